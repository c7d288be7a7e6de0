package ether

import (
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"time"
)

// Faults is what befalls frames on one way. The zero value is a good cable.
type Faults struct {
	// Delay is added to every frame, and up to Jitter more to each. Neither
	// changes the order of frames.
	Delay, Jitter time.Duration
	// Loss, Duplicate and Reorder are probabilities from 0 to 1. A frame that
	// is reordered is held back so that later ones overtake it.
	Loss, Duplicate, Reorder float64
	// Bandwidth is in bits per second, counted without preamble and gap; 0:
	// no limit.
	Bandwidth int64
	// NoMulticast drops frames to group addresses but broadcasts (which ARP
	// needs), as switches do that filter what they believe nobody wants.
	NoMulticast bool
	// Cut lets nothing through.
	Cut bool
}

// heldBack is how much longer a reordered frame takes.
const heldBack = 20 * time.Millisecond

// Validate returns everything that is wrong, joined.
func (f Faults) Validate() error {
	var errs []error
	for _, p := range []struct {
		name string
		v    float64
	}{{"loss", f.Loss}, {"duplication", f.Duplicate}, {"reordering", f.Reorder}} {
		if !(p.v >= 0 && p.v <= 1) {
			errs = append(errs, fmt.Errorf("ether: %s of %v: want 0 to 1", p.name, p.v))
		}
	}
	if f.Delay < 0 || f.Jitter < 0 || f.Delay > time.Minute || f.Jitter > time.Minute {
		errs = append(errs, fmt.Errorf("ether: delay %v and jitter %v: want 0 to 1 min", f.Delay, f.Jitter))
	}
	if f.Bandwidth < 0 {
		errs = append(errs, fmt.Errorf("ether: bandwidth %d bit/s", f.Bandwidth))
	}
	return errors.Join(errs...)
}

// way is one direction between two ports, or of one port's cable: its faults
// and its dice.
type way struct {
	Faults
	dice *rand.Rand
	busy time.Time // until when the cable is sending
	last time.Time // between two ports: when the last frame in order is due
}

func newWay(seed uint64, name string) *way {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	return &way{dice: rand.New(rand.NewPCG(seed, h.Sum64()))}
}

// fate is what one frame gets on one way.
type fate struct {
	drop     drop
	due      time.Time
	again    bool // deliver it twice
	overtake bool // may be overtaken
}

// throw decides about a frame of n bytes that enters the way at a time. It
// always takes the same number of throws, so that a frame's fate does not
// depend on which faults were set before.
func (w *way) throw(at time.Time, n int, group, broadcast bool) fate {
	loss, twice, back, jitter := w.dice.Float64(), w.dice.Float64(), w.dice.Float64(), w.dice.Float64()
	f := fate{due: at}
	switch {
	case w.Cut:
		f.drop = dropCut
	case w.NoMulticast && group && !broadcast:
		f.drop = dropMulticast
	case loss < w.Loss:
		f.drop = dropLoss
	}
	if f.drop != dropNot {
		return f
	}
	f.again, f.overtake = twice < w.Duplicate, back < w.Reorder
	if w.Bandwidth > 0 {
		begin := f.due
		if w.busy.After(begin) {
			begin = w.busy
		}
		w.busy = begin.Add(time.Duration(float64(n) * 8 / float64(w.Bandwidth) * float64(time.Second)))
		f.due = w.busy
	}
	f.due = f.due.Add(w.Delay + time.Duration(jitter*float64(w.Jitter)))
	if f.overtake {
		f.due = f.due.Add(heldBack)
	}
	return f
}
