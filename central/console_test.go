package central

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

// window is a browser without scripts on a running centre.
type window struct {
	t    *testing.T
	r    *running
	http *http.Client
}

func (r *running) window(t *testing.T) *window {
	c := r.client()
	c.Jar, _ = cookiejar.New(nil) // never fails without options
	return &window{t, r, c}
}

var formToken = regexp.MustCompile(`name="csrf" value="([^"]+)"`)

func (w *window) get(path string, code int) string {
	w.t.Helper()
	res, err := w.http.Get(w.r.admin.Server + path)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.read(res, code)
}

func (w *window) read(res *http.Response, code int) string {
	w.t.Helper()
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != code {
		w.t.Fatalf("%s: %d, want %d: %.1500s (%v)", res.Request.URL, res.StatusCode, code, b, err)
	}
	return string(b)
}

// submit posts a form with the token of the page it stands on.
func (w *window) submit(page, path string, form url.Values, code int) string {
	w.t.Helper()
	m := formToken.FindStringSubmatch(page)
	if m == nil {
		w.t.Fatal("the page has no form")
	}
	form.Set("csrf", m[1])
	res, err := w.http.PostForm(w.r.admin.Server+path, form)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.read(res, code)
}

func (w *window) login() *window {
	w.submit(w.get("/login", 200), "/login", url.Values{"token": {w.r.admin.Token}, "next": {"/"}}, 200)
	return w
}

var revisionField = regexp.MustCompile(`name="revision" value="(\d+)"`)

// What the console does is what the API does: the same act, the same record,
// under the person's name and address.
func TestConsoleApprovesThroughTheAPI(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	req, err := r.File(ctx, newMachine(t, "a").filing)
	if err != nil {
		t.Fatal(err)
	}
	w := r.window(t).login()
	if home := w.get("/", 200); !strings.Contains(home, req.Words) || !strings.Contains(home, "A genuine machine, and it runs our image") {
		t.Fatalf("the queue does not show the request: %.3000s", home)
	}
	page := w.get("/requests/"+string(req.ID), 200)
	form := url.Values{"revision": {revisionField.FindStringSubmatch(page)[1]}, "site": {"shop-7"}, "labels": {"rack=2"}, "reason": {"words compared"}}
	// A site that is not there is not made by itself.
	if again := w.submit(page, "/requests/"+string(req.ID)+"/approve", form, 404); !strings.Contains(again, "There is no site") {
		t.Errorf("a site that is missing: %.2000s", again)
	}
	form.Set("create", "yes")
	if home := w.submit(page, "/requests/"+string(req.ID)+"/approve", form, 200); !strings.Contains(home, "Approved.") {
		t.Errorf("after approving: %.2000s", home)
	}
	records, err := r.records()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, x := range records {
		if x.Kind == audit.RequestApproved {
			n++
			if x.Actor != "user:admin" || x.Source != "127.0.0.1" || x.Reason != "words compared" || x.Object != "request/"+string(req.ID) {
				t.Errorf("the record says %+v", x)
			}
		}
	}
	if n != 1 {
		t.Errorf("%d records of the approval", n)
	}
	for _, path := range []string{"/nodes", "/sites", "/sites/shop-7", "/images", "/events", "/audit?verify=1&kind=request.", "/access", "/help", "/requests?state=approved"} {
		w.get(path, 200)
	}
	if page := w.get("/audit?verify=1", 200); !strings.Contains(page, "The chain holds") || !strings.Contains(page, "words compared") {
		t.Errorf("the audit page: %.3000s", page)
	}
	// Without the session there is nothing to see.
	if page := r.window(t).get("/", 200); !strings.Contains(page, "Log in") {
		t.Errorf("a stranger sees %.500s", page)
	}
}

// A role that may look cannot decide, whatever it posts.
func TestConsoleAsksTheAPIWhoMay(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	req, err := r.File(ctx, newMachine(t, "a").filing)
	if err != nil {
		t.Fatal(err)
	}
	token := r.person(t, "vera", access.Binding{Tenant: DefaultTenant, Role: access.Viewer})
	r.admin.Token = token
	w := r.window(t).login()
	page := w.get("/requests/"+string(req.ID), 200)
	if strings.Contains(page, "Approve this machine") {
		t.Error("a viewer is offered to approve")
	}
	form := url.Values{"revision": {fmt.Sprint(req.Revision)}, "reason": {"x"}}
	for _, verb := range []string{"approve", "reject"} {
		if page := w.submit(page, "/requests/"+string(req.ID)+"/"+verb, form, 403); !strings.Contains(page, "Your role does not allow this") {
			t.Errorf("%s by a viewer: %.800s", verb, page)
		}
	}
	now, err := r.Request(ctx, DefaultTenant, req.ID)
	if err != nil || now.State != fleet.RequestPending {
		t.Errorf("the request is %s, %v", now.State, err)
	}
	// A session that is revoked ends at once.
	if err := r.s.store.Update(ctx, func(tx store.Tx) error {
		all, err := tx.Credentials(DefaultTenant, store.CredentialSession, "", 10)
		if err != nil || len(all) != 1 {
			return fmt.Errorf("%d sessions, %v", len(all), err)
		}
		return tx.RevokeCredential(all[0].ID, time.Now())
	}); err != nil {
		t.Fatal(err)
	}
	if page := w.get("/", 200); !strings.Contains(page, "Log in") {
		t.Error("the session outlives its end")
	}
}

// floodOf is how many requests of an attacker wait beside the honest ones.
const floodOf = 100_000

// However many strangers wait, those for whom somebody vouches are on the
// first page, and pages after it are complete.
func TestQueueWhenStrangersFloodItThenHonestRequestsAreFirst(t *testing.T) {
	if testing.Short() {
		t.Skip("100,000 rows")
	}
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	forge := func(i int) fleet.Request {
		f := servicetest.Filing(fmt.Sprint("stranger ", i))
		// Enrollment caps them at a thousand; the queue must hold when that
		// fails, too.
		f.Evidence.Identity, f.Evidence.Boot, f.Evidence.Image = fleet.IdentityUnverified, fleet.BootUnknown, ""
		d := enroll.EvidenceDigest(f.Evidence)
		node := f.Evidence.EK.NodeID()
		return fleet.Request{
			ID: fleet.RequestIDOf(d), Tenant: DefaultTenant, Node: node, Words: fleet.Words(node), State: fleet.RequestPending, Identity: f.Evidence.Identity, Boot: f.Evidence.Boot,
			EvidenceDigest: d, Evidence: f.Evidence, FirstSeen: servicetest.Start.Add(-time.Hour), LastSeen: servicetest.Start, Revision: 1,
		}
	}
	for from := 0; from < floodOf; from += 10_000 {
		if err := h.store.Update(ctx, func(t store.Tx) error {
			for i := from; i < from+10_000; i++ {
				if err := t.AddRequest(forge(i)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	honest := make(map[fleet.RequestID]bool)
	for i := range 10 {
		f := servicetest.Filing("honest " + rand.Text()[:8])
		f.Evidence.Identity = []fleet.IdentityTrust{fleet.IdentityHardware, fleet.IdentityListed, fleet.IdentityLab}[i%3]
		r, err := h.File(ctx, f)
		if err != nil {
			t.Fatal(err)
		}
		honest[r.ID] = true
	}
	m := management{Server: h.s}
	as := access.NewContext(ctx, testCaller.Principal)
	start := time.Now()
	out, err := m.ListRequests(as, &musterv1.ListRequestsRequest{State: "pending", ByTrust: true, Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("first page of %d: %s", out.Total, time.Since(start))
	if len(out.Requests) != 50 || out.Total != floodOf+10 || !out.More || out.Next == "" {
		t.Fatalf("%d of %d, more %v, next %q", len(out.Requests), out.Total, out.More, out.Next)
	}
	for i, r := range out.Requests {
		if honest[fleet.RequestID(r.Id)] != (i < 10) {
			t.Errorf("place %d is %s (%s)", i, r.Id, r.Identity)
		}
		if i > 0 && r.Identity > out.Requests[i-1].Identity {
			t.Errorf("place %d is %s after %s", i, r.Identity, out.Requests[i-1].Identity)
		}
	}
	// Page after page, nothing twice and nothing left out, over the borders
	// of identities.
	seen, next := make(map[string]bool), ""
	for range 10 {
		out, err := m.ListRequests(as, &musterv1.ListRequestsRequest{State: "pending", ByTrust: true, Limit: 3, After: next})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range out.Requests {
			if seen[r.Id] {
				t.Errorf("%s is listed twice", r.Id)
			}
			seen[r.Id] = true
		}
		next = out.Next
	}
	for id := range honest {
		if !seen[string(id)] {
			t.Errorf("honest %s is on no page", id)
		}
	}
	if len(seen) != 30 {
		t.Errorf("%d of 30", len(seen))
	}
}

func TestListRequestsWhenAskedForNonsenseThenInvalid(t *testing.T) {
	h := newHarness(t, t.TempDir())
	m, ctx := management{Server: h.s}, access.NewContext(context.Background(), testCaller.Principal)
	for name, q := range map[string]*musterv1.ListRequestsRequest{
		"trust without a state":  {ByTrust: true},
		"after that is no ID":    {State: "pending", After: "x"},
		"after of nothing":       {State: "pending", ByTrust: true, After: "hardware.1"},
		"after of no identity":   {State: "pending", ByTrust: true, After: "x.1.r-aaaaaaaaaaaaaaaaaaaaaaaa"},
		"search and state":       {State: "pending", Search: "a"},
		"a search without end":   {Search: strings.Repeat("a", 200)},
		"identities, no trust":   {State: "pending", Identities: []musterv1.IdentityTrust{1}},
		"more identities than 4": {State: "pending", ByTrust: true, Identities: []musterv1.IdentityTrust{1, 1, 1, 1, 1}},
	} {
		if _, err := m.ListRequests(ctx, q); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSearchFindsWordsIDsAndStickers(t *testing.T) {
	h := newHarness(t, t.TempDir())
	m, ctx := management{Server: h.s}, access.NewContext(context.Background(), testCaller.Principal)
	r, err := h.File(ctx, servicetest.Filing("a"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.File(ctx, servicetest.Filing("b")); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{string(r.ID), string(r.ID)[:9], r.Words, strings.ToUpper(strings.Fields(r.Words)[0]), string(r.Node), "S-a", "uuid-a"} {
		out, err := m.ListRequests(ctx, &musterv1.ListRequestsRequest{Search: s})
		if err != nil || len(out.Requests) != 1 || out.Requests[0].Id != string(r.ID) {
			t.Errorf("%q finds %v, %v", s, out.GetRequests(), err)
		}
	}
	for _, s := range []string{"zzz", "S-", "%", "S-c"} {
		if out, err := m.ListRequests(ctx, &musterv1.ListRequestsRequest{Search: s}); err != nil || len(out.Requests) != 0 {
			t.Errorf("%q finds %d, %v", s, len(out.GetRequests()), err)
		}
	}
}

func TestAuditIsReadFromItsEnd(t *testing.T) {
	h := newHarness(t, t.TempDir())
	m, ctx := management{Server: h.s}, access.NewContext(context.Background(), testCaller.Principal)
	for i := range 700 {
		if err := h.store.Update(ctx, func(t store.Tx) error {
			by := act{actor: []string{"user:anna", "user:ben"}[i%2], now: servicetest.Start}
			return by.record(t, DefaultTenant, audit.SiteCreated, fmt.Sprint("site/s-", i), nil, nil, "")
		}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := h.records()
	if err != nil {
		t.Fatal(err)
	}
	read := func(q *musterv1.ListAuditRequest) (seqs []uint64) {
		q.NewestFirst = true
		for range 100 {
			out, err := m.ListAudit(ctx, q)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range out.Records {
				seqs = append(seqs, r.Seq)
			}
			if q.Before = out.Next; q.Before == 0 {
				return seqs
			}
		}
		t.Fatal("it has no end")
		return nil
	}
	seqs := read(&musterv1.ListAuditRequest{Limit: 64})
	if len(seqs) != len(all) {
		t.Fatalf("%d of %d", len(seqs), len(all))
	}
	for i, n := range seqs {
		if n != all[len(all)-1-i].Seq {
			t.Fatalf("place %d is record %d", i, n)
		}
	}
	if n := len(read(&musterv1.ListAuditRequest{Actor: "user:anna", Limit: 50})); n != 350 {
		t.Errorf("anna: %d", n)
	}
	if n := len(read(&musterv1.ListAuditRequest{Object: "site/s-7"})); n != 1 {
		t.Errorf("one site: %d", n)
	}
	if n := len(read(&musterv1.ListAuditRequest{Kind: "site."})); n != 700 {
		t.Errorf("sites: %d", n)
	}
	if _, err := m.ListAudit(ctx, &musterv1.ListAuditRequest{Actor: "x"}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a filter the other way round: %v", err)
	}
}
