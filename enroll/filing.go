package enroll

import (
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Filing is what a machine has proved, ready to become a request. The service
// makes one only after every check of the protocol and of pki.Verify held.
type Filing struct {
	Tenant string
	// Evidence is cleaned: every string in it is safe to store.
	Evidence fleet.Evidence
	// Findings and Warnings are the verifier's.
	Findings []fleet.Finding
	Warnings []string
	// Source is the caller's network address: a claim.
	Source string
	// Clock is the TPM's clock in this quote.
	Clock fleet.TPMClock
	// Begun is when the centre made the challenge that this quote answers:
	// the quote is younger than that.
	Begun time.Time
	// MaxUnverified is the largest number of machines with an unverified EK
	// that may wait in the tenant's queue; 0 means DefaultMaxUnverified.
	MaxUnverified int
	// Claim is the claim code as the machine sent it, at most MaxClaim bytes;
	// usually empty.
	Claim string
}

// Known is what the centre's store knows when a Filing arrives, read in the
// transaction that writes the Decision.
type Known struct {
	// Requests are all requests of this node in any state and any order.
	Requests []fleet.Request
	// Others are live requests of other nodes in the tenant whose serial or
	// UUID equals the Filing's (and is not empty). A bounded sample will do:
	// they lead to warnings only.
	Others []fleet.Request
	// Denied is true if the node's identity EK is on the tenant's deny list.
	Denied bool
	// UnverifiedWaiting counts the tenant's pending and quarantined requests
	// with identity unverified.
	UnverifiedWaiting int
}

// Certificate is what an issuer made.
type Certificate struct {
	// Chain is DER, leaf first.
	Chain [][]byte
	// Serial is lower-case hex without a prefix.
	Serial              string
	NotBefore, NotAfter time.Time
}

// Issued is what a node collects.
type Issued struct {
	// Certificates are DER, leaf first.
	Certificates [][]byte `json:"certificates"`
	// Documents are DSSE envelopes (Admission, Charter, ...).
	Documents [][]byte `json:"documents,omitempty"`
	// Serial is lower-case hex without a prefix.
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	// LDevIDKey is SHA-256 over the PKIX DER of the certified key.
	LDevIDKey fleet.HexBytes `json:"ldevid_key"`
}

// Reusable reports whether a machine that collects again gets this one again:
// it is for the same key and has more than a third of its life left (that is
// when renewal starts).
func (i Issued) Reusable(ldevidKey []byte, now time.Time) bool {
	life := i.NotAfter.Sub(i.NotBefore)
	return len(i.Certificates) > 0 && len(ldevidKey) > 0 && string(i.LDevIDKey) == string(ldevidKey) &&
		life > 0 && now.Before(i.NotAfter.Add(-life/3))
}
