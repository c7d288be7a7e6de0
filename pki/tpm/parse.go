package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/pki"
)

// Caps of what is parsed, in bytes. An RSA-4096 public area has about 540, an
// attestation statement about 150, an RSA-4096 signature 518.
const (
	maxPublic    = 1024
	maxAttest    = 1024
	maxSignature = 1024
	maxName      = 2 + 64
)

var (
	errTooLong  = errors.New("too long")
	errTrailing = errors.New("bytes differ when written again (trailing or non-canonical data)")
)

// decode reads exactly one structure. go-tpm ignores what follows the
// structure, panics when it writes some unions, and does not look into
// TPM2Bs; so the result is written again and compared, and panics end here.
func decode[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte, most int) (v *T, err error) {
	defer func() {
		if r := recover(); r != nil {
			v, err = nil, fmt.Errorf("malformed structure: %v", r)
		}
	}()
	if len(b) > most {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errTooLong, len(b), most)
	}
	if v, err = tpm2.Unmarshal[T, P](b); err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(*v), b) {
		return nil, errTrailing
	}
	return v, nil
}

// guard turns a panic of go-tpm into an error.
func guard(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("malformed structure: %v", r)
	}
}

// ParsePublic reads a TPMT_PUBLIC of an RSA key (2048 to 4096 bits) or of an
// ECC key (P-256, P-384). The name is recomputed from the bytes.
func ParsePublic(b []byte) (key pki.Key, err error) {
	defer func() {
		if err != nil {
			key, err = pki.Key{}, fmt.Errorf("tpm: parse public area: %w", err)
		}
	}()
	defer guard(&err)
	pub, err := decode[tpm2.TPMTPublic](b, maxPublic)
	if err != nil {
		return key, err
	}
	key = pki.Key{
		Raw:        bytes.Clone(b),
		NameAlg:    uint16(pub.NameAlg),
		Attributes: binary.BigEndian.Uint32(b[4:8]),
		AuthPolicy: bytes.Clone(pub.AuthPolicy.Buffer),
	}
	if key.Name, err = pki.ComputeName(b); err != nil {
		return key, err
	}
	switch pub.Type {
	case tpm2.TPMAlgRSA:
		return key, parseRSA(pub, &key)
	case tpm2.TPMAlgECC:
		return key, parseECC(pub, &key)
	}
	return key, fmt.Errorf("key type 0x%04x is neither RSA nor ECC", uint16(pub.Type))
}

func parseRSA(pub *tpm2.TPMTPublic, key *pki.Key) error {
	parms, err := pub.Parameters.RSADetail()
	if err != nil {
		return err
	}
	unique, err := pub.Unique.RSA()
	if err != nil {
		return err
	}
	key.Type, key.Bits = "rsa", int(parms.KeyBits)
	switch key.Bits {
	case 2048, 3072, 4096:
	default:
		return fmt.Errorf("RSA key of %d bits", key.Bits)
	}
	n := new(big.Int).SetBytes(unique.Buffer)
	if len(unique.Buffer) != key.Bits/8 || n.BitLen() != key.Bits || n.Bit(0) == 0 {
		return fmt.Errorf("modulus is not an odd number of %d bits", key.Bits)
	}
	// Zero is the TPM's way to say 65537 (Part 2 §12.2.3.5).
	if parms.Exponent != 0 && parms.Exponent != 65537 {
		return fmt.Errorf("public exponent %d", parms.Exponent)
	}
	key.Public = &rsa.PublicKey{N: n, E: 65537}
	key.Scheme = uint16(parms.Scheme.Scheme)
	switch parms.Scheme.Scheme {
	case tpm2.TPMAlgRSASSA:
		d, err := parms.Scheme.Details.RSASSA()
		if err != nil {
			return err
		}
		key.Hash = uint16(d.HashAlg)
	case tpm2.TPMAlgRSAPSS:
		d, err := parms.Scheme.Details.RSAPSS()
		if err != nil {
			return err
		}
		key.Hash = uint16(d.HashAlg)
	}
	return nil
}

func parseECC(pub *tpm2.TPMTPublic, key *pki.Key) error {
	parms, err := pub.Parameters.ECCDetail()
	if err != nil {
		return err
	}
	point, err := pub.Unique.ECC()
	if err != nil {
		return err
	}
	key.Type = "ecc"
	var curve elliptic.Curve
	switch parms.CurveID {
	case tpm2.TPMECCNistP256:
		curve, key.Curve, key.Bits = elliptic.P256(), "P-256", 256
	case tpm2.TPMECCNistP384:
		curve, key.Curve, key.Bits = elliptic.P384(), "P-384", 384
	default:
		return fmt.Errorf("curve 0x%04x", uint16(parms.CurveID))
	}
	size := key.Bits / 8
	if len(point.X.Buffer) > size || len(point.Y.Buffer) > size {
		return errors.New("point is longer than the curve")
	}
	uncompressed := make([]byte, 1+2*size)
	uncompressed[0] = 4
	copy(uncompressed[1+size-len(point.X.Buffer):], point.X.Buffer)
	copy(uncompressed[1+2*size-len(point.Y.Buffer):], point.Y.Buffer)
	public, err := ecdsa.ParseUncompressedPublicKey(curve, uncompressed)
	if err != nil {
		return errors.New("point is not on the curve")
	}
	key.Public, key.Scheme = public, uint16(parms.Scheme.Scheme)
	if parms.Scheme.Scheme == tpm2.TPMAlgECDSA {
		d, err := parms.Scheme.Details.ECDSA()
		if err != nil {
			return err
		}
		key.Hash = uint16(d.HashAlg)
	}
	return nil
}

// ParseCertify reads the TPMS_ATTEST and TPMT_SIGNATURE of TPM2_Certify. It
// checks form only; pki.Verify judges.
func ParseCertify(attest, sig []byte) (s pki.Statement, err error) {
	defer func() {
		if err != nil {
			s, err = pki.Statement{}, fmt.Errorf("tpm: parse certify statement: %w", err)
		}
	}()
	defer guard(&err)
	s, a, err := parseAttest(attest, sig)
	if err != nil {
		return s, err
	}
	if a.Type != tpm2.TPMSTAttestCertify {
		return s, fmt.Errorf("statement is of type 0x%04x", uint16(a.Type))
	}
	info, err := a.Attested.Certify()
	if err != nil {
		return s, err
	}
	if len(info.Name.Buffer) > maxName || len(info.QualifiedName.Buffer) > maxName {
		return s, errTooLong
	}
	s.Certified = pki.Certified{Name: info.Name.Buffer, QualifiedName: info.QualifiedName.Buffer}
	return s, nil
}

// ParseQuote reads the TPMS_ATTEST and TPMT_SIGNATURE of TPM2_Quote. It
// checks form only; pki.Verify judges.
func ParseQuote(attest, sig []byte) (s pki.Statement, err error) {
	defer func() {
		if err != nil {
			s, err = pki.Statement{}, fmt.Errorf("tpm: parse quote: %w", err)
		}
	}()
	defer guard(&err)
	s, a, err := parseAttest(attest, sig)
	if err != nil {
		return s, err
	}
	if a.Type != tpm2.TPMSTAttestQuote {
		return s, fmt.Errorf("statement is of type 0x%04x", uint16(a.Type))
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return s, err
	}
	s.Quoted.PCRDigest = info.PCRDigest.Buffer
	if s.Quoted.PCRSelection, err = parseSelection(info.PCRSelect); err != nil {
		return s, err
	}
	return s, nil
}

// parseSelection turns bit maps into sorted indices. A bank named twice is an
// error: readers that merge and readers that take the last would differ.
func parseSelection(list tpm2.TPMLPCRSelection) (map[uint16][]int, error) {
	if len(list.PCRSelections) > 16 {
		return nil, errors.New("too many PCR banks")
	}
	out := map[uint16][]int{}
	for _, sel := range list.PCRSelections {
		bank := uint16(sel.Hash)
		if _, twice := out[bank]; twice {
			return nil, fmt.Errorf("PCR bank 0x%04x is there twice", bank)
		}
		pcrs := []int{}
		for i := range len(sel.PCRSelect) * 8 {
			if sel.PCRSelect[i/8]&(1<<(i%8)) != 0 {
				pcrs = append(pcrs, i)
			}
		}
		out[bank] = pcrs
	}
	return out, nil
}

func parseAttest(attest, sig []byte) (pki.Statement, *tpm2.TPMSAttest, error) {
	a, err := decode[tpm2.TPMSAttest](attest, maxAttest)
	if err != nil {
		return pki.Statement{}, nil, err
	}
	if err := a.Magic.Check(); err != nil { // go-tpm does not do it by itself
		return pki.Statement{}, nil, err
	}
	if len(a.QualifiedSigner.Buffer) > maxName || len(a.ExtraData.Buffer) > maxName {
		return pki.Statement{}, nil, errTooLong
	}
	signature, err := parseSignature(sig)
	if err != nil {
		return pki.Statement{}, nil, fmt.Errorf("signature: %w", err)
	}
	return pki.Statement{
		Magic:           uint32(a.Magic),
		Type:            uint16(a.Type),
		QualifiedSigner: a.QualifiedSigner.Buffer,
		ExtraData:       a.ExtraData.Buffer,
		Clock: pki.ClockInfo{
			Clock:        a.ClockInfo.Clock,
			ResetCount:   a.ClockInfo.ResetCount,
			RestartCount: a.ClockInfo.RestartCount,
			Safe:         bool(a.ClockInfo.Safe),
		},
		FirmwareVersion: a.FirmwareVersion,
		Raw:             bytes.Clone(attest),
		Signature:       signature,
	}, a, nil
}

func parseSignature(b []byte) (pki.Signature, error) {
	t, err := decode[tpm2.TPMTSignature](b, maxSignature)
	if err != nil {
		return pki.Signature{}, err
	}
	s := pki.Signature{Alg: uint16(t.SigAlg)}
	switch t.SigAlg {
	case tpm2.TPMAlgECDSA:
		c, err := t.Signature.ECDSA()
		if err != nil {
			return pki.Signature{}, err
		}
		s.Hash, s.R, s.S = uint16(c.Hash), c.SignatureR.Buffer, c.SignatureS.Buffer
	case tpm2.TPMAlgRSASSA:
		c, err := t.Signature.RSASSA()
		if err != nil {
			return pki.Signature{}, err
		}
		s.Hash, s.RSA = uint16(c.Hash), c.Sig.Buffer
	case tpm2.TPMAlgRSAPSS:
		c, err := t.Signature.RSAPSS()
		if err != nil {
			return pki.Signature{}, err
		}
		s.Hash, s.RSA = uint16(c.Hash), c.Sig.Buffer
	default:
		return pki.Signature{}, fmt.Errorf("algorithm 0x%04x", uint16(t.SigAlg))
	}
	return s, nil
}

// SplitSized reads a TPM2B that fills b exactly and returns its contents.
func SplitSized(b []byte, most int) ([]byte, error) {
	if len(b) < 2 || len(b) > most {
		return nil, fmt.Errorf("tpm: read TPM2B: %d bytes, want 2 to %d", len(b), most)
	}
	if n := int(binary.BigEndian.Uint16(b)); n != len(b)-2 {
		return nil, fmt.Errorf("tpm: read TPM2B: size field says %d, there are %d bytes", n, len(b)-2)
	}
	return b[2:], nil
}

// sized makes a TPM2B.
func sized(b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
}
