package console

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
)

// people is the access service of the fake centre.
type people struct {
	musterv1connect.UnimplementedAccessServiceHandler

	mu       sync.Mutex
	bindings []*musterv1.RoleBinding
	tokens   []*musterv1.AccessToken
	stacks   []*musterv1.StackSummary
	drift    *musterv1.GetDriftResponse
	done     []string
}

// secretOfTest is what a new token is: 256 bits, written as the centre does.
const secretOfTest = "muster_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"

func (p *people) furnishPeople() {
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(start.Add(d)) }
	p.bindings = []*musterv1.RoleBinding{
		{Id: "b-aaaa", Subject: "user:admin", Tenant: "*", Role: "admin", Created: at(-900 * time.Hour), CreatedBy: "system", Reason: "administrator of the host"},
		{Id: "b-bbbb", Subject: "user:anna", Tenant: "default", Role: "admin", Created: at(-500 * time.Hour), CreatedBy: "user:admin"},
		{Id: "b-cccc", Subject: "group:technicians", Tenant: "default", Role: "operator", Sites: "region=north", Created: at(-40 * time.Hour), CreatedBy: "user:anna"},
		{Id: "b-dddd", Subject: "user:oidc/lena@example.org", Tenant: "default", Role: "viewer", Created: at(-2 * time.Hour), CreatedBy: "user:anna", Reason: "looks at drift"},
	}
	scope := func(role, sites string) []*musterv1.RoleBinding {
		return []*musterv1.RoleBinding{{Tenant: "default", Role: role, Sites: sites}}
	}
	p.tokens = []*musterv1.AccessToken{
		{Id: "c-self", Kind: "session", Holder: "anna", Prefix: "muster_9dKq2", Created: at(-time.Hour), Expires: at(11 * time.Hour), LastUsed: at(-10 * time.Second), Source: "192.0.2.7"},
		{Id: "c-ci", Kind: "token", Name: "ci", Holder: "anna", Prefix: "muster_3fG9a", Scopes: scope("viewer", ""), Created: at(-600 * time.Hour), Expires: at(20 * 24 * time.Hour), LastUsed: at(-3 * time.Minute), Source: "192.0.2.7"},
		{Id: "c-north", Kind: "token", Name: "north-installer", Holder: "ben", Prefix: "muster_Qq81z", Scopes: scope("approver", "region=north"), Created: at(-80 * time.Hour), Expires: at(30 * time.Minute), Source: "198.51.100.20"},
		{Id: "c-desk", Kind: "personal", Holder: "oidc/lena@example.org", Prefix: "muster_Lm55b", Created: at(-2 * time.Hour), Expires: at(10 * time.Hour), LastUsed: at(-time.Hour), Source: "2001:db8::7"},
		{Id: "c-old", Kind: "token", Name: "old", Holder: "anna", Prefix: "muster_Zz0aa", Scopes: scope("operator", ""), Created: at(-2000 * time.Hour), Ended: "has expired", Expires: at(-time.Hour)},
	}
	version := func(name, k3s, etcd string, ago time.Duration) *musterv1.PublishedVersion {
		return &musterv1.PublishedVersion{
			Version: &musterv1.StackVersion{
				Tenant: "default", Stack: "store", Version: name, K3S: k3s, EtcdMinor: etcd,
				Images: []*musterv1.ImageRef{{Name: "store", Version: name, Arch: "amd64"}},
				AddOns: []*musterv1.AddOn{{Name: "longhorn", Version: "1.9.0"}}, Apps: []*musterv1.App{{Chart: &musterv1.AddOn{Name: "till", Version: "4"}}},
			},
			Sha256: []byte(name + "0123456789abcdef"), Published: at(-ago), By: "user:anna", KeyId: "5a1f0c77d2e94b10",
		}
	}
	p.stacks = []*musterv1.StackSummary{
		{Stack: &musterv1.Stack{Meta: meta("store"), Title: "Shops with a till"}, Sites: map[string]uint32{"1.4.0": 5, "1.3.2": 1, "1.2.9": 1}, Versions: []*musterv1.PublishedVersion{
			version("1.4.0", "v1.36.3+k3s1", "3.6", 50*time.Hour), version("1.3.2", "v1.35.4+k3s1", "3.6", 900*time.Hour)}},
		{Stack: &musterv1.Stack{Meta: meta("press"), Title: "Halls with machines"}},
	}
	p.drift = &musterv1.GetDriftResponse{Sites: 6, SitesCurrent: 3, Summary: "3 of 6 sites current; 1 blocked, 1 updating, 1 unknown", Now: at(0), Outliers: []*musterv1.SiteDrift{
		{Site: "shop-8", Desired: "store@1.4.0", State: "updating", Why: "one of three nodes has the new version", Nodes: 3, NodesCurrent: 1, LastHeard: at(-40 * time.Second)},
		{Site: "shop-12", Desired: "store@1.4.0", State: "blocked", Why: "a node went back to 1.3.2 and will not try again by itself", Nodes: 3, NodesCurrent: 2, LastHeard: at(-20 * time.Second), Outliers: []*musterv1.NodeDrift{
			{Node: "n-x", Words: "amber canoe dune fox lamp oak", Running: "store@1.3.2", Why: "rolled back: the network was not up after 5 minutes"}}},
		{Site: "ship-aurora", Desired: "store@1.4.0", State: "unknown", Why: "nothing was heard for two days", Nodes: 2, Stale: true, LastHeard: at(-41 * time.Hour)},
	}}
}

func meta(name string) *musterv1.Meta {
	return &musterv1.Meta{Tenant: "default", Name: name, Generation: 1, Labels: map[string]string{"line": "retail"}}
}

// poisonPeople puts a hostile string wherever people, a provider or a stack
// could have one.
func (p *people) poisonPeople(s string) {
	p.bindings = append(p.bindings, &musterv1.RoleBinding{Id: fmt.Sprint("b-", len(p.bindings)), Subject: s, Tenant: s, Role: s, Sites: s, CreatedBy: s, Reason: s})
	p.tokens = append(p.tokens, &musterv1.AccessToken{Id: fmt.Sprint("c-", len(p.tokens)), Kind: s, Name: s, Holder: s, Prefix: s, Source: s, Ended: s, Scopes: []*musterv1.RoleBinding{{Role: s, Sites: s}}})
	v := p.stacks[0].Versions[0].Version
	v.K3S, v.AddOns = s, append(v.AddOns, &musterv1.AddOn{Name: s, Version: s})
	p.stacks[0].Versions[0].By = s
	p.stacks[1].Stack.Title = s
	p.drift.Outliers = append(p.drift.Outliers, &musterv1.SiteDrift{Site: s, Desired: s, State: s, Why: s, Outliers: []*musterv1.NodeDrift{{Node: s, Words: s, Running: s, Why: s}}})
}

func (p *people) did(format string, args ...any) {
	p.done = append(p.done, fmt.Sprintf(format, args...))
}

func (p *people) acts() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.done...)
}

// admin refuses like the API.
func admin(ctx context.Context) error {
	if s, _ := ctx.Value(actorKey{}).(Session); s.Role != "admin" {
		return connect.NewError(connect.CodePermissionDenied, errors.New("the role "+s.Role+" does not allow this; it takes admin"))
	}
	return nil
}

func (p *people) WhoAmI(ctx context.Context, _ *musterv1.WhoAmIRequest) (*musterv1.WhoAmIResponse, error) {
	s, _ := ctx.Value(actorKey{}).(Session)
	return &musterv1.WhoAmIResponse{
		User: "anna", Tenant: "default", Role: s.Role, Credential: "c-self", Kind: "session", Expires: timestamppb.New(start.Add(11 * time.Hour)),
		Roles: []*musterv1.RoleBinding{{Tenant: "default", Role: s.Role}},
	}, nil
}

func (p *people) ListBindings(ctx context.Context, _ *musterv1.ListBindingsRequest) (*musterv1.ListBindingsResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &musterv1.ListBindingsResponse{Bindings: p.bindings}, admin(ctx)
}

func (p *people) Grant(ctx context.Context, q *musterv1.GrantRequest) (*musterv1.GrantResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := admin(ctx); err != nil {
		return nil, err
	}
	if strings.Contains(q.Subject, " ") {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%q is no name", q.Subject))
	}
	b := &musterv1.RoleBinding{Id: fmt.Sprint("b-new", len(p.bindings)), Subject: q.Subject, Tenant: "default", Role: q.Role, Sites: q.Sites, Reason: q.Reason, Created: timestamppb.New(start)}
	p.bindings = append(p.bindings, b)
	p.did("grant %s %s sites=%s", q.Subject, q.Role, q.Sites)
	return &musterv1.GrantResponse{Binding: b}, nil
}

func (p *people) Revoke(ctx context.Context, q *musterv1.RevokeRequest) (*musterv1.RevokeResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := admin(ctx); err != nil {
		return nil, err
	}
	for i, b := range p.bindings {
		if b.Id == q.Id {
			p.bindings = append(p.bindings[:i:i], p.bindings[i+1:]...)
			p.did("revoke %s reason=%s", q.Id, q.Reason)
			return &musterv1.RevokeResponse{Revoked: []*musterv1.RoleBinding{b}}, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such role"))
}

func (p *people) Invite(ctx context.Context, q *musterv1.InviteRequest) (*musterv1.InviteResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := admin(ctx); err != nil {
		return nil, err
	}
	p.did("invite %s %s", q.User, q.Role)
	return &musterv1.InviteResponse{Secret: secretOfTest, Token: &musterv1.AccessToken{Id: "c-inv", Kind: "invitation", Holder: q.User, Expires: timestamppb.New(start.Add(7 * 24 * time.Hour))}}, nil
}

func (p *people) ListTokens(_ context.Context, q *musterv1.ListTokensRequest) (*musterv1.ListTokensResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := &musterv1.ListTokensResponse{}
	for _, t := range p.tokens {
		if (q.All || t.Holder == "anna") && (q.Ended || t.Ended == "") {
			out.Tokens = append(out.Tokens, t)
		}
	}
	return out, nil
}

func (p *people) CreateToken(_ context.Context, q *musterv1.CreateTokenRequest) (*musterv1.CreateTokenResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.tokens {
		if t.Name == q.Name {
			return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("you have a token %q already", q.Name))
		}
	}
	t := &musterv1.AccessToken{
		Id: "c-new", Kind: "token", Name: q.Name, Holder: "anna", Prefix: secretOfTest[:13], Created: timestamppb.New(start), Expires: timestamppb.New(start.Add(time.Duration(q.ExpiresSeconds) * time.Second)),
		Scopes: []*musterv1.RoleBinding{{Role: q.Role, Sites: q.Sites}},
	}
	p.tokens = append(p.tokens, t)
	p.did("token %s %s sites=%s for %s", q.Name, q.Role, q.Sites, time.Duration(q.ExpiresSeconds)*time.Second)
	return &musterv1.CreateTokenResponse{Token: t, Secret: secretOfTest}, nil
}

func (p *people) RevokeToken(_ context.Context, q *musterv1.RevokeTokenRequest) (*musterv1.RevokeTokenResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.tokens {
		if t.Id == q.Id {
			t.Ended = "was revoked"
			p.did("end %s reason=%s", q.Id, q.Reason)
			return &musterv1.RevokeTokenResponse{Token: t}, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such token that you may revoke"))
}

func (f *fake) ListStacks(context.Context, *musterv1.ListStacksRequest) (*musterv1.ListStacksResponse, error) {
	return &musterv1.ListStacksResponse{Stacks: f.stacks}, nil
}

func (f *fake) GetStack(_ context.Context, q *musterv1.GetStackRequest) (*musterv1.GetStackResponse, error) {
	for _, s := range f.stacks {
		if s.Stack.Meta.Name == q.Name {
			return &musterv1.GetStackResponse{Stack: s}, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no stack %.80q", q.Name))
}

func (f *fake) GetDrift(context.Context, *musterv1.GetDriftRequest) (*musterv1.GetDriftResponse, error) {
	return f.drift, nil
}

// A secret is on the answer that makes it and on no other page, in no address
// and in no memory of the browser.
func TestASecretIsShownOnce(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_admin")
	page, res := p.post("/tokens", url.Values{"name": {"backup"}, "role": {"viewer"}, "sites": {"region=north"}, "days": {"7"}}, 200)
	if strings.Count(page, secretOfTest) != 2 || !strings.Contains(page, "It is shown this once") || !strings.Contains(page, stamp(start.Add(7*24*time.Hour))) {
		t.Errorf("the page: %s", page)
	}
	if res.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("it may be kept: %q", res.Header.Get("Cache-Control"))
	}
	page, _ = p.post("/access/invite", url.Values{"name": {"zoe"}, "role": {"approver"}}, 200)
	if strings.Count(page, secretOfTest) != 2 {
		t.Errorf("the invitation: %s", page)
	}
	for name, path := range pagesOf(f) {
		if strings.Contains(p.get(path, 200), secretOfTest) {
			t.Errorf("%s shows the secret", name)
		}
	}
	if got := strings.Join(f.people.acts(), "; "); got != "token backup viewer sites=region=north for 168h0m0s; invite zoe approver" {
		t.Errorf("done: %s", got)
	}
}

// What the API refuses is said on the page, with the form as it was filled in.
func TestFormsOfPeopleSayWhatIsWrong(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_admin")
	for _, x := range []struct {
		path string
		form url.Values
		code int
		want []string
	}{
		{"/access/grant", url.Values{"name": {"two words"}, "role": {"operator"}, "sites": {"a=b"}}, 400, []string{"Nothing was done", "is no name", `value="two words"`, "<option selected>operator"}},
		{"/access/revoke", url.Values{"id": {"b-none"}}, 404, []string{"There is no such role"}},
		{"/tokens", url.Values{"name": {"ci"}, "days": {"30"}}, 409, []string{"you have a token", `value="ci"`}},
		{"/tokens/revoke", url.Values{"id": {"c-none"}}, 404, []string{"There is no such token"}},
	} {
		page, _ := p.post(x.path, x.form, x.code)
		for _, w := range x.want {
			if !strings.Contains(strings.ToLower(page), strings.ToLower(w)) {
				t.Errorf("%s lacks %q: %.4000s", x.path, w, page)
			}
		}
	}
	if got := f.people.acts(); len(got) != 0 {
		t.Errorf("done: %q", got)
	}
	// Twins.
	p.post("/access/grant", url.Values{"name": {"group:night"}, "role": {"operator"}, "sites": {"region=north"}}, 303)
	p.post("/access/revoke", url.Values{"id": {"b-dddd"}, "reason": {"left"}}, 303)
	p.post("/tokens/revoke", url.Values{"id": {"c-ci"}}, 303)
	if _, res := p.post("/tokens/revoke", url.Values{"id": {"c-self"}}, 303); res.Header.Get("Location") != "/login" {
		t.Errorf("after ending the own session: %s", res.Header.Get("Location"))
	}
	if got := strings.Join(f.people.acts(), "; "); got != "grant group:night operator sites=region=north; revoke b-dddd reason=left; end c-ci reason=; end c-self reason=" {
		t.Errorf("done: %s", got)
	}
}

// Who is no admin sees their own roles and tokens, and is refused what they
// post all the same.
func TestWhoIsNoAdminSeesTheirOwn(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_viewer")
	page := p.get("/access", 200)
	for _, secret := range []string{"group:technicians", "Give a role", "lena"} {
		if strings.Contains(page, secret) {
			t.Errorf("a viewer sees %q", secret)
		}
	}
	if !strings.Contains(page, "<strong>viewer</strong> in tenant default") {
		t.Errorf("own roles: %s", page)
	}
	page = p.get("/tokens?all=1", 200)
	if strings.Contains(page, "north-installer") || strings.Contains(page, "Everybody") || strings.Contains(page, "<option>operator") {
		t.Errorf("a viewer's tokens: %s", page)
	}
	for path, form := range map[string]url.Values{
		"/access/grant": {"name": {"anna"}, "role": {"admin"}}, "/access/revoke": {"id": {"b-aaaa"}}, "/access/invite": {"name": {"x"}, "role": {"admin"}},
	} {
		if page, _ := p.post(path, form, 403); !strings.Contains(page, "it takes admin") {
			t.Errorf("%s: %s", path, page)
		}
	}
	if got := f.people.acts(); len(got) != 0 {
		t.Errorf("done: %q", got)
	}
	// Without a session, or with a form of somebody else's, nothing at all.
	stranger := visitor(t, c)
	for _, path := range []string{"/access/grant", "/access/revoke", "/access/invite", "/tokens", "/tokens/revoke"} {
		if res := stranger.do("POST", path, url.Values{"name": {"x"}, "id": {"b-aaaa"}}); res.StatusCode != http.StatusSeeOther || res.Header.Get("Location") != "/login" {
			t.Errorf("%s by a stranger: %d", path, res.StatusCode)
		}
		if res := p.do("POST", path, url.Values{"csrf": {"x"}, "name": {"x"}, "id": {"b-aaaa"}}); res.StatusCode != http.StatusForbidden {
			t.Errorf("%s with a foreign form: %d", path, res.StatusCode)
		}
	}
}

func TestStacksShowWhatDiffersFirst(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_viewer")
	page := p.get("/stacks", 200)
	at := -1
	for _, want := range []string{"3 of 6 sites current", "shop-12", "ship-aurora", "shop-8"} {
		i := strings.Index(page, want)
		if i <= at {
			t.Errorf("%q is not where it should be", want)
		}
		at = i
	}
	page = p.get("/stacks/store", 200)
	for _, want := range []string{"1.4.0", "v1.36.3", "longhorn 1.9.0", "till 4", "1 site shall run a version that is not published", "muster get drift --stack store --all"} {
		if !strings.Contains(page, want) {
			t.Errorf("the stack lacks %q", want)
		}
	}
	if strings.Contains(page, "muster assign") {
		t.Error("a viewer is told how to assign")
	}
	p.get("/stacks/none", 404)
	f.stacks = nil
	if page := p.get("/stacks", 200); !strings.Contains(page, "muster stack publish SIGNED") {
		t.Errorf("no stacks: %s", page)
	}
}

func TestEnds(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Hour: "now", 0: "now", time.Second: "in 1 min", 59 * time.Minute: "in 59 min", 11*time.Hour + 59*time.Minute: "in 11 h", 47 * time.Hour: "in 47 h", 72*time.Hour + time.Minute: "in 3 days",
	} {
		if got := ends(start, start.Add(d)); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}

// By keyboard alone: to the page, a token made, another one ended.
func TestBrowserMakesAndEndsATokenByKeyboard(t *testing.T) {
	f := furnished()
	b := open(t, f)
	b.login("muster_admin")
	b.run(chromedp.KeyEvent("g"), chromedp.KeyEvent("t"))
	b.until("location.pathname === '/tokens'")
	b.run(chromedp.WaitVisible("#name", chromedp.ByQuery))
	b.key("a")
	b.until("document.activeElement.id === 'name'")
	b.run(chromedp.KeyEvent("backup"), chromedp.KeyEvent(kb.Enter), chromedp.WaitVisible("[data-secret]", chromedp.ByQuery))
	if s := b.text("[data-secret]"); s != secretOfTest {
		t.Errorf("the page shows %q", s)
	}
	b.goTo("/tokens")
	b.run(chromedp.KeyEvent("j"), chromedp.KeyEvent("j"), chromedp.KeyEvent("o"))
	b.until("document.querySelector('#token-c-ci details').open")
	b.run(chromedp.KeyEvent(kb.Tab))
	b.until("document.activeElement.id === 'why-c-ci'")
	b.run(chromedp.KeyEvent("leaked"), chromedp.KeyEvent(kb.Enter))
	b.until("location.search === '?done=revoked'")
	want := []string{"token backup viewer sites= for 720h0m0s", "end c-ci reason=leaked"}
	if got := f.people.acts(); strings.Join(got, ";") != strings.Join(want, ";") {
		t.Errorf("done: %q", got)
	}
}

// fakeProvider is an identity provider: what is asked of it says what it does.
type fakeProvider struct{}

func (fakeProvider) Title() string { return "Log in with Acme" }

var noRoleOfTest = &LoginProblem{
	Code: http.StatusForbidden, Title: "You have no role here yet", Text: "The identity provider knows you as bob@example.org, and nothing gives you a role in this centre.",
	Details: []string{"Your groups: " + hostile[0] + ", " + hostile[3] + "."}, Commands: []string{"muster access grant oidc/bob@example.org --role viewer"},
}

func (fakeProvider) Begin(_ http.ResponseWriter, _ *http.Request, next string) (string, error) {
	if next == "/sites" {
		return "", noRoleOfTest
	}
	return "https://login.example.org/authorize?next=" + url.QueryEscape(next), nil
}

func (fakeProvider) Finish(_ http.ResponseWriter, r *http.Request) (Arrival, error) {
	switch r.URL.Query().Get("state") {
	case "good":
		return Arrival{Next: r.URL.Query().Get("next")}, nil
	case "line":
		return Arrival{Line: &CommandLine{Name: "oidc/ann@example.org", Check: "ABCD-EFGH", URL: "http://127.0.0.1:45678/?code=c&state=s"}}, nil
	case "broken":
		return Arrival{}, errors.New("the database is full of secrets")
	}
	return Arrival{}, &LoginProblem{Code: http.StatusForbidden, Title: "You could not be logged in", Text: "This log-in was used already.", Tried: true}
}

// The pages around an identity provider: nobody is sent elsewhere by them but
// to the provider, what it says is text, and guessing is slow.
func TestPagesOfTheProvider(t *testing.T) {
	c, _ := newConsole(t, furnished())
	p := visitor(t, c)
	if page := p.get("/login?next=/nodes", 200); !strings.Contains(page, `href="/auth/oidc?next=%2fnodes"`) && !strings.Contains(page, `href="/auth/oidc?next=/nodes"`) && !strings.Contains(page, `href="/auth/oidc?next=%2Fnodes"`) {
		t.Errorf("the log-in page: %s", page)
	}
	for next, want := range map[string]string{"/nodes": "%2Fnodes", "//evil.example": "%2F", "/auth/oidc": "%2F"} {
		res := p.do("GET", "/auth/oidc?next="+url.QueryEscape(next), nil)
		if to := res.Header.Get("Location"); res.StatusCode != http.StatusSeeOther || to != "https://login.example.org/authorize?next="+want {
			t.Errorf("%s: %d to %s", next, res.StatusCode, to)
		}
	}
	page := p.get("/auth/oidc?next=/sites", 403)
	if strings.Contains(page, "<script>window") || strings.Contains(page, "\u202e") || !strings.Contains(page, "&lt;script&gt;window.owned") || !strings.Contains(page, "muster access grant oidc/bob@example.org") {
		t.Errorf("no role: %s", page)
	}
	for next, want := range map[string]string{"/nodes": "/nodes", "//evil.example": "/", "https://evil.example": "/"} {
		if page := p.get("/auth/oidc/callback?state=good&next="+url.QueryEscape(next), 200); !strings.Contains(page, `content="0; url=`+want+`"`) {
			t.Errorf("%s: %s", next, page)
		}
	}
	if page := p.get("/auth/oidc/callback?state=line", 200); !strings.Contains(page, "ABCD-EFGH") || !strings.Contains(page, `href="http://127.0.0.1:45678/?code=c&amp;state=s"`) {
		t.Errorf("the command line's page: %s", page)
	}
	if page := p.get("/auth/oidc/callback?state=broken", 503); strings.Contains(page, "secrets") {
		t.Errorf("an error of ours shows: %s", page)
	}
	for range 5 {
		p.get("/auth/oidc/callback?state=x", 403)
	}
	if res := p.do("GET", "/auth/oidc/callback?state=good", nil); res.StatusCode != http.StatusTooManyRequests || res.Header.Get("Retry-After") == "" {
		t.Errorf("after five failures: %d", res.StatusCode)
	}
	// Without one, there is no such way in.
	c.cfg.Provider = nil
	for _, path := range []string{"/auth/oidc", "/auth/oidc/callback?state=good"} {
		p.get(path, 404)
	}
	if strings.Contains(p.get("/login", 200), "/auth/oidc") {
		t.Error("the log-in page leads to a provider that is none")
	}
}
