package central

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint"
)

// AskFounding implements the node service: one compare-and-set per site. The
// right is on disk before anybody hears of it.
func (s nodeService) AskFounding(ctx context.Context, q *musterv1.AskFoundingRequest) (*musterv1.AskFoundingResponse, error) {
	c, e, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := fleet.ValidateClusterUID(q.Uid); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if e.site == "" || q.Site != e.site {
		return &musterv1.AskFoundingResponse{Reason: "The centre knows you as a node of " + placeOf(e.site) + "."}, nil
	}
	var out *musterv1.AskFoundingResponse
	// Most ask again and again while another one founds: these cost no write.
	err = s.store.View(ctx, func(t store.Reader) error {
		site, n, epoch, err := foundingOf(t, e, c.id)
		if err == nil {
			out, _ = decideFounding(site, n, epoch, q.Uid)
		}
		return err
	})
	if err != nil {
		return nil, s.unavailable("founding not decided", c.id, err)
	}
	if out != nil {
		return out, nil
	}
	if !s.reports.mayWrite(c.id, s.cfg.Now()) {
		return &musterv1.AskFoundingResponse{Reason: "You have asked too often; ask again in a minute."}, nil
	}
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: "node:" + string(c.id), source: c.source, now: s.cfg.Now()}
		site, n, epoch, err := foundingOf(t, e, c.id)
		if err != nil {
			return err
		}
		var grant fleet.FoundingGrant
		if out, grant = decideFounding(site, n, epoch, q.Uid); out != nil {
			return nil // somebody was faster
		}
		grant.At = by.now.UTC()
		before := site.Ledger.Grant
		site.Ledger.Grant = &grant
		if _, err := t.PutSite(site); err != nil {
			return err
		}
		if err := by.record(t, e.tenant, audit.FoundingGranted, "site/"+site.Name, before, grant, ""); err != nil {
			return err
		}
		if _, err := t.AddEvent(cleanEvent(fleet.Event{
			Tenant: e.tenant, Time: by.now, Kind: "site.founding-granted", Node: c.id, Site: site.Name,
			Text: fmt.Sprintf("%s may found the cluster of site %s", n.Words, site.Name),
		})); err != nil {
			return err
		}
		failpoint.Hit("found.before-commit")
		out = &musterv1.AskFoundingResponse{Node: string(c.id), Uid: grant.UID}
		return nil
	})
	if err != nil {
		return nil, s.unavailable("founding not decided", c.id, err)
	}
	failpoint.Hit("found.after-commit")
	s.hub.changed(eventsTopic(e.tenant))
	return out, nil
}

func placeOf(site string) string {
	if site == "" {
		return "no site"
	}
	return "site " + site
}

func foundingOf(t store.Reader, e nodeEntry, id fleet.NodeID) (fleet.Site, fleet.Node, uint64, error) {
	epoch, err := t.Epoch()
	if err != nil {
		return fleet.Site{}, fleet.Node{}, 0, err
	}
	n, err := t.Node(e.tenant, id)
	if err != nil {
		return fleet.Site{}, n, 0, err
	}
	site, err := t.Site(e.tenant, e.site)
	return site, n, epoch, err
}

// decideFounding answers a node that asks for the founding right. Without an
// answer the right is the node's, and grant is what to write down first.
func decideFounding(site fleet.Site, n fleet.Node, epoch uint64, uid string) (*musterv1.AskFoundingResponse, fleet.FoundingGrant) {
	no := func(format string, args ...any) (*musterv1.AskFoundingResponse, fleet.FoundingGrant) {
		out := &musterv1.AskFoundingResponse{Reason: fmt.Sprintf(format, args...)}
		if g := site.Ledger.Grant; g != nil {
			out.Node, out.Uid = string(g.Node), g.UID
		}
		return out, fleet.FoundingGrant{}
	}
	g := site.Ledger.Grant
	switch {
	case n.State == fleet.NodeDenied || !n.Admitted() || n.Site != site.Name:
		return &musterv1.AskFoundingResponse{Reason: "You do not belong to site " + site.Name + "."}, fleet.FoundingGrant{}
	case site.Status.ClusterUID != "" && site.Status.ClusterUID == uid && site.Status.Founder == n.ID:
		return &musterv1.AskFoundingResponse{Node: string(n.ID), Uid: uid}, fleet.FoundingGrant{}
	case site.Status.ClusterUID != "":
		return &musterv1.AskFoundingResponse{
			Node: string(site.Status.Founder), Uid: site.Status.ClusterUID,
			Reason: fmt.Sprintf("Site %s has a cluster already, founded by %s.", site.Name, fleet.Words(site.Status.Founder)),
		}, fleet.FoundingGrant{}
	case site.Ledger.Unsure(epoch):
		out, _ := no("The centre was restored from a backup and does not know whether site %s has a cluster: somebody has to look (muster site confirm %s).", site.Name, site.Name)
		out.Unsure, out.Node, out.Uid = true, "", ""
		return out, fleet.FoundingGrant{}
	case site.Spec.Chosen().Founding.Mode != fleet.FoundCentral:
		return no("The charter of site %s does not ask the centre who founds.", site.Name)
	case g != nil && g.Node == n.ID && g.UID == uid:
		return &musterv1.AskFoundingResponse{Node: string(n.ID), Uid: uid}, fleet.FoundingGrant{}
	case g != nil && g.Node != n.ID:
		return no("The right to found the cluster of site %s was given to %s.", site.Name, fleet.Words(g.Node))
	case !n.MayServe:
		return no("You may not be a server of site %s.", site.Name)
	}
	return nil, fleet.FoundingGrant{Node: n.ID, UID: uid}
}
