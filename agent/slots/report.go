package slots

import (
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// states are the centre's words for the planner's.
var states = map[string]fleet.SystemState{
	firmware.UpToDate.String(): fleet.SystemCurrent, firmware.Judging.String(): fleet.SystemTrying, firmware.WritingSlot.String(): fleet.SystemWriting,
	firmware.ReadyToFlip.String(): fleet.SystemWaiting, firmware.Flipping.String(): fleet.SystemRestarting,
	firmware.RolledBack.String(): fleet.SystemRolledBack, firmware.Held.String(): fleet.SystemFailed,
}

// Report is what the centre is told. stack is that of the charter; warnings are
// others'.
func (n Now) Report(stack *fleet.StackRef, warnings []string) fleet.SystemReport {
	r := fleet.SystemReport{Slot: n.Slot, State: states[n.State], Percent: n.Percent, Reason: clip(n.Reason), Warnings: warnings[:min(len(warnings), fleet.MaxSystemWarnings)]}
	if !n.Image.IsZero() {
		r.ImageSHA256 = n.Image[:]
	}
	for _, s := range n.Slots {
		if s.Image == n.Image && s.Name != "" {
			r.Image = s.Name + "@" + s.Version
		}
	}
	r.Target = n.Wanted
	if n.Wanted == "" && r.State == fleet.SystemCurrent {
		r.Stack = stack
	}
	for _, f := range n.Failed[max(0, len(n.Failed)-fleet.MaxFailedImages):] {
		r.Failed = append(r.Failed, fleet.FailedImage{SHA256: f.Image[:], Image: f.Version, Reason: clip(f.Reason), At: f.At})
	}
	return r
}
