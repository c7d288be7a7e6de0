package console

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	stdlog "log"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	cdppage "github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/cdproto/security"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/muster-edge/muster/fleet"
)

// axeSHA256 is of axe.min.js in axe-core 4.14.1 of the npm registry (MPL-2.0).
// It is test data: no program of ours carries it.
const axeSHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"

var axeSource = sync.OnceValues(func() (string, error) {
	f, err := os.Open("testdata/axe/axe.min.js.gz")
	if err != nil {
		return "", err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(z)
	if d := sha256.Sum256(b); err == nil && hex.EncodeToString(d[:]) != axeSHA256 {
		err = fmt.Errorf("axe.min.js has SHA-256 %x, want %s", d, axeSHA256)
	}
	return string(b), err
})

// thorough is for the run before a release: every page with every string, all
// of axe twice.
var thorough = os.Getenv("MUSTER_BROWSER_TESTS") == "long"

// chromium finds the browser, or skips with the reason.
func chromium(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("no browser in -short")
	}
	for _, name := range []string{os.Getenv("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if path, err := exec.LookPath(name); name != "" && err == nil {
			return path
		}
	}
	t.Skip("no browser: install chromium (internal/dev/prerequisites test), or name one in $CHROMIUM")
	return ""
}

// running is the one browser of all tests: it takes seconds to start.
var running struct {
	once sync.Once
	ctx  context.Context
	err  error
	end  func()
}

func theBrowser(path string) (context.Context, error) {
	running.once.Do(func() {
		profile, err := os.MkdirTemp("", "chromium-")
		if err != nil {
			running.err = err
			return
		}
		alloc, end := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
			chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.UserDataDir(profile), chromedp.Env("TMPDIR="+profile), chromedp.Flag("disable-dev-shm-usage", true), chromedp.Flag("hide-scrollbars", true),
			// What the browser itself would fetch is not ours to judge.
			chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-background-networking", true), chromedp.Flag("force-color-profile", "srgb"), chromedp.Flag("font-render-hinting", "none"),
			chromedp.WindowSize(1280, 900),
		)...)
		ctx, cancel := chromedp.NewContext(alloc)
		running.end = func() {
			_ = chromedp.Cancel(ctx) // waits until it has ended; it may have crashed before
			cancel()
			end()
			for range 100 { // its children may still be writing
				if os.RemoveAll(profile) == nil {
					return
				}
			}
		}
		running.ctx, running.err = ctx, chromedp.Run(ctx)
	})
	return running.ctx, running.err
}

func TestMain(m *testing.M) {
	code := m.Run()
	if running.end != nil {
		running.end()
	}
	os.Exit(code)
}

// browser is one window of a real browser, on a console that serves HTTPS.
type browser struct {
	*testing.T
	ctx    context.Context
	origin string
	fake   *fake

	mu sync.Mutex
	// foreign are requests to other places, problems what the browser
	// complained about, dialogs what a script of a stranger would open.
	foreign           map[network.RequestID]string
	problems, dialogs []string
	// expected are beginnings of complaints that the test provokes.
	expected []string
}

func open(t *testing.T, f *fake) *browser {
	t.Helper()
	path := chromium(t)
	c, _ := newConsole(t, f)
	server := httptest.NewUnstartedServer(c.Handler())
	server.EnableHTTP2 = true
	server.Config.ErrorLog = stdlog.New(io.Discard, "", 0) // the browser tries the certificate before it ignores it
	server.StartTLS()
	b := &browser{T: t, origin: server.URL, fake: f, foreign: map[network.RequestID]string{}}
	first, err := theBrowser(path)
	if err != nil {
		t.Fatalf("%s does not start: %v", path, err)
	}
	ctx, cancel := chromedp.NewContext(first)
	ctx, stop := context.WithTimeout(ctx, 4*time.Minute)
	b.ctx = ctx
	t.Cleanup(func() {
		stop()
		cancel()
		server.CloseClientConnections()
		server.Close()
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, x := range b.foreign {
			t.Errorf("a request left the origin: %s", x)
		}
		for _, x := range b.problems {
			t.Errorf("the browser complained: %s", x)
		}
		for _, x := range b.dialogs {
			t.Errorf("a dialog opened: %s", x)
		}
	})
	chromedp.ListenTarget(ctx, func(ev any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := ev.(type) {
		case *network.EventRequestWillBeSent:
			if u := e.Request.URL; !strings.HasPrefix(u, b.origin+"/") && !strings.HasPrefix(u, "data:,") {
				b.foreign[e.RequestID] = u
			}
		case *network.EventLoadingFailed:
			if e.BlockedReason == network.BlockedReasonCsp {
				delete(b.foreign, e.RequestID) // it did not leave
			}
		case *log.EventEntryAdded:
			b.complain(e.Entry.Text + " " + e.Entry.URL)
		case *runtime.EventExceptionThrown:
			b.complain(e.ExceptionDetails.Error())
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.APITypeError || e.Type == runtime.APITypeWarning {
				b.complain(fmt.Sprint(string(e.Args[0].Value), " ", e.Args[0].Description))
			}
		case *cdppage.EventJavascriptDialogOpening:
			b.dialogs = append(b.dialogs, e.Message)
			go func() { _ = chromedp.Run(ctx, cdppage.HandleJavaScriptDialog(false)) }()
		}
	})
	if err := chromedp.Run(ctx, security.SetIgnoreCertificateErrors(true), network.Enable(), network.ClearBrowserCookies(), log.Enable(), runtime.Enable(), cdppage.Enable(), cdppage.BringToFront(), emulation.SetFocusEmulationEnabled(true)); err != nil {
		t.Fatalf("%s opens no window: %v", path, err)
	}
	return b
}

// complain is called with the lock held.
func (b *browser) complain(s string) {
	for _, e := range b.expected {
		if strings.Contains(s, e) {
			return
		}
	}
	b.problems = append(b.problems, s)
}

// expect lets the browser complain about what the test does on purpose.
func (b *browser) expect(s string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.expected = append(b.expected, s)
}

func (b *browser) run(actions ...chromedp.Action) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, 40*time.Second)
	defer cancel()
	if err := chromedp.Run(ctx, actions...); err != nil {
		var where, body string
		_ = chromedp.Run(b.ctx, chromedp.Location(&where), chromedp.Text("body", &body, chromedp.ByQuery))
		b.Fatalf("at %s: %v\n%.1500s", where, err, body)
	}
}

func (b *browser) goTo(path string) {
	b.Helper()
	b.run(chromedp.Navigate(b.origin+path), chromedp.WaitReady("#main", chromedp.ByQuery))
}

func (b *browser) login(token string) {
	b.Helper()
	b.goTo("/login")
	b.run(chromedp.SendKeys("#token", token, chromedp.ByQuery), chromedp.Click(".login form button", chromedp.ByQuery), chromedp.WaitVisible(".bar", chromedp.ByQuery))
}

func (b *browser) text(selector string) (out string) {
	b.Helper()
	b.run(chromedp.Text(selector, &out, chromedp.ByQuery))
	return out
}

// until waits for an expression to become true.
func (b *browser) until(expression string) {
	b.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		// The page may go away under the question: then it is asked again.
		err = chromedp.Run(ctx, chromedp.Poll(expression, nil, chromedp.WithPollingTimeout(4*time.Second), chromedp.WithPollingInterval(50*time.Millisecond)))
		cancel()
		if err == nil {
			return
		}
	}
	b.run(chromedp.ActionFunc(func(context.Context) error { return fmt.Errorf("%s never became true: %w", expression, err) }))
}

// key presses a key as a person does: what the page prevents does not type.
func (b *browser) key(k string) {
	b.Helper()
	b.run(input.DispatchKeyEvent(input.KeyDown).WithKey(k).WithText(k), input.DispatchKeyEvent(input.KeyUp).WithKey(k))
}

func (b *browser) eval(expression string, out any) {
	b.Helper()
	b.run(chromedp.Evaluate(expression, out))
}

func (b *browser) await(promise string, out any) {
	b.Helper()
	b.run(chromedp.Evaluate(promise, out, func(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }))
}

func (b *browser) look(scheme string, width, height int64) {
	b.Helper()
	b.run(
		emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"}}),
		emulation.SetDeviceMetricsOverride(width, height, 1, false),
	)
}

func hasAct(f *fake, want string) bool {
	return slices.ContainsFunc(f.acts(), func(s string) bool { return strings.HasPrefix(s, want) })
}

func TestBrowserApprovesByMouse(t *testing.T) {
	f := furnished()
	b := open(t, f)
	b.login("muster_approver")
	r := f.requests[0]
	b.run(
		chromedp.Click("#row-"+string(r.ID)+" [data-open]", chromedp.ByQuery), chromedp.WaitVisible("#site", chromedp.ByQuery),
		chromedp.SendKeys("#site", "shop-7", chromedp.ByQuery), chromedp.SendKeys("#labels", "rack=2", chromedp.ByQuery),
		chromedp.Click(".decide .primary", chromedp.ByQuery), chromedp.WaitVisible("[data-done]", chromedp.ByQuery),
	)
	if s := b.text("[data-done]"); !strings.Contains(s, "Approved") || !strings.Contains(s, r.Words) || !strings.Contains(s, "shop-7") {
		t.Errorf("the queue says %q", s)
	}
	if want := fmt.Sprintf("user:anna approve %s site=shop-7 labels=map[rack:2]", r.ID); !hasAct(f, want) {
		t.Errorf("%q is not among %q", want, f.acts())
	}
	var gone bool
	b.eval(fmt.Sprintf("document.getElementById('row-%s') === null", r.ID), &gone)
	if !gone {
		t.Error("the approved request is still in the queue")
	}
}

func TestBrowserApprovesAndRejectsByKeyboardAlone(t *testing.T) {
	f := furnished()
	b := open(t, f)
	b.goTo("/login")
	b.until("document.activeElement.id === 'token'")
	b.run(chromedp.KeyEvent("muster_approver"), chromedp.KeyEvent(kb.Enter), chromedp.WaitVisible(".bar", chromedp.ByQuery))
	// The first line: next, and back to it.
	b.run(chromedp.KeyEvent("j"), chromedp.KeyEvent("j"), chromedp.KeyEvent("k"))
	var id string
	b.eval("document.querySelector('.here').id.slice(4)", &id)
	b.run(chromedp.KeyEvent("a"), chromedp.WaitVisible("#site", chromedp.ByQuery))
	b.until("document.activeElement.id === 'site'")
	b.run(chromedp.KeyEvent("shop-9"), chromedp.KeyEvent(kb.Enter), chromedp.WaitVisible("[data-done]", chromedp.ByQuery))
	if !hasAct(f, "user:anna approve "+id+" site=shop-9") {
		t.Errorf("not approved: %q", f.acts())
	}
	b.run(chromedp.KeyEvent("j"))
	b.eval("document.querySelector('.here').id.slice(4)", &id)
	b.run(chromedp.KeyEvent("r"), chromedp.WaitVisible("#why", chromedp.ByQuery))
	b.until("document.activeElement.id === 'why'")
	b.run(chromedp.KeyEvent("not ours"), chromedp.KeyEvent(kb.Enter), chromedp.WaitVisible("[data-done]", chromedp.ByQuery))
	if !hasAct(f, "user:anna reject "+id) {
		t.Errorf("not rejected: %q", f.acts())
	}
	// Help, search, going places.
	b.run(chromedp.KeyEvent("?"), chromedp.WaitVisible("#keys", chromedp.ByQuery), chromedp.KeyEvent(kb.Escape), chromedp.WaitNotVisible("#keys", chromedp.ByQuery))
	b.key("/")
	b.until("document.activeElement.id === 'q'")
	b.run(chromedp.KeyEvent("MXQC30B"), chromedp.KeyEvent(kb.Enter))
	b.until("location.search.includes('MXQC30B') && document.querySelectorAll('[data-row]').length === 1")
	b.run(chromedp.KeyEvent("g"), chromedp.KeyEvent("n"))
	b.until("location.pathname === '/nodes'")
	// The keys of the menu work without any shortcut, too: the first stop of
	// the tab key leads past it.
	b.goTo("/")
	b.run(chromedp.KeyEvent(kb.Tab))
	b.until("document.activeElement.className === 'skip'")
}

func TestBrowserDecidesTogether(t *testing.T) {
	f := furnished()
	b := open(t, f)
	b.login("muster_approver")
	b.run(chromedp.KeyEvent("j"), chromedp.KeyEvent("x"), chromedp.KeyEvent("j"), chromedp.KeyEvent("x"))
	b.until("document.querySelector('[data-bulk-count]').textContent === '2 requests ticked'")
	b.run(chromedp.Click(".bulkbar button[value=approve]", chromedp.ByQuery), chromedp.WaitVisible(".outcomes", chromedp.ByQuery))
	if len(f.acts()) != 0 {
		t.Fatalf("something was done before it was confirmed: %q", f.acts())
	}
	if s := b.text(".outcomes"); !strings.Contains(s, "genuine machine") {
		t.Errorf("the confirmation says %q", s)
	}
	b.run(chromedp.SendKeys("#site", "shop-7", chromedp.ByQuery), chromedp.Click(".decide .primary", chromedp.ByQuery))
	b.until("document.querySelector('h1').textContent === '2 requests approved'")
	if n := len(f.acts()); n != 2 {
		t.Errorf("%d acts: %q", n, f.acts())
	}
}

func TestBrowserSeesNewRequestsAtOnce(t *testing.T) {
	f := furnished()
	b := open(t, f)
	b.login("muster_viewer")
	b.until("document.querySelector('[data-live-word]').textContent === 'live' && !document.querySelector('[data-live-dot]').hidden")
	r := machine("bb80", fleet.IdentityHardware, fleet.BootMeasured, time.Minute, nil)
	f.file(r)
	b.until(fmt.Sprintf("document.getElementById('row-%s') !== null", r.ID))
	// Who ticks is not disturbed: a viewer has no ticks, an approver has.
	b.login("muster_approver")
	b.until("document.querySelector('[data-live-word]').textContent === 'live' && !document.querySelector('[data-live-dot]').hidden")
	b.run(chromedp.KeyEvent("j"), chromedp.KeyEvent("x"))
	f.file(machine("bb90", fleet.IdentityHardware, fleet.BootMeasured, time.Minute, nil))
	b.until("document.querySelector('[data-status]').textContent.startsWith('Something changed')")
	b.until("document.querySelectorAll('[data-pick]:checked').length === 1")
}

func TestBrowserShowsWhatChangedSinceItWasShown(t *testing.T) {
	f := furnished()
	b := open(t, f)
	b.login("muster_approver")
	r := f.requests[0]
	b.goTo("/requests/" + string(r.ID))
	f.mu.Lock()
	f.requests[0].Revision, f.requests[0].Warnings = 2, []string{"Another machine claims the same serial number"}
	f.mu.Unlock()
	b.expect("status of 409")
	b.run(chromedp.SendKeys("#site", "shop-7", chromedp.ByQuery), chromedp.Click(".decide .primary", chromedp.ByQuery), chromedp.WaitVisible(".notice[role=alert]", chromedp.ByQuery))
	if s := b.text(".notice[role=alert]"); !strings.Contains(s, "nothing was done") || !strings.Contains(s, "New warning: Another machine claims the same serial number") {
		t.Errorf("it says %q", s)
	}
	if len(f.acts()) != 0 {
		t.Errorf("something was done: %q", f.acts())
	}
	// Seen, and decided again.
	b.run(chromedp.Click(".decide .primary", chromedp.ByQuery), chromedp.WaitVisible("[data-done]", chromedp.ByQuery))
	if !hasAct(f, "user:anna approve "+string(r.ID)) {
		t.Error("not approved the second time")
	}
}

// hostile are strings as a machine with bad manners has them, not cleaned as
// the centre cleans them: what slips through above must be harmless here.
var hostile = []string{
	`<script>window.owned=1;alert("owned")</script>`, `"><img src=x onerror="window.owned=1;alert('owned')">`, `'"--></style></title><svg/onload=alert(1)>`,
	"\u202egnp.exe\u202c", "\x1b[2J\x1b]0;owned\x07", `=HYPERLINK("https://evil.example","x")`, `{{.Session}} ${7*7} #{7*7}`, `javascript:alert(1)`, `" hx-get="https://evil.example/" hx-trigger="load`,
	strings.Repeat("A", 10_000), strings.Repeat("\u0301", 200) + "zalgo", "\u2066\u2069\u200b\ufeff", `</textarea><iframe srcdoc="<script>parent.owned=1</script>">`,
}

// poisoned puts hostile strings wherever machines and strangers can write.
func poisoned() *fake {
	f := furnished()
	poison := func(h *fleet.Hardware, s string) {
		h.Vendor, h.Product, h.Serial, h.UUID, h.BoardVendor, h.Board, h.BIOSVendor, h.CPU, h.TPMVendor, h.BootPath = s, s, s, s, s, s, s, s, s, s
		h.NICs = []fleet.NIC{{Name: s, MAC: s, Addresses: []string{s}}}
		h.Disks = []fleet.Disk{{Path: s, Model: s, Serial: s}}
		h.Devices = []fleet.Device{{Bus: s, Vendor: s, Device: s, Class: s}}
	}
	for i, s := range hostile {
		f.requests = append(f.requests, machine(fmt.Sprintf("%02x77", i), fleet.IdentityHardware, fleet.BootMeasured, time.Hour, func(r *fleet.Request) {
			poison(&r.Evidence.Hardware, s)
			r.Evidence.Serial, r.Evidence.UUID, r.Evidence.EKIssuer, r.Source, r.Warnings = s, s, s, s, []string{s, s}
			r.Findings = append(r.Findings, fleet.Finding{Check: s, Detail: s})
		}))
		f.events = append(f.events, fleet.Event{Tenant: "default", Seq: uint64(len(f.events) + 1), Time: start, Kind: "pxe.served", MAC: s, Text: s})
		f.audit = append(f.audit, fleet.AuditRecord{Seq: uint64(len(f.audit) + 1), Tenant: "default", Time: start, Actor: s, Source: s, Kind: "site.created", Object: s, Reason: s})
		f.images = append(f.images, fleet.Image{Name: s, Version: s, Arch: s, Registered: start})
		f.warnings = append(f.warnings, s)
		n := f.nodes[0]
		n.EK = fleet.EKHash(sum(fmt.Sprint("poisoned", i)))
		n.ID, n.Words, n.Reason, n.Source, n.Image = n.EK.NodeID(), s, s, s, s
		poison(&n.Hardware, s)
		f.nodes = append(f.nodes, n)
		f.reports[n.ID] = fleet.NodeReport{Node: n.ID, At: start, Role: s, State: s, Blocker: s, Reason: s, K3s: s, UID: s, Snapshots: []string{s}}
		f.sites[3].Title, f.sites[3].Location = s, s
		site := f.sites[0]
		site.Name, site.Title, site.Location, site.Status.Blocker, site.Status.Version = fmt.Sprintf("evil-%d", i), s, s, s, s
		f.sites = append(f.sites, site)
		f.poisonPeople(s)
		f.alike[f.requests[0].ID] = append(f.alike[f.requests[0].ID], s)
	}
	return f
}

func TestBrowserIsNotTakenOverByHostileStrings(t *testing.T) {
	f := poisoned()
	b := open(t, f)
	b.login("muster_admin")
	paths := []string{"/", "/nodes", "/sites", "/sites/shop-7", "/sites/evil-3", "/stacks", "/stacks/store", "/access", "/tokens", "/tokens?all=1&ended=1", "/images", "/events", "/audit", "/?q=" + url.QueryEscape(hostile[0]), "/nodes?q=" + url.QueryEscape(hostile[1]), "/audit?object=" + url.QueryEscape(hostile[8])}
	for i := range hostile {
		paths = append(paths, "/requests/"+string(f.requests[len(f.requests)-1-i].ID))
		if i%4 == 0 || thorough {
			paths = append(paths, "/nodes/"+string(f.nodes[len(f.nodes)-1-i].ID))
		}
	}
	b.expect("status of 404")
	b.look("light", 320, 640)
	for _, path := range paths {
		b.goTo(path)
		var got struct {
			Owned            bool
			Foreign, Scripts int
			Wide             float64
			Bidi             bool
		}
		b.eval(`({Owned: "owned" in window, Foreign: document.querySelectorAll("iframe,object,embed,img,base,#main [style],[onerror],[onload],[hx-get^=http]").length,
			Scripts: document.querySelectorAll("script:not([integrity])").length, Wide: document.documentElement.scrollWidth - innerWidth,
			Bidi: /[\u202a-\u202e\u2066-\u2069\u001b]/.test(document.documentElement.textContent + document.documentElement.outerHTML)})`, &got)
		if got.Owned || got.Foreign > 0 || got.Scripts > 0 || got.Bidi {
			t.Errorf("%s: %+v", path, got)
		}
		if got.Wide > 0 {
			t.Errorf("%s is %v pixels wider than a small screen", path, got.Wide)
		}
	}
}

// What the policy forbids is really stopped by the browser: else the test
// above would be worth nothing.
func TestBrowserStopsWhatThePolicyForbids(t *testing.T) {
	b := open(t, furnished())
	b.login("muster_admin")
	b.expect("Content Security Policy")
	b.expect("evil.example")
	var ran bool
	b.await(`new Promise((done) => {
		document.addEventListener("securitypolicyviolation", () => { window.stopped = (window.stopped || 0) + 1; if (window.stopped === 3) done(true); });
		const s = document.createElement("script"); s.textContent = "window.owned = 1"; document.body.append(s);
		document.body.insertAdjacentHTML("beforeend", '<img src="https://evil.example/x.png">');
		document.body.insertAdjacentHTML("beforeend", '<b onclick="window.owned=1" id="trap">x</b>'); document.getElementById("trap").click();
		setTimeout(() => done(window.stopped === 3), 5000);
	})`, &ran)
	var owned bool
	b.eval(`"owned" in window`, &owned)
	if !ran || owned {
		t.Errorf("stopped %v, owned %v", ran, owned)
	}
}

func TestBrowserFindsNoBarrierByAxe(t *testing.T) {
	source, err := axeSource()
	if err != nil {
		t.Fatal(err)
	}
	f := furnished()
	f.lab, f.warnings = true, []string{"EK root not used: it has expired"}
	b := open(t, f)
	var loaded bool
	everything := `{type: "tag", values: ["wcag2a","wcag2aa","wcag21a","wcag21aa","wcag22aa","best-practice"]}`
	// What else than structure depends on colours and width.
	looks := `{type: "rule", values: ["color-contrast","link-in-text-block","target-size","scrollable-region-focusable"]}`
	if thorough {
		looks = everything
	}
	check := func(name, rules string) {
		t.Helper()
		var raw string
		// The tool is put in by the debugger, past the page's policy.
		b.eval(`"axe" in window`, &loaded)
		if !loaded {
			b.eval(source+";0", nil)
		}
		b.await(`axe.run(document, {resultTypes: ["violations"], runOnly: `+rules+`}).then((r) => JSON.stringify(r.violations.map((v) =>
			v.id + ": " + v.help + " " + v.nodes.slice(0,3).map((n) => n.target + " " + n.failureSummary).join(" | "))))`, &raw)
		var found []string
		if err := json.Unmarshal([]byte(raw), &found); err != nil {
			t.Fatal(err)
		}
		for _, x := range found {
			t.Errorf("%s: %s", name, x)
		}
	}
	b.expect("status of 403")
	for name, path := range map[string]string{"login": "/login", "no role": "/auth/oidc?next=/sites", "command line": "/auth/oidc/callback?state=line"} {
		b.look("light", 1280, 900)
		b.goTo(path)
		check(name+", light", everything)
		b.look("dark", 320, 640)
		check(name+", dark, 320", everything)
		var wide float64
		b.eval("document.documentElement.scrollWidth - innerWidth", &wide)
		if wide > 0 {
			t.Errorf("%s is %v pixels wider than a small screen", name, wide)
		}
	}
	b.login("muster_admin")
	for name, path := range pagesOf(f) {
		b.look("light", 1280, 900)
		b.goTo(path)
		check(name+", light", everything)
		b.look("dark", 320, 640)
		var wide float64
		b.eval("document.documentElement.scrollWidth - innerWidth", &wide)
		if wide > 0 {
			t.Errorf("%s is %v pixels wider than a small screen", name, wide)
		}
		check(name+", dark, 320", looks)
	}
}

// pictures are for the documentation.
func TestBrowserTakesPictures(t *testing.T) {
	if !*update {
		t.Skip("pictures are taken with -update")
	}
	f := furnished()
	b := open(t, f)
	b.login("muster_admin")
	dir := filepath.Join("..", "..", "docs", "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range []struct {
		name, path, scheme string
		width, height      int64
	}{
		{"console-queue", "/", "light", 1200, 860}, {"console-queue-dark", "/", "dark", 1200, 860}, {"console-request", "/requests/" + string(f.requests[0].ID), "light", 1200, 900},
		{"console-changed", "/requests/" + string(f.requests[3].ID), "light", 1200, 900}, {"console-sites", "/sites", "light", 1200, 760}, {"console-site", "/sites/shop-7", "dark", 1200, 900}, {"console-stacks", "/stacks", "light", 1200, 860}, {"console-access", "/access", "light", 1200, 900}, {"console-tokens", "/tokens?all=1", "dark", 1200, 860}, {"console-phone", "/requests/" + string(f.requests[0].ID), "light", 390, 780},
	} {
		b.look(p.scheme, p.width, p.height)
		b.goTo(p.path)
		b.until("document.fonts.status === 'loaded'")
		var png []byte
		b.run(chromedp.CaptureScreenshot(&png))
		if len(png) < 5000 {
			t.Errorf("%s: a picture of %d bytes", p.name, len(png))
		}
		if err := os.WriteFile(filepath.Join(dir, p.name+".png"), png, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
