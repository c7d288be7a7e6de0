package tables

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

func (t *tx) LastEvent(tenant string) (uint64, error) {
	n, err := t.q.LastEvent(t.ctx, tenant)
	return uint64(n), wrap("read", "last event", err)
}

func (t *tx) Events(tenant string, after uint64, count int) ([]fleet.Event, error) {
	rows, err := t.q.ListEvents(t.ctx, db.ListEventsParams{Tenant: tenant, After: int64(after), Count: int64(count)})
	return list(rows, err, "events", func(r db.Event) (fleet.Event, error) {
		var v fleet.Event
		err := decode("event", r.Body, &v)
		v.Seq = uint64(r.Seq)
		return v, err
	})
}

func (t *tx) AddEvent(v fleet.Event) (fleet.Event, error) {
	last, err := t.LastEvent(v.Tenant)
	if err != nil {
		return v, err
	}
	v.Seq = last + 1
	t.changed(store.ChangedEvents, v.Tenant, "")
	body, err := encode("event", v)
	if err != nil {
		return v, err
	}
	if err := t.q.InsertEvent(t.ctx, db.InsertEventParams{Tenant: v.Tenant, Seq: int64(v.Seq), Body: body}); err != nil {
		return v, wrap("write", "event", err)
	}
	if old := int64(v.Seq) - int64(t.maxEvents); old > 0 {
		err = t.q.TrimEvents(t.ctx, db.TrimEventsParams{Tenant: v.Tenant, Seq: old})
	}
	return v, wrap("trim", "events", err)
}

func (t *tx) Audit(tenant string, after uint64, count int) ([]fleet.AuditRecord, error) {
	rows, err := t.q.ListAudit(t.ctx, db.ListAuditParams{Tenant: tenant, After: int64(after), Count: int64(count)})
	return list(rows, err, "audit records", func(r db.Audit) (fleet.AuditRecord, error) {
		var v fleet.AuditRecord
		// A record somebody spoilt must not hide the others from the verifier.
		if json.Unmarshal([]byte(r.Body), &v) != nil || v.Seq != uint64(r.Seq) || v.Hash.String() != r.Hash {
			v = fleet.AuditRecord{Seq: uint64(r.Seq), Tenant: r.Tenant}
		}
		return v, nil
	})
}

func (t *tx) AddAudit(v fleet.AuditRecord) (fleet.AuditRecord, error) {
	var head audit.Head
	row, err := t.q.LastAudit(t.ctx, v.Tenant)
	switch err = wrap("read", "last audit record", err); {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return v, err
	default:
		head.Count = uint64(row.Seq)
		if err := head.Hash.UnmarshalText([]byte(row.Hash)); err != nil {
			return v, fmt.Errorf("tables: link audit record: %w", err)
		}
	}
	v, err = audit.Append(head, v)
	if err != nil {
		return v, fmt.Errorf("tables: link audit record: %w", err)
	}
	body, err := encode("audit record", v)
	if err != nil {
		return v, err
	}
	return v, wrap("write", "audit record", t.q.InsertAudit(t.ctx, db.InsertAuditParams{
		Tenant: v.Tenant, Seq: int64(v.Seq), Hash: v.Hash.String(), Body: body,
	}))
}
