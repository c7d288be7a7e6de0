package central

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// TestClearedTPM: after TPM2_Clear the same machine is a new request that says
// what changed, and once that has its certificate the old one ends.
func TestClearedTPM(t *testing.T) {
	r, clock := timed(t, t.TempDir())
	b := newBox(t, r, nil)
	old := b.admit(t)
	if err := b.report(old); err != nil {
		t.Fatal(err)
	}
	before := b.live(t)

	_ = b.device.Close()
	if err := b.chip.Restart(); err != nil {
		t.Fatal(err)
	}
	raw, err := linuxudstpm.Open(b.chip.Path())
	if err != nil {
		t.Fatal(err)
	}
	clearTPM(t, raw)
	_ = raw.Close()
	clock.set(clock.now().Add(time.Hour))
	b.open(t)
	if _, err := b.enroll(t); err == nil || !strings.HasPrefix(err.Error(), "pending") {
		t.Fatalf("a cleared machine: %v", err)
	}
	q := b.live(t)
	if q.Node != before.Node || q.ID == before.ID || q.Supersedes != before.ID || q.Evidence.LDevIDKey.String() == before.Evidence.LDevIDKey.String() {
		t.Errorf("the new request: %+v", q)
	}
	out, err := r.manage().GetRequest(t.Context(), &musterv1.GetRequestRequest{Id: string(q.ID)})
	if err != nil || !strings.Contains(strings.Join(out.Diff, "\n"), "TPM was cleared") {
		t.Errorf("the difference: %q, %v", out.GetDiff(), err)
	}
	// The approval does not carry over, and the new key is not in force yet.
	if n := r.node(t, q.Node); string(n.LDevIDKey) != string(before.Evidence.LDevIDKey) {
		t.Error("the node's key changed without a person")
	}
	b.approve(t)
	fresh, err := b.enroll(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.report(fresh); err != nil {
		t.Errorf("the new certificate: %v", err)
	}
	// The old certificate cannot even be used with the new key; with the old
	// key, had anybody kept it, the centre refuses it by the node's row.
	if err := b.report(old); err == nil {
		t.Error("the old certificate still opens the door")
	}
	if n := r.node(t, q.Node); string(n.LDevIDKey) != string(q.Evidence.LDevIDKey) || n.Request != q.ID {
		t.Errorf("node: %+v", n)
	}
	r.sound(t)
}

// TestNewLDevIDEndsTheOldOne: the old key still signs, and gets nothing once
// the request with the new key is issued; before that it goes on.
func TestNewLDevIDEndsTheOldOne(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	m := newMachine(t, "a")
	_, old, _ := r.enroll(t, m)
	again := newMachine(t, "a") // the same EK with another LDevID key
	again.filing.Evidence.AKName = fleet.HexBytes("another attestation key, by now.")
	q := r.file(t, again)
	if q.State != fleet.RequestPending || q.Supersedes == "" {
		t.Fatalf("request: %+v", q)
	}
	if _, err := r.report(old); err != nil {
		t.Errorf("while the new one waits: %v", err)
	}
	_, fresh, _ := r.enroll(t, again)
	if _, err := r.report(old); err == nil || !strings.Contains(err.Error(), "not the one node") {
		t.Errorf("the old key after the new one is issued: %v", err)
	}
	if _, err := r.report(fresh); err != nil {
		t.Error(err)
	}
	r.sound(t)
}

func clearTPM(t *testing.T, raw transport.TPM) {
	t.Helper()
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(raw); err != nil {
		t.Fatal(err)
	}
}
