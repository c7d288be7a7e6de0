package central

import (
	"context"
	"errors"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

// Browser sessions: SessionPrincipal says who sends a request, openSession and
// closeSession begin and end one. The one door to them is the console's log-in
// page, with its form tokens and its limit on guessing.
//
// A session is a row with the SHA-256 of the cookie's value. It ends after an
// hour without use, twelve hours in any case, by logging out and by being
// revoked. Every log-in makes a new value, so that one that was planted in a
// browser before is worth nothing.
const (
	sessionCookie = "__Host-muster"
	// TenantCookie holds the tenant that a person with several looks at.
	TenantCookie = "__Host-muster-tenant"
	sessionLife  = 12 * time.Hour
	sessionIdle  = time.Hour
)

var (
	// ErrNoSession: nobody is logged in.
	ErrNoSession = errors.New("central: nobody is logged in")

	errNoPrincipal = errors.New("central: call inside: the context carries no principal")
)

// SessionPrincipal returns who sends the request. The error is ErrNoSession if
// nobody is logged in (any more); another error is a fault of ours.
func (s *Server) SessionPrincipal(r *http.Request) (access.Principal, error) {
	value := cookieOf(r, sessionCookie)
	if value == "" {
		return access.Principal{}, ErrNoSession
	}
	kinds := map[store.CredentialKind]bool{store.CredentialSession: true}
	source := sourceOf(r.RemoteAddr)
	p, err := s.principalOfToken(r.Context(), value, cookieOf(r, TenantCookie), source, kinds)
	if connect.CodeOf(err) == connect.CodeNotFound && cookieOf(r, TenantCookie) != "" {
		// The tenant of yesterday may be handed over by now.
		p, err = s.principalOfToken(r.Context(), value, "", source, kinds)
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated, connect.CodeNotFound:
		if err != nil {
			return p, ErrNoSession
		}
	}
	return p, err
}

func cookieOf(r *http.Request, name string) string {
	c, err := r.Cookie(name)
	if err != nil || len(c.Value) > 128 {
		return ""
	}
	return c.Value
}

// newCredential makes a credential and its secret.
func newCredential(kind store.CredentialKind, holder, tenant string, now time.Time, life time.Duration) (store.Credential, string) {
	token, hash := newToken()
	c := store.Credential{
		ID: "c-" + randomID(), Hash: hash, Tenant: tenant, Kind: kind, Holder: holder, Created: now.UTC(), LastUsed: now.UTC(),
		Prefix: token[:len(tokenPrefix)+6],
	}
	if life > 0 {
		c.Expires = now.Add(life).UTC()
	}
	return c, token
}

// openSession logs somebody in: it makes a session for a person, ends the one
// that the browser had, and sets the cookie.
func (s *Server) openSession(ctx context.Context, w http.ResponseWriter, r *http.Request, who identity) error {
	life := sessionLife
	if who.life > 0 {
		life = who.life
	}
	cred, token := newCredential(store.CredentialSession, who.name, who.tenant, s.cfg.Now(), life)
	cred.Idle, cred.Groups, cred.Source = sessionIdle, who.groups, sourceOf(r.RemoteAddr)
	old := hashToken(cookieOf(r, sessionCookie))
	err := s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: userSubject(who.name), source: cred.Source, now: s.cfg.Now()}
		if c, err := t.CredentialByHash(old); err == nil && c.Kind == store.CredentialSession {
			if err := t.RevokeCredential(c.ID, by.now); err != nil {
				return err
			}
		} else if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err := t.AddCredential(cred); err != nil {
			return err
		}
		return by.record(t, auditTenant(who.tenant), audit.LoggedIn, "session/"+cred.ID, nil, map[string]any{"user": who.name, "groups": who.groups, "by": who.how, "expires": cred.Expires}, "")
	})
	if err != nil {
		return err
	}
	http.SetCookie(w, sessionCookieOf(token, life))
	return nil
}

// auditTenant is whose chain has what is done to the centre as a whole.
func auditTenant(tenant string) string {
	if tenant == access.AllTenants || tenant == "" {
		return DefaultTenant
	}
	return tenant
}

func sessionCookieOf(value string, life time.Duration) *http.Cookie {
	return &http.Cookie{
		Name: sessionCookie, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode,
		MaxAge: int(life / time.Second),
	}
}

// closeSession ends the browser's session.
func (s *Server) closeSession(w http.ResponseWriter, r *http.Request) error {
	value := cookieOf(r, sessionCookie)
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode, MaxAge: -1})
	if value == "" {
		return nil
	}
	return s.store.Update(r.Context(), func(t store.Tx) error {
		c, err := t.CredentialByHash(hashToken(value))
		if errors.Is(err, store.ErrNotFound) || err == nil && (c.Kind != store.CredentialSession || !c.Revoked.IsZero()) {
			return nil
		}
		if err != nil {
			return err
		}
		by := act{actor: userSubject(c.Holder), source: sourceOf(r.RemoteAddr), now: s.cfg.Now()}
		if err := t.RevokeCredential(c.ID, by.now); err != nil {
			return err
		}
		return by.record(t, auditTenant(c.Tenant), audit.LoggedOut, "session/"+c.ID, nil, nil, "")
	})
}
