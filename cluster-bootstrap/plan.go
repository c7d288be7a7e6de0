package clusterbootstrap

import (
	"time"

	"github.com/muster-edge/muster/fleet"
)

// view is an Observation during one Plan, with what was worked out from it.
type view struct {
	Observation
	now   time.Time
	pol   Policy
	extra []Action // done before whatever the state wants
}

// Plan says where the node stands and what it should do next. The list is
// never empty: a node with nothing to do is told to wait, and why.
func Plan(now time.Time, obs Observation, pol Policy) (State, []Action) {
	v := view{Observation: obs, now: now, pol: pol.WithDefaults()}
	s, acts := v.decide()
	v.noteOrder(acts)
	if len(v.extra) > 0 {
		acts = append(v.extra, acts...)
	}
	return s, acts
}

func (v *view) decide() (State, []Action) {
	if v.Docs.removed(v.Self) {
		return v.ended()
	}
	if v.Docs.Charter == nil {
		return v.wait(Waiting, NoCharter, "I have no charter of a site yet. The centre or a peer must give me one.")
	}
	if _, ok := v.Docs.Admitted(v.Self); !ok {
		return v.wait(Waiting, NotAdmitted, "I am not admitted to this site yet. Somebody must assign me to it.")
	}
	v.addresses()
	switch {
	case v.Disk.Reset != nil:
		return v.recovering()
	case v.Disk.Aside && v.Disk.Intent != nil:
		return Founding, []Action{{Kind: AbandonFounding, Reason: "I was undoing a founding when I was interrupted, and go on with it."}}
	case v.Disk.Aside:
		return v.aside(v.Disk.Role, v.Disk.Record, "I was moving old cluster data aside when I was interrupted, and go on with it.")
	}
	switch v.Disk.Role {
	case RoleWorker:
		return v.worker()
	case RoleCandidate:
		return v.candidate()
	case RoleServer:
		return v.server()
	}
	if v.Disk.Intent != nil {
		return v.founding()
	}
	return v.outsider()
}

// ended stops a node whose membership was ended by a Removal.
func (v *view) ended() (State, []Action) {
	const why = "I was removed from this site. A new admission is needed to come back."
	if v.lastVote() {
		return v.wait(Removed, Settling, "I was removed from this site, and wait until the other server has taken my vote away.")
	}
	if v.K3s.Process != ProcessNone {
		return Removed, []Action{{Kind: StopK3s, Reason: why}}
	}
	return v.wait(Removed, RemovedNode, why)
}

// lastVote reports whether this node's vote is one of two, and the other
// server can take it away: if this one just stopped, no majority would be left
// to do so. A removed node is heard for no longer than PeerFresh.
func (v *view) lastVote() bool {
	if v.K3s.Process != ProcessServer || !v.K3s.API {
		return false
	}
	votes, me, other := 0, false, false
	for _, m := range v.K3s.Members {
		if m.Learner {
			continue
		}
		votes++
		p := v.peer(m.Node)
		me = me || m.Node == v.Self
		other = other || p != nil && p.Age <= v.pol.PeerFresh && p.Status.API
	}
	return votes == 2 && me && other
}

// addresses tells the launcher when a peer is seen at another address than
// the one it knows: the cluster's own addresses never change, only the way to
// them.
func (v *view) addresses() {
	changed := false
	for i := range v.Peers {
		p := &v.Peers[i]
		if p.Addr != "" && v.Disk.Addrs[p.Status.Node] != p.Addr {
			changed = true
			break
		}
	}
	if !changed {
		return
	}
	m := make(map[fleet.NodeID]string, len(v.Peers))
	for k, a := range v.Disk.Addrs {
		m[k] = a
	}
	for _, p := range v.Peers {
		if p.Addr != "" {
			m[p.Status.Node] = p.Addr
		}
	}
	v.extra = append(v.extra, Action{Kind: UpdateAddresses, Addrs: m, Reason: "A peer has a new address."})
}

// outsider is a node that is in no cluster: it joins the one there is, or
// takes part in founding the first.
func (v *view) outsider() (State, []Action) {
	if m := v.restoreOrder(nil); m != nil {
		return v.restore(m)
	}
	if target := v.bestCluster(); target != nil {
		return v.join(target)
	}
	adm, _ := v.Docs.Admitted(v.Self)
	if m := v.foundOrder(); m != nil && v.founderSeen() == nil && !v.ackBinds() {
		if s, acts := v.foundByOrder(m, adm.MayServe); acts != nil {
			return s, acts
		}
	}
	if v.Disk.Ack != nil {
		if s, acts := v.acknowledged(); acts != nil {
			return s, acts
		}
	}
	if r := v.known(); r != nil {
		return v.absent("This site has a cluster already, but none of its servers answers.")
	}
	if p := v.founderSeen(); p != nil {
		return v.wait(Waiting, ServerAway, v.name(p.Status.Node)+" is starting the cluster; I join when it is up.")
	}
	f := v.Docs.Charter.Founding
	switch f.Mode {
	case fleet.FoundFirst:
		return v.first(adm.MayServe)
	case fleet.FoundNamed:
		if v.Disk.member() {
			break
		}
		if f.Founder == v.Self {
			return v.found("The charter names me to start the cluster.")
		}
		why := "The charter names " + v.name(f.Founder) + " to start the cluster; I have not heard from it."
		if s := v.successor(f); s != "" {
			why += " If it is lost, an order lets " + v.name(s) + " start it."
		}
		return v.wait(Waiting, FounderAway, why)
	case fleet.FoundCentral:
		if v.Disk.member() {
			break
		}
		return v.central(adm.MayServe)
	}
	return v.absent("I was in a cluster of this site before, so that I must not start another one.")
}

// successor is the first of the charter's successors that is up, or the first.
func (v *view) successor(f fleet.Founding) fleet.NodeID {
	for _, s := range f.Successors {
		if s == v.Self || v.heard(s) {
			return s
		}
	}
	if len(f.Successors) > 0 {
		return f.Successors[0]
	}
	return ""
}

func (v *view) central(mayServe bool) (State, []Action) {
	switch c := v.Centre; {
	case c.Granted == v.Self && mayServe:
		return v.found("The centre gave me the right to start the cluster.")
	case c.Granted != "":
		return v.wait(Waiting, FounderAway, "The centre chose "+v.name(c.Granted)+" to start the cluster; I have not heard from it.")
	case !mayServe:
		return v.wait(Waiting, FounderAway, "I may not be a server, so that another node must start the cluster.")
	case !c.Reachable:
		return Waiting, []Action{{Kind: AskGrant, Blocker: CentreUnreachable, For: 10 * time.Second,
			Reason: "The centre decides who starts the cluster, and it does not answer. I keep asking."}}
	case c.Unsure:
		return Waiting, []Action{{Kind: AskGrant, Blocker: CentreUnsure, For: 10 * time.Second,
			Reason: "The centre was restored from a backup and cannot know whether this site has a cluster. Somebody must confirm it there."}}
	}
	return Waiting, []Action{{Kind: AskGrant, Blocker: Settling, For: 5 * time.Second, Reason: "I ask the centre who starts the cluster."}}
}

func (v *view) found(why string) (State, []Action) {
	return Founding, []Action{{Kind: FoundCluster, Reason: why,
		Intent: &Intent{UID: v.Fresh, Boot: v.Boot, Mode: v.Docs.Charter.Founding.Mode}}}
}

// founding goes on from a written Intent: nobody has joined yet, since join
// material is given only by a node that has a record.
func (v *view) founding() (State, []Action) {
	in := v.Disk.Intent
	if v.isDamaged() {
		const why = "The first server's datastore was damaged before anybody joined, so I start anew."
		acts := []Action{{Kind: AbandonFounding, Reason: why}}
		if v.K3s.Process != ProcessNone {
			acts = append([]Action{{Kind: StopK3s, Reason: why}}, acts...)
		}
		return Founding, acts
	}
	// In mode first an acknowledgement is worth something only while those
	// who gave it wait: after a restart, look around again.
	if in.Mode == fleet.FoundFirst && !v.Disk.Datastore && v.K3s.Process == ProcessNone &&
		(in.Boot != v.Boot || v.bestCluster() != nil) {
		return Founding, []Action{{Kind: AbandonFounding, Reason: "I was interrupted before the cluster existed, so I look around once more."}}
	}
	switch {
	case v.K3s.Process == ProcessAgent:
		return Founding, []Action{{Kind: StopK3s, Reason: "A worker process is in the way of the first server."}}
	case v.K3s.Process == ProcessNone:
		return Founding, []Action{{Kind: StartServer, Init: !v.Disk.Datastore, Reason: "I start the first server of this site."}}
	case !v.K3s.API && v.K3s.Running > max(v.pol.FoundLimit, v.Mono/4):
		// A power cut in its first minute may have taken keys that k3s does not
		// flush. The pause grows, so that a machine that can never found does
		// not wear out its TPM.
		const why = "The first server does not come up. Nobody has joined it, so I start anew."
		return Founding, []Action{{Kind: StopK3s, Reason: why}, {Kind: AbandonFounding, Reason: why}}
	case !v.K3s.API:
		return v.wait(Founding, ServerStarting, "The first server is starting.")
	case v.K3s.Ledger == nil:
		return Founding, []Action{{Kind: WriteLedger, Reason: "The first server is up; I write down who the cluster is.",
			Ledger: &Ledger{Record: Record{UID: in.UID, Epoch: 1, Version: 1, Founder: v.Self, Servers: []fleet.NodeID{v.Self}}}}}
	}
	r := v.K3s.Ledger.Record
	return Founding, []Action{{Kind: KeepRecord, Record: &r, Role: RoleServer, Reason: "The cluster exists; I keep its record."}}
}

func (v *view) join(p *Peer) (State, []Action) {
	r := p.Status.Record
	if why := skew(v.K3s.Version, p.Status.Version); why != "" {
		return v.wait(Waiting, VersionSkew, "I cannot join the cluster: "+why+".")
	}
	m := v.Material
	if m == nil || m.As != RoleWorker || m.UID != r.UID || m.Epoch != r.Epoch || m.Age > v.pol.MaterialAge {
		return Joining, []Action{{Kind: RequestJoinMaterial, From: p.Status.Node, As: RoleWorker, UID: r.UID,
			For: 5 * time.Second, Reason: "I ask " + v.name(p.Status.Node) + " to let me join the cluster."}}
	}
	if v.K3s.Process != ProcessNone {
		return Joining, []Action{{Kind: StopK3s, Reason: "An old k3s process must be gone before I join."}}
	}
	return Joining, []Action{{Kind: StartWorker, Record: r, Reason: "I join the cluster as a worker."}}
}

func (v *view) worker() (State, []Action) {
	rec := v.Disk.Record
	if acts := v.followRecord(rec); acts != nil {
		return Leaving, acts
	}
	if v.Disk.Datastore || v.Disk.Tombstone {
		return v.aside(RoleWorker, rec, "Old server data is in the way; I move it aside.")
	}
	if v.K3s.Process == ProcessServer {
		return Leaving, []Action{{Kind: StopK3s, Reason: "I am a worker now; the old server process must end."}}
	}
	if s, acts := v.workerOrder(rec); acts != nil {
		return s, acts
	}
	// A worker holds none of the cluster's data.
	if !v.K3s.API && v.serverOf(rec.UID) == nil && v.replaced(rec.UID) != nil {
		return v.aside(RoleNone, nil, "My cluster has long been silent, and a person had another one founded in its place. I join that.")
	}
	if v.newer(rec) {
		r, _ := v.Docs.Newest(rec.UID)
		v.extra = append(v.extra, Action{Kind: KeepRecord, Record: &r, Reason: "The list of servers changed."})
	}
	if v.K3s.Process == ProcessNone {
		return v.startWorker(rec)
	}
	if pl := v.plan(rec); pl.Active() && v.isCandidate(pl) && (v.K3s.API || v.heard(pl.Leader)) {
		return v.prepare(rec, pl)
	}
	if !v.K3s.API && v.serverOf(rec.UID) == nil {
		s, acts := v.absent("No server of the cluster answers. What runs on me goes on.")
		return s, acts
	}
	if !v.K3s.API && v.serverOf(rec.UID) != nil {
		return v.refused()
	}
	return v.wait(Worker, NoBlocker, "I am a worker of the cluster.")
}

// refused is a worker whose agent hears a server of the cluster while its k3s
// gets nowhere. A token of minutes may have ended before k3s came to use it:
// k3s would try it for ever.
func (v *view) refused() (State, []Action) {
	m := v.Material
	if !v.Disk.AgentCert && v.K3s.NoAPI > v.pol.MaterialAge && (m == nil || m.Age > v.pol.MaterialAge) {
		return Joining, []Action{{Kind: StopK3s, Reason: "My token ended before k3s could use it; I ask for a new one."}}
	}
	if v.K3s.NoAPI > v.pol.QuorumLost {
		return v.wait(Worker, WorkerRefused, "The cluster's servers answer me, but the k3s on me does not get into the cluster.")
	}
	return v.wait(Worker, ServerStarting, "The k3s on me has not reached the cluster yet.")
}

// workerOrder does what an order allows a worker whose cluster is gone.
func (v *view) workerOrder(rec *Record) (State, []Action) {
	if v.Mandate == nil || v.K3s.API || v.serverOf(rec.UID) != nil {
		return 0, nil
	}
	if m := v.restoreOrder(rec); m != nil {
		return v.restore(m)
	}
	adm, _ := v.Docs.Admitted(v.Self)
	if m := v.foundOrder(); m != nil && adm.MayServe && v.bestCluster() == nil {
		return v.aside(RoleNone, nil, "An order tells me to start a new cluster in place of mine, which is lost.")
	}
	return v.giveUp(rec)
}

// startWorker starts k3s; a worker that lost its certificate asks for a new
// token first.
func (v *view) startWorker(rec *Record) (State, []Action) {
	if !v.Disk.AgentCert {
		m, p := v.Material, v.serverOf(rec.UID)
		if p != nil {
			if why := skew(v.K3s.Version, p.Status.Version); why != "" {
				return v.wait(Waiting, VersionSkew, "I cannot join the cluster again: "+why+".")
			}
		}
		if m == nil || m.As != RoleWorker || m.UID != rec.UID || m.Age > v.pol.MaterialAge {
			if p == nil {
				return v.absent("I need a server of the cluster to join again, and none answers.")
			}
			return Joining, []Action{{Kind: RequestJoinMaterial, From: p.Status.Node, As: RoleWorker, UID: rec.UID,
				For: 5 * time.Second, Reason: "I ask " + v.name(p.Status.Node) + " to let me join again."}}
		}
	}
	return Worker, []Action{{Kind: StartWorker, Record: rec, Reason: "I start as a worker."}}
}

// followRecord leaves a cluster that was dissolved.
func (v *view) followRecord(rec *Record) []Action {
	if n, ok := v.Docs.Newest(rec.UID); ok && n.Into != "" {
		_, acts := v.aside(RoleNone, nil, "My cluster was dissolved, since this site has another one. I join that.")
		return acts
	}
	return nil
}

// aside stops k3s and moves the cluster's data away; the result is a worker
// of rec, or an outsider.
func (v *view) aside(role Role, rec *Record, why string) (State, []Action) {
	if role != RoleWorker {
		role, rec = RoleNone, nil
	}
	acts := []Action{{Kind: MoveAside, Role: role, Record: rec, Reason: why}}
	if v.K3s.Process != ProcessNone {
		acts = append([]Action{{Kind: StopK3s, Reason: why}}, acts...)
	}
	return Leaving, acts
}

// absent waits for servers that do not answer.
func (v *view) absent(why string) (State, []Action) {
	b, uid := ServerAway, ""
	if v.Disk.Record != nil {
		uid = v.Disk.Record.UID
	}
	if v.silence(uid) > v.pol.QuorumLost {
		b = ServersLost
		why += " It has been long: please check that the other machines are on and connected."
	}
	return v.wait(Waiting, b, why)
}

func (v *view) wait(s State, b Blocker, why string) (State, []Action) {
	return s, []Action{{Kind: Wait, Blocker: b, Reason: why}}
}
