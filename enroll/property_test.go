package enroll

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

// model plays random acts of machines, people and time and remembers, apart
// from the code under test, who approved what.
type model struct {
	s        *store
	now      time.Time
	approved map[fleet.RequestID]time.Time // approved and nothing said against it since
	issued   map[fleet.RequestID]bool
	clock    uint64
	last     *Filing
}

func (m *model) filing(t *rapid.T) Filing {
	e := evidence(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "tpm"))
	e.Serial = rapid.SampledFrom([]string{"s1", "s2"}).Draw(t, "serial")
	e.Boot = rapid.SampledFrom([]fleet.BootTrust{fleet.BootUnknown, fleet.BootMeasured, fleet.BootEnforced}).Draw(t, "boot")
	e.Identity = rapid.SampledFrom([]fleet.IdentityTrust{fleet.IdentityUnverified, fleet.IdentityListed, fleet.IdentityHardware}).Draw(t, "identity")
	m.clock++
	f := filing(e, m.clock, m.now.Add(-time.Second))
	if rapid.IntRange(0, 9).Draw(t, "backwards") == 0 {
		f.Clock.Millis = 1
	}
	f.MaxUnverified = 2
	return f
}

func (m *model) pick(t *rapid.T) (fleet.Request, bool) {
	var all []fleet.Request
	for _, tpm := range []string{"a", "b", "c"} {
		all = append(all, m.s.of(evidence(tpm).EK.NodeID())...)
	}
	if len(all) == 0 {
		return fleet.Request{}, false
	}
	return all[rapid.IntRange(0, len(all)-1).Draw(t, "request")], true
}

func (m *model) put(t *rapid.T, r fleet.Request, f Fact, err error) bool {
	if err != nil {
		return false
	}
	if before := m.s.requests[r.ID]; r.Revision <= before.Revision && r.State != before.State {
		t.Fatalf("state of %s changed %s -> %s and the revision did not", r.ID, before.State, r.State)
	}
	m.s.requests[r.ID] = r
	m.s.facts = append(m.s.facts, f)
	return true
}

func TestLifeOfRequests(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{s: newStore(), now: start, approved: map[fleet.RequestID]time.Time{}, issued: map[fleet.RequestID]bool{}, clock: 1000}
		ruling := func(r fleet.Request) Ruling { return Ruling{Revision: r.Revision, Actor: "user:eve"} }
		t.Repeat(map[string]func(*rapid.T){
			"file": func(t *rapid.T) {
				f := m.filing(t)
				node := f.Evidence.EK.NodeID()
				d, err := m.s.file(m.now, f)
				switch {
				case errors.Is(err, ErrDenied):
					if !m.s.denied[node] {
						t.Fatal("denied without being on the list")
					}
					return
				case errors.Is(err, ErrFull):
					return
				case err != nil:
					t.Fatal(err)
				case m.s.denied[node]:
					t.Fatal("a denied machine filed")
				}
				for _, fact := range d.Facts {
					if fact.Before != fact.After {
						delete(m.approved, fact.Request)
					}
				}
				m.last = &f
			},
			"replay": func(t *rapid.T) {
				if m.last == nil {
					return
				}
				facts := len(m.s.facts)
				d, err := m.s.file(m.now, *m.last)
				if err != nil {
					return
				}
				again, err := m.s.file(m.now, *m.last)
				if err != nil || again.Action != Keep || len(again.Facts) != 0 || len(again.Others) != 0 || !reflect.DeepEqual(again.Request, d.Request) {
					t.Fatalf("replay: %v %v (%s): %+v is now %+v", err, again.Action, again.Reason, d.Request, again.Request)
				}
				for _, fact := range m.s.facts[facts:] {
					if fact.Before != fact.After {
						delete(m.approved, fact.Request)
					}
				}
			},
			"approve": func(t *rapid.T) {
				if r, ok := m.pick(t); ok {
					p := Policy{Lab: rapid.Bool().Draw(t, "lab"), UnknownBoot: true}
					out, f, err := Approve(m.now, r, Approval{Ruling: ruling(r), Policy: p})
					if m.put(t, out, f, err) {
						if r.Identity == fleet.IdentityUnverified || r.Boot == fleet.BootUnknown && !p.Lab {
							t.Fatalf("approved %s/%s", r.Identity, r.Boot)
						}
						m.approved[r.ID] = m.now
					}
				}
			},
			"approve what was seen before": func(t *rapid.T) {
				if r, ok := m.pick(t); ok {
					old := ruling(r)
					old.Revision -= int64(rapid.IntRange(1, 3).Draw(t, "behind"))
					if _, _, err := Approve(m.now, r, Approval{Ruling: old}); !errors.Is(err, ErrConflict) {
						t.Fatalf("approval of revision %d at %d: %v", old.Revision, r.Revision, err)
					}
				}
			},
			"reject": func(t *rapid.T) {
				if r, ok := m.pick(t); ok {
					out, f, err := Reject(m.now, r, ruling(r))
					if m.put(t, out, f, err) {
						delete(m.approved, r.ID)
					}
				}
			},
			"release": func(t *rapid.T) {
				if r, ok := m.pick(t); ok {
					out, f, err := Release(m.now, r, ruling(r))
					if m.put(t, out, f, err) {
						delete(m.approved, r.ID)
					}
				}
			},
			"deny": func(t *rapid.T) {
				n := evidence(rapid.SampledFrom([]string{"a", "b"}).Draw(t, "tpm")).EK.NodeID()
				if m.s.denied[n] {
					delete(m.s.denied, n)
					return
				}
				m.s.denied[n] = true
				if r, f, ok := Deny(m.now, m.s.of(n), Ruling{Actor: "user:eve"}); ok {
					m.put(t, r, f, nil)
					delete(m.approved, r.ID)
				}
			},
			"issue": func(t *rapid.T) {
				r, ok := m.pick(t)
				if !ok {
					return
				}
				key := r.Evidence.LDevIDKey
				foreign := rapid.IntRange(0, 3).Draw(t, "foreign key") == 0
				if foreign {
					key = hashOf("foreign")
				}
				out, f, err := Issue(m.now, r, Issued{Serial: "1", LDevIDKey: key})
				if !m.put(t, out, f, err) {
					return
				}
				at, approved := m.approved[r.ID]
				switch {
				case foreign:
					t.Fatal("issued for a key that is not in the evidence")
				case !approved:
					t.Fatalf("issued without approval: %+v", r)
				case !m.issued[r.ID] && m.now.Sub(at) >= ApprovedFor:
					t.Fatal("issued on an approval that had run out")
				}
				m.issued[r.ID] = true
			},
			"time": func(*rapid.T) {
				m.now = m.now.Add(time.Duration(rapid.SampledFrom([]int{1, 60, 3600, 90000, 20 * 86400}).Draw(t, "seconds")) * time.Second)
			},
			"": func(t *rapid.T) {
				waiting := 0
				for _, tpm := range []string{"a", "b", "c"} {
					live := m.s.live(evidence(tpm).EK.NodeID())
					if len(live) > 1 {
						t.Fatalf("%d live requests of one node: %v", len(live), live)
					}
					for _, r := range live {
						if waitsUnverified(r) {
							waiting++
						}
						if r.State == fleet.RequestIssued || r.State == fleet.RequestApproved {
							if _, ok := m.approved[r.ID]; !ok {
								t.Fatalf("%s is %s and nobody approved it", r.ID, r.State)
							}
						}
						if fleet.RequestIDOf(r.EvidenceDigest) != r.ID || EvidenceDigest(r.Evidence) != r.EvidenceDigest {
							t.Fatalf("%s does not name its evidence", r.ID)
						}
					}
				}
				for id := range m.issued {
					if m.s.requests[id].State != fleet.RequestIssued {
						delete(m.issued, id)
					}
				}
			},
		})
	})
}

func TestWhenAMachineChangesForEverThenRowsAndFactsAreBounded(t *testing.T) {
	for _, kinds := range []int{2, 100000} {
		t.Run(fmt.Sprintf("%d kinds of evidence", kinds), func(t *testing.T) {
			s := newStore()
			for i := range 2000 {
				e := evidence("a")
				e.Serial = fmt.Sprint(i % kinds)
				if _, err := s.file(start.Add(time.Duration(i)*time.Second), filing(e, uint64(i+1), start)); err != nil {
					t.Fatal(err)
				}
			}
			if len(s.requests) > MaxChanges+1 || len(s.facts) > 10*MaxChanges {
				t.Errorf("%d requests and %d facts of one machine", len(s.requests), len(s.facts))
			}
			live := s.live(evidence("a").EK.NodeID())
			if len(live) != 1 || live[0].State != fleet.RequestQuarantined {
				t.Errorf("live: %+v", live)
			}
		})
	}
}
