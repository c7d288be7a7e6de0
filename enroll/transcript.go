package enroll

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"

	"github.com/muster-edge/muster/fleet"
)

// ExporterLabel and ExporterLength are the arguments of the TLS exporter
// (RFC 8446 §7.5, empty context) that ties a proof to one connection.
const (
	ExporterLabel  = "EXPORTER-muster-enroll-v1"
	ExporterLength = 32
)

const (
	domainTranscript = "muster/enroll/v1/transcript"
	domainEvidence   = "muster/enroll/v1/evidence"
)

// TranscriptFields are what a transcript binds together.
type TranscriptFields struct {
	// Nonce is the centre's, 32 bytes.
	Nonce []byte
	// EK is the PKIX DER of the identity EK's public key.
	EK []byte
	// AK and LDevID are TPMT_PUBLIC structures.
	AK, LDevID []byte
	// CSR is the PKCS #10 request in DER.
	CSR []byte
	// Hardware is the hardware description exactly as sent.
	Hardware []byte
	// Exporter is the TLS exporter of the connection, ExporterLength bytes.
	Exporter []byte
	// Claim is the claim code exactly as sent. Empty, it is no field at all,
	// so that transcripts without one are what they were before there were
	// claim codes; at the end, it cannot be taken for another field.
	Claim []byte
}

// Transcript is the qualifying data of both TPM statements. Every field is
// length-prefixed and the domain comes first, so that no two different lists
// of fields, and no other kind of digest, give the same bytes to the hash.
func Transcript(f TranscriptFields) [32]byte {
	d := newDigest(domainTranscript)
	for _, b := range [][]byte{f.Nonce, f.EK, f.AK, f.LDevID, f.CSR, f.Hardware, f.Exporter} {
		d.bytes(b)
	}
	if len(f.Claim) > 0 {
		d.bytes(f.Claim)
	}
	return d.sum()
}

// Proof shows that who knows the transcript also activated the credential:
// HMAC-SHA-256(secret, transcript).
func Proof(secret []byte, transcript [32]byte) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write(transcript[:])
	return m.Sum(nil)
}

// CheckProof compares in constant time. An empty secret proves nothing.
func CheckProof(proof, secret []byte, transcript [32]byte) bool {
	return len(secret) > 0 && hmac.Equal(proof, Proof(secret, transcript))
}

// EvidencePCRs are the PCRs whose values are stable evidence: firmware,
// option ROMs, Secure Boot state. 4, 9, 11 and 12 enter as boot verdict and
// image only, since another boot path changes their raw values.
var EvidencePCRs = []int{0, 2, 7}

// EvidenceDigest names evidence. It covers the stable part: what a person
// approves, and what must not change behind an approval. Aliases, EK issuer
// and the hardware list are shown but not covered.
func EvidenceDigest(e fleet.Evidence) [32]byte {
	d := newDigest(domainEvidence)
	d.bytes(e.EK[:])
	d.bytes(e.AKName)
	d.bytes(e.LDevIDName)
	d.bytes(e.LDevIDKey)
	d.text(e.Identity.String())
	d.text(e.Boot.String())
	d.text(e.Image)
	for _, i := range EvidencePCRs {
		d.bytes(e.PCRs[i])
	}
	for _, s := range []string{e.TPMVendor, e.TPMFirmware, e.Board, e.Serial, e.UUID} {
		d.text(s)
	}
	return d.sum()
}

// digest hashes length-prefixed fields.
type digest struct{ h hash.Hash }

func newDigest(domain string) digest {
	d := digest{sha256.New()}
	d.text(domain)
	return d
}

func (d digest) bytes(b []byte) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(b)))
	d.h.Write(n[:])
	d.h.Write(b)
}

func (d digest) text(s string) { d.bytes([]byte(s)) }

func (d digest) sum() (out [32]byte) {
	d.h.Sum(out[:0])
	return out
}
