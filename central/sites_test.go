package central

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/statement"
)

// member is a node with a key of its own.
type member struct {
	fleet.Node
	key *ecdsa.PrivateKey
	ctx context.Context
}

// shop is a centre with documents, and what its nodes and people do.
type shop struct {
	*harness
	t    testing.TB
	node nodeService
}

func newShop(t testing.TB) *shop {
	t.Helper()
	h := newHarness(t, t.TempDir())
	h.scribe = &h.s.scribe
	s := &shop{h, t, nodeService{Server: h.s}}
	s.image("slot", "1")
	return s
}

func (s *shop) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *shop) update(f func(store.Tx) error) {
	s.t.Helper()
	s.must(s.s.store.Update(context.Background(), f))
}

func (s *shop) image(name, version string) {
	s.t.Helper()
	s.update(func(t store.Tx) error { return addTestImage(t, s.clock.now(), name, version) })
}

func addTestImage(t store.Tx, now time.Time, name, version string) error {
	sum := sha256.Sum256([]byte(name + version))
	return t.AddImage(fleet.Image{
		Tenant: DefaultTenant, Name: name, Version: version, Kind: fleet.ImageSlot, Arch: "amd64", SHA256: sum[:], Size: 1,
		Authenticode: sum[:], PCR11: sum[:], Registered: now,
	})
}

// join enrolls a machine into a site, the way machines do.
func (s *shop) join(name, site string) *member {
	s.t.Helper()
	// The same machine has the same key, also in another process.
	seed := sha256.Sum256([]byte("ldevid " + name))
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), seed[:])
	s.must(err)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	s.must(err)
	sum := sha256.Sum256(public)
	f := servicetest.Filing(name)
	f.Evidence.LDevIDKey = sum[:]
	r, err := s.File(context.Background(), f)
	s.must(err)
	if r.State == fleet.RequestPending {
		_, _, err = s.s.approve(context.Background(), testCaller, approval{id: string(r.ID), revision: r.Revision, site: site, createSite: true})
		s.must(err)
	}
	_, err = s.Issue(context.Background(), DefaultTenant, r.ID, func(r fleet.Request) (enroll.Issued, error) {
		now := s.clock.now()
		c := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: now, NotAfter: now.Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		return enroll.Issued{
			Certificates: [][]byte{der}, Serial: fmt.Sprintf("%x", sha256.Sum256(der))[:16], NotBefore: now, NotAfter: now.Add(30 * 24 * time.Hour), LDevIDKey: r.Evidence.LDevIDKey,
		}, err
	})
	s.must(err)
	m := &member{key: key, ctx: context.WithValue(context.Background(), nodeCallerKey{}, nodeCaller{r.Node, "192.0.2.1"})}
	m.Node = s.get(r.Node)
	_, err = s.node.Report(m.ctx, &musterv1.ReportRequest{})
	s.must(err)
	return m
}

func (s *shop) get(id fleet.NodeID) (n fleet.Node) {
	s.t.Helper()
	s.must(s.s.store.View(context.Background(), func(t store.Reader) (err error) { n, err = t.Node(DefaultTenant, id); return err }))
	return n
}

func (s *shop) site(name string) (site fleet.Site) {
	s.t.Helper()
	s.must(s.s.store.View(context.Background(), func(t store.Reader) (err error) { site, err = t.Site(DefaultTenant, name); return err }))
	return site
}

func (s *shop) set(name string, change func(*fleet.SiteSettings)) (siteChanged, error) {
	site := s.site(name)
	set := site.Spec.Chosen()
	change(&set)
	return s.s.setSite(context.Background(), testCaller, siteChange{name: name, settings: &set, reason: "test"})
}

// pulled is what a node got of the centre, by kind.
type pulled struct {
	charter    *fleet.Charter
	admissions map[fleet.NodeID]fleet.Admission
	removals   map[fleet.NodeID]fleet.Removal
	orders     map[string]fleet.Order
	live       []string
	revision   *musterv1.DocVersion
	calls      int
}

// pull fetches everything, and verifies it with the orders key.
func (s *shop) pull(m *member) pulled {
	s.t.Helper()
	key, err := s.s.ca.OrdersKey(DefaultTenant)
	s.must(err)
	p := pulled{admissions: map[fleet.NodeID]fleet.Admission{}, removals: map[fleet.NodeID]fleet.Removal{}, orders: map[string]fleet.Order{}}
	read := func(envelope []byte, v any) bool {
		env, err := statement.Parse(envelope)
		s.must(err)
		payload, err := statement.Verify(envelope, env.PayloadType, []crypto.PublicKey{key.Public()})
		s.must(err)
		s.must(json.Unmarshal(payload, v))
		return true
	}
	q := &musterv1.DocumentsRequest{Site: s.get(m.ID).Site}
	for {
		out, err := s.node.Documents(m.ctx, q)
		s.must(err)
		p.calls++
		for _, e := range out.Envelopes {
			env, err := statement.Parse(e)
			s.must(err)
			switch env.PayloadType {
			case fleet.CharterPayload:
				p.charter = new(fleet.Charter)
				read(e, p.charter)
			case fleet.AdmissionPayload:
				var a fleet.Admission
				read(e, &a)
				p.admissions[a.Node] = a
			case fleet.RemovalPayload:
				var r fleet.Removal
				read(e, &r)
				p.removals[r.Node] = r
			case fleet.OrderPayload:
				var o fleet.Order
				read(e, &o)
				p.orders[o.ID] = o
			default:
				s.t.Fatal("a document of type", env.PayloadType)
			}
		}
		if !out.More {
			p.live, p.revision = out.Orders, out.Revision
			return p
		}
		q.After = out.Next
	}
}

func (s *shop) record(m *member, change func(*fleet.ClusterRecord)) []byte {
	s.t.Helper()
	r := fleet.ClusterRecord{Tenant: DefaultTenant, Site: m.Site, UID: "c-1", Epoch: 1, Version: 1, Founder: m.ID, Servers: []fleet.NodeID{m.ID}}
	if change != nil {
		change(&r)
	}
	payload, err := json.Marshal(r)
	s.must(err)
	env, err := statement.Sign(fleet.ClusterRecordPayload, payload, m.key)
	s.must(err)
	return env.JSON()
}

func (s *shop) report(m *member, role string, record []byte) *musterv1.ReportResponse {
	s.t.Helper()
	out, err := s.node.Report(m.ctx, &musterv1.ReportRequest{Cluster: &musterv1.ClusterReport{Record: record, Role: role, State: role}})
	s.must(err)
	return out
}

func (s *shop) events(kind string) (out []fleet.Event) {
	s.t.Helper()
	s.must(s.s.store.View(context.Background(), func(t store.Reader) error {
		all, err := t.Events(DefaultTenant, 0, 10000)
		for _, e := range all {
			if e.Kind == kind {
				out = append(out, e)
			}
		}
		return err
	}))
	return out
}

func (s *shop) audited(kind audit.Kind) (n int) {
	s.t.Helper()
	records, err := s.records()
	s.must(err)
	s.must(audit.Verify(records))
	for _, r := range records {
		if r.Kind == kind {
			n++
		}
	}
	return n
}

func TestCharterFollowsWhatTheTenantWants(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	first := s.pull(a).charter
	if first == nil || len(first.Images) != 1 || !first.Lab || first.Founding.Mode != fleet.FoundCentral || first.Birth.NodeCIDR == "" {
		t.Fatalf("%+v", first)
	}
	s.must(s.s.refreshAll(context.Background()))
	if again := s.pull(a).charter; again.Version != first.Version {
		t.Errorf("nothing changed, and the charter is %s after %s", again.Version, first.Version)
	}
	s.image("slot", "2")
	s.must(s.s.refreshAll(context.Background()))
	second := s.pull(a).charter
	if len(second.Images) != 2 || second.Version.Compare(first.Version) <= 0 {
		t.Errorf("a new image: %+v", second)
	}
	if _, err := s.s.trustEscrowKey(context.Background(), testCaller, make([]byte, 32), "test"); err != nil {
		t.Fatal(err)
	}
	s.must(s.s.refreshAll(context.Background()))
	if third := s.pull(a).charter; len(third.EscrowKey) != 32 || third.Version.Compare(second.Version) <= 0 {
		t.Errorf("an escrow key: %+v", third)
	}
	out, err := s.set("shop-7", func(set *fleet.SiteSettings) { set.Images = []string{"slot@2"}; set.Policy.PromoteAfter = 5 })
	s.must(err)
	if !out.changed || len(out.charter.Images) != 1 || out.charter.Images[0].Version != "2" || out.charter.Policy.PromoteAfter != 5 {
		t.Errorf("%+v", out)
	}
	if again, err := s.set("shop-7", func(*fleet.SiteSettings) {}); err != nil || again.changed {
		t.Errorf("the same settings: %+v %v", again, err)
	}
	if site := s.site("shop-7"); site.Spec.Charter != out.charter.Version || site.Ledger.Documents.Compare(out.charter.Version) < 0 || site.Generation != 2 {
		t.Errorf("%+v", site)
	}
}

func TestWithoutAnImageThereIsNoCharterAndAReason(t *testing.T) {
	h := newHarness(t, t.TempDir())
	out, err := h.s.setSite(context.Background(), testCaller, siteChange{name: "shop-1", create: true})
	if err != nil || !out.created || out.charter != nil || !strings.Contains(out.why, "no image") {
		t.Fatalf("%+v %v", out, err)
	}
}

func TestSettingsThatAreRefused(t *testing.T) {
	s := newShop(t)
	s.join("a", "shop-7")
	_, err := s.set("shop-7", func(set *fleet.SiteSettings) {
		set.Policy.Servers = 2
		set.Birth.NodeCIDR = "10.42.0.0/24"
		set.Founding.Founder = "n-x"
		set.Images = []string{"nothing@1"}
		set.Delegates = [][]byte{{1}}
	})
	for _, want := range []string{"servers is 2", "overlap", "founder is named", "nothing@1", "delegate 0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %q: %v", want, err)
		}
	}
	if site := s.site("shop-7"); site.Generation != 1 {
		t.Error("it was changed all the same")
	}
	if _, err := s.s.setSite(context.Background(), testCaller, siteChange{name: "shop-7", generation: 9}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("another generation: %v", err)
	}
	if _, err := s.s.setSite(context.Background(), testCaller, siteChange{name: "nowhere"}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("no such site: %v", err)
	}
	set := fleet.DefaultSettings()
	set.AnyBoot = true
	s.must(s.s.store.View(context.Background(), func(r store.Reader) error {
		if err := checkSettings(r, fleet.Tenant{Meta: fleet.Meta{Name: DefaultTenant}}, set); err == nil || !strings.Contains(err.Error(), "lab") {
			t.Errorf("any-boot outside a lab: %v", err)
		}
		return nil
	}))
}

func TestBirthSettingsAreFrozen(t *testing.T) {
	change := func(set *fleet.SiteSettings) { set.Birth.Disable = []string{"traefik"} }
	s := newShop(t)
	a := s.join("a", "shop-7")
	if _, err := s.set("shop-7", change); err != nil {
		t.Fatalf("before a cluster: %v", err)
	}
	if _, err := s.node.AskFounding(a.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"}); err != nil {
		t.Fatal(err)
	}
	back := func(set *fleet.SiteSettings) { set.Birth.Disable = nil }
	if _, err := s.set("shop-7", back); err == nil || !strings.Contains(err.Error(), "may be doing it") {
		t.Errorf("after the grant: %v", err)
	}
	s.report(a, "server", s.record(a, nil))
	if _, err := s.set("shop-7", back); err == nil || !strings.Contains(err.Error(), "c-1") {
		t.Errorf("with a cluster: %v", err)
	}
	if _, err := s.set("shop-7", func(set *fleet.SiteSettings) { set.Policy.ReplaceAfter = 60 }); err != nil {
		t.Errorf("policy is no birth setting: %v", err)
	}
}

func TestMembersComeAndGo(t *testing.T) {
	s := newShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	p := s.pull(b)
	if x, y := p.admissions[a.ID], p.admissions[b.ID]; x.Address != "100.96.0.1" || y.Address != "100.96.0.2" || !x.MayServe || x.Incarnation != 1 {
		t.Fatalf("%+v\n%+v", x, y)
	}
	n, removal, err := s.s.removeNode(context.Background(), testCaller, string(a.ID), 0, "gone")
	s.must(err)
	if n.Site != "" || removal == nil || removal.Incarnation != 1 || s.pull(b).removals[a.ID].Reason != "gone" {
		t.Fatalf("%+v %+v", n, removal)
	}
	if out, err := s.node.Documents(a.ctx, &musterv1.DocumentsRequest{Site: "shop-7"}); err != nil || out.Site != "" || len(out.Envelopes) != 0 {
		t.Errorf("a removed node still gets documents: %+v %v", out, err)
	}
	if _, _, err := s.s.removeNode(context.Background(), testCaller, string(a.ID), 0, "again"); err == nil {
		t.Error("removed twice")
	}
	// It comes back as another incarnation, at its old address.
	n, adm, _, err := s.s.assign(context.Background(), testCaller, assignment{id: string(a.ID), site: "shop-7", worker: true, labels: map[string]string{"rack": "2"}})
	s.must(err)
	if adm.Incarnation != 2 || adm.Address != "100.96.0.1" || adm.MayServe || adm.Labels["rack"] != "2" || n.Incarnation != 2 {
		t.Fatalf("%+v", adm)
	}
	// A new certificate changes none of that.
	a2 := s.join("a", "shop-7")
	if x := s.pull(a2).admissions[a.ID]; x.Incarnation != 2 || x.MayServe {
		t.Errorf("after a new certificate: %+v", x)
	}
	if _, _, _, err := s.s.assign(context.Background(), testCaller, assignment{id: string(a.ID), site: "shop-8", createSite: true}); err == nil {
		t.Error("a member of one site was assigned to another")
	}
	// Denying removes; the others hear of it.
	s.must(s.Deny(b.ID))
	if r, there := s.pull(a2).removals[b.ID]; !there || !strings.Contains(r.Reason, "denied") {
		t.Errorf("a denied node's removal: %+v", r)
	}
	if got := s.audited(audit.RemovalIssued); got != 2 {
		t.Errorf("%d removals recorded", got)
	}
	if len(s.pull(a2).admissions) != 2 {
		t.Error("the admissions of removed nodes are needed to know whom the removal meant")
	}
}

func TestAddressesRunOutWithAReason(t *testing.T) {
	s := newShop(t)
	s.join("a", "shop-7")
	_, err := s.set("shop-7", func(set *fleet.SiteSettings) { set.Birth.NodeCIDR = "192.168.255.0/28" })
	s.must(err)
	site := s.site("shop-7")
	seen := map[string]bool{}
	s.update(func(tx store.Tx) error {
		for i := range 13 {
			a, err := addressOf(tx, site, fleet.EKHash{byte(i), 77}.NodeID())
			if err != nil || seen[a] {
				t.Errorf("address %d: %s %v", i, a, err)
			}
			seen[a] = true
		}
		if _, err := addressOf(tx, site, fleet.EKHash{99, 77}.NodeID()); err == nil || !strings.Contains(err.Error(), "used up") {
			t.Errorf("one too many: %v", err)
		}
		return nil
	})
	if seen["192.168.255.0"] || seen["192.168.255.15"] || seen["192.168.255.1"] {
		t.Error("the network, the broadcast, or somebody's address was given out")
	}
}

func TestDocumentsInPages(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	s.update(func(tx store.Tx) error {
		site, err := tx.Site(DefaultTenant, "shop-7")
		if err != nil {
			return err
		}
		for i := range 600 {
			n := fleet.Node{ID: fleet.EKHash{byte(i), byte(i >> 8), 5}.NodeID(), Tenant: DefaultTenant, Site: "shop-7", Incarnation: 1, LDevIDKey: make([]byte, 32)}
			if _, _, err := s.s.scribe.admit(tx, act{actor: "system", now: s.clock.now()}, &site, n, "test"); err != nil {
				return err
			}
		}
		_, err = tx.PutSite(site)
		return err
	})
	p := s.pull(a)
	if len(p.admissions) != 601 || p.calls < 3 || p.charter == nil {
		t.Errorf("%d admissions in %d calls", len(p.admissions), p.calls)
	}
	counting := &countingStore{Store: s.s.store}
	s.s.store = counting
	out, err := s.node.Documents(a.ctx, &musterv1.DocumentsRequest{Site: "shop-7", Have: p.revision})
	if err != nil || !out.Unchanged || counting.n.Load() != 0 {
		t.Errorf("nothing new: %+v, %d reads, %v", out, counting.n.Load(), err)
	}
	// What a node has of another site is nothing; and a version out of this
	// world asks for no document and breaks nothing.
	if out, err = s.node.Documents(a.ctx, &musterv1.DocumentsRequest{Site: "other", Have: p.revision}); err != nil || len(out.Envelopes) == 0 {
		t.Errorf("as if it had all: %v", err)
	}
	huge := &musterv1.DocVersion{Epoch: 1 << 63, N: 1<<64 - 1}
	if out, err = s.node.Documents(a.ctx, &musterv1.DocumentsRequest{Site: "shop-7", Have: huge, After: huge}); err != nil || len(out.Envelopes) != 0 || out.Unchanged {
		t.Errorf("%+v %v", out, err)
	}
}

func TestFoundingIsGrantedOnce(t *testing.T) {
	s := newShop(t)
	var members []*member
	for _, n := range []string{"a", "b", "c", "d"} {
		members = append(members, s.join(n, "shop-7"))
	}
	var mu sync.Mutex
	granted := map[string]int{}
	var wg sync.WaitGroup
	for _, m := range members {
		for range 4 {
			wg.Go(func() {
				out, err := s.node.AskFounding(m.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-" + string(m.ID)[2:]})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				granted[out.Node]++
			})
		}
	}
	wg.Wait()
	if len(granted) != 1 || s.audited(audit.FoundingGranted) != 1 {
		t.Fatalf("granted to %v, %d records", granted, s.audited(audit.FoundingGranted))
	}
	for _, m := range members {
		out, err := s.node.AskFounding(m.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-other"})
		s.must(err)
		if granted[string(m.ID)] > 0 && (out.Node != string(m.ID) || out.Uid != "c-other") {
			t.Errorf("the founder with another UID: %+v", out)
		}
		if granted[string(m.ID)] == 0 && (out.Node == string(m.ID) || out.Reason == "") {
			t.Errorf("another node: %+v", out)
		}
	}
	if out, _ := s.node.AskFounding(members[0].ctx, &musterv1.AskFoundingRequest{Site: "shop-8", Uid: "c-1"}); out.GetNode() != "" {
		t.Errorf("another site: %+v", out)
	}
	if _, err := s.node.AskFounding(members[0].ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "../x"}); err == nil {
		t.Error("a malformed UID")
	}
}

func TestWhoMayNotFound(t *testing.T) {
	s := newShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	_, _, _, err := s.s.assign(context.Background(), testCaller, assignment{id: string(a.ID), site: "shop-7", worker: true})
	s.must(err)
	ask := func(m *member) *musterv1.AskFoundingResponse {
		out, err := s.node.AskFounding(m.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"})
		s.must(err)
		return out
	}
	if out := ask(a); out.Node != "" || !strings.Contains(out.Reason, "may not be a server") {
		t.Errorf("a worker: %+v", out)
	}
	_, err = s.set("shop-7", func(set *fleet.SiteSettings) { set.Founding = fleet.Founding{Mode: fleet.FoundNamed, Founder: b.ID} })
	s.must(err)
	if out := ask(b); out.Node != "" || !strings.Contains(out.Reason, "does not ask") {
		t.Errorf("mode named: %+v", out)
	}
}

func TestAfterARestoredBackupNobodyFounds(t *testing.T) {
	s := newShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-8")
	s.update(func(tx store.Tx) error {
		_, err := raiseEpoch(tx, act{actor: "user:local", now: s.clock.now()}, "disk lost")
		return err
	})
	ask := func(m *member, site, uid string) *musterv1.AskFoundingResponse {
		out, err := s.node.AskFounding(m.ctx, &musterv1.AskFoundingRequest{Site: site, Uid: uid})
		s.must(err)
		return out
	}
	if out := ask(a, "shop-7", "c-1"); !out.Unsure || out.Node != "" {
		t.Fatalf("%+v", out)
	}
	// A report without a cluster proves nothing: another node may have one.
	s.report(a, "none", nil)
	if out := ask(a, "shop-7", "c-1"); !out.Unsure {
		t.Errorf("after a report without a cluster: %+v", out)
	}
	s.report(b, "server", s.record(b, func(r *fleet.ClusterRecord) { r.Site = "shop-8" }))
	if out := ask(b, "shop-8", "c-9"); out.Unsure || out.Uid != "c-1" || s.site("shop-8").Ledger.Unsure(2) {
		t.Errorf("after the site showed its cluster: %+v", out)
	}
	if _, err := s.s.confirmSite(context.Background(), testCaller, "shop-8", "looked"); err == nil {
		t.Error("confirmed what was not in doubt")
	}
	_, err := s.s.confirmSite(context.Background(), testCaller, "shop-7", "looked")
	s.must(err)
	if out := ask(a, "shop-7", "c-1"); out.Node != string(a.ID) {
		t.Errorf("after a person confirmed: %+v", out)
	}
	// New documents outrank all that the lost days gave out.
	c := s.join("c", "shop-7")
	if v := s.pull(c).admissions[c.ID].Version; v.Epoch != 2 {
		t.Errorf("version %s", v)
	}
}

func TestANodeThatKnowsMoreThanTheCentreRaisesADoubt(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	have := s.site("shop-7").Ledger.Documents
	report := func(v fleet.DocVersion) {
		_, err := s.node.Report(a.ctx, &musterv1.ReportRequest{Epoch: v.Epoch, Version: v.N})
		s.must(err)
	}
	report(have)
	if s.site("shop-7").Ledger.Doubt != "" {
		t.Fatal("doubt without a cause")
	}
	report(fleet.DocVersion{Epoch: have.Epoch, N: have.N + 7})
	report(fleet.DocVersion{Epoch: have.Epoch, N: have.N + 8})
	if s.site("shop-7").Ledger.Doubt == "" || len(s.events("site.doubt")) != 1 {
		t.Errorf("%+v, %d events", s.site("shop-7").Ledger, len(s.events("site.doubt")))
	}
	out, err := s.node.AskFounding(a.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"})
	if err != nil || !out.Unsure {
		t.Errorf("%+v %v", out, err)
	}
}

func TestRecordsAreVerified(t *testing.T) {
	s := newShop(t)
	a, b, other := s.join("a", "shop-7"), s.join("b", "shop-7"), s.join("o", "shop-8")
	uid := func() string { return s.site("shop-7").Status.ClusterUID }
	stranger := &member{Node: a.Node}
	var err error
	stranger.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	worker := func() {
		_, _, _, err := s.s.assign(context.Background(), testCaller, assignment{id: string(b.ID), site: "shop-7", worker: true})
		s.must(err)
	}
	worker()
	for name, record := range map[string][]byte{
		"a stranger's key":       s.record(stranger, nil),
		"a node of another site": s.record(other, func(r *fleet.ClusterRecord) { r.Site = "shop-7" }),
		"of another site":        s.record(a, func(r *fleet.ClusterRecord) { r.Site = "shop-8" }),
		"of another tenant":      s.record(a, func(r *fleet.ClusterRecord) { r.Tenant = "other" }),
		"a worker's":             s.record(b, nil),
		"nonsense":               []byte("{"),
		"without a UID":          s.record(a, func(r *fleet.ClusterRecord) { r.UID = "" }),
		"an epoch of a galaxy":   s.record(a, func(r *fleet.ClusterRecord) { r.Epoch = 1 << 60 }),
		"an order": func() []byte {
			env, err := statement.Sign(fleet.OrderPayload, []byte("{}"), a.key)
			s.must(err)
			return env.JSON()
		}(),
	} {
		s.report(a, "server", record)
		if uid() != "" {
			t.Fatalf("%s was believed", name)
		}
	}
	s.report(b, "worker", s.record(a, nil)) // somebody else may show it
	if uid() != "c-1" {
		t.Fatal("a good record was not believed")
	}
}

func TestClustersOfASite(t *testing.T) {
	s := newShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	if out, err := s.node.AskFounding(a.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"}); err != nil || out.Node != string(a.ID) {
		t.Fatal(out, err)
	}
	status := func() fleet.SiteStatus { return s.site("shop-7").Status }
	s.report(a, "server", s.record(a, func(r *fleet.ClusterRecord) { r.Epoch, r.Version = 3, 5 }))
	s.report(a, "server", s.record(a, func(r *fleet.ClusterRecord) { r.Epoch, r.Version = 2, 9 }))
	if st := status(); st.ClusterEpoch != 3 || st.ClusterVersion != 5 {
		t.Errorf("the epoch went back: %+v", st)
	}
	if len(s.events("site.founded-without-grant")) != 0 || s.audited(audit.NodeReported) != 1 {
		t.Error("an alarm about a granted founding, or no record")
	}
	// A second cluster: one alarm, and the first one stays the site's.
	second := s.record(b, func(r *fleet.ClusterRecord) { r.UID = "c-2" })
	for _, state := range []string{"server", "server", "candidate"} {
		s.report(b, state, second)
	}
	if st := status(); st.ClusterUID != "c-1" || st.Second != "c-2" || st.SecondBy != b.ID || !strings.Contains(st.Blocker, "two clusters") {
		t.Errorf("%+v", st)
	}
	if e := s.events("site.two-clusters"); len(e) != 1 || e[0].Level != fleet.EventAlarm {
		t.Errorf("%+v", e)
	}
	// The second is dissolved into the first.
	s.report(b, "worker", s.record(b, func(r *fleet.ClusterRecord) { r.UID, r.Version, r.Into = "c-2", 2, "c-1" }))
	if site := s.site("shop-7"); site.Status.Second != "" || site.Status.ClusterUID != "c-1" || !site.Ledger.HasEnded("c-2") {
		t.Errorf("%+v %+v", site.Status, site.Ledger)
	}
	// The ended one shows up again: said, and not believed.
	s.report(b, "server", second)
	if st := status(); st.ClusterUID != "c-1" || st.Second != "" || len(s.events("site.cluster-ended")) != 1 {
		t.Errorf("%+v", st)
	}
}

func TestAFounderWithoutAGrantIsAnAlarm(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	s.report(a, "server", s.record(a, nil))
	if e := s.events("site.founded-without-grant"); len(e) != 1 || e[0].Level != fleet.EventAlarm {
		t.Errorf("%+v", e)
	}
}

func TestClusterReportsCostNothingWhenNothingChanged(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	out, err := s.node.Report(a.ctx, &musterv1.ReportRequest{})
	if err != nil || !out.WantCluster {
		t.Fatalf("the centre does not ask: %+v %v", out, err)
	}
	record := s.record(a, nil)
	s.report(a, "server", record)
	counting := &countingStore{Store: s.s.store}
	s.s.store = counting
	if out := s.report(a, "server", record); out.WantCluster || counting.n.Load() != 0 {
		t.Errorf("%d transactions, %+v", counting.n.Load(), out)
	}
	if out := s.report(a, "worker", record); counting.n.Load() == 0 {
		t.Errorf("a change was not written: %+v", out)
	}
}

func TestHostileClusterReports(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	for name, q := range map[string]*musterv1.ReportRequest{
		"a giant record":    {Cluster: &musterv1.ClusterReport{Role: "server", Record: make([]byte, maxRecord+1)}},
		"a role of its own": {Cluster: &musterv1.ClusterReport{Role: "root"}},
		"many snapshots":    {Cluster: &musterv1.ClusterReport{Role: "none", Snapshots: make([]string, 17)}},
		"bad labels":        {Cluster: &musterv1.ClusterReport{Role: "none", NodeLabels: map[string]string{"a b": ""}}},
		"many outcomes":     {Outcomes: make([]*musterv1.OrderOutcome, 17)},
		"a giant offer":     {Cluster: &musterv1.ClusterReport{Role: "none", EscrowOffer: make([]byte, maxOffer+1)}},
	} {
		if _, err := s.node.Report(a.ctx, q); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	evil := "\x1b[2J\u202e<script>\n" + strings.Repeat("x", 4096)
	_, err := s.node.Report(a.ctx, &musterv1.ReportRequest{Cluster: &musterv1.ClusterReport{
		Role: "worker", State: evil, Blocker: evil, Reason: evil, K3SVersion: evil, Snapshots: []string{evil},
	}})
	s.must(err)
	s.must(s.s.store.View(context.Background(), func(r store.Reader) error {
		got, err := r.Report(DefaultTenant, a.ID)
		b, _ := json.Marshal(got)
		if len(b) > 4096 || strings.ContainsAny(got.State+got.Reason+got.Blocker+got.K3s+got.Snapshots[0], "\x1b\u202e\n") {
			t.Errorf("%d bytes: %s", len(b), b)
		}
		return err
	}))
}

func (s *shop) order(w wish) (promise, error) {
	w.site, w.reason = "shop-7", "test"
	return s.s.order(context.Background(), testCaller, w)
}

func TestOrders(t *testing.T) {
	s := newShop(t)
	a, b, other := s.join("a", "shop-7"), s.join("b", "shop-7"), s.join("o", "shop-8")
	for name, w := range map[string]wish{
		"a node of another site": {kind: fleet.OrderFound, node: string(other.ID)},
		"no such kind":           {kind: fleet.OrderWipe, node: string(a.ID)},
		"no cluster":             {kind: fleet.OrderReset, node: string(a.ID)},
		"no snapshot":            {kind: fleet.OrderRestore, node: string(a.ID), cluster: "c-1"},
		"not handed over":        {kind: fleet.OrderRestore, node: string(a.ID), cluster: "c-1", snapshot: "e-aaaaaaaaaaaaaaaaaaaaaaaa"},
		"into itself":            {kind: fleet.OrderDissolve, node: string(a.ID), cluster: "c-1", into: "c-1"},
	} {
		if p, err := s.order(w); err == nil {
			t.Errorf("%s: %s", name, p.sentence)
		}
	}
	s.report(a, "server", s.record(a, func(r *fleet.ClusterRecord) { r.Epoch = 4 }))
	before := s.pull(a).revision
	p, err := s.order(wish{kind: fleet.OrderReset, node: string(a.ID), dry: true})
	if err != nil || p.sentence == "" || len(s.pull(a).orders) != 0 || s.audited(audit.OrderIssued) != 0 {
		t.Fatalf("a dry run: %+v %v", p, err)
	}
	if _, err := s.order(wish{kind: fleet.OrderReset, node: string(a.ID), seenEpoch: 3}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("another epoch: %v", err)
	}
	p, err = s.order(wish{kind: fleet.OrderReset, node: string(a.ID), seenEpoch: 4})
	s.must(err)
	if o := p.order; o.Cluster != "c-1" || o.Epoch <= 4 || o.State != fleet.OrderOpen || o.NotAfter.Sub(o.Issued) != defaultOrderLife {
		t.Errorf("%+v", o)
	}
	if _, err := s.order(wish{kind: fleet.OrderReset, node: string(b.ID)}); err == nil || !strings.Contains(err.Error(), "stands") {
		t.Errorf("a second one: %v", err)
	}
	if out, err := s.node.Report(a.ctx, &musterv1.ReportRequest{}); err != nil || out.Documents.N <= before.N {
		t.Errorf("the node is not told: %+v %v", out, err)
	}
	if got := s.pull(b); len(got.orders) != 0 {
		t.Error("another node got it")
	}
	if got := s.pull(a); len(got.orders) != 1 || !slices.Equal(got.live, []string{p.order.ID}) {
		t.Errorf("%+v", got)
	}
	state := func() (o store.Order) {
		s.must(s.s.store.View(context.Background(), func(r store.Reader) (err error) { o, err = r.Order(DefaultTenant, p.order.ID); return err }))
		return o
	}
	if state().State != fleet.OrderDelivered {
		t.Errorf("state %s", state().State)
	}
	say := func(m *member, st musterv1.OrderState) []string {
		out, err := s.node.Report(m.ctx, &musterv1.ReportRequest{Outcomes: []*musterv1.OrderOutcome{{Id: p.order.ID, State: st, Text: "done\x1b"}}})
		s.must(err)
		return out.Acknowledged
	}
	say(b, musterv1.OrderState_ORDER_STATE_DONE)
	say(a, musterv1.OrderState_ORDER_STATE_WITHDRAWN)
	if state().State != fleet.OrderDelivered {
		t.Error("somebody else, or nonsense, ended it")
	}
	say(a, musterv1.OrderState_ORDER_STATE_RUNNING)
	if _, err := s.s.withdraw(context.Background(), testCaller, p.order.ID, "x"); err == nil {
		t.Error("withdrawn while it runs")
	}
	if ack := say(a, musterv1.OrderState_ORDER_STATE_DONE); !slices.Equal(ack, []string{p.order.ID}) {
		t.Errorf("acknowledged %v", ack)
	}
	say(a, musterv1.OrderState_ORDER_STATE_DONE)
	if o := state(); o.State != fleet.OrderDone || strings.Contains(o.Text, "\x1b") || s.audited(audit.OrderFinished) != 1 {
		t.Errorf("%+v", o)
	}
	if got := s.pull(a); len(got.orders) != 0 || len(got.live) != 0 {
		t.Error("it is given out after its end")
	}
}

func TestWithdrawnAndExpiredOrdersAreNotGiven(t *testing.T) {
	s := newShop(t)
	a := s.join("a", "shop-7")
	p, err := s.order(wish{kind: fleet.OrderFound, node: string(a.ID)})
	s.must(err)
	if _, err := s.s.withdraw(context.Background(), testCaller, p.order.ID[:6], "changed my mind"); err != nil {
		t.Fatal(err)
	}
	if got := s.pull(a); len(got.live) != 0 || s.site("shop-7").Ledger.Grant != nil {
		t.Errorf("%+v", got)
	}
	if _, err = s.order(wish{kind: fleet.OrderFound, node: string(a.ID), life: time.Minute}); err != nil {
		t.Fatal(err)
	}
	s.clock.set(s.clock.now().Add(2 * time.Minute))
	if got := s.pull(a); len(got.live) != 0 {
		t.Error("an ended order is given out")
	}
	s.must(s.s.expireOrders(context.Background()))
	if len(s.events("order.expired")) != 1 {
		t.Error("nobody heard of the end")
	}
}

// An order to found moves the right, and declares the old cluster lost.
func TestAnOrderToFoundMovesTheRight(t *testing.T) {
	s := newShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	if out, err := s.node.AskFounding(a.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"}); err != nil || out.Node != string(a.ID) {
		t.Fatal(out, err)
	}
	s.report(a, "server", s.record(a, nil))
	p, err := s.order(wish{kind: fleet.OrderFound, node: string(b.ID)})
	s.must(err)
	if !strings.Contains(p.sentence, "declared lost") || len(p.warnings) != 2 {
		t.Errorf("%+v", p)
	}
	if out, err := s.node.AskFounding(b.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-2"}); err != nil || out.Node != string(b.ID) || out.Uid != "c-2" {
		t.Errorf("%+v %v", out, err)
	}
	if out, err := s.node.AskFounding(a.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"}); err != nil || out.Node == string(a.ID) {
		t.Errorf("the old founder: %+v %v", out, err)
	}
	s.report(b, "server", s.record(b, func(r *fleet.ClusterRecord) { r.UID = "c-2" }))
	if st := s.site("shop-7").Status; st.ClusterUID != "c-2" || st.Second != "" {
		t.Errorf("%+v", st)
	}
}

func TestHardwareBecomesLabels(t *testing.T) {
	got := hardwareLabels(fleet.Hardware{
		Vendor: "ACME Inc.", Product: "Box 9000", CPUs: 8, MemoryBytes: 17 << 30,
		Devices: []fleet.Device{{Bus: "pci", Class: "0x030000"}, {Bus: "usb", Class: "0e"}, {Bus: "pci", Class: "0x020000"}},
		Disks:   []fleet.Disk{{Rotational: true}, {}, {Removable: true}},
	})
	want := map[string]string{"muster/cpus": "8", "muster/memory-gib": "17", "muster/gpu": "true", "muster/camera": "true", "muster/disk": "flash"}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s=%s, want %s", k, got[k], v)
		}
	}
	if err := fleet.ValidateLabels(got); err != nil {
		t.Error(err)
	}
	evil := "\x1b[31m" + strings.Repeat("é/", 200)
	n := fleet.Node{Hardware: fleet.Hardware{Vendor: evil, Product: evil, CPUs: 1 << 40, MemoryBytes: 1 << 62}, Labels: map[string]string{"muster/cpus": "4"}}
	for i := range fleet.MaxLabels - 1 {
		n.Labels[fmt.Sprintf("own-%d", i)] = "x"
	}
	a := admissionOf(n, "")
	if err := fleet.ValidateLabels(a.Labels); err != nil || a.Labels["muster/cpus"] != "4" {
		t.Error(err, a.Labels["muster/cpus"])
	}
}

// A node that turned hostile can neither fill the audit log nor keep the
// writer from others; an honest one beside it notices nothing.
func TestANodeCannotWriteWithoutEnd(t *testing.T) {
	s := newShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	before := len(must(s.records())(t))
	counting := &countingStore{Store: s.s.store}
	s.s.store = counting
	for i := range 500 {
		_, err := s.node.AskFounding(a.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: fmt.Sprintf("c-%d", i)})
		s.must(err)
		out, err := s.node.Report(a.ctx, &musterv1.ReportRequest{
			Cluster:  &musterv1.ClusterReport{Role: "worker", State: fmt.Sprint(i)},
			Outcomes: []*musterv1.OrderOutcome{{Id: fmt.Sprintf("o-%d", i), State: musterv1.OrderState_ORDER_STATE_DONE}},
		})
		s.must(err)
		if i == 499 && (!out.WantCluster || len(out.Acknowledged) != 0) {
			t.Errorf("it is not asked to say it again: %+v", out)
		}
	}
	if n := len(must(s.records())(t)) - before; n > writeBurst {
		t.Errorf("%d records", n)
	}
	s.report(b, "worker", nil)
	if r := s.site("shop-7").Status; r.Workers == 0 {
		t.Errorf("the other node was not heard: %+v", r)
	}
	s.clock.set(s.clock.now().Add(time.Minute))
	if out := s.report(a, "server", nil); out.WantCluster {
		t.Error("a minute later it is still not heard")
	}
}
