// Package turns decides when a node of a site may restart into another
// version: one at a time, only while everything else is up, in the site's
// maintenance window, with its pods gone elsewhere. It is pure: who asks
// gathers the facts and does the one step that comes out.
//
// What the site agrees on is one small object in its cluster, changed by
// compare-and-set: who has the turn, and which images failed on which node. A
// node that is down keeps its turn until it comes back and says how the image
// did, or is removed from the cluster; nobody else goes down meanwhile.
package turns

import (
	"fmt"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Hold is how long the turn of a node stands that is still draining and gives
// no sign of life.
const Hold = 45 * time.Minute

const (
	// renewAfter is how old a turn's last sign of life may get.
	renewAfter = Hold / 9
	// sure is how fresh it must be at the moment of the restart.
	sure = time.Minute
	// rest is the pause after a drain that did not end in time.
	rest = 30 * time.Minute
	// MaxFailed bounds Ledger.Failed.
	MaxFailed = 16
	maxText   = 500
)

// Ledger is what the site agrees on.
type Ledger struct {
	Turn *Turn `json:"turn,omitempty"`
	// Failed are images that some node found bad, the newest last.
	Failed []Failed `json:"failed,omitempty"`
}

// Turn is the right to be down.
type Turn struct {
	Node fleet.NodeID `json:"node"`
	// Image is what the node goes to (SHA-256 in hex), Version what people call
	// it.
	Image   string `json:"image"`
	Version string `json:"version"`
	// Beat counts signs of life.
	Beat uint64 `json:"beat"`
	// Down: the node may be down from now on.
	Down bool `json:"down,omitempty"`
	// At is when it was taken, by the clock of who wrote it: for people.
	At time.Time `json:"at"`
}

// Failed is an image that did not work on a node. It stops the site's other
// nodes until that node forgives it or leaves the site.
type Failed struct {
	Image   string       `json:"image"`
	Version string       `json:"version"`
	Node    fleet.NodeID `json:"node"`
	Reason  string       `json:"reason"`
	At      time.Time    `json:"at"`
}

// Phase is what the node is about.
type Phase uint8

const (
	// Leaving: it is ready to restart into Facts.Image.
	Leaving Phase = iota
	// Judging: it has restarted and does not know yet whether it is well.
	Judging
	// Settled: it runs what it should, or the image failed.
	Settled
	numPhases
)

var phaseNames = [numPhases]string{"leaving", "judging", "settled"}

// String returns the phase in a word.
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

// ParsePhase reads a word.
func ParsePhase(s string) (Phase, error) {
	i := slices.Index(phaseNames[:], s)
	if i < 0 {
		return 0, fmt.Errorf("turns: phase %.40q is none of %v", s, phaseNames)
	}
	return Phase(i), nil
}

// Node is one node of the cluster.
type Node struct {
	ID fleet.NodeID
	// Ready by its Node object; Server: it is a confirmed server.
	Ready, Server bool
	// K3s is the version that it runs, "" if it is not known.
	K3s string
}

// Facts are what is known when a node asks.
type Facts struct {
	Now time.Time
	// Self asks. Server: it is one.
	Self   fleet.NodeID
	Server bool
	Phase  Phase
	// Image and Version are what it goes to, or what failed; K3s is the version
	// of k3s in it. Older: it is a way back, for which an order was given.
	Image, Version, K3s string
	Older               bool
	// Failed is set when Settled: why the image did not work here.
	Failed string

	// Open: the maintenance window; Opens is when it opens next, zero if that
	// is not known.
	Open  bool
	Opens time.Time
	// Clustered: there is a cluster that this node belongs to; API: it answers.
	Clustered, API bool
	// Ledger as read just now; LedgerFor is how long it has been like this,
	// seen by one observer's monotonic clock.
	Ledger    Ledger
	LedgerFor time.Duration
	// Nodes of the cluster, this one included.
	Nodes []Node
	// Voters are etcd's members with a vote, Learners how many have none.
	Voters   []fleet.NodeID
	Learners int
	// Busy is why the cluster is changing its servers, "" if it is not.
	Busy string

	// Cordoned: this node was cordoned for its turn; Draining is for how long.
	Cordoned bool
	Draining time.Duration
	// Pods must still leave. DrainLimit and Force are the charter's.
	Pods       int
	DrainLimit time.Duration
	Force      bool
	// GaveUp is how long ago a drain of this node was given up; 0: never.
	GaveUp time.Duration
}

// Step is the one thing to do.
type Step uint8

const (
	// Wait does nothing.
	Wait Step = iota
	// Write puts Answer.Ledger in place of the one that was read.
	Write
	// Drain cordons the node and asks its pods to leave.
	Drain
	// Uncordon takes the node back into service.
	Uncordon
	// Go: the node may restart.
	Go
	numSteps
)

var stepNames = [numSteps]string{"wait", "write", "drain", "uncordon", "go"}

// String returns the step in a word.
func (s Step) String() string {
	if int(s) < len(stepNames) {
		return stepNames[s]
	}
	return fmt.Sprintf("step(%d)", uint8(s))
}

// State is where the node stands with its turn.
//
//	idle --> queued <--> draining --> down --> back --> idle
//	           |             |                   |
//	           +--> stopped  +--> queued         +--> idle (failed: the site stops)
type State uint8

const (
	// Idle: it wants nothing.
	Idle State = iota
	// Queued: it waits for its turn.
	Queued
	// Draining: it has the turn; its pods leave.
	Draining
	// Down: it may restart.
	Down
	// Back: it has restarted and is being judged.
	Back
	// Stopped: the image failed at this site.
	Stopped
	numStates
)

var stateNames = [numStates]string{"idle", "queued", "draining", "down", "back", "stopped"}

// String returns the state in a word.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Answer is what comes out.
type Answer struct {
	State State
	Step  Step
	// Reason for a person.
	Reason string
	// Ledger is what Write writes.
	Ledger Ledger
	// GiveUp: a drain did not end in time; the edge remembers when.
	GiveUp bool
}

// Decide says what to do next for the node that asks.
func Decide(f Facts) Answer {
	switch f.Phase {
	case Judging:
		return f.judging()
	case Settled:
		return f.settled()
	}
	return f.leaving()
}

func (f *Facts) mine() bool { return f.Ledger.Turn != nil && f.Ledger.Turn.Node == f.Self }

func say(s State, format string, a ...any) Answer {
	return Answer{State: s, Reason: fmt.Sprintf(format, a...)}
}

// write answers with a changed ledger.
func (f *Facts) write(s State, why string, change func(*Ledger)) Answer {
	l := f.Ledger
	l.Failed = slices.Clone(l.Failed)
	if l.Turn != nil {
		t := *l.Turn
		l.Turn = &t
	}
	change(&l)
	return Answer{State: s, Step: Write, Reason: why, Ledger: l}
}

// leaving leads to the restart.
func (f *Facts) leaving() Answer {
	switch {
	case !f.Clustered && !f.Open:
		return f.closed()
	case !f.Clustered:
		return Answer{State: Down, Step: Go, Reason: "This node belongs to no cluster yet; nobody misses it."}
	case !f.API:
		return say(Queued, "the cluster does not answer, so that nobody could know that this node is away")
	}
	if bad, own := f.failed(); own {
		return f.write(Queued, "The failure of this image was forgiven.", func(l *Ledger) {
			l.Failed = slices.DeleteFunc(l.Failed, func(x Failed) bool { return x.Node == f.Self && x.Image == f.Image })
		})
	} else if bad != nil {
		return f.back(say(Stopped, "version %s failed on node %s (%s); the site goes on when that is cleared", bad.Version, bad.Node, bad.Reason))
	}
	if !f.Open {
		return f.back(f.closed())
	}
	if why := f.unsafe(); why != "" {
		return f.back(say(Queued, "%s", why))
	}
	t := f.Ledger.Turn
	switch {
	case t != nil && !f.mine() && f.holds(t):
		return say(Queued, "node %s has the turn", t.Node)
	case !f.mine() && f.GaveUp > 0 && f.GaveUp < rest:
		return say(Queued, "its pods did not leave in time; it tries again later")
	case !f.mine() || t.Image != f.Image:
		// Everything is up, whoever had the turn and lost it.
		return f.write(Draining, "This node takes the turn.", func(l *Ledger) {
			l.Turn = &Turn{Node: f.Self, Image: f.Image, Version: f.Version, At: f.Now}
		})
	}
	return f.drained()
}

// holds reports whether somebody else's turn stands. One that may be down
// keeps its turn until it gives it back itself, or is no node any more: only it
// can tell how the image did. One that was still draining loses it after Hold.
func (f *Facts) holds(t *Turn) bool {
	if !slices.ContainsFunc(f.Nodes, func(n Node) bool { return n.ID == t.Node }) {
		return false
	}
	return t.Down || f.LedgerFor < Hold
}

func (f *Facts) closed() Answer {
	if f.Opens.IsZero() {
		return say(Queued, "the site's maintenance window is closed")
	}
	return say(Queued, "the site's maintenance window opens at %s", f.Opens.UTC().Format("Mon 15:04 MST"))
}

// drained goes on with the turn: pods first, then the last sign of life, then
// the restart.
func (f *Facts) drained() Answer {
	if !f.Cordoned {
		return Answer{State: Draining, Step: Drain, Reason: "no new pods come to this node"}
	}
	if f.Pods > 0 {
		switch {
		case f.Draining < f.DrainLimit:
			if f.LedgerFor >= renewAfter {
				return f.beat(Draining, false)
			}
			return Answer{State: Draining, Step: Drain, Reason: fmt.Sprintf("%d pods have yet to leave this node", f.Pods)}
		case !f.Force:
			a := f.back(say(Queued, "%d pods did not leave this node within %s", f.Pods, f.DrainLimit))
			a.GiveUp = true
			return a
		}
	}
	if t := f.Ledger.Turn; !t.Down || f.LedgerFor >= sure {
		return f.beat(Down, true)
	}
	return Answer{State: Down, Step: Go, Reason: "it is this node's turn"}
}

// beat renews the turn. It needs a majority, so that it proves that the
// cluster works at this moment.
func (f *Facts) beat(s State, down bool) Answer {
	return f.write(s, "This node keeps its turn.", func(l *Ledger) {
		l.Turn.Beat++
		l.Turn.Down = l.Turn.Down || down
	})
}

// back gives up what a node that is not to go has: first its pods may come
// back, then the turn is free. It answers a otherwise.
func (f *Facts) back(a Answer) Answer {
	switch {
	case f.Cordoned:
		a.Step = Uncordon
	case f.mine():
		b := f.write(a.State, a.Reason, func(l *Ledger) { l.Turn = nil })
		b.GiveUp = a.GiveUp
		return b
	}
	return a
}

// failed returns a failure of the image at this site; own: it is one of this
// node, which would not ask if it still thought so.
func (f *Facts) failed() (*Failed, bool) {
	for i, x := range f.Ledger.Failed {
		if x.Image != f.Image {
			continue
		}
		if x.Node == f.Self {
			return &f.Ledger.Failed[i], true
		}
		if slices.ContainsFunc(f.Nodes, func(n Node) bool { return n.ID == x.Node }) {
			return &f.Ledger.Failed[i], false
		}
	}
	return nil, false
}

// unsafe says why this node must not go down now, "" if it may.
func (f *Facts) unsafe() string {
	if f.Busy != "" {
		return f.Busy
	}
	known := map[fleet.NodeID]Node{}
	for _, n := range f.Nodes {
		known[n.ID] = n
		if n.ID != f.Self && !n.Ready {
			return fmt.Sprintf("node %s is not ready, and only one may be away", n.ID)
		}
	}
	if _, ok := known[f.Self]; !ok {
		return "the cluster does not know this node"
	}
	if f.Learners > 0 {
		return "a new server is being taken in"
	}
	servers := 0
	for _, n := range f.Nodes {
		if n.Server {
			servers++
		}
	}
	if len(f.Voters) == 0 || len(f.Voters) != servers {
		return fmt.Sprintf("etcd has %d members with a vote, and the site %d servers", len(f.Voters), servers)
	}
	for _, v := range f.Voters {
		if n, ok := known[v]; !ok || !n.Server || !n.Ready && v != f.Self {
			return fmt.Sprintf("etcd member %s is not a ready server", v)
		}
	}
	// One of two servers takes the majority with it for as long as it is away;
	// a single server does so too, and there is no other way.
	if f.Server && len(f.Voters) == 2 {
		return "the cluster has two servers, and would stand still with one"
	}
	if !f.Server && !f.Older && f.K3s != "" {
		// A kubelet must not be newer than the servers (Kubernetes version skew
		// policy).
		for _, n := range f.Nodes {
			if n.Server && n.K3s != "" && n.K3s != f.K3s {
				return fmt.Sprintf("server %s goes first", n.ID)
			}
		}
	}
	return ""
}

// judging keeps the turn.
func (f *Facts) judging() Answer {
	if f.Clustered && f.API && f.mine() && f.LedgerFor >= renewAfter {
		return f.beat(Back, true)
	}
	return say(Back, "it is being judged")
}

// settled tells the site how it came out, and gives back the turn.
func (f *Facts) settled() Answer {
	if !f.Clustered || !f.API {
		return say(Idle, "there is no cluster to tell")
	}
	i := slices.IndexFunc(f.Ledger.Failed, func(x Failed) bool { return x.Image == f.Image && x.Node == f.Self })
	switch {
	case f.Failed != "" && i < 0:
		return f.write(Back, "Version "+f.Version+" failed here.", func(l *Ledger) {
			l.Failed = append(l.Failed, Failed{Image: f.Image, Version: f.Version, Node: f.Self, Reason: f.Failed[:min(len(f.Failed), maxText)], At: f.Now})
			l.Failed = l.Failed[max(0, len(l.Failed)-MaxFailed):]
		})
	case f.Failed == "" && i >= 0:
		return f.write(Back, "Version "+f.Version+" works here after all.", func(l *Ledger) { l.Failed = slices.Delete(l.Failed, i, i+1) })
	}
	return f.back(say(Idle, "it is back"))
}
