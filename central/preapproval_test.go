package central

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

func (h *harness) importCSV(t testing.TB, name, csv string) listImported {
	t.Helper()
	p := preApprovalOf(testCaller, name, "shop-7", map[string]string{"from": name})
	p.NotAfter = h.clock.now().Add(time.Hour)
	out, err := h.s.importList(context.Background(), testCaller, listImport{PreApproval: p, csv: []byte(csv)})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (h *harness) rule(t testing.TB, name string, edit func(*fleet.PreApproval)) {
	t.Helper()
	p := preApprovalOf(testCaller, name, "shop-7", nil)
	p.Kind, p.MinIdentity, p.MinBoot, p.Limit = fleet.PreApproveRule, fleet.IdentityHardware, fleet.BootMeasured, 2
	p.NotAfter = h.clock.now().Add(100 * time.Hour)
	if edit != nil {
		edit(&p)
	}
	if _, err := h.s.createPreApproval(context.Background(), testCaller, p, ""); err != nil {
		t.Fatal(err)
	}
}

// claim makes a claim code and returns it.
func (h *harness) claim(t testing.TB, name string) string {
	t.Helper()
	code, hash := fixedClaim(name)
	p := preApprovalOf(testCaller, name, "shop-7", nil)
	p.Kind, p.ClaimHash, p.Limit, p.NotAfter = fleet.PreApproveClaim, hash, 1, h.clock.now().Add(time.Hour)
	if _, err := h.s.createPreApproval(context.Background(), testCaller, p, ""); err != nil {
		t.Fatal(err)
	}
	return code
}

// fixedClaim makes the code that belongs to a name.
func fixedClaim(name string) (string, fleet.HexBytes) {
	code, hash, err := enroll.NewClaim(strings.NewReader(name + strings.Repeat("x", 20)))
	if err != nil {
		panic(err) // the reader cannot fail
	}
	return code, hash
}

func (h *harness) call(t testing.TB, f enroll.Filing) fleet.Request {
	t.Helper()
	r, err := h.File(context.Background(), f)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (h *harness) preApproval(t testing.TB, name string) (p fleet.PreApproval) {
	t.Helper()
	if err := h.store.View(context.Background(), func(r store.Reader) (err error) {
		p, err = r.PreApproval(DefaultTenant, name)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (h *harness) last(t testing.TB) fleet.AuditRecord {
	t.Helper()
	records, err := h.records()
	if err != nil || len(records) == 0 {
		t.Fatal(err)
	}
	return records[len(records)-1]
}

func listOf(names ...string) string {
	s := "ek_sha256,serial\n"
	for _, n := range names {
		s += servicetest.Filing(n).Evidence.EK.String() + ",S-" + n + "\n"
	}
	return s
}

func TestAListedMachineIsApprovedWhenItCalls(t *testing.T) {
	h := newHarness(t, t.TempDir())
	t.Cleanup(func() { h.sound(t) })
	if out := h.importCSV(t, "dell-7", listOf("a", "b")); len(out.list.Problems) != 0 || out.p.Limit != 2 || out.sites[0] != "shop-7" {
		t.Fatalf("%+v", out)
	}
	r := h.call(t, servicetest.Filing("a"))
	if r.State != fleet.RequestApproved || r.Site != "shop-7" || r.Labels["from"] != "dell-7" || r.DecidedBy != "preapproval:dell-7" {
		t.Fatalf("%+v", r)
	}
	last := h.last(t)
	if last.Kind != audit.RequestPreApproved || last.Actor != "preapproval:dell-7" || last.Object != "request/"+string(r.ID) || !strings.Contains(last.Reason, "on the list") {
		t.Errorf("audit: %+v", last)
	}
	if p := h.preApproval(t, "dell-7"); p.Used != 1 {
		t.Errorf("used %d times", p.Used)
	}
	if out, err := h.issueNow(r.ID, "0a"); err != nil || out.Serial != "0a" {
		t.Errorf("%+v, %v", out, err)
	}
	// Again with the same evidence: it stays, and nothing is used.
	if again := h.call(t, servicetest.Filing("a")); again.State != fleet.RequestIssued || h.preApproval(t, "dell-7").Used != 1 {
		t.Errorf("%+v", again)
	}
	// With other evidence it waits: the line is used, and it is no new machine.
	changed := servicetest.Filing("a")
	changed.Evidence.PCRs[7] = make(fleet.HexBytes, 32)
	if r := h.call(t, changed); r.State != fleet.RequestPending || h.preApproval(t, "dell-7").Used != 1 {
		t.Errorf("changed evidence: %+v", r)
	}
	// Who is not listed waits; who is denied does not even do that.
	if r := h.call(t, servicetest.Filing("z")); r.State != fleet.RequestPending {
		t.Errorf("not listed: %+v", r)
	}
	// An alias on the list is a claim and nothing more.
	alias := servicetest.Filing("y")
	alias.Evidence.Aliases = []fleet.EKHash{servicetest.Filing("b").Evidence.EK}
	if r := h.call(t, alias); r.State != fleet.RequestPending {
		t.Errorf("an alias is listed: %+v", r)
	}
}

func TestAMachineThatWaitsIsApprovedWhenItCallsAgain(t *testing.T) {
	h := newHarness(t, t.TempDir())
	before := h.call(t, servicetest.Filing("a"))
	h.importCSV(t, "late", listOf("a"))
	r := h.call(t, servicetest.Filing("a"))
	if before.State != fleet.RequestPending || r.State != fleet.RequestApproved || r.ID != before.ID {
		t.Errorf("%s, then %+v", before.State, r)
	}
	// A person's decision is not taken again by a pre-approval.
	b := h.call(t, servicetest.Filing("b"))
	if err := h.Reject(b.ID, b.Revision); err != nil {
		t.Fatal(err)
	}
	h.importCSV(t, "later", listOf("b"))
	if r := h.call(t, servicetest.Filing("b")); r.State != fleet.RequestRejected {
		t.Errorf("rejected, then %s", r.State)
	}
	changed := servicetest.Filing("b")
	changed.Evidence.Serial = "other"
	if r := h.call(t, changed); r.State == fleet.RequestApproved {
		t.Error("a rejected machine came in with other evidence")
	}
	// Nor does it stand in for a person whose approval was about other evidence.
	c := h.call(t, servicetest.Filing("c"))
	if err := h.Approve(c.ID, c.Revision); err != nil {
		t.Fatal(err)
	}
	h.importCSV(t, "last", listOf("c"))
	changed = servicetest.Filing("c")
	changed.Evidence.Serial = "other"
	if r := h.call(t, changed); r.State != fleet.RequestPending || r.Supersedes != c.ID {
		t.Errorf("approved by a person, then changed: %+v", r)
	}
}

func TestWhenAListHasABadLineThenNothingIsImported(t *testing.T) {
	h := newHarness(t, t.TempDir())
	h.importCSV(t, "first", listOf("a"))
	r := h.call(t, servicetest.Filing("d"))
	if err := h.Deny(r.Node); err != nil {
		t.Fatal(err)
	}
	out := h.importCSV(t, "second", strings.Replace(listOf("a", "b", "d"), "serial\n", "site\n", 1)+"zz,\n")
	var got []string
	for _, p := range out.list.Problems {
		got = append(got, fmt.Sprintf("%d:%s", p.Line, p.Why))
	}
	text := strings.Join(got, "\n")
	for _, want := range []string{"2:the EK", "is on the list first already", "4:the EK", "deny list", "2:site \"S-a\"", "3:site", "5:ek_sha256"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if err := h.store.View(context.Background(), func(r store.Reader) error {
		_, err := r.PreApproval(DefaultTenant, "second")
		return err
	}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("it is there: %v", err)
	}
	if r := h.call(t, servicetest.Filing("b")); r.State != fleet.RequestPending {
		t.Errorf("%s", r.State)
	}
	// A site nobody has made is a slip until somebody says it is not.
	q := listImport{PreApproval: preApprovalOf(testCaller, "third", "", nil), csv: []byte("ek_sha256,site\n" + servicetest.Filing("c").Evidence.EK.String() + ",shop-8\n")}
	q.NotAfter = h.clock.now().Add(time.Hour)
	for _, step := range []struct {
		create, dry bool
		problems    int
	}{{false, false, 1}, {true, true, 0}, {false, false, 1}, {true, false, 0}} {
		q.createSites, q.dryRun = step.create, step.dry
		out, err := h.s.importList(context.Background(), testCaller, q)
		if err != nil || len(out.list.Problems) != step.problems {
			t.Errorf("%+v: %+v, %v", step, out.list.Problems, err)
		}
	}
	if r := h.call(t, servicetest.Filing("c")); r.State != fleet.RequestApproved || r.Site != "shop-8" {
		t.Errorf("%+v", r)
	}
}

func TestAClaimCodeIsGoodOnce(t *testing.T) {
	h := newHarness(t, t.TempDir())
	t.Cleanup(func() { h.sound(t) })
	code := h.claim(t, "till")
	with := func(name, code string) enroll.Filing {
		f := servicetest.Filing(name)
		f.Claim = code
		return f
	}
	for name, code := range map[string]string{"w1": "", "w2": "nonsense", "w3": code[:16] + "0", "w4": strings.Replace(code, code[:1], "Z", 1)} {
		if r := h.call(t, with(name, code)); r.State != fleet.RequestPending || len(r.Warnings) != min(1, len(code)) {
			t.Errorf("code %q: %+v", code, r)
		}
	}
	weak := with("weak", code)
	weak.Evidence.Identity = fleet.IdentityUnverified
	if r := h.call(t, weak); r.State != fleet.RequestPending {
		t.Errorf("unverified with a code: %s", r.State)
	}
	if r := h.call(t, with("a", strings.ToLower(code))); r.State != fleet.RequestApproved || r.DecidedBy != "preapproval:till" || r.Site != "shop-7" || len(r.Warnings) != 0 {
		t.Fatalf("%+v", r)
	}
	r := h.call(t, with("b", code))
	if r.State != fleet.RequestPending || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "used up") {
		t.Errorf("%+v", r)
	}
	if again := h.call(t, with("b", code)); again.Revision != r.Revision || len(again.Warnings) != 1 {
		t.Errorf("the same again: %+v", again)
	}
	for _, record := range must(h.records())(t) {
		if strings.Contains(string(record.After)+record.Reason, code) {
			t.Errorf("the code is in the audit log: %+v", record)
		}
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestGuessingClaimCodesIsSlow(t *testing.T) {
	h := newHarness(t, t.TempDir())
	code := h.claim(t, "till")
	guess := func(i int, code, source string) fleet.Request {
		f := servicetest.Filing(fmt.Sprint("guess", i))
		f.Claim, f.Source = code, source
		return h.call(t, f)
	}
	for i := range maxWrongCodes + 3 {
		wrong, _, err := enroll.NewClaim(strings.NewReader(strings.Repeat(string(rune('a'+i)), 20)))
		if err != nil {
			t.Fatal(err)
		}
		r := guess(i, wrong, "2001:db8::1")
		want := "nobody gave out this code"
		if i >= maxWrongCodes {
			want = "too many wrong codes"
		}
		if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], want) {
			t.Fatalf("guess %d: %v", i, r.Warnings)
		}
	}
	if r := guess(100, code, "2001:db8::2"); r.State != fleet.RequestPending {
		t.Error("the same network guesses on")
	}
	if r := guess(101, code, "2001:db8:0:1::1"); r.State != fleet.RequestApproved {
		t.Errorf("another network: %+v", r)
	}
	next := h.claim(t, "next")
	h.clock.set(h.clock.now().Add(wrongCodesAgain / 2))
	if r := guess(102, next, "2001:db8::1"); r.State != fleet.RequestApproved {
		t.Errorf("after a while: %+v", r)
	}
}

func TestTheTableOfWrongCodesIsBounded(t *testing.T) {
	var w wrongCodes
	now := servicetest.Start
	for i := range maxWrongSources + 100 {
		w.failed(now.Add(time.Duration(i)), fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255))
	}
	if len(w.source) != maxWrongSources {
		t.Errorf("%d sources", len(w.source))
	}
	if _, there := w.source[networkOf("10.0.0.0")]; there {
		t.Error("the oldest is still there")
	}
}

func TestRulesKeepTheirCaps(t *testing.T) {
	h := newHarness(t, t.TempDir())
	t.Cleanup(func() { h.sound(t) })
	h.rule(t, "shop", func(p *fleet.PreApproval) { p.Limit, p.PerDay = 5, 2 })
	approved := func(name string, edit func(*enroll.Filing)) bool {
		f := servicetest.Filing(name)
		f.Evidence.Serial, f.Evidence.UUID = "S-"+name, ""
		if edit != nil {
			edit(&f)
		}
		return h.call(t, f).State == fleet.RequestApproved
	}
	if approved("low", func(f *enroll.Filing) { f.Evidence.Boot = fleet.BootUnknown }) || approved("lab", func(f *enroll.Filing) { f.Evidence.Identity = fleet.IdentityLab }) {
		t.Error("approved below what the rule wants")
	}
	for day, want := range []int{2, 2, 1, 0} {
		n := 0
		for i := range 4 {
			if approved(fmt.Sprint(day, "-", i), nil) {
				n++
			}
		}
		if n != want {
			t.Errorf("day %d: %d approved, want %d", day, n, want)
		}
		h.clock.set(h.clock.now().Add(24 * time.Hour))
	}
	if p := h.preApproval(t, "shop"); p.Used != 5 {
		t.Errorf("used %d times", p.Used)
	}
	h.rule(t, "twins", nil)
	if approved("twin", func(f *enroll.Filing) { f.Evidence.Serial = "S-0-0" }) {
		t.Error("a machine with another's serial number was approved by a rule")
	}
	if !approved("single", nil) {
		t.Error("the second rule does not work at all")
	}
}

func TestWhatWasRemovedApprovesNothing(t *testing.T) {
	h := newHarness(t, t.TempDir())
	h.rule(t, "shop", nil)
	if _, err := h.s.removePreApproval(context.Background(), testCaller, "shop", "over"); err != nil {
		t.Fatal(err)
	}
	if last := h.last(t); last.Kind != audit.PreApprovalEnded || last.Actor != "user:test" || last.Reason != "over" {
		t.Errorf("%+v", last)
	}
	if r := h.call(t, servicetest.Filing("a")); r.State != fleet.RequestPending {
		t.Errorf("%+v", r)
	}
	for _, name := range []string{"shop", "nothing"} {
		if _, err := h.s.removePreApproval(context.Background(), testCaller, name, ""); err == nil {
			t.Errorf("%s was removed", name)
		}
	}
	// Expired: the same.
	h.rule(t, "short", func(p *fleet.PreApproval) { p.NotAfter = h.clock.now().Add(time.Minute) })
	h.clock.set(h.clock.now().Add(time.Minute))
	if r := h.call(t, servicetest.Filing("b")); r.State != fleet.RequestPending {
		t.Errorf("%+v", r)
	}
}

func TestATestOfPreApprovalsSaysWhatFilingDoes(t *testing.T) {
	h := newHarness(t, t.TempDir())
	r := h.call(t, servicetest.Filing("a"))
	h.claim(t, "till")
	h.importCSV(t, "others", listOf("b"))
	h.rule(t, "strict", func(p *fleet.PreApproval) { p.MinBoot = fleet.BootEnforced })
	test := func() enroll.Outcome {
		t.Helper()
		_, o, err := h.s.testPreApprovals(context.Background(), testCaller, string(r.ID))
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	records := len(must(h.records())(t))
	o := test()
	var got []string
	for _, x := range o.Tried {
		got = append(got, x.ID+": "+x.Why)
	}
	if text := strings.Join(got, "\n"); o.Approve || text != "others: it does not list the EK that this machine proved\n"+
		"till: the machine did not bring its code\nstrict: boot is measured, it wants enforced" {
		t.Errorf("%s", text)
	}
	h.rule(t, "fits", nil)
	if o := test(); !o.Approve || o.Which != "fits" || o.Site != "shop-7" {
		t.Errorf("%+v", o)
	}
	if n := len(must(h.records())(t)); n != records+1 || h.preApproval(t, "fits").Used != 0 {
		t.Errorf("the test changed something: %d records", n)
	}
	if now := h.call(t, servicetest.Filing("a")); now.DecidedBy != "preapproval:fits" {
		t.Errorf("%+v", now)
	}
	if o := test(); o.Approve || !strings.Contains(o.Reason, "approved") {
		t.Errorf("afterwards: %+v", o)
	}
	if _, _, err := h.s.testPreApprovals(context.Background(), testCaller, "r-aaaaaaaaaaaaaaaaaaaaaaaa"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("of nothing: %v", err)
	}
}

// An approval that nobody collected is over, and its line is used: it does
// not approve by itself a second time, and the filing is no fault.
func TestAnUncollectedPreApprovalIsNotTakenAgain(t *testing.T) {
	h := newHarness(t, t.TempDir())
	h.rule(t, "shop", nil)
	if r := h.call(t, servicetest.Filing("a")); r.State != fleet.RequestApproved {
		t.Fatalf("%+v", r)
	}
	h.clock.set(h.clock.now().Add(enroll.ApprovedFor))
	for range 2 {
		if r := h.call(t, servicetest.Filing("a")); r.State != fleet.RequestPending {
			t.Errorf("%+v", r)
		}
	}
	if p := h.preApproval(t, "shop"); p.Used != 1 {
		t.Errorf("used %d times", p.Used)
	}
}

func TestManyMachinesAtOnceUseNoMoreThanThereIs(t *testing.T) {
	h := newHarness(t, t.TempDir())
	t.Cleanup(func() { h.sound(t) })
	code := h.claim(t, "till")
	h.rule(t, "shop", func(p *fleet.PreApproval) { p.Limit = 3 })
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			f := servicetest.Filing(fmt.Sprint("m", i))
			f.Claim = code
			if _, err := h.File(context.Background(), f); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	by := map[string]int{}
	for _, r := range must(h.Requests())(t) {
		by[r.DecidedBy]++
	}
	if by["preapproval:till"] != 1 || by["preapproval:shop"] != 3 || by[""] != 16 {
		t.Errorf("%v", by)
	}
}
