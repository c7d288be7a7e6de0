package fleet

import (
	"fmt"
	"regexp"
	"slices"
	"time"
)

// ClusterRecord is what a server says about the cluster it belongs to: the
// payload of an envelope of type ClusterRecordPayload, signed with the LDevID
// key of the server that wrote it. It is good if that key is in an Admission
// with MayServe that no Removal ended. A record is newer than another one of
// the same UID by (Epoch, Version).
type ClusterRecord struct {
	Tenant string `json:"tenant"`
	Site   string `json:"site"`
	// UID is drawn by the founder and never changes.
	UID string `json:"uid"`
	// Epoch grows with each reset or restore; Version with each other change
	// inside an epoch. Data of a smaller epoch is void.
	Epoch   uint64 `json:"epoch"`
	Version uint64 `json:"version"`
	Founder NodeID `json:"founder"`
	// Servers are the confirmed servers, sorted.
	Servers []NodeID `json:"servers"`
	// Into is the UID of the cluster this one was dissolved into.
	Into string `json:"into,omitempty"`
}

const (
	// MaxClusterEpoch bounds epochs, so that nobody can use them up.
	MaxClusterEpoch = 1 << 40
	// MaxRecordServers bounds the list of servers in a record.
	MaxRecordServers = 16
	// MaxEnvelope bounds the signed documents that nodes keep and pass on, in
	// bytes of the envelope's JSON.
	MaxEnvelope = 256 << 10
)

var clusterUIDForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,63}$`)

// ValidateClusterUID checks the form of a cluster's UID: 1-64 letters, digits
// and '-', as it appears in object names and lines for people.
func ValidateClusterUID(uid string) error {
	if !clusterUIDForm.MatchString(uid) {
		return fmt.Errorf("fleet: cluster UID %q: want 1-64 letters, digits and '-'", clip(uid, 80))
	}
	return nil
}

// Newer reports whether r replaces o, a record of the same cluster.
func (r ClusterRecord) Newer(o ClusterRecord) bool {
	return r.Epoch > o.Epoch || r.Epoch == o.Epoch && r.Version > o.Version
}

// Validate reports all problems of the record.
func (r ClusterRecord) Validate() error {
	var p problems
	p.add(ValidateName("tenant", r.Tenant))
	p.add(ValidateName("site", r.Site))
	p.check(r.Site != PoolSite, "the name %q stands for nodes without a site", PoolSite)
	p.add(ValidateClusterUID(r.UID))
	p.check(r.Epoch <= MaxClusterEpoch, "epoch %d; at most %d is allowed", r.Epoch, uint64(MaxClusterEpoch))
	p.add(r.Founder.Validate())
	p.check(len(r.Servers) <= MaxRecordServers, "%d servers, at most %d are allowed", len(r.Servers), MaxRecordServers)
	servers := head(r.Servers, MaxRecordServers)
	for _, s := range servers {
		p.add(s.Validate())
	}
	p.check(slices.IsSorted(servers), "the servers are not sorted")
	p.check(len(slices.Compact(slices.Clone(servers))) == len(servers), "a server is listed twice")
	if r.Into != "" {
		p.add(ValidateClusterUID(r.Into))
		p.check(r.Into != r.UID, "cluster %q cannot be dissolved into itself", clip(r.Into, 80))
	}
	return p.err("cluster record")
}

// EscrowOffer is how a node says to which key an operator may seal a snapshot
// for it: the payload of an envelope of type EscrowOfferPayload, signed with
// the node's LDevID key.
type EscrowOffer struct {
	// Format is EscrowOfferFormat.
	Format string `json:"format"`
	Tenant string `json:"tenant"`
	Site   string `json:"site"`
	Node   NodeID `json:"node"`
	// Key is an X25519 public key, 32 bytes. Its private half is in the
	// node's memory only and ends with the agent.
	Key    HexBytes  `json:"key"`
	Issued time.Time `json:"issued"`
}

// EscrowOfferFormat is the value of EscrowOffer.Format.
const EscrowOfferFormat = "muster/escrow-offer/v1"

// Validate reports all problems of the offer.
func (o EscrowOffer) Validate() error {
	var p problems
	p.document(o.Format, EscrowOfferFormat, o.Tenant, o.Site, o.Issued)
	p.add(o.Node.Validate())
	p.check(len(o.Key) == escrowKeySize, "key has %d bytes; an X25519 public key has %d", len(o.Key), escrowKeySize)
	return p.err("escrow offer")
}

// NodeReport is how one node stands in its site's cluster, as it last said.
// All texts are claims of the node, cleaned.
type NodeReport struct {
	Tenant string `json:"tenant"`
	Site   string `json:"site"`
	Node   NodeID `json:"node"`
	// At is when the centre got it.
	At time.Time `json:"at"`
	// UID, Epoch and Version are of the cluster record the node holds; ""
	// if it holds none that is good.
	UID     string `json:"uid,omitempty"`
	Epoch   uint64 `json:"epoch,omitempty"`
	Version uint64 `json:"version,omitempty"`
	// Role is "none", "worker", "candidate" or "server"; State the planner's
	// word; Blocker a word for what the node waits for, Reason a sentence.
	Role    string `json:"role"`
	State   string `json:"state"`
	Blocker string `json:"blocker,omitempty"`
	Reason  string `json:"reason,omitempty"`
	// Voters and Learners are what a server sees of etcd; Nodes and
	// NodesReady what it sees of Kubernetes.
	Voters     int        `json:"voters,omitempty"`
	Learners   int        `json:"learners,omitempty"`
	Nodes      int        `json:"nodes,omitempty"`
	NodesReady int        `json:"nodes_ready,omitempty"`
	K3s        string     `json:"k3s,omitempty"`
	Since      time.Time  `json:"since,omitzero"`
	Charter    DocVersion `json:"charter,omitzero"`
	// Offer is the key to which a snapshot for this node may be sealed, and
	// Offered the node's signed envelope that says so.
	Offer   HexBytes `json:"offer,omitempty"`
	Offered []byte   `json:"offered,omitempty"`
	// Snapshots are on the node's own disk, newest first.
	Snapshots []string `json:"snapshots,omitempty"`
	// Labels are what the node gave its k3s node.
	Labels map[string]string `json:"labels,omitempty"`
}

// IssuedOrder is an order with what became of it.
type IssuedOrder struct {
	Order
	State OrderState `json:"state"`
	// Text is what the node said last about it.
	Text string `json:"text,omitempty"`
	// By gave the order.
	By string `json:"by"`
	// Changed is when State last changed.
	Changed  time.Time `json:"changed"`
	Revision int64     `json:"revision"`
}

// EscrowBlob describes one sealed snapshot at the centre.
type EscrowBlob struct {
	Tenant string `json:"tenant"`
	Site   string `json:"site"`
	// ID is EscrowID of SHA256.
	ID     string   `json:"id"`
	SHA256 HexBytes `json:"sha256"`
	Size   int64    `json:"size"`
	// Node is who sent it; For is set if an operator sealed it for that node.
	Node NodeID `json:"node,omitempty"`
	For  NodeID `json:"for,omitempty"`
	// Kind is that of package escrow: "" for a snapshot, or disk-key.
	Kind    string `json:"kind,omitempty"`
	Cluster string `json:"cluster,omitempty"`
	Epoch   uint64 `json:"epoch,omitempty"`
	// Taken is the node's claim, Stored the centre's clock.
	Taken  time.Time `json:"taken,omitzero"`
	Stored time.Time `json:"stored"`
	// KeyID names the public key it is sealed to.
	KeyID string `json:"key_id,omitempty"`
}

var escrowIDForm = regexp.MustCompile(`^e-[a-z2-7]{24}$`)

// EscrowID names a sealed blob by SHA-256 over its bytes: "e-" and the base32
// of the first 15 bytes.
func EscrowID(sha256 [32]byte) string { return "e-" + lowerBase32.EncodeToString(sha256[:15]) }

// ValidateEscrowID checks the form of an EscrowID.
func ValidateEscrowID(id string) error {
	if !escrowIDForm.MatchString(id) {
		return fmt.Errorf("fleet: escrow ID %q: want e- and 24 characters a-z2-7", clip(id, 80))
	}
	return nil
}
