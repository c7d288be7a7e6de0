package image

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/petest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// fakeStub is a PE file that could be a stub.
func fakeStub() []byte {
	return petest.Make(petest.Section{Name: ".text", Data: []byte("#### LoaderInfo: systemd-stub 252.1 ####")},
		petest.Section{Name: ".sdmagic", Data: []byte("magic")})
}

func fakeInputs() inputs {
	return inputs{
		stub: fakeStub(),
		kernel: kernel{
			release: "6.1.0-1-amd64",
			image:   petest.Make(petest.Section{Name: ".text", Data: []byte("kernel")}),
			modules: []file{{path: "/lib/modules/6.1.0-1-amd64/kernel/a.ko", data: []byte("a")}},
			sizes:   map[string]int64{"drivers/net": 1, "fs": 2},
			paths:   []string{"kernel/a.ko"},
		},
		node:   []byte("\x7fELF node"),
		list:   []firmware.Input{{Name: "x", Version: "1", SHA256: firmware.Digest{1}}},
		newest: time.Date(2026, 3, 4, 5, 6, 7, 8, time.FixedZone("", 3600)),
	}
}

func fakeConfig(t *testing.T) RecoveryConfig {
	t.Helper()
	cfg, err := RecoveryConfig{OutDir: t.TempDir(), Version: "1.0", NodeBinary: "x", CacheDir: "x"}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// elfModule makes a relocatable ELF file with one section, .modinfo.
func elfModule(info ...string) []byte {
	le := binary.LittleEndian
	data := []byte(strings.Join(info, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	out := make([]byte, 64)
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], 1)  // ET_REL
	le.PutUint16(out[18:], 62) // x86-64
	le.PutUint32(out[20:], 1)
	dataAt := len(out)
	out = append(out, data...)
	namesAt := len(out)
	out = append(out, names...)
	table := len(out)
	le.PutUint64(out[40:], uint64(table))
	le.PutUint16(out[52:], 64)
	le.PutUint16(out[58:], 64)
	le.PutUint16(out[60:], 3)
	le.PutUint16(out[62:], 2)
	header := func(name, kind uint32, at, size int) {
		h := make([]byte, 64)
		le.PutUint32(h, name)
		le.PutUint32(h[4:], kind)
		le.PutUint64(h[24:], uint64(at))
		le.PutUint64(h[32:], uint64(size))
		le.PutUint64(h[48:], 1)
		out = append(out, h...)
	}
	header(0, 0, 0, 0)
	header(1, 1, dataAt, len(data))
	header(10, 3, namesAt, len(names))
	return out
}

func TestComposeDependsOnInputsAlone(t *testing.T) {
	one, err := compose(fakeConfig(t), fakeInputs())
	if err != nil {
		t.Fatal(err)
	}
	two, err := compose(fakeConfig(t), fakeInputs())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.efi, two.efi) {
		t.Error("the same inputs gave other bytes")
	}
	if want := "2026-03-04T04:06:07Z"; one.timeFloor.Format(time.RFC3339) != want {
		t.Errorf("time floor is %s, want the newest input's date %s", one.timeFloor, want)
	}
	for when, change := range map[string]func(*RecoveryConfig, *inputs){
		"the node binary":  func(_ *RecoveryConfig, in *inputs) { in.node = []byte("\x7fELF mode") },
		"a module":         func(_ *RecoveryConfig, in *inputs) { in.kernel.modules[0].data = []byte("b") },
		"the date":         func(_ *RecoveryConfig, in *inputs) { in.newest = in.newest.Add(time.Second) },
		"the time floor":   func(c *RecoveryConfig, _ *inputs) { c.TimeFloor = time.Unix(1, 0) },
		"the centre":       func(c *RecoveryConfig, _ *inputs) { c.Site.Centre = []string{"https://a"} },
		"the site version": func(c *RecoveryConfig, _ *inputs) { c.Site.Version = "2" },
		"the network":      func(c *RecoveryConfig, _ *inputs) { c.Site.Network = fleet.NetworkConfig{VLAN: 3} },
	} {
		cfg, in := fakeConfig(t), fakeInputs()
		change(&cfg, &in)
		other, err := compose(cfg, in)
		if err != nil {
			t.Fatal(err)
		}
		if other.measured.PCR11 == one.measured.PCR11 || other.measured.Authenticode == one.measured.Authenticode {
			t.Errorf("when %s changes, then the measurements must", when)
		}
	}
	in := fakeInputs()
	in.newest = time.Time{}
	if _, err := compose(fakeConfig(t), in); err == nil {
		t.Error("an image without any date was made: its time floor would be the year 1")
	}
}

// initrdFile reads one file back out of a finished image.
func initrdFile(t *testing.T, efi []byte, name string) []byte {
	t.Helper()
	pe, err := firmware.ParsePE(efi)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := pe.Section(firmware.SectionInitrd)
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	archive := cpio.NewReader(z)
	for {
		h, err := archive.Next()
		if err != nil {
			t.Fatalf("no %s in the initrd: %v", name, err)
		}
		if h.Name == name {
			data, err := io.ReadAll(archive)
			if err != nil {
				t.Fatal(err)
			}
			return data
		}
	}
}

// write puts the media into folder and manifest, and takes away those of an
// earlier build.
func TestWriteMedia(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cfg := fakeConfig(t)
	cfg.Formats, cfg.Release = []string{FormatUKI, FormatISO, FormatDisk}, key
	build := func() Result {
		t.Helper()
		m, err := compose(cfg, fakeInputs())
		if err != nil {
			t.Fatal(err)
		}
		r, err := write(cfg, Lock{Format: LockFormat}, fakeInputs(), m)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	failed := func() (names []string) {
		t.Helper()
		checks, err := Verify(cfg.OutDir, []crypto.PublicKey{key.Public()})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range checks {
			if !c.OK && strings.HasPrefix(c.Name, "medium") {
				names = append(names, c.Name)
			}
		}
		return names
	}
	r := build()
	if len(r.Manifest.Media) != 2 {
		t.Fatalf("%+v", r.Manifest.Media)
	}
	for _, d := range r.Manifest.Media {
		path := filepath.Join(cfg.OutDir, d.File)
		b, err := os.ReadFile(path)
		if err != nil || firmware.Digest(sha256.Sum256(b)) != d.SHA256 || int64(len(b)) != d.Size || d.File != mediaFiles[d.Format] {
			t.Errorf("%+v: %d bytes, %v", d, len(b), err)
		}
		if bad := failed(); bad != nil {
			t.Errorf("good media fail %v", bad)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if bad := failed(); len(bad) != 1 || bad[0] != "medium "+d.Format {
			t.Errorf("a changed %s fails %v", d.File, bad)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if bad := failed(); bad != nil {
			t.Errorf("media that were not copied fail %v", bad)
		}
	}
	// A manifest may be signed over a medium that holds something else.
	m, err := compose(cfg, fakeInputs())
	if err != nil {
		t.Fatal(err)
	}
	other, err := makeMedium(FormatISO, noise(len(m.efi)), mediaDate)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.OutDir, ISOFile), other, 0o644); err != nil {
		t.Fatal(err)
	}
	r.Manifest.Media = []firmware.Medium{{Format: FormatISO, File: ISOFile, SHA256: sha256.Sum256(other), Size: int64(len(other))}}
	payload, err := r.Manifest.JSON()
	if err != nil {
		t.Fatal(err)
	}
	envelope, err := statement.Sign(firmware.ManifestType, payload, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.OutDir, ManifestFile), envelope.JSON(), 0o644); err != nil {
		t.Fatal(err)
	}
	if bad := failed(); len(bad) != 1 || bad[0] != "medium iso: image" {
		t.Errorf("a medium of another image fails %v", bad)
	}

	build()
	cfg.Formats = nil
	if r := build(); r.Manifest.Media != nil {
		t.Errorf("%+v", r.Manifest.Media)
	}
	for _, name := range mediaFiles {
		if _, err := os.Stat(filepath.Join(cfg.OutDir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s of an earlier build is still there (%v)", name, err)
		}
	}
}
