package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/logutil"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"sigs.k8s.io/yaml"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

// StartNew founds a cluster of one, or starts an initialised member again.
func (s *Store) StartNew(ctx context.Context, initialised bool) error {
	if initialised {
		return s.start(ctx, "", "", false)
	}
	proc.Info("Managed etcd cluster initializing")
	return s.start(ctx, s.name+"="+s.peerURL(), "new", false)
}

// start writes db/etcd/config and runs etcd with it.
func (s *Store) start(ctx context.Context, initial, state string, reset bool) error {
	if err := os.MkdirAll(s.Dir(), 0o700); err != nil {
		return err
	}
	if err := os.Chmod(s.Dir(), 0o700); err != nil {
		return err
	}
	file := filepath.Join(s.Dir(), "config")
	c := map[string]any{
		"name":                           s.name,
		"data-dir":                       s.Dir(),
		"listen-client-urls":             endpoint + "," + s.clientURL(),
		"advertise-client-urls":          s.clientURL(),
		"listen-peer-urls":               "https://127.0.0.1:2380," + s.peerURL(),
		"initial-advertise-peer-urls":    s.peerURL(),
		"listen-metrics-urls":            "http://127.0.0.1:2381",
		"heartbeat-interval":             500,
		"election-timeout":               5000,
		"snapshot-count":                 10000,
		"warning-unary-request-duration": 300000000,
		"feature-gates":                  "InitialCorruptCheck=true",
		"log-outputs":                    []string{"stderr"},
		"logger":                         "zap",
		"log-level":                      "warn",
		"client-transport-security":      s.transport("server-client", "server-ca"),
		"peer-transport-security":        s.transport("peer-server-client", "peer-ca"),
	}
	if reset {
		c["listen-client-urls"], c["advertise-client-urls"] = endpoint, endpoint
		c["listen-peer-urls"] = "https://127.0.0.1:2380"
		c["force-new-cluster"] = true
	}
	if initial != "" {
		c["initial-cluster"], c["initial-cluster-state"] = initial, state
	}
	for _, a := range s.cfg.List("etcd-arg") {
		k, v, ok := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch n, err := strconv.ParseInt(v, 10, 64); {
		case !ok || v == "true":
			c[k] = true
		case v == "false":
			c[k] = false
		case err == nil:
			c[k] = n
		default:
			c[k] = v
		}
	}
	b, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return err
	}
	ec, err := embed.ConfigFromFile(file)
	if err != nil {
		return fmt.Errorf("etcd configuration: %w", err)
	}
	var removed atomic.Bool
	lg, err := s.logger(&removed)
	if err != nil {
		return err
	}
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(lg)
	e, err := embed.StartEtcd(ec)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	s.closed = make(chan struct{})
	go func() {
		defer close(s.closed)
		s.watch(ctx, e, &removed)
	}()
	return nil
}

// WaitClosed waits until etcd has closed its files.
func (s *Store) WaitClosed() error {
	if s.closed != nil {
		<-s.closed
	}
	return nil
}

func (s *Store) transport(leaf, ca string) map[string]any {
	return map[string]any{
		"cert-file": s.tree.Path("etcd", leaf+".crt"), "key-file": s.tree.Path("etcd", leaf+".key"),
		"client-cert-auth": true, "trusted-ca-file": s.tree.Path("etcd", ca+".crt"),
	}
}

// logger sees the one line that etcd writes when the member has been removed:
// the unmodified etcd has no other way to tell.
func (s *Store) logger(removed *atomic.Bool) (*zap.Logger, error) {
	zc := logutil.DefaultZapLoggerConfig
	zc.DisableStacktrace = true
	zc.Level = zap.NewAtomicLevelAt(zapcore.WarnLevel)
	zc.OutputPaths, zc.ErrorOutputPaths = []string{"stderr"}, []string{"stderr"}
	return zc.Build(zap.Hooks(func(e zapcore.Entry) error {
		if strings.Contains(e.Message, "data-dir used by this member must be removed") {
			removed.Store(true)
		}
		return nil
	}))
}

// watch ends etcd with the run and writes the tombstone of a removed member.
func (s *Store) watch(ctx context.Context, e *embed.Etcd, removed *atomic.Bool) {
	select {
	case <-ctx.Done():
		e.Close()
		return
	case <-e.Server.StopNotify():
	case err := <-e.Err():
		proc.Error("etcd exited: %v", err)
	}
	if removed.Load() {
		if err := os.WriteFile(s.tombstone(), nil, 0o600); err != nil {
			proc.Fatal("failed to write tombstone file to %s: %v", s.tombstone(), err)
		}
		e.Close()
		proc.Info("This node has been removed from the cluster - please restart k3s to rejoin the cluster")
		return
	}
	e.Close()
	if ctx.Err() == nil {
		proc.Error("etcd exited")
	}
}

// Close ends the client.
func (s *Store) Close() {
	if c := s.Client(); c != nil {
		_ = c.Close()
	}
}

// settle is how long a reset waits between looks.
const settle = time.Second
