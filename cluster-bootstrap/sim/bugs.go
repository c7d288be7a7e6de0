package sim

import (
	"slices"
	"strings"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Bug is a planted bug: a planner, or an edge around it, that does one thing
// wrong. The simulator must find each of them.
type Bug struct {
	Name string
	// Kind is the kind of run that finds it soonest.
	Kind string
	// Seed found it before; the search starts there.
	Seed uint64
	// Observe changes what the planner sees.
	Observe func(View, *cb.Observation)
	// Decide changes what it decided.
	Decide func(View, cb.Observation, cb.State, []cb.Action) (cb.State, []cb.Action)
	// Material changes the answer to who asks for join material.
	Material func(cb.Observation, fleet.NodeID, cb.Role, bool) bool
	// Edge switches on a fault inside the simulated edge.
	Edge string
}

type decider = func(View, cb.Observation, cb.State, []cb.Action) (cb.State, []cb.Action)

// without drops actions of one kind.
func without(kind cb.ActionKind) decider {
	return func(_ View, _ cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
		kept := slices.DeleteFunc(slices.Clone(acts), func(a cb.Action) bool { return a.Kind == kind })
		if len(kept) == 0 {
			kept = []cb.Action{{Kind: cb.Wait, Reason: "planted: " + kind.String() + " left out"}}
		}
		return s, kept
	}
}

// instead replaces a wait for one blocker in one state.
func instead(state cb.State, b cb.Blocker, do func(View, cb.Observation) []cb.Action) decider {
	return func(v View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
		if last := acts[len(acts)-1]; s == state && last.Blocker == b && last.Kind == cb.Wait {
			if x := do(v, o); x != nil {
				return s, x
			}
		}
		return s, acts
	}
}

// records changes the newest record of the node's own cluster.
func records(change func(o *cb.Observation, own cb.Record, r *cb.Record)) func(View, *cb.Observation) {
	return func(_ View, o *cb.Observation) {
		if o.Disk.Record == nil {
			return
		}
		rs := slices.Clone(o.Docs.Records)
		for i := range rs {
			if rs[i].UID == o.Disk.Record.UID {
				change(o, *o.Disk.Record, &rs[i])
			}
		}
		o.Docs.Records = rs
	}
}

func mutatePlan(l *cb.Ledger, f func(*cb.PlanDoc)) *cb.Ledger {
	n, p := *l, *l.Plan
	f(&p)
	n.Plan = &p
	return &n
}

// Bugs are all planted bugs.
var Bugs = []Bug{
	{Name: "founds without waiting for acknowledgements", Kind: "founding", Seed: 189,
		Decide: instead(cb.Claiming, cb.AckMissing, func(_ View, o cb.Observation) []cb.Action {
			return []cb.Action{{Kind: cb.FoundCluster, Reason: "planted", Intent: &cb.Intent{UID: o.Fresh, Boot: o.Boot, Mode: fleet.FoundFirst}}}
		})},
	{Name: "claims without a survey", Kind: "founding",
		Observe: func(_ View, o *cb.Observation) {
			if o.Survey != nil {
				o.Survey = &cb.Survey{Since: o.Mono - 61*time.Second, Round: o.Survey.Round}
			}
		}},
	{Name: "tie-break by arrival: never yields to a better claim", Kind: "founding", Seed: 133,
		Decide: without(cb.WithdrawClaim)},
	{Name: "acknowledges a second claim", Kind: "founding", Seed: 38,
		Decide: instead(cb.Surveying, cb.AckGiven, func(_ View, o cb.Observation) []cb.Action {
			for _, p := range o.Peers {
				if c := p.Status.Claim; c != nil && p.Age < 10*time.Second && *c != *o.Disk.Ack {
					return []cb.Action{{Kind: cb.AckClaim, Claim: c, Reason: "planted"}}
				}
			}
			return nil
		})},
	{Name: "forgets its acknowledgement in a restart", Kind: "founding", Seed: 7206,
		Observe: func(v View, o *cb.Observation) {
			if o.Disk.Ack != nil && v.Boots > 1 {
				o.Disk.Ack = nil
			}
		}},
	{Name: "writes are not flushed", Kind: "promotion", Seed: 2, Edge: "lost-fsync"},
	{Name: "founds in spite of a sign of membership", Kind: "founding", Seed: 23,
		Observe: func(_ View, o *cb.Observation) {
			if o.Disk.Role == cb.RoleNone && o.Disk.Intent == nil {
				o.Disk.Mark, o.Disk.AgentCert = "", false
				o.Docs.Records = nil
			}
		}},
	{Name: "the centre grants founding to everybody", Kind: "founding", Seed: 1, Edge: "centre-grants-all"},
	{Name: "the centre forgets its grant in a restore", Kind: "founding", Seed: 596, Edge: "centre-forgets"},
	{Name: "a removal loses to an admission", Kind: "", Seed: 1,
		Observe: func(_ View, o *cb.Observation) { o.Docs.Removals = nil }},
	{Name: "a first server that lost its keys is waited for without end", Kind: "founding", Seed: 44,
		Decide: func(_ View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if s == cb.Founding && o.K3s.Damaged == "" && o.K3s.Process != cb.ProcessNone && acts[len(acts)-1].Kind == cb.AbandonFounding {
				return s, []cb.Action{{Kind: cb.Wait, Reason: "planted: it may come up yet"}}
			}
			return s, acts
		}},
	{Name: "a worker waits for a cluster in place of which a person had another founded", Kind: "orders", Seed: 17,
		Decide: func(_ View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if s == cb.Leaving && o.Disk.Role == cb.RoleWorker && strings.Contains(acts[0].Reason, "founded in its place") {
				return cb.Waiting, []cb.Action{{Kind: cb.Wait, Blocker: cb.ServersLost, Reason: "planted: it waits on"}}
			}
			return s, acts
		}},
	{Name: "a worker tries a token that has ended for ever", Kind: "", Seed: 1070,
		Decide: func(_ View, _ cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if s == cb.Joining && acts[0].Kind == cb.StopK3s && strings.Contains(acts[0].Reason, "token") {
				return s, []cb.Action{{Kind: cb.Wait, Reason: "planted: the token that ended is kept"}}
			}
			return s, acts
		}},
	{Name: "the server token goes to any worker that asks", Kind: "promotion",
		Decide: instead(cb.Worker, cb.NoBlocker, func(_ View, o cb.Observation) []cb.Action {
			for _, p := range o.Peers {
				if p.Status.API {
					return []cb.Action{{Kind: cb.RequestJoinMaterial, From: p.Status.Node, As: cb.RoleServer, Plan: "x", Reason: "planted"}}
				}
			}
			return nil
		}),
		Material: func(o cb.Observation, _ fleet.NodeID, as cb.Role, ok bool) bool {
			return ok || as == cb.RoleServer && o.K3s.Ledger != nil
		}},
	{Name: "promotes with two ready nodes", Kind: "promotion",
		Observe: func(_ View, o *cb.Observation) {
			if o.Docs.Charter != nil {
				c := *o.Docs.Charter
				c.Policy.Servers, c.Policy.PromoteAt = 2, 2
				o.Docs.Charter = &c
			}
		}},
	{Name: "promotes nodes that may not serve", Kind: "promotion", Seed: 3,
		Observe: func(_ View, o *cb.Observation) {
			o.Docs.Admissions = slices.Clone(o.Docs.Admissions)
			for i := range o.Docs.Admissions {
				o.Docs.Admissions[i].MayServe = true
			}
		}},
	{Name: "compare-and-set is a set", Kind: "", Seed: 1, Edge: "cas-ignored"},
	{Name: "starts the new role before the old process is gone", Kind: "promotion", Edge: "no-wait-for-exit",
		Observe: func(_ View, o *cb.Observation) {
			if o.K3s.Stopping {
				o.K3s.Process = cb.ProcessNone
			}
		}},
	{Name: "the fence lease is not honoured", Kind: "promotion", Seed: 7, Edge: "lease-not-honoured",
		Decide: func(_ View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if o.Disk.Role == cb.RoleCandidate && o.K3s.Process == cb.ProcessServer {
				return without(cb.StopK3s)(View{}, o, s, acts)
			}
			return s, acts
		}},
	{Name: "the leader gives leases although it resets", Kind: "promotion", Seed: 2, Edge: "lease-after-reset"},
	{Name: "the leader resets without waiting for leases to end", Kind: "promotion", Seed: 7,
		Observe: func(_ View, o *cb.Observation) { o.LastGrant = -time.Hour }},
	{Name: "the leader trusts its memory of leases across a restart", Kind: "promotion", Seed: 3150,
		Observe: func(_ View, o *cb.Observation) {
			if o.LastGrant == 0 {
				o.LastGrant = -time.Hour
			}
		}},
	{Name: "the leader may still reset after it confirmed", Kind: "promotion", Seed: 4,
		Decide: func(v View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			acts = slices.Clone(acts)
			for i, a := range acts {
				if a.Kind == cb.LeadPlan && a.Lead != nil && a.Lead.Phase == cb.LeadConfirming {
					d := *a.Lead
					d.Phase = cb.LeadOpen
					acts[i].Lead = &d
				}
			}
			if l := o.Disk.Lead; len(acts) == 1 && acts[0].Kind == cb.LeadPlan && acts[0].Lead == nil && l != nil {
				return s, []cb.Action{{Kind: cb.Wait, Reason: "planted"}}
			}
			return s, acts
		}},
	{Name: "the window never fails", Kind: "promotion", Seed: 7,
		Decide: func(v View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if acts[len(acts)-1].Kind == cb.BeginReset {
				s = cb.Leading
			}
			return without(cb.BeginReset)(v, o, s, acts)
		}},
	{Name: "the epoch is not raised by a reset", Kind: "promotion", Seed: 7,
		Decide: func(_ View, _ cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			acts = slices.Clone(acts)
			for i, a := range acts {
				if a.Kind == cb.RaiseEpoch {
					r := *a.Record
					r.Epoch--
					acts[i].Record = &r
				}
			}
			return s, acts
		}},
	{Name: "a stale epoch is accepted", Kind: "return", Seed: 6,
		Observe: records(func(o *cb.Observation, own cb.Record, r *cb.Record) {
			if r.Epoch > own.Epoch && o.Disk.Role != cb.RoleWorker {
				*r = own
			}
		})},
	{Name: "a replaced server starts on its old data", Kind: "return", Seed: 1,
		Observe: records(func(o *cb.Observation, own cb.Record, r *cb.Record) {
			if r.Epoch == own.Epoch && o.Disk.Role == cb.RoleServer {
				*r = own
			}
			o.Disk.Tombstone = false
		})},
	{Name: "a dead server is replaced but not removed", Kind: "promotion", Decide: without(cb.RemoveDeadServer)},
	{Name: "confirms before all have a vote", Kind: "promotion",
		Decide: instead(cb.Leading, cb.PeerMissing, func(_ View, o cb.Observation) []cb.Action {
			l := o.K3s.Ledger
			if l == nil || l.Plan == nil || l.Plan.Phase != cb.PlanSwitch {
				return nil
			}
			n := mutatePlan(l, func(p *cb.PlanDoc) { p.Phase = cb.PlanDone })
			n.Record.Servers = slices.Concat(l.Record.Servers, l.Plan.Candidates)
			n.Record.Version++
			return []cb.Action{{Kind: cb.WriteLedger, Ledger: n, Reason: "planted"}}
		})},
	{Name: "a candidate never gives up", Kind: "promotion", Seed: 2,
		Decide: func(v View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if o.Disk.Role == cb.RoleCandidate {
				return without(cb.MoveAside)(v, o, s, acts)
			}
			return s, acts
		}},
	{Name: "two clusters do not fence each other", Kind: "", Seed: 26,
		Observe: func(_ View, o *cb.Observation) {
			if l := o.K3s.Ledger; l != nil {
				o.Peers = slices.DeleteFunc(slices.Clone(o.Peers), func(p cb.Peer) bool {
					return p.Status.Record != nil && p.Status.Record.UID != l.Record.UID
				})
			}
		}},
	{Name: "a cluster with data dissolves itself", Kind: "", Seed: 385, Edge: "dissolves-with-data",
		Observe: func(_ View, o *cb.Observation) { o.K3s.Virgin = true }},
	{Name: "new addresses are not passed on", Kind: "", Seed: 1, Decide: without(cb.UpdateAddresses)},
	{Name: "a stuck learner is never taken out", Kind: "promotion", Seed: 4,
		Observe: func(_ View, o *cb.Observation) {
			o.K3s.Members = slices.Clone(o.K3s.Members)
			for i := range o.K3s.Members {
				o.K3s.Members[i].For = 0
			}
		}},
	{Name: "a slow start is taken for damage", Kind: "promotion", Seed: 1,
		Observe: func(_ View, o *cb.Observation) {
			if o.K3s.Process == cb.ProcessServer && !o.K3s.API && o.K3s.Running > 20*time.Second {
				o.K3s.Damaged = "planted"
			}
		}},
	{Name: "a cluster is given up without a snapshot", Kind: "orders", Seed: 15,
		Observe: func(_ View, o *cb.Observation) {
			if m := o.Mandate; m != nil && m.Kind == cb.MandateDissolve {
				o.K3s.Snapshot = m.ID
			}
		}},
	{Name: "an order that has ended is carried out", Kind: "orders", Seed: 51,
		Observe: func(_ View, o *cb.Observation) {
			if o.Mandate != nil {
				m := *o.Mandate
				m.NotAfter = m.NotAfter.Add(1000 * time.Hour)
				o.Mandate = &m
			}
		}},
	{Name: "an order to found is used again", Kind: "orders", Seed: 3,
		Observe: func(_ View, o *cb.Observation) {
			if m := o.Mandate; m != nil && m.Kind == cb.MandateFound && o.Disk.Role == cb.RoleNone && o.Disk.Intent == nil {
				o.Disk.Mark, o.Docs.Records = "", nil
			}
		}},
	{Name: "the second of two servers leaves the list before etcd", Kind: "orders", Seed: 107,
		Decide: func(_ View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			a := acts[len(acts)-1]
			if l := o.K3s.Ledger; a.Kind == cb.RemoveDeadServer && l != nil && l.Record.Has(a.Node) {
				n := *l
				n.Record.Servers = []fleet.NodeID{o.Self}
				n.Record.Version++
				return s, []cb.Action{{Kind: cb.WriteLedger, Ledger: &n, Reason: "planted"}}
			}
			return s, acts
		}},
	{Name: "a removed server of two stops at once", Kind: "orders", Seed: 96,
		Observe: func(_ View, o *cb.Observation) {
			if _, ok := o.Docs.Admitted(o.Self); !ok {
				o.K3s.API = false
			}
		}},
	{Name: "joins a cluster of an older k3s", Kind: "", Seed: 6,
		Observe: func(_ View, o *cb.Observation) {
			if o.Disk.Role == cb.RoleNone {
				o.K3s.Version = ""
			}
		}},
	{Name: "promotes whatever k3s and disk a node has", Kind: "promotion", Seed: 6,
		Observe: func(_ View, o *cb.Observation) {
			o.Peers = slices.Clone(o.Peers)
			for i := range o.Peers {
				s := *o.Peers[i].Status
				s.Version, s.Args, s.Fsync = "", "", 0
				o.Peers[i].Status = &s
			}
		}},
	{Name: "votes are taken away before the fence of a called-off plan", Kind: "promotion", Seed: 4,
		Decide: func(_ View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if l := o.K3s.Ledger; l != nil && l.Plan != nil && l.Plan.Off && l.Plan.Active() && l.Plan.Leader == o.Self && s == cb.Leading && acts[0].Kind != cb.LeadPlan {
				return s, []cb.Action{{Kind: cb.LeadPlan, Reason: "planted"}, {Kind: cb.WriteLedger, Reason: "planted",
					Ledger: mutatePlan(l, func(p *cb.PlanDoc) { p.Phase = cb.PlanAborted; p.Failures++ })}}
			}
			return s, acts
		}},
	{Name: "an order goes off when a server merely restarts", Kind: "orders", Seed: 2,
		Observe: func(_ View, o *cb.Observation) {
			if m := o.Mandate; m != nil && m.Kind == cb.MandateRestore && o.Survey == nil {
				const long = time.Hour
				o.Mono += long
				o.LastGrant += long
				o.Lease.Until += long
				o.Peers = slices.Clone(o.Peers)
				for i := range o.Peers {
					o.Peers[i].Served = -1
				}
			}
		}},
	{Name: "no snapshot, no confirmation", Kind: "promotion", Seed: 36,
		Decide: func(_ View, o cb.Observation, s cb.State, acts []cb.Action) (cb.State, []cb.Action) {
			if a := acts[len(acts)-1]; a.Kind == cb.WriteLedger && a.Ledger.Plan != nil && a.Ledger.Plan.Phase == cb.PlanDone && o.K3s.Snapshot != a.Ledger.Plan.ID {
				return s, []cb.Action{{Kind: cb.TakeSnapshot, Plan: a.Ledger.Plan.ID, Reason: "planted"}}
			}
			return s, acts
		}},
	{Name: "a wait without a reason", Kind: "", Seed: 1,
		Decide: instead(cb.Waiting, cb.ServerAway, func(View, cb.Observation) []cb.Action {
			return []cb.Action{{Kind: cb.Wait, Blocker: cb.ServerAway}}
		})},
}
