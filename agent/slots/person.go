package slots

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/firmware"
)

// lockFile keeps the agent and a person's command from writing at once.
const lockFile = "slots.lock"

// ErrBusy: somebody else holds the lock.
var ErrBusy = errors.New("slots: the node agent is in the middle of a change; try again in a minute, or stop it (systemctl stop muster-agent)")

// Lock takes the lock in the volatile directory run for do. It waits up to
// half a minute: changes under it take seconds.
func Lock(run string, do func() error) error {
	if err := os.MkdirAll(run, 0o755); err != nil {
		return fmt.Errorf("slots: lock: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(run, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("slots: lock: %w", err)
	}
	defer f.Close()
	const tries, pause = 150, 200 * time.Millisecond
	for i := range tries {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return do()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("slots: lock: %w", err)
		}
		if i < tries-1 {
			time.Sleep(pause)
		}
	}
	return ErrBusy
}

func (k *Keeper) locked(do func() error) error { return Lock(k.cfg.Run, do) }

// Desk is what a person at the box works with. The agent need not run.
type Desk struct {
	Record  Record
	ESP     ESP
	Loader  Loader
	Running func() (firmware.SlotID, error)
	// Run is the agent's volatile directory: its lock is there.
	Run string
}

// Listing is what `muster-node slot list` prints.
type Listing struct {
	// Running is "" in recovery.
	Running string `json:"running"`
	// Next is the boot file that the next start takes, "" for none on the disk.
	Next  string `json:"next"`
	Slots []Row  `json:"slots"`
	// Failed are images that are not tried again here.
	Failed []firmware.FailedImage `json:"failed,omitempty"`
	// Recovery is why the next start is recovery, "" if it is not.
	Recovery string `json:"recovery,omitempty"`
}

// Row is one slot.
type Row struct {
	ID string `json:"slot"`
	firmware.Slot
	Running bool `json:"running"`
	// File is its boot file with its counter, "" if it has none.
	File string `json:"file"`
}

// List says how the slots are.
func (d Desk) List() (Listing, error) {
	l := Listing{}
	m, v, running, err := d.look()
	if err != nil {
		return l, err
	}
	l.Next, l.Failed, l.Recovery = v.Next, m.Failed, m.Recovery
	if running != nil {
		l.Running = running.String()
	}
	for i, s := range m.Slots {
		id := firmware.SlotID(i)
		r := Row{ID: id.String(), Slot: s, Running: running != nil && *running == id}
		for _, f := range v.Files {
			if f.Base == s.Entry && s.Entry != "" {
				r.File = f.Name
			}
		}
		l.Slots = append(l.Slots, r)
	}
	return l, nil
}

func (d Desk) look() (m firmware.Meta, v View, running *firmware.SlotID, err error) {
	if m, err = d.Record.Read(); err != nil {
		return
	}
	if v, err = d.ESP.Look(); err != nil {
		return
	}
	if id, err := d.Running(); err == nil {
		running = &id
	}
	return
}

// MarkBad says that the system in slot is not to be started again as long as
// there is another, nor written again before an order forgives it.
func (d Desk) MarkBad(slot firmware.SlotID, why string) error {
	return Lock(d.Run, func() error {
		m, v, running, err := d.look()
		if err != nil {
			return err
		}
		if running != nil && *running == slot {
			return fmt.Errorf("slots: slot %s runs; use rollback, which also restarts", slot)
		}
		return d.spoil(m, v, slot, why)
	})
}

// Rollback goes back to the system before and restarts. The record comes
// first: if the power fails before the boot file has its new name, the agent
// finishes what was begun (firmware.PlanUpdate).
func (d Desk) Rollback(why string, restart func() error) (from, to firmware.Slot, err error) {
	err = Lock(d.Run, func() error {
		m, v, running, err := d.look()
		if err != nil {
			return err
		}
		if running == nil {
			return errors.New("slots: no slot runs; from recovery, use the recovery menu")
		}
		from, to = m.Slots[*running], m.Slots[running.Other()]
		if to.State != firmware.SlotGood {
			return fmt.Errorf("slots: slot %s is %s: there is no system before this one that was found healthy; \"muster-node slot recover\" starts recovery", running.Other(), to.State)
		}
		return d.spoil(m, v, *running, why)
	})
	if err != nil {
		return from, to, err
	}
	return from, to, restart()
}

func (d Desk) spoil(m firmware.Meta, v View, slot firmware.SlotID, why string) error {
	next, err := m.MarkBad(slot, why)
	if err != nil {
		return err
	}
	if err := d.Record.Write(next); err != nil {
		return err
	}
	for _, f := range v.Files {
		if f.Base == m.Slots[slot].Entry && f.Left != 0 {
			return d.ESP.Rename(f.Name, firmware.CountedName(f.Base, 0, max(f.Done, 0)))
		}
	}
	return nil
}

// Recover makes the next start one of recovery and restarts.
func (d Desk) Recover(why string, restart func() error) error {
	if err := Lock(d.Run, func() error { return toRecovery(d.Record, d.Loader, why) }); err != nil {
		return err
	}
	return restart()
}

// Forgive forgets that an image failed here: what a clear-failed order does,
// for somebody who is at the box. A zero digest forgives all.
func (d Desk) Forgive(image firmware.Digest) error {
	return Lock(d.Run, func() error {
		m, _, running, err := d.look()
		if err != nil {
			return err
		}
		if running == nil {
			return errors.New("slots: no slot runs; forgive from the installed system")
		}
		return d.Record.Write(m.Forgive(image, *running))
	})
}
