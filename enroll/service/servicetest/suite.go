package servicetest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
)

// Start is when the suite's clock starts.
var Start = time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)

func hash(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

// Filing returns the filing of a good machine with the TPM named tpm.
func Filing(tpm string) enroll.Filing {
	return enroll.Filing{
		Tenant: Tenant,
		Evidence: fleet.Evidence{
			EK:     fleet.EKHash(hash("ek " + tpm)),
			AKName: hash("ak " + tpm), LDevIDName: hash("name " + tpm), LDevIDKey: hash("key " + tpm),
			Identity: fleet.IdentityHardware, Boot: fleet.BootMeasured, Image: "recovery",
			PCRs:   map[int]fleet.HexBytes{0: hash("0"), 2: hash("2"), 7: hash("7")},
			Serial: "S-" + tpm, UUID: "uuid-" + tpm,
		},
		Findings: []fleet.Finding{{Check: "ek", OK: true}},
		Source:   "192.0.2.1",
		Clock:    fleet.TPMClock{Millis: 1000, Resets: 1},
		Begun:    Start.Add(-time.Second),
	}
}

func issued(r fleet.Request, serial string, now time.Time) enroll.Issued {
	return enroll.Issued{
		Certificates: [][]byte{[]byte("leaf " + serial), []byte("ca")}, Documents: [][]byte{[]byte("{}")}, Serial: serial,
		NotBefore: now, NotAfter: now.Add(30 * 24 * time.Hour), LDevIDKey: r.Evidence.LDevIDKey,
	}
}

// Run runs the suite; open returns a new, empty harness each time.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	for _, c := range []struct {
		name string
		run  func(*suite)
	}{
		{"when a machine files then there is one request, however often", (*suite).replay},
		{"when evidence changes then the old request cannot be approved", (*suite).changed},
		{"when nobody approved then nothing is issued", (*suite).unapproved},
		{"when approved then one certificate is made and kept", (*suite).issue},
		{"when making a certificate fails then nothing changes", (*suite).failure},
		{"when rejected then nothing is issued and new evidence is no way out", (*suite).rejected},
		{"when denied then nothing is filed and nothing issued", (*suite).denied},
		{"when a request is not there then ErrNotFound", (*suite).missing},
		{"when another TPM claims the same serial then a warning", (*suite).twins},
		{"when too many unverified machines wait then ErrFull", (*suite).full},
		{"when a request changes then who waits is told", (*suite).told},
		{"when an approval is not collected then it expires", (*suite).expires},
		{"when many call at once then one request and one certificate", (*suite).concurrent},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := open(t)
			h.SetNow(Start)
			c.run(&suite{T: t, h: h, now: Start})
		})
	}
}

type suite struct {
	*testing.T
	h   Harness
	now time.Time
}

func (s *suite) after(d time.Duration) { s.now = s.now.Add(d); s.h.SetNow(s.now) }

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *suite) file(f enroll.Filing) fleet.Request {
	s.Helper()
	r, err := s.h.File(context.Background(), f)
	s.must(err)
	return r
}

func (s *suite) count(kind fleet.AuditKind) (n int) {
	s.Helper()
	kinds, err := s.h.Audit()
	s.must(err)
	for _, k := range kinds {
		if k == kind {
			n++
		}
	}
	return n
}

func (s *suite) rows(want int) []fleet.Request {
	s.Helper()
	all, err := s.h.Requests()
	s.must(err)
	if len(all) != want {
		s.Fatalf("%d requests, want %d: %+v", len(all), want, all)
	}
	return all
}

func (s *suite) state(id fleet.RequestID, want fleet.RequestState) fleet.Request {
	s.Helper()
	r, err := s.h.Request(context.Background(), Tenant, id)
	s.must(err)
	if r.State != want {
		s.Fatalf("request is %s, want %s", r.State, want)
	}
	return r
}

// issue calls Store.Issue and counts the certificates made.
func (s *suite) get(id fleet.RequestID, made *int) (enroll.Issued, error) {
	return s.h.Issue(context.Background(), Tenant, id, func(r fleet.Request) (enroll.Issued, error) {
		if err := enroll.MayIssue(s.now, r, r.Evidence.LDevIDKey); err != nil {
			return enroll.Issued{}, err
		}
		*made++
		return issued(r, fmt.Sprintf("0%d", *made), s.now), nil
	})
}

func (s *suite) replay() {
	f := Filing("a")
	first := s.file(f)
	if first.State != fleet.RequestPending || first.Revision != 1 || first.Node != f.Evidence.EK.NodeID() {
		s.Fatalf("first: %+v", first)
	}
	s.after(time.Minute)
	second := s.file(f)
	if second.ID != first.ID || second.Revision != first.Revision || !second.LastSeen.Equal(s.now) || !second.FirstSeen.Equal(Start) {
		s.Errorf("second: %+v", second)
	}
	stored := s.state(first.ID, fleet.RequestPending)
	if stored.Revision != 1 || !stored.LastSeen.Equal(s.now) || stored.EvidenceDigest != enroll.EvidenceDigest(f.Evidence) ||
		enroll.EvidenceDigest(stored.Evidence) != stored.EvidenceDigest || stored.Clock != f.Clock || len(stored.Findings) != 1 {
		s.Errorf("stored: %+v", stored)
	}
	s.rows(1)
	if n := s.count(enroll.FactFiled); n != 1 {
		s.Errorf("%d audit records of filing", n)
	}
	// The power cycle between looking and approving does not matter.
	s.must(s.h.Approve(first.ID, 1))
	s.file(f)
	s.state(first.ID, fleet.RequestApproved)
}

func (s *suite) changed() {
	old := s.file(Filing("a"))
	f := Filing("a")
	f.Evidence.Boot = fleet.BootEnforced
	changed := s.file(f)
	if changed.ID == old.ID || changed.Supersedes != old.ID || len(changed.Warnings) == 0 {
		s.Fatalf("changed: %+v", changed)
	}
	s.rows(2)
	s.state(old.ID, fleet.RequestSuperseded)
	if err := s.h.Approve(old.ID, old.Revision); !errors.Is(err, enroll.ErrConflict) {
		s.Errorf("approval of what was seen before: %v", err)
	}
	var made int
	if _, err := s.get(old.ID, &made); err == nil || made != 0 {
		s.Errorf("issued for superseded evidence: %v", err)
	}
	s.must(s.h.Approve(changed.ID, changed.Revision))
	s.file(Filing("a"))
	s.state(old.ID, fleet.RequestPending)
	s.state(changed.ID, fleet.RequestSuperseded)
}

func (s *suite) unapproved() {
	r := s.file(Filing("a"))
	var made int
	if _, err := s.get(r.ID, &made); !errors.Is(err, enroll.ErrNotApproved) || made != 0 {
		s.Errorf("issue: %v, %d certificates", err, made)
	}
	s.state(r.ID, fleet.RequestPending)
}

func (s *suite) issue() {
	r := s.file(Filing("a"))
	s.must(s.h.Approve(r.ID, r.Revision))
	var made int
	one, err := s.get(r.ID, &made)
	s.must(err)
	s.state(r.ID, fleet.RequestIssued)
	two, err := s.get(r.ID, &made)
	s.must(err)
	if made != 1 || one.Serial != two.Serial || string(one.Certificates[0]) != string(two.Certificates[0]) || len(two.Documents) != 1 {
		s.Errorf("%d certificates made: %+v, %+v", made, one, two)
	}
	if n := s.count(enroll.FactIssued); n != 1 {
		s.Errorf("%d audit records of issuing", n)
	}
	// The machine boots again with the same evidence in the last third.
	s.after(25 * 24 * time.Hour)
	s.file(Filing("a"))
	three, err := s.get(r.ID, &made)
	s.must(err)
	if made != 2 || three.Serial == one.Serial {
		s.Errorf("in the last third: %d certificates made, serial %s", made, three.Serial)
	}
	s.state(r.ID, fleet.RequestIssued)
}

func (s *suite) failure() {
	r := s.file(Filing("a"))
	s.must(s.h.Approve(r.ID, r.Revision))
	broken := errors.New("the CA is away")
	if _, err := s.h.Issue(context.Background(), Tenant, r.ID, func(fleet.Request) (enroll.Issued, error) {
		return enroll.Issued{}, broken
	}); !errors.Is(err, broken) {
		s.Fatalf("issue: %v", err)
	}
	s.state(r.ID, fleet.RequestApproved)
	if _, err := s.h.Issue(context.Background(), Tenant, r.ID, func(r fleet.Request) (enroll.Issued, error) {
		i := issued(r, "66", s.now)
		i.LDevIDKey = hash("another key")
		return i, nil
	}); err == nil {
		s.Fatal("a certificate for another key was stored")
	}
	s.state(r.ID, fleet.RequestApproved)
	if n := s.count(enroll.FactIssued); n != 0 {
		s.Errorf("%d audit records of issuing", n)
	}
	var made int
	if _, err := s.get(r.ID, &made); err != nil || made != 1 {
		s.Errorf("afterwards: %v", err)
	}
}

func (s *suite) rejected() {
	r := s.file(Filing("a"))
	s.must(s.h.Reject(r.ID, r.Revision))
	f := Filing("a")
	f.Evidence.Serial = "other"
	if again := s.file(f); again.ID != r.ID || again.State != fleet.RequestRejected {
		s.Errorf("new evidence of a rejected machine: %+v", again)
	}
	s.rows(1)
	var made int
	if _, err := s.get(r.ID, &made); !errors.Is(err, enroll.ErrNotApproved) || made != 0 {
		s.Errorf("issue: %v", err)
	}
}

func (s *suite) denied() {
	a, b := s.file(Filing("a")), s.file(Filing("b"))
	s.must(s.h.Approve(a.ID, a.Revision))
	s.must(s.h.Deny(a.Node))
	for _, c := range []struct {
		eks  []fleet.EKHash
		want bool
	}{
		{[]fleet.EKHash{a.Evidence.EK}, true}, {[]fleet.EKHash{b.Evidence.EK}, false},
		{[]fleet.EKHash{b.Evidence.EK, a.Evidence.EK}, true}, {nil, false},
	} {
		got, err := s.h.Denied(context.Background(), Tenant, c.eks)
		s.must(err)
		if got != c.want {
			s.Errorf("denied %v: %v", c.eks, got)
		}
	}
	if _, err := s.h.File(context.Background(), Filing("a")); !errors.Is(err, enroll.ErrDenied) {
		s.Errorf("file: %v", err)
	}
	var made int
	if _, err := s.get(a.ID, &made); err == nil || made != 0 {
		s.Errorf("issued for a denied machine: %v", err)
	}
	s.file(Filing("b"))
	s.must(s.h.Allow(a.Node))
	s.file(Filing("a"))
	if _, err := s.get(a.ID, &made); err == nil {
		s.Error("the approval from before the denial came back")
	}
}

func (s *suite) missing() {
	r := s.file(Filing("a"))
	other := fleet.RequestIDOf([32]byte{1})
	for tenant, id := range map[string]fleet.RequestID{Tenant: other, "another": r.ID} {
		if _, err := s.h.Request(context.Background(), tenant, id); !errors.Is(err, service.ErrNotFound) {
			s.Errorf("request %s/%s: %v", tenant, id, err)
		}
		if _, err := s.h.Issue(context.Background(), tenant, id, func(r fleet.Request) (enroll.Issued, error) {
			return issued(r, "66", s.now), nil
		}); !errors.Is(err, service.ErrNotFound) {
			s.Errorf("issue %s/%s: %v", tenant, id, err)
		}
	}
}

func (s *suite) twins() {
	a := s.file(Filing("a"))
	f := Filing("b")
	f.Evidence.Serial, f.Evidence.UUID = "S-a", "uuid-a"
	b := s.file(f)
	if len(b.Warnings) != 2 || b.Node == a.Node {
		s.Errorf("the second: %+v", b)
	}
	if got := s.state(a.ID, fleet.RequestPending); got.Revision != a.Revision || len(got.Warnings) != 0 {
		s.Errorf("the first was touched: %+v", got)
	}
}

func (s *suite) full() {
	for i := range 5 {
		f := Filing(fmt.Sprint("x", i))
		f.Evidence.Identity, f.MaxUnverified = fleet.IdentityUnverified, 3
		if _, err := s.h.File(context.Background(), f); errors.Is(err, enroll.ErrFull) != (i >= 3) || err != nil && i < 3 {
			s.Errorf("machine %d: %v", i, err)
		}
	}
	f := Filing("a")
	f.MaxUnverified = 3
	s.file(f)
	s.rows(4)
}

func (s *suite) told() {
	r := s.file(Filing("a"))
	changed, done := s.h.Changed(r.ID)
	defer done()
	s.must(s.h.Approve(r.ID, r.Revision))
	select {
	case <-changed:
	case <-time.After(10 * time.Second):
		s.Error("nobody told")
	}
}

func (s *suite) expires() {
	r := s.file(Filing("a"))
	s.must(s.h.Approve(r.ID, r.Revision))
	s.after(enroll.ApprovedFor)
	var made int
	if _, err := s.get(r.ID, &made); !errors.Is(err, enroll.ErrNotApproved) || made != 0 {
		s.Errorf("issue: %v", err)
	}
	again := s.file(Filing("a"))
	if again.ID != r.ID || again.State != fleet.RequestPending {
		s.Errorf("back: %+v", again)
	}
	if s.count(enroll.FactExpired) != 1 || s.count(enroll.FactReopened) != 1 {
		s.Error("the audit log does not tell")
	}
	s.rows(1)
}

func (s *suite) concurrent() {
	const n = 8
	var group sync.WaitGroup
	together := func(f func(i int) error) {
		s.Helper()
		errs := make([]error, n)
		for i := range n {
			group.Go(func() { errs[i] = f(i) })
		}
		group.Wait()
		s.must(errors.Join(errs...))
	}
	together(func(int) error {
		_, err := s.h.File(context.Background(), Filing("a"))
		return err
	})
	r := s.rows(1)[0]
	if k := s.count(enroll.FactFiled); k != 1 {
		s.Errorf("%d audit records of filing", k)
	}
	s.must(s.h.Approve(r.ID, r.Revision))
	serials := make([]string, n)
	together(func(i int) error {
		out, err := s.h.Issue(context.Background(), Tenant, r.ID, func(r fleet.Request) (enroll.Issued, error) {
			return issued(r, fmt.Sprintf("%02x", i+16), s.now), nil
		})
		serials[i] = out.Serial
		return err
	})
	for _, serial := range serials {
		if serial != serials[0] {
			s.Errorf("several certificates for one request: %v", serials)
			break
		}
	}
	if k := s.count(enroll.FactIssued); k != 1 {
		s.Errorf("%d audit records of issuing", k)
	}
}
