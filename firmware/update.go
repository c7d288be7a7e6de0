package firmware

import (
	"fmt"
	"slices"
	"strings"
)

// UpdateState is where a node stands with its own system.
type UpdateState uint8

const (
	// UpToDate: what runs is what is wanted, and it was found healthy.
	UpToDate UpdateState = iota
	// Judging: the running system has not been found healthy yet.
	Judging
	// WritingSlot: the other slot is being written.
	WritingSlot
	// ReadyToFlip: written and verified; waits for its time.
	ReadyToFlip
	// Flipping: the next start tries the other slot.
	Flipping
	// RolledBack: what is wanted failed here; an order must clear it.
	RolledBack
	// Held: something on this box is in the way.
	Held
	numUpdateStates
)

var updateStateNames = [numUpdateStates]string{"up-to-date", "judging", "writing", "ready", "flipping", "rolled-back", "held"}

// String returns the state as shown.
func (s UpdateState) String() string {
	if int(s) < len(updateStateNames) {
		return updateStateNames[s]
	}
	return fmt.Sprintf("update-state(%d)", uint8(s))
}

// BootFile is one file below EFI/Linux, its name taken apart.
type BootFile struct {
	// Name as it is, Base without counter.
	Name, Base string
	// Left is -1 without counter.
	Left, Done int
}

// StagedPrefix hides a boot file that is being written from the loader.
const StagedPrefix = ".new-"

// Tries is how often the loader tries a new system.
const Tries = 3

// MaxRounds is how often all tries may be spent without a verdict before the
// image is held to be bad: once can be a power failure that came three times.
const MaxRounds = 2

// MaxStarts is how many starts without a healthy one are borne where the
// loader cannot count.
const MaxStarts = 5

// Target is the system that this node is to run.
type Target struct {
	Image         Digest
	Name, Version string
	// Entry is the boot file's name without counter.
	Entry string
	// Size of the image in bytes; BootSize that of the boot file.
	Size, BootSize int64
	K3s, Etcd      string
	// Order is the ID of the order that asks for it, "" for the stack's version.
	Order string
	// Older: the loader would prefer what runs; only an order may ask for it.
	Older bool
}

// UpdateFacts are what a node knows when it plans.
type UpdateFacts struct {
	Meta Meta
	// Running is the slot under the root file system (the device below
	// dm-verity), never what a file name says.
	Running SlotID
	// Counted: the running system was started with a counter and has not
	// been blessed.
	Counted bool
	// Noted: this start is counted in Meta.Starts.
	Noted bool
	// Health is the gate's verdict, and why.
	Health Verdict
	Why    string

	// Files are all files below EFI/Linux, sorted by name.
	Files []BootFile
	// Next is the boot file, without counter, that the loader would start at the
	// next power-on (package bootmodel).
	Next string
	// StagedWhole: the hidden file of Target is there, and its bytes are those
	// of the manifest.
	StagedWhole bool
	// Writable and Free (bytes) are about the ESP.
	Writable bool
	Free     int64

	// Target is nil when nothing is wanted.
	Target *Target
	// NeedsSnapshot: this node is a server and has taken no snapshot for
	// Target yet.
	NeedsSnapshot bool
	// MayFlip: maintenance window, the site's lock, the drain; Blocker says
	// what is missing.
	MayFlip bool
	Blocker string
}

// UpdateKind is one thing to do.
type UpdateKind uint8

const (
	// UpdateWait does nothing.
	UpdateWait UpdateKind = iota
	// WriteMeta writes Meta.
	WriteMeta
	// RemoveFile removes File from EFI/Linux.
	RemoveFile
	// RenameFile gives File the name To.
	RenameFile
	// WriteImage goes on writing the image into Slot from Meta.Update.Verified,
	// verifying what it wrote; it notes its progress in Meta.Update.Verified.
	WriteImage
	// StageFile writes the boot file as File and reads it back.
	StageFile
	// TakeEtcdSnapshot takes one and copies it off the node.
	TakeEtcdSnapshot
	// SetOneShot makes the loader start what matches File, once.
	SetOneShot
	// Restart restarts through the firmware, never by kexec.
	Restart
	numUpdateKinds
)

var updateKindNames = [numUpdateKinds]string{"wait", "write-meta", "remove-file", "rename-file", "write-image", "stage-file",
	"take-snapshot", "set-one-shot", "restart"}

// String returns the name of the kind.
func (k UpdateKind) String() string {
	if int(k) < len(updateKindNames) {
		return updateKindNames[k]
	}
	return fmt.Sprintf("update-kind(%d)", uint8(k))
}

// UpdateAction is one thing to do, and why. Each is on disk before the next
// begins; all may be repeated after a power cut.
type UpdateAction struct {
	Kind     UpdateKind
	Reason   string
	Meta     *Meta
	Slot     SlotID
	File, To string
}

// PlanUpdate says where the node stands with its system and what to do next.
// Like every plan it is made anew after each list of actions.
func PlanUpdate(f UpdateFacts) (UpdateState, []UpdateAction) {
	if !f.Noted {
		m := f.Meta
		m.Starts++
		// A system runs: whoever wanted recovery had it, or has to say it again.
		m.Recovery = ""
		if s := &m.Slots[f.Running]; f.Counted && s.State == SlotStaged {
			s.State = SlotTrying
		}
		return Judging, []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "The system has started; I count the start."}}
	}
	if a := f.tidy(); a != nil {
		return Judging, a
	}
	if a := f.finishWayBack(); a != nil {
		return Judging, a
	}
	if f.Counted || f.Meta.Slots[f.Running].State == SlotTrying || f.Meta.Starts > 0 {
		if s, a := f.judge(); a != nil {
			return s, a
		}
	}
	if a := f.spent(); a != nil {
		return Judging, a
	}
	return f.towards()
}

func wait(s UpdateState, why string) (UpdateState, []UpdateAction) {
	return s, []UpdateAction{{Kind: UpdateWait, Reason: why}}
}

func (f *UpdateFacts) file(base string) *BootFile {
	for i := range f.Files {
		if f.Files[i].Base == base {
			return &f.Files[i]
		}
	}
	return nil
}

// tidy removes what a power cut left double: a name without counter is written
// only for a system that was found healthy, so that it counts more than the
// one with a counter.
func (f *UpdateFacts) tidy() []UpdateAction {
	if !f.Writable {
		return nil
	}
	for _, x := range f.Files {
		for _, y := range f.Files {
			if x.Base == y.Base && x.Name != y.Name && (x.Left > y.Left || x.Left == y.Left && x.Done < y.Done) {
				return []UpdateAction{{Kind: RemoveFile, File: x.Name, Reason: "A power cut left two names of one boot file."}}
			}
		}
	}
	return nil
}

// judge carries out the gate's verdict on the running system.
func (f *UpdateFacts) judge() (UpdateState, []UpdateAction) {
	slot := f.Meta.Slots[f.Running]
	verdict, why := f.Health, f.Why
	if verdict == Undecided && f.Counted && f.Meta.Starts >= MaxStarts {
		verdict, why = Failed, fmt.Sprintf("started %d times without becoming healthy", f.Meta.Starts)
	}
	entry := f.file(slot.Entry)
	switch verdict {
	case Undecided:
		return wait(Judging, "The system is not known to be healthy: "+why+".")
	case Healthy:
		if slot.State == SlotBad {
			// It was judged, and runs because nothing else does: it is not
			// blessed again, and may still be replaced.
			if f.Meta.Starts == 0 {
				return 0, nil
			}
			m := f.Meta
			m.Starts = 0
			return Judging, []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "The system is healthy, although it is marked bad."}}
		}
		if entry != nil && entry.Left >= 0 {
			if !f.Writable {
				return wait(Held, "The system is healthy, but the ESP cannot be written, so that I cannot say so to the loader.")
			}
			return Judging, []UpdateAction{{Kind: RenameFile, File: entry.Name, To: entry.Base, Reason: "The system is healthy; it stays."}}
		}
		if slot.State != SlotGood || f.Meta.Starts > 0 {
			m := f.Meta
			s := &m.Slots[f.Running]
			s.State, s.Rounds, s.Reason = SlotGood, 0, ""
			m.Starts = 0
			return Judging, []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "The system is healthy."}}
		}
		return 0, nil
	}
	if !f.Counted {
		// It was good before: there is nothing better to go back to by itself.
		return wait(Held, "The system is not healthy: "+why+". It was healthy before, so that I stay.")
	}
	m := f.Meta
	s := &m.Slots[f.Running]
	var acts []UpdateAction
	if s.State != SlotBad {
		s.State, s.Reason = SlotBad, clipReason(why)
		m = m.WithFailed(FailedImage{Image: s.Image, Version: s.Version, Reason: clipReason(why), At: m.Floor})
		acts = append(acts, UpdateAction{Kind: WriteMeta, Meta: &m, Reason: "The new system does not work here: " + why + "."})
	}
	switch before := f.Meta.Slots[f.Running.Other()]; {
	case entry == nil || entry.Left <= 0:
	case !f.Writable:
		acts = append(acts, UpdateAction{Kind: SetOneShot, File: pattern(before.Entry), Reason: "The ESP cannot be written; this way the loader goes back, once."})
	default:
		acts = append(acts, UpdateAction{Kind: RenameFile, File: entry.Name, To: CountedName(entry.Base, 0, entry.Done), Reason: "The loader shall not try it again."})
	}
	return Judging, append(acts, UpdateAction{Kind: Restart, Reason: "I go back to the system before: " + why + "."})
}

// finishWayBack goes on with a way back that a person began and the power cut:
// the record says that the running system is bad, and its boot file does not
// yet. It needs a system to go back to; the name that says so ends it.
func (f *UpdateFacts) finishWayBack() []UpdateAction {
	slot, before := f.Meta.Slots[f.Running], f.Meta.Slots[f.Running.Other()]
	entry := f.file(slot.Entry)
	if f.Counted || slot.State != SlotBad || before.State != SlotGood || f.file(before.Entry) == nil || entry == nil || entry.Left == 0 || !f.Writable {
		return nil
	}
	return []UpdateAction{
		{Kind: RenameFile, File: entry.Name, To: CountedName(entry.Base, 0, max(entry.Done, 0)), Reason: "This system was marked bad: " + slot.Reason + "."},
		{Kind: Restart, Reason: "I go back to the system before: " + slot.Reason + "."},
	}
}

// pattern matches a boot file with and without counter.
func pattern(entry string) string {
	return strings.TrimSuffix(entry, ".efi") + "*"
}

// CountedName is base ("edge-1.efi") with a counter, as systemd-boot writes it
// (Automatic Boot Assessment). What does not end in .efi takes none.
func CountedName(base string, left, done int) string {
	n := len(base) - len(".efi")
	if n < 0 || !strings.EqualFold(base[n:], ".efi") {
		return base
	}
	if done > 0 {
		return fmt.Sprintf("%s+%d-%d%s", base[:n], left, done, base[n:])
	}
	return fmt.Sprintf("%s+%d%s", base[:n], left, base[n:])
}

func clipReason(s string) string { return s[:min(len(s), maxReason)] }

// spent looks at a new system that used up its tries without ever saying
// anything: the running system is the one before it.
func (f *UpdateFacts) spent() []UpdateAction {
	other := f.Running.Other()
	slot := f.Meta.Slots[other]
	if slot.State != SlotStaged && slot.State != SlotTrying {
		return nil
	}
	e := f.file(slot.Entry)
	switch {
	case e == nil || e.Left > 0:
		return nil
	case e.Left < 0:
		// Blessed, and the record does not know yet.
		m := f.Meta
		m.Slots[other].State = SlotGood
		return []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "The other system was found healthy before."}}
	}
	m := f.Meta
	s := &m.Slots[other]
	s.Rounds++
	if s.Rounds < MaxRounds {
		if !f.Writable {
			return nil
		}
		// The name first: a cut between the two gives it one round more, and
		// never one less.
		s.State = SlotStaged
		return []UpdateAction{
			{Kind: RenameFile, File: e.Name, To: StagedPrefix + e.Base, Reason: "The new system never came up. That can be power that failed; it gets one more round."},
			{Kind: WriteMeta, Meta: &m, Reason: "I count the rounds of the new system."},
		}
	}
	why := fmt.Sprintf("it used up its tries %d times without coming up", s.Rounds)
	s.State, s.Reason = SlotBad, why
	m = m.WithFailed(FailedImage{Image: s.Image, Version: s.Version, Reason: why, At: m.Floor})
	return []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "The new system does not come up here: " + why + "."}}
}

// towards goes from a healthy system to the wanted one.
func (f *UpdateFacts) towards() (UpdateState, []UpdateAction) {
	t := f.Target
	running := f.Meta.Slots[f.Running]
	if t == nil || t.Image == running.Image {
		if running.State == SlotBad {
			return wait(Held, "This system is marked bad ("+running.Reason+") and runs because no other does.")
		}
		if a := f.preferRunning(); a != nil {
			return UpToDate, a
		}
		return wait(UpToDate, "The system is the wanted one.")
	}
	if bad, ok := f.Meta.HasFailed(t.Image); ok {
		return wait(RolledBack, "Version "+t.Version+" failed here before ("+bad.Reason+"). An order must clear that.")
	}
	if t.Older && t.Order == "" {
		return wait(Held, "Version "+t.Version+" is older than the one that runs; only an order may go back.")
	}
	other := f.Running.Other()
	slot := f.Meta.Slots[other]
	if slot.Image == t.Image && slot.State >= SlotStaged {
		return f.flip(other, slot)
	}
	return f.write(other, slot)
}

// preferRunning makes the loader prefer the running system after an ordered
// way back: the newer one is kept as a last resort.
func (f *UpdateFacts) preferRunning() []UpdateAction {
	other := f.Meta.Slots[f.Running.Other()]
	if f.Next != other.Entry || !f.Writable {
		return nil
	}
	if e := f.file(other.Entry); e != nil && e.Left != 0 {
		return []UpdateAction{{Kind: RenameFile, File: e.Name, To: CountedName(e.Base, 0, max(e.Done, 0)), Reason: "The other system is kept as a last resort."}}
	}
	return nil
}

// write brings the image into the other slot.
func (f *UpdateFacts) write(other SlotID, slot Slot) (UpdateState, []UpdateAction) {
	t := f.Target
	if !f.Writable {
		return wait(Held, "The ESP cannot be written; it may be damaged.")
	}
	u := f.Meta.Update
	if u == nil || u.Slot != other || u.Image != t.Image || slot.State != SlotWriting {
		m := f.Meta
		m.Slots[other] = Slot{State: SlotWriting, Entry: slot.Entry}
		m.Update = &SlotUpdate{Slot: other, Image: t.Image, Order: t.Order, Downgrade: t.Older}
		return WritingSlot, []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "Version " + t.Version + " goes into slot " + other.String() + "."}}
	}
	// The old boot file goes first: its slot is about to become invalid. So
	// does what an attempt before this one staged.
	keep := f.Meta.Slots[f.Running].Entry
	for _, x := range f.Files {
		if stale := x.Base == slot.Entry && x.Base != keep; stale || strings.HasPrefix(x.Name, StagedPrefix) && x.Name != StagedPrefix+t.Entry {
			return WritingSlot, []UpdateAction{{Kind: RemoveFile, File: x.Name, Reason: "Its slot is about to be written."}}
		}
	}
	if e := f.file(t.Entry); e != nil {
		if t.Entry == keep {
			return wait(Held, "Version "+t.Version+" has the same boot file name as the one that runs; it cannot be told apart.")
		}
		return WritingSlot, []UpdateAction{{Kind: RemoveFile, File: e.Name, Reason: "Its slot is about to be written."}}
	}
	if u.Verified < t.Size {
		return WritingSlot, []UpdateAction{{Kind: WriteImage, Slot: other, Reason: "I write version " + t.Version + " into slot " + other.String() + "."}}
	}
	if !f.StagedWhole {
		if f.Free < 2*t.BootSize {
			return wait(Held, fmt.Sprintf("The ESP has %d MB free, and the update needs %d.", f.Free>>20, 2*t.BootSize>>20))
		}
		return WritingSlot, []UpdateAction{{Kind: StageFile, File: StagedPrefix + t.Entry, Reason: "The boot file comes beside it, still hidden."}}
	}
	m := f.Meta
	m.Slots[other] = Slot{State: SlotStaged, Image: t.Image, Name: t.Name, Version: t.Version, Entry: t.Entry, K3s: t.K3s, Etcd: t.Etcd}
	m.Update = nil
	return WritingSlot, []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "Version " + t.Version + " is written and verified."}}
}

// flip makes the loader try the other slot.
func (f *UpdateFacts) flip(other SlotID, slot Slot) (UpdateState, []UpdateAction) {
	t := f.Target
	if slot.State == SlotBad {
		return wait(RolledBack, "Slot "+other.String()+" is bad: "+slot.Reason+".")
	}
	var pre []UpdateAction
	if t.Older {
		// Newer systems come first in the loader's list.
		pre = []UpdateAction{{Kind: SetOneShot, File: pattern(slot.Entry), Reason: "The older system is to be started once, to be judged."}}
	}
	snapshot := []UpdateAction{{Kind: TakeEtcdSnapshot, Reason: "A snapshot comes before another version."}}
	if e := f.file(slot.Entry); e != nil {
		if f.NeedsSnapshot {
			return ReadyToFlip, snapshot
		}
		if !f.MayFlip {
			return wait(ReadyToFlip, "Version "+t.Version+" is to be tried; I wait: "+f.Blocker+".")
		}
		if f.Next != slot.Entry && e.Left == 0 {
			if !f.Writable {
				return wait(Held, "The ESP cannot be written; it may be damaged.")
			}
			// It was kept as a last resort; now it is wanted again.
			pre = append([]UpdateAction{{Kind: RenameFile, File: e.Name, To: CountedName(e.Base, Tries, 0),
				Reason: "From now on the loader tries version " + t.Version + " again."}}, pre...)
		}
		return Flipping, append(pre, UpdateAction{Kind: Restart, Reason: "I start version " + t.Version + "."})
	}
	if !f.Writable {
		return wait(Held, "The ESP cannot be written; it may be damaged.")
	}
	if !f.StagedWhole {
		m := f.Meta
		m.Slots[other] = Slot{State: SlotWriting}
		m.Update = &SlotUpdate{Slot: other, Image: t.Image, Order: t.Order, Verified: 0, Downgrade: t.Older}
		if _, err := slot.State.MoveTo(SlotWriting); err != nil {
			m.Slots[other], m.Update = slot, nil
			m.Slots[other].State, m.Slots[other].Reason = SlotBad, "its boot file is damaged"
		}
		return WritingSlot, []UpdateAction{{Kind: WriteMeta, Meta: &m, Reason: "The hidden boot file is gone or damaged; I write the slot again."}}
	}
	switch {
	case f.NeedsSnapshot:
		return ReadyToFlip, snapshot
	case !f.MayFlip:
		return wait(ReadyToFlip, "Version "+t.Version+" is ready; I wait: "+f.Blocker+".")
	}
	return Flipping, append([]UpdateAction{{Kind: RenameFile, File: StagedPrefix + slot.Entry, To: CountedName(slot.Entry, Tries, 0),
		Reason: "From now on the next start tries version " + t.Version + "."}}, append(pre, UpdateAction{Kind: Restart, Reason: "I start version " + t.Version + "."})...)
}

// MarkBad returns m after a person said that slot is bad.
func (m Meta) MarkBad(slot SlotID, why string) (Meta, error) {
	s := m.Slots[slot]
	to, err := s.State.MoveTo(SlotBad)
	if err != nil {
		return m, err
	}
	s.State, s.Reason = to, clipReason(why)
	m.Slots[slot] = s
	m.Failed = slices.Clone(m.Failed)
	return m.WithFailed(FailedImage{Image: s.Image, Version: s.Version, Reason: clipReason(why), At: m.Floor}), nil
}

// Forgive returns m after it was said that image shall be tried again; a zero
// image means all. A slot that holds it is written anew: what is in it may be
// why it failed.
func (m Meta) Forgive(image Digest, running SlotID) Meta {
	m = m.WithoutFailed(image)
	other := running.Other()
	if s := m.Slots[other]; s.State == SlotBad && (image.IsZero() || s.Image == image) {
		m.Slots[other] = Slot{State: SlotWriting, Entry: s.Entry}
		m.Update = nil
	}
	return m
}
