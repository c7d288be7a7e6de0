package member

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/agent/peer"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/fleet"
)

// Member is one node of a site. Its methods may be called from any goroutine.
type Member struct {
	cfg  Config
	log  *slog.Logger
	born time.Duration // CLOCK_BOOTTIME when the agent started

	// dialer is set by Run; nil before.
	dialer Dialer
	// kick wakes the loop.
	kick chan struct{}
	// aliveUntil is the Mono until which the loop is not called stuck.
	aliveUntil atomic.Int64
	seq        atomic.Uint64

	// lastDone and repeats are the loop's own: what it did last, and how often
	// in a row.
	lastDone string
	repeats  int

	// k3sMu: the manager is called by one goroutine at a time.
	k3sMu sync.Mutex
	// jobs are calls to others that the loop does not wait for.
	jobs sync.WaitGroup
	// life is Run's context, for jobs.
	life context.Context

	mu sync.Mutex
	view
	discover discover
	done     map[string]string // what was done once: keys of setup
}

// view is what the node knows besides its disk; Member.mu guards it.
type view struct {
	mark      string
	markRead  bool
	markTried time.Duration

	k3s   cb.K3s
	signs k3s.DiskSigns
	// seen is when (Mono) the observation of k3s began; < 0 never.
	seen time.Duration

	peers map[fleet.NodeID]*heard

	state   cb.State
	shown   shown
	since   time.Time
	changed chan struct{} // closed when what peers should see has changed
	planned bool

	fresh    string
	survey   *cb.Survey
	round    uint64
	claim    *cb.Claim
	ackAt    time.Duration
	lease    cb.Lease
	leaseAsk leaseAsk
	material *cb.Material
	gotAt    time.Duration // when the material came
	fitting  fitting
	grantAt  time.Duration
	centre   cb.Centre
	asked    map[cb.ActionKind]time.Duration
	running  map[cb.ActionKind]bool

	snapshot string // plan of the newest snapshot that is kept elsewhere
	// updateSnapshot is the image before which a snapshot was taken.
	updateSnapshot string
	// escrowAt is when (Mono) the next copy of the datastore is due; 0 at first.
	escrowAt time.Duration
	failures map[string]string // what could not be done, for people
}

// shown is the part of the state that people and logs see.
type shown struct {
	State   cb.State
	Blocker cb.Blocker
	Reason  string
	Action  cb.ActionKind
}

// heard is what a peer said last.
type heard struct {
	st     *cb.Status
	at     time.Duration
	served time.Duration // when it last showed a working API; < 0 never
	addrs  map[netip.Addr]time.Duration
}

// maxAddrs bounds the addresses that are remembered of one peer.
const maxAddrs = 8

// New checks the configuration. Nothing is read or opened before Run.
func New(cfg Config) (*Member, error) {
	cfg.defaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	m := &Member{
		cfg: cfg, log: cfg.Log.With("node", string(cfg.Self)), kick: make(chan struct{}, 1), done: map[string]string{},
	}
	m.born = cfg.Clock.Boottime()
	m.view = view{
		seen: -1, peers: map[fleet.NodeID]*heard{}, changed: make(chan struct{}), fresh: cfg.Fresh(), since: cfg.Clock.Now(),
		asked: map[cb.ActionKind]time.Duration{}, running: map[cb.ActionKind]bool{}, failures: map[string]string{},
		shown: shown{State: cb.Observing, Reason: "The node agent has just started."},
	}
	m.discover.init()
	if cfg.Lease != nil {
		// A lease of an earlier run in this boot still counts, as it does for
		// the launcher.
		if plan, until, ok := cfg.Lease(); ok && until-m.born <= cfg.Policy.Lease {
			m.lease = cb.Lease{Plan: plan, Until: until - m.born}
		}
	}
	return m, nil
}

// Dialer opens connections to peers.
type Dialer interface {
	Dial(ctx context.Context, addr string) (Conn, error)
}

// DialPeers makes a Dialer of a Peer.
func DialPeers(p *peer.Peer) Dialer { return dialPeers{p} }

type dialPeers struct{ p *peer.Peer }

func (d dialPeers) Dial(ctx context.Context, addr string) (Conn, error) {
	c, err := d.p.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Run is the node's membership until ctx ends. k3s is left running: a node
// agent that ends must not end what runs on the node.
func (m *Member) Run(ctx context.Context, dialer Dialer) error {
	m.dialer = dialer
	g, ctx := errgroup.WithContext(ctx)
	m.life = ctx
	m.alive(time.Minute)
	g.Go(func() error { return m.loop(ctx) })
	g.Go(func() error { return m.keepLease(ctx) })
	g.Go(func() error { return m.keepLooking(ctx) })
	g.Go(func() error { return m.find(ctx) })
	err := g.Wait()
	m.jobs.Wait()
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return err
}

// mono is the time since the agent started.
func (m *Member) mono() time.Duration { return m.cfg.Clock.Boottime() - m.born }

// wake makes the loop plan soon.
func (m *Member) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// show tells sessions that the status changed. The caller holds mu.
func (m *Member) show() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// alive says that the loop is not stuck before d has passed.
func (m *Member) alive(d time.Duration) { m.aliveUntil.Store(int64(m.mono() + d)) }

// Alive reports whether the loop turns, for a watchdog.
func (m *Member) Alive() bool { return m.mono() <= time.Duration(m.aliveUntil.Load()) }

// job does something beside the loop. At most one of a kind runs.
func (m *Member) job(kind cb.ActionKind, limit time.Duration, do func(context.Context) error) {
	m.mu.Lock()
	if m.running[kind] || m.life == nil {
		m.mu.Unlock()
		return
	}
	m.running[kind] = true
	m.mu.Unlock()
	m.jobs.Go(func() {
		ctx, cancel := context.WithTimeout(m.life, limit)
		defer cancel()
		err := do(ctx)
		m.mu.Lock()
		delete(m.running, kind)
		m.mu.Unlock()
		m.outcome(answerTo(kind), err)
		m.wake()
	})
}

// outcome keeps the last failure of each kind for people, and logs it once.
func (m *Member) outcome(what string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	m.mu.Lock()
	was := m.failures[what]
	if text == "" {
		delete(m.failures, what)
	} else {
		m.failures[what] = text
	}
	m.mu.Unlock()
	switch {
	case err != nil && text != was:
		m.log.Warn("could not do it", "what", what, "err", err)
	case err == nil && was != "":
		m.log.Info("done after failures", "what", what)
	}
}

// listenPort is the port of a listen address.
func listenPort(listen string) (uint16, error) {
	_, p, err := net.SplitHostPort(listen)
	if err != nil {
		return 0, fmt.Errorf("member: config: Listen %q: want [HOST]:PORT", listen)
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("member: config: Listen %q: want a port", listen)
	}
	return uint16(n), nil
}

func freshText() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // crypto/rand never fails: it ends the program instead
	return hex.EncodeToString(b)
}
