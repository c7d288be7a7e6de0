package recovery

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/recovery/netup"
)

func up() netup.NIC {
	return netup.NIC{Name: "eth0", Device: "eth0", Phase: netup.Up, Address: netip.MustParsePrefix("192.0.2.7/24")}
}

func TestAssess(t *testing.T) {
	nolink := netup.NIC{Name: "eth0", MAC: "52:54:00:00:00:01"}
	asking := netup.NIC{Name: "eth1", Phase: netup.Asking}
	waiting := &Progress{State: agent.WaitingForApproval, Text: "ask somebody"}
	done := &Progress{State: agent.Enrolled}
	for _, c := range []struct {
		name string
		c    conditions
		want agent.State
		text string
	}{
		{"when just started then booting", conditions{}, agent.Booting, "devices"},
		{"when no interface is found then say so", conditions{Booted: true}, agent.Network, "no network interface"},
		{"when there is no cable then ask about it", conditions{Booted: true, NICs: []netup.NIC{nolink}}, agent.Network, "cable"},
		{"when DHCP is silent then say how many have a cable", conditions{Booted: true, NICs: []netup.NIC{nolink, asking}}, agent.Network, "1 of 2"},
		{"when an address is there then ask the centre for the time", conditions{NICs: []netup.NIC{nolink, up()}, Centre: "https://c"}, agent.Time, "192.0.2.7 on eth0, asking https://c"},
		{"when the centre speaks then show it", conditions{NICs: []netup.NIC{up()}, Progress: waiting}, agent.WaitingForApproval, "ask somebody"},
		{"when the network goes then that comes first", conditions{Booted: true, NICs: []netup.NIC{nolink}, Progress: waiting}, agent.Network, "cable"},
		{"when enrolled then say as whom", conditions{NICs: []netup.NIC{up()}, Progress: done, Words: "a b c"}, agent.Enrolled, "enrolled as a b c; waiting for orders"},
		{"when there is no TPM then a cable does not help", conditions{Booted: true, TPMError: NoTPM}, agent.Failed, NoTPM},
		{"when site.json is bad then nothing else matters", conditions{SiteError: "bad", TPMError: NoTPM, Progress: done}, agent.Failed, "bad"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, text := assess(c.c)
			if s != c.want || !strings.Contains(text, c.text) {
				t.Errorf("got %s: %s", s, text)
			}
		})
	}
}

// TestEveryStepOfAMachineIsInTheMoveTable drives a machine's conditions at
// random, one change at a time, and asks the table about every move.
func TestEveryStepOfAMachineIsInTheMoveTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := conditions{}
		state := agent.Booting
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0:
				c.Booted = true
			case 1: // an interface is seen before it has an address
				if len(c.NICs) == 0 {
					c.NICs = []netup.NIC{{Phase: netup.NoLink}}
				} else {
					c.NICs = []netup.NIC{up()}
				}
			case 2:
				c.NICs = []netup.NIC{{Phase: netup.Asking}}
			case 3: // an Enroller reports; it runs only once there is a TPM
				if c.TPMError == "" && len(c.NICs) > 0 && (c.Progress == nil || c.Progress.State != agent.Enrolled) {
					steps := []agent.State{agent.Time, agent.Enrolling}
					if c.Progress != nil && c.Progress.State != agent.Time {
						steps = append(steps, agent.WaitingForApproval, agent.Enrolled)
					}
					c.Progress = &Progress{State: rapid.SampledFrom(steps).Draw(t, "progress")}
				}
			case 4: // it stops
				if c.Progress == nil || c.Progress.State != agent.Enrolled {
					c.TPMError, c.Progress = NoTPM, nil
				}
			case 5:
				c.TPMError = ""
			}
			next, _ := assess(c)
			if _, err := state.MoveTo(next); err != nil {
				t.Fatal(err)
			}
			state = next
		}
	})
}

func TestConsoleNames(t *testing.T) {
	for in, want := range map[string][]string{
		"tty0 ttyS0\n":          {"tty0", "ttyS0"},
		"":                      {"console"},
		"../sda ttyS0 a/b":      {"ttyS0"},
		strings.Repeat("x ", 9): {"x", "x", "x", "x", "x", "x", "x", "x"},
	} {
		if got := activeConsoles([]byte(in)); !slices.Equal(got, want) {
			t.Errorf("%q: %v", in, got)
		}
	}
	for name, want := range map[string]bool{"tty0": true, "tty1": true, "ttyS0": false, "hvc0": false, "tty": false, "ttyAMA0": false} {
		if isScreen(name) != want {
			t.Errorf("%s is a screen: %v", name, !want)
		}
	}
}

// TestAStuckConsoleHoldsNobodyUp: a serial line with flow control and nobody
// at the other end.
func TestAStuckConsoleHoldsNobodyUp(t *testing.T) {
	c := &consoles{all: []*console{{name: "ttyS0", out: make(chan string, 2)}}} // nobody reads
	for i := range 100 {
		c.line(fmt.Sprint(i))
	}
	c.flush(time.Millisecond)
	if n := len(c.all[0].out); n != 2 {
		t.Errorf("%d lines queued", n)
	}
}

func TestScreenIsDrawnOnlyWhenItChanges(t *testing.T) {
	tty := &console{name: "tty0", screen: true, width: 80, out: make(chan string, 10)}
	serial := &console{name: "ttyS0", out: make(chan string, 10)}
	c := &consoles{all: []*console{tty, serial}}
	c.draw(agent.View{Text: "a"})
	c.draw(agent.View{Text: "a"})
	c.draw(agent.View{Text: "b"})
	if len(tty.out) != 2 || len(serial.out) != 0 {
		t.Errorf("%d drawings on the screen, %d on the serial line", len(tty.out), len(serial.out))
	}
}

// fake is an Enroller whose life is written down beforehand.
type fake struct {
	identity, enroll error
	panics           bool
	block            bool
	closed           *int
	stay             error // nil: until the end
}

func (f *fake) Stay(ctx context.Context) error {
	if f.stay != nil {
		return f.stay
	}
	<-ctx.Done()
	return ctx.Err()
}

func (f *fake) Identity(context.Context) (Identity, error) {
	return Identity{Words: "a b c", Node: "n-x"}, f.identity
}

func (f *fake) Enroll(ctx context.Context) error {
	if f.panics {
		panic("boom")
	}
	if f.block {
		<-ctx.Done()
		return ctx.Err()
	}
	return f.enroll
}

func (f *fake) Close() error { *f.closed++; return nil }

func TestEnrollmentOutlivesEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closed := 0
		lives := []any{
			fmt.Errorf("open: %w", ErrNoTPM), fmt.Errorf("open: %w", ErrNoTPM),
			&fake{identity: errors.New("TPM is busy"), closed: &closed},
			&fake{panics: true, closed: &closed},
			&fake{enroll: errors.New("TPM went away"), closed: &closed},
			&fake{closed: &closed, stay: fmt.Errorf("%w: expired", ErrNotANode)},
			&fake{closed: &closed},
		}
		var texts []string
		opened, words := 0, ""
		isUp := make(chan struct{})
		close(isUp)
		e := &enrollment{
			open: func(context.Context, Services) (Enroller, error) {
				life := lives[opened]
				opened++
				if err, ok := life.(error); ok {
					return nil, err
				}
				return life.(*fake), nil
			},
			up: func() <-chan struct{} { return isUp }, identity: func(id Identity) { words = id.Words },
			failed: func(s string) { texts = append(texts, s) }, pause: pause, log: slog.New(slog.DiscardHandler),
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := e.run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if opened != len(lives) || closed != 5 || words != "a b c" {
			t.Errorf("opened %d, closed %d, words %q", opened, closed, words)
		}
		all := strings.Join(texts, "|")
		for _, want := range []string{NoTPM, "TPM is busy", "panic: boom", "TPM went away", "renewed: expired"} {
			if !strings.Contains(all, want) {
				t.Errorf("nobody was told %q: %s", want, all)
			}
		}
		if texts[len(texts)-1] != "" {
			t.Error("the last failure was not taken back")
		}
	})
}

func TestWhenTheNetworkReturnsThenEnrollmentStartsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closed, attempts := 0, 0
		isUp := make(chan struct{})
		close(isUp)
		redo := make(chan struct{}, 1)
		f := &fake{block: true, closed: &closed}
		e := &enrollment{
			open:     func(context.Context, Services) (Enroller, error) { return f, nil },
			up:       func() <-chan struct{} { attempts++; return isUp },
			redo:     redo,
			identity: func(Identity) {}, failed: func(string) {}, pause: pause, log: slog.New(slog.DiscardHandler),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.run(ctx) }()
		synctest.Wait()
		redo <- struct{}{}
		synctest.Wait()
		if attempts != 2 || closed != 0 {
			t.Errorf("%d attempts, TPM closed %d times", attempts, closed)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		uptime := func() time.Duration { return time.Since(start) }
		heart := &agent.Heartbeat{Patience: heartPatience}
		why := make(chan string, 10)
		w := &watchdog{heart: heart, uptime: uptime, log: slog.New(slog.DiscardHandler),
			open:   func() (*os.File, error) { return nil, os.ErrNotExist },
			reboot: func(s string) { why <- s }}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- w.run(ctx) }()
		for range 20 { // a beating heart for 200 s
			heart.Beat(uptime())
			pause(ctx, 10*time.Second)
		}
		if len(why) != 0 {
			t.Fatalf("restarted a living machine: %s", <-why)
		}
		pause(ctx, 4*heartPatience+2*petPeriod)
		if len(why) == 0 {
			t.Error("a dead main loop went on for ever")
		}
		cancel()
		<-done
	})
}

func TestWatchdogPetsOnlyALivingLoop(t *testing.T) {
	r, dev, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	now := make(chan time.Duration, 1)
	now <- 0
	heart := &agent.Heartbeat{Patience: heartPatience}
	for _, c := range []struct {
		uptime time.Duration
		pets   bool
	}{{0, true}, {heartPatience + time.Second, false}} {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // one look only
		w := &watchdog{heart: heart, uptime: func() time.Duration { return c.uptime }, log: slog.New(slog.DiscardHandler),
			open: func() (*os.File, error) { return dev, nil }, reboot: func(string) {}}
		_ = w.run(ctx)
		_ = r.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, _ := r.Read(make([]byte, 8))
		if (n > 0) != c.pets {
			t.Errorf("at %s: petted %v", c.uptime, n > 0)
		}
	}
}

// clockMachine is a machine whose clock is a variable.
func clockMachine(now time.Time, floor time.Time) (*machine, *time.Time) {
	clock := now
	m := &machine{screen: &consoles{}, log: slog.New(slog.DiscardHandler), events: make(chan func(), 8)}
	m.site.TimeFloor = floor
	m.sys = system{now: func() time.Time { return clock }, setTime: func(t time.Time) error { clock = t; return nil }}
	m.firstClock()
	return m, &clock
}

func TestMachineClock(t *testing.T) {
	floor := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	m, clock := clockMachine(time.Unix(0, 0), floor)
	if !clock.Equal(floor) || len(m.notes) != 1 {
		t.Errorf("1970: clock %s, notes %v", clock, m.notes)
	}
	m, clock = clockMachine(floor.AddDate(10, 0, 0), floor)
	if !clock.Equal(floor.AddDate(10, 0, 0)) {
		t.Errorf("2036: clock %s before anybody said better", clock)
	}
	if err := m.toldClock(floor.AddDate(0, 1, 0)); err != nil || !clock.Equal(floor.AddDate(0, 1, 0)) {
		t.Errorf("told: %v, clock %s", err, clock)
	}
	if err := m.toldClock(floor.AddDate(0, -1, 0)); err == nil || !clock.Equal(floor.AddDate(0, 1, 0)) {
		t.Errorf("told a time before the floor: %v, clock %s", err, clock)
	}
}

// TestNothingHereOpensADisk reads our own source: in all that /init is made
// of, files are opened for writing by constant names in a short list, and no
// package that writes to block devices is imported. The node agent is in the
// same program and writes its own state; none of its rooms may be reached from
// here, so that the list of rooms is checked, too. What does write a disk is
// reached by one file, cmd/muster-node/install.go, once the machine has a
// certificate; agent/install does nothing without an order.
func TestNothingHereOpensADisk(t *testing.T) {
	allowed := map[string]bool{
		`"/dev/"+name`: true, // consoles
		`"/dev/kmsg"`:  true, `"/dev/watchdog0"`: true, `"/dev/rtc0"`: true,
		`"/proc/sys/kernel/printk_devkmsg"`: true,
		`file+".new"`:                       true, // resolv.conf, in RAM
	}
	writes := map[string]bool{"OpenFile": true, "Create": true, "WriteFile": true, "CreateTemp": true}
	seen := 0
	const ours = "github.com/muster-edge/muster/agent"
	rooms := map[string]bool{ours: true, ours + "/facts": true, ours + "/kmod": true, ours + "/recovery": true, ours + "/recovery/netup": true}
	// The one exception is asked only in an image that was built to scan: see
	// TestOnlyAScanReachesTheStick.
	const stick = ours + "/recovery/stick"
	for _, pattern := range []string{"../*.go", "../facts/*.go", "../kmod/*.go", "*.go", "netup/*.go", "../../cmd/muster-node/main.go", "../../cmd/muster-node/enroll.go", "../../cmd/muster-node/scan.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no files (%v): this test looks at the wrong place", pattern, err)
		}
		err = each(files, func(p string) error {
			if strings.HasSuffix(p, "_test.go") {
				return nil
			}
			src, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, p, src, 0)
			if err != nil {
				return err
			}
			for _, im := range f.Imports {
				if name := strings.Trim(im.Path.Value, `"`); strings.HasPrefix(name, ours) && !rooms[name] && (name != stick || p != "../../cmd/muster-node/scan.go") {
					t.Errorf("%s imports %s: recovery has nothing to do with the rooms of the node agent", p, name)
				}
				for _, bad := range []string{"os/exec", "go-diskfs", "firmware/disk", "pkg/mount"} {
					if strings.Contains(im.Path.Value, bad) {
						t.Errorf("%s imports %s: recovery starts no programs and writes no disks", p, im.Path.Value)
					}
				}
			}
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || len(call.Args) == 0 {
					return true
				}
				sel, ok := call.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if id, ok := sel.X.(*ast.Ident); !ok || id.Name != "os" || !writes[sel.Sel.Name] {
					return true
				}
				seen++
				a := call.Args[0]
				name := string(src[fset.Position(a.Pos()).Offset:fset.Position(a.End()).Offset])
				if !allowed[name] {
					t.Errorf("%s: os.%s(%s): not in the list of files /init may write", fset.Position(call.Pos()), sel.Sel.Name, name)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seen < 4 {
		t.Fatalf("found %d places that write: this test looks at the wrong files", seen)
	}
}

func each(files []string, f func(string) error) error {
	for _, name := range files {
		if err := f(name); err != nil {
			return err
		}
	}
	return nil
}

func TestMountedKnowsWhatIsThere(t *testing.T) {
	if !mounted(mountPoint{target: "/proc", kind: "proc"}) {
		t.Error("/proc is not mounted?")
	}
	if mounted(mountPoint{target: "/", kind: "proc"}) || mounted(mountPoint{target: t.TempDir(), kind: "tmpfs"}) {
		t.Error("something that is no mount point was taken for one")
	}
}
