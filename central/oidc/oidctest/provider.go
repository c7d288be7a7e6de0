// Package oidctest runs a real OpenID Connect provider (package op of
// zitadel/oidc) on a loopback port over TLS, for tests. Beside what a provider
// does, it can sign a wrong ID token with its right key, so that a test shows
// which check refuses it.
package oidctest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// ClientID and ClientSecret are of the one client.
const (
	ClientID     = "muster"
	ClientSecret = "a secret of the test / with + odd = signs"
)

// Provider is a running provider.
type Provider struct {
	Issuer string
	server *httptest.Server
	store  *memory

	mu   sync.Mutex
	user string
	// forge changes header and claims of the next ID tokens.
	forge func(header, claims map[string]any)
	// Logins counts browsers that were at the log-in page.
	logins int
}

// User is somebody whom the provider knows.
type User struct {
	ID, Email  string
	Unverified bool
	Groups     []string
}

// Start runs a provider whose client may come back to redirect. Somebody who
// is sent there is logged in as the user of As without being asked.
func Start(t testing.TB, redirect string, users ...User) *Provider {
	t.Helper()
	p := &Provider{}
	all := people{}
	for _, u := range users {
		all[u.ID] = u
	}
	p.store = &memory{Storage: storage.NewStorageWithClients(all, nil), people: all, redirect: redirect}
	mux := http.NewServeMux()
	p.server = httptest.NewUnstartedServer(mux)
	p.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	p.server.StartTLS()
	t.Cleanup(p.server.Close)
	p.Issuer = p.server.URL
	key := [32]byte{}
	rand.Read(key[:])
	provider, err := op.NewProvider(&op.Config{CryptoKey: key, CodeMethodS256: true, AuthMethodPost: true}, p.store, op.StaticIssuer(p.Issuer), op.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	callback := op.AuthCallbackURL(provider)
	mux.HandleFunc("GET /login", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		user := p.user
		p.logins++
		p.mu.Unlock()
		id := r.URL.Query().Get("id")
		if user == "" {
			http.Error(w, "nobody is logged in at this provider", http.StatusForbidden)
			return
		}
		if err := p.store.CheckUsernamePassword(user, "password", id); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		http.Redirect(w, r, callback(op.ContextWithIssuer(r.Context(), p.Issuer), id), http.StatusFound)
	})
	mux.Handle("/oauth/token", p.forged(provider))
	mux.Handle("/", provider)
	return p
}

// Stop ends the provider: calls of it fail from now on.
func (p *Provider) Stop() { p.server.Close() }

// As says who is logged in at the provider, by ID.
func (p *Provider) As(user string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.user = user
}

// SetGroups changes the groups of a user.
func (p *Provider) SetGroups(user string, groups ...string) {
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	u := p.store.people[user]
	u.Groups = groups
	p.store.people[user] = u
}

// Logins is how many log-ins came as far as the provider's page.
func (p *Provider) Logins() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.logins
}

// Forge changes header and claims of ID tokens before they are signed; nil
// ends it. The algorithm in the header says how: "none", "HS256" (by the
// client's secret) and "other key" do not use the provider's key.
func (p *Provider) Forge(f func(header, claims map[string]any)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forge = f
}

// CA is the certificate of the provider, PEM.
func (p *Provider) CA() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.server.Certificate().Raw})
}

// Client is a browser that believes the provider's certificate, and others'
// from whatever else conf believes.
func (p *Provider) TLS(conf *tls.Config) *tls.Config {
	conf = conf.Clone()
	conf.RootCAs = conf.RootCAs.Clone()
	conf.RootCAs.AddCert(p.server.Certificate())
	return conf
}

// Files writes settings for this provider into a directory, with more lines,
// and returns the name of the file.
func (p *Provider) Files(t testing.TB, redirect, more string) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	write("secret", []byte(ClientSecret+"\n"))
	write("ca.pem", p.CA())
	return write("oidc.yaml", fmt.Appendf(nil, "issuer: %s\nclient-id: %s\nclient-secret-file: secret\nca-file: ca.pem\nredirect-url: %s\n%s", p.Issuer, ClientID, redirect, more))
}

// forged lets the provider answer and changes the ID token in the answer.
func (p *Provider) forged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		forge := p.forge
		p.mu.Unlock()
		if forge == nil {
			next.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		body := rec.Body.Bytes()
		var answer map[string]any
		if json.Unmarshal(body, &answer) == nil && answer["id_token"] != nil {
			answer["id_token"] = p.resign(fmt.Sprint(answer["id_token"]), forge)
			body, _ = json.Marshal(answer) // it was JSON a moment ago
		}
		for k, v := range rec.Header() {
			if k != "Content-Length" {
				w.Header()[k] = v
			}
		}
		w.WriteHeader(rec.Code)
		_, _ = io.Copy(w, bytes.NewReader(body)) // the caller went away
	})
}

func (p *Provider) resign(token string, forge func(header, claims map[string]any)) string {
	parts := strings.Split(token, ".")
	decode := func(s string) (m map[string]any) {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err == nil {
			err = json.Unmarshal(b, &m)
		}
		if err != nil {
			panic(err) // of our own provider
		}
		return m
	}
	header, claims := decode(parts[0]), decode(parts[1])
	forge(header, claims)
	payload, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	key, err := p.store.SigningKey(context.Background())
	if err != nil {
		panic(err)
	}
	kid, _ := header["kid"].(string)
	var use jose.SigningKey
	switch alg := header["alg"]; alg {
	case "none":
		head, _ := json.Marshal(map[string]string{"alg": "none", "typ": "JWT"})
		return base64.RawURLEncoding.EncodeToString(head) + "." + base64.RawURLEncoding.EncodeToString(payload) + "."
	case "HS256":
		use = jose.SigningKey{Algorithm: jose.HS256, Key: []byte(ClientSecret)}
	case "other key":
		other, err := storage.NewStorageWithClients(people{}, nil).SigningKey(context.Background())
		if err != nil {
			panic(err)
		}
		use = jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: other.Key(), KeyID: kid}}
	default:
		use = jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key.Key(), KeyID: kid}}
	}
	signer, err := jose.NewSigner(use, nil)
	if err != nil {
		panic(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		panic(err)
	}
	out, err := signed.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return out
}

// people are the users as the storage wants them.
type people map[string]User

// GetUserByID implements storage.UserStore.
func (p people) GetUserByID(id string) *storage.User {
	u, known := p[id]
	if !known {
		return nil
	}
	return &storage.User{ID: u.ID, Username: u.ID, Password: "password", Email: u.Email, EmailVerified: !u.Unverified}
}

// GetUserByUsername implements storage.UserStore.
func (p people) GetUserByUsername(name string) *storage.User { return p.GetUserByID(name) }

// ExampleClientID implements storage.UserStore.
func (p people) ExampleClientID() string { return "service" }

// memory is the provider's example storage with our client and groups.
type memory struct {
	*storage.Storage
	redirect string

	mu     sync.Mutex
	people people
}

type client struct {
	*storage.Client
	redirect string
}

// The client's settings.

func (c client) RedirectURIs() []string               { return []string{c.redirect} }
func (c client) LoginURL(id string) string            { return "/login?" + url.Values{"id": {id}}.Encode() }
func (c client) DevMode() bool                        { return false }
func (c client) IDTokenUserinfoClaimsAssertion() bool { return true }
func (c client) IDTokenLifetime() time.Duration       { return 5 * time.Minute }
func (c client) IsScopeAllowed(scope string) bool     { return scope == "groups" }

// GetClientByClientID implements op.Storage.
func (m *memory) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	if id != ClientID {
		return nil, fmt.Errorf("there is no client %q", id)
	}
	return client{storage.WebClient(ClientID, ClientSecret, m.redirect), m.redirect}, nil
}

// AuthorizeClientIDSecret implements op.Storage.
func (m *memory) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	if id != ClientID || secret != ClientSecret {
		return fmt.Errorf("wrong client or secret")
	}
	return nil
}

// SetUserinfoFromRequest implements op.CanSetUserinfoFromRequest: claims of
// the ID token.
func (m *memory) SetUserinfoFromRequest(ctx context.Context, info *oidc.UserInfo, token op.IDTokenRequest, scopes []string) error {
	if err := m.Storage.SetUserinfoFromRequest(ctx, info, token, scopes); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	info.AppendClaims("groups", slices.Clone(m.people[token.GetSubject()].Groups))
	return nil
}

// SetUserinfoFromToken implements op.Storage: the userinfo endpoint.
func (m *memory) SetUserinfoFromToken(ctx context.Context, info *oidc.UserInfo, tokenID, subject, origin string) error {
	if err := m.Storage.SetUserinfoFromToken(ctx, info, tokenID, subject, origin); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	info.AppendClaims("groups", slices.Clone(m.people[subject].Groups))
	return nil
}
