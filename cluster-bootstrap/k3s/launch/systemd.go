package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Systemd runs the launcher as a unit. The unit needs KillMode=process, so
// that containers live on, Restart=always, and a TimeoutStopSec above
// Config.StopTimeout; it is not enabled, since after power-on the node agent
// decides when k3s may run.
type Systemd struct {
	Unit  string // "" means muster-k3s.service
	Paths Paths
	// Systemctl is the program; "" means systemctl.
	Systemctl string
}

func (s *Systemd) unit() string {
	if s.Unit == "" {
		return "muster-k3s.service"
	}
	return s.Unit
}

func (s *Systemd) ctl(ctx context.Context, args ...string) (string, error) {
	name := s.Systemctl
	if name == "" {
		name = "systemctl"
	}
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("launch: %s %s: %w: %.200s", name, strings.Join(args, " "), errors.Join(err, ctx.Err()), strings.TrimSpace(errs.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// Start starts the unit. It does not wait for READY=1, which a worker may owe
// for ever when no server answers, but until the launcher holds the lock.
func (s *Systemd) Start(ctx context.Context) error {
	p := s.Paths.WithDefaults()
	if on, err := locked(p); on || err != nil {
		return err
	}
	// A unit that failed too often is not started again without this.
	if _, err := s.ctl(ctx, "reset-failed", s.unit()); err != nil && ctx.Err() != nil {
		return err
	}
	if _, err := s.ctl(ctx, "start", "--no-block", s.unit()); err != nil {
		return err
	}
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		if on, err := locked(p); on || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("launch: start %s: %w", s.unit(), ctx.Err())
		case <-t.C:
		}
	}
}

// Stop stops the unit and sees k3s gone: with KillMode=process systemd kills
// only the launcher when its time is over.
func (s *Systemd) Stop(ctx context.Context) error {
	if _, err := s.ctl(ctx, "stop", s.unit()); err != nil {
		return err
	}
	p := s.Paths.WithDefaults()
	if on, err := locked(p); err != nil {
		return err
	} else if on {
		// Started by hand, or by Direct before.
		return (&Direct{Paths: p}).Stop(ctx)
	}
	return endLeftover(ctx, p, 3*time.Minute)
}

// Running reports whether a launcher runs, whoever started it.
func (s *Systemd) Running(context.Context) (bool, error) {
	return locked(s.Paths.WithDefaults())
}
