package central

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

// Browser sessions. What the console needs of them:
//
//   - SessionPrincipal: who sends this request, or why nobody.
//   - CheckForm: whether a request that changes something comes from one of our
//     own pages; CSRFToken is what those pages put into their forms (field
//     "csrf") or headers (X-CSRF-Token).
//   - POST /auth/login (field token), POST /auth/logout, GET /auth/oidc: see
//     addLogin. A page that wants somebody logged in redirects to LoginPath
//     with ?next=/path.
//
// A session is a row with the SHA-256 of the cookie's value. It ends after an
// hour without use, twelve hours in any case, by logging out and by being
// revoked. Every log-in makes a new value, so that one that was planted in a
// browser before is worth nothing.
const (
	// LoginPath is the page on which people log in. The console serves it.
	LoginPath = "/login"

	sessionCookie = "__Host-muster"
	// TenantCookie holds the tenant that a person with several looks at.
	TenantCookie = "__Host-muster-tenant"
	sessionLife  = 12 * time.Hour
	sessionIdle  = time.Hour
	csrfField    = "csrf"
	csrfHeader   = "X-CSRF-Token"
)

var (
	// ErrNoSession: nobody is logged in.
	ErrNoSession = errors.New("central: nobody is logged in")
	// ErrForged: the request does not come from one of our own pages.
	ErrForged = errors.New("central: the form is not from this page, or it is too old; load the page again")

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

// CSRFToken is the value that our pages send along with what changes
// something. It follows from the session's secret, so that nothing is kept.
func CSRFToken(r *http.Request) string {
	value := cookieOf(r, sessionCookie)
	if value == "" {
		return ""
	}
	h := hmac.New(sha256.New, []byte(value))
	h.Write([]byte("muster/csrf/v1"))
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// CheckForm returns ErrForged unless a request is harmless (GET, HEAD,
// OPTIONS) or was sent by one of our own pages: by what browsers say about the
// origin, and by the token.
func CheckForm(r *http.Request) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return nil
	}
	if sameOrigin(r) != nil {
		return ErrForged
	}
	got, want := r.Header.Get(csrfHeader), CSRFToken(r)
	if got == "" {
		got = r.PostFormValue(csrfField)
	}
	if want == "" || !hmac.Equal([]byte(got), []byte(want)) {
		return ErrForged
	}
	return nil
}

// sameOrigin believes what browsers say of where a request comes from.
func sameOrigin(r *http.Request) error { return http.NewCrossOriginProtection().Check(r) }

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
	cred, token := newCredential(store.CredentialSession, who.name, who.tenant, s.cfg.Now(), sessionLife)
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
	http.SetCookie(w, sessionCookieOf(token, sessionLife))
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

// localPath returns where to go after a log-in: a path of our own and nothing
// else, since "//host", "/\host" and "https:" would send people elsewhere.
func localPath(next string) string {
	if !strings.HasPrefix(next, "/") || strings.HasPrefix(next, "//") || strings.ContainsAny(next, "\\\r\n\t") || len(next) > 512 ||
		strings.HasPrefix(next, "/auth/") || strings.HasPrefix(next, LoginPath) {
		return "/"
	}
	for _, c := range next {
		if c < 0x20 || c == 0x7f {
			return "/"
		}
	}
	return next
}
