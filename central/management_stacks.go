package central

import (
	"context"
	"errors"
	"strconv"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/drift"
	"github.com/muster-edge/muster/fleet/placement"
	"github.com/muster-edge/muster/fleet/text"
)

// maxAssigned bounds the sites that one call names.
const maxAssigned = 10000

// lastOrders is how many orders of a node are shown with it.
const lastOrders = 8

func publishedToProto(v store.StackVersion, envelope bool) (*musterv1.PublishedVersion, error) {
	sv, err := versionOf(v)
	if err != nil {
		return nil, err
	}
	m := &musterv1.PublishedVersion{
		Version: api.StackVersionToProto(sv), Sha256: v.SHA256, Published: timestamppb.New(v.Published), By: v.By, KeyId: v.KeyID,
	}
	if envelope {
		m.Envelope = v.Envelope
	}
	return m, nil
}

// PublishStackVersion implements the management service.
func (s management) PublishStackVersion(ctx context.Context, q *musterv1.PublishStackVersionRequest) (*musterv1.PublishStackVersionResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if len(q.Envelope) == 0 || len(q.Envelope) > fleet.MaxEnvelope {
		return nil, invalid("the stack version has %d bytes; want 1 to %d", len(q.Envelope), fleet.MaxEnvelope)
	}
	v, created, warnings, err := s.publish(ctx, callerOf(ctx), q.Envelope, reason)
	if err != nil {
		return nil, s.coded(ctx, "publishing the stack version", err)
	}
	m, err := publishedToProto(v, false)
	if err != nil {
		return nil, s.coded(ctx, "publishing the stack version", err)
	}
	return &musterv1.PublishStackVersionResponse{Version: m, Created: created, Warnings: warnings}, nil
}

// ListStacks implements the management service.
func (s management) ListStacks(ctx context.Context, _ *musterv1.ListStacksRequest) (*musterv1.ListStacksResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListStacksResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		stacks, err := t.Stacks(c.Tenant)
		if err != nil {
			return err
		}
		out.Stacks, err = c.part(t).summaries(stacks, false)
		return err
	})
	return out, s.coded(ctx, "listing stacks", err)
}

// GetStack implements the management service.
func (s management) GetStack(ctx context.Context, q *musterv1.GetStackRequest) (*musterv1.GetStackResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetStackResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		k, err := findStack(t, c.Tenant, q.Name)
		if err != nil {
			return err
		}
		list, err := c.part(t).summaries([]fleet.Stack{k}, true)
		if err == nil {
			out.Stack = list[0]
		}
		return err
	})
	return out, s.coded(ctx, "reading the stack", err)
}

func findStack(t store.Reader, tenant, name string) (fleet.Stack, error) {
	k, err := t.Stack(tenant, name)
	if errors.Is(err, store.ErrNotFound) {
		return k, &errNoSuch{"there is no stack " + strconv.Quote(text.Clean(name, 80)) + " in tenant " + tenant, "`muster get stacks` lists them"}
	}
	return k, err
}

// summaries are the stacks with their versions, and how many sites that the
// caller sees shall run each.
func (p *part) summaries(stacks []fleet.Stack, envelopes bool) (out []*musterv1.StackSummary, err error) {
	t, tenant := p.t, p.Tenant
	sites := make(map[string]map[string]uint32)
	if err := eachSite(t, tenant, func(site fleet.Site) error {
		if sees, err := p.sees(access.Site, site.Name); err != nil || !sees {
			return err
		}
		if sites[site.Spec.Stack] == nil {
			sites[site.Spec.Stack] = make(map[string]uint32)
		}
		sites[site.Spec.Stack][site.Spec.Version]++
		return nil
	}); err != nil {
		return nil, err
	}
	for _, k := range stacks {
		m := &musterv1.StackSummary{Stack: api.StackToProto(k), Sites: sites[k.Name]}
		versions, err := t.StackVersions(tenant, k.Name)
		if err != nil {
			return nil, err
		}
		for _, v := range versions {
			p, err := publishedToProto(v, envelopes)
			if err != nil {
				return nil, err
			}
			m.Versions = append(m.Versions, p)
		}
		out = append(out, m)
	}
	return out, nil
}

// AssignStack implements the management service.
func (s management) AssignStack(ctx context.Context, q *musterv1.AssignStackRequest) (*musterv1.AssignStackResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	switch {
	case len(q.Sites) == 0 && len(q.Labels) == 0, len(q.Sites) > 0 && len(q.Labels) > 0:
		return nil, invalid("want sites by name, or by labels")
	case len(q.Sites) > maxAssigned:
		return nil, invalid("%d sites; at most %d are allowed in one call", len(q.Sites), maxAssigned)
	case (q.Stack == "") != (q.Version == ""):
		return nil, invalid("want a stack and a version: NAME@VERSION")
	case q.Generation != 0 && len(q.Sites) != 1:
		return nil, invalid("a generation is for one site")
	}
	done, warnings, err := s.assignStack(ctx, callerOf(ctx), stackAssignment{
		sites: q.Sites, labels: q.Labels, stack: q.Stack, version: q.Version, reason: reason, generation: q.Generation, dry: q.DryRun, noReturn: q.AcceptNoReturn,
	})
	if err != nil {
		return nil, s.coded(ctx, "assigning the stack", err)
	}
	out := &musterv1.AssignStackResponse{Warnings: warnings}
	for _, d := range done {
		out.Sites = append(out.Sites, &musterv1.AssignedSite{Site: api.SiteToProto(d.site), Before: d.before, Changed: d.changed, Refused: d.refused})
	}
	return out, nil
}

// GetDrift implements the management service.
func (s management) GetDrift(ctx context.Context, q *musterv1.GetDriftRequest) (*musterv1.GetDriftResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetDriftResponse{Now: timestamppb.New(s.cfg.Now())}
	var results []drift.Result
	images := make(map[string][]fleet.ImageRef)
	// A snapshot for each page: a long look keeps no version of the whole
	// database alive.
	for after, more := "", true; more; {
		err := s.store.View(ctx, func(t store.Reader) (err error) {
			if out.Lab, err = labOf(t, c.Tenant); err != nil {
				return err
			}
			sites, err := t.Sites(c.Tenant, after, refreshBatch)
			if more = len(sites) == refreshBatch; err != nil || len(sites) == 0 {
				return err
			}
			look := c.part(t)
			for _, site := range sites {
				if sees, err := look.sees(access.Site, site.Name); err != nil {
					return err
				} else if !sees {
					continue
				}
				if !placement.Fits(q.Labels, site.Labels) || q.Stack != "" && site.Spec.Stack != q.Stack {
					continue
				}
				r, err := s.driftOf(t, site, images)
				if err != nil {
					return err
				}
				results = append(results, r)
			}
			after = sites[len(sites)-1].Name
			return nil
		})
		if err != nil {
			return nil, s.coded(ctx, "comparing the sites", err)
		}
	}
	f := drift.Sum(results)
	out.Sites, out.SitesCurrent, out.Unassigned, out.Summary = uint32(f.Sites), uint32(f.Current), uint32(f.Unassigned), f.String()
	list := f.Outliers
	if q.All {
		list = results
	}
	for _, r := range list[:min(len(list), maxAssigned)] {
		out.Outliers = append(out.Outliers, api.SiteDriftToProto(r))
	}
	return out, nil
}

// showSystem adds what the node said of its system, what it shall run, and its
// orders.
func (s management) showSystem(t store.Reader, n fleet.Node, out *musterv1.GetNodeResponse) error {
	out.Now, out.StaleAfterSeconds = timestamppb.New(s.cfg.Now()), uint32(s.staleAfter().Seconds())
	r, err := t.System(n.Tenant, n.ID)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if err == nil {
		out.System = api.SystemReportToProto(r)
	}
	if !n.Admitted() {
		return nil
	}
	site, err := t.Site(n.Tenant, n.Site)
	if err != nil {
		return err
	}
	out.Desired = api.StackRefToProto(site.Spec.StackRef())
	orders, err := t.Orders(n.Tenant, n.Site, maxList)
	for _, o := range orders {
		if o.Node == n.ID && len(out.Orders) < lastOrders {
			out.Orders = append(out.Orders, api.IssuedOrderToProto(o.IssuedOrder))
		}
	}
	return err
}
