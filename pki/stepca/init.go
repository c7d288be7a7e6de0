package stepca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/pki"
)

// Lifetimes of the CAs.
const (
	rootLifetime = 10 * 365 * 24 * time.Hour
	caLifetime   = 3 * 365 * 24 * time.Hour
)

// Options of Init.
type Options struct {
	// Now dates the certificates. It must be set.
	Now time.Time
	// Name appears in the subjects of the CA certificates: the name of the
	// organisation, "muster" by default.
	Name string
}

func (o Options) validate() error {
	var list []error
	if o.Now.IsZero() {
		list = append(list, errors.New("the time is not set"))
	}
	if len(o.Name) > 64 { // ub-organization-name of RFC 5280
		list = append(list, fmt.Errorf("the name has %d bytes, at most 64 are allowed", len(o.Name)))
	}
	return errors.Join(list...)
}

// stepped is called after each durable step of Init; tests end the process
// in it.
var stepped = func(step string) { failpoint.Hit("stepca.init." + step) }

// Init makes the CA in DIR/ca unless there is one, and reports whether it did.
// It never changes an existing CA. All files are written into a folder beside
// it, flushed, and moved into place by one rename: a crash leaves either
// nothing or the whole CA.
func Init(dir string, o Options) (created bool, err error) {
	if err := o.validate(); err != nil {
		return false, fmt.Errorf("stepca: init: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false, fmt.Errorf("stepca: init: %w", err)
	}
	unlock, err := lock(filepath.Join(dir, ".ca.lock"))
	if err != nil {
		return false, err
	}
	defer unlock()
	if _, err := os.Lstat(caDir(dir)); !errors.Is(err, fs.ErrNotExist) {
		return false, wrap("init", err)
	}
	if err := removeLeftovers(dir); err != nil {
		return false, err
	}
	temp, err := os.MkdirTemp(dir, tempPrefix+"*")
	if err != nil {
		return false, fmt.Errorf("stepca: init: %w", err)
	}
	defer os.RemoveAll(temp) // after the rename there is nothing left of it
	if err := writeCA(temp, o); err != nil {
		return false, err
	}
	if err := syncDir(temp); err != nil {
		return false, err
	}
	stepped("written")
	if err := os.Rename(temp, caDir(dir)); err != nil {
		return false, fmt.Errorf("stepca: init: %w", err)
	}
	stepped("renamed")
	return true, syncDir(dir)
}

// removeLeftovers removes what crashed attempts left. Their keys have signed
// nothing that anybody has seen.
func removeLeftovers(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("stepca: init: %w", err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("stepca: init: %w", err)
		}
	}
	return nil
}

func writeCA(dir string, o Options) error {
	name := o.Name
	if name == "" {
		name = "muster"
	}
	now := o.Now.UTC().Truncate(time.Second)
	rootTemplate := caTemplate(name, "root CA", now, rootLifetime)
	rootTemplate.MaxPathLen = 1
	root, rootPrivate, err := makeCA(rootTemplate, nil, nil)
	if err != nil {
		return err
	}

	node, nodePrivate, err := makeCA(nodeTemplate(name, "node CA", now), root, rootPrivate)
	if err != nil {
		return err
	}

	serverTemplate := caTemplate(name, "server CA", now, caLifetime)
	serverTemplate.MaxPathLenZero = true
	serverTemplate.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	// A centre may have any name but a node's.
	serverTemplate.PermittedDNSDomainsCritical = true
	serverTemplate.ExcludedDNSDomains = []string{pki.TrustDomain}
	server, serverPrivate, err := makeCA(serverTemplate, root, rootPrivate)
	if err != nil {
		return err
	}

	for _, f := range []struct {
		name string
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
	}{
		{rootCert, root, nil}, {rootKey, nil, rootPrivate},
		{nodeCert, node, nil}, {nodeKey, nil, nodePrivate},
		{serverCert, server, nil}, {serverKey, nil, serverPrivate},
	} {
		content, mode := []byte(nil), fs.FileMode(0o644)
		if f.cert != nil {
			content = encodeCertificate(f.cert.Raw)
		} else if content, err = encodeKey(f.key); err != nil {
			return err
		} else {
			mode = 0o600
		}
		if err := writeSynced(filepath.Join(dir, f.name), content, mode); err != nil {
			return err
		}
		stepped(f.name)
	}
	return nil
}

// nodeTemplate is the certificate of a node CA.
func nodeTemplate(organisation, name string, now time.Time) *x509.Certificate {
	t := caTemplate(organisation, name, now, caLifetime)
	t.MaxPathLenZero = true
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	// RFC 5280 section 4.2.1.10: a name is unconstrained in the forms that
	// are not mentioned, so that IP addresses are shut out whole.
	t.PermittedDNSDomainsCritical = true
	t.PermittedDNSDomains = []string{pki.NodeDomain}
	t.PermittedURIDomains = []string{"." + pki.TrustDomain}
	t.PermittedEmailAddresses = []string{"invalid"} // a host that is never anybody's (RFC 2606)
	t.ExcludedIPRanges = everyAddress()
	return t
}

func caTemplate(organisation, name string, now time.Time, life time.Duration) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{organisation}, CommonName: organisation + " " + name},
		NotBefore:             now.Add(-pki.Backdate),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
	}
}

// makeCA makes a key and has it certified by parent; without a parent it
// signs itself.
func makeCA(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	fail := func(err error) (*x509.Certificate, *ecdsa.PrivateKey, error) {
		return nil, nil, fmt.Errorf("stepca: init: make %s: %w", template.Subject.CommonName, err)
	}
	key, err := newKey()
	if err != nil {
		return fail(err)
	}
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return fail(err)
	}
	serial[0] = serial[0]&0x7f | 0x40 // positive and of full length
	template.SerialNumber = new(big.Int).SetBytes(serial)
	if template.SubjectKeyId, err = pki.SubjectKeyID(key.Public()); err != nil {
		return fail(err)
	}
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return fail(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	return cert, key, nil
}

func everyAddress() []*net.IPNet {
	return []*net.IPNet{
		{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	}
}

// ExportRoot copies the root's certificate and key into the folder to, which
// must not hold them yet. With remove it then takes the key away from DIR/ca:
// the CA works without it until a new node or server CA has to be signed.
func ExportRoot(dir, to string, remove bool) error {
	key, err := readKey(filepath.Join(caDir(dir), rootKey))
	if err != nil {
		return err
	}
	cert, err := readCertificate(filepath.Join(caDir(dir), rootCert))
	if err != nil {
		return err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return fmt.Errorf("stepca: export root: %s does not belong to %s", rootKey, rootCert)
	}
	encoded, err := encodeKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return fmt.Errorf("stepca: export root: %w", err)
	}
	if err := writeSynced(filepath.Join(to, rootKey), encoded, 0o600); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(to, rootCert), encodeCertificate(cert.Raw), 0o644); err != nil {
		return err
	}
	if err := syncDir(to); err != nil {
		return err
	}
	// Read back what must be good before the only other copy goes.
	again, err := readKey(filepath.Join(to, rootKey))
	if err != nil {
		return err
	}
	if !again.Equal(key) {
		return errors.New("stepca: export root: the copy differs")
	}
	if !remove {
		return nil
	}
	if err := os.Remove(filepath.Join(caDir(dir), rootKey)); err != nil {
		return fmt.Errorf("stepca: export root: %w", err)
	}
	return syncDir(caDir(dir))
}
