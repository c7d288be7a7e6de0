package swtpmtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// CA is an EK authority in a directory: what a TPM vendor is for real TPMs.
type CA struct {
	// Dir holds the files; it can be handed to any number of TPMs.
	Dir string
	// Root is the self-signed certificate, Issuer the one that signs EK
	// certificates. They are the same unless the CA was opened with an
	// intermediate.
	Root, Issuer *x509.Certificate
	// Key belongs to Issuer.
	Key crypto.Signer
}

const (
	rootFile   = "root.pem"
	issuerFile = "issuer.pem"
	keyFile    = "key.pem"
)

// OpenCA opens the EK authority in dir and makes it first if it is not there.
// With intermediate, EK certificates are signed by an issuing CA below the
// root, as real vendors do. It is safe to open one directory from several
// processes at once.
func OpenCA(dir string, intermediate bool) (*CA, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("swtpmtest: open EK authority: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: lock EK authority: %w", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return nil, fmt.Errorf("swtpmtest: lock EK authority: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, rootFile)); errors.Is(err, os.ErrNotExist) {
		if err := makeCA(dir, intermediate); err != nil {
			return nil, fmt.Errorf("swtpmtest: make EK authority: %w", err)
		}
	}
	ca := &CA{Dir: dir}
	if ca.Root, err = readCertificate(filepath.Join(dir, rootFile)); err != nil {
		return nil, err
	}
	if ca.Issuer, err = readCertificate(filepath.Join(dir, issuerFile)); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: read EK authority key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("swtpmtest: read EK authority key: no PEM block")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: read EK authority key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("swtpmtest: read EK authority key: not a signing key")
	}
	ca.Key = signer
	return ca, nil
}

// RootPEM returns the certificates to import as (lab) roots: the root and,
// if there is one, the intermediate.
func (c *CA) RootPEM() []byte {
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Root.Raw})
	if !c.Issuer.Equal(c.Root) {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Issuer.Raw})...)
	}
	return out
}

// Roots returns a pool with the root only.
func (c *CA) Roots() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.Root)
	return p
}

// Certify signs a certificate for an EK public key. Edit, if given, may
// change the template first: that is how tests make bad certificates.
func (c *CA) Certify(public crypto.PublicKey, edit func(*x509.Certificate)) ([]byte, error) {
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "unknown"},
		NotBefore:             time.Now().Add(-time.Hour).Truncate(time.Second),
		NotAfter:              time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageKeyEncipherment,
		UnknownExtKeyUsage:    []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
	}
	if _, ok := public.(*rsa.PublicKey); !ok {
		t.KeyUsage = x509.KeyUsageKeyAgreement
	}
	if edit != nil {
		edit(t)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, c.Issuer, public, c.Key)
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: certify EK: %w", err)
	}
	return der, nil
}

func makeCA(dir string, intermediate bool) error {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	name := filepath.Base(dir)
	if len(name) > 24 {
		name = name[:24]
	}
	template := func(cn string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber:          serial(),
			Subject:               pkix.Name{CommonName: cn, Organization: []string{"swtpm " + name}},
			NotBefore:             time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
			NotAfter:              time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
			IsCA:                  true,
			BasicConstraintsValid: true,
			KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	t := template(fmt.Sprintf("swtpm EK root %x", serial().Bytes()[:4]))
	root, err := x509.CreateCertificate(rand.Reader, t, t, rootKey.Public(), rootKey)
	if err != nil {
		return err
	}
	issuer, key := root, rootKey
	if intermediate {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return err
		}
		parent, err := x509.ParseCertificate(root)
		if err != nil {
			return err
		}
		issuer, err = x509.CreateCertificate(rand.Reader, template("swtpm EK issuing CA"), parent, key.Public(), rootKey)
		if err != nil {
			return err
		}
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	// The root is written last: its presence says that the others are there.
	for _, f := range []struct {
		name, kind string
		der        []byte
		mode       os.FileMode
	}{
		{keyFile, "PRIVATE KEY", pkcs8, 0o600},
		{issuerFile, "CERTIFICATE", issuer, 0o644},
		{rootFile, "CERTIFICATE", root, 0o644},
	} {
		b := pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der})
		if err := os.WriteFile(filepath.Join(dir, f.name), b, f.mode); err != nil {
			return err
		}
	}
	return nil
}

func readCertificate(path string) (*x509.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: read certificate: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("swtpmtest: read certificate %s: no PEM block", path)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: read certificate %s: %w", path, err)
	}
	return c, nil
}

// serial returns 127 random bits; crypto/rand does not fail (Go 1.24 on).
func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}
