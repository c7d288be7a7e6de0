package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
)

// ComputeName returns the TPM name of a TPMT_PUBLIC: nameAlg || H(raw). The
// name algorithm is the second field of the structure, TPM 2.0 Library Part
// 2 §12.2.4.
func ComputeName(raw []byte) ([]byte, error) {
	if len(raw) < 4 {
		return nil, errors.New("pki: compute name: too short for a public area")
	}
	name := append([]byte(nil), raw[2:4]...)
	switch alg := binary.BigEndian.Uint16(name); alg {
	case AlgSHA256:
		h := sha256.Sum256(raw)
		return append(name, h[:]...), nil
	case AlgSHA384:
		h := sha512.Sum384(raw)
		return append(name, h[:]...), nil
	case AlgSHA512:
		h := sha512.Sum512(raw)
		return append(name, h[:]...), nil
	default:
		return nil, fmt.Errorf("pki: compute name: name algorithm 0x%04x is not SHA-256 or better", alg)
	}
}

// OwnerQualifiedName returns the qualified name of a primary key in the owner
// hierarchy with a SHA-256 name: nameAlg || H(TPM_RH_OWNER || name), TPM 2.0
// Library Part 1 §16.
func OwnerQualifiedName(name []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, ownerHierarchy)
	h := sha256.Sum256(append(b, name...))
	return append(binary.BigEndian.AppendUint16(nil, AlgSHA256), h[:]...)
}

// checkName recomputes the key's name, so that nothing rests on the parser.
func checkName(k Key) error {
	name, err := ComputeName(k.Raw)
	if err != nil {
		return err
	}
	if !bytes.Equal(name, k.Name) {
		return fmt.Errorf("the name is not the hash of the public area")
	}
	return nil
}

// checkSigningKey checks that k is exactly a P-256 ECDSA-SHA256 key with the
// wanted attributes and no policy. After it has looked at the fields, for a
// clear message, it writes the one public area that has them and compares
// the bytes the name was computed from: what was hashed is what was judged.
func checkSigningKey(k Key, attributes uint32) error {
	if k.Type != "ecc" || k.Curve != "P-256" {
		return fmt.Errorf("want an ECC P-256 key, got %s %s %d", k.Type, k.Curve, k.Bits)
	}
	if k.Scheme != AlgECDSA || k.Hash != AlgSHA256 {
		return fmt.Errorf("want the scheme ECDSA with SHA-256, got 0x%04x with 0x%04x", k.Scheme, k.Hash)
	}
	if k.Attributes != attributes {
		return fmt.Errorf("attributes are 0x%08x, want exactly 0x%08x (missing 0x%x, surplus 0x%x)",
			k.Attributes, attributes, attributes&^k.Attributes, k.Attributes&^attributes)
	}
	if len(k.AuthPolicy) != 0 {
		return errors.New("has an authorization policy")
	}
	pub, ok := k.Public.(*ecdsa.PublicKey)
	if !ok || pub == nil || pub.Curve != elliptic.P256() {
		return errors.New("the public key is not on P-256")
	}
	point, err := pub.Bytes()
	if err != nil {
		return errors.New("the public key is not on P-256")
	}
	x, y := point[1:33], point[33:]
	// TPMs before library revision 1.38 may drop leading zeros.
	if bytes.Equal(k.Raw, eccPublic(attributes, x, y)) ||
		bytes.Equal(k.Raw, eccPublic(attributes, bytes.TrimLeft(x, "\x00"), bytes.TrimLeft(y, "\x00"))) {
		return nil
	}
	return errors.New("the public area differs from what its fields say")
}

// eccPublic writes the TPMT_PUBLIC of a P-256 ECDSA-SHA256 signing key, TPM
// 2.0 Library Part 2 §12.2.4.
func eccPublic(attributes uint32, x, y []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, AlgECC)
	b = binary.BigEndian.AppendUint16(b, AlgSHA256) // nameAlg
	b = binary.BigEndian.AppendUint32(b, attributes)
	b = appendSized(b, nil)                       // authPolicy
	b = binary.BigEndian.AppendUint16(b, AlgNull) // symmetric
	b = binary.BigEndian.AppendUint16(b, AlgECDSA)
	b = binary.BigEndian.AppendUint16(b, AlgSHA256)
	b = binary.BigEndian.AppendUint16(b, 0x0003)  // TPM_ECC_NIST_P256
	b = binary.BigEndian.AppendUint16(b, AlgNull) // kdf
	b = appendSized(b, x)
	return appendSized(b, y)
}

// appendSized appends a TPM2B.
func appendSized(b, v []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(v))), v...)
}

// ekRank is the place of an EK's kind in the order that picks the identity
// EK: RSA-2048, P-256, P-384; ok is false for any other kind.
func ekRank(k Key) (rank int, ok bool) {
	switch pub := k.Public.(type) {
	case *rsa.PublicKey:
		if pub == nil || pub.N == nil || k.Type != "rsa" || k.Bits != 2048 || pub.N.BitLen() != 2048 {
			return 0, false
		}
		return 0, true
	case *ecdsa.PublicKey:
		switch {
		case pub == nil || k.Type != "ecc":
			return 0, false
		case k.Curve == "P-256" && pub.Curve == elliptic.P256():
			return 1, true
		case k.Curve == "P-384" && pub.Curve == elliptic.P384():
			return 2, true
		}
	}
	return 0, false
}

// checkEK checks the form of an EK: a kind we know, and a storage key that
// cannot sign. The attributes are the machine's word (nothing proves an EK's
// public area but its key), so this catches mistakes, not lies.
func checkEK(k Key) error {
	if _, ok := ekRank(k); !ok {
		return fmt.Errorf("want RSA-2048, P-256 or P-384, got %s %s %d", k.Type, k.Curve, k.Bits)
	}
	const must = AttrFixedTPM | AttrFixedParent | AttrSensitiveDataOrigin | AttrRestricted | AttrDecrypt
	if k.Attributes&must != must || k.Attributes&AttrSign != 0 {
		return fmt.Errorf("attributes 0x%08x are not those of an endorsement key", k.Attributes)
	}
	return checkName(k)
}

// samePublic compares two public keys of any kind.
func samePublic(a, b any) bool {
	switch x := a.(type) {
	case *rsa.PublicKey:
		y, ok := b.(*rsa.PublicKey)
		return ok && x != nil && y != nil && x.N != nil && y.N != nil && x.Equal(y)
	case *ecdsa.PublicKey:
		y, ok := b.(*ecdsa.PublicKey)
		if !ok || x == nil || y == nil || x.Curve != y.Curve {
			return false
		}
		// Bytes knows only the curves that we do, and refuses bad points.
		a, errA := x.Bytes()
		b, errB := y.Bytes()
		return errA == nil && errB == nil && bytes.Equal(a, b)
	}
	return false
}
