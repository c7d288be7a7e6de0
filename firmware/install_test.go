package firmware

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

func TestLeaveRecovery(t *testing.T) {
	windows := BootEntry{Number: 3, Active: true, Title: "Windows Boot Manager", Part: testESP(1), File: "EFI/Microsoft/Boot/bootmgfw.efi"}
	pxe := BootEntry{Number: 1, Active: true, Title: "PXE", Network: true}
	good := IdleFacts{Waiting: 2 * time.Hour, Network: true, Entries: []BootEntry{pxe, windows}, Order: []uint16{1, 3}}
	if n, why, ok := LeaveRecovery(good); !ok || n != 3 || !strings.Contains(why, "Windows") {
		t.Errorf("%d %q %v", n, why, ok)
	}
	for name, change := range map[string]func(*IdleFacts){
		"too soon":          func(f *IdleFacts) { f.Waiting = LeaveAfter - time.Second },
		"from a stick":      func(f *IdleFacts) { f.Network = false },
		"ours":              func(f *IdleFacts) { f.Ours = true },
		"nothing else":      func(f *IdleFacts) { f.Entries = f.Entries[:1] },
		"not in the order":  func(f *IdleFacts) { f.Order = f.Order[:1] },
		"switched off":      func(f *IdleFacts) { w := windows; w.Active = false; f.Entries = []BootEntry{pxe, w} },
		"one of ours stale": func(f *IdleFacts) { w := windows; w.Title = TitleCopy; f.Entries = []BootEntry{pxe, w} },
	} {
		f := good
		change(&f)
		if n, why, ok := LeaveRecovery(f); ok || why == "" {
			t.Errorf("%s: it leaves for %d (%q)", name, n, why)
		}
	}
}

func TestMatchDisk(t *testing.T) {
	target := fleet.DiskTarget{Serial: "S", WWN: "W", Model: "M", SizeBytes: 1e11}
	d := fleet.Disk{Path: "/dev/sda", Serial: "S", WWN: "W", Model: "M", SizeBytes: 1e11}
	other := d
	other.Path, other.Serial = "/dev/sdb", "T"
	if got, why := MatchDisk(target, []fleet.Disk{other, d}); got == nil || got.Path != "/dev/sda" || why != "" {
		t.Errorf("%v %q", got, why)
	}
	twin := d
	twin.Path = "/dev/sdc"
	for name, c := range map[string]struct {
		disks []fleet.Disk
		say   string
	}{
		"none there":  {nil, "no disk"},
		"none fits":   {[]fleet.Disk{other}, "serial T"},
		"two of them": {[]fleet.Disk{d, twin}, "2 disks"},
	} {
		if got, why := MatchDisk(target, c.disks); got != nil || !strings.Contains(why, c.say) {
			t.Errorf("%s: %v %q", name, got, why)
		}
	}
}

// Whatever the facts: no action without an order in force, none on a disk that
// the order does not name exactly, a reason for everything, and nothing that
// starts a system before all of it is there.
func TestPlanInstallProperties(t *testing.T) {
	const self = fleet.NodeID("n-self")
	now := time.Unix(1e9, 0)
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string, n int) int { return rapid.IntRange(0, n-1).Draw(t, name) }
		disk := func(name string) fleet.Disk {
			return fleet.Disk{Path: "/dev/" + name, Serial: []string{"A", "B"}[draw(name, 2)], SizeBytes: MinDisk}
		}
		img := Manifest{Name: "edge", Version: "1", Kind: fleet.ImageSlot, Arch: "amd64", SHA256: Digest{1}, Size: 1 << 20,
			Slot: &SlotImage{Root: File{Size: 8 << 20}, Verity: File{Size: 4096}}}
		o := fleet.Order{ID: "o", Node: []fleet.NodeID{self, "n-other"}[draw("node", 2)], Kind: []fleet.OrderKind{fleet.OrderInstall, fleet.OrderWipe, fleet.OrderRecover, fleet.OrderReset}[draw("kind", 4)],
			NotAfter: now.Add(time.Duration(draw("left", 3)-1) * time.Hour), Disk: &fleet.DiskTarget{Serial: "A", SizeBytes: MinDisk}, Image: &fleet.ImageRef{SHA256: img.SHA256[:]}}
		withdrawn, done := draw("withdrawn", 4) == 0, draw("done", 4) == 0
		f := InstallFacts{Now: now, TimeKnown: draw("time", 4) > 0, Node: self, Arch: "amd64", Orders: []fleet.Order{o},
			Withdrawn: func(string) bool { return withdrawn }, Done: func(string) bool { return done }, HandOver: draw("papers", 2) == 0, Missing: "x"}
		for _, n := range []string{"sda", "sdb"}[:draw("disks", 3)] {
			f.Disks = append(f.Disks, disk(n))
		}
		if draw("manifest", 4) > 0 {
			f.Image = &img
		}
		entry := img.Entry()
		switch draw("recovery", 3) {
		case 0:
			f.RecoveryWhy = "none"
		case 1:
			f.Recovery = &Manifest{Name: "muster-recovery", Version: "7", Size: 1 << 20}
		}
		if draw("looked", 4) > 0 {
			o.KeepData = draw("keep", 2) == 0
			f.Orders[0].KeepData = o.KeepData
			d := &TargetDisk{Data: draw("data", 2) == 0, RecoveryStaged: draw("recovery staged", 2) == 0, RecoveryWhole: draw("recovery whole", 2) == 0, Ours: draw("ours", 3) > 0, ESP: draw("esp", 3) > 0, Free: 1 << 30, Loader: draw("loader", 2) == 0, StagedWhole: draw("staged", 2) == 0,
				FinalWhole: draw("final", 2) == 0, Documents: draw("docs", 2) == 0, Entries: draw("entries", 2) == 0}
			d.Meta.Node = []fleet.NodeID{self, "n-other"}[draw("owner", 2)]
			d.Meta.Slots[SlotA] = Slot{State: SlotState(draw("state", int(numSlotStates))), Image: Digest{byte(draw("image", 3))}, Entry: entry}
			d.Meta.Installed = []string{"", "o", "p"}[draw("installed", 3)]
			if draw("update", 2) == 0 {
				d.Meta.Slots[SlotA].State = SlotWriting
				d.Meta.Update = &SlotUpdate{Order: []string{"o", "p"}[draw("whose", 2)], Image: Digest{byte(draw("what", 3))}, Verified: int64(draw("verified", 3)) * (4<<20 + 2048)}
			}
			for _, n := range []string{entry, StagedPrefix + entry, CountedName(entry, 3, 0), "old.efi", "recovery-6.efi", "recovery-7.efi", StagedPrefix + "recovery-7.efi"} {
				if draw("file "+n, 3) == 0 {
					x := BootFile{Name: n, Base: n, Left: -1}
					if n == CountedName(entry, 3, 0) {
						x.Base, x.Left = entry, 3
					}
					d.Files = append(d.Files, x)
				}
			}
			f.Target = d
		}
		state, acts := PlanInstall(f)
		if len(acts) == 0 {
			t.Fatal("a plan without a word")
		}
		inForce := o.Node == self && !withdrawn && !done && f.TimeKnown && now.Before(o.NotAfter) && o.Kind != fleet.OrderReset
		for _, a := range acts {
			if !strings.HasSuffix(a.Reason, ".") {
				t.Fatalf("%s: %q is no sentence", a.Kind, a.Reason)
			}
			if a.Kind == InstallWait {
				continue
			}
			if !inForce || a.Order == nil {
				t.Fatalf("%s without an order in force", a.Kind)
			}
			if o.Kind == fleet.OrderRecover {
				if a.Kind != TellDone {
					t.Fatalf("%s by an order to recover", a.Kind)
				}
				continue
			}
			same := 0
			for _, d := range f.Disks {
				if o.Disk.Matches(d) {
					same++
				}
			}
			if same != 1 || a.Disk == nil || !o.Disk.Matches(*a.Disk) {
				t.Fatalf("%s on %v, %d disks match", a.Kind, a.Disk, same)
			}
			if (a.Kind == WipeDisk) && o.Kind != fleet.OrderWipe {
				t.Fatal("it wipes without being told")
			}
			if a.Kind == InstallRename && !IsRecovery(a.File) && (!f.HandOver || !f.Target.Documents || !f.Target.StagedWhole || f.Target.Meta.Slots[SlotA].State != SlotStaged || f.Target.Meta.Installed != "o") {
				t.Fatalf("the system would start too early: %+v", f.Target)
			}
			if r := f.Recovery; a.Kind == InstallRename && a.To != "recovery-7.efi" && (r == nil && f.RecoveryWhy == "" || r != nil && !f.Target.RecoveryWhole) {
				t.Fatalf("the system would start without a recovery image behind it: %+v", f.Target)
			}
			if a.Kind == InstallRename && a.To == "recovery-7.efi" && !f.Target.RecoveryStaged {
				t.Fatal("half a recovery image gets its name")
			}
			if a.Kind == InstallRemove && IsRecovery(a.File) && (a.File == "recovery-7.efi" || f.Recovery == nil || !f.Target.RecoveryWhole || !f.Target.Entries) {
				t.Fatalf("%s goes, and nothing takes its place: %+v", a.File, f.Target)
			}
			if a.Kind == EraseData && (o.KeepData || o.Kind != fleet.OrderInstall) {
				t.Fatal("data goes that shall stay")
			}
			if a.Kind == WriteSystem && f.Target.Data && !o.KeepData && f.Target.Meta.Update.Verified == 0 {
				t.Fatal("data stays that shall go")
			}
			if a.Kind == WriteSystem || a.Kind == EraseData {
				for _, x := range f.Target.Files {
					if x.Name != StagedPrefix+entry && !IsRecovery(x.Name) {
						t.Fatalf("the slot is written while %s is there", x.Name)
					}
				}
			}
			if a.Meta != nil {
				m := *a.Meta
				if m.Node != self {
					t.Fatalf("the record is %q's", m.Node)
				}
			}
		}
		if state == Installed && !(f.Target.FinalWhole && f.Target.Meta.Installed == "o") {
			t.Fatal("installed, and it is not")
		}
	})
}

// installFacts are those of a machine whose order o is about to end.
func installFacts() InstallFacts {
	const self = fleet.NodeID("n-self")
	now := time.Unix(1e9, 0)
	img := Manifest{Name: "edge", Version: "1", Kind: fleet.ImageSlot, Arch: "amd64", SHA256: Digest{1}, Size: 1 << 20,
		Slot: &SlotImage{Root: File{Size: 8 << 20}, Verity: File{Size: 4096}}}
	o := fleet.Order{ID: "o", Node: self, Kind: fleet.OrderInstall, NotAfter: now.Add(time.Hour), Disk: &fleet.DiskTarget{Serial: "A", SizeBytes: MinDisk}, Image: &fleet.ImageRef{SHA256: img.SHA256[:]}}
	no := func(string) bool { return false }
	return InstallFacts{Now: now, TimeKnown: true, Node: self, Arch: "amd64", Orders: []fleet.Order{o}, Withdrawn: no, Done: no, HandOver: true, RecoveryWhy: "none",
		Disks: []fleet.Disk{{Path: "/dev/sda", Serial: "A", SizeBytes: MinDisk}}, Image: &img,
		Target: &TargetDisk{Ours: true, ESP: true, Free: 1 << 30, Documents: true, Entries: true, Meta: Meta{Node: self}}}
}
