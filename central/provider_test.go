package central

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/oidc"
	"github.com/muster-edge/muster/central/oidc/oidctest"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

// The provider knows the centre by this name; browsers of the test find it.
const centreHost = "centre.example:7443"

// withProvider runs a centre whose people log in at a real provider.
type withProvider struct {
	*running
	t  *testing.T
	at *oidctest.Provider
	// ahead is how far the centre's clock is ahead, people how many browsers
	// there were.
	ahead  *atomic.Int64
	people byte
}

const rulesOfTest = `rules:
- {group: shops-north, role: operator, sites: region=north}
- {group: everybody, role: viewer}
- {group: acme-people, role: admin, tenant: acme}
`

func serveWithProvider(t *testing.T, more string) *withProvider {
	t.Helper()
	redirect := "https://" + centreHost + oidc.CallbackPath
	at := oidctest.Start(t, redirect,
		oidctest.User{ID: "ann", Email: "ann@example.org", Groups: []string{"everybody", "shops-north"}},
		oidctest.User{ID: "bob", Email: "bob@example.org", Groups: []string{"other", "Night <b>shift</b>"}},
		oidctest.User{ID: "zoe", Email: "zoe@example.org", Groups: []string{"acme-people"}},
		oidctest.User{ID: "adm", Email: "admin", Groups: []string{"everybody"}})
	cfg, err := oidc.Load(at.Files(t, redirect, more))
	if err != nil {
		t.Fatal(err)
	}
	ahead := new(atomic.Int64)
	r := serve(t, t.TempDir(), func(c *Config) {
		c.OIDC, c.Advertise = cfg, []string{"centre.example"}
		c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	if _, err := r.access(r.admin.Token).CreateTenant(context.Background(), &musterv1.CreateTenantRequest{Name: "acme"}); err != nil {
		t.Fatal(err)
	}
	return &withProvider{running: r, t: t, at: at, ahead: ahead}
}

// later moves the centre's clock to this much after the real one.
func (w *withProvider) later(d time.Duration) { w.ahead.Store(int64(d)) }

// browser is one that keeps cookies, follows redirects, and shows where it
// was.
type browser struct {
	*withProvider
	http *http.Client
	// stop, if set, ends a walk before an address is opened.
	stop func(*http.Request) bool
}

func (w *withProvider) browser() *browser {
	b := &browser{withProvider: w}
	// Each has a network of its own: failed attempts are counted by network.
	w.people++
	from := &net.TCPAddr{IP: net.IPv4(127, 0, w.people, 1)}
	plain := w.client().Transport.(*http.Transport)
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	transport := &http.Transport{
		TLSClientConfig: w.at.TLS(plain.TLSClientConfig),
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == centreHost {
				address = w.addr.Operators
			}
			return (&net.Dialer{LocalAddr: from}).DialContext(ctx, network, address)
		},
	}
	w.t.Cleanup(transport.CloseIdleConnections)
	b.http = &http.Client{Transport: transport, Jar: jar, CheckRedirect: func(r *http.Request, _ []*http.Request) error {
		if b.stop != nil && b.stop(r) {
			return http.ErrUseLastResponse
		}
		return nil
	}}
	return b
}

// open goes to an address and returns where it ended.
func (b *browser) open(address string) (code int, at *url.URL, page string) {
	b.t.Helper()
	if strings.HasPrefix(address, "/") {
		address = "https://" + centreHost + address
	}
	resp, err := b.http.Get(address)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.StatusCode, resp.Request.URL, string(body)
}

// login logs in as somebody of the provider, and fails the test if they are
// not let in.
func (b *browser) login(user string) *browser {
	b.t.Helper()
	b.at.As(user)
	code, _, page := b.open("/auth/oidc?next=/sites")
	if code != http.StatusOK || !strings.Contains(page, `url=/sites`) {
		b.t.Fatalf("%s: %d %s", user, code, page)
	}
	return b
}

func (b *browser) cookie(name string) string {
	for _, c := range b.http.Jar.Cookies(&url.URL{Scheme: "https", Host: centreHost, Path: "/"}) {
		if c.Name == name {
			return c.Value
		}
	}
	return ""
}

func (w *withProvider) principal(b *browser) (access.Principal, error) {
	q, err := http.NewRequest(http.MethodGet, "https://"+centreHost+"/", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	if v := b.cookie(sessionCookie); v != "" {
		q.AddCookie(&http.Cookie{Name: sessionCookie, Value: v})
	}
	return w.s.SessionPrincipal(q)
}

// A person of the provider has the roles of their groups, in the console and
// for no longer than the settings say.
func TestLogInAtAnIdentityProvider(t *testing.T) {
	w := serveWithProvider(t, "session: 2h\n"+rulesOfTest)
	b := w.browser()
	if _, _, page := b.open("/login"); !strings.Contains(page, "Log in with your identity provider") || !strings.Contains(page, `name="token"`) {
		t.Errorf("the log-in page: %s", page)
	}
	b.login("ann")
	p, err := w.principal(b)
	if err != nil || p.Name != "oidc/ann@example.org" || p.Tenant != DefaultTenant || p.Unlimited() != access.Viewer || p.At(map[string]string{"region": "north"}) != access.Operator {
		t.Fatalf("%+v, %v", p, err)
	}
	if code, at, page := b.open("/sites"); code != 200 || at.Path != "/sites" || !strings.Contains(page, "user:oidc/ann@example.org") {
		t.Errorf("the page after it: %d at %s", code, at)
	}
	if b.cookie(flowCookie) != "" {
		t.Error("the cookie of the log-in stays")
	}
	w.later(30 * time.Minute)
	if _, err := w.principal(b); err != nil {
		t.Errorf("after half an hour: %v", err)
	}
	w.later(2*time.Hour + time.Minute)
	w.s.usage.note(p.Via, time.Now().Add(2*time.Hour)) // it is not idle
	if _, err := w.principal(b); err != ErrNoSession {
		t.Errorf("after the session's life: %v", err)
	}
	w.later(0)
	records, err := w.records()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, a := range records {
		if a.Kind == audit.LoggedIn && a.Actor == "user:oidc/ann@example.org" && strings.Contains(string(a.After), w.at.Issuer) {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d records of the log-in", n)
	}
	// Logging out ends it, whatever the provider still thinks.
	b = w.browser().login("ann")
	_, _, page := b.open("/access")
	resp, err := b.http.PostForm("https://"+centreHost+"/logout", url.Values{"csrf": {formToken.FindStringSubmatch(page)[1]}})
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if _, err := w.principal(b); err != ErrNoSession {
		t.Errorf("after logging out: %v", err)
	}
	w.sound(t)
}

// Whom no rule and no grant knows is let in nowhere, and reads what to ask for.
func TestWhoeverHasNoRoleIsNotLetIn(t *testing.T) {
	w := serveWithProvider(t, rulesOfTest)
	b := w.browser()
	w.at.As("bob")
	code, _, page := b.open("/auth/oidc")
	for _, want := range []string{"You have no role here yet", "muster access grant oidc/bob@example.org --role viewer", "Night &lt;b&gt;shift&lt;/b&gt;", "other"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q: %s", want, page)
		}
	}
	if _, err := w.principal(b); code != http.StatusForbidden || err != ErrNoSession || b.cookie(sessionCookie) != "" {
		t.Errorf("%d, %v", code, err)
	}
	// A local name is nobody's at the provider: its "admin" is another one,
	// and no email either.
	w.at.As("adm")
	w.at.Forge(func(_, c map[string]any) { c["email_verified"] = true })
	if code, _, _ := b.open("/auth/oidc"); code != http.StatusOK {
		t.Fatalf("adm: %d", code)
	}
	w.at.Forge(nil)
	if p, err := w.principal(b); err != nil || p.Name != "oidc/admin" || p.Role() != access.Viewer || p.Central() != access.None {
		t.Errorf("the provider's admin: %+v, %v", p, err)
	}
	// And nobody is invited under a name of the provider.
	_, err := w.access(w.admin.Token).Invite(context.Background(), &musterv1.InviteRequest{User: "oidc/ann@example.org", Role: "viewer"})
	connectCode(t, err, connect.CodeFailedPrecondition)
	// The administrator does what the page said.
	if _, err := w.access(w.admin.Token).Grant(context.Background(), &musterv1.GrantRequest{Subject: "oidc/bob@example.org", Role: "viewer"}); err != nil {
		t.Fatal(err)
	}
	if p, err := w.principal(w.browser().login("bob")); err != nil || p.Role() != access.Viewer {
		t.Errorf("after the grant: %+v, %v", p, err)
	}
}

func connectCode(t *testing.T, err error, want connect.Code) {
	t.Helper()
	if err == nil || connect.CodeOf(err) != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// Somebody of one tenant is nobody in another, whatever they send along.
func TestPeopleOfTheProviderStayInTheirTenant(t *testing.T) {
	w := serveWithProvider(t, rulesOfTest)
	b := w.browser().login("zoe")
	p, err := w.principal(b)
	if err != nil || p.Tenant != "acme" || p.Role() != access.Admin {
		t.Fatalf("%+v, %v", p, err)
	}
	q, err := http.NewRequest(http.MethodGet, "https://"+centreHost+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	q.AddCookie(&http.Cookie{Name: sessionCookie, Value: b.cookie(sessionCookie)})
	q.AddCookie(&http.Cookie{Name: TenantCookie, Value: DefaultTenant})
	if p, err := w.s.SessionPrincipal(q); err != nil || p.Tenant != "acme" {
		t.Errorf("with a cookie of another tenant: %+v, %v", p, err)
	}
	token := w.lineToken(b)
	other := w.access(token)
	if who, err := other.WhoAmI(context.Background(), &musterv1.WhoAmIRequest{}); err != nil || who.Tenant != "acme" || who.Role != "admin" {
		t.Errorf("%v, %v", who, err)
	}
	_, err = other.Grant(context.Background(), &musterv1.GrantRequest{Subject: "user:x", Role: "viewer", Centre: true})
	connectCode(t, err, connect.CodePermissionDenied)
	// Rules of the host's file stand in the way of a hand-over, which
	// promises that they end.
	_, err = w.access(w.admin.Token).HandOverTenant(context.Background(), &musterv1.HandOverTenantRequest{Name: "acme", User: "yan", Reason: "sold"})
	connectCode(t, err, connect.CodeFailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "--oidc") {
		t.Errorf("%v", err)
	}
}

// Each of these ends before anybody has a session.
func TestLogInsThatAreNotWholeAreRefused(t *testing.T) {
	w := serveWithProvider(t, rulesOfTest)
	w.at.As("ann")
	callback := func(b *browser) string {
		b.t.Helper()
		var back string
		b.stop = func(r *http.Request) bool {
			if r.URL.Host == centreHost && r.URL.Path == oidc.CallbackPath {
				back = r.URL.String()
				return true
			}
			return false
		}
		b.open("/auth/oidc")
		b.stop = nil
		if back == "" {
			t.Fatal("the provider does not send back")
		}
		return back
	}
	for name, try := range map[string]func(*browser) string{
		"another browser":   func(*browser) string { return callback(w.browser()) },
		"a planted address": func(*browser) string { return oidc.CallbackPath + "?state=x&code=y" },
		"a state of another log-in": func(b *browser) string {
			old := callback(b)
			callback(b) // a new one began
			return old
		},
		"a code of somebody else": func(b *browser) string {
			theirs, err := url.Parse(callback(w.browser()))
			if err != nil {
				t.Fatal(err)
			}
			mine, err := url.Parse(callback(b))
			if err != nil {
				t.Fatal(err)
			}
			q := mine.Query()
			q.Set("code", theirs.Query().Get("code"))
			mine.RawQuery = q.Encode()
			return mine.String()
		},
		"too late": func(b *browser) string {
			at := callback(b)
			w.later(flowLife + time.Minute)
			return at
		},
		"a cookie that was changed": func(b *browser) string {
			at := callback(b)
			v := []byte(b.cookie(flowCookie))
			v[len(v)/2] ^= 1
			b.http.Jar.SetCookies(&url.URL{Scheme: "https", Host: centreHost, Path: "/"}, []*http.Cookie{{Name: flowCookie, Value: string(v), Path: "/", Secure: true}})
			return at
		},
		"a wrong audience": func(b *browser) string {
			w.at.Forge(func(_, c map[string]any) { c["aud"] = "x" })
			return callback(b)
		},
		"another nonce": func(b *browser) string {
			w.at.Forge(func(_, c map[string]any) { c["nonce"] = "x" })
			return callback(b)
		},
		"the algorithm none": func(b *browser) string {
			w.at.Forge(func(h, _ map[string]any) { h["alg"] = "none" })
			return callback(b)
		},
	} {
		b := w.browser()
		address := try(b)
		code, _, page := b.open(address)
		w.at.Forge(nil)
		w.later(0)
		if _, err := w.principal(b); code != http.StatusForbidden || err != ErrNoSession {
			t.Errorf("%s: %d, %v: %s", name, code, err, page)
		}
	}
	// Replayed, with the very same cookie.
	b := w.browser()
	address := callback(b)
	flow := b.cookie(flowCookie)
	if code, _, page := b.open(address); code != http.StatusOK {
		t.Fatalf("the honest one: %d %s", code, page)
	}
	thief := w.browser()
	thief.http.Jar.SetCookies(&url.URL{Scheme: "https", Host: centreHost, Path: "/"}, []*http.Cookie{{Name: flowCookie, Value: flow, Path: "/", Secure: true}})
	if code, _, _ := thief.open(address); code != http.StatusForbidden || thief.cookie(sessionCookie) != "" {
		t.Errorf("replayed: %d", code)
	}
	if _, err := w.principal(b); err != nil {
		t.Errorf("the honest session: %v", err)
	}
	// Even a provider that takes a code twice does not help.
	f, ok := w.s.provider.openFlow(withCookie(flow))
	if !ok {
		t.Fatal("the flow does not open")
	}
	if _, err := w.s.provider.admit(context.Background(), f, oidc.Person{Subject: "ann", Name: "ann@example.org", Groups: []string{"everybody"}}, ""); err == nil || !strings.Contains(err.Error(), "used already") {
		t.Errorf("the same flow twice: %v", err)
	}
}

func withCookie(value string) *http.Request {
	r := &http.Request{Header: http.Header{}}
	r.AddCookie(&http.Cookie{Name: flowCookie, Value: value})
	return r
}

// After it, a browser goes on at a page of ours and nowhere else.
func TestLogInLeadsNowhereElse(t *testing.T) {
	w := serveWithProvider(t, rulesOfTest)
	w.at.As("ann")
	for _, next := range []string{"//evil.example", "https://evil.example/", `/\evil.example`, "/auth/oidc", "/login", "javascript:alert(1)", "/\"><script>"} {
		_, _, page := w.browser().open("/auth/oidc?next=" + url.QueryEscape(next))
		if m := regexp.MustCompile(`url=([^"]*)"`).FindStringSubmatch(page); m == nil || m[1] != "/" && !strings.HasPrefix(m[1], "/%") && m[1] != `/&#34;&gt;&lt;script&gt;` {
			t.Errorf("%q leads to %v", next, m)
		}
		if strings.Contains(page, "evil") || strings.Contains(page, "<script>") {
			t.Errorf("%q: %s", next, page)
		}
	}
	// Whatever a request calls the host, the provider sends back to the name
	// in the settings.
	q, err := http.NewRequest(http.MethodGet, "https://"+centreHost+"/auth/oidc?next=/nodes", nil)
	if err != nil {
		t.Fatal(err)
	}
	b := w.browser()
	b.stop = func(*http.Request) bool { return true }
	for host, want := range map[string]string{"evil.example": "https://" + centreHost + "/auth/oidc?home=1&next=%2Fnodes", centreHost: w.at.Issuer + "/"} {
		q.Host = host
		resp, err := b.http.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		to := resp.Header.Get("Location")
		if !strings.HasPrefix(to, want) {
			t.Errorf("host %s: %s, want %s", host, to, want)
		}
		if u, err := url.Parse(to); err != nil || host == centreHost && u.Query().Get("redirect_uri") != "https://"+centreHost+oidc.CallbackPath {
			t.Errorf("host %s: %s, %v", host, to, err)
		}
	}
	// The provider itself refuses to send a code anywhere else.
	if _, _, page := w.browser().open(w.at.Issuer + "/authorize?client_id=" + oidctest.ClientID + "&response_type=code&scope=openid&redirect_uri=https%3A%2F%2Fevil.example%2F"); !strings.Contains(page, "redirect_uri") {
		t.Errorf("the provider sends elsewhere: %s", page)
	}
}

// Without the provider people read what is the case, and the host's own
// administrator logs in as ever.
func TestProviderDownLeavesTheLocalAdministrator(t *testing.T) {
	w := serveWithProvider(t, rulesOfTest)
	held := w.browser().login("ann")
	w.at.Stop()
	w.s.provider.oidc = oidc.New(w.s.cfg.OIDC, time.Now) // as after a restart of the centre
	code, _, page := w.browser().open("/auth/oidc")
	if code != http.StatusServiceUnavailable || !strings.Contains(page, "The identity provider does not answer") || !strings.Contains(page, AdminFile) {
		t.Errorf("%d %s", code, page)
	}
	if home := w.window(t).login().get("/", 200); !strings.Contains(home, "user:admin") {
		t.Errorf("the local administrator: %.800s", home)
	}
	if _, err := w.principal(held); err != nil {
		t.Errorf("a session from before: %v", err)
	}
}

// lineToken logs a command line in by a browser and returns its token.
func (w *withProvider) lineToken(b *browser) string {
	w.t.Helper()
	code, verifier := w.lineCode(b)
	in, err := w.access("").Login(context.Background(), &musterv1.LoginRequest{Code: code, Verifier: verifier})
	if err != nil {
		w.t.Fatal(err)
	}
	return in.Token
}

var lineLink = regexp.MustCompile(`href="http://127\.0\.0\.1:45678/\?code=([^&"]+)&amp;state=([^"]+)"`)

func (w *withProvider) lineCode(b *browser) (code, verifier string) {
	w.t.Helper()
	verifier, state := strings.Repeat("v", 43), base64.RawURLEncoding.EncodeToString(make([]byte, 32))
	sum := sha256.Sum256([]byte(verifier))
	challenge := base64.RawURLEncoding.EncodeToString(sum[:])
	status, _, page := b.open("/auth/oidc?port=45678&challenge=" + challenge + "&state=" + state)
	m := lineLink.FindStringSubmatch(page)
	if status != 200 || m == nil || m[2] != state || !strings.Contains(page, LoginCheck(challenge)) {
		w.t.Fatalf("%d %s", status, page)
	}
	return m[1], verifier
}

// A command line gets a token by a code that works once, for it alone; tokens
// of people of the provider end with their groups.
func TestCommandLineLogsInAtTheProvider(t *testing.T) {
	w := serveWithProvider(t, "session: 3h\ntokens: 48h\n"+rulesOfTest)
	ctx := context.Background()
	w.at.As("ann")
	b := w.browser()
	secret, verifier := w.lineCode(b)
	if b.cookie(sessionCookie) != "" {
		t.Error("the browser has a session that nobody asked for")
	}
	in, err := w.access("").Login(ctx, &musterv1.LoginRequest{Code: secret, Verifier: verifier})
	if err != nil || in.User != "oidc/ann@example.org" || in.Tenant != DefaultTenant || time.Until(in.Expires.AsTime()) > 3*time.Hour {
		t.Fatalf("%v, %v", in, err)
	}
	who, err := w.access(in.Token).WhoAmI(ctx, &musterv1.WhoAmIRequest{})
	if err != nil || who.Role != "operator" || len(who.Roles) != 2 {
		t.Errorf("%v, %v", who, err)
	}
	spent, _ := w.lineCode(b)
	for name, q := range map[string]*musterv1.LoginRequest{
		"the code again":      {Code: secret, Verifier: verifier},
		"a wrong verifier":    {Code: spent, Verifier: "w"},
		"and then the right":  {Code: spent, Verifier: verifier},
		"a code that is none": {Code: "x", Verifier: verifier},
		"a guess":             {Code: base64.RawURLEncoding.EncodeToString(make([]byte, 48)), Verifier: verifier},
		"no verifier":         {Code: spent},
	} {
		if name == "and then the right" {
			continue // after the loop: maps have no order
		}
		_, err := w.access("").Login(ctx, q)
		code(t, name, err, connect.CodeUnauthenticated)
	}
	_, err = w.access("").Login(ctx, &musterv1.LoginRequest{Code: spent, Verifier: verifier})
	code(t, "a code after a wrong verifier", err, connect.CodeUnauthenticated)
	late, verifier := w.lineCode(b)
	w.later(lineCodeLife + time.Second)
	_, err = w.access("").Login(ctx, &musterv1.LoginRequest{Code: late, Verifier: verifier})
	w.later(0)
	code(t, "a code after its time", err, connect.CodeUnauthenticated)
	for _, q := range []string{"port=80&challenge=x&state=y", "port=45678", "port=x&challenge=" + strings.Repeat("a", 43) + "&state=" + strings.Repeat("a", 43)} {
		if status, _, _ := w.browser().open("/auth/oidc?" + q); status != http.StatusBadRequest {
			t.Errorf("%s: %d", q, status)
		}
	}

	// An API token lives as long as the settings allow, and ends when its
	// holder logs in without the group it was made with.
	api := w.access(in.Token)
	_, err = api.CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "ci", Role: "viewer", ExpiresSeconds: 49 * 3600})
	code(t, "a token that outlives the settings", err, connect.CodeInvalidArgument)
	made, err := api.CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "ci", Role: "viewer"})
	if err != nil || time.Until(made.Token.Expires.AsTime()) > 48*time.Hour {
		t.Fatalf("%v, %v", made, err)
	}
	if _, err := w.manageAs(made.Secret).ListNodes(ctx, &musterv1.ListNodesRequest{}); err != nil {
		t.Fatal(err)
	}
	w.at.SetGroups("ann", "everybody")
	w.browser().login("ann")
	for name, token := range map[string]string{"the token": made.Secret, "the command line's": in.Token} {
		_, err := w.manageAs(token).ListNodes(ctx, &musterv1.ListNodesRequest{})
		code(t, name+" after the group ended", err, connect.CodeUnauthenticated)
	}
	// A centre without a provider knows none of them.
	kept := w.lineToken(b)
	provider := w.s.provider
	w.s.provider = nil
	_, err = w.manageAs(kept).ListNodes(ctx, &musterv1.ListNodesRequest{})
	code(t, "a token without the provider", err, connect.CodeUnauthenticated)
	_, err = w.access("").Login(ctx, &musterv1.LoginRequest{Code: late, Verifier: verifier})
	code(t, "a code without the provider", err, connect.CodeFailedPrecondition)
	w.s.provider = provider
	if err := w.s.store.View(ctx, func(tx store.Reader) error {
		all, err := tx.CredentialsOf("oidc/ann@example.org", store.CredentialToken, 10)
		for _, c := range all {
			if c.Revoked.IsZero() {
				t.Errorf("token %s goes on", c.ID)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
