package central

import (
	"context"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

func (r *running) access(token string) musterv1connect.AccessServiceClient {
	return musterv1connect.NewAccessServiceClient(r.client(), r.admin.Server, connect.WithInterceptors(withToken(token)))
}

func (r *running) manageAs(token string) musterv1connect.ManagementServiceClient {
	return musterv1connect.NewManagementServiceClient(r.client(), r.admin.Server, connect.WithInterceptors(withToken(token)))
}

func code(t *testing.T, what string, err error, want connect.Code) {
	t.Helper()
	if err == nil || connect.CodeOf(err) != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

// The start token lets in once; the host's file gets a new one, and goes on
// working.
func TestStartTokenIsUsedUp(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, nil)
	ctx := context.Background()
	start := r.admin.Token
	in, err := r.access("").Login(ctx, &musterv1.LoginRequest{Token: start})
	if err != nil {
		t.Fatal(err)
	}
	who, err := r.access(in.Token).WhoAmI(ctx, &musterv1.WhoAmIRequest{})
	if err != nil || who.User != "admin" || who.Role != "admin" || who.Kind != "personal" || who.Expires == nil {
		t.Fatalf("%v, %v", who, err)
	}
	_, err = r.access("").Login(ctx, &musterv1.LoginRequest{Token: start})
	code(t, "logging in twice with a start token", err, connect.CodeUnauthenticated)
	_, err = r.manageAs(start).ListNodes(ctx, &musterv1.ListNodesRequest{})
	code(t, "a used start token", err, connect.CodeUnauthenticated)
	again := accessOf(t, dir).admin.Token
	if again == start {
		t.Fatal("admin.yaml still has the used token")
	}
	if _, err := r.manageAs(again).ListNodes(ctx, &musterv1.ListNodesRequest{}); err != nil {
		t.Errorf("the host's new token: %v", err)
	}
	if info, err := os.Stat(filepath.Join(dir, AdminFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := r.access(in.Token).Logout(ctx, &musterv1.LogoutRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = r.access(in.Token).WhoAmI(ctx, &musterv1.WhoAmIRequest{})
	code(t, "after logging out", err, connect.CodeUnauthenticated)
	r.sound(t)
}

// A token does what it was made for, as long as its holder may, until it ends;
// its secret is nowhere in the database or in the audit log.
func TestTokens(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, nil)
	ctx := context.Background()
	ann := r.person(t, "ann", access.Binding{Tenant: DefaultTenant, Role: access.Operator})
	api := r.access(ann)
	_, err := api.CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "t", Role: "admin"})
	code(t, "a token above its holder", err, connect.CodePermissionDenied)
	for _, q := range []*musterv1.CreateTokenRequest{{Name: "T", Role: "viewer"}, {Name: "t", Role: "king"}, {Name: "t", Role: "viewer", Sites: "a=b=c"}, {Name: "t", Role: "viewer", ExpiresSeconds: 1 << 40}} {
		_, err := api.CreateToken(ctx, q)
		code(t, q.String(), err, connect.CodeInvalidArgument)
	}
	made, err := api.CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "ci", Role: "approver", ExpiresSeconds: 3600})
	if err != nil {
		t.Fatal(err)
	}
	_, err = api.CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "ci", Role: "viewer"})
	code(t, "the same name again", err, connect.CodeFailedPrecondition)
	ci := r.manageAs(made.Secret)
	if _, err := ci.ListNodes(ctx, &musterv1.ListNodesRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = ci.DenyNode(ctx, &musterv1.DenyNodeRequest{Id: "n-x", Reason: "r"})
	code(t, "beyond its role", err, connect.CodePermissionDenied)
	_, err = r.access(made.Secret).CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "child", Role: "viewer"})
	code(t, "a token that makes tokens", err, connect.CodePermissionDenied)
	_, err = r.access("").Login(ctx, &musterv1.LoginRequest{Token: made.Secret})
	code(t, "logging in with an API token", err, connect.CodeUnauthenticated)
	list, err := api.ListTokens(ctx, &musterv1.ListTokensRequest{})
	if err != nil || len(list.Tokens) != 2 || list.Tokens[0].LastUsed == nil || !strings.HasPrefix(made.Secret, list.Tokens[0].Prefix) {
		t.Errorf("%v, %v", list, err)
	}

	// Somebody else's tokens are not to be found, let alone revoked.
	eve := r.access(r.person(t, "eve", access.Binding{Tenant: DefaultTenant, Role: access.Operator}))
	_, err = eve.RevokeToken(ctx, &musterv1.RevokeTokenRequest{Id: made.Token.Id})
	code(t, "revoking somebody else's token", err, connect.CodeNotFound)
	_, err = eve.ListTokens(ctx, &musterv1.ListTokensRequest{All: true})
	code(t, "listing everybody's tokens", err, connect.CodePermissionDenied)

	// The holder's role ends, and with it what the token can do.
	admin := r.access(r.admin.Token)
	if _, err := admin.Revoke(ctx, &musterv1.RevokeRequest{Subject: "user:ann"}); err != nil {
		t.Fatal(err)
	}
	_, err = ci.ListNodes(ctx, &musterv1.ListNodesRequest{})
	code(t, "the token of somebody without a role", err, connect.CodeNotFound)
	if _, err := admin.Grant(ctx, &musterv1.GrantRequest{Subject: "ann", Role: "viewer"}); err != nil {
		t.Fatal(err)
	}
	_, err = ci.Approve(ctx, &musterv1.ApproveRequest{Id: "x"})
	code(t, "above what the holder may now", err, connect.CodePermissionDenied)
	if _, err := ci.ListNodes(ctx, &musterv1.ListNodesRequest{}); err != nil {
		t.Error(err)
	}

	// It expires.
	late := time.Now().Add(2 * time.Hour)
	kinds := map[store.CredentialKind]bool{store.CredentialToken: true}
	r.s.cfg.Now = func() time.Time { return late }
	_, err = r.s.principalOfToken(ctx, made.Secret, "", "", kinds)
	code(t, "an expired token", err, connect.CodeUnauthenticated)
	r.s.cfg.Now = time.Now
	if _, err := admin.RevokeToken(ctx, &musterv1.RevokeTokenRequest{Id: made.Token.Prefix, Reason: "leaked"}); err != nil {
		t.Fatal(err)
	}
	_, err = ci.ListNodes(ctx, &musterv1.ListNodesRequest{})
	code(t, "a revoked token", err, connect.CodeUnauthenticated)

	records, err := r.records()
	if err != nil {
		t.Fatal(err)
	}
	granted := 0
	for _, a := range records {
		for _, b := range [][]byte{a.Before, a.After} {
			if strings.Contains(string(b), made.Secret) || strings.Contains(string(b), r.admin.Token) {
				t.Errorf("record %d holds a secret", a.Seq)
			}
		}
		if a.Kind == audit.RoleGranted && a.Actor == "user:admin" && a.Source != "" && len(a.After) > 0 {
			granted++
		}
	}
	if granted != 1 {
		t.Errorf("%d records of the grant", granted)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{databaseFile, databaseFile + "-wal"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil && (strings.Contains(string(b), made.Secret) || strings.Contains(string(b), r.admin.Token)) {
			t.Errorf("%s holds a secret in clear", name)
		}
	}
}

// A tenant has its own people and its own log; handing it over ends what
// others had in it, and nothing before the new owner has come.
func TestTenantHandOver(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	admin := r.access(r.admin.Token)
	if _, err := admin.CreateTenant(ctx, &musterv1.CreateTenantRequest{Name: "acme", Title: "ACME"}); err != nil {
		t.Fatal(err)
	}
	_, err := admin.CreateTenant(ctx, &musterv1.CreateTenantRequest{Name: "acme"})
	code(t, "a second one of that name", err, connect.CodeFailedPrecondition)
	bob := r.person(t, "bob", access.Binding{Tenant: "acme", Role: access.Admin})
	token, err := r.access(bob).CreateToken(ctx, &musterv1.CreateTokenRequest{Name: "ci", Role: "admin"})
	if err != nil {
		t.Fatal(err)
	}
	// Bob's calls act in acme without being told so; the default tenant is
	// none for him.
	if who, err := r.access(bob).WhoAmI(ctx, &musterv1.WhoAmIRequest{}); err != nil || who.Tenant != "acme" {
		t.Errorf("%v, %v", who, err)
	}
	if list, err := r.access(bob).ListTenants(ctx, &musterv1.ListTenantsRequest{}); err != nil || len(list.Tenants) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	_, err = r.access(bob).CreateTenant(ctx, &musterv1.CreateTenantRequest{Name: "other"})
	code(t, "a tenant made by a tenant's admin", err, connect.CodePermissionDenied)
	_, err = r.access(bob).Grant(ctx, &musterv1.GrantRequest{Subject: "bob", Role: "admin", Centre: true})
	code(t, "a role over the centre from a tenant's admin", err, connect.CodePermissionDenied)
	_, err = r.access(bob).HandOverTenant(ctx, &musterv1.HandOverTenantRequest{Name: DefaultTenant, User: "zoe", Reason: "r"})
	code(t, "handing over another tenant", err, connect.CodeNotFound)
	out, err := r.access(bob).HandOverTenant(ctx, &musterv1.HandOverTenantRequest{Name: "acme", User: "zoe", Reason: "sold"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.manageAs(token.Secret).ListNodes(ctx, &musterv1.ListNodesRequest{}); err != nil {
		t.Errorf("before the new owner came: %v", err)
	}
	_, err = r.manageAs(out.Secret).ListNodes(ctx, &musterv1.ListNodesRequest{})
	code(t, "an invitation as a token", err, connect.CodeUnauthenticated)
	zoe, err := r.access("").Login(ctx, &musterv1.LoginRequest{Token: out.Secret})
	if err != nil || zoe.Tenant != "acme" {
		t.Fatal(zoe, err)
	}
	for what, secret := range map[string]string{"the old admin": bob, "their token": token.Secret} {
		_, err := r.manageAs(secret).ListNodes(ctx, &musterv1.ListNodesRequest{})
		if c := connect.CodeOf(err); err == nil || c != connect.CodeUnauthenticated && c != connect.CodeNotFound {
			t.Errorf("%s after the hand-over: %v", what, err)
		}
	}
	_, err = r.access("").Login(ctx, &musterv1.LoginRequest{Token: out.Secret})
	code(t, "an invitation used twice", err, connect.CodeUnauthenticated)
	if v, err := r.manageAs(zoe.Token).VerifyAudit(ctx, &musterv1.VerifyAuditRequest{}); err != nil || !v.Ok || v.Records < 6 {
		t.Errorf("%v, %v", v, err)
	}
	list, err := r.manageAs(zoe.Token).ListAudit(ctx, &musterv1.ListAuditRequest{})
	if err != nil {
		t.Fatal(err)
	}
	kinds := ""
	for _, a := range list.Records {
		kinds += a.Kind + " "
	}
	if !strings.Contains(kinds, string(audit.TenantHandedOver)) || !strings.Contains(kinds, string(audit.RoleRevoked)) || !strings.Contains(kinds, string(audit.TokenRevoked)) {
		t.Errorf("the tenant's log: %s", kinds)
	}
}

// Sessions: host-only, strict, made anew at each log-in, ended by logging out;
// forms only from our own pages.
func TestSessions(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	base, err := url.Parse(r.admin.Server)
	if err != nil {
		t.Fatal(err)
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := r.client()
	client.Jar = jar
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	post := func(path string, form url.Values, headers ...string) *http.Response {
		t.Helper()
		q, err := http.NewRequest(http.MethodPost, r.admin.Server+path, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		for i := 0; i+1 < len(headers); i += 2 {
			q.Header.Set(headers[i], headers[i+1])
		}
		resp, err := client.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	// page is a page of the console, with the token of its forms.
	page := func(path string) string {
		t.Helper()
		resp, err := client.Get(r.admin.Server + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		m := formToken.FindSubmatch(b)
		if m == nil {
			t.Fatalf("%s has no form: %s", path, resp.Status)
		}
		return string(m[1])
	}
	login := func(token, next string, headers ...string) *http.Response {
		t.Helper()
		return post("/login", url.Values{"csrf": {page("/login")}, "token": {token}, "next": {next}}, headers...)
	}
	session := func() *http.Request {
		q, err := http.NewRequest(http.MethodPost, r.admin.Server+"/x", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range jar.Cookies(base) {
			q.AddCookie(c)
		}
		return q
	}
	// A cookie that somebody planted is no session, before and after.
	jar.SetCookies(base, []*http.Cookie{{Name: sessionCookie, Value: "muster_planted", Path: "/", Secure: true}})
	if _, err := r.s.SessionPrincipal(session()); err != ErrNoSession {
		t.Fatalf("a planted cookie: %v", err)
	}
	if resp := login("muster_wrong", "/nodes"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("a wrong token: %s", resp.Status)
	}
	if resp := login(r.admin.Token, "/", "Sec-Fetch-Site", "cross-site"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("logging in from a foreign page: %s", resp.Status)
	}
	if resp := post("/login", url.Values{"token": {r.admin.Token}}); resp.StatusCode != http.StatusForbidden {
		t.Errorf("logging in without the form's token: %s", resp.Status)
	}
	// There is no second door, which would have no limit on guessing.
	for _, path := range []string{"/auth/login", "/auth/logout"} {
		if resp := post(path, url.Values{"token": {r.admin.Token}}); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	ann := r.person(t, "ann", access.Binding{Tenant: DefaultTenant, Role: access.Viewer})
	resp := login(ann, "/nodes")
	if resp.StatusCode != http.StatusSeeOther || resp.Header.Get("Location") != "/nodes" {
		t.Fatalf("%s %s", resp.Status, resp.Header.Get("Location"))
	}
	set := ""
	for _, c := range resp.Header.Values("Set-Cookie") {
		if strings.HasPrefix(c, sessionCookie+"=") {
			set = c
		}
	}
	for _, want := range []string{"__Host-muster=", "Path=/", "HttpOnly", "Secure", "SameSite=Strict"} {
		if !strings.Contains(set, want) {
			t.Errorf("Set-Cookie %q lacks %s", set, want)
		}
	}
	if strings.Contains(set, "Domain") || strings.Contains(set, "planted") {
		t.Errorf("Set-Cookie %q", set)
	}
	first := session()
	p, err := r.s.SessionPrincipal(first)
	if err != nil || p.Name != "ann" || p.Role() != access.Viewer {
		t.Fatalf("%+v, %v", p, err)
	}
	// The cookie is no bearer token, and the API does not look at cookies.
	_, err = r.manageAs(cookieOf(first, sessionCookie)).ListNodes(context.Background(), &musterv1.ListNodesRequest{})
	code(t, "a session as a bearer token", err, connect.CodeUnauthenticated)
	if resp := post(musterv1connect.ManagementServiceListNodesProcedure, nil, "Content-Type", "application/json"); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("the API by cookie: %s", resp.Status)
	}

	// Logging in again ends the first session.
	login(ann, "/")
	if _, err := r.s.SessionPrincipal(first); err != ErrNoSession {
		t.Errorf("the session before: %v", err)
	}
	second := session()
	if cookieOf(second, sessionCookie) == cookieOf(first, sessionCookie) {
		t.Error("the session's value did not change")
	}
	// Idle, then absolute end.
	now := time.Now()
	at := func(d time.Duration) error {
		r.s.cfg.Now = func() time.Time { return now.Add(d) }
		defer func() { r.s.cfg.Now = time.Now }()
		_, err := r.s.SessionPrincipal(second)
		return err
	}
	if err := at(sessionIdle - time.Minute); err != nil {
		t.Errorf("used within the idle time: %v", err)
	}
	if err := at(3 * sessionIdle); err != ErrNoSession {
		t.Errorf("idle: %v", err)
	}
	for d := sessionIdle - 2*time.Minute; d < sessionLife; d += sessionIdle / 2 {
		if err := at(d); err != nil {
			t.Fatalf("after %s of use: %v", d, err)
		}
	}
	if err := at(sessionLife + time.Minute); err != ErrNoSession {
		t.Errorf("after its life: %v", err)
	}
	if resp := post("/logout", url.Values{"csrf": {"x"}}); resp.StatusCode != http.StatusForbidden {
		t.Errorf("logging out without the form's token: %s", resp.Status)
	}
	if resp := post("/logout", url.Values{"csrf": {page("/access")}}); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("logging out: %s", resp.Status)
	}
	if _, err := r.s.SessionPrincipal(second); err != ErrNoSession {
		t.Errorf("after logging out: %v", err)
	}
}

// The API without a socket is the same API, gate included.
func TestInside(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	api := musterv1connect.NewManagementServiceClient(&http.Client{Transport: r.s.Inside()}, "http://inside")
	as := func(role access.Role) context.Context {
		return access.NewContext(context.Background(), access.Principal{Name: "x", Tenant: DefaultTenant, Bindings: []access.Binding{{Tenant: DefaultTenant, Role: role}}})
	}
	out, err := api.GetCentre(as(access.Viewer), &musterv1.GetCentreRequest{})
	if err != nil || out.Role != "viewer" {
		t.Fatalf("%v, %v", out, err)
	}
	_, err = api.DenyNode(as(access.Viewer), &musterv1.DenyNodeRequest{Id: "x", Reason: "r"})
	code(t, "beyond the role", err, connect.CodePermissionDenied)
	if _, err := api.GetCentre(context.Background(), &musterv1.GetCentreRequest{}); err == nil {
		t.Error("somebody without a principal is answered")
	}
	ctx, cancel := context.WithCancel(as(access.Viewer))
	defer cancel()
	stream, err := api.WatchEvents(ctx, &musterv1.WatchEventsRequest{Follow: true})
	if err != nil || !stream.Receive() {
		t.Fatalf("events: %v, %v", err, stream.Err())
	}
	cancel()
	for stream.Receive() {
	}
}

// Somebody of one part of the tenant sees that part alone: lists, single
// objects by whole ID and by prefix, events, counts.
func TestPartOfATenant(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	q, _, _ := r.enroll(t, newMachine(t, "a")) // at shop-7
	selector, err := fleet.ParseSelector("muster/site=elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	api := r.manageAs(r.person(t, "out", access.Binding{Tenant: DefaultTenant, Role: access.Operator, Sites: selector}))
	id := string(q.Node)
	for _, by := range []string{id, id[:6], fleet.Words(q.Node)} {
		_, err := api.GetNode(ctx, &musterv1.GetNodeRequest{Id: by})
		code(t, "a node outside by "+by, err, connect.CodeNotFound)
	}
	nodes, err := api.ListNodes(ctx, &musterv1.ListNodesRequest{})
	if err != nil || len(nodes.Nodes) != 0 {
		t.Errorf("%v, %v", nodes, err)
	}
	sites, err := api.ListSites(ctx, &musterv1.ListSitesRequest{})
	if err != nil || len(sites.Sites) != 0 {
		t.Errorf("%v, %v", sites, err)
	}
	centre, err := api.GetCentre(ctx, &musterv1.GetCentreRequest{})
	if err != nil || len(centre.Nodes) != 0 {
		t.Errorf("%v, %v", centre.GetNodes(), err)
	}
	_, err = api.SetSite(ctx, &musterv1.SetSiteRequest{Name: "third", Create: true})
	code(t, "a site made outside", err, connect.CodePermissionDenied)
	if _, err := api.SetSite(ctx, &musterv1.SetSiteRequest{Name: "elsewhere", Create: true}); err != nil {
		t.Errorf("a site of their own: %v", err)
	}
	stream, err := api.WatchEvents(ctx, &musterv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
		if e := stream.Msg().Event; e != nil && e.Node == id {
			t.Errorf("event of a hidden node: %v", e)
		}
	}
}
