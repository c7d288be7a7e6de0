package enroll

import (
	"crypto/sha256"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/fleet"
)

var update = flag.Bool("update", false, "rewrite golden files")

var start = time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)

func hashOf(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

// evidence is good evidence of the TPM named name.
func evidence(name string) fleet.Evidence {
	return fleet.Evidence{
		EK:     fleet.EKHash(hashOf("ek " + name)),
		AKName: hashOf("ak " + name), LDevIDName: hashOf("ldevid name " + name), LDevIDKey: hashOf("ldevid " + name),
		Identity: fleet.IdentityHardware, Boot: fleet.BootMeasured, Image: "recovery",
		PCRs:      map[int]fleet.HexBytes{0: hashOf("pcr0"), 2: hashOf("pcr2"), 7: hashOf("pcr7")},
		TPMVendor: "IFX", TPMFirmware: "7.85", Board: "ACME B1", Serial: "S-" + name, UUID: "uuid-" + name,
	}
}

func filing(e fleet.Evidence, clock uint64, begun time.Time) Filing {
	return Filing{Tenant: "default", Evidence: e, Source: "192.0.2.1", Clock: fleet.TPMClock{Millis: clock, Resets: 7}, Begun: begun}
}

// store applies decisions as the centre does.
type store struct {
	requests map[fleet.RequestID]fleet.Request
	denied   map[fleet.NodeID]bool
	facts    []Fact
}

func newStore() *store {
	return &store{requests: map[fleet.RequestID]fleet.Request{}, denied: map[fleet.NodeID]bool{}}
}

func (s *store) of(n fleet.NodeID) (out []fleet.Request) {
	for _, r := range s.requests {
		if r.Node == n {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b fleet.Request) int { return cmpString(string(a.ID), string(b.ID)) })
	return out
}

func cmpString(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (s *store) file(now time.Time, f Filing) (Decision, error) {
	node := f.Evidence.EK.NodeID()
	known := Known{Requests: s.of(node), Denied: s.denied[node]}
	for _, r := range s.requests {
		if r.Node != node && r.State.Live() && (r.Evidence.Serial == f.Evidence.Serial || r.Evidence.UUID == f.Evidence.UUID) {
			known.Others = append(known.Others, r)
		}
		if waitsUnverified(r) {
			known.UnverifiedWaiting++
		}
	}
	d, err := File(now, known, f)
	if err != nil {
		return d, err
	}
	for _, r := range append(slices.Clone(d.Others), d.Request) {
		s.requests[r.ID] = r
	}
	s.facts = append(s.facts, d.Facts...)
	return d, nil
}

func (s *store) live(n fleet.NodeID) (out []fleet.Request) {
	for _, r := range s.of(n) {
		if r.State.Live() {
			out = append(out, r)
		}
	}
	return out
}

// golden compares got with testdata/name; -update rewrites it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s differs (-want +got); go test -update rewrites it:\n%s", path, d)
	}
}
