package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/lab/host"
	"github.com/muster-edge/muster/lab/machine"
)

// patience is how long a run may take to end in order.
const patience = 40 * time.Second

// UsageError is a mistake in what was asked for (exit code 2).
type UsageError struct{ Err error }

func (u *UsageError) Error() string { return u.Err.Error() }
func (u *UsageError) Unwrap() error { return u.Err }

// DefaultDir returns the directory of a run that begins now:
// $XDG_STATE_HOME/muster/lab/SCENARIO-TIME.
func DefaultDir(scenario string, now time.Time) (string, error) {
	home, err := Home()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, scenario+"-"+now.UTC().Format("20060102-150405.000")), nil
}

// Home is the directory of all runs.
func Home() (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("lab: find state directory: %w", err)
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "muster", "lab"), nil
}

// CheckHost returns an *Unable when the spec cannot run on this host.
func CheckHost(s Spec) error {
	err := checkNetworkRights()
	var unable *Unable
	if err != nil && !errors.As(err, &unable) {
		return err
	}
	out := Unable{}
	var reasons []string
	if unable != nil {
		reasons = append(reasons, unable.Reason)
	}
	if s.host {
		missing, _ := host.CheckHost()
		for _, m := range missing {
			reasons = append(reasons, m+" is missing")
		}
		if len(missing) > 0 {
			out.Packages = append(out.Packages, "swtpm-tools")
		}
		if s.K3s == "" {
			reasons = append(reasons, "there is no k3s: give --k3s PATH or $K3S, put k3s on PATH, or build the stand-in (make standin)")
		}
	} else {
		seen := map[string]bool{}
		for _, m := range machine.CheckHost(s.SecureBoot) {
			reasons = append(reasons, m.What+" is missing")
			if !seen[m.Package] {
				seen[m.Package] = true
				out.Packages = append(out.Packages, m.Package)
			}
		}
	}
	if s.disk {
		if s.K3s == "" {
			reasons = append(reasons, "there is no k3s for the image: give --k3s PATH or $K3S, put k3s on PATH, or build the stand-in (make standin)")
		}
		for _, t := range []struct{ program, pkg string }{{"mmdebstrap", "mmdebstrap"}, {"mkfs.erofs", "erofs-utils"}, {"veritysetup", "cryptsetup-bin"}, {"depmod", "kmod"}} {
			if _, err := exec.LookPath(t.program); err != nil {
				reasons = append(reasons, "the program "+t.program+" is missing")
				out.Packages = append(out.Packages, t.pkg)
			}
		}
		if os.Geteuid() != 0 {
			reasons = append(reasons, "slot images are built as root")
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	out.Reason = strings.Join(reasons, "; ")
	return &out
}

// Launch runs a scenario to its end and returns its result. The error is for
// runs that have none: *UsageError, *Unable, or something broken; what a
// scenario found not to hold is in the result. people gets progress lines.
//
// When ctx ends, the run is ended in order. When this process is killed, the
// kernel ends everything.
func Launch(ctx context.Context, s Spec, sc Scenario, people io.Writer) (Result, error) {
	p, err := prepare(ctx, s, sc, people)
	if err != nil {
		return p.result, err
	}
	in, err := enterNamespaces(p.briefing(), true, io.Discard, people)
	if err != nil {
		return p.fail(err)
	}
	if err := writeRecord(p.spec, in.cmd.Process.Pid, false); err != nil {
		in.stop(patience)
		return p.fail(err)
	}
	if s.Keep {
		_, _ = fmt.Fprintf(people, "look around inside with: nsenter -t %d -n -m -p\n", in.cmd.Process.Pid)
	}
	select {
	case <-in.done:
	case <-ctx.Done():
		_, _ = fmt.Fprintln(people, "ending the run...")
		in.stop(patience)
	}
	result, err := readResult(p.spec.Dir)
	if err != nil {
		return p.fail(fmt.Errorf("lab: the run ended without a result (%v)", in.err))
	}
	return result, nil
}

// LaunchDetached starts a lab that stays after this process, and returns when
// it is up.
func LaunchDetached(ctx context.Context, s Spec, sc Scenario, people io.Writer) (Result, error) {
	p, err := prepare(ctx, s, sc, people)
	if err != nil {
		return p.result, err
	}
	log, err := os.OpenFile(filepath.Join(p.spec.Dir, "lab.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return p.fail(fmt.Errorf("lab: open log: %w", err))
	}
	defer log.Close()
	in, err := enterNamespaces(p.briefing(), false, log, log)
	if err != nil {
		return p.fail(err)
	}
	if err := writeRecord(p.spec, in.cmd.Process.Pid, true); err != nil {
		in.stop(patience)
		return p.fail(err)
	}
	follower := follow(filepath.Join(p.spec.Dir, "lab.log"), people)
	defer follower.Close()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		if b, err := os.ReadFile(filepath.Join(p.spec.Dir, "phase")); err == nil && strings.TrimSpace(string(b)) == "up" {
			r := p.result
			r.OK = true
			return r, nil
		}
		select {
		case <-tick.C:
		case <-in.done:
			if r, err := readResult(p.spec.Dir); err == nil {
				return r, nil
			}
			return p.fail(fmt.Errorf("lab: the lab ended before it was up (%v)", in.err))
		case <-ctx.Done():
			in.stop(patience)
			return p.fail(fmt.Errorf("lab: interrupted: %w", ctx.Err()))
		}
	}
}

// preparation is what a run has before its namespaces.
type preparation struct {
	spec   Spec
	began  time.Time
	result Result
}

func (p *preparation) briefing() briefing {
	return briefing{Spec: p.spec, BeganAgo: time.Since(p.began), Result: p.result}
}

// fail writes down a run that ended early.
func (p *preparation) fail(err error) (Result, error) {
	p.result.Error = err.Error()
	var unable *Unable
	p.result.Unable = errors.As(err, &unable)
	if p.spec.Dir != "" {
		return p.result, errors.Join(err, p.result.write(p.spec.Dir))
	}
	return p.result, err
}

func prepare(ctx context.Context, s Spec, sc Scenario, people io.Writer) (*preparation, error) {
	s.host, s.disk = sc.Host, sc.Disk
	if s.Nodes == 0 {
		s.Nodes = sc.Nodes
	}
	if s.Timeout == 0 {
		s.Timeout = sc.Timeout
	}
	s = s.Defaults()
	p := &preparation{spec: s, began: time.Now(), result: newResult(s)}
	if err := s.Validate(); err != nil {
		p.spec.Dir = "" // nothing is written where nothing was agreed
		r, _ := p.fail(&UsageError{err})
		p.result = r
		return p, &UsageError{err}
	}
	if err := CheckHost(s); err != nil {
		p.spec.Dir = ""
		p.result, _ = p.fail(err)
		return p, err
	}
	if old, err := os.ReadDir(s.Dir); err == nil && len(old) > 0 {
		err := &UsageError{fmt.Errorf("lab: %s is not empty: each run wants a new directory", s.Dir)}
		p.spec.Dir = ""
		p.result, _ = p.fail(err)
		return p, err
	}
	// Runs hold keys of lab authorities: for the user alone.
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		p.spec.Dir = ""
		err = fmt.Errorf("lab: make run directory: %w", err)
		p.result, _ = p.fail(err)
		return p, err
	}
	if err := writeRecord(s, os.Getpid(), false); err != nil {
		p.result, err = p.fail(err)
		return p, err
	}
	l, err := newLab(p.briefing(), people)
	if err != nil {
		p.result, err = p.fail(err)
		return p, err
	}
	defer l.line.Close()
	l.Note("lab", "begin", sc.Name)
	if sc.Prepare != nil {
		if err := sc.Prepare(ctx, l); err != nil {
			l.Say("lab", "failed", err.Error())
			p.result, err = p.fail(err)
			return p, err
		}
	}
	// Preparation may have recorded timings and checks, and filled in what
	// was left open (the image it built).
	p.result, p.spec = l.result, l.Spec
	return p, nil
}
