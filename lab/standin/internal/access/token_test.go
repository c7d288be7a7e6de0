package access

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

var pin = strings.Repeat("ab", 32)

func TestParseToken(t *testing.T) {
	for in, want := range map[string]Token{
		"secret":                                  {Password: "secret"},
		"abcdef.0123456789abcdef":                 {Bootstrap: "abcdef.0123456789abcdef"},
		"K10" + pin + "::server:secret":           {CAHash: pin, User: "server", Password: "secret"},
		"K10" + pin + "::node:a:b":                {CAHash: pin, User: "node", Password: "a:b"},
		"K10" + pin + "::abcdef.0123456789abcdef": {CAHash: pin, Bootstrap: "abcdef.0123456789abcdef"},
		"K1": {Password: "K1"},
	} {
		got, err := ParseToken(in)
		if err != nil || got != want {
			t.Errorf("ParseToken(%q) = %+v, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "K10", "K10abc::server:x", "K10" + pin, "K10" + pin + "::", "K10" + pin + "::server:", "K10" + strings.Repeat("zz", 32) + "::server:x"} {
		if got, err := ParseToken(bad); err == nil {
			t.Errorf("ParseToken(%q) = %+v", bad, got)
		}
	}
	for _, boot := range []string{"abcdef.0123456789abcdef", "K10" + pin + "::abcdef.0123456789abcdef"} {
		if pw, err := ServerPassword(boot); err == nil {
			t.Errorf("a bootstrap token makes a server: %q", pw)
		}
	}
}

func cert(t *testing.T, cn string, parent *x509.Certificate, pk *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if parent == nil {
		parent, pk = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), pk)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestCAHash(t *testing.T) {
	root, rk, rootPEM := cert(t, "root", nil, nil)
	inter, ik, interPEM := cert(t, "intermediate", root, rk)
	_, _, leafPEM := cert(t, "ca", inter, ik)
	sum := sha256.Sum256(rootPEM)
	if h, err := CAHash(rootPEM); err != nil || h != hex.EncodeToString(sum[:]) {
		t.Errorf("one certificate: %s %v", h, err)
	}
	chain := append(append(leafPEM, interPEM...), rootPEM...)
	sum = sha256.Sum256(root.Raw)
	if h, err := CAHash(chain); err != nil || h != hex.EncodeToString(sum[:]) {
		t.Errorf("chain: %s %v, want the root's DER form", h, err)
	}
	if h, err := CAHash([]byte("nothing")); err == nil {
		t.Errorf("hash of nothing: %s", h)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add("K10" + pin + "::server:secret")
	f.Add("abcdef.0123456789abcdef")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err == nil && (tok.Password == "") == (tok.Bootstrap == "") {
			t.Errorf("ParseToken(%q) = %+v: neither or both", s, tok)
		}
	})
}
