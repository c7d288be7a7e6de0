package member

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent/hostnet"
	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/agent/peer"
	"github.com/muster-edge/muster/agent/spool"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/discovery"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// Journal is what the node must not forget; *journal.Journal has it.
type Journal interface {
	Disk() cb.Disk
	Boots() uint64
	Update(change func(*cb.Disk)) error
	Failed() error
	Mend() error
}

// Mark is the cluster's UID in the TPM; *device.Device has it.
type Mark interface {
	Mark() (string, error)
	SetMark(uid string) error
}

// Papers are the documents of the site; *papers.Papers has it.
type Papers interface {
	Learn(envelopes [][]byte) (int, error)
	Documents() cb.Documents
	Revision() uint64
	Changed() <-chan struct{}
	Orders(now time.Time) []fleet.Order
}

// K3s is this node's k3s; *k3s.Manager has it. It is called by one goroutine
// at a time.
type K3s interface {
	Observe(ctx context.Context) (cb.K3s, k3s.DiskSigns)
	Tend(ctx context.Context) error
	Start(ctx context.Context, s k3s.Start) error
	Stop(ctx context.Context) error
	SetRole(role cb.Role) error
	Reconfigure(role cb.Role, s k3s.Settings) error
	KeepMaterial(x k3s.Material) error
	ForgetServerMaterial() error
	WriteLease(plan string, until time.Duration) error
	WriteLedger(ctx context.Context, l cb.Ledger) (uint64, error)
	WorkerMaterial(ctx context.Context, ttl time.Duration, server netip.Addr, b fleet.BirthSettings) (k3s.Material, error)
	ServerMaterial(ctx context.Context, server netip.Addr, b fleet.BirthSettings) (k3s.Material, error)
	Fit(ctx context.Context, x k3s.Material, b fleet.BirthSettings) error
	RemoveServer(ctx context.Context, node fleet.NodeID, keepNode bool) error
	Snapshot(ctx context.Context, plan string) (k3s.Snapshot, error)
	EscrowToken() (server, agent string, err error)
	Reset(ctx context.Context, s k3s.Settings) error
	Restore(ctx context.Context, s k3s.Settings, file, server, agent string) error
	MoveAside(ctx context.Context, role cb.Role) error
	Virgin(ctx context.Context) (bool, error)
}

// Host is the network of the host; *hostnet.Host has it.
type Host interface {
	Apply(hostnet.Desired) error
}

// Conn is a connection to a peer; *peer.Conn has it.
type Conn interface {
	Hello(ctx context.Context) (peer.Greeting, error)
	Exchange(ctx context.Context) (int, error)
	Status(ctx context.Context) (cb.Status, bool, error)
	JoinMaterial(ctx context.Context, as cb.Role, plan string) (peer.Material, error)
	Lease(ctx context.Context, plan string) (time.Duration, error)
	Turn(ctx context.Context, ask turns.Ask) (turns.Reply, error)
	KeepEscrow(ctx context.Context, b peer.Blob, data io.Reader) error
	Close() error
}

// Centre is the way to the centre. Calls may take as long as their context;
// none of them is made by the loop itself.
type Centre interface {
	// AskFounding asks for the right to found with uid.
	AskFounding(ctx context.Context, site, uid string) (Grant, error)
	// PutEscrow hands over a sealed blob.
	PutEscrow(ctx context.Context, b peer.Blob, taken time.Time, keyID string, data io.Reader) error
	// Handover fetches the snapshot that an operator sealed for this node and
	// opens it: its file and the two tokens.
	Handover(ctx context.Context, id, dir string) (Restored, error)
}

// Grant is the centre's answer about founding. Node and UID are who holds the
// right, "" if nobody does.
type Grant struct {
	Node   fleet.NodeID
	UID    string
	Unsure bool
}

// Restored is a snapshot with the secrets that it needs.
type Restored struct {
	File                    string
	ServerToken, AgentToken string
}

// Multicast finds peers on the link; *mdns.Service has it.
type Multicast interface {
	Run(ctx context.Context) error
	Wait(ctx context.Context) ([]discovery.Hint, error)
}

// Clock is where time comes from.
type Clock struct {
	// Now is the wall clock. It ends orders and dates lines for people.
	Now func() time.Time
	// Boottime is CLOCK_BOOTTIME: it goes on while the machine sleeps, so that
	// no lease outlives a sleep. Everything else is measured by it.
	Boottime func() time.Duration
}

// boottime reads the kernel's CLOCK_BOOTTIME.
func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // it cannot fail with a valid clock and pointer
	}
	return time.Duration(ts.Nano())
}

// Config says what a Member works with. What is not marked optional is needed.
type Config struct {
	Self fleet.NodeID
	// Boot tells this run of the agent from all others.
	Boot string
	// StateDir and RunDir hold files of this package: peers.json, escrow.
	StateDir string
	RunDir   string
	// Listen is the address of the peer API; only its port is told to others.
	Listen string
	// Link limits the LAN interface; "" is any. Optional.
	Link string
	// Snapshots is the directory of k3s' etcd snapshots. Optional: only what the
	// centre hands over can be restored.
	Snapshots string
	// Configured are addresses of peers from the configuration. Optional.
	Configured []netip.AddrPort

	Journal Journal
	Mark    Mark
	Papers  Papers
	K3s     K3s
	Host    Host
	// SettingsOf works k3s' settings out of the documents; default: k3s'.
	SettingsOf func(docs cb.Documents, self fleet.NodeID, servers []fleet.NodeID, lan netip.Addr) (k3s.Settings, error)
	// Spool takes acts and notes for the centre. Optional.
	Spool *spool.Spool
	// Multicast makes the mDNS service of a site; nil is no mDNS.
	Multicast func(tag discovery.SiteTag) (Multicast, error)
	// Own tells this host's address on the LAN; default: OwnAddress(Link).
	Own func() netip.Addr
	// Centre: nil is a site without centre.
	Centre Centre
	// SignRecord signs a cluster record with this node's key.
	SignRecord func(tenant, site string, r cb.Record) ([]byte, error)
	// Lease reads the lease that an earlier run of the agent in this boot left
	// for the launcher: its plan and end by CLOCK_BOOTTIME. Optional.
	Lease func() (plan string, until time.Duration, ok bool)
	// Withdrawn reports whether the centre took an order back. Optional.
	Withdrawn func(order string) bool
	// Labels are those of the hardware, for the k3s node. Optional.
	Labels map[string]string
	// Extra goes into k3s.Settings.Extra: labs only. Optional.
	Extra map[string]any
	// Firewall: limit the ports of k3s to admitted nodes.
	Firewall bool

	// Policy holds the protocol's timers; zero fields get the defaults.
	Policy cb.Policy
	// Hello is the pause between two status exchanges with a peer (5 s).
	Hello time.Duration
	// EscrowEvery is how old the newest copied snapshot may get (1 h).
	EscrowEvery time.Duration

	Clock Clock
	// Rand gives jitter and, by default from the kernel, fresh texts. Optional.
	Rand *rand.Rand
	// Fresh makes a random 128-bit text. Optional.
	Fresh func() string
	// Log gets the time line. Optional.
	Log *slog.Logger
}

func (c *Config) defaults() {
	if c.Clock.Now == nil {
		c.Clock.Now = time.Now
	}
	if c.Clock.Boottime == nil {
		c.Clock.Boottime = boottime
	}
	if c.Rand == nil {
		c.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	if c.Fresh == nil {
		c.Fresh = freshText
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Hello <= 0 {
		c.Hello = 5 * time.Second
	}
	if c.EscrowEvery <= 0 {
		c.EscrowEvery = time.Hour
	}
	if c.SettingsOf == nil {
		c.SettingsOf = k3s.SettingsOf
	}
	if c.Own == nil {
		c.Own = func() netip.Addr { return OwnAddress(c.Link) }
	}
	c.Policy = c.Policy.WithDefaults()
}

// Validate reports all problems.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("member: config: %s", what))
		}
	}
	if err := c.Self.Validate(); err != nil {
		errs = append(errs, err)
	}
	check(c.Boot != "", "Boot is missing")
	check(c.StateDir != "", "StateDir is missing")
	check(c.RunDir != "", "RunDir is missing")
	check(c.Journal != nil, "Journal is missing")
	check(c.Mark != nil, "Mark is missing")
	check(c.Papers != nil, "Papers is missing")
	check(c.K3s != nil, "K3s is missing")
	check(c.Host != nil, "Host is missing")
	check(c.SignRecord != nil, "SignRecord is missing")
	if _, err := listenPort(c.Listen); err != nil {
		errs = append(errs, err)
	}
	if err := fleet.ValidateLabels(c.Labels); err != nil {
		errs = append(errs, err)
	}
	if err := c.Policy.Validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

var _ Papers = (*papers.Papers)(nil)
var _ K3s = (*k3s.Manager)(nil)
var _ Host = (*hostnet.Host)(nil)
var _ Conn = (*peer.Conn)(nil)
var _ peer.Node = (*Member)(nil)
