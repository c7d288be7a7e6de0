package papers

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

var issued = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// member is a node with its LDevID key.
type member struct {
	id  fleet.NodeID
	key *ecdsa.PrivateKey
	ref Ref
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newMember(t testing.TB) *member {
	t.Helper()
	m := &member{key: newKey(t)}
	var err error
	if m.ref, err = KeyRef(m.key.Public()); err != nil {
		t.Fatal(err)
	}
	m.id = fleet.EKHash(m.ref).NodeID()
	return m
}

// site signs documents as the centre does.
type site struct {
	t            testing.TB
	orders       *ecdsa.PrivateKey
	tenant, name string
	n            uint64
}

func newSite(t testing.TB) *site {
	return &site{t: t, orders: newKey(t), tenant: "acme", name: "hall-1"}
}

func (s *site) next() fleet.DocVersion { s.n++; return fleet.DocVersion{Epoch: 1, N: s.n} }

func (s *site) sign(kind string, v any, by ...crypto.Signer) []byte {
	s.t.Helper()
	if len(by) == 0 {
		by = []crypto.Signer{s.orders}
	}
	b, err := json.Marshal(v)
	if err != nil {
		s.t.Fatal(err)
	}
	e, err := statement.Sign(kind, b, by...)
	if err != nil {
		s.t.Fatal(err)
	}
	return e.JSON()
}

func (s *site) aCharter(delegates ...*ecdsa.PrivateKey) fleet.Charter {
	c := fleet.Charter{Format: fleet.CharterFormat, Tenant: s.tenant, Site: s.name, Version: s.next(), Lab: true, AnyBoot: true,
		Founding: fleet.Founding{Mode: fleet.FoundCentral}, Policy: fleet.DefaultPolicy(), Birth: fleet.DefaultBirth(), Issued: issued}
	for _, d := range delegates {
		der, err := x509.MarshalPKIXPublicKey(d.Public())
		if err != nil {
			s.t.Fatal(err)
		}
		c.Delegates = append(c.Delegates, der)
	}
	return c
}

func (s *site) anAdmission(m *member) fleet.Admission {
	return fleet.Admission{Format: fleet.AdmissionFormat, Tenant: s.tenant, Site: s.name, Node: m.id, Incarnation: 1, LDevIDKey: m.ref[:],
		MayServe: true, Version: s.next(), Issued: issued}
}

func (s *site) aRemoval(m *member) fleet.Removal {
	return fleet.Removal{Format: fleet.RemovalFormat, Tenant: s.tenant, Site: s.name, Node: m.id, Incarnation: 1, LDevIDKey: m.ref[:], Version: s.next(), Issued: issued}
}

func (s *site) anOrder(m *member, kind fleet.OrderKind) fleet.Order {
	v := s.next()
	return fleet.Order{Format: fleet.OrderFormat, ID: fmt.Sprintf("order-%d", v.N), Tenant: s.tenant, Site: s.name, Node: m.id, Kind: kind,
		Version: v, Issued: issued, NotAfter: issued.Add(time.Hour)}
}

func (s *site) charter(delegates ...*ecdsa.PrivateKey) []byte {
	return s.sign(fleet.CharterPayload, s.aCharter(delegates...))
}
func (s *site) admission(m *member) []byte { return s.sign(fleet.AdmissionPayload, s.anAdmission(m)) }
func (s *site) removal(m *member) []byte   { return s.sign(fleet.RemovalPayload, s.aRemoval(m)) }

func (s *site) record(by *member, r clusterbootstrap.Record) []byte {
	s.t.Helper()
	b, err := SignRecord(by.key, s.tenant, s.name, r)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func aRecord(uid string, epoch, version uint64, servers ...*member) clusterbootstrap.Record {
	r := clusterbootstrap.Record{UID: uid, Epoch: epoch, Version: version, Founder: servers[0].id}
	for _, m := range servers {
		r.Servers = append(r.Servers, m.id)
	}
	return r
}

func (s *site) open(dir string, m *member) *Papers {
	s.t.Helper()
	p, err := Open(Config{Dir: dir, OrdersKeys: []crypto.PublicKey{s.orders.Public()}, Node: m.id, Key: m.ref})
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

func learn(t testing.TB, p *Papers, want int, envelopes ...[]byte) {
	t.Helper()
	if n, err := p.Learn(envelopes); n != want || err != nil {
		t.Fatalf("learned %d, %v; want %d", n, err, want)
	}
}

func TestPapersSurviveARestart(t *testing.T) {
	s, me, other := newSite(t), newMember(t), newMember(t)
	dir := filepath.Join(t.TempDir(), "papers")
	p := s.open(dir, me)
	changed := p.Changed()
	record := aRecord("c1", 2, 3, me)
	order := s.anOrder(me, fleet.OrderFound)
	// In the worst order: what vouches for the others comes last.
	learn(t, p, 6, s.sign(fleet.OrderPayload, order), s.record(me, record), s.removal(other), s.admission(other), s.admission(me), s.charter())
	select {
	case <-changed:
	default:
		t.Error("nobody was told of the change")
	}
	for name, q := range map[string]*Papers{"at once": p, "after a restart": s.open(dir, me)} {
		d := q.Documents()
		if tenant, at := q.Site(); tenant != "acme" || at != "hall-1" {
			t.Errorf("%s: the site is %s %s", name, tenant, at)
		}
		if d.Charter == nil || len(d.Admissions) != 2 || len(d.Removals) != 1 || len(d.Records) != 1 || !reflect.DeepEqual(d.Records[0], record) {
			t.Errorf("%s: %+v", name, d)
		}
		if _, ok := d.Admitted(me.id); !ok {
			t.Errorf("%s: this node is not admitted", name)
		}
		if _, st := q.Standing(me.ref); st != Admitted {
			t.Errorf("%s: this node's key is %v", name, st)
		}
		if _, st := q.Standing(other.ref); st != Removed {
			t.Errorf("%s: the removed node's key is %v", name, st)
		}
		if _, st := q.Standing(Ref{1}); st != Unknown {
			t.Errorf("%s: a stranger's key is %v", name, st)
		}
		if o := q.Orders(issued); len(o) != 1 || o[0].ID != order.ID {
			t.Errorf("%s: orders %+v", name, o)
		}
		if q.Revision() != p.Revision() || len(q.Refs()) != 6 || len(q.Envelopes(q.Refs())) != 6 || len(q.Missing(append(q.Refs(), Ref{}))) != 1 {
			t.Errorf("%s: %d refs, revision %x", name, len(q.Refs()), q.Revision())
		}
		h := q.Hello(me.id, "c1")
		if h.Charter == nil || h.Admission == nil || h.Record == nil || !reflect.DeepEqual(q.Hello(other.id, "c2"), Shown{Charter: h.Charter}) {
			t.Errorf("%s: hello shows %d %d %d bytes", name, len(h.Charter), len(h.Admission), len(h.Record))
		}
	}
	if n, err := p.Learn(p.Envelopes(p.Refs())); n != 0 || err != nil {
		t.Errorf("the same again: %d, %v", n, err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
}

func TestRefusals(t *testing.T) {
	s, me, worker, gone, stranger := newSite(t), newMember(t), newMember(t), newMember(t), newMember(t)
	delegate, foreign := newKey(t), newKey(t)
	elsewhere := &site{t: t, orders: s.orders, tenant: "acme", name: "hall-2"}
	other := &site{t: t, orders: s.orders, tenant: "umbrella", name: "hall-1"}
	noServer := s.anAdmission(worker)
	noServer.MayServe = false
	start := [][]byte{s.charter(delegate), s.admission(me), s.sign(fleet.AdmissionPayload, noServer), s.admission(gone), s.removal(gone)}
	tampered := func(b []byte, old, with string) []byte {
		e, err := statement.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		e.Payload = bytes.Replace(e.Payload, []byte(old), []byte(with), 1)
		return e.JSON()
	}
	badEpoch := s.anOrder(me, fleet.OrderReset)
	swapped := func() []byte { // a record whose envelope brings somebody else's key
		var e recordEnvelope
		if err := json.Unmarshal(s.record(stranger, aRecord("c1", 1, 1, me)), &e); err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKIXPublicKey(me.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		e.Signatures[0].Key = der
		e.Signatures[0].KeyID = me.ref.String()
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	nobody := newMember(t)
	for name, c := range map[string]struct {
		bad, twin []byte
	}{
		"rubbish":                     {[]byte("rubbish"), nil},
		"nothing":                     {nil, nil},
		"deep JSON":                   {bytes.Repeat([]byte(`{"payload":`), 20_000), nil},
		"too large":                   {append(s.admission(stranger), bytes.Repeat([]byte(" "), MaxEnvelope)...), nil},
		"unknown kind":                {s.sign("application/x", 1), nil},
		"foreign key":                 {s.sign(fleet.AdmissionPayload, s.anAdmission(nobody), foreign), s.admission(nobody)},
		"altered":                     {tampered(s.admission(stranger), string(stranger.id), string(nobody.id)), nil},
		"another site":                {elsewhere.admission(stranger), nil},
		"another tenant":              {other.admission(stranger), nil},
		"charter of another site":     {elsewhere.charter(), s.charter(delegate)},
		"charter by a delegate":       {s.sign(fleet.CharterPayload, s.aCharter(delegate), delegate), nil},
		"order by a delegate":         {s.sign(fleet.OrderPayload, s.anOrder(me, fleet.OrderFound), delegate), s.sign(fleet.OrderPayload, s.anOrder(me, fleet.OrderFound))},
		"admission typed as removal":  {s.sign(fleet.RemovalPayload, s.anAdmission(stranger)), nil},
		"invalid order":               {s.sign(fleet.OrderPayload, badEpoch), nil},
		"record of a worker":          {s.record(worker, aRecord("c1", 1, 1, me)), s.record(me, aRecord("c1", 1, 1, me))},
		"record of a removed server":  {s.record(gone, aRecord("c2", 1, 1, me)), s.record(me, aRecord("c2", 1, 1, me))},
		"record of a stranger":        {s.record(stranger, aRecord("c3", 1, 1, me)), nil},
		"record with another's key":   {swapped(), nil},
		"record by the orders key":    {s.sign(fleet.ClusterRecordPayload, fleet.ClusterRecord{Tenant: "acme", Site: "hall-1", UID: "c4", Founder: me.id, Servers: []fleet.NodeID{me.id}}), nil},
		"record of another site":      {elsewhere.record(me, aRecord("c5", 1, 1, me)), nil},
		"admission by a delegate (+)": {s.sign(fleet.AdmissionPayload, s.anAdmission(nobody), foreign), s.sign(fleet.AdmissionPayload, s.anAdmission(nobody), delegate)},
	} {
		t.Run(name, func(t *testing.T) {
			p := s.open(filepath.Join(t.TempDir(), "p"), me)
			learn(t, p, 5, start...)
			before := p.Revision()
			n, err := p.Learn([][]byte{c.bad})
			var r *Refused
			if n != 0 || !errors.As(err, &r) || p.Revision() != before {
				t.Fatalf("learned %d, %v", n, err)
			}
			if c.twin == nil {
				return
			}
			// What is bad costs what is good nothing.
			if n, err := p.Learn([][]byte{c.bad, c.twin, c.bad}); n != 1 || err == nil {
				t.Errorf("with its twin: learned %d, %v", n, err)
			}
			if q := s.open(p.cfg.Dir, me); q.Revision() != p.Revision() {
				t.Error("the disk holds something else than was learned")
			}
		})
	}
}

// Before its own admission a node takes nothing, whoever signed it.
func TestTheOwnAdmissionSaysWhichSite(t *testing.T) {
	s, me, other := newSite(t), newMember(t), newMember(t)
	elsewhere := &site{t: t, orders: s.orders, tenant: "acme", name: "hall-2"}
	delegate := newKey(t)
	p := s.open(filepath.Join(t.TempDir(), "p"), me)
	wrongKey := s.anAdmission(me)
	wrongKey.LDevIDKey = other.ref[:]
	if n, err := p.Learn([][]byte{s.charter(), s.admission(other), s.sign(fleet.AdmissionPayload, wrongKey), s.sign(fleet.AdmissionPayload, s.anAdmission(me), delegate)}); n != 0 || err == nil {
		t.Fatalf("learned %d, %v", n, err)
	}
	// A delegate's word counts with the charter that names it.
	learn(t, p, 3, s.sign(fleet.AdmissionPayload, s.anAdmission(me), delegate), s.charter(delegate), s.admission(other))
	if n, err := p.Learn([][]byte{elsewhere.admission(me), elsewhere.charter()}); n != 0 || err == nil {
		t.Errorf("another site was learned: %d, %v", n, err)
	}
	if _, at := s.open(p.cfg.Dir, me).Site(); at != "hall-1" {
		t.Errorf("after a restart the site is %q", at)
	}
	fixed, err := Open(Config{Dir: filepath.Join(t.TempDir(), "q"), OrdersKeys: []crypto.PublicKey{s.orders.Public()}, Node: me.id, Key: me.ref, Tenant: "acme", Site: "hall-1"})
	if err != nil {
		t.Fatal(err)
	}
	learn(t, fixed, 1, s.charter())
}

// The charter in force says whose word counts, whatever came first.
func TestWhenADelegateIsNoLongerThenItsWordIsNot(t *testing.T) {
	s, me, a, b := newSite(t), newMember(t), newMember(t), newMember(t)
	delegate := newKey(t)
	dir := filepath.Join(t.TempDir(), "p")
	p := s.open(dir, me)
	byDelegate := s.sign(fleet.AdmissionPayload, s.anAdmission(a), delegate)
	learn(t, p, 4, s.admission(me), s.charter(delegate), byDelegate, s.sign(fleet.RemovalPayload, s.aRemoval(b), delegate))
	if _, ok := p.Documents().Admitted(a.id); !ok {
		t.Fatal("the delegate's admission was not taken")
	}
	learn(t, p, 1, s.charter())
	for name, q := range map[string]*Papers{"at once": p, "after a restart": s.open(dir, me)} {
		if d := q.Documents(); len(d.Admissions) != 1 || len(d.Removals) != 0 {
			t.Errorf("%s: %d admissions, %d removals", name, len(d.Admissions), len(d.Removals))
		}
	}
	if n, err := p.Learn([][]byte{byDelegate}); n != 0 || err == nil {
		t.Errorf("learned %d, %v", n, err)
	}
	if _, err := os.Stat(filepath.Join(dir, factFile(admissionPrefix, a.id, 1))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its file is still there: %v", err)
	}
}

// A record outlives its signer: a forgotten cluster would be founded again.
func TestWhenTheSignerOfARecordIsRemovedThenTheRecordStays(t *testing.T) {
	s, me, founder := newSite(t), newMember(t), newMember(t)
	dir := filepath.Join(t.TempDir(), "p")
	p := s.open(dir, me)
	learn(t, p, 4, s.charter(), s.admission(me), s.admission(founder), s.record(founder, aRecord("c1", 1, 1, founder)))
	learn(t, p, 1, s.removal(founder))
	for name, q := range map[string]*Papers{"at once": p, "after a restart": s.open(dir, me)} {
		if _, ok := q.Documents().Newest("c1"); !ok {
			t.Errorf("%s: the record is gone", name)
		}
	}
	if n, err := p.Learn([][]byte{s.record(founder, aRecord("c1", 1, 2, founder))}); n != 0 || err == nil {
		t.Errorf("a removed server still writes: %d, %v", n, err)
	}
	learn(t, p, 1, s.record(me, aRecord("c1", 1, 2, me)))
	learn(t, p, 0, s.record(me, aRecord("c1", 1, 1, me)))
	if r, _ := p.Documents().Newest("c1"); r.Version != 2 {
		t.Errorf("the record went back to version %d", r.Version)
	}
}

func TestMandate(t *testing.T) {
	s, me, other := newSite(t), newMember(t), newMember(t)
	p := s.open(filepath.Join(t.TempDir(), "p"), me)
	learn(t, p, 3, s.charter(), s.admission(me), s.record(me, aRecord("c1", 4, 1, me)))
	give := func(o fleet.Order) fleet.Order {
		t.Helper()
		learn(t, p, 1, s.sign(fleet.OrderPayload, o))
		return o
	}
	about := func(kind fleet.OrderKind, m *member, edit func(*fleet.Order)) fleet.Order {
		o := s.anOrder(m, kind)
		if edit != nil {
			edit(&o)
		}
		return o
	}
	want := func(what string, now time.Time, m *clusterbootstrap.Mandate) {
		t.Helper()
		if got := p.Mandate(now); !reflect.DeepEqual(got, m) {
			t.Errorf("%s: %+v, want %+v", what, got, m)
		}
	}
	want("none", issued, nil)
	give(about(fleet.OrderReset, other, func(o *fleet.Order) { o.Cluster, o.Epoch = "c1", 9 }))
	want("of another node", issued, nil)
	give(about(fleet.OrderRecover, me, nil))
	want("of no concern to the planner", issued, nil)
	give(about(fleet.OrderReset, me, func(o *fleet.Order) { o.Cluster, o.Epoch = "c1", 4 }))
	want("done already", issued, nil)
	reset := give(about(fleet.OrderReset, me, func(o *fleet.Order) { o.Cluster, o.Epoch = "c1", 5 }))
	m := clusterbootstrap.Mandate{ID: reset.ID, Kind: clusterbootstrap.MandateReset, UID: "c1", Epoch: 5, NotAfter: reset.NotAfter}
	want("reset", issued, &m)
	want("at its end", reset.NotAfter, nil)
	want("a moment before", reset.NotAfter.Add(-1), &m)
	restore := give(about(fleet.OrderRestore, me, func(o *fleet.Order) { o.Cluster, o.Epoch, o.Snapshot = "c1", 6, "snap-1" }))
	newer := clusterbootstrap.Mandate{ID: restore.ID, Kind: clusterbootstrap.MandateRestore, UID: "c1", Epoch: 6, Snapshot: "snap-1", NotAfter: restore.NotAfter}
	want("the newer one", issued, &newer)
	learn(t, p, 1, s.record(me, aRecord("c1", 6, 1, me)))
	want("both are done", issued, nil)
	dissolve := give(about(fleet.OrderDissolve, me, func(o *fleet.Order) { o.Cluster, o.Into = "c1", "c2" }))
	want("dissolve", issued, &clusterbootstrap.Mandate{ID: dissolve.ID, Kind: clusterbootstrap.MandateDissolve, UID: "c1", Into: "c2", NotAfter: dissolve.NotAfter})
	r := aRecord("c1", 6, 2, me)
	r.Into = "c2"
	learn(t, p, 1, s.record(me, r))
	want("it is dissolved", issued, nil)
	found := give(about(fleet.OrderFound, me, nil))
	want("found", issued, &clusterbootstrap.Mandate{ID: found.ID, Kind: clusterbootstrap.MandateFound, NotAfter: found.NotAfter})
}

func TestOrdersHaveABound(t *testing.T) {
	s, me, other := newSite(t), newMember(t), newMember(t)
	dir := filepath.Join(t.TempDir(), "p")
	p := s.open(dir, me)
	learn(t, p, 1, s.admission(me))
	var mine, theirs [][]byte
	for i := range MaxOrders {
		a, b := s.anOrder(me, fleet.OrderRecover), s.anOrder(other, fleet.OrderRecover)
		a.NotAfter = issued.Add(time.Hour + time.Duration(i)*time.Minute)
		b.NotAfter = a.NotAfter
		mine, theirs = append(mine, s.sign(fleet.OrderPayload, a)), append(theirs, s.sign(fleet.OrderPayload, b))
	}
	learn(t, p, MaxOrders, mine...)
	learn(t, p, MaxOrders, theirs...)
	early := s.anOrder(me, fleet.OrderRecover)
	early.NotAfter = issued.Add(time.Minute)
	if n, err := p.Learn([][]byte{s.sign(fleet.OrderPayload, early)}); n != 0 || err == nil {
		t.Errorf("one that ends before all: %d, %v", n, err)
	}
	late := s.anOrder(me, fleet.OrderRecover)
	late.NotAfter = issued.Add(24 * time.Hour)
	learn(t, p, 1, s.sign(fleet.OrderPayload, late))
	if o := p.Orders(issued); len(o) != MaxOrders || o[len(o)-1].ID != late.ID || o[0].ID == "order-2" {
		t.Errorf("%d orders, the first is %s", len(o), o[0].ID)
	}
	if q := s.open(dir, me); q.Revision() != p.Revision() || len(q.Refs()) != 1+2*MaxOrders {
		t.Errorf("after a restart there are %d documents", len(q.Refs()))
	}
}

// The bounds of facts, records and bytes, without thousands of signatures.
func TestBounds(t *testing.T) {
	s, me := newSite(t), newMember(t)
	p := &Papers{cfg: Config{Node: me.id, Key: me.ref}}
	fact := func(i int) (string, *doc) {
		a := s.anAdmission(me)
		a.Node = fleet.EKHash{byte(i), byte(i >> 8)}.NodeID()
		return factFile(admissionPrefix, a.Node, 1), &doc{admission: &a, envelope: []byte("x")}
	}
	l := p.learning(newSet("acme", "hall-1"), false)
	for i := range MaxFacts {
		if err := l.take(fact(i)); err != nil {
			t.Fatalf("fact %d: %v", i, err)
		}
	}
	if err := l.take(fact(MaxFacts)); err == nil {
		t.Error("one fact too many was taken")
	}
	file, again := fact(7)
	again.admission.MayServe = false
	if err := l.take(file, again); err != nil || l.set.docs[file].admission.MayServe {
		t.Errorf("a newer fact about a known node was not taken: %v", err)
	}
	for i := range MaxRecords + 1 {
		r := aRecord(fmt.Sprint("c", i), 1, 1, me)
		if err := l.take(recordPrefix+r.UID+suffix, &doc{record: &r}); (err != nil) != (i == MaxRecords) {
			t.Errorf("record %d: %v", i, err)
		}
	}
	l.set.bytes = MaxBytes
	o := s.anOrder(me, fleet.OrderRecover)
	if err := l.take("order-x", &doc{order: &o, envelope: []byte("x")}); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("more bytes than may be: %v", err)
	}
}

func TestConfigNamesEveryProblem(t *testing.T) {
	err := Config{Tenant: "A B", Site: "../x"}.Validate()
	for _, want := range []string{"dir", "orders key", "node", "key is missing", "tenant", "site"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %q", err, want)
		}
	}
}

// A file that went bad on the disk is left out, and left alone.
func TestBadFiles(t *testing.T) {
	s, me, other := newSite(t), newMember(t), newMember(t)
	dir := filepath.Join(t.TempDir(), "p")
	p := s.open(dir, me)
	learn(t, p, 3, s.charter(), s.admission(me), s.admission(other))
	bad := filepath.Join(dir, factFile(admissionPrefix, other.id, 1))
	if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{".charter.dsse123": "half", "readme.txt": "hello"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "admission-x.dsse")); err != nil {
		t.Fatal(err)
	}
	q := s.open(dir, me)
	if len(q.Refs()) != 2 {
		t.Errorf("%d documents, want 2", len(q.Refs()))
	}
	if _, err := os.Stat(bad); err != nil {
		t.Errorf("the bad file is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".charter.dsse123")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unfinished file is still there: %v", err)
	}
	learn(t, q, 1, s.admission(other))
	if len(s.open(dir, me).Refs()) != 3 {
		t.Error("the document was not written again")
	}
}

// When the disk fails, nothing is acknowledged.
func TestWhenTheDiskFailsThenNothingIsLearned(t *testing.T) {
	s, me := newSite(t), newMember(t)
	dir := filepath.Join(t.TempDir(), "p")
	p := s.open(dir, me)
	learn(t, p, 1, s.admission(me))
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	n, err := p.Learn([][]byte{s.charter()})
	var r *Refused
	if n != 0 || err == nil || errors.As(err, &r) || p.Documents().Charter != nil {
		t.Errorf("learned %d, %v", n, err)
	}
}
