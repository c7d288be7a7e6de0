package discovery

import "fmt"

// State is what is known of an address.
type State uint8

const (
	// Hinted: somebody named it; it was never dialled.
	Hinted State = iota
	// Tried: dialled, and nobody of ours has answered so far.
	Tried
	// Proven: an authenticated peer answered there, and nothing since speaks
	// against it.
	Proven
	// Doubted: it was proven, now or in an earlier run; since then a dial
	// failed or a goodbye was heard.
	Doubted
)

func (s State) String() string {
	switch s {
	case Hinted:
		return "hinted"
	case Tried:
		return "tried"
	case Proven:
		return "proven"
	case Doubted:
		return "doubted"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// event moves an address from state to state.
type event uint8

const (
	dialled event = iota
	answered
	failed
	goodbye
)

// moves is the whole state machine. Nothing leads from Proven or Doubted back
// to Hinted or Tried: what was proven is forgotten only by age or by Forget.
var moves = [...][4]State{
	Hinted:  {dialled: Tried, answered: Proven, failed: Tried, goodbye: Hinted},
	Tried:   {dialled: Tried, answered: Proven, failed: Tried, goodbye: Tried},
	Proven:  {dialled: Proven, answered: Proven, failed: Doubted, goodbye: Doubted},
	Doubted: {dialled: Doubted, answered: Proven, failed: Doubted, goodbye: Doubted},
}
