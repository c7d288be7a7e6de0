package firmware

import (
	"fmt"
	"strings"
)

// Cause is why a machine is in recovery.
type Cause uint8

const (
	// CauseNew: no disk of this machine is ours, so that there was nothing else
	// to start.
	CauseNew Cause = iota
	// CauseAsked: an order or a person sent it here.
	CauseAsked
	// CauseNoSystem: no slot can be started any more.
	CauseNoSystem
	// CauseSystem: a system that was good before gave up on its way up.
	CauseSystem
	// CauseFirmware: the firmware passed over the boot loader or a boot file.
	CauseFirmware
	// CauseMedium: it came over the network or from a medium, beside a system
	// that could be started.
	CauseMedium
	numCauses
)

var causeNames = [numCauses]string{"new", "asked", "no-system", "system", "firmware", "medium"}

// String returns the cause in a word.
func (c Cause) String() string {
	if int(c) < len(causeNames) {
		return causeNames[c]
	}
	return fmt.Sprintf("cause(%d)", uint8(c))
}

// NeedsPerson: the machine did not come here because somebody wanted it.
func (c Cause) NeedsPerson() bool {
	return c == CauseNoSystem || c == CauseSystem || c == CauseFirmware
}

// RecoveryFacts are what a machine in recovery knows of its way there.
type RecoveryFacts struct {
	// Loader is the entry that the boot loader chose in this start, "" if it
	// did not run.
	Loader string
	// Entry is the title of the firmware's boot entry of this start, "" if it
	// has none.
	Entry string
	// Ours: there is a disk with our partitions. The rest is about it.
	Ours bool
	// Meta is its record; MetaWhy says why there is none.
	Meta    Meta
	MetaWhy string
	// Files are those below EFI/Linux; FilesWhy says why they are not known.
	Files    []BootFile
	FilesWhy string
}

// WhyRecovery says why a machine is in recovery, in one or two sentences for a
// screen and for the centre; "" for a machine that is new.
func WhyRecovery(f RecoveryFacts) (Cause, string) {
	if !f.Ours {
		return CauseNew, ""
	}
	if f.MetaWhy != "" {
		return CauseNoSystem, "The disk is ours, and its record cannot be read: " + f.MetaWhy + "."
	}
	if f.Meta.Recovery != "" {
		return CauseAsked, "Recovery was asked for: " + strings.TrimRight(f.Meta.Recovery, ". ") + "."
	}
	var slots []string
	startable := 0
	for i := range f.Meta.Slots {
		text, ok := f.slot(SlotID(i))
		if ok {
			startable++
		}
		slots = append(slots, "slot "+SlotID(i).String()+" "+text)
	}
	both := strings.Join(slots, "; ") + "."
	switch {
	case f.FilesWhy != "":
		return CauseNoSystem, "The ESP cannot be read: " + f.FilesWhy + ". By the record, " + both
	case startable == 0 && f.Meta.Update != nil && f.Meta.Installed == "":
		return CauseNoSystem, "An install was interrupted: " + both
	case startable == 0:
		return CauseNoSystem, "No system of this disk starts: " + both
	case IsRecovery(f.Loader):
		// It is behind every slot that could be started, unless it is asked
		// for by name.
		return CauseSystem, "A system that was good before did not come up and sent me here: " + both
	case f.Loader != "":
		return CauseFirmware, "The firmware could not start " + f.Loader + " (damaged, or its signature is refused): " + both
	case f.Entry == TitleRecovery:
		return CauseFirmware, "The firmware started me by my own entry: the boot loader and its copy do not start, or somebody chose me in the firmware's boot menu; " + both
	}
	return CauseMedium, "The firmware started me from the network or a medium, before the disk or instead of it; " + both
}

// slot says how a slot is, and whether the loader could start it before
// recovery.
func (f RecoveryFacts) slot(id SlotID) (string, bool) {
	s := f.Meta.Slots[id]
	if s.State == SlotEmpty {
		return "is empty", false
	}
	what := strings.TrimSpace("with " + strings.TrimSpace(s.Name+" "+s.Version))
	e := fileOf(f.Files, s.Entry)
	tries := e != nil && e.Left != 0
	switch {
	case s.State == SlotWriting:
		return "was being written", false
	case s.State == SlotBad:
		return what + " is bad: " + s.Reason, tries
	case e == nil:
		return what + " has no boot file", false
	case !tries:
		return fmt.Sprintf("%s used up its %d tries without becoming healthy", what, max(e.Done, 1)), false
	case s.State == SlotGood:
		return what + " was found healthy before", true
	}
	return fmt.Sprintf("%s has %d tries left", what, e.Left), true
}
