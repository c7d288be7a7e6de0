package turns

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// ErrDenied: whoever was asked gives no turns to this node. Another may.
var ErrDenied = errors.New("turns: denied")

// Ask is what a node tells a server that asks the cluster for it: a worker may
// not write there. What it says of itself is believed; it can hurt nobody but
// itself by it, save that a failure stops the site.
type Ask struct {
	Phase Phase
	// Image, Version, K3s, Older and Failed are those of Facts.
	Image, Version, K3s string
	Older               bool
	Failed              string
}

// Reply is the answer.
type Reply struct {
	State State
	// Go: the node may restart.
	Go     bool
	Reason string
}

// Validate reports all problems of a question that came over a network.
func (a Ask) Validate() error {
	var errs []error
	check := func(ok bool, format string, v ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("turns: ask: "+format, v...))
		}
	}
	check(a.Phase < numPhases, "%s", a.Phase)
	if d, err := hex.DecodeString(a.Image); a.Phase != Judging || a.Image != "" {
		check(err == nil && len(d) == 32, "image %.80q is no digest", a.Image)
	}
	check(len(a.Version) <= maxText, "version has %d bytes", len(a.Version))
	check(len(a.K3s) <= maxText, "k3s has %d bytes", len(a.K3s))
	check(len(a.Failed) <= maxText, "failed has %d bytes", len(a.Failed))
	check(a.Failed == "" || a.Phase == Settled, "failed, and not settled")
	return errors.Join(errs...)
}

// Facts are those that the node knows itself.
func (a Ask) Facts() Facts {
	return Facts{Phase: a.Phase, Image: a.Image, Version: a.Version, K3s: a.K3s, Older: a.Older, Failed: a.Failed}
}

// ParseState reads a word.
func ParseState(s string) (State, error) {
	i := slices.Index(stateNames[:], s)
	if i < 0 {
		return 0, fmt.Errorf("turns: state %.40q is none of %v", s, stateNames)
	}
	return State(i), nil
}
