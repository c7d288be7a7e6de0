package metal

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/petest"
	"github.com/muster-edge/muster/fleet"
)

func bootFile(t *testing.T, dir, name, release string) []byte {
	t.Helper()
	b := petest.Make(petest.Section{Name: ".linux", Data: []byte("kernel")}, petest.Section{Name: ".osrel", Data: []byte(release)})
	full := filepath.Join(dir, filepath.FromSlash(bootmodel.Entries), name)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(full, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return b
}

// What the loader would start is known from the files themselves: the newer
// version, unless its tries are spent; recovery behind both.
func TestTheViewKnowsWhatComesNext(t *testing.T) {
	dir := t.TempDir()
	e := &ESP{Dir: dir}
	next := func(want string) {
		t.Helper()
		v, err := e.Look()
		if err != nil || v.Next != want || !v.Writable || v.Free == 0 {
			t.Fatalf("%v %+v, want %s", err, v, want)
		}
	}
	bootFile(t, dir, "recovery-1.efi", "ID=zz-muster-recovery\nVERSION_ID=\"1\"\nPRETTY_NAME=\"r\"\n")
	next("recovery-1.efi")
	bootFile(t, dir, "edge-1.9.efi", "ID=edge\nVERSION_ID=\"1.9\"\nPRETTY_NAME=\"e\"\n")
	next("edge-1.9.efi")
	bootFile(t, dir, "edge-1.10+3.efi", "ID=edge\nVERSION_ID=\"1.10\"\nPRETTY_NAME=\"e\"\n")
	bootFile(t, dir, ".new-edge-1.11.efi", "ID=edge\nVERSION_ID=\"1.11\"\nPRETTY_NAME=\"e\"\n")
	next("edge-1.10.efi")
	if err := e.Rename("edge-1.10+3.efi", "edge-1.10+0-3.efi"); err != nil {
		t.Fatal(err)
	}
	next("edge-1.9.efi")
	if err := os.WriteFile(filepath.Join(dir, "EFI/Linux/edge-1.9.efi"), []byte("garbage"), 0o644); err != nil {
		t.Fatal(err)
	}
	next("recovery-1.efi")
}

func TestRecordOnAFile(t *testing.T) {
	r := Record{Device: filepath.Join(t.TempDir(), "meta")}
	if err := os.WriteFile(r.Device, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(); !errors.Is(err, firmware.ErrMetaBlank) {
		t.Fatal(err)
	}
	// A blank one is nothing to go on from: recovery writes the first.
	if err := r.Write(firmware.Meta{}); !errors.Is(err, firmware.ErrMetaBlank) {
		t.Fatal(err)
	}
	d, err := disk.Open(r.Device)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := disk.WriteMeta(d, firmware.Meta{Starts: 1}, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for i := 2; i < 5; i++ {
		if err := r.Write(firmware.Meta{Starts: i}); err != nil {
			t.Fatal(err)
		}
		if m, err := r.Read(); err != nil || m.Starts != i {
			t.Fatalf("%v %+v", err, m)
		}
	}
}

// shop is a source that has files.
type shop struct {
	name  string
	files map[fetch.Digest][]byte
}

func (s shop) Name() string { return s.name }

func (s shop) Open(_ context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	b, ok := s.files[d]
	if !ok {
		return nil, fetch.ErrMissing
	}
	return io.NopCloser(bytes.NewReader(b[off:min(off+n, int64(len(b)))])), nil
}

// A stack version or a manifest that no release key signed is not believed,
// whoever sends it.
func TestUnsignedIsNotBelieved(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	envelope := []byte(`{"payloadType":"x","payload":"e30=","signatures":[]}`)
	m := &Images{Dir: t.TempDir(), ReleaseKeys: []crypto.PublicKey{key.Public()}, Arch: "amd64",
		Fetcher: func() *fetch.Fetcher {
			return &fetch.Fetcher{Sources: func() []fetch.Source {
				return []fetch.Source{shop{"centre", map[fetch.Digest][]byte{sha256.Sum256(envelope): envelope}}}
			}}
		},
		Manifest: func(context.Context, firmware.Digest) ([]byte, error) { return envelope, nil }}
	sum := sha256.Sum256(envelope)
	if _, err := m.Stack(t.Context(), fleet.StackRef{Name: "shop", Version: "1", SHA256: sum[:]}, "acme"); err == nil {
		t.Error("an unsigned stack version is believed")
	}
	if _, err := m.Stack(t.Context(), fleet.StackRef{Name: "shop", Version: "1", SHA256: make([]byte, 32)}, "acme"); err == nil || !strings.Contains(err.Error(), "nobody has") {
		t.Error(err)
	}
	if _, err := m.Target(t.Context(), fleet.ImageRef{SHA256: sum[:]}); err == nil {
		t.Error("an unsigned manifest is believed")
	}
	if all, err := os.ReadDir(m.Dir); err != nil || len(all) != 0 {
		t.Errorf("%v %v: something of it was kept", err, all)
	}
}

func FuzzRelease(f *testing.F) {
	f.Add("ID=edge\nVERSION_ID=\"1\"\nPRETTY_NAME='x'\n\x00")
	f.Fuzz(func(t *testing.T, s string) { _ = parseRelease(s) })
}

func FuzzStack(f *testing.F) {
	f.Add([]byte(`{"format":"muster/stack-version/v1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, err := parseStack(b); err == nil && v.Validate() != nil {
			t.Fatal(v)
		}
	})
}
