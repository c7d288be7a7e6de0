package sim

import (
	"fmt"
	"slices"
	"strings"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// The invariants. Those about one act are checked in that act; those about
// the whole site after every event (check) or every two seconds (watch).

// check runs after every event.
func (w *world) check() {
	serving := 0
	for _, g := range w.groups {
		if len(g.voters) > 3 {
			w.violate("etcd %d has %d voters", g.id, len(g.voters))
		}
		if len(w.groups) > 1 && w.quorum(g) >= 0 {
			serving++
		}
	}
	if serving < 2 {
		return
	}
	for i, g := range w.groups {
		for _, h := range w.groups[:i] {
			if g.uid != "" && g.uid == h.uid && w.quorum(g) >= 0 && w.quorum(h) >= 0 {
				w.violate("two datastores of one cluster serve: etcd %d (%s) and etcd %d (%s)", g.id, w.nameList(g.voters), h.id, w.nameList(h.voters))
			}
		}
	}
}

// linkedFor is how long i and j have heard each other.
func (w *world) linkedFor(i, j int) time.Duration {
	if !w.linked(i, j) {
		return 0
	}
	return w.now - max(w.since[i][j], w.since[j][i])
}

// founded: n made a new datastore with cluster-init.
func (w *world) founded(n *node) {
	if in := n.disk.Intent; n.mandate != nil && in != nil && strings.HasPrefix(in.UID, "o") {
		// A node that joined another cluster since has forgotten the order.
		if h := w.usedBy[n.mandate.ID]; h != nil && (n.lastUID == "" || n.lastUID == h.uid) {
			w.violate("%s founds a second cluster by one order", n.name)
		}
		w.usedBy[n.mandate.ID], n.lastUID = n.data, in.UID
		n.data.byOrder = true
		return // a person decided
	}
	if n.member {
		w.violate("%s founds although it was in a cluster before", n.name)
	}
	if up := n.mono(); w.sc.Mode == fleet.FoundFirst && up < w.pol.Survey {
		w.violate("%s founds %s after its start, without a survey", n.name, up)
	}
	g := n.data
	// Shorter than a survey by one round of hello; long enough that nobody
	// missed the other in between.
	const met = 55 * time.Second
	for _, h := range w.groups {
		if h == g || h.made < 0 || h.byOrder {
			continue
		}
		f := w.nodes[h.made]
		if w.confirmed && f.gone {
			continue // a person said that the first cluster is no more
		}
		if w.sc.Mode != fleet.FoundFirst && w.given[cb.MandateFound] > 0 {
			continue // a person gave the right away, and then its owner came
		}
		if w.sc.Mode != fleet.FoundFirst {
			w.violate("%s founds a second cluster in mode %s", n.name, w.sc.Mode)
			continue
		}
		if h.ledger != nil && h.ledger.Record.Into != "" || f.gone || f.data != h {
			continue
		}
		if w.linkedFor(n.i, f.i) > met {
			w.violate("%s founds although it has heard %s, the founder of another cluster, for %s", n.name, f.name, w.linkedFor(n.i, f.i))
		}
		for _, x := range w.nodes {
			if x != n && x != f && !x.gone && w.linkedFor(x.i, n.i) > met && w.linkedFor(x.i, f.i) > met {
				w.violate("%s and %s found two clusters although %s has heard both for long", n.name, f.name, x.name)
			}
		}
	}
}

// acked: n acknowledged c. It must not have acknowledged somebody else whom it
// has heard of lately.
func (w *world) acked(n *node, c *cb.Claim) {
	if a := n.lastAck; a.Node != "" && a.Node != c.Node {
		m := w.byID(a.Node)
		if m.claim != nil && *m.claim == a && !w.removed(m) && w.now-n.heard[m.i] < w.pol.AckHold*9/10 {
			w.violate("%s acknowledges %s while the claim of %s that it acknowledged before still stands", n.name, w.byID(c.Node).name, m.name)
		}
	}
	n.lastAck = *c
}

// joined: n starts as a worker of uid.
func (w *world) joined(n *node, uid string) {
	n.member = true
	if j := w.apiFor(n.i); j >= 0 && minorOf(n.version) > minorOf(w.nodes[j].version) && !n.disk.AgentCert {
		w.violate("%s joins with a k3s newer than the server's", n.name)
	}
	if !n.joinedUID(uid) {
		w.grew(uid)
	}
}

func minorOf(v string) string { return v[:strings.LastIndex(v, ".")] }

func (n *node) joinedUID(uid string) bool {
	was := n.lastUID == uid
	n.lastUID = uid
	return was
}

// grew: of two clusters that have met for a minute, only one grows.
func (w *world) grew(uid string) {
	for k, at := range w.meets {
		if k[0] != uid && k[1] != uid || w.now-at < 65*time.Second {
			continue
		}
		w.growth = append(w.growth, growth{k, uid})
		for _, g := range w.growth {
			if g.pair == k && g.uid != uid {
				w.violate("two clusters that have met both grow: %s and %s", g.uid, uid)
			}
		}
	}
}

type growth struct {
	pair [2]string
	uid  string
}

// committed: n wrote l into g.
func (w *world) committed(n *node, g *group, l *cb.Ledger, order string, stale bool) {
	if stale {
		w.violate("%s overwrites the ledger of etcd %d with a stale one: an acknowledged plan step is lost", n.name, g.id)
	}
	if m := w.epochs[l.Record.UID]; l.Record.Epoch < m {
		w.violate("%s commits epoch %d after epoch %d", n.name, l.Record.Epoch, m)
	}
	w.epochs[l.Record.UID] = max(w.epochs[l.Record.UID], l.Record.Epoch)
	if old := g.ledger; old != nil && old.Record.UID == l.Record.UID && !l.Record.Newer(old.Record) && l.Record.Version != old.Record.Version {
		w.violate("%s takes the record back from version %d to %d", n.name, old.Record.Version, l.Record.Version)
	}
	if l.Record.Into != "" && (g.ledger == nil || g.ledger.Record.Into == "") {
		s := w.escrow[l.Record.UID]
		switch {
		case order == "" && !g.virgin:
			w.violate("%s dissolves a cluster that holds data", n.name)
		case order != "":
			w.ordered(n, order)
			if s == nil || s.of != g || w.now-s.at > 15*time.Minute {
				w.violate("%s gives a cluster up without a snapshot of it", n.name)
			}
		}
	}
	if l.Plan != nil && (g.ledger == nil || g.ledger.Plan == nil || g.ledger.Plan.ID != l.Plan.ID) {
		w.grew(l.Record.UID)
		ready := 0
		for i := range g.nodes {
			if g.nodes[i].known && w.now-g.nodes[i].contact < 60*time.Second {
				ready++
			}
		}
		if !l.Plan.Replace && ready < w.docs.charter.Policy.PromoteAt {
			w.violate("%s starts a promotion with %d ready nodes", n.name, ready)
		}
		if len(l.Record.Servers)+len(l.Plan.Candidates) != 3 {
			w.violate("%s plans for %d servers", n.name, len(l.Record.Servers)+len(l.Plan.Candidates))
		}
		for _, c := range l.Plan.Candidates {
			if a, _ := n.documents().Admitted(c); !a.MayServe {
				w.violate("%s plans with %s, which may not serve", n.name, c)
			}
			if m := w.byID(c); m.version != n.version || m.args != n.args || m.fsync > w.pol.FsyncLimit {
				w.violate("%s plans with %s, whose k3s or disk is not fit for a server", n.name, m.name)
			}
		}
	}
	if p := l.Plan; p != nil && p.Phase == cb.PlanDone && (g.ledger.Plan == nil || g.ledger.Plan.Phase != cb.PlanDone) {
		if len(g.voters) != 3 {
			w.violate("%s confirms a plan with %d voters", n.name, len(g.voters))
		}
		for _, s := range l.Record.Servers {
			if !slices.Contains(g.voters, w.byID(s).i) {
				w.violate("%s confirms %s, which has no vote", n.name, s)
			}
		}
		g.confirmed = p.ID
	}
}

// ordered: n does what only an order allows.
func (w *world) ordered(n *node, order string) {
	// Wall clocks differ from the truth by an hour at most.
	if m := n.mandate; order != "" && (m == nil || wall.Add(w.now).After(m.NotAfter.Add(70*time.Minute))) {
		w.violate("%s carries out an order that has ended", n.name)
	}
	if r := n.disk.Record; order == "reset" && r != nil && !(len(r.Servers) == 1 && r.Has(n.id)) && w.now-w.served[r.UID] < w.pol.QuorumLost*9/10 {
		w.violate("%s resets or restores by order a cluster that was up a moment ago", n.name)
	}
}

// stops: n is about to stop k3s.
func (w *world) stops(n *node) {
	g := n.data
	if n.state != cb.Removed || n.proc.kind != cb.ProcessServer || !w.api(n.i) || len(g.voters) != 2 || g.ledger == nil || len(g.ledger.Record.Servers) != 2 {
		return
	}
	for _, v := range g.voters {
		if v != n.i && w.linkedFor(n.i, v) > 30*time.Second && w.api(v) && w.now-n.heard[v] < 10*time.Second {
			w.violate("%s was removed and takes the majority of two along", n.name)
		}
	}
}

// movesAside: n is about to move its cluster data aside.
func (w *world) movesAside(n *node) {
	g := n.data
	if n.believed.Role != cb.RoleServer || g == nil || n.damaged || g.ledger == nil || !slices.Contains(g.voters, n.i) {
		return
	}
	l := &g.ledger.Record
	switch m := n.mandate; {
	case l.Into != "" || l.Epoch < w.epochs[g.uid] || m != nil && m.Kind == cb.MandateDissolve:
	case l.Has(n.id):
		w.violate("%s moves good data aside", n.name)
	case len(g.voters) == 2:
		w.violate("%s moves its vote aside, one of two", n.name)
	}
}

// gave: m gave join material to n.
func (w *world) gave(m, n *node, as cb.Role) {
	d := m.documents()
	if _, ok := d.Admitted(n.id); !ok {
		w.violate("%s gives a token to %s, which is not admitted", m.name, n.name)
	}
	if as != cb.RoleServer {
		return
	}
	g := m.data
	if g == nil || g.ledger == nil || !g.ledger.Plan.Active() || !slices.Contains(g.ledger.Plan.Candidates, n.id) {
		w.violate("%s gives the server token to %s, which no plan names", m.name, n.name)
	}
}

// raised: n raises the epoch.
func (w *world) raised(n *node, r *cb.Record) {
	if m := w.epochs[r.UID]; r.Epoch <= m && (w.raisedBy[r.UID] != n.i || r.Epoch < m) {
		w.violate("%s raises the epoch to %d, and %d was there before", n.name, r.Epoch, m)
	}
	w.epochs[r.UID] = max(w.epochs[r.UID], r.Epoch)
	w.raisedBy[r.UID] = n.i
}

// checkReset: whoever resets to its own data must be the last that runs.
func (w *world) checkReset(n *node) {
	r := n.disk.Reset
	if n.data == nil || r == nil || r.Plan == "" {
		return
	}
	for j := range w.nodes {
		if j != n.i && w.runs(n.data, j) {
			w.violate("%s resets to its own data while %s still runs in the same etcd", n.name, w.nodes[j].name)
		}
	}
	if n.data.confirmed == r.Plan {
		w.violate("%s resets although plan %s was confirmed", n.name, r.Plan)
	}
}

// oldData: n is about to start etcd on data that it knows is void.
func (w *world) oldData(n *node) {
	g := n.data
	if g == nil || g.ledger == nil || n.disk.Record == nil {
		return
	}
	d := n.documents()
	r, ok := d.Newest(g.uid)
	own := max(g.ledger.Record.Epoch, n.disk.Record.Epoch)
	if ok && (r.Epoch > own || n.disk.Role == cb.RoleServer && r.Epoch == own && r.Newer(*n.disk.Record) && !r.Has(n.id)) {
		w.violate("%s starts etcd with old data although it knows better", n.name)
	}
}

// lostWrites: the power is gone; what others were told must be on the disk.
func (n *node) lostWrites() {
	b, f := &n.believed, &n.flushed
	if b.Ack != f.Ack || b.Step != f.Step || b.Lead != f.Lead || b.Role != f.Role || b.Intent != f.Intent || b.Reset != f.Reset || b.Record != f.Record {
		n.w.violate("%s: the power cut took a step that had been acknowledged", n.name)
	}
}

// watch looks at the site every two seconds, and ends the run.
func (w *world) watch() {
	for i, n := range w.nodes {
		if n.disk.Role == cb.RoleServer && w.api(i) {
			w.served[n.data.uid] = w.now
		}
	}
	w.meetings()
	w.learners()
	if w.quiet {
		w.progress()
	}
	w.after(2*time.Second, w.watch)
}

// learners: none stays one for much longer than Policy.LearnerLimit while
// somebody could take it out.
func (w *world) learners() {
	for _, g := range w.groups {
		for _, i := range g.learners {
			l := w.quorum(g)
			if l < 0 || g.ledger == nil || len(g.ledger.Record.Servers) != 1 || w.byID(g.ledger.Record.Servers[0]).i != l {
				continue
			}
			up := w.nodes[l].proc.started
			if !w.api(l) || w.now-max(g.since[i], up, w.since[l][i]) < w.pol.LearnerLimit+3*time.Minute {
				continue
			}
			w.violate("%s is a learner of etcd %d for %s and nobody takes it out", w.nodes[i].name, g.id, w.now-g.since[i])
		}
	}
}

// meetings notes since when two clusters have seen each other.
func (w *world) meetings() {
	if len(w.groups) < 2 {
		return
	}
	now := map[[2]string]bool{}
	for i := range w.nodes {
		for j := range w.nodes[:i] {
			if !w.linked(i, j) || !w.api(i) || !w.api(j) {
				continue
			}
			a, b := w.nodes[i].data.uid, w.nodes[j].data.uid
			if a != "" && b != "" && a != b {
				now[[2]string{min(a, b), max(a, b)}] = true
			}
		}
	}
	for k := range w.meets {
		if !now[k] {
			delete(w.meets, k)
			w.growth = slices.DeleteFunc(w.growth, func(g growth) bool { return g.pair == k })
		}
	}
	for k := range now {
		if _, ok := w.meets[k]; !ok {
			w.meets[k] = w.now
		}
	}
}

const (
	patience = 60 * time.Minute // from the end of faults to the goal
	rest     = 40 * time.Second // the goal must hold so long
	stuck    = 14 * time.Minute // a person's blocker must stand so long
)

// progress ends the run when the goal holds, or a person is truly needed.
func (w *world) progress() {
	missing := w.missing()
	if missing == "" {
		if w.good < 0 {
			w.good = w.now
		}
		if w.now-w.good >= rest && (w.returning == 0 || w.opt.Kind != "return") {
			w.res.End = "goal"
			w.tracef("the goal holds")
		}
		return
	}
	w.good = -1
	since := w.now - w.sc.Quiet
	if since > stuck && w.now-w.acted > stuck {
		if b, n, err := w.blocked(); err != "" {
			if since > patience {
				w.violate("no progress: %s; %s; %s", missing, err, w.states())
			}
		} else if !w.sc.PersonActs || !w.act(b, n) {
			w.res.End = "person: " + string(b)
			w.tracef("a person is needed: %s (%s)", b, missing)
		}
	}
	if since > 2*patience {
		w.violate("no progress: %s; %s", missing, w.states())
	}
}

func (w *world) states() string {
	var s []string
	for _, n := range w.nodes {
		switch {
		case n.dead:
			s = append(s, n.name+" dead")
		default:
			s = append(s, fmt.Sprintf("%s %s%s", n.name, n.state, blockerText(n.blocker)))
		}
	}
	return strings.Join(s, ", ")
}

// missing says what the goal lacks: one cluster, every living admitted node in
// it, as many servers as there can be.
func (w *world) missing() string {
	var alive []*node
	able := 0
	for _, n := range w.nodes {
		if n.dead || n.mask&(1<<(removalBit+n.i)) != 0 || w.removed(n) {
			continue
		}
		alive = append(alive, n)
		if !slices.Contains(w.sc.MayNot, n.i) {
			able++
		}
	}
	w.res.Servers = 0
	if len(alive) == 0 {
		return ""
	}
	var g *group
	for _, n := range w.nodes {
		if w.api(n.i) && n.data.ledger != nil {
			if g != nil && g != n.data {
				return "two clusters serve"
			}
			g = n.data
		}
	}
	if g == nil {
		return "no cluster serves"
	}
	l := g.ledger
	w.res.Servers = len(l.Record.Servers)
	if l.Plan.Active() {
		return "plan " + l.Plan.ID + " is " + l.Plan.Phase.String()
	}
	for _, n := range alive {
		r := n.disk.Record
		switch {
		case !n.up:
			return n.name + " is off"
		case r == nil || r.UID != g.uid || r.Epoch != l.Record.Epoch:
			return n.name + " is not in the cluster"
		case l.Record.Has(n.id) && (n.state != cb.Server && n.state != cb.Fenced || !w.api(n.i)):
			return n.name + " is not up as a server"
		case !l.Record.Has(n.id) && (n.state != cb.Worker || w.apiFor(n.i) < 0):
			return n.name + " is not up as a worker"
		}
	}
	want := 1
	if w.sc.Servers == 3 && (able >= 3 || len(l.Record.Servers) > 1) {
		want = 3
	}
	if len(l.Record.Servers) == 2 && able < 3 {
		want = 1 // one was taken out and nobody can take its place
	}
	if len(l.Record.Servers) != want {
		return fmt.Sprintf("%d servers, want %d", len(l.Record.Servers), want)
	}
	if len(g.voters) != want || len(g.learners) != 0 {
		return fmt.Sprintf("%d voters and %d learners, want %d", len(g.voters), len(g.learners), want)
	}
	if w.sc.Replace > 0 && want == 3 && able >= 3 {
		for _, s := range l.Record.Servers {
			if m := w.byID(s); !slices.Contains(alive, m) {
				return m.name + " is dead and not replaced"
			}
		}
	}
	return ""
}

func (w *world) removed(n *node) bool {
	for _, m := range w.nodes {
		if m.mask&(1<<(removalBit+n.i)) != 0 {
			return true
		}
	}
	return false
}

// blocked returns a blocker that asks for a person, and is true.
func (w *world) blocked() (cb.Blocker, *node, string) {
	wrong := "nobody asks for a person"
	for _, n := range w.nodes {
		if !n.up || !n.blocker.NeedsPerson() || n.blocker == cb.RemovedNode {
			continue
		}
		err := w.truth(n)
		if err == "" {
			return n.blocker, n, ""
		}
		wrong = n.name + " says " + string(n.blocker) + ", but " + err
	}
	return "", nil, wrong
}

// truth is "" if n's blocker names what really is wrong.
func (w *world) truth(n *node) string {
	lostVoters := func(g *group) bool {
		live := 0
		for _, v := range g.voters {
			if m := w.nodes[v]; !m.dead && m.data == g && !m.damaged && !w.removed(m) {
				live++
			}
		}
		return live <= len(g.voters)/2
	}
	switch n.blocker {
	case cb.CentreUnsure:
		if !w.centre.unsure {
			return "the centre is sure"
		}
	case cb.FounderAway:
		f := w.byID(w.founderByRight())
		if w.sc.Mode == fleet.FoundFirst {
			for _, m := range w.nodes {
				if !m.gone && !slices.Contains(w.sc.MayNot, m.i) {
					return m.name + " could found"
				}
			}
			return ""
		}
		if f != nil && !f.gone && !w.removed(f) && f.disk.Mark == "" {
			return "the founder is alive"
		}
	case cb.QuorumLost:
		g := n.data
		if g != nil && !lostVoters(g) {
			return "enough voters are alive"
		}
		if g != nil && g.ledger != nil && len(g.ledger.Record.Servers) == 1 && g.ledger.Record.Has(n.id) && g.ledger.Record.Epoch == w.epochs[g.uid] &&
			(n.disk.Lead == nil || n.disk.Lead.Phase == cb.LeadOpen) {
			return "it is the only server and could go on alone"
		}
	case cb.LeaderAway:
		if l := w.byID(n.disk.Step.Leader); !l.gone && !w.removed(l) && (l.disk.Record == nil || l.disk.Record.UID == n.disk.Record.UID) {
			return "the leader is alive"
		}
	case cb.ServersLost:
		for _, g := range w.groups {
			if n.disk.Record != nil && g.uid == n.disk.Record.UID && !lostVoters(g) {
				return "the servers are alive"
			}
		}
		for j, m := range w.nodes {
			if m.disk.Role == cb.RoleServer && n.data == nil && n.disk.Record != nil && m.data != nil && m.data.uid != n.disk.Record.UID && strings.HasPrefix(m.data.uid, "o") && !m.fenced && w.api(j) && w.routed(n.i, j) {
				return "a person had a cluster founded that it can join"
			}
		}
	case cb.TwoClusters:
		for _, g := range w.groups {
			if w.sc.Mode == fleet.FoundFirst && g == n.data && g.virgin {
				return "its cluster is empty"
			}
		}
	case cb.DataLost:
		if n.data != nil {
			return "the data is there"
		}
	case cb.DataDamaged:
		if !n.damaged {
			return "its data is good"
		}
	case cb.OrderVoid:
		if n.mandate == nil {
			return "there is no order"
		}
	case cb.VersionSkew, cb.ArgsDiffer, cb.SlowDisk:
		for _, m := range w.nodes {
			if m.version != version || m.args != args || m.fsync != fsync {
				return ""
			}
		}
		return "all nodes are alike"
	default:
		return "nothing of that kind was done to it"
	}
	return ""
}

func (w *world) founderByRight() fleet.NodeID {
	if w.sc.Mode == fleet.FoundCentral {
		return w.centre.granted
	}
	return nodeID(w.sc.Founder)
}
