package secureboot

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"math/big"
	"time"
	"unicode/utf16"
)

// guid is a GUID in the order in which people write it.
type guid [16]byte

// bytes returns the GUID as UEFI stores it: the first three groups are
// little-endian numbers (UEFI 2.10, appendix A).
func (g guid) bytes() []byte {
	return []byte{g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]}
}

func (g guid) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[:4], g[4:6], g[6:8], g[8:10], g[10:])
}

// UEFI 2.10, sections 3.3, 8.2.2 and 32.4.1; the last is Microsoft's as the
// owner of its own certificates.
var (
	globalVariable   = guid{0x8b, 0xe4, 0xdf, 0x61, 0x93, 0xca, 0x11, 0xd2, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	securityDatabase = guid{0xd7, 0x19, 0xb2, 0xcb, 0x3d, 0x3a, 0x45, 0x96, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
	certX509         = guid{0xa5, 0xc0, 0x59, 0xa1, 0x94, 0xe4, 0x4a, 0xa7, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}
	certPKCS7        = guid{0x4a, 0xaf, 0xd2, 0x9d, 0x68, 0xdf, 0x49, 0xee, 0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7}
	ownerMicrosoft   = guid{0x77, 0xfa, 0x9a, 0xbd, 0x03, 0x59, 0x4d, 0x32, 0xbd, 0x60, 0x28, 0xf4, 0xe7, 0x8f, 0x78, 0x4b}
)

// attributes of every Secure Boot variable: non-volatile, seen by boot
// services and by the running system, written by time-stamped signature.
const attributes = 0x01 | 0x02 | 0x04 | 0x20

// variable is a Secure Boot variable's full name.
type variable struct {
	name   string
	vendor guid
}

var (
	varPK  = variable{"PK", globalVariable}
	varKEK = variable{"KEK", globalVariable}
	varDB  = variable{"db", securityDatabase}
)

// SignatureList is a certificate in the form in which firmware keeps those it
// trusts, for example as CA of HTTPS boot. It has no owner.
func SignatureList(cert *x509.Certificate) []byte { return signatureList(guid{}, cert) }

// signatureList is an EFI_SIGNATURE_LIST with one certificate. Certificates
// differ in length, so that each has a list of its own.
func signatureList(owner guid, cert *x509.Certificate) []byte {
	const header = 16 + 3*4
	size := 16 + len(cert.Raw)
	le := binary.LittleEndian
	b := certX509.bytes()
	b = le.AppendUint32(b, uint32(header+size))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, uint32(size))
	b = append(b, owner.bytes()...)
	return append(b, cert.Raw...)
}

// efiTime is an EFI_TIME as time-stamped signatures want it: whole seconds,
// everything after them zero.
func efiTime(t time.Time) []byte {
	t = t.UTC()
	b := binary.LittleEndian.AppendUint16(nil, uint16(t.Year()))
	b = append(b, byte(t.Month()), byte(t.Day()), byte(t.Hour()), byte(t.Minute()), byte(t.Second()))
	return append(b, make([]byte, 16-len(b))...)
}

// signedBytes are what the signature of a variable's new content covers.
func signedBytes(v variable, when time.Time, content []byte) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(v.name)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	b = append(b, v.vendor.bytes()...)
	b = binary.LittleEndian.AppendUint32(b, attributes)
	b = append(b, efiTime(when)...)
	return append(b, content...)
}

// authenticated is the file that sets v to content: an
// EFI_VARIABLE_AUTHENTICATION_2 (UEFI 2.10, section 8.2.2) and the content.
func authenticated(v variable, when time.Time, content []byte, cert *x509.Certificate, key *rsa.PrivateKey) ([]byte, error) {
	signed, err := signData(signedBytes(v, when, content), cert, key)
	if err != nil {
		return nil, fmt.Errorf("secureboot: sign %s: %w", v.name, err)
	}
	le := binary.LittleEndian
	b := efiTime(when)
	b = le.AppendUint32(b, uint32(8+16+len(signed)))
	b = le.AppendUint16(b, 0x0200)
	b = le.AppendUint16(b, 0x0ef1) // WIN_CERT_TYPE_EFI_GUID
	b = append(b, certPKCS7.bytes()...)
	b = append(b, signed...)
	return append(b, content...), nil
}

var (
	oidData   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidRSA    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
)

type algorithm struct {
	OID    asn1.ObjectIdentifier
	Params asn1.RawValue
}

type signerInfo struct {
	Version int
	Issuer  struct {
		Name   asn1.RawValue
		Serial *big.Int
	}
	Digest    algorithm
	Algorithm algorithm
	Signature []byte
}

// signData is a PKCS #7 SignedData (RFC 2315, section 9) over content that is
// not in it, without signed attributes. It is not wrapped in a ContentInfo:
// the specification asks for SignedData, and firmware from before 2019 takes
// nothing else.
func signData(content []byte, cert *x509.Certificate, key *rsa.PrivateKey) ([]byte, error) {
	digest := sha256.Sum256(content)
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	if err != nil {
		return nil, err
	}
	withNull := func(oid asn1.ObjectIdentifier) algorithm { return algorithm{oid, asn1.NullRawValue} }
	info := signerInfo{Version: 1, Digest: withNull(oidSHA256), Algorithm: withNull(oidRSA), Signature: signature}
	info.Issuer.Name = asn1.RawValue{FullBytes: cert.RawIssuer}
	info.Issuer.Serial = cert.SerialNumber
	return asn1.Marshal(struct {
		Version      int
		Digests      []algorithm `asn1:"set"`
		Content      struct{ Type asn1.ObjectIdentifier }
		Certificates asn1.RawValue
		Signers      []signerInfo `asn1:"set"`
	}{
		Version: 1, Digests: []algorithm{withNull(oidSHA256)},
		Content:      struct{ Type asn1.ObjectIdentifier }{oidData},
		Certificates: asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: bytes.Clone(cert.Raw)},
		Signers:      []signerInfo{info},
	})
}
