package pki

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// TPM algorithm and structure numbers, TPM 2.0 Library Part 2 §6.3, §6.9 and
// the TCG algorithm registry.
const (
	AlgRSA    uint16 = 0x0001
	AlgSHA1   uint16 = 0x0004
	AlgSHA256 uint16 = 0x000B
	AlgSHA384 uint16 = 0x000C
	AlgSHA512 uint16 = 0x000D
	AlgNull   uint16 = 0x0010
	AlgRSASSA uint16 = 0x0014
	AlgRSAPSS uint16 = 0x0016
	AlgECDSA  uint16 = 0x0018
	AlgECC    uint16 = 0x0023

	attestMagic   uint32 = 0xFF544347 // TPM_GENERATED_VALUE
	attestCertify uint16 = 0x8017     // TPM_ST_ATTEST_CERTIFY
	attestQuote   uint16 = 0x8018     // TPM_ST_ATTEST_QUOTE

	ownerHierarchy uint32 = 0x40000001 // TPM_RH_OWNER
)

// Attributes of TPM objects, TPMA_OBJECT, TPM 2.0 Library Part 2 §8.3.
const (
	AttrFixedTPM            uint32 = 1 << 1
	AttrFixedParent         uint32 = 1 << 4
	AttrSensitiveDataOrigin uint32 = 1 << 5
	AttrUserWithAuth        uint32 = 1 << 6
	AttrAdminWithPolicy     uint32 = 1 << 7
	AttrNoDA                uint32 = 1 << 10
	AttrRestricted          uint32 = 1 << 16
	AttrDecrypt             uint32 = 1 << 17
	AttrSign                uint32 = 1 << 18

	// LDevIDAttributes are exactly those of an LDevID key.
	LDevIDAttributes = AttrFixedTPM | AttrFixedParent | AttrSensitiveDataOrigin | AttrUserWithAuth | AttrNoDA | AttrSign
	// AKAttributes are exactly those of an attestation key: as the LDevID,
	// and restricted, so that it signs only what the TPM made itself.
	AKAttributes = LDevIDAttributes | AttrRestricted
)

// QuotePCRs are the PCRs a machine quotes, in the SHA-256 bank: firmware (0),
// option ROMs (2), programs (4), Secure Boot state (7), what the kernel's EFI
// stub adds (9), the unified kernel image (11), its overrides (12).
var QuotePCRs = []int{0, 2, 4, 7, 9, 11, 12}

// Key is the public part of a TPM key.
type Key struct {
	// Raw is the TPMT_PUBLIC.
	Raw []byte
	// Name is the TPM's name for the key: nameAlg || H_nameAlg(Raw).
	Name []byte
	// Type is "rsa" or "ecc".
	Type string
	// Attributes is TPMA_OBJECT.
	Attributes uint32
	AuthPolicy []byte
	// NameAlg, Scheme and Hash are TPM algorithm numbers; Scheme is AlgNull
	// and Hash 0 if the key has no fixed scheme.
	NameAlg, Scheme, Hash uint16
	// Bits is the size of the modulus or of the curve; Curve is "P-256",
	// "P-384" or "".
	Bits  int
	Curve string
	// Public is *rsa.PublicKey or *ecdsa.PublicKey (for EKs too, although an
	// ECC EK does Diffie-Hellman).
	Public crypto.PublicKey
}

// EndorsementKey is one EK with what vouches for it.
type EndorsementKey struct {
	Key Key
	// Certificate is the EK certificate, nil if the TPM holds none.
	Certificate *x509.Certificate
	// CertificateError says why a certificate that was sent is not there.
	CertificateError error
	// Intermediates came from the TPM too; they are never trust anchors.
	Intermediates []*x509.Certificate
}

// Statement is a TPMS_ATTEST with its signature.
type Statement struct {
	Magic           uint32
	Type            uint16
	QualifiedSigner []byte
	ExtraData       []byte
	Clock           ClockInfo
	// FirmwareVersion is obfuscated by the TPM for keys in the owner
	// hierarchy (TPM 2.0 Library Part 1 §36.7): not for display.
	FirmwareVersion uint64
	// Certified is set in a Certify statement, Quoted in a Quote.
	Certified Certified
	Quoted    Quoted
	// Raw are the bytes that were signed.
	Raw       []byte
	Signature Signature
}

// ClockInfo is TPMS_CLOCK_INFO. Clock is in milliseconds of powered time; for
// keys in the owner hierarchy the two counters carry a constant offset, so
// they may be compared among statements of one key only.
type ClockInfo struct {
	Clock        uint64
	ResetCount   uint32
	RestartCount uint32
	Safe         bool
}

// Regressed tells whether a TPM whose clock was before once now says c: a
// copy of a software TPM, or a replayed state. Both must come from statements
// of one AK.
func (c ClockInfo) Regressed(before ClockInfo) bool {
	return before.clock().After(c.clock())
}

func (c ClockInfo) clock() fleet.TPMClock {
	return fleet.TPMClock{Millis: c.Clock, Resets: c.ResetCount, Restarts: c.RestartCount}
}

// Certified is TPMS_CERTIFY_INFO.
type Certified struct{ Name, QualifiedName []byte }

// Quoted is TPMS_QUOTE_INFO.
type Quoted struct {
	// PCRSelection maps a bank's hash algorithm to sorted PCR indices.
	PCRSelection map[uint16][]int
	PCRDigest    []byte
}

// Signature is a TPMT_SIGNATURE: R and S for AlgECDSA, RSA for the others.
type Signature struct {
	Alg, Hash uint16
	R, S      []byte
	RSA       []byte
}

// LogEvent is one event of the firmware's log, reduced to the SHA-256 bank.
// Type, and for some types Data, are not protected by anything: only PCR and
// Digest are, once the log replays to quoted values.
type LogEvent struct {
	PCR    int
	Type   uint32
	Digest [32]byte
	Data   []byte
}

// Evidence is all that a machine shows in one enrollment. The proof that the
// credential was activated is not here: it is checked before, by enroll.
type Evidence struct {
	// Transcript is what both statements must be about.
	Transcript [32]byte
	// EKs: the identity EK, whose credential was activated, is first.
	EKs        []EndorsementKey
	AK, LDevID Key
	Certify    Statement
	Quote      Statement
	// PCRs are SHA-256 values by index.
	PCRs map[int][]byte
	Log  []LogEvent
	// LogError says why a log that was sent is not there.
	LogError error
	// CSRKey is the public key of the certificate request.
	CSRKey crypto.PublicKey
}

// Policy is what the centre knows when it judges.
type Policy struct {
	// Now is the centre's clock, TimeFloor an instant that is surely past.
	// Only what ended before TimeFloor is rejected as expired.
	Now, TimeFloor time.Time
	// VendorRoots and LabRoots are trust anchors, and nothing but self-signed
	// roots belongs in them. Either may be nil.
	VendorRoots, LabRoots *x509.CertPool
	// Intermediates help to build chains and are trusted for nothing.
	Intermediates []*x509.Certificate
	// RootNames maps the SHA-256 of a root's DER to the name that people know
	// it by (its file); may be nil.
	RootNames map[[32]byte]string
	// Listed tells whether the operator knew this EK beforehand; may be nil.
	Listed func(fleet.EKHash) bool
	// Images are the registered images.
	Images []fleet.Image
}

// Verdict is what the evidence proves.
type Verdict struct {
	Identity fleet.IdentityTrust
	Boot     fleet.BootTrust
	// Image is the ID (name@version) of the registered image that runs, "" if
	// unknown.
	Image string
	// EK is the hash of the identity EK.
	EK fleet.EKHash
	// Aliases are hashes of the other EKs the machine showed. They are
	// claims: only the first EK was proved.
	Aliases []fleet.EKHash
	// EKIssuer is the issuer of the EK certificate, EKRoot the trust anchor.
	// EKIssuer is the machine's word when the identity is unverified.
	EKIssuer, EKRoot string
	// TPMVendor and TPMFirmware come from the EK certificate ("" without):
	// what the TPM was when it left the factory.
	TPMVendor, TPMModel, TPMFirmware string
	// Findings are all checks made, in order.
	Findings []fleet.Finding
	// Warnings are sentences for the person who decides.
	Warnings []string
}

// Refusal is the error of Verify when a binding does not hold. Such evidence
// is not weak, it is wrong: an honest machine does not produce it.
type Refusal struct {
	// Check is the finding that failed, Detail is for people.
	Check, Detail string
}

// Error implements error.
func (r *Refusal) Error() string { return fmt.Sprintf("pki: verify %s: %s", r.Check, r.Detail) }
