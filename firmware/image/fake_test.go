package image

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/petest"
	"github.com/muster-edge/muster/fleet"
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
