package bootmodel

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/muster-edge/muster/firmware"
)

// quality is what a system does when it starts.
type quality int

const (
	fine    quality = iota // becomes healthy
	sick                   // comes up and fails its health gate
	silent                 // dies before it can say anything
	blurred                // waits for others at first, then becomes healthy
)

// box is one machine with two slots, an ESP and a record, and a planner that
// is cut off anywhere.
type box struct {
	t    *testing.T
	rng  *rand.Rand
	m    Machine
	meta []byte
	// slots hold the image that was written whole, if one was.
	slots [2]firmware.Digest
	// files say which image a boot file starts.
	files     map[string]firmware.Digest
	qualities map[firmware.Digest]quality
	target    *firmware.Target
	runs      map[firmware.Digest]int
	snapshot  bool
	cut       float64 // how often the power fails during an action
	log       []string
	bug       string
}

func image(n byte) (d firmware.Digest) { d[0] = n; return d }

const imageSize = 8

func newBox(t *testing.T, seed uint64) *box {
	b := &box{t: t, rng: rand.New(rand.NewPCG(seed, 1)), meta: make([]byte, 2*firmware.MetaArea), qualities: map[firmware.Digest]quality{},
		files: map[string]firmware.Digest{}, runs: map[firmware.Digest]int{}}
	b.m = Machine{Order: installed, ESP: esp(nil)}
	b.put("edge-1.efi", image(1), "1", true)
	b.slots[firmware.SlotA] = image(1)
	b.write(firmware.Meta{Slots: [2]firmware.Slot{{State: firmware.SlotGood, Image: image(1), Name: "edge", Version: "1", Entry: "edge-1.efi"}}}, len(b.meta))
	return b
}

func (b *box) note(format string, a ...any) { b.log = append(b.log, fmt.Sprintf(format, a...)) }

func (b *box) put(name string, img firmware.Digest, version string, whole bool) {
	b.m.ESP[Entries+"/"+name] = File{Starts: whole, Garbled: !whole && b.rng.IntN(2) == 0, Release: release("edge", version)}
	b.files[name] = img
}

// write puts a record on the disk, of which only the first n bytes arrive.
func (b *box) write(m firmware.Meta, n int) {
	old, err := b.read()
	if err == nil {
		m.Seq = old.Seq + 1
	}
	c, err := m.Encode()
	if err != nil {
		b.fail("a record that cannot be written: %v", err)
	}
	copy(b.meta[m.Area():], c[:min(n, len(c))])
}

func (b *box) read() (firmware.Meta, error) {
	return firmware.DecodeMeta(b.meta[:firmware.MaxMeta], b.meta[firmware.MetaArea:][:firmware.MaxMeta])
}

func (b *box) fail(format string, a ...any) {
	b.t.Helper()
	b.t.Fatalf("%s\n%s", fmt.Sprintf(format, a...), strings.Join(b.log[max(0, len(b.log)-60):], "\n"))
}

// start is one power-on; false: it ended without a running system.
func (b *box) start() (slot firmware.SlotID, counted, ok bool) {
	before := b.m.OneShot
	out := b.m.PowerOn(false)
	b.sync()
	b.note("power on: %s", strings.Join(out.Steps, "; "))
	name := path.Base(out.File)
	img, mine := b.files[name]
	switch {
	case out.Menu || out.Network:
		b.fail("the box is lost")
	case !mine:
		b.fail("the box is in recovery (%s, one-shot %q), though a slot is sound", name, before)
	}
	for i, s := range b.slots {
		if s == img {
			_, left, _ := Counter(name)
			return firmware.SlotID(i), left >= 0, b.qualities[img] != silent
		}
	}
	b.note("the root of %s is damaged: restart", name)
	return 0, false, false
}

// sync gives the files that the loader renamed their images.
func (b *box) sync() {
	for full := range b.m.ESP {
		name := path.Base(full)
		if _, ok := b.files[name]; ok || !strings.HasPrefix(name, "edge") {
			continue
		}
		base, _, _ := Counter(name)
		for old, img := range b.files {
			if ob, _, _ := Counter(old); ob == base && !strings.HasPrefix(old, ".") {
				b.files[name] = img
			}
		}
	}
	for name := range b.files {
		if _, ok := b.m.ESP[Entries+"/"+name]; !ok {
			delete(b.files, name)
		}
	}
}

func (b *box) facts(running firmware.SlotID, counted, noted bool, plans int) firmware.UpdateFacts {
	m, err := b.read()
	if err != nil {
		b.fail("the record is lost: %v", err)
	}
	f := firmware.UpdateFacts{Meta: m, Running: running, Counted: counted, Noted: noted, Writable: !b.m.ReadOnly, Free: 1 << 30, Target: b.target,
		NeedsSnapshot: !b.snapshot, MayFlip: plans > 2, Blocker: "the maintenance window is closed"}
	for _, name := range slices.Sorted(maps.Keys(b.files)) {
		base, left, done := Counter(name)
		f.Files = append(f.Files, firmware.BootFile{Name: name, Base: base, Left: left, Done: done})
	}
	next := Machine{ESP: maps.Clone(b.m.ESP), Order: b.m.Order}
	if out := next.PowerOn(false); out.File != "" {
		f.Next, _, _ = Counter(path.Base(out.File))
	}
	if b.target != nil {
		name := firmware.StagedPrefix + b.target.Entry
		f.StagedWhole = b.files[name] == b.target.Image && b.m.ESP[Entries+"/"+name].Starts
	}
	switch q := b.qualities[b.slots[running]]; {
	case plans < 2 || q == blurred && b.runs[b.slots[running]] < 2:
		f.Health, f.Why = firmware.Undecided, "it is young"
	case q == sick:
		f.Health, f.Why = firmware.Failed, "k3s does not stay up"
	default:
		f.Health, f.Why = firmware.Healthy, "k3s is ready"
	}
	return f
}

// run is one life of a system: until it restarts, loses power or has nothing
// to do. It reports whether it came to rest.
func (b *box) run(running firmware.SlotID, counted bool) (rest bool) {
	noted := false
	b.runs[b.slots[running]]++
	for plans := range 200 {
		state, acts := firmware.PlanUpdate(b.facts(running, counted && b.counted(running), noted, plans))
		for _, a := range acts {
			b.note("  %s: %s %s %s: %s", state, a.Kind, a.File, a.To, a.Reason)
			cut := b.rng.Float64() < b.cut
			switch a.Kind {
			case firmware.UpdateWait:
				if plans > 12 {
					return true
				}
			case firmware.Restart:
				return false
			case firmware.SetOneShot:
				if !cut {
					b.m.OneShot = a.File
				}
			case firmware.TakeEtcdSnapshot:
				b.snapshot = !cut
			case firmware.WriteMeta:
				n := 1 << 30
				if cut {
					n = b.rng.IntN(5000)
				}
				b.write(*a.Meta, n)
				noted = true
			default:
				b.change(a, cut)
			}
			if cut {
				b.note("  the power fails")
				return false
			}
		}
	}
	b.fail("it plans for ever")
	return false
}

// counted: the running system's file still has its counter.
func (b *box) counted(running firmware.SlotID) bool {
	for name, img := range b.files {
		if _, left, _ := Counter(name); img == b.slots[running] && left < 0 && !strings.HasPrefix(name, ".") {
			return false
		}
	}
	return true
}

// change does what an action does to ESP and slots. Of a rename that the power
// interrupts, FAT may keep the old name, the new one, or both.
func (b *box) change(a firmware.UpdateAction, cut bool) {
	if b.m.ReadOnly {
		b.fail("it writes to an ESP that cannot be written")
	}
	full := func(name string) string { return Entries + "/" + name }
	switch a.Kind {
	case firmware.RemoveFile:
		if cut && b.rng.IntN(2) == 0 {
			return
		}
		delete(b.m.ESP, full(a.File))
		delete(b.files, a.File)
	case firmware.RenameFile:
		f, ok := b.m.ESP[full(a.File)]
		if !ok {
			b.fail("it renames %s, which is not there", a.File)
		}
		how := 1
		if cut {
			how = b.rng.IntN(3)
		}
		if how > 0 {
			b.m.ESP[full(a.To)], b.files[a.To] = f, b.files[a.File]
		}
		if how == 1 {
			delete(b.m.ESP, full(a.File))
			delete(b.files, a.File)
		}
	case firmware.WriteImage:
		for name, img := range b.files {
			if img == b.slots[a.Slot] && img != (firmware.Digest{}) && !strings.HasPrefix(name, ".") && b.bug == "" {
				b.fail("slot %s is written while %s would start it", a.Slot, name)
			}
		}
		m, _ := b.read()
		b.slots[a.Slot] = firmware.Digest{}
		m.Update.Verified = imageSize
		if cut {
			m.Update.Verified = int64(b.rng.IntN(imageSize))
			b.write(m, 1<<30)
			return
		}
		b.slots[a.Slot] = b.target.Image
		b.write(m, 1<<30)
	case firmware.StageFile:
		b.put(a.File, b.target.Image, b.target.Version, !cut)
	default:
		b.fail("unknown action %s", a.Kind)
	}
}

// live starts the box again and again until it rests or n starts are over.
func (b *box) live(n int) bool {
	for range n {
		slot, counted, ok := b.start()
		if !ok {
			continue
		}
		if b.rng.Float64() < b.cut/2 {
			b.note("the power fails during the start")
			continue
		}
		if b.run(slot, counted) {
			return true
		}
	}
	return false
}

func (b *box) want(n byte, q quality) {
	b.qualities[image(n)] = q
	b.snapshot = false
	b.target = &firmware.Target{Image: image(n), Name: "edge", Version: fmt.Sprint(n), Entry: fmt.Sprintf("edge-%d.efi", n), Size: imageSize, BootSize: 1 << 20}
}

// Whatever fails and whenever the power is cut: the box always starts a sound
// system, a good version ends up running, a bad one is given up and not tried
// again, and what ran before runs.
func TestUpdatesSurviveEverything(t *testing.T) {
	seeds := uint64(600)
	if testing.Short() {
		seeds = 60
	}
	for seed := range seeds {
		b := newBox(t, seed)
		b.note("seed %d", seed)
		b.cut = []float64{0, 0.05, 0.3}[seed%3]
		good := byte(1)
		for n := byte(2); n < 6; n++ {
			q := quality(b.rng.IntN(4))
			b.want(n, q)
			b.note("wanted: version %d, quality %d", n, q)
			cut := b.cut
			if !b.live(60) {
				b.cut = 0 // the power holds at last
				if !b.live(40) {
					b.fail("it never rests")
				}
			}
			b.cut = 0
			if !b.live(40) {
				b.fail("it does not rest again")
			}
			b.cut = cut
			m, err := b.read()
			if err != nil {
				b.fail("%v", err)
			}
			slot, _, _ := b.start()
			got := b.slots[slot]
			_, failed := m.HasFailed(image(n))
			if q == blurred {
				q = fine // it only took longer
			}
			switch {
			case q == fine && got == image(n):
				good = n
			case q == fine && failed && cut == 0:
				b.fail("a good version was given up without a power cut")
			case q == fine && failed:
				// Its tries were spent by power cuts, twice over.
				if m.Slots[slot.Other()].Rounds < firmware.MaxRounds && !strings.Contains(m.Slots[slot.Other()].Reason, "without becoming healthy") {
					b.fail("a good version was given up too early: %+v", m.Slots)
				}
			case q != fine && (got != image(good) || !failed):
				b.fail("after a bad version: running %v, remembered %v", got[0], failed)
			case q == fine:
				b.fail("a good version does not run: %v", got[0])
			}
		}
	}
}

// An order may go back to an older version, and a cleared failure is tried
// again.
func TestOrderedWayBack(t *testing.T) {
	for seed := range uint64(120) {
		b := newBox(t, seed)
		b.want(3, fine)
		b.cut = 0.1 * float64(seed%2)
		b.live(60)
		b.want(2, []quality{fine, sick}[seed/2%2])
		b.target.Older, b.target.Order = true, "o-1"
		b.live(60)
		b.cut = 0
		b.live(40)
		b.live(40)
		slot, _, _ := b.start()
		m, err := b.read()
		if err != nil {
			b.fail("%v", err)
		}
		_, failed := m.HasFailed(image(2))
		switch got := b.slots[slot]; {
		case failed && b.qualities[image(2)] == fine && seed%2 == 0:
			b.fail("a good old version was given up")
		case failed && got == image(2):
			b.fail("a failed version runs")
		case !failed && b.qualities[image(2)] == sick:
			b.fail("a sick old version was kept")
		case !failed && got != image(2):
			b.fail("the order was not carried out: version %d runs", got[0])
		}
	}
}

func TestWithoutOrderNothingGoesBack(t *testing.T) {
	b := newBox(t, 1)
	b.want(3, fine)
	b.live(10)
	b.want(2, fine)
	b.target.Older = true
	b.live(10)
	if slot, _, _ := b.start(); b.slots[slot] != image(3) {
		b.fail("an older version runs without an order")
	}
}

// A version that failed is not tried again, though its slot was written over
// meanwhile, before its failure is cleared.
func TestFailedIsRemembered(t *testing.T) {
	b := newBox(t, 1)
	b.want(4, sick)
	b.live(10)
	b.want(5, fine)
	b.live(10)
	b.want(4, fine)
	b.target.Older, b.target.Order = true, "o-1"
	b.live(10)
	if slot, _, _ := b.start(); b.slots[slot] != image(5) || b.slots[slot.Other()] == image(4) {
		b.fail("a failed version was written again")
	}
	m, err := b.read()
	if err != nil {
		t.Fatal(err)
	}
	b.write(m.WithoutFailed(image(4)), 1<<30)
	b.live(10)
	if slot, _, _ := b.start(); b.slots[slot] != image(4) {
		b.fail("a cleared version is not tried")
	}
}

// An ESP that cannot be written stops updates and counts, never the box.
func TestReadOnlyESP(t *testing.T) {
	for seed := range uint64(200) {
		b := newBox(t, seed)
		b.cut = 0.1
		b.want(2, quality(seed%4))
		b.live(int(seed / 4 % 8))
		b.m.ReadOnly = true
		b.cut = 0
		for range 40 {
			if b.live(1) {
				break
			}
		}
		if m, err := b.read(); err != nil && !errors.Is(err, firmware.ErrMetaBlank) {
			b.fail("%v %v", m, err)
		}
	}
}

// The check itself: a planner that leaves the old boot file in place while its
// slot is written is noticed.
func TestUpdateBoxNotices(t *testing.T) {
	b := newBox(t, 1)
	b.put("edge-9.efi", image(9), "9", true)
	b.slots[firmware.SlotB] = image(9)
	b.slots[firmware.SlotB] = firmware.Digest{} // its slot is being written
	b.bug = "planted"
	if _, _, ok := b.start(); ok {
		t.Fatal("a damaged slot was started without notice")
	}
	if !bytes.Contains([]byte(strings.Join(b.log, "\n")), []byte("damaged")) {
		t.Fatal("nobody noticed")
	}
}

// A person marks the running system bad; the power fails at any point of it.
// The box ends in the system before, does not come back by itself, and a
// forgiven version is tried again.
func TestWayBackOfAPerson(t *testing.T) {
	for seed := range uint64(60) {
		b := newBox(t, seed)
		b.want(2, fine)
		if !b.live(20) {
			b.fail("no update")
		}
		m, err := b.read()
		if err != nil {
			b.fail("%v", err)
		}
		bad, err := m.MarkBad(firmware.SlotB, "a person said so")
		if err != nil {
			b.fail("%v", err)
		}
		n := 1 << 30
		if seed%3 == 0 {
			n = int(seed) * 20 // torn: nobody said anything
		}
		b.write(bad, n)
		if m, _ = b.read(); m.Slots[firmware.SlotB].State == firmware.SlotBad && seed%2 == 0 {
			b.change(firmware.UpdateAction{Kind: firmware.RenameFile, File: "edge-2.efi", To: "edge-2+0.efi"}, seed%4 == 0)
		}
		b.cut = 0.2 * float64(seed%2)
		b.live(20)
		b.cut = 0
		b.live(20)
		slot, _, _ := b.start()
		want := image(1)
		if m.Slots[firmware.SlotB].State != firmware.SlotBad {
			want = image(2)
		}
		if b.slots[slot] != want {
			b.fail("version %d runs, want %d", b.slots[slot][0], want[0])
		}
		if want == image(2) {
			continue
		}
		if m, err = b.read(); err != nil {
			b.fail("%v", err)
		}
		b.write(m.Forgive(image(2), firmware.SlotA), 1<<30)
		b.live(20)
		if slot, _, _ := b.start(); b.slots[slot] != image(2) {
			b.fail("a forgiven version is not tried again")
		}
	}
}

// A system that is marked bad runs when nothing else starts. It is not blessed
// again, and an update into the other slot goes on.
func TestBadAsLastResort(t *testing.T) {
	b := newBox(t, 3)
	b.want(2, fine)
	b.live(20)
	m, err := b.read()
	if err != nil {
		t.Fatal(err)
	}
	bad, err := m.MarkBad(firmware.SlotB, "a person said so")
	if err != nil {
		t.Fatal(err)
	}
	b.write(bad, 1<<30)
	// The system before is gone meanwhile.
	b.change(firmware.UpdateAction{Kind: firmware.RemoveFile, File: "edge-1.efi"}, false)
	b.live(20)
	if m, err = b.read(); err != nil || m.Slots[firmware.SlotB].State != firmware.SlotBad {
		t.Fatalf("%v %+v", err, m.Slots)
	}
	state, acts := firmware.PlanUpdate(b.facts(firmware.SlotB, false, true, 9))
	if state != firmware.Held || acts[0].Kind != firmware.UpdateWait {
		t.Fatalf("%s %v", state, acts)
	}
	b.want(3, fine)
	b.live(20)
	if slot, _, _ := b.start(); b.slots[slot] != image(3) {
		b.fail("no way out of a bad system")
	}
}
