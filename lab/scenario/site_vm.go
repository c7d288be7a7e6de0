package scenario

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
)

// runVMSite: empty machines get power at once and become one site with as many
// servers as it should have; it goes on without one of them, and takes it
// back. Everything is seen as an operator sees it: at the centre.
func runVMSite(ctx context.Context, l *lab.Lab) error {
	e, err := openEstate(ctx, l, estateOptions{site: []string{"--replace-after", "24h"}})
	if err != nil {
		return err
	}
	err = e.c.alive(ctx, func(ctx context.Context) error {
		began := time.Now()
		if err := e.install(ctx); err != nil {
			return err
		}
		want := serversOf(len(e.pcs))
		err := e.serving(ctx, "site", func(s siteView) error { return s.servers(want) })
		if err := l.Check(fmt.Sprintf("the centre sees one cluster of %d nodes, all ready, with %d servers that are voters", len(e.pcs), want), err); err != nil {
			return err
		}
		if want == 3 {
			l.Timing("", "power_on_to_three_voters_s", time.Since(began))
		}
		err = e.each(ctx, func(ctx context.Context, p *pc) error {
			return errors.Join(e.runs(ctx, p, firstVersion, fleet.SystemCurrent), p.untouched())
		})
		if err := l.Check("every machine runs what it shall; the disks that nobody named are as they were", err); err != nil {
			return err
		}
		if want == 3 {
			if err := e.loseOne(ctx); err != nil {
				return err
			}
		}
		return e.lastLook(ctx)
	})
	e.report()
	if err != nil || l.Spec.Keep {
		return err
	}
	return e.last(ctx)
}

// loseOne is the twin of "three servers": without one of them the site goes on,
// and takes it back.
func (e *estate) loseOne(ctx context.Context) error {
	v, err := e.site(ctx)
	if err != nil {
		return err
	}
	var lost *pc
	for _, p := range e.pcs {
		if p.node == v.Status.Founder {
			lost = p
		}
	}
	if lost == nil {
		return e.l.Check("the centre knows who founded the cluster", fmt.Errorf("the founder is %q", v.Status.Founder))
	}
	if err := e.cut(lost); err != nil {
		return err
	}
	off := time.Now()
	err = e.serving(ctx, "without "+lost.Name(), func(s siteView) error { return s.without(lost.node, off) })
	if err := e.l.Check("with the first server gone the others say that the cluster's API goes on without it", err); err != nil {
		return err
	}
	if err := e.on(ctx, lost); err != nil {
		return err
	}
	if err := e.l.Check("it comes back from its disk", e.up(ctx, lost, firmware.SlotA)); err != nil {
		return err
	}
	back := time.Now()
	err = e.serving(ctx, "back", func(s siteView) error {
		for _, n := range s.Nodes {
			if n.Report == nil || n.ID == lost.node && !n.Report.At.After(back) {
				return fmt.Errorf("%s has not reported yet", n.Words)
			}
		}
		return s.servers(3)
	})
	return e.l.Check("and the site is whole again", err)
}

// without returns nil if all nodes but one have said since that they are
// servers of one cluster that answers, and that the one is not ready.
func (s siteView) without(lost fleet.NodeID, since time.Time) error {
	for _, n := range s.Nodes {
		switch r := n.Report; {
		case n.ID == lost:
		case r == nil || !r.At.After(since):
			return fmt.Errorf("%s has not reported since", n.Words)
		case r.Role != "server" || r.Voters != len(s.Nodes) || r.NodesReady != len(s.Nodes)-1:
			return fmt.Errorf("%s is %s, sees %d voters and %d of %d nodes ready: %s", n.Words, r.Role, r.Voters, r.NodesReady, len(s.Nodes), r.Reason)
		}
	}
	return nil
}

// report puts what is at the end into the result, whether it held or not.
func (e *estate) report() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	v, err := e.site(ctx)
	if err != nil {
		return
	}
	uids := map[string]bool{}
	e.l.Site(func(r *lab.SiteResult) {
		r.Servers, r.Voters = 0, 0
		for _, n := range v.Nodes {
			if n.Report == nil {
				continue
			}
			if n.Report.Role == "server" {
				r.Servers++
			}
			r.Voters = max(r.Voters, n.Report.Voters)
			if n.Report.UID != "" {
				uids[n.Report.UID] = true
			}
		}
		r.Clusters = len(uids)
	})
}
