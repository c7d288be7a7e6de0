package tables

import (
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

func blobOf(r db.Blob) (store.Blob, error) {
	b := store.Blob{Tenant: r.Tenant, Size: r.Size, Stored: clock(r.Stored), By: r.Actor}
	if err := b.SHA256.UnmarshalText([]byte(r.Sha256)); err != nil {
		return b, fmt.Errorf("tables: decode blob: %w", err)
	}
	return b, nil
}

func (t *tx) Blob(tenant string, sha256 fleet.HexBytes) (store.Blob, error) {
	r, err := t.q.GetBlob(t.ctx, db.GetBlobParams{Tenant: tenant, Sha256: sha256.String()})
	if err != nil {
		return store.Blob{}, wrap("read", "blob", err)
	}
	return blobOf(r)
}

func (t *tx) Blobs(tenant string, after fleet.HexBytes, count int) ([]store.Blob, error) {
	rows, err := t.q.ListBlobs(t.ctx, db.ListBlobsParams{Tenant: tenant, After: after.String(), Count: int64(count)})
	return list(rows, err, "blobs", blobOf)
}

func (t *tx) BlobBytes(tenant string) (int64, error) {
	n, err := t.q.SumBlobs(t.ctx, tenant)
	return n, wrap("read", "blobs", err)
}

func (t *tx) AddBlob(b store.Blob) error {
	return wrap("write", "blob", t.q.InsertBlob(t.ctx, db.InsertBlobParams{
		Tenant: b.Tenant, Sha256: b.SHA256.String(), Size: b.Size, Stored: stamp(b.Stored), Actor: b.By,
	}))
}

func (t *tx) DropBlob(tenant string, sha256 fleet.HexBytes) error {
	return wrap("delete", "blob", t.q.DeleteBlob(t.ctx, db.DeleteBlobParams{Tenant: tenant, Sha256: sha256.String()}))
}

func (t *tx) ImageBySHA256(tenant string, sha256 fleet.HexBytes) (fleet.Image, error) {
	r, err := t.q.GetImageBySHA256(t.ctx, db.GetImageBySHA256Params{Tenant: tenant, Sha256: sha256.String()})
	if err != nil {
		return fleet.Image{}, wrap("read", "image", err)
	}
	return imageOf(r)
}

func systemOf(r db.System) (fleet.SystemReport, error) {
	var v fleet.SystemReport
	err := decode("system", r.Body, &v)
	return v, err
}

func (t *tx) System(tenant string, node fleet.NodeID) (fleet.SystemReport, error) {
	r, err := t.q.GetSystem(t.ctx, db.GetSystemParams{Tenant: tenant, Node: string(node)})
	if err != nil {
		return fleet.SystemReport{}, wrap("read", "system", err)
	}
	return systemOf(r)
}

func (t *tx) SystemsOfSite(tenant, site string) ([]fleet.SystemReport, error) {
	rows, err := t.q.ListSystemsOfSite(t.ctx, db.ListSystemsOfSiteParams{Tenant: tenant, Site: site})
	return list(rows, err, "systems", systemOf)
}

func (t *tx) Systems(tenant string, after fleet.NodeID, count int) ([]fleet.SystemReport, error) {
	rows, err := t.q.ListSystems(t.ctx, db.ListSystemsParams{Tenant: tenant, After: string(after), Count: int64(count)})
	return list(rows, err, "systems", systemOf)
}

func (t *tx) PutSystem(v fleet.SystemReport) error {
	body, err := encode("system", v)
	if err != nil {
		return err
	}
	return wrap("write", "system", t.q.PutSystem(t.ctx, db.PutSystemParams{Tenant: v.Tenant, Node: string(v.Node), Site: v.Site, Body: body}))
}

func (t *tx) DropSystem(tenant string, node fleet.NodeID) error {
	return wrap("delete", "system", t.q.DeleteSystem(t.ctx, db.DeleteSystemParams{Tenant: tenant, Node: string(node)}))
}

func stackOf(r db.Stack) (fleet.Stack, error) {
	var v fleet.Stack
	err := decode("stack", r.Body, &v)
	v.Revision = r.Revision
	return v, err
}

func (t *tx) Stack(tenant, name string) (fleet.Stack, error) {
	r, err := t.q.GetStack(t.ctx, db.GetStackParams{Tenant: tenant, Name: name})
	if err != nil {
		return fleet.Stack{}, wrap("read", "stack", err)
	}
	return stackOf(r)
}

func (t *tx) Stacks(tenant string) ([]fleet.Stack, error) {
	rows, err := t.q.ListStacks(t.ctx, tenant)
	return list(rows, err, "stacks", stackOf)
}

func (t *tx) PutStack(v fleet.Stack) (fleet.Stack, error) {
	seen := v.Revision
	v.Revision++
	body, err := encode("stack", v)
	if err != nil {
		return v, err
	}
	if seen == 0 {
		return v, wrap("write", "stack", t.q.InsertStack(t.ctx, db.InsertStackParams{Tenant: v.Tenant, Name: v.Name, Body: body}))
	}
	n, err := t.q.UpdateStack(t.ctx, db.UpdateStackParams{Tenant: v.Tenant, Name: v.Name, Body: body, Seen: seen})
	return v, replaced("stack", n, err)
}

func (t *tx) DeleteStack(tenant, name string, revision int64) error {
	if err := t.q.DeleteStackVersions(t.ctx, db.DeleteStackVersionsParams{Tenant: tenant, Stack: name}); err != nil {
		return wrap("delete", "stack versions", err)
	}
	n, err := t.q.DeleteStack(t.ctx, db.DeleteStackParams{Tenant: tenant, Name: name, Seen: revision})
	return replaced("stack", n, err)
}

func stackVersionOf(r db.StackVersion) (store.StackVersion, error) {
	v := store.StackVersion{
		Tenant: r.Tenant, Stack: r.Stack, Version: r.Version, Published: clock(r.Published), By: r.Actor, KeyID: r.KeyID, Envelope: []byte(r.Envelope),
	}
	if err := v.SHA256.UnmarshalText([]byte(r.Sha256)); err != nil {
		return v, fmt.Errorf("tables: decode stack version: %w", err)
	}
	return v, nil
}

func (t *tx) StackVersion(tenant, stack, version string) (store.StackVersion, error) {
	r, err := t.q.GetStackVersion(t.ctx, db.GetStackVersionParams{Tenant: tenant, Stack: stack, Version: version})
	if err != nil {
		return store.StackVersion{}, wrap("read", "stack version", err)
	}
	return stackVersionOf(r)
}

func (t *tx) StackVersionBySHA256(tenant string, sha256 fleet.HexBytes) (store.StackVersion, error) {
	r, err := t.q.GetStackVersionBySHA256(t.ctx, db.GetStackVersionBySHA256Params{Tenant: tenant, Sha256: sha256.String()})
	if err != nil {
		return store.StackVersion{}, wrap("read", "stack version", err)
	}
	return stackVersionOf(r)
}

func (t *tx) StackVersions(tenant, stack string) ([]store.StackVersion, error) {
	rows, err := t.q.ListStackVersions(t.ctx, db.ListStackVersionsParams{Tenant: tenant, Stack: stack})
	return list(rows, err, "stack versions", stackVersionOf)
}

func (t *tx) AddStackVersion(v store.StackVersion) error {
	return wrap("write", "stack version", t.q.InsertStackVersion(t.ctx, db.InsertStackVersionParams{
		Tenant: v.Tenant, Stack: v.Stack, Version: v.Version, Sha256: v.SHA256.String(), Published: stamp(v.Published), Actor: v.By,
		KeyID: v.KeyID, Envelope: string(v.Envelope),
	}))
}

func (t *tx) DeleteStackVersion(tenant, stack, version string) error {
	n, err := t.q.DeleteStackVersion(t.ctx, db.DeleteStackVersionParams{Tenant: tenant, Stack: stack, Version: version})
	if err == nil && n == 0 {
		return fmt.Errorf("tables: delete stack version: %w", store.ErrNotFound)
	}
	return wrap("delete", "stack version", err)
}

func (t *tx) DeleteSite(tenant, name string, revision int64) error {
	t.changed(store.ChangedSite, tenant, name)
	if err := t.DropAddresses(tenant, name); err != nil {
		return err
	}
	n, err := t.q.DeleteSite(t.ctx, db.DeleteSiteParams{Tenant: tenant, Name: name, Seen: revision})
	return replaced("site", n, err)
}
