package k3s

import (
	"context"
	"errors"
	"net/netip"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

var errUnbuilt = errors.New("k3s: not built yet")

// Manager does what the planner wants of this node's k3s. Its methods may be
// called from one goroutine at a time.
type Manager struct{ cfg Config }

// New checks cfg and returns a Manager.
func New(cfg Config) (*Manager, error) { return &Manager{cfg: cfg}, nil }

// Observe asks k3s, launcher and disk how things are. What cannot be learnt
// has its cautious value.
func (m *Manager) Observe(ctx context.Context) (clusterbootstrap.K3s, DiskSigns) {
	return clusterbootstrap.K3s{}, DiskSigns{}
}

// Tend starts the launcher again if it should run and died. Call it each turn.
func (m *Manager) Tend(ctx context.Context) error { return errUnbuilt }

// Start writes config and role file and the permission for this boot, then
// starts the launcher. Repeating it is no error.
func (m *Manager) Start(ctx context.Context, s Start) error { return errUnbuilt }

// Stop withdraws the permission and ends k3s; it returns when k3s is gone.
func (m *Manager) Stop(ctx context.Context) error { return errUnbuilt }

// SetRole changes the role file alone: a candidate that runs becomes a server
// without a restart.
func (m *Manager) SetRole(role clusterbootstrap.Role) error { return errUnbuilt }

// Reconfigure rewrites config.yaml for the next start; see Settings.Join.
func (m *Manager) Reconfigure(role clusterbootstrap.Role, s Settings) error { return errUnbuilt }

// KeepMaterial writes what a server gave, flushed. Server material is kept
// apart until Start with RoleCandidate takes it.
func (m *Manager) KeepMaterial(x Material) error { return errUnbuilt }

// ForgetServerMaterial deletes the server token of a plan that came to
// nothing: workers hold no server token.
func (m *Manager) ForgetServerMaterial() error { return errUnbuilt }

// WriteLease allows a candidate to run k3s until CLOCK_BOOTTIME is until.
func (m *Manager) WriteLease(plan string, until time.Duration) error { return errUnbuilt }

// Boottime is CLOCK_BOOTTIME, in which leases are counted.
func Boottime() time.Duration { return 0 }

// ReadLedger reads the ledger linearizably; nil if there is none.
func (m *Manager) ReadLedger(ctx context.Context) (*clusterbootstrap.Ledger, error) {
	return nil, errUnbuilt
}

// WriteLedger puts l if the stored version is still l.Version, and returns the
// new version; ErrConflict if not.
func (m *Manager) WriteLedger(ctx context.Context, l clusterbootstrap.Ledger) (uint64, error) {
	return 0, errUnbuilt
}

// WorkerMaterial makes a bootstrap token that lives for ttl. server is the
// address nodes join by: this node's.
func (m *Manager) WorkerMaterial(ctx context.Context, ttl time.Duration, server netip.Addr, b fleet.BirthSettings) (Material, error) {
	return Material{}, errUnbuilt
}

// ServerMaterial returns what a candidate needs.
func (m *Manager) ServerMaterial(ctx context.Context, server netip.Addr, b fleet.BirthSettings) (Material, error) {
	return Material{}, errUnbuilt
}

// Fit reports why this node cannot become a server by x (ErrUnfit), or nil:
// version, critical arguments, speed of the disk.
func (m *Manager) Fit(ctx context.Context, x Material, b fleet.BirthSettings) error {
	return errUnbuilt
}

// RemoveServer takes node out of the etcd members and waits until it is gone.
// With keepNode its Node object stays (it comes back as a worker under its old
// name and certificate), else it is deleted. A stuck learner is removed the
// same way.
func (m *Manager) RemoveServer(ctx context.Context, node fleet.NodeID, keepNode bool) error {
	return errUnbuilt
}

// Snapshot takes an etcd snapshot for plan, or returns the one there is.
func (m *Manager) Snapshot(ctx context.Context, plan string) (Snapshot, error) {
	return Snapshot{}, errUnbuilt
}

// EscrowToken is the server token that the snapshots of now need, and the
// agent token beside it.
func (m *Manager) EscrowToken() (server, agent string, err error) { return "", "", errUnbuilt }

// Reset goes on from this node's own data: cluster-reset. k3s must not run. It
// is done when ResetFlag is there.
func (m *Manager) Reset(ctx context.Context, s Settings) error { return errUnbuilt }

// Restore goes on from snapshot file with the tokens of its time.
func (m *Manager) Restore(ctx context.Context, s Settings, file, server, agent string) error {
	return errUnbuilt
}

// MoveAside moves server data away (with RoleNone the worker's certificates
// too) and deletes the server's secrets. It goes on where it was interrupted.
func (m *Manager) MoveAside(ctx context.Context, role clusterbootstrap.Role) error {
	return errUnbuilt
}

// Virgin reports whether the cluster holds nothing of anybody. Not cached.
func (m *Manager) Virgin(ctx context.Context) (bool, error) { return false, errUnbuilt }

// Version is the k3s version of Binary.
func (m *Manager) Version(ctx context.Context) (string, error) { return "", errUnbuilt }

// CriticalDigest stands for everything that k3s wants to be the same on all
// servers of a cluster, and max-learners.
func CriticalDigest(b fleet.BirthSettings) string { return "" }

// SettingsOf works the settings of node self out of the documents. peers are
// the servers to join by, best first; lan is the address without in-site
// addresses.
func SettingsOf(docs clusterbootstrap.Documents, self fleet.NodeID, servers []fleet.NodeID, lan netip.Addr) (Settings, error) {
	return Settings{}, errUnbuilt
}

// NodeLabels splits labels into those that a kubelet may set on its own Node,
// as "key=value", sorted, and the reasons why the others were left out.
func NodeLabels(labels map[string]string) (ok []string, refused []error) { return nil, nil }
