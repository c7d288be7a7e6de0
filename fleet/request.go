package fleet

import (
	"fmt"
	"time"
)

// RequestState is the life of an enrollment request.
//
//	            +-> rejected            (a person says no; sticky per EK)
//	            |
//	pending ----+-> approved ----> issued ----> superseded
//	  |  ^      |      |  |                        ^
//	  |  |      |      |  +------------------------+  changed evidence
//	  |  |      |      +-> expired     (approved, never collected: 24 h)
//	  |  |      +-> expired            (never approved: 14 days)
//	  |  +-- quarantined <----------   (same EK in two places, clock backwards)
//	  +----> superseded                (changed evidence: a new request)
//
// The table of allowed moves is requestMoves; docs/terms.md has the words.
type RequestState uint8

const (
	RequestPending RequestState = iota
	RequestApproved
	RequestIssued
	RequestRejected
	RequestExpired
	RequestSuperseded
	RequestQuarantined
)

var requestNames = [...]string{"pending", "approved", "issued", "rejected", "expired", "superseded", "quarantined"}

var requestMoves = map[RequestState][]RequestState{
	RequestPending:     {RequestApproved, RequestRejected, RequestExpired, RequestSuperseded, RequestQuarantined},
	RequestApproved:    {RequestIssued, RequestRejected, RequestExpired, RequestSuperseded, RequestQuarantined},
	RequestIssued:      {RequestSuperseded, RequestRejected, RequestQuarantined},
	RequestQuarantined: {RequestPending, RequestRejected, RequestSuperseded},
	RequestExpired:     {RequestPending, RequestSuperseded},
	RequestRejected:    {RequestPending, RequestSuperseded},
	RequestSuperseded:  {RequestPending},
}

// String returns the word used in the CLI, the API and the console.
func (s RequestState) String() string { return name(requestNames[:], int(s), "state") }

// MarshalText implements encoding.TextMarshaler.
func (s RequestState) MarshalText() ([]byte, error) {
	return marshal(requestNames[:], int(s), "request state")
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *RequestState) UnmarshalText(b []byte) error {
	i, err := unmarshal(requestNames[:], b, "request state")
	*s = RequestState(i)
	return err
}

// Live reports whether the request is the one that counts for its node: a
// node has at most one live request.
func (s RequestState) Live() bool {
	switch s {
	case RequestPending, RequestApproved, RequestIssued, RequestQuarantined, RequestRejected:
		return true
	}
	return false
}

// MoveTo returns to if the table of moves allows s -> to.
func (s RequestState) MoveTo(to RequestState) (RequestState, error) {
	for _, m := range requestMoves[s] {
		if m == to {
			return to, nil
		}
	}
	return s, fmt.Errorf("fleet: request cannot go from %s to %s", s, to)
}

// Request is one machine's wish to become a node, with the verdict on its
// evidence. Its ID is a prefix of the evidence digest.
type Request struct {
	ID       RequestID     `json:"id"`
	Tenant   string        `json:"tenant"`
	Node     NodeID        `json:"node"`
	Words    string        `json:"words"`
	State    RequestState  `json:"state"`
	Identity IdentityTrust `json:"identity"`
	Boot     BootTrust     `json:"boot"`
	// Image is the registered image the machine proved to run ("" if none).
	Image string `json:"image"`
	Site  string `json:"site"`
	// Labels were given at approval.
	Labels map[string]string `json:"labels,omitempty"`
	// EvidenceDigest is over stable evidence only (see package enroll).
	EvidenceDigest [32]byte  `json:"-"`
	Evidence       Evidence  `json:"evidence"`
	FirstSeen      time.Time `json:"first_seen"`
	LastSeen       time.Time `json:"last_seen"`
	// Source is the network address the machine was last seen at: a claim.
	Source string `json:"source"`
	// Clock is the TPM's clock in the machine's last quote.
	Clock TPMClock `json:"tpm_clock,omitzero"`
	// Warnings are short sentences for the person who decides.
	Warnings []string `json:"warnings"`
	// Findings is what the verifier checked, in order.
	Findings []Finding `json:"findings,omitempty"`
	// DecidedBy, DecidedAt and Reason describe the last decision.
	DecidedBy string    `json:"decided_by,omitempty"`
	DecidedAt time.Time `json:"decided_at,omitzero"`
	Reason    string    `json:"reason,omitempty"`
	// Supersedes is the node's earlier request, if evidence changed.
	Supersedes RequestID `json:"supersedes,omitempty"`
	// Replaces is the node whose place the machine takes.
	Replaces NodeID `json:"replaces,omitempty"`
	// Revision counts the changes that matter to a person who decides (state,
	// warnings, findings; not LastSeen, Source, Clock). Callers that decide
	// give the one they saw.
	Revision int64 `json:"revision"`
}

// Evidence is the stable part of what a machine proved, the part that the
// evidence digest covers. Nonces, quotes, clocks and link state are not here.
type Evidence struct {
	EK         EKHash   `json:"ek"`
	Aliases    []EKHash `json:"ek_aliases,omitempty"`
	AKName     HexBytes `json:"ak_name"`
	LDevIDName HexBytes `json:"ldevid_name"`
	// LDevIDKey is SHA-256 over the PKIX DER of the LDevID public key; it is
	// what Admissions name.
	LDevIDKey HexBytes      `json:"ldevid_key"`
	Identity  IdentityTrust `json:"identity"`
	Boot      BootTrust     `json:"boot"`
	Image     string        `json:"image"`
	// PCRs holds the SHA-256 values of PCR 0, 2 and 7.
	PCRs        map[int]HexBytes `json:"pcrs"`
	TPMVendor   string           `json:"tpm_vendor"`
	TPMFirmware string           `json:"tpm_firmware"`
	Board       string           `json:"board"`
	Serial      string           `json:"serial"`
	UUID        string           `json:"uuid"`
	// EKIssuer names the EK certificate's issuer, for display.
	EKIssuer string `json:"ek_issuer,omitempty"`
	// Hardware is what the machine says of itself: claims, never keys. Only
	// board, serial and UUID of it enter the digest.
	Hardware Hardware `json:"hardware"`
}

// TPMClock is a TPM's own idea of time: milliseconds of powered time, and how
// often it was reset and restarted. The counters carry a constant offset that
// belongs to the attestation key, so clocks of one key only are comparable.
type TPMClock struct {
	Millis   uint64 `json:"millis"`
	Resets   uint32 `json:"resets"`
	Restarts uint32 `json:"restarts"`
}

// After reports whether c stands later than b; both are of one attestation
// key. Counters only rise between two TPM2_Clear, which also ends the key;
// Millis only rises while both counters stay. The counters carry an unknown
// constant offset (TPM 2.0 Library Part 1, obfuscation), so that they may
// wrap: they are compared as serial numbers, RFC 1982.
func (c TPMClock) After(b TPMClock) bool {
	if c.Resets != b.Resets {
		return int32(c.Resets-b.Resets) > 0
	}
	if c.Restarts != b.Restarts {
		return int32(c.Restarts-b.Restarts) > 0
	}
	return c.Millis > b.Millis
}

// Finding is one check of the verifier with its outcome.
type Finding struct {
	Check  string `json:"check"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}
