// Package pki makes the cluster's certificate authorities and leaf
// certificates under server/tls, and carries the bootstrap data (authorities,
// passwd and keys) between servers.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Tree is server/tls of one data directory.
type Tree struct{ Dir string }

// Path is a file below server/tls.
func (t Tree) Path(p ...string) string { return filepath.Join(append([]string{t.Dir}, p...)...) }

// authorities are made by the founder when they are not there.
var authorities = []struct{ file, cn string }{
	{"client-ca", "k3s-client-ca"},
	{"server-ca", "k3s-server-ca"},
	{"request-header-ca", "k3s-request-header-ca"},
	{"etcd/peer-ca", "etcd-peer-ca"},
	{"etcd/server-ca", "etcd-server-ca"},
}

// EnsureCAs makes what is missing; files that are there are kept, so an
// operator may put their own before the first start.
func (t Tree) EnsureCAs(now time.Time) error {
	if err := os.MkdirAll(t.Path("etcd"), 0o700); err != nil {
		return err
	}
	for _, a := range authorities {
		if _, err := os.Stat(t.Path(a.file + ".key")); err == nil {
			continue
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		tmpl := &x509.Certificate{
			SerialNumber: serial(), Subject: pkix.Name{CommonName: fmt.Sprintf("%s@%d", a.cn, now.Unix())},
			NotBefore: now.Add(-time.Minute), NotAfter: now.AddDate(10, 0, 0), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
		if err != nil {
			return err
		}
		if err := t.write(a.file, key, der); err != nil {
			return err
		}
	}
	if _, err := os.Stat(t.Path("service.key")); err != nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		return writeKey(t.Path("service.key"), key)
	}
	return nil
}

func (t Tree) write(name string, key *ecdsa.PrivateKey, chain ...[]byte) error {
	if err := writeKey(t.Path(name+".key"), key); err != nil {
		return err
	}
	return os.WriteFile(t.Path(name+".crt"), encode(chain...), 0o644)
}

func encode(chain ...[]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	return new(big.Int).SetBytes(b[:15])
}

// CA is an authority with its key.
type CA struct {
	Cert  *x509.Certificate
	Key   crypto.Signer
	Chain [][]byte // DER, the authority first
}

// Load reads an authority by its file name without extension.
func (t Tree) Load(name string) (*CA, error) {
	cb, err := os.ReadFile(t.Path(name + ".crt"))
	if err != nil {
		return nil, err
	}
	var ca CA
	for b, rest := pem.Decode(cb); b != nil; b, rest = pem.Decode(rest) {
		ca.Chain = append(ca.Chain, b.Bytes)
	}
	if len(ca.Chain) == 0 {
		return nil, fmt.Errorf("%s: no certificate", name)
	}
	if ca.Cert, err = x509.ParseCertificate(ca.Chain[0]); err != nil {
		return nil, err
	}
	kb, err := os.ReadFile(t.Path(name + ".key"))
	if err != nil {
		return nil, err
	}
	ca.Key, err = ParseKey(kb)
	return &ca, err
}

// ParseKey reads a PEM private key of any usual form.
func ParseKey(b []byte) (crypto.Signer, error) {
	for blk, rest := pem.Decode(b); blk != nil; blk, rest = pem.Decode(rest) {
		switch blk.Type {
		case "EC PRIVATE KEY":
			return x509.ParseECPrivateKey(blk.Bytes)
		case "RSA PRIVATE KEY":
			return x509.ParsePKCS1PrivateKey(blk.Bytes)
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(blk.Bytes)
			if err != nil {
				return nil, err
			}
			if s, ok := k.(crypto.Signer); ok {
				return s, nil
			}
		}
	}
	return nil, errors.New("no private key found")
}

// Sign issues a leaf for a public key; the result is PEM, leaf first, then the
// authority's chain.
func (ca *CA) Sign(pub crypto.PublicKey, subj pkix.Name, names []string, ips []net.IP, usage []x509.ExtKeyUsage, now time.Time) ([]byte, error) {
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: subj, DNSNames: names, IPAddresses: ips,
		NotBefore: now.Add(-time.Minute), NotAfter: now.AddDate(0, 0, 365),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: usage,
	}
	if ca.Cert.NotBefore.After(tmpl.NotBefore) {
		tmpl.NotBefore = ca.Cert.NotBefore
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, pub, ca.Key)
	if err != nil {
		return nil, err
	}
	return encode(append([][]byte{der}, ca.Chain...)...), nil
}

var (
	clientUse = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	bothUse   = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
)

// ClientUse and BothUse are the key usages of leaf certificates.
func ClientUse() []x509.ExtKeyUsage { return clientUse }
func BothUse() []x509.ExtKeyUsage   { return bothUse }

// EnsureLeaves makes the server's own leaf certificates, again at each start:
// the stand-in has no renewal of its own. An empty SAN list means "all local".
func (t Tree) EnsureLeaves(nodeName, nodeIP string, sans []string, svcIP net.IP, now time.Time) error {
	ip := net.ParseIP(nodeIP)
	names := []string{"kubernetes.default.svc.cluster.local", "kubernetes.default.svc", "kubernetes.default", "kubernetes", "localhost", nodeName}
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, ip, svcIP}
	for _, s := range sans {
		if p := net.ParseIP(s); p != nil {
			ips = append(ips, p)
		} else {
			names = append(names, s)
		}
	}
	etcdNames, etcdIPs := []string{"localhost", nodeName}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, ip}
	for _, l := range []struct {
		file, ca, cn string
		org          []string
		names        []string
		ips          []net.IP
		use          []x509.ExtKeyUsage
	}{
		{"client-admin", "client-ca", "system:admin", []string{"system:masters"}, nil, nil, clientUse},
		{"client-supervisor", "client-ca", "system:k3s-supervisor", []string{"system:masters"}, nil, nil, clientUse},
		{"client-kube-apiserver", "client-ca", "system:apiserver", []string{"system:masters"}, nil, nil, clientUse},
		{"client-controller", "client-ca", "system:kube-controller-manager", nil, nil, nil, clientUse},
		{"client-scheduler", "client-ca", "system:kube-scheduler", nil, nil, nil, clientUse},
		{"serving-kube-apiserver", "server-ca", "kube-apiserver", nil, names, ips, bothUse},
		{"client-auth-proxy", "request-header-ca", "system:auth-proxy", nil, nil, nil, clientUse},
		{"etcd/client", "etcd/server-ca", "etcd-client", nil, nil, nil, clientUse},
		{"etcd/server-client", "etcd/server-ca", "etcd-server", nil, etcdNames, etcdIPs, bothUse},
		{"etcd/peer-server-client", "etcd/peer-ca", "etcd-peer", nil, etcdNames, etcdIPs, bothUse},
	} {
		ca, err := t.Load(l.ca)
		if err != nil {
			return err
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		crt, err := ca.Sign(key.Public(), pkix.Name{CommonName: l.cn, Organization: l.org}, l.names, l.ips, l.use, now)
		if err != nil {
			return err
		}
		if err := writeKey(t.Path(l.file+".key"), key); err != nil {
			return err
		}
		if err := os.WriteFile(t.Path(l.file+".crt"), crt, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// RandomHex is n random bytes.
func RandomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}
