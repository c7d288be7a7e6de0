package pxe

import (
	"fmt"
	"net/netip"
	"time"
)

// State is how far a machine's network boot has come, as seen from here.
//
//	            +--------> refused    (silent on purpose, with a reason)
//	            |
//	seen ---> offered --> bound --> fetching --> served --> called-home
//	            |            |        ^  |
//	            |            +--------+  +--> seen   (aborted, or power cycle)
//	            +--> fetching (proxy mode: the other server binds)
//	            +--> gave-up  (the firmware ignores what we say)
//
// Every state can go back to seen: power cycles are normal.
type State uint8

// The states of a machine.
const (
	StateSeen State = iota
	StateRefused
	StateOffered
	StateBound
	StateFetching
	StateServed
	StateCalledHome
	StateGaveUp
)

var stateNames = [...]string{"seen", "refused", "offered", "bound", "fetching", "served", "called-home", "gave-up"}

var stateMoves = map[State][]State{
	StateSeen:       {StateRefused, StateOffered, StateBound, StateFetching, StateCalledHome, StateGaveUp},
	StateRefused:    {StateSeen, StateOffered, StateBound, StateFetching, StateCalledHome},
	StateOffered:    {StateSeen, StateRefused, StateBound, StateFetching, StateCalledHome, StateGaveUp},
	StateBound:      {StateSeen, StateRefused, StateOffered, StateFetching, StateCalledHome},
	StateFetching:   {StateSeen, StateRefused, StateOffered, StateServed, StateCalledHome},
	StateServed:     {StateSeen, StateRefused, StateOffered, StateFetching, StateCalledHome},
	StateCalledHome: {StateSeen, StateRefused, StateOffered},
	StateGaveUp:     {StateSeen, StateRefused, StateOffered, StateFetching, StateCalledHome},
}

// String returns the word used in events.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *State) UnmarshalText(b []byte) error {
	for i, n := range stateNames {
		if n == string(b) {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("pxe: read state: unknown word %q", clip(string(b), 40))
}

// MoveTo returns to if the table of moves allows s -> to, else s and an error.
func (s State) MoveTo(to State) (State, error) {
	for _, m := range stateMoves[s] {
		if m == to {
			return to, nil
		}
	}
	return s, fmt.Errorf("pxe: machine cannot go from %s to %s", s, to)
}

// Event is one line for the person watching: one machine made one step, or
// (with a zero MAC) something happened that concerns all.
type Event struct {
	Time time.Time  `json:"time"`
	MAC  MAC        `json:"mac"`
	UUID UUID       `json:"-"`
	Arch Arch       `json:"arch"`
	Addr netip.Addr `json:"addr,omitzero"`
	// Step is the machine's state after the step. In an alarm it has no
	// meaning.
	Step State `json:"step"`
	// Alarm is true for what an operator must act on.
	Alarm bool `json:"alarm,omitempty"`
	// Text is one sentence. It never holds raw bytes of a client.
	Text string `json:"text"`
}

// String renders the event as one line without its time.
func (e Event) String() string {
	who := e.MAC.String()
	if e.MAC == (MAC{}) {
		who = "-"
	}
	step := e.Step.String()
	if e.Alarm {
		step = "ALARM"
	}
	if e.Addr.IsValid() {
		return fmt.Sprintf("%-17s %-11s %s (%s)", who, step, e.Text, e.Addr)
	}
	return fmt.Sprintf("%-17s %-11s %s", who, step, e.Text)
}
