package slots

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/fleet"
)

// quality is what a system does when it runs.
type quality int

const (
	fine    quality = iota // becomes healthy after a minute
	sick                   // comes up, k3s never does
	silent                 // dies before the agent runs
	without                // its cluster has no majority for an hour
)

var errCut = errors.New("the power is gone")

// rig is one machine under a Keeper: an ESP with systemd-boot's rules, the two
// areas of the record, two slots, a clock. The power can fail in each call.
type rig struct {
	t   *testing.T
	rng *rand.Rand
	m   bootmodel.Machine
	// meta is the partition.
	meta []byte
	// slots hold the image that is whole in them; part is how much of part's
	// image is there.
	slots [2]firmware.Digest
	// files say which image a boot file is, zero for a torn one.
	files     map[string]firmware.Digest
	qualities map[firmware.Digest]quality
	images    map[firmware.Digest]firmware.Target

	wanted     *fleet.ImageRef
	stack      string
	orders     []fleet.Order
	done       []string
	window     bool
	snapshots  map[firmware.Digest]bool
	told       []firmware.FailedImage
	settled    int
	toRecovery int
	// why is what the record said when recovery was started last.
	why string

	now, up time.Duration
	dead    bool
	// cutting is asked at each point of a change.
	cutting func(point string) bool
	written int64 // bytes fetched in all
	dir     string
	lives   int
	keeper  *Keeper
	log     []string
}

const size = 40

func digest(n byte) (d firmware.Digest) { d[0] = n; return d }

func newRig(t *testing.T, seed uint64) *rig {
	r := &rig{t: t, rng: rand.New(rand.NewPCG(seed, 7)), meta: make([]byte, 2*firmware.MetaArea), files: map[string]firmware.Digest{},
		qualities: map[firmware.Digest]quality{}, images: map[firmware.Digest]firmware.Target{}, snapshots: map[firmware.Digest]bool{},
		window: true, dir: t.TempDir(), cutting: func(string) bool { return false }, stack: "s1"}
	r.m = bootmodel.Machine{ESP: bootmodel.ESP{
		"EFI/systemd/systemd-bootx64.efi": {Starts: true, Loader: true}, bootmodel.DefaultPath: {Starts: true, Loader: true},
		bootmodel.Entries + "/recovery-1.efi": {Starts: true, Release: &bootmodel.Release{ID: "zz-recovery", VersionID: "1", PrettyName: "recovery"}},
	}, Order: []bootmodel.Target{{File: "EFI/systemd/systemd-bootx64.efi"}, {File: bootmodel.DefaultPath}, {File: bootmodel.Entries + "/recovery-1.efi"}, {Network: true}}}
	r.image(1, fine)
	r.put("edge-1.efi", digest(1))
	r.slots[firmware.SlotA] = digest(1)
	r.write(firmware.Meta{Slots: [2]firmware.Slot{{State: firmware.SlotGood, Image: digest(1), Name: "edge", Version: "1", Entry: "edge-1.efi"}}}, len(r.meta))
	return r
}

func (r *rig) note(format string, a ...any) { r.log = append(r.log, fmt.Sprintf(format, a...)) }

func (r *rig) fail(format string, a ...any) {
	r.t.Helper()
	r.t.Fatalf("%s\n%s", fmt.Sprintf(format, a...), strings.Join(r.log[max(0, len(r.log)-80):], "\n"))
}

func (r *rig) image(n byte, q quality) {
	r.qualities[digest(n)] = q
	r.images[digest(n)] = firmware.Target{Image: digest(n), Name: "edge", Version: fmt.Sprint(n), Entry: fmt.Sprintf("edge-%d.efi", n), Size: size, BootSize: 1 << 20}
}

func (r *rig) want(n byte, q quality) {
	r.image(n, q)
	r.wanted, r.stack = refOf(n), fmt.Sprint("stack", n)
}

func refOf(n byte) *fleet.ImageRef {
	d := digest(n)
	return &fleet.ImageRef{Name: "edge", Version: fmt.Sprint(n), Arch: "amd64", SHA256: d[:]}
}

// cut reports whether the power fails here.
func (r *rig) cut(point string) bool {
	if !r.dead && r.cutting(point) {
		r.note("  the power fails at %s", point)
		r.dead = true
	}
	return r.dead
}

func (r *rig) put(name string, img firmware.Digest) {
	r.m.ESP[bootmodel.Entries+"/"+name] = bootmodel.File{Starts: !img.IsZero(), Release: &bootmodel.Release{ID: "edge", VersionID: r.images[img].Version, PrettyName: "edge"}}
	r.files[name] = img
}

// write is Record.Write of which n bytes arrive.
func (r *rig) write(m firmware.Meta, n int) {
	if old, err := r.readMeta(); err == nil {
		m.Seq = old.Seq + 1
	}
	c, err := m.Encode()
	if err != nil {
		r.fail("a record that cannot be written: %v", err)
	}
	copy(r.meta[m.Area():], c[:min(n, len(c))])
}

func (r *rig) readMeta() (firmware.Meta, error) {
	return firmware.DecodeMeta(r.meta[:firmware.MaxMeta], r.meta[firmware.MetaArea:][:firmware.MaxMeta])
}

type record struct{ *rig }

func (r record) Read() (firmware.Meta, error) {
	if r.dead {
		return firmware.Meta{}, errCut
	}
	return r.readMeta()
}

func (r record) Write(m firmware.Meta) error {
	if r.cut("record") {
		r.write(m, r.rng.IntN(6000))
		return errCut
	}
	r.write(m, 1<<30)
	return nil
}

type esp struct{ *rig }

func (e esp) Look() (View, error) {
	if e.dead {
		return View{}, errCut
	}
	v := View{Writable: !e.m.ReadOnly, Free: 1 << 30}
	for _, name := range slices.Sorted(maps.Keys(e.files)) {
		base, left, done := bootmodel.Counter(name)
		v.Files = append(v.Files, firmware.BootFile{Name: name, Base: base, Left: left, Done: done})
	}
	next := bootmodel.Machine{ESP: maps.Clone(e.m.ESP), Order: e.m.Order}
	if out := next.PowerOn(false); out.File != "" {
		v.Next, _, _ = bootmodel.Counter(path.Base(out.File))
	}
	return v, nil
}

func (e esp) Remove(name string) error {
	if e.cut("remove") && e.rng.IntN(2) == 0 {
		return errCut
	}
	delete(e.m.ESP, bootmodel.Entries+"/"+name)
	delete(e.files, name)
	return e.power()
}

func (r *rig) power() error {
	if r.dead {
		return errCut
	}
	return nil
}

// Rename may leave the old name, the new one or both when it is cut off.
func (e esp) Rename(from, to string) error {
	img, ok := e.files[from]
	if !ok {
		e.fail("it renames %s, which is not there", from)
	}
	how := 1
	if e.cut("rename") {
		how = e.rng.IntN(3)
	}
	f := e.m.ESP[bootmodel.Entries+"/"+from]
	if how > 0 {
		e.m.ESP[bootmodel.Entries+"/"+to], e.files[to] = f, img
	}
	if how == 1 {
		delete(e.m.ESP, bootmodel.Entries+"/"+from)
		delete(e.files, from)
	}
	return e.power()
}

func (e esp) Stage(_ context.Context, name string, want firmware.Digest, _ int64, from io.Reader) error {
	b, err := io.ReadAll(from)
	if err != nil {
		return err
	}
	if b[0] != want[0] {
		return errors.New("the file is another one")
	}
	if e.cut("stage") {
		e.put(name, firmware.Digest{})
		return errCut
	}
	e.put(name, want)
	return nil
}

func (e esp) Whole(name string, want firmware.Digest, _ int64) (bool, error) {
	return e.files[name] == want, e.power()
}

type loader struct{ *rig }

func (l loader) SetOneShot(pattern string) error {
	if !l.cut("one-shot") {
		l.m.OneShot = pattern
	}
	return l.power()
}

func (l loader) Restart(context.Context, string) error {
	if l.cut("restart") {
		return errCut
	}
	return nil
}

type images struct{ *rig }

func (i images) Write(_ context.Context, slot firmware.SlotID, img firmware.Digest, from int64, note func(int64) error) error {
	for name, x := range i.files {
		if x == i.slots[slot] && !x.IsZero() && !strings.HasPrefix(name, ".") {
			i.fail("slot %s is written while %s would start it", slot, name)
		}
	}
	i.slots[slot] = firmware.Digest{}
	for at := from; at < size; {
		if i.cut("chunk") {
			return errCut
		}
		at += 10
		i.written += 10
		if at >= size {
			i.slots[slot] = img // before it is noted, as a real one flushes first
		}
		if err := note(at); err != nil {
			return err
		}
	}
	return i.power()
}

func (i images) Boot(_ context.Context, img firmware.Digest) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader([]byte{img[0]})), nil
}

type site struct{ *rig }

func (s site) NeedsSnapshot(img firmware.Digest) bool { return !s.snapshots[img] }

func (s site) Snapshot(_ context.Context, img firmware.Digest) error {
	if !s.cut("snapshot") {
		s.snapshots[img] = true
	}
	return s.power()
}

func (s site) Turn(_ context.Context, t firmware.Target) (bool, string) {
	m, err := s.readMeta()
	if err != nil || !s.snapshots[t.Image] || m.Slots[firmware.SlotA].Image != t.Image && m.Slots[firmware.SlotB].Image != t.Image {
		s.fail("a turn is asked for before snapshot and image are there")
	}
	return s.window, "the window is closed"
}

func (s site) Settled(_ context.Context, _ firmware.Digest, _ string, failed *firmware.FailedImage) error {
	s.settled++
	if failed != nil {
		s.told = append(s.told, *failed)
	}
	return nil
}

func (s site) Judging(context.Context) {}

// sync gives files that the loader renamed their images.
func (r *rig) sync() {
	for full := range r.m.ESP {
		name := path.Base(full)
		if _, ok := r.files[name]; ok || !strings.HasPrefix(name, "edge") {
			continue
		}
		base, _, _ := bootmodel.Counter(name)
		for old, img := range r.files {
			if ob, _, _ := bootmodel.Counter(old); ob == base && !strings.HasPrefix(old, ".") {
				r.files[name] = img
			}
		}
	}
	for name := range r.files {
		if _, ok := r.m.ESP[bootmodel.Entries+"/"+name]; !ok {
			delete(r.files, name)
		}
	}
}

// start is one power-on; false: no slot runs its agent.
func (r *rig) start() (firmware.SlotID, bool) {
	r.dead = false
	out := r.m.PowerOn(false)
	r.sync()
	r.now += time.Minute
	r.up = r.now
	r.note("power on: %s", strings.Join(out.Steps, "; "))
	if out.Menu || out.Network {
		r.fail("the box is lost")
	}
	name := path.Base(out.File)
	if strings.HasPrefix(name, "recovery") {
		r.toRecovery++
		if m, err := r.readMeta(); err == nil {
			r.why = m.Recovery
		}
		return 0, false
	}
	for i, s := range r.slots {
		if s == r.files[name] {
			return firmware.SlotID(i), r.qualities[s] != silent
		}
	}
	r.note("the root of %s is damaged", name)
	return 0, false
}

// run is one life of the keeper; true: it came to rest.
func (r *rig) run(slot firmware.SlotID) bool {
	r.lives++
	k, err := New(Config{
		Record: record{r}, ESP: esp{r}, Loader: loader{r}, Images: images{r}, Site: site{r},
		Running: func() (firmware.SlotID, error) { return slot, nil },
		Health:  func(context.Context) firmware.Health { return r.health(slot) },
		Wanted: func(context.Context) Wanted {
			return Wanted{Image: r.wanted, Stack: r.stack, Orders: r.orders}
		},
		Target: func(_ context.Context, ref fleet.ImageRef) (firmware.Target, error) {
			return r.images[firmware.Digest(ref.SHA256)], nil
		},
		Done: func(o fleet.Order, _ string) error { r.done = append(r.done, o.ID); return nil },
		Dir:  filepath.Join(r.dir, "data"), Run: filepath.Join(r.dir, fmt.Sprint("run", r.lives)),
		cut: func(point string) error {
			if r.cut(point) {
				return errCut
			}
			return nil
		},
	})
	if err != nil {
		r.fail("%v", err)
	}
	r.keeper = k
	idle := 0
	for range 600 {
		pause, err := k.Step(context.Background())
		r.note("  %s %s: %s (%v)", r.now, k.Now().State, k.Now().Reason, err)
		switch {
		case errors.Is(err, errRestart), r.dead:
			return false
		case err != nil:
			r.fail("%v", err)
		}
		r.now += pause
		if pause == idlePause {
			// Waiting costs few steps: two minutes in one go.
			r.now += 105 * time.Second
			if idle++; idle > 6 && r.now-r.up > 16*time.Minute && k.Now().State != firmware.Judging.String() || idle > 100 {
				return true
			}
		} else {
			idle = 0
		}
	}
	r.fail("it never rests")
	return false
}

func (r *rig) health(slot firmware.SlotID) firmware.Health {
	up := r.now - r.up
	q := r.qualities[r.slots[slot]]
	return firmware.Health{Up: up, RootVerified: true, DataMounted: true, Identity: true, Wanted: true, Process: q != sick && up > 30*time.Second,
		NodeReady: up > time.Minute && q != sick, Server: true, Member: true, Quorum: q != without || up > time.Hour, APIReachable: true}
}

// live starts the box again and again until it rests.
func (r *rig) live(n int) bool {
	for range n {
		slot, ok := r.start()
		if !ok {
			continue
		}
		if r.run(slot) {
			return true
		}
	}
	return false
}

// runs is the version that is running after the box came to rest.
func (r *rig) runs() byte {
	slot, ok := r.start()
	if !ok {
		r.fail("no slot runs")
	}
	return r.slots[slot][0]
}
