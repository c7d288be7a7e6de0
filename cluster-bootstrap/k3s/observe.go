package k3s

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/kube"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// virginEvery is how often the whole cluster is looked through.
const virginEvery = 20 * time.Second

// seen is what earlier observations leave behind. All times are
// CLOCK_BOOTTIME.
type seen struct {
	session  launch.Process // the launcher whose k3s is meant
	since    time.Duration  // when its k3s was first started
	info     time.Duration  // when /db/info last answered; 0: never in this session
	nodes    map[fleet.NodeID]nodeSeen
	ledger   uint64
	ledgerAt time.Duration
	virgin   bool
	virginAt time.Duration
	started  time.Duration // when this k3s was started
	flushed  time.Duration // started of the k3s whose files are on disk
	trouble  string        // last logged
	deaf     time.Duration // since when a worker reaches no apiserver; 0: it does
	vain     time.Duration // the same, over all restarts of k3s
	members  []member
	memberAt map[memberKey]time.Duration // since when a member is as it is
}

type memberKey struct {
	id      uint64
	learner bool
}

type nodeSeen struct {
	ready bool
	since time.Duration
}

// Observe asks k3s, launcher and disk how things are. What cannot be learnt
// has its cautious value: not ready, not virgin, no API.
func (m *Manager) Observe(ctx context.Context) (clusterbootstrap.K3s, DiskSigns) {
	p := m.cfg.Paths
	note, err := p.ReadRole()
	if err != nil {
		m.cfg.Log.Error("read role file", "err", err)
	}
	signs := DiskSigns{Role: roleOf(note.Role), Aside: exists(m.asideFile()), Datastore: exists(p.WAL()), Tombstone: exists(p.Tombstone()),
		ResetFlag: exists(p.ResetFlag()), AgentCert: hasCertificate(p.AgentCert())}
	k := m.process(note)
	m.standing(ctx, &k)
	if t := m.Trouble(); t != m.seen.trouble {
		if m.seen.trouble = t; t != "" {
			m.cfg.Log.Warn("k3s may run and does not", "reason", t)
		}
	}
	if k.Process != clusterbootstrap.ProcessAgent {
		m.seen.deaf = 0
	}
	if k.Process == clusterbootstrap.ProcessServer {
		m.seen.vain = 0
	}
	if k.Process == clusterbootstrap.ProcessNone {
		m.seen.members = nil
		return k, signs
	}
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout+time.Second)
	defer cancel()
	if k.Process == clusterbootstrap.ProcessAgent {
		k.API = m.workerAPI(ctx) && m.flush()
		now := m.cfg.Boottime()
		if k.API {
			m.seen.deaf, m.seen.vain = 0, 0
		} else {
			if m.seen.deaf == 0 {
				m.seen.deaf = now
			}
			if m.seen.vain == 0 {
				m.seen.vain = now
			}
			k.NoAPI = max(now-m.seen.vain, 1)
		}
		return k, signs
	}
	m.askServer(ctx, &k)
	k.API = k.API && m.flush()
	return k, signs
}

// flush puts on disk what k3s wrote while it came up, and reports whether that
// is done. k3s does not flush its keys and certificates itself: a power cut
// half a minute later leaves empty files, with which it never starts again.
// So nobody hears that a k3s is up before it would survive that.
func (m *Manager) flush() bool {
	if m.seen.flushed == m.seen.started && m.seen.started > 0 {
		return true
	}
	d, err := os.Open(m.cfg.Paths.Data)
	if err == nil {
		err = errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
	}
	if err != nil {
		m.cfg.Log.Error("flush what k3s wrote", "err", err)
		return false
	}
	m.seen.flushed = m.seen.started
	return true
}

// standing adds what is known whether k3s runs or not.
func (m *Manager) standing(ctx context.Context, k *clusterbootstrap.K3s) {
	v, err := m.Version(ctx)
	if err != nil {
		m.cfg.Log.Warn("ask k3s for its version", "err", err)
	}
	k.Version = v
	k.Fsync = m.fsync(k.Process == clusterbootstrap.ProcessServer)
	if m.cfg.Birth != nil {
		if b, ok := m.cfg.Birth(); ok {
			k.Args = CriticalDigest(b)
			return
		}
	}
	if m.birth != nil {
		k.Args = CriticalDigest(*m.birth)
	}
}

// process says which k3s runs. One that ended by itself and is about to be
// started again counts as running, or a k3s that fails again and again would
// look like one that has just been started.
func (m *Manager) process(note launch.RoleNote) clusterbootstrap.K3s {
	var k clusterbootstrap.K3s
	s, err := m.cfg.Paths.ReadStatus()
	live := err == nil && s.Launcher.Alive()
	old := m.cfg.Paths.K3s()
	role := launch.Role(s.Role)
	switch {
	case old != nil && s.Role == "":
		role = note.Role
	case old == nil && !(live && (s.State == launch.Pausing || s.State == launch.Stopping)):
		m.seen.session = launch.Process{}
		return k
	}
	k.Process = clusterbootstrap.ProcessServer
	if role == launch.Worker {
		k.Process = clusterbootstrap.ProcessAgent
	}
	m.seen.started = s.Started
	k.Stopping = s.State == launch.Stopping || !m.allowed()
	now := m.cfg.Boottime()
	if m.seen.session != s.Launcher {
		m.seen.session, m.seen.info, m.seen.since = s.Launcher, 0, now
		if s.Started > 0 && s.Started < now {
			m.seen.since = s.Started
		}
	}
	k.Running = now - m.seen.since
	return k
}

// workerAPI reports whether this node's kubelet reaches an apiserver with
// quorum: reading one object is linearizable.
func (m *Manager) workerAPI(ctx context.Context) bool {
	c, err := m.kubelet()
	if err != nil {
		return false
	}
	var n struct{}
	err = c.Get(ctx, nodePath(m.cfg.Self), &n)
	return err == nil || kube.IsStatus(err, http.StatusNotFound)
}

func (m *Manager) askServer(ctx context.Context, k *clusterbootstrap.K3s) {
	now := m.cfg.Boottime()
	noInfo := func() {
		k.NoInfo = max(now-max(m.seen.info, m.seen.since), 1)
	}
	c, err := m.admin()
	if err != nil {
		noInfo()
		k.Damaged = damage(m.cfg.Paths.LogFile())
		return
	}
	var (
		wg      sync.WaitGroup
		raw     []dbMember
		infoErr error
		ledger  *clusterbootstrap.Ledger
		apiErr  error
		nodes   []nodeStatus
	)
	// Beside each other: with quorum lost both take until the timeout.
	wg.Go(func() { raw, infoErr = dbInfo(ctx, c) })
	wg.Go(func() {
		if ledger, apiErr = readLedger(ctx, c); apiErr == nil {
			nodes, apiErr = listNodes(ctx, c)
		}
	})
	wg.Wait()
	k.API = apiErr == nil
	if k.API {
		k.Nodes = m.conditions(nodes, now)
		k.Ledger = ledger
		if ledger != nil {
			if m.seen.ledger != ledger.Version {
				m.seen.ledger, m.seen.ledgerAt = ledger.Version, now
			}
			k.LedgerFor = now - m.seen.ledgerAt
		}
		k.Virgin = m.cachedVirgin(ctx, c, now)
	}
	if infoErr == nil {
		m.seen.info = now
		m.seen.members = nameMembers(raw, nodes, m.seen.members)
		at := make(map[memberKey]time.Duration, len(m.seen.members))
		for _, x := range m.seen.members {
			key := memberKey{x.ID, x.Learner}
			since, ok := m.seen.memberAt[key]
			if !ok {
				since = now
			}
			at[key] = since
			k.Members = append(k.Members, clusterbootstrap.Member{Node: x.node, Learner: x.Learner, For: now - since})
		}
		m.seen.memberAt = at
		slices.SortFunc(k.Members, func(a, b clusterbootstrap.Member) int { return strings.Compare(string(a.Node), string(b.Node)) })
	} else {
		noInfo()
		k.Damaged = damage(m.cfg.Paths.LogFile())
		m.cfg.Log.Debug("ask /db/info", "err", infoErr)
	}
	if apiErr != nil {
		m.cfg.Log.Debug("ask the API", "err", apiErr)
	}
	var s Snapshot
	if launch.ReadFile(m.snapshotFile(), &s) == nil {
		k.Snapshot = s.Plan
	}
}

func (m *Manager) cachedVirgin(ctx context.Context, c *kube.Client, now time.Duration) bool {
	if m.seen.virginAt != 0 && now-m.seen.virginAt < virginEvery {
		return m.seen.virgin
	}
	why, err := used(ctx, c)
	m.seen.virgin, m.seen.virginAt = err == nil && why == "", now
	return m.seen.virgin
}

// conditions adds for how long each Node has been in its condition.
func (m *Manager) conditions(nodes []nodeStatus, now time.Duration) []clusterbootstrap.NodeObject {
	next := make(map[fleet.NodeID]nodeSeen, len(nodes))
	out := make([]clusterbootstrap.NodeObject, 0, len(nodes))
	for _, n := range nodes {
		s, ok := m.seen.nodes[n.id]
		if !ok || s.ready != n.ready {
			s = nodeSeen{ready: n.ready, since: now}
		}
		next[n.id] = s
		out = append(out, clusterbootstrap.NodeObject{Node: n.id, Ready: n.ready, For: now - s.since})
	}
	m.seen.nodes = next
	return out
}

// nodeStatus is what is read of a Node object.
type nodeStatus struct {
	id    fleet.NodeID
	ready bool
	addrs []netip.Addr // InternalIP
}

const maxNodes = 1000

// listNodes reads the Node objects, sorted by name.
func listNodes(ctx context.Context, c *kube.Client) ([]nodeStatus, error) {
	var raw json.RawMessage
	if err := c.Get(ctx, "/api/v1/nodes?limit=1000", &raw); err != nil {
		return nil, err
	}
	return parseNodes(raw)
}

func parseNodes(b []byte) ([]nodeStatus, error) {
	var l struct {
		Items []struct {
			Metadata kube.Meta `json:"metadata"`
			Status   struct {
				Conditions []struct {
					Type   string `json:"type"`
					Status string `json:"status"`
				} `json:"conditions"`
				Addresses []struct {
					Type    string `json:"type"`
					Address string `json:"address"`
				} `json:"addresses"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, err
	}
	var out []nodeStatus
	for _, i := range l.Items[:min(len(l.Items), maxNodes)] {
		n := nodeStatus{id: fleet.NodeID(i.Metadata.Name)}
		if i.Metadata.Name == "" {
			continue
		}
		for _, c := range i.Status.Conditions {
			if c.Type == "Ready" {
				n.ready = c.Status == "True"
			}
		}
		for _, a := range i.Status.Addresses {
			if x, err := netip.ParseAddr(a.Address); err == nil && a.Type == "InternalIP" {
				n.addrs = append(n.addrs, x)
			}
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b nodeStatus) int { return strings.Compare(string(a.id), string(b.id)) })
	return out, nil
}
