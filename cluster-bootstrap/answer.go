package clusterbootstrap

import (
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// MaxQuoteAge is how old the quote may be that comes with a request for join
// material.
const MaxQuoteAge = 60 * time.Second

// AnswerMaterial says whether a server gives from what it asks for, and if
// not, why. quoteAge is the age of a quote that satisfied the charter.
func AnswerMaterial(obs Observation, pol Policy, from fleet.NodeID, as Role, plan string, quoteAge time.Duration) (bool, string) {
	v := view{Observation: obs, pol: pol.WithDefaults()}
	adm, ok := obs.Docs.Admitted(from)
	l := obs.K3s.Ledger
	switch {
	case !ok:
		return false, "not admitted to this site"
	case obs.Docs.removed(obs.Self):
		return false, "removed from this site"
	case quoteAge < 0 || quoteAge > MaxQuoteAge:
		return false, "no fresh proof of what the node runs"
	case obs.Disk.Role != RoleServer || obs.Disk.Reset != nil || !obs.K3s.API || l == nil || obs.Disk.Record == nil:
		return false, "no server that is up"
	case l.Record.Epoch != obs.Disk.Record.Epoch || l.Record.Into != "":
		return false, "the cluster is being reset or dissolved"
	}
	switch as {
	case RoleWorker:
		if r := v.rival(l); r != nil && !betterCluster(&Status{Virgin: obs.K3s.Virgin, Record: &l.Record}, r) {
			return false, "this site has two clusters; this one does not grow"
		}
		return true, ""
	case RoleServer:
		p := l.Plan
		if !p.Active() || p.ID != plan || p.Epoch != l.Record.Epoch || !slices.Contains(p.Candidates, from) || !adm.MayServe {
			return false, "no plan makes this node a server"
		}
		return true, ""
	}
	return false, "no such role"
}

// AnswerLease says whether the leader of plan lets from run as a server for
// another Policy.Lease. It asks the disk, not etcd, which cannot be read when
// it matters most. The caller notes the time in LastGrant before it answers.
func AnswerLease(obs Observation, pol Policy, from fleet.NodeID, plan string) (time.Duration, string) {
	d := obs.Disk.Lead
	switch {
	case obs.Disk.Reset != nil:
		return 0, "the plan has failed"
	case d == nil || d.Plan != plan || obs.Disk.Record == nil || d.Epoch != obs.Disk.Record.Epoch:
		return 0, "no such plan is open"
	case !slices.Contains(d.Candidates, from):
		return 0, "the plan does not name this node"
	}
	if l := obs.K3s.Ledger; l != nil && l.Plan != nil && l.Plan.ID == plan && l.Plan.Phase == PlanAborted {
		return 0, "the plan was called off"
	}
	if _, ok := obs.Docs.Admitted(from); !ok || obs.Docs.removed(obs.Self) {
		return 0, "not admitted to this site"
	}
	return pol.WithDefaults().Lease, ""
}
