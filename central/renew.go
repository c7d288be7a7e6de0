package central

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
)

// Renew implements the node service.
func (s nodeService) Renew(ctx context.Context, q *musterv1.RenewRequest) (*musterv1.RenewResponse, error) {
	c, ok := ctx.Value(nodeCallerKey{}).(nodeCaller)
	if !ok {
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("no node"))
	}
	return s.enroll.Renew(ctx, c.id, q)
}

// allowedToday holds a machine that wants another certificate against today's
// policy: what was allowed once need not be any more. A first certificate is
// the approval's own, made within hours of it.
func (e *enrollment) allowedToday(t store.Reader, r fleet.Request) error {
	if e.approvals == nil || r.State != fleet.RequestIssued {
		return nil
	}
	tenant, err := t.Tenant(r.Tenant)
	if err != nil {
		return err
	}
	return e.approvals(tenant).Check(r.Identity, r.Boot)
}

// Live implements service.Store.
func (e *enrollment) Live(ctx context.Context, tenant string, node fleet.NodeID) (live fleet.Request, err error) {
	err = e.store.View(ctx, func(t store.Reader) error {
		requests, err := t.RequestsOfNode(tenant, node)
		for _, r := range requests {
			if r.State.Live() {
				live = r
				return nil
			}
		}
		return errors.Join(err, service.ErrNotFound)
	})
	return live, err
}
