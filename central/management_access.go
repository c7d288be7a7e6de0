package central

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/text"
)

// accessService implements musterv1connect.AccessServiceHandler.
type accessService struct {
	*Server
	musterv1connect.UnimplementedAccessServiceHandler
}

func (s accessService) coded(ctx context.Context, verb string, err error) error {
	return management{Server: s.Server}.coded(ctx, verb, err)
}

// How long credentials hold if nobody says otherwise, and at most.
const (
	personalLife   = 30 * 24 * time.Hour
	tokenLife      = 90 * 24 * time.Hour
	maxTokenLife   = 366 * 24 * time.Hour
	invitationLife = 7 * 24 * time.Hour
	maxInvitation  = 30 * 24 * time.Hour
	maxTokens      = 200 // of one holder
)

func lifeOf(seconds uint64, normal, most time.Duration) (time.Duration, error) {
	switch {
	case seconds == 0:
		return normal, nil
	case seconds > uint64(most/time.Second):
		return 0, invalid("it holds for at most %d hours", most/time.Hour)
	}
	return time.Duration(seconds) * time.Second, nil
}

// tokenLifeOf is how long a token of somebody may hold. What the identity
// provider says of a person is known when they log in and not between, so
// their tokens end sooner.
func (s accessService) tokenLifeOf(holder string, seconds uint64) (time.Duration, error) {
	if fromProvider(holder) && s.provider != nil {
		most := s.provider.cfg.TokenLife()
		return lifeOf(seconds, min(tokenLife, most), most)
	}
	return lifeOf(seconds, tokenLife, maxTokenLife)
}

// userName checks the name of a person or group.
func userName(s string) (string, error) {
	clean := text.Clean(strings.TrimSpace(s), 128)
	if clean == "" || clean != s || strings.ContainsAny(s, " :\"'<>&") {
		return "", invalid("%.80q is no name: want 1 to 128 characters without spaces, colons, quotes and brackets", s)
	}
	return clean, nil
}

func subjectOf(s string) (string, error) {
	kind, name, found := strings.Cut(s, ":")
	if !found {
		kind, name = "user", s
	}
	if kind != "user" && kind != "group" {
		return "", invalid("subject %.80q: want user:NAME or group:NAME", s)
	}
	name, err := userName(name)
	return kind + ":" + name, err
}

func bindingFrom(tenant, role, sites string) (access.Binding, error) {
	b := access.Binding{Tenant: tenant}
	var err error
	if b.Role, err = access.ParseRole(role); err != nil {
		return b, invalid("%v", err)
	}
	if b.Sites, err = fleet.ParseSelector(sites); err != nil {
		return b, invalid("%v", err)
	}
	if err := b.Validate(); err != nil {
		return b, invalid("%v", err)
	}
	return b, nil
}

// covers refuses to give what the caller does not have.
func (c caller) covers(b access.Binding) error {
	if access.Covers(c.Bindings, b) && (!c.Bounded || access.Covers(c.Owner, b)) {
		return nil
	}
	return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("you are not %s yourself, so you cannot give that", b))
}

// Login implements the access service.
func (s accessService) Login(ctx context.Context, q *musterv1.LoginRequest) (*musterv1.LoginResponse, error) {
	c := callerOf(ctx)
	var who identity
	var err error
	switch {
	case q.Token != "" && q.Code == "":
		who, err = s.loginByToken(ctx, q.Token, c.source)
	case q.Code != "" && q.Token == "":
		who, err = s.provider.redeem(ctx, q.Code, q.Verifier)
	default:
		return nil, invalid("want a token, or a code with its verifier")
	}
	if err != nil {
		return nil, s.coded(ctx, "logging in", err)
	}
	personal := personalLife
	if who.life > 0 {
		personal = who.life
	}
	cred, token := newCredential(store.CredentialPersonal, who.name, who.tenant, s.cfg.Now(), personal)
	cred.Groups, cred.Source = who.groups, c.source
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: userSubject(who.name), source: c.source, now: s.cfg.Now()}
		if err := t.AddCredential(cred); err != nil {
			return err
		}
		return by.record(t, auditTenant(who.tenant), audit.TokenCreated, "token/"+cred.ID, nil,
			map[string]any{"kind": cred.Kind, "user": who.name, "groups": who.groups, "by": who.how, "expires": cred.Expires}, "")
	})
	if err != nil {
		return nil, s.coded(ctx, "logging in", err)
	}
	return &musterv1.LoginResponse{Token: token, User: who.name, Tenant: auditTenant(who.tenant), Expires: timestamppb.New(cred.Expires)}, nil
}

// WhoAmI implements the access service.
func (s accessService) WhoAmI(ctx context.Context, _ *musterv1.WhoAmIRequest) (*musterv1.WhoAmIResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.WhoAmIResponse{User: c.Name, Tenant: c.Tenant, Role: c.Role().String(), Source: c.source, Credential: c.Via}
	for _, b := range c.Bindings {
		out.Roles = append(out.Roles, roleToProto(b))
	}
	err := s.store.View(ctx, func(t store.Reader) error {
		cred, err := t.Credential(c.Via)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		out.Kind, out.Groups, out.Expires = string(cred.Kind), cred.Groups, stampOf(cred.Expires)
		return err
	})
	return out, s.coded(ctx, "reading the credential", err)
}

// Logout implements the access service.
func (s accessService) Logout(ctx context.Context, _ *musterv1.LogoutRequest) (*musterv1.LogoutResponse, error) {
	c := callerOf(ctx)
	err := s.store.Update(ctx, func(t store.Tx) error {
		cred, err := t.Credential(c.Via)
		if err != nil {
			return err
		}
		return s.endCredential(t, c.act(s.cfg.Now()), cred, "logged out")
	})
	return &musterv1.LogoutResponse{}, s.coded(ctx, "logging out", err)
}

// endCredential revokes a credential and says so.
func (s accessService) endCredential(t store.Tx, by act, c store.Credential, reason string) error {
	if err := t.RevokeCredential(c.ID, by.now); err != nil {
		return err
	}
	return by.record(t, auditTenant(c.Tenant), audit.TokenRevoked, "token/"+c.ID, map[string]any{"kind": c.Kind, "user": c.Holder, "name": c.Name}, nil, reason)
}

// CreateToken implements the access service.
func (s accessService) CreateToken(ctx context.Context, q *musterv1.CreateTokenRequest) (*musterv1.CreateTokenResponse, error) {
	c := callerOf(ctx)
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if c.Bounded {
		return nil, connect.NewError(connect.CodePermissionDenied, errors.New("a token makes no tokens: log in and make it yourself"))
	}
	if err := fleet.ValidateName("token", q.Name); err != nil {
		return nil, invalid("%v", err)
	}
	life, err := s.tokenLifeOf(c.Name, q.ExpiresSeconds)
	if err != nil {
		return nil, err
	}
	scope, err := bindingFrom(c.Tenant, q.Role, q.Sites)
	if err != nil {
		return nil, err
	}
	if err := c.covers(scope); err != nil {
		return nil, err
	}
	cred, secret := newCredential(store.CredentialToken, c.Name, c.Tenant, s.cfg.Now(), life)
	cred.Name, cred.Scopes, cred.CreatedBy, cred.Source = q.Name, []access.Binding{scope}, c.actor(), c.source
	err = s.store.Update(ctx, func(t store.Tx) error {
		if own, err := t.Credential(c.Via); err == nil {
			cred.Groups = own.Groups // what the holder has by them bounds the token, too
		} else if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		have, err := t.CredentialsOf(c.Name, store.CredentialToken, maxCredentials)
		if err != nil {
			return err
		}
		live := 0
		for _, h := range have {
			if h.Ended(s.cfg.Now()) != "" {
				continue
			}
			if live++; h.Name == q.Name {
				return &enroll.Refused{Why: fmt.Sprintf("you have a token %q already", q.Name), Do: "revoke it (muster token revoke " + h.ID + "), or give another name"}
			}
		}
		if live >= maxTokens {
			return &enroll.Refused{Why: fmt.Sprintf("you have %d tokens", live), Do: "revoke some: muster token list"}
		}
		if err := t.AddCredential(cred); err != nil {
			return err
		}
		return c.act(s.cfg.Now()).record(t, c.Tenant, audit.TokenCreated, "token/"+cred.ID, nil,
			map[string]any{"kind": cred.Kind, "user": c.Name, "name": cred.Name, "scopes": cred.Scopes, "expires": cred.Expires}, reason)
	})
	if err != nil {
		return nil, s.coded(ctx, "making the token", err)
	}
	return &musterv1.CreateTokenResponse{Token: s.tokenToProto(cred), Secret: secret}, nil
}

// listedKinds are what `muster token list` shows.
var listedKinds = []store.CredentialKind{store.CredentialToken, store.CredentialPersonal, store.CredentialSession, store.CredentialInvitation, store.CredentialStart}

// ListTokens implements the access service.
func (s accessService) ListTokens(ctx context.Context, q *musterv1.ListTokensRequest) (*musterv1.ListTokensResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListTokensResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		if q.All {
			if err := c.part(t).may(access.Token, access.Read, ""); err != nil {
				return err
			}
		}
		for _, kind := range listedKinds {
			var all []store.Credential
			if q.All {
				homes := []string{c.Tenant}
				if c.Central() >= access.Admin {
					homes = append(homes, access.AllTenants)
				}
				for _, home := range homes {
					some, err := t.Credentials(home, kind, "", maxList)
					if err != nil {
						return err
					}
					all = append(all, some...)
				}
			} else if all, err = t.CredentialsOf(c.Name, kind, maxList); err != nil {
				return err
			}
			for _, cred := range all {
				cred.LastUsed = s.usage.newer(cred.ID, cred.LastUsed)
				if q.Ended || cred.Ended(s.cfg.Now()) == "" {
					out.Tokens = append(out.Tokens, s.tokenToProto(cred))
				}
			}
		}
		return nil
	})
	return out, s.coded(ctx, "listing tokens", err)
}

// RevokeToken implements the access service.
func (s accessService) RevokeToken(ctx context.Context, q *musterv1.RevokeTokenRequest) (*musterv1.RevokeTokenResponse, error) {
	c := callerOf(ctx)
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	var cred store.Credential
	err = s.store.Update(ctx, func(t store.Tx) (err error) {
		if cred, err = s.findToken(t, c, q.Id); err != nil {
			return err
		}
		if why := cred.Ended(s.cfg.Now()); why != "" {
			return &enroll.Refused{Why: fmt.Sprintf("token %s %s already", cred.ID, why)}
		}
		cred.Revoked = s.cfg.Now().UTC()
		return s.endCredential(t, c.act(s.cfg.Now()), cred, reason)
	})
	if err != nil {
		return nil, s.coded(ctx, "revoking", err)
	}
	return &musterv1.RevokeTokenResponse{Token: s.tokenToProto(cred)}, nil
}

// findToken finds one of the caller's own credentials, or, for admins, of the
// tenant.
func (s accessService) findToken(t store.Reader, c caller, id string) (store.Credential, error) {
	none := &errNoSuch{fmt.Sprintf("there is no token %.80q that you may revoke", id), "`muster token list` lists them"}
	if id == "" || len(id) > 64 {
		return store.Credential{}, none
	}
	var found []store.Credential
	match := func(all []store.Credential) {
		for _, cred := range all {
			known := slices.ContainsFunc(found, func(f store.Credential) bool { return f.ID == cred.ID })
			if !known && (cred.ID == id || cred.Name == id && cred.Ended(s.cfg.Now()) == "" || cred.Prefix == id) {
				found = append(found, cred)
			}
		}
	}
	may := access.Allow(c.Principal, access.Change, access.Object{Kind: access.Token, Tenant: c.Tenant}).Answer == access.Allowed
	for _, kind := range listedKinds {
		own, err := t.CredentialsOf(c.Name, kind, maxCredentials)
		if err != nil {
			return store.Credential{}, err
		}
		match(own)
		if !may {
			continue
		}
		homes := []string{c.Tenant}
		if c.Central() >= access.Admin {
			homes = append(homes, access.AllTenants)
		}
		for _, home := range homes {
			all, err := t.Credentials(home, kind, "", maxCredentials)
			if err != nil {
				return store.Credential{}, err
			}
			match(all)
		}
	}
	switch len(found) {
	case 0:
		return store.Credential{}, none
	case 1:
		return found[0], nil
	}
	var fits []string
	for _, f := range found[:min(len(found), 6)] {
		fits = append(fits, f.ID+" ("+f.Holder+")")
	}
	return store.Credential{}, &errAmbiguous{id, fits}
}

// ListBindings implements the access service.
func (s accessService) ListBindings(ctx context.Context, _ *musterv1.ListBindingsRequest) (*musterv1.ListBindingsResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListBindingsResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		homes := []string{c.Tenant}
		if c.Central() >= access.Admin {
			homes = append(homes, access.AllTenants)
		}
		for _, home := range homes {
			all, err := t.Bindings(home)
			if err != nil {
				return err
			}
			for _, b := range all {
				out.Bindings = append(out.Bindings, bindingToProto(b))
			}
		}
		return nil
	})
	return out, s.coded(ctx, "listing roles", err)
}

// Grant implements the access service.
func (s accessService) Grant(ctx context.Context, q *musterv1.GrantRequest) (*musterv1.GrantResponse, error) {
	c := callerOf(ctx)
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	b := store.Binding{}
	if b.Subject, err = subjectOf(q.Subject); err != nil {
		return nil, err
	}
	tenant := c.Tenant
	if q.Centre {
		tenant = access.AllTenants
	}
	if b.Binding, err = bindingFrom(tenant, q.Role, q.Sites); err != nil {
		return nil, err
	}
	if err := c.covers(b.Binding); err != nil {
		return nil, err
	}
	err = s.store.Update(ctx, func(t store.Tx) (err error) {
		b, err = grant(t, c.act(s.cfg.Now()), b, reason)
		return err
	})
	if err != nil {
		return nil, s.coded(ctx, "granting", err)
	}
	return &musterv1.GrantResponse{Binding: bindingToProto(b)}, nil
}

// Revoke implements the access service.
func (s accessService) Revoke(ctx context.Context, q *musterv1.RevokeRequest) (*musterv1.RevokeResponse, error) {
	c := callerOf(ctx)
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if (q.Id == "") == (q.Subject == "") {
		return nil, invalid("want the ID of a role binding, or a subject")
	}
	subject := ""
	if q.Subject != "" {
		if subject, err = subjectOf(q.Subject); err != nil {
			return nil, err
		}
	}
	out := &musterv1.RevokeResponse{}
	err = s.store.Update(ctx, func(t store.Tx) error {
		out.Revoked = nil
		homes := []string{c.Tenant}
		if c.Central() >= access.Admin {
			homes = append(homes, access.AllTenants)
		}
		for _, home := range homes {
			all, err := t.Bindings(home)
			if err != nil {
				return err
			}
			for _, b := range all {
				if b.ID != q.Id && b.Subject != subject {
					continue
				}
				if err := revokeBinding(t, c.act(s.cfg.Now()), b, reason); err != nil {
					return err
				}
				out.Revoked = append(out.Revoked, bindingToProto(b))
			}
		}
		if len(out.Revoked) == 0 {
			return &errNoSuch{fmt.Sprintf("there is no role of %.80q in tenant %s", q.Id+subject, c.Tenant), "`muster access list` lists them"}
		}
		return nil
	})
	if err != nil {
		return nil, s.coded(ctx, "revoking", err)
	}
	return out, nil
}

// Invite implements the access service.
func (s accessService) Invite(ctx context.Context, q *musterv1.InviteRequest) (*musterv1.InviteResponse, error) {
	c := callerOf(ctx)
	b, err := bindingFrom(c.Tenant, q.Role, q.Sites)
	if err != nil {
		return nil, err
	}
	if err := c.covers(b); err != nil {
		return nil, err
	}
	cred, secret, err := s.invite(ctx, c, q.User, b, q.ExpiresSeconds, q.Reason, false)
	if err != nil {
		return nil, err
	}
	return &musterv1.InviteResponse{Token: s.tokenToProto(cred), Secret: secret}, nil
}

func (s accessService) invite(ctx context.Context, c caller, user string, b access.Binding, seconds uint64, why string, handOver bool) (cred store.Credential, secret string, err error) {
	reason, err := reasonOf(why, handOver)
	if err != nil {
		return cred, "", err
	}
	if user, err = userName(user); err != nil {
		return cred, "", err
	}
	if fromProvider(user) {
		return cred, "", s.coded(ctx, "inviting", &enroll.Refused{
			Why: "names that begin with " + providerPrefix + " are of people who log in at the identity provider",
			Do:  "give them a role: muster access grant " + user + " --role ROLE",
		})
	}
	life, err := lifeOf(seconds, invitationLife, maxInvitation)
	if err != nil {
		return cred, "", err
	}
	cred, secret = newCredential(store.CredentialInvitation, user, b.Tenant, s.cfg.Now(), life)
	cred.Grants, cred.HandOver, cred.CreatedBy, cred.Source = []access.Binding{b}, handOver, c.actor(), c.source
	err = s.store.Update(ctx, func(t store.Tx) error {
		if user == localAdmin {
			return &enroll.Refused{Why: "the name " + localAdmin + " is the host's administrator", Do: "choose another name"}
		}
		if _, err := t.Tenant(b.Tenant); errors.Is(err, store.ErrNotFound) {
			return noTenant(b.Tenant)
		} else if err != nil {
			return err
		}
		if err := t.AddCredential(cred); err != nil {
			return err
		}
		return c.act(s.cfg.Now()).record(t, b.Tenant, audit.TokenCreated, "token/"+cred.ID, nil,
			map[string]any{"kind": cred.Kind, "user": user, "grants": cred.Grants, "hand_over": handOver, "expires": cred.Expires}, reason)
	})
	return cred, secret, s.coded(ctx, "inviting", err)
}

// ListTenants implements the access service.
func (s accessService) ListTenants(ctx context.Context, _ *musterv1.ListTenantsRequest) (*musterv1.ListTenantsResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListTenantsResponse{}
	err := s.store.View(ctx, func(t store.Reader) error {
		all, err := t.Tenants()
		for _, v := range all {
			in := c.Principal
			if in.Tenant = v.Name; in.Role() != access.None {
				out.Tenants = append(out.Tenants, api.TenantToProto(v))
			}
		}
		return err
	})
	return out, s.coded(ctx, "listing tenants", err)
}

// CreateTenant implements the access service.
func (s accessService) CreateTenant(ctx context.Context, q *musterv1.CreateTenantRequest) (*musterv1.CreateTenantResponse, error) {
	c := callerOf(ctx)
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	tenant := fleet.Tenant{Meta: fleet.Meta{Tenant: q.Name, Name: q.Name, Generation: 1, Created: now, Updated: now}, Title: text.Clean(q.Title, 256)}
	if err := tenant.Validate(); err != nil {
		return nil, invalid("%v", err)
	}
	err = s.store.Update(ctx, func(t store.Tx) (err error) {
		if tenant, err = t.PutTenant(tenant); errors.Is(err, store.ErrExists) {
			return &enroll.Refused{Why: fmt.Sprintf("there is a tenant %q already", q.Name)}
		} else if err != nil {
			return err
		}
		// In its own chain, which begins with who made it.
		return c.act(now).record(t, tenant.Name, audit.TenantCreated, "tenant/"+tenant.Name, nil, tenant, reason)
	})
	if err != nil {
		return nil, s.coded(ctx, "making the tenant", err)
	}
	return &musterv1.CreateTenantResponse{Tenant: api.TenantToProto(tenant)}, nil
}

// HandOverTenant implements the access service.
func (s accessService) HandOverTenant(ctx context.Context, q *musterv1.HandOverTenantRequest) (*musterv1.HandOverTenantResponse, error) {
	c := callerOf(ctx)
	if q.Name != c.Tenant && c.Central() < access.Admin {
		return nil, s.coded(ctx, "handing over", noTenant(q.Name))
	}
	if q.Name == DefaultTenant {
		return nil, s.coded(ctx, "handing over", &enroll.Refused{
			Why: "the tenant " + DefaultTenant + " belongs to whoever runs the centre: its log holds what is done to the centre itself",
			Do:  "make a tenant for the other owner: muster tenant create NAME",
		})
	}
	if err := s.provider.mayHandOver(q.Name); err != nil {
		return nil, s.coded(ctx, "handing over", err)
	}
	b, err := bindingFrom(q.Name, access.Admin.String(), "")
	if err != nil {
		return nil, err
	}
	if err := c.covers(b); err != nil {
		return nil, err
	}
	cred, secret, err := s.invite(ctx, c, q.User, b, q.ExpiresSeconds, q.Reason, true)
	if err != nil {
		return nil, err
	}
	return &musterv1.HandOverTenantResponse{Token: s.tokenToProto(cred), Secret: secret}, nil
}

func roleToProto(b access.Binding) *musterv1.RoleBinding {
	return &musterv1.RoleBinding{Tenant: b.Tenant, Role: b.Role.String(), Sites: b.Sites.String()}
}

func bindingToProto(b store.Binding) *musterv1.RoleBinding {
	m := roleToProto(b.Binding)
	m.Id, m.Subject, m.Created, m.CreatedBy, m.Reason = b.ID, b.Subject, stampOf(b.Created), b.CreatedBy, b.Reason
	return m
}

func stampOf(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func (s accessService) tokenToProto(c store.Credential) *musterv1.AccessToken {
	m := &musterv1.AccessToken{
		Id: c.ID, Kind: string(c.Kind), Name: c.Name, Holder: c.Holder, Prefix: c.Prefix, Created: stampOf(c.Created), Expires: stampOf(c.Expires),
		LastUsed: stampOf(c.LastUsed), Revoked: stampOf(c.Revoked), Ended: c.Ended(s.cfg.Now()), Source: c.Source, Tenant: c.Tenant,
	}
	for _, b := range append(slices.Clone(c.Scopes), c.Grants...) {
		m.Scopes = append(m.Scopes, roleToProto(b))
	}
	return m
}
