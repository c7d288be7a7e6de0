package console

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-edge/muster/fleet"
)

func TestEveryAnswerCarriesThePolicy(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c)
	stranger := p.do("GET", "/login", nil)
	p.login("muster_admin")
	for _, res := range []*http.Response{stranger, p.do("GET", "/auth/oidc", nil), p.do("GET", "/auth/oidc/callback", nil), p.do("GET", "/", nil), p.do("GET", "/nothing", nil), p.do("GET", c.assets.byName["console.js"].url, nil), p.do("POST", "/bulk", url.Values{})} {
		h := res.Header
		for k, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin"} {
			if h.Get(k) != want {
				t.Errorf("%s: %q", k, h.Get(k))
			}
		}
		csp := h.Get("Content-Security-Policy")
		for _, part := range []string{"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"} {
			if !strings.Contains(csp, part) {
				t.Errorf("the policy lacks %s: %q", part, csp)
			}
		}
		if strings.Contains(csp, "unsafe") || strings.Contains(csp, "*") || strings.Contains(csp, "http") {
			t.Errorf("the policy is open: %q", csp)
		}
	}
}

func TestPagesHoldNothingThatThePolicyForbids(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_admin")
	for name, path := range pagesOf(f) {
		page := p.get(path, 200)
		for _, bad := range []string{"<style", " style=", " onclick", " onload", "javascript:", "http://", "https://"} {
			if strings.Contains(page, bad) {
				t.Errorf("%s holds %q", name, bad)
			}
		}
		if n, m := strings.Count(page, "<script"), strings.Count(page, `integrity="sha384-`); n != 2 || m != 3 {
			t.Errorf("%s: %d scripts, %d digests", name, n, m)
		}
	}
}

func TestCookiesAreStrict(t *testing.T) {
	c, _ := newConsole(t, furnished())
	p := visitor(t, c)
	page := p.get("/login", 200)
	res := p.do("POST", "/login", url.Values{"csrf": {csrfField.FindStringSubmatch(page)[1]}, "token": {"muster_admin"}})
	for _, k := range res.Cookies() {
		if !k.Secure || !k.HttpOnly || k.SameSite != http.SameSiteStrictMode || k.Path != "/" || k.Domain != "" || !strings.HasPrefix(k.Name, "__Host-") {
			t.Errorf("cookie %+v", k)
		}
	}
	if strings.Contains(res.Header.Get("Location"), "muster_admin") {
		t.Error("the token is in an address")
	}
}

// A session that somebody planted in the browser is not the one that begins.
func TestLoginDoesNotTakeOverASession(t *testing.T) {
	c, g := newConsole(t, furnished())
	p := visitor(t, c)
	p.cookies[sessionCookie] = "planted"
	p.login("muster_admin")
	if p.cookies[sessionCookie] == "planted" || g.open["planted"].Actor != "" {
		t.Error("the planted session is in use")
	}
	old := p.cookies[sessionCookie]
	p.post("/logout", url.Values{}, 303)
	p.cookies[sessionCookie] = old
	if res := p.do("GET", "/", nil); res.StatusCode != 303 {
		t.Errorf("after logging out: %d", res.StatusCode)
	}
}

func TestFormsOfOthersAreRefused(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_approver")
	path := "/requests/" + string(f.requests[0].ID) + "/approve"
	form := func(csrf string) url.Values { return url.Values{"csrf": {csrf}, "revision": {"1"}} }
	good := csrfOf(p.cookies[sessionCookie])
	for name, try := range map[string]func() *http.Response{
		"without a token":           func() *http.Response { return p.do("POST", path, url.Values{"revision": {"1"}}) },
		"with another token":        func() *http.Response { return p.do("POST", path, form(csrfOf("other"))) },
		"with a token in the query": func() *http.Response { return p.do("POST", path+"?csrf="+good, url.Values{"revision": {"1"}}) },
		"from another site": func() *http.Response {
			p.headers["Sec-Fetch-Site"] = "cross-site"
			defer delete(p.headers, "Sec-Fetch-Site")
			return p.do("POST", path, form(good))
		},
		"from another origin": func() *http.Response {
			p.headers["Origin"] = "https://evil.example"
			defer delete(p.headers, "Origin")
			return p.do("POST", path, form(good))
		},
		"from a sibling of the same site": func() *http.Response {
			p.headers["Sec-Fetch-Site"] = "same-site"
			defer delete(p.headers, "Sec-Fetch-Site")
			return p.do("POST", path, form(good))
		},
		"the bulk way":     func() *http.Response { return p.do("POST", "/bulk/apply", url.Values{"pick": {"x@1"}}) },
		"logging out":      func() *http.Response { return p.do("POST", "/logout", url.Values{}) },
		"by a GET request": func() *http.Response { return p.do("GET", path+"?"+form(good).Encode(), nil) },
		"too long a form": func() *http.Response {
			return p.do("POST", path, url.Values{"csrf": {good}, "reason": {strings.Repeat("a", maxForm)}})
		},
	} {
		if res := try(); res.StatusCode < 400 {
			t.Errorf("%s: %d", name, res.StatusCode)
		}
	}
	if len(f.acts()) != 0 {
		t.Fatalf("something was done: %q", f.acts())
	}
	// The twin: our own form works.
	p.headers["Sec-Fetch-Site"], p.headers["Origin"] = "same-origin", "https://centre.example"
	p.read(p.do("POST", path, form(good)), 303)
	if len(f.acts()) != 1 {
		t.Errorf("our own form did nothing")
	}
}

func TestLoginLeadsNowhereElse(t *testing.T) {
	for in, want := range map[string]string{
		"/sites?q=a": "/sites?q=a", "/nodes/n-1": "/nodes/n-1", "/": "/", "": "/", "//evil.example": "/", `/\evil.example`: "/", "https://evil.example": "/", "javascript:alert(1)": "/",
		"/\t/evil.example": "/", "/a/../../evil": "/", "/%2f/evil": "/", "///evil": "/", "evil": "/", "/a\r\nSet-Cookie: x": "/", "/" + strings.Repeat("a", 600): "/", "/@evil.example": "/@evil.example",
		"/login?next=/login": "/", "/logout": "/", "/auth/oidc/callback": "/",
	} {
		if got := localPath(in); got != want {
			t.Errorf("%q leads to %q, want %q", in, got, want)
		}
	}
	c, _ := newConsole(t, furnished())
	p := visitor(t, c)
	page := p.get("/login?next="+url.QueryEscape("//evil.example/"), 200)
	res := p.do("POST", "/login", url.Values{"csrf": {csrfField.FindStringSubmatch(page)[1]}, "token": {"muster_admin"}, "next": {"//evil.example/"}})
	if l := res.Header.Get("Location"); l != "/" {
		t.Errorf("login leads to %q", l)
	}
	if res := p.do("POST", "/theme", url.Values{"theme": {"dark"}, "next": {"https://evil.example"}}); res.Header.Get("Location") != "/" {
		t.Errorf("the theme leads to %q", res.Header.Get("Location"))
	}
}

func TestLinkFromAChatOpensThePage(t *testing.T) {
	c, _ := newConsole(t, furnished())
	p := visitor(t, c)
	p.headers["Sec-Fetch-Site"], p.headers["Sec-Fetch-Mode"] = "cross-site", "navigate"
	if page := p.get("/sites/shop-7", 200); !strings.Contains(page, `content="0; url=/sites/shop-7"`) {
		t.Errorf("no way on: %s", page)
	}
	delete(p.headers, "Sec-Fetch-Site")
	if res := p.do("GET", "/sites/shop-7", nil); res.StatusCode != 303 || res.Header.Get("Location") != "/login?next=%2Fsites%2Fshop-7" {
		t.Errorf("%d %q", res.StatusCode, res.Header.Get("Location"))
	}
}

func TestLoginIsSlowForWhoGuesses(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c)
	token := csrfField.FindStringSubmatch(p.get("/login", 200))[1]
	try := func(from, secret string) int {
		p.from = from + ":1"
		return p.do("POST", "/login", url.Values{"csrf": {token}, "token": {secret}}).StatusCode
	}
	for i := range 5 {
		if code := try("203.0.113.5", "muster_wrong"); code != 403 {
			t.Fatalf("attempt %d: %d", i, code)
		}
	}
	// Also with the right token, from anywhere in the network; not elsewhere.
	for _, from := range []string{"203.0.113.5", "203.0.113.200"} {
		if code := try(from, "muster_admin"); code != 429 {
			t.Errorf("%s after five failures: %d", from, code)
		}
	}
	f.now = f.now.Add(7 * time.Second)
	if code := try("203.0.113.5", "muster_wrong"); code != 403 {
		t.Errorf("after a while: %d", code)
	}
	if code := try("198.51.100.1", "muster_admin"); code != 303 {
		t.Errorf("somebody else: %d", code)
	}
}

func TestLimiterIsBounded(t *testing.T) {
	l := newLimiter(5, time.Second)
	for i := range 3 * maxLimited {
		l.failed(start, fmt.Sprintf("10.%d.%d.1", i/256%256, i%256)+strings.Repeat("x", i/65536))
	}
	if len(l.full) > maxLimited+1 {
		t.Errorf("%d networks are remembered", len(l.full))
	}
	if l.wait(start, "172.16.0.1") == 0 {
		t.Error("in a flood a stranger does not wait")
	}
	if l.wait(start.Add(time.Hour*24), "172.16.0.1") != 0 {
		t.Error("a day later somebody still waits")
	}
}

func TestStaleDecisionSaysWhatChanged(t *testing.T) {
	r := machine("a10b", fleet.IdentityHardware, fleet.BootMeasured, time.Minute, nil)
	shown := seenOf(r).encode()
	r.State, r.DecidedBy, r.Reason, r.Warnings = fleet.RequestRejected, "user:ben", "too old", []string{"new \u202e<b>"}
	r.Findings[0].OK = false
	got := strings.Join(changes(shown, r), "\n")
	for _, want := range []string{"It was pending and is rejected now (user:ben: too old)", "New warning: new <b>", "A check says no now: ek-certificate"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %q", got, want)
		}
	}
	for _, bad := range []string{"", "%%%", "AAAA", strings.Repeat("A", 1<<20)} {
		if lines := changes(bad, r); len(lines) != 1 {
			t.Errorf("%.20q: %q", bad, lines)
		}
	}
}

func FuzzChanges(f *testing.F) {
	r := machine("a10b", fleet.IdentityHardware, fleet.BootMeasured, time.Minute, nil)
	f.Add(seenOf(r).encode())
	f.Add("e30")
	f.Fuzz(func(t *testing.T, s string) {
		if n := len(changes(s, r)); n == 0 || n > 100 {
			t.Errorf("%d lines", n)
		}
	})
}

func FuzzLocalPath(f *testing.F) {
	for _, s := range []string{"/", "//x", `/\x`, "/a?b=c", "/%2e%2e/", "/a//b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p := localPath(s)
		if !strings.HasPrefix(p, "/") || strings.HasPrefix(p, "//") || strings.HasPrefix(p, `/\`) || strings.ContainsAny(p, "\r\n\t") {
			t.Errorf("%q leads to %q", s, p)
		}
		base, err := url.Parse("https://centre.example/login")
		if err != nil {
			t.Fatal(err)
		}
		if u, err := base.Parse(p); err != nil || u.Host != "centre.example" {
			t.Errorf("%q leads to %v, %v", s, u, err)
		}
	})
}

func FuzzParseLabels(f *testing.F) {
	f.Add("a=b, c=d")
	f.Add("=,=,a")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := parseLabels(s)
		if err == nil {
			for k := range m {
				if k == "" {
					t.Errorf("%q gives an empty key", s)
				}
			}
		}
	})
}

func TestCommandsAreOneWordPerWord(t *testing.T) {
	for in, want := range map[string]string{
		"shop-7": "muster get shop-7", "a b": "muster get 'a b'", "$(id)": "muster get '$(id)'", "it's": `muster get 'it'\''s'`, "": "muster get ''", "\x1b[2Ja\u202eb\n-x": "muster get 'ab -x'", "`id`;rm": "muster get '`id`;rm'",
	} {
		if got := command("get", in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestBulkHasLimitsAndLeavesOutWhatWantsALook(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_approver")
	pick := func(i, rev int) string { return fmt.Sprintf("%s@%d", f.requests[i].ID, rev) }
	page, _ := p.post("/bulk", url.Values{"what": {"approve"}, "pick": {pick(0, 1), pick(1, 7), pick(3, 1), pick(5, 1), pick(7, 2)}}, 200)
	in, out, _ := strings.Cut(page, "Left out")
	if !strings.Contains(in, f.requests[0].Words) || strings.Count(in, `name="pick"`) != 1 {
		t.Errorf("taken in: %.3000s", in)
	}
	for _, why := range []string{"It has changed since you ticked it", "It has warnings", "It is not proved that this machine runs", "It is rejected already"} {
		if !strings.Contains(out, why) {
			t.Errorf("left out lacks %q", why)
		}
	}
	for name, form := range map[string]url.Values{
		"nothing": {}, "rubbish": {"pick": {"x"}}, "twice": {"pick": {pick(0, 1), pick(0, 1)}}, "any revision": {"pick": {pick(0, 0)}},
		"too many": {"pick": func() (all []string) {
			for i := range maxBulk + 1 {
				all = append(all, fmt.Sprintf("%s@1", machine(fmt.Sprintf("%04x", i), 3, 1, 0, nil).ID))
			}
			return all
		}()},
	} {
		p.post("/bulk", form, 400)
		form.Del("csrf")
		p.post("/bulk/apply", form, 400)
		if len(f.acts()) != 0 {
			t.Fatalf("%s: something was done: %q", name, f.acts())
		}
	}
	// One that fails does not take the others with it.
	page, _ = p.post("/bulk/apply", url.Values{"what": {"approve"}, "site": {"shop-7"}, "pick": {pick(0, 1), pick(1, 7), pick(2, 1)}}, 200)
	if !strings.Contains(page, "2 worked, 1 did not") || len(f.acts()) != 2 {
		t.Errorf("%q: %.2000s", f.acts(), page)
	}
	p.post("/bulk/apply", url.Values{"what": {"reject"}, "pick": {pick(1, 1)}}, 400) // a reason is missing
}

func TestApprovalNamesTheRevisionThatWasShown(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_approver")
	path := "/requests/" + string(f.requests[0].ID) + "/approve"
	for _, rev := range []string{"", "0", "-1", "x", "99999999999999999999"} {
		p.post(path, url.Values{"revision": {rev}}, 400)
	}
	p.post(path, url.Values{"revision": {"2"}}, 409)
	if len(f.acts()) != 0 {
		t.Errorf("done: %q", f.acts())
	}
}

func TestLiveUpdatesAreBounded(t *testing.T) {
	s := newStreams(3, 2)
	var got []bool
	for _, who := range []string{"a", "a", "a", "b", "c"} {
		got = append(got, s.enter(who))
	}
	if !slices.Equal(got, []bool{true, true, false, true, false}) {
		t.Errorf("limits do not hold: %v", got)
	}
	s.leave("a")
	if !s.enter("c") || len(s.of) != 3 {
		t.Errorf("%+v", s.of)
	}
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c)
	if res := p.do("GET", "/live", nil); res.StatusCode != 401 {
		t.Errorf("a stranger gets %d", res.StatusCode)
	}
	p.login("muster_viewer")
	for range c.cfg.StreamsPerSession {
		c.streams.enter(p.cookies[sessionCookie])
	}
	if res := p.do("GET", "/live", nil); res.StatusCode != 429 {
		t.Errorf("one too many gets %d", res.StatusCode)
	}
}

func TestInProcessCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := ""
		ended := make(chan struct{})
		client := &http.Client{Transport: InProcess(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/panics":
				panic("no")
			case "/waits":
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				close(ended)
			case "/hangs":
				<-r.Context().Done()
			default:
				w.Header().Set("X-Path", r.URL.Path)
				w.WriteHeader(http.StatusTeapot)
				_, _ = fmt.Fprint(w, "hello")
			}
		}), func(v any, _ []byte) { failed = fmt.Sprint(v) })}
		res, err := client.Get("https://x.invalid/a")
		if err != nil || res.StatusCode != 418 || res.Header.Get("X-Path") != "/a" {
			t.Fatal(res, err)
		}
		if b := make([]byte, 5); true {
			if n, err := res.Body.Read(b); string(b[:n]) != "hello" {
				t.Error(string(b), err)
			}
		}
		_ = res.Body.Close()
		if res, err = client.Get("https://x.invalid/panics"); err != nil || res.StatusCode != 500 || failed != "no" {
			t.Error(res, err, failed)
		}
		if res, err = client.Get("https://x.invalid/waits"); err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		<-ended
		r := httptest.NewRequest("GET", "https://x.invalid/hangs", nil)
		r.RequestURI = ""
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := client.Do(r.WithContext(ctx)); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		synctest.Wait()
	})
}
