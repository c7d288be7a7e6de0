package tables

import (
	"encoding/hex"
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

func requestOf(r db.Request) (fleet.Request, error) {
	var v fleet.Request
	if err := decode("request", r.Body, &v); err != nil {
		return v, err
	}
	// The digest is no part of a request's JSON.
	b, err := hex.DecodeString(r.Digest)
	if err != nil || len(b) != len(v.EvidenceDigest) {
		return v, fmt.Errorf("tables: decode request: digest %.80q", r.Digest)
	}
	copy(v.EvidenceDigest[:], b)
	v.Revision = r.Revision
	return v, nil
}

func (t *tx) Request(tenant string, id fleet.RequestID) (fleet.Request, error) {
	r, err := t.q.GetRequest(t.ctx, db.GetRequestParams{Tenant: tenant, ID: string(id)})
	if err != nil {
		return fleet.Request{}, wrap("read", "request", err)
	}
	return requestOf(r)
}

func (t *tx) Requests(tenant string, state *fleet.RequestState, count int) ([]fleet.Request, error) {
	if state != nil {
		rows, err := t.q.ListRequestsByState(t.ctx, db.ListRequestsByStateParams{Tenant: tenant, State: state.String(), Count: int64(count)})
		return list(rows, err, "requests", requestOf)
	}
	rows, err := t.q.ListRequests(t.ctx, db.ListRequestsParams{Tenant: tenant, Count: int64(count)})
	return list(rows, err, "requests", requestOf)
}

func (t *tx) RequestsAfter(tenant string, state *fleet.RequestState, after fleet.RequestID, count int) ([]fleet.Request, error) {
	r, err := t.q.GetRequest(t.ctx, db.GetRequestParams{Tenant: tenant, ID: string(after)})
	if err != nil {
		return nil, wrap("read", "request", err)
	}
	if state != nil {
		rows, err := t.q.ListRequestsByStateAfter(t.ctx, db.ListRequestsByStateAfterParams{
			Tenant: tenant, State: state.String(), FirstSeen: r.FirstSeen, ID: r.ID, Count: int64(count),
		})
		return list(rows, err, "requests", requestOf)
	}
	rows, err := t.q.ListRequestsBefore(t.ctx, db.ListRequestsBeforeParams{Tenant: tenant, FirstSeen: r.FirstSeen, ID: r.ID, Count: int64(count)})
	return list(rows, err, "requests", requestOf)
}

func (t *tx) RequestsOfNode(tenant string, node fleet.NodeID) ([]fleet.Request, error) {
	rows, err := t.q.ListRequestsOfNode(t.ctx, db.ListRequestsOfNodeParams{Tenant: tenant, Node: string(node)})
	return list(rows, err, "requests", requestOf)
}

func (t *tx) FindRequests(tenant, prefix string, count int) ([]fleet.RequestID, error) {
	rows, err := t.q.FindRequests(t.ctx, db.FindRequestsParams{Tenant: tenant, Low: prefix, High: beyond(prefix), Count: int64(count)})
	return list(rows, err, "requests", func(s string) (fleet.RequestID, error) { return fleet.RequestID(s), nil })
}

func (t *tx) LookAlikes(tenant string, node fleet.NodeID, serial, uuid string, count int) ([]fleet.Request, error) {
	rows, err := t.q.ListLookAlikes(t.ctx, db.ListLookAlikesParams{
		Tenant: tenant, Node: string(node), Serial: serial, Uuid: uuid, Count: int64(count),
	})
	return list(rows, err, "requests", requestOf)
}

func (t *tx) CountUnverified(tenant string) (int, error) {
	n, err := t.q.CountUnverified(t.ctx, tenant)
	return int(n), wrap("count", "requests", err)
}

func (t *tx) CountRequests(tenant string) (map[fleet.RequestState]int, error) {
	rows, err := t.q.CountRequests(t.ctx, tenant)
	if err != nil {
		return nil, wrap("count", "requests", err)
	}
	out := make(map[fleet.RequestState]int)
	for _, r := range rows {
		var s fleet.RequestState
		if err := s.UnmarshalText([]byte(r.State)); err != nil {
			return nil, fmt.Errorf("tables: count requests: %w", err)
		}
		out[s] = int(r.N)
	}
	return out, nil
}

func (t *tx) AddRequest(v fleet.Request) error {
	t.changed(store.ChangedRequest, v.Tenant, string(v.ID))
	body, err := encode("request", v)
	if err != nil {
		return err
	}
	return wrap("write", "request", t.q.InsertRequest(t.ctx, db.InsertRequestParams{
		Tenant: v.Tenant, ID: string(v.ID), Node: string(v.Node), Words: v.Words, State: v.State.String(),
		Identity: v.Identity.String(), Serial: v.Evidence.Serial, Uuid: v.Evidence.UUID,
		Digest: hex.EncodeToString(v.EvidenceDigest[:]), FirstSeen: stamp(v.FirstSeen), Revision: v.Revision, Body: body,
	}))
}

func (t *tx) PutRequest(v fleet.Request, seen int64) error {
	t.changed(store.ChangedRequest, v.Tenant, string(v.ID))
	body, err := encode("request", v)
	if err != nil {
		return err
	}
	n, err := t.q.UpdateRequest(t.ctx, db.UpdateRequestParams{
		Tenant: v.Tenant, ID: string(v.ID), Node: string(v.Node), State: v.State.String(), Revision: v.Revision,
		Digest: hex.EncodeToString(v.EvidenceDigest[:]), Body: body, Seen: seen,
	})
	return replaced("request", n, err)
}

func issuedOf(r db.Issued) (store.Issued, error) {
	var v store.Issued
	err := decode("issued certificate", r.Body, &v)
	return v, err
}

func (t *tx) Issued(tenant string, id fleet.RequestID) (store.Issued, error) {
	r, err := t.q.LatestIssued(t.ctx, db.LatestIssuedParams{Tenant: tenant, Request: string(id)})
	if err != nil {
		return store.Issued{}, wrap("read", "issued certificate", err)
	}
	return issuedOf(r)
}

func (t *tx) IssuedToNode(tenant string, id fleet.NodeID) ([]store.Issued, error) {
	rows, err := t.q.ListIssuedOfNode(t.ctx, db.ListIssuedOfNodeParams{Tenant: tenant, Node: string(id)})
	return list(rows, err, "issued certificates", issuedOf)
}

func (t *tx) AddIssued(v store.Issued) error {
	body, err := encode("issued certificate", v)
	if err != nil {
		return err
	}
	return wrap("write", "issued certificate", t.q.InsertIssued(t.ctx, db.InsertIssuedParams{
		Tenant: v.Tenant, Serial: v.Serial, Request: string(v.Request), Node: string(v.Node),
		LdevidKey: v.LDevIDKey.String(), NotBefore: stamp(v.NotBefore), NotAfter: stamp(v.NotAfter), Body: body,
	}))
}

func denialOf(r db.Denial) (store.Denial, error) {
	ek, err := fleet.ParseEKHash(r.Ek)
	if err != nil {
		return store.Denial{}, fmt.Errorf("tables: decode denial: %w", err)
	}
	return store.Denial{Tenant: r.Tenant, EK: ek, Node: fleet.NodeID(r.Node), Reason: r.Reason, Actor: r.Actor, At: clock(r.At)}, nil
}

func (t *tx) Denial(tenant string, ek fleet.EKHash) (store.Denial, error) {
	r, err := t.q.GetDenial(t.ctx, db.GetDenialParams{Tenant: tenant, Ek: ek.String()})
	if err != nil {
		return store.Denial{}, wrap("read", "denial", err)
	}
	return denialOf(r)
}

func (t *tx) Denials(tenant string) ([]store.Denial, error) {
	rows, err := t.q.ListDenials(t.ctx, tenant)
	return list(rows, err, "denials", denialOf)
}

func (t *tx) PutDenial(d store.Denial) error {
	t.changed(store.ChangedDenial, d.Tenant, string(d.Node))
	return wrap("write", "denial", t.q.PutDenial(t.ctx, db.PutDenialParams{
		Tenant: d.Tenant, Ek: d.EK.String(), Node: string(d.Node), Reason: d.Reason, Actor: d.Actor, At: stamp(d.At),
	}))
}

func (t *tx) RemoveDenials(tenant string, node fleet.NodeID) error {
	t.changed(store.ChangedDenial, tenant, string(node))
	_, err := t.q.DeleteDenials(t.ctx, db.DeleteDenialsParams{Tenant: tenant, Node: string(node)})
	return wrap("delete", "denials", err)
}
