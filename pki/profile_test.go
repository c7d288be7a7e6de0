package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

var profileNow = time.Date(2027, 3, 4, 5, 6, 7, 890, time.FixedZone("CET", 3600))

func profileKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// profileIssuer makes a node CA for the tests of this file.
func profileIssuer(t testing.TB) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	k := profileKey(t)
	keyID, err := SubjectKeyID(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test node CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: profileNow.AddDate(0, -1, 0), NotAfter: profileNow.AddDate(3, 0, 0), SubjectKeyId: keyID,
		KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, k
}

func profileOf(t testing.TB) NodeProfile {
	t.Helper()
	k := profileKey(t)
	ek, err := fleet.HashEK(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return NodeProfile{Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Public: k.Public(), Now: profileNow}
}

// signLeaf signs the template after change was at it.
func signLeaf(t testing.TB, p NodeProfile, issuer *x509.Certificate, key *ecdsa.PrivateKey, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template, err := LeafTemplate(p, issuer)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = new(big.Int).Lsh(big.NewInt(0x5a5a5a5a), 90)
	parent := *issuer
	if change != nil {
		change(template)
		// CreateCertificate takes this extension from the parent.
		parent.SubjectKeyId = template.AuthorityKeyId
	}
	der, err := x509.CreateCertificate(rand.Reader, template, &parent, template.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestNamesOfANode(t *testing.T) {
	p := NodeProfile{Tenant: "acme", Site: "shop-1", Node: "n-aaaaaaaaaaaaaaaaaaaaaaaa"}
	if got, want := p.DNSName(), "n-aaaaaaaaaaaaaaaaaaaaaaaa.shop-1.acme.node.muster.internal"; got != want {
		t.Errorf("DNS name is %s, want %s", got, want)
	}
	if got, want := p.URI().String(), "spiffe://acme.muster.internal/node/n-aaaaaaaaaaaaaaaaaaaaaaaa"; got != want {
		t.Errorf("URI is %s, want %s", got, want)
	}
	p.Site = ""
	if got := p.DNSName(); !strings.Contains(got, ".pool.acme.") {
		t.Errorf("DNS name in the pool is %s", got)
	}
}

func TestTheLongestNamesFit(t *testing.T) {
	issuer, key := profileIssuer(t)
	p := profileOf(t)
	p.Tenant, p.Site = strings.Repeat("t", 63), strings.Repeat("s", 63)
	if n := len(p.DNSName()); n > 253 {
		t.Errorf("the DNS name has %d characters", n)
	}
	if problems := CheckLeaf(signLeaf(t, p, issuer, key, nil), issuer, p); len(problems) > 0 {
		t.Error(problems)
	}
}

func TestLeafTemplate(t *testing.T) {
	issuer, key := profileIssuer(t)
	p := profileOf(t)
	leaf := signLeaf(t, p, issuer, key, nil)
	if problems := CheckLeaf(leaf, issuer, p); len(problems) > 0 {
		t.Errorf("a leaf of the template has problems: %v", problems)
	}
	if d := leaf.NotAfter.Sub(leaf.NotBefore); d != NodeLifetime+Backdate {
		t.Errorf("it lives %v", d)
	}
	if leaf.NotBefore.Nanosecond() != 0 || leaf.NotBefore.After(p.Now.Add(-Backdate)) {
		t.Errorf("it begins on %v", leaf.NotBefore)
	}
}

func TestCheckLeafSeesEveryChange(t *testing.T) {
	issuer, key := profileIssuer(t)
	p := profileOf(t)
	other := profileKey(t)
	unknown := pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Value: []byte{5, 0}}
	san := func(names ...asn1.RawValue) pkix.Extension {
		b, err := asn1.Marshal(names)
		if err != nil {
			t.Fatal(err)
		}
		return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: b}
	}
	name := func(tag int, s string) asn1.RawValue {
		return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(s)}
	}
	otherName, err := asn1.Marshal(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 8, 3})
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*x509.Certificate){
		"small serial number":   func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) },
		"huge serial number":    func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) },
		"common name":           func(c *x509.Certificate) { c.Subject.CommonName = "admin" },
		"organisation":          func(c *x509.Certificate) { c.Subject.Organization = []string{"x"} },
		"begins later":          func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Second) },
		"ends later":            func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) },
		"ends earlier":          func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(-time.Second) },
		"key":                   func(c *x509.Certificate) { c.PublicKey = other.Public() },
		"hash of the signature": func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA512 },
		"key usage":             func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement },
		"no key usage":          func(c *x509.Certificate) { c.KeyUsage = 0 },
		"server":                func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) },
		"any use":               func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} },
		"no use":                func(c *x509.Certificate) { c.ExtKeyUsage = nil },
		"unknown use": func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}}
		},
		"CA":                   func(c *x509.Certificate) { c.IsCA = true },
		"no basic constraints": func(c *x509.Certificate) { c.BasicConstraintsValid = false },
		"another DNS name":     func(c *x509.Certificate) { c.DNSNames[0] = "x" + c.DNSNames[0] },
		"more DNS names":       func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "x.node.muster.internal") },
		"no DNS name":          func(c *x509.Certificate) { c.DNSNames = nil },
		"another URI":          func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "x", Path: "/y"}} },
		"no URI":               func(c *x509.Certificate) { c.URIs = nil },
		"e-mail":               func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b"} },
		"IP address":           func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} },
		"policy": func(c *x509.Certificate) {
			oid, err := x509.OIDFromInts([]uint64{1, 2, 3})
			if err != nil {
				t.Fatal(err)
			}
			c.Policies = []x509.OID{oid}
		},
		"CRL":               func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://x"} },
		"OCSP":              func(c *x509.Certificate) { c.OCSPServer = []string{"http://x"} },
		"issuer URL":        func(c *x509.Certificate) { c.IssuingCertificateURL = []string{"http://x"} },
		"name constraints":  func(c *x509.Certificate) { c.IsCA = true; c.PermittedDNSDomains = []string{"x"} },
		"subject key ID":    func(c *x509.Certificate) { c.SubjectKeyId = []byte{1} },
		"authority key ID":  func(c *x509.Certificate) { c.AuthorityKeyId = []byte{1} },
		"unknown extension": func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{unknown} },
		"critical names": func(c *x509.Certificate) {
			e := san(name(2, p.DNSName()), name(6, p.URI().String()))
			e.Critical = true
			c.ExtraExtensions = []pkix.Extension{e}
		},
		"name Go cannot read": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{san(name(2, p.DNSName()), name(6, p.URI().String()), asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 8, Bytes: otherName[2:]})}
		},
	} {
		leaf := signLeaf(t, p, issuer, key, change)
		if problems := CheckLeaf(leaf, issuer, p); len(problems) == 0 {
			t.Errorf("%s: it was not noticed", what)
		}
	}
	// The same names given by hand are the same certificate.
	byHand := signLeaf(t, p, issuer, key, func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{san(name(2, p.DNSName()), name(6, p.URI().String()))}
	})
	if problems := CheckLeaf(byHand, issuer, p); len(problems) > 0 {
		t.Errorf("names by hand: %v", problems)
	}
}

func TestCheckLeafWantsTheIssuer(t *testing.T) {
	issuer, key := profileIssuer(t)
	other, _ := profileIssuer(t)
	p := profileOf(t)
	if len(CheckLeaf(signLeaf(t, p, issuer, key, nil), other, p)) == 0 {
		t.Error("a leaf of another CA of the same name was taken")
	}
	// All as it should be, but one bit of the signature.
	raw := bytes.Clone(signLeaf(t, p, issuer, key, nil).Raw)
	raw[len(raw)-1] ^= 1
	forged, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(CheckLeaf(forged, issuer, p)) != 1 {
		t.Error("a leaf with a false signature was taken")
	}
	bad := p
	bad.Node = "x"
	if len(CheckLeaf(signLeaf(t, p, issuer, key, nil), issuer, bad)) == 0 {
		t.Error("a leaf was compared with a malformed profile")
	}
}

func TestValidityStaysWithinTheIssuer(t *testing.T) {
	issuer, _ := profileIssuer(t)
	rapid.Check(t, func(t *rapid.T) {
		seconds := rapid.Int64Range(issuer.NotBefore.Unix()-1000000, issuer.NotAfter.Unix()+1000000).Draw(t, "now")
		now := time.Unix(seconds, rapid.Int64Range(0, 999999999).Draw(t, "ns"))
		life := time.Duration(rapid.Int64Range(1, int64(5*365*24*time.Hour)).Draw(t, "life"))
		notBefore, notAfter, err := Validity(now, life, issuer)
		inside := seconds >= issuer.NotBefore.Unix() && seconds < issuer.NotAfter.Unix()
		if (err == nil) != inside {
			t.Fatalf("at %v: %v", now, err)
		}
		if err != nil {
			return
		}
		if notBefore.Before(issuer.NotBefore) || notAfter.After(issuer.NotAfter) || notBefore.After(now) || notAfter.Sub(now) > life {
			t.Fatalf("at %v: %v to %v", now, notBefore, notAfter)
		}
	})
}

func TestCheckKey(t *testing.T) {
	k := profileKey(t)
	if err := CheckKey(k.Public()); err != nil {
		t.Error(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 a point off the curve cannot be made otherwise
	for _, bad := range []any{nil, k, p521.Public(), (*ecdsa.PublicKey)(nil), &ecdsa.PublicKey{}, &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}, "x"} {
		if CheckKey(bad) == nil {
			t.Errorf("%#v was taken", bad)
		}
	}
}

func TestSubjectKeyID(t *testing.T) {
	k := profileKey(t)
	id, err := SubjectKeyID(k.Public())
	if err != nil || len(id) != 20 {
		t.Fatalf("%x, %v", id, err)
	}
	point, err := k.PublicKey.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha1.Sum(point.Bytes()); bytes.Equal(id, sum[:]) {
		t.Error("it is the SHA-1 of RFC 5280, not the method of RFC 7093")
	}
	if _, err := SubjectKeyID("x"); err == nil {
		t.Error("a string has a key identifier")
	}
}
