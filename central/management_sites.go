package central

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/text"
)

// staleReports: what a node said longer than so many reports ago is old.
const staleReports = 3

// AssignNode implements the management service.
func (s management) AssignNode(ctx context.Context, q *musterv1.AssignNodeRequest) (*musterv1.AssignNodeResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if err := fleet.ValidateName("site", q.Site); err != nil || q.Site == fleet.PoolSite {
		return nil, invalid("a site is needed; to put a node back into the pool: muster remove NODE")
	}
	if err := fleet.ValidateLabels(q.Labels); err != nil {
		return nil, invalid("%v", err)
	}
	if q.RoleHint != "" && q.RoleHint != "server" && q.RoleHint != "worker" {
		return nil, invalid("role hint %.40q is neither server nor worker", q.RoleHint)
	}
	n, a, created, err := s.assign(ctx, callerOf(ctx), assignment{
		id: q.Id, site: q.Site, reason: reason, revision: q.Revision, worker: q.RoleHint == "worker", labels: q.Labels, createSite: q.CreateSite,
	})
	if err != nil {
		return nil, s.coded(ctx, "assigning", err)
	}
	return &musterv1.AssignNodeResponse{Node: api.NodeToProto(n), Admission: api.AdmissionToProto(a), SiteCreated: created}, nil
}

// RemoveNode implements the management service.
func (s management) RemoveNode(ctx context.Context, q *musterv1.RemoveNodeRequest) (*musterv1.RemoveNodeResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	n, r, err := s.removeNode(ctx, callerOf(ctx), q.Id, q.Revision, reason)
	if err != nil {
		return nil, s.coded(ctx, "removing", err)
	}
	return &musterv1.RemoveNodeResponse{Node: api.NodeToProto(n), Removal: api.RemovalToProto(*r)}, nil
}

// GetSite implements the management service.
func (s management) GetSite(ctx context.Context, q *musterv1.GetSiteRequest) (*musterv1.GetSiteResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetSiteResponse{Now: timestamppb.New(s.cfg.Now()), StaleAfterSeconds: uint32(staleReports * s.cfg.ReportEvery / time.Second)}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		site, err := c.part(t).findSite(q.Name)
		if err != nil {
			return err
		}
		out.Site = api.SiteToProto(site)
		epoch, err := t.Epoch()
		if err != nil {
			return err
		}
		out.Unsure = site.Ledger.Unsure(epoch)
		if err := s.showCharter(t, site, out); err != nil {
			return err
		}
		reports := make(map[fleet.NodeID]fleet.NodeReport)
		said, err := t.Reports(c.Tenant, site.Name)
		if err != nil {
			return err
		}
		for _, r := range said {
			reports[r.Node] = r
		}
		addresses, err := t.Addresses(c.Tenant, site.Name)
		if err != nil {
			return err
		}
		if err := eachNodeOf(t, c.Tenant, site.Name, func(n fleet.Node) error {
			out.Nodes = append(out.Nodes, api.NodeToProto(n))
			out.Reports = append(out.Reports, api.NodeReportToProto(reports[n.ID]))
			address := ""
			if a, there := addresses[n.ID]; there {
				address = a.String()
			}
			out.Addresses = append(out.Addresses, address)
			return nil
		}); err != nil {
			return err
		}
		if err := s.showDrift(t, site, out); err != nil {
			return err
		}
		orders, err := t.OpenOrders(c.Tenant, site.Name, "", maxNodeOrders)
		for _, o := range orders {
			out.Orders = append(out.Orders, api.IssuedOrderToProto(o.IssuedOrder))
		}
		return err
	})
	return out, s.coded(ctx, "reading the site", err)
}

func (s management) showCharter(t store.Reader, site fleet.Site, out *musterv1.GetSiteResponse) error {
	charter, _, err := charterNow(t, site.Tenant, site.Name)
	if err != nil {
		return err
	}
	if charter != nil {
		out.Charter = api.CharterToProto(*charter)
	}
	want, err := charterOf(t, site)
	if err != nil {
		return err
	}
	want.Issued = s.cfg.Now()
	if err := want.Validate(); err != nil {
		out.WhyNoCharter = text.Clean(problemOf(err), maxSentence)
	}
	return nil
}

// SetSite implements the management service.
func (s management) SetSite(ctx context.Context, q *musterv1.SetSiteRequest) (*musterv1.SetSiteResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if err := fleet.ValidateName("site", q.Name); err != nil {
		return nil, invalid("%v", err)
	}
	change := siteChange{name: q.Name, title: q.Title, location: q.Location, reason: reason, generation: q.Generation, create: q.Create}
	if q.Settings != nil {
		set, err := api.SettingsFromProto(q.Settings)
		if err != nil {
			return nil, invalid("%v", err)
		}
		change.settings = &set
	}
	r, err := s.setSite(ctx, callerOf(ctx), change)
	if err != nil {
		return nil, s.coded(ctx, "changing the site", err)
	}
	if r.changed {
		s.installs(ctx, callerOf(ctx).Tenant, q.Name)
	}
	out := &musterv1.SetSiteResponse{Site: api.SiteToProto(r.site), Changed: r.changed, Created: r.created, WhyNoCharter: text.Clean(r.why, maxSentence)}
	if r.charter != nil {
		out.Charter = api.CharterToProto(*r.charter)
	}
	return out, nil
}

// ConfirmSite implements the management service.
func (s management) ConfirmSite(ctx context.Context, q *musterv1.ConfirmSiteRequest) (*musterv1.ConfirmSiteResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	site, err := s.confirmSite(ctx, callerOf(ctx), q.Name, reason)
	if err != nil {
		return nil, s.coded(ctx, "confirming the site", err)
	}
	return &musterv1.ConfirmSiteResponse{Site: api.SiteToProto(site)}, nil
}

// CreateOrder implements the management service.
func (s management) CreateOrder(ctx context.Context, q *musterv1.CreateOrderRequest) (*musterv1.CreateOrderResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	if q.Site == "" && !slices.Contains(systemOrders, fleet.OrderKind(q.Kind)) {
		return nil, invalid("a site is needed")
	}
	p, err := s.order(ctx, callerOf(ctx), wish{
		kind: fleet.OrderKind(q.Kind), node: q.Node, site: q.Site, snapshot: q.Snapshot, cluster: q.Cluster, into: q.Into, reason: reason,
		life: time.Duration(q.ValidSeconds) * time.Second, seenEpoch: q.SeenEpoch, dry: q.DryRun,
		disk: q.Disk, image: q.Image, keepData: q.KeepData, overwrite: q.Overwrite,
	})
	if err != nil {
		return nil, s.coded(ctx, "giving the order", err)
	}
	return &musterv1.CreateOrderResponse{Order: api.IssuedOrderToProto(p.order), Sentence: p.sentence, Warnings: p.warnings, Epoch: p.epoch}, nil
}

// ListOrders implements the management service.
func (s management) ListOrders(ctx context.Context, q *musterv1.ListOrdersRequest) (*musterv1.ListOrdersResponse, error) {
	c := callerOf(ctx)
	limit := limitOf(q.Limit)
	out := &musterv1.ListOrdersResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		look := c.part(t)
		if q.Site != "" {
			if sees, err := look.sees(access.Order, q.Site); err != nil || !sees {
				return err
			}
		}
		orders, err := some(look, access.Order, limit+1, func(count int) ([]store.Order, error) { return t.Orders(c.Tenant, q.Site, count) },
			func(o store.Order) string { return o.Site })
		if len(orders) > limit {
			orders, out.More = orders[:limit], true
		}
		for _, o := range orders {
			stands := o.State == fleet.OrderOpen || o.State == fleet.OrderDelivered || o.State == fleet.OrderRunning
			if q.Open && !stands {
				continue
			}
			out.Orders = append(out.Orders, api.IssuedOrderToProto(o.IssuedOrder))
		}
		return err
	})
	return out, s.coded(ctx, "listing orders", err)
}

// WithdrawOrder implements the management service.
func (s management) WithdrawOrder(ctx context.Context, q *musterv1.WithdrawOrderRequest) (*musterv1.WithdrawOrderResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	o, err := s.withdraw(ctx, callerOf(ctx), q.Id, reason)
	if err != nil {
		return nil, s.coded(ctx, "withdrawing the order", err)
	}
	return &musterv1.WithdrawOrderResponse{Order: api.IssuedOrderToProto(o)}, nil
}

// TrustEscrowKey implements the management service.
func (s management) TrustEscrowKey(ctx context.Context, q *musterv1.TrustEscrowKeyRequest) (*musterv1.TrustEscrowKeyResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	changed, err := s.trustEscrowKey(ctx, callerOf(ctx), q.Key, reason)
	if err != nil {
		return nil, s.coded(ctx, "setting the escrow key", err)
	}
	return &musterv1.TrustEscrowKeyResponse{KeyId: keyIDOf(q.Key), Changed: changed}, nil
}

// showKey adds the node's key, as its certificate has it, and its last report.
func showKey(t store.Reader, n fleet.Node, out *musterv1.GetNodeResponse) error {
	key, err := keyOf(t, n)
	switch {
	case err == nil:
		if out.LdevidPublic, err = x509.MarshalPKIXPublicKey(key); err != nil {
			return err
		}
	case !errors.Is(err, errBadSignature):
		return err
	}
	r, err := t.Report(n.Tenant, n.ID)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err == nil {
		out.Report = api.NodeReportToProto(r)
	}
	return err
}

// showDrift adds what the site's nodes said of their systems, and how that
// compares with what they shall run.
func (s management) showDrift(t store.Reader, site fleet.Site, out *musterv1.GetSiteResponse) error {
	systems, err := t.SystemsOfSite(site.Tenant, site.Name)
	if err != nil {
		return err
	}
	said := make(map[string]fleet.SystemReport)
	for _, r := range systems {
		said[string(r.Node)] = r
	}
	for _, n := range out.Nodes {
		out.Systems = append(out.Systems, api.SystemReportToProto(said[n.Id]))
	}
	d, err := s.driftOf(t, site, map[string][]fleet.ImageRef{})
	out.Drift = api.SiteDriftToProto(d)
	return err
}
