package sim

import (
	"slices"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// observe gathers what the planner sees.
func (n *node) observe() cb.Observation {
	w := n.w
	o := cb.Observation{Self: n.id, Words: n.name, Boot: n.boot, Mono: n.mono(), Addr: n.addr,
		Fresh: n.fresh, Docs: n.documents(), Disk: n.believed,
		Centre: n.centre, Mandate: n.mandate, Survey: n.survey, Claim: n.claim, Lease: n.lease, LastGrant: n.grantAt,
		AckSeen: n.age(n.ackAt)}
	if n.material != nil {
		m := *n.material
		m.Age = n.age(n.matAt)
		o.Material = &m
	}
	n.obsPeers = n.obsPeers[:0]
	for j := range n.peers {
		if s := n.peers[j]; s.st != nil {
			if _, ok := o.Docs.Admitted(s.st.Node); ok {
				served := time.Duration(-1)
				if s.served >= 0 {
					served = n.age(s.served)
				}
				n.obsPeers = append(n.obsPeers, cb.Peer{Served: served, Words: w.nodes[j].name, Addr: w.nodes[j].addrSeen(n), Age: n.age(s.at), Status: s.st})
			}
		}
	}
	o.Peers = n.obsPeers
	o.K3s = n.observeK3s()
	return o
}

// addrSeen is the address at which by heard n last; hello brings it.
func (n *node) addrSeen(by *node) string { return n.addr }

func (n *node) observeK3s() cb.K3s {
	w := n.w
	k := cb.K3s{Process: n.proc.kind, Stopping: n.proc.stopping, Snapshot: n.snapshot, Version: n.version, Args: n.args, Fsync: n.fsync, Damaged: n.says}
	if n.proc.kind == cb.ProcessNone {
		n.infoAt = w.now
		return k
	}
	k.Running = n.age(n.proc.started)
	j := -1
	if n.proc.kind == cb.ProcessServer {
		g := n.data
		if g != nil && w.runs(g, n.i) {
			if l := w.quorum(g); l >= 0 && w.routed(n.i, l) {
				n.infoAt = w.now
				n.obsMembers = n.obsMembers[:0]
				for i := range w.nodes {
					learner := slices.Contains(g.learners, i)
					if learner || slices.Contains(g.voters, i) {
						n.obsMembers = append(n.obsMembers, cb.Member{Node: w.nodes[i].id, Learner: learner, For: n.age(max(g.since[i], n.proc.started))})
					}
				}
				k.Members = n.obsMembers
			}
		}
		k.NoInfo = n.age(n.infoAt)
		if w.api(n.i) {
			j = n.i
		}
		n.vainAt = 0
	} else {
		// Without a certificate the kubelet asks nobody.
		if n.disk.AgentCert {
			j = w.apiFor(n.i)
		}
		if j >= 0 {
			n.vainAt = 0
		} else {
			if n.vainAt == 0 {
				n.vainAt = w.now
			}
			k.NoAPI = max(n.age(n.vainAt), 1)
		}
	}
	if j < 0 {
		return k
	}
	g := w.nodes[j].data
	k.API, k.Virgin = true, g.virgin
	if g.ledger != nil {
		k.Ledger = g.ledger
		if n.ledgerG != g || n.ledgerV != g.ledger.Version {
			n.ledgerG, n.ledgerV, n.ledgerAt = g, g.ledger.Version, w.now
		}
		k.LedgerFor = n.age(n.ledgerAt)
	}
	if n.proc.kind == cb.ProcessServer {
		k.EscrowDue = w.escrowDue(n, g)
		n.obsNodes = n.obsNodes[:0]
		for i := range g.nodes {
			x := &g.nodes[i]
			if !x.known {
				continue
			}
			if x.ready && w.now-x.contact > 40*time.Second {
				x.ready, x.from = false, w.now
			}
			n.obsNodes = append(n.obsNodes, cb.NodeObject{Node: w.nodes[i].id, Ready: x.ready, For: n.age(x.from)})
		}
		k.Nodes = n.obsNodes
	}
	return k
}

func (n *node) documents() cb.Documents {
	if n.docsKey[0] != len(n.records) || n.docsMask != n.mask {
		n.docs = n.w.docs.get(n.mask)
		n.docs.Records = n.records
		n.docsKey[0], n.docsMask = len(n.records), n.mask
	}
	return n.docs
}

// keepRecord merges a record into the node's documents.
func (n *node) keepRecord(r *cb.Record) {
	if r == nil || r == n.kept {
		return
	}
	n.kept = r
	d := n.documents().WithRecord(*r)
	if len(d.Records) != len(n.records) || len(d.Records) > 0 && &d.Records[0] != &n.records[0] {
		n.records = d.Records
		n.docsKey[0] = -1
		n.wake(50 * time.Millisecond)
	}
}

// status is what hello shows.
func (n *node) status() *cb.Status {
	w := n.w
	n.seq++
	room := &struct {
		s    cb.Status
		sees [maxNodes]fleet.NodeID
	}{}
	s := &room.s
	*s = cb.Status{Node: n.id, Boots: n.boots, Seq: n.seq, Role: n.believed.Role, State: n.state, Record: n.believed.Record,
		Intent: n.believed.Intent != nil, Claim: n.claim, Ack: n.believed.Ack, Step: n.believed.Step, Lead: n.believed.Lead,
		Reset: n.believed.Reset != nil, Blocker: n.blocker, Fenced: n.fenced, Version: n.version, Args: n.args, Fsync: n.fsync, Sees: room.sees[:0]}
	for j := range n.peers {
		if p := n.peers[j]; p.st != nil && w.now-p.at < w.pol.PeerFresh {
			s.Sees = append(s.Sees, p.st.Node)
		}
	}
	if n.proc.kind == cb.ProcessServer && w.api(n.i) {
		s.API, s.Virgin = true, n.data.virgin
		s.Voters, s.Learners = len(n.data.voters), len(n.data.learners)
		if l := n.data.ledger; l != nil {
			s.Plan = l.Plan
			n.keepRecord(&l.Record)
		}
	}
	if s.Role == cb.RoleCandidate && s.Step != nil && s.API {
		s.Plan = nil
	}
	return s
}

func (n *node) helloLoop() {
	n.hello()
	if n.proc.kind != cb.ProcessNone {
		n.heartbeat()
	}
	n.later(n.w.between(4*time.Second, 6*time.Second), n.helloLoop)
}

// hello shows the status to every peer and takes theirs. It is one round trip;
// either half may get lost.
func (n *node) hello() {
	w := n.w
	if w.now-n.helloAt < 300*time.Millisecond {
		return
	}
	n.helloAt = w.now
	st := n.status()
	for j, m := range w.nodes {
		if j == n.i {
			continue
		}
		w.send(n.i, j, func() {
			m.hear(n, st)
			back := m.status()
			w.send(j, n.i, func() { n.hear(m, back) })
		})
	}
}

// send delivers after a delay, perhaps never, perhaps twice.
func (w *world) send(i, j int, do func()) {
	if !w.nodes[i].up || !w.link[i][j] || w.chance(w.loss()) {
		return
	}
	times := 1
	if !w.quiet && w.chance(w.sc.Dup) {
		times = 2
	}
	for range times {
		d := w.between(time.Millisecond, 20*time.Millisecond)
		if !w.quiet && w.sc.Delay > 0 && w.chance(0.3) {
			d = w.between(time.Millisecond, w.sc.Delay)
		}
		m := w.nodes[j]
		if !m.up {
			continue
		}
		m.later(d, func() {
			if w.link[i][j] {
				do()
			}
		})
	}
}

func (w *world) loss() float64 {
	if w.quiet {
		return 0.01
	}
	return w.sc.Loss
}

// hear takes a status and the documents that come with it.
func (n *node) hear(from *node, st *cb.Status) {
	w := n.w
	// The caller shows charter and admission first; who is not admitted is
	// not answered. Both sides hold the union from here on.
	if n.mask != from.mask {
		n.mask |= from.mask
		n.wake(50 * time.Millisecond)
	}
	for i := range from.records {
		n.keepRecord(&from.records[i])
	}
	n.keepRecord(st.Record)
	old := n.peers[from.i].st
	if old != nil && (st.Boots < old.Boots || st.Boots == old.Boots && st.Seq <= old.Seq) {
		return
	}
	served := w.now
	switch {
	case st.API:
	case old == nil:
		served = -1
	default:
		served = n.peers[from.i].served
	}
	n.peers[from.i] = seen{st, w.now, served}
	n.heard[from.i] = w.now
	if n.disk.Ack != nil && n.disk.Ack.Node == from.id {
		n.ackAt = w.now
	}
	if old == nil || differs(old, st) {
		n.wake(30 * time.Millisecond)
	}
}

func differs(a, b *cb.Status) bool {
	return a.Role != b.Role || a.Record != b.Record || a.Intent != b.Intent || a.Claim != b.Claim || a.Ack != b.Ack || a.API != b.API ||
		a.Voters != b.Voters || a.Learners != b.Learners || a.Step != b.Step || a.Lead != b.Lead || a.Plan != b.Plan || a.Reset != b.Reset
}

// due limits calls to others.
func (n *node) due(k cb.ActionKind, every time.Duration) bool {
	if at := n.asked[k]; at != 0 && n.w.now-at < every {
		return false
	}
	n.asked[k] = n.w.now
	return true
}

func (w *world) byID(id fleet.NodeID) *node {
	for _, n := range w.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// do carries out one action; done says whether it worked.
func (n *node) do(a cb.Action, done func(bool)) {
	w := n.w
	ok := func() { done(true) }
	shown := func() { n.hello(); done(true) }
	switch a.Kind {
	case cb.Wait:
		done(true)
	case cb.StartSurvey:
		n.round++
		n.renew()
		n.claim = nil
		n.survey = &cb.Survey{Since: n.mono(), Round: n.round}
		if n.disk.Ack != nil {
			n.write(func(d *cb.Disk) { d.Ack = nil }, shown)
			return
		}
		shown()
	case cb.AskGrant:
		n.askCentre()
		done(true)
	case cb.ClaimFounding:
		n.claim = a.Claim
		shown()
	case cb.WithdrawClaim:
		n.claim = nil
		shown()
	case cb.AckClaim:
		n.write(func(d *cb.Disk) { d.Ack = a.Claim }, func() {
			n.ackAt = w.now
			w.acked(n, a.Claim)
			shown()
		})
	case cb.FoundCluster:
		w.ordered(n, a.Order)
		n.write(func(d *cb.Disk) { d.Intent, d.Mark = a.Intent, a.Intent.UID }, shown)
	case cb.AbandonFounding:
		n.claim, n.survey = nil, nil
		if n.data != nil {
			n.data.made = -1 // it never was one
			n.data, n.damaged, n.mute, n.says = nil, false, false, ""
			n.k3sDisk(func(d *cb.Disk) { d.Datastore, d.Tombstone = false, false })
		}
		n.write(func(d *cb.Disk) { d.Intent, d.Mark = nil, "" }, shown)
	case cb.RequestJoinMaterial:
		n.askMaterial(a)
		done(true)
	case cb.RenewFenceLease:
		n.askLease(a)
		done(true)
	case cb.StartWorker:
		n.write(func(d *cb.Disk) { d.Role, d.Record, d.Mark = cb.RoleWorker, a.Record, a.Record.UID }, func() {
			if n.proc.kind == cb.ProcessNone {
				w.joined(n, a.Record.UID)
				if n.material != nil && !n.disk.AgentCert {
					n.tokenAt = n.matAt
				}
				n.startAgent()
			}
			shown()
		})
	case cb.StartServer:
		if n.proc.kind != cb.ProcessNone && !w.bug("no-wait-for-exit") {
			done(false) // the launcher's lock
			return
		}
		n.startServer(a.Init)
		n.later(100*time.Millisecond, ok)
	case cb.KeepRecord:
		was := n.disk.Role
		n.write(func(d *cb.Disk) {
			d.Record = a.Record
			if a.Role != cb.RoleNone {
				d.Role, d.Intent, d.Ack = a.Role, nil, nil
				if a.Role == cb.RoleServer {
					d.Step = nil
				}
			}
		}, func() {
			n.keepRecord(a.Record)
			if was != cb.RoleServer && a.Role == cb.RoleServer {
				w.tracef("%s: is a confirmed server", n.name)
			}
			shown()
		})
	case cb.WriteLedger:
		if !w.quiet && w.chance(w.sc.LostReply) {
			// The call times out; the write may still arrive, much later.
			w.tracef("%s: a write to etcd is late", n.name)
			n.later(w.between(time.Second, 12*time.Second), func() { n.writeLedger(a, func(bool) {}) })
			n.later(500*time.Millisecond, func() { done(false) })
			return
		}
		n.later(w.between(20*time.Millisecond, 200*time.Millisecond), func() { n.writeLedger(a, done) })
	case cb.StepPlan:
		n.write(func(d *cb.Disk) {
			d.Step = a.Step
			if a.Step.Phase == cb.StepSwitched {
				d.Role = cb.RoleCandidate
			}
		}, shown)
	case cb.LeadPlan:
		n.write(func(d *cb.Disk) { d.Lead = a.Lead }, shown)
	case cb.TakeSnapshot:
		n.later(w.between(time.Second, 4*time.Second), func() { done(n.takeSnapshot(a.Plan)) })
	case cb.StopK3s:
		w.stops(n)
		n.stop(ok)
	case cb.BeginReset:
		if a.Reset.Plan == "" {
			w.ordered(n, "reset")
		}
		n.write(func(d *cb.Disk) { d.Reset = a.Reset }, shown)
	case cb.ResetToOwnData, cb.RestoreFromEscrow:
		w.checkReset(n)
		n.later(w.between(6*time.Second, 10*time.Second), func() {
			switch {
			case a.Kind == cb.RestoreFromEscrow:
				if !n.restore(a.Reset.UID) {
					done(false)
					return
				}
			case n.damaged:
				n.says = damage
				done(false)
				return
			default:
				n.reset(false)
			}
			if !n.maybeCut("after the reset") {
				done(true)
			}
		})
	case cb.RaiseEpoch:
		w.raised(n, a.Record)
		n.write(func(d *cb.Disk) {
			d.Record, d.Role, d.Mark = a.Record, cb.RoleServer, a.Record.UID
			d.Reset, d.Step, d.Lead = nil, nil, nil
		}, func() {
			n.keepRecord(a.Record)
			shown()
		})
	case cb.MoveAside:
		w.movesAside(n)
		n.write(func(d *cb.Disk) {
			d.Role, d.Record, d.Aside = a.Role, a.Record, true
			d.Step, d.Lead, d.Reset, d.Intent, d.Ack = nil, nil, nil, nil, nil
		}, func() {
			n.later(w.between(50*time.Millisecond, 500*time.Millisecond), func() {
				n.data = nil
				n.damaged, n.mute, n.says = false, false, ""
				n.token = map[string]bool{}
				n.lease, n.material = cb.Lease{}, nil
				n.k3sDisk(func(d *cb.Disk) {
					d.Datastore, d.Tombstone, d.ResetFlag = false, false, false
					if a.Role == cb.RoleNone {
						d.AgentCert = false
					}
				})
				n.write(func(d *cb.Disk) { d.Aside = false }, shown)
			})
		})
	case cb.RemoveDeadServer:
		n.later(w.between(100*time.Millisecond, time.Second), func() {
			m := w.byID(a.Node)
			if m == nil || !w.api(n.i) {
				done(false)
				return
			}
			g := n.data
			drop := func(x int) bool { return x == m.i }
			if len(g.voters) > 1 {
				g.voters = slices.DeleteFunc(g.voters, drop)
			}
			g.learners = slices.DeleteFunc(g.learners, drop)
			delete(g.caught, m.i)
			if !a.KeepNode {
				g.nodes[m.i].known = false
			}
			w.tracef("etcd %d: %s removed (voters %s)", g.id, m.name, w.nameList(g.voters))
			done(true)
		})
	case cb.UpdateAddresses:
		n.write(func(d *cb.Disk) { d.Addrs = a.Addrs }, ok)
	default:
		w.violate("%s: action %s is not carried out by anybody", n.name, a.Kind)
	}
}

func (n *node) writeLedger(a cb.Action, done func(bool)) {
	w := n.w
	if !w.api(n.i) || n.proc.kind != cb.ProcessServer {
		done(false)
		return
	}
	g := n.data
	var have uint64
	if g.ledger != nil {
		have = g.ledger.Version
	}
	if a.Ledger.Version != have && !w.bug("cas-ignored") || a.Ledger.Record.Into != "" && a.Order == "" && !g.virgin && !w.bug("dissolves-with-data") {
		w.tracef("%s: compare-and-set lost", n.name)
		done(false)
		return
	}
	l := *a.Ledger
	l.Version = have + 1
	w.committed(n, g, &l, a.Order, a.Ledger.Version != have)
	g.ledger = &l
	g.uid = l.Record.UID
	n.keepRecord(&l.Record)
	n.hello()
	if !w.quiet && w.chance(w.sc.LostReply) {
		w.tracef("%s: the answer to a write that succeeded got lost", n.name)
		done(false)
		return
	}
	if n.maybeCut("after a write to etcd") {
		return
	}
	done(true)
}

// escrowDue: the newest snapshot that is kept elsewhere is over an hour old,
// and there is somebody to keep a new one.
func (w *world) escrowDue(n *node, g *group) bool {
	if s := w.escrow[g.uid]; g.uid == "" || s != nil && s.of == g && w.now-s.at < time.Hour {
		return false
	}
	for j := range w.nodes {
		if j != n.i && w.linked(n.i, j) {
			return true
		}
	}
	return w.sc.CentreUsed && w.centre.up
}

// snap is a sealed snapshot that somebody else keeps.
type snap struct {
	of     *group
	at     time.Duration
	ledger cb.Ledger
	virgin bool
}

func (n *node) takeSnapshot(plan string) bool {
	w := n.w
	if !w.api(n.i) || n.data.ledger == nil {
		return false
	}
	if p := n.data.ledger.Plan; w.sc.NoSnapshots && p != nil && p.ID == plan || !w.quiet && w.chance(w.sc.LostReply) {
		return false
	}
	n.snapshot = plan
	w.escrow[n.data.uid] = &snap{n.data, w.now, *n.data.ledger, n.data.virgin}
	return true
}

// restore makes a cluster from the newest snapshot of uid.
func (n *node) restore(uid string) bool {
	s := n.w.escrow[uid]
	if s == nil {
		return false
	}
	n.data = &group{uid: uid, ledger: &s.ledger, virgin: s.virgin, confirmed: s.of.confirmed}
	n.damaged, n.mute, n.says = false, false, ""
	n.reset(true)
	return true
}

func (n *node) askMaterial(a cb.Action) {
	w := n.w
	m := w.byID(a.From)
	if m == nil || !n.due(a.Kind, 3*time.Second) {
		return
	}
	quote := w.between(0, 5*time.Second)
	w.send(n.i, m.i, func() {
		obs := m.observe()
		b := w.opt.Bug
		if b != nil && b.Observe != nil {
			b.Observe(m.view(), &obs)
		}
		ok, why := cb.AnswerMaterial(obs, w.pol, n.id, a.As, a.Plan, quote)
		if b != nil && b.Material != nil {
			ok = b.Material(obs, n.id, a.As, ok)
		}
		if !ok {
			if w.tracing() {
				w.tracef("%s: no join material for %s: %s", m.name, n.name, why)
			}
			return
		}
		w.gave(m, n, a.As)
		rec := m.disk.Record
		w.send(m.i, n.i, func() {
			n.material = &cb.Material{UID: rec.UID, Epoch: rec.Epoch, As: a.As, Plan: a.Plan}
			n.matAt = w.now
			if a.As == cb.RoleServer {
				n.token[rec.UID] = true
			}
			n.wake(10 * time.Millisecond)
		})
	})
}

func (n *node) askLease(a cb.Action) {
	w := n.w
	m := w.byID(a.From)
	if m == nil || !n.due(a.Kind, 2*time.Second) {
		return
	}
	sent := n.mono()
	w.send(n.i, m.i, func() {
		obs := m.observe()
		d, why := cb.AnswerLease(obs, w.pol, n.id, a.Plan)
		if w.bug("lease-after-reset") && d == 0 && m.disk.Reset != nil {
			d = w.pol.Lease
		}
		if d == 0 {
			if w.tracing() {
				w.tracef("%s: no lease for %s: %s", m.name, n.name, why)
			}
			return
		}
		m.grantAt = m.mono()
		w.send(m.i, n.i, func() {
			n.lease = cb.Lease{Plan: a.Plan, Until: sent + d}
			n.leaseWatch()
			n.wake(10 * time.Millisecond)
		})
	})
}
