package central

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// copied makes a second TPM from the state of a stopped one, as somebody does
// who copies a virtual machine.
func copied(t *testing.T, chip *swtpmtest.TPM) *swtpmtest.TPM {
	t.Helper()
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.CopyFS(filepath.Join(dir, "state"), os.DirFS(filepath.Join(chip.Dir, "state"))); err != nil {
		t.Fatal(err)
	}
	// A lock of the first is no part of the state.
	_ = os.Remove(filepath.Join(dir, "state", ".lock"))
	twin, err := swtpmtest.New(dir, swtpmtest.Options{CADir: chip.CA.Dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = twin.Close() })
	return twin
}

// TestCopiedTPM: one TPM in two places is put into quarantine as soon as one
// copy's clock stands behind the other's, with both addresses; a person
// releases it or turns it down.
func TestCopiedTPM(t *testing.T) {
	r, clock := timed(t, t.TempDir())
	a := newBox(t, r, nil)
	a.from = "127.0.0.2"
	id := a.admit(t)
	later := func() { clock.set(clock.now().Add(time.Minute)) }

	// The honest twin of all that follows: power cycles and further quotes of
	// one machine raise no doubt.
	cycle := func(b *box) {
		t.Helper()
		_ = b.device.Close()
		if err := b.chip.Restart(); err != nil {
			t.Fatal(err)
		}
		b.open(t)
	}
	for range 2 {
		later()
		cycle(a)
		if _, err := a.enroll(t); err != nil {
			t.Fatalf("after a power cycle: %v", err)
		}
	}

	_ = a.device.Close()
	if err := a.chip.Close(); err != nil {
		t.Fatal(err)
	}
	twin := copied(t, a.chip)
	if err := a.chip.Start(); err != nil {
		t.Fatal(err)
	}
	a.open(t)
	cycle(a)
	later()
	if _, err := a.enroll(t); err != nil {
		t.Fatal(err)
	}
	b := newBox(t, r, twin)
	b.from = "127.0.0.3"
	later()
	if _, err := b.enroll(t); err == nil || !strings.HasPrefix(err.Error(), "quarantined") {
		t.Fatalf("the copy: %v", err)
	}
	q := a.live(t)
	if b.live(t).ID != q.ID || q.State != fleet.RequestQuarantined {
		t.Fatalf("the live request is %s", q.State)
	}
	if w := strings.Join(q.Warnings, "\n"); !strings.Contains(w, "clock went backwards") || !strings.Contains(w, "127.0.0.2 before") || !strings.Contains(w, "127.0.0.3 now") {
		t.Errorf("warnings: %q", q.Warnings)
	}
	// Neither gets anything new; approving is refused; calling to and fro
	// neither leaves the quarantine nor makes rows.
	clock.set(clock.now().Add(21 * day))
	for _, m := range []*box{a, b, a, b} {
		later()
		if _, err := m.enroll(t); err == nil {
			t.Error("a machine in quarantine got a certificate")
		}
		if _, err := m.client.Renew(t.Context(), id); !errors.Is(err, client.ErrEnroll) {
			t.Errorf("a machine in quarantine renews: %v", err)
		}
	}
	if all, err := r.Requests(); err != nil || len(all) != 1 || len(all[0].Warnings) > 8 {
		t.Errorf("%d requests, %v: %+v", len(all), err, all)
	}
	api := r.manage()
	q = a.live(t)
	if _, err := api.Approve(t.Context(), &musterv1.ApproveRequest{Id: string(q.ID), Revision: q.Revision}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("approving in quarantine: %v", err)
	}
	if _, err := api.Release(t.Context(), &musterv1.ReleaseRequest{Id: string(q.ID)}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("releasing without a reason: %v", err)
	}
	if _, err := api.Release(t.Context(), &musterv1.ReleaseRequest{Id: string(q.ID), Revision: q.Revision + 7, Reason: "x"}); connect.CodeOf(err) != connect.CodeAborted {
		t.Errorf("releasing another revision: %v", err)
	}

	// The copy was found and destroyed: the machine is released, approved,
	// served. It is not in quarantine again by itself.
	out, err := api.Release(t.Context(), &musterv1.ReleaseRequest{Id: string(q.ID), Revision: q.Revision, Reason: "copy deleted"})
	if err != nil || out.Request.State != musterv1.RequestState_REQUEST_STATE_PENDING {
		t.Fatalf("release: %v, %v", out, err)
	}
	later()
	if _, err := a.enroll(t); err == nil || !strings.HasPrefix(err.Error(), "pending") {
		t.Errorf("a released machine nobody approved: %v", err)
	}
	a.approve(t)
	if _, err := a.enroll(t); err != nil {
		t.Errorf("a released and approved machine: %v", err)
	}
	if _, err := api.Release(t.Context(), &musterv1.ReleaseRequest{Id: string(q.ID), Reason: "again"}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("releasing what is not held: %v", err)
	}

	// The copy is back: quarantine again; this time it is turned down.
	later()
	if _, err := b.enroll(t); err == nil || !strings.HasPrefix(err.Error(), "quarantined") {
		t.Errorf("the copy once more: %v", err)
	}
	q = a.live(t)
	if _, err := api.Reject(t.Context(), &musterv1.RejectRequest{Id: string(q.ID), Revision: q.Revision, Reason: "copied"}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.enroll(t); err == nil || !strings.HasPrefix(err.Error(), "rejected") {
		t.Errorf("a rejected machine: %v", err)
	}
	// What is denied is not released behind the deny list's back.
	if err := r.Deny(id.Node); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Release(t.Context(), &musterv1.ReleaseRequest{Id: string(q.ID), Reason: "x"}); connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "muster allow") {
		t.Errorf("releasing a denied machine: %v", err)
	}
	r.sound(t)
	err = r.store.View(t.Context(), func(tx store.Reader) error {
		events, err := tx.Events(DefaultTenant, 0, 1000)
		for _, e := range events {
			if e.Kind == "request.quarantined" && e.Level == fleet.EventAlarm {
				return nil
			}
		}
		return errors.Join(err, errors.New("no alarm for those who watch"))
	})
	if err != nil {
		t.Error(err)
	}
}
