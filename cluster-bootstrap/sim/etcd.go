package sim

import (
	"slices"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
)

// group is one etcd cluster: its members and what they have agreed on. A reset
// makes a new group out of a copy; data never goes from one to another.
type group struct {
	id        int
	uid       string // of the ledger, once written
	voters    []int
	learners  []int
	caught    map[int]time.Duration // when a learner is caught up
	leader    int
	ledger    *cb.Ledger
	virgin    bool
	nodes     []k8sNode
	ticking   bool
	confirmed string          // the last plan that was confirmed
	since     []time.Duration // when each member became what it is
	byOrder   bool            // a person ordered it
	made      int             // who made it with cluster-init; -1: a reset
}

type k8sNode struct {
	known         bool
	contact, from time.Duration
	ready         bool
}

// proc is the k3s process of a node.
type proc struct {
	kind     cb.Process
	started  time.Duration
	stopping bool
	init     bool
	member   bool // takes part in data's raft
	apiAt    time.Duration
	extra    bool // a second k3s runs beside it
}

func (w *world) newGroup(i int) *group {
	g := &group{id: len(w.groups), voters: []int{i}, leader: i, virgin: true, made: -1, nodes: make([]k8sNode, len(w.nodes)),
		caught: map[int]time.Duration{}, since: make([]time.Duration, len(w.nodes))}
	g.since[i] = w.now
	w.groups = append(w.groups, g)
	return g
}

// linked reports whether packets pass both ways.
func (w *world) linked(i, j int) bool {
	if i == j {
		return w.nodes[i].up
	}
	return w.nodes[i].up && w.nodes[j].up && w.link[i][j] && w.link[j][i]
}

// routed adds that the launchers know the addresses: etcd dials those.
func (w *world) routed(i, j int) bool {
	if i == j {
		return w.nodes[i].up
	}
	a, b := w.nodes[i], w.nodes[j]
	return w.linked(i, j) && (b.addr == a.disk.Addrs[b.id] || a.addr == b.disk.Addrs[a.id])
}

func (w *world) runs(g *group, i int) bool {
	n := w.nodes[i]
	return n.up && n.data == g && n.proc.kind == cb.ProcessServer && n.proc.member && !n.proc.extra
}

// quorum returns the leader of g, or -1.
func (w *world) quorum(g *group) int {
	ok := func(l int) bool {
		if !w.runs(g, l) {
			return false
		}
		c := 0
		for _, v := range g.voters {
			if w.runs(g, v) && w.routed(l, v) {
				c++
			}
		}
		return c > len(g.voters)/2
	}
	if slices.Contains(g.voters, g.leader) && ok(g.leader) {
		return g.leader
	}
	for _, v := range g.voters {
		if ok(v) {
			g.leader = v
			return v
		}
	}
	return -1
}

// api reports whether the apiserver of node i answers.
func (w *world) api(i int) bool {
	n := w.nodes[i]
	g := n.data
	if g == nil || !w.runs(g, i) || w.now < n.proc.apiAt || !slices.Contains(g.voters, i) {
		return false
	}
	l := w.quorum(g)
	return l >= 0 && w.routed(i, l)
}

// apiFor returns the node through which the agent process of node i reaches
// its cluster, or -1.
func (w *world) apiFor(i int) int {
	n := w.nodes[i]
	if n.disk.Record == nil {
		return -1
	}
	for j := range w.nodes {
		if j != i && w.routed(i, j) && w.api(j) && w.nodes[j].data.uid == n.disk.Record.UID {
			return j
		}
	}
	return -1
}

// tick is the leader's loop: it makes learners voters that have caught up,
// whether they still live or not (measured).
func (w *world) tick(g *group) {
	if g.ticking {
		return
	}
	g.ticking = true
	w.after(w.between(500*time.Millisecond, 15*time.Second), func() {
		g.ticking = false
		if w.quorum(g) >= 0 {
			for _, i := range slices.Clone(g.learners) {
				if at, ok := g.caught[i]; ok && w.now >= at && w.quorum(g) >= 0 {
					g.learners = slices.DeleteFunc(g.learners, func(x int) bool { return x == i })
					g.voters = append(g.voters, i)
					slices.Sort(g.voters)
					g.since[i] = w.now
					w.tracef("etcd %d: %s has a vote now (voters %s)", g.id, w.nodes[i].name, w.nameList(g.voters))
				}
			}
		}
		if len(g.learners) > 0 {
			w.tick(g)
		}
	})
}

func (w *world) nameList(is []int) string {
	var ns []*node
	for _, i := range is {
		ns = append(ns, w.nodes[i])
	}
	return names(ns)
}

// startServer starts the server process.
func (n *node) startServer(init bool) {
	w := n.w
	p := &n.proc
	if p.kind != cb.ProcessNone {
		// Two k3s processes on one node: the second can never listen.
		w.violate("%s: two k3s processes on one node", n.name)
		return
	}
	*p = proc{kind: cb.ProcessServer, started: w.now, init: init}
	n.infoAt = w.now
	w.tracef("%s: k3s server starts (init=%v, data=%v)", n.name, init, n.data != nil)
	if init && n.data != nil {
		init = false
	}
	start := w.now
	alive := func() bool { return n.proc.kind == cb.ProcessServer && n.proc.started == start && !n.proc.stopping }
	up := func() {
		n.proc.member = true
		n.proc.apiAt = w.now + w.between(5*time.Second, 9*time.Second)
		if !w.quiet && w.sc.SlowStart > 0 && w.chance(.3) {
			n.proc.apiAt = w.now + w.between(5*time.Second, w.sc.SlowStart)
		}
		n.later(n.proc.apiAt-w.now+time.Millisecond, func() { n.wake(0) })
	}
	n.later(w.between(500*time.Millisecond, 2*time.Second), func() {
		if !alive() {
			return
		}
		switch {
		case n.disk.Tombstone:
			// k3s backs the old data up and joins again, unasked (measured
			// behaviour of the source: facts of a removed member).
			w.tracef("%s: k3s finds the tombstone and joins again by itself", n.name)
			n.k3sDisk(func(d *cb.Disk) { d.Tombstone, d.Datastore = false, false })
			n.data = nil
			n.joinLoop(alive, up)
		case n.data != nil && n.mute:
			w.tracef("%s: k3s does not find its keys and begins again and again", n.name)
		case n.data != nil && n.damaged:
			w.tracef("%s: k3s ends: %s", n.name, damage)
			n.proc, n.says = proc{}, damage
			n.wake(100 * time.Millisecond)
		case n.data != nil:
			w.oldData(n)
			n.k3sDisk(func(d *cb.Disk) { d.ResetFlag = false })
			up()
			n.watchRemoval(alive)
		case init:
			n.data = w.newGroup(n.i)
			n.data.made = n.i
			n.k3sDisk(func(d *cb.Disk) { d.Datastore = true })
			w.founded(n)
			up()
		default:
			n.joinLoop(alive, up)
		}
	})
}

// k3sDisk changes what k3s itself has on disk; it flushes by itself.
func (n *node) k3sDisk(f func(d *cb.Disk)) { f(&n.disk); f(&n.flushed); f(&n.believed) }

// joinLoop joins as a learner, as soon as the cluster takes one.
func (n *node) joinLoop(alive func() bool, up func()) {
	w := n.w
	n.later(w.between(500*time.Millisecond, 2500*time.Millisecond), func() {
		if !alive() {
			return
		}
		j := w.apiFor(n.i)
		if j >= 0 {
			g := w.nodes[j].data
			active := 0
			for _, v := range g.voters {
				if w.runs(g, v) && w.routed(w.quorum(g), v) {
					active++
				}
			}
			if !n.token[g.uid] {
				w.violate("%s: joins as a server without a server token", n.name)
				return
			}
			healthy := active >= (len(g.voters)+1)/2+1 || len(g.voters) == 1
			if len(g.learners) < w.sc.MaxLearners && healthy && !slices.Contains(g.learners, n.i) {
				if slices.Contains(g.voters, n.i) {
					// A member of that name with other data.
					w.tracef("%s: duplicate member name, join refused", n.name)
					n.joinLoop(alive, up)
					return
				}
				g.learners = append(g.learners, n.i)
				g.since[n.i] = w.now
				if delete(g.caught, n.i); w.quiet || !w.chance(w.sc.Stuck) {
					g.caught[n.i] = w.now + w.between(300*time.Millisecond, 2*time.Second)
				} else {
					w.tracef("etcd %d: %s does not catch up", g.id, n.name)
				}
				w.evict(g, n)
				n.data, n.damaged = g, false
				n.k3sDisk(func(d *cb.Disk) { d.Datastore = true })
				w.tracef("%s: etcd %d takes it in as a learner", n.name, g.id)
				up()
				w.tick(g)
				n.watchRemoval(alive)
				if w.chance(w.sc.KillLearner) && !w.quiet {
					n.later(w.between(100*time.Millisecond, 9*time.Second), func() { w.killOne(n, "in the window") })
				}
				return
			}
		}
		n.joinLoop(alive, up)
	})
}

const damage = "walpb: crc mismatch"

// evict is k3s's own rule: one learner without progress is taken out after
// five minutes. With two of them it watches neither.
func (w *world) evict(g *group, n *node) {
	if w.sc.MaxLearners > 1 {
		return
	}
	at := w.now
	w.after(5*time.Minute, func() {
		if g.since[n.i] == at && slices.Contains(g.learners, n.i) && w.quorum(g) >= 0 {
			g.learners = slices.DeleteFunc(g.learners, func(x int) bool { return x == n.i })
			w.tracef("etcd %d: k3s takes the learner %s out", g.id, n.name)
		}
	})
}

// watchRemoval ends a member that was removed, once it hears of it.
func (n *node) watchRemoval(alive func() bool) {
	w := n.w
	n.later(2*time.Second, func() {
		if !alive() || n.data == nil {
			return
		}
		g := n.data
		if l := w.quorum(g); l >= 0 && w.routed(n.i, l) && !slices.Contains(g.voters, n.i) && !slices.Contains(g.learners, n.i) {
			w.tracef("%s: k3s: this node has been removed from the cluster", n.name)
			n.k3sDisk(func(d *cb.Disk) { d.Tombstone = true })
			n.proc = proc{}
			n.wake(100 * time.Millisecond)
			return
		}
		n.watchRemoval(alive)
	})
}

func (n *node) startAgent() {
	w := n.w
	if n.proc.kind != cb.ProcessNone {
		w.violate("%s: two k3s processes on one node", n.name)
		return
	}
	n.proc = proc{kind: cb.ProcessAgent, started: w.now}
	w.tracef("%s: k3s agent starts", n.name)
	n.later(3*time.Second, n.heartbeat)
}

// tokenLife is how long a worker's token can be used.
const tokenLife = 10 * time.Minute

// heartbeat keeps the Node object ready.
func (n *node) heartbeat() {
	w := n.w
	j := -1
	switch n.proc.kind {
	case cb.ProcessServer:
		if w.api(n.i) {
			j = n.i
		}
	case cb.ProcessAgent:
		if !n.disk.AgentCert && w.now-n.tokenAt > tokenLife {
			return // k3s tries it for ever
		}
		j = w.apiFor(n.i)
	}
	if j >= 0 {
		g := w.nodes[j].data
		k := &g.nodes[n.i]
		if !k.known || !k.ready || w.now-k.contact > 40*time.Second {
			*k = k8sNode{known: true, ready: true, from: w.now}
			if n.proc.kind == cb.ProcessAgent {
				n.k3sDisk(func(d *cb.Disk) { d.AgentCert = true })
			}
		}
		k.contact = w.now
	}
}

// stop stops k3s; next runs when it is gone.
func (n *node) stop(next func()) {
	if n.proc.kind == cb.ProcessNone {
		next()
		return
	}
	n.proc.stopping = true
	n.proc.member = false
	if n.w.bug("no-wait-for-exit") {
		n.later(n.w.between(time.Second, 4*time.Second), func() { n.proc = proc{} })
		next()
		return
	}
	n.later(n.w.between(500*time.Millisecond, 4*time.Second), func() {
		n.proc = proc{}
		next()
	})
}

// leaseWatch is the launcher's own fence: it needs no planner.
func (n *node) leaseWatch() {
	if n.w.bug("lease-not-honoured") {
		return
	}
	until := n.lease.Until
	left := time.Duration(float64(until-n.mono()) / n.rate)
	n.later(max(left, 0)+time.Millisecond, func() {
		if n.lease.Until == until && n.disk.Role == cb.RoleCandidate && n.disk.Step != nil && !n.disk.Step.Replace && n.proc.kind == cb.ProcessServer {
			n.w.tracef("%s: the lease has ended, the launcher kills k3s", n.name)
			n.later(n.w.between(0, 3*time.Second), func() {
				if n.lease.Until == until && n.proc.kind == cb.ProcessServer && n.disk.Role == cb.RoleCandidate {
					n.proc = proc{}
					n.wake(100 * time.Millisecond)
				}
			})
		}
	})
}

// reset makes a cluster of its own out of the node's data.
func (n *node) reset(restored bool) {
	w := n.w
	old := n.data
	g := w.newGroup(n.i)
	if old != nil {
		if old.ledger != nil {
			l := *old.ledger
			g.ledger = &l
		}
		g.uid, g.virgin, g.confirmed = old.uid, old.virgin, old.confirmed
		copy(g.nodes, old.nodes)
	}
	if restored {
		g.virgin = false
	}
	n.data = g
	n.k3sDisk(func(d *cb.Disk) { d.ResetFlag, d.Datastore = true, true })
	w.res.Resets++
	w.tracef("%s: cluster-reset: etcd %d from its own data", n.name, g.id)
}
