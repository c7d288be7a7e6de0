package pki

import (
	"crypto"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// NodeProfile is all that a node certificate is made from. Nothing of a
// certificate request is in it but the key.
type NodeProfile struct {
	Tenant string
	// Site is "" for a node in the pool.
	Site string
	Node fleet.NodeID
	// Public is the LDevID key, *ecdsa.PublicKey on P-256.
	Public crypto.PublicKey
	Now    time.Time
}
