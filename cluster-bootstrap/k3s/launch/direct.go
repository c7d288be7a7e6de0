package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Direct runs the launcher as a process of its own, with its own session, for
// machines without systemd and for the lab. It is found again by lock and
// status file, so that it outlives whoever started it.
type Direct struct {
	// Command is the launcher with its arguments. Required. For example
	// muster-node k3s --state ... --run ... --k3s ...
	Command []string
	Paths   Paths
	// Patience is how long a launcher may take to end before it is killed
	// (3 min, more than Config.StopTimeout).
	Patience time.Duration
	// Env is added to the environment.
	Env []string
}

const probeEvery = 20 * time.Millisecond

// Running reports whether a launcher holds the lock.
func (d *Direct) Running(context.Context) (bool, error) {
	return locked(d.Paths.WithDefaults())
}

// Start starts the launcher unless one runs.
func (d *Direct) Start(ctx context.Context) error {
	p := d.Paths.WithDefaults()
	if on, err := locked(p); on || err != nil {
		return err
	}
	if len(d.Command) == 0 {
		return errors.New("launch: start launcher: no command")
	}
	path := filepath.Join(filepath.Dir(p.LogFile()), "launcher.log")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("launch: start launcher: %w", err)
	}
	if err := rotate(path, 1<<20, 2); err != nil {
		return err
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("launch: start launcher: %w", err)
	}
	defer out.Close()
	cmd := exec.Command(d.Command[0], d.Command[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), d.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("launch: start launcher: %w", err)
	}
	gone := make(chan struct{})
	go func() { _ = cmd.Wait(); close(gone) }()
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		if s, err := p.ReadStatus(); err == nil && s.Launcher.PID == cmd.Process.Pid && s.Launcher.Alive() {
			return nil
		}
		select {
		case <-gone:
			if s, err := p.ReadStatus(); err == nil && s.Launcher.PID == cmd.Process.Pid {
				return nil // it ran, and had nothing to do
			}
			if on, err := locked(p); on || err != nil {
				return err // another one was faster
			}
			return fmt.Errorf("launch: start launcher: it ended at once; see %s", path)
		case <-ctx.Done():
			return fmt.Errorf("launch: start launcher: %w", ctx.Err())
		case <-t.C:
		}
	}
}

// Stop ends the launcher, which ends k3s.
func (d *Direct) Stop(ctx context.Context) error {
	p := d.Paths.WithDefaults()
	patience := d.Patience
	if patience == 0 {
		patience = 3 * time.Minute
	}
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		on, err := locked(p)
		if err != nil {
			return err
		}
		if !on {
			break
		}
		// Between locking and the first status it has no name yet.
		if s, err := p.ReadStatus(); err == nil && s.Launcher.Alive() {
			if err := s.Launcher.End(ctx, patience); err != nil {
				return err
			}
			continue
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("launch: stop launcher: %w", ctx.Err())
		case <-t.C:
		}
	}
	return endLeftover(ctx, p, patience)
}

// endLeftover ends a k3s whose launcher was killed.
func endLeftover(ctx context.Context, p Paths, patience time.Duration) error {
	return p.K3s().End(ctx, patience)
}
