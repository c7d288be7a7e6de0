package stepca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
)

var testNow = time.Date(2027, 3, 4, 5, 6, 7, 0, time.UTC)

func newCA(t *testing.T) (*Authority, string) {
	t.Helper()
	dir := t.TempDir()
	created, err := Init(dir, Options{Now: testNow})
	if err != nil || !created {
		t.Fatalf("Init: created %v, error %v", created, err)
	}
	a, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return a, dir
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func testProfile(t testing.TB) pki.NodeProfile {
	t.Helper()
	k := p256(t)
	ek, err := fleet.HashEK(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pki.NodeProfile{Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Public: k.Public(), Now: testNow.Add(time.Hour)}
}

func TestIssueNode(t *testing.T) {
	a, _ := newCA(t)
	p := testProfile(t)
	chain, serial, notBefore, notAfter, err := a.IssueNode(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if problems := pki.CheckLeaf(leaf, a.NodeCA(), p); len(problems) > 0 {
		t.Errorf("the leaf is not as its profile wants it: %v", problems)
	}
	if got := hex.EncodeToString(leaf.SerialNumber.Bytes()); strings.TrimLeft(got, "0") != serial {
		t.Errorf("serial is %s, want %s", serial, got)
	}
	if !notBefore.Equal(p.Now.Add(-5*time.Minute)) || !notAfter.Equal(p.Now.Add(30*24*time.Hour)) {
		t.Errorf("dates are %s and %s", notBefore, notAfter)
	}
	if want := string(p.Node) + ".shop-1.default.node.muster.internal"; len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != want {
		t.Errorf("DNS names are %v, want %s", leaf.DNSNames, want)
	}
	if want := "spiffe://default.muster.internal/node/" + string(p.Node); len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
		t.Errorf("URIs are %v, want %s", leaf.URIs, want)
	}
	intermediates := x509.NewCertPool()
	intermediates.AddCert(a.NodeCA())
	roots := x509.NewCertPool()
	roots.AddCert(a.Root())
	verify := func(use x509.ExtKeyUsage, at time.Time, pool *x509.CertPool) error {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{use}})
		return err
	}
	for name, pool := range map[string]*x509.CertPool{"root": roots, "node CA": a.ClientPool()} {
		if err := verify(x509.ExtKeyUsageClientAuth, p.Now, pool); err != nil {
			t.Errorf("as a client, against the %s: %v", name, err)
		}
		if verify(x509.ExtKeyUsageServerAuth, p.Now, pool) == nil {
			t.Errorf("the node certificate is good for a server, against the %s", name)
		}
		if verify(x509.ExtKeyUsageClientAuth, p.Now.Add(31*24*time.Hour), pool) == nil {
			t.Errorf("the node certificate never ends, against the %s", name)
		}
	}
	again, serial2, _, _, err := a.IssueNode(t.Context(), p)
	if err != nil || serial2 == serial || len(again) != 2 {
		t.Errorf("the second certificate has serial %s after %s, error %v", serial2, serial, err)
	}
}

// The issuer gets a key and names from us, nothing from the machine. What
// could still be hostile is the key, and what callers pass on.
func TestHostileProfilesAreRefused(t *testing.T) {
	a, _ := newCA(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := p256(t)
	//lint:ignore SA1019 a point off the curve cannot be made otherwise
	offCurve := &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int).Add(good.X, big.NewInt(1)), Y: good.Y}
	//lint:ignore SA1019 as above
	wrongCurve := &ecdsa.PublicKey{Curve: elliptic.P384(), X: good.X, Y: good.Y}
	rows := []struct {
		name   string
		change func(*pki.NodeProfile)
	}{
		{"RSA key", func(p *pki.NodeProfile) { p.Public = rsaKey.Public() }},
		{"P-384 key", func(p *pki.NodeProfile) { p.Public = p384.Public() }},
		{"P-224 key", func(p *pki.NodeProfile) { p.Public = p224.Public() }},
		{"Ed25519 key", func(p *pki.NodeProfile) { p.Public = ed }},
		{"no key", func(p *pki.NodeProfile) { p.Public = nil }},
		{"nil pointer for a key", func(p *pki.NodeProfile) { p.Public = (*ecdsa.PublicKey)(nil) }},
		{"key without a point", func(p *pki.NodeProfile) { p.Public = &ecdsa.PublicKey{Curve: elliptic.P256()} }},
		{"point off the curve", func(p *pki.NodeProfile) { p.Public = offCurve }},
		{"point under another curve's name", func(p *pki.NodeProfile) { p.Public = wrongCurve }},
		{"private key for a public one", func(p *pki.NodeProfile) { p.Public = good }},
		{"tenant with a dot", func(p *pki.NodeProfile) { p.Tenant = "other.default" }},
		{"tenant with a wildcard", func(p *pki.NodeProfile) { p.Tenant = "*" }},
		{"site that leaves its tenant", func(p *pki.NodeProfile) { p.Site = "shop.evil" }},
		{"site with a NUL byte", func(p *pki.NodeProfile) { p.Site = "shop\x00" }},
		{"node ID with a path", func(p *pki.NodeProfile) { p.Node = "n-aaaaaaaaaaaaaaaaaaaaaaaa/../x" }},
		{"node ID of another form", func(p *pki.NodeProfile) { p.Node = "admin" }},
		{"no time", func(p *pki.NodeProfile) { p.Now = time.Time{} }},
		{"clock before the CA began", func(p *pki.NodeProfile) { p.Now = testNow.Add(-time.Hour) }},
		{"clock at 1970", func(p *pki.NodeProfile) { p.Now = time.Unix(0, 0) }},
		{"clock after the CA ended", func(p *pki.NodeProfile) { p.Now = testNow.AddDate(10, 0, 0) }},
	}
	for _, row := range rows {
		p := testProfile(t)
		row.change(&p)
		if chain, _, _, _, err := a.IssueNode(t.Context(), p); err == nil || chain != nil {
			t.Errorf("%s: a certificate was issued", row.name)
		}
	}
	if _, _, _, _, err := a.IssueNode(t.Context(), testProfile(t)); err != nil {
		t.Errorf("the unchanged profile was refused: %v", err)
	}
}

// step-ca copies subject, names and extensions of a request into the leaf
// unless they are overwritten. These requests ask for all they can get.
func TestNothingOfARequestSurvives(t *testing.T) {
	a, _ := newCA(t)
	p := testProfile(t)
	template, err := pki.LeafTemplate(p, a.NodeCA())
	if err != nil {
		t.Fatal(err)
	}
	caTrue := pkix.Extension{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}
	anyUse := pkix.Extension{Id: []int{2, 5, 29, 37}, Value: []byte{0x30, 0x06, 0x06, 0x04, 0x55, 0x1d, 0x25, 0x00}}
	unknown := pkix.Extension{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}}
	policies := pkix.Extension{Id: []int{2, 5, 29, 32}, Value: []byte{0x30, 0x08, 0x30, 0x06, 0x06, 0x04, 0x55, 0x1d, 0x20, 0x00}}
	keyUse := pkix.Extension{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}}
	uri := uris(t, "spiffe://other.muster.internal/node/n-x")
	for name, request := range map[string]*x509.CertificateRequest{
		"empty":                {},
		"foreign subject":      {Subject: pkix.Name{CommonName: "admin", Organization: []string{"other"}}},
		"foreign DNS name":     {DNSNames: []string{"n-x.shop.other.node.muster.internal"}},
		"wildcard":             {DNSNames: []string{"*.node.muster.internal"}},
		"public DNS name":      {DNSNames: []string{"example.com"}},
		"IP address":           {IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}},
		"e-mail address":       {EmailAddresses: []string{"root@example.com"}},
		"foreign SPIFFE ID":    {URIs: uri},
		"CA:TRUE":              {ExtraExtensions: []pkix.Extension{caTrue}},
		"any key usage":        {ExtraExtensions: []pkix.Extension{anyUse, keyUse}},
		"unknown extension":    {ExtraExtensions: []pkix.Extension{unknown}},
		"policies":             {ExtraExtensions: []pkix.Extension{policies}},
		"everything at a time": {Subject: pkix.Name{CommonName: "admin"}, DNSNames: []string{"a.example"}, URIs: uri, ExtraExtensions: []pkix.Extension{caTrue, anyUse, unknown, policies}},
	} {
		der, err := x509.CreateCertificateRequest(rand.Reader, request, p256(t))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		hostile, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		i := *a.node
		i.request = hostile
		leaf, err := i.sign(t.Context(), template)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if problems := pki.CheckLeaf(leaf, a.NodeCA(), p); len(problems) > 0 {
			t.Errorf("%s: the leaf carries some of it: %v", name, problems)
		}
	}
}

// The guard and the name constraints hold even if a template were wrong.
func TestWrongTemplatesAreNotSigned(t *testing.T) {
	a, _ := newCA(t)
	p := testProfile(t)
	for name, change := range map[string]func(*x509.Certificate){
		"CA":                   func(c *x509.Certificate) { c.IsCA = true },
		"no constraints":       func(c *x509.Certificate) { c.BasicConstraintsValid = false },
		"signs certificates":   func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"server":               func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"client and server":    func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) },
		"no dates":             func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Time{}, time.Time{} },
		"foreign DNS name":     func(c *x509.Certificate) { c.DNSNames = []string{"example.com"} },
		"IP address":           func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} },
		"foreign URI":          func(c *x509.Certificate) { c.URIs = uris(t, "spiffe://example.com/node/x") },
		"name like the domain": func(c *x509.Certificate) { c.DNSNames = []string{"evilnode.muster.internal"} },
	} {
		template, err := pki.LeafTemplate(p, a.NodeCA())
		if err != nil {
			t.Fatal(err)
		}
		change(template)
		if _, err := a.node.sign(t.Context(), template); err == nil {
			t.Errorf("%s: it was signed", name)
		}
	}
}

func TestLeafWithOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: the chain is checked by Go alone")
	}
	a, dir := newCA(t)
	p := testProfile(t)
	chain, _, _, _, err := a.IssueNode(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root, ca := file("r.pem", a.RootsPEM()), file("i.pem", encodeCertificate(chain[1]))
	at := p.Now.Unix()
	verify := func(leaf []byte, purpose string) (string, error) {
		out, err := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-attime", big.NewInt(at).String(),
			"-purpose", purpose, "-CAfile", root, "-untrusted", ca, file("l.pem", encodeCertificate(leaf))).CombinedOutput()
		return string(out), err
	}
	if out, err := verify(chain[0], "sslclient"); err != nil {
		t.Errorf("as a client: %s", out)
	}
	if out, err := verify(chain[0], "sslserver"); err == nil {
		t.Errorf("as a server: %s", out)
	}
	// A leaf that breaks the name constraints, signed with the CA's own key.
	template, err := pki.LeafTemplate(p, a.NodeCA())
	if err != nil {
		t.Fatal(err)
	}
	key, err := readKey(filepath.Join(caDir(dir), nodeKey))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"foreign DNS name": func(c *x509.Certificate) { c.DNSNames = []string{"example.com"} },
		"IP address":       func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} },
		"e-mail address":   func(c *x509.Certificate) { c.EmailAddresses = []string{"root@example.com"} },
	} {
		bad := *template
		bad.SerialNumber = big.NewInt(7)
		change(&bad)
		der, err := x509.CreateCertificate(rand.Reader, &bad, a.NodeCA(), p.Public, key)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := verify(der, "sslclient"); err == nil {
			t.Errorf("%s: openssl takes a leaf outside of the name constraints: %s", name, out)
		}
	}
}

func TestLeafNeverOutlivesTheCA(t *testing.T) {
	a, _ := newCA(t)
	p := testProfile(t)
	p.Now = a.NodeCA().NotAfter.Add(-24 * time.Hour)
	_, _, _, notAfter, err := a.IssueNode(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if !notAfter.Equal(a.NodeCA().NotAfter) {
		t.Errorf("the leaf ends on %s, the CA on %s", notAfter, a.NodeCA().NotAfter)
	}
	p.Now = a.NodeCA().NotBefore
	_, _, notBefore, _, err := a.IssueNode(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if notBefore.Before(a.NodeCA().NotBefore) {
		t.Errorf("the leaf begins on %s, before the CA", notBefore)
	}
}

func TestServerCertificate(t *testing.T) {
	a, _ := newCA(t)
	names := []string{"Centre.example.", "localhost", "10.77.0.1", "::1", "::ffff:192.0.2.1"}
	cert, err := a.ServerCertificate(names, testNow)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(a.RootsPEM()) {
		t.Fatal("RootsPEM holds no certificate")
	}
	if want := []string{"centre.example", "localhost"}; !reflect.DeepEqual(cert.Leaf.DNSNames, want) {
		t.Errorf("DNS names are %v, want %v", cert.Leaf.DNSNames, want)
	}
	for name, want := range map[string]bool{"centre.example": true, "10.77.0.1": true, "::1": true, "192.0.2.1": true, "other.example": false, "10.77.0.2": false} {
		if got := handshake(t, cert, name, roots) == nil; got != want {
			t.Errorf("TLS to %s: %v, want %v", name, got, want)
		}
	}
	if got := cert.Leaf.NotAfter; !got.Equal(testNow.Add(90 * 24 * time.Hour)) {
		t.Errorf("it ends on %s", got)
	}
	intermediates := x509.NewCertPool()
	intermediates.AddCert(a.ServerCA())
	for pool, p := range map[string]*x509.CertPool{"client pool": a.ClientPool(), "roots": roots} {
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: p, Intermediates: intermediates, CurrentTime: testNow, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
			t.Errorf("the server certificate is good for a client, against the %s", pool)
		}
	}
	for _, bad := range [][]string{nil, {""}, {"*.example"}, {"a b"}, {"n-x.shop.default.node.muster.internal"}, {"fe80::1%eth0"}, {"évil.example"}, make([]string, 100)} {
		if _, err := a.ServerCertificate(bad, testNow); err == nil {
			t.Errorf("names %q: a certificate was made", bad)
		}
	}
	if _, err := a.ServerCertificate(names, testNow.Add(-time.Hour)); err == nil {
		t.Error("a certificate was made with a clock before the CA began")
	}
}

// handshake dials over a pipe and returns what the client thinks of it.
func handshake(t *testing.T, cert tls.Certificate, name string, roots *x509.CertPool) error {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer far.Close()
		s := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
		_, _ = io.Copy(io.Discard, s)
	}()
	c := tls.Client(near, &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS13, Time: func() time.Time { return testNow }})
	err := c.HandshakeContext(t.Context())
	near.Close()
	<-done
	return err
}

func TestOrdersKeys(t *testing.T) {
	a, dir := newCA(t)
	first, err := a.OrdersKey("default")
	if err != nil {
		t.Fatal(err)
	}
	other, err := a.OrdersKey("other")
	if err != nil {
		t.Fatal(err)
	}
	if first.Public().(*ecdsa.PublicKey).Equal(other.Public()) {
		t.Error("two tenants have the same key")
	}
	b, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := b.OrdersKey("default")
	if err != nil || !again.Public().(*ecdsa.PublicKey).Equal(first.Public()) {
		t.Errorf("after opening again there is another key (%v)", err)
	}
	for _, bad := range []string{"", "../x", "a/b", "UPPER", "a.b"} {
		if _, err := a.OrdersKey(bad); err == nil {
			t.Errorf("tenant %q has a key", bad)
		}
	}
	info, err := os.Stat(filepath.Join(dir, "ca", "orders-default.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key has mode %v, error %v", info.Mode(), err)
	}
	text, err := a.OrdersPublicPEM("default")
	if err != nil || strings.Contains(string(text), "PRIVATE") || !strings.Contains(string(text), "PUBLIC KEY") {
		t.Errorf("public key is %s, error %v", text, err)
	}
}

func TestOrdersKeyIsMadeOnce(t *testing.T) {
	_, dir := newCA(t)
	const processes = 8
	keys := make([]crypto.PublicKey, processes)
	var wait sync.WaitGroup
	for i := range processes {
		wait.Go(func() {
			if k, err := loadOrCreateKey(filepath.Join(caDir(dir), ordersKey("race"))); err == nil {
				keys[i] = k.Public()
			}
		})
	}
	wait.Wait()
	for i, k := range keys {
		if k == nil || !keys[0].(*ecdsa.PublicKey).Equal(k) {
			t.Fatalf("caller %d has another key than caller 0", i)
		}
	}
	left, err := filepath.Glob(filepath.Join(caDir(dir), ".key-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
}

func uris(t *testing.T, s string) []*url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return []*url.URL{u}
}
