package slots

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

func TestAnUpdateIsJudgedAndStays(t *testing.T) {
	r := newRig(t, 1)
	r.want(2, fine)
	if !r.live(5) || r.runs() != 2 {
		r.fail("version 2 does not run")
	}
	if r.written != size || r.settled == 0 || len(r.told) != 0 {
		r.fail("written %d, settled %d, told %v", r.written, r.settled, r.told)
	}
	m, err := r.readMeta()
	if err != nil || m.Slots[firmware.SlotB].State != firmware.SlotGood || m.Starts != 0 {
		r.fail("%v %+v", err, m)
	}
	n := r.keeper.Now()
	if n.State != "up-to-date" || n.Slot != "b" || n.Version != "2" || n.NeedsPerson {
		r.fail("%+v", n)
	}
}

// The negative twins: a system that comes up and fails, and one that never
// comes up, end in the system before; the failure is told and remembered.
func TestABadUpdateGoesBack(t *testing.T) {
	for _, q := range []quality{sick, silent} {
		r := newRig(t, 2)
		r.want(2, q)
		if !r.live(20) || r.runs() != 1 {
			r.fail("quality %d: version 1 does not run", q)
		}
		n := r.keeper.Now()
		if n.State != "rolled-back" || !n.NeedsPerson || len(n.Failed) != 1 || len(r.told) == 0 || r.told[0].Image != digest(2) {
			r.fail("quality %d: %+v, told %v", q, n, r.told)
		}
		// It is not tried again, however often the box starts.
		before := r.written
		for range 3 {
			r.live(3)
		}
		if r.written != before || r.runs() != 1 {
			r.fail("a failed version was written again")
		}
		// The next version goes through.
		r.want(3, fine)
		if !r.live(5) || r.runs() != 3 {
			r.fail("version 3 does not run")
		}
	}
}

// A cluster without majority withholds the verdict: nobody restarts because of
// it, and nobody is blamed.
func TestNoMajorityIsNoBlame(t *testing.T) {
	r := newRig(t, 3)
	r.want(2, without)
	if !r.live(5) {
		r.fail("it never rests")
	}
	if m, err := r.readMeta(); err != nil || len(m.Failed) != 0 || r.runs() != 2 {
		r.fail("%v: %+v", err, m)
	}
}

func TestAClosedWindowHoldsTheRestart(t *testing.T) {
	r := newRig(t, 4)
	r.window = false
	r.want(2, fine)
	if !r.live(3) || r.runs() != 1 {
		r.fail("it restarted outside of its window")
	}
	n := r.keeper.Now()
	if n.State != "ready" || !strings.Contains(n.Reason, "the window is closed") || n.Percent != 100 || n.NeedsPerson {
		r.fail("%+v", n)
	}
	r.window = true
	if !r.live(3) || r.runs() != 2 {
		r.fail("it did not restart in its window")
	}
}

// story is an update that works, one that does not, and an ordered way back.
func story(r *rig) {
	rest := func(n byte) {
		// Whatever was cut: the power holds at last.
		if !r.live(30) {
			r.fail("it never rests")
		}
		if got := r.runs(); got != n {
			r.fail("version %d runs, want %d", got, n)
		}
	}
	r.want(2, fine)
	rest(2)
	r.want(3, sick)
	rest(2)
	r.orders = []fleet.Order{{ID: "back", Kind: fleet.OrderDowngrade, Image: refOf(1)}}
	rest(1)
	if !slices.Contains(r.done, "back") {
		r.fail("nobody was told of the order")
	}
	// A new stack ends what the order said.
	r.want(4, fine)
	rest(4)
	if m, err := r.readMeta(); err != nil || len(m.Failed) != 1 || m.Failed[0].Image != digest(3) {
		r.fail("%v: %+v", err, m.Failed)
	}
}

// The power is cut once at each point of each change of a whole story: the
// story ends as it does without.
func TestAPowerCutAnywhere(t *testing.T) {
	points := 0
	count := newRig(t, 5)
	count.cutting = func(string) bool { points++; return false }
	story(count)
	if points < 60 {
		t.Fatalf("only %d points", points)
	}
	step := 1
	if testing.Short() {
		step = 7
	}
	for at := 0; at < points; at += step {
		r := newRig(t, uint64(at))
		i := 0
		r.cutting = func(string) bool { i++; return i == at+1 }
		story(r)
	}
	t.Logf("%d points, each cut", points)
}

// The property: with cuts anywhere, again and again, the box always starts a
// sound system, good versions end up running unless power cuts used up their
// tries, and bad ones are remembered.
func TestUpdatesOnBadPower(t *testing.T) {
	seeds := uint64(45)
	if testing.Short() {
		seeds = 15
	}
	for seed := range seeds {
		r := newRig(t, seed)
		p := []float64{0.02, 0.1, 0.3}[seed%3]
		bad := func(string) bool { return r.rng.Float64() < p }
		good := byte(1)
		for n := byte(2); n < 6; n++ {
			q := quality(r.rng.IntN(3))
			r.want(n, q)
			r.note("wanted: version %d, quality %d", n, q)
			r.cutting = bad
			r.live(25)
			r.cutting = func(string) bool { return false }
			for range 2 { // at rest it stays
				if !r.live(40) {
					r.fail("seed %d: it never rests", seed)
				}
			}
			m, err := r.readMeta()
			if err != nil {
				r.fail("%v", err)
			}
			_, failed := m.HasFailed(digest(n))
			got := r.runs()
			switch {
			case q == fine && got == n && !failed:
				good = n
			case q == fine && !failed:
				r.fail("seed %d: a good version neither runs nor failed", seed)
			case got != good || !failed:
				r.fail("seed %d: after version %d (quality %d): %d runs, want %d; failed %v", seed, n, q, got, good, failed)
			}
		}
		if r.toRecovery > 0 {
			r.fail("seed %d: recovery was started with a sound slot", seed)
		}
	}
}

func TestClearFailedTriesAgainOnce(t *testing.T) {
	r := newRig(t, 6)
	r.want(2, sick)
	r.live(20)
	r.qualities[digest(2)] = fine // what was wrong was outside
	d := digest(2)
	r.orders = []fleet.Order{{ID: "clear", Kind: fleet.OrderClearFailed, Digest: d[:]}}
	if !r.live(10) || r.runs() != 2 {
		r.fail("a cleared version does not run")
	}
	// The same order does not clear a later failure.
	r.orders = append(r.orders, fleet.Order{ID: "back", Kind: fleet.OrderDowngrade, Image: refOf(1)})
	r.live(10)
	r.qualities[digest(2)] = sick
	r.stack = "again"
	if !r.live(20) || r.runs() != 1 {
		r.fail("version 1 does not run")
	}
	if n := r.keeper.Now(); n.State != "rolled-back" || len(r.done) != 2 {
		r.fail("%+v, done %v", n, r.done)
	}
}

func TestAnOrderIntoRecoveryIsObeyedOnce(t *testing.T) {
	for _, at := range []string{"", "record", "one-shot", "slots.order.recover.end", "restart"} {
		r := newRig(t, 7)
		r.orders = []fleet.Order{{ID: "rec", Kind: fleet.OrderRecover, Reason: "look at the disk"}}
		cut := false
		r.cutting = func(p string) bool {
			hit := p == at && !cut && slices.ContainsFunc(r.log, func(s string) bool { return strings.Contains(s, "power on") }) && r.keeper != nil && r.keeper.Now().Slot != ""
			cut = cut || hit
			return hit
		}
		if !r.live(10) {
			r.fail("cut at %q: it never rests", at)
		}
		if r.toRecovery < 1 || r.toRecovery > 2 || at == "" && r.toRecovery != 1 {
			r.fail("cut at %q: recovery was started %d times", at, r.toRecovery)
		}
		m, err := r.readMeta()
		if err != nil || !strings.Contains(r.why, "look at the disk") || m.Recovery != "" {
			r.fail("cut at %q: %v, recovery was told %q, and %q is left", at, err, r.why, m.Recovery)
		}
	}
}

// Two systems that fail end in recovery, by themselves.
func TestBothBadEndsInRecovery(t *testing.T) {
	r := newRig(t, 8)
	r.want(2, sick)
	r.live(20)
	// The system before breaks as well: its file is gone.
	r.slots[firmware.SlotA] = firmware.Digest{}
	delete(r.m.ESP, "EFI/Linux/edge-1.efi")
	r.sync()
	if _, ok := r.start(); ok || r.toRecovery != 1 {
		r.fail("recovery does not come by itself")
	}
}

func TestDamagedNotesRepeatNoOrder(t *testing.T) {
	r := newRig(t, 9)
	r.orders = []fleet.Order{{ID: "rec", Kind: fleet.OrderRecover}}
	r.live(10)
	if r.toRecovery != 1 {
		r.fail("recovery was started %d times", r.toRecovery)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "data", notesFile), []byte("{torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !r.live(10) || r.toRecovery != 1 {
		r.fail("an order was carried out again")
	}
}

func TestDesk(t *testing.T) {
	r := newRig(t, 10)
	r.want(2, fine)
	r.live(5)
	slot, _ := r.start()
	d := Desk{Record: record{r}, ESP: esp{r}, Loader: loader{r}, Running: func() (firmware.SlotID, error) { return slot, nil }, Run: t.TempDir()}
	l, err := d.List()
	if err != nil || l.Running != "b" || l.Next != "edge-2.efi" || len(l.Slots) != 2 || l.Slots[1].File != "edge-2.efi" || !l.Slots[1].Running {
		t.Fatalf("%v %+v", err, l)
	}
	restarted := 0
	restart := func() error { restarted++; return nil }
	if err := d.MarkBad(firmware.SlotB, "x"); err == nil || !strings.Contains(err.Error(), "rollback") {
		t.Fatalf("marking what runs: %v", err)
	}
	from, to, err := d.Rollback("the till does not print", restart)
	if err != nil || from.Version != "2" || to.Version != "1" || restarted != 1 {
		t.Fatalf("%v %v %v", from, to, err)
	}
	if !r.live(5) || r.runs() != 1 {
		r.fail("it did not go back")
	}
	if n := r.keeper.Now(); n.State != "rolled-back" || !strings.Contains(n.Reason, "till") {
		r.fail("%+v", n)
	}
	slot, _ = r.start()
	if _, _, err := d.Rollback("again", restart); err == nil || restarted != 1 {
		t.Fatalf("a way back into a bad slot: %v", err)
	}
	if err := d.Forgive(firmware.Digest{}); err != nil {
		t.Fatal(err)
	}
	if !r.live(5) || r.runs() != 2 {
		r.fail("a forgiven version does not run")
	}
	slot, _ = r.start()
	if err := d.MarkBad(firmware.SlotA, "old"); err != nil {
		t.Fatal(err)
	}
	if err := d.Recover("a person", restart); err != nil || restarted != 2 || r.m.OneShot != firmware.RecoveryPattern {
		t.Fatalf("%v", err)
	}
	d.Running = func() (firmware.SlotID, error) { return 0, errors.New("no slot runs") }
	if l, err := d.List(); err != nil || l.Running != "" || l.Recovery != "a person" {
		t.Fatalf("%v %+v", err, l)
	}
}

func TestLockWaitsAndSaysWho(t *testing.T) {
	dir := t.TempDir()
	held, free := make(chan struct{}), make(chan struct{})
	go func() {
		_ = Lock(dir, func() error { close(held); <-free; return nil })
	}()
	<-held
	got := make(chan error, 1)
	go func() { got <- Lock(dir, func() error { return nil }) }()
	close(free)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestConfigNamesWhatIsMissing(t *testing.T) {
	_, err := New(Config{})
	for _, what := range []string{"Record", "ESP", "Loader", "Images", "Site", "Running", "Health", "Wanted", "Target", "Done", "Dir", "Run"} {
		if err == nil || !strings.Contains(err.Error(), what+" is missing") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestOlder(t *testing.T) {
	for _, c := range []struct {
		name, version string
		run           firmware.Slot
		want          bool
	}{
		{"edge", "1.10", firmware.Slot{Name: "edge", Version: "1.9"}, false},
		{"edge", "1.9", firmware.Slot{Name: "edge", Version: "1.10"}, true},
		{"edge", "1.9", firmware.Slot{}, false},
		{"zeta", "9", firmware.Slot{Name: "edge", Version: "1"}, true},
		{"alpha", "1", firmware.Slot{Name: "edge", Version: "9"}, false},
	} {
		if got := older(firmware.Target{Name: c.name, Version: c.version}, c.run); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func FuzzNotes(f *testing.F) {
	for _, s := range []string{"", "{}", `{"orders":["a"],"pin":{"order":"x","stack":"y","image":{"name":"edge","version":"1","arch":"amd64","sha256":"00"}}}`, `{"deaf":true}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseNotes(b)
		if err == nil && (len(n.Orders) > maxTicked || n.Pin != nil && len(n.Pin.Image.SHA256) != len(firmware.Digest{})) {
			t.Fatal(fmt.Sprint(n))
		}
	})
}

// What keeps an image from coming is told, as long as it does and only while a
// slot is being written.
func TestWaitingIsTold(t *testing.T) {
	told := 0
	k := &Keeper{cfg: Config{Tells: func() { told++ }}}
	k.now = Now{State: firmware.WritingSlot.String(), Reason: "I write version 2 into slot b."}
	k.Waiting("")
	if got := k.Now().Reason; got != "I write version 2 into slot b." || told != 0 {
		t.Errorf("%q, told %d times", got, told)
	}
	k.Waiting("centre: it sent other bytes")
	k.Waiting("centre: it sent other bytes")
	if got := k.Now().Reason; got != "I wait for the image: centre: it sent other bytes" || told != 1 {
		t.Errorf("%q, told %d times", got, told)
	}
	k.Waiting("")
	if got := k.Now().Reason; strings.Contains(got, "other bytes") {
		t.Errorf("it comes, and it says %q", got)
	}
	k.now.State, k.now.Reason = firmware.UpToDate.String(), "The system is the wanted one."
	k.Waiting("centre: away")
	if got := k.Now().Reason; got != "The system is the wanted one." {
		t.Errorf("%q", got)
	}
}

// Whoever sent the machine into recovery is not named any more when a system
// runs again: a later start of recovery has another reason.
func TestASystemForgetsWhyRecoveryWasWanted(t *testing.T) {
	m := firmware.Meta{Recovery: "order o-1", Slots: [2]firmware.Slot{{State: firmware.SlotGood, Image: digest(1), Entry: "edge-1.efi"}}}
	_, acts := firmware.PlanUpdate(firmware.UpdateFacts{Meta: m, Writable: true})
	if len(acts) != 1 || acts[0].Meta == nil || acts[0].Meta.Recovery != "" {
		t.Errorf("%+v", acts)
	}
}
