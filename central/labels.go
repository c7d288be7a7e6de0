package central

import (
	"context"
	"fmt"
	"maps"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

// relabel returns labels with a change; changed is false if it changes nothing.
func relabel(old, set map[string]string, remove []string) (out map[string]string, changed bool, err error) {
	out = maps.Clone(old)
	if out == nil {
		out = make(map[string]string)
	}
	for _, k := range remove {
		delete(out, k)
	}
	maps.Copy(out, set)
	if err := fleet.ValidateLabels(out); err != nil {
		return nil, false, &enroll.Refused{Why: err.Error()}
	}
	return out, !maps.Equal(old, out), nil
}

func unchangedSince(kind, name string, seen, is int64) error {
	if seen != 0 && seen != is {
		return fmt.Errorf("%w: %s %s is at revision %d", store.ErrConflict, kind, name, is)
	}
	return nil
}

// LabelObject implements the management service. The labels of a node are in
// its admission: a new one follows in the same transaction.
func (s management) LabelObject(ctx context.Context, q *musterv1.LabelObjectRequest) (*musterv1.LabelObjectResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if len(q.Set)+len(q.Remove) == 0 || len(q.Remove) > fleet.MaxLabels {
		return nil, invalid("want labels to set (KEY=VALUE) or to remove, at most %d", fleet.MaxLabels)
	}
	c := callerOf(ctx)
	out := &musterv1.LabelObjectResponse{}
	err = s.store.Update(ctx, func(t store.Tx) error {
		by, look := c.act(s.cfg.Now()), c.part(t)
		switch q.Kind {
		case "site":
			return look.labelSite(t, by, q, reason, out)
		case "stack":
			return look.labelStack(t, by, q, reason, out)
		case "node":
			return look.labelNode(t, by, s.scribe, q, reason, out)
		}
		return invalid("kind %.40q is none of site, stack, node", q.Kind)
	})
	if err == nil && out.Changed {
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return out, s.coded(ctx, "labelling", err)
}

func (p *part) labelSite(t store.Tx, by act, q *musterv1.LabelObjectRequest, reason string, out *musterv1.LabelObjectResponse) error {
	site, err := p.findSite(q.Name)
	if err != nil {
		return err
	}
	if err := p.may(access.Site, access.Change, site.Name); err != nil {
		return err
	}
	if err := unchangedSince("site", site.Name, q.Revision, site.Revision); err != nil {
		return err
	}
	before := site.Labels
	site.Labels, out.Changed, err = relabel(site.Labels, q.Set, q.Remove)
	if err == nil && out.Changed {
		// Labels say whose a site is: nobody moves one out of their part.
		if err := p.mayMake(site); err != nil {
			return err
		}
		site.Updated = by.now
		site.Generation++
		if site, err = t.PutSite(site); err == nil {
			err = by.record(t, p.Tenant, audit.SiteChanged, "site/"+site.Name, map[string]any{"labels": before}, map[string]any{"labels": site.Labels}, reason)
		}
		if err == nil {
			err = siteEvent(t, by, site)
		}
	}
	out.Labels, out.Revision = site.Labels, site.Revision
	return err
}

func (p *part) labelStack(t store.Tx, by act, q *musterv1.LabelObjectRequest, reason string, out *musterv1.LabelObjectResponse) error {
	k, err := findStack(t, p.Tenant, q.Name)
	if err != nil {
		return err
	}
	if err := p.may(access.Stack, access.Change, ""); err != nil {
		return err
	}
	if err := unchangedSince("stack", k.Name, q.Revision, k.Revision); err != nil {
		return err
	}
	before := k.Labels
	k.Labels, out.Changed, err = relabel(k.Labels, q.Set, q.Remove)
	if err == nil && out.Changed {
		k.Updated = by.now
		k.Generation++
		if k, err = t.PutStack(k); err == nil {
			err = by.record(t, p.Tenant, audit.StackChanged, "stack/"+k.Name, map[string]any{"labels": before}, map[string]any{"labels": k.Labels}, reason)
		}
	}
	out.Labels, out.Revision = k.Labels, k.Revision
	return err
}

func (p *part) labelNode(t store.Tx, by act, sign scribe, q *musterv1.LabelObjectRequest, reason string, out *musterv1.LabelObjectResponse) error {
	n, err := p.findNode(q.Name)
	if err != nil {
		return err
	}
	if err := p.may(access.Node, access.Change, n.Site); err != nil {
		return err
	}
	if err := unchangedSince("node", string(n.ID), q.Revision, n.Revision); err != nil {
		return err
	}
	before := n.Labels
	n.Labels, out.Changed, err = relabel(n.Labels, q.Set, q.Remove)
	if err != nil || !out.Changed {
		out.Labels, out.Revision = n.Labels, n.Revision
		return err
	}
	n.Generation++
	if n, err = t.PutNode(n); err != nil {
		return err
	}
	out.Labels, out.Revision = n.Labels, n.Revision
	if err := by.record(t, p.Tenant, audit.NodeChanged, "node/"+string(n.ID), map[string]any{"labels": before}, map[string]any{"labels": n.Labels}, reason); err != nil {
		return err
	}
	if err := objectEvent(t, by, fleet.Event{Tenant: p.Tenant, Kind: "node.labelled", Node: n.ID, Site: n.Site, Text: fmt.Sprintf("%s was labelled by %s", n.Words, by.actor)}); err != nil {
		return err
	}
	if !n.Admitted() {
		return nil
	}
	site, err := t.Site(p.Tenant, n.Site)
	if err != nil {
		return err
	}
	if _, _, err := sign.admit(t, by, &site, n, reason); err != nil {
		return err
	}
	_, err = t.PutSite(site)
	return err
}
