package central

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// Bounds of one answer.
const (
	pageDocuments = 256
	pageBytes     = 1 << 20
	maxNodeOrders = 64
)

// caller is the node behind a call, with what the index knows of it.
func (s nodeService) caller(ctx context.Context) (nodeCaller, nodeEntry, error) {
	c, ok := ctx.Value(nodeCallerKey{}).(nodeCaller)
	if !ok {
		return c, nodeEntry{}, connect.NewError(connect.CodeUnauthenticated, errors.New("no node"))
	}
	e, ok := s.index.get(c.id)
	if !ok {
		return c, e, connect.NewError(connect.CodePermissionDenied, errors.New("the node is not known here"))
	}
	return c, e, nil
}

// unavailable hides what went wrong from the node and tells the log.
func (s nodeService) unavailable(what string, id fleet.NodeID, err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return err
	}
	s.log.Error(what, logNode, id, logError, err)
	return connect.NewError(connect.CodeUnavailable, errors.New("try again"))
}

// Documents implements the node service.
func (s nodeService) Documents(ctx context.Context, q *musterv1.DocumentsRequest) (*musterv1.DocumentsResponse, error) {
	c, e, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	out := &musterv1.DocumentsResponse{Site: e.site, Now: timestamppb.New(s.cfg.Now())}
	if e.site == "" {
		return out, nil
	}
	have, after := api.DocVersion(q.Have), api.DocVersion(q.After)
	if q.Site != e.site {
		have = fleet.DocVersion{}
	}
	revision := s.sites.get(e.tenant, e.site).documents
	if have == revision && revision != (fleet.DocVersion{}) {
		out.Revision, out.Unchanged = api.DocVersionToProto(revision), true
		return out, nil
	}
	if have.Epoch != revision.Epoch || have.Compare(revision) > 0 {
		// A backup was restored in between: numbers that the node has seen may
		// stand for other documents now. It gets all, once.
		have = fleet.DocVersion{}
	}
	if after.Compare(have) > 0 {
		have = after
	}
	var orders []store.Order
	err = s.store.View(ctx, func(t store.Reader) error {
		out.Envelopes, orders = nil, nil
		return s.page(t, c.id, e, have, out, &orders)
	})
	if err == nil {
		err = s.delivered(ctx, orders)
	}
	if err != nil {
		return nil, s.unavailable("documents not read", c.id, err)
	}
	return out, nil
}

// page fills one answer with what is newer than have.
func (s nodeService) page(t store.Reader, id fleet.NodeID, e nodeEntry, have fleet.DocVersion, out *musterv1.DocumentsResponse, orders *[]store.Order) error {
	site, err := t.Site(e.tenant, e.site)
	if err != nil {
		return err
	}
	out.Revision = api.DocVersionToProto(site.Ledger.Documents)
	documents, err := t.DocumentsOfSite(e.tenant, e.site, have, pageDocuments)
	if err != nil {
		return err
	}
	size := 0
	for i, d := range documents {
		if size += len(d.Envelope); i > 0 && size > pageBytes {
			out.More = true
			return nil
		}
		out.Envelopes = append(out.Envelopes, d.Envelope)
		out.Next = api.DocVersionToProto(d.Version)
	}
	if len(documents) == pageDocuments {
		out.More = true
		return nil
	}
	open, err := t.OpenOrders(e.tenant, e.site, id, maxNodeOrders)
	if err != nil {
		return err
	}
	now := s.cfg.Now()
	for _, o := range open {
		// Orders are given at one site; a node that went elsewhere has none.
		if o.Site != e.site || !now.Before(o.NotAfter) && o.State != fleet.OrderRunning {
			continue
		}
		out.Orders = append(out.Orders, o.ID)
		out.Envelopes = append(out.Envelopes, o.Envelope)
		*orders = append(*orders, o)
	}
	return nil
}

// delivered notes that the node was given its orders.
func (s nodeService) delivered(ctx context.Context, orders []store.Order) error {
	fresh := orders[:0:0]
	for _, o := range orders {
		if o.State == fleet.OrderOpen {
			fresh = append(fresh, o)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	err := s.store.Update(ctx, func(t store.Tx) error {
		for _, o := range fresh {
			now, err := t.Order(o.Tenant, o.ID)
			if err != nil {
				return err
			}
			if now.State != fleet.OrderOpen {
				continue
			}
			if now.State, err = now.State.MoveTo(fleet.OrderDelivered); err != nil {
				return err
			}
			now.Changed = s.cfg.Now()
			if _, err := t.PutOrder(now.IssuedOrder); err != nil {
				return err
			}
			if _, err := t.AddEvent(cleanEvent(fleet.Event{
				Tenant: o.Tenant, Time: now.Changed, Kind: "order.delivered", Node: o.Node, Site: o.Site,
				Text: fmt.Sprintf("order %s (%s) has reached %s", o.ID, o.Kind, fleet.Words(o.Node)),
			})); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		s.hub.changed(eventsTopic(fresh[0].Tenant))
	}
	return err
}
