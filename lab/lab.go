package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/lab/machine"
)

// Lab is one run, as a scenario sees it. While Prepare runs it has a
// directory and a time line only; while Run runs it has the network, too.
type Lab struct {
	Spec Spec
	// Dir is the run's directory.
	Dir string

	line *timeline

	mu       sync.Mutex
	result   Result
	machines []*machine.Machine
	children []*Child
	closers  []func() error
	phase    string
	said     map[string]bool // console milestones already told
	trunks   map[string]*trunk
}

func newLab(b briefing, people io.Writer) (*Lab, error) {
	line, err := newTimeline(b.Spec.Dir, time.Now().Add(-b.BeganAgo), people)
	if err != nil {
		return nil, err
	}
	return &Lab{Spec: b.Spec, Dir: b.Spec.Dir, line: line, result: b.Result}, nil
}

// ForTest returns a run without namespaces, for tests of scenarios' parts: it
// has a directory and a time line.
func ForTest(dir string) *Lab {
	l, err := newLab(briefing{Spec: Spec{Dir: dir}}, nil)
	if err != nil {
		panic(err) // the test's directory is not writable
	}
	return l
}

// Say records something and tells people.
func (l *Lab) Say(source, event, text string) { l.line.add(time.Now(), source, event, text, true) }

// Note records something without telling people.
func (l *Lab) Note(source, event, text string) { l.line.add(time.Now(), source, event, text, false) }

// At is Note for something that happened at a time, of which another clock on
// this host told.
func (l *Lab) At(at time.Time, source, event, text string, tell bool) {
	l.line.add(at, source, event, text, tell)
}

// Footer shows lines below the time line when people watch at a terminal. Each
// line must be no longer than Spec.Width and end in a newline.
func (l *Lab) Footer(text string) {
	if l.Spec.Width > 0 {
		l.line.setFooter(text)
	}
}

// Site changes what the result says of the site's cluster.
func (l *Lab) Site(edit func(*SiteResult)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.result.SiteResult == nil {
		l.result.SiteResult = &SiteResult{}
	}
	edit(l.result.SiteResult)
}

// AddNode puts a node of the host lab into the result.
func (l *Lab) AddNode(name, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := l.machineResult(name); r != nil {
		r.Node = id
		return
	}
	l.result.Machines = append(l.result.Machines, MachineResult{Name: name, Node: id, Timings: map[string]float64{}})
}

// Path joins names below the run's directory.
func (l *Lab) Path(names ...string) string {
	return filepath.Join(append([]string{l.Dir}, names...)...)
}

// Check records one assertion of the scenario. It returns err again, so that
// a scenario can stop at what did not hold.
func (l *Lab) Check(name string, err error) error {
	c := Check{Name: name, OK: err == nil}
	if err != nil {
		c.Detail = err.Error()
	}
	l.mu.Lock()
	l.result.Checks = append(l.result.Checks, c)
	l.mu.Unlock()
	if err == nil {
		l.line.add(time.Now(), "check", "held", name, true)
		return nil
	}
	l.line.add(time.Now(), "check", "failed", "DID NOT HOLD: "+name+": "+err.Error(), true)
	return &checkError{name, err}
}

// checkError is an assertion that did not hold; people were told already.
type checkError struct {
	name string
	err  error
}

func (c *checkError) Error() string { return c.name + ": " + c.err.Error() }
func (c *checkError) Unwrap() error { return c.err }

// Timing records how long something took for a machine; the run's timing is
// that of its slowest machine. name ends in "_s".
func (l *Lab) Timing(machine, name string, d time.Duration) {
	s := seconds(d.Seconds())
	l.mu.Lock()
	defer l.mu.Unlock()
	l.result.Timings[name] = max(l.result.Timings[name], s)
	if r := l.machineResult(machine); r != nil {
		r.Timings[name] = s
	}
}

// Enrolled records which node and request a machine turned out to be.
func (l *Lab) Enrolled(machine, node, request string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := l.machineResult(machine); r != nil {
		r.Node, r.Request = node, request
	}
}

func (l *Lab) machineResult(name string) *MachineResult {
	for i := range l.result.Machines {
		if l.result.Machines[i].Name == name {
			return &l.result.Machines[i]
		}
	}
	return nil
}

// Defer registers something to end with the run, in reverse order, after the
// machines are off.
func (l *Lab) Defer(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// Machines returns the machines made so far.
func (l *Lab) Machines() []*machine.Machine {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*machine.Machine(nil), l.machines...)
}

// Authority is the directory of the EK authority of the run's TPMs.
func (l *Lab) Authority() string { return l.Path("tpm-vendor") }

// AddMachine makes the next machine, with tap, TPM and console on the time
// line. edit may change what the spec says.
func (l *Lab) AddMachine(edit func(*machine.Config)) (*machine.Machine, error) {
	l.mu.Lock()
	n := len(l.machines) + 1
	accel := l.result.Accel
	l.mu.Unlock()
	name := fmt.Sprintf("node%d", n)
	cfg := machine.Config{
		Name: name, Dir: l.Path(name), SecureBoot: l.Spec.SecureBoot, MemoryMB: l.Spec.MemoryMB,
		Accel: accel, NIC: l.Spec.NIC, MAC: macOf(n), Tap: fmt.Sprintf("tap%d", n), Boot: l.Spec.Boot,
		TPMAuthority: l.Authority(), Serial: fmt.Sprintf("LAB-%04d", n),
		UUID: fmt.Sprintf("6d757374-6572-4c61-8000-%012d", n), Clock: l.Spec.Clock, VLAN: l.Spec.SwitchVLAN,
		OnLine:  func(line machine.Line) { l.console(name, line) },
		OnEvent: func(e machine.Event) { l.line.add(e.At, name, "qemu", e.Name, false) },
	}
	if edit != nil {
		edit(&cfg)
	}
	if cfg.VLAN == 0 {
		if err := addTap(cfg.Tap); err != nil {
			return nil, err
		}
	} else {
		t, err := startTrunk(cfg.Dir, cfg.Tap, cfg.VLAN)
		if err != nil {
			return nil, err
		}
		l.Defer(t.close)
		l.mu.Lock()
		if l.trunks == nil {
			l.trunks = map[string]*trunk{}
		}
		l.trunks[name] = t
		l.mu.Unlock()
	}
	m, err := machine.New(cfg)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.machines = append(l.machines, m)
	l.result.Machines = append(l.result.Machines, MachineResult{Name: name, Timings: map[string]float64{}})
	return m, nil
}

// PowerOn switches a machine on and says so.
func (l *Lab) PowerOn(ctx context.Context, m *machine.Machine) error {
	if err := m.PowerOn(ctx); err != nil {
		return err
	}
	l.Say(m.Name(), "power-on", "power on")
	return nil
}

// close ends everything in order: machines first, since they talk to the
// children; the network goes with the namespace.
func (l *Lab) close() error {
	l.mu.Lock()
	machines, children, closers := l.machines, l.children, l.closers
	l.mu.Unlock()
	var errs []error
	var wg sync.WaitGroup
	ends := make([]error, len(machines))
	for i, m := range machines {
		wg.Go(func() { ends[i] = m.Close() })
	}
	wg.Wait()
	errs = append(errs, ends...)
	for i := len(closers) - 1; i >= 0; i-- {
		errs = append(errs, closers[i]())
	}
	for i := len(children) - 1; i >= 0; i-- {
		children[i].Stop(10 * time.Second)
	}
	return errors.Join(errs...)
}

// autopsy tells people, after a failure, what each machine said last and
// where to look.
func (l *Lab) autopsy(w io.Writer) {
	for _, m := range l.Machines() {
		tail := m.Serial().Tail(12)
		if len(tail) == 0 {
			continue
		}
		_, _ = fmt.Fprintf(w, "the last lines of %s's console:\n", m.Name())
		for _, line := range tail {
			_, _ = fmt.Fprintf(w, "    %s\n", line.Text)
		}
	}
	l.mu.Lock()
	children := l.children
	l.mu.Unlock()
	for _, c := range children {
		if s := tailOf(c.Log); s != "it said nothing" {
			_, _ = fmt.Fprintf(w, "the end of %s:\n    %s\n", c.Log, strings.ReplaceAll(s, "\n", "\n    "))
		}
	}
	_, _ = fmt.Fprintf(w, "everything is kept in %s\n", l.Dir)
}

// setPhase is shown by `muster lab list`.
func (l *Lab) setPhase(p string) {
	l.mu.Lock()
	l.phase = p
	l.mu.Unlock()
	_ = os.WriteFile(l.Path("phase"), []byte(p+"\n"), 0o644)
}

// Ready says that the lab is up and stays so until it is told to end: the
// scenario `up` calls it.
func (l *Lab) Ready(ctx context.Context) {
	l.setPhase("up")
	l.Note("lab", "ready", "")
	<-ctx.Done()
}
