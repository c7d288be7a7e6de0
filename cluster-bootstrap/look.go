package clusterbootstrap

import (
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// peer returns what is known of id, or nil.
func (v *view) peer(id fleet.NodeID) *Peer {
	for i := range v.Peers {
		if v.Peers[i].Status.Node == id {
			return &v.Peers[i]
		}
	}
	return nil
}

// heard reports whether id was heard lately.
func (v *view) heard(id fleet.NodeID) bool {
	p := v.peer(id)
	return p != nil && p.Age <= v.pol.PeerFresh
}

// name is how people call a node.
func (v *view) name(id fleet.NodeID) string {
	if p := v.peer(id); p != nil && p.Words != "" {
		return p.Words
	}
	if id == v.Self && v.Words != "" {
		return v.Words
	}
	return string(id)
}

func (v *view) names(ids []fleet.NodeID) string {
	var b strings.Builder
	for i, id := range ids {
		if i > 0 {
			b.WriteString(" and ")
		}
		b.WriteString(v.name(id))
	}
	return b.String()
}

func (v *view) nodeReady(id fleet.NodeID) bool {
	for _, n := range v.K3s.Nodes {
		if n.Node == id {
			return n.Ready
		}
	}
	return false
}

func (v *view) newer(rec *Record) bool {
	n, ok := v.Docs.Newest(rec.UID)
	return ok && n.Newer(*rec)
}

// serves reports whether p is a server that can take nodes in, with a record
// that nothing newer replaced.
func (v *view) serves(p *Peer) bool {
	s := p.Status
	if p.Age > v.pol.PeerFresh || !s.API || s.Role != RoleServer || s.Record == nil || s.Record.Into != "" || s.Reset {
		return false
	}
	n, ok := v.Docs.Newest(s.Record.UID)
	return !ok || n.Epoch <= s.Record.Epoch && n.Into == ""
}

// serverOf returns a server of cluster uid.
func (v *view) serverOf(uid string) *Peer {
	for i := range v.Peers {
		if p := &v.Peers[i]; v.serves(p) && p.Status.Record.UID == uid {
			return p
		}
	}
	return nil
}

// bestCluster returns a server of the cluster that an outsider should join.
func (v *view) bestCluster() *Peer {
	var best *Peer
	for i := range v.Peers {
		p := &v.Peers[i]
		if !v.serves(p) || p.Status.Fenced {
			continue
		}
		if best == nil || p.Status.Record.UID != best.Status.Record.UID && betterCluster(p.Status, best.Status) {
			best = p
		}
	}
	return best
}

// plan returns the newest view of the plan: from the API, else what peers of
// this cluster pass on.
func (v *view) plan(rec *Record) *PlanDoc {
	var p *PlanDoc
	if v.K3s.API && v.K3s.Ledger != nil {
		return v.K3s.Ledger.Plan
	}
	for i := range v.Peers {
		s := v.Peers[i].Status
		if q := s.Plan; q != nil && s.Record != nil && s.Record.UID == rec.UID && (p == nil || planNewer(q, p)) {
			p = q
		}
	}
	return p
}

func planNewer(a, b *PlanDoc) bool {
	switch {
	case a.Epoch != b.Epoch:
		return a.Epoch > b.Epoch
	case a.N != b.N:
		return a.N > b.N
	case a.Phase != b.Phase:
		return a.Phase > b.Phase
	case a.Go != b.Go:
		return a.Go > b.Go
	}
	return a.Off && !b.Off
}
