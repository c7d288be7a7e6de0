package papers

import (
	"crypto"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Open reads the papers in cfg.Dir, and drops what does not verify.
func Open(cfg Config) (*Papers, error) { return nil, errNotYet }

// Learn verifies each envelope, merges it and flushes what is new before it
// returns how many that were. Envelopes that are refused cost nothing but a
// *Refused in the joined error; any other error is a fault of the disk, after
// which nothing of this call is acknowledged.
func (p *Papers) Learn(envelopes [][]byte) (learned int, err error) { return 0, errNotYet }

// Documents is what the planner reads. It is never changed in place.
func (p *Papers) Documents() clusterbootstrap.Documents { return clusterbootstrap.Documents{} }

// Revision changes whenever the papers do, but not their order of arrival: two
// nodes that hold the same documents have the same revision.
func (p *Papers) Revision() uint64 { return 0 }

// Changed returns a channel that is closed at the next change.
func (p *Papers) Changed() <-chan struct{} { return nil }

// Refs names all documents, sorted.
func (p *Papers) Refs() []Ref { return nil }

// Envelopes returns the envelopes of those refs that are held.
func (p *Papers) Envelopes(refs []Ref) [][]byte { return nil }

// Missing returns those of refs that are not held.
func (p *Papers) Missing(refs []Ref) []Ref { return nil }

// Shown are the envelopes of a hello; nil for what there is not.
type Shown struct{ Charter, Admission, Record []byte }

// Hello returns what node shows of itself: the charter, its newest admission,
// the newest record of the cluster uid ("": of any).
func (p *Papers) Hello(node fleet.NodeID, uid string) Shown { return Shown{} }

// Standing says what the owner of an LDevID key is to this site now.
func (p *Papers) Standing(key Ref) (fleet.Admission, Standing) { return fleet.Admission{}, Unknown }

// Orders returns the orders for this node that end after now, oldest first.
func (p *Papers) Orders(now time.Time) []fleet.Order { return nil }

// Mandate returns the newest order for this node that ends after now and tells
// the planner something; nil if there is none.
func (p *Papers) Mandate(now time.Time) *clusterbootstrap.Mandate { return nil }

// KeyRef is SHA-256 over the PKIX DER of a key.
func KeyRef(public crypto.PublicKey) (Ref, error) { return Ref{}, errNotYet }

// SignRecord makes the envelope of a cluster record, signed by this node's
// LDevID key. Learn takes it if the key's admission lets the node serve.
func SignRecord(signer crypto.Signer, tenant, site string, r clusterbootstrap.Record) ([]byte, error) {
	return nil, errNotYet
}
