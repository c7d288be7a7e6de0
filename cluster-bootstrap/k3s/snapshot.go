package k3s

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
)

var planID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.-]{0,63}$`)

// keepSnapshots is how many of ours stay on the node, beside k3s' own.
const keepSnapshots = 3

func (m *Manager) snapshotFile() string {
	return filepath.Join(m.cfg.Paths.State, "k3s", "snapshot.json")
}

func (m *Manager) snapshotDir() string { return filepath.Join(m.cfg.Paths.Server(), "db", "snapshots") }

// Snapshot takes an etcd snapshot for plan, or returns the one there is.
func (m *Manager) Snapshot(ctx context.Context, plan string) (Snapshot, error) {
	if !planID.MatchString(plan) {
		return Snapshot{}, fmt.Errorf("k3s: take snapshot: plan %.80q", plan)
	}
	var s Snapshot
	if launch.ReadFile(m.snapshotFile(), &s) == nil && s.Plan == plan {
		if fi, err := os.Stat(s.Path); err == nil && fi.Size() == s.Size {
			return s, nil
		}
	}
	name := "muster-" + plan
	before := m.snapshotsNamed(name)
	// The command asks the running server; it reads the server's token from
	// the data directory, so that no secret is among its arguments.
	cmd := exec.CommandContext(ctx, m.cfg.Binary, "etcd-snapshot", "save", "--name", name, "--data-dir", m.cfg.Paths.Data)
	cmd.Env = append(withoutK3s(os.Environ()), "K3S_CONFIG_FILE="+m.cfg.Paths.ConfigFile())
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	runErr := cmd.Run()
	// Whatever it said: there is a snapshot if there is a file.
	for _, f := range m.snapshotsNamed(name) {
		if slices.ContainsFunc(before, func(b os.DirEntry) bool { return b.Name() == f.Name() }) {
			continue
		}
		fi, err := f.Info()
		if err != nil || fi.Size() == 0 {
			continue
		}
		s = Snapshot{Plan: plan, Name: f.Name(), Path: filepath.Join(m.snapshotDir(), f.Name()), Size: fi.Size()}
		if err := syncFile(s.Path); err != nil {
			return Snapshot{}, err
		}
		if err := launch.WriteFile(m.snapshotFile(), s); err != nil {
			return Snapshot{}, err
		}
		m.pruneSnapshots(s.Name)
		return s, nil
	}
	return Snapshot{}, fmt.Errorf("k3s: take snapshot: no file appeared: %w: %.300s", errors.Join(runErr, ctx.Err()), lastLine(out.String()))
}

func withoutK3s(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, "K3S_") })
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("k3s: flush %s: %w", path, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("k3s: flush %s: %w", path, err)
	}
	return nil
}

func (m *Manager) snapshotsNamed(prefix string) []os.DirEntry {
	all, err := os.ReadDir(m.snapshotDir())
	if err != nil {
		return nil // none yet
	}
	return slices.DeleteFunc(all, func(e os.DirEntry) bool {
		return !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), prefix+"-") || strings.HasSuffix(e.Name(), ".part")
	})
}

// pruneSnapshots deletes old ones of ours. k3s forgets a snapshot whose file
// is gone the next time it looks.
func (m *Manager) pruneSnapshots(keep string) {
	all := m.snapshotsNamed("muster")
	slices.SortFunc(all, func(a, b os.DirEntry) int {
		x, errX := a.Info()
		y, errY := b.Info()
		if errX != nil || errY != nil {
			return cmp.Compare(a.Name(), b.Name())
		}
		return y.ModTime().Compare(x.ModTime())
	})
	for i, f := range all {
		if i < keepSnapshots || f.Name() == keep {
			continue
		}
		if err := os.Remove(filepath.Join(m.snapshotDir(), f.Name())); err != nil {
			m.cfg.Log.Warn("delete an old snapshot", "err", err)
		}
	}
}

// resetLimit bounds a cluster-reset; it took 8 s when measured.
const resetLimit = 10 * time.Minute

// Reset goes on from this node's own data: cluster-reset. It is done when
// ResetFlag is there, and then does nothing.
func (m *Manager) Reset(ctx context.Context, s Settings) error {
	if exists(m.cfg.Paths.ResetFlag()) {
		return nil
	}
	if !exists(m.cfg.Paths.WAL()) {
		return errors.New("k3s: reset: this node has no datastore")
	}
	return m.clusterReset(ctx, s)
}

// Restore goes on from snapshot file with the tokens of its time: server in
// K10 form or bare, as EscrowToken gave it.
func (m *Manager) Restore(ctx context.Context, s Settings, file, server, agent string) error {
	if exists(m.cfg.Paths.ResetFlag()) {
		return nil
	}
	if fi, err := os.Stat(file); err != nil || !fi.Mode().IsRegular() || fi.Size() == 0 || !filepath.IsAbs(file) {
		return errors.Join(fmt.Errorf("k3s: restore: %q is no snapshot", file), err)
	}
	// The CA of the old cluster is in the snapshot, and a new disk has no
	// other: what the hash pinned would only be compared with itself.
	if _, secret, bootstrap, err := ParseToken(server); err == nil && !bootstrap {
		server = secret
	}
	if !passwordForm.MatchString(server) || !passwordForm.MatchString(agent) {
		return errors.New("k3s: restore: the tokens have not the form of tokens")
	}
	if err := m.Stop(ctx); err != nil {
		return err
	}
	if err := errors.Join(m.writeToken(tokenAgent, agent), m.writeToken(tokenServer, server)); err != nil {
		return err
	}
	return m.clusterReset(ctx, s, "--cluster-reset-restore-path", file)
}

func (m *Manager) clusterReset(ctx context.Context, s Settings, args ...string) error {
	if err := m.Stop(ctx); err != nil {
		return err
	}
	if err := m.keepNodePassword(); err != nil {
		return err
	}
	s.Join = "" // k3s refuses to reset with a server to join
	if err := m.writeConfig(clusterbootstrap.RoleServer, s); err != nil {
		return err
	}
	// A tombstone is of the membership that ends here.
	if err := launch.Remove(m.cfg.Paths.Tombstone()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, resetLimit)
	defer cancel()
	all := append([]string{"server", "--config", m.cfg.Paths.ConfigFile(), "--cluster-reset"}, args...)
	if err := launch.Once(ctx, m.launcher(), all); err != nil {
		return fmt.Errorf("k3s: cluster-reset: %w", err)
	}
	if !exists(m.cfg.Paths.ResetFlag()) {
		return fmt.Errorf("k3s: cluster-reset: k3s ended and left no reset-flag; see %s", m.cfg.Paths.LogFile())
	}
	return launch.SyncDir(filepath.Dir(m.cfg.Paths.ResetFlag()))
}

// launcher is the launcher's configuration for what this package runs itself.
func (m *Manager) launcher() launch.Config {
	return launch.Config{Paths: m.cfg.Paths, Binary: m.cfg.Binary, Child: m.cfg.Child, Ports: m.cfg.Ports, Log: m.cfg.Log}
}
