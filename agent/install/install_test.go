package install

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/efivarfs"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/disk/disktest"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// variables is NVRAM.
type variables map[efivarfs.VariableDescriptor][]byte

func (v variables) Get(d efivarfs.VariableDescriptor) (efivarfs.VariableAttributes, []byte, error) {
	b, ok := v[d]
	if !ok {
		return 0, nil, fs.ErrNotExist
	}
	return 7, b, nil
}

func (v variables) Set(d efivarfs.VariableDescriptor, _ efivarfs.VariableAttributes, b []byte) error {
	v[d] = bytes.Clone(b)
	return nil
}

func (v variables) Remove(d efivarfs.VariableDescriptor) error {
	delete(v, d)
	return nil
}

func (v variables) List() ([]efivarfs.VariableDescriptor, error) {
	return slices.Collect(maps.Keys(v)), nil
}

var errCut = errors.New("the power is gone")

// rig is a machine with two disks in memory, a source and a centre.
type rig struct {
	t      testing.TB
	disks  map[string]*disktest.Disk
	facts  []fleet.Disk
	vars   variables
	blobs  map[fetch.Digest][]byte
	image  firmware.Manifest
	signed []byte
	pub    crypto.PublicKey
	// recovery is the image that belongs on the disk, recoverySigned its
	// envelope; nameless: the charter does not name it.
	recovery       firmware.Manifest
	recoverySigned []byte
	nameless       bool

	orders    []fleet.Order
	withdrawn map[string]bool
	timeless  bool
	missing   string
	now       time.Time
	done      map[string]fleet.OrderState
	restarted bool
	sent      int64
	busy      map[string]bool
	cut       func(point string) error
	points    map[string]bool
}

const (
	rootSize = 3*firmware.ChunkSize/2 + 4096
	ukiSize  = 40_000
	// recoverySize differs, so that nothing passes for the other.
	recoverySize = 30_000
)

var node = fleet.EKHash(sha256.Sum256([]byte("ek"))).NodeID()

func filler(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, disks: map[string]*disktest.Disk{}, vars: variables{}, blobs: map[fetch.Digest][]byte{}, withdrawn: map[string]bool{},
		now: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC), done: map[string]fleet.OrderState{}, busy: map[string]bool{}, points: map[string]bool{}}
	for i, name := range []string{"/dev/vda", "/dev/vdb"} {
		d := disktest.New(firmware.MinDisk, 512)
		if _, err := d.WriteAt(bytes.Repeat([]byte("foreign "), 1000), 0); err != nil {
			t.Fatal(err)
		}
		r.disks[name] = d
		r.facts = append(r.facts, fleet.Disk{Path: name, Model: "virtual", Serial: fmt.Sprintf("S%d", i), SizeBytes: firmware.MinDisk})
	}
	blob := func(name string, b []byte) firmware.File {
		sum := firmware.Digest(sha256.Sum256(b))
		r.blobs[fetch.Digest(sum)] = b
		return firmware.File{File: name, Size: int64(len(b)), SHA256: sum}
	}
	root := filler(1, rootSize)
	chunks, err := firmware.Chunks(bytes.NewReader(root))
	if err != nil {
		t.Fatal(err)
	}
	uki := blob("edge-1-amd64.efi", filler(2, ukiSize))
	sections := []firmware.SectionDigest{{Name: ".linux", SHA256: firmware.Digest{1}}}
	pcr, err := firmware.PCR11(sections)
	if err != nil {
		t.Fatal(err)
	}
	r.image = firmware.Manifest{
		Format: firmware.ManifestFormat, Name: "edge", Version: "1", Kind: fleet.ImageSlot, Arch: "amd64", File: uki.File, SHA256: uki.SHA256, Size: uki.Size,
		Measurements: firmware.Measurements{Authenticode: firmware.Digest{2}, Kernel: firmware.Digest{3}, Loader: firmware.Digest{4}, PCR11: pcr, Sections: sections},
		Created:      time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		Slot: &firmware.SlotImage{Root: blob("edge.root", root), Verity: blob("edge.verity", filler(3, 8192)), Loader: blob("edge.loader.efi", filler(4, 5000)),
			RootHash: firmware.Digest{5}, RootUUID: "11111111-1111-1111-1111-111111111111", VerityUUID: "22222222-2222-2222-2222-222222222222",
			ChunkSize: firmware.ChunkSize, Chunks: chunks},
	}
	rec := blob("recovery.efi", filler(5, recoverySize))
	r.recovery = firmware.Manifest{
		Format: firmware.ManifestFormat, Name: "muster-recovery", Version: "7", Kind: fleet.ImageRecovery, Arch: "amd64", File: rec.File, SHA256: rec.SHA256, Size: rec.Size,
		Measurements: firmware.Measurements{Authenticode: firmware.Digest{6}, Kernel: firmware.Digest{3}, PCR11: pcr, Sections: sections}, Created: r.image.Created,
	}
	r.resign(func(*firmware.Manifest) {})
	return r
}

func (r *rig) order(id string, kind fleet.OrderKind) fleet.Order {
	o := fleet.Order{ID: id, Node: node, Kind: kind, NotAfter: r.now.Add(time.Hour)}
	if kind == fleet.OrderInstall || kind == fleet.OrderWipe {
		o.Disk = &fleet.DiskTarget{Serial: "S0", Model: "virtual", SizeBytes: firmware.MinDisk}
	}
	if kind == fleet.OrderInstall {
		o.Image = &fleet.ImageRef{Name: "edge", Version: "1", Arch: "amd64", SHA256: r.image.SHA256[:]}
	}
	return o
}

// Disk, Part, Mount and Vars implement Machine.
func (r *rig) Disk(d fleet.Disk) (Device, func() error, error) {
	if r.busy[d.Path] {
		return nil, nil, errors.New("it is in use")
	}
	return r.disks[d.Path], func() error { return nil }, nil
}

type part struct{ disk.Section }

func (part) Close() error { return nil }

func (r *rig) Part(d fleet.Disk, label string) (Device, error) {
	dev := r.disks[d.Path]
	table, err := disk.ReadTable(dev)
	if err != nil {
		return nil, err
	}
	s, err := disk.Part(dev, table, label)
	return part{s}, err
}

func (r *rig) Mount(d fleet.Disk) (efi.Files, func() error, error) {
	p, err := r.Part(d, firmware.LabelESP)
	if err != nil {
		return nil, nil, err
	}
	f, err := disktest.OpenFAT(p)
	return f, p.Sync, err
}

func (r *rig) Vars() (*efi.Vars, func(), error) { return efi.VarsOn(r.vars), func() {}, nil }

// Name, Open and Manifest implement Source.
func (r *rig) Name() string { return "centre" }

func (r *rig) Open(_ context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	b, ok := r.blobs[d]
	if !ok {
		return nil, fetch.ErrMissing
	}
	r.sent += n
	return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
}

func (r *rig) Manifest(_ context.Context, image fetch.Digest, _ int64) ([]byte, error) {
	if b, ok := map[fetch.Digest][]byte{fetch.Digest(r.image.SHA256): r.signed, fetch.Digest(r.recovery.SHA256): r.recoverySigned}[image]; ok {
		return b, nil
	}
	return nil, fetch.ErrMissing
}

// start is a start of recovery.
func (r *rig) start() *Installer {
	r.t.Helper()
	r.restarted = false
	i, err := New(Config{
		Node: node, Arch: "amd64", ReleaseKeys: []crypto.PublicKey{r.pub}, Machine: r, Disks: func() []fleet.Disk { return r.facts },
		Orders: func() []fleet.Order { return r.orders }, Withdrawn: func(id string) bool { return r.withdrawn[id] },
		TimeKnown: func() bool { return !r.timeless }, Now: func() time.Time { return r.now }, Sources: func() []Source { return []Source{r} },
		HandOver: func() (HandOver, string) {
			return HandOver{Site: []byte("{}\n"), Identity: []byte("{}\n"), Documents: [][]byte{[]byte("charter")}}, r.missing
		},
		Recovery: func() ([]fleet.ImageRef, string) {
			if r.nameless {
				return nil, "the charter names none"
			}
			return []fleet.ImageRef{{Name: r.recovery.Name, Version: r.recovery.Version, SHA256: r.recovery.SHA256[:]}}, ""
		},
		Tell: func(id string, s fleet.OrderState, _ string) { r.done[id] = s }, Heard: func(context.Context) {},
		Restart: func(string) { r.restarted = true },
		cut: func(p string) error {
			r.points[p] = true
			if r.cut != nil {
				return r.cut(p)
			}
			return nil
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return i
}

// live steps until the machine rests, restarts or the power goes.
func (r *rig) live(i *Installer) error {
	r.t.Helper()
	for range 200 {
		ctx, cancel := context.WithCancel(r.t.Context())
		if r.restarted {
			cancel()
			return nil
		}
		i.cfg.Restart = func(string) { r.restarted = true; cancel() }
		busy, err := i.Step(ctx)
		cancel()
		if r.restarted {
			return nil
		}
		if err != nil {
			return err
		}
		if !busy {
			return nil
		}
	}
	r.t.Fatal("it plans for ever")
	return nil
}

// boots says what a power-on of the machine would start, from what is on d.
func (r *rig) boots(d *disktest.Disk) (bootmodel.Outcome, error) {
	m := bootmodel.Machine{ESP: bootmodel.ESP{}}
	// With the entry of the recovery image from the first moment on: that is
	// the worse case.
	for _, e := range firmware.BootEntries(firmware.PartRef{}, firmware.RecoveryEntry("7")) {
		m.Order = append(m.Order, bootmodel.Target{File: e.File})
	}
	table, err := disk.ReadTable(d)
	if err != nil {
		return m.PowerOn(false), nil
	}
	esp, err := disk.Part(d, table, firmware.LabelESP)
	if err != nil {
		return m.PowerOn(false), nil
	}
	files, err := disktest.OpenFAT(esp)
	if err != nil {
		return m.PowerOn(false), nil
	}
	read := func(name string) []byte {
		f, err := files.Open(name)
		if err != nil {
			return nil
		}
		defer f.Close()
		b, _ := io.ReadAll(io.LimitReader(f, 1<<20))
		return b
	}
	for _, name := range []string{firmware.LoaderFile, firmware.LoaderCopy} {
		if b := read(name); b != nil {
			whole := sha256.Sum256(b) == r.image.Slot.Loader.SHA256
			m.ESP[name] = bootmodel.File{Starts: whole, Loader: whole, Garbled: !whole}
		}
	}
	m.ESP[loaderConf] = bootmodel.File{Text: string(read(loaderConf))}
	names, err := files.List(bootmodel.Entries)
	if err != nil {
		return m.PowerOn(false), nil
	}
	for _, n := range names {
		b := read(path.Join(bootmodel.Entries, n))
		if firmware.IsRecovery(n) {
			m.ESP[path.Join(bootmodel.Entries, n)] = bootmodel.File{Starts: sha256.Sum256(b) == r.recovery.SHA256,
				Release: &bootmodel.Release{ID: "zz-muster-recovery", VersionID: "7", PrettyName: "recovery"}}
			continue
		}
		whole := sha256.Sum256(b) == r.image.SHA256
		// Half a file may have sound headers: that is the worse case.
		m.ESP[path.Join(bootmodel.Entries, n)] = bootmodel.File{Starts: whole, Release: &bootmodel.Release{ID: "edge", VersionID: "1", PrettyName: "edge 1"}}
	}
	out := m.PowerOn(false)
	if out.File == "" || firmware.IsRecovery(path.Base(out.File)) {
		return out, nil
	}
	// What starts must find its slot.
	for label, f := range map[string]firmware.File{firmware.LabelRootA: r.image.Slot.Root, firmware.LabelVerityA: r.image.Slot.Verity} {
		p, err := disk.Part(d, table, label)
		if err != nil {
			return out, err
		}
		if sum, err := disk.Digest(p, f.Size); err != nil || sum != f.SHA256 {
			return out, fmt.Errorf("%s starts, and %s is not whole", out.File, label)
		}
	}
	meta, err := disk.Part(d, table, firmware.LabelMeta)
	if err != nil {
		return out, err
	}
	rec, err := disk.ReadMeta(meta)
	if err != nil || rec.Slots[firmware.SlotA].State != firmware.SlotStaged || rec.Node != node {
		return out, fmt.Errorf("%s starts, and the record is %+v (%v)", out.File, rec, err)
	}
	e := efi.On(files)
	if h, err := ReadHandOver(e); err != nil || len(h.Documents) != 1 || len(h.Site) == 0 {
		return out, fmt.Errorf("%s starts, and has no documents (%v)", out.File, err)
	}
	return out, nil
}

// startsSystem: it is the slot, and neither recovery nor nothing.
func startsSystem(out bootmodel.Outcome) bool {
	return out.File != "" && !firmware.IsRecovery(path.Base(out.File))
}

// names lists EFI/Linux.
func (r *rig) names() []string {
	r.t.Helper()
	files, _, err := r.Mount(r.facts[0])
	if err != nil {
		r.t.Fatal(err)
	}
	names, err := files.List(bootmodel.Entries)
	if err != nil {
		r.t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func (r *rig) installed() {
	r.t.Helper()
	out, err := r.boots(r.disks["/dev/vda"])
	if err != nil || !startsSystem(out) || !r.restarted || r.done["o-1"] != fleet.OrderDone {
		r.t.Fatalf("not installed: %+v %v, restarted %v, order %v", out, err, r.restarted, r.done)
	}
}

func (r *rig) untouched(name string) {
	r.t.Helper()
	d := disktest.New(firmware.MinDisk, 512)
	want := bytes.Repeat([]byte("foreign "), 1000)
	if _, err := d.WriteAt(want, 0); err != nil {
		r.t.Fatal(err)
	}
	if !r.disks[name].Equal(d) {
		r.t.Fatalf("%s was touched", name)
	}
}

func TestInstall(t *testing.T) {
	r := newRig(t)
	i := r.start()
	if err := r.live(i); err != nil || i.Now().State != firmware.InstallIdle {
		t.Fatalf("without an order: %+v %v", i.Now(), err)
	}
	r.untouched("/dev/vda")
	r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
	if err := r.live(i); err != nil {
		t.Fatal(err)
	}
	r.installed()
	r.untouched("/dev/vdb")
	// The firmware knows loader, copy and recovery image, in this order.
	b, err := efi.VarsOn(r.vars).Boot()
	var order []string
	for _, n := range b.Order {
		for _, e := range b.Entries {
			if e.Number == n {
				order = append(order, e.Title+" "+e.File)
			}
		}
	}
	if want := []string{"muster EFI/systemd/systemd-bootx64.efi", "muster (copy) EFI/BOOT/BOOTX64.EFI", "muster recovery EFI/Linux/recovery-7.efi"}; err != nil || !slices.Equal(order, want) {
		t.Errorf("%q %v", order, err)
	}
	if want := []string{"edge-1+3.efi", "recovery-7.efi"}; !slices.Equal(r.names(), want) {
		t.Errorf("%q, want %q", r.names(), want)
	}
	// The machine comes into recovery again with the order still there: it
	// only says that it is done, and starts its system.
	before := r.sent
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	r.installed()
	if r.sent != before {
		t.Errorf("%d bytes were fetched again", r.sent-before)
	}
	// A new order of the same image writes it anew.
	r.orders = append(r.orders, r.order("o-2", fleet.OrderInstall))
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	if r.done["o-2"] != fleet.OrderDone || r.sent == before {
		t.Errorf("the second order: %v, %d bytes", r.done, r.sent-before)
	}
}

// Whatever is wrong: nothing is written anywhere, and the reason is told.
func TestInstallWaits(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *rig, o *fleet.Order)
		say    string
	}{
		"no disk matches":      {func(_ *rig, o *fleet.Order) { o.Disk.Serial = "S7" }, "this machine has model virtual, serial S0"},
		"another size":         {func(_ *rig, o *fleet.Order) { o.Disk.SizeBytes++ }, "this machine has"},
		"two with one serial":  {func(r *rig, _ *fleet.Order) { r.facts[1].Serial = "S0" }, "2 disks say that"},
		"no disk at all":       {func(r *rig, _ *fleet.Order) { r.facts = nil }, "has no disk"},
		"for another node":     {func(_ *rig, o *fleet.Order) { o.Node = "n-x" }, "another machine"},
		"ended":                {func(r *rig, o *fleet.Order) { o.NotAfter = r.now }, "it ended on"},
		"withdrawn":            {func(r *rig, _ *fleet.Order) { r.withdrawn["o-1"] = true }, "withdrawn"},
		"wrong clock":          {func(r *rig, _ *fleet.Order) { r.timeless = true }, "did not tell me the time"},
		"unknown image":        {func(_ *rig, o *fleet.Order) { o.Image.SHA256 = make([]byte, 32) }, "manifest did not come"},
		"forged manifest":      {func(r *rig, _ *fleet.Order) { r.pub = ed25519.PublicKey(filler(7, 32)) }, "manifest did not come"},
		"another architecture": {func(r *rig, _ *fleet.Order) { r.resign(func(m *firmware.Manifest) { m.Arch = "arm64" }) }, "is for arm64"},
		"not one for a disk": {func(r *rig, _ *fleet.Order) {
			r.resign(func(m *firmware.Manifest) { m.Kind, m.Slot = fleet.ImageRecovery, nil })
		}, "not one for a disk"},
		"somebody has it open":  {func(r *rig, _ *fleet.Order) { r.busy["/dev/vda"] = true }, "in use"},
		"a disk that is small":  {func(r *rig, o *fleet.Order) { r.facts[0].SizeBytes = 1e9; o.Disk.SizeBytes = 1e9 }, "at least"},
		"order of another kind": {func(_ *rig, o *fleet.Order) { o.Kind = fleet.OrderDowngrade }, "no order"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			o := r.order("o-1", fleet.OrderInstall)
			c.change(r, &o)
			r.orders = []fleet.Order{o}
			i := r.start()
			if err := r.live(i); err != nil {
				t.Fatal(err)
			}
			if n := i.Now(); !strings.Contains(n.Reason, c.say) {
				t.Errorf("it says %q (%s), want %q", n.Reason, n.State, c.say)
			}
			r.untouched("/dev/vda")
			r.untouched("/dev/vdb")
			if r.restarted || r.done["o-1"] == fleet.OrderDone {
				t.Error("it says that it is done")
			}
		})
	}
}

func (r *rig) resign(change func(*firmware.Manifest)) {
	r.t.Helper()
	change(&r.image)
	key := ed25519.NewKeyFromSeed(filler(9, ed25519.SeedSize))
	r.pub = key.Public()
	sign := func(m firmware.Manifest) []byte {
		payload, err := m.JSON()
		if err != nil {
			r.t.Fatal(err)
		}
		e, err := statement.Sign(firmware.ManifestType, payload, key)
		if err != nil {
			r.t.Fatal(err)
		}
		b, err := json.Marshal(e)
		if err != nil {
			r.t.Fatal(err)
		}
		return b
	}
	r.signed, r.recoverySigned = sign(r.image), sign(r.recovery)
}

// The system's documents are not complete: all is written, and nothing starts
// before they are.
func TestInstallWaitsForDocuments(t *testing.T) {
	r := newRig(t)
	r.orders, r.missing = []fleet.Order{r.order("o-1", fleet.OrderInstall)}, "the charter did not come yet"
	i := r.start()
	if err := r.live(i); err != nil || !strings.Contains(i.Now().Reason, "charter") {
		t.Fatalf("%+v %v", i.Now(), err)
	}
	if out, err := r.boots(r.disks["/dev/vda"]); err != nil || out.File != "" {
		t.Fatalf("%+v %v", out, err)
	}
	r.missing = ""
	if err := r.live(i); err != nil {
		t.Fatal(err)
	}
	r.installed()
}

func TestWipeAndRecover(t *testing.T) {
	r := newRig(t)
	r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	r.installed()
	r.orders = append(r.orders, r.order("o-2", fleet.OrderWipe), r.order("o-3", fleet.OrderRecover))
	i := r.start()
	if err := r.live(i); err != nil {
		t.Fatal(err)
	}
	// The newest one settles what came before it.
	if r.done["o-3"] != fleet.OrderDone || r.done["o-2"] == fleet.OrderDone {
		t.Errorf("%v", r.done)
	}
	r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall), r.order("o-4", fleet.OrderWipe)}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	if out, err := r.boots(r.disks["/dev/vda"]); err != nil || out.File != "" || r.done["o-4"] != fleet.OrderDone || r.restarted {
		t.Errorf("after the wipe: %+v %v %v", out, err, r.done)
	}
	r.untouched("/dev/vdb")
}

// The power is cut before and after each action, again and again: what is on
// the disk starts nothing that is not whole, and the install ends well.
func TestCutAtEachAction(t *testing.T) {
	all := newRig(t)
	all.orders = []fleet.Order{all.order("o-1", fleet.OrderInstall)}
	if err := all.live(all.start()); err != nil {
		t.Fatal(err)
	}
	for point := range all.points {
		r := newRig(t)
		r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
		n := 0
		r.cut = func(p string) error {
			if p == point {
				if n++; n <= 1 {
					return errCut
				}
			}
			return nil
		}
		for range 6 {
			err := r.live(r.start())
			if err != nil && !errors.Is(err, errCut) {
				t.Fatalf("%s: %v", point, err)
			}
			if _, err := r.boots(r.disks["/dev/vda"]); err != nil {
				t.Fatalf("%s: %v", point, err)
			}
			if r.restarted {
				break
			}
		}
		if n == 0 {
			t.Fatalf("%s was not reached", point)
		}
		r.installed()
	}
	t.Logf("%d points", len(all.points))
}

// Every write of an install is recorded; the machine is looked at as each
// power cut would leave it: after every write in order, and with the writes
// since the last flush arrived in any choice. It never starts what is not
// whole, and recovery always ends the install.
func TestPowerCutsOfInstall(t *testing.T) {
	// All of it takes a minute: MUSTER_VM_TESTS=long has time for that.
	seeds := uint64(2)
	if os.Getenv("MUSTER_VM_TESTS") == "long" {
		seeds = 20
	}
	r := newRig(t)
	r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
	d := r.disks["/dev/vda"]
	base := d.Clone()
	d.Record()
	r.cut = func(p string) error { d.Point(p); return nil }
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	r.installed()
	log := slices.Clone(d.Log)
	// The points that matter are those around flushes and inside of them; the
	// bulk of the image is alike.
	var cuts []int
	perPoint := map[string]int{}
	for i, w := range log {
		near := w.Flush || i > 0 && log[i-1].Flush || i+1 < len(log) && log[i+1].Flush
		if near || i%997 == 0 {
			cuts = append(cuts, i+1)
			perPoint[w.Point]++
		}
	}
	t.Logf("%d writes of sectors and flushes, %d cuts at %d points, %d seeds", len(log), len(cuts), len(perPoint), seeds)
	if len(cuts) < 60 {
		t.Fatalf("only %d cuts", len(cuts))
	}
	started, rested, onDisk := 0, 0, 0
	for _, n := range cuts {
		for seed := range seeds {
			var rng *rand.Rand
			if seed > 0 {
				rng = rand.New(rand.NewPCG(uint64(n), seed))
			}
			left := disktest.Cut(base, log, n, rng)
			out, err := r.boots(left)
			if err != nil {
				t.Fatalf("cut after %d of %d (%s), seed %d: %v\n%s", n, len(log), log[n-1].Point, seed, err, strings.Join(out.Steps, "\n"))
			}
			switch {
			case startsSystem(out):
				started++
				continue
			case out.File != "":
				onDisk++
			}
			rested++
			// Recovery comes by the network and goes on; for some, since it
			// takes a moment each.
			if seed > 1 || n%7 != 0 {
				continue
			}
			again := newRig(t)
			again.orders = []fleet.Order{again.order("o-1", fleet.OrderInstall)}
			again.disks["/dev/vda"] = left
			if err := again.live(again.start()); err != nil {
				t.Fatalf("cut after %d (%s), seed %d: recovery does not end the install: %v", n, log[n-1].Point, seed, err)
			}
			again.installed()
		}
	}
	t.Logf("%d of the cuts start the new system, %d recovery, %d of these from the disk", started, rested, onDisk)
	if started == 0 || rested == onDisk || onDisk == 0 {
		t.Error("the cuts show nothing")
	}
}

func TestHandOver(t *testing.T) {
	e := efi.NewESP(t.TempDir())
	if h, err := ReadHandOver(e); err != nil || h.Site != nil || h.Documents != nil {
		t.Fatalf("nothing there: %+v %v", h, err)
	}
	want := HandOver{Site: []byte("{}"), Identity: []byte("[]"), Documents: [][]byte{[]byte("a"), []byte("b")}}
	files, err := want.Files()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		if err := e.PutBytes(name, b); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ReadHandOver(e)
	if err != nil || !bytes.Equal(got.Site, want.Site) || len(got.Documents) != 2 || string(got.Documents[1]) != "b" {
		t.Fatalf("%+v %v", got, err)
	}
	if err := e.PutBytes(HandOverDocuments, []byte("{")); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadHandOver(e); err == nil {
		t.Error("half a file was read")
	}
}

func FuzzReadHandOver(f *testing.F) {
	b, err := json.Marshal(map[string][]string{"envelopes": {base64.StdEncoding.EncodeToString([]byte("x"))}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"envelopes":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e := efi.NewESP(t.TempDir())
		if err := e.PutBytes(HandOverDocuments, b); err != nil {
			t.Skip()
		}
		if h, _ := ReadHandOver(e); len(h.Documents) > maxDocuments {
			t.Fatal("too many")
		}
	})
}

// What people see of the writing goes one way: the hash tree comes behind the
// file system, and the hundredth part is the last.
func TestPercentGoesUp(t *testing.T) {
	slot := &firmware.SlotImage{Root: firmware.File{Size: 160 << 20}, Verity: firmware.File{Size: 1 << 20}}
	i := &Installer{manifest: &firmware.Manifest{Slot: slot}}
	i.show(func(n *Now) { n.State = firmware.WritingSystem })
	last := 0
	for _, p := range [][2]int64{{0, slot.Root.Size}, {80 << 20, slot.Root.Size}, {slot.Root.Size, slot.Root.Size}, {0, slot.Verity.Size}, {slot.Verity.Size, slot.Verity.Size}} {
		i.progress(p[0], p[1], "")
		if n := i.Now().Percent; n < last || n > 100 {
			t.Errorf("after %d of %d it says %d %%, before %d %%", p[0], p[1], n, last)
		} else {
			last = n
		}
	}
	if last != 100 {
		t.Errorf("at the end it says %d %%", last)
	}
}

// spend makes the system of slot A one that never came up.
func (r *rig) spend() {
	r.t.Helper()
	files, umount, err := r.Mount(r.facts[0])
	if err != nil {
		r.t.Fatal(err)
	}
	entry := r.image.Entry()
	if err := efi.On(files).Rename(firmware.CountedName(entry, firmware.Tries, 0), firmware.CountedName(entry, 0, firmware.Tries)); err != nil {
		r.t.Fatal(err)
	}
	if err := umount(); err != nil {
		r.t.Fatal(err)
	}
}

// A machine whose system never came up ends in the recovery image of its own
// disk, and is installed again from there, with the network boot host away: at
// no moment nothing starts any more.
func TestInstallAgainFromTheDisk(t *testing.T) {
	r := newRig(t)
	r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	r.spend()
	out, err := r.boots(r.disks["/dev/vda"])
	if err != nil || !firmware.IsRecovery(path.Base(out.File)) {
		t.Fatalf("it starts %q (%v)", out.File, err)
	}
	r.orders = []fleet.Order{r.order("o-2", fleet.OrderInstall)}
	r.cut = func(p string) error {
		if out, err := r.boots(r.disks["/dev/vda"]); err != nil || out.File == "" {
			t.Fatalf("%s: nothing would start: %v\n%s", p, err, strings.Join(out.Steps, "\n"))
		}
		return nil
	}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	if out, err := r.boots(r.disks["/dev/vda"]); err != nil || !startsSystem(out) || r.done["o-2"] != fleet.OrderDone {
		t.Fatalf("%+v %v %v", out, err, r.done)
	}
}

// Another recovery image takes the place of the one before, and only when the
// firmware knows it the old one goes. None to bring leaves what is there.
func TestRecoveryImageIsReplaced(t *testing.T) {
	r := newRig(t)
	r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	b := filler(6, recoverySize)
	r.recovery.Version, r.recovery.SHA256 = "8+x", sha256.Sum256(b)
	r.blobs[fetch.Digest(r.recovery.SHA256)] = b
	r.resign(func(*firmware.Manifest) {})
	r.orders = []fleet.Order{r.order("o-2", fleet.OrderInstall)}
	r.cut = func(p string) error {
		if p == "install.set-entries.begin" && !slices.Contains(r.names(), "recovery-7.efi") {
			t.Error("the old one is gone before the firmware knows the new one")
		}
		return nil
	}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"edge-1+3.efi", "recovery-8_x.efi"}; !slices.Equal(r.names(), want) {
		t.Errorf("%q, want %q", r.names(), want)
	}
	r.nameless, r.cut = true, nil
	r.orders = []fleet.Order{r.order("o-3", fleet.OrderInstall)}
	if err := r.live(r.start()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"edge-1+3.efi", "recovery-8_x.efi"}; !slices.Equal(r.names(), want) || r.done["o-3"] != fleet.OrderDone {
		t.Errorf("%q, want %q, %v", r.names(), want, r.done)
	}
	boot, err := efi.VarsOn(r.vars).Boot()
	if err != nil || len(boot.Order) != 3 {
		t.Errorf("%+v %v", boot, err)
	}
}

// A recovery image that is nowhere as a file, or that no release key signed: the
// machine gets its system all the same in the first case, and waits in the
// second, since somebody lies.
func TestRecoveryImageThatDoesNotCome(t *testing.T) {
	for name, c := range map[string]struct {
		change    func(*rig)
		installed bool
		say       string
	}{
		"not pushed":     {func(r *rig) { delete(r.blobs, fetch.Digest(r.recovery.SHA256)) }, true, ""},
		"for arm64":      {func(r *rig) { r.recovery.Arch = "arm64"; r.resign(func(*firmware.Manifest) {}) }, true, ""},
		"not in charter": {func(r *rig) { r.nameless = true }, true, ""},
		"forged": {func(r *rig) {
			// The envelope of another payload: nobody signed this one.
			at := bytes.Index(r.recoverySigned, []byte(`"payload":"`)) + 100
			r.recoverySigned[at] ^= 2
		}, false, "did not come"},
		"a slot's": {func(r *rig) {
			r.recovery.Kind, r.recovery.Slot, r.recovery.Measurements.Loader = fleet.ImageSlot, r.image.Slot, firmware.Digest{4}
			r.resign(func(*firmware.Manifest) {})
		}, false, "kind slot"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			c.change(r)
			r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
			err := r.live(r.start())
			if c.installed {
				if err != nil || !r.restarted || !slices.Equal(r.names(), []string{"edge-1+3.efi"}) {
					t.Errorf("%v, restarted %v, %q", err, r.restarted, r.names())
				}
				return
			}
			if err == nil || r.restarted || !strings.Contains(err.Error(), c.say) {
				t.Errorf("%v, restarted %v", err, r.restarted)
			}
			if out, err := r.boots(r.disks["/dev/vda"]); err != nil || out.File != "" {
				t.Errorf("%+v %v", out, err)
			}
		})
	}
}

// Data of the system before stays only if the order says so; and it goes when
// nothing is left that could start without it.
func TestDataStaysOrGoes(t *testing.T) {
	for _, keep := range []bool{true, false} {
		r := newRig(t)
		r.orders = []fleet.Order{r.order("o-1", fleet.OrderInstall)}
		if err := r.live(r.start()); err != nil {
			t.Fatal(err)
		}
		data, err := r.Part(r.facts[0], firmware.LabelData)
		if err != nil {
			t.Fatal(err)
		}
		old := []byte("LUKS and what belongs to it")
		for _, at := range []int64{0, 20 << 20} {
			if _, err := data.WriteAt(old, at); err != nil {
				t.Fatal(err)
			}
		}
		o := r.order("o-2", fleet.OrderInstall)
		o.KeepData = keep
		r.orders = []fleet.Order{o}
		erased := false
		r.cut = func(p string) error {
			if p != "install.erase-data.begin" {
				return nil
			}
			erased = true
			if out, err := r.boots(r.disks["/dev/vda"]); err != nil || startsSystem(out) {
				t.Errorf("a system would start without its data: %+v %v", out, err)
			}
			return nil
		}
		if err := r.live(r.start()); err != nil || r.done["o-2"] != fleet.OrderDone {
			t.Fatal(err, r.done)
		}
		for _, at := range []int64{0, 20 << 20} {
			b := make([]byte, len(old))
			if _, err := data.ReadAt(b, at); err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(b, old) != keep || erased == keep {
				t.Errorf("keep %v: at %d there is %q, erased %v", keep, at, b, erased)
			}
		}
	}
}
