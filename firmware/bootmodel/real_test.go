package bootmodel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware/petest"
	"github.com/muster-edge/muster/lab/machine"
)

// partition is the GUID of the ESP in the tests, in text and as UEFI has it.
const partition = "11223344-5566-4788-99aa-bbccddeeff00"

var partitionBytes = []byte{0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0x88, 0x47, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0x00}

// realCase is one machine, as the model has it. Files named "ok" start and
// run for ever; what else a file does is in broken and resets.
type realCase struct {
	name    string
	machine Machine
	// resets are files that run and then reset the machine, as a system does
	// that comes up and dies.
	resets []string
	// forged are files whose Starts is false because of their signature;
	// other files that do not start are cut short.
	forged  []string
	pressed bool
	secure  bool
	// needs is a word that a loader must know.
	needs string
	// forget deletes the firmware's variables before the first power-on.
	forget bool
}

func release(id, version string) *Release {
	return &Release{ID: id, VersionID: version, PrettyName: id + " " + version}
}

func uki(id, version string) File { return File{Starts: true, Release: release(id, version)} }
func broken(f File) File          { f.Starts = false; return f }
func garbled(f File) File         { f.Starts, f.Garbled = false, true; return f }

// installed is the boot order that muster writes: the loader, its copy, the
// recovery image by itself.
var installed = []Target{{File: "EFI/systemd/systemd-bootx64.efi"}, {File: "EFI/BOOT/BOOTX64.EFI"}, {File: "EFI/Linux/recovery-1.efi"}}

func esp(extra ESP) ESP {
	e := ESP{
		"EFI/systemd/systemd-bootx64.efi": {Starts: true, Loader: true},
		"EFI/BOOT/BOOTX64.EFI":            {Starts: true, Loader: true},
		"EFI/Linux/recovery-1.efi":        uki("zz-recovery", "1"),
		LoaderConf:                        {Text: "timeout 0\neditor no\n"},
	}
	for name, f := range extra {
		if f.Text == "-" {
			delete(e, name)
			continue
		}
		e[name] = f
	}
	return e
}

func realCases() []realCase {
	return []realCase{
		{name: "newest", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.9.efi": uki("edge", "1.9"), "EFI/Linux/edge-1.10.efi": uki("edge", "1.10")})}},
		{name: "bad-slot-counts-down", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/edge-2+3.efi": uki("edge", "2")})},
			resets: []string{"edge 2"}},
		{name: "both-slots-bad", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1+1-2.efi": uki("edge", "1"), "EFI/Linux/edge-2+2.efi": uki("edge", "2")})},
			resets: []string{"edge 1", "edge 2"}},
		{name: "garbled-uki", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/edge-2+3.efi": garbled(uki("edge", "2"))})}},
		{name: "corrupt-uki", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/edge-2+3.efi": broken(uki("edge", "2"))})}},
		{name: "corrupt-only-slot", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-2.efi": broken(uki("edge", "2"))})}},
		{name: "forged-uki", secure: true, forged: []string{"EFI/Linux/edge-2+3.efi"},
			machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/edge-2+3.efi": broken(uki("edge", "2"))})}},
		{name: "one-shot-glob", machine: Machine{Order: installed, OneShot: "recovery-*", ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1")})}},
		{name: "one-shot-is-erased", machine: Machine{Order: installed, OneShot: "recovery-*", ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1")})},
			resets: []string{"zz-recovery 1"}},
		{name: "one-shot-of-nothing", machine: Machine{Order: installed, OneShot: "nosuch-*", ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1")})}},
		{name: "spent-default-is-started", machine: Machine{Order: installed, Default: "edge-2*", ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/edge-2+0-3.efi": uki("edge", "2")})}},
		{name: "spent-go-last", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/edge-2+0-3.efi": uki("edge", "2")})}},
		{name: "hidden-names", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/Linux/.new-2.efi": uki("edge", "2"), "EFI/Linux/edge-3.txt": uki("edge", "3")})}},
		{name: "nvram-lost", forget: true, machine: Machine{ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1")})}},
		{name: "loader-corrupt", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"), "EFI/systemd/systemd-bootx64.efi": {Loader: true}})}},
		{name: "both-loaders-corrupt", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"),
			"EFI/systemd/systemd-bootx64.efi": {Loader: true}, "EFI/BOOT/BOOTX64.EFI": {Loader: true}})}},
		{name: "key-pressed-menu-disabled", pressed: true, needs: "menu-disabled", machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1"),
			LoaderConf: {Text: "timeout menu-disabled\neditor no\n"}})}},
		{name: "key-pressed", pressed: true, machine: Machine{Order: installed, ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1")})}},
	}
}

// smoke are the cases of every run; MUSTER_VM_TESTS=long has all.
var smoke = []string{"bad-slot-counts-down", "corrupt-uki", "key-pressed"}

// TestRealLoader compares the model with systemd-boot itself, on UEFI firmware
// in a virtual machine: what starts, in which order, and what the ESP holds
// afterwards.
func TestRealLoader(t *testing.T) {
	if os.Getenv("MUSTER_VM_TESTS") == "" {
		t.Skip("starts virtual machines: set MUSTER_VM_TESTS=1 to run it")
	}
	loader := realLoader(t)
	all := os.Getenv("MUSTER_VM_TESTS") == "long"
	for _, c := range realCases() {
		if !all && !slices.Contains(smoke, c.name) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			if missing := machine.CheckHost(c.secure); len(missing) > 0 {
				t.Skipf("this host cannot run machines: missing %v", missing)
			}
			if c.needs != "" && !bytes.Contains(loader, []byte(c.needs)) && !bytes.Contains(loader, petest.UTF16(c.needs)[:2*len(c.needs)]) {
				t.Skipf("this version of the loader does not know %q", c.needs)
			}
			compareReal(t, loader, c)
		})
	}
}

// A key pressed at power-on parks the loader in its menu. Firmware arms a
// watchdog of five minutes before it starts a boot option (UEFI 2.10, 3.1.2);
// this test says whether it ends the menu.
func TestRealMenuEnds(t *testing.T) {
	if os.Getenv("MUSTER_VM_TESTS") != "long" {
		t.Skip("takes seven minutes in a virtual machine: set MUSTER_VM_TESTS=long to run it")
	}
	loader := realLoader(t)
	dir, err := os.MkdirTemp("", "bm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := realCase{machine: Machine{ESP: esp(ESP{"EFI/Linux/edge-1.efi": uki("edge", "1")})}}
	disk := filepath.Join(dir, "esp.img")
	makeDisk(t, disk, c, loader)
	m, err := machine.New(machine.Config{Name: "bm", Dir: filepath.Join(dir, "m"), Boot: machine.BootDisk, FirmwareOrder: true,
		MemoryMB: 256, NoTPM: true, Disks: []machine.Disk{{File: disk, Serial: "ESP"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	pressing, stop := context.WithCancel(ctx)
	pressed(pressing, m)
	menu, err := m.Serial().Wait(ctx, 0, regexp.MustCompile(`^\s*edge 1\b`))
	stop()
	if err != nil {
		t.Fatal(err)
	}
	up, err := m.Serial().Wait(ctx, 0, said)
	if err != nil {
		t.Fatalf("the menu stays: %v", err)
	}
	t.Logf("the menu was left after %s", up.At.Sub(menu.At).Round(time.Second))
}

// realLoader is Debian's systemd-boot, from the package or from the archive.
func realLoader(t *testing.T) []byte {
	const where = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	name := where
	if f := os.Getenv("MUSTER_SYSTEMD_BOOT"); f != "" {
		name = f
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("no systemd-boot at %s: install the package systemd-boot-efi, or name the program in MUSTER_SYSTEMD_BOOT", name)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var said = regexp.MustCompile(`^muster-entry: (.*)$`)

func compareReal(t *testing.T, loader []byte, c realCase) {
	dir, err := os.MkdirTemp("", "bm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	disk := filepath.Join(dir, "esp.img")
	makeDisk(t, disk, c, loader)

	started := make(chan string, 64)
	cfg := machine.Config{Name: "bm", Dir: filepath.Join(dir, "m"), Boot: machine.BootDisk, FirmwareOrder: true, MemoryMB: 256,
		SecureBoot: c.secure, NoTPM: true, Disks: []machine.Disk{{File: disk, Serial: "ESP"}},
		OnLine: func(l machine.Line) {
			if m := said.FindStringSubmatch(strings.TrimSpace(l.Text)); m != nil {
				started <- m[1]
			}
		}}
	if !c.forget {
		setVariables(t, dir, cfg, c)
	}
	m, err := machine.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()

	// The model first: it knows how often to look.
	model := c.machine
	model.ESP = ESP{}
	for k, v := range c.machine.ESP {
		model.ESP[k] = v
	}
	var want []string
	menu := false
	for range 12 {
		out := model.PowerOn(c.pressed)
		t.Logf("model: %s", strings.Join(out.Steps, "; "))
		if menu = out.Menu; menu {
			break
		}
		title := model.ESP[out.File].Release.PrettyName
		want = append(want, title)
		if !slices.Contains(c.resets, title) {
			break
		}
	}

	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	var got []string
	if c.pressed {
		pressed(ctx, m)
	}
	for len(got) < len(want) {
		select {
		case s := <-started:
			got = append(got, s)
		case <-ctx.Done():
			t.Fatalf("real: %q, then nothing; the model says %q", got, want)
		}
	}
	if menu {
		// The menu shows every title and stays.
		if _, err := m.Serial().Wait(ctx, 0, regexp.MustCompile(`^\s*edge 1\b`)); err != nil {
			log, _ := os.ReadFile(filepath.Join(cfg.Dir, "serial.log"))
			t.Fatalf("no menu on the console: %v\n%q", err, tail(log))
		}
	}
	if err := m.Cut(); err != nil {
		t.Fatal(err)
	}
	if len(started) > 0 {
		t.Errorf("real: also %q", <-started)
	}
	if !slices.Equal(got, want) {
		t.Errorf("started:\nreal  %q\nmodel %q", got, want)
	}
	var names []string
	for name := range model.ESP {
		names = append(names, strings.ToLower(name))
	}
	slices.Sort(names)
	if real := listDisk(t, disk); !slices.Equal(real, names) {
		t.Errorf("files afterwards:\nreal  %q\nmodel %q", real, names)
	}
}

// pressed presses a key again and again until the test's machine is off.
func pressed(ctx context.Context, m *machine.Machine) {
	go func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if m.Press(ctx, "x") != nil {
					return
				}
			}
		}
	}()
}

// program is the file f as bytes.
func (c realCase) program(t *testing.T, name string, f File, loader []byte) []byte {
	var b []byte
	switch {
	case f.Loader:
		b = loader
	case f.Release == nil:
		return []byte(f.Text)
	default:
		p := petest.Program{Say: "muster-entry: " + f.Release.PrettyName, Then: petest.Halt,
			OSRelease: fmt.Sprintf("ID=%s\nVERSION_ID=%s\nPRETTY_NAME=\"%s\"\n", f.Release.ID, f.Release.VersionID, f.Release.PrettyName)}
		if slices.Contains(c.resets, f.Release.PrettyName) {
			p.Then = petest.Reset
		}
		b = p.Make()
	}
	if c.secure && !slices.Contains(c.forged, name) {
		b = sign(t, b)
	}
	if !f.Starts && !slices.Contains(c.forged, name) {
		b = slices.Clone(b)
		switch {
		case f.Loader:
			return b[:len(b)/2]
		case f.Garbled:
			binary.LittleEndian.PutUint16(b[68:], 0x1c0) // a program for another processor
		default:
			binary.LittleEndian.PutUint32(b[88+56:], 0x7fffffff) // larger than the machine's memory
		}
	}
	return b
}

func sign(t *testing.T, b []byte) []byte {
	dir := t.TempDir()
	key, in, out := filepath.Join(dir, "key"), filepath.Join(dir, "in"), filepath.Join(dir, "out")
	must(t, "openssl", "rsa", "-in", machine.SnakeoilKey, "-passin", "pass:"+machine.SnakeoilPassword, "-out", key)
	if err := os.WriteFile(in, b, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "sbsign", "--key", key, "--cert", machine.SnakeoilCert, "--output", out, in)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

const offset = "@@1M"

// makeDisk makes a disk with a GPT and one ESP.
func makeDisk(t *testing.T, disk string, c realCase, loader []byte) {
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 48<<20); err != nil {
		t.Fatal(err)
	}
	must(t, "sgdisk", "-n1:2048:0", "-t1:ef00", "-u1:"+partition, disk)
	must(t, "mformat", "-i", disk+offset, "-F", "-T", fmt.Sprint((48<<20)/512-2048-34), "::")
	dirs := map[string]bool{}
	for name := range c.machine.ESP {
		for d := path.Dir(name); d != "."; d = path.Dir(d) {
			dirs[d] = true
		}
	}
	for _, d := range slices.Sorted(maps.Keys(dirs)) {
		must(t, "mmd", "-i", disk+offset, "::/"+d)
	}
	for name, f := range c.machine.ESP {
		src := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(src, c.program(t, name, f, loader), 0o600); err != nil {
			t.Fatal(err)
		}
		must(t, "mcopy", "-i", disk+offset, src, "::/"+name)
	}
}

func listDisk(t *testing.T, disk string) []string {
	var out []string
	for _, line := range strings.Split(must(t, "mdir", "-i", disk+offset, "-/", "-b", "-a", "::/"), "\n") {
		name := strings.ToLower(strings.TrimPrefix(strings.TrimSpace(line), "::/"))
		if name != "" && !strings.HasSuffix(name, "/") {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// setVariables starts a machine once with a program that writes the variables.
func setVariables(t *testing.T, dir string, cfg machine.Config, c realCase) {
	p := petest.Program{Say: "muster-entry: set", Then: petest.Halt}
	var order []byte
	for i, target := range c.machine.Order {
		n := uint16(0x1000 + i)
		order = binary.LittleEndian.AppendUint16(order, n)
		p.Variables = append(p.Variables, petest.Variable{Name: fmt.Sprintf("Boot%04X", n), GUID: petest.GlobalVariable, Data: loadOption(target.File)})
	}
	p.Variables = append(p.Variables, petest.Variable{Name: "BootOrder", GUID: petest.GlobalVariable, Data: order})
	for name, value := range map[string]string{"LoaderEntryOneShot": c.machine.OneShot, "LoaderEntryDefault": c.machine.Default} {
		if value != "" {
			p.Variables = append(p.Variables, petest.Variable{Name: name, GUID: petest.LoaderVariable, Data: petest.UTF16(value)})
		}
	}
	setter := c
	setter.machine = Machine{ESP: ESP{}}
	disk := filepath.Join(dir, "set.img")
	makeDisk(t, disk, setter, nil)
	b := p.Make()
	if c.secure {
		b = sign(t, b)
	}
	src := filepath.Join(dir, "set.efi")
	if err := os.WriteFile(src, b, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "mmd", "-i", disk+offset, "::/EFI", "::/EFI/BOOT")
	must(t, "mcopy", "-i", disk+offset, src, "::/EFI/BOOT/BOOTX64.EFI")
	cfg.Disks = []machine.Disk{{File: disk, Serial: "SET"}}
	done := make(chan struct{}, 1)
	cfg.OnLine = func(l machine.Line) {
		if strings.TrimSpace(l.Text) == p.Say {
			done <- struct{}{}
		}
	}
	m, err := machine.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
	case <-ctx.Done():
		log, _ := os.ReadFile(filepath.Join(cfg.Dir, "serial.log"))
		t.Fatalf("the variables were not set; console:\n%s", tail(log))
	}
	if err := m.Cut(); err != nil {
		t.Fatal(err)
	}
}

func tail(b []byte) []byte { return bytes.TrimSpace(b[max(0, len(b)-2000):]) }

// loadOption is EFI_LOAD_OPTION for a file on the ESP (UEFI 2.10, 3.1.3, 10.3.5.1, 10.3.5.4).
func loadOption(file string) []byte {
	le := binary.LittleEndian
	hd := []byte{4, 1, 42, 0}
	hd = le.AppendUint32(hd, 1)    // partition number
	hd = le.AppendUint64(hd, 2048) // start
	hd = le.AppendUint64(hd, (48<<20)/512-2048-33)
	hd = append(hd, partitionBytes...)
	hd = append(hd, 2, 2) // GPT, GUID
	name := petest.UTF16(`\` + strings.ReplaceAll(file, "/", `\`))
	fp := le.AppendUint16([]byte{4, 4}, uint16(4+len(name)))
	fp = append(fp, name...)
	list := slices.Concat(hd, fp, []byte{0x7f, 0xff, 4, 0})
	out := le.AppendUint32(nil, 1) // active
	out = le.AppendUint16(out, uint16(len(list)))
	out = append(out, petest.UTF16("muster "+path.Base(file))...)
	return append(out, list...)
}
