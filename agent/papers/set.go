package papers

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Names of files. Each document has the name of what it is about, so that a
// newer one takes the place of an older one by a rename.
const (
	suffix          = ".dsse"
	charterFile     = "charter" + suffix
	admissionPrefix = "admission-"
	removalPrefix   = "removal-"
	recordPrefix    = "record-"
	orderPrefix     = "order-"
)

func factFile(prefix string, n fleet.NodeID, incarnation uint64) string {
	return fmt.Sprintf("%s%s-%d%s", prefix, n, incarnation, suffix)
}

// doc is one verified document; exactly one of the pointers is set.
type doc struct {
	ref      Ref
	envelope []byte
	// delegate is the key that signed it, zero if that was an orders key.
	delegate Ref

	charter   *fleet.Charter
	admission *fleet.Admission
	removal   *fleet.Removal
	record    *clusterbootstrap.Record
	order     *fleet.Order
}

// set is all documents at one time. It is built by learning, then finished,
// then never changed.
type set struct {
	tenant, site string
	docs         map[string]*doc // by file name
	bytes        int

	// Made by finish.
	documents clusterbootstrap.Documents
	byRef     map[Ref]*doc
	refs      []Ref
	revision  uint64
	byKey     map[Ref][]fleet.NodeID
}

func newSet(tenant, site string) *set {
	return &set{tenant: tenant, site: site, docs: map[string]*doc{}, byRef: map[Ref]*doc{}}
}

// clone returns a set that may be changed. Documents are shared.
func (s *set) clone() *set {
	n := newSet(s.tenant, s.site)
	n.docs, n.bytes = maps.Clone(s.docs), s.bytes
	n.documents = s.documents
	return n
}

// put sets the document of a file.
func (s *set) put(file string, d *doc) {
	s.drop(file)
	s.docs[file] = d
	s.bytes += len(d.envelope)
}

func (s *set) drop(file string) {
	if d := s.docs[file]; d != nil {
		s.bytes -= len(d.envelope)
		delete(s.docs, file)
	}
}

// count counts the documents that f likes.
func (s *set) count(f func(*doc) bool) (n int) {
	for _, d := range s.docs {
		if f(d) {
			n++
		}
	}
	return n
}

// charter returns the charter in force, nil without one.
func (s *set) charter() *fleet.Charter {
	if d := s.docs[charterFile]; d != nil {
		return d.charter
	}
	return nil
}

// facts computes what the planner reads.
func (s *set) facts() clusterbootstrap.Documents {
	var out clusterbootstrap.Documents
	out.Charter = s.charter()
	for _, d := range s.docs {
		switch {
		case d.admission != nil:
			out.Admissions = append(out.Admissions, *d.admission)
		case d.removal != nil:
			out.Removals = append(out.Removals, *d.removal)
		case d.record != nil:
			out.Records = append(out.Records, *d.record)
		}
	}
	slices.SortFunc(out.Admissions, func(a, b fleet.Admission) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Incarnation, b.Incarnation))
	})
	slices.SortFunc(out.Removals, func(a, b fleet.Removal) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Incarnation, b.Incarnation))
	})
	slices.SortFunc(out.Records, func(a, b clusterbootstrap.Record) int { return cmp.Compare(a.UID, b.UID) })
	return out
}

// index makes what standing reads.
func (s *set) index() {
	s.documents = s.facts()
	s.byKey = map[Ref][]fleet.NodeID{}
	note := func(key []byte, n fleet.NodeID) {
		if r := Ref(key); !slices.Contains(s.byKey[r], n) {
			s.byKey[r] = append(s.byKey[r], n)
		}
	}
	for _, a := range s.documents.Admissions {
		note(a.LDevIDKey, a.Node)
	}
	for _, r := range s.documents.Removals {
		note(r.LDevIDKey, r.Node)
	}
}

// finish computes everything that readers want.
func (s *set) finish() {
	s.index()
	s.byRef = make(map[Ref]*doc, len(s.docs))
	s.refs = make([]Ref, 0, len(s.docs))
	s.revision = 0
	for _, d := range s.docs {
		if s.byRef[d.ref] == nil {
			s.refs = append(s.refs, d.ref)
			// Refs are digests: their sum knows no order.
			s.revision += binary.BigEndian.Uint64(d.ref[:8])
		}
		s.byRef[d.ref] = d
	}
	slices.SortFunc(s.refs, func(a, b Ref) int { return slices.Compare(a[:], b[:]) })
}

// standing says what the owner of a key is. A key that an older incarnation of
// a node had is a removed one: the node has another now.
func (s *set) standing(key Ref) (fleet.Admission, Standing) {
	out := Unknown
	for _, n := range s.byKey[key] {
		if a, ok := s.documents.Admitted(n); ok && Ref(a.LDevIDKey) == key {
			return a, Admitted
		}
		out = Removed
	}
	return fleet.Admission{}, out
}
