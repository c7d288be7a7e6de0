package tables

import (
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

func (t *tx) Queue(tenant string, state fleet.RequestState, identity fleet.IdentityTrust, after store.QueueKey, count int) ([]fleet.Request, error) {
	rows, err := t.q.ListQueue(t.ctx, db.ListQueueParams{
		Tenant: tenant, State: state.String(), Identity: identity.String(), FirstSeen: stamp(after.FirstSeen), ID: string(after.ID), Count: int64(count),
	})
	return list(rows, err, "requests", requestOf)
}

func (t *tx) CountQueue(tenant string, state fleet.RequestState) (map[fleet.IdentityTrust]int, error) {
	rows, err := t.q.CountQueue(t.ctx, db.CountQueueParams{Tenant: tenant, State: state.String()})
	if err != nil {
		return nil, wrap("count", "requests", err)
	}
	out := make(map[fleet.IdentityTrust]int)
	for _, r := range rows {
		var i fleet.IdentityTrust
		if err := i.UnmarshalText([]byte(r.Identity)); err != nil {
			return nil, wrap("count", "requests", err)
		}
		out[i] = int(r.N)
	}
	return out, nil
}
