package pxe

import (
	"fmt"
	"time"
)

// Rung is a way of telling firmware about the boot file in proxy mode.
type Rung uint8

// The rungs, in the order they are tried.
const (
	// RungDirect is a complete proxy offer with option 43 {6:8}, which EDK2
	// calls PXE10: "skip discovery, just use this file".
	RungDirect Rung = iota
	// RungBINL is an offer without option 43 and without a file: the client
	// comes to port 4011 for it. EDK2 before April 2017 drops every PXE10
	// proxy offer and needs this.
	RungBINL
	// RungGaveUp: the firmware reacts to neither.
	RungGaveUp
)

var rungNames = [...]string{"direct", "binl", "gave-up"}

// String returns "direct", "binl" or "gave-up".
func (r Rung) String() string {
	if int(r) < len(rungNames) {
		return rungNames[r]
	}
	return fmt.Sprintf("rung(%d)", uint8(r))
}

const (
	// climbAfter is the pause after an offer before another DISCOVER counts
	// as "the last offer did not work". EDK2 asks again after 4, 8, 16 and
	// 32 s; what comes sooner is a duplicate or a second boot entry.
	climbAfter = 2 * time.Second
	// coolDown ends a give-up, so that a later power cycle, perhaps with
	// other firmware settings, starts afresh.
	coolDown = time.Minute
	// freshAfter is the silence after which a DISCOVER is a new boot and not
	// a sign that the last offer failed.
	freshAfter = 90 * time.Second
)

// Ladder remembers, per MAC, which rung is being tried. The zero value is a
// machine never seen.
type Ladder struct {
	Rung Rung `json:"rung"`
	// Offered is when the last proxy offer went out, zero if none is open.
	Offered time.Time `json:"-"`
	// Worked is true once a fetch followed an offer on this rung.
	Worked bool `json:"worked"`
	// Start is the rung that worked last time, or RungDirect.
	Start Rung `json:"start"`
}

// next is the ladder when a DISCOVER arrives at now.
func (l Ladder) next(now time.Time) Ladder {
	since := now.Sub(l.Offered)
	switch {
	case l.Offered.IsZero():
		l.Rung = l.Start
	case l.Rung == RungGaveUp:
		if since >= coolDown {
			l = Ladder{Start: l.Start, Rung: l.Start}
		}
	case since < climbAfter:
		// Same rung: a duplicate.
	case since >= freshAfter:
		l.Rung = l.Start
	case l.Start == RungBINL && l.Rung == RungBINL:
		// The rung that used to work failed: try the other one once.
		l.Start, l.Rung = RungDirect, RungDirect
	default:
		l.Rung++
	}
	return l
}

// Fetched records that the machine asked for the file: this rung works.
func (l Ladder) Fetched() Ladder {
	if l.Rung != RungGaveUp {
		l.Start = l.Rung
		l.Worked = true
	}
	l.Offered = time.Time{}
	return l
}
