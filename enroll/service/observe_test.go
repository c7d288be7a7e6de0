package service_test

import (
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// observed keeps what an observer was told.
type observed struct {
	mu  sync.Mutex
	all []service.Observation
}

func (o *observed) add(x service.Observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all = append(o.all, x)
}

func (o *observed) count(call, outcome, check string) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range o.all {
		if x.Call == call && x.Outcome == outcome && x.Check == check {
			n++
		}
	}
	return n
}

// Every way a call ends is told, with words from the lists alone.
func TestObserver(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	var seen observed
	c := newCentre(t, options{roots: m.tpm.CA, config: func(cfg *service.Config) { cfg.Observe = seen.add }})
	w := c.dial(t)
	want := func(call, outcome, check string, n int) {
		t.Helper()
		if got := seen.count(call, outcome, check); got != n {
			t.Errorf("%s/%s/%s was told %d times, want %d", call, outcome, check, got, n)
		}
	}
	_, err := w.rpc.Begin(t.Context(), &musterv1.BeginRequest{Protocol: 9})
	refused(t, err, connect.CodeFailedPrecondition, "protocol")
	want(service.CallBegin, "protocol", "", 1)

	_, err = w.rpc.Complete(t.Context(), &musterv1.CompleteRequest{Cookie: []byte("x")})
	refused(t, err, connect.CodeFailedPrecondition, "begin-again")
	want(service.CallComplete, "begin-again", "", 1)

	a := w.begin(t, m)
	want(service.CallBegin, "ok", "", 1)
	a.edit = func(m *musterv1.CompleteRequest) { m.Proof = make([]byte, 32) }
	_, err = w.complete(t, a)
	refused(t, err, connect.CodePermissionDenied, "not-proven")
	want(service.CallComplete, "not-proven", "proof", 1)

	a = w.begin(t, m)
	a.edit = func(m *musterv1.CompleteRequest) { m.Pcrs[0].Sha256 = make([]byte, 32); m.Pcrs[0].Sha256[0] = 9 }
	_, err = w.complete(t, a)
	refused(t, err, connect.CodePermissionDenied, "not-proven")
	want(service.CallComplete, "not-proven", "quote-pcrs", 1)

	a = w.begin(t, m)
	out, err := w.complete(t, a)
	must(t, err)
	want(service.CallComplete, "ok", "", 1)
	_, err = w.rpc.Collect(t.Context(), &musterv1.CollectRequest{Ticket: []byte("x")})
	refused(t, err, connect.CodeNotFound, "not-found")
	want(service.CallCollect, "not-found", "", 1)
	want(service.CallIssue, "ok", "", 0)
	r := c.only()
	must(t, c.store.Approve(r.ID, r.Revision))
	for range 2 { // the second gets what is there
		_, err = w.rpc.Collect(t.Context(), &musterv1.CollectRequest{Ticket: out.Ticket})
		must(t, err)
	}
	want(service.CallCollect, "ok", "", 2)
	want(service.CallIssue, "ok", "", 1)

	// What the handler refuses itself is told as well.
	_, err = w.rpc.Collect(t.Context(), &musterv1.CollectRequest{Ticket: make([]byte, 8<<10)})
	refused(t, err, connect.CodeResourceExhausted, "too-large")
	want(service.CallCollect, "too-large", "", 1)

	// The verifier's checks that refuse are exactly those before identity and
	// boot; a new one must get a name in the list.
	for _, f := range r.Findings[:slices.IndexFunc(r.Findings, func(f fleet.Finding) bool { return f.Check == "csr-key" })+1] {
		if !slices.Contains(service.Checks(), f.Check) {
			t.Errorf("the check %q has no name among those of an Observation", f.Check)
		}
	}
	for _, x := range seen.all {
		if !slices.Contains(service.Outcomes(), x.Outcome) || x.Check != "" && !slices.Contains(service.Checks(), x.Check) {
			t.Errorf("told words from nowhere: %+v", x)
		}
	}
}
