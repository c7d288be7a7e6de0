package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The tests here start this test binary again: as the parent of a run, and
// that one starts it as the process inside.
func TestMain(m *testing.M) {
	find := func(string) (Scenario, bool) { return dummy, true }
	switch {
	case len(os.Args) > 2 && slices.Equal(os.Args[1:3], InsideArgs):
		ctx, cancel := context.WithCancel(context.Background())
		if err := Inside(ctx, os.Stdin, os.Stderr, find); err != nil {
			fmt.Fprintln(os.Stderr, err)
			cancel()
			os.Exit(1)
		}
		cancel()
		os.Exit(0)
	case os.Getenv("MUSTER_LAB_TEST_PARENT") != "":
		r, err := Launch(context.Background(), Spec{Scenario: "dummy", Dir: os.Getenv("MUSTER_LAB_TEST_PARENT"), Program: "/bin/sh", Timeout: time.Minute}, dummy, os.Stderr)
		if err != nil || !r.OK {
			fmt.Fprintln(os.Stderr, err, r.Error)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// dummy makes everything a real scenario makes but machines: a tap, the other
// host, long-lived programs, one of them with children that ignore signals.
var dummy = Scenario{Name: "dummy", Summary: "for tests", Run: func(ctx context.Context, l *Lab) error {
	if err := addTap("tap1"); err != nil {
		return err
	}
	if _, err := exec.LookPath("dnsmasq"); err == nil {
		if _, err := l.StartForeignDHCP(); err != nil {
			return err
		}
	}
	for _, script := range []string{
		"sleep 1001",
		"trap '' TERM INT HUP; (trap '' TERM; setsid sleep 1002) & wait; sleep 1003",
	} {
		if _, err := l.Start(fmt.Sprintf("sleeper%d", len(script)), "-c", script); err != nil {
			return err
		}
	}
	links, err := hostLinks()
	if err != nil {
		return err
	}
	if err := l.Check("the namespace has our interfaces only", func() error {
		for _, n := range links {
			if !strings.Contains(" lo mbr0 tap1 foreign0 ifb0 ifb1 ", " "+n+" ") {
				return fmt.Errorf("there is %s", n)
			}
		}
		return nil
	}()); err != nil {
		return err
	}
	if os.Getenv("MUSTER_LAB_TEST_QUICK") != "" {
		return nil
	}
	l.Ready(ctx)
	return nil
}}

// needLab skips, with the reason, where no lab can run. The dummy needs no
// QEMU, but Launch checks for it as for a real scenario.
func needLab(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("network namespaces are left out with -short")
	}
	if err := CheckHost(Spec{}); err != nil {
		t.Skip(err)
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "run")
}

// parent starts a run in a process of its own.
func parent(t *testing.T, dir string, env ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(append(os.Environ(), "MUSTER_LAB_TEST_PARENT="+dir), env...)
	out := &capped{most: 64 << 10}
	cmd.Stderr = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the run said:\n%s", out.String())
		}
	})
	return cmd
}

// until polls for something another process does.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("after 20 s still not: %s", what)
		}
	}
}

// inNamespace lists the processes whose PID namespace is ns.
func inNamespace(t *testing.T, ns string) []string {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		pid, err := strconv.Atoi(filepath.Base(e))
		if err != nil {
			t.Fatal(err)
		}
		// One that has ended and whose parent has not asked yet is nobody.
		if _, err := processStart(pid); err != nil {
			continue
		}
		if l, err := os.Readlink(filepath.Join(e, "ns", "pid")); err == nil && l == ns {
			b, _ := os.ReadFile(filepath.Join(e, "cmdline"))
			out = append(out, filepath.Base(e)+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return out
}

// marked lists processes that carry the run's directory in their environment.
func marked(dir string) []string {
	entries, _ := filepath.Glob("/proc/[0-9]*/environ")
	var out []string
	for _, e := range entries {
		if b, err := os.ReadFile(e); err == nil && strings.Contains(string(b), "MUSTER_LAB_RUN="+dir) {
			out = append(out, e)
		}
	}
	return out
}

func start(t *testing.T, dir string) (cmd *exec.Cmd, run Running, ns string) {
	t.Helper()
	cmd = parent(t, dir)
	until(t, "the run is up", func() bool {
		r, err := Find(dir)
		run = r
		return err == nil && r.State == "up" && r.PID != cmd.Process.Pid
	})
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", run.PID))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(inNamespace(t, ns)); n < 4 {
		t.Fatalf("the run has %d processes, too few to prove anything", n)
	}
	if len(marked(dir)) < 4 {
		t.Fatal("the run's processes do not carry its directory")
	}
	return cmd, run, ns
}

func TestRunWhenParentIsKilledThenNothingIsLeft(t *testing.T) {
	needLab(t)
	before, err := hostLinks()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	cmd, _, ns := start(t, dir)
	during, err := hostLinks()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(before, during) {
		t.Errorf("the host's interfaces changed from %v to %v", before, during)
	}

	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()

	until(t, "every process of the run has ended", func() bool { return len(inNamespace(t, ns)) == 0 })
	if left := marked(dir); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	after, err := hostLinks()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(before, after) {
		t.Errorf("the host's interfaces changed from %v to %v", before, after)
	}
	run, err := Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	if run.State != "killed" || run.Alive() || run.OK == nil || *run.OK {
		t.Errorf("the run is taken for %+v", run)
	}
	if _, err := os.Stat(filepath.Join(dir, controlFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket was not swept away: %v", err)
	}
}

func TestRunWhenToldToEndThenInOrder(t *testing.T) {
	needLab(t)
	dir := shortDir(t)
	cmd, run, ns := start(t, dir)
	a, err := Ask(dir, Request{Op: "status"})
	if err != nil || a.Phase != "up" {
		t.Errorf("status: %+v %v", a, err)
	}
	if _, err := Ask(dir, Request{Op: "dance"}); err == nil {
		t.Error("op dance: no error")
	}
	if _, err := Ask(dir, Request{Op: "reset", Machine: "node7"}); err == nil {
		t.Error("reset of a machine that is not there: no error")
	}
	if err := Down(run, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	if left := inNamespace(t, ns); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the parent: %v", err)
	}
	r, err := readResult(dir)
	if err != nil || !r.OK {
		t.Errorf("result %+v %v", r, err)
	}
}

func TestRunWhenScenarioEndsThenResult(t *testing.T) {
	needLab(t)
	dir := shortDir(t)
	cmd := parent(t, dir, "MUSTER_LAB_TEST_QUICK=1")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	r, err := readResult(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !r.OK || len(r.Checks) != 1 || r.Lab != "machine" || r.Dir != dir || r.Timings["total_s"] <= 0 {
		t.Errorf("result %+v", r)
	}
	again := parent(t, dir, "MUSTER_LAB_TEST_QUICK=1")
	if err := again.Wait(); err == nil {
		t.Error("a second run in the same directory: no error")
	}
	if now, err := readResult(dir); err != nil || !now.OK {
		t.Error("the second run has overwritten the first one's result")
	}
}
