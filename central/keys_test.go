package central

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
)

func TestCookieKeysRotate(t *testing.T) {
	h := newHarness(t, t.TempDir())
	seal := make([]byte, 32)
	rand.Read(seal)
	ctx := context.Background()
	fresh := func(seal []byte) *cookieKeys {
		k, err := newCookieKeys(h.store, seal)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	keys := fresh(seal)
	first, err := keys.current(ctx, servicetest.Start)
	if err != nil || len(first) != 1 {
		t.Fatalf("%d keys, %v", len(first), err)
	}
	// A restart and a replica have the same keys.
	if again, err := fresh(seal).current(ctx, servicetest.Start.Add(time.Hour)); err != nil || again[0] != first[0] {
		t.Errorf("after a restart: other keys, %v", err)
	}
	now := servicetest.Start
	for range 5 {
		now = now.Add(cookieKeyLife)
		next, err := keys.current(ctx, now)
		if err != nil || next[0].ID == first[0].ID || next[1] != first[0] || len(next) > cookieKeyKeep {
			t.Fatalf("at %s: %v after %v, %v", now, next, first, err)
		}
		first = next
	}
	if err := h.store.View(ctx, func(r store.Reader) error {
		stored, err := r.CookieKeys()
		if len(stored) != cookieKeyKeep {
			t.Errorf("%d keys are kept", len(stored))
		}
		for _, k := range stored {
			for _, f := range first {
				if bytes.Contains(k.Sealed, f.Secret[:]) {
					t.Error("the database holds a secret in the clear")
				}
			}
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	// With another sealing key nothing is made up.
	other := make([]byte, 32)
	if _, err := fresh(other).current(ctx, now); err == nil {
		t.Error("keys were opened with another sealing key")
	}
}

func TestSealKeyIsKept(t *testing.T) {
	d, err := openDataDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	one, err := d.sealKey()
	if err != nil {
		t.Fatal(err)
	}
	two, err := d.sealKey()
	if err != nil || !bytes.Equal(one, two) {
		t.Errorf("another key the second time, %v", err)
	}
	if info, err := os.Stat(d.file(sealKeyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	// A damaged key is not replaced: that would hide the loss.
	if err := os.WriteFile(d.file(sealKeyFile), one[:16], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.sealKey(); err == nil {
		t.Error("half a key is taken")
	}
}

func TestSweep(t *testing.T) {
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	a, err := h.File(ctx, servicetest.Filing("a"))
	if err != nil {
		t.Fatal(err)
	}
	h.clock.set(servicetest.Start.Add(enroll.PendingFor - time.Second))
	b, err := h.File(ctx, servicetest.Filing("b"))
	if err != nil {
		t.Fatal(err)
	}
	state := func(id fleet.RequestID) fleet.RequestState {
		r, err := h.Request(ctx, DefaultTenant, id)
		if err != nil {
			t.Fatal(err)
		}
		return r.State
	}
	if err := h.s.expire(ctx); err != nil || state(a.ID) != fleet.RequestPending {
		t.Fatalf("a second too early: %s, %v", state(a.ID), err)
	}
	h.clock.set(servicetest.Start.Add(enroll.PendingFor))
	if err := h.s.expire(ctx); err != nil {
		t.Fatal(err)
	}
	if state(a.ID) != fleet.RequestExpired || state(b.ID) != fleet.RequestPending {
		t.Errorf("the old is %s, the new is %s", state(a.ID), state(b.ID))
	}
	// Once is enough.
	before, err := h.records()
	if err := errors.Join(err, h.s.expire(ctx)); err != nil {
		t.Fatal(err)
	}
	if after, err := h.records(); err != nil || len(after) != len(before) {
		t.Errorf("%d records became %d, %v", len(before), len(after), err)
	}
	h.sound(t)
}

func TestNodeIndexKeepsDenialsApart(t *testing.T) {
	x := newNodeIndex()
	node := func(name string, state fleet.NodeState, mac string) fleet.Node {
		f := servicetest.Filing(name)
		return fleet.Node{ID: f.Evidence.EK.NodeID(), Tenant: DefaultTenant, State: state, Hardware: fleet.Hardware{NICs: []fleet.NIC{{MAC: mac}}}}
	}
	const mac = "52:54:00:AA:BB:CC"
	x.put(node("thief", fleet.NodeDenied, mac))
	if x.knownMAC(mac) {
		t.Error("a denied machine is one of ours to the boot role")
	}
	if !x.deniedMAC(mac) || x.deniedMAC("52:54:00:00:00:01") {
		t.Error("the denied machine is not known by its address")
	}
	x.put(node("victim", fleet.NodeActive, mac))
	if !x.knownMAC(mac) || x.knownMAC("52:54:00:00:00:01") {
		t.Error("a node's address is not known, or a stranger's is")
	}
	if x.deniedMAC(mac) {
		t.Error("a denied machine silences another by claiming its address")
	}
	x.put(node("victim", fleet.NodeDenied, mac))
	if !x.deniedMAC(mac) {
		t.Error("both are denied, and the address is not")
	}
	for _, name := range []string{"thief", "victim"} {
		x.put(node(name, fleet.NodeApproved, mac))
	}
	if x.deniedMAC(mac) || len(x.denied) != 0 {
		t.Error("allowed machines are still denied")
	}
}

// TestNodeIndexKnowsTheNewest: what was committed later wins, whatever comes
// first: a denied node must not slip back in.
func TestNodeIndexKnowsTheNewest(t *testing.T) {
	x := newNodeIndex()
	id := servicetest.Filing("a").Evidence.EK.NodeID()
	x.put(fleet.Node{ID: id, State: fleet.NodeDenied, Revision: 3})
	x.put(fleet.Node{ID: id, State: fleet.NodeApproved, Revision: 2})
	if e, _ := x.get(id); e.state != fleet.NodeDenied {
		t.Errorf("the node is %s", e.state)
	}
	x.put(fleet.Node{ID: id, State: fleet.NodeApproved, Revision: 4})
	if e, _ := x.get(id); e.state != fleet.NodeApproved {
		t.Errorf("allowed again, and it is %s", e.state)
	}
}

// TestDeniedBeforeItWasANode: such a machine gets no boot, also after a
// restart.
func TestDeniedBeforeItWasANode(t *testing.T) {
	h := newHarness(t, t.TempDir())
	f := servicetest.Filing("a")
	f.Evidence.Hardware.NICs = []fleet.NIC{{MAC: "52:54:00:00:00:09"}}
	r, err := h.File(context.Background(), f)
	if err != nil {
		t.Fatal(err)
	}
	if h.s.index.deniedMAC("52:54:00:00:00:09") {
		t.Error("denied before anybody did")
	}
	if err := h.Deny(r.Node); err != nil {
		t.Fatal(err)
	}
	restarted := newNodeIndex()
	if err := restarted.load(context.Background(), h.store, DefaultTenant); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]*nodeIndex{"now": h.s.index, "after a restart": restarted} {
		if !x.deniedMAC("52:54:00:00:00:09") {
			t.Errorf("%s: the machine may boot", name)
		}
	}
}
