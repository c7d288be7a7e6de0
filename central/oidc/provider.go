package oidc

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	coreos "github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"github.com/muster-edge/muster/fleet/text"
)

// ErrUnavailable: the provider does not answer, or not as one.
var ErrUnavailable = errors.New("oidc: the identity provider does not answer")

// Refused says why somebody was not let in, for that person.
type Refused struct{ Why string }

// Error implements error.
func (r *Refused) Error() string { return "oidc: refused: " + r.Why }

func refused(format string, args ...any) error { return &Refused{fmt.Sprintf(format, args...)} }

// algorithms of signatures that count: those with a public key. With "none"
// anybody is anybody, and with HS256 whoever knows the client secret.
var algorithms = []string{
	coreos.RS256, coreos.RS384, coreos.RS512, coreos.PS256, coreos.PS384, coreos.PS512, coreos.ES256, coreos.ES384, coreos.ES512, coreos.EdDSA,
}

const (
	// callLimit bounds one call of the provider in time, answerLimit its
	// answer in bytes.
	callLimit   = 10 * time.Second
	answerLimit = 1 << 20
	// atOnce bounds the calls that strangers can cause.
	atOnce = 16
	// again is how long a provider that did not answer is not asked.
	again = 3 * time.Second
)

// Provider is a connection to an identity provider. It is asked when somebody
// logs in and not before: a centre starts without it.
type Provider struct {
	cfg    *Config
	now    func() time.Time
	client *http.Client
	slots  chan struct{}

	mu    sync.Mutex
	known *coreos.Provider
	// failed is why the last look for it failed, and when.
	failed   error
	failedAt time.Time
}

// New returns a Provider for settings of Load.
func New(cfg *Config, now func() time.Time) *Provider {
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.roots},
		TLSHandshakeTimeout: callLimit, ResponseHeaderTimeout: callLimit, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
	}
	return &Provider{
		cfg: cfg, now: now, slots: make(chan struct{}, atOnce),
		client: &http.Client{
			Transport: bounded{transport}, Timeout: callLimit,
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return errors.New("the identity provider sends elsewhere, which it has no reason to")
			},
		},
	}
}

// bounded reads no answer without end, and speaks TLS alone.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fmt.Errorf("the identity provider names the address %.200q, which is not https", r.URL.Redacted())
	}
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, answerLimit)
	}
	return resp, err
}

// Config returns the settings.
func (p *Provider) Config() *Config { return p.cfg }

// Flow is a log-in while the browser is at the provider. Whoever keeps it sees
// to it that the browser that brings State back is the one that was sent, and
// that no flow is finished twice.
type Flow struct {
	State, Nonce, Verifier string
}

// Begin starts a log-in: the address to send the browser to.
func (p *Provider) Begin(ctx context.Context) (Flow, string, error) {
	_, conf, err := p.find(ctx)
	if err != nil {
		return Flow{}, "", err
	}
	f := Flow{State: secret(), Nonce: secret(), Verifier: oauth2.GenerateVerifier()}
	return f, conf.AuthCodeURL(f.State, coreos.Nonce(f.Nonce), oauth2.S256ChallengeOption(f.Verifier)), nil
}

func secret() string {
	b := make([]byte, 32)
	rand.Read(b)
	return base64.RawURLEncoding.EncodeToString(b)
}

// find asks the provider for its description, once.
func (p *Provider) find(ctx context.Context) (*coreos.Provider, *oauth2.Config, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known == nil {
		if p.failed != nil && p.now().Sub(p.failedAt).Abs() < again {
			return nil, nil, p.failed
		}
		// Who waits for it may go away; the others still want the answer.
		known, err := coreos.NewProvider(coreos.ClientContext(context.WithoutCancel(ctx), p.client), p.cfg.Issuer)
		if err == nil {
			err = onlyTLS(known)
		}
		if err != nil {
			p.failed, p.failedAt = fmt.Errorf("%w: %s: %s", ErrUnavailable, p.cfg.Issuer, text.Clean(err.Error(), 300)), p.now()
			return nil, nil, p.failed
		}
		p.known, p.failed = known, nil
	}
	return p.known, &oauth2.Config{
		ClientID: p.cfg.ClientID, ClientSecret: p.cfg.secret, Endpoint: p.known.Endpoint(), RedirectURL: p.cfg.RedirectURL,
		Scopes: append([]string{coreos.ScopeOpenID}, p.cfg.Scopes...),
	}, nil
}

// onlyTLS refuses a description with addresses in clear.
func onlyTLS(p *coreos.Provider) error {
	var d struct {
		Auth  string `json:"authorization_endpoint"`
		Token string `json:"token_endpoint"`
		Keys  string `json:"jwks_uri"`
	}
	if err := p.Claims(&d); err != nil {
		return err
	}
	for _, a := range []string{d.Auth, d.Token, d.Keys} {
		if u, err := url.Parse(a); err != nil || u.Scheme != "https" || u.Host == "" {
			return fmt.Errorf("its description names the address %.200q, which is not https", a)
		}
	}
	return nil
}

// Finish takes what the browser brought back and says who it is.
func (p *Provider) Finish(ctx context.Context, f Flow, q url.Values) (Person, error) {
	if f.State == "" || subtle.ConstantTimeCompare([]byte(f.State), []byte(q.Get("state"))) != 1 {
		return Person{}, refused("this answer belongs to another log-in")
	}
	// RFC 9207: an answer of another provider is not for us.
	if iss := q.Get("iss"); iss != "" && iss != p.cfg.Issuer {
		return Person{}, refused("this answer is of another identity provider")
	}
	if e := q.Get("error"); e != "" {
		if d := q.Get("error_description"); d != "" {
			e += ": " + d
		}
		return Person{}, refused("the identity provider says no (%s)", text.Clean(e, 200))
	}
	code := q.Get("code")
	if code == "" || len(code) > 4096 {
		return Person{}, refused("the identity provider gave no code")
	}
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		return Person{}, fmt.Errorf("%w: too many people log in at once", ErrUnavailable)
	}
	known, conf, err := p.find(ctx)
	if err != nil {
		return Person{}, err
	}
	ctx = coreos.ClientContext(ctx, p.client)
	tokens, err := conf.Exchange(ctx, code, oauth2.VerifierOption(f.Verifier))
	if err != nil {
		return Person{}, exchangeError(err)
	}
	raw, _ := tokens.Extra("id_token").(string)
	if raw == "" {
		return Person{}, refused("the identity provider gave no ID token; is the scope openid allowed for this client?")
	}
	c, err := p.verify(ctx, known, raw, f.Nonce)
	if err != nil {
		return Person{}, err
	}
	if p.cfg.UserInfo {
		if err := p.addUserInfo(ctx, known, tokens, c); err != nil {
			return Person{}, err
		}
	}
	who, err := c.person(p.cfg)
	if err != nil {
		return Person{}, refused("%v", err)
	}
	return who, nil
}

// exchangeError tells a provider that refuses from one that is not there.
func exchangeError(err error) error {
	var said *oauth2.RetrieveError
	if errors.As(err, &said) && said.Response != nil && said.Response.StatusCode < 500 {
		if said.ErrorCode == "invalid_client" {
			return refused("the identity provider does not accept this centre's client ID or secret")
		}
		return refused("the identity provider does not take the code (%s)", text.Clean(said.ErrorCode, 80))
	}
	return fmt.Errorf("%w: exchange code: %s", ErrUnavailable, text.Clean(err.Error(), 300))
}

// verify checks an ID token: signature by a key of the provider, issuer,
// audience, time, nonce.
func (p *Provider) verify(ctx context.Context, known *coreos.Provider, raw, nonce string) (claims, error) {
	if len(raw) > maxClaims {
		return nil, refused("the ID token is too long")
	}
	t, err := known.Verifier(&coreos.Config{ClientID: p.cfg.ClientID, SupportedSigningAlgs: algorithms, Now: p.now}).Verify(ctx, raw)
	var late *coreos.TokenExpiredError
	switch {
	case errors.As(err, &late):
		return nil, refused("the ID token has expired; are the clocks of the centre and of the identity provider right?")
	case err != nil && strings.Contains(err.Error(), "fetching keys"): // it is no type of its own
		return nil, fmt.Errorf("%w: its keys: %s", ErrUnavailable, text.Clean(err.Error(), 300))
	case err != nil:
		return nil, refused("the ID token is not good: %s", text.Clean(err.Error(), 200))
	case subtle.ConstantTimeCompare([]byte(t.Nonce), []byte(nonce)) != 1:
		return nil, refused("the ID token belongs to another log-in (nonce)")
	}
	var body json.RawMessage
	if err := t.Claims(&body); err != nil {
		return nil, refused("the ID token cannot be read")
	}
	c, err := parseClaims(body)
	if err != nil {
		return nil, refused("%v", err)
	}
	// With more than one audience, the token says for whom it was made.
	if azp := c.text("azp"); (len(t.Audience) > 1 || azp != "") && azp != p.cfg.ClientID {
		return nil, refused("the ID token was made for another client (azp)")
	}
	return c, nil
}

// addUserInfo adds what only the userinfo endpoint says; what the signed token
// says holds.
func (p *Provider) addUserInfo(ctx context.Context, known *coreos.Provider, tokens *oauth2.Token, c claims) error {
	info, err := known.UserInfo(ctx, oauth2.StaticTokenSource(tokens))
	if err != nil {
		return fmt.Errorf("%w: userinfo: %s", ErrUnavailable, text.Clean(err.Error(), 300))
	}
	if info.Subject != c.text("sub") {
		return refused("the identity provider's userinfo is about somebody else")
	}
	var body json.RawMessage
	if err := info.Claims(&body); err != nil {
		return refused("the identity provider's userinfo cannot be read")
	}
	more, err := parseClaims(body)
	if err != nil {
		return refused("%v", err)
	}
	for name, v := range more {
		if _, there := c[name]; !there {
			c[name] = v
		}
	}
	return nil
}
