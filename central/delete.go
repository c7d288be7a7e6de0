package central

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/declare"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/failpoint"
)

// deletion is what a person wants to be gone.
type deletion struct {
	kind, name, reason string
	generation         int64
	dry, withEscrow    bool
}

// deleteObject deletes what nothing needs any more, or says what needs it.
func (s *Server) deleteObject(ctx context.Context, c caller, q deletion) (notes []string, err error) {
	if q.kind == "pre-approval" {
		if q.dry {
			return nil, invalid("there is no dry run for a pre-approval")
		}
		_, err := s.removePreApproval(ctx, c, q.name, q.reason)
		return nil, err
	}
	var files []string
	err = s.store.Update(ctx, func(t store.Tx) error {
		d := deleting{Server: s, part: c.part(t), t: t, by: c.act(s.cfg.Now()), deletion: q}
		var err error
		switch q.kind {
		case "site":
			err = d.site()
		case "stack":
			err = d.stack()
		case "stack-version":
			err = d.version()
		default:
			err = invalid("kind %.40q is none of site, stack, stack-version, pre-approval; a node is removed with muster remove, and shut out with muster deny", q.kind)
		}
		notes, files = d.notes, d.files
		if err == nil && q.dry {
			return errDry
		}
		failpoint.Hit("delete.before-commit")
		return err
	})
	if errors.Is(err, errDry) {
		return notes, nil
	}
	if err != nil {
		return nil, err
	}
	s.vault.drop(c.Tenant, files)
	s.hub.changed(eventsTopic(c.Tenant))
	s.log.Info("object deleted", logObject, q.kind+"/"+q.name, logActor, c.actor())
	return notes, nil
}

type deleting struct {
	*Server
	*part
	deletion
	t  store.Tx
	by act
	// notes say what goes with it; files are of its snapshots.
	notes, files []string
}

// needed is the refusal that names what needs the object.
func (d *deleting) needed(do string, whys []string) error {
	if len(whys) == 0 {
		return nil
	}
	return &enroll.Refused{Why: fmt.Sprintf("%s %s is still needed: %s", d.kind, d.name, strings.Join(whys, "; ")), Do: do}
}

func (d *deleting) at(generation int64) error {
	if d.generation != 0 && d.generation != generation {
		return fmt.Errorf("%w: %s %s is at generation %d", store.ErrConflict, d.kind, d.name, generation)
	}
	return nil
}

// names lists some of many.
func names(list []string) string {
	const shown = 5
	if len(list) > shown {
		return strings.Join(list[:shown], ", ") + fmt.Sprintf(" and %d more", len(list)-shown)
	}
	return strings.Join(list, ", ")
}

func (d *deleting) site() error {
	t := d.t
	site, err := d.findSite(d.name)
	if err != nil {
		return err
	}
	if err := d.may(access.Site, access.Change, site.Name); err != nil {
		return err
	}
	if err := d.at(site.Generation); err != nil {
		return err
	}
	whys, err := d.siteNeeds(site)
	if err != nil {
		return err
	}
	blobs, err := t.EscrowOfSite(d.Tenant, site.Name, 10000)
	if err != nil {
		return err
	}
	if len(blobs) > 0 && !d.withEscrow {
		whys = append(whys, fmt.Sprintf("%d sealed snapshots are kept for it, the way back if its cluster is lost (--with-snapshots deletes them)", len(blobs)))
	}
	if err := d.needed("take its nodes out (muster remove NODE), withdraw what is open, then delete it", whys); err != nil {
		return err
	}
	for _, b := range blobs {
		if err := t.DropEscrow(d.Tenant, b.ID); err != nil {
			return err
		}
		d.files = append(d.files, b.ID)
	}
	if len(blobs) > 0 {
		d.notes = append(d.notes, fmt.Sprintf("%d sealed snapshots go with it", len(blobs)))
	}
	if uid := site.Status.ClusterUID; uid != "" {
		d.notes = append(d.notes, fmt.Sprintf("the cluster %s was born there: what still runs of it runs on by itself, and is nobody's", uid))
	}
	if err := t.DeleteSite(d.Tenant, site.Name, site.Revision); err != nil {
		return err
	}
	if err := d.by.record(t, d.Tenant, audit.SiteDeleted, "site/"+site.Name, site, nil, d.reason); err != nil {
		return err
	}
	_, err = t.AddEvent(cleanEvent(fleet.Event{
		Tenant: d.Tenant, Time: d.by.now, Level: fleet.EventWarning, Kind: "site.deleted", Text: fmt.Sprintf("site %s was deleted by %s", site.Name, d.by.actor),
		// It is at no site any more: who sees a part of the tenant is not told.
		Fields: map[string]string{"site": site.Name},
	}))
	return err
}

// siteNeeds says what needs the site.
func (d *deleting) siteNeeds(site fleet.Site) (whys []string, err error) {
	t := d.t
	var nodes []string
	if err := eachNodeOf(t, d.Tenant, site.Name, func(n fleet.Node) error {
		nodes = append(nodes, fmt.Sprintf("%s (%s)", n.Words, n.ID))
		return nil
	}); err != nil {
		return nil, err
	}
	if len(nodes) > 0 {
		whys = append(whys, fmt.Sprintf("%d nodes belong to it: %s", len(nodes), names(nodes)))
	}
	approved := fleet.RequestApproved
	requests, err := t.Requests(d.Tenant, &approved, maxFiltered)
	if err != nil {
		return nil, err
	}
	var waiting []string
	for _, r := range requests {
		if r.Site == site.Name {
			waiting = append(waiting, r.Words)
		}
	}
	if len(waiting) > 0 {
		whys = append(whys, fmt.Sprintf("machines were approved for it that have not come back yet: %s", names(waiting)))
	}
	orders, err := t.OpenOrders(d.Tenant, site.Name, "", maxNodeOrders)
	if err != nil {
		return nil, err
	}
	var open []string
	for _, o := range orders {
		open = append(open, o.ID)
	}
	if len(open) > 0 {
		whys = append(whys, "orders stand there: "+names(open))
	}
	more, err := d.preApprovalsInto(site)
	if len(more) > 0 {
		whys = append(whys, "pre-approvals bring machines there: "+names(more)+" (muster preapprove remove)")
	}
	if err != nil {
		return nil, err
	}
	return whys, nil
}

func (d *deleting) preApprovalsInto(site fleet.Site) (found []string, err error) {
	for _, kind := range []fleet.PreApprovalKind{fleet.PreApproveEKs, fleet.PreApproveClaim, fleet.PreApproveRule} {
		all, err := d.t.PreApprovalsOfKind(d.Tenant, kind)
		if err != nil {
			return nil, err
		}
		for _, p := range all {
			if !p.Open(d.by.now) {
				continue
			}
			into := p.Site == site.Name
			if kind == fleet.PreApproveEKs && !into {
				n, err := d.t.CountLinesOfSite(d.Tenant, p.Name, site.Name)
				if err != nil {
					return nil, err
				}
				into = n > 0
			}
			if into {
				found = append(found, p.Name)
			}
		}
	}
	return found, nil
}

// sitesWith are the sites that shall run a stack, or one version of it.
func (d *deleting) sitesWith(stack, version string) (found []string, err error) {
	err = eachSite(d.t, d.Tenant, func(site fleet.Site) error {
		if site.Spec.Stack == stack && (version == "" || site.Spec.Version == version) {
			found = append(found, site.Name)
		}
		return nil
	})
	return found, err
}

func (d *deleting) stack() error {
	if err := d.may(access.Stack, access.Change, ""); err != nil {
		return err
	}
	k, err := findStack(d.t, d.Tenant, d.name)
	if err != nil {
		return err
	}
	if err := d.at(k.Generation); err != nil {
		return err
	}
	whys, err := d.stackNeeds(k.Name, "")
	if err != nil {
		return err
	}
	if err := d.needed("give these sites another stack, or none: muster assign SITE --stack none", whys); err != nil {
		return err
	}
	versions, err := d.t.StackVersions(d.Tenant, k.Name)
	if err != nil {
		return err
	}
	var ids []string
	for _, v := range versions {
		ids = append(ids, v.Version)
	}
	if len(ids) > 0 {
		d.notes = append(d.notes, fmt.Sprintf("its %d versions go with it: %s", len(ids), names(ids)))
	}
	if err := d.t.DeleteStack(d.Tenant, k.Name, k.Revision); err != nil {
		return err
	}
	return d.by.record(d.t, d.Tenant, audit.StackDeleted, "stack/"+k.Name, map[string]any{"stack": k, "versions": ids}, nil, d.reason)
}

func (d *deleting) version() error {
	if err := d.may(access.Stack, access.Change, ""); err != nil {
		return err
	}
	stack, version, ok := declare.SplitVersion(d.name)
	if !ok {
		return invalid("which version? STACK@VERSION")
	}
	v, err := d.t.StackVersion(d.Tenant, stack, version)
	if errors.Is(err, store.ErrNotFound) {
		return &errNoSuch{fmt.Sprintf("there is no stack version %s in tenant %s", text.Clean(d.name, 200), d.Tenant), "`muster get stacks` lists them"}
	}
	if err != nil {
		return err
	}
	whys, err := d.stackNeeds(stack, version)
	if err != nil {
		return err
	}
	if err := d.needed("give these sites another version first: muster assign SITE --stack NAME@VERSION", whys); err != nil {
		return err
	}
	if err := d.t.DeleteStackVersion(d.Tenant, stack, version); err != nil {
		return err
	}
	d.notes = append(d.notes, "its images and charts stay: other versions may have them, too")
	return d.by.record(d.t, d.Tenant, audit.StackVersionGone, "stack/"+d.name, map[string]any{"sha256": v.SHA256, "key_id": v.KeyID}, nil, d.reason)
}

// stackNeeds says what needs a stack, or one version of it.
func (d *deleting) stackNeeds(stack, version string) (whys []string, err error) {
	sites, err := d.sitesWith(stack, version)
	if len(sites) > 0 {
		whys = append(whys, fmt.Sprintf("%d sites shall run it: %s", len(sites), names(sites)))
	}
	if err != nil {
		return nil, err
	}
	rollouts, err := d.t.Rollouts(d.Tenant)
	for _, r := range rollouts {
		if r.State.Live() && r.Plan.Stack.Name == stack && (version == "" || r.Plan.Stack.Version == version) {
			whys = append(whys, "the rollout "+r.Name+" brings it to sites (muster rollout abort)")
		}
	}
	return whys, err
}
