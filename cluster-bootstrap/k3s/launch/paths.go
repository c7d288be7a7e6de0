package launch

import (
	"errors"
	"fmt"
	"path/filepath"
)

// Paths says where everything is on a node. Zero fields get the defaults.
type Paths struct {
	// State is muster's persistent directory (/var/lib/muster); ours is
	// State/k3s.
	State string
	// Run is volatile (/run/muster); ours is Run/k3s.
	Run string
	// Data is k3s' data-dir (/var/lib/rancher/k3s).
	Data string
	// Config is the directory of config.yaml (/etc/rancher/k3s).
	Config string
	// Node is where k3s keeps the node password (/etc/rancher/node). k3s does
	// not let anybody choose it; it is here for tests.
	Node string
}

// WithDefaults returns p with every empty field set.
func (p Paths) WithDefaults() Paths {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	set(&p.State, "/var/lib/muster")
	set(&p.Run, "/run/muster")
	set(&p.Data, "/var/lib/rancher/k3s")
	set(&p.Config, "/etc/rancher/k3s")
	set(&p.Node, "/etc/rancher/node")
	return p
}

// Validate reports all problems.
func (p Paths) Validate() error {
	p = p.WithDefaults()
	var errs []error
	for name, d := range map[string]string{"state": p.State, "run": p.Run, "data": p.Data, "config": p.Config, "node": p.Node} {
		if !filepath.IsAbs(d) || filepath.Clean(d) != d {
			errs = append(errs, fmt.Errorf("launch: path %s %q must be absolute and clean", name, d))
		}
	}
	return errors.Join(errs...)
}

// Files of ours. Persistent ones are below State, volatile ones below Run.

// RoleFile says what this node runs; see Role.
func (p Paths) RoleFile() string { return filepath.Join(p.State, "k3s", "role.json") }

// Tokens is the directory of the token files (0700, files 0600).
func (p Paths) Tokens() string { return filepath.Join(p.State, "k3s", "tokens") }

// LogFile is where k3s' output goes when it does not go to the journal.
func (p Paths) LogFile() string { return filepath.Join(p.State, "k3s", "log", "k3s.log") }

// GoFile is the permission to run k3s in this boot; see Go.
func (p Paths) GoFile() string { return filepath.Join(p.Run, "k3s", "go.json") }

// InitFile allows one start with cluster-init.
func (p Paths) InitFile() string { return filepath.Join(p.Run, "k3s", "cluster-init") }

// LeaseFile holds a candidate's lease; see Lease.
func (p Paths) LeaseFile() string { return filepath.Join(p.Run, "k3s", "lease.json") }

// LockFile is locked by the launcher, and by whoever runs k3s once.
func (p Paths) LockFile() string { return filepath.Join(p.Run, "k3s", "lock") }

// StatusFile is what the launcher says of itself; see Status.
func (p Paths) StatusFile() string { return filepath.Join(p.Run, "k3s", "launcher.json") }

// ProcessFile names the k3s process, written by that process before it
// becomes k3s.
func (p Paths) ProcessFile() string { return filepath.Join(p.Run, "k3s", "process.json") }

// NotifySocket receives k3s' sd_notify messages.
func (p Paths) NotifySocket() string { return filepath.Join(p.Run, "k3s", "notify") }

// ConfigFile is k3s' config file for the role.
func (p Paths) ConfigFile() string { return filepath.Join(p.Config, "config.yaml") }

// DropIns is the directory of an operator's own settings.
func (p Paths) DropIns() string { return filepath.Join(p.Config, "config.yaml.d") }

// Files of k3s.

// Server is the directory with everything that makes a node a server.
func (p Paths) Server() string { return filepath.Join(p.Data, "server") }

// WAL exists as soon as there is a datastore.
func (p Paths) WAL() string { return filepath.Join(p.Data, "server", "db", "etcd", "member", "wal") }

// Tombstone exists when the node was removed from the etcd members.
func (p Paths) Tombstone() string { return filepath.Join(p.Data, "server", "db", "etcd", "tombstone") }

// ResetFlag exists between a cluster-reset and the next normal start.
func (p Paths) ResetFlag() string { return filepath.Join(p.Data, "server", "db", "reset-flag") }

// AgentCert exists when a node has joined as an agent.
func (p Paths) AgentCert() string { return filepath.Join(p.Data, "agent", "client-kubelet.crt") }
