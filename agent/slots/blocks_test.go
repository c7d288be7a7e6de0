package slots

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/agent/install"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/disk/disktest"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
)

// The rig below the keeper is a disk in memory whose every write of a sector
// is recorded, with the flushes between: real FAT32, real record, real writing
// of slots. What a power cut leaves, at any point and with the writes since the
// last flush arrived in any choice, is started by systemd-boot's model.

var update = flag.Bool("update", false, "write docs/reference/power-cut-points.md")

// Where things are on the disk.
const (
	blocksSize = 32 << 20
	metaAt     = 1 << 20
	metaLen    = 2 * firmware.MetaArea
	espAt      = 16 << 20
	espLen     = 9 << 20
)

var slotAt = [2]struct{ root, verity int64 }{{4 << 20, 6 << 20}, {8 << 20, 10 << 20}}

const (
	slotLen  = 1 << 20
	testRoot = 40 << 10
	testPart = 16 << 10
	recovery = "recovery-1.efi"
)

// system is an image.
type system struct {
	n            byte
	q            quality
	uki          []byte
	root, verity []byte
	img          firmware.SlotImage
	target       firmware.Target
}

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed, 99}).Read(b)
	return b
}

func newSystem(n byte, q quality) *system {
	s := &system{n: n, q: q, uki: noise(n, 3072), root: noise(n+50, testRoot), verity: noise(n+100, 4096)}
	file := func(b []byte) firmware.File {
		return firmware.File{File: "x", Size: int64(len(b)), SHA256: sha256.Sum256(b)}
	}
	s.img = firmware.SlotImage{Root: file(s.root), Verity: file(s.verity), ChunkSize: testPart}
	for off := 0; off < len(s.root); off += testPart {
		s.img.Chunks = append(s.img.Chunks, sha256.Sum256(s.root[off:min(off+testPart, len(s.root))]))
	}
	s.target = firmware.Target{Image: sha256.Sum256(s.uki), Name: "edge", Version: fmt.Sprint(n), Entry: fmt.Sprintf("edge-%d.efi", n),
		Size: s.img.WriteSize(), BootSize: int64(len(s.uki))}
	return s
}

func (s *system) ref() *fleet.ImageRef {
	return &fleet.ImageRef{Name: "edge", Version: s.target.Version, Arch: "amd64", SHA256: s.target.Image[:]}
}

// bug is something wrong that the rig must find.
type bug int

const (
	noBug bug = iota
	noteFirst
	noFlush
	entryLeft
	lastChunkLate
	recordUnflushed
	entryFirst
)

var bugNames = map[bug]string{
	noteFirst: "a chunk is noted before it is written", noFlush: "nothing is flushed", entryLeft: "the entry of the slot that is overwritten is left",
	lastChunkLate: "a chunk is written at the restart", recordUnflushed: "the record is not flushed",
	entryFirst: "the boot file gets its final name at once",
}

// ack is what was acknowledged up to an entry of the log.
type ack struct {
	at      int
	seq     uint64
	oneShot string
	phase   int
}

// blocks is the machine.
type blocks struct {
	t       *testing.T
	bug     bug
	d       *disktest.Disk
	fat     *disktest.FAT
	all     map[firmware.Digest]*system
	oneShot string
	acks    []ack
	phase   int
	label   string
	counts  map[string]int
	late    func() error
	left    []string // files that are to be removed, with bug entryLeft

	wanted  *system
	orders  []fleet.Order
	done    []string
	now, up time.Duration
	dir     string
	lives   int
	log     []string
}

func newBlocks(t *testing.T, b bug) *blocks {
	t.Helper()
	r := &blocks{t: t, bug: b, d: disktest.New(blocksSize, 512), all: map[firmware.Digest]*system{}, counts: map[string]int{}, dir: t.TempDir()}
	for n := byte(1); n < 5; n++ {
		q := fine
		if n == 3 {
			q = sick
		}
		s := newSystem(n, q)
		r.all[s.target.Image] = s
	}
	r.must(disk.FormatESP(r.part(espAt, espLen)))
	r.open()
	e := efi.On(r.fat)
	one := r.system(1)
	r.must(e.PutBytes(firmware.LoaderFile, []byte("loader")))
	r.must(e.PutBytes(firmware.LoaderCopy, []byte("loader")))
	r.must(e.PutBytes(path.Join(bootmodel.Entries, recovery), []byte("rescue")))
	r.must(e.PutBytes(path.Join(bootmodel.Entries, one.target.Entry), one.uki))
	r.must(disk.WriteChunk(r.part(slotAt[0].root, slotLen), 0, one.root))
	r.must(disk.WriteChunk(r.part(slotAt[0].verity, slotLen), 0, one.verity))
	m := firmware.Meta{Slots: [2]firmware.Slot{{State: firmware.SlotGood, Image: one.target.Image, Name: "edge", Version: "1", Entry: one.target.Entry}}}
	for i := range uint64(2) {
		_, err := disk.WriteMeta(r.part(metaAt, metaLen), m, i)
		r.must(err)
	}
	return r
}

func (r *blocks) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatalf("%v\n%s", err, strings.Join(r.log[max(0, len(r.log)-40):], "\n"))
	}
}

func (r *blocks) system(n byte) *system {
	for _, s := range r.all {
		if s.n == n {
			return s
		}
	}
	r.t.Fatalf("no system %d", n)
	return nil
}

// lazy does not flush.
type lazy struct{ disk.Section }

func (lazy) Sync() error { return nil }

func (r *blocks) part(at, size int64) disk.Device {
	s, err := disk.Sub(r.d, at, size)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.bug == noFlush && r.fat != nil || r.bug == recordUnflushed && at == metaAt {
		return lazy{s}
	}
	return s
}

func (r *blocks) open() {
	r.must(oneTable(r.d))
	f, err := disktest.OpenFAT(r.part(espAt, espLen))
	r.must(err)
	r.fat = f
}

// at names what is written from here on.
func (r *blocks) at(point string) {
	name := fmt.Sprintf("%s: %s", r.label, point)
	r.counts[name]++
	r.d.Point(fmt.Sprintf("%s %d", name, r.counts[name]))
}

func (r *blocks) note() { r.acks = append(r.acks, ack{len(r.d.Log), r.seq(), r.oneShot, r.phase}) }

func (r *blocks) seq() uint64 {
	m, err := disk.ReadMeta(r.part(metaAt, metaLen))
	r.must(err)
	return m.Seq
}

type blockRecord struct{ *blocks }

func (r blockRecord) Read() (firmware.Meta, error) { return disk.ReadMeta(r.part(metaAt, metaLen)) }

func (r blockRecord) Write(m firmware.Meta) error {
	d := r.part(metaAt, metaLen)
	last, err := disk.ReadMeta(d)
	if err != nil {
		return err
	}
	if _, err = disk.WriteMeta(d, m, last.Seq); err == nil {
		r.note()
	}
	return err
}

type blockESP struct{ *blocks }

func (r blockESP) esp() *efi.ESP { return efi.On(r.fat) }

func (r blockESP) Look() (v View, err error) {
	if v.Files, err = r.esp().BootFiles(); err != nil {
		return v, err
	}
	v.Files = slices.DeleteFunc(v.Files, func(f firmware.BootFile) bool { return slices.Contains(r.left, f.Name) })
	v.Writable, v.Free = true, 1<<30
	m := machineOf(r.fat, r.all)
	if out := m.PowerOn(false); out.File != "" {
		v.Next, _, _ = bootmodel.Counter(path.Base(out.File))
	}
	return v, nil
}

func (r blockESP) Remove(name string) error {
	if r.bug == entryLeft && strings.HasPrefix(name, "edge") {
		r.left = append(r.left, name)
		return nil
	}
	return r.esp().Remove(name)
}

func (r blockESP) Rename(from, to string) error { return r.esp().Rename(from, to) }

func (r blockESP) Stage(_ context.Context, name string, want firmware.Digest, size int64, from io.Reader) error {
	if r.bug == entryFirst {
		b, err := io.ReadAll(from)
		if err != nil {
			return err
		}
		f, err := r.fat.Create(path.Join(bootmodel.Entries, strings.TrimPrefix(name, firmware.StagedPrefix)))
		if err != nil {
			return err
		}
		if _, err := f.Write(b); err != nil {
			return err
		}
		from = bytes.NewReader(b)
	}
	return r.esp().Stage(name, from, size, want)
}

func (r blockESP) Whole(name string, want firmware.Digest, size int64) (bool, error) {
	return r.esp().Whole(name, size, want)
}

type blockLoader struct{ *blocks }

func (r blockLoader) SetOneShot(pattern string) error {
	r.oneShot = pattern
	r.note()
	return nil
}

func (r blockLoader) Restart(context.Context, string) error {
	for _, name := range r.left {
		if err := efi.On(r.fat).Remove(name); err != nil {
			return err
		}
	}
	r.left = nil
	if r.late != nil {
		err := r.late()
		r.late = nil
		return err
	}
	return nil
}

// Name and Open implement fetch.Source.
func (r *blocks) Name() string { return "centre" }

func (r *blocks) Open(_ context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	for _, s := range r.all {
		for _, b := range [][]byte{s.root, s.verity, s.uki} {
			if sha256.Sum256(b) == d {
				return io.NopCloser(bytes.NewReader(b[off:min(off+n, int64(len(b)))])), nil
			}
		}
	}
	return nil, fetch.ErrMissing
}

type blockImages struct{ *blocks }

func (r blockImages) Write(ctx context.Context, slot firmware.SlotID, img firmware.Digest, from int64, note func(int64) error) error {
	s := r.all[img]
	root := r.part(slotAt[slot].root, slotLen)
	if r.bug == lastChunkLate && slot == firmware.SlotB {
		if err := disk.WriteChunk(root, 0, make([]byte, testPart)); err != nil {
			return err
		}
		r.late = func() error { return disk.WriteChunk(root, 0, s.root[:testPart]) }
		if from == 0 {
			from = testPart
		}
	}
	f := &fetch.Fetcher{Sources: func() []fetch.Source { return []fetch.Source{r.blocks} }}
	r.blocks.at("chunk")
	if r.bug == noteFirst {
		if err := note(s.img.Root.Size); err != nil { // and all of it
			return err
		}
	}
	return install.WriteSlot(ctx, f, s.img, root, r.part(slotAt[slot].verity, slotLen), from, func(n int64) error {
		r.blocks.at("note of a chunk")
		err := note(n)
		r.blocks.at("chunk")
		return err
	})
}

func (r blockImages) Boot(_ context.Context, img firmware.Digest) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(r.all[img].uki)), nil
}

type blockSite struct{}

func (blockSite) NeedsSnapshot(firmware.Digest) bool                   { return false }
func (blockSite) Snapshot(context.Context, firmware.Digest) error      { return nil }
func (blockSite) Turn(context.Context, firmware.Target) (bool, string) { return true, "" }
func (blockSite) Settled(context.Context, firmware.Digest, string, *firmware.FailedImage) error {
	return nil
}
func (blockSite) Judging(context.Context) {}

// machineOf is what the firmware sees on a FAT.
func machineOf(f *disktest.FAT, all map[firmware.Digest]*system) *bootmodel.Machine {
	m := &bootmodel.Machine{ESP: bootmodel.ESP{}, Order: []bootmodel.Target{{File: firmware.LoaderFile}, {File: firmware.LoaderCopy}, {Network: true}}}
	read := func(name string) []byte {
		x, err := f.Open(name)
		if err != nil {
			return nil
		}
		defer x.Close()
		b, _ := io.ReadAll(io.LimitReader(x, 1<<16))
		return b
	}
	for _, name := range []string{firmware.LoaderFile, firmware.LoaderCopy} {
		if b := read(name); b != nil {
			whole := string(b) == "loader"
			m.ESP[name] = bootmodel.File{Starts: whole, Loader: whole, Garbled: !whole}
		}
	}
	names, err := f.List(bootmodel.Entries)
	if err != nil {
		return m
	}
	for _, n := range names {
		b := read(path.Join(bootmodel.Entries, n))
		file := bootmodel.File{Garbled: len(b) == 0}
		if s := all[sha256.Sum256(b)]; s != nil {
			file = bootmodel.File{Starts: true, Release: &bootmodel.Release{ID: "edge", VersionID: s.target.Version, PrettyName: "edge"}}
		} else if string(b) == "rescue" {
			file = bootmodel.File{Starts: true, Release: &bootmodel.Release{ID: "zz-recovery", VersionID: "1", PrettyName: "recovery"}}
		} else if len(b) > 0 {
			// Half a file may have sound headers: that is the worse case.
			base, _, _ := bootmodel.Counter(n)
			v := strings.TrimSuffix(strings.TrimPrefix(base, "edge-"), ".efi")
			file = bootmodel.File{Release: &bootmodel.Release{ID: "edge", VersionID: v, PrettyName: "edge"}}
		}
		m.ESP[path.Join(bootmodel.Entries, n)] = file
	}
	return m
}

// oneTable makes the second file allocation table the first one, as firmware
// and kernel see it: they read the first. The library of this rig compares.
func oneTable(d *disktest.Disk) error {
	head := make([]byte, 512)
	if _, err := d.ReadAt(head, espAt); err != nil {
		return err
	}
	from := int64(binary.LittleEndian.Uint16(head[14:])) * 512
	size := int64(binary.LittleEndian.Uint32(head[36:])) * 512
	if from == 0 || size == 0 || from+2*size > espLen {
		return errors.New("the head of the FAT is damaged")
	}
	b := make([]byte, size)
	if _, err := d.ReadAt(b, espAt+from); err != nil {
		return err
	}
	_, err := d.WriteAt(b, espAt+from+size)
	return err
}

// starts says what a power-on of what is on d starts: a system and its slot, or
// recovery; an error is a box that somebody must visit.
func starts(d *disktest.Disk, all map[firmware.Digest]*system, oneShot string) (*system, firmware.SlotID, bootmodel.Outcome, *bootmodel.Machine, error) {
	esp, err := disk.Sub(d, espAt, espLen)
	if err != nil {
		return nil, 0, bootmodel.Outcome{}, nil, err
	}
	if err := oneTable(d); err != nil {
		return nil, 0, bootmodel.Outcome{}, nil, err
	}
	f, err := disktest.OpenFAT(esp)
	if err != nil {
		return nil, 0, bootmodel.Outcome{}, nil, err
	}
	m := machineOf(f, all)
	m.OneShot = oneShot
	out := m.PowerOn(false)
	if out.Menu || out.Network || out.File == "" {
		return nil, 0, out, m, errors.New("nothing on the disk starts")
	}
	if path.Base(out.File) == recovery {
		return nil, 0, out, m, nil
	}
	x, err := f.Open(beforeCount(f, out.File))
	if err != nil {
		return nil, 0, out, m, err
	}
	b, err := io.ReadAll(x)
	_ = x.Close()
	s := all[sha256.Sum256(b)]
	if err != nil || s == nil {
		return nil, 0, out, m, fmt.Errorf("%s starts and is torn (%w)", out.File, err)
	}
	// Whatever the loader could start has its slot, not only what comes first.
	var slot firmware.SlotID
	names, err := f.List(bootmodel.Entries)
	if err != nil {
		return nil, 0, out, m, err
	}
	for _, n := range names {
		x, err := f.Open(path.Join(bootmodel.Entries, n))
		if err != nil || strings.HasPrefix(n, ".") {
			continue
		}
		b, _ := io.ReadAll(x)
		_ = x.Close()
		o := all[sha256.Sum256(b)]
		if o == nil {
			continue
		}
		id, ok := slotOf(d, o)
		if !ok {
			return nil, 0, out, m, fmt.Errorf("%s can be started, and no slot has its root", n)
		}
		if o == s {
			slot = id
		}
	}
	return s, slot, out, m, nil
}

// slotOf finds the slot with the root and the tree of a system.
func slotOf(d *disktest.Disk, s *system) (firmware.SlotID, bool) {
	root, tree := make([]byte, len(s.root)), make([]byte, len(s.verity))
	for id, at := range slotAt {
		_, err1 := d.ReadAt(root, at.root)
		_, err2 := d.ReadAt(tree, at.verity)
		if err1 == nil && err2 == nil && bytes.Equal(root, s.root) && bytes.Equal(tree, s.verity) {
			return firmware.SlotID(id), true
		}
	}
	return 0, false
}

// beforeCount is the name that a file has on the disk, where the model has
// counted a try already.
func beforeCount(f *disktest.FAT, full string) string {
	base, _, _ := bootmodel.Counter(path.Base(full))
	names, err := f.List(path.Dir(full))
	if err != nil {
		return full
	}
	for _, n := range names {
		if b, _, _ := bootmodel.Counter(n); b == base && !strings.HasPrefix(n, ".") {
			return path.Join(path.Dir(full), n)
		}
	}
	return full
}

// powerOn starts the box: the loader counts on the ESP.
func (r *blocks) powerOn() (*system, firmware.SlotID, error) {
	r.now += time.Minute
	r.up = r.now
	s, slot, out, m, err := starts(r.d, r.all, r.oneShot)
	r.log = append(r.log, "power on: "+strings.Join(out.Steps, "; "))
	if err != nil {
		return nil, 0, err
	}
	r.oneShot = ""
	r.open()
	names, err := r.fat.List(bootmodel.Entries)
	r.must(err)
	r.at("the loader counts")
	for _, n := range names {
		if _, same := m.ESP[path.Join(bootmodel.Entries, n)]; same {
			continue
		}
		base, _, _ := bootmodel.Counter(n)
		for full := range m.ESP {
			if b, _, _ := bootmodel.Counter(path.Base(full)); b == base && path.Dir(full) == bootmodel.Entries && !slices.Contains(names, path.Base(full)) {
				r.must(efi.On(r.fat).Rename(n, path.Base(full)))
			}
		}
	}
	r.note()
	return s, slot, nil
}

func (r *blocks) health(s *system) firmware.Health {
	up := r.now - r.up
	return firmware.Health{Up: up, RootVerified: true, DataMounted: true, Identity: true, Wanted: true, Process: s.q != sick && up > 30*time.Second,
		NodeReady: up > time.Minute && s.q != sick, Server: true, Member: true, Quorum: true, APIReachable: true}
}

// run is one life of the keeper; true: it came to rest.
func (r *blocks) run(s *system, slot firmware.SlotID) bool {
	r.lives++
	k, err := New(Config{
		Record: blockRecord{r}, ESP: blockESP{r}, Loader: blockLoader{r}, Images: blockImages{r}, Site: blockSite{},
		Running: func() (firmware.SlotID, error) { return slot, nil },
		Health:  func(context.Context) firmware.Health { return r.health(s) },
		Wanted: func(context.Context) Wanted {
			return Wanted{Image: r.wanted.ref(), Stack: fmt.Sprint("stack", r.wanted.n), Orders: r.orders}
		},
		Target: func(_ context.Context, ref fleet.ImageRef) (firmware.Target, error) {
			return r.all[firmware.Digest(ref.SHA256)].target, nil
		},
		Done: func(o fleet.Order, _ string) error { r.done = append(r.done, o.ID); return nil },
		Dir:  filepath.Join(r.dir, "data"), Run: filepath.Join(r.dir, fmt.Sprint("run", r.lives)),
		cut: func(point string) error {
			point = strings.TrimPrefix(point, "slots.")
			if name, ok := strings.CutSuffix(point, ".begin"); ok {
				r.at(name)
			}
			return nil
		},
	})
	r.must(err)
	for idle := 0; ; {
		pause, err := k.Step(context.Background())
		r.log = append(r.log, fmt.Sprintf("  %s %s: %s (%v)", r.now, k.Now().State, k.Now().Reason, err))
		if errors.Is(err, errRestart) {
			return false
		}
		r.must(err)
		if r.now += pause; pause == idlePause {
			r.now += 105 * time.Second
			if idle++; idle > 6 && r.now-r.up > 16*time.Minute && k.Now().State != firmware.Judging.String() {
				return true
			}
		} else {
			idle = 0
		}
		if len(r.log) > 5000 {
			r.must(errors.New("it never rests"))
		}
	}
}

// rest starts the box until it rests, and returns the version that runs.
func (r *blocks) rest() byte {
	r.t.Helper()
	n, err := r.rests()
	r.must(err)
	return n
}

func (r *blocks) rests() (byte, error) {
	for range 40 {
		s, slot, err := r.powerOn()
		if err != nil {
			return 0, err
		}
		if s == nil {
			continue
		}
		if r.run(s, slot) {
			return s.n, nil
		}
	}
	return 0, errors.New("it never rests")
}

// chapters are what is done to the box, one after the other, and what runs
// afterwards.
var chapters = []struct {
	name   string
	want   byte
	orders []fleet.Order
	ends   byte
}{
	{"update", 2, nil, 2},
	{"bad update", 3, nil, 2},
	{"order back to 1", 3, []fleet.Order{{ID: "back", Kind: fleet.OrderDowngrade}}, 1},
	{"order into recovery", 3, []fleet.Order{{ID: "back", Kind: fleet.OrderDowngrade}, {ID: "rescue", Kind: fleet.OrderRecover, Reason: "test"}}, 1},
	{"clear failed", 3, []fleet.Order{{ID: "back", Kind: fleet.OrderDowngrade}, {ID: "clear", Kind: fleet.OrderClearFailed}}, 1},
	{"next update", 4, nil, 4},
}

func (r *blocks) chapter(i int) {
	c := chapters[i]
	r.phase, r.label = i, c.name
	r.wanted = r.system(c.want)
	r.orders = slices.Clone(c.orders)
	for j := range r.orders {
		switch r.orders[j].Kind {
		case fleet.OrderDowngrade:
			r.orders[j].Image = r.system(1).ref()
		case fleet.OrderClearFailed:
			r.orders[j].Digest = r.system(3).target.Image[:]
		}
	}
}

// tale plays all chapters and returns the disk as it was before.
func (r *blocks) tale() *disktest.Disk {
	r.t.Helper()
	base := r.d.Clone()
	r.d.Record()
	r.note()
	for i, c := range chapters {
		r.chapter(i)
		if got := r.rest(); got != c.ends {
			r.must(fmt.Errorf("%s: version %d runs, want %d", c.name, got, c.ends))
		}
	}
	return base
}

// judge looks at one power cut.
func judge(left *disktest.Disk, all map[firmware.Digest]*system, a ack) (string, error) {
	s, _, out, _, err := starts(left, all, a.oneShot)
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.Join(out.Steps, "; "))
	}
	p, err := disk.Sub(left, metaAt, metaLen)
	if err != nil {
		return "", err
	}
	m, err := disk.ReadMeta(p)
	if err != nil {
		return "", err
	}
	if m.Seq < a.seq {
		return "", fmt.Errorf("the record is number %d, and %d was acknowledged", m.Seq, a.seq)
	}
	if s == nil {
		if a.oneShot == "" && chapters[a.phase].name != "order into recovery" {
			return "", errors.New("recovery starts, and a sound system is there")
		}
		return "recovery", nil
	}
	return "version " + s.target.Version, nil
}

// acked is what counts after the first n entries of the log.
func (r *blocks) acked(n int) (a ack) {
	for _, x := range r.acks {
		if x.at > n {
			break
		}
		a = x
	}
	return a
}

type row struct {
	writes, flushes, cuts int
	outcomes              map[string]int
}

// cutAll cuts at every point with so many seeds; prefixes: also after each
// write in order. It returns the first box that must be visited.
func (r *blocks) cutAll(base *disktest.Disk, seeds int, prefixes bool) (map[string]*row, []string, error) {
	log := r.d.Log
	rows, order, places := map[string]*row{}, []string{}, map[string][]int{}
	for i, w := range log {
		x := rows[w.Point]
		if x == nil {
			x = &row{outcomes: map[string]int{}}
			rows[w.Point] = x
			order = append(order, w.Point)
		}
		if w.Flush {
			x.flushes++
		} else {
			x.writes++
		}
		places[w.Point] = append(places[w.Point], i+1)
	}
	look := func(n int, rng *rand.Rand) error {
		point := log[n-1].Point
		got, err := judge(disktest.Cut(base, log, n, rng), r.all, r.acked(n-1))
		if err != nil {
			return fmt.Errorf("cut at %q, after %d of %d writes: %w", point, n, len(log), err)
		}
		rows[point].cuts++
		rows[point].outcomes[got]++
		return nil
	}
	for k, point := range order {
		at := places[point]
		for seed := range seeds {
			rng := rand.New(rand.NewPCG(uint64(k), uint64(seed)))
			if err := look(at[rng.IntN(len(at))], rng); err != nil {
				return rows, order, fmt.Errorf("seed %d: %w", seed, err)
			}
		}
		if prefixes {
			for j, n := range at {
				// The bulk of a slot is alike.
				if len(at) > 40 && j%8 != 0 && j < len(at)-4 {
					continue
				}
				if err := look(n, nil); err != nil {
					return rows, order, err
				}
			}
		}
	}
	return rows, order, nil
}

const pointsFile = "../../docs/reference/power-cut-points.md"

// Every write of update, flip, bless, rollback and orders is cut at each named
// point with 20 seeds: the box starts a sound system, and what was acknowledged
// is there.
func TestPowerCutPoints(t *testing.T) {
	r := newBlocks(t, noBug)
	base := r.tale()
	rows, order, err := r.cutAll(base, 20, true)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	cuts := 0
	fmt.Fprintf(&b, pointsHead, len(order))
	for _, p := range order {
		x := rows[p]
		outs := slices.Sorted(maps.Keys(x.outcomes))
		cuts += x.cuts
		fmt.Fprintf(&b, "| %s | %d | %d | %s |\n", p, x.writes, x.flushes, strings.Join(outs, ", "))
	}
	t.Logf("%d points, %d writes and flushes, %d cuts\n%s", len(order), len(r.d.Log), cuts, b.String())
	if len(order) < 60 {
		t.Errorf("only %d points", len(order))
	}
	if *update {
		if err := os.WriteFile(pointsFile, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(pointsFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != b.String() {
		t.Errorf("%s is not what the rig says; write it with: go test ./agent/slots -run TestPowerCutPoints -update", pointsFile)
	}
}

const pointsHead = `# Points at which the power was cut

Written by ` + "`go test ./agent/slots -run TestPowerCutPoints -update`" + `. The keeper of a node's slots works on a disk in memory with a real FAT32, a real record and real
slots; each write of a sector and each flush is recorded. At each of the %d points below the power is cut with 20 seeds: somewhere inside, with the writes since the last
flush arrived in any choice; and after each write in order. What is left is started by the model of systemd-boot (` + "`firmware/bootmodel`" + `), which real systemd-boot was
compared with. A box holds when it starts a boot file that is whole with a slot that is whole, and when every record that was acknowledged is there. From
each fourth point (each with MUSTER_VM_TESTS=long) a box goes on to the end of its chapter. Six planted bugs of order and of flushing are found.

The number behind a name counts its occurrences in a chapter. Not in this table: install (` + "`TestPowerCutsOfInstall`" + ` of agent/install, its own points in the same way), the
journal of the cluster (` + "`TestPowerCut`, `TestKillAtEveryPoint`" + ` of agent/journal), and the firmware's variables, which are written by the firmware.

| chapter: point | sectors written | flushes | what starts after a cut here |
|---|---|---|---|
`

// goesOn starts the box as each point left it, and returns the first that does
// not end where its chapter ends.
func (r *blocks) goesOn(t *testing.T, base *disktest.Disk, step int) (n int, err error) {
	seen := map[string]bool{}
	for i, w := range r.d.Log {
		if seen[w.Point] {
			continue
		}
		seen[w.Point] = true
		if n++; n%step != 0 {
			continue
		}
		a := r.acked(i)
		left := disktest.Cut(base, r.d.Log, i+1, rand.New(rand.NewPCG(uint64(i), 5)))
		again := &blocks{t: t, all: r.all, counts: map[string]int{}, dir: t.TempDir(), oneShot: a.oneShot, d: left, bug: r.bug}
		again.chapter(a.phase)
		got, err := again.rests()
		if err != nil {
			return n, fmt.Errorf("cut at %q: it does not go on: %w", w.Point, err)
		}
		if want := chapters[a.phase].ends; got != want && !(chapters[a.phase].name == "clear failed" && got == 1) {
			return n, fmt.Errorf("cut at %q: version %d runs in the end, want %d", w.Point, got, want)
		}
	}
	return n, nil
}

// After each point a box goes on and ends where it should.
func TestPowerCutGoesOn(t *testing.T) {
	r := newBlocks(t, noBug)
	step := 4 // MUSTER_VM_TESTS=long has time for all
	if os.Getenv("MUSTER_VM_TESTS") == "long" {
		step = 1
	}
	n, err := r.goesOn(t, r.tale(), step)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d points, each %dth gone on from", n, step)
}

// The rig finds what it must.
func TestPowerCutRigFindsPlantedBugs(t *testing.T) {
	for b := noteFirst; b <= entryFirst; b++ {
		t.Run(bugNames[b], func(t *testing.T) {
			r := newBlocks(t, b)
			base := r.d.Clone()
			r.d.Record()
			r.note()
			for _, i := range []int{0, 1, 5} {
				r.chapter(i)
				if got := r.rest(); got != chapters[i].ends {
					t.Fatalf("without a power cut version %d runs", got)
				}
			}
			var err error
			if b == noteFirst { // what it breaks shows when the box goes on
				_, err = r.goesOn(t, base, 1)
			} else {
				_, _, err = r.cutAll(base, 20, false)
			}
			if err == nil {
				t.Fatal("it was not found")
			}
			t.Log("found:", err)
		})
	}
}
