package firmware

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"testing"

	"github.com/muster-edge/muster/firmware/petest"
)

func tiny() []byte {
	return petest.Make(petest.Section{Name: ".text", Data: []byte("code")}, petest.Section{Name: ".linux", Data: []byte("kernel")})
}

func TestParsePE(t *testing.T) {
	p, err := ParsePE(tiny())
	if err != nil {
		t.Fatal(err)
	}
	if p.Arch != "amd64" || len(p.Sections) != 2 || p.Signed() {
		t.Errorf("got %s, %d sections, signed %v", p.Arch, len(p.Sections), p.Signed())
	}
	if data, err := p.Section(".linux"); err != nil || string(data) != "kernel" {
		t.Errorf(".linux is %q (%v): the padding must not be part of it", data, err)
	}
	if _, err := p.Section(".initrd"); err == nil {
		t.Error("a section that is not there was found")
	}
	twice, err := ParsePE(petest.Make(petest.Section{Name: ".linux", Data: []byte("a")}, petest.Section{Name: ".linux", Data: []byte("b")}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := twice.Section(".linux"); err == nil {
		t.Error("a section that is there twice was returned")
	}
	if _, err := twice.UKISections(); err == nil {
		t.Error("a UKI with two kernels was read")
	}
}

func TestParsePERefuses(t *testing.T) {
	put32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[at:], v); return b }
	}
	put16 := func(at int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint16(b[at:], v); return b }
	}
	const section = 328
	for when, change := range map[string]func([]byte) []byte{
		"the file is empty":                       func([]byte) []byte { return nil },
		"there is no MZ":                          func(b []byte) []byte { b[0] = 0; return b },
		"the header offset is outside":            put32(60, 1<<31),
		"there is no PE":                          func(b []byte) []byte { b[64] = 0; return b },
		"it is a 32-bit machine":                  put16(68, 0x14c),
		"there are no sections":                   put16(70, 0),
		"there are too many sections":             put16(70, 97),
		"it is not PE32+":                         put16(88, 0x10b),
		"the optional header is cut":              put16(84, 100),
		"SizeOfHeaders is before the table":       put32(88+60, 300),
		"SizeOfHeaders is outside":                put32(88+60, 1<<20),
		"there are too many directories":          put32(88+108, 17),
		"a section's bytes are outside":           put32(section+16, 1<<20),
		"a section's bytes start outside":         put32(section+20, 1<<31),
		"a section's address overflows":           put32(section+12, 1<<32-2),
		"the certificate table is outside":        put32(88+112+36, 8),
		"the certificate table is not at the end": func(b []byte) []byte { put32(88+112+32, 1024)(b); return put32(88+112+36, 8)(b) },
		"the file is cut":                         func(b []byte) []byte { return b[:len(b)-1] },
	} {
		if _, err := ParsePE(change(tiny())); err == nil {
			t.Errorf("when %s, then no error", when)
		}
	}
}

func TestAuthenticode(t *testing.T) {
	raw := tiny()
	p, err := ParsePE(raw)
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Authenticode()
	if err != nil {
		t.Fatal(err)
	}
	// Checksum at 88+64, security directory at 88+112+4*8.
	h := sha256.New()
	h.Write(raw[:152])
	h.Write(raw[156:232])
	h.Write(raw[240:])
	if want := Digest(h.Sum(nil)); got != want {
		t.Errorf("digest %s, by hand %s", got, want)
	}

	same := bytes.Clone(raw)
	same[152] ^= 0xff // checksum
	if d := authenticode(t, same); d != got {
		t.Error("the checksum changed the digest")
	}
	for _, at := range []int{2, 100, 400, petest.Headers, len(raw) - 1} {
		other := bytes.Clone(raw)
		other[at] ^= 0xff
		if p, err := ParsePE(other); err == nil {
			if d, err := p.Authenticode(); err == nil && d == got {
				t.Errorf("byte %d does not count", at)
			}
		}
	}
	longer := append(bytes.Clone(raw), "tail"...)
	if d := authenticode(t, longer); d == got {
		t.Error("bytes after the sections do not count")
	}
	gap := bytes.Clone(raw)
	binary.LittleEndian.PutUint32(gap[328+40+20:], petest.Headers) // both sections at one place
	if p, err := ParsePE(gap); err != nil {
		t.Error(err)
	} else if _, err := p.Authenticode(); err == nil {
		t.Error("overlapping sections were hashed")
	}
}

func authenticode(t *testing.T, raw []byte) Digest {
	t.Helper()
	p, err := ParsePE(raw)
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Authenticode()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// testdata/signed.efi is tiny() signed by another program:
//
//	openssl req -x509 -newkey rsa:2048 -nodes -days 36500 -subj "/CN=test db key" -keyout k.pem -out c.pem
//	sbsign --key k.pem --cert c.pem --output signed.efi tiny.efi
const signedBy = "7c3b00a39cf765392a5d0bcbd294913f71fdda6f2a537c617f5b67ac3d9addd9"

func TestSignature(t *testing.T) {
	raw, err := os.ReadFile("testdata/signed.efi")
	if err != nil {
		t.Fatal(err)
	}
	unsigned := authenticode(t, tiny())
	if got := authenticode(t, raw); got != unsigned {
		t.Fatalf("the signature changed the digest from %s to %s", unsigned, got)
	}
	p, err := ParsePE(raw)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := p.Signer(unsigned)
	if err != nil {
		t.Fatal(err)
	}
	if got := Digest(sha256.Sum256(cert.Raw)); got.String() != signedBy || cert.Subject.CommonName != "test db key" {
		t.Errorf("signed by %v %s, want %s", cert.Subject, got, signedBy)
	}
	if _, err := p.Signer(Digest{1}); err == nil {
		t.Error("the signature was accepted for another image")
	}
	// No single byte of the signed part may be changed. The certificate's
	// own signature is not ours to check, so some bytes do not count.
	counted := 0
	for at := p.certStart; at < len(raw); at++ {
		bad := bytes.Clone(raw)
		bad[at] ^= 1
		q, err := ParsePE(bad)
		if err != nil {
			counted++
			continue
		}
		c, err := q.Signer(unsigned)
		if err != nil {
			counted++
		} else if got := sha256.Sum256(c.Raw); Digest(got).String() == signedBy && at < len(raw)-8 && at > p.certStart+8 {
			// Tolerated: fields that sit outside of signature and
			// certificate, such as version numbers and the list of
			// digest algorithms.
			t.Logf("byte %d is not covered", at-p.certStart)
		}
	}
	if counted < 300 {
		t.Errorf("only %d bytes of the signature count", counted)
	}
	if q, err := ParsePE(tiny()); err != nil {
		t.Error(err)
	} else if _, err := q.Signer(unsigned); err == nil {
		t.Error("an unsigned file has a signer")
	}
}

func FuzzParsePE(f *testing.F) {
	f.Add(tiny())
	f.Add(petest.Make(petest.Section{Name: ".linux", Data: []byte("k")}, petest.Section{Name: ".osrel", Data: []byte("o")}))
	if raw, err := os.ReadFile("testdata/signed.efi"); err == nil {
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := ParsePE(raw)
		if err != nil {
			return
		}
		d, _ := p.Authenticode()
		_, _ = p.Signer(d)
		sections, err := p.UKISections()
		if err != nil {
			return
		}
		if _, err := PCR11(MeasureSections(sections)); err != nil {
			t.Errorf("sections of a UKI that was read have no PCR 11: %v", err)
		}
	})
}
