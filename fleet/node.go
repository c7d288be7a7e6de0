package fleet

import (
	"fmt"
	"slices"
	"time"
)

// NodeState is the life of a node as the centre sees it.
//
//	approved <---> active      (first call with its certificate; and back
//	   |  ^          |          when it enrolls again and gets a new one)
//	   v  |          v
//	   denied <------+         (a person denies; allowing leads back to
//	                            approved: a new certificate is needed)
//
// The table of allowed moves is nodeMoves.
type NodeState uint8

const (
	NodeApproved NodeState = iota
	NodeActive
	NodeDenied
)

var nodeNames = [...]string{"approved", "active", "denied"}

// A denied node never becomes active at once: its certificate was refused
// meanwhile, so that it has to collect a new one.
var nodeMoves = map[NodeState][]NodeState{
	NodeApproved: {NodeActive, NodeDenied},
	NodeActive:   {NodeApproved, NodeDenied},
	NodeDenied:   {NodeApproved},
}

// String returns the word used in the CLI, the API and the console.
func (s NodeState) String() string { return name(nodeNames[:], int(s), "node state") }

// MarshalText implements encoding.TextMarshaler.
func (s NodeState) MarshalText() ([]byte, error) { return marshal(nodeNames[:], int(s), "node state") }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *NodeState) UnmarshalText(b []byte) error {
	i, err := unmarshal(nodeNames[:], b, "node state")
	if err == nil {
		*s = NodeState(i)
	}
	return err
}

// MoveTo returns to if the table of moves allows s -> to.
func (s NodeState) MoveTo(to NodeState) (NodeState, error) {
	if slices.Contains(nodeMoves[s], to) {
		return to, nil
	}
	return s, fmt.Errorf("fleet: node cannot go from %s to %s", s, to)
}

// Node is a machine whose request was approved.
type Node struct {
	ID     NodeID    `json:"id"`
	Tenant string    `json:"tenant"`
	Words  string    `json:"words"`
	State  NodeState `json:"state"`
	// Site is "" while the node waits in the pool of unassigned nodes.
	Site   string            `json:"site"`
	Labels map[string]string `json:"labels,omitempty"`
	// Incarnation counts the admissions of the node: a removed node that is
	// admitted again gets the next number.
	Incarnation uint64 `json:"incarnation,omitempty"`
	// Removed is the last incarnation that a Removal ended; the node is
	// admitted to its site while Incarnation is greater.
	Removed uint64 `json:"removed,omitempty"`
	// MayServe allows the node to be a server of its site.
	MayServe bool     `json:"may_serve"`
	EK       EKHash   `json:"ek"`
	Aliases  []EKHash `json:"ek_aliases,omitempty"`
	// AKName and LDevIDName are TPM names; LDevIDKey is SHA-256 over the PKIX
	// DER of the LDevID public key.
	AKName     HexBytes      `json:"ak_name"`
	LDevIDName HexBytes      `json:"ldevid_name,omitempty"`
	LDevIDKey  HexBytes      `json:"ldevid_key"`
	Identity   IdentityTrust `json:"identity"`
	Boot       BootTrust     `json:"boot"`
	Image      string        `json:"image,omitempty"`
	// Request is the request that was approved last.
	Request     RequestID   `json:"request"`
	Certificate Certificate `json:"certificate,omitzero"`
	Hardware    Hardware    `json:"hardware,omitzero"`
	Created     time.Time   `json:"created,omitzero"`
	LastSeen    time.Time   `json:"last_seen,omitzero"`
	// Source is the network address the node was last seen at: a claim.
	Source string `json:"source,omitempty"`
	// Reason is what the person who denied the node wrote.
	Reason string `json:"reason,omitempty"`
	// Replaces is the node whose place this one took; ReplacedBy is the one
	// that took its place.
	Replaces   NodeID `json:"replaces,omitempty"`
	ReplacedBy NodeID `json:"replaced_by,omitempty"`
	// Generation counts changes of site, labels and duties; Revision all.
	Generation int64 `json:"generation,omitempty"`
	Revision   int64 `json:"revision"`
}

// Admitted reports whether the node has a site and its admission stands.
func (n Node) Admitted() bool { return n.Site != "" && n.Incarnation > n.Removed }

// Certificate describes the certificate a node holds.
type Certificate struct {
	// Serial is lower-case hex without a prefix.
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

// Validate reports all problems of the node.
func (n Node) Validate() error {
	var p problems
	p.add(n.ID.Validate())
	p.check(n.EK.NodeID() == n.ID, "ID %s does not belong to EK %s", clip(string(n.ID), 80), n.EK)
	p.add(ValidateName("tenant", n.Tenant))
	if n.Site != "" {
		p.add(ValidateName("site", n.Site))
		p.check(n.Site != PoolSite, "the name %q stands for nodes without a site", PoolSite)
	}
	p.check(int(n.State) < len(nodeNames), "state %d does not exist", n.State)
	p.add(ValidateLabels(n.Labels))
	p.sha256("ldevid_key", n.LDevIDKey, true)
	p.add(n.Request.Validate())
	p.text("reason", n.Reason)
	return p.err("node")
}

// PreApprovalKind tells how a PreApproval recognises a machine.
type PreApprovalKind string

const (
	// PreApproveEKs: the machine's EK is in the list.
	PreApproveEKs PreApprovalKind = "ek-list"
	// PreApproveClaim: somebody on site typed the claim code.
	PreApproveClaim PreApprovalKind = "claim-code"
	// PreApproveRule: the verdict reaches what the rule demands.
	PreApproveRule PreApprovalKind = "rule"
)

// PreApproval is a decision taken before the machine called. It approves at
// most Limit requests, each EK once, and never what the approval policy
// refuses.
type PreApproval struct {
	Meta
	Kind PreApprovalKind `json:"kind"`
	// Site receives the nodes; "" leaves them in the pool. An EK of the list
	// can name another site.
	Site string `json:"site,omitempty"`
	// NodeLabels are given to the nodes. (Meta.Labels are of this object.)
	NodeLabels map[string]string `json:"node_labels,omitempty"`
	EKs        []ListedEK        `json:"eks,omitempty"`
	// ClaimHash is SHA-256 over the claim code; the code itself is shown once.
	ClaimHash HexBytes `json:"claim_hash,omitempty"`
	// MinIdentity and MinBoot are the least trust a machine must reach.
	MinIdentity IdentityTrust `json:"min_identity"`
	MinBoot     BootTrust     `json:"min_boot"`
	// Vendor and Serials narrow a rule to machines that say these of
	// themselves (SMBIOS system vendor and serial number, equal to the last
	// character). They are claims: a rule demands a proof beside them.
	Vendor  string   `json:"vendor,omitempty"`
	Serials []string `json:"serials,omitempty"`
	// Limit caps the uses; Used counts them. PerDay caps the uses of any 24
	// hours; 0: no such cap.
	Limit     int       `json:"limit"`
	PerDay    int       `json:"per_day,omitempty"`
	Used      int       `json:"used"`
	NotAfter  time.Time `json:"not_after"`
	Withdrawn bool      `json:"withdrawn,omitempty"`
}

// ListedEK is one line of an EK list.
type ListedEK struct {
	EK EKHash `json:"ek"`
	// Serial is for people; it is never compared.
	Serial string `json:"serial,omitempty"`
	Site   string `json:"site,omitempty"`
	// Labels are given to the node beside those of the list, and win.
	Labels map[string]string `json:"labels,omitempty"`
	// Request is the request this line approved; a line is good for one.
	Request RequestID `json:"request,omitempty"`
}

// Bounds of one PreApproval.
const (
	MaxListedEKs      = 100_000
	MaxListedSerials  = 1000
	maxListedProblems = 16
)

// Open reports whether the pre-approval can still approve a request.
func (a PreApproval) Open(now time.Time) bool {
	return !a.Withdrawn && a.Used < a.Limit && now.Before(a.NotAfter)
}

// Validate reports all problems of the pre-approval.
func (a PreApproval) Validate() error {
	var p problems
	a.Meta.validate(&p, "pre-approval")
	if a.Site != "" {
		p.add(ValidateName("site", a.Site))
	}
	p.add(ValidateLabels(a.NodeLabels))
	p.check(a.Limit > 0 && a.Limit <= MaxListedEKs, "limit %d; want 1 to %d", a.Limit, MaxListedEKs)
	p.check(a.Used >= 0, "used %d is negative", a.Used)
	p.check(a.PerDay >= 0 && a.PerDay <= a.Limit, "%d a day; want at most the limit of %d", a.PerDay, a.Limit)
	p.check(!a.NotAfter.IsZero(), "not_after is not set: a pre-approval must end")
	switch a.Kind {
	case PreApproveEKs:
		p.check(len(a.EKs) > 0 && len(a.EKs) <= MaxListedEKs, "%d EKs; want 1 to %d", len(a.EKs), MaxListedEKs)
	case PreApproveClaim:
		p.sha256("claim_hash", a.ClaimHash, true)
		p.check(a.Limit == 1, "limit %d; a claim code is good for one machine", a.Limit)
		p.check(a.Site != "", "a claim code belongs to a site")
	case PreApproveRule:
		// A rule without a demand on identity would approve any program that
		// talks to any TPM.
		p.check(a.MinIdentity > IdentityUnverified, "a rule must demand an identity better than %q", IdentityUnverified)
		p.check(a.MinBoot > BootUnknown, "a rule must demand a boot better than %q", BootUnknown)
	default:
		p.check(false, "kind %q is none of %q, %q, %q", clip(string(a.Kind), 80), PreApproveEKs, PreApproveClaim, PreApproveRule)
	}
	p.check(a.Kind == PreApproveEKs || len(a.EKs) == 0, "EKs belong to kind %q only", PreApproveEKs)
	p.check(a.Kind == PreApproveRule || a.Vendor == "" && len(a.Serials) == 0 && a.PerDay == 0, "vendor, serials and per_day belong to kind %q only", PreApproveRule)
	p.text("vendor", a.Vendor)
	p.check(len(a.Serials) <= MaxListedSerials, "%d serials, at most %d are allowed", len(a.Serials), MaxListedSerials)
	for _, s := range head(a.Serials, MaxListedSerials) {
		p.check(s != "", "a serial is empty: that would match machines which say nothing")
		p.text("serial", s)
	}
	p.check(a.Kind == PreApproveClaim || len(a.ClaimHash) == 0, "claim_hash belongs to kind %q only", PreApproveClaim)
	seen := map[EKHash]bool{}
	for _, e := range head(a.EKs, MaxListedEKs) {
		if len(p.list) > maxListedProblems {
			break
		}
		p.check(!seen[e.EK], "EK %s is listed twice", e.EK)
		seen[e.EK] = true
		p.text("serial", e.Serial)
		p.add(ValidateLabels(e.Labels))
		if e.Site != "" {
			p.add(ValidateName("site", e.Site))
		}
	}
	return p.err("pre-approval")
}
