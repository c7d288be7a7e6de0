package firmware

import (
	"fmt"
	"slices"
)

// SlotID names one of the two places for a system.
type SlotID uint8

const (
	SlotA SlotID = iota
	SlotB
)

// String returns "a" or "b", as partitions are labelled.
func (s SlotID) String() string {
	if s <= SlotB {
		return string("ab"[s])
	}
	return fmt.Sprintf("slot(%d)", uint8(s))
}

// Other returns the other slot.
func (s SlotID) Other() SlotID { return SlotA + SlotB - s }

// SlotState is how far a slot is.
//
//	empty ---> writing ---> staged ---> trying ---> good
//	  ^          | ^          |  |        |          | |
//	  +----------+ |          |  +--------+--> bad <-+ |
//	             ^ +----------+              |         |
//	             +---------------------------+---------+
//
// A power cut changes no state: writing starts over, trying is tried again.
// Only a judgement of the health gate, a person or a file that proves to be
// damaged makes a slot bad.
type SlotState uint8

const (
	// SlotEmpty: nothing that could start.
	SlotEmpty SlotState = iota
	// SlotWriting: an image is being written; its boot file is gone.
	SlotWriting
	// SlotStaged: written, read back and verified; the boot file is there, with
	// its tries, or about to be renamed into place.
	SlotStaged
	// SlotTrying: it was started, and nobody has judged it yet.
	SlotTrying
	// SlotGood: the health gate said so.
	SlotGood
	// SlotBad: judged; it is started only when there is nothing else.
	SlotBad
	numSlotStates
)

var slotStateNames = [numSlotStates]string{"empty", "writing", "staged", "trying", "good", "bad"}

// String returns the state as shown and stored.
func (s SlotState) String() string {
	if int(s) < len(slotStateNames) {
		return slotStateNames[s]
	}
	return fmt.Sprintf("slot-state(%d)", uint8(s))
}

// MarshalText implements encoding.TextMarshaler.
func (s SlotState) MarshalText() ([]byte, error) {
	if int(s) >= len(slotStateNames) {
		return nil, fmt.Errorf("firmware: marshal slot state: no such value %d", s)
	}
	return []byte(slotStateNames[s]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *SlotState) UnmarshalText(b []byte) error {
	i := slices.Index(slotStateNames[:], string(b))
	if i < 0 {
		return fmt.Errorf("firmware: read slot state: %.40q is none of %v", b, slotStateNames)
	}
	*s = SlotState(i)
	return nil
}

var slotMoves = [numSlotStates][]SlotState{
	SlotEmpty:   {SlotWriting},
	SlotWriting: {SlotEmpty, SlotStaged},
	SlotStaged:  {SlotTrying, SlotWriting, SlotBad},
	SlotTrying:  {SlotGood, SlotBad},
	SlotGood:    {SlotBad, SlotWriting},
	SlotBad:     {SlotWriting, SlotGood},
}

// MoveTo returns to if the table allows s -> to; staying is always allowed.
// SlotBad to SlotGood is for a system that was judged wrongly, by an order.
func (s SlotState) MoveTo(to SlotState) (SlotState, error) {
	if s < numSlotStates && (s == to || slices.Contains(slotMoves[s], to)) {
		return to, nil
	}
	return s, fmt.Errorf("firmware: slot cannot go from %s to %s", s, to)
}
