package ekcert

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-attestation/attest"
)

// maxCertificate bounds what is parsed. EK certificates have 1 to 2 KiB.
const maxCertificate = 8 * 1024

var oidRSAESOAEP = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}

// ParseCertificate reads an EK certificate as it lies in NV. It accepts the
// header of TCG PC Client Specific Implementation §7.3.2, padding behind the
// certificate, and an RSA key under the RSAES-OAEP identifier (some Infineon
// TPMs), which crypto/x509 leaves unread.
func ParseCertificate(raw []byte) (cert *x509.Certificate, err error) {
	defer func() {
		if r := recover(); r != nil {
			cert, err = nil, fmt.Errorf("ekcert: parse EK certificate: malformed: %v", r)
		}
	}()
	if len(raw) > maxCertificate {
		return nil, fmt.Errorf("ekcert: parse EK certificate: %d bytes, at most %d", len(raw), maxCertificate)
	}
	cert, err = attest.ParseEKCertificate(raw)
	if err != nil {
		return nil, fmt.Errorf("ekcert: parse EK certificate: %w", err)
	}
	if cert.PublicKey == nil {
		key, err := oaepKey(cert.RawSubjectPublicKeyInfo)
		if err != nil {
			return nil, fmt.Errorf("ekcert: parse EK certificate: %w", err)
		}
		cert.PublicKey, cert.PublicKeyAlgorithm = key, x509.RSA
	}
	if err := checkKey(cert.PublicKey); err != nil {
		return nil, fmt.Errorf("ekcert: parse EK certificate: %w", err)
	}
	return cert, nil
}

// ParseIntermediate reads one intermediate certificate, DER.
func ParseIntermediate(der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("ekcert: parse certificate: %d bytes, at most %d", len(der), maxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("ekcert: parse certificate: %w", err)
	}
	if err := checkKey(cert.PublicKey); err != nil {
		return nil, fmt.Errorf("ekcert: parse certificate: %w", err)
	}
	return cert, nil
}

// checkKey refuses keys that are costly to work with.
func checkKey(key any) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("RSA key of %d bits", n)
		}
	case *ecdsa.PublicKey:
	default:
		return errors.New("key is neither RSA nor ECDSA")
	}
	return nil
}

// oaepKey reads a SubjectPublicKeyInfo with the identifier id-RSAES-OAEP (RFC
// 4055 §4.1), whose key has the form of any RSA key.
func oaepKey(spki []byte) (*rsa.PublicKey, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}
	if rest, err := asn1.Unmarshal(spki, &info); err != nil || len(rest) != 0 {
		return nil, errors.New("public key info is malformed")
	}
	if !info.Algorithm.Algorithm.Equal(oidRSAESOAEP) {
		return nil, fmt.Errorf("public key algorithm %v", info.Algorithm.Algorithm)
	}
	var key struct {
		N *big.Int
		E int
	}
	if rest, err := asn1.Unmarshal(info.PublicKey.RightAlign(), &key); err != nil || len(rest) != 0 {
		return nil, errors.New("RSA key is malformed")
	}
	if key.N.Sign() <= 0 || key.E != 65537 {
		return nil, errors.New("RSA key is malformed")
	}
	return &rsa.PublicKey{N: key.N, E: key.E}, nil
}
