package clusterbootstrap

import (
	"fmt"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// ActionKind is one thing to do. "Writes" means: on disk and flushed before
// the next action begins. All actions may be repeated after a power cut.
type ActionKind uint8

const (
	// Wait does nothing; Reason and Blocker say why.
	Wait ActionKind = iota
	// StartSurvey starts the survey anew and forgets an own claim and a
	// written acknowledgement.
	StartSurvey
	// AskGrant asks the centre for the founding right.
	AskGrant
	// ClaimFounding shows Claim in hello from now on.
	ClaimFounding
	// WithdrawClaim shows it no longer.
	WithdrawClaim
	// AckClaim writes Claim as acknowledged, then shows it.
	AckClaim
	// FoundCluster writes Intent and the TPM mark.
	FoundCluster
	// AbandonFounding undoes a founding that nobody can have joined: moves
	// server data aside if there is any, clears the mark, then deletes Intent.
	AbandonFounding
	// RequestJoinMaterial asks From for what As needs (Plan for servers).
	RequestJoinMaterial
	// StartWorker writes role worker, Record and the mark, then starts k3s as
	// a worker once no other k3s process is left.
	StartWorker
	// StartServer starts k3s as a server once no other k3s process is left.
	// Init: with cluster-init, in a volatile file for this start only.
	StartServer
	// KeepRecord writes Record; Role too, if it is not RoleNone.
	KeepRecord
	// WriteLedger puts Ledger by compare-and-set on Ledger.Version (the
	// version that was read; 0 creates). If Record.Into is set and Order is "",
	// the caller checks once more that the cluster is virgin.
	WriteLedger
	// StepPlan writes Step (and role candidate when it is StepSwitched).
	StepPlan
	// LeadPlan writes Lead; nil deletes it.
	LeadPlan
	// RenewFenceLease asks From for a lease under Plan.
	RenewFenceLease
	// TakeSnapshot takes an etcd snapshot for Plan (a plan, an order, or
	// "hourly"), seals it with the server token to the escrow key and copies it
	// to a peer and, if it is reachable, the centre. Without an escrow key it
	// stays on this node.
	TakeSnapshot
	// StopK3s stops k3s and sees it gone.
	StopK3s
	// BeginReset writes Reset.
	BeginReset
	// ResetToOwnData runs cluster-reset.
	ResetToOwnData
	// RestoreFromEscrow runs cluster-reset with the mandate's snapshot.
	RestoreFromEscrow
	// RaiseEpoch writes Record and role server and deletes Reset, Step, Lead.
	RaiseEpoch
	// MoveAside writes Role and Record, then moves the server data (with
	// RoleNone the worker's certificates too) aside; deletes Step, Lead, Reset, Intent,
	// Ack, and forgets join material.
	MoveAside
	// RemoveDeadServer removes Node from the etcd members, and its Node object
	// too unless KeepNode says that the machine lives and stays a worker.
	RemoveDeadServer
	// UpdateAddresses writes Addrs for the launcher and the address layer.
	UpdateAddresses
	numActions
)

var actionNames = [numActions]string{"wait", "start-survey", "ask-grant", "claim-founding", "withdraw-claim", "ack-claim",
	"found-cluster", "abandon-founding", "request-join-material", "start-worker", "start-server", "keep-record", "write-ledger",
	"step-plan", "lead-plan", "renew-fence-lease", "take-snapshot", "stop-k3s", "begin-reset", "reset-to-own-data",
	"restore-from-escrow", "raise-epoch", "move-aside", "remove-dead-server", "update-addresses"}

// String returns the name of the kind.
func (k ActionKind) String() string {
	if int(k) < len(actionNames) {
		return actionNames[k]
	}
	return fmt.Sprintf("action(%d)", uint8(k))
}

// Action is one thing to do, and why. The caller does the actions of one Plan
// in order, stops at the first that fails, and plans again.
type Action struct {
	Kind ActionKind
	// Reason is a sentence that somebody can read out on the phone.
	Reason  string
	Blocker Blocker

	Init  bool
	As    Role
	Role  Role
	Node  fleet.NodeID
	From  fleet.NodeID
	UID   string
	Plan  string
	Order string // the Mandate behind it
	// KeepNode: RemoveDeadServer leaves the Node object alone.
	KeepNode bool
	Claim    *Claim
	Intent   *Intent
	Record   *Record
	Ledger   *Ledger
	Step     *Step
	Lead     *Lead
	Reset    *Reset
	Addrs    map[fleet.NodeID]string
	// For is how long it is sensible to wait before planning again; 0: until
	// something changes.
	For time.Duration
}
