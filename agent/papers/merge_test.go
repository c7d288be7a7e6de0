package papers

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// memory are papers that are never flushed: for tests of many orders.
func memory(s *site, m *member) *Papers {
	id, err := statement.KeyID(s.orders.Public())
	if err != nil {
		s.t.Fatal(err)
	}
	return &Papers{cfg: Config{Node: m.id, Key: m.ref, Tenant: s.tenant, Site: s.name}, keys: map[string]crypto.PublicKey{id: s.orders.Public()}}
}

// deck is every kind of document about few things, in several versions.
func deck(t testing.TB, s *site, me *member, delegate *ecdsa.PrivateKey) [][]byte {
	a, b := newMember(t), newMember(t)
	var out [][]byte
	for _, m := range []*member{me, a, b} {
		out = append(out, s.admission(m))
	}
	again := s.anAdmission(a)
	again.Labels = map[string]string{"gpu": "true"}
	second := s.anAdmission(b)
	second.Incarnation = 2
	out = append(out, s.sign(fleet.AdmissionPayload, again), s.sign(fleet.AdmissionPayload, second), s.removal(b), s.charter(), s.charter())
	// Two of one version: nobody signs such, and all must pick the same.
	x := s.aCharter()
	y := x
	y.Policy.PromoteAfter++
	out = append(out, s.sign(fleet.CharterPayload, x), s.sign(fleet.CharterPayload, y))
	for _, r := range []clusterbootstrap.Record{aRecord("c1", 1, 1, me), aRecord("c1", 1, 2, me, a), aRecord("c1", 2, 1, a), aRecord("c2", 1, 1, a)} {
		slices.Sort(r.Servers)
		out = append(out, s.record(me, r))
	}
	o := s.anOrder(me, fleet.OrderRecover)
	p := o
	p.Version = s.next()
	return append(out, s.sign(fleet.OrderPayload, o), s.sign(fleet.OrderPayload, p))
}

// Whatever the order and however often: the same papers, and those that the
// planner's own rule of merging comes to.
func TestMergeIsAUnionInAnyOrder(t *testing.T) {
	s, me := newSite(t), newMember(t)
	cards := deck(t, s, me, nil)
	all := memory(s, me)
	l := all.learning(newSet(s.tenant, s.name), false)
	l.all(cards)
	if len(l.refused) > 0 {
		t.Fatal(l.refused)
	}
	l.set.finish()
	rapid.Check(t, func(t *rapid.T) {
		p := memory(s, me)
		p.set = newSet(s.tenant, s.name)
		p.set.finish()
		// Admissions first, since a record's signer must be known: what comes
		// too early is offered again.
		for round := range 2 {
			shuffled := rapid.Permutation(cards).Draw(t, "order")
			for len(shuffled) > 0 {
				n := rapid.IntRange(1, len(shuffled)).Draw(t, "batch")
				l := p.learning(p.set.clone(), false)
				l.all(shuffled[:n])
				l.set.finish()
				p.set, shuffled = l.set, shuffled[n:]
			}
			_ = round
		}
		if p.set.revision != l.set.revision || !reflect.DeepEqual(p.set.documents, l.set.documents) {
			t.Fatalf("%+v\nis not %+v", p.set.documents, l.set.documents)
		}
	})
	var merged clusterbootstrap.Documents
	for _, c := range cards {
		merged = merged.Merge(single(t, c))
	}
	if !reflect.DeepEqual(plain(t, merged), plain(t, l.set.documents)) {
		t.Errorf("Merge comes to %+v\nthe papers to %+v", merged, l.set.documents)
	}
}

// single is what one envelope says.
func single(t *testing.T, envelope []byte) (d clusterbootstrap.Documents) {
	e, err := statement.Parse(envelope)
	if err != nil {
		t.Fatal(err)
	}
	read := func(v any) {
		if err := json.Unmarshal(e.Payload, v); err != nil {
			t.Fatal(err)
		}
	}
	switch e.PayloadType {
	case fleet.CharterPayload:
		d.Charter = new(fleet.Charter)
		read(d.Charter)
	case fleet.AdmissionPayload:
		d.Admissions = make([]fleet.Admission, 1)
		read(&d.Admissions[0])
	case fleet.RemovalPayload:
		d.Removals = make([]fleet.Removal, 1)
		read(&d.Removals[0])
	case fleet.ClusterRecordPayload:
		var r fleet.ClusterRecord
		read(&r)
		d.Records = []clusterbootstrap.Record{toRecord(r)}
	}
	return d
}

func plain(t *testing.T, d clusterbootstrap.Documents) string {
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Nothing that the orders key did not sign is ever taken.
func FuzzLearn(f *testing.F) {
	s, me := newSite(f), newMember(f)
	good := map[Ref]bool{}
	for _, b := range deck(f, s, me, nil) {
		e, err := statement.Parse(b)
		if err != nil {
			f.Fatal(err)
		}
		good[refOf(e)] = true
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := memory(s, me)
		base := p.learning(newSet(s.tenant, s.name), false)
		base.all([][]byte{b})
		base.set.finish()
		for ref := range base.set.byRef {
			if !good[ref] {
				t.Errorf("%s was taken: %s", ref, b)
			}
		}
		// The same bytes from the disk.
		l := p.learning(newSet(s.tenant, s.name), true)
		l.all([][]byte{b})
		if len(l.set.docs) > 1 {
			t.Errorf("%d documents of one envelope", len(l.set.docs))
		}
	})
}

func refOf(e statement.Envelope) Ref { return sha256.Sum256(e.Payload) }

// Any bytes in the directory: Open neither fails nor believes them.
func FuzzOpen(f *testing.F) {
	s, me := newSite(f), newMember(f)
	for _, b := range deck(f, s, me, nil) {
		f.Add("charter.dsse", b)
	}
	f.Add("admission-x-1.dsse", []byte("{"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		if filepath.Base(name) != name || name == "." || name == ".." || len(name) > 200 || name == "" {
			return
		}
		sub, err := os.MkdirTemp(dir, "x")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(sub)
		if os.WriteFile(filepath.Join(sub, name), b, 0o600) != nil {
			return // no name of a file
		}
		if _, err := Open(Config{Dir: sub, OrdersKeys: []crypto.PublicKey{s.orders.Public()}, Node: me.id, Key: me.ref}); err != nil {
			t.Error(err)
		}
	})
}
