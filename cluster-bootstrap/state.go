package clusterbootstrap

import (
	"fmt"
	"slices"
)

// State is where a node stands. It is computed anew by each Plan; the table
// of moves says which changes between two calls are possible.
//
//	observing --> surveying <--> claiming --> founding --> server <--> leading
//	    |             |             |                        |  ^         |
//	    |             +--> joining <+                        |  |         v
//	    |                    |                               |  +--- recovering
//	    |                    v                               v
//	    |                  worker <--> candidate --> server  fenced --> leaving --> joining
//	    |                                  |                                |
//	    |                                  +------------> leaving ----------+--> worker
//	    +--> any: after a restart the disk alone says where the node was
//	waiting: reachable from all but founding's first write; the Wait action names the blocker
//	removed: final for this incarnation of the node
type State uint8

const (
	// Observing: just started; listens before it acts.
	Observing State = iota
	// Surveying: founding mode first; looks for peers and for a cluster.
	Surveying
	// Claiming: founding mode first; asks the visible peers to acknowledge.
	Claiming
	// Founding: has the right to found, on disk, and does.
	Founding
	// Joining: asks a server for join material.
	Joining
	// Worker: runs k3s as a worker.
	Worker
	// Candidate: changes from worker to server under a plan.
	Candidate
	// Server: runs k3s as a confirmed server.
	Server
	// Leading: a server that carries out a plan.
	Leading
	// Fenced: a server of a cluster that must not grow, since the site has a
	// better one.
	Fenced
	// Recovering: resets the datastore to its own data, or restores it.
	Recovering
	// Leaving: moves its cluster data aside, to come back as a worker.
	Leaving
	// Waiting: cannot go on by itself; the Wait action says why.
	Waiting
	// Removed: a signed Removal ended this node's membership.
	Removed
	numStates
)

var stateNames = [numStates]string{"observing", "surveying", "claiming", "founding", "joining", "worker", "candidate",
	"server", "leading", "fenced", "recovering", "leaving", "waiting", "removed"}

// String returns the word shown to people.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Moves returns the table of moves: for each state those that may follow.
// Staying is always possible, and Removed
// may follow any state; neither is listed. A restart leads to Observing
// from everywhere and is not a move.
func Moves() map[State][]State {
	m := make(map[State][]State, len(moves))
	for k, v := range moves {
		m[k] = slices.Clone(v)
	}
	return m
}

// MoveTo returns to if the table allows s -> to.
func (s State) MoveTo(to State) (State, error) {
	if s == to || to == Removed || slices.Contains(moves[s], to) {
		return to, nil
	}
	return s, fmt.Errorf("clusterbootstrap: node cannot go from %s to %s", s, to)
}

// Blocker is the short code of what a waiting node waits for. It goes into
// reports, metrics and the answer to "why".
type Blocker string

const (
	// NoBlocker: nothing is wrong, there is just nothing to do.
	NoBlocker Blocker = ""

	// These pass by themselves.
	Settling          Blocker = "settling"           // a timer of the protocol runs
	CentreUnreachable Blocker = "centre-unreachable" // founding mode central, no answer
	AckMissing        Blocker = "ack-missing"        // a visible peer has not acknowledged the claim
	AckGiven          Blocker = "ack-given"          // this node acknowledged another node's claim
	ServerAway        Blocker = "server-away"        // the site has a cluster, no server of it answers
	ServerStarting    Blocker = "server-starting"    // k3s is starting
	NoQuorum          Blocker = "no-quorum"          // the servers seen are too few
	LeaseMissing      Blocker = "lease-missing"      // the leader of the plan does not renew the lease
	LeaseRunsOut      Blocker = "lease-runs-out"     // leases given to others must end first
	PeerMissing       Blocker = "peer-missing"       // a plan waits for a node
	FewNodes          Blocker = "few-nodes"          // too few ready nodes to promote
	NoCandidate       Blocker = "no-candidate"       // no ready worker may serve
	RetryLater        Blocker = "retry-later"        // the last plan failed; pause before the next
	ServerDown        Blocker = "server-down"        // a server is away, not long enough to replace it

	// These need a person, if what they name does not come back by itself.
	NoCharter     Blocker = "no-charter"
	NotAdmitted   Blocker = "not-admitted"
	RemovedNode   Blocker = "removed"
	CentreUnsure  Blocker = "centre-unsure"  // the centre lost its memory and grants nothing
	FounderAway   Blocker = "founder-away"   // another node has the founding right, and is not seen
	LeaderAway    Blocker = "leader-away"    // the founder went away inside the promotion window
	QuorumLost    Blocker = "quorum-lost"    // for longer than Policy.QuorumLost
	ServersLost   Blocker = "servers-lost"   // no server seen for longer than Policy.QuorumLost
	DataLost      Blocker = "data-lost"      // the only server has lost its datastore
	TwoClusters   Blocker = "two-clusters"   // both hold data of their own
	DataDamaged   Blocker = "data-damaged"   // etcd cannot use its data
	VersionSkew   Blocker = "k3s-version"    // k3s versions that do not go together
	ArgsDiffer    Blocker = "k3s-arguments"  // critical arguments of k3s differ between nodes
	WorkerRefused Blocker = "worker-refused" // servers answer, and the worker's k3s does not get in
	SlowDisk      Blocker = "slow-disk"      // the nodes that could be servers have disks too slow for etcd
	OrderVoid     Blocker = "order-void"     // an order cannot be carried out on this node as it is
)

var personal = []Blocker{NoCharter, NotAdmitted, RemovedNode, CentreUnsure, FounderAway, LeaderAway, QuorumLost,
	ServersLost, DataLost, TwoClusters, DataDamaged, VersionSkew, ArgsDiffer, WorkerRefused, SlowDisk, OrderVoid}

// NeedsPerson reports whether b asks a person to look.
func (b Blocker) NeedsPerson() bool { return slices.Contains(personal, b) }
