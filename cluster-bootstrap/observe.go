package clusterbootstrap

import (
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Observation is everything a node knows when it plans. All ages and
// durations come from the monotonic clock; wall time decides nothing but the
// end of a Mandate.
type Observation struct {
	Self  fleet.NodeID
	Words string // how people call this node
	// Boot tells this run of the node agent from all others.
	Boot string
	// Mono is the time since the agent started.
	Mono time.Duration
	// Addr is this node's address on the LAN now.
	Addr string
	// Fresh is a random 128-bit text, new for each run: UID or claim token.
	Fresh string

	Docs  Documents
	Disk  Disk
	K3s   K3s
	Peers []Peer // verified by hello and admitted; sorted by ID

	Centre   Centre
	Mandate  *Mandate
	Survey   *Survey
	Claim    *Claim        // own claim, if one stands
	AckSeen  time.Duration // since the claimant this node acknowledged was last seen (or since start)
	Lease    Lease
	Material *Material
	// LastGrant is when (Mono) this node last gave a lease; zero after a
	// restart, which is the cautious value: a lease may have been given just
	// before.
	LastGrant time.Duration
}

// Role is what the role file tells the launcher to run.
type Role uint8

const (
	RoleNone Role = iota
	RoleWorker
	// RoleCandidate runs as a server, but only under a lease.
	RoleCandidate
	RoleServer
)

var roleNames = [...]string{"none", "worker", "candidate", "server"}

// String returns the role as hello shows it.
func (r Role) String() string {
	if int(r) < len(roleNames) {
		return roleNames[r]
	}
	return "unknown"
}

// Disk is what survives a power cut: each write was flushed before the next
// action began.
type Disk struct {
	Role   Role
	Record *Record
	// Intent is the founding right, written before k3s first starts.
	Intent *Intent
	// Ack is the claim this node acknowledged; it founds nothing meanwhile.
	Ack *Claim
	// Step is this node's own step as a candidate.
	Step *Step
	// Lead is this node's own step as the leader of a plan.
	Lead *Lead
	// Reset is a recovery that was decided and is not finished.
	Reset *Reset
	// Aside: moving cluster data aside was begun and is not finished.
	Aside bool
	// Addrs is where the launcher believes the peers to be.
	Addrs map[fleet.NodeID]string

	// What k3s itself leaves behind.
	Datastore bool // server/db/etcd/member/wal
	Tombstone bool // server/db/etcd/tombstone: removed from the members
	ResetFlag bool // server/db/reset-flag: reset done, not yet started
	AgentCert bool // agent/client-kubelet.crt
	// Mark is the cluster UID in the TPM: it survives a new disk.
	Mark string
}

// member reports whether anything says that this node has ever belonged to a
// cluster. Any such sign forbids founding.
func (d Disk) member() bool {
	return d.Role != RoleNone || d.Record != nil || d.Step != nil || d.Lead != nil || d.Reset != nil || d.Aside ||
		d.Datastore || d.Tombstone || d.AgentCert || d.Mark != ""
}

// Intent is the journal of a founding.
type Intent struct {
	UID  string
	Boot string
	Mode fleet.FoundingMode
}

// Claim asks for the founding right in mode first. A claim is as good as its
// token; a node that restarts claims anew.
type Claim struct {
	Node  fleet.NodeID
	Round uint64
	Token string
}

// Survey is the time of looking around before a claim.
type Survey struct {
	Since time.Duration // Mono when it began
	Round uint64
}

// StepPhase is how far a candidate is in a plan.
type StepPhase uint8

const (
	StepPrepared StepPhase = iota + 1 // holds what it needs, still a worker
	StepSwitched                      // role file says candidate
)

// Step is a candidate's journal under a plan's ID.
type Step struct {
	Plan    string
	N       uint64
	Epoch   uint64
	Leader  fleet.NodeID
	Phase   StepPhase
	Replace bool
}

// LeadPhase is how far the leader is in a plan.
type LeadPhase uint8

const (
	// LeadOpen: candidates may switch; a reset to own data is still possible.
	LeadOpen LeadPhase = iota + 1
	// LeadConfirming: the confirmation may have been written, so that the
	// candidates may run without a lease: no reset any more.
	LeadConfirming
)

// Lead is the leader's journal of a plan. It counts more than etcd's copy,
// which cannot be read once quorum is lost.
type Lead struct {
	Plan       string
	Epoch      uint64
	Phase      LeadPhase
	Candidates []fleet.NodeID
}

// Reset is the journal of a recovery.
type Reset struct {
	Plan     string // of the window that failed; "" if mandated
	To       uint64 // the new epoch
	Snapshot string // restore this snapshot instead of own data
	UID      string // of the cluster, as the order named it
}

// Process is which k3s runs on this node.
type Process uint8

const (
	ProcessNone Process = iota
	ProcessAgent
	ProcessServer
)

// Member is one etcd member as /db/info lists it.
type Member struct {
	Node    fleet.NodeID
	Learner bool
	// For is how long this agent has seen it like this: as a learner, or with
	// a vote.
	For time.Duration
}

// NodeObject is one Kubernetes Node.
type NodeObject struct {
	Node  fleet.NodeID
	Ready bool
	For   time.Duration // in this condition, as seen by this agent
}

// K3s is what this node's k3s says.
type K3s struct {
	Process Process
	// Stopping: told to stop, not gone yet.
	Stopping bool
	// Running is the time since the process started.
	Running time.Duration
	// API: the apiserver answers, which takes quorum.
	API bool
	// NoInfo is how long /db/info has been failing since it last answered or
	// since the process started; 0 while it answers.
	NoInfo time.Duration
	// NoAPI is how long a worker's k3s has reached no apiserver, over all its
	// restarts; 0 while it does, and on servers.
	NoAPI   time.Duration
	Members []Member // from /db/info; sorted
	Nodes   []NodeObject
	// Ledger is the ConfigMap; nil if it does not exist or API is false.
	Ledger *Ledger
	// LedgerFor is how long this agent has seen this version of it.
	LedgerFor time.Duration
	// Virgin: no PVC and no object outside the stack.
	Virgin bool
	// Snapshot is the ID of the plan (or order) for which the newest snapshot
	// was taken, sealed to the escrow key, and kept on another node.
	Snapshot string
	// EscrowDue: no snapshot that another node or the centre keeps is younger
	// than the edge wants. The leader takes one when nothing else is to do.
	EscrowDue bool

	// Version is the k3s version on this node ("v1.36.3+k3s1"), Args a digest
	// of the arguments that must be the same on all servers (birth settings,
	// max-learners, disable list; not addresses and secrets). "" is unknown
	// and hinders nothing. Known whether k3s runs or not.
	Version string
	Args    string
	// Fsync is the 99th percentile of flushing 8 KiB to the disk that holds
	// the datastore, measured while the node is a worker or starts; 0 is
	// unknown and hinders nothing.
	Fsync time.Duration
	// Damaged is "" or what k3s says of a datastore that it cannot use (damaged
	// write-ahead log or snapshot file, failed corruption check), in its words
	// and clipped to 200 bytes. A datastore that is only slow, or without
	// quorum, is not damaged. Plan believes it of a running server only after
	// Policy.QuorumGrace.
	Damaged string
}

// Ledger is the one ConfigMap that holds record and plan: both change in one
// compare-and-set.
type Ledger struct {
	Version uint64 // resource version for the compare-and-set
	Record  Record
	Plan    *PlanDoc
}

// PlanPhase is how far a plan is.
type PlanPhase uint8

const (
	PlanPrepare PlanPhase = iota + 1
	PlanSwitch
	PlanDone
	PlanAborted
)

var phaseNames = [...]string{"none", "prepare", "switch", "done", "aborted"}

// String returns the phase in words.
func (p PlanPhase) String() string { return phaseNames[min(int(p), len(phaseNames)-1)] }

// PlanDoc is one promotion: from 1 to 3 servers, or the replacement of a dead
// one (Replace).
type PlanDoc struct {
	ID         string
	N          uint64 // counts plans in the ledger
	Epoch      uint64
	Leader     fleet.NodeID
	Candidates []fleet.NodeID
	Phase      PlanPhase
	// Replace: two confirmed servers take in one more. No lease is needed,
	// since nobody resets to own data in it.
	Replace bool
	// Serial: one candidate after the other; Go counts those that may switch.
	Serial bool
	Go     int
	// Reopened: the confirmation was attempted, is not in the ledger, and can
	// no longer get in, since this write took its version. The window may be
	// closed by a reset again.
	Reopened bool
	// Off: the plan is being called off while nobody is dead: members that are
	// no servers are removed from etcd, then the plan is aborted. The fence
	// stays up until then.
	Off bool
	// Failures counts aborted plans in a row.
	Failures int
	Why      string
}

// Active reports whether the plan still wants something.
func (p *PlanDoc) Active() bool { return p != nil && (p.Phase == PlanPrepare || p.Phase == PlanSwitch) }

// Peer is what a peer said last.
type Peer struct {
	Words  string
	Addr   string
	Age    time.Duration
	Status *Status
	// Served is the age of its last status that showed a working API; a
	// negative value means none since this agent started.
	Served time.Duration
}

// Status is what a node shows in hello. Receivers drop one that is older than
// what they have (Boots, Seq).
type Status struct {
	Node   fleet.NodeID
	Boots  uint64
	Seq    uint64
	Role   Role
	State  State
	Record *Record
	// Intent: founding has begun; a record will follow.
	Intent bool
	Claim  *Claim
	Ack    *Claim
	API    bool
	Virgin bool
	Fenced bool
	// Voters and Learners as this server sees them.
	Voters, Learners int
	Step             *Step
	Lead             *Lead
	Plan             *PlanDoc // the ledger's plan, passed on for those without API
	Reset            bool
	Sees             []fleet.NodeID // peers it has heard lately
	Blocker          Blocker
	// Version, Args and Fsync of K3s.
	Version string
	Args    string
	Fsync   time.Duration
}

// Centre is the last answer of the centre about founding.
type Centre struct {
	Reachable bool
	Granted   fleet.NodeID // who holds the founding right; "" if nobody
	// Unsure: restored from a backup; grants nothing until the site reported
	// or a person confirmed.
	Unsure bool
}

// MandateKind is what a signed Order allows beyond what nodes do alone.
type MandateKind uint8

const (
	// MandateFound: this node founds, in place of the one that should have, or
	// of a cluster that is lost. One such order founds one cluster, whose UID
	// begins with a hash of the order's ID.
	MandateFound MandateKind = iota + 1
	// MandateReset: go on from this node's own data.
	MandateReset
	// MandateRestore: go on from an escrowed snapshot.
	MandateRestore
	// MandateDissolve: this node's cluster UID gives way to the cluster Into,
	// whatever it holds. A snapshot is taken first.
	MandateDissolve
)

// Mandate is a signed Order for this node that was verified. It names the
// epoch to raise to, so that it outranks every reset the nodes did alone.
type Mandate struct {
	ID       string
	Kind     MandateKind
	UID      string
	Epoch    uint64
	Snapshot string
	Into     string // MandateDissolve only
	NotAfter time.Time
}

// Lease is a candidate's right to run k3s as a server, by its own monotonic
// clock, counted from the sending of the request.
type Lease struct {
	Plan  string
	Until time.Duration
}

// Material is what a server gave to join with. Its secrets are not here.
type Material struct {
	UID   string
	Epoch uint64
	As    Role   // RoleWorker or RoleServer
	Plan  string // RoleServer only
	Age   time.Duration
}
