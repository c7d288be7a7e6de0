package console

import (
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/html"
)

var update = flag.Bool("update", false, "write golden files and the pictures of the documentation")

// person is a browser without scripts.
type person struct {
	t testing.TB
	h http.Handler
	// cookies by name.
	cookies map[string]string
	from    string
	headers map[string]string
}

func visitor(t testing.TB, c *Console) *person {
	return &person{t: t, h: c.Handler(), cookies: map[string]string{}, from: "192.0.2.7:4711", headers: map[string]string{}}
}

func (p *person) do(method, path string, form url.Values) *http.Response {
	p.t.Helper()
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r := httptest.NewRequest(method, "https://centre.example"+path, body)
	r.RemoteAddr = p.from
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for k, v := range p.headers {
		r.Header.Set(k, v)
	}
	for k, v := range p.cookies {
		r.AddCookie(&http.Cookie{Name: k, Value: v})
	}
	w := httptest.NewRecorder()
	p.h.ServeHTTP(w, r)
	for _, k := range w.Result().Cookies() {
		if k.MaxAge < 0 {
			delete(p.cookies, k.Name)
		} else {
			p.cookies[k.Name] = k.Value
		}
	}
	return w.Result()
}

func (p *person) get(path string, code int) string {
	p.t.Helper()
	return p.read(p.do("GET", path, nil), code)
}

func (p *person) read(res *http.Response, code int) string {
	p.t.Helper()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	if res.StatusCode != code {
		p.t.Fatalf("%d, want %d: %.2000s", res.StatusCode, code, b)
	}
	return string(b)
}

// post sends the form of a page with the token that stands in it.
func (p *person) post(path string, form url.Values, code int) (string, *http.Response) {
	p.t.Helper()
	if form.Get("csrf") == "" {
		form.Set("csrf", csrfOf(p.cookies[sessionCookie]))
	}
	res := p.do("POST", path, form)
	return p.read(res, code), res
}

var csrfField = regexp.MustCompile(`name="csrf" value="([^"]+)"`)

func (p *person) login(token string) *person {
	p.t.Helper()
	page := p.get("/login", 200)
	m := csrfField.FindStringSubmatch(page)
	if m == nil {
		p.t.Fatal("the login page has no form")
	}
	p.read(p.do("POST", "/login", url.Values{"csrf": {m[1]}, "token": {token}, "next": {"/"}}), 303)
	return p
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (run with -update to accept):\n%s", file, d)
	}
}

var volatile = regexp.MustCompile(`(console|htmx\.min|favicon)\.[0-9a-f]{12}\.|sha384-[A-Za-z0-9+/=]+`)

// pages are all pages of a furnished centre that a person can open.
func pagesOf(f *fake) map[string]string {
	return map[string]string{
		"queue": "/", "request": "/requests/" + string(f.requests[0].ID), "request-changed": "/requests/" + string(f.requests[3].ID),
		"request-refused": "/requests/" + string(f.requests[5].ID), "request-rejected": "/requests/" + string(f.requests[7].ID), "requests": "/requests?state=rejected",
		"search": "/?q=MXQA10B", "nodes": "/nodes", "node": "/nodes/" + string(f.nodes[0].ID), "node-denied": "/nodes/" + string(f.nodes[5].ID), "node-pool": "/nodes/" + string(f.nodes[4].ID),
		"sites": "/sites", "site": "/sites/shop-7", "images": "/images", "events": "/events", "audit": "/audit", "access": "/access", "help": "/help",
		"tokens": "/tokens", "tokens-all": "/tokens?all=1&ended=1", "stacks": "/stacks", "stack": "/stacks/store",
	}
}

func TestPagesAreAsTheyWere(t *testing.T) {
	f := furnished()
	c, _ := newConsole(t, f)
	p := visitor(t, c).login("muster_admin")
	for name, path := range pagesOf(f) {
		page := p.get(path, 200)
		if _, err := html.Parse(strings.NewReader(page)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !strings.Contains(page, "The same on the command line") || !strings.Contains(page, "<code>muster ") {
			t.Errorf("%s shows no command", name)
		}
		page = volatile.ReplaceAllString(page, "$1.DIGEST.")
		golden(t, name+".html", strings.ReplaceAll(page, csrfOf(p.cookies[sessionCookie]), "CSRF"))
	}
}

func TestHTMXIsTheOneThatWasChosen(t *testing.T) {
	b, err := staticFiles.ReadFile("static/htmx.min.js")
	if err != nil {
		t.Fatal(err)
	}
	if d := sha256.Sum256(b); hex.EncodeToString(d[:]) != htmxSHA256 {
		t.Errorf("static/htmx.min.js has SHA-256 %x", d)
	}
}
