package launch

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// Config is a launcher. Zero durations get the defaults.
type Config struct {
	Paths  Paths
	Binary string // k3s
	// Journal leaves k3s' output where the launcher's goes, instead of
	// Paths.LogFile.
	Journal bool
	// LogSize and LogFiles bound the log (8 MiB, 4 files).
	LogSize  int64
	LogFiles int
	// StopTimeout is how long k3s may take to end before it is killed (90 s).
	StopTimeout time.Duration
	// Pause is the time before k3s is started again (5 s); after six starts in
	// a row it doubles up to MaxPause (60 s).
	Pause, MaxPause time.Duration
	Log             *slog.Logger
}

// Launcher is `muster-node k3s`.
type Launcher struct{ cfg Config }

// New checks cfg and returns a Launcher.
func New(cfg Config) (*Launcher, error) { return &Launcher{cfg: cfg}, nil }

// Run runs k3s as the files say until ctx ends or the permission is withdrawn,
// and then ends k3s in order.
func (l *Launcher) Run(ctx context.Context) error { return errors.New("launch: not built yet") }

// Systemd controls the launcher as a systemd unit.
type Systemd struct {
	Unit  string // muster-k3s.service
	Paths Paths
}

// Direct runs the launcher as a process of its own, for machines without
// systemd and for the lab.
type Direct struct {
	// Command is the launcher with its arguments; nil: this program with
	// "k3s" and the paths and Binary below.
	Command []string
	Binary  string
	Paths   Paths
}
