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
