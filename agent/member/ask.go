package member

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/agent/peer"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// due limits how often something is asked of others.
func (m *Member) due(k cb.ActionKind, every time.Duration) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, asked := m.asked[k]
	if asked && m.mono()-at < every {
		return false
	}
	m.asked[k] = m.mono()
	return true
}

// askGrant asks the centre who founds. Without a centre there is no answer,
// and the planner keeps waiting.
func (m *Member) askGrant() {
	if m.cfg.Centre == nil || !m.due(cb.AskGrant, 3*time.Second) {
		return
	}
	m.job(cb.AskGrant, grantLimit, func(ctx context.Context) error {
		docs := m.cfg.Papers.Documents()
		if docs.Charter == nil {
			return nil
		}
		m.mu.Lock()
		uid := m.fresh
		m.mu.Unlock()
		g, err := m.cfg.Centre.AskFounding(ctx, docs.Charter.Site, uid)
		m.mu.Lock()
		defer m.mu.Unlock()
		if err != nil {
			m.centre.Reachable = false
			return err
		}
		m.centre = cb.Centre{Reachable: true, Granted: g.Node, Unsure: g.Unsure}
		if g.Node == m.cfg.Self && (g.UID != uid || m.fresh != uid) {
			// The right is ours only under the UID that we asked with. Another
			// one is a cluster that this node founded once and knows nothing
			// of any more: founding again would make a second one.
			m.centre.Granted, m.centre.Unsure = "", true
		}
		return nil
	})
}

// materialLimit bounds a request: it needs a proof by two TPMs.
const materialLimit = 45 * time.Second

// askMaterial asks a server for what it takes to join. What comes is on the
// disk before the planner sees that it came.
func (m *Member) askMaterial(a cb.Action) {
	if !m.due(cb.RequestJoinMaterial, 3*time.Second) {
		return
	}
	m.job(cb.RequestJoinMaterial, materialLimit, func(ctx context.Context) error {
		got, err := m.ask(ctx, a.From, func(c Conn) (any, error) { return c.JoinMaterial(ctx, a.As, a.Plan) })
		if err != nil {
			return fmt.Errorf("member: ask %s for join material: %w", fleet.Words(a.From), err)
		}
		x, ok := got.(peer.Material)
		if !ok || x.As != a.As || x.Plan != a.Plan || a.UID != "" && x.UID != a.UID {
			return errors.New("member: join material: it is not what was asked for")
		}
		defer x.Wipe()
		s, err := given(x)
		if err != nil {
			return err
		}
		if a.As == cb.RoleServer {
			m.setDone(tokenHere, "yes")
		}
		m.k3sMu.Lock()
		err = m.cfg.K3s.KeepMaterial(s)
		m.k3sMu.Unlock()
		if err != nil {
			return fmt.Errorf("member: keep join material: %w", err)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.material = &cb.Material{UID: x.UID, Epoch: x.Epoch, As: x.As, Plan: x.Plan}
		m.gotAt = m.mono()
		m.fitting = fitting{Version: s.Version, Critical: s.Critical}
		return nil
	})
}

// fitting is what a candidate compares itself with; nothing of it is secret.
type fitting struct{ Version, Critical string }

// fit asks k3s whether this node can become a server next to the one that gave
// the material.
func (m *Member) fit(ctx context.Context) error {
	docs := m.cfg.Papers.Documents()
	if docs.Charter == nil {
		return errors.New("member: become a server: no charter")
	}
	m.mu.Lock()
	f := m.fitting
	m.mu.Unlock()
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	return m.cfg.K3s.Fit(ctx, k3s.Material{As: cb.RoleServer, Version: f.Version, Critical: f.Critical}, docs.Charter.Birth)
}

// workerTTL is how long a worker's token is good: enough for the slowest
// machine to start once.
const workerTTL = 10 * time.Minute

// Material implements peer.Node. The planner said yes to an observation a
// moment ago; here the secret is taken out, and nothing else is decided.
func (m *Member) Material(ctx context.Context, to fleet.NodeID, as cb.Role, plan string) (peer.Material, error) {
	docs := m.cfg.Papers.Documents()
	self, ok := docs.Admitted(m.cfg.Self)
	rec := m.cfg.Journal.Disk().Record
	if !ok || docs.Charter == nil || rec == nil {
		return peer.Material{}, errors.New("member: join material: this node is no member")
	}
	m.mu.Lock()
	at := m.discover.own
	m.mu.Unlock()
	if a, err := netip.ParseAddr(self.Address); err == nil {
		at = a
	}
	if !at.IsValid() {
		return peer.Material{}, errors.New("member: join material: this node has no address")
	}
	var x k3s.Material
	var err error
	out := peer.Material{UID: rec.UID, Epoch: rec.Epoch, As: as, Plan: plan}
	m.k3sMu.Lock()
	switch as {
	case cb.RoleWorker:
		out.Good = workerTTL
		// It has just proved who it is; with a new disk it has a new password.
		if f, ok := m.cfg.K3s.(passwordForgetter); ok {
			err = f.ForgetPassword(ctx, to)
		}
		if err == nil {
			x, err = m.cfg.K3s.WorkerMaterial(ctx, workerTTL, at, docs.Charter.Birth)
		}
	case cb.RoleServer:
		x, err = m.cfg.K3s.ServerMaterial(ctx, at, docs.Charter.Birth)
	default:
		err = fmt.Errorf("member: join material: for %s there is none", as)
	}
	m.k3sMu.Unlock()
	if err != nil {
		return peer.Material{}, err
	}
	out.Token, out.AgentToken = peer.Secret(x.Token), peer.Secret(x.AgentToken)
	out.Version, out.Args = x.Version, x.Critical
	out.Servers = []string{x.Server}
	m.log.Info("join material given", "to", string(to), "as", as.String(), "plan", plan)
	return out, nil
}

// passwordForgetter makes the cluster take a node with another node password;
// *k3s.Manager does.
type passwordForgetter interface {
	ForgetPassword(ctx context.Context, node fleet.NodeID) error
}

// given turns what a peer gave into what k3s takes.
func given(x peer.Material) (k3s.Material, error) {
	if len(x.Servers) == 0 || len(x.Token) == 0 {
		return k3s.Material{}, errors.New("member: join material: server or token is missing")
	}
	return k3s.Material{As: x.As, Server: x.Servers[0], Token: string(x.Token), AgentToken: string(x.AgentToken), Version: x.Version, Critical: x.Args}, nil
}

// leaseAsk says that this node wants to hold a lease.
type leaseAsk struct {
	plan string
	from fleet.NodeID
	at   time.Duration
}

// askLease makes keepLease ask from now on.
func (m *Member) askLease(a cb.Action) {
	m.mu.Lock()
	fresh := m.leaseAsk.plan != a.Plan || m.leaseAsk.from != a.From
	m.leaseAsk = leaseAsk{plan: a.Plan, from: a.From, at: m.mono()}
	m.mu.Unlock()
	if fresh {
		m.log.Info("lease wanted", "plan", a.Plan, "from", string(a.From))
	}
}

// keepLease renews the lease beside the loop: the loop may be waiting for k3s
// to start while the lease runs out. It asks as long as the planner wanted a
// lease lately or the journal says that this node runs under one.
func (m *Member) keepLease(ctx context.Context) error {
	for {
		m.mu.Lock()
		ask := m.leaseAsk
		recent := ask.plan != "" && m.mono()-ask.at < m.cfg.Policy.Lease
		m.mu.Unlock()
		if d := m.cfg.Journal.Disk(); d.Step != nil && d.Role == cb.RoleCandidate && !d.Step.Replace && d.Reset == nil {
			ask = leaseAsk{plan: d.Step.Plan, from: d.Step.Leader}
			recent = true
		}
		pause := 500 * time.Millisecond
		if recent {
			began := m.mono()
			m.outcome("lease", m.renewLease(ctx, ask))
			pause = max(pause, m.cfg.Policy.LeaseRenew-(m.mono()-began))
			if !m.holds(ask.plan) { // the first one is waited for
				pause = min(pause, 2*time.Second)
			}
		} else {
			m.outcome("lease", nil)
		}
		if sleep.For(ctx, pause) != nil {
			return nil
		}
	}
}

func (m *Member) holds(plan string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lease.Plan == plan && m.mono() < m.lease.Until
}

// renewLease asks once. The lease counts from the sending, so that whatever
// the way costs is on the safe side.
func (m *Member) renewLease(ctx context.Context, ask leaseAsk) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Policy.Lease/2)
	defer cancel()
	var sent time.Duration
	got, err := m.ask(ctx, ask.from, func(c Conn) (any, error) {
		sent = m.mono()
		return c.Lease(ctx, ask.plan)
	})
	if err != nil {
		return fmt.Errorf("member: ask %s for the lease: %w", fleet.Words(ask.from), err)
	}
	d, ok := got.(time.Duration)
	// The length counts from the call; before the request was sent, this node
	// may have had to prove what it runs.
	if !ok || d <= 0 || d > m.cfg.Policy.Lease+(m.mono()-sent) {
		return fmt.Errorf("member: a lease of %v makes no sense", got)
	}
	m.mu.Lock()
	if m.lease.Plan == ask.plan && m.lease.Until >= sent+d {
		m.mu.Unlock()
		return nil
	}
	m.mu.Unlock()
	// The launcher first: what the planner believes must be true for it, too.
	// Not under k3sMu: the loop may hold it while k3s starts, and the lease
	// would run out meanwhile. WriteLease writes one file and nothing else.
	if err := m.cfg.K3s.WriteLease(ask.plan, m.born+sent+d); err != nil {
		return fmt.Errorf("member: write the lease: %w", err)
	}
	m.mu.Lock()
	first := m.lease.Plan != ask.plan || m.mono() >= m.lease.Until
	m.lease = cb.Lease{Plan: ask.plan, Until: sent + d}
	m.mu.Unlock()
	if first {
		m.wake()
	}
	return nil
}

// noRoom tells a TPM without free memory from one that fails.
func (m *Member) noRoom(err error) bool { return errors.Is(err, device.ErrNoRoom) }
