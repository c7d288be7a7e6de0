package ekcert_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

func newCA(t testing.TB, intermediate bool) *swtpmtest.CA {
	t.Helper()
	ca, err := swtpmtest.OpenCA(t.TempDir(), intermediate)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// oaepCertificate is a certificate whose key stands under id-RSAES-OAEP. Go
// cannot make one, so a certificate made by Go is taken apart. Its signature
// does not hold any more; what is tested is reading.
func oaepCertificate(t testing.TB, der []byte) []byte {
	t.Helper()
	rsaOID, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1})
	if err != nil {
		t.Fatal(err)
	}
	oaep := bytes.Clone(rsaOID)
	oaep[len(oaep)-1] = 7
	if bytes.Count(der, rsaOID) != 1 {
		t.Fatal("the certificate has not one RSA key")
	}
	return bytes.Replace(der, rsaOID, oaep, 1)
}

func TestParseCertificate(t *testing.T) {
	ca, key := newCA(t, false), rsaKey(t, 2048)
	der, err := ca.Certify(&key.PublicKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	header := append([]byte{0x10, 0x01, 0x00}, binary.BigEndian.AppendUint16(nil, uint16(len(der)))...)
	small := rsaKey(t, 1024)
	smallDER, err := ca.Certify(&small.PublicKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		when string
		in   []byte
		ok   bool
	}{
		{"when it is plain", der, true},
		{"when it is padded with ones", append(bytes.Clone(der), bytes.Repeat([]byte{0xff}, 300)...), true},
		{"when it is padded with zeros", append(bytes.Clone(der), make([]byte, 300)...), true},
		{"when it has the TCG header", append(bytes.Clone(header), der...), true},
		{"when it has header and padding", append(append(bytes.Clone(header), der...), 0, 0, 0), true},
		{"when its key is RSAES-OAEP", oaepCertificate(t, der), true},
		{"when the header promises too much", append([]byte{0x10, 0x01, 0x00, 0xff, 0xff}, der...), false},
		{"when it is cut", der[:len(der)-1], false},
		{"when it is empty", nil, false},
		{"when it is noise", bytes.Repeat([]byte{0x30}, 200), false},
		{"when it is huge", append(bytes.Clone(der), make([]byte, 100_000)...), false},
		{"when its key has 1024 bits", smallDER, false},
	} {
		t.Run(c.when, func(t *testing.T) {
			got, err := ekcert.ParseCertificate(c.in)
			if (err == nil) != c.ok {
				t.Fatalf("error %v", err)
			}
			if err != nil {
				return
			}
			if !key.PublicKey.Equal(got.PublicKey) {
				t.Errorf("key is %T", got.PublicKey)
			}
		})
	}
}

func TestParseIntermediateWhenTheKeyIsEndlessThenError(t *testing.T) {
	n := new(big.Int).Lsh(big.NewInt(1), 20000)
	n.SetBit(n, 0, 1)
	ca := newCA(t, false)
	der, err := ca.Certify(&rsa.PublicKey{N: n, E: 65537}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ekcert.ParseIntermediate(der); err == nil {
		t.Error("an RSA key of 20000 bits was taken")
	}
	if _, err := ekcert.ParseIntermediate(ca.Root.Raw); err != nil {
		t.Error(err)
	}
}

func readLog(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// header is a log's first entry: no event, but the list of banks.
func header(algs ...uint16) []byte {
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	spec = binary.LittleEndian.AppendUint32(spec, uint32(len(algs)))
	for _, a := range algs {
		spec = binary.LittleEndian.AppendUint16(spec, a)
		size := uint16(32)
		if a == 4 {
			size = 20
		}
		spec = binary.LittleEndian.AppendUint16(spec, size)
	}
	spec = append(spec, 0)
	b := binary.LittleEndian.AppendUint32(nil, 0)
	b = binary.LittleEndian.AppendUint32(b, 3)
	b = append(b, make([]byte, 20)...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(spec)))
	return append(b, spec...)
}

// entry is one event with digests of one byte repeated.
func entry(pcr, kind uint32, data string, algs ...uint16) []byte {
	b := binary.LittleEndian.AppendUint32(nil, pcr)
	b = binary.LittleEndian.AppendUint32(b, kind)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(algs)))
	for _, a := range algs {
		b = binary.LittleEndian.AppendUint16(b, a)
		n := 32
		if a == 4 {
			n = 20
		}
		b = append(b, bytes.Repeat([]byte{byte(a)}, n)...)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestParseEventLog(t *testing.T) {
	const sha1, sha256 = 4, 0xB
	for _, c := range []struct {
		when string
		in   []byte
		want int // events, -1 for an error
	}{
		{"when it is a real one", readLog(t, "disk"), 35},
		{"when it has two banks", join(header(sha1, sha256), entry(4, 1, "x", sha1, sha256)), 1},
		{"when an unextended entry has no digest", join(header(sha256), entry(0, 3, "StartupLocality\x00\x03")), 1},
		{"when an unextended entry is outside all PCRs", join(header(sha256), entry(0xFFFFFFFF, 3, "platform", sha256), entry(4, 1, "x", sha256)), 1},
		{"when an event is outside all PCRs", join(header(sha256), entry(0xFFFFFFFF, 1, "x", sha256)), -1},
		{"when an event is in PCR 24", join(header(sha256), entry(24, 1, "x", sha256)), -1},
		{"when an event has only SHA-1", join(header(sha1, sha256), entry(4, 1, "x", sha1)), -1},
		{"when the log has only SHA-1", join(header(sha1), entry(4, 1, "x", sha1)), -1},
		{"when it is of TPM 1.2", join(entry(0, 1, "")[:8], make([]byte, 24)), -1},
		{"when an event has no digest", join(header(sha256), entry(4, 1, "x")), -1},
		{"when a bank is unknown", join(header(0x77, sha256), entry(4, 1, "x", 0x77)), -1},
		{"when a size is beyond the end", join(header(sha256), entry(4, 1, "x", sha256)[:42], []byte{0xff, 0xff, 0xff, 0xff}), -1},
		{"when the count of digests is endless", join(header(sha256), []byte{4, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}), -1},
		{"when it is cut", readLog(t, "disk")[:2000], -1},
		{"when it is empty", nil, -1},
		{"when it is noise", bytes.Repeat([]byte{0xff}, 4096), -1},
		{"when it is over 1 MiB", make([]byte, 1<<20+1), -1},
		{"when it has too many events", join(header(sha256), bytes.Repeat(entry(4, 1, "", sha256), 17000)), -1},
	} {
		t.Run(c.when, func(t *testing.T) {
			events, err := ekcert.ParseEventLog(c.in)
			if (err != nil) != (c.want < 0) || c.want >= 0 && len(events) != c.want {
				t.Errorf("%d events, %v; want %d", len(events), err, c.want)
			}
		})
	}
	events, err := ekcert.ParseEventLog(join(header(sha1, sha256), entry(4, 1, "x", sha1, sha256)))
	if err != nil || events[0].Digest != [32]byte(bytes.Repeat([]byte{sha256}, 32)) || string(events[0].Data) != "x" {
		t.Errorf("%+v, %v", events, err)
	}
}

func TestLoadRoots(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "lab"), 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	vendor, lab, cross := newCA(t, true), newCA(t, false), newCA(t, false)
	put("vendor.pem", vendor.RootPEM()) // root and intermediate in one file
	put("again.pem", vendor.RootPEM())
	put("cross.der", cross.Root.Raw)
	put("lab/ours.crt", lab.RootPEM())
	put("bad.pem", []byte("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n"))
	put("empty.pem", nil)
	put("noise.der", []byte("noise"))
	put("half.pem", append(lab.RootPEM(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})...))
	put("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}))
	put("README.md", []byte("not looked at"))
	put("huge.pem", make([]byte, 2<<20))
	if err := os.Symlink("/dev/zero", filepath.Join(dir, "device.pem")); err != nil {
		t.Fatal(err)
	}

	r, err := ekcert.LoadRoots(dir)
	if err != nil {
		t.Fatal(err)
	}
	var bad []string
	for _, p := range r.Problems {
		bad = append(bad, p.Error())
	}
	for _, name := range []string{"bad.pem", "empty.pem", "noise.der", "half.pem", "key.pem", "huge.pem", "device.pem"} {
		if !strings.Contains(strings.Join(bad, "\n"), name) {
			t.Errorf("%s is not among the problems", name)
		}
	}
	if len(bad) != 7 {
		t.Errorf("%d problems: %q", len(bad), bad)
	}
	// vendor root, its intermediate, cross root, lab root (from half.pem and
	// from lab/: two lists).
	if len(r.All) != 5 || len(r.Intermediates) != 1 || !r.Intermediates[0].Equal(vendor.Issuer) {
		t.Errorf("%d certificates, %d intermediates", len(r.All), len(r.Intermediates))
	}
	if name := r.Names[r.All[0].SHA256]; !strings.HasPrefix(name, r.All[0].File) && r.All[0].Anchor {
		t.Errorf("name %q", name)
	}
	key := rsaKey(t, 2048)
	chains := func(pool *x509.CertPool, ca *swtpmtest.CA) bool {
		der, err := ca.Certify(&key.PublicKey, nil)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ekcert.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		between := x509.NewCertPool()
		for _, i := range r.Intermediates {
			between.AddCert(i)
		}
		_, err = c.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	}
	if !chains(r.Vendor, vendor) || !chains(r.Vendor, cross) || !chains(r.Lab, lab) {
		t.Error("a root does not vouch")
	}
	if chains(r.Lab, vendor) || chains(r.Lab, cross) {
		t.Error("a vendor root is a lab root")
	}
	only, err := ekcert.LoadRoots(filepath.Join(dir, "lab"))
	if err != nil || len(only.All) != 1 || only.All[0].Lab {
		t.Errorf("%d, %v", len(only.All), err)
	}
	none, err := ekcert.LoadRoots(filepath.Join(dir, "nowhere"))
	if err != nil || len(none.All) != 0 || none.Vendor == nil || none.Lab == nil {
		t.Errorf("a missing directory: %+v, %v", none, err)
	}
}

func TestLoadRootsWhenAnIntermediateComesAloneThenItIsNoAnchor(t *testing.T) {
	dir, ca := t.TempDir(), newCA(t, true)
	if err := os.WriteFile(filepath.Join(dir, "issuing.der"), ca.Issuer.Raw, 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := ekcert.LoadRoots(dir)
	if err != nil || len(r.All) != 1 || r.All[0].Anchor || len(r.Names) != 0 {
		t.Fatalf("%+v, %v", r.All, err)
	}
	key := rsaKey(t, 2048)
	der, err := ca.Certify(&key.PublicKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ekcert.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: r.Vendor, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
		t.Error("an intermediate alone vouches")
	}
}

func TestLoadRootsWhenOneForgesASelfSignatureThenItIsNoAnchor(t *testing.T) {
	// Issuer and subject are one, but another key signed.
	dir := t.TempDir()
	name := pkix.Name{CommonName: "root"}
	key := rsaKey(t, 2048)
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: name, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, parent, parent, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der[len(der)-1] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "forged.der"), der, 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := ekcert.LoadRoots(dir)
	if err != nil || len(r.All) != 1 || r.All[0].Anchor {
		t.Errorf("%+v, %v", r.All, err)
	}
}

func FuzzParseCertificate(f *testing.F) {
	ca := newCA(f, false)
	f.Add(ca.Root.Raw)
	f.Add(append([]byte{0x10, 0x01, 0x00, 1, 0}, ca.Root.Raw...))
	key := rsaKey(f, 2048)
	der, err := ca.Certify(&key.PublicKey, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(oaepCertificate(f, der))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ekcert.ParseCertificate(b)
		if err != nil {
			return
		}
		switch k := c.PublicKey.(type) {
		case *rsa.PublicKey:
			if n := k.N.BitLen(); n < 2048 || n > 4096 {
				t.Fatalf("RSA key of %d bits", n)
			}
		case *ecdsa.PublicKey:
		default:
			t.Fatalf("key %T", k)
		}
	})
}

func FuzzParseEventLog(f *testing.F) {
	// Small seeds: the fuzzer spends its time on making big ones smaller.
	f.Add(join(header(0xB), entry(4, 1, "x", 0xB)))
	f.Add(join(header(0xB), entry(0, 3, "StartupLocality\x00\x03")))
	f.Add(join(header(4, 0xB), entry(0xFFFFFFFF, 3, "x"), entry(4, 1, "x", 4, 0xB)))
	f.Fuzz(func(t *testing.T, b []byte) {
		events, err := ekcert.ParseEventLog(b)
		if err != nil {
			return
		}
		size := 0
		for _, e := range events {
			if e.PCR < 0 || e.PCR > 23 {
				t.Fatalf("PCR %d", e.PCR)
			}
			size += len(e.Data)
		}
		if size > len(b) {
			t.Fatalf("%d bytes of data from a log of %d", size, len(b))
		}
		pki.Replay(events)
	})
}

func FuzzParseRoots(f *testing.F) {
	ca := newCA(f, true)
	f.Add(ca.RootPEM())
	f.Add(ca.Root.Raw)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, b []byte) {
		certs, err := ekcert.ParseRoots(b)
		if len(certs) == 0 && err == nil {
			t.Fatal("nothing, and no error")
		}
	})
}
