package tables

import (
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet/rollout"
)

func rolloutOf(r db.Rollout) (rollout.Rollout, error) {
	var v rollout.Rollout
	err := decode("rollout", r.Body, &v)
	v.Revision = r.Revision
	return v, err
}

func (t *tx) Rollout(tenant, name string) (rollout.Rollout, error) {
	r, err := t.q.GetRollout(t.ctx, db.GetRolloutParams{Tenant: tenant, Name: name})
	if err != nil {
		return rollout.Rollout{}, wrap("read", "rollout", err)
	}
	return rolloutOf(r)
}

func (t *tx) Rollouts(tenant string) ([]rollout.Rollout, error) {
	rows, err := t.q.ListRollouts(t.ctx, tenant)
	return list(rows, err, "rollouts", rolloutOf)
}

func (t *tx) RolloutsOfState(state rollout.State) ([]rollout.Rollout, error) {
	rows, err := t.q.ListRolloutsOfState(t.ctx, state.String())
	return list(rows, err, "rollouts", rolloutOf)
}

func (t *tx) PutRollout(v rollout.Rollout) (rollout.Rollout, error) {
	seen := v.Revision
	v.Revision++
	body, err := encode("rollout", v)
	if err != nil {
		return v, err
	}
	if seen == 0 {
		return v, wrap("write", "rollout", t.q.InsertRollout(t.ctx, db.InsertRolloutParams{Tenant: v.Tenant, Name: v.Name, State: v.State.String(), Body: body}))
	}
	n, err := t.q.UpdateRollout(t.ctx, db.UpdateRolloutParams{Tenant: v.Tenant, Name: v.Name, State: v.State.String(), Body: body, Seen: seen})
	return v, replaced("rollout", n, err)
}

func (t *tx) DeleteRollout(tenant, name string, revision int64) error {
	n, err := t.q.DeleteRollout(t.ctx, db.DeleteRolloutParams{Tenant: tenant, Name: name, Seen: revision})
	return replaced("rollout", n, err)
}
