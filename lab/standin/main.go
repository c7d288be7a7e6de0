//go:build labstandin

// Command k3s-standin behaves like k3s where muster relies on k3s, for tests on
// machines without a k3s. It is a real etcd and a real kube-apiserver with a
// supervisor and an agent of our own, and it runs no containers. It is no k3s:
// it says so in its version, on its Nodes and in every answer, and it starts
// only with LAB_STANDIN=1.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/node"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
	"github.com/muster-edge/muster/lab/standin/internal/server"
)

const usage = `k3s-standin: k3s for tests, without containers (not k3s)

  server         run a server       (--cluster-init, --server, --cluster-reset, ...)
  agent          run an agent
  token          create, list, delete bootstrap tokens
  etcd-snapshot  save, ls, delete
  --version
`

func main() {
	var args []string
	for _, a := range os.Args[1:] {
		args = append(args, strings.Clone(a)) // the originals are overwritten by the title
	}
	if len(args) == 0 {
		fmt.Print(usage)
		return
	}
	if slices.Contains([]string{"--version", "-v", "version"}, args[0]) {
		fmt.Printf("k3s version %s (lab)\ngo version %s\n", proc.Version, runtime.Version())
		return
	}
	if os.Getenv("LAB_STANDIN") != "1" {
		fmt.Fprintln(os.Stderr, "k3s-standin: this is a stand-in for tests and not k3s; it starts only with LAB_STANDIN=1")
		os.Exit(1)
	}
	var err error
	switch cmd, rest := args[0], args[1:]; cmd {
	case "server", "agent":
		err = run(cmd, rest)
	case "token":
		err = tokenCommand(rest)
	case "etcd-snapshot":
		err = snapshotCommand(rest)
	default:
		fmt.Fprint(os.Stderr, usage)
		err = fmt.Errorf("unknown command %q", filepath.Base(cmd))
	}
	if err != nil && !errors.Is(err, proc.ErrShutdown) && !errors.Is(err, context.Canceled) {
		proc.Fatal("%v", err)
	}
}

func run(role string, args []string) error {
	cfg, err := conf.New(role, args, func(s string) { proc.Warn("%s", s) })
	if err != nil {
		return err
	}
	proc.Title("k3s " + role)
	proc.Quiet()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, sd := proc.NewShutdown(ctx)
	if role == "agent" {
		return node.Run(ctx, sd, cfg, false)
	}
	return server.Run(ctx, sd, cfg, func(ctx context.Context) error { return node.Run(ctx, sd, cfg, true) })
}
