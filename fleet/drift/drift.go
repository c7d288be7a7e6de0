// Package drift compares what sites shall run with what their nodes say, and
// puts the difference into words: "497 of 500 current; these 3 are not, and
// this is why". What was said long ago is marked as old, and a site that is
// out of reach waits: it has not failed.
package drift

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// State is how a site compares. Of its nodes the worst counts, in this order:
//
//	unassigned   nothing is asked of the site
//	current      all nodes run what they shall
//	updating     nodes are on their way
//	waiting      for a window, for its turn, for a person, or for contact
//	unknown      a node has said nothing of its system
//	blocked      a node will not get there by itself
type State uint8

const (
	Unassigned State = iota
	Current
	Updating
	Waiting
	Unknown
	Blocked
)

var names = [...]string{"unassigned", "current", "updating", "waiting", "unknown", "blocked"}

// String returns the word used in the CLI, the API and the console.
func (s State) String() string {
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Node is what is known of one node of a site.
type Node struct {
	ID       fleet.NodeID
	Words    string
	LastSeen time.Time
	// System is what it said last; the zero value: nothing.
	System fleet.SystemReport
}

// Input is one site.
type Input struct {
	Site  fleet.Site
	Nodes []Node
	// Images are those of the desired stack version.
	Images []fleet.ImageRef
}

// NodeResult is how one node compares.
type NodeResult struct {
	ID        fleet.NodeID
	Words     string
	State     State
	Stale     bool
	LastHeard time.Time
	Running   string
	System    fleet.SystemState
	Percent   int
	// Why it is not current, in a sentence.
	Why string
}

// Result is how one site compares.
type Result struct {
	Site    string
	Desired *fleet.StackRef
	State   State
	Why     string
	Nodes   int
	Current int
	// Stale: of a node nothing was heard for a while; LastHeard is the oldest
	// contact of all.
	Stale     bool
	LastHeard time.Time
	// Outliers are the nodes that are not current.
	Outliers []NodeResult
}

// Compare compares one site. Contact older than stale is old.
func Compare(now time.Time, stale time.Duration, in Input) Result {
	out := Result{Site: in.Site.Name, Desired: in.Site.Spec.StackRef(), Nodes: len(in.Nodes)}
	if out.Desired == nil {
		return out
	}
	out.State = Current
	if len(in.Nodes) == 0 {
		out.State, out.Why = Unknown, "the site has no nodes"
		return out
	}
	for _, n := range in.Nodes {
		r := compareNode(now, stale, in, n)
		if out.LastHeard.IsZero() || r.LastHeard.Before(out.LastHeard) {
			out.LastHeard = r.LastHeard
		}
		out.Stale = out.Stale || r.Stale
		if r.State == Current {
			out.Current++
			continue
		}
		out.Outliers = append(out.Outliers, r)
		if r.State > out.State {
			out.State, out.Why = r.State, r.Words+": "+r.Why
		}
	}
	if more := len(out.Outliers) - 1; more > 0 {
		out.Why += fmt.Sprintf(" (and %d more of its nodes)", more)
	}
	return out
}

func compareNode(now time.Time, stale time.Duration, in Input, n Node) NodeResult {
	sys, want := n.System, in.Site.Spec.StackRef()
	r := NodeResult{ID: n.ID, Words: n.Words, LastHeard: n.LastSeen, Running: sys.Image, System: sys.State, Percent: sys.Percent, State: Current}
	r.Stale = now.Sub(n.LastSeen) > stale
	say := func(s State, format string, args ...any) NodeResult {
		r.State, r.Why = s, fmt.Sprintf(format, args...)
		if r.Stale {
			r.Why += "; last heard of " + since(now, n.LastSeen)
		}
		return r
	}
	because := ""
	if sys.Reason != "" {
		because = ": " + sys.Reason
	}
	image := wanted(in.Images, sys)
	// A reboot back into recovery is told of by the slot.
	if sys.Slot != fleet.SlotRecovery && runs(want, image, sys) {
		return r
	}
	for _, f := range sys.Failed {
		if image != nil && bytes.Equal(f.SHA256, image.SHA256) {
			return say(Blocked, "image %s failed here (%s) and is not tried again; mend it in a new version, or: muster order clear-failed %s --image %s", image.ID(), orUnknown(f.Reason), n.ID, image.ID())
		}
	}
	switch sys.State {
	case fleet.SystemRolledBack, fleet.SystemFailed:
		return say(Blocked, "%s%s", sys.State, because)
	case fleet.SystemUnknown:
		if r.Stale {
			return say(Waiting, "nothing is known of its system")
		}
		return say(Unknown, "it has said nothing of its system")
	case fleet.SystemRecovery:
		return say(Waiting, "it runs the recovery image and nothing is installed: muster order install %s%s", n.ID, because)
	}
	if r.Stale {
		return say(Waiting, "it runs %s and gets the new version when it is back", orUnknown(sys.Image))
	}
	switch sys.State {
	case fleet.SystemCurrent:
		if in.Site.Spec.Chosen().Update != nil && in.Site.Spec.Chosen().Update.Paused {
			return say(Waiting, "it runs %s, and updates of the site are paused", orUnknown(sys.Image))
		}
		return say(Updating, "it runs %s and has not begun%s", orUnknown(sys.Image), because)
	case fleet.SystemStaged, fleet.SystemWaiting:
		return say(Waiting, "it holds the new version and waits%s", because)
	}
	return say(Updating, "%s, %d %%%s", sys.State, sys.Percent, because)
}

// wanted is the image of the version that is for the node: by what it runs or
// goes to, or the only one there is.
func wanted(images []fleet.ImageRef, sys fleet.SystemReport) *fleet.ImageRef {
	for i := range images {
		if bytes.Equal(images[i].SHA256, sys.ImageSHA256) || bytes.Equal(images[i].SHA256, sys.TargetSHA256) {
			return &images[i]
		}
	}
	if len(images) == 1 {
		return &images[0]
	}
	return nil
}

// runs reports whether the node runs what it shall: the version by its digest,
// or, where it does not know that, an image of it.
func runs(want *fleet.StackRef, image *fleet.ImageRef, sys fleet.SystemReport) bool {
	if sys.State == fleet.SystemTrying {
		return false // it is being judged
	}
	if sys.Stack != nil {
		return bytes.Equal(sys.Stack.SHA256, want.SHA256)
	}
	return image != nil && len(sys.ImageSHA256) > 0 && bytes.Equal(sys.ImageSHA256, image.SHA256)
}

func orUnknown(s string) string {
	if s == "" {
		return "nothing that it named"
	}
	return s
}

func since(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format(time.RFC3339) + " (" + now.Sub(t).Truncate(time.Second).String() + " ago)"
}

// Fleet is many sites in a few numbers.
type Fleet struct {
	Sites, Current, Unassigned int
	// OldCurrent are those of Current of which a part is old knowledge.
	OldCurrent int
	ByState    map[State]int
	// Outliers are the sites that are not current, the worst first.
	Outliers []Result
}

// Sum counts results.
func Sum(results []Result) Fleet {
	f := Fleet{ByState: make(map[State]int)}
	for _, r := range results {
		f.ByState[r.State]++
		if r.State == Unassigned {
			f.Unassigned++
			continue
		}
		f.Sites++
		if r.State == Current {
			f.Current++
			if r.Stale {
				f.OldCurrent++
			}
			continue
		}
		f.Outliers = append(f.Outliers, r)
	}
	slices.SortStableFunc(f.Outliers, func(a, b Result) int {
		if a.State != b.State {
			return int(b.State) - int(a.State)
		}
		return strings.Compare(a.Site, b.Site)
	})
	return f
}

// String says it in a sentence.
func (f Fleet) String() string {
	if f.Sites == 0 {
		return "no site has a stack"
	}
	s := fmt.Sprintf("%d of %d current", f.Current, f.Sites)
	if f.OldCurrent > 0 {
		s += fmt.Sprintf(" (%d of them as last known)", f.OldCurrent)
	}
	var parts []string
	for _, state := range []State{Blocked, Unknown, Waiting, Updating} {
		if n := f.ByState[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	if len(parts) > 0 {
		s += "; " + strings.Join(parts, ", ")
	}
	return s
}
