package member

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/muster-edge/muster/agent/hostnet"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/fleet"
)

// setUp brings things in line with the journal that a power cut, a person or
// a new document put out of line. All of it is repeated each turn and costs
// nothing when it is right already.
func (m *Member) setUp(ctx context.Context) {
	m.outcome("TPM mark", m.mendMark())
	m.outcome("role file", m.mendRole())
	m.outcome("sign record", m.publishRecord())
	m.outcome("host network", m.applyHost())
	m.outcome("k3s config", m.reconfigure())
	m.outcome("forget token", m.forgetToken())
	m.outcome("order outcomes", m.noteOutcomes())
}

// readMark asks the TPM once; it is asked again only after a failure.
func (m *Member) readMark() error {
	m.mu.Lock()
	read := m.markRead
	m.mu.Unlock()
	if read {
		return nil
	}
	mark, err := m.cfg.Mark.Mark()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mark, m.markRead = mark, true
	return nil
}

// setMark writes the mark unless it is there. A TPM without room for it is
// no reason to leave a shop without a cluster: the node says so, and goes on
// with the journal alone.
func (m *Member) setMark(uid string) error {
	m.mu.Lock()
	same := m.mark == uid
	m.mu.Unlock()
	if same {
		return nil
	}
	if err := m.cfg.Mark.SetMark(uid); err != nil {
		if m.noRoom(err) {
			m.outcome("TPM has no room for a mark", err)
			err = nil
		} else {
			return fmt.Errorf("member: mark the TPM: %w", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mark = uid
	return nil
}

// mendMark writes a mark that a power cut prevented. A failed TPM is asked
// again after a minute, so that its flash is not worn.
func (m *Member) mendMark() error {
	d := m.cfg.Journal.Disk()
	want := ""
	switch {
	case d.Record != nil:
		want = d.Record.UID
	case d.Intent != nil:
		want = d.Intent.UID
	}
	m.mu.Lock()
	again := want != "" && want != m.mark && (m.markTried == 0 || m.mono()-m.markTried >= time.Minute)
	if again {
		m.markTried = m.mono()
	}
	m.mu.Unlock()
	if !again {
		return nil
	}
	return m.setMark(want)
}

// mendRole repeats the change of a candidate into a server in the launcher's
// role file, without which the launcher would stop the server.
func (m *Member) mendRole() error {
	m.mu.Lock()
	wrong := m.signs.Role == cb.RoleCandidate
	m.mu.Unlock()
	if !wrong || m.cfg.Journal.Disk().Role != cb.RoleServer {
		return nil
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	return m.cfg.K3s.SetRole(cb.RoleServer)
}

// publishRecord signs what a server knows of its cluster, so that others can
// believe it: the record of its own journal, and the one in the ledger.
func (m *Member) publishRecord() error {
	d := m.cfg.Journal.Disk()
	docs := m.cfg.Papers.Documents()
	adm, ok := docs.Admitted(m.cfg.Self)
	if !ok || !adm.MayServe {
		return nil
	}
	var mine []cb.Record
	if d.Role == cb.RoleServer && d.Record != nil {
		mine = append(mine, *d.Record)
	}
	m.mu.Lock()
	if l := m.k3s.Ledger; d.Role == cb.RoleServer && m.k3s.Process == cb.ProcessServer && l != nil {
		mine = append(mine, l.Record)
	}
	m.mu.Unlock()
	for _, r := range mine {
		if known, ok := docs.Newest(r.UID); ok && !r.Newer(known) {
			continue
		}
		envelope, err := m.cfg.SignRecord(adm.Tenant, adm.Site, r)
		if err != nil {
			return err
		}
		if _, err := m.cfg.Papers.Learn([][]byte{envelope}); err != nil {
			return err
		}
		docs = m.cfg.Papers.Documents()
	}
	return nil
}

// reconfigure keeps config.yaml as the documents want it, for the next start.
func (m *Member) reconfigure() error {
	d := m.cfg.Journal.Disk()
	if d.Role == cb.RoleNone || d.Aside || d.Reset != nil {
		return nil
	}
	s, err := m.settings()
	if err != nil {
		return err
	}
	key := fmt.Sprintf("%d %+v", d.Role, s)
	m.mu.Lock()
	same := m.done["config"] == key
	m.mu.Unlock()
	if same {
		return nil
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.Reconfigure(d.Role, s); err != nil {
		return err
	}
	m.setDone("config", key)
	return nil
}

func (m *Member) setDone(what, key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done[what] = key
}

// tokenHere is the key in done that says whether the server token may be on
// the disk: anything but "no".
const tokenHere = "server token"

// forgetToken deletes the server token of a plan that came to nothing: no
// worker holds one.
func (m *Member) forgetToken() error {
	d := m.cfg.Journal.Disk()
	m.mu.Lock()
	asked := m.material != nil && m.material.As == cb.RoleServer && m.mono()-m.gotAt <= m.cfg.Policy.MaterialAge &&
		!m.calledOff(m.material.Plan)
	needed := d.Role == cb.RoleCandidate || d.Role == cb.RoleServer || d.Intent != nil || d.Reset != nil || asked ||
		m.running[cb.RequestJoinMaterial] || d.Step != nil && !m.planEnded(d)
	gone := m.done[tokenHere] == "no"
	m.mu.Unlock()
	if needed || gone {
		return nil
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.ForgetServerMaterial(); err != nil {
		return err
	}
	m.setDone(tokenHere, "no")
	return nil
}

// calledOff reports whether somebody shows that this very plan is over; what
// does not know it may be older. The caller holds mu.
func (m *Member) calledOff(plan string) bool {
	over := func(p *cb.PlanDoc) bool { return p != nil && p.ID == plan && !p.Active() }
	if l := m.k3s.Ledger; l != nil && over(l.Plan) {
		return true
	}
	for _, h := range m.peers {
		if over(h.st.Plan) {
			return true
		}
	}
	return false
}

// planEnded reports whether somebody shows that the plan of this node's step
// is over. The caller holds mu.
func (m *Member) planEnded(d cb.Disk) bool {
	over := func(p *cb.PlanDoc) bool {
		return p != nil && (p.ID == d.Step.Plan && !p.Active() || p.N > d.Step.N && p.Epoch >= d.Step.Epoch)
	}
	if l := m.k3s.Ledger; m.k3s.API && l != nil {
		return l.Plan == nil || over(l.Plan) || l.Plan.ID != d.Step.Plan
	}
	for _, h := range m.peers {
		if s := h.st; s.Record != nil && d.Record != nil && s.Record.UID == d.Record.UID && over(s.Plan) {
			return true
		}
	}
	return false
}

// settings are what k3s' configuration is made of now.
func (m *Member) settings() (k3s.Settings, error) {
	docs := m.cfg.Papers.Documents()
	d := m.cfg.Journal.Disk()
	var servers []fleet.NodeID
	m.mu.Lock()
	lan := m.discover.own
	rank := func(id fleet.NodeID) int {
		h := m.peers[id]
		switch {
		case h == nil || m.mono()-h.at > m.cfg.Policy.Survey:
			return 2
		case !h.st.API:
			return 1
		}
		return 0
	}
	if rec := d.Record; rec != nil {
		r := *rec
		if n, ok := docs.Newest(r.UID); ok && n.Newer(r) {
			r = n
		}
		for _, id := range r.Servers {
			if id != m.cfg.Self {
				servers = append(servers, id)
			}
		}
		// The leader first: a candidate joins by it, and it answers.
		leader := fleet.NodeID("")
		if d.Step != nil {
			leader = d.Step.Leader
		}
		slices.SortStableFunc(servers, func(a, b fleet.NodeID) int {
			if a == leader || b == leader {
				return cmp.Compare(boolInt(b == leader), boolInt(a == leader))
			}
			return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b))
		})
	}
	m.mu.Unlock()
	s, err := m.cfg.SettingsOf(docs, m.cfg.Self, servers, lan)
	if err != nil {
		return s, fmt.Errorf("member: settings of k3s: %w", err)
	}
	if len(m.cfg.Labels) > 0 {
		// What a person signed beats what the hardware says of itself.
		labels := maps.Clone(m.cfg.Labels)
		maps.Copy(labels, s.Labels)
		s.Labels = labels
	}
	s.Extra = m.cfg.Extra
	return s, nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// applyHost makes link, routes and firewall as documents and journal say.
func (m *Member) applyHost() error {
	d, ok := m.desired()
	if !ok {
		return nil
	}
	m.mu.Lock()
	last, applied := m.discover.applied, m.discover.appliedAt
	due := !reflect.DeepEqual(last, d) || applied < 0 || m.mono()-applied >= hostEvery
	m.mu.Unlock()
	if !due {
		return nil
	}
	if err := m.cfg.Host.Apply(d); err != nil {
		return fmt.Errorf("member: network of the host: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.discover.applied, m.discover.appliedAt = d, m.mono()
	return nil
}

// hostEvery is how often the host's network is looked at although nothing
// changed here: somebody else may have changed it.
const hostEvery = 30 * time.Second

// desired is how the host's network should be; false: leave it as it is.
func (m *Member) desired() (hostnet.Desired, bool) {
	docs := m.cfg.Papers.Documents()
	self, ok := docs.Admitted(m.cfg.Self)
	if !ok || docs.Charter == nil {
		m.mu.Lock()
		runs := m.k3s.Process != cb.ProcessNone || m.seen < 0
		m.mu.Unlock()
		// A removed node keeps its addresses until k3s has ended.
		return hostnet.Desired{}, !runs && !ok && len(docs.Admissions) > 0
	}
	d := hostnet.Desired{Link: m.cfg.Link, Peers: map[netip.Addr]netip.Addr{}}
	if a, err := netip.ParseAddr(self.Address); err == nil {
		d.Self, d.FallbackDefault = a, true
	}
	at := m.cfg.Journal.Disk().Addrs
	var nodes []netip.Addr
	seen := map[fleet.NodeID]bool{m.cfg.Self: true}
	for _, a := range docs.Admissions {
		if seen[a.Node] {
			continue
		}
		seen[a.Node] = true
		adm, ok := docs.Admitted(a.Node)
		if !ok {
			continue
		}
		lan, err := netip.ParseAddr(at[a.Node])
		if err == nil {
			nodes = append(nodes, lan.WithZone(""))
		}
		if in, err := netip.ParseAddr(adm.Address); err == nil {
			d.Peers[in] = lan // invalid: no route yet
		}
	}
	if m.cfg.Firewall {
		slices.SortFunc(nodes, netip.Addr.Compare)
		f := &hostnet.Firewall{Nodes: slices.Compact(nodes)}
		f.PeerPort, _ = listenPort(m.cfg.Listen)
		for _, c := range []string{docs.Charter.Birth.ClusterCIDR, docs.Charter.Birth.ServiceCIDR} {
			if p, err := netip.ParsePrefix(c); err == nil {
				f.Networks = append(f.Networks, p)
			}
		}
		d.Firewall = f
	}
	return d, true
}
