package firmware

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestWhyRecovery(t *testing.T) {
	good := Slot{State: SlotGood, Name: "edge", Version: "1", Entry: "edge-1.efi", Image: Digest{1}}
	trying := Slot{State: SlotStaged, Name: "edge", Version: "2", Entry: "edge-2.efi", Image: Digest{2}}
	bad := Slot{State: SlotBad, Name: "edge", Version: "3", Entry: "edge-3.efi", Image: Digest{3}, Reason: "k3s does not stay up"}
	file := func(base string, left, done int) BootFile {
		name := base
		if left >= 0 {
			name = CountedName(base, left, done)
		}
		return BootFile{Name: name, Base: base, Left: left, Done: done}
	}
	rec := BootFile{Name: "recovery-7.efi", Base: "recovery-7.efi", Left: -1}
	for name, c := range map[string]struct {
		f     RecoveryFacts
		cause Cause
		says  []string
	}{
		"new": {RecoveryFacts{}, CauseNew, nil},
		"ordered": {RecoveryFacts{Ours: true, Loader: "recovery-7.efi", Meta: Meta{Slots: [2]Slot{good}, Recovery: "order o-1: a new disk comes"}, Files: []BootFile{file("edge-1.efi", -1, 0), rec}},
			CauseAsked, []string{"asked for", "order o-1: a new disk comes."}},
		"both used up": {RecoveryFacts{Ours: true, Loader: "recovery-7.efi", Meta: Meta{Slots: [2]Slot{bad, trying}}, Files: []BootFile{file("edge-2.efi", 0, 3), file("edge-3.efi", 0, 1), rec}},
			CauseNoSystem, []string{"No system of this disk starts", "slot a with edge 3 is bad: k3s does not stay up", "slot b with edge 2 used up its 3 tries"}},
		"the only one used up": {RecoveryFacts{Ours: true, Loader: "recovery-7.efi", Meta: Meta{Slots: [2]Slot{trying}}, Files: []BootFile{file("edge-2.efi", 0, 3), rec}},
			CauseNoSystem, []string{"slot a with edge 2 used up", "slot b is empty"}},
		"a good one gave up": {RecoveryFacts{Ours: true, Loader: "recovery-7.efi", Meta: Meta{Slots: [2]Slot{good, bad}}, Files: []BootFile{file("edge-1.efi", -1, 0), file("edge-3.efi", 0, 1), rec}},
			CauseSystem, []string{"did not come up and sent me here", "slot a with edge 1 was found healthy before"}},
		"its boot file is gone": {RecoveryFacts{Ours: true, Loader: "recovery-7.efi", Meta: Meta{Slots: [2]Slot{good}}, Files: []BootFile{rec}},
			CauseNoSystem, []string{"slot a with edge 1 has no boot file"}},
		"a boot file that does not load": {RecoveryFacts{Ours: true, Loader: "edge-1.efi", Entry: TitleRecovery, Meta: Meta{Slots: [2]Slot{good}}, Files: []BootFile{file("edge-1.efi", -1, 0), rec}},
			CauseFirmware, []string{"could not start edge-1.efi"}},
		"no loader": {RecoveryFacts{Ours: true, Entry: TitleRecovery, Meta: Meta{Slots: [2]Slot{good}}, Files: []BootFile{file("edge-1.efi", -1, 0), rec}},
			CauseFirmware, []string{"by my own entry"}},
		"by the network": {RecoveryFacts{Ours: true, Entry: "UEFI PXEv4", Meta: Meta{Slots: [2]Slot{good}}, Files: []BootFile{file("edge-1.efi", -1, 0), rec}},
			CauseMedium, []string{"from the network or a medium"}},
		"half installed": {RecoveryFacts{Ours: true, Meta: Meta{Slots: [2]Slot{{State: SlotWriting, Entry: "edge-1.efi"}}, Update: &SlotUpdate{Order: "o-1"}}, Files: []BootFile{rec}},
			CauseNoSystem, []string{"interrupted", "slot a was being written"}},
		"no record": {RecoveryFacts{Ours: true, MetaWhy: "both copies are torn"}, CauseNoSystem, []string{"both copies are torn"}},
		"no ESP":    {RecoveryFacts{Ours: true, FilesWhy: "wrong fs type", Meta: Meta{Slots: [2]Slot{good}}}, CauseNoSystem, []string{"wrong fs type", "slot a"}},
	} {
		cause, text := WhyRecovery(c.f)
		if cause != c.cause {
			t.Errorf("%s: %s (%s), want %s", name, cause, text, c.cause)
		}
		for _, s := range c.says {
			if !strings.Contains(text, s) {
				t.Errorf("%s: %q does not say %q", name, text, s)
			}
		}
	}
}

// Whatever is on the disk: a sentence, and none that says two things.
func TestWhyRecoveryAlwaysSays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var f RecoveryFacts
		f.Ours = true
		f.Loader = rapid.SampledFrom([]string{"", "recovery-1.efi", "edge-1+2-1.efi", "x"}).Draw(t, "loader")
		f.Entry = rapid.SampledFrom([]string{"", TitleRecovery, TitleLoader}).Draw(t, "entry")
		for i := range f.Meta.Slots {
			f.Meta.Slots[i] = Slot{State: SlotState(rapid.IntRange(0, int(numSlotStates)-1).Draw(t, "state")), Entry: rapid.SampledFrom([]string{"", "a.efi", "b.efi"}).Draw(t, "file"), Reason: "x"}
		}
		for _, n := range []string{"a.efi", "b.efi"} {
			if rapid.Bool().Draw(t, n) {
				left := rapid.IntRange(-1, 3).Draw(t, "left")
				f.Files = append(f.Files, BootFile{Name: n, Base: n, Left: left})
			}
		}
		cause, text := WhyRecovery(f)
		if cause == CauseNew || !strings.HasSuffix(text, ".") || strings.Contains(text, "  ") || strings.Contains(text, "..") {
			t.Fatalf("%s: %q", cause, text)
		}
	})
}

// An order that was carried out once is never carried out again, whatever
// became of the slots since: what runs by now is newer.
func TestADoneInstallTouchesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := installFacts()
		d := f.Target
		d.Meta.Installed = "o"
		d.Meta.Slots[SlotA] = Slot{State: []SlotState{SlotWriting, SlotTrying, SlotGood, SlotBad}[rapid.IntRange(0, 3).Draw(t, "state")], Image: Digest{byte(rapid.IntRange(0, 2).Draw(t, "image"))}, Entry: "edge-1.efi"}
		d.FinalWhole, d.StagedWhole, d.Loader = rapid.Bool().Draw(t, "final"), rapid.Bool().Draw(t, "staged"), rapid.Bool().Draw(t, "loader")
		_, acts := PlanInstall(f)
		for _, a := range acts {
			if a.Kind != TellDone && a.Kind != InstallWait {
				t.Fatalf("%s: %s", a.Kind, a.Reason)
			}
		}
	})
}

// A system that spent its tries is not started in a circle, and a person who
// asked for recovery stays there.
func TestAnInstalledSystemIsNotStartedInACircle(t *testing.T) {
	for name, c := range map[string]struct {
		left     int
		recovery string
		restarts bool
	}{"fresh": {3, "", true}, "spent": {0, "", false}, "asked": {3, "a person: look", false}} {
		f := installFacts()
		f.Target.FinalWhole, f.Target.Loader, f.Target.Meta.Installed, f.Target.Meta.Recovery = true, true, "o", c.recovery
		f.Target.Meta.Slots[SlotA] = Slot{State: SlotStaged, Image: f.Image.SHA256, Entry: "edge-1.efi"}
		f.Target.Files = []BootFile{{Name: CountedName("edge-1.efi", c.left, 3-c.left), Base: "edge-1.efi", Left: c.left, Done: 3 - c.left}}
		_, acts := PlanInstall(f)
		restarts, done := false, false
		for _, a := range acts {
			restarts = restarts || a.Kind == RestartMachine
			done = done || a.Kind == TellDone
		}
		if restarts != c.restarts || !done {
			t.Errorf("%s: restarts %v, done %v: %+v", name, restarts, done, acts)
		}
	}
}
