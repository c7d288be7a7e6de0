package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
)

// launchK3s is `muster-node k3s`: it runs k3s as the role file says. The node
// agent starts it, by systemd or itself.
func launchK3s(args []string) int {
	f := flag.NewFlagSet("muster-node k3s", flag.ContinueOnError)
	var c launch.Config
	f.StringVar(&c.Paths.State, "state", "", "persistent directory (/var/lib/muster)")
	f.StringVar(&c.Paths.Run, "run", "", "volatile directory (/run/muster)")
	f.StringVar(&c.Paths.Data, "k3s-data", "", "data-dir of k3s (/var/lib/rancher/k3s)")
	f.StringVar(&c.Paths.Config, "k3s-config", "", "directory of k3s' config.yaml (/etc/rancher/k3s)")
	f.StringVar(&c.Binary, "k3s", "/usr/local/bin/k3s", "the k3s program")
	f.BoolVar(&c.Journal, "journal", false, "k3s writes to where this writes, instead of STATE/k3s/log/k3s.log")
	f.DurationVar(&c.StopTimeout, "stop-timeout", 90*time.Second, "how long k3s may take to end")
	if err := f.Parse(args); err != nil || f.NArg() > 0 {
		return 2
	}
	c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	l, err := launch.New(c)
	if err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: k3s: %v\n", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err = l.Run(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: k3s: %v\n", err)
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, launch.ErrLocked):
		return 3 // another one does it; systemd need not try again
	}
	return 1
}

// becomeK3s is `muster-node k3s-child`, which the launcher calls.
func becomeK3s(args []string) int {
	if err := launch.BecomeK3s(args); err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: k3s-child: %v\n", err)
		return 1
	}
	return 0 // it was a candidate's guard
}
