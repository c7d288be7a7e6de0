package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
)

// record is run.json: whose process a run is. It makes runs findable and
// tells the living from those that were killed.
type record struct {
	Scenario string    `json:"scenario"`
	Nodes    int       `json:"nodes"`
	Started  time.Time `json:"started"`
	// PID and Ticks name the process that the run depends on; a PID alone
	// could be somebody else's by now.
	PID      int    `json:"pid"`
	Ticks    uint64 `json:"start_ticks"`
	BootID   string `json:"boot_id"`
	Detached bool   `json:"detached"`
}

const (
	recordFile  = "run.json"
	controlFile = "control.sock"
)

func writeRecord(s Spec, pid int, detached bool) error {
	ticks, err := processStart(pid)
	if err != nil {
		// It has ended already: its result says why.
		return nil
	}
	b, err := json.Marshal(record{Scenario: s.Scenario, Nodes: s.Nodes, Started: time.Now().UTC(), PID: pid, Ticks: ticks, BootID: bootID(), Detached: detached})
	if err != nil {
		return fmt.Errorf("lab: write run record: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(s.Dir, recordFile), b, 0o644); err != nil {
		return fmt.Errorf("lab: write run record: %w", err)
	}
	enlist(s.Dir)
	return nil
}

// Running describes a run found on this host.
type Running struct {
	Name     string    `json:"name"`
	Dir      string    `json:"dir"`
	Scenario string    `json:"scenario"`
	Nodes    int       `json:"nodes"`
	Started  time.Time `json:"started"`
	// State is "running", "up", "kept", "ending", "ended" or "killed".
	State string `json:"state"`
	PID   int    `json:"pid,omitempty"`
	// OK is the result's verdict once there is one.
	OK *bool `json:"ok,omitempty"`
}

// Alive reports whether the run's processes exist.
func (r Running) Alive() bool { return r.PID != 0 }

// enlist makes a run that lives elsewhere findable by its name: a link in
// Home. The name may be taken, or Home not writable; then the run is known by
// its directory only, which is no reason to fail.
func enlist(dir string) {
	home, err := Home()
	if err != nil || filepath.Dir(dir) == home {
		return
	}
	if os.MkdirAll(home, 0o700) != nil {
		return
	}
	link := filepath.Join(home, filepath.Base(dir))
	if at, err := os.Readlink(link); err == nil {
		if r, err := Find(at); err == nil && at != dir && (r.State == "up" || r.State == "running") {
			return
		}
		_ = os.Remove(link)
	}
	_ = os.Symlink(dir, link)
}

// List returns the runs of this user, newest first. Runs that were killed are
// cleaned of their sockets and get a result that says so.
func List() ([]Running, error) {
	home, err := Home()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(home)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("lab: list runs: %w", err)
	}
	var out []Running
	for _, e := range entries {
		if r, err := Find(filepath.Join(home, e.Name())); err == nil {
			out = append(out, r)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Started.After(out[j].Started) })
	return out, nil
}

// Find reads one run, by its name below Home or by its directory.
func Find(name string) (Running, error) {
	dir := name
	if !strings.ContainsRune(name, filepath.Separator) {
		home, err := Home()
		if err != nil {
			return Running{}, err
		}
		dir = filepath.Join(home, name)
	}
	b, err := readCapped(filepath.Join(dir, recordFile), 64<<10)
	if err != nil {
		return Running{}, fmt.Errorf("lab: find run %s: %w", name, err)
	}
	var rec record
	if err := json.Unmarshal(b, &rec); err != nil {
		return Running{}, fmt.Errorf("lab: find run %s: %w", name, err)
	}
	r := Running{Name: filepath.Base(dir), Dir: dir, Scenario: rec.Scenario, Nodes: rec.Nodes, Started: rec.Started, State: "ended"}
	if rec.alive() {
		r.PID, r.State = rec.PID, "running"
		if phase, err := readCapped(filepath.Join(dir, "phase"), 64); err == nil {
			r.State = strings.TrimSpace(string(phase))
		}
		return r, nil
	}
	result, err := readResult(dir)
	if err != nil {
		r.State = "killed"
		result = newResult(Spec{Scenario: rec.Scenario, Nodes: rec.Nodes, Dir: dir})
		result.Error = "lab: the run was killed"
		_ = result.write(dir) // the next look tries again
		sweep(dir)
	}
	if result.Error == "lab: the run was killed" {
		r.State = "killed"
	}
	r.OK = &result.OK
	return r, nil
}

func (r record) alive() bool {
	if r.BootID != bootID() || r.PID <= 0 {
		return false
	}
	ticks, err := processStart(r.PID)
	return err == nil && ticks == r.Ticks
}

// sweep removes the sockets of a run that was killed; the kernel has taken
// everything else.
func sweep(dir string) {
	for _, pattern := range []string{controlFile, "*/qmp.sock", "*/tpm/tpm.ctrl"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			continue // the patterns are constant and right
		}
		for _, f := range found {
			_ = os.Remove(f)
		}
	}
}

// Down ends a run: in order, or by force when it does not listen.
func Down(r Running, wait time.Duration) error {
	if !r.Alive() {
		return nil
	}
	_, askErr := Ask(r.Dir, Request{Op: "down"})
	if askErr != nil {
		// PID 1 of the namespace; its death is the death of all in it.
		if err := syscall.Kill(r.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("lab: end run %s: %w", r.Name, err)
		}
	}
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	forced := false
	for {
		now, err := Find(r.Dir)
		if err != nil || !now.Alive() {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			if forced {
				return fmt.Errorf("lab: end run %s: process %d does not end", r.Name, r.PID)
			}
			forced = true
			_ = syscall.Kill(r.PID, syscall.SIGKILL)
			deadline.Reset(5 * time.Second)
		}
	}
}

// Request is one message to a running lab; Answer its reply. One JSON object
// per line each, one request per connection.
type Request struct {
	// Op is "status", "down", "power-on", "power-off" or "reset".
	Op      string `json:"op"`
	Machine string `json:"machine,omitempty"`
}

// Answer is the reply to a Request.
type Answer struct {
	OK       bool            `json:"ok"`
	Error    string          `json:"error,omitempty"`
	Phase    string          `json:"phase,omitempty"`
	Machines []MachineStatus `json:"machines,omitempty"`
}

// MachineStatus is one machine of a running lab.
type MachineStatus struct {
	Name string `json:"name"`
	On   bool   `json:"on"`
	MAC  string `json:"mac"`
	// Last is the last line of its console.
	Last string `json:"last,omitempty"`
}

// maxControl caps a message on the control socket.
const maxControl = 256 << 10

// Ask sends a request to the lab in dir.
func Ask(dir string, req Request) (Answer, error) {
	conn, err := net.DialTimeout("unix", filepath.Join(dir, controlFile), 5*time.Second)
	if err != nil {
		return Answer{}, fmt.Errorf("lab: ask the lab: %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return Answer{}, fmt.Errorf("lab: ask the lab: %w", err)
	}
	var a Answer
	if err := json.NewDecoder(io.LimitReader(conn, maxControl)).Decode(&a); err != nil {
		return Answer{}, fmt.Errorf("lab: ask the lab: %w", err)
	}
	if !a.OK {
		return a, fmt.Errorf("lab: the lab refuses: %s", a.Error)
	}
	return a, nil
}

// follower copies a growing file to a writer until closed.
type follower struct {
	once sync.Once
	end  chan struct{}
	done chan struct{}
}

func follow(path string, to io.Writer) *follower {
	f := &follower{end: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(f.done)
		_ = Follow(f.end, path, to)
	}()
	return f
}

func (f *follower) Close() {
	f.once.Do(func() { close(f.end) })
	<-f.done
}

// Follow copies what is in a file and what is added to it until end closes.
func Follow(end <-chan struct{}, path string, to io.Writer) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("lab: follow log: %w", err)
	}
	defer file.Close()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := io.Copy(to, file); err != nil {
			return fmt.Errorf("lab: follow log: %w", err)
		}
		select {
		case <-end:
			_, err := io.Copy(to, file)
			return err
		case <-tick.C:
		}
	}
}
