package firmware

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// InstallState is where a machine in recovery stands with its disk.
//
//	idle ---> waiting ---> partitioning ---> writing ---> files ---> handing-over ---> installed
//	  ^          |                                                                       |
//	  +----------+-------------------------- a new order ------------------------------+
//
// A power cut changes no state but the way there: what is on the disk says how
// far the machine was, and the same order goes on from it.
type InstallState uint8

const (
	// InstallIdle: there is no order for this machine's disk.
	InstallIdle InstallState = iota
	// InstallWaiting: there is an order, and something is in its way.
	InstallWaiting
	// Partitioning: the disk gets its table.
	Partitioning
	// WritingSystem: slot A is being written.
	WritingSystem
	// WritingFiles: the ESP gets what starts.
	WritingFiles
	// HandingOver: documents for the system, entries for the firmware.
	HandingOver
	// Installed: the order is carried out; the next start is one of the system.
	Installed
	// WipingDisk: an order makes the disk empty.
	WipingDisk
	// Wiped: it is.
	Wiped
	numInstallStates
)

var installStateNames = [numInstallStates]string{"idle", "waiting", "partitioning", "writing", "files", "handing-over", "installed", "wiping", "wiped"}

// String returns the state as shown.
func (s InstallState) String() string {
	if int(s) < len(installStateNames) {
		return installStateNames[s]
	}
	return fmt.Sprintf("install-state(%d)", uint8(s))
}

// WriteSize is how many bytes of a slot image are written raw: the file system
// and then its hash tree. SlotUpdate.Verified counts them in this order.
func (s SlotImage) WriteSize() int64 { return s.Root.Size + s.Verity.Size }

// InstallFacts are what a machine in recovery knows when it plans.
type InstallFacts struct {
	Now time.Time
	// TimeKnown: the centre told the time in this start, and which orders it
	// still wants carried out. Without it no order is known to be in force.
	TimeKnown bool
	Node      fleet.NodeID
	// Arch is this machine's, in Go's word.
	Arch string
	// Orders are all verified orders that are held, oldest first.
	Orders []fleet.Order
	// Withdrawn: the centre took it back. Done: it was carried out, and the
	// centre may not have heard of that yet.
	Withdrawn, Done func(id string) bool
	Disks           []fleet.Disk
	// Image is the manifest of the order's image, ImageWhy why there is none.
	Image    *Manifest
	ImageWhy string
	// Target is what is on the disk that the order names; nil as long as
	// nobody looked, and TargetWhy says why it cannot be looked at.
	Target    *TargetDisk
	TargetWhy string
	// Recovery is the manifest of the recovery image that belongs on the disk,
	// RecoveryWhy why there will be none: then the disk keeps the one it has.
	Recovery    *Manifest
	RecoveryWhy string
	// HandOver says that the documents for the system are complete, Missing
	// what is not.
	HandOver bool
	Missing  string
}

// TargetDisk is what is on the disk that an order names.
type TargetDisk struct {
	// Ours: it has exactly our partitions.
	Ours bool
	// Sector is its logical sector.
	Sector int64
	// Meta is the record; MetaWhy says why there is none ("" if there is).
	Meta    Meta
	MetaWhy string
	// ESP: it can be mounted. The rest is known only then.
	ESP  bool
	Free int64
	// Files are those below EFI/Linux.
	Files []BootFile
	// Loader: both copies of the loader and its settings are as they should be.
	Loader bool
	// StagedWhole and FinalWhole: the boot file of Image is there under its
	// hidden name, and under the one that is started.
	StagedWhole, FinalWhole bool
	// RecoveryStaged and RecoveryWhole: the same of the recovery image.
	RecoveryStaged, RecoveryWhole bool
	// Documents: what is handed over is on the ESP, as it is now.
	Documents bool
	// Entries: the firmware's boot order is right; true where it has none.
	Entries bool
	// Data: the data partition holds something.
	Data bool
}

// InstallKind is one thing to do.
type InstallKind uint8

const (
	// InstallWait does nothing.
	InstallWait InstallKind = iota
	// LookAtDisk opens the disk of the order, to know what is on it.
	LookAtDisk
	// FetchManifest asks for the manifest of the order's image.
	FetchManifest
	// FetchRecovery asks for that of the recovery image.
	FetchRecovery
	// WriteTable makes the disk ours; all that was on it is gone.
	WriteTable
	// MakeESP makes an empty ESP.
	MakeESP
	// InstallMeta writes Meta.
	InstallMeta
	// WriteSystem goes on writing root and hash tree from Meta.Update.Verified.
	WriteSystem
	// EraseData empties the data partition.
	EraseData
	// WriteLoader brings the loader, its copy and its settings.
	WriteLoader
	// StageSystem brings the boot file under File, a hidden name, StageRecovery
	// that of the recovery image.
	StageSystem
	StageRecovery
	// WriteDocuments hands the documents over.
	WriteDocuments
	// SetEntries sets the firmware's boot order, with the recovery image File
	// ("" for none).
	SetEntries
	// InstallRename gives File the name To: from here on the system starts.
	InstallRename
	// InstallRemove removes File from EFI/Linux.
	InstallRemove
	// WipeDisk empties the disk.
	WipeDisk
	// TellDone notes that Order is carried out, and tells the centre.
	TellDone
	// RestartMachine restarts through the firmware.
	RestartMachine
	numInstallKinds
)

var installKindNames = [numInstallKinds]string{"wait", "look-at-disk", "fetch-manifest", "fetch-recovery", "write-table", "make-esp", "write-meta", "write-system",
	"erase-data", "write-loader", "stage-file", "stage-recovery", "write-documents", "set-entries", "rename-file", "remove-file", "wipe-disk", "tell-done", "restart"}

// String returns the name of the kind.
func (k InstallKind) String() string {
	if int(k) < len(installKindNames) {
		return installKindNames[k]
	}
	return fmt.Sprintf("install-kind(%d)", uint8(k))
}

// InstallAction is one thing to do, and why. Each is on disk before the next
// begins, and may be repeated after a power cut.
type InstallAction struct {
	Kind   InstallKind
	Reason string
	// Order is what asks for it; Disk the one disk that it is about.
	Order    *fleet.Order
	Disk     *fleet.Disk
	Meta     *Meta
	File, To string
}

// PickInstallOrder returns the order that a machine in recovery works on now:
// the newest one in force that is about its disk or about being here. why says
// what is wrong with the last one that is not in force.
func PickInstallOrder(f InstallFacts) (o *fleet.Order, why string) {
	for i := range slices.Backward(f.Orders) {
		x := &f.Orders[i]
		switch x.Kind {
		case fleet.OrderInstall, fleet.OrderWipe, fleet.OrderRecover:
		default:
			continue
		}
		said := func(s string) {
			if why == "" {
				why = "Order " + x.ID + " (" + string(x.Kind) + ") is not carried out: " + s + "."
			}
		}
		switch {
		case f.Done(x.ID):
			// What came before it is settled by it.
			return nil, ""
		case x.Node != f.Node:
			said("it is for another machine")
		case f.Withdrawn(x.ID):
			said("it was withdrawn")
		case !f.TimeKnown:
			said("the centre did not tell me the time and what it still wants yet, so that I cannot know whether it holds")
		case !f.Now.Before(x.NotAfter):
			said("it ended on " + x.NotAfter.UTC().Format(time.RFC3339) + ", and it is " + f.Now.UTC().Format(time.RFC3339))
		default:
			return x, ""
		}
	}
	return nil, why
}

// MatchDisk returns the one disk that target names, or why there is not exactly
// one. Disks that say the same of themselves cannot be told apart, and none of
// them is touched.
func MatchDisk(target fleet.DiskTarget, disks []fleet.Disk) (*fleet.Disk, string) {
	var found []int
	for i, d := range disks {
		if target.Matches(d) {
			found = append(found, i)
		}
	}
	name := diskName(target)
	switch len(found) {
	case 0:
		var seen []string
		for _, d := range disks {
			seen = append(seen, diskName(fleet.DiskTarget{Serial: d.Serial, WWN: d.WWN, Model: d.Model, SizeBytes: d.SizeBytes}))
		}
		if len(seen) == 0 {
			return nil, "the order names " + name + ", and this machine has no disk"
		}
		return nil, "the order names " + name + ", and this machine has " + strings.Join(seen[:min(len(seen), 4)], "; ")
	case 1:
		return &disks[found[0]], ""
	}
	return nil, fmt.Sprintf("the order names %s, and %d disks say that of themselves: none is touched; take one out", name, len(found))
}

func diskName(t fleet.DiskTarget) string {
	var out []string
	for _, s := range []struct{ what, text string }{{"model", t.Model}, {"serial", t.Serial}, {"WWN", t.WWN}} {
		if s.text != "" {
			out = append(out, s.what+" "+s.text)
		}
	}
	if len(out) == 0 {
		out = []string{"a disk without serial"}
	}
	return fmt.Sprintf("%s (%d GB)", strings.Join(out, ", "), t.SizeBytes/1e9)
}

func holdInstall(why string) (InstallState, []InstallAction) {
	return InstallWaiting, []InstallAction{{Kind: InstallWait, Reason: why}}
}

// PlanInstall says where a machine in recovery stands with its disk and what to
// do next. Like every plan it is made anew after each list of actions.
func PlanInstall(f InstallFacts) (InstallState, []InstallAction) {
	o, why := PickInstallOrder(f)
	if o == nil {
		if why == "" {
			why = "There is no order for the disk of this machine."
			return InstallIdle, []InstallAction{{Kind: InstallWait, Reason: why}}
		}
		return holdInstall(why)
	}
	do := func(s InstallState, acts ...InstallAction) (InstallState, []InstallAction) {
		for i := range acts {
			acts[i].Order = o
		}
		return s, acts
	}
	if o.Kind == fleet.OrderRecover {
		return do(InstallIdle, InstallAction{Kind: TellDone, Reason: "Recovery runs; that is what the order asks for."})
	}
	d, no := MatchDisk(*o.Disk, f.Disks)
	if d == nil {
		return holdInstall("I write nothing: " + no + ".")
	}
	on := func(s InstallState, acts ...InstallAction) (InstallState, []InstallAction) {
		for i := range acts {
			acts[i].Disk = d
		}
		return do(s, acts...)
	}
	if o.Kind == fleet.OrderWipe {
		return on(WipingDisk,
			InstallAction{Kind: WipeDisk, Reason: "An order empties " + diskName(*o.Disk) + "."},
			InstallAction{Kind: TellDone, Reason: "The disk is empty."})
	}
	if f.Image == nil {
		if f.ImageWhy != "" {
			return holdInstall("I do not know yet what to write: " + f.ImageWhy + ".")
		}
		return on(InstallWaiting, InstallAction{Kind: FetchManifest, Reason: "I ask for the manifest of " + o.Image.Name + " " + o.Image.Version + "."})
	}
	if no := fits(f, *o, *d); no != "" {
		return holdInstall("I write nothing: " + no + ".")
	}
	if f.Target == nil {
		if f.TargetWhy != "" {
			return holdInstall("I cannot use the disk that the order names: " + f.TargetWhy + ".")
		}
		return on(InstallWaiting, InstallAction{Kind: LookAtDisk, Reason: "I look at what is on the disk."})
	}
	return f.install(*o, on)
}

// fits says why the image cannot go onto this machine; "" if it can.
func fits(f InstallFacts, o fleet.Order, d fleet.Disk) string {
	m := f.Image
	switch {
	case m.Kind != fleet.ImageSlot || m.Slot == nil:
		return "image " + m.Name + " " + m.Version + " is not one for a disk"
	case !slices.Equal(m.SHA256[:], o.Image.SHA256):
		return "the manifest is of another image than the order's"
	case m.Arch != f.Arch:
		return "image " + m.Name + " " + m.Version + " is for " + m.Arch + ", and this machine is " + f.Arch
	case d.SizeBytes < MinDisk:
		return fmt.Sprintf("the disk has %d GB, and at least %d GB are needed", d.SizeBytes/1e9, int64(MinDisk)/1e9+1)
	case m.Size > SizeESP/4:
		return fmt.Sprintf("the boot file has %d MB, and the ESP must hold two and more", m.Size>>20)
	case IsRecovery(m.Entry()):
		return "image " + m.Name + " is named like the recovery image, and the loader could not tell them apart"
	}
	return ""
}

// install goes from what is on the disk to a system on it.
func (f InstallFacts) install(o fleet.Order, on func(InstallState, ...InstallAction) (InstallState, []InstallAction)) (InstallState, []InstallAction) {
	t, m := f.Target, f.Image
	entry := m.Entry()
	what := m.Name + " " + m.Version
	if !t.Ours {
		return on(Partitioning, InstallAction{Kind: WriteTable, Reason: "The disk gets a new partition table; what was on it goes."})
	}
	if !t.ESP {
		return on(Partitioning, InstallAction{Kind: MakeESP, Reason: "The ESP is empty or damaged; it is made anew."})
	}
	slot := t.Meta.Slots[SlotA]
	u := t.Meta.Update
	mine := t.MetaWhy == "" && t.Meta.Node == f.Node
	final := fileOf(t.Files, entry)
	if mine && u == nil && t.Meta.Installed == o.ID && (slot.State != SlotStaged || slot.Image != m.SHA256) {
		// A system has run since. The centre may not have heard how the order
		// ended, or is heard of it late: what runs by now stays.
		return on(Installed, InstallAction{Kind: TellDone, Reason: what + " was installed before."})
	}
	if mine && u == nil && t.Meta.Installed == o.ID && t.FinalWhole && final != nil && (final.Left == 0 || t.Meta.Recovery != "") {
		// To start it again would lead in a circle, or away from who wanted to
		// be here.
		return on(Installed, InstallAction{Kind: TellDone, Reason: what + " is installed and is not started from here; another order of install writes it anew."})
	}
	if mine && u == nil && slot.State == SlotStaged && slot.Image == m.SHA256 && t.FinalWhole && t.Meta.Installed == o.ID {
		// The loader comes last: one that finds nothing to start may end in the
		// firmware's setup instead of the next entry (systemd-boot 252).
		if !t.Loader {
			return on(HandingOver, InstallAction{Kind: WriteLoader, Reason: "The boot loader comes onto the ESP: from now on this machine starts " + what + "."})
		}
		return on(Installed,
			InstallAction{Kind: TellDone, Reason: what + " is installed."},
			InstallAction{Kind: RestartMachine, Reason: "I start " + what + "."})
	}
	staged := mine && u == nil && slot.State == SlotStaged && slot.Image == m.SHA256 && t.Meta.Installed == o.ID
	if !staged && (!mine || u == nil || u.Slot != SlotA || u.Image != m.SHA256 || u.Order != o.ID) {
		// What is on the disk is of another node, another order, or was
		// finished before this order: slot A begins anew, data stays.
		next := Meta{Node: f.Node, Floor: f.Now.UTC().Truncate(time.Second)}
		if mine {
			next.Failed = t.Meta.Failed
		}
		next.Slots[SlotA] = Slot{State: SlotWriting, Entry: entry}
		next.Update = &SlotUpdate{Slot: SlotA, Image: m.SHA256, Order: o.ID}
		return on(WritingSystem, InstallAction{Kind: InstallMeta, Meta: &next, Reason: what + " goes into slot a."})
	}
	if !staged {
		// Nothing may start from a slot that is being written; and a system
		// of before must not be what the loader prefers. The recovery image
		// stays: it is what goes on after a power cut.
		for _, x := range t.Files {
			if x.Name != StagedPrefix+entry && !IsRecovery(x.Name) {
				return on(WritingSystem, InstallAction{Kind: InstallRemove, File: x.Name, Reason: "Its slot is about to be written."})
			}
		}
		if u.Verified == 0 && t.Data && !o.KeepData {
			// Only now: no system is left that would take an empty partition
			// for its own.
			return on(WritingSystem, InstallAction{Kind: EraseData, Reason: "The data of the system before goes; the order does not say that it stays."})
		}
		if u.Verified < m.Slot.WriteSize() {
			return on(WritingSystem, InstallAction{Kind: WriteSystem, Reason: "I write " + what + "."})
		}
		if !t.StagedWhole {
			if t.Free < m.Size+m.Size/8 && fileOf(t.Files, StagedPrefix+entry) == nil {
				return holdInstall(fmt.Sprintf("The ESP has %d MB free, and the boot file needs %d.", t.Free>>20, m.Size>>20))
			}
			return on(WritingFiles, InstallAction{Kind: StageSystem, File: StagedPrefix + entry, Reason: "The boot file comes onto the ESP, still hidden."})
		}
	}
	if s, acts := f.recovery(on); acts != nil {
		return s, acts
	}
	if !f.HandOver {
		return holdInstall("I do not start the system yet: " + f.Missing + ".")
	}
	if !t.Documents {
		return on(HandingOver, InstallAction{Kind: WriteDocuments, Reason: "The system gets the documents of its site."})
	}
	if !t.Entries {
		return on(HandingOver, InstallAction{Kind: SetEntries, File: t.RecoveryFile(f.Recovery), Reason: "The firmware is told to start from this disk."})
	}
	// Only now no entry leads to a recovery image of before.
	for _, x := range t.Files {
		if f.Recovery != nil && IsRecovery(x.Name) && x.Name != t.RecoveryFile(f.Recovery) {
			return on(HandingOver, InstallAction{Kind: InstallRemove, File: x.Name, Reason: "The recovery image on this disk is " + t.RecoveryFile(f.Recovery) + " now."})
		}
	}
	if !staged {
		next := t.Meta
		next.Slots[SlotA] = Slot{State: SlotStaged, Image: m.SHA256, Name: m.Name, Version: m.Version, Entry: entry, K3s: m.Slot.K3s, Etcd: m.Slot.EtcdMinor}
		next.Slots[SlotB] = Slot{}
		next.Update, next.Starts, next.Recovery, next.Installed = nil, 0, "", o.ID
		return on(HandingOver, InstallAction{Kind: InstallMeta, Meta: &next, Reason: what + " is written and verified."})
	}
	if t.StagedWhole && final == nil {
		return on(HandingOver, InstallAction{Kind: InstallRename, File: StagedPrefix + entry, To: CountedName(entry, Tries, 0), Reason: "The boot file of " + what + " takes its name."})
	}
	// The record says staged, and the boot file is gone or damaged: the
	// last step was cut off on a FAT, or somebody was here.
	next := t.Meta
	next.Slots[SlotA] = Slot{State: SlotWriting, Entry: entry}
	next.Update = &SlotUpdate{Slot: SlotA, Image: m.SHA256, Order: o.ID}
	next.Installed = ""
	return on(WritingSystem, InstallAction{Kind: InstallMeta, Meta: &next, Reason: "The boot file is gone or damaged; I write the slot again."})
}

// recovery brings the recovery image onto the ESP: what starts when neither slot
// does. It comes before the entry that names it and before everything that could
// fail. The actions are nil when it is there, or when there is none to bring.
func (f InstallFacts) recovery(on func(InstallState, ...InstallAction) (InstallState, []InstallAction)) (InstallState, []InstallAction) {
	t, r := f.Target, f.Recovery
	switch {
	case r == nil && f.RecoveryWhy == "" && f.HandOver:
		// The documents are there, and with them the word which one it is.
		return on(WritingFiles, InstallAction{Kind: FetchRecovery, Reason: "I ask for the recovery image that belongs on the disk."})
	case r == nil || t.RecoveryWhole:
		return 0, nil
	}
	name := RecoveryEntry(r.Version)
	hidden := StagedPrefix + name
	if t.RecoveryStaged {
		return on(WritingFiles, InstallAction{Kind: InstallRename, File: hidden, To: name, Reason: "The recovery image takes its name: it starts when no system does."})
	}
	if t.Free < r.Size+r.Size/8 && fileOf(t.Files, hidden) == nil {
		return holdInstall(fmt.Sprintf("The ESP has %d MB free, and the recovery image needs %d.", t.Free>>20, r.Size>>20))
	}
	return on(WritingFiles, InstallAction{Kind: StageRecovery, File: hidden, Reason: "The recovery image comes onto the ESP, still hidden."})
}

// RecoveryFile is the boot file of the recovery image that the firmware shall
// know: that of r, which is brought, or the last that is there; "" for none.
func (t TargetDisk) RecoveryFile(r *Manifest) string {
	if r != nil {
		return RecoveryEntry(r.Version)
	}
	last := ""
	for _, x := range t.Files {
		if IsRecovery(x.Name) && !strings.HasPrefix(x.Name, StagedPrefix) {
			last = x.Name
		}
	}
	return last
}

func fileOf(files []BootFile, base string) *BootFile {
	for i := range files {
		if files[i].Base == base {
			return &files[i]
		}
	}
	return nil
}

// LoaderConf are the loader's settings: no menu whatever is pressed, and no
// default, which would beat the counters (docs/adr/0011-loader.md). The loader
// adds no entries of its own: one without any other entry would start "Reboot
// Into Firmware Interface", and park the machine in its setup (seen in a
// virtual machine whose install was cut between loader and boot file).
const LoaderConf = "timeout menu-disabled\neditor no\nauto-firmware no\nauto-entries no\n"

// IdleFacts are what decides how long a machine stays in recovery that nobody
// asked to be there.
type IdleFacts struct {
	// Waiting is how long it has been waiting for an approval or an order.
	Waiting time.Duration
	// Network: recovery came over the network, so that a disk was passed over.
	Network bool
	// Entries and Order are the firmware's; Unread are entries nobody can read.
	Entries []BootEntry
	Order   []uint16
	// Ours: a disk of this machine has our partitions, or an order is held.
	Ours bool
}

// LeaveAfter is how long a machine with a system of somebody else waits in
// recovery before it starts that.
const LeaveAfter = time.Hour

// LeaveRecovery returns the boot entry to start next when a machine with
// another system on its disk has been in recovery for long and nobody wanted
// it. ok is false when it stays; why says why.
func LeaveRecovery(f IdleFacts) (next uint16, why string, ok bool) {
	switch {
	case f.Ours:
		return 0, "this machine is ours", false
	case !f.Network:
		return 0, "recovery was started from a medium, by somebody", false
	case f.Waiting < LeaveAfter:
		return 0, "somebody may still want this machine", false
	}
	for _, n := range f.Order {
		for _, e := range f.Entries {
			if e.Number == n && e.Active && !e.Network && e.File != "" && !strings.HasPrefix(e.Title, TitleLoader) {
				return n, fmt.Sprintf("nobody wanted this machine for %s, and it has a system: %s", f.Waiting.Round(time.Minute), e.Title), true
			}
		}
	}
	return 0, "there is no other system to start", false
}
