package firmware

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

func sample(t testing.TB) Manifest {
	t.Helper()
	sections := MeasureSections(map[string][]byte{SectionLinux: []byte("k"), SectionInitrd: []byte("i")})
	pcr, err := PCR11(sections)
	if err != nil {
		t.Fatal(err)
	}
	return Manifest{
		Format: ManifestFormat, Name: "recovery", Version: "1.0", Kind: fleet.ImageRecovery, Arch: "amd64",
		File: "recovery.efi", SHA256: Digest{1}, Size: 10,
		Parts:        []Part{{Name: "kernel", Size: 5, Packed: 4}},
		Media:        []Medium{{Format: "disk", File: "recovery.img", SHA256: Digest{7}, Size: 9}, {Format: "iso", File: "recovery.iso", SHA256: Digest{8}, Size: 9}},
		Inputs:       []Input{{Name: "linux", Version: "6.1", SHA256: Digest{2}}},
		Measurements: Measurements{Authenticode: Digest{3}, Kernel: Digest{4}, PCR11: pcr, Sections: sections},
		SecureBoot:   SecureBoot{SignerCertSHA256: Digest{5}},
		Created:      time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

func TestManifestRoundTrip(t *testing.T) {
	m := sample(t)
	payload, err := m.JSON()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseManifest(payload)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m, got); diff != "" {
		t.Error(diff)
	}
	image := got.Image()
	image.Tenant = "default"
	if err := image.Validate(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(image.Authenticode, m.Measurements.Authenticode[:]) || !bytes.Equal(image.Kernel, m.Measurements.Kernel[:]) ||
		!bytes.Equal(image.PCR11, m.Measurements.PCR11[:]) || !bytes.Equal(image.SignerCert, m.SecureBoot.SignerCertSHA256[:]) {
		t.Errorf("the image lost measurements: %+v", image)
	}
	m.SecureBoot = SecureBoot{}
	if got := m.Image().SignerCert; len(got) != 0 {
		t.Errorf("an unsigned image has the signer %s", got)
	}
}

func TestManifestRefuses(t *testing.T) {
	for when, change := range map[string]func(*Manifest){
		"the format is another":         func(m *Manifest) { m.Format = "muster/image/v2" },
		"the name is no label":          func(m *Manifest) { m.Name = "../x" },
		"the version is empty":          func(m *Manifest) { m.Version = "" },
		"the kind is unknown":           func(m *Manifest) { m.Kind = "disk" },
		"the architecture is unknown":   func(m *Manifest) { m.Arch = "riscv64" },
		"the file leaves the folder":    func(m *Manifest) { m.File = "../../etc/passwd" },
		"the file is a folder":          func(m *Manifest) { m.File = ".." },
		"there is no digest":            func(m *Manifest) { m.SHA256 = Digest{} },
		"the size is negative":          func(m *Manifest) { m.Size = -1 },
		"a part has no name":            func(m *Manifest) { m.Parts[0].Name = "" },
		"an input has no digest":        func(m *Manifest) { m.Inputs[0].SHA256 = Digest{} },
		"PCR 11 is not of the sections": func(m *Manifest) { m.Measurements.PCR11[0] ^= 1 },
		"there are no sections":         func(m *Manifest) { m.Measurements.Sections = nil },
		"a section is there twice": func(m *Manifest) {
			m.Measurements.Sections = append(m.Measurements.Sections, m.Measurements.Sections[0])
		},
		"there is no Authenticode digest": func(m *Manifest) { m.Measurements.Authenticode = Digest{} },
		"there is no kernel digest":       func(m *Manifest) { m.Measurements.Kernel = Digest{} },
		"there is no date":                func(m *Manifest) { m.Created = time.Time{} },
		"a medium is of another kind":     func(m *Manifest) { m.Media[0].Format = "uki" },
		"a medium is elsewhere":           func(m *Manifest) { m.Media[0].File = "../x" },
		"a medium is the image":           func(m *Manifest) { m.Media[0].File = m.File },
		"two media are one file":          func(m *Manifest) { m.Media[1].File = m.Media[0].File },
		"a medium has no digest":          func(m *Manifest) { m.Media[0].SHA256 = Digest{} },
		"a medium is empty":               func(m *Manifest) { m.Media[1].Size = 0 },
		"there are too many media":        func(m *Manifest) { m.Media = make([]Medium, maxMedia+1) },
		"there are too many parts":        func(m *Manifest) { m.Parts = make([]Part, maxParts+1) },
	} {
		m := sample(t)
		change(&m)
		if _, err := m.JSON(); err == nil {
			t.Errorf("when %s, then it is written", when)
		}
	}
	payload, err := sample(t).JSON()
	if err != nil {
		t.Fatal(err)
	}
	for when, text := range map[string]string{
		"a field is unknown":    strings.Replace(string(payload), `"name"`, `"nome": "x", "name"`, 1),
		"there is data after":   string(payload) + "{}",
		"it is cut":             string(payload[:len(payload)-10]),
		"it is larger than max": string(payload) + strings.Repeat(" ", maxPayload),
		"the date has no zone":  strings.Replace(string(payload), "05Z", "05", 1),
	} {
		if _, err := ParseManifest([]byte(text)); err == nil {
			t.Errorf("when %s, then it is read", when)
		}
	}
}

func TestOpenManifest(t *testing.T) {
	key, other := newKey(t), newKey(t)
	payload, err := sample(t).JSON()
	if err != nil {
		t.Fatal(err)
	}
	envelope, err := statement.Sign(ManifestType, payload, key)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := OpenManifest(envelope.JSON(), []crypto.PublicKey{key.Public()}); err != nil || m.Version != "1.0" {
		t.Errorf("got %q, %v", m.Version, err)
	}
	if _, err := OpenManifest(envelope.JSON(), []crypto.PublicKey{other.Public()}); !errors.Is(err, statement.ErrUntrusted) {
		t.Errorf("another key: %v", err)
	}
	foreign, err := statement.Sign("application/vnd.muster.order.v1+json", payload, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenManifest(foreign.JSON(), []crypto.PublicKey{key.Public()}); err == nil {
		t.Error("a document of another type was taken for a manifest")
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keysOf(key *ecdsa.PrivateKey) []crypto.PublicKey { return []crypto.PublicKey{key.Public()} }

func FuzzParseManifest(f *testing.F) {
	payload, err := sample(f).JSON()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload)
	f.Add([]byte(`{}`))
	slot, err := sampleSlot(f).JSON()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(slot)
	f.Fuzz(func(t *testing.T, payload []byte) {
		m, err := ParseManifest(payload)
		if err != nil {
			return
		}
		// What was read can be written, and means the same.
		again, err := m.JSON()
		if err != nil {
			t.Fatalf("read but not written: %v", err)
		}
		if len(again) > maxPayload {
			return
		}
		n, err := ParseManifest(again)
		if err != nil {
			t.Fatalf("written but not read: %v", err)
		}
		if m.Measurements.PCR11 != n.Measurements.PCR11 || m.Name != n.Name || !m.Created.Equal(n.Created) {
			t.Fatalf("%+v became %+v", m, n)
		}
	})
}
