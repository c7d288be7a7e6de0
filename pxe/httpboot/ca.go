package httpboot

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// The CA of HTTPS boot is RSA and stands alone: EDK2 as it is built into OVMF
// of 2022 and much firmware in the field knows no elliptic curves, which all
// our other CAs use. It vouches for a boot host and for nothing else.
const (
	caFile    = "https-ca.pem"
	caKeyFile = "https-ca.key"
	rsaBits   = 2048
	caYears   = 20
	maxPEM    = 64 << 10
)

// CA certifies boot hosts' addresses.
type CA struct {
	// Path is the certificate to enrol in the firmware of the machines.
	Path string
	cert *x509.Certificate
	key  *rsa.PrivateKey
}

// OpenCA reads the CA in dir, or makes one.
func OpenCA(dir string, now time.Time) (*CA, error) {
	ca := &CA{Path: filepath.Join(dir, caFile)}
	cert, err := readPEM(ca.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return ca, ca.make(dir, now)
	}
	var key []byte
	if err == nil {
		key, err = readPEM(filepath.Join(dir, caKeyFile))
	}
	if err == nil {
		ca.cert, err = x509.ParseCertificate(cert)
	}
	if err == nil {
		ca.key, err = x509.ParsePKCS1PrivateKey(key)
	}
	if err == nil && !ca.key.PublicKey.Equal(ca.cert.PublicKey) {
		err = errors.New("key and certificate do not belong together")
	}
	if err != nil {
		return nil, fmt.Errorf("httpboot: read CA: %w", err)
	}
	return ca, nil
}

func readPEM(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxPEM {
		return nil, fmt.Errorf("%s is too large", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", path)
	}
	return block.Bytes, nil
}

func (c *CA) make(dir string, now time.Time) error {
	key, err := rsa.GenerateKey(rand.Reader, rsaBits)
	if err != nil {
		return fmt.Errorf("httpboot: make CA: %w", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "muster HTTPS boot CA"},
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: began, NotAfter: now.AddDate(caYears, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err == nil {
		c.cert, err = x509.ParseCertificate(der)
	}
	// The key first: a certificate without its key would never be made anew.
	if err == nil {
		err = renameio.WriteFile(filepath.Join(dir, caKeyFile), pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), 0o600)
	}
	if err == nil {
		err = renameio.WriteFile(c.Path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	}
	if err != nil {
		return fmt.Errorf("httpboot: make CA: %w", err)
	}
	c.key = key
	return nil
}

// began is when certificates begin: firmware compares with a clock that may
// have lost its battery, and nothing here rests on the beginning.
var began = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return new(big.Int).SetBytes(b)
}

// TLS returns a configuration with a fresh certificate for addr, as long as
// the CA lives: firmware has no way to complain, so it must not expire.
func (c *CA) TLS(addr netip.Addr) (*tls.Config, error) {
	key, err := rsa.GenerateKey(rand.Reader, rsaBits)
	if err != nil {
		return nil, fmt.Errorf("httpboot: make certificate: %w", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: addr.String()}, IPAddresses: []net.IP{addr.AsSlice()},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, NotBefore: began, NotAfter: c.cert.NotAfter,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, key.Public(), c.key)
	if err != nil {
		return nil, fmt.Errorf("httpboot: make certificate: %w", err)
	}
	out := FirmwareTLS()
	out.Certificates = []tls.Certificate{{Certificate: [][]byte{der, c.cert.Raw}, PrivateKey: key}}
	return out, nil
}
