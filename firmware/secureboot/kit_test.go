package secureboot

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

var when = time.Date(2026, 3, 4, 5, 6, 7, 890, time.FixedZone("", 3600))

func mustPair(t testing.TB, name string) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, cert, err := newPair(name, when)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func mustMake(t *testing.T, foreign ...*x509.Certificate) map[string]File {
	t.Helper()
	files, err := Make(Config{Name: "Example AG", Now: when, Foreign: foreign})
	if err != nil {
		t.Fatal(err)
	}
	kit := map[string]File{}
	for _, f := range files {
		if _, ok := kit[f.Name]; ok || !fs.ValidPath(f.Name) {
			t.Errorf("file name %q", f.Name)
		}
		kit[f.Name] = f
	}
	return kit
}

func kitCert(t *testing.T, kit map[string]File, name string) *x509.Certificate {
	t.Helper()
	cert, err := ParseCertificate(kit["keys/"+name+".crt"].Data)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// listed reads signature lists as firmware does: owners and certificates.
func listed(t *testing.T, b []byte) (owners []string, certs [][]byte) {
	t.Helper()
	le := binary.LittleEndian
	for len(b) > 0 {
		if len(b) < 28 {
			t.Fatalf("%d bytes after the last list", len(b))
		}
		size, header, each := int(le.Uint32(b[16:])), int(le.Uint32(b[20:])), int(le.Uint32(b[24:]))
		if !bytes.Equal(b[:16], certX509.bytes()) || header != 0 || size > len(b) || size != 28+each || each <= 16 {
			t.Fatalf("signature list of %d bytes, header %d, signatures of %d", size, header, each)
		}
		o := b[28:44]
		owners = append(owners, fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(o), le.Uint16(o[4:]), le.Uint16(o[6:]), o[8:10], o[10:]))
		certs = append(certs, b[44:size])
		b = b[size:]
	}
	return owners, certs
}

// split takes an authenticated variable apart: PKCS #7 data and content.
func split(t *testing.T, auth []byte) (signed, content []byte) {
	t.Helper()
	le := binary.LittleEndian
	length := int(le.Uint32(auth[16:]))
	if le.Uint16(auth[20:]) != 0x0200 || le.Uint16(auth[22:]) != 0x0ef1 || !bytes.Equal(auth[24:40], certPKCS7.bytes()) || 16+length > len(auth) {
		t.Fatalf("header % x", auth[:40])
	}
	if y := le.Uint16(auth); y != 2026 || !bytes.Equal(auth[2:7], []byte{3, 4, 4, 6, 7}) || !bytes.Equal(auth[7:16], make([]byte, 9)) {
		t.Errorf("time % x", auth[:16])
	}
	return auth[40 : 16+length], auth[16+length:]
}

func TestKit(t *testing.T) {
	_, foreign := mustPair(t, "Option ROM `CA`\n")
	kit := mustMake(t, foreign)
	certs := map[string]*x509.Certificate{}
	for _, name := range []string{"PK", "KEK", "db"} {
		file := kit["keys/"+name+".key"]
		block, rest := pem.Decode(file.Data)
		if block == nil || len(rest) > 0 || file.Mode != 0o600 {
			t.Fatalf("%s.key: mode %v", name, file.Mode)
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		cert := kitCert(t, kit, name)
		certs[name] = cert
		private, ok := key.(*rsa.PrivateKey)
		if !ok || private.N.BitLen() != 2048 || !private.PublicKey.Equal(cert.PublicKey) {
			t.Errorf("%s: key %T does not fit its certificate", name, key)
		}
		if err := cert.CheckSignature(x509.SHA256WithRSA, cert.RawTBSCertificate, cert.Signature); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if cert.NotAfter != time.Date(2036, 3, 4, 4, 6, 7, 0, time.UTC) || cert.Subject.CommonName != "Example AG "+name {
			t.Errorf("%s: %v until %v", name, cert.Subject, cert.NotAfter)
		}
		if !bytes.Equal(kit["enroll/"+name+".cer"].Data, cert.Raw) {
			t.Errorf("%s.cer is another certificate", name)
		}
	}
	if bytes.Equal(certs["PK"].RawSubjectPublicKeyInfo, certs["db"].RawSubjectPublicKeyInfo) {
		t.Error("PK and db have one key")
	}
	for name, want := range map[string][][]byte{"PK": {certs["PK"].Raw}, "KEK": {certs["KEK"].Raw}, "db": {certs["db"].Raw, foreign.Raw}} {
		list := kit["enroll/"+name+".esl"].Data
		owners, got := listed(t, list)
		if len(got) != len(want) {
			t.Fatalf("%s lists %d certificates", name, len(got))
		}
		for i := range want {
			if !bytes.Equal(got[i], want[i]) {
				t.Errorf("%s: certificate %d is another", name, i)
			}
		}
		if !strings.Contains(string(kit["README.md"].Data), owners[0]) {
			t.Errorf("the README does not name the owner %s", owners[0])
		}
		if name == "db" && owners[1] != "77fa9abd-0359-4d32-bd60-28f4e78f784b" {
			t.Errorf("the foreign certificate's owner is %s", owners[1])
		}
		if _, content := split(t, kit["enroll/"+name+".auth"].Data); !bytes.Equal(content, list) {
			t.Errorf("%s.auth sets something else than %s.esl", name, name)
		}
	}
	if text := string(kit["README.md"].Data); !strings.Contains(text, "Option ROM ?CA?") || strings.Contains(text, "--microsoft-ca") || strings.Contains(text, "<no value>") {
		t.Errorf("README:\n%s", text)
	}
	if text := string(mustMake(t)["README.md"].Data); !strings.Contains(text, "--microsoft-ca") {
		t.Error("without a foreign certificate, the README does not speak of option ROMs")
	}
}

// No file outside of keys holds a private key in any form.
func TestPrivateKeysStayInTheirFolder(t *testing.T) {
	kit := mustMake(t)
	var secrets [][]byte
	for name, f := range kit {
		if strings.HasSuffix(name, ".key") {
			block, _ := pem.Decode(f.Data)
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			k, ok := key.(*rsa.PrivateKey)
			if !ok {
				t.Fatalf("%T", key)
			}
			secrets = append(secrets, k.Primes[0].Bytes(), k.Primes[1].Bytes(), k.D.Bytes(), []byte("PRIVATE KEY"))
		}
	}
	found := false
	for name, f := range kit {
		for _, s := range secrets {
			if bytes.Contains(f.Data, s) {
				found = true
				if !strings.HasPrefix(name, KeysFolder+"/") || f.Mode != 0o600 {
					t.Errorf("%s (mode %v) holds a secret", name, f.Mode)
				}
			}
		}
	}
	if !found || len(secrets) != 12 {
		t.Errorf("the search finds nothing: %d secrets", len(secrets))
	}
}

func TestMakeRefuses(t *testing.T) {
	_, cert := mustPair(t, "x")
	for when, cfg := range map[string]Config{
		"there is no name":           {Now: when},
		"the name is long":           {Name: strings.Repeat("x", maxName+1), Now: when},
		"the name has lines":         {Name: "a\nb", Now: when},
		"there is no time":           {Name: "x"},
		"a certificate comes twice":  {Name: "x", Now: when, Foreign: []*x509.Certificate{cert, cert}},
		"there are too many of them": {Name: "x", Now: when},
	} {
		if strings.HasPrefix(when, "there are too many") {
			for i := range maxForeign + 1 {
				cfg.Foreign = append(cfg.Foreign, &x509.Certificate{Raw: []byte{byte(i)}})
			}
		}
		if _, err := Make(cfg); err == nil {
			t.Errorf("when %s, then a kit is made", when)
		}
	}
	var both error
	if _, both = Make(Config{}); both == nil || !strings.Contains(both.Error(), "name") || !strings.Contains(both.Error(), "time") {
		t.Errorf("want all problems at once, got %v", both)
	}
}

func TestParseCertificate(t *testing.T) {
	_, cert := mustPair(t, "x")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	for _, good := range [][]byte{cert.Raw, text, append(bytes.Clone(text), '\n')} {
		if got, err := ParseCertificate(good); err != nil || !got.Equal(cert) {
			t.Errorf("%v", err)
		}
	}
	for when, bad := range map[string][]byte{
		"it is empty":        nil,
		"it is cut":          cert.Raw[:len(cert.Raw)-1],
		"there are two":      append(bytes.Clone(text), text...),
		"it is a key":        pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: cert.Raw}),
		"something follows":  append(bytes.Clone(cert.Raw), 0),
		"it is far too long": append(bytes.Clone(cert.Raw), make([]byte, maxCertificate)...),
	} {
		if _, err := ParseCertificate(bad); err == nil {
			t.Errorf("when %s, then it is read", when)
		}
	}
}

func FuzzParseCertificate(f *testing.F) {
	_, cert := mustPair(f, "x")
	f.Add(cert.Raw)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	f.Fuzz(func(t *testing.T, b []byte) {
		cert, err := ParseCertificate(b)
		if err == nil && !bytes.Contains(signatureList(ownerMicrosoft, cert), cert.Raw) {
			t.Error("a certificate got lost")
		}
	})
}

func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not here: install the package %s", name, pkg)
	}
	return path
}

func lay(t *testing.T, kit map[string]File) string {
	t.Helper()
	dir := t.TempDir()
	for name, f := range kit {
		path := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(path, f.Data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// OpenSSL accepts each signature by the right key over the right bytes, and
// no other.
func TestOpenSSLVerifiesTheVariables(t *testing.T) {
	openssl := tool(t, "openssl", "openssl")
	kit := mustMake(t)
	dir := lay(t, kit)
	verify := func(file string, v variable, signer string, change func(signed, content []byte)) error {
		t.Helper()
		signed, content := split(t, bytes.Clone(kit["enroll/"+file+".auth"].Data))
		change(signed, content)
		// OpenSSL wants the ContentInfo around it.
		outer, err := asn1.Marshal(struct {
			Type    asn1.ObjectIdentifier
			Content asn1.RawValue
		}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}, asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: signed}})
		if err != nil {
			t.Fatal(err)
		}
		p7, data := filepath.Join(dir, "p7"), filepath.Join(dir, "data")
		if err := errors.Join(os.WriteFile(p7, outer, 0o600), os.WriteFile(data, signedBytes(v, when, content), 0o600)); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(openssl, "smime", "-verify", "-binary", "-inform", "DER", "-in", p7, "-content", data,
			"-CAfile", filepath.Join(dir, signer+".crt"), "-purpose", "any", "-attime", fmt.Sprint(when.Unix()+60), "-out", os.DevNull).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	same := func(_, _ []byte) {}
	for _, c := range []struct {
		v              variable
		signer, others string
	}{{varPK, "PK", "KEK db"}, {varKEK, "PK", "KEK db"}, {varDB, "KEK", "PK db"}} {
		if err := verify(c.v.name, c.v, c.signer, same); err != nil {
			t.Errorf("%s by %s: %v", c.v.name, c.signer, err)
		}
		for _, other := range strings.Fields(c.others) {
			if verify(c.v.name, c.v, other, same) == nil {
				t.Errorf("%s passes as signed by %s", c.v.name, other)
			}
		}
		if verify(c.v.name, c.v, c.signer, func(_, content []byte) { content[50] ^= 1 }) == nil {
			t.Errorf("changed content of %s passes", c.v.name)
		}
		if verify(c.v.name, c.v, c.signer, func(signed, _ []byte) { signed[len(signed)-1] ^= 1 }) == nil {
			t.Errorf("a changed signature of %s passes", c.v.name)
		}
		if verify(c.v.name, variable{"dbx", c.v.vendor}, c.signer, same) == nil {
			t.Errorf("%s passes as dbx", c.v.name)
		}
	}
}

// efitools makes the same bytes from the same keys, owner and time.
func TestEFIToolsMakeTheSame(t *testing.T) {
	toList, sign := tool(t, "cert-to-efi-sig-list", "efitools"), tool(t, "sign-efi-sig-list", "efitools")
	kit := mustMake(t)
	dir := lay(t, kit)
	owner := regexp.MustCompile(`Owner GUID ([0-9a-f-]{36})`).FindSubmatch(kit["README.md"].Data)
	if owner == nil {
		t.Fatal("no owner in the README")
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, signer := range map[string]string{"PK": "PK", "KEK": "PK", "db": "KEK"} {
		for _, args := range [][]string{
			{toList, "-g", string(owner[1]), at(name + ".crt"), at("theirs.esl")},
			{sign, "-g", string(owner[1]), "-t", when.UTC().Format(time.DateTime), "-k", at(signer + ".key"), "-c", at(signer + ".crt"), name, at("theirs.esl"), at("theirs.auth")},
		} {
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Env = append(os.Environ(), "TZ=UTC")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		for _, kind := range []string{".esl", ".auth"} {
			theirs, err := os.ReadFile(at("theirs" + kind))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(theirs, kit["enroll/"+name+kind].Data) {
				t.Errorf("%s%s differs from what efitools make", name, kind)
			}
		}
	}
}
