package stick

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

var (
	program = []byte("the image")
	ours    = firmware.MediumOf(sha256.Sum256(program)).Partition
	machine = Entry{fleet.ListedEK{EK: fleet.EKHash{1}, Serial: "S1", Site: "shop-1"}, "ACME Box"}
)

// gpt makes the start of a disk with one partition at sector 2048.
func gpt(guid firmware.GUID) []byte {
	b := make([]byte, 34*512)
	h, e, le := b[512:][:92], b[1024:][:128*128], binary.LittleEndian
	copy(e, "a type of a file")
	copy(e[16:], guid[:])
	le.PutUint64(e[32:], 2048)
	le.PutUint64(e[40:], 2048+999)
	copy(h, "EFI PART")
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(e))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	return b
}

// world is a machine with disks.
type world struct {
	t     *testing.T
	sys   fstest.MapFS
	disks map[string][]byte
	dir   string // the file system of the stick
	// writable is what a mount for writing says.
	writable error
	writes   int
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, sys: fstest.MapFS{}, disks: map[string][]byte{}, dir: t.TempDir()}
	if err := os.MkdirAll(filepath.Join(w.dir, "EFI", "BOOT"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.put("EFI/BOOT/BOOTX64.EFI", program)
	w.add("sda", gpt(firmware.GUID{9}))
	w.add("sdb", gpt(ours))
	w.set("loop0", "size", "100")
	return w
}

func (w *world) set(dev, name, value string) {
	w.sys["sys/class/block/"+dev+"/"+name] = &fstest.MapFile{Data: []byte(value + "\n")}
}

func (w *world) add(disk string, b []byte) {
	w.disks[disk] = b
	w.set(disk, "size", "100000")
	w.set(disk, "ro", "0")
	w.set(disk, "queue/logical_block_size", "512")
	w.set(disk, "device/model", "Stick of "+disk)
	part := disk + "1"
	if strings.HasPrefix(disk, "nvme") {
		part = disk + "p1"
	}
	for k, v := range map[string]string{"partition": "1", "start": "2048", "size": "1000", "ro": "0"} {
		w.set(part, k, v)
	}
}

func (w *world) remove(disk string) {
	for k := range w.sys {
		if strings.HasPrefix(k, "sys/class/block/"+disk) {
			delete(w.sys, k)
		}
	}
}

func (w *world) put(name string, b []byte) {
	if err := os.WriteFile(filepath.Join(w.dir, name), b, 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) list(name string) string {
	b, err := os.ReadFile(filepath.Join(w.dir, name))
	if err != nil {
		return ""
	}
	return string(b)
}

func (w *world) finder() finder {
	return finder{w.sys, func(name string) (io.ReaderAt, io.Closer, error) {
		b, ok := w.disks[name]
		if !ok {
			return nil, nil, os.ErrNotExist
		}
		return bytes.NewReader(b), io.NopCloser(nil), nil
	}}
}

func (w *world) places() places {
	return places{
		finder: w.finder(),
		mount: func(device string, write bool, f func(string) error) error {
			if device != "sdb1" {
				w.t.Errorf("%s was mounted", device)
			}
			if write {
				if w.writable != nil {
					return w.writable
				}
				w.writes++
			}
			return f(w.dir)
		},
		forget: func(string) error { return nil },
		pause:  func(context.Context, time.Duration) error { return nil },
		since:  func() time.Duration { return time.Hour },
	}
}

func TestFindIsExact(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*world)
		id     string
		want   string // of the error; "" is sdb1
	}{
		"the stick is there":              {func(*world) {}, ours.String(), ""},
		"the firmware shouts":             {func(*world) {}, strings.ToUpper(ours.String()), ""},
		"the firmware names nothing":      {func(*world) {}, "", "not started from a stick"},
		"the stick was taken out":         {func(w *world) { w.remove("sdb") }, ours.String(), "put it back"},
		"the machine has a copy of it":    {func(w *world) { w.add("nvme0n1", gpt(ours)) }, ours.String(), "2 disks are copies"},
		"the table's checksum is wrong":   {func(w *world) { w.disks["sdb"][520] ^= 1 }, ours.String(), "put it back"},
		"an entry was changed":            {func(w *world) { w.disks["sdb"][1024+50] ^= 1 }, ours.String(), "put it back"},
		"the kernel has another start":    {func(w *world) { w.set("sdb1", "start", "4096") }, ours.String(), "do not agree"},
		"the kernel has no such part":     {func(w *world) { delete(w.sys, "sys/class/block/sdb1/partition") }, ours.String(), "do not agree"},
		"the disk is gone in mid-look":    {func(w *world) { delete(w.disks, "sdb") }, ours.String(), "put it back"},
		"it is a loop device":             {func(w *world) { w.add("loop7", gpt(ours)); w.remove("sdb") }, ours.String(), "put it back"},
		"the disk ends in its table":      {func(w *world) { w.disks["sdb"] = w.disks["sdb"][:2000] }, ours.String(), "put it back"},
		"the other disk has no table":     {func(w *world) { w.disks["sda"] = make([]byte, 34*512) }, ours.String(), ""},
		"the other disk cannot be opened": {func(w *world) { delete(w.disks, "sda") }, ours.String(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.change(w)
			m, err := w.finder().find(c.id)
			switch {
			case c.want == "" && (err != nil || m.device != "sdb1" || m.disk != "sdb" || m.protected || m.model != "Stick of sdb"):
				t.Errorf("%+v, %v", m, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%+v, %v; want %q", m, err, c.want)
			}
		})
	}
}

func TestAdd(t *testing.T) {
	header := "ek_sha256,serial,site,model,words\n"
	line := machine.EK.String() + ",S1,shop-1,ACME Box," + fleet.Words(machine.EK.NodeID()) + "\n"
	other := fleet.EKHash{2}
	for name, c := range map[string]struct {
		change func(*world)
		file   string
		want   string // the whole list
		say    string
		fail   error
		writes int
	}{
		"the stick is new":            {func(*world) {}, "machines.csv", header + line, "machine 1)", nil, 1},
		"another machine is there":    {func(w *world) { w.put("machines.csv", []byte("ek_sha256\n"+other.String()+"\n")) }, "machines.csv", "ek_sha256\n" + other.String() + "\n" + machine.EK.String() + "\n", "machine 2)", nil, 1},
		"the machine is there":        {func(w *world) { w.put("machines.csv", []byte(header+line)) }, "machines.csv", header + line, "was on the list already", nil, 0},
		"the list was cut off":        {func(w *world) { w.put("machines.csv", []byte(header+"0102")) }, "machine2.csv", header + line, "machines.csv cannot be read as a list and was left alone", nil, 1},
		"it is known and protected":   {func(w *world) { w.put("machines.csv", []byte(header+line)); w.set("sdb", "ro", "1") }, "machines.csv", header + line, "already", nil, 0},
		"the switch of the stick":     {func(w *world) { w.set("sdb", "ro", "1") }, "machines.csv", "", "", ErrProtected, 0},
		"the partition is read-only":  {func(w *world) { w.set("sdb1", "ro", "1") }, "machines.csv", "", "", ErrProtected, 0},
		"the mount says so":           {func(w *world) { w.writable = ErrProtected }, "machines.csv", "", "", ErrProtected, 0},
		"another program is on it":    {func(w *world) { w.put("EFI/BOOT/BOOTX64.EFI", []byte("of somebody else")) }, "machines.csv", "", "", ErrForeign, 0},
		"no program is on it":         {func(w *world) { _ = os.RemoveAll(filepath.Join(w.dir, "EFI")) }, "machines.csv", "", "", ErrForeign, 0},
		"a directory is in the place": {func(w *world) { _ = os.Mkdir(filepath.Join(w.dir, "machines.csv"), 0o755) }, "machines.csv", "", "", errors.ErrUnsupported, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.change(w)
			m, err := w.finder().find(ours.String())
			if err != nil {
				t.Fatal(err)
			}
			o, err := add(m, machine, w.places())
			if c.fail != nil {
				if err == nil || c.fail != errors.ErrUnsupported && !errors.Is(err, c.fail) || w.writes != 0 || w.list(c.file) != c.want {
					t.Errorf("%v, %d writes, list %q", err, w.writes, w.list(c.file))
				}
				return
			}
			if err != nil || w.list(c.file) != c.want || w.writes != c.writes || !strings.Contains(o.text("w"), c.say) {
				t.Errorf("%v, %d writes, %q says\n%s", err, w.writes, o.text("w"), w.list(c.file))
			}
			if l := enroll.ParseList([]byte(w.list(c.file))); len(l.Problems) > 0 {
				t.Errorf("%+v", l.Problems)
			}
		})
	}
}

// A stick that does not keep what was written must not end in DONE.
func TestAddWhenTheStickLies(t *testing.T) {
	w := newWorld(t)
	m, err := w.finder().find(ours.String())
	if err != nil {
		t.Fatal(err)
	}
	p := w.places()
	p.forget = func(string) error { w.put("machines.csv", []byte("ek_sha256,serial\n")); return nil }
	if _, err := add(m, machine, p); err == nil || !strings.Contains(err.Error(), "another stick") {
		t.Errorf("%v", err)
	}
}

// From a stick that is protected over a stick that works to one that is out.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.set("sdb", "ro", "1")
		p := w.places()
		began := time.Now()
		p.since = func() time.Duration { return time.Since(began) }
		step := 0
		p.pause = func(ctx context.Context, d time.Duration) error {
			time.Sleep(d)
			switch step++; step {
			case 2: // it is taken out, its switch is moved
				w.remove("sdb")
			case 12:
				w.add("sdb", gpt(ours))
			case 14:
				w.remove("sdb")
			}
			return ctx.Err()
		}
		var said []string
		err := run(t.Context(), Config{
			Entry: machine, Words: "six words", Partition: ours.String,
			Say: func(s agent.State, text string) {
				if line := fmt.Sprintf("%s: %.24s", s, text); len(said) == 0 || said[len(said)-1] != line {
					said = append(said, line)
				}
			},
		}, p)
		if err != nil || len(said) < 6 || said[0] != "scanning: looking for the stick" || !strings.HasPrefix(said[2], "failed: the stick is write-") ||
			!strings.HasPrefix(said[len(said)-1], "scanned: six words is on") || w.writes != 1 {
			t.Errorf("%v, %d writes: %q", err, w.writes, said)
		}
		if !strings.Contains(strings.Join(said, "\n"), "failed: the stick this machine") {
			t.Errorf("a stick that is out for long is not asked for: %q", said)
		}
	})
	t.Run("when told to end then it ends", func(t *testing.T) {
		w := newWorld(t)
		w.remove("sdb")
		ctx, cancel := context.WithCancel(t.Context())
		p := w.places()
		p.pause = func(ctx context.Context, _ time.Duration) error { cancel(); return ctx.Err() }
		if err := run(ctx, Config{Entry: machine, Partition: ours.String, Say: func(agent.State, string) {}}, p); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestEntryOf(t *testing.T) {
	e := EntryOf(fleet.EKHash{3}, "shop", fleet.Hardware{Vendor: "ACME", Product: "Box", Serial: "7"})
	if e.EK != (fleet.EKHash{3}) || e.Site != "shop" || e.Serial != "7" || e.Model != "ACME Box" {
		t.Errorf("%+v", e)
	}
}

func FuzzGPT(f *testing.F) {
	f.Add(gpt(ours), 512)
	f.Add(gpt(ours)[:1100], 512)
	f.Add([]byte("EFI PART"), 4096)
	f.Fuzz(func(t *testing.T, b []byte, sector int) {
		parts, err := readGPT(bytes.NewReader(b), sector)
		if err != nil && len(parts) > 0 || len(parts) > maxEntries {
			t.Fatalf("%d partitions, %v", len(parts), err)
		}
		// The checksums stop a fuzzer; what is behind them is reached too.
		if len(b) >= 1024+128 && sector == 512 {
			b = bytes.Clone(b)
			le, h := binary.LittleEndian, b[512:][:92]
			copy(h, "EFI PART")
			le.PutUint32(h[12:], 92)
			if n := int64(le.Uint32(h[80:])) * int64(le.Uint32(h[84:])); le.Uint64(h[72:]) == 2 && n <= int64(len(b)-1024) && n >= 0 {
				le.PutUint32(h[88:], crc32.ChecksumIEEE(b[1024:][:n]))
			}
			le.PutUint32(h[16:], 0)
			le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
			parts, err = readGPT(bytes.NewReader(b), 512)
			for _, p := range parts {
				if p.number < 1 || p.number > maxEntries || p.sectors == 0 || p.start == 0 || err != nil {
					t.Fatalf("%+v, %v", p, err)
				}
			}
		}
	})
}
