package central

import (
	"context"
	"sync"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// watched is the store with the indexes in memory kept up: what an Update
// wrote about nodes and sites is in them when it returns, whoever wrote it.
type watched struct {
	store.Store
	nodes *nodeIndex
	sites *siteIndex
}

// Update implements store.Store.
func (w *watched) Update(ctx context.Context, f func(store.Tx) error) error {
	var t *watchedTx
	err := w.Store.Update(ctx, func(inner store.Tx) error {
		t = &watchedTx{Tx: inner}
		return f(t)
	})
	if err != nil || t == nil {
		return err
	}
	for _, n := range t.nodes {
		w.nodes.put(n)
	}
	for _, s := range t.sites {
		w.sites.put(s)
	}
	for _, k := range t.gone {
		w.sites.drop(k)
	}
	return nil
}

type watchedTx struct {
	store.Tx
	nodes []fleet.Node
	sites []fleet.Site
	gone  []siteKey
}

// DeleteSite implements store.Tx.
func (t *watchedTx) DeleteSite(tenant, name string, revision int64) error {
	err := t.Tx.DeleteSite(tenant, name, revision)
	if err == nil {
		t.gone = append(t.gone, siteKey{tenant, name})
	}
	return err
}

// PutNode implements store.Tx.
func (t *watchedTx) PutNode(n fleet.Node) (fleet.Node, error) {
	n, err := t.Tx.PutNode(n)
	if err == nil {
		t.nodes = append(t.nodes, n)
	}
	return n, err
}

// PutSite implements store.Tx.
func (t *watchedTx) PutSite(s fleet.Site) (fleet.Site, error) {
	s, err := t.Tx.PutSite(s)
	if err == nil {
		t.sites = append(t.sites, s)
	}
	return s, err
}

type siteKey struct{ tenant, name string }

// siteEntry is what answering a report needs to know of the node's site.
type siteEntry struct {
	documents fleet.DocVersion
	revision  int64
}

// siteIndex holds all sites of the centre.
type siteIndex struct {
	mu    sync.RWMutex
	sites map[siteKey]siteEntry
}

func newSiteIndex() *siteIndex { return &siteIndex{sites: make(map[siteKey]siteEntry)} }

func (x *siteIndex) put(s fleet.Site) {
	x.mu.Lock()
	defer x.mu.Unlock()
	k := siteKey{s.Tenant, s.Name}
	if old := x.sites[k]; old.revision <= s.Revision {
		x.sites[k] = siteEntry{documents: s.Ledger.Documents, revision: s.Revision}
	}
}

// drop forgets a site that was deleted: one of the same name begins at
// revision 1 again.
func (x *siteIndex) drop(k siteKey) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.sites, k)
}

func (x *siteIndex) get(tenant, name string) siteEntry {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.sites[siteKey{tenant, name}]
}

func (x *siteIndex) load(ctx context.Context, s store.Store, tenant string) error {
	return s.View(ctx, func(t store.Reader) error {
		return eachSite(t, tenant, func(site fleet.Site) error {
			x.put(site)
			return nil
		})
	})
}

// eachSite calls f for every site of the tenant.
func eachSite(t store.Reader, tenant string, f func(fleet.Site) error) error {
	for after := ""; ; {
		sites, err := t.Sites(tenant, after, 500)
		if err != nil || len(sites) == 0 {
			return err
		}
		for _, s := range sites {
			if err := f(s); err != nil {
				return err
			}
		}
		after = sites[len(sites)-1].Name
	}
}
