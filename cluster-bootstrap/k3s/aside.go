package k3s

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/internal/failpoint"
)

// keepAside is how many old datastores stay on the node.
const keepAside = 2

// asideNote is the journal of MoveAside.
type asideNote struct {
	ID   string `json:"id"`
	Role string `json:"role"` // what the node is afterwards: "none" or "worker"
}

func (m *Manager) asideFile() string { return filepath.Join(m.cfg.Paths.State, "k3s", "aside.json") }

// asideDir is on the file system of the data, so that moving is renaming.
func (m *Manager) asideDir() string { return filepath.Join(m.cfg.Paths.Data, "muster-aside") }

// MoveAside makes a worker (or, with RoleNone, a node that never joined) of a
// server: it moves the datastore away and deletes the server's secrets. What
// runs in containers, images and the node password stay. With RoleNone the
// worker's certificates go too. It goes on where it was interrupted.
//
// Old copies hold the datastore alone: a worker's disk must not hold what
// makes a server. The last keepAside stay.
func (m *Manager) MoveAside(ctx context.Context, role clusterbootstrap.Role) error {
	if role != clusterbootstrap.RoleWorker && role != clusterbootstrap.RoleNone {
		return fmt.Errorf("k3s: move aside: role %s", role)
	}
	if err := m.Stop(ctx); err != nil {
		return err
	}
	var n asideNote
	err := launch.ReadFile(m.asideFile(), &n)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		n = asideNote{ID: m.nextAside()}
	case err != nil:
		return fmt.Errorf("k3s: move aside: %w", err)
	case !asideName(n.ID):
		return fmt.Errorf("k3s: move aside: the journal names %.80q", n.ID)
	}
	// Interrupted as none and repeated as worker: the certificates may be
	// gone already, so that it stays none.
	if n.Role != clusterbootstrap.RoleNone.String() {
		n.Role = role.String()
	}
	steps := []struct {
		name string
		do   func() error
	}{
		{"journal", func() error { return launch.WriteFile(m.asideFile(), n) }},
		{"role", func() error { return launch.Remove(m.cfg.Paths.RoleFile()) }},
		{"tokens", func() error { return errors.Join(m.ForgetServerMaterial(), m.forgetServerTokens()) }},
		{"move", func() error { return m.moveServer(n.ID) }},
		{"scrub", func() error { return m.scrub(n.ID) }},
		{"worker", func() error {
			if n.Role != clusterbootstrap.RoleNone.String() {
				return nil
			}
			return m.dropWorker()
		}},
		// A config of a server would make the next start one.
		{"config", func() error { return launch.Remove(m.cfg.Paths.ConfigFile()) }},
		{"snapshot", func() error { return launch.Remove(m.snapshotFile()) }},
		{"prune", m.pruneAside},
		{"done", func() error { return launch.Remove(m.asideFile()) }},
	}
	for _, s := range steps {
		failpoint.Hit("k3s.aside." + s.name)
		if m.step != nil {
			if err := m.step(s.name); err != nil {
				return err
			}
		}
		if err := s.do(); err != nil {
			return fmt.Errorf("k3s: move aside: %s: %w", s.name, err)
		}
	}
	return nil
}

// secrets are what below server/ makes a server; everything there but the
// datastore and what an operator put in.
var secrets = []string{"token", "node-token", "agent-token", "cred", "tls", "etc"}

func (m *Manager) moveServer(id string) error {
	to := filepath.Join(m.asideDir(), id)
	server := m.cfg.Paths.Server()
	if err := os.MkdirAll(to, 0o700); err != nil {
		return fmt.Errorf("k3s: move aside: %w", err)
	}
	if err := launch.SyncDir(m.asideDir()); err != nil {
		return err
	}
	if exists(server) {
		// The datastore first: as long as secrets or datastore are in place,
		// the journal is, too.
		if err := os.Rename(server, filepath.Join(to, "server")); err != nil {
			return fmt.Errorf("k3s: move aside: %w", err)
		}
		if err := errors.Join(launch.SyncDir(to), launch.SyncDir(m.cfg.Paths.Data)); err != nil {
			return err
		}
	}
	return nil
}

// scrub deletes the secrets from the copy.
func (m *Manager) scrub(id string) error {
	to := filepath.Join(m.asideDir(), id)
	for _, s := range secrets {
		if err := os.RemoveAll(filepath.Join(to, "server", s)); err != nil {
			return fmt.Errorf("k3s: move aside: %w", err)
		}
	}
	if dir := filepath.Join(to, "server"); exists(dir) {
		return launch.SyncDir(dir)
	}
	return nil
}

// dropWorker deletes what lets the node in as a worker. Images and containers
// stay.
func (m *Manager) dropWorker() error {
	agent := filepath.Join(m.cfg.Paths.Data, "agent")
	var errs []error
	for _, g := range []string{"*.crt", "*.key", "*.kubeconfig", filepath.Join("etc", "*load-balancer.json")} {
		files, err := filepath.Glob(filepath.Join(agent, g))
		errs = append(errs, err)
		for _, f := range files {
			errs = append(errs, os.Remove(f))
		}
	}
	errs = append(errs, launch.Remove(m.tokenFile(tokenJoin)), launch.Remove(m.joinFile()))
	if exists(agent) {
		errs = append(errs, launch.SyncDir(agent))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("k3s: move aside: %w", err)
	}
	return nil
}

func asideName(s string) bool {
	return len(s) == 4 && strings.Trim(s, "0123456789") == ""
}

func (m *Manager) asides() []string {
	all, err := os.ReadDir(m.asideDir())
	if err != nil {
		return nil // none yet
	}
	var out []string
	for _, e := range all {
		if asideName(e.Name()) {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out
}

// nextAside counts up, so that names sort by age whatever the clock says.
func (m *Manager) nextAside() string {
	n := 0
	for _, a := range m.asides() {
		_, _ = fmt.Sscanf(a, "%d", &n) // sorted, of that form
	}
	if n >= 9999 {
		n = 0
	}
	return fmt.Sprintf("%04d", n+1)
}

func (m *Manager) pruneAside() error {
	all := m.asides()
	var errs []error
	for _, a := range all[:max(0, len(all)-keepAside)] {
		errs = append(errs, os.RemoveAll(filepath.Join(m.asideDir(), a)))
	}
	return errors.Join(errs...)
}
