package main

import (
	"fmt"
	"path/filepath"

	"github.com/muster-edge/muster/agent/slots"
	"github.com/muster-edge/muster/agent/slots/metal"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
)

// box is the installed system below this program: its disk and slots.
type box struct {
	run string
	sys disk.System
	esp *metal.ESP
}

// espDir is where the ESP is mounted, by `muster-node data` or by whoever
// needs it first.
func espDir(run string) string { return filepath.Join(run, "esp") }

// openBox finds the disk by the root file system. An error wraps
// disk.ErrNoSlot when no slot runs.
func openBox(run string) (*box, error) {
	sys, err := disk.Running("/")
	if err != nil {
		return nil, err
	}
	for _, label := range []string{firmware.LabelESP, firmware.LabelMeta, firmware.LabelData} {
		if sys.Parts[label] == "" {
			return nil, fmt.Errorf("muster-node: disk %s has no partition %q", sys.Disk, label)
		}
	}
	dir := espDir(run)
	if err := metal.MountESP(sys.Parts[firmware.LabelESP], dir); err != nil {
		return nil, err
	}
	return &box{run: run, sys: sys, esp: &metal.ESP{Dir: dir}}, nil
}

func (b *box) record() metal.Record { return metal.Record{Device: b.sys.Parts[firmware.LabelMeta]} }

func (b *box) running() (firmware.SlotID, error) { return b.sys.Slot, nil }

func (b *box) desk() slots.Desk {
	return slots.Desk{Record: b.record(), ESP: b.esp, Loader: metal.Loader{}, Running: b.running, Run: b.run}
}
