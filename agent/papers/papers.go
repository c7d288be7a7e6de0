// Package papers keeps the signed documents of a node's site on disk: charter,
// admissions, removals, orders and cluster records, each as the envelope it
// came in. What is in it was verified; what was acknowledged survives a power
// cut at any write. It needs no centre and believes no clock.
//
// It talks to nobody: who learned what from whom is the caller's matter, as is
// doing what an order says.
package papers

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/muster-edge/muster/fleet"
)

// Bounds of what is kept, all enforced by Learn. The centre's own limit of
// nodes per site is far below.
const (
	// MaxEnvelope is the largest envelope in bytes.
	MaxEnvelope = 256 << 10
	// MaxFacts bounds admissions and removals together.
	MaxFacts = 4096
	// MaxOrders bounds the orders of this node, and those of all others.
	MaxOrders = 64
	// MaxRecords bounds the clusters of the site whose record is kept.
	MaxRecords = 16
	// MaxBytes bounds all envelopes together.
	MaxBytes = 32 << 20
)

// Config says whose papers these are.
type Config struct {
	// Dir is made if it is missing (mode 0700).
	Dir string
	// OrdersKeys are trusted for every document, for ever: those of site.json.
	OrdersKeys []crypto.PublicKey
	// Node is this node, Key SHA-256 over the PKIX DER of its LDevID key.
	Node fleet.NodeID
	Key  Ref
	// Tenant and Site: "" means those of this node's own Admission, and that
	// nothing is learned before it.
	Tenant, Site string
	// Log gets a line for each document that is refused; default: none.
	Log *slog.Logger
}

// Validate reports all problems.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("papers: config: "+what))
		}
	}
	check(c.Dir != "", "dir is missing")
	check(len(c.OrdersKeys) > 0, "there is no orders key, so that no document could be verified")
	check(c.Node.Validate() == nil, "node is no node ID")
	check(c.Key != Ref{}, "key is missing")
	check(c.Tenant == "" || fleet.ValidateName("tenant", c.Tenant) == nil, "tenant is no name")
	check(c.Site == "" || fleet.ValidateName("site", c.Site) == nil, "site is no name")
	return errors.Join(errs...)
}

// Ref names a document by SHA-256 of its payload, or a key by SHA-256 of its
// PKIX DER.
type Ref [sha256.Size]byte

// String is hex.
func (r Ref) String() string { return fmt.Sprintf("%x", r[:]) }

// Refused says why one envelope was not taken. It is no fault: the others of
// the same Learn were.
type Refused struct {
	// Ref is that of the payload; zero if the envelope could not be read.
	Ref  Ref
	Kind string
	Why  error
}

// Error implements error.
func (r *Refused) Error() string {
	return fmt.Sprintf("papers: refuse %s %.8s: %v", r.Kind, r.Ref, r.Why)
}

// Unwrap returns the reason.
func (r *Refused) Unwrap() error { return r.Why }

// Standing is what a key is to this site.
type Standing uint8

const (
	// Unknown: no admission names it.
	Unknown Standing = iota
	// Admitted: the newest admission of its node names it, and stands.
	Admitted
	// Removed: it was admitted once and is no longer.
	Removed
)

// Papers are the documents of one node. Methods may be called by anybody at
// any time.
type Papers struct {
	cfg Config
	mu  sync.Mutex
	set *set
}

type set struct{}

var errNotYet = errors.New("papers: not written yet")
