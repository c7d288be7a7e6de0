package firmware

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

func sampleSlot(t testing.TB) Manifest {
	m := sample(t)
	m.Name, m.Kind, m.File, m.Media = "edge", fleet.ImageSlot, "edge-1.0-amd64.efi", nil
	m.Measurements.Loader = Digest{6}
	m.Slot = &SlotImage{
		Root:     File{"edge-1.0-amd64.root", 2*ChunkSize + 4096, Digest{10}},
		Verity:   File{"edge-1.0-amd64.verity", 8192, Digest{11}},
		Loader:   File{"edge-1.0-amd64.loader.efi", 130048, Digest{12}},
		RootHash: Digest{13},
		RootUUID: "11111111-2222-8333-9444-555555555555", VerityUUID: "11111111-2222-8333-9444-555555555556",
		K3s: "v1.36.3+k3s1", K3sDigest: Digest{14}, EtcdMinor: "3.6",
		ChunkSize: ChunkSize, Chunks: []Digest{{1}, {2}, {3}},
	}
	return m
}

func TestSlotManifestRoundTrip(t *testing.T) {
	m := sampleSlot(t)
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
	if err := image.Validate(); err != nil || !bytes.Equal(image.Loader, m.Measurements.Loader[:]) {
		t.Errorf("the image is %+v, %v", image, err)
	}
	if files := got.Files(); len(files) != 4 || files[0].SHA256 != m.SHA256 || files[1] != m.Slot.Root {
		t.Errorf("files %+v", files)
	}
	if off, n := got.Slot.ChunkRange(2); off != 2*ChunkSize || n != 4096 {
		t.Errorf("the last chunk is %d+%d", off, n)
	}
}

// What is written today must be read by every later version.
func TestSlotManifestGolden(t *testing.T) {
	payload, err := sampleSlot(t).JSON()
	if err != nil {
		t.Fatal(err)
	}
	const want = "dc9d271168887ad0"
	if got := fmt.Sprintf("%x", sha256.Sum256(payload)); !strings.HasPrefix(got, want) {
		t.Errorf("the bytes of a manifest changed (digest %s, want %s...):\n%s", got, want, payload)
	}
}

// The largest image that fits a slot has a manifest that fits an envelope.
func TestLargestSlotManifestFits(t *testing.T) {
	m := sampleSlot(t)
	m.Slot.Root.Size = SizeRoot
	m.Slot.Verity.Size = SizeVerity
	m.Slot.Chunks = make([]Digest, maxChunks)
	for i := range m.Slot.Chunks {
		_, _ = rand.Read(m.Slot.Chunks[i][:])
	}
	for i := range 300 {
		m.Inputs = append(m.Inputs, Input{Name: fmt.Sprintf("libsomething-with-a-long-name-%d", i), Version: "1:2.3.4-5+deb12u6~bpo12+1", SHA256: Digest{1, byte(i)}})
	}
	payload, err := m.JSON()
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	envelope, err := statement.Sign(ManifestType, payload, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("payload %d of %d bytes, envelope %d of %d", len(payload), maxPayload, len(envelope.JSON()), fleet.MaxManifest)
	if _, err := OpenManifest(envelope.JSON(), keysOf(key)); err != nil {
		t.Error(err)
	}
}

func TestSlotManifestRefuses(t *testing.T) {
	for when, change := range map[string]func(*Manifest){
		"the slot's files are missing":       func(m *Manifest) { m.Slot = nil },
		"recovery has files of a slot":       func(m *Manifest) { m.Kind = fleet.ImageRecovery },
		"the loader has no measurement":      func(m *Manifest) { m.Measurements.Loader = Digest{} },
		"root leaves the folder":             func(m *Manifest) { m.Slot.Root.File = "../x" },
		"root is the UKI":                    func(m *Manifest) { m.Slot.Root.File = m.File },
		"verity is root":                     func(m *Manifest) { m.Slot.Verity.File = m.Slot.Root.File },
		"root is too large for a slot":       func(m *Manifest) { m.Slot.Root.Size = SizeRoot + 4096 },
		"verity is too large":                func(m *Manifest) { m.Slot.Verity.Size = SizeVerity + 4096 },
		"the loader is too large":            func(m *Manifest) { m.Slot.Loader.Size = maxLoader + 1 },
		"the loader is empty":                func(m *Manifest) { m.Slot.Loader.Size = 0 },
		"root is no whole number of blocks":  func(m *Manifest) { m.Slot.Root.Size-- },
		"root has no digest":                 func(m *Manifest) { m.Slot.Root.SHA256 = Digest{} },
		"there is no root hash":              func(m *Manifest) { m.Slot.RootHash = Digest{} },
		"a UUID is none":                     func(m *Manifest) { m.Slot.RootUUID = "x y" },
		"a UUID is in upper case":            func(m *Manifest) { m.Slot.RootUUID = strings.ToUpper("aaaaaaaa-2222-8333-9444-555555555555") },
		"both UUIDs are one":                 func(m *Manifest) { m.Slot.VerityUUID = m.Slot.RootUUID },
		"k3s has no digest":                  func(m *Manifest) { m.Slot.K3sDigest = Digest{} },
		"k3s has no etcd":                    func(m *Manifest) { m.Slot.EtcdMinor = "" },
		"the version of k3s is a sentence":   func(m *Manifest) { m.Slot.K3s = "v1.2.3; rm" },
		"the minor of etcd is a patch level": func(m *Manifest) { m.Slot.EtcdMinor = "3.6.1" },
		"chunks have another size":           func(m *Manifest) { m.Slot.ChunkSize = 1 },
		"a chunk is missing":                 func(m *Manifest) { m.Slot.Chunks = m.Slot.Chunks[:2] },
		"there is a chunk too many":          func(m *Manifest) { m.Slot.Chunks = append(m.Slot.Chunks, Digest{4}) },
		"a chunk is zero":                    func(m *Manifest) { m.Slot.Chunks[1] = Digest{} },
	} {
		m := sampleSlot(t)
		change(&m)
		if _, err := m.JSON(); err == nil {
			t.Errorf("when %s, then it is written", when)
		}
	}
	bare := sampleSlot(t)
	bare.Slot.K3s, bare.Slot.K3sDigest, bare.Slot.EtcdMinor = "", Digest{}, ""
	if _, err := bare.JSON(); err != nil {
		t.Errorf("a system without k3s: %v", err)
	}
}

func TestChunks(t *testing.T) {
	data := bytes.Repeat([]byte("muster"), ChunkSize/5)
	got, err := Chunks(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	want := []Digest{sha256.Sum256(data[:ChunkSize]), sha256.Sum256(data[ChunkSize:])}
	if !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	if got, err := Chunks(bytes.NewReader(data[:ChunkSize])); err != nil || len(got) != 1 {
		t.Errorf("one whole chunk: %v, %v", got, err)
	}
}

func TestEntryTakesNoCounterFromVersion(t *testing.T) {
	m := sampleSlot(t)
	m.Version = "1.0+3"
	if got := m.Entry(); got != "edge-1.0_3.efi" {
		t.Errorf("got %s", got)
	}
}
