// Package access decides who may do what: one table of kinds of objects and
// verbs, and one function over it. It knows nothing of tokens, sessions or
// databases: who calls is a Principal, resolved once per call, and what is
// called upon is an Object.
//
// Three answers exist. Allowed; Forbidden, for somebody who may know that the
// object is there; and Hidden, for everybody else: the caller is told the same
// as if there were no such object, so that nobody learns names of a foreign
// tenant or of a site outside of their part.
package access

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// Role is what somebody may do; each includes those before it.
type Role uint8

// The roles.
const (
	None Role = iota
	Viewer
	Approver
	Operator
	Admin
)

var roleNames = [...]string{"none", "viewer", "approver", "operator", "admin"}

// String returns the word of the CLI and the API.
func (r Role) String() string {
	if int(r) < len(roleNames) {
		return roleNames[r]
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// ParseRole reads one of viewer, approver, operator, admin.
func ParseRole(s string) (Role, error) {
	if i := slices.Index(roleNames[1:], s); i >= 0 {
		return Role(i + 1), nil
	}
	return None, fmt.Errorf("access: role %.40q is none of %s", s, strings.Join(roleNames[1:], ", "))
}

// MarshalText implements encoding.TextMarshaler.
func (r Role) MarshalText() ([]byte, error) {
	if r == None || int(r) >= len(roleNames) {
		return nil, errors.New("access: write role: it is not set")
	}
	return []byte(r.String()), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Role) UnmarshalText(b []byte) error {
	v, err := ParseRole(string(b))
	if err == nil {
		*r = v
	}
	return err
}

// AllTenants as the tenant of a binding means the centre itself: every tenant,
// and what stands above them (tenants, EK roots, the boot role).
const AllTenants = "*"

// Binding gives a role in one tenant, at all of its sites or at those that a
// selector picks.
type Binding struct {
	// Tenant is a name or AllTenants.
	Tenant string `json:"tenant"`
	Role   Role   `json:"role"`
	// Sites limits the role to sites with these labels; "muster/site=NAME"
	// names one. Empty: no limit, and only then also what belongs to no site.
	Sites fleet.Selector `json:"sites,omitzero"`
}

// Validate reports all problems of the binding.
func (b Binding) Validate() error {
	var errs []error
	if b.Tenant != AllTenants {
		errs = append(errs, fleet.ValidateName("tenant", b.Tenant))
	}
	if b.Role == None || b.Role > Admin {
		errs = append(errs, fmt.Errorf("access: role %d does not exist", b.Role))
	}
	if b.Tenant == AllTenants && !b.Sites.Empty() {
		errs = append(errs, errors.New("access: a role in all tenants cannot be limited to sites: labels mean something else in each tenant"))
	}
	if b.Role == Admin && !b.Sites.Empty() {
		errs = append(errs, errors.New("access: an admin cannot be limited to sites: who gives out roles could give the limit away; make it an operator"))
	}
	return errors.Join(errs...)
}

// String is the binding in words.
func (b Binding) String() string {
	s := b.Role.String() + " of tenant " + b.Tenant
	if b.Tenant == AllTenants {
		s = b.Role.String() + " of the centre"
	}
	if !b.Sites.Empty() {
		s += " at sites " + b.Sites.String()
	}
	return s
}

// in reports whether the binding is of a tenant.
func (b Binding) in(tenant string) bool { return b.Tenant == tenant || b.Tenant == AllTenants }

// Covers reports whether the bindings give at least what b gives: nobody
// hands on more than they have. A limited role is covered by an unlimited
// one, or by one with the same limit.
func Covers(have []Binding, b Binding) bool {
	return slices.ContainsFunc(have, func(h Binding) bool {
		return (h.Tenant == AllTenants || h.Tenant == b.Tenant) && h.Role >= b.Role &&
			(h.Sites.Empty() || h.Sites.String() == b.Sites.String())
	})
}

// Principal is who makes a call.
type Principal struct {
	// Name is the person's or the token's owner's name.
	Name string
	// Via is the public ID of the credential that was shown, "" on the host.
	Via string
	// Source is the network address the call comes from.
	Source string
	// Tenant is the one tenant that this call acts in.
	Tenant   string
	Bindings []Binding
	// Bounded says that Bindings hold only as far as Owner's do: the scopes of
	// a token never exceed what its owner may today.
	Bounded bool
	Owner   []Binding
}

// Actor is the principal's name in the audit log.
func (p Principal) Actor() string { return "user:" + p.Name }

// Role is the highest role in the tenant of the call, at whatever sites.
func (p Principal) Role() Role {
	return p.best(func(b Binding) bool { return b.in(p.Tenant) })
}

// best is the highest role of the bindings that fit, bounded by the owner's.
func (p Principal) best(fits func(Binding) bool) Role {
	top := func(all []Binding) (r Role) {
		for _, b := range all {
			if fits(b) {
				r = max(r, b.Role)
			}
		}
		return r
	}
	r := top(p.Bindings)
	if p.Bounded {
		r = min(r, top(p.Owner))
	}
	return r
}

// Unlimited is the highest role in the tenant that has no limit to sites.
func (p Principal) Unlimited() Role {
	return p.best(func(b Binding) bool { return b.in(p.Tenant) && b.Sites.Empty() })
}

// Central is the highest role over the centre itself.
func (p Principal) Central() Role {
	return p.best(func(b Binding) bool { return b.Tenant == AllTenants })
}

// At is the highest role at a site with these labels (Site.SelectLabels).
func (p Principal) At(labels map[string]string) Role {
	return p.best(func(b Binding) bool { return b.in(p.Tenant) && b.Sites.Matches(labels) })
}

type contextKey struct{}

// NewContext returns a context that carries the principal. Only code that has
// authenticated somebody may make one.
func NewContext(ctx context.Context, p Principal) context.Context {
	return context.WithValue(ctx, contextKey{}, p)
}

// FromContext returns who makes the call.
func FromContext(ctx context.Context) (Principal, bool) {
	p, ok := ctx.Value(contextKey{}).(Principal)
	return p, ok
}
