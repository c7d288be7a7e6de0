package sim

import (
	"fmt"
	"slices"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
)

// sign gives a node an order that nobody asked for.
func (w *world) sign(what string, n *node) {
	if n.id == "" {
		return
	}
	switch what {
	case "found":
		w.give(n, cb.Mandate{Kind: cb.MandateFound}, 48*time.Hour)
	case "stale":
		w.give(n, cb.Mandate{Kind: cb.MandateFound}, -3*time.Hour)
	case "restore": // of the node's own cluster
		if r := n.disk.Record; r != nil && w.escrow[r.UID] != nil {
			w.give(n, cb.Mandate{Kind: cb.MandateRestore, UID: r.UID, Epoch: w.epochs[r.UID] + 100, Snapshot: "newest"}, 48*time.Hour)
		}
	case "dissolve":
		g := n.data
		if g == nil || g.uid == "" || w.given[cb.MandateDissolve] > 0 {
			return
		}
		for _, h := range w.groups {
			if h.uid != "" && h.uid != g.uid {
				w.give(n, cb.Mandate{Kind: cb.MandateDissolve, UID: g.uid, Into: h.uid}, 48*time.Hour)
				return
			}
		}
	default:
		w.violate("script: no order %q", what)
	}
}

func (w *world) give(n *node, m cb.Mandate, valid time.Duration) {
	w.orders++
	w.given[m.Kind]++
	m.ID = fmt.Sprintf("order-%d", w.orders)
	m.NotAfter = wall.Add(w.now + valid)
	n.mandate = &m
	w.tracef("person: signs order %d for %s: %s", w.orders, n.name, orderText(m))
	n.wake(0)
}

func orderText(m cb.Mandate) string {
	switch m.Kind {
	case cb.MandateFound:
		return "start a cluster"
	case cb.MandateReset:
		return fmt.Sprintf("go on from your own data of %s in epoch %d", m.UID, m.Epoch)
	case cb.MandateRestore:
		return fmt.Sprintf("restore the snapshot of %s in epoch %d", m.UID, m.Epoch)
	}
	return fmt.Sprintf("give %s up for %s", m.UID, m.Into)
}

// act is the person: does what n's blocker asks for. False: nothing more that
// a person would do.
func (w *world) act(b cb.Blocker, n *node) bool {
	w.acted = w.now
	if w.orders > 12 {
		return false
	}
	switch b {
	case cb.CentreUnsure:
		w.centre.unsure = false
		w.confirmed = true
		w.tracef("person: confirms at the centre")
		return true
	case cb.VersionSkew, cb.ArgsDiffer, cb.SlowDisk:
		w.tracef("person: makes all nodes alike")
		for _, m := range w.nodes {
			m.version, m.args, m.fsync = version, args, fsync
		}
		return true
	case cb.OrderVoid:
		w.tracef("person: withdraws the order for %s", n.name)
		w.given[n.mandate.Kind]--
		n.mandate = nil
		n.wake(0)
		return true
	case cb.FounderAway:
		return w.orderFound()
	case cb.TwoClusters:
		for i, m := range w.nodes {
			if w.api(i) && m.data.ledger != nil && m.data.uid != n.data.uid {
				w.give(n, cb.Mandate{Kind: cb.MandateDissolve, UID: n.data.uid, Into: m.data.uid}, 48*time.Hour)
				return true
			}
		}
		return false
	case cb.QuorumLost, cb.LeaderAway, cb.ServersLost, cb.DataLost, cb.DataDamaged:
		return w.orderRecovery(n)
	}
	return false
}

// orderRecovery brings n's cluster back: from data that is left, from a
// snapshot, or as a new one; once there is another cluster, n gives its own up.
func (w *world) orderRecovery(n *node) bool {
	uid := ""
	if n.disk.Record != nil {
		uid = n.disk.Record.UID
	}
	for i := range n.records {
		if r := &n.records[i]; uid == "" && r.Into == "" {
			uid = r.UID
		}
	}
	for i, m := range w.nodes {
		if uid != "" && w.api(i) && m.data.ledger != nil && m.data.uid != uid {
			w.give(n, cb.Mandate{Kind: cb.MandateDissolve, UID: uid, Into: m.data.uid}, 48*time.Hour)
			return true
		}
	}
	usable := func(m *node) bool { return m.up && !w.removed(m) && !slices.Contains(w.sc.MayNot, m.i) }
	epoch := w.epochs[uid] + 100
	if uid != "" && w.given[cb.MandateReset] == 0 {
		for _, m := range w.nodes {
			if usable(m) && m.data != nil && !m.damaged && m.data.uid == uid && m.disk.Datastore && m.disk.Record != nil && m.disk.Role != cb.RoleWorker {
				w.give(m, cb.Mandate{Kind: cb.MandateReset, UID: uid, Epoch: epoch}, 48*time.Hour)
				return true
			}
		}
	}
	if w.escrow[uid] != nil && w.given[cb.MandateRestore] == 0 {
		for _, m := range append([]*node{n}, w.nodes...) {
			if usable(m) && (m.disk.Record == nil || m.disk.Record.UID == uid) {
				w.give(m, cb.Mandate{Kind: cb.MandateRestore, UID: uid, Epoch: epoch, Snapshot: "newest"}, 48*time.Hour)
				return true
			}
		}
	}
	return w.orderFound()
}

func (w *world) orderFound() bool {
	for _, m := range w.nodes {
		if m.up && !w.removed(m) && !slices.Contains(w.sc.MayNot, m.i) && (m.disk.Role != cb.RoleServer || m.data == nil) && m.disk.Role != cb.RoleCandidate {
			w.give(m, cb.Mandate{Kind: cb.MandateFound}, 48*time.Hour)
			w.confirmed = true
			return true
		}
	}
	return false
}
