package central

import (
	"crypto/sha256"
	"crypto/x509"
	"maps"
	"slices"
	"testing"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
)

// TestOtherHardware: a machine that comes back with another disk and another
// card is served without a person; the rule looks at it again although its
// report is the same, and the boot host knows the new card.
func TestOtherHardware(t *testing.T) {
	y := newYard(t, "1")
	a := y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	if _, err := y.assign("shop-7", "1", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := y.set("shop-7", func(s *fleet.SiteSettings) { s.Install = &fleet.DiskRule{Prefer: fleet.DiskOnly} }); err != nil {
		t.Fatal(err)
	}
	orders := func() []fleet.Order { return slices.Collect(maps.Values(y.pull(a).orders)) }
	y.says(a, &musterv1.SystemReport{Slot: "recovery", Image: "recovery@1", State: musterv1.SystemState_SYSTEM_STATE_RECOVERY})
	if n := len(orders()); n != 0 {
		t.Fatalf("%d orders for a machine without a disk", n)
	}
	public, err := x509.MarshalPKIXPublicKey(a.key.Public())
	y.must(err)
	sum := sha256.Sum256(public)
	again := func(hw fleet.Hardware) fleet.Request {
		t.Helper()
		f := servicetest.Filing("a")
		f.Evidence.LDevIDKey, f.Evidence.Hardware = sum[:], hw
		r, err := y.File(t.Context(), f)
		y.must(err)
		return r
	}
	hw := y.get(a.ID).Hardware
	before := y.get(a.ID).Revision
	if r := again(hw); r.State != fleet.RequestIssued || y.get(a.ID).Revision != before {
		t.Errorf("the same hardware: the request is %s, the node was written", r.State)
	}
	hw.Disks = []fleet.Disk{{Path: "/dev/sda", Serial: "S1", SizeBytes: 1 << 36}}
	hw.NICs = []fleet.NIC{{Name: "eth0", MAC: "52:54:00:00:00:77"}}
	if r := again(hw); r.State != fleet.RequestIssued {
		t.Fatalf("other hardware: the request is %s", r.State)
	}
	if n := y.get(a.ID); len(n.Hardware.Disks) != 1 || n.State != fleet.NodeActive || n.Certificate.Serial != a.Certificate.Serial {
		t.Errorf("the node is %+v", n)
	}
	got := orders()
	if len(got) != 1 || got[0].Kind != fleet.OrderInstall || got[0].Disk.Serial != "S1" {
		t.Errorf("orders: %+v; waits: %+v", got, y.events("install.waits"))
	}
	if ids := y.s.index.byMAC("52:54:00:00:00:77"); len(ids) != 1 || ids[0] != a.ID {
		t.Errorf("the new card is that of %v", ids)
	}
	if n := len(y.events("node.disks")); n != 1 {
		t.Errorf("%d events about disks", n)
	}
}
