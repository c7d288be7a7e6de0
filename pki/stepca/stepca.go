// Package stepca keeps the certificate authority. It embeds step-ca's
// authority without any of its outside: no provisioner, no listener, no admin
// database. A signature is made only when our own code asks for one, and what
// is signed is the template of package pki, never what a machine wrote.
//
//	root CA     10 years, may be kept offline
//	 +- node CA    3 years, signs node certificates only
//	 +- server CA  3 years, signs the centre's TLS certificates only
//
// Beside it lie the orders keys, one per tenant, that sign documents for
// nodes; they are no part of the X.509 tree. DESIGN.md gives the reasons.
package stepca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
)

// Authority is an opened CA. Its methods may be called at the same time.
type Authority struct {
	dir  string // DIR/ca
	root *x509.Certificate
	node *issuer
	// retired are the node CAs before node.
	retired []*x509.Certificate
	server  *issuer

	mu     sync.Mutex // guards the creation of orders keys
	orders map[string]*ecdsa.PrivateKey
}

// issuer is one intermediate CA with the step-ca authority around it.
type issuer struct {
	cert *x509.Certificate
	ca   *authority.Authority
	// request satisfies step-ca, which wants a signed certificate request.
	// Its key is thrown away: the template's key replaces it.
	request *x509.CertificateRequest
}

// Open opens the CA in DIR/ca, which Init made. The root's private key is not
// needed and not read.
func Open(dir string) (*Authority, error) {
	ca := caDir(dir)
	a := &Authority{dir: ca, orders: map[string]*ecdsa.PrivateKey{}}
	var err error
	if a.root, err = readCertificate(filepath.Join(ca, rootCert)); err != nil {
		return nil, err
	}
	if err := a.root.CheckSignatureFrom(a.root); err != nil {
		return nil, fmt.Errorf("stepca: open: root certificate: %w", err)
	}
	if err := a.openNodeCAs(); err != nil {
		return nil, err
	}
	if a.server, err = a.openIssuer(serverCert, serverKey, x509.ExtKeyUsageServerAuth); err != nil {
		return nil, err
	}
	return a, nil
}

func (a *Authority) openIssuer(certFile, keyFile string, use x509.ExtKeyUsage) (*issuer, error) {
	cert, err := readCertificate(filepath.Join(a.dir, certFile))
	if err != nil {
		return nil, err
	}
	key, err := readKey(filepath.Join(a.dir, keyFile))
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("stepca: open: %s does not belong to %s", keyFile, certFile)
	}
	if err := cert.CheckSignatureFrom(a.root); err != nil {
		return nil, fmt.Errorf("stepca: open: %s is not signed by %s: %w", certFile, rootCert, err)
	}
	request, err := throwawayRequest()
	if err != nil {
		return nil, err
	}
	ca, err := authority.NewEmbedded(
		authority.WithConfig(&config.Config{AuthorityConfig: &config.AuthConfig{}}),
		authority.WithX509RootCerts(a.root),
		authority.WithX509Signer(cert, key),
		authority.WithX509Enforcers(guard(use)),
		authority.WithQuietInit(),
	)
	if err != nil {
		return nil, fmt.Errorf("stepca: open: start the authority of %s: %w", certFile, err)
	}
	return &issuer{cert: cert, ca: ca, request: request}, nil
}

// guard is the last to see a leaf before step-ca signs it. It changes
// nothing; it stops what no profile of ours would ask for.
func guard(use x509.ExtKeyUsage) provisioner.CertificateEnforcer {
	return provisioner.CertificateEnforcerFunc(func(leaf *x509.Certificate) error {
		switch {
		case leaf.IsCA || !leaf.BasicConstraintsValid:
			return errors.New("stepca: guard: the leaf would be a CA")
		case leaf.KeyUsage != x509.KeyUsageDigitalSignature:
			return errors.New("stepca: guard: the key usage is not digitalSignature alone")
		case len(leaf.ExtKeyUsage) != 1 || leaf.ExtKeyUsage[0] != use || len(leaf.UnknownExtKeyUsage) > 0:
			return errors.New("stepca: guard: the extended key usage is not the issuer's")
		case len(leaf.ExtraExtensions) > 0:
			return errors.New("stepca: guard: there are extra extensions")
		case leaf.NotBefore.IsZero() || leaf.NotAfter.IsZero():
			// step-ca would fill them from the wall clock, with no lifetime.
			return errors.New("stepca: guard: the dates are not set")
		}
		return nil
	})
}

// sign lets step-ca sign the template. Without a template option step-ca
// copies subject, names and extensions from the request, so that the whole
// leaf is replaced after its last validator ran.
func (i *issuer) sign(ctx context.Context, template *x509.Certificate) (*x509.Certificate, error) {
	rewrite := provisioner.CertificateEnforcerFunc(func(leaf *x509.Certificate) error {
		*leaf = *template
		leaf.ExtraExtensions = nil
		leaf.SerialNumber = nil // step-ca draws a random one
		return nil
	})
	chain, err := i.ca.SignWithContext(ctx, i.request, provisioner.SignOptions{}, rewrite)
	if err != nil {
		return nil, err
	}
	if len(chain) < 2 || !chain[1].Equal(i.cert) {
		return nil, errors.New("step-ca returned another chain")
	}
	return chain[0], nil
}

// IssueNode signs a certificate for the key of the profile and nothing else
// of the machine. It returns DER certificates, leaf first, then the node CA;
// the serial number is lower-case hex. The result was compared field by field
// with the profile before it is returned.
func (a *Authority) IssueNode(ctx context.Context, p pki.NodeProfile) (chain [][]byte, serial string, notBefore, notAfter time.Time, err error) {
	none := time.Time{}
	template, err := pki.LeafTemplate(p, a.node.cert)
	if err != nil {
		return nil, "", none, none, fmt.Errorf("stepca: issue node certificate: %w", err)
	}
	leaf, err := a.node.sign(ctx, template)
	if err != nil {
		return nil, "", none, none, fmt.Errorf("stepca: issue node certificate for %s: %w", p.Node, err)
	}
	if problems := pki.CheckLeaf(leaf, a.node.cert, p); len(problems) > 0 {
		return nil, "", none, none, fmt.Errorf("stepca: issue node certificate for %s: the signed leaf is wrong: %v", p.Node, problems)
	}
	return [][]byte{leaf.Raw, a.node.cert.Raw}, fmt.Sprintf("%x", leaf.SerialNumber), leaf.NotBefore, leaf.NotAfter, nil
}

// maxServerNames bounds the names of one server certificate.
const maxServerNames = 64

// ServerCertificate makes a new key and a TLS server certificate for names,
// each a DNS name or an IP address. The key is never written to disk.
func (a *Authority) ServerCertificate(names []string, now time.Time) (tls.Certificate, error) {
	template, err := a.serverTemplate(names, now)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("stepca: server certificate: %w", err)
	}
	key, err := newKey()
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("stepca: server certificate: %w", err)
	}
	template.PublicKey = key.Public()
	if template.SubjectKeyId, err = pki.SubjectKeyID(key.Public()); err != nil {
		return tls.Certificate{}, fmt.Errorf("stepca: server certificate: %w", err)
	}
	leaf, err := a.server.sign(context.Background(), template)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("stepca: server certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, a.server.cert.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

func (a *Authority) serverTemplate(names []string, now time.Time) (*x509.Certificate, error) {
	if len(names) == 0 || len(names) > maxServerNames {
		return nil, fmt.Errorf("%d names, want 1 to %d", len(names), maxServerNames)
	}
	notBefore, notAfter, err := pki.Validity(now, pki.ServerLifetime, a.server.cert)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		Subject: pkix.Name{CommonName: "muster centre"}, Issuer: a.server.cert.Subject,
		NotBefore: notBefore, NotAfter: notAfter,
		PublicKeyAlgorithm: x509.ECDSA, SignatureAlgorithm: x509.ECDSAWithSHA256,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, AuthorityKeyId: a.server.cert.SubjectKeyId,
	}
	for _, n := range names {
		if ip, err := netip.ParseAddr(n); err == nil {
			if ip.Zone() != "" {
				return nil, fmt.Errorf("address %q has a zone", n)
			}
			t.IPAddresses = append(t.IPAddresses, net.IP(ip.Unmap().AsSlice()))
			continue
		}
		name := strings.ToLower(strings.TrimSuffix(n, "."))
		if err := checkHost(name); err != nil {
			return nil, err
		}
		t.DNSNames = append(t.DNSNames, name)
	}
	return t, nil
}

// checkHost takes host names of letters, digits and '-' (RFC 1123 section
// 2.1), and no wildcard.
func checkHost(name string) error {
	if len(name) == 0 || len(name) > 253 {
		return fmt.Errorf("host name of %d characters", len(name))
	}
	if strings.HasSuffix(name, "."+pki.TrustDomain) || name == pki.TrustDomain {
		return fmt.Errorf("host name %q lies in the domain of nodes", name)
	}
	for _, l := range strings.Split(name, ".") {
		if err := fleet.ValidateName("host", l); err != nil {
			return fmt.Errorf("host name %q: %w", name, err)
		}
	}
	return nil
}

// RootsPEM returns the root certificate in PEM: what images carry.
func (a *Authority) RootsPEM() []byte { return encodeCertificate(a.root.Raw) }

// Root returns the root certificate.
func (a *Authority) Root() *x509.Certificate { return a.root }

// NodeCA returns the certificate of the node CA.
func (a *Authority) NodeCA() *x509.Certificate { return a.node.cert }

// ServerCA returns the certificate of the server CA.
func (a *Authority) ServerCA() *x509.Certificate { return a.server.cert }

// ClientPool holds the node CAs alone, the current one and those before it: the trust anchors with which the node
// endpoint verifies client certificates. The root is not among them, so that
// no other certificate below it opens that door.
func (a *Authority) ClientPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.node.cert)
	for _, c := range a.retired {
		pool.AddCert(c)
	}
	return pool
}

// OrdersKey returns the tenant's orders key and makes it on first use.
func (a *Authority) OrdersKey(tenant string) (crypto.Signer, error) {
	if err := fleet.ValidateName("tenant", tenant); err != nil {
		return nil, fmt.Errorf("stepca: orders key: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if k := a.orders[tenant]; k != nil {
		return k, nil
	}
	k, err := loadOrCreateKey(filepath.Join(a.dir, ordersKey(tenant)))
	if err != nil {
		return nil, err
	}
	a.orders[tenant] = k
	return k, nil
}

// OrdersPublicPEM returns the public half of the tenant's orders key as a
// PKIX PEM block: what images carry.
func (a *Authority) OrdersPublicPEM(tenant string) ([]byte, error) {
	k, err := a.OrdersKey(tenant)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		return nil, fmt.Errorf("stepca: orders key of %s: %w", tenant, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// throwawayRequest is an empty request signed by a key that nobody keeps.
func throwawayRequest() (*x509.CertificateRequest, error) {
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("stepca: open: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("stepca: open: %w", err)
	}
	return x509.ParseCertificateRequest(der)
}
