package member

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
)

// stale is how old an observation of k3s may be for an answer to a peer.
const stale = 10 * time.Second

// look asks k3s how things are.
func (m *Member) look(ctx context.Context) {
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	m.looking(ctx)
}

// looking is look; the caller holds k3sMu, so that an older observation never
// replaces a newer one.
func (m *Member) looking(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	at := m.mono()
	k, signs := m.cfg.K3s.Observe(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.k3s
	m.k3s, m.signs, m.seen = k, signs, at
	if was.API != k.API || was.Process != k.Process || !reflect.DeepEqual(was.Members, k.Members) || !sameLedger(was.Ledger, k.Ledger) {
		m.show()
	}
}

// keepLooking looks while the loop is busy with a long action (a snapshot on
// its way to a peer), so that what peers are shown does not grow stale.
func (m *Member) keepLooking(ctx context.Context) error {
	for sleep.For(ctx, stale/4) == nil {
		m.mu.Lock()
		old := m.seen >= 0 && m.mono()-m.seen > stale/2+longest/2
		m.mu.Unlock()
		if old && m.k3sMu.TryLock() {
			m.looking(ctx)
			m.k3sMu.Unlock()
		}
	}
	return nil
}

func sameLedger(a, b *cb.Ledger) bool {
	return a == b || a != nil && b != nil && a.Version == b.Version
}

// disk is what is flushed, with what others observe. The caller holds mu.
func (m *Member) disk() cb.Disk {
	d := m.cfg.Journal.Disk()
	d.Datastore, d.Tombstone, d.ResetFlag, d.AgentCert = m.signs.Datastore, m.signs.Tombstone, m.signs.ResetFlag, m.signs.AgentCert
	d.Aside = d.Aside || m.signs.Aside
	d.Mark = m.mark
	return d
}

// Observation implements peer.Node: what the planner would see now. k3s is as
// it was at the last look; when that is long ago, it is not believed to answer.
func (m *Member) Observation() (cb.Observation, cb.Policy) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.observation()
	if m.seen < 0 || m.mono()-m.seen > stale {
		o.K3s.API, o.K3s.Ledger = false, nil
	}
	return o, m.cfg.Policy
}

// observation assembles everything. The caller holds mu.
func (m *Member) observation() cb.Observation {
	now := m.mono()
	o := cb.Observation{
		Self: m.cfg.Self, Words: fleet.Words(m.cfg.Self), Boot: m.cfg.Boot, Mono: now, Addr: m.lanAddr(), Fresh: m.fresh,
		Docs: m.cfg.Papers.Documents(), Disk: m.disk(), K3s: m.k3s, Centre: m.centre, Mandate: m.mandate(),
		Survey: m.survey, Claim: m.claim, AckSeen: now - m.ackAt, Lease: m.lease, LastGrant: m.grantAt,
	}
	if m.k3s.Process != cb.ProcessNone && m.seen >= 0 {
		// Ages go on between two looks.
		gone := now - m.seen
		o.K3s.Running += gone
		if o.K3s.NoInfo > 0 {
			o.K3s.NoInfo += gone
		}
		if o.K3s.NoAPI > 0 {
			o.K3s.NoAPI += gone
		}
		if o.K3s.Ledger != nil {
			o.K3s.LedgerFor += gone
		}
	}
	o.K3s.Snapshot = m.snapshot
	o.K3s.EscrowDue = m.escrowDue(o.Docs)
	if m.material != nil {
		x := *m.material
		x.Age = now - m.gotAt
		o.Material = &x
	}
	for id, h := range m.peers {
		if _, ok := o.Docs.Admitted(id); !ok {
			continue
		}
		p := cb.Peer{Words: fleet.Words(id), Addr: m.addrOf(id, h, o.Disk), Age: now - h.at, Status: h.st, Served: -1}
		if h.served >= 0 {
			p.Served = now - h.served
		}
		o.Peers = append(o.Peers, p)
	}
	slices.SortFunc(o.Peers, func(a, b cb.Peer) int { return strings.Compare(string(a.Status.Node), string(b.Status.Node)) })
	return o
}

// settled is how long an address may be silent before another one of the same
// peer takes its place: a peer with two addresses must not make them alternate.
const settled = 30 * time.Second

// addrOf is where a peer is now: where it was last believed to be, if it still
// answers there; else where it answered lately, IPv4 first, since in-site
// addresses are IPv4; else where it answered last.
func (m *Member) addrOf(id fleet.NodeID, h *heard, d cb.Disk) string {
	now := m.mono()
	if a, err := netip.ParseAddr(d.Addrs[id]); err == nil {
		if at, ok := h.addrs[a]; ok && now-at <= settled {
			return a.String()
		}
	}
	var best netip.Addr
	better := func(a netip.Addr) bool {
		fresh, was := now-h.addrs[a] <= settled, now-h.addrs[best] <= settled
		switch {
		case !best.IsValid():
			return true
		case fresh != was:
			return fresh
		case fresh && a.Is4() != best.Is4():
			return a.Is4()
		case h.addrs[a] != h.addrs[best]:
			return h.addrs[a] > h.addrs[best]
		}
		return a.Less(best)
	}
	for a := range h.addrs {
		if better(a) {
			best = a
		}
	}
	if !best.IsValid() {
		return ""
	}
	return best.String()
}

// lanAddr is this node's own address on the LAN, as far as it matters: without
// in-site addresses k3s is known by it.
func (m *Member) lanAddr() string {
	if a := m.discover.own; a.IsValid() {
		return a.String()
	}
	return ""
}

// Status implements peer.Node. All of it is flushed, or was never promised to
// outlive a restart.
func (m *Member) Status() cb.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.cfg.Journal.Disk()
	now := m.mono()
	s := cb.Status{
		Node: m.cfg.Self, Boots: m.cfg.Journal.Boots(), Seq: m.seq.Add(1), Role: d.Role, State: m.state, Record: d.Record,
		Intent: d.Intent != nil, Claim: m.claim, Ack: d.Ack, Step: d.Step, Lead: d.Lead, Reset: d.Reset != nil,
		Blocker: m.shown.Blocker, Fenced: m.state == cb.Fenced,
		Version: m.k3s.Version, Args: m.k3s.Args, Fsync: m.k3s.Fsync,
	}
	for id, h := range m.peers {
		if now-h.at < m.cfg.Policy.PeerFresh {
			s.Sees = append(s.Sees, id)
		}
	}
	slices.Sort(s.Sees)
	if m.k3s.Process == cb.ProcessServer && m.k3s.API && now-m.seen <= stale {
		s.API, s.Virgin = true, m.k3s.Virgin
		for _, x := range m.k3s.Members {
			if x.Learner {
				s.Learners++
			} else {
				s.Voters++
			}
		}
		// A candidate's ledger is the leader's: it has nothing to pass on.
		if l := m.k3s.Ledger; l != nil && !(s.Role == cb.RoleCandidate && s.Step != nil) {
			s.Plan = l.Plan
		}
	}
	return s
}

// Heard implements peer.Node.
func (m *Member) Heard(from fleet.NodeID, at netip.AddrPort, s cb.Status) {
	if from == m.cfg.Self || s.Node != from {
		return
	}
	if _, ok := m.cfg.Papers.Documents().Admitted(from); !ok {
		return
	}
	m.mu.Lock()
	now := m.mono()
	h := m.peers[from]
	if h == nil {
		h = &heard{served: -1, addrs: map[netip.Addr]time.Duration{}}
		m.peers[from] = h
	}
	differ := h.st == nil || differs(*h.st, s)
	back := h.st == nil || now-h.at > m.cfg.Policy.PeerFresh
	h.st, h.at = &s, now
	if s.API {
		h.served = now
	}
	if a := at.Addr().Unmap(); a.IsValid() && !a.IsLoopback() {
		h.addrs[a] = now
		for len(h.addrs) > maxAddrs {
			oldest := a
			for x, t := range h.addrs {
				if t < h.addrs[oldest] {
					oldest = x
				}
			}
			delete(h.addrs, oldest)
		}
	}
	if ack := m.cfg.Journal.Disk().Ack; ack != nil && ack.Node == from {
		m.ackAt = now
	}
	if back {
		m.show() // it should learn soon that it is seen
	}
	m.mu.Unlock()
	if differ || back {
		m.wake()
	}
	m.heardAt(from, at)
}

// differs reports whether anything changed that the planner looks at.
func differs(a, b cb.Status) bool {
	a.Seq, b.Seq, a.Sees, b.Sees, a.State, b.State, a.Blocker, b.Blocker = 0, 0, nil, nil, 0, 0, "", ""
	return !reflect.DeepEqual(a, b)
}

// NoteGrant implements peer.Node.
func (m *Member) NoteGrant(fleet.NodeID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.grantAt = m.mono()
}
