package initrd

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/firmware"
)

const (
	rootID   = "11111111-2222-8333-9444-555555555555"
	verityID = "11111111-2222-8333-9444-555555555556"
)

func sampleRoot() firmware.SlotImage {
	return firmware.SlotImage{Root: firmware.File{Size: 8 * blockSize}, RootHash: firmware.Digest{1, 2}, RootUUID: rootID, VerityUUID: verityID}
}

// What the builder writes, the initrd reads.
func TestParseRootReadsTheBuildersWords(t *testing.T) {
	s := sampleRoot()
	r, err := parseRoot("quiet " + s.RootArguments() + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if r.hash != s.RootHash.String() || r.rootUUID != rootID || r.verityUUID != verityID || r.size != 8*blockSize {
		t.Errorf("got %+v", r)
	}
	if !ForSlot(s.RootArguments()) || ForSlot("console=ttyS0 panic=10") {
		t.Error("a slot's command line is not told from another")
	}
}

func TestParseRootRefuses(t *testing.T) {
	good := sampleRoot()
	text := good.RootArguments()
	for when, bad := range map[string]string{
		"there is no hash":              strings.Replace(text, "roothash=", "x=", 1),
		"the hash is short":             strings.Replace(text, good.RootHash.String(), "abcd", 1),
		"the hash is in upper case":     strings.Replace(text, good.RootHash.String(), strings.ToUpper(strings.Repeat("ab", 32)), 1),
		"the hash is there twice":       text + " roothash=" + good.RootHash.String(),
		"a UUID is a path":              strings.Replace(text, "UUID="+rootID, "/dev/sda", 1),
		"the size is no whole block":    strings.Replace(text, "32768", "32767", 1),
		"the size is larger than slots": strings.Replace(text, "32768", "9000000000000", 1),
		"the size is negative":          strings.Replace(text, "32768", "-4096", 1),
		"it is empty":                   "",
	} {
		if r, err := parseRoot(bad); err == nil {
			t.Errorf("when %s: %+v", when, r)
		}
	}
}

func raw(id string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(id, "-", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// superblocks as mkfs.erofs and veritysetup write them.
func superblocks() (erofs, verity []byte) {
	le := binary.LittleEndian
	erofs = make([]byte, superblockBytes)
	le.PutUint32(erofs[1024:], 0xe0f5e1e2)
	copy(erofs[1024+48:], raw(rootID))
	verity = make([]byte, superblockBytes)
	copy(verity, "verity\x00\x00")
	le.PutUint32(verity[8:], 1)
	le.PutUint32(verity[12:], 1)
	copy(verity[16:], raw(verityID))
	copy(verity[32:], "sha256")
	le.PutUint32(verity[64:], blockSize)
	le.PutUint32(verity[68:], blockSize)
	le.PutUint64(verity[72:], 8)
	le.PutUint16(verity[80:], 4)
	copy(verity[88:], "salt")
	return erofs, verity
}

func TestSuperblocks(t *testing.T) {
	e, v := superblocks()
	if erofsUUID(e) != rootID || verityUUID(v) != verityID || erofsUUID(v) != "" || verityUUID(e) != "" {
		t.Errorf("erofs %q, verity %q", erofsUUID(e), verityUUID(v))
	}
	r := root{verityUUID: verityID, size: 8 * blockSize}
	if salt, err := veritySalt(v, r); err != nil || salt != hex.EncodeToString([]byte("salt")) {
		t.Errorf("salt %q, %v", salt, err)
	}
	for when, change := range map[string]func(b []byte){
		"it is another's":         func(b []byte) { b[16] ^= 1 },
		"the version is 2":        func(b []byte) { b[8] = 2 },
		"the algorithm is weaker": func(b []byte) { copy(b[32:], "md5\x00\x00\x00") },
		"blocks are small":        func(b []byte) { b[65] = 2 },
		"it is for fewer blocks":  func(b []byte) { b[72] = 7 },
		"the salt is too long":    func(b []byte) { b[81] = 2 },
		"there is no salt":        func(b []byte) { b[80] = 0 },
	} {
		b := bytes.Clone(v)
		change(b)
		if _, err := veritySalt(b, r); err == nil {
			t.Errorf("when %s, then it is taken", when)
		}
	}
}

func FuzzSuperblocks(f *testing.F) {
	e, v := superblocks()
	f.Add(e)
	f.Add(v)
	f.Add([]byte("verity"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = erofsUUID(b)
		id := verityUUID(b)
		if salt, err := veritySalt(b, root{verityUUID: id, size: 8 * blockSize}); err == nil && (id == "" || len(salt) > 128) {
			t.Errorf("salt %q of %q", salt, id)
		}
	})
}

func TestChoose(t *testing.T) {
	r := root{rootUUID: rootID, verityUUID: verityID}
	part := func(disk, label, erofs, verity string) partition {
		return partition{disk: disk, name: disk + label, label: label, erofs: erofs, verity: verity}
	}
	a := []partition{part("vda", "root-a", rootID, ""), part("vda", "root-a-verity", "", verityID)}
	b := []partition{part("vda", "root-b", rootID, ""), part("vda", "root-b-verity", "", verityID)}
	stick := []partition{part("sdb", "root-a", rootID, "")}
	for _, c := range []struct {
		when  string
		parts []partition
		want  string
	}{
		{"one slot holds it", append(b, part("vda", "root-a", "other", "")), "b"},
		{"both hold it", append(b, a...), "ab"},
		{"the hash tree is on another disk", []partition{stick[0], a[1]}, ""},
		{"root and hash tree are of different slots", []partition{a[0], b[1]}, ""},
		{"nothing is labelled", []partition{part("vda", "", rootID, ""), part("vda", "", "", verityID)}, ""},
	} {
		got := ""
		for _, c := range choose(c.parts, r) {
			got += c.slot.String()
		}
		if got != c.want {
			t.Errorf("when %s: %q, want %q", c.when, got, c.want)
		}
	}
}

// A tree of sysfs as the kernel has it.
func TestPartitions(t *testing.T) {
	top := t.TempDir()
	real, sys, dev := filepath.Join(top, "devices/pci/block/vda"), filepath.Join(top, "class"), filepath.Join(top, "dev")
	e, v := superblocks()
	for i, p := range []struct {
		name, label string
		data        []byte
	}{{"vda1", "ESP", e}, {"vda2", "root-a", e}, {"vda3", "root-a-verity", v}} {
		for _, d := range []string{filepath.Join(real, p.name), sys, dev} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for name, text := range map[string]string{"partition": "1\n", "dev": "254:" + string(rune('1'+i)) + "\n", "uevent": "DEVNAME=" + p.name + "\nPARTNAME=" + p.label + "\n"} {
			if err := os.WriteFile(filepath.Join(real, p.name, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dev, p.name), p.data, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(real, p.name), filepath.Join(sys, p.name)); err != nil {
			t.Fatal(err)
		}
	}
	var parts []partition
	for _, p := range partitions(sys, dev, map[string]*partition{}) {
		parts = append(parts, *p)
		if p.label == "ESP" && p.erofs != "" {
			t.Error("a partition that cannot be a slot was read")
		}
	}
	found := choose(parts, root{rootUUID: rootID, verityUUID: verityID})
	if len(found) != 1 || found[0].root.device != "254:2" || found[0].verity.device != "254:3" || found[0].root.disk != "vda" {
		t.Errorf("found %+v in %+v", found, parts)
	}
	salt, err := veritySalt(found[0].verity.superblock, root{verityUUID: verityID, size: 8 * blockSize})
	if err != nil {
		t.Fatal(err)
	}
	want := "1 254:2 254:3 4096 4096 8 1 sha256 ff 73616c74 1 panic_on_corruption"
	if got := verityTable(found[0], root{hash: "ff", size: 8 * blockSize}, salt, true); got != want {
		t.Errorf("table %q", got)
	}
}

// Sizes and offsets of linux/dm-ioctl.h.
func TestDeviceMapperRequests(t *testing.T) {
	target := dmTarget(64, "verity", "1 2")
	b := dmRequest("root", "CRYPT-VERITY-1", dmReadOnly, 1, target)
	le := binary.LittleEndian
	if len(target)%8 != 0 || le.Uint64(target[8:]) != 64 || string(target[24:30]) != "verity" || string(target[40:43]) != "1 2" || target[43] != 0 {
		t.Errorf("target % x", target)
	}
	if len(b) != 312+len(target) || int(le.Uint32(b[12:])) != len(b) || le.Uint32(b[16:]) != 312 || le.Uint32(b[20:]) != 1 ||
		string(b[48:53]) != "root\x00" || string(b[176:190]) != "CRYPT-VERITY-1" {
		t.Errorf("request % x", b[:64])
	}
}

func TestReadNode(t *testing.T) {
	m := firmware.Meta{Seq: 3, Node: "n-aaaaaaaaaaaaaaaaaaaaaaaa"}
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	device := filepath.Join(t.TempDir(), "meta")
	f, err := os.Create(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, m.Area()); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(firmware.SizeMeta); err != nil {
		t.Fatal(err)
	}
	if got, err := readNode(device); err != nil || got != m.Node {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := f.WriteAt([]byte("torn"), m.Area()+100); err != nil {
		t.Fatal(err)
	}
	if got, err := readNode(device); err == nil {
		t.Errorf("a torn record names %q", got)
	}
	if id := machineID("a"); len(id) != 32 || id == machineID("b") {
		t.Errorf("machine ID %q", id)
	}
}
