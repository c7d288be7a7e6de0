package slots

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/fleet"
)

// facts gathers what the plan needs.
func (k *Keeper) facts(ctx context.Context) (firmware.UpdateFacts, Wanted, error) {
	var f firmware.UpdateFacts
	var err error
	if f.Running, err = k.cfg.Running(); err != nil {
		return f, Wanted{}, err
	}
	var v View
	err = k.locked(func() error {
		if f.Meta, err = k.cfg.Record.Read(); err != nil {
			return err
		}
		v, err = k.cfg.ESP.Look()
		return err
	})
	if err != nil {
		return f, Wanted{}, err
	}
	f.Files, f.Next, f.Writable, f.Free = v.Files, v.Next, v.Writable, v.Free
	f.Counted = counted(f.Meta.Slots[f.Running].Entry, v.Files)
	f.Noted = k.startNoted()
	f.Health, f.Why = k.cfg.Gate.Judge(k.cfg.Health(ctx))
	w := k.cfg.Wanted(ctx)
	n, err := k.notes()
	if err != nil {
		return f, w, err
	}
	ref, order := w.Image, ""
	if p := n.Pin; p != nil && p.Stack == w.Stack {
		ref, order = &p.Image, p.Order
	}
	if ref == nil {
		return f, w, nil
	}
	t, err := k.cfg.Target(ctx, *ref)
	if err != nil {
		w.Why = "What it should run is not known in full: " + err.Error() + "."
		return f, w, nil
	}
	t.Order, t.Older = order, older(t, f.Meta.Slots[f.Running])
	f.Target = &t
	k.aboutTarget(ctx, &f, t)
	return f, w, nil
}

// older reports whether the loader would prefer what runs: by sort key, which
// is the image's name, then the newest version.
func older(t firmware.Target, run firmware.Slot) bool {
	if t.Name != run.Name {
		return run.Name != "" && t.Name > run.Name
	}
	return bootmodel.CompareVersions(t.Version, run.Version) < 0
}

// aboutTarget adds what matters only when something is wanted. The site is
// asked for a turn only by a node that has everything else.
func (k *Keeper) aboutTarget(ctx context.Context, f *firmware.UpdateFacts, t firmware.Target) {
	hidden := firmware.StagedPrefix + t.Entry
	if slices.ContainsFunc(f.Files, func(x firmware.BootFile) bool { return x.Name == hidden }) {
		whole, err := k.cfg.ESP.Whole(hidden, t.Image, t.BootSize)
		f.StagedWhole = err == nil && whole
	}
	other := f.Meta.Slots[f.Running.Other()]
	_, failed := f.Meta.HasFailed(t.Image)
	ready := !failed && other.Image == t.Image && other.State >= firmware.SlotStaged && other.State != firmware.SlotBad &&
		f.Meta.Slots[f.Running].Image != t.Image
	if !ready || f.Health != firmware.Healthy || f.Meta.Starts > 0 {
		f.Blocker = "it is not written yet"
		return
	}
	if f.NeedsSnapshot = k.cfg.Site.NeedsSnapshot(t.Image); f.NeedsSnapshot {
		return
	}
	f.MayFlip, f.Blocker = k.cfg.Site.Turn(ctx, t)
}

// counted reports whether the loader still counts the tries of entry: no name
// of it is without a counter.
func counted(entry string, files []firmware.BootFile) bool {
	found := false
	for _, x := range files {
		if x.Base == entry {
			if x.Left < 0 {
				return false
			}
			found = true
		}
	}
	return found
}

// tell keeps what people see.
func (k *Keeper) tell(state firmware.UpdateState, acts []firmware.UpdateAction, f firmware.UpdateFacts, w Wanted) {
	run := f.Meta.Slots[f.Running]
	n := Now{Slot: f.Running.String(), Image: run.Image, Version: run.Version, State: state.String(), Failed: f.Meta.Failed, Slots: f.Meta.Slots}
	if len(acts) > 0 {
		n.Reason = acts[len(acts)-1].Reason
	}
	if t := f.Target; t != nil && t.Image != run.Image {
		n.Wanted = t.Version
		n.NoReturn = run.Etcd != "" && t.Etcd != "" && run.Etcd != t.Etcd && !t.Older
		if u := f.Meta.Update; u != nil && t.Size > 0 {
			n.Percent = percent(u.Verified, t.Size)
		} else if f.Meta.Slots[f.Running.Other()].Image == t.Image {
			n.Percent = 100
		}
	} else if t == nil && w.Why != "" {
		n.Reason = w.Why
	}
	n.NeedsPerson = state == firmware.RolledBack || state == firmware.Held
	k.mu.Lock()
	k.troubles = 0
	k.mu.Unlock()
	k.show(n)
}

func percent(n, of int64) int { return int(min(max(n, 0), of) * 100 / of) }

func (k *Keeper) progress(verified int64, t *firmware.Target) {
	k.mu.Lock()
	n := k.now
	k.mu.Unlock()
	if t != nil && t.Size > 0 {
		n.Percent = percent(verified, t.Size)
		k.show(n)
	}
}

// Waiting says what keeps an image from coming, for people; "" when it comes.
// It is about a slot that is being written, and about nothing else.
func (k *Keeper) Waiting(why string) {
	k.mu.Lock()
	n := k.now
	k.mu.Unlock()
	if n.State != firmware.WritingSlot.String() {
		return
	}
	const waits = "I wait for the image: "
	switch {
	case why != "":
		n.Reason = waits + why
	case strings.HasPrefix(n.Reason, waits):
		n.Reason = "The image comes."
	default:
		return
	}
	k.show(n)
}

func (k *Keeper) show(n Now) {
	k.mu.Lock()
	changed := k.now.State != n.State || k.now.Reason != n.Reason || k.now.Percent/10 != n.Percent/10 || len(k.now.Failed) != len(n.Failed)
	k.now = n
	k.mu.Unlock()
	if changed && k.cfg.Tells != nil {
		k.cfg.Tells()
	}
}

// trouble shows an error that keeps the plan from being made or done.
func (k *Keeper) trouble(err error) {
	k.mu.Lock()
	n := k.now
	k.troubles++
	n.NeedsPerson = k.troubles >= many
	k.mu.Unlock()
	n.Reason = "I cannot look after my slots: " + err.Error()
	k.show(n)
}

// orders carries out the orders that change what the plan is made of. done:
// something was changed; look again.
func (k *Keeper) orders(ctx context.Context, f firmware.UpdateFacts, w Wanted) (done bool, err error) {
	n, err := k.notes()
	if err != nil {
		return false, err
	}
	if n.Deaf {
		return true, k.hearAgain(w.Orders)
	}
	for _, o := range w.Orders {
		if n.has(o.ID) {
			continue
		}
		if err := k.at("slots.order." + string(o.Kind) + ".begin"); err != nil {
			return false, err
		}
		switch o.Kind {
		case fleet.OrderClearFailed:
			err = k.clearFailed(o.Digest, f.Running)
		case fleet.OrderRecover:
			// The one-shot is set before the order is ticked off: a power cut in
			// between starts recovery once more, never once less.
			err = k.recovery("order " + o.ID + ": " + o.Reason)
		case fleet.OrderDowngrade:
			err = k.setPin(o, w.Stack)
		default:
			continue
		}
		if err != nil {
			return false, fmt.Errorf("slots: carry out order %s: %w", o.ID, err)
		}
		if err := k.at("slots.order." + string(o.Kind) + ".end"); err != nil {
			return false, err
		}
		if err := k.tick(o); err != nil {
			return false, err
		}
		if o.Kind == fleet.OrderRecover {
			if err := k.cfg.Loader.Restart(ctx, "An order sends me into recovery."); err != nil {
				return false, err
			}
			return true, errRestart
		}
		return true, nil
	}
	return false, nil
}
