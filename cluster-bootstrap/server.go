package clusterbootstrap

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// server is a confirmed server: what it must check before its etcd data may
// run, how it waits for the others, and then its duties.
func (v *view) server() (State, []Action) {
	rec := v.Disk.Record
	if acts := v.followRecord(rec); acts != nil {
		return Leaving, acts
	}
	if m := v.resetOrder(rec); m != nil {
		return v.beginReset(Reset{To: m.Epoch}, "An order tells me to go on from my own data.")
	}
	if s, acts := v.superseded(rec); acts != nil {
		return s, acts
	}
	if m := v.restoreOrder(rec); m != nil {
		return v.restore(m)
	}
	if s, acts := v.giveUp(rec); acts != nil {
		return s, acts
	}
	if v.isDamaged() && v.Disk.Datastore {
		return v.damaged(rec)
	}
	if !v.Disk.Datastore && v.K3s.Process == ProcessNone {
		return v.dataLost(rec)
	}
	switch v.K3s.Process {
	case ProcessAgent:
		return Server, []Action{{Kind: StopK3s, Reason: "A worker process is in the way of the server."}}
	case ProcessNone:
		if v.Mono < v.pol.BootCheck && !v.listed(rec) {
			return v.wait(Observing, Settling, "I ask the other servers for news before I start.")
		}
		return Server, []Action{{Kind: StartServer, Reason: "I start as a server."}}
	}
	if s, acts := v.windowFailed(rec); acts != nil {
		return s, acts
	}
	if !v.K3s.API {
		return v.noAPI(rec)
	}
	return v.duties(rec)
}

// superseded moves the data of a server aside that was replaced, or whose
// cluster went on without it in a higher epoch. Starting k3s on such data
// would bring a member back that nobody wants, by itself.
func (v *view) superseded(rec *Record) (State, []Action) {
	n, ok := v.Docs.Newest(rec.UID)
	switch {
	case v.Disk.Tombstone:
		return v.aside(RoleWorker, rec, "I am no server of the cluster any more. I come back as a worker.")
	case !ok || !n.Newer(*rec):
		return 0, nil
	case n.Epoch > rec.Epoch:
		return v.aside(RoleWorker, &n, "The cluster was reset while I was away, so that my data is old. I come back as a worker.")
	case !n.Has(v.Self):
		return v.aside(RoleWorker, &n, "I am no server of the cluster any more. I come back as a worker.")
	}
	v.extra = append(v.extra, Action{Kind: KeepRecord, Record: &n, Reason: "The list of servers changed."})
	return 0, nil
}

func (v *view) dataLost(rec *Record) (State, []Action) {
	if len(rec.Servers) > 1 {
		return v.aside(RoleWorker, rec, "My datastore is gone. I come back as a worker.")
	}
	adm, _ := v.Docs.Admitted(v.Self)
	if m := v.foundOrder(); m != nil && adm.MayServe && v.bestCluster() == nil {
		return v.aside(RoleNone, nil, "An order tells me to start a new cluster in place of mine, which is lost.")
	}
	return v.wait(Waiting, DataLost, "I was the only server and my datastore is gone. A snapshot must be restored by an order.")
}

// listed reports whether another server says, now, that this node is one.
func (v *view) listed(rec *Record) bool {
	for i := range v.Peers {
		s := v.Peers[i].Status
		if v.Peers[i].Age <= v.pol.PeerFresh && s.Role == RoleServer && s.Record != nil && s.Record.UID == rec.UID {
			return s.Record.Has(v.Self)
		}
	}
	return false
}

func (v *view) noAPI(rec *Record) (State, []Action) {
	if v.K3s.Running < v.pol.QuorumGrace {
		return v.wait(Server, ServerStarting, "My server is starting.")
	}
	away := ""
	for _, s := range rec.Servers {
		if p := v.peer(s); s != v.Self && (p == nil || p.Age > v.pol.PeerFresh) {
			away += " " + v.name(s)
		}
	}
	why := "The cluster has no majority. Servers that I do not hear:" + away + "."
	if away == "" {
		why = "The cluster has no majority, though I hear its servers."
	}
	if max(v.K3s.NoInfo, 0) > v.pol.QuorumLost {
		return v.wait(Waiting, QuorumLost, why+" Please check that they are on and connected; if they are lost, an order is needed.")
	}
	return v.wait(Waiting, NoQuorum, why)
}

// duties of a server whose API answers.
func (v *view) duties(rec *Record) (State, []Action) {
	l := v.K3s.Ledger
	switch {
	case l == nil || l.Record.UID != rec.UID || l.Record.Epoch < rec.Epoch:
		n := Ledger{Record: *rec}
		n.Record.Version++
		if l != nil {
			n.Version = l.Version
			if l.Plan != nil {
				p := *l.Plan
				if p.Active() {
					p.Phase, p.Failures, p.Why = PlanAborted, p.Failures+1, "the cluster was reset"
				}
				n.Plan = &p
			}
		}
		return Recovering, []Action{{Kind: WriteLedger, Ledger: &n, Reason: "I write down that the cluster goes on in a new epoch."}}
	case l.Record.Newer(*rec) && l.Record.Has(v.Self):
		return Server, []Action{{Kind: KeepRecord, Record: &l.Record, Reason: "The list of servers changed."}}
	case l.Record.Newer(*rec):
		return v.aside(RoleWorker, &l.Record, "I am no server of the cluster any more. I come back as a worker.")
	}
	if d := v.Disk.Lead; d != nil && (l.Plan == nil || l.Plan.ID != d.Plan || !l.Plan.Active()) {
		return v.windowClosed(l, d)
	}
	if s, acts := v.dissolve(l); acts != nil {
		return s, acts
	}
	if s, acts := v.fenced(l); acts != nil {
		return s, acts
	}
	if !v.leads(l) {
		return v.wait(Server, NoBlocker, "I am a server of the cluster.")
	}
	if l.Plan.Active() {
		return v.lead(l)
	}
	if s, acts := v.cleanUp(l); acts != nil {
		return s, acts
	}
	s, acts := v.grow(l)
	if a := &acts[len(acts)-1]; s == Server && a.Kind == Wait && v.K3s.EscrowDue {
		a.Kind, a.Plan, a.Reason = TakeSnapshot, "hourly", "I take a snapshot for safe keeping elsewhere. "+a.Reason
	}
	return s, acts
}

// windowClosed ends the leader's part in a plan. If it was called off, the
// fence stays until nobody can hold a lease any more: a candidate that does not
// know yet may still join etcd, and then die.
func (v *view) windowClosed(l *Ledger, d *Lead) (State, []Action) {
	if p := l.Plan; p != nil && p.ID == d.Plan && p.Phase == PlanAborted {
		if a := v.stray(l); a != nil {
			return Leading, []Action{*a}
		}
		if end := v.LastGrant + v.pol.Lease + v.pol.LeaseMargin; v.Mono < end {
			return Server, []Action{{Kind: Wait, Blocker: LeaseRunsOut, For: end - v.Mono,
				Reason: "The change of roles was called off. I wait until nobody can run under a lease any more."}}
		}
	}
	return Server, []Action{{Kind: LeadPlan, Reason: "The plan has ended."}}
}

// leads reports whether this server carries the plan, or would start one: the
// lowest ID of the servers that are up. Two that both believe so meet at the
// compare-and-set.
func (v *view) leads(l *Ledger) bool {
	if l.Plan.Active() {
		if l.Plan.Leader == v.Self {
			return true
		}
		p := v.peer(l.Plan.Leader)
		if !l.Plan.Replace || p != nil && p.Age <= v.pol.Survey && p.Status.Role == RoleServer {
			return false
		}
	}
	for _, s := range l.Record.Servers {
		if s == v.Self {
			return true
		}
		if p := v.peer(s); p != nil && p.Age <= v.pol.PeerFresh && p.Status.API && p.Status.Role == RoleServer {
			return false
		}
	}
	return false
}

// rival is another cluster of this site, as one of its servers shows it.
func (v *view) rival(l *Ledger) *Status {
	var worst *Status
	for i := range v.Peers {
		p := &v.Peers[i]
		s := p.Status
		if p.Age > v.pol.PeerFresh || !s.API || s.Record == nil || s.Record.UID == l.Record.UID || s.Record.Into != "" {
			continue
		}
		if worst == nil || betterCluster(s, worst) {
			worst = s
		}
	}
	return worst
}

// betterCluster orders two clusters of one site: with data of somebody, more
// servers, lower UID. It uses only what both sides know of each other.
func betterCluster(a, b *Status) bool {
	if a.Virgin != b.Virgin {
		return b.Virgin
	}
	if x, y := len(a.Record.Servers), len(b.Record.Servers); x != y {
		return x > y
	}
	return a.Record.UID < b.Record.UID
}

// fenced handles two clusters that met: the worse one stops growing at once.
// If nothing of anybody is in it, it dissolves itself; else a person decides.
func (v *view) fenced(l *Ledger) (State, []Action) {
	if l.Record.Into != "" {
		return v.aside(RoleNone, nil, "My cluster was dissolved, since this site has another one. I join that.")
	}
	r := v.rival(l)
	if r == nil || betterCluster(&Status{Virgin: v.K3s.Virgin, Record: &l.Record}, r) {
		return 0, nil
	}
	switch {
	case l.Plan.Active() && l.Plan.Phase == PlanPrepare && l.Plan.Leader == v.Self:
		return Fenced, []Action{v.abort(l, "the site has two clusters")}
	case l.Plan.Active() && l.Plan.Leader == v.Self:
		return 0, nil // a window is closed first, one way or the other
	case l.Plan.Active():
		return v.wait(Fenced, Settling, "This site has two clusters; mine must not grow. A plan ends first.")
	case v.Docs.Charter.Founding.Mode == fleet.FoundFirst && v.K3s.Virgin:
		n := *l
		n.Record.Into = r.Record.UID
		n.Record.Version++
		return Fenced, []Action{{Kind: WriteLedger, Ledger: &n,
			Reason: "This site has two clusters, and mine holds nothing of anybody. I dissolve it and join the other."}}
	}
	return v.wait(Fenced, TwoClusters, "This site has two clusters with data in both. Mine does not grow until somebody decides which stays.")
}

// cleanUp removes members that are no servers, and takes servers off the list
// that are dead or lost their vote. The list changes first, so that a server
// that comes back knows; only of two votes the member goes first, as the other
// one must still be there to agree.
func (v *view) cleanUp(l *Ledger) (State, []Action) {
	if a := v.stray(l); a != nil {
		return Leading, []Action{*a}
	}
	for _, s := range l.Record.Servers {
		why, spare := v.dead(l, s)
		switch {
		case why == "":
			continue
		case len(l.Record.Servers) == 2 && v.isMember(s):
			if !v.Docs.removed(s) {
				continue // who is away took the majority along, and comes back
			}
			return Leading, []Action{{Kind: RemoveDeadServer, Node: s, Reason: why + " I take its vote away."}}
		}
		if spare {
			if c, hindered := v.eligible(l, s); len(c) == 0 {
				hindered.Reason = strings.TrimSpace(why + " No other node can take its place now. " + hindered.Reason)
				return Server, []Action{hindered}
			}
		}
		n := *l
		n.Record.Servers = slices.DeleteFunc(slices.Clone(l.Record.Servers), func(x fleet.NodeID) bool { return x == s })
		n.Record.Version++
		return Leading, []Action{{Kind: WriteLedger, Ledger: &n, Node: s, Reason: why + " I take it off the list of servers."}}
	}
	return 0, nil
}

// stray removes a member that is no server: those first that are not up, and
// learners before votes.
func (v *view) stray(l *Ledger) *Action {
	var worst *Member
	rank := func(m *Member) int {
		p := v.peer(m.Node)
		switch {
		case p == nil || p.Age > v.pol.PeerFresh || p.Status.Role == RoleWorker || p.Status.Role == RoleNone:
			return 0
		case m.Learner:
			return 1
		}
		return 2
	}
	for i := range v.K3s.Members {
		if m := &v.K3s.Members[i]; !l.Record.Has(m.Node) && (worst == nil || rank(m) < rank(worst)) {
			worst = m
		}
	}
	if worst == nil {
		return nil
	}
	_, admitted := v.Docs.Admitted(worst.Node)
	return &Action{Kind: RemoveDeadServer, Node: worst.Node, KeepNode: admitted && v.heard(worst.Node),
		Reason: v.name(worst.Node) + " is no server of the cluster any more; I remove what is left of it."}
}

func (v *view) isMember(id fleet.NodeID) bool {
	return slices.ContainsFunc(v.K3s.Members, func(m Member) bool { return m.Node == id })
}

// dead says why server s should go; spare: only if another can take its place.
func (v *view) dead(l *Ledger, s fleet.NodeID) (why string, spare bool) {
	if s == v.Self {
		return "", false
	}
	if v.Docs.removed(s) {
		return v.name(s) + " was removed from this site.", false
	}
	if len(v.K3s.Members) > 0 && !v.isMember(s) {
		return v.name(s) + " has no vote any more.", false
	}
	p := v.peer(s)
	if p != nil && p.Age <= v.pol.PeerFresh {
		if st := p.Status; st.Role == RoleWorker && st.Record != nil && st.Record.UID == l.Record.UID && !l.Record.Newer(*st.Record) || st.Role == RoleNone {
			return v.name(s) + " is no server any more.", false
		}
		return "", false
	}
	after := time.Duration(v.Docs.Charter.Policy.ReplaceAfter) * time.Second
	silent := v.Mono
	if p != nil {
		silent = p.Age
	}
	if after == 0 || silent < after || v.nodeReady(s) {
		return "", false
	}
	for _, o := range l.Record.Servers { // the other one must miss it, too
		if q := v.peer(o); o != s && o != v.Self && (q == nil || q.Age > v.pol.PeerFresh || slices.Contains(q.Status.Sees, s)) {
			return "", false
		}
	}
	return v.name(s) + " has been away for " + strconv.Itoa(int(silent/time.Minute)) + " minutes.", true
}

// recovering goes on from a written Reset.
func (v *view) recovering() (State, []Action) {
	r := v.Disk.Reset
	rec := v.Disk.Record
	if rec != nil {
		if n, ok := v.Docs.Newest(rec.UID); ok && n.Epoch >= r.To && !n.Has(v.Self) {
			return v.aside(RoleWorker, &n, "The cluster went on elsewhere in the meantime. I come back as a worker.")
		}
	}
	if m := v.mandate(MandateRestore); m != nil && m.Epoch > r.To && !v.Disk.ResetFlag && (rec == nil || m.UID == rec.UID) {
		return v.restore(m)
	}
	if v.K3s.Process != ProcessNone && !v.Disk.ResetFlag {
		return Recovering, []Action{{Kind: StopK3s, Reason: "k3s must be stopped before its datastore is reset."}}
	}
	if end := v.LastGrant + v.pol.Lease + v.pol.LeaseMargin; r.Plan != "" && !v.Disk.ResetFlag && v.Mono < end {
		return Recovering, []Action{{Kind: Wait, Blocker: LeaseRunsOut, For: end - v.Mono,
			Reason: "The promotion failed and the cluster has no majority. I wait until the other nodes have certainly stopped, then go on from my own data."}}
	}
	if !v.Disk.ResetFlag {
		if r.Snapshot == "" && v.K3s.Damaged != "" {
			return v.wait(Waiting, DataDamaged, "I should go on from my own data, but it is damaged ("+v.K3s.Damaged+"). A snapshot must be restored by an order.")
		}
		if r.Snapshot != "" {
			return Recovering, []Action{{Kind: RestoreFromEscrow, Reset: r, Reason: "I restore the cluster from the snapshot that the order names."}}
		}
		return Recovering, []Action{{Kind: ResetToOwnData, Reset: r, Reason: "I go on from my own data as the only server."}}
	}
	n := Record{Epoch: r.To, Version: 1, Founder: v.Self, Servers: []fleet.NodeID{v.Self}}
	if n.UID = r.UID; rec != nil {
		n.UID, n.Founder = rec.UID, rec.Founder
	}
	return Recovering, []Action{{Kind: RaiseEpoch, Record: &n, Reason: "The cluster goes on in a new epoch; what the others hold of the old one is void."}}
}
