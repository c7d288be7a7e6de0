package disk

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/muster-edge/muster/firmware"
)

// file makes a sparse disk with something old at places where signatures are.
func file(t *testing.T, size, sector int64) *Disk {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1 << 20, 1<<20 + 82, size - 512, size - 66000} {
		if _, err := f.WriteAt([]byte("an old signature"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	d, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	d.SetSector(sector)
	t.Cleanup(func() { d.Close() })
	return d
}

func layout(t *testing.T, d Device) []firmware.Partition {
	t.Helper()
	parts, err := firmware.Layout(d.Size(), d.Sector())
	if err != nil {
		t.Fatal(err)
	}
	return parts
}

func TestTable(t *testing.T) {
	for _, sector := range []int64{512, 4096} {
		d := file(t, firmware.MinDisk+5<<20, sector)
		if _, err := ReadTable(d); err == nil {
			t.Error("an empty disk has a table")
		}
		made, err := WriteTable(d, layout(t, d))
		if err != nil {
			t.Fatal(err)
		}
		again, err := ReadTable(d)
		if err != nil || !slices.Equal(made, again) {
			t.Fatalf("%v\n%v\n%v", err, made, again)
		}
		esp, err := Part(d, again, firmware.LabelESP)
		if err != nil || esp.Size() != firmware.SizeESP {
			t.Fatalf("%+v %v", esp, err)
		}
		old := make([]byte, 4096)
		for _, at := range []int64{1 << 20, d.Size() - 66000} {
			if _, err := d.ReadAt(old, at); err != nil || bytes.Contains(old, []byte("old signature")) {
				t.Errorf("%d: a signature is left (%v)", at, err)
			}
		}
		if err := FormatESP(esp); err != nil {
			t.Fatal(err)
		}
		fsck(t, d, esp)
		if sector == 512 {
			sgdisk(t, d.Path())
		}
		if ref := made[0].Ref(sector); ref.Start != uint64(firmware.PartitionAlign/sector) || ref.Number != 1 {
			t.Errorf("%+v", ref)
		}
		// A damaged first copy is no loss.
		if _, err := d.WriteAt([]byte("garbage"), sector+16); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadTable(d); err != nil || !slices.Equal(got, made) {
			t.Errorf("by the second copy: %v %v", got, err)
		}
		if err := Wipe(d); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadTable(d); err == nil {
			t.Errorf("after the wipe: %v", got)
		}
	}
}

func fsck(t *testing.T, d *Disk, esp Section) {
	t.Helper()
	if _, err := exec.LookPath("fsck.fat"); err != nil {
		t.Log("fsck.fat is not installed: the FAT is checked by the library alone")
		return
	}
	b := make([]byte, fatHead)
	if _, err := esp.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "esp")
	if err := errors.Join(os.WriteFile(name, b, 0o600), os.Truncate(name, esp.Size())); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "fsck.fat", "-n", name).CombinedOutput(); err != nil {
		t.Errorf("sectors of %d: %v\n%s", d.Sector(), err, out)
	}
}

func sgdisk(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath("sgdisk"); err != nil {
		t.Log("sgdisk is not installed: the table is checked by the library alone")
		return
	}
	if out, err := exec.CommandContext(t.Context(), "sgdisk", "-v", name).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("No problems found")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// recorder notes every write, and can fail.
type recorder struct {
	Device
	writes [][2]int64
	fail   int
	flip   bool
}

func (r *recorder) WriteAt(b []byte, off int64) (int, error) {
	r.writes = append(r.writes, [2]int64{off, int64(len(b))})
	if r.fail > 0 && len(r.writes) >= r.fail {
		return 0, errors.New("input/output error")
	}
	if r.flip {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 1
	}
	return r.Device.WriteAt(b, off)
}

// At every write at which the power may fail there is either no table or the
// whole new one: never the old table over wiped partitions.
func TestTableCutAtEveryWrite(t *testing.T) {
	d := file(t, firmware.MinDisk, 512)
	old := []firmware.Partition{{Number: 1, Label: "somebody's", Type: firmware.TypeLinuxData, Start: 1 << 20, Size: 1 << 30}}
	all := &recorder{Device: d}
	if _, err := WriteTable(all, layout(t, d)); err != nil {
		t.Fatal(err)
	}
	seen := map[int]int{}
	for cut := 2; cut <= len(all.writes); cut++ {
		if _, err := WriteTable(d, old); err != nil {
			t.Fatal(err)
		}
		if _, err := WriteTable(&recorder{Device: d, fail: cut}, layout(t, d)); err == nil {
			t.Fatal("the cut was not noticed")
		}
		got, err := ReadTable(d)
		seen[len(got)]++
		if err == nil && len(got) != 7 && cut > 2 {
			t.Fatalf("cut at %d: %d partitions", cut, len(got))
		}
		if _, err := WriteTable(d, layout(t, d)); err != nil {
			t.Fatalf("cut at %d: again: %v", cut, err)
		}
	}
	if seen[0] == 0 || seen[7] == 0 {
		t.Errorf("cuts that showed nothing: %v", seen)
	}
}

func TestHostileTable(t *testing.T) {
	d := file(t, firmware.MinDisk, 512)
	made, err := WriteTable(d, layout(t, d))
	if err != nil {
		t.Fatal(err)
	}
	// Whatever a flipped bit does, what is read is the table or an error.
	b := make([]byte, 34*512)
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	for i := 512; i < 1500; i += 3 {
		c := bytes.Clone(b)
		c[i] ^= 0x40
		if _, err := d.WriteAt(c, 0); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadTable(d); err == nil && !slices.Equal(got, made) {
			t.Fatalf("byte %d: %v", i, got)
		}
	}
}

func TestWriteChunk(t *testing.T) {
	d := file(t, 8<<20, 512)
	b := bytes.Repeat([]byte("muster"), 1000)
	if err := WriteChunk(d, 4096, b); err != nil {
		t.Fatal(err)
	}
	part, err := Sub(d, 4096, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if sum, err := Digest(part, int64(len(b))); err != nil || sum != sha256.Sum256(b) {
		t.Fatalf("%v %v", sum, err)
	}
	if err := WriteChunk(&recorder{Device: d, flip: true}, 0, b); !errors.Is(err, ErrBroken) {
		t.Errorf("flipped bits: %v", err)
	}
	for _, off := range []int64{-1, 1, 1 << 40} {
		if err := WriteChunk(part, off, b); err == nil {
			t.Errorf("%d: outside was written", off)
		}
	}
	if _, err := Sub(d, 1<<20, 8<<20); err == nil {
		t.Error("a part that ends outside")
	}
	if err := WriteChunk(d, 8<<20-1, b); err == nil {
		t.Error("outside was written")
	}
}

func TestMeta(t *testing.T) {
	d := file(t, firmware.SizeMeta, 512)
	if err := zero(d, 0, 3<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadMeta(d); !errors.Is(err, firmware.ErrMetaBlank) {
		t.Fatal(err)
	}
	var m firmware.Meta
	var err error
	for i := range 5 {
		m.Starts = i
		if m, err = WriteMeta(d, m, m.Seq); err != nil {
			t.Fatal(err)
		}
		got, err := ReadMeta(d)
		if err != nil || got.Seq != uint64(i+1) || got.Starts != i {
			t.Fatalf("%+v %v", got, err)
		}
	}
	// The power fails in a write: the record before it is the truth.
	next := m
	next.Starts = 99
	if _, err := WriteMeta(&recorder{Device: d, fail: 1}, next, m.Seq); err == nil {
		t.Fatal("not noticed")
	}
	if got, err := ReadMeta(d); err != nil || got.Starts != 4 {
		t.Fatalf("%+v %v", got, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, name := range []string{"/dev/null", t.TempDir(), filepath.Join(t.TempDir(), "nothing")} {
		if d, err := Open(name); err == nil {
			d.Close()
			t.Errorf("%s was opened", name)
		}
	}
}

// fake makes a sysfs with one disk, dm-verity on slot and the root on it.
func fake(t *testing.T, slaves ...string) string {
	t.Helper()
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		full := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.WriteFile(full, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	link := func(from, to string) {
		t.Helper()
		full := filepath.Join(root, from)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.Symlink(to, full)); err != nil {
			t.Fatal(err)
		}
	}
	write("proc/self/mountinfo", "1 0 0:2 / / rw - rootfs rootfs rw\n22 1 253:0 / / ro,relatime - erofs /dev/mapper/root ro\n23 22 0:5 / /dev rw - devtmpfs d rw\n")
	link("sys/dev/block/253:0", "../../devices/virtual/block/dm-0")
	link("sys/class/block/dm-0", "../../devices/virtual/block/dm-0")
	for _, disk := range []string{"vda", "vdb"} {
		write("sys/devices/pci/block/"+disk+"/uevent", "DEVTYPE=disk\n")
		link("sys/class/block/"+disk, "../../devices/pci/block/"+disk)
		for i, label := range []string{"ESP", "root-a", "root-a-verity", "root-b", "root-b-verity", "meta", "data"} {
			part := fmt.Sprintf("%s%d", disk, i+1)
			write("sys/devices/pci/block/"+disk+"/"+part+"/partition", fmt.Sprint(i+1))
			write("sys/devices/pci/block/"+disk+"/"+part+"/uevent", fmt.Sprintf("DEVNAME=%s\nPARTN=%d\nPARTNAME=%s\n", part, i+1, label))
			link("sys/class/block/"+part, "../../devices/pci/block/"+disk+"/"+part)
		}
	}
	for _, s := range slaves {
		link("sys/devices/virtual/block/dm-0/slaves/"+s, "../../../../pci/block/"+s[:3]+"/"+s)
	}
	return root
}

func TestRunning(t *testing.T) {
	s, err := Running(fake(t, "vda4", "vda5"))
	if err != nil || s.Slot != firmware.SlotB || s.Disk != "/dev/vda" || len(s.Parts) != 7 || s.Parts["meta"] != "/dev/vda6" {
		t.Fatalf("%+v %v", s, err)
	}
	if s, err := Running(fake(t, "vdb3", "vdb2")); err != nil || s.Slot != firmware.SlotA || s.Disk != "/dev/vdb" {
		t.Fatalf("%+v %v", s, err)
	}
	for name, slaves := range map[string][]string{
		"nothing below":  {},
		"one below":      {"vda2"},
		"mixed slots":    {"vda2", "vda5"},
		"mixed disks":    {"vda2", "vdb3"},
		"not partitions": {"vda2", "vda"},
		"no slot":        {"vda1", "vda7"},
	} {
		if s, err := Running(fake(t, slaves...)); !errors.Is(err, ErrNoSlot) {
			t.Errorf("%s: %+v %v", name, s, err)
		}
	}
	if _, err := Running(t.TempDir()); err == nil {
		t.Error("nothing at all")
	}
}

// With real block devices: the kernel sees the new table, a mounted or busy
// disk is refused, and of a second disk no byte changes.
func TestLoopDevices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("loop devices need root")
	}
	for _, sector := range []string{"512", "4096"} {
		var dev [2]string
		for i := range dev {
			f := filepath.Join(t.TempDir(), "disk")
			if err := errors.Join(os.WriteFile(f, bytes.Repeat([]byte("mine"), 1<<18), 0o600), os.Truncate(f, firmware.MinDisk)); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), "losetup", "-P", "-b", sector, "-f", "--show", f).Output()
			if err != nil {
				t.Skipf("no loop devices here: %v", err)
			}
			dev[i] = strings.TrimSpace(string(out))
			t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev[i]).Run() })
		}
		d, err := Open(dev[0])
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(d.Sector()) != sector || d.KernelName() != filepath.Base(dev[0]) {
			t.Fatalf("%d %s", d.Sector(), d.KernelName())
		}
		if _, err := Open(dev[0]); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("opened twice: %v", err)
		}
		if _, err := WriteTable(d, layout(t, d)); err != nil {
			t.Fatal(err)
		}
		if err := d.Announce(); err != nil {
			t.Fatal(err)
		}
		parts, err := Parts("/", d.KernelName())
		if err == nil && len(parts) == 0 && !gptKernel() {
			// The rest is about partitions as the kernel sees them.
			t.Log("this kernel reads no GPT (CONFIG_EFI_PARTITION): partitions are tested in virtual machines alone")
			if err := WriteChunk(d, 5<<30, bytes.Repeat([]byte{7}, firmware.ChunkSize)); err != nil {
				t.Fatal(err)
			}
			unchanged(t, dev[1])
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err != nil || len(parts) != 7 || parts["root-b"] != dev[0]+"p4" {
			t.Fatalf("%v %v", parts, err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		slot, err := Open(parts["root-b"])
		if err != nil {
			t.Fatal(err)
		}
		if slot.Size() != firmware.SizeRoot {
			t.Errorf("%d", slot.Size())
		}
		if err := WriteChunk(slot, firmware.ChunkSize, bytes.Repeat([]byte{7}, firmware.ChunkSize)); err != nil {
			t.Fatal(err)
		}
		if d, err := Open(dev[0]); err == nil {
			d.Close()
			t.Error("the disk was opened while a partition is in use")
		}
		if err := slot.Close(); err != nil {
			t.Fatal(err)
		}
		unchanged(t, dev[1])
	}
}

// gptKernel says whether the running kernel reads GPTs; true when it does not
// tell.
func gptKernel() bool {
	f, err := os.Open("/proc/config.gz")
	if err != nil {
		return true
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return true
	}
	b, err := io.ReadAll(z)
	return err != nil || bytes.Contains(b, []byte("CONFIG_EFI_PARTITION=y"))
}

func unchanged(t *testing.T, dev string) {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	if _, err := io.ReadFull(f, b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, bytes.Repeat([]byte("mine"), 1<<18)) {
		t.Error("the second disk changed")
	}
	// Behind what was filled everything is zero still.
	for _, at := range []int64{1 << 30, firmware.MinDisk - 1<<20} {
		if _, err := f.ReadAt(b, at); err != nil || len(bytes.Trim(b, "\x00")) != 0 {
			t.Errorf("the second disk changed at %d (%v)", at, err)
		}
	}
}
