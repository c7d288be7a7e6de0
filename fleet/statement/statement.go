// Package statement is the one envelope of all signed documents: DSSE v1, the
// Dead Simple Signing Envelope (github.com/secure-systems-lab/dsse). The
// signature covers the payload type and the exact payload bytes, so that a
// document can neither be taken for one of another kind nor be re-encoded.
//
// Only two kinds of keys sign: ECDSA P-256 with SHA-256 (ASN.1 signatures)
// and Ed25519. It does no I/O.
package statement

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// Limits of what Verify and Parse read. They hold before anything is decoded.
const (
	// MaxEnvelope is the largest envelope, in bytes of JSON.
	MaxEnvelope = 1 << 20
	// MaxSignatures is the largest number of signatures in one envelope.
	MaxSignatures = 8
	maxType       = 256
	maxKeyFile    = 64 << 10
)

// ErrUntrusted is what Verify returns for a well-formed envelope that none of
// the given keys signed. A caller may fetch newer keys and try again.
var ErrUntrusted = errors.New("statement: no signature by a trusted key")

// Envelope is a DSSE envelope. Its JSON form is the one of the specification.
type Envelope struct {
	PayloadType string      `json:"payloadType"`
	Payload     []byte      `json:"payload"`
	Signatures  []Signature `json:"signatures"`
}

// Signature is one signature over the pre-authentication encoding.
type Signature struct {
	// KeyID is the KeyID of the signing key. It is a hint to find the key and
	// is not covered by the signature.
	KeyID string `json:"keyid"`
	Sig   []byte `json:"sig"`
}

// Sign puts payload into an envelope signed by every signer, of which there
// must be at least one and at most MaxSignatures.
func Sign(payloadType string, payload []byte, signers ...crypto.Signer) (Envelope, error) {
	if len(signers) == 0 || len(signers) > MaxSignatures {
		return Envelope{}, fmt.Errorf("statement: sign: %d signers, want 1 to %d", len(signers), MaxSignatures)
	}
	if payloadType == "" || len(payloadType) > maxType {
		return Envelope{}, fmt.Errorf("statement: sign: payload type of %d bytes, want 1 to %d", len(payloadType), maxType)
	}
	e := Envelope{PayloadType: payloadType, Payload: bytes.Clone(payload)}
	if e.Payload == nil {
		e.Payload = []byte{} // null would not be base64
	}
	message := encode(payloadType, payload)
	for _, s := range signers {
		id, err := KeyID(s.Public())
		if err != nil {
			return Envelope{}, fmt.Errorf("statement: sign: %w", err)
		}
		var sig []byte
		if _, ok := s.Public().(ed25519.PublicKey); ok {
			sig, err = s.Sign(rand.Reader, message, crypto.Hash(0))
		} else {
			digest := sha256.Sum256(message)
			sig, err = s.Sign(rand.Reader, digest[:], crypto.SHA256)
		}
		if err != nil {
			return Envelope{}, fmt.Errorf("statement: sign with key %s: %w", id, err)
		}
		e.Signatures = append(e.Signatures, Signature{KeyID: id, Sig: sig})
	}
	if size := len(e.JSON()); size > MaxEnvelope {
		return Envelope{}, fmt.Errorf("statement: sign: envelope of %d bytes, at most %d are allowed", size, MaxEnvelope)
	}
	return e, nil
}

// JSON returns the envelope as one line of JSON.
func (e Envelope) JSON() []byte {
	b, err := json.Marshal(e)
	if err != nil {
		return nil // strings and byte slices always marshal
	}
	return b
}

// Parse reads an envelope without trusting it: nothing of the result is
// verified. It is for showing and for picking keys.
func Parse(envelope []byte) (Envelope, error) {
	if len(envelope) > MaxEnvelope {
		return Envelope{}, fmt.Errorf("statement: read envelope: %d bytes, at most %d are allowed", len(envelope), MaxEnvelope)
	}
	// The specification wants unknown fields ignored; the base64 may be
	// standard or URL-safe ("Either standard or URL-safe encoding is
	// allowed", section Protocol), so that it is decoded by hand.
	var raw struct {
		PayloadType string `json:"payloadType"`
		Payload     string `json:"payload"`
		Signatures  []struct {
			KeyID string `json:"keyid"`
			Sig   string `json:"sig"`
		} `json:"signatures"`
	}
	d := json.NewDecoder(bytes.NewReader(envelope))
	if err := d.Decode(&raw); err != nil {
		return Envelope{}, fmt.Errorf("statement: read envelope: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Envelope{}, errors.New("statement: read envelope: something follows the JSON object")
	}
	if raw.PayloadType == "" || len(raw.PayloadType) > maxType {
		return Envelope{}, fmt.Errorf("statement: read envelope: payload type of %d bytes, want 1 to %d", len(raw.PayloadType), maxType)
	}
	if n := len(raw.Signatures); n == 0 || n > MaxSignatures {
		return Envelope{}, fmt.Errorf("statement: read envelope: %d signatures, want 1 to %d", n, MaxSignatures)
	}
	e := Envelope{PayloadType: raw.PayloadType}
	var err error
	if e.Payload, err = decodeBase64(raw.Payload); err != nil {
		return Envelope{}, fmt.Errorf("statement: read envelope: payload: %w", err)
	}
	for i, s := range raw.Signatures {
		sig, err := decodeBase64(s.Sig)
		if err != nil {
			return Envelope{}, fmt.Errorf("statement: read envelope: signature %d: %w", i, err)
		}
		e.Signatures = append(e.Signatures, Signature{KeyID: s.KeyID, Sig: sig})
	}
	return e, nil
}

// Verify returns the payload of the envelope (JSON) if its type is
// payloadType and at least one of keys signed it. The error is ErrUntrusted
// when the envelope is sound but no key fits.
func Verify(envelope []byte, payloadType string, keys []crypto.PublicKey) ([]byte, error) {
	e, err := Parse(envelope)
	if err != nil {
		return nil, err
	}
	if _, err := e.VerifiedBy(payloadType, keys); err != nil {
		return nil, err
	}
	return e.Payload, nil
}

// VerifiedBy is as Verify, for a parsed envelope, and returns the index in
// keys of the first key that signed.
func (e Envelope) VerifiedBy(payloadType string, keys []crypto.PublicKey) (int, error) {
	if e.PayloadType != payloadType {
		return -1, fmt.Errorf("statement: verify: payload type is %.80q, want %q", e.PayloadType, payloadType)
	}
	if n := len(e.Signatures); n == 0 || n > MaxSignatures {
		return -1, fmt.Errorf("statement: verify: %d signatures, want 1 to %d", n, MaxSignatures)
	}
	message := encode(e.PayloadType, e.Payload)
	digest := sha256.Sum256(message)
	for i, k := range keys {
		id, err := KeyID(k)
		if err != nil {
			return -1, fmt.Errorf("statement: verify: trusted key %d: %w", i, err)
		}
		for _, s := range e.Signatures {
			// The key ID only saves work: a signature without one is tried.
			if s.KeyID != "" && subtle.ConstantTimeCompare([]byte(s.KeyID), []byte(id)) == 0 {
				continue
			}
			if fits(k, message, digest[:], s.Sig) {
				return i, nil
			}
		}
	}
	return -1, ErrUntrusted
}

func fits(key crypto.PublicKey, message, digest, sig []byte) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest, sig)
	case ed25519.PublicKey:
		return ed25519.Verify(k, message, sig)
	}
	return false
}

// KeyID is the lower-case hex SHA-256 of the key's PKIX DER. It refuses all
// but ECDSA P-256 and Ed25519 keys.
func KeyID(key crypto.PublicKey) (string, error) {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k == nil || k.Curve != elliptic.P256() {
			return "", errors.New("statement: key: ECDSA keys must be on P-256")
		}
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return "", errors.New("statement: key: Ed25519 key has a wrong size")
		}
	default:
		return "", fmt.Errorf("statement: key: %T neither is ECDSA P-256 nor Ed25519", key)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("statement: key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// ParseKeys reads "PUBLIC KEY" PEM blocks (PKIX). Every block must be a key
// that can sign envelopes; other text between blocks is skipped.
func ParseKeys(text []byte) ([]crypto.PublicKey, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("statement: read keys: %d bytes, at most %d are allowed", len(text), maxKeyFile)
	}
	var keys []crypto.PublicKey
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		if block == nil {
			break
		}
		if block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("statement: read keys: PEM block %.40q, want PUBLIC KEY", block.Type)
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("statement: read keys: %w", err)
		}
		if _, err := KeyID(k); err != nil {
			return nil, fmt.Errorf("statement: read keys: %w", err)
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, errors.New("statement: read keys: no PUBLIC KEY block in PEM form")
	}
	return keys, nil
}

// encode is PAE, the pre-authentication encoding of DSSE v1:
// "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body.
func encode(payloadType string, payload []byte) []byte {
	b := make([]byte, 0, 40+len(payloadType)+len(payload))
	b = append(b, "DSSEv1 "...)
	b = strconv.AppendInt(b, int64(len(payloadType)), 10)
	b = append(b, ' ')
	b = append(b, payloadType...)
	b = append(b, ' ')
	b = strconv.AppendInt(b, int64(len(payload)), 10)
	b = append(b, ' ')
	return append(b, payload...)
}

func decodeBase64(s string) ([]byte, error) {
	// URL-safe text is brought to the standard alphabet.
	std := []byte(s)
	for i, c := range std {
		switch c {
		case '-':
			std[i] = '+'
		case '_':
			std[i] = '/'
		}
	}
	b, err := base64.StdEncoding.Strict().DecodeString(string(std))
	if err != nil {
		return nil, err
	}
	return b, nil
}
