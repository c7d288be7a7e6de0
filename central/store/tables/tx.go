package tables

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

// tx is one transaction: the queries with the context it was begun with.
type tx struct {
	ctx       context.Context
	q         *db.Queries
	maxEvents int
	changes   map[store.Change]struct{}
	order     []store.Change
}

const (
	settingEpoch   = "epoch"
	settingVersion = "document-version"
	settingTerm    = "leader-term"
)

// encode and decode turn objects into the body column and back.
func encode(object string, v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("tables: encode %s: %w", object, err)
	}
	return string(b), nil
}

func decode(object, body string, v any) error {
	if err := json.Unmarshal([]byte(body), v); err != nil {
		return fmt.Errorf("tables: decode %s: %w", object, err)
	}
	return nil
}

// list maps rows to objects.
func list[R, T any](rows []R, err error, object string, f func(R) (T, error)) ([]T, error) {
	if err != nil {
		return nil, wrap("list", object, err)
	}
	out := make([]T, 0, len(rows))
	for _, r := range rows {
		t, err := f(r)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

func (t *tx) Setting(name string) (string, error) {
	v, err := t.q.GetSetting(t.ctx, name)
	return v, wrap("read", "setting "+name, err)
}

func (t *tx) PutSetting(name, value string) error {
	return wrap("write", "setting "+name, t.q.PutSetting(t.ctx, db.PutSettingParams{Name: name, Value: value}))
}

func (t *tx) Epoch() (uint64, error) { return t.number(settingEpoch) }

func (t *tx) RaiseEpoch() (uint64, error) {
	n, err := t.Epoch()
	if err != nil {
		return 0, err
	}
	n++
	return n, t.PutSetting(settingEpoch, strconv.FormatUint(n, 10))
}

func (t *tx) number(setting string) (uint64, error) {
	s, err := t.Setting(setting)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("tables: read setting %s: %w", setting, err)
	}
	return n, nil
}

func (t *tx) NextVersion() (fleet.DocVersion, error) {
	epoch, err := t.Epoch()
	if err != nil {
		return fleet.DocVersion{}, err
	}
	n, err := t.number(settingVersion)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fleet.DocVersion{}, err
	}
	n++
	return fleet.DocVersion{Epoch: epoch, N: n}, t.PutSetting(settingVersion, strconv.FormatUint(n, 10))
}

func tenantOf(r db.Tenant) (fleet.Tenant, error) {
	var v fleet.Tenant
	err := decode("tenant", r.Body, &v)
	v.Revision, v.Lab = r.Revision, r.Lab != 0
	return v, err
}

func (t *tx) Tenant(name string) (fleet.Tenant, error) {
	r, err := t.q.GetTenant(t.ctx, name)
	if err != nil {
		return fleet.Tenant{}, wrap("read", "tenant", err)
	}
	return tenantOf(r)
}

func (t *tx) Tenants() ([]fleet.Tenant, error) {
	rows, err := t.q.ListTenants(t.ctx)
	return list(rows, err, "tenants", tenantOf)
}

func (t *tx) PutTenant(v fleet.Tenant) (fleet.Tenant, error) {
	seen := v.Revision
	v.Revision++
	body, err := encode("tenant", v)
	if err != nil {
		return v, err
	}
	lab := int64(0)
	if v.Lab {
		lab = 1
	}
	if seen == 0 {
		return v, wrap("write", "tenant", t.q.InsertTenant(t.ctx, db.InsertTenantParams{Name: v.Name, Lab: lab, Body: body}))
	}
	t.changed(store.ChangedTenant, v.Name, "")
	n, err := t.q.UpdateTenant(t.ctx, db.UpdateTenantParams{Name: v.Name, Lab: lab, Body: body, Seen: seen})
	return v, replaced("tenant", n, err)
}

func siteOf(r db.Site) (fleet.Site, error) {
	var v fleet.Site
	err := decode("site", r.Body, &v)
	v.Revision = r.Revision
	return v, err
}

func (t *tx) Site(tenant, name string) (fleet.Site, error) {
	r, err := t.q.GetSite(t.ctx, db.GetSiteParams{Tenant: tenant, Name: name})
	if err != nil {
		return fleet.Site{}, wrap("read", "site", err)
	}
	return siteOf(r)
}

func (t *tx) Sites(tenant, after string, count int) ([]fleet.Site, error) {
	rows, err := t.q.ListSites(t.ctx, db.ListSitesParams{Tenant: tenant, After: after, Count: int64(count)})
	return list(rows, err, "sites", siteOf)
}

func (t *tx) PutSite(v fleet.Site) (fleet.Site, error) {
	t.changed(store.ChangedSite, v.Tenant, v.Name)
	seen := v.Revision
	v.Revision++
	body, err := encode("site", v)
	if err != nil {
		return v, err
	}
	if seen == 0 {
		return v, wrap("write", "site", t.q.InsertSite(t.ctx, db.InsertSiteParams{Tenant: v.Tenant, Name: v.Name, Body: body}))
	}
	n, err := t.q.UpdateSite(t.ctx, db.UpdateSiteParams{Tenant: v.Tenant, Name: v.Name, Body: body, Seen: seen})
	return v, replaced("site", n, err)
}

func nodeOf(r db.Node) (fleet.Node, error) {
	var v fleet.Node
	err := decode("node", r.Body, &v)
	v.Revision, v.LastSeen = r.Revision, clock(r.LastSeen)
	return v, err
}

func (t *tx) Node(tenant string, id fleet.NodeID) (fleet.Node, error) {
	r, err := t.q.GetNode(t.ctx, db.GetNodeParams{Tenant: tenant, ID: string(id)})
	if err != nil {
		return fleet.Node{}, wrap("read", "node", err)
	}
	return nodeOf(r)
}

func (t *tx) Nodes(tenant string, after fleet.NodeID, count int) ([]fleet.Node, error) {
	rows, err := t.q.ListNodes(t.ctx, db.ListNodesParams{Tenant: tenant, After: string(after), Count: int64(count)})
	return list(rows, err, "nodes", nodeOf)
}

// beyond is the first text after all that start with prefix, for the ASCII
// of IDs and words.
func beyond(prefix string) string { return prefix + "\x7f" }

func (t *tx) FindNodes(tenant, prefix string, count int) ([]fleet.NodeID, error) {
	rows, err := t.q.FindNodes(t.ctx, db.FindNodesParams{Tenant: tenant, Low: prefix, High: beyond(prefix), Count: int64(count)})
	return list(rows, err, "nodes", func(s string) (fleet.NodeID, error) { return fleet.NodeID(s), nil })
}

func (t *tx) CountNodes(tenant string) (map[fleet.NodeState]int, error) {
	rows, err := t.q.CountNodes(t.ctx, tenant)
	if err != nil {
		return nil, wrap("count", "nodes", err)
	}
	out := make(map[fleet.NodeState]int)
	for _, r := range rows {
		var s fleet.NodeState
		if err := s.UnmarshalText([]byte(r.State)); err != nil {
			return nil, fmt.Errorf("tables: count nodes: %w", err)
		}
		out[s] = int(r.N)
	}
	return out, nil
}

func (t *tx) PutNode(v fleet.Node) (fleet.Node, error) {
	t.changed(store.ChangedNode, v.Tenant, string(v.ID))
	seen := v.Revision
	v.Revision++
	body, err := encode("node", v)
	if err != nil {
		return v, err
	}
	if seen == 0 {
		return v, wrap("write", "node", t.q.InsertNode(t.ctx, db.InsertNodeParams{
			Tenant: v.Tenant, ID: string(v.ID), Words: v.Words, State: v.State.String(), Site: v.Site, Ek: v.EK.String(),
			LdevidKey: v.LDevIDKey.String(), LastSeen: stamp(v.LastSeen), Body: body,
		}))
	}
	n, err := t.q.UpdateNode(t.ctx, db.UpdateNodeParams{
		Tenant: v.Tenant, ID: string(v.ID), State: v.State.String(), Site: v.Site, Ek: v.EK.String(),
		LdevidKey: v.LDevIDKey.String(), Body: body, Seen: seen,
	})
	return v, replaced("node", n, err)
}

func (t *tx) TouchNode(tenant string, id fleet.NodeID, at time.Time) error {
	return wrap("touch", "node", t.q.TouchNode(t.ctx, db.TouchNodeParams{Tenant: tenant, ID: string(id), At: stamp(at)}))
}

func imageOf(r db.Image) (fleet.Image, error) {
	var v fleet.Image
	err := decode("image", r.Body, &v)
	return v, err
}

func (t *tx) Image(tenant, name, version, arch string) (fleet.Image, error) {
	r, err := t.q.GetImage(t.ctx, db.GetImageParams{Tenant: tenant, Name: name, Version: version, Arch: arch})
	if err != nil {
		return fleet.Image{}, wrap("read", "image", err)
	}
	return imageOf(r)
}

func (t *tx) Images(tenant string) ([]fleet.Image, error) {
	rows, err := t.q.ListImages(t.ctx, tenant)
	return list(rows, err, "images", imageOf)
}

func (t *tx) AddImage(v fleet.Image) error {
	body, err := encode("image", v)
	if err != nil {
		return err
	}
	return wrap("write", "image", t.q.InsertImage(t.ctx, db.InsertImageParams{
		Tenant: v.Tenant, Name: v.Name, Version: v.Version, Arch: v.Arch, Sha256: v.SHA256.String(), Body: body,
	}))
}

func (t *tx) ReleaseKeys(tenant string) ([]store.ReleaseKey, error) {
	rows, err := t.q.ListReleaseKeys(t.ctx, tenant)
	return list(rows, err, "release keys", func(r db.ReleaseKey) (store.ReleaseKey, error) {
		return store.ReleaseKey{Tenant: r.Tenant, KeyID: r.Keyid, PEM: r.Pem, Added: clock(r.Added)}, nil
	})
}

func (t *tx) AddReleaseKey(k store.ReleaseKey) (bool, error) {
	n, err := t.q.InsertReleaseKey(t.ctx, db.InsertReleaseKeyParams{Tenant: k.Tenant, Keyid: k.KeyID, Pem: k.PEM, Added: stamp(k.Added)})
	return n == 1, wrap("write", "release key", err)
}

func (t *tx) CookieKeys() ([]store.CookieKey, error) {
	rows, err := t.q.ListCookieKeys(t.ctx)
	return list(rows, err, "cookie keys", func(r db.CookieKey) (store.CookieKey, error) {
		b, err := hex.DecodeString(r.Sealed)
		if err != nil {
			return store.CookieKey{}, fmt.Errorf("tables: decode cookie key: %w", err)
		}
		return store.CookieKey{ID: r.ID, Created: clock(r.Created), Sealed: b}, nil
	})
}

func (t *tx) AddCookieKey(k store.CookieKey) error {
	return wrap("write", "cookie key", t.q.InsertCookieKey(t.ctx, db.InsertCookieKeyParams{
		ID: k.ID, Created: stamp(k.Created), Sealed: hex.EncodeToString(k.Sealed),
	}))
}

func (t *tx) DropCookieKeysBefore(id int64) error {
	return wrap("delete", "cookie keys", t.q.DeleteCookieKeysBefore(t.ctx, id))
}
