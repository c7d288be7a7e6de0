package k3s

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// Paths says where everything is on a node.
type Paths = launch.Paths

// Config makes a Manager.
type Config struct {
	// Self is this node; it is k3s' node-name too. Required.
	Self  fleet.NodeID
	Paths Paths
	// Binary is the k3s program. Required.
	Binary string
	// Control starts and stops the launcher. Required.
	Control launch.Control
	// Child and Ports are those of launch.Config, for cluster-reset.
	Child []string
	Ports []int
	// Birth are the charter's birth settings of now; optional. Without it
	// K3s.Args is known after the first Start only.
	Birth func() (fleet.BirthSettings, bool)
	// API is where this node's k3s answers; zero: 127.0.0.1:6443. Workers use
	// the address in their kubeconfig.
	API netip.AddrPort
	// Timeout bounds each question to k3s (4 s).
	Timeout time.Duration
	// Boottime reads CLOCK_BOOTTIME; nil: the kernel's.
	Boottime func() time.Duration
	Log      *slog.Logger
}

// Settings is what config.yaml is made of. All servers of a cluster must get
// the same Birth; see SettingsOf.
type Settings struct {
	Self fleet.NodeID
	// Address is node-ip: the in-site address, or the LAN address when the
	// site has no in-site addresses.
	Address netip.Addr
	// Interface is flannel-iface; "" leaves the choice to k3s.
	Interface string
	Birth     fleet.BirthSettings
	// Labels are those of the Admission; those that a kubelet may not set are
	// left out and reported by NodeLabels.
	Labels map[string]string
	// Servers are the addresses that the API certificate must carry, sorted:
	// of all nodes that may serve.
	Servers []netip.Addr
	// Join is the server to join by: "https://IN-SITE:6443". For workers and
	// candidates "" means the one that last gave material; with three servers,
	// any other one for each server.
	Join string
	// Extra are more lines for a lab (kubelet-arg and the like), merged last;
	// they may not contain what is decided here.
	Extra map[string]any
}

// Material is what a server gives a node to join with. It holds secrets.
type Material struct {
	As clusterbootstrap.Role // RoleWorker or RoleServer
	// Server is the URL to join by.
	Server string
	// Token is a bootstrap token in K10 form for workers, the server token in
	// K10 form for servers.
	Token string
	// AgentToken is the second secret of the cluster, for servers only: one
	// that lacks it locks workers out.
	AgentToken string
	// Version is the k3s version of the server that gives, as `k3s --version`
	// prints it ("v1.36.3+k3s1"); a candidate must have the same one.
	Version string
	// Critical is CriticalDigest of the server that gives.
	Critical string
}

// DiskSigns is what k3s and this package leave on disk: it fills the same
// fields of clusterbootstrap.Disk.
type DiskSigns struct {
	// Role is the role file's; RoleNone if there is none. The planner's own
	// journal counts; this one is what the launcher goes by.
	Role      clusterbootstrap.Role
	Aside     bool // MoveAside was begun and is not finished
	Datastore bool
	Tombstone bool
	ResetFlag bool
	AgentCert bool
}

// Start is what to start.
type Start struct {
	Role clusterbootstrap.Role
	// Plan is the promotion whose lease a candidate needs. "": any lease of
	// this boot counts.
	Plan string
	// Unfenced is a candidate that takes the place of a dead server: two
	// others hold the quorum whatever it does, nobody resets, and it needs no
	// lease.
	Unfenced bool
	Settings Settings
	// Init makes a new cluster. RoleServer only, and only without datastore.
	Init bool
}

// Snapshot is an etcd snapshot on this node.
type Snapshot struct {
	Plan string `json:"plan"`
	Name string `json:"name"`
	Path string `json:"path"`
	Size int64  `json:"size"`
}

// Errors that callers tell apart.
var (
	// ErrConflict: the ledger was changed by somebody else in the meantime.
	ErrConflict = errors.New("k3s: the ledger changed in the meantime")
	// ErrRunning: a k3s process is in the way.
	ErrRunning = errors.New("k3s: a k3s process still runs")
	// ErrNotReady: this node's k3s does not answer, or is no server.
	ErrNotReady = errors.New("k3s: no server answers on this node")
	// ErrUnfit: the node cannot become a server; the text says why.
	ErrUnfit = errors.New("k3s: not fit to be a server")
)
