package clusterbootstrap

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"

	"github.com/muster-edge/muster/fleet"
)

// Record is the cluster record: what the members say about their cluster. It
// is in etcd (inside the Ledger), on every member's disk, and in each hello.
type Record struct {
	// UID is drawn by the founder and never changes.
	UID string `json:"uid"`
	// Epoch grows with each reset or restore. Data of a lower epoch of the
	// same UID is void.
	Epoch uint64 `json:"epoch"`
	// Version grows with each change of the other fields inside an epoch.
	Version uint64       `json:"version"`
	Founder fleet.NodeID `json:"founder"`
	// Servers are the confirmed servers, sorted. A server that is not listed
	// in a newer record has been replaced.
	Servers []fleet.NodeID `json:"servers"`
	// Into is the UID of the cluster this one was dissolved into.
	Into string `json:"into,omitempty"`
}

// Newer reports whether r replaces o, a record of the same cluster.
func (r Record) Newer(o Record) bool {
	return cmp.Or(cmp.Compare(r.Epoch, o.Epoch), cmp.Compare(r.Version, o.Version)) > 0
}

// Has reports whether id is a confirmed server.
func (r Record) Has(id fleet.NodeID) bool { return slices.Contains(r.Servers, id) }

// maxRecords bounds what a node remembers of clusters of its site.
const maxRecords = 16

// Documents is what a node holds of its site, verified and merged. Values are
// never changed in place, so that they may be shared.
type Documents struct {
	Charter    *fleet.Charter
	Admissions []fleet.Admission // sorted by node and incarnation
	Removals   []fleet.Removal   // sorted by node and incarnation
	Records    []Record          // newest of each UID, sorted by UID
}

// Merge returns the union of d and o: newest charter, all admissions and
// removals, newest record of each cluster. It is commutative, associative and
// idempotent, so that peers may pass documents on in any order.
func (d Documents) Merge(o Documents) Documents {
	m := Documents{
		Admissions: union(d.Admissions, o.Admissions, func(a fleet.Admission) fact { return fact{a.Node, a.Incarnation, a.Version} }),
		Removals:   union(d.Removals, o.Removals, func(r fleet.Removal) fact { return fact{r.Node, r.Incarnation, r.Version} }),
		Records:    mergeRecords(d.Records, o.Records),
	}
	m.Charter = newerCharter(d.Charter, o.Charter)
	return m
}

type fact struct {
	node        fleet.NodeID
	incarnation uint64
	version     fleet.DocVersion
}

func (f fact) compare(g fact) int {
	return cmp.Or(cmp.Compare(f.node, g.node), cmp.Compare(f.incarnation, g.incarnation))
}

// union merges two sets; of two documents about the same incarnation the one
// with the higher version stays, then the one with the greater bytes.
func union[T any](a, b []T, key func(T) fact) []T {
	all := slices.Concat(a, b)
	slices.SortStableFunc(all, func(x, y T) int {
		kx, ky := key(x), key(y)
		if c := cmp.Or(kx.compare(ky), ky.version.Compare(kx.version)); c != 0 {
			return c
		}
		return -compareJSON(x, y)
	})
	return slices.CompactFunc(all, func(x, y T) bool { return key(x).compare(key(y)) == 0 })
}

func mergeRecords(a, b []Record) []Record {
	all := slices.Concat(a, b)
	slices.SortStableFunc(all, func(x, y Record) int {
		if x.UID != y.UID {
			return cmp.Compare(x.UID, y.UID)
		}
		switch {
		case x.Newer(y):
			return -1
		case y.Newer(x):
			return 1
		}
		return -compareJSON(x, y)
	})
	all = slices.CompactFunc(all, func(x, y Record) bool { return x.UID == y.UID })
	if len(all) > maxRecords {
		all = all[:maxRecords]
	}
	return all
}

func newerCharter(a, b *fleet.Charter) *fleet.Charter {
	if a == nil || a == b {
		return b
	}
	if b == nil {
		return a
	}
	if c := cmp.Or(a.Version.Compare(b.Version), compareJSON(a, b)); c < 0 {
		return b
	}
	return a
}

// compareJSON orders two documents of one version. The centre never signs two
// such; if somebody did, all peers must still pick the same one.
func compareJSON(a, b any) int {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	if errX != nil || errY != nil {
		return 0
	}
	return bytes.Compare(x, y)
}

// Admitted returns the newest admission of id that no removal ended. A removal
// ends its own incarnation and all before it, whatever arrived first.
func (d Documents) Admitted(id fleet.NodeID) (fleet.Admission, bool) {
	var ended uint64
	for i := range d.Removals {
		if r := &d.Removals[i]; r.Node == id && r.Incarnation > ended {
			ended = r.Incarnation
		}
	}
	for i := len(d.Admissions) - 1; i >= 0; i-- {
		if a := &d.Admissions[i]; a.Node == id {
			return *a, a.Incarnation > ended
		}
	}
	return fleet.Admission{}, false
}

// WithRecord returns d with r merged in; d itself if r is nothing new.
func (d Documents) WithRecord(r Record) Documents {
	if old, ok := d.Newest(r.UID); ok && !r.Newer(old) {
		return d
	}
	d.Records = mergeRecords(d.Records, []Record{r})
	return d
}

// Newest returns the newest record of the cluster uid.
func (d Documents) Newest(uid string) (Record, bool) {
	for i := range d.Records {
		if d.Records[i].UID == uid {
			return d.Records[i], true
		}
	}
	return Record{}, false
}

// removed reports whether id was admitted once and is no longer.
func (d Documents) removed(id fleet.NodeID) bool {
	if _, ok := d.Admitted(id); ok {
		return false
	}
	return slices.ContainsFunc(d.Removals, func(r fleet.Removal) bool { return r.Node == id })
}
