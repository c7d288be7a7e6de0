package scenario

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

const testNode = fleet.NodeID("n-aaaaaaaaaaaaaaaaaaaaaaaa")

var testNow = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t *testing.T, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCheckChain(t *testing.T) {
	caKey, nodeKey := newKey(t), newKey(t)
	caTemplate := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: testNow.AddDate(-1, 0, 0), NotAfter: testNow.AddDate(1, 0, 0),
	}
	ca := sign(t, caTemplate, caTemplate, caKey.Public(), caKey)
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	der, err := x509.MarshalPKIXPublicKey(nodeKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	request := fleet.Request{Node: testNode, Tenant: "default", Site: "lab", Evidence: fleet.Evidence{LDevIDKey: sum[:]}}
	good := func() *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: string(testNode)}, BasicConstraintsValid: true,
			NotBefore: testNow.Add(-5 * time.Minute), NotAfter: testNow.AddDate(0, 0, 30), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			URIs:        []*url.URL{{Scheme: "spiffe", Host: "default.muster.internal", Path: "/node/" + string(testNode)}},
			DNSNames:    []string{string(testNode) + ".lab.default.node.muster.internal"},
		}
	}
	for name, c := range map[string]struct {
		edit func(*x509.Certificate)
		key  crypto.PublicKey
		by   crypto.Signer
		now  time.Time
		want string // "" is fine
	}{
		"as it should be":   {want: ""},
		"another node":      {edit: func(c *x509.Certificate) { c.Subject.CommonName = "n-bbbbbbbbbbbbbbbbbbbbbbbb" }, want: "subject"},
		"more in subject":   {edit: func(c *x509.Certificate) { c.Subject.Organization = []string{"x"} }, want: "subject"},
		"another tenant":    {edit: func(c *x509.Certificate) { c.URIs[0].Host = "other.muster.internal" }, want: "URIs"},
		"two URIs":          {edit: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, want: "URIs"},
		"another site":      {edit: func(c *x509.Certificate) { c.DNSNames[0] = string(testNode) + ".x.default.node.muster.internal" }, want: "DNS"},
		"an address":        {edit: func(c *x509.Certificate) { c.IPAddresses = []net.IP{{1, 2, 3, 4}} }, want: "other names"},
		"a CA":              {edit: func(c *x509.Certificate) { c.IsCA = true }, want: "CA"},
		"server use":        {edit: func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }, want: "extended key usages"},
		"no use":            {edit: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, want: "chain"},
		"too long":          {edit: func(c *x509.Certificate) { c.NotAfter = testNow.AddDate(0, 0, 60) }, want: "good for"},
		"over":              {now: testNow.AddDate(0, 2, 0), want: "chain"},
		"not the TPM's key": {key: newKey(t).Public(), want: "its key"},
		"another CA":        {by: newKey(t), want: "chain"},
	} {
		t.Run(name, func(t *testing.T) {
			template, key, by, now := good(), crypto.PublicKey(nodeKey.Public()), crypto.Signer(caKey), testNow
			if c.edit != nil {
				c.edit(template)
			}
			if c.key != nil {
				key = c.key
			}
			parent := ca
			if c.by != nil {
				by = c.by
				other := *caTemplate
				parent = sign(t, &other, &other, by.Public(), by)
			}
			if !c.now.IsZero() {
				now = c.now
			}
			leaf := sign(t, template, parent, key, by)
			err := checkChain([][]byte{leaf.Raw, parent.Raw}, roots, request, now)
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v does not say %q", err, c.want)
			}
		})
	}
	if err := checkChain(nil, roots, request, testNow); err == nil {
		t.Error("no certificate: no error")
	}
}

func TestRequestOf(t *testing.T) {
	list := []fleet.Request{
		{ID: "r-1", FirstSeen: testNow, Evidence: fleet.Evidence{UUID: "6D757374-6572-4C61-8000-000000000001"}},
		{ID: "r-2", FirstSeen: testNow.Add(time.Second), Evidence: fleet.Evidence{UUID: "6d757374-6572-4c61-8000-000000000001"}},
		{ID: "r-3", FirstSeen: testNow, Evidence: fleet.Evidence{UUID: "6d757374-6572-4c61-8000-000000000002"}},
	}
	if r, ok := requestOf(list, "6d757374-6572-4c61-8000-000000000001"); !ok || r.ID != "r-2" {
		t.Errorf("got %v %v, want the newest, r-2", r.ID, ok)
	}
	if r, ok := requestOf(list, "6d757374-6572-4c61-8000-000000000003"); ok {
		t.Errorf("got %v for a machine without request", r.ID)
	}
	if r, ok := requestOf([]fleet.Request{{ID: "r-4"}}, ""); ok {
		t.Errorf("got %v for no UUID", r.ID)
	}
}

func TestScenarios(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range All() {
		if s.Name == "" || s.Summary == "" || s.Run == nil || seen[s.Name] {
			t.Errorf("scenario %+v is not complete or not the only one of its name", s)
		}
		seen[s.Name] = true
		if got, ok := Find(s.Name); !ok || got.Name != s.Name {
			t.Errorf("Find(%q) = %v, %v", s.Name, got.Name, ok)
		}
	}
	if _, ok := Find("nonsense"); ok {
		t.Error("there is a scenario nonsense")
	}
}
