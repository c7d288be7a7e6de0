package firmware

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
)

// maxSignature bounds a certificate table. Ours has about 2 kB; a
// certificate chain with long names stays below this by far.
const maxSignature = 256 << 10

// Object identifiers of PKCS #7 (RFC 2315), PKCS #9 and Authenticode.
var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidSpcIndirect   = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
)

type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"explicit,tag:0"`
}

type signedData struct {
	Version      int
	Digests      asn1.RawValue
	Content      contentInfo
	Certificates asn1.RawValue `asn1:"optional,tag:0"`
	CRLs         asn1.RawValue `asn1:"optional,tag:1"`
	Signers      []signerInfo  `asn1:"set"`
}

type signerInfo struct {
	Version   int
	Issuer    issuerAndSerial
	Digest    algorithm
	Signed    asn1.RawValue `asn1:"optional,tag:0"`
	Algorithm algorithm
	Signature []byte
	Unsigned  asn1.RawValue `asn1:"optional,tag:1"`
}

type issuerAndSerial struct {
	Issuer asn1.RawValue
	Serial *big.Int
}

type algorithm struct {
	OID    asn1.ObjectIdentifier
	Params asn1.RawValue `asn1:"optional"`
}

type attribute struct {
	Type   asn1.ObjectIdentifier
	Values asn1.RawValue
}

type spcIndirect struct {
	Data   asn1.RawValue
	Digest struct {
		Algorithm algorithm
		Digest    []byte
	}
}

// Signer checks the file's Authenticode signature over digest and returns the
// certificate whose key made it. Whether that certificate is to be trusted is
// the caller's question: firmware asks its db, we compare with the manifest.
// Exactly one signature by one signer is accepted, made with SHA-256.
func (p *PE) Signer(digest Digest) (*x509.Certificate, error) {
	cert, err := p.signer(digest)
	if err != nil {
		return nil, fmt.Errorf("firmware: check signature: %w", err)
	}
	return cert, nil
}

func (p *PE) signer(digest Digest) (*x509.Certificate, error) {
	if !p.Signed() {
		return nil, errors.New("the file is not signed")
	}
	if p.certSize > maxSignature || p.certSize < 8 {
		return nil, fmt.Errorf("certificate table of %d bytes, want 8 to %d", p.certSize, maxSignature)
	}
	// WIN_CERTIFICATE: length, revision 0x0200, type 2 (PKCS #7); tables are
	// padded to 8 bytes.
	table := p.raw[p.certStart:]
	length := int(binary.LittleEndian.Uint32(table))
	if length < 8 || length > len(table) || len(table)-length >= 8 || binary.LittleEndian.Uint32(table[4:]) != 0x00020200 {
		return nil, errors.New("want exactly one PKCS #7 signature")
	}
	var outer contentInfo
	if rest, err := asn1.Unmarshal(table[8:length], &outer); err != nil || len(rest) >= 8 || !outer.Type.Equal(oidSignedData) {
		return nil, fmt.Errorf("not PKCS #7 signed data: %v", err)
	}
	var sd signedData
	if _, err := asn1.Unmarshal(outer.Content.Bytes, &sd); err != nil {
		return nil, fmt.Errorf("read signed data: %w", err)
	}
	if !sd.Content.Type.Equal(oidSpcIndirect) || len(sd.Signers) != 1 {
		return nil, fmt.Errorf("want Authenticode content and one signer, got %v and %d", sd.Content.Type, len(sd.Signers))
	}
	var spc spcIndirect
	if _, err := asn1.Unmarshal(sd.Content.Content.Bytes, &spc); err != nil {
		return nil, fmt.Errorf("read Authenticode content: %w", err)
	}
	if !spc.Digest.Algorithm.OID.Equal(oidSHA256) || !bytes.Equal(spc.Digest.Digest, digest[:]) {
		return nil, errors.New("the signature is over another image")
	}
	// The digest signed is over the content without its outer header.
	var content asn1.RawValue
	if _, err := asn1.Unmarshal(sd.Content.Content.Bytes, &content); err != nil {
		return nil, fmt.Errorf("read Authenticode content: %w", err)
	}
	return sd.verify(content.Bytes)
}

// verify checks the one signer's signature over content and returns its
// certificate.
func (sd *signedData) verify(content []byte) (*x509.Certificate, error) {
	si := &sd.Signers[0]
	if !si.Digest.OID.Equal(oidSHA256) {
		return nil, fmt.Errorf("digest algorithm %v is not SHA-256", si.Digest.OID)
	}
	certs, err := x509.ParseCertificates(sd.Certificates.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	var cert *x509.Certificate
	for _, c := range certs {
		if bytes.Equal(c.RawIssuer, si.Issuer.Issuer.FullBytes) && si.Issuer.Serial != nil && c.SerialNumber.Cmp(si.Issuer.Serial) == 0 {
			cert = c
		}
	}
	if cert == nil {
		return nil, errors.New("the signer's certificate is not in the signature")
	}
	if len(si.Signed.FullBytes) == 0 {
		return nil, errors.New("no signed attributes")
	}
	sum := sha256.Sum256(content)
	if err := hasDigest(si.Signed.Bytes, sum[:]); err != nil {
		return nil, err
	}
	// Signed as a SET OF, transmitted with an implicit tag (RFC 2315, 9.3).
	signed := append([]byte(nil), si.Signed.FullBytes...)
	signed[0] = asn1.TagSet | 0x20
	h := sha256.Sum256(signed)
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		err = rsa.VerifyPKCS1v15(key, crypto.SHA256, h[:], si.Signature)
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(key, h[:], si.Signature) {
			err = errors.New("ECDSA signature is wrong")
		}
	default:
		err = fmt.Errorf("key type %T is not supported", key)
	}
	if err != nil {
		return nil, fmt.Errorf("by %q: %w", cert.Subject, err)
	}
	return cert, nil
}

// hasDigest wants exactly one messageDigest attribute, with this value.
func hasDigest(attributes, want []byte) error {
	found := 0
	for len(attributes) > 0 {
		var a attribute
		rest, err := asn1.Unmarshal(attributes, &a)
		if err != nil {
			return fmt.Errorf("read signed attributes: %w", err)
		}
		attributes = rest
		if !a.Type.Equal(oidMessageDigest) {
			continue
		}
		found++
		var got []byte
		if _, err := asn1.Unmarshal(a.Values.Bytes, &got); err != nil || !bytes.Equal(got, want) {
			return errors.New("the signed digest is not that of the content")
		}
	}
	if found != 1 {
		return fmt.Errorf("%d signed digests, want one", found)
	}
	return nil
}
