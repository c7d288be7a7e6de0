package efi

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/efivarfs"

	"github.com/muster-edge/muster/firmware"
)

func put(t *testing.T, e *ESP, name, content string) {
	t.Helper()
	if err := e.Stage(name, strings.NewReader(content), int64(len(content)), sha256.Sum256([]byte(content))); err != nil {
		t.Fatal(err)
	}
}

func TestStageRenameRemove(t *testing.T) {
	e := NewESP(t.TempDir())
	if files, err := e.BootFiles(); err != nil || len(files) != 0 {
		t.Fatalf("an empty ESP: %v %v", files, err)
	}
	put(t, e, ".new-edge-2.efi", "system")
	sum := firmware.Digest(sha256.Sum256([]byte("system")))
	if ok, err := e.Whole(".new-edge-2.efi", 6, sum); !ok || err != nil {
		t.Fatalf("staged: %v %v", ok, err)
	}
	if err := e.Rename(".new-edge-2.efi", "edge-2+3.efi"); err != nil {
		t.Fatal(err)
	}
	files, err := e.BootFiles()
	want := []firmware.BootFile{{Name: "edge-2+3.efi", Base: "edge-2.efi", Left: 3}}
	if err != nil || !slices.Equal(files, want) {
		t.Fatalf("%+v %v", files, err)
	}
	for i, bad := range []struct {
		size int64
		sum  firmware.Digest
	}{{5, sum}, {7, sum}, {6, firmware.Digest{1}}} {
		if ok, err := e.Whole("edge-2+3.efi", bad.size, bad.sum); ok || err != nil {
			t.Errorf("%d: %v %v", i, ok, err)
		}
	}
	for range 2 {
		if err := e.Remove("edge-2+3.efi"); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := e.Whole("edge-2+3.efi", 6, sum); ok || err != nil {
		t.Errorf("removed: %v %v", ok, err)
	}
}

func TestStageRefuses(t *testing.T) {
	e := NewESP(t.TempDir())
	sum := firmware.Digest(sha256.Sum256([]byte("system")))
	for name, c := range map[string]struct {
		file, content string
		size          int64
	}{
		"a name that the loader would start": {"edge-2+3.efi", "system", 6},
		"a folder":                           {".new-../x.efi", "system", 6},
		"a back slash":                       {`.new-\x.efi`, "system", 6},
		"too little":                         {".new-a.efi", "syste", 6},
		"too much":                           {".new-a.efi", "systems", 6},
		"other bytes":                        {".new-a.efi", "System", 6},
	} {
		if err := e.Stage(c.file, strings.NewReader(c.content), c.size, sum); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if files, err := e.BootFiles(); err != nil || len(files) != 0 {
		t.Errorf("left behind: %v %v", files, err)
	}
	if err := e.Rename("../a", "b"); err == nil {
		t.Error("a rename out of the folder")
	}
}

func TestPutIsAtomicAndLazy(t *testing.T) {
	dir := t.TempDir()
	e := NewESP(dir)
	for range 2 {
		if err := e.PutBytes("loader/loader.conf", []byte("timeout 0\n")); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := e.ReadSmall("loader/loader.conf"); err != nil || string(b) != "timeout 0\n" {
		t.Fatalf("%q %v", b, err)
	}
	if names, err := e.List("loader"); err != nil || !slices.Equal(names, []string{"loader.conf"}) {
		t.Fatalf("%v %v", names, err)
	}
	// The same bytes are not written again: the file is still the same one.
	before, err := os.Stat(filepath.Join(dir, "loader/loader.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if err := e.PutBytes("loader/loader.conf", []byte("timeout 0\n")); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(filepath.Join(dir, "loader/loader.conf")); err != nil || !os.SameFile(before, after) {
		t.Error("it was written again")
	}
	if err := os.WriteFile(filepath.Join(dir, "big"), make([]byte, maxSmall+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := e.ReadSmall("big"); err == nil {
		t.Error("a big file was read whole")
	}
}

// faulty makes one kind of call fail or lie.
type faulty struct {
	Dir
	full, flip, sync, readOnly bool
}

func (f *faulty) Create(name string) (File, error) {
	g, err := f.Dir.Create(name)
	if err == nil && f.full {
		return full{g}, nil
	}
	return g, err
}

type full struct{ File }

func (full) Write(b []byte) (int, error) { return 0, errors.New("no space left on device") }

func (f *faulty) Open(name string) (io.ReadCloser, error) {
	r, err := f.Dir.Open(name)
	if err != nil || !f.flip {
		return r, err
	}
	b, err := io.ReadAll(r)
	if len(b) > 0 {
		b[0] ^= 1
	}
	return io.NopCloser(bytes.NewReader(b)), errors.Join(err, r.Close())
}

func (f *faulty) Sync() error {
	if f.sync {
		return errors.New("input/output error")
	}
	return f.Dir.Sync()
}

func (f *faulty) Space() (int64, bool, error) {
	n, _, err := f.Dir.Space()
	return n, f.readOnly, err
}

func TestFaultyMedium(t *testing.T) {
	sum := firmware.Digest(sha256.Sum256([]byte("system")))
	for name, f := range map[string]*faulty{"full": {full: true}, "flipped bits": {flip: true}, "no sync": {sync: true}} {
		f.Dir = Dir(t.TempDir())
		e := On(f)
		err := e.Stage(".new-a.efi", strings.NewReader("system"), 6, sum)
		if err == nil || name == "flipped bits" && !errors.Is(err, ErrBroken) {
			t.Errorf("%s: %v", name, err)
		}
		if names, _ := f.Dir.List("EFI/Linux"); len(names) != 0 {
			t.Errorf("%s: left %v", name, names)
		}
	}
	e := On(&faulty{Dir: Dir(t.TempDir()), readOnly: true})
	if free, writable, err := e.Space(); writable || free <= 0 || err != nil {
		t.Errorf("%d %v %v", free, writable, err)
	}
}

// memory is a Store; it fails after some writes, as NVRAM that is full does.
type memory struct {
	vars  map[efivarfs.VariableDescriptor][]byte
	left  int
	write int
}

func newMemory() *memory {
	return &memory{vars: map[efivarfs.VariableDescriptor][]byte{}, left: 1 << 30}
}

func (m *memory) Get(d efivarfs.VariableDescriptor) (efivarfs.VariableAttributes, []byte, error) {
	b, ok := m.vars[d]
	if !ok {
		return 0, nil, fs.ErrNotExist
	}
	return kept, b, nil
}

func (m *memory) Set(d efivarfs.VariableDescriptor, a efivarfs.VariableAttributes, b []byte) error {
	if m.left == 0 {
		return errors.New("no space left on device")
	}
	if a != kept {
		return fmt.Errorf("attributes %x", a)
	}
	m.left--
	m.write++
	m.vars[d] = bytes.Clone(b)
	return nil
}

func (m *memory) Remove(d efivarfs.VariableDescriptor) error {
	if m.left == 0 {
		return errors.New("input/output error")
	}
	m.left--
	if _, ok := m.vars[d]; !ok {
		return fs.ErrNotExist
	}
	delete(m.vars, d)
	return nil
}

func (m *memory) List() (out []efivarfs.VariableDescriptor, err error) {
	for d := range m.vars {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b efivarfs.VariableDescriptor) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

var testESP = firmware.PartRef{Number: 1, Start: 2048, Sectors: 1 << 21, ID: firmware.GUID{1, 2, 3}}

func global(name string) efivarfs.VariableDescriptor {
	return efivarfs.VariableDescriptor{Name: name, GUID: globalGUID}
}

func TestSetBoot(t *testing.T) {
	m := newMemory()
	m.vars[global("Boot0000")] = []byte{1} // makes no sense
	m.vars[global("Boot00aa")] = []byte{1} // is none
	m.vars[global("BootOrder")] = []byte{0, 0, 9, 0, 1}
	v := VarsOn(m)
	want := firmware.BootEntries(testESP, firmware.RecoveryEntry("1"))
	if n, err := v.SetBoot(want); err != nil || n != 4 {
		t.Fatalf("%d %v", n, err)
	}
	b, err := v.Boot()
	if err != nil || !slices.Equal(b.Order, []uint16{1, 2, 3, 0, 9}) || !slices.Equal(b.Unread, []uint16{0}) || len(b.Entries) != 3 {
		t.Fatalf("%+v %v", b, err)
	}
	before := m.write
	if n, err := v.SetBoot(want); err != nil || n != 0 || m.write != before {
		t.Fatalf("written again: %d %v", n, err)
	}
}

// NVRAM may be full, or the power fail, after any write: what the order names
// is there, and doing it again ends well.
func TestSetBootCutAnywhere(t *testing.T) {
	old := firmware.BootEntries(firmware.PartRef{Number: 1, ID: firmware.GUID{9}}, firmware.RecoveryEntry("1"))
	for cut := range 8 {
		m := newMemory()
		v := VarsOn(m)
		if _, err := v.SetBoot(old); err != nil {
			t.Fatal(err)
		}
		m.left = cut
		want := firmware.BootEntries(testESP, firmware.RecoveryEntry("2"))
		_, err := v.SetBoot(want)
		b, berr := v.Boot()
		if berr != nil || len(b.Order) < 3 {
			t.Fatalf("cut %d: %+v %v", cut, b, berr)
		}
		for _, n := range b.Order {
			if !slices.ContainsFunc(b.Entries, func(e firmware.BootEntry) bool { return e.Number == n }) {
				t.Fatalf("cut %d: the order names %d, which is not there", cut, n)
			}
		}
		m.left = 100
		if _, err2 := v.SetBoot(want); err2 != nil {
			t.Fatalf("cut %d: %v, then %v", cut, err, err2)
		}
		if n, err := v.SetBoot(want); n != 0 || err != nil {
			t.Fatalf("cut %d: %d %v", cut, n, err)
		}
	}
}

func TestLoader(t *testing.T) {
	m := newMemory()
	loader := func(name, text string) {
		m.vars[efivarfs.VariableDescriptor{Name: name, GUID: loaderGUID}] = firmware.LoaderText(text)
	}
	loader("LoaderEntrySelected", "edge-1+3.efi")
	loader("LoaderBootCountPath", `\EFI\Linux\edge-1+2-1.efi`)
	loader("LoaderDevicePartUUID", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
	v := VarsOn(m)
	if err := v.SetOneShot(firmware.RecoveryPattern); err != nil {
		t.Fatal(err)
	}
	l, err := v.Loader()
	esp, _ := firmware.ParseGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
	if want := (Loader{Entry: "edge-1+3.efi", CountPath: "EFI/Linux/edge-1+2-1.efi", ESP: esp, OneShot: "recovery-*"}); err != nil || l != want {
		t.Fatalf("%+v %v", l, err)
	}
	for range 2 {
		if err := v.SetOneShot(""); err != nil {
			t.Fatal(err)
		}
	}
	if l, err := v.Loader(); err != nil || l.OneShot != "" {
		t.Fatalf("%+v %v", l, err)
	}
	if l, err := VarsOn(newMemory()).Loader(); err != nil || l != (Loader{}) {
		t.Fatalf("nothing there: %+v %v", l, err)
	}
	m.vars[efivarfs.VariableDescriptor{Name: "LoaderEntrySelected", GUID: loaderGUID}] = make([]byte, 1<<20)
	if _, err := v.Loader(); err == nil {
		t.Error("a variable of 1 MiB was read")
	}
}

func TestHostileVariables(t *testing.T) {
	m := newMemory()
	for i := range 2000 {
		m.vars[global(fmt.Sprintf("Boot%04X", i))] = bytes.Repeat([]byte{byte(i)}, i%100)
	}
	m.vars[global("BootOrder")] = bytes.Repeat([]byte{1, 0}, 30000)
	b, err := VarsOn(m).Boot()
	if err != nil || len(b.Entries)+len(b.Unread) > firmware.MaxBootEntries || len(b.Order) != 1 {
		t.Fatalf("%d entries, %d unread, order %v, %v", len(b.Entries), len(b.Unread), b.Order, err)
	}
}
