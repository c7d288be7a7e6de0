package oidc_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/central/oidc"
	"github.com/muster-edge/muster/central/oidc/oidctest"
)

const redirect = "https://centre.example:7443" + oidc.CallbackPath

var ann = oidctest.User{ID: "u1", Email: "ann@example.org", Groups: []string{"shops", "Night shift", "shops"}}

// browse is a browser that is sent to the provider and stops where it is sent
// back to the centre.
func browse(t *testing.T, p *oidctest.Provider, to string) url.Values {
	t.Helper()
	var back *url.URL
	client := &http.Client{
		Transport: &http.Transport{TLSClientConfig: p.TLS(&tls.Config{RootCAs: x509.NewCertPool()})},
		CheckRedirect: func(r *http.Request, _ []*http.Request) error {
			if strings.HasPrefix(r.URL.String(), redirect) {
				back = r.URL
				return http.ErrUseLastResponse
			}
			return nil
		},
	}
	resp, err := client.Get(to)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	client.CloseIdleConnections()
	if back == nil {
		t.Fatalf("the provider does not send back: %s at %s", resp.Status, resp.Request.URL)
	}
	return back.Query()
}

func start(t *testing.T, more string, users ...oidctest.User) (*oidctest.Provider, *oidc.Provider) {
	t.Helper()
	p := oidctest.Start(t, redirect, users...)
	if len(users) > 0 {
		p.As(users[0].ID)
	}
	cfg, err := oidc.Load(p.Files(t, redirect, more))
	if err != nil {
		t.Fatal(err)
	}
	return p, oidc.New(cfg, time.Now)
}

// login goes the whole way; change may spoil what comes back.
func login(t *testing.T, p *oidctest.Provider, c *oidc.Provider, change func(*oidc.Flow, url.Values)) (oidc.Person, error) {
	t.Helper()
	ctx := context.Background()
	flow, to, err := c.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	q := browse(t, p, to)
	if change != nil {
		change(&flow, q)
	}
	return c.Finish(ctx, flow, q)
}

func TestLogInAtARealProvider(t *testing.T) {
	p, c := start(t, "", ann)
	who, err := login(t, p, c, nil)
	if err != nil || who.Name != "ann@example.org" || who.Subject != "u1" || !slices.Equal(who.Groups, []string{"Night shift", "shops"}) {
		t.Fatalf("%+v, %v", who, err)
	}
	flow, to, err := c.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"response_type": "code", "code_challenge_method": "S256", "redirect_uri": redirect, "client_id": oidctest.ClientID, "state": flow.State, "nonce": flow.Nonce, "scope": "openid profile email"} {
		if got := u.Query().Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if len(flow.State) < 40 || len(flow.Nonce) < 40 || flow.State == flow.Nonce || strings.Contains(to, flow.Verifier) {
		t.Errorf("flow %+v", flow)
	}
}

// What is wrong with one thing is refused for that thing.
func TestWrongAnswersAreRefused(t *testing.T) {
	p, c := start(t, "", ann)
	claim := func(name string, v any) func(_, claims map[string]any) {
		return func(_, claims map[string]any) { claims[name] = v }
	}
	alg := func(name string) func(header, _ map[string]any) {
		return func(header, _ map[string]any) { header["alg"] = name }
	}
	for name, x := range map[string]struct {
		forge  func(header, claims map[string]any)
		change func(*oidc.Flow, url.Values)
		why    string
	}{
		"a wrong audience":           {forge: claim("aud", "somebody-else"), why: "audience"},
		"two audiences, no azp":      {forge: func(_, c map[string]any) { c["aud"] = []string{oidctest.ClientID, "x"}; delete(c, "azp") }, why: "azp"},
		"made for another client":    {forge: claim("azp", "somebody-else"), why: "azp"},
		"a wrong issuer":             {forge: claim("iss", "https://evil.example"), why: "issued by a different provider"},
		"no issuer":                  {forge: claim("iss", ""), why: "issued by a different provider"},
		"an expired token":           {forge: claim("exp", time.Now().Add(-time.Hour).Unix()), why: "expired"},
		"a token of the future":      {forge: claim("nbf", time.Now().Add(time.Hour).Unix()), why: "before the nbf"},
		"another nonce":              {forge: claim("nonce", "x"), why: "nonce"},
		"no nonce":                   {forge: func(_, c map[string]any) { delete(c, "nonce") }, why: "nonce"},
		"the algorithm none":         {forge: alg("none"), why: "not good"},
		"the algorithm HS256":        {forge: alg("HS256"), why: "not good"},
		"another key":                {forge: alg("other key"), why: "not good"},
		"no subject":                 {forge: claim("sub", ""), why: "subject"},
		"no email":                   {forge: claim("email", ""), why: "user-claim"},
		"an email nobody verified":   {forge: claim("email_verified", false), why: "verified"},
		"an email with a quote":      {forge: claim("email", `a"b@example.org`), why: "cannot be used"},
		"an email that turns around": {forge: claim("email", "a\u202egro@example.org"), why: "cannot be used"},
		"groups that are none":       {forge: claim("groups", []any{1}), why: "names of groups"},
		"groups without end":         {forge: claim("groups", slices.Repeat([]string{"g"}, 501)), why: "more than 500"},
		"another state":              {change: func(_ *oidc.Flow, q url.Values) { q.Set("state", "x") }, why: "another log-in"},
		"no state":                   {change: func(_ *oidc.Flow, q url.Values) { q.Del("state") }, why: "another log-in"},
		"no flow at all":             {change: func(f *oidc.Flow, q url.Values) { *f = oidc.Flow{}; q.Del("state") }, why: "another log-in"},
		"another verifier":           {change: func(f *oidc.Flow, _ url.Values) { f.Verifier = strings.Repeat("v", 43) }, why: "does not take the code"},
		"another code":               {change: func(_ *oidc.Flow, q url.Values) { q.Set("code", "x") }, why: "does not take the code"},
		"no code":                    {change: func(_ *oidc.Flow, q url.Values) { q.Del("code") }, why: "no code"},
		"another provider's answer":  {change: func(_ *oidc.Flow, q url.Values) { q.Set("iss", "https://evil.example") }, why: "another identity provider"},
		"a refusal": {change: func(_ *oidc.Flow, q url.Values) {
			q.Set("error", "access_denied")
			q.Set("error_description", "go\u202e away\x1b[2J")
		}, why: "says no (access_denied: go"},
	} {
		p.Forge(x.forge)
		who, err := login(t, p, c, x.change)
		var no *oidc.Refused
		if !errors.As(err, &no) || !strings.Contains(no.Why, x.why) {
			t.Errorf("%s: %+v, %v; want a refusal with %q", name, who, err, x.why)
		}
		if no != nil && strings.ContainsAny(no.Why, "\x1b\u202e") {
			t.Errorf("%s: the reason carries what a terminal obeys: %q", name, no.Why)
		}
	}
	// The twin: a token that is signed again and not changed is good.
	p.Forge(func(_, _ map[string]any) {})
	if who, err := login(t, p, c, nil); err != nil {
		t.Errorf("an honest token: %+v, %v", who, err)
	}
	// A code counts once.
	ctx := context.Background()
	flow, to, err := c.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	q := browse(t, p, to)
	if _, err := c.Finish(ctx, flow, q); err != nil {
		t.Fatal(err)
	}
	var no *oidc.Refused
	if _, err := c.Finish(ctx, flow, q); !errors.As(err, &no) {
		t.Errorf("the same code again: %v", err)
	}
}

// Groups that only the userinfo endpoint knows are asked for there, and what
// the signed token says is not overruled.
func TestUserInfo(t *testing.T) {
	p, c := start(t, "userinfo: true\nuser-claim: sub\ngroups-claim: groups\n", ann)
	p.Forge(func(_, claims map[string]any) { delete(claims, "groups"); claims["email"] = "signed@example.org" })
	who, err := login(t, p, c, nil)
	if err != nil || who.Name != "u1" || len(who.Groups) != 2 {
		t.Errorf("%+v, %v", who, err)
	}
	p.Forge(func(_, claims map[string]any) { claims["sub"] = "u2" })
	var no *oidc.Refused
	if _, err := login(t, p, c, nil); !errors.As(err, &no) || !strings.Contains(no.Why, "somebody else") {
		t.Errorf("userinfo of another person: %v", err)
	}
}

func TestProviderThatIsDown(t *testing.T) {
	p, c := start(t, "", ann)
	ctx := context.Background()
	flow, to, err := c.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	q := browse(t, p, to)
	p.Stop()
	if _, err := c.Finish(ctx, flow, q); !errors.Is(err, oidc.ErrUnavailable) {
		t.Errorf("it went away before the end: %v", err)
	}
	late := oidc.New(c.Config(), time.Now)
	for range 2 {
		if _, _, err := late.Begin(ctx); !errors.Is(err, oidc.ErrUnavailable) || !strings.Contains(err.Error(), p.Issuer) {
			t.Errorf("it was never there: %v", err)
		}
	}
}

// A server that is no provider, or another one, is not believed.
func TestDescriptionsThatAreWrong(t *testing.T) {
	p, c := start(t, "", ann)
	ctx := context.Background()
	for name, change := range map[string]func(*oidc.Config){
		"another issuer by name":  func(c *oidc.Config) { c.Issuer += "/" },
		"a page of something":     func(c *oidc.Config) { c.Issuer += "/login" },
		"a CA that did not sign":  func(c *oidc.Config) { c.CAFile = "" },
		"nobody at that address":  func(c *oidc.Config) { c.Issuer = "https://127.0.0.1:1" },
		"an address without TLS":  func(c *oidc.Config) { c.Issuer = strings.Replace(c.Issuer, "https", "http", 1) },
		"a name that is not real": func(c *oidc.Config) { c.Issuer = "https://idp.invalid" },
	} {
		again := *c.Config()
		change(&again)
		if again.CAFile == "" {
			file := p.Files(t, redirect, "")
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(strings.Replace(string(b), "ca-file: ca.pem\n", "", 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			loaded, err := oidc.Load(file)
			if err != nil {
				t.Fatal(err)
			}
			again = *loaded
		}
		if _, _, err := oidc.New(&again, time.Now).Begin(ctx); !errors.Is(err, oidc.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := oidc.New(c.Config(), time.Now).Begin(ctx); err != nil {
		t.Errorf("the right one: %v", err)
	}
}
