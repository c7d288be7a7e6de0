package clusterbootstrap

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// What a node's own k3s, disk and version allow.

// isDamaged: k3s said so, and has had the time to show otherwise: the words may
// be of a run before the data was replaced.
func (v *view) isDamaged() bool {
	return v.K3s.Damaged != "" && (v.K3s.Process != ProcessServer || v.K3s.Running >= v.pol.QuorumGrace)
}

// damaged is a server whose datastore cannot be used.
func (v *view) damaged(rec *Record) (State, []Action) {
	what := "My datastore is damaged (" + v.K3s.Damaged + ")."
	if len(rec.Servers) > 1 && v.serverOf(rec.UID) != nil {
		return v.aside(RoleWorker, rec, what+" The other servers go on, and I come back as a worker.")
	}
	return v.wait(Waiting, DataDamaged, what+" A snapshot must be restored by an order.")
}

// differ compares two texts of which either may be unknown.
func differ(a, b string) bool { return a != "" && b != "" && a != b }

// minor returns the minor number of a k3s version such as v1.36.3+k3s1; -1 if
// it cannot be told.
func minor(version string) int {
	f := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(f) < 2 || f[0] != "1" {
		return -1
	}
	n, err := strconv.Atoi(f[1])
	if err != nil {
		return -1
	}
	return n
}

// maxSkew is how many minor versions a kubelet may be older than its
// apiserver (Kubernetes' version skew policy); newer it may never be.
const maxSkew = 3

// skew says why a worker of version mine cannot join a server of version
// theirs; "" if it can, or if one of them is unknown.
func skew(mine, theirs string) string {
	switch a, b := minor(mine), minor(theirs); {
	case a < 0 || b < 0:
	case a > b:
		return fmt.Sprintf("my k3s %s is newer than the cluster's %s", mine, theirs)
	case b-a > maxSkew:
		return fmt.Sprintf("my k3s %s is too old for the cluster's %s", mine, theirs)
	}
	return ""
}

// eligible are the workers that may become servers, lowest ID first. If a
// ready node is not among them for a reason that will not pass, hindered says
// which.
func (v *view) eligible(l *Ledger, not fleet.NodeID) (out []fleet.NodeID, hindered Action) {
	soak := time.Duration(v.Docs.Charter.Policy.PromoteAfter) * time.Second
	hindered = Action{Kind: Wait, Blocker: NoCandidate}
	for _, n := range v.K3s.Nodes {
		if !n.Ready || n.For < soak || n.Node == not || n.Node == v.Self || l.Record.Has(n.Node) {
			continue
		}
		p := v.peer(n.Node)
		if p == nil || p.Age > v.pol.PeerFresh || p.Status.Role != RoleWorker ||
			p.Status.Record == nil || p.Status.Record.UID != l.Record.UID || p.Status.Record.Epoch != l.Record.Epoch {
			continue
		}
		if a, ok := v.Docs.Admitted(n.Node); !ok || !a.MayServe {
			continue
		}
		switch s := p.Status; {
		case differ(s.Version, v.K3s.Version):
			hindered.Blocker = VersionSkew
			hindered.Reason = fmt.Sprintf("%s runs k3s %s and I run %s. Servers need the same version.", v.name(n.Node), s.Version, v.K3s.Version)
		case differ(s.Args, v.K3s.Args):
			hindered.Blocker = ArgsDiffer
			hindered.Reason = v.name(n.Node) + " would run k3s with other settings than mine. Servers need the same."
		case s.Fsync > v.pol.FsyncLimit:
			hindered.Blocker = SlowDisk
			hindered.Reason = fmt.Sprintf("The disk of %s takes %s to write safely; a server's may take %s.", v.name(n.Node), s.Fsync.Round(time.Millisecond), v.pol.FsyncLimit)
		default:
			out = append(out, n.Node)
		}
	}
	slices.Sort(out)
	return out, hindered
}

// hopeful returns a node that may become the missing server soon, or "".
func (v *view) hopeful(l *Ledger) fleet.NodeID {
	for i := range v.Peers {
		p := &v.Peers[i]
		id := p.Status.Node
		if a, ok := v.Docs.Admitted(id); ok && a.MayServe && p.Age <= v.pol.Survey && !l.Record.Has(id) {
			return id
		}
	}
	return ""
}

// stepDown takes the second of two servers back to a worker when no third one
// is in sight: two votes are worse than one, since either machine stops the
// API. The etcd member goes first, while both live; then the list.
func (v *view) stepDown(l *Ledger) (State, []Action) {
	if len(l.Record.Servers) != 2 || l.Plan.Active() || v.K3s.LedgerFor < v.pol.StepDown || v.Mono < v.pol.StepDown || v.hopeful(l) != "" {
		return 0, nil
	}
	for _, s := range l.Record.Servers {
		p := v.peer(s)
		if s == v.Self || p == nil || p.Age > v.pol.PeerFresh || !p.Status.API || p.Status.Role != RoleServer {
			continue
		}
		return Leading, []Action{{Kind: RemoveDeadServer, Node: s, KeepNode: true,
			Reason: "No third server is in sight, and two are worse than one: " + v.name(s) + " becomes a worker again."}}
	}
	return 0, nil
}
