package clusterbootstrap

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Promotion. The leader's side: grow starts a plan, lead carries it out,
// windowFailed ends one that lost quorum. The candidate's side: prepare and
// candidate.

// grow starts a plan when the site has what it takes.
func (v *view) grow(l *Ledger) (State, []Action) {
	want := v.Docs.Charter.Policy.Servers
	have := len(l.Record.Servers)
	if have >= want {
		for _, s := range l.Record.Servers {
			if p := v.peer(s); s != v.Self && (p == nil || p.Age > v.pol.PeerFresh) {
				return v.wait(Server, ServerDown, "The server "+v.name(s)+" is away. The cluster runs on without it for now.")
			}
		}
		return v.wait(Server, NoBlocker, "I am a server of the cluster.")
	}
	ready := 0
	for _, n := range v.K3s.Nodes {
		if n.Ready {
			ready++
		}
	}
	if at := v.Docs.Charter.Policy.PromoteAt; have == 1 && ready < at {
		return v.wait(Server, FewNodes, fmt.Sprintf("I run the cluster alone: %d of %d nodes are ready that it takes to have three servers.", ready, at))
	}
	cands, hindered := v.eligible(l, "")
	if len(cands) < want-have {
		if s, acts := v.stepDown(l); acts != nil {
			return s, acts
		}
		if hindered.Reason == "" {
			hindered.Reason = "I look for nodes that are ready, may be servers and have been so for long enough; there are too few."
		}
		return Server, []Action{hindered}
	}
	cands = cands[:want-have]
	p := PlanDoc{N: 1, Epoch: l.Record.Epoch, Leader: v.Self, Candidates: cands, Phase: PlanPrepare, Replace: have > 1}
	if old := l.Plan; old != nil {
		p.N = old.N + 1
		if old.Phase == PlanAborted {
			p.Failures = old.Failures
		}
		if pause := v.pol.RetryAfter << min(max(old.Failures-1, 0), 3); old.Phase == PlanAborted && v.K3s.LedgerFor < pause {
			return Server, []Action{{Kind: Wait, Blocker: RetryLater, For: pause - v.K3s.LedgerFor,
				Reason: "The last try to make more servers failed (" + old.Why + "). I try again in a few minutes."}}
		}
	}
	p.Serial = v.Docs.Charter.Birth.MaxLearners < 2 || p.Failures%2 == 1
	p.Go = len(cands)
	if p.Serial {
		p.Go = 1
	}
	p.ID = fmt.Sprintf("%.8s-%d-%d", l.Record.UID, p.Epoch, p.N)
	return Leading, []Action{{Kind: WriteLedger, Ledger: &Ledger{Version: l.Version, Record: l.Record, Plan: &p}, Plan: p.ID,
		Reason: "Enough nodes are ready: " + v.names(cands) + " shall become servers."}}
}

// lead carries out an active plan while the API answers.
func (v *view) lead(l *Ledger) (State, []Action) {
	p := l.Plan
	if p.Leader != v.Self {
		n := clonePlan(l)
		n.Plan.Leader = v.Self
		return Leading, []Action{{Kind: WriteLedger, Ledger: n, Plan: p.ID, Reason: v.name(p.Leader) + " is away; I carry on its plan."}}
	}
	if p.Epoch != l.Record.Epoch {
		return Leading, []Action{v.abort(l, "the cluster was reset")}
	}
	if p.Phase == PlanPrepare {
		return v.leadPrepare(l)
	}
	return v.leadSwitch(l)
}

func (v *view) leadPrepare(l *Ledger) (State, []Action) {
	p := l.Plan
	for _, c := range p.Candidates {
		if _, ok := v.Docs.Admitted(c); !ok {
			return Leading, []Action{v.abort(l, v.name(c)+" was removed")}
		}
		q := v.peer(c)
		if q != nil && q.Age <= v.pol.PeerFresh && q.Status.Step != nil && q.Status.Step.Plan == p.ID {
			continue
		}
		if v.K3s.LedgerFor > v.pol.PrepareLimit {
			return Leading, []Action{v.abort(l, v.name(c)+" did not get ready")}
		}
		return v.wait(Leading, PeerMissing, v.name(c)+" gets ready to become a server.")
	}
	var acts []Action
	if !p.Replace && (v.Disk.Lead == nil || v.Disk.Lead.Plan != p.ID) {
		acts = append(acts, Action{Kind: LeadPlan, Lead: &Lead{Plan: p.ID, Epoch: p.Epoch, Phase: LeadOpen, Candidates: p.Candidates},
			Reason: "From here on the new servers run only while I renew their lease."})
	}
	n := clonePlan(l)
	n.Plan.Phase = PlanSwitch
	return Leading, append(acts, Action{Kind: WriteLedger, Ledger: n, Plan: p.ID, Reason: "All are ready: the change of roles begins."})
}

func (v *view) leadSwitch(l *Ledger) (State, []Action) {
	p := l.Plan
	if p.Replace && v.K3s.LedgerFor > v.pol.WindowLimit {
		return Leading, []Action{v.abort(l, "the new server did not come up")}
	}
	if p.Off {
		if a := v.stray(l); a != nil {
			return Leading, []Action{*a}
		}
		return Leading, []Action{v.abort(l, p.Why)}
	}
	confirming := v.Disk.Lead != nil && v.Disk.Lead.Plan == p.ID && v.Disk.Lead.Phase == LeadConfirming
	switch {
	case p.Reopened && confirming:
		d := *v.Disk.Lead
		d.Phase = LeadOpen
		return Leading, []Action{{Kind: LeadPlan, Lead: &d, Reason: "The confirmation did not get through and no longer can; I call the change off."}}
	case confirming && v.K3s.LedgerFor > v.pol.WindowLimit:
		n := clonePlan(l)
		n.Plan.Reopened, n.Plan.Why = true, "a new server went away before it was confirmed"
		return Leading, []Action{{Kind: WriteLedger, Ledger: n, Plan: p.ID, Reason: "I cannot confirm the new servers; I make sure that nobody can, and call the change off."}}
	}
	if why := v.gaveUp(l); why != "" && !confirming {
		if p.Replace {
			return Leading, []Action{v.abort(l, why)}
		}
		n := clonePlan(l)
		n.Plan.Off, n.Plan.Why = true, why
		return Leading, []Action{{Kind: WriteLedger, Ledger: n, Plan: p.ID, Reason: "The change of roles does not work: " + why + ". I take the new members out again."}}
	}
	servers := slices.Concat(l.Record.Servers, p.Candidates)
	slices.Sort(servers)
	voters := 0
	for _, m := range v.K3s.Members {
		if !m.Learner && slices.Contains(servers, m.Node) {
			voters++
		}
	}
	if p.Go < len(p.Candidates) && voters >= len(l.Record.Servers)+p.Go {
		n := clonePlan(l)
		n.Plan.Go++
		return Leading, []Action{{Kind: WriteLedger, Ledger: n, Plan: p.ID, Reason: "The first new server is in; the next one follows."}}
	}
	for _, c := range p.Candidates {
		q := v.peer(c)
		if q == nil || q.Age > v.pol.PeerFresh/2 || !q.Status.API || q.Status.Voters != len(servers) || q.Status.Learners != 0 ||
			q.Status.Step == nil || q.Status.Step.Plan != p.ID {
			return v.wait(Leading, PeerMissing, "I wait until "+v.name(c)+" is up as a server.")
		}
	}
	if voters != len(servers) || len(v.K3s.Members) != len(servers) {
		return v.wait(Leading, Settling, "I wait until all servers have a vote.")
	}
	// A snapshot that cannot be put elsewhere must not cost the site its new
	// servers: after half of the window's time the plan goes on without it.
	if v.K3s.Snapshot != p.ID && v.K3s.LedgerFor < v.pol.WindowLimit/2 {
		return Leading, []Action{{Kind: TakeSnapshot, Plan: p.ID, Reason: "All servers are up; I take a snapshot."}}
	}
	var acts []Action
	if !p.Replace && v.Disk.Lead.Phase != LeadConfirming {
		d := *v.Disk.Lead
		d.Phase = LeadConfirming
		// From the moment the confirmation may be in etcd the candidates may
		// run without a lease, so that this node must never reset by itself.
		acts = append(acts, Action{Kind: LeadPlan, Lead: &d, Reason: "I confirm the new servers."})
	}
	n := clonePlan(l)
	n.Plan.Phase, n.Plan.Failures = PlanDone, 0
	n.Record.Servers = servers
	n.Record.Version++
	return Leading, append(acts, Action{Kind: WriteLedger, Ledger: n, Plan: p.ID, Reason: "All servers are up and agree: the plan is done."})
}

// gaveUp says why a plan cannot succeed although the majority is there.
func (v *view) gaveUp(l *Ledger) string {
	for _, m := range v.K3s.Members {
		if m.Learner && m.For > v.pol.LearnerLimit && slices.Contains(l.Plan.Candidates, m.Node) {
			return v.name(m.Node) + " got no vote within " + strconv.Itoa(int(v.pol.LearnerLimit/time.Minute)) + " minutes"
		}
	}
	if v.K3s.LedgerFor <= v.pol.PeerFresh {
		return ""
	}
	for _, c := range l.Plan.Candidates {
		// Each showed its step before the switch began, and shows statuses in
		// order: one without it has given up.
		if q := v.peer(c); q != nil && q.Age <= v.pol.PeerFresh && q.Status.Role != RoleCandidate && (q.Status.Step == nil || q.Status.Step.Plan != l.Plan.ID) {
			return v.name(c) + " gave up"
		}
	}
	return ""
}

func (v *view) abort(l *Ledger, why string) Action {
	n := clonePlan(l)
	n.Plan.Phase, n.Plan.Why = PlanAborted, why
	n.Plan.Failures++
	return Action{Kind: WriteLedger, Ledger: n, Plan: l.Plan.ID, Reason: "I call off the plan: " + why + "."}
}

func clonePlan(l *Ledger) *Ledger {
	n, p := *l, *l.Plan
	n.Plan = &p
	return &n
}

// windowFailed decides to go back to one server: quorum is lost inside the
// window, or the window has been open for too long. Only before the
// confirmation may have been written.
func (v *view) windowFailed(rec *Record) (State, []Action) {
	d := v.Disk.Lead
	if d == nil || d.Phase != LeadOpen || d.Epoch != rec.Epoch {
		return 0, nil
	}
	if l := v.K3s.Ledger; v.K3s.API && l != nil && (l.Plan == nil || l.Plan.ID != d.Plan || l.Plan.Phase != PlanSwitch) {
		return 0, nil
	}
	r := Reset{Plan: d.Plan, To: rec.Epoch + 1}
	switch {
	case v.K3s.NoInfo > v.pol.QuorumGrace:
		return v.beginReset(r, "The cluster lost its majority while "+v.names(d.Candidates)+" became servers. I take it back to one server.")
	case v.K3s.API && (v.K3s.LedgerFor > v.pol.WindowLimit || v.K3s.Ledger != nil && v.K3s.Ledger.Plan.Reopened):
		return v.beginReset(r, "The new servers "+v.names(d.Candidates)+" did not come up in time. I take the cluster back to one server.")
	}
	if !v.K3s.API {
		return v.wait(Leading, NoQuorum, "The cluster has no majority while "+v.names(d.Candidates)+" become servers; I give it a moment.")
	}
	return 0, nil
}

func (v *view) isCandidate(p *PlanDoc) bool { return slices.Contains(p.Candidates, v.Self) }

// prepare is a worker that a plan names.
func (v *view) prepare(rec *Record, p *PlanDoc) (State, []Action) {
	st := v.Disk.Step
	if p.Epoch != rec.Epoch {
		return v.wait(Worker, Settling, "A plan of another epoch names me; it is void.")
	}
	step := Step{Plan: p.ID, N: p.N, Epoch: p.Epoch, Leader: p.Leader, Replace: p.Replace}
	if st == nil || st.Plan != p.ID {
		if p.Phase != PlanPrepare {
			return v.wait(Worker, Settling, "I was to become a server and gave up; I stay a worker until the plan has ended.")
		}
		m := v.Material
		if m == nil || m.As != RoleServer || m.Plan != p.ID || m.Epoch != p.Epoch {
			return Worker, []Action{{Kind: RequestJoinMaterial, From: p.Leader, As: RoleServer, UID: rec.UID, Plan: p.ID,
				For: 5 * time.Second, Reason: "I shall become a server and ask " + v.name(p.Leader) + " for what that takes."}}
		}
		step.Phase = StepPrepared
		return Worker, []Action{{Kind: StepPlan, Step: &step, Plan: p.ID, Reason: "I have what it takes to become a server."}}
	}
	turn := slices.Index(p.Candidates, v.Self) < p.Go
	if p.Phase != PlanSwitch || !turn || p.Off {
		return v.wait(Worker, Settling, "I am ready to become a server and wait for my turn.")
	}
	if !p.Replace && !v.leaseHolds(p.ID, v.pol.Lease/3) {
		return Worker, []Action{v.renew(p.ID, p.Leader)}
	}
	step.Phase = StepSwitched
	return Candidate, []Action{{Kind: StepPlan, Step: &step, Plan: p.ID, Reason: "I change from worker to server."}}
}

func (v *view) leaseHolds(plan string, rest time.Duration) bool {
	return v.Lease.Plan == plan && v.Mono+rest < v.Lease.Until
}

func (v *view) renew(plan string, leader fleet.NodeID) Action {
	return Action{Kind: RenewFenceLease, Plan: plan, From: leader, For: v.pol.LeaseRenew,
		Blocker: LeaseMissing, Reason: "I ask " + v.name(leader) + " whether I may still run as a new server."}
}

// candidate changes from worker to server, and stays one only if the plan is
// confirmed.
func (v *view) candidate() (State, []Action) {
	rec, st := v.Disk.Record, v.Disk.Step
	if rec == nil || st == nil {
		return v.aside(RoleWorker, rec, "My notes about becoming a server are incomplete; I stay a worker.")
	}
	if acts := v.followRecord(rec); acts != nil {
		return Leaving, acts
	}
	if m := v.resetOrder(rec); m != nil {
		return v.beginReset(Reset{To: m.Epoch}, "An order tells me to go on from my own data.")
	}
	n := *rec
	if d, ok := v.Docs.Newest(rec.UID); ok && d.Newer(n) {
		n = d
	}
	if l := v.K3s.Ledger; l != nil && l.Record.UID == rec.UID && l.Record.Newer(n) {
		n = l.Record
	}
	switch {
	case n.Epoch > st.Epoch:
		return v.aside(RoleWorker, &n, "The change of roles failed and the cluster was reset. I am a worker again.")
	case n.Has(v.Self) && v.Disk.Datastore:
		return Server, []Action{{Kind: KeepRecord, Record: &n, Role: RoleServer, Reason: "The plan is confirmed: I am a server."}}
	}
	if p := v.plan(rec); p != nil && (p.ID == st.Plan && p.Phase == PlanAborted || p.N > st.N && p.Epoch >= st.Epoch) {
		return v.aside(RoleWorker, rec, "The change of roles was called off. I am a worker again.")
	}
	if v.Disk.Tombstone {
		return v.aside(RoleWorker, rec, "I was taken out of the servers again. I am a worker.")
	}
	if v.isDamaged() {
		return v.aside(RoleWorker, rec, "My new datastore is damaged ("+v.K3s.Damaged+"). I am a worker again.")
	}
	if st.Replace && v.K3s.Process == ProcessServer && !v.K3s.API && v.K3s.NoInfo > v.pol.QuorumLost {
		if s, acts := v.candidateOrder(rec); acts != nil {
			return s, acts
		}
		return v.wait(Waiting, QuorumLost, "The cluster lost its majority while I became a server. Please check the other servers; if they are lost, an order is needed.")
	}
	if !st.Replace && !v.leaseHolds(st.Plan, 0) {
		if s, acts := v.candidateOrder(rec); acts != nil {
			return s, acts
		}
		return v.leaseEnded(st)
	}
	if !st.Replace && v.Lease.Until-v.Mono < v.pol.Lease-v.pol.LeaseRenew {
		v.extra = append(v.extra, v.renew(st.Plan, st.Leader))
	}
	switch {
	case v.K3s.Process == ProcessAgent:
		return Candidate, []Action{{Kind: StopK3s, Reason: "The worker process must be gone before the server starts."}}
	case v.K3s.Process == ProcessNone && (st.Replace || v.leaseHolds(st.Plan, v.pol.Lease/3)):
		return Candidate, []Action{{Kind: StartServer, Plan: st.Plan, Reason: "I start as a new server."}}
	case v.K3s.Process == ProcessNone:
		return v.wait(Candidate, LeaseMissing, "I wait for the lease to be renewed before I start.")
	}
	return v.wait(Candidate, Settling, "I run as a new server; the plan is not confirmed yet.")
}

// candidateOrder does what an order allows a candidate that cannot go on.
func (v *view) candidateOrder(rec *Record) (State, []Action) {
	if m := v.restoreOrder(rec); m != nil && !v.K3s.API {
		return v.restore(m)
	}
	return v.giveUp(rec)
}

func (v *view) leaseEnded(st *Step) (State, []Action) {
	why := "I may run as a new server only while " + v.name(st.Leader) + " allows it, and it does not answer."
	ask := v.renew(st.Plan, st.Leader)
	if v.K3s.Process == ProcessServer {
		return Candidate, []Action{{Kind: StopK3s, Reason: why}, ask}
	}
	silent := v.Mono
	if p := v.peer(st.Leader); p != nil {
		silent = p.Age
	}
	ask.Reason = why
	if p := v.peer(st.Leader); p != nil && p.Age <= v.pol.PeerFresh &&
		(p.Status.Role != RoleServer || p.Status.Record != nil && p.Status.Record.UID != v.Disk.Record.UID) {
		ask.Blocker = LeaderAway
		ask.Reason = "The change of roles stopped half-way: " + v.name(st.Leader) + " led it and has lost its data. An order is needed."
		return Waiting, []Action{ask}
	}
	if silent > v.pol.QuorumLost {
		ask.Blocker = LeaderAway
		ask.Reason += " Please check that machine; if it is lost, an order is needed."
	}
	return Waiting, []Action{ask}
}
