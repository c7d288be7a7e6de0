package agent

import (
	"fmt"
	"slices"
)

// State is where a machine in the recovery image stands. It is what people
// on site see, and what scenarios wait for on the serial console.
//
//	booting -> network -> time -> enrolling -> waiting-for-approval -> enrolled
//	               ^________|_________|______________|________________|
//	                              (the network went away)
//
//	booting -> scanning -> scanned          (an image for a warehouse)
//
// failed is a state to leave: it says what is wrong (no TPM, unreadable
// site.json) while the machine keeps looking. The moves are in moves.
type State uint8

const (
	// Booting: file systems, clock, modules.
	Booting State = iota
	// Network: no address yet, or none any more.
	Network
	// Time: an address is there; the centre has not answered yet, so the
	// clock is only known to be at or after the floor.
	Time
	// Enrolling: the centre answers and the machine is proving itself.
	Enrolling
	// WaitingForApproval: a request is filed; a person or a rule decides.
	WaitingForApproval
	// Enrolled: certificate in hand, waiting for orders.
	Enrolled
	// Scanning: reading the TPM and looking for the stick.
	Scanning
	// Scanned: the machine is on the stick's list; nothing follows but taking
	// the stick out.
	Scanned
	// Failed: something on this machine stands in the way; the text says what.
	Failed
)

var stateNames = [...]string{"booting", "network", "time", "enrolling", "waiting-for-approval", "enrolled", "scanning", "scanned", "failed"}

var moves = map[State][]State{
	Booting:            {Network, Scanning, Failed},
	Network:            {Time, Enrolling, WaitingForApproval, Enrolled, Failed},
	Time:               {Network, Enrolling, Failed},
	Enrolling:          {Network, Time, WaitingForApproval, Enrolled, Failed},
	WaitingForApproval: {Network, Time, Enrolling, Enrolled, Failed},
	Enrolled:           {Network, Enrolling, Failed},
	Scanning:           {Scanned, Failed},
	Failed:             {Network, Time, Enrolling, Scanning, Scanned},
}

// String returns the word printed on consoles.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// MoveTo returns to if the table of moves allows s -> to. Staying is allowed:
// the text of a state may change.
func (s State) MoveTo(to State) (State, error) {
	if s == to && int(s) < len(stateNames) || slices.Contains(moves[s], to) {
		return to, nil
	}
	return s, fmt.Errorf("agent: machine cannot go from %s to %s", s, to)
}
