package sim

import (
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// centre grants the founding right, once.
type centre struct {
	up      bool
	granted fleet.NodeID
	unsure  bool
}

func (n *node) centreLoop() {
	// The centre's view is only asked for through AskGrant; this loop lets the
	// node report, which makes a restored centre sure again.
	w := n.w
	if w.centre.up && w.centre.unsure && n.disk.Record != nil {
		w.centre.unsure = false
		w.centre.granted = n.disk.Record.Founder
		w.tracef("centre: the site reports its cluster")
	}
	n.later(w.between(10*time.Second, 20*time.Second), n.centreLoop)
}

func (n *node) askCentre() {
	w := n.w
	if !n.due(cb.AskGrant, 4*time.Second) {
		return
	}
	if !w.centre.up {
		n.centre.Reachable = false
		return
	}
	n.later(w.between(10*time.Millisecond, 2*time.Second), func() {
		if !w.centre.up {
			n.centre.Reachable = false
			return
		}
		c := &w.centre
		adm, _ := n.documents().Admitted(n.id)
		if c.granted == "" && (!c.unsure || w.bug("centre-forgets")) && adm.MayServe || w.bug("centre-grants-all") && adm.MayServe {
			c.granted = n.id
			w.tracef("centre: %s may found", n.name)
		}
		if !w.quiet && w.chance(w.sc.LostReply) {
			return
		}
		n.later(w.between(10*time.Millisecond, 500*time.Millisecond), func() {
			n.centre = cb.Centre{Reachable: true, Granted: c.granted, Unsure: c.unsure}
			n.wake(10 * time.Millisecond)
		})
	})
}
