package central

import (
	"context"
	"errors"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet/audit"
)

// identity is a person who has proven who they are.
type identity struct {
	name   string
	groups []string
	// tenant is where they act unless they say otherwise.
	tenant string
	// life is how long the log-in holds; 0: as long as those of others.
	life time.Duration
	// how says what they proved it by, for the audit log.
	how string
}

// loginKinds are the credentials that a person may log in with. Those that
// open the door once are used up by it.
var loginKinds = map[store.CredentialKind]bool{store.CredentialStart: true, store.CredentialInvitation: true, store.CredentialPersonal: true}

var errBadToken = connect.NewError(connect.CodeUnauthenticated, errors.New("this token is not known here, was used already, or has ended"))

// loginByToken proves who somebody is by a token. A start token or an
// invitation is used up in the same transaction; the start token's file gets a
// new one.
func (s *Server) loginByToken(ctx context.Context, token, source string) (who identity, err error) {
	if !strings.HasPrefix(token, tokenPrefix) || len(token) > 128 {
		return who, errBadToken
	}
	var used store.Credential
	// A look first: strangers with wrong tokens shall not keep the one writer
	// busy.
	err = s.store.View(ctx, func(t store.Reader) error {
		_, err := t.CredentialByHash(hashToken(token))
		if errors.Is(err, store.ErrNotFound) {
			return errBadToken
		}
		return err
	})
	if err != nil {
		return identity{}, err
	}
	err = s.store.Update(ctx, func(t store.Tx) error {
		c, err := t.CredentialByHash(hashToken(token))
		if errors.Is(err, store.ErrNotFound) || err == nil && (!loginKinds[c.Kind] || c.Ended(s.cfg.Now()) != "") {
			return errBadToken
		}
		if err != nil {
			return err
		}
		used = c
		who = identity{name: c.Holder, groups: c.Groups, tenant: c.Tenant, how: string(c.Kind) + " " + c.ID}
		if c.Kind == store.CredentialPersonal {
			return nil
		}
		by := act{actor: userSubject(c.Holder), source: source, now: s.cfg.Now()}
		if err := t.RevokeCredential(c.ID, by.now); err != nil {
			return err
		}
		if err := by.record(t, auditTenant(c.Tenant), audit.TokenUsedUp, "token/"+c.ID, nil, map[string]any{"kind": c.Kind, "user": c.Holder}, ""); err != nil {
			return err
		}
		if c.Kind == store.CredentialInvitation {
			return s.acceptInvitation(t, by, c)
		}
		return nil
	})
	if err != nil {
		return identity{}, err
	}
	if used.Kind == store.CredentialStart {
		// The host stays able to administer its own centre.
		if err := s.newStartToken(ctx); err != nil {
			s.log.Error("no new "+AdminFile+"; delete it and start the centre again to get one", logError, err)
		}
	}
	return who, nil
}

// acceptInvitation gives the newcomer their roles. A tenant that is handed
// over loses all others.
func (s *Server) acceptInvitation(t store.Tx, by act, c store.Credential) error {
	if c.HandOver {
		if err := s.provider.mayHandOver(c.Tenant); err != nil {
			return err
		}
		if err := s.clearTenant(t, by, c); err != nil {
			return err
		}
	}
	for _, g := range c.Grants {
		if _, err := grant(t, by, store.Binding{Binding: g, Subject: userSubject(c.Holder)}, "invitation "+c.ID+" by "+c.CreatedBy); err != nil {
			return err
		}
	}
	return nil
}

// clearTenant ends all roles, tokens and sessions that others have in a tenant
// that gets a new owner. Roles over the centre stay: whoever runs the host
// cannot be shut out of it, and says so in the audit log when they look.
func (s *Server) clearTenant(t store.Tx, by act, c store.Credential) error {
	bindings, err := t.Bindings(c.Tenant)
	if err != nil {
		return err
	}
	for _, b := range bindings {
		if err := revokeBinding(t, by, b, "the tenant was handed over to "+c.Holder); err != nil {
			return err
		}
	}
	for _, kind := range []store.CredentialKind{store.CredentialToken, store.CredentialPersonal, store.CredentialSession, store.CredentialInvitation} {
		all, err := t.Credentials(c.Tenant, kind, "", maxCredentials)
		if err != nil {
			return err
		}
		for _, o := range all {
			if o.ID == c.ID || o.Ended(by.now) != "" {
				continue
			}
			if err := t.RevokeCredential(o.ID, by.now); err != nil {
				return err
			}
			if err := by.record(t, c.Tenant, audit.TokenRevoked, "token/"+o.ID, nil, map[string]any{"kind": o.Kind, "user": o.Holder, "name": o.Name}, "the tenant was handed over to "+c.Holder); err != nil {
				return err
			}
		}
	}
	return by.record(t, c.Tenant, audit.TenantHandedOver, "tenant/"+c.Tenant, map[string]any{"bindings": len(bindings)}, map[string]any{"admin": c.Holder}, "")
}

// maxCredentials bounds what one transaction looks at.
const maxCredentials = 10000

// grant adds a binding unless the subject has it already.
func grant(t store.Tx, by act, b store.Binding, reason string) (store.Binding, error) {
	have, err := t.BindingsOf(b.Subject)
	if err != nil {
		return b, err
	}
	for _, h := range have {
		if h.Binding.String() == b.Binding.String() {
			return h, nil
		}
	}
	b.ID, b.Created, b.CreatedBy, b.Reason = "b-"+randomID(), by.now.UTC(), by.actor, reason
	if err := t.AddBinding(b); err != nil {
		return b, err
	}
	return b, by.record(t, auditTenant(b.Tenant), audit.RoleGranted, "binding/"+b.ID, nil, bindingForAudit(b), reason)
}

func revokeBinding(t store.Tx, by act, b store.Binding, reason string) error {
	if err := t.DropBinding(b.Tenant, b.ID); err != nil {
		return err
	}
	return by.record(t, auditTenant(b.Tenant), audit.RoleRevoked, "binding/"+b.ID, bindingForAudit(b), nil, reason)
}

func bindingForAudit(b store.Binding) any {
	return map[string]any{"subject": b.Subject, "tenant": b.Tenant, "role": b.Role, "sites": b.Sites.String()}
}
