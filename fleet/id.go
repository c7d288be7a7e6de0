package fleet

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

// EKHash is SHA-256 over the PKIX (SubjectPublicKeyInfo) DER of an EK public
// key. It is the portable name of a TPM: inventories of other tools use the
// same definition.
type EKHash [32]byte

// HashEK computes the EKHash of an RSA or ECDSA/ECDH public key.
func HashEK(publicKey any) (EKHash, error) {
	der, err := x509.MarshalPKIXPublicKey(publicKey)
	if err != nil {
		return EKHash{}, fmt.Errorf("fleet: hash EK: %w", err)
	}
	return sha256.Sum256(der), nil
}

// String returns 64 lower-case hex digits.
func (h EKHash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements encoding.TextMarshaler.
func (h EKHash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *EKHash) UnmarshalText(b []byte) error {
	p, err := ParseEKHash(string(b))
	if err == nil {
		*h = p
	}
	return err
}

// ParseEKHash reads 64 hex digits; separators ':' and surrounding space are
// tolerated since people paste from other tools.
func ParseEKHash(s string) (EKHash, error) {
	var h EKHash
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(s), ":", ""))
	if err != nil || len(b) != len(h) {
		return EKHash{}, fmt.Errorf("fleet: read EK hash: want 64 hex digits, got %q", clip(s, 80))
	}
	copy(h[:], b)
	return h, nil
}

// NodeID names a node for ever: "n-" and the base32 of the first 15 bytes of
// its EK hash (24 characters, lower case, no padding).
type NodeID string

// RequestID is "r-" and the base32 of the first 15 bytes of the evidence
// digest: approving an ID approves exactly that evidence.
type RequestID string

var lowerBase32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// NodeID derives the node's ID from the EK hash.
func (h EKHash) NodeID() NodeID { return NodeID("n-" + lowerBase32.EncodeToString(h[:15])) }

// RequestIDOf derives the request's ID from its evidence digest.
func RequestIDOf(evidenceDigest [32]byte) RequestID {
	return RequestID("r-" + lowerBase32.EncodeToString(evidenceDigest[:15]))
}

var (
	nodeIDForm    = regexp.MustCompile(`^n-[a-z2-7]{24}$`)
	requestIDForm = regexp.MustCompile(`^r-[a-z2-7]{24}$`)
	nameForm      = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

// Validate reports whether id has the form of a node ID.
func (id NodeID) Validate() error {
	if !nodeIDForm.MatchString(string(id)) {
		return fmt.Errorf("fleet: node ID %q: want n- and 24 characters a-z2-7", clip(string(id), 80))
	}
	return nil
}

// bytes returns the 15 bytes behind the ID.
func (id NodeID) bytes() ([]byte, error) {
	if err := id.Validate(); err != nil {
		return nil, err
	}
	return lowerBase32.DecodeString(string(id[2:]))
}

// Validate reports whether id has the form of a request ID.
func (id RequestID) Validate() error {
	if !requestIDForm.MatchString(string(id)) {
		return fmt.Errorf("fleet: request ID %q: want r- and 24 characters a-z2-7", clip(string(id), 80))
	}
	return nil
}

// ValidateName checks the name of a tenant, site or stack: a DNS label
// (RFC 1123), since names appear in certificates and Kubernetes labels.
func ValidateName(kind, s string) error {
	if !nameForm.MatchString(s) {
		return fmt.Errorf("fleet: %s name %q: want 1-63 characters a-z, 0-9 and '-', not at the ends", kind, clip(s, 80))
	}
	return nil
}

// clip bounds hostile input in error texts.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
