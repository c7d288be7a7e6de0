package peer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"time"

	"github.com/muster-edge/muster/agent/papers"
)

// Arguments of the TLS exporter (RFC 8446 §7.5, empty context) that ties what
// is said inside a connection to this one connection.
const (
	exporterLabel  = "EXPORTER-muster-peer-v1"
	exporterLength = 32
)

// Domains of what is hashed, so that no digest can be taken for another.
const (
	domainServer = "muster/peer/v1/server"
	domainQuote  = "muster/peer/v1/quote"
)

// bare makes a certificate that says nothing but the key: no name, no site, and
// dates that nobody reads.
func bare(signer crypto.Signer) (tls.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Unix(0, 0).UTC(),
		// RFC 5280 §4.1.2.5: no well-defined end.
		NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("peer: make certificate: %w", err)
	}
	return tls.Certificate{
		Certificate: [][]byte{der}, PrivateKey: signer,
		// A key in a TPM has one scheme.
		SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
	}, nil
}

// serverTLS is the configuration of the listening side. Its key lives as long
// as the process: a handshake costs no TPM command, so that strangers cannot
// use the TPM up, and tells nothing about the node.
func serverTLS() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("peer: make TLS key: %w", err)
	}
	certificate, err := bare(key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{certificate},
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"http/1.1"},
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := keyOf(s)
			return err
		},
	}, nil
}

// clientTLS is the configuration of the dialling side. Whose the other end is,
// the answer to Hello proves: nothing is said about this connection before.
func clientTLS(certificate tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		Certificates:       []tls.Certificate{certificate},
		InsecureSkipVerify: true, // see Conn.Hello
		NextProtos:         []string{"http/1.1"},
	}
}

// keyOf returns the key that the other end proved to have.
func keyOf(s tls.ConnectionState) (*ecdsa.PublicKey, error) {
	if s.Version != tls.VersionTLS13 || len(s.PeerCertificates) == 0 {
		return nil, errors.New("peer: TLS 1.3 with a certificate is needed")
	}
	key, ok := s.PeerCertificates[0].PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("peer: the certificate is not for a P-256 key")
	}
	return key, nil
}

// exporterOf is a secret that only the two ends of this connection know, and
// that differs for each connection.
func exporterOf(c *tls.Conn) (out [exporterLength]byte, err error) {
	state := c.ConnectionState()
	b, err := state.ExportKeyingMaterial(exporterLabel, nil, exporterLength)
	if err != nil {
		return out, fmt.Errorf("peer: TLS exporter: %w", err)
	}
	copy(out[:], b)
	return out, nil
}

// serverDigest is what the server's LDevID key signs: I am at this end of this
// connection, and the caller with this key is at the other.
func serverDigest(exporter [exporterLength]byte, server, caller papers.Ref) [32]byte {
	return digest(domainServer, exporter[:], server[:], caller[:])
}

// quoteFields is what a quote to a peer binds together.
type quoteFields struct {
	Nonce    []byte
	Exporter [exporterLength]byte
	// EK, AK and LDevID are TPMT_PUBLICs.
	EK, AK, LDevID []byte
	// Prover and Verifier are the keys of the two ends.
	Prover, Verifier papers.Ref
}

// transcript is the qualifying data of both statements.
func (f quoteFields) transcript() [32]byte {
	return digest(domainQuote, f.Nonce, f.Exporter[:], f.EK, f.AK, f.LDevID, f.Prover[:], f.Verifier[:])
}

// digest hashes a domain and length-prefixed fields.
func digest(domain string, fields ...[]byte) (out [32]byte) {
	h := sha256.New()
	sized(h, []byte(domain))
	for _, f := range fields {
		sized(h, f)
	}
	h.Sum(out[:0])
	return out
}

func sized(h hash.Hash, b []byte) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(b)))
	h.Write(n[:])
	h.Write(b)
}
