package central

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/internal/failpoint"
)

// makeSite makes a site with its first charter, if one can be signed.
func (s *Server) makeSite(t store.Tx, by act, site fleet.Site, reason string) (fleet.Site, *fleet.Charter, string, error) {
	epoch, err := t.Epoch()
	if err != nil {
		return site, nil, "", err
	}
	site.Generation, site.Created, site.Updated, site.Ledger.Sure = 1, by.now, by.now, epoch
	if err := site.Validate(); err != nil {
		return site, nil, "", &enroll.Refused{Why: err.Error()}
	}
	// The row comes first: documents belong to it.
	if site, err = t.PutSite(site); err != nil {
		return site, nil, "", err
	}
	if err := by.record(t, site.Tenant, audit.SiteCreated, "site/"+site.Name, nil, site, reason); err != nil {
		return site, nil, "", err
	}
	if err := objectEvent(t, by, fleet.Event{Tenant: site.Tenant, Kind: "site.created", Site: site.Name, Text: fmt.Sprintf("site %s was made by %s", site.Name, by.actor)}); err != nil {
		return site, nil, "", err
	}
	c, changed, why, err := s.scribe.charter(t, by, &site, reason)
	if err == nil && changed {
		site, err = t.PutSite(site)
	}
	return site, c, why, err
}

// siteChange is what a person chose for a site.
type siteChange struct {
	name, title, location, reason string
	generation                    int64 // 0: whatever is there
	settings                      *fleet.SiteSettings
	create                        bool
}

// siteChanged is what came of it.
type siteChanged struct {
	site             fleet.Site
	changed, created bool
	charter          *fleet.Charter
	why              string
}

// setSite changes what people chose for a site; the charter that says it is
// signed in the same transaction.
func (s *Server) setSite(ctx context.Context, c caller, q siteChange) (out siteChanged, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		out = siteChanged{}
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		if q.settings != nil {
			if err := checkSettings(t, tenant, *q.settings); err != nil {
				return err
			}
		}
		look := c.part(t)
		old, err := t.Site(c.Tenant, q.name)
		if errors.Is(err, store.ErrNotFound) && q.create {
			out.created, out.changed = true, true
			site := fleet.Site{Meta: fleet.Meta{Tenant: c.Tenant, Name: q.name}, Title: q.title, Location: q.location}
			if err := look.mayMake(site); err != nil {
				return err
			}
			site.Spec.Settings = q.settings
			out.site, out.charter, out.why, err = s.makeSite(t, by, site, q.reason)
			return err
		}
		if errors.Is(err, store.ErrNotFound) {
			return noSite(c.Tenant, q.name)
		}
		if err != nil {
			return err
		}
		if err := look.may(access.Site, access.Change, old.Name); err != nil {
			return err
		}
		if q.generation != 0 && q.generation != old.Generation {
			return fmt.Errorf("%w: site %s is at generation %d", store.ErrConflict, old.Name, old.Generation)
		}
		site := old
		site.Title, site.Location = q.title, q.location
		if q.settings != nil {
			site.Spec.Settings = q.settings
		}
		if out, err = s.rewriteSite(t, by, look, old, site, q.reason); err != nil || !out.changed {
			return err
		}
		failpoint.Hit("site.before-commit")
		return nil
	})
	if err == nil {
		failpoint.Hit("site.after-commit")
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return out, err
}

// rewriteSite brings a site that is there to what site says, with the charter
// that says it to its nodes.
func (s *Server) rewriteSite(t store.Tx, by act, look *part, old, site fleet.Site, reason string) (out siteChanged, err error) {
	was, is := old.Spec.Chosen(), site.Spec.Chosen()
	reborn := !sameJSON(was.Birth, is.Birth)
	if why := birthFrozen(old); reborn && why != "" {
		return out, &enroll.Refused{
			Why: fmt.Sprintf("the birth settings of site %s cannot change any more: %s", old.Name, why),
			Do:  "network ranges, the flannel backend, secrets encryption, disabled parts and max-learners are for a new cluster only",
		}
	}
	if out.changed = !sameJSON(wanted4audit(old), wanted4audit(site)); !out.changed {
		out.site = old
		out.charter, _, err = charterNow(t, site.Tenant, site.Name)
		return out, err
	}
	// Labels say whose a site is: nobody moves one out of their part.
	if !maps.Equal(old.Labels, site.Labels) {
		if err := look.mayMake(site); err != nil {
			return out, err
		}
	}
	site.Generation++
	site.Updated = by.now
	if err := site.Validate(); err != nil {
		return out, &enroll.Refused{Why: err.Error()}
	}
	if _, _, out.why, err = s.scribe.charter(t, by, &site, reason); err != nil {
		return out, err
	}
	if out.charter, _, err = charterNow(t, site.Tenant, site.Name); err != nil {
		return out, err
	}
	if was.Birth.NodeCIDR != is.Birth.NodeCIDR {
		if err := s.readdress(t, by, &site); err != nil {
			return out, err
		}
	}
	if out.site, err = t.PutSite(site); err != nil {
		return out, err
	}
	if err := by.record(t, site.Tenant, audit.SiteChanged, "site/"+site.Name, wanted4audit(old), wanted4audit(out.site), reason); err != nil {
		return out, err
	}
	if !sameJSON(stackForAudit(old), stackForAudit(site)) {
		return out, stackEvent(t, by, site)
	}
	return out, siteEvent(t, by, site)
}

func siteEvent(t store.Tx, by act, site fleet.Site) error {
	return objectEvent(t, by, fleet.Event{Tenant: site.Tenant, Kind: "site.changed", Site: site.Name, Text: fmt.Sprintf("site %s was changed by %s", site.Name, by.actor)})
}

// readdress gives all nodes new in-site addresses. No cluster is known yet.
func (s *Server) readdress(t store.Tx, by act, site *fleet.Site) error {
	if err := t.DropAddresses(site.Tenant, site.Name); err != nil {
		return err
	}
	return eachNodeOf(t, site.Tenant, site.Name, func(n fleet.Node) error {
		_, _, err := s.scribe.admit(t, by, site, n, "the site has another node network")
		return err
	})
}

// wanted4audit is what the audit log keeps of a site.
func wanted4audit(s fleet.Site) any {
	return map[string]any{
		"title": s.Title, "location": s.Location, "labels": s.Labels, "settings": s.Spec.Chosen(), "stack": s.Spec.StackRef(), "generation": s.Generation,
	}
}

func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	if errX != nil || errY != nil {
		return reflect.DeepEqual(a, b)
	}
	return string(x) == string(y)
}

func noSite(tenant, name string) error {
	return &errNoSuch{fmt.Sprintf("there is no site %.80q in tenant %s", name, tenant), "`muster get sites` lists them"}
}

// findSite finds what the caller sees.
func (p *part) findSite(name string) (fleet.Site, error) {
	site, err := p.t.Site(p.Tenant, name)
	if errors.Is(err, store.ErrNotFound) {
		return site, noSite(p.Tenant, name)
	}
	if err != nil {
		return site, err
	}
	if sees, err := p.sees(access.Site, site.Name); err != nil || !sees {
		return fleet.Site{}, cmp.Or(err, noSite(p.Tenant, name))
	}
	return site, nil
}

// checkDelegate takes only keys that package statement takes.
func checkDelegate(der []byte) error {
	return checkKey(der)
}

func checkKey(der []byte) error {
	key, err := parsePKIX(der)
	if err != nil {
		return err
	}
	_, err = statement.KeyID(key)
	return err
}

// confirmSite notes that a person knows how it stands with a site after a
// backup was restored.
func (s *Server) confirmSite(ctx context.Context, c caller, name, reason string) (site fleet.Site, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		epoch, err := t.Epoch()
		if err != nil {
			return err
		}
		look := c.part(t)
		if site, err = look.findSite(name); err != nil {
			return err
		}
		if err := look.may(access.Site, access.Change, name); err != nil {
			return err
		}
		if !site.Ledger.Unsure(epoch) {
			return &enroll.Refused{Why: fmt.Sprintf("there is no doubt about site %s", name)}
		}
		before := site.Ledger
		site.Ledger.Sure, site.Ledger.Doubt = epoch, ""
		if site, err = t.PutSite(site); err != nil {
			return err
		}
		return by.record(t, c.Tenant, audit.SiteConfirmed, "site/"+name, before, site.Ledger, reason)
	})
	return site, err
}

// newer notes when a node holds documents that this database never gave out:
// then it was restored from a backup and nobody said so. It touches memory
// only while all is well.
func (s *Server) newer(ctx context.Context, e nodeEntry, id fleet.NodeID, has fleet.DocVersion) error {
	if e.site == "" || s.sites.get(e.tenant, e.site).documents.Compare(has) >= 0 {
		return nil
	}
	doubted := false
	err := s.store.Update(ctx, func(t store.Tx) error {
		doubted = false
		// The index may be a moment behind the store.
		site, err := t.Site(e.tenant, e.site)
		if err != nil || site.Ledger.Documents.Compare(has) >= 0 || site.Ledger.Doubt != "" {
			return err
		}
		doubted = true
		site.Ledger.Doubt = fmt.Sprintf("node %s holds document %s, and the centre has given this site none after %s: it was restored from an older backup", id, has, site.Ledger.Documents)
		if _, err := t.PutSite(site); err != nil {
			return err
		}
		_, err = t.AddEvent(cleanEvent(fleet.Event{
			Tenant: e.tenant, Time: s.cfg.Now(), Level: fleet.EventAlarm, Kind: "site.doubt", Node: id, Site: e.site,
			Text: site.Ledger.Doubt + "; if a backup was restored, run: muster restored",
		}))
		return err
	})
	if doubted && err == nil {
		s.hub.changed(eventsTopic(e.tenant))
	}
	return err
}

// raiseEpoch begins a new life of the database.
func raiseEpoch(t store.Tx, by act, reason string) (uint64, error) {
	epoch, err := t.RaiseEpoch()
	if err != nil {
		return 0, err
	}
	return epoch, by.record(t, DefaultTenant, audit.BackupRestored, "tenant/"+DefaultTenant,
		map[string]uint64{"epoch": epoch - 1}, map[string]uint64{"epoch": epoch}, reason)
}

// parsePKIX reads a public key in PKIX DER.
func parsePKIX(der []byte) (any, error) {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("no public key in PKIX form: %w", err)
	}
	return key, nil
}
