package central

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// maxImages is what a charter holds; of more the newest are taken.
const maxImages = 64

// charterOf is the charter that the site's settings and the tenant's images
// make today, without version and time.
func charterOf(t store.Reader, site fleet.Site) (fleet.Charter, error) {
	tenant, err := t.Tenant(site.Tenant)
	if err != nil {
		return fleet.Charter{}, err
	}
	images, err := t.Images(site.Tenant)
	if err != nil {
		return fleet.Charter{}, err
	}
	return charterWith(tenant, images, site), nil
}

// charterWith is charterOf for those who have read tenant and images once for
// many sites. images is not changed.
func charterWith(tenant fleet.Tenant, images []fleet.Image, site fleet.Site) fleet.Charter {
	images = slices.Clone(images)
	set := site.Spec.Chosen()
	if len(set.Images) > 0 {
		images = slices.DeleteFunc(images, func(i fleet.Image) bool { return !slices.Contains(set.Images, i.ID()) })
	}
	slices.SortStableFunc(images, func(a, b fleet.Image) int { return b.Registered.Compare(a.Registered) })
	images = images[:min(len(images), maxImages)]
	slices.SortFunc(images, func(a, b fleet.Image) int {
		return strings.Compare(a.ID()+" "+a.Arch, b.ID()+" "+b.Arch)
	})
	c := fleet.Charter{
		Format: fleet.CharterFormat, Tenant: site.Tenant, Site: site.Name, Lab: tenant.Lab, Founding: set.Founding, Policy: set.Policy,
		Birth: set.Birth, AnyBoot: set.AnyBoot, Delegates: set.Delegates, EscrowKey: tenant.EscrowKey, Images: []fleet.ImageEvidence{},
		Update: set.Update,
	}
	if ref := site.Spec.StackRef(); ref != nil && len(ref.SHA256) > 0 {
		c.Stack = ref
	}
	for _, i := range images {
		c.Images = append(c.Images, fleet.ImageEvidence{
			Name: i.Name, Version: i.Version, Authenticode: i.Authenticode, Kernel: i.Kernel, Loader: i.Loader, PCR11: i.PCR11, SignerCert: i.SignerCert, SHA256: i.SHA256,
		})
	}
	return c
}

// charterNow returns the newest charter of the site, nil without one.
func charterNow(t store.Reader, tenant, site string) (*fleet.Charter, []byte, error) {
	d, err := t.DocumentOfSite(tenant, site, docCharter, site)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var c fleet.Charter
	if err := said(d.Envelope, &c); err != nil {
		return nil, nil, err
	}
	return &c, d.Envelope, nil
}

// charter brings the site's charter to what it shall be. It returns why there
// is none, for a person. The caller writes the site.
func (w scribe) charter(t store.Tx, by act, site *fleet.Site, reason string) (c *fleet.Charter, changed bool, why string, err error) {
	want, err := charterOf(t, *site)
	if err != nil {
		return nil, false, "", err
	}
	old, _, err := charterNow(t, site.Tenant, site.Name)
	if err != nil {
		return nil, false, "", err
	}
	want.Issued = by.now.UTC()
	if err := want.Validate(); err != nil {
		// What nodes hold stays good until something better can be signed.
		return old, false, problemOf(err), nil
	}
	if old != nil && sameCharter(*old, want) {
		return old, false, "", nil
	}
	if want.Version, err = t.NextVersion(); err != nil {
		return nil, false, "", err
	}
	if _, err := w.issue(t, by, site, docCharter, site.Name, fleet.CharterPayload, want, want.Version, reason); err != nil {
		return nil, false, "", err
	}
	site.Spec.Charter = want.Version
	if old != nil {
		_, err = t.AddEvent(cleanEvent(fleet.Event{
			Tenant: site.Tenant, Time: by.now, Kind: "site.charter", Site: site.Name,
			Text: fmt.Sprintf("site %s has charter %s: %s", site.Name, want.Version, reason),
		}))
	}
	return &want, true, "", err
}

func problemOf(err error) string {
	return strings.ReplaceAll(strings.TrimPrefix(err.Error(), "fleet: charter: "), "\n", "; ")
}

func sameCharter(a, b fleet.Charter) bool {
	a.Version, a.Issued = b.Version, b.Issued
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// checkSettings refuses settings that no charter could say, with all reasons.
func checkSettings(t store.Reader, tenant fleet.Tenant, set fleet.SiteSettings) error {
	var errs []error
	errs = append(errs, set.Validate())
	if set.AnyBoot && !tenant.Lab {
		errs = append(errs, errors.New("any-boot is for lab tenants only: it would give tokens to machines that run anything"))
	}
	images, err := t.Images(tenant.Name)
	if err != nil {
		return err
	}
	for _, id := range set.Images {
		if !slices.ContainsFunc(images, func(i fleet.Image) bool { return i.ID() == id }) {
			errs = append(errs, fmt.Errorf("image %q is not registered: `muster get images` lists them", id))
		}
	}
	for i, d := range set.Delegates {
		if err := checkDelegate(d); err != nil {
			errs = append(errs, fmt.Errorf("delegate %d: %w", i, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return &enroll.Refused{Why: err.Error()}
	}
	return nil
}

// birthFrozen says why the birth settings of a site cannot change, "" if they
// can.
func birthFrozen(site fleet.Site) string {
	switch {
	case site.Status.ClusterUID != "":
		return fmt.Sprintf("cluster %s was born with them on %s's word", site.Status.ClusterUID, site.Status.Founder)
	case site.Ledger.Grant != nil:
		return fmt.Sprintf("node %s was given the right to found the cluster and may be doing it", site.Ledger.Grant.Node)
	}
	return ""
}

// refreshEvery is how often all charters and admissions are compared with
// what they shall be, beside each change that calls for it: a crash between a
// change of the tenant and the charters of its sites is mended here.
const refreshEvery = time.Hour

// refresh keeps all sites' documents as the tenant wants them, as soon as
// s.stale says that something changed here.
func (s *Server) refresh(ctx context.Context) error {
	for {
		select {
		case <-s.stale:
			s.refreshNow(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// refreshHourly does the same now and then for what nobody said.
func (s *Server) refreshHourly(ctx context.Context) error {
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	for {
		s.refreshNow(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Server) refreshNow(ctx context.Context) {
	if err := s.refreshAll(ctx); err != nil && ctx.Err() == nil {
		s.log.Error("charters not renewed", logError, err)
	}
}

// documentsStale asks for a refresh soon.
func (s *Server) documentsStale() {
	select {
	case s.stale <- struct{}{}:
	default: // one is waiting already
	}
}

func (s *Server) refreshAll(ctx context.Context) error {
	for after := ""; ; {
		due, last, err := s.refreshDue(ctx, DefaultTenant, after)
		if err != nil {
			return err
		}
		for _, name := range due {
			if err := s.refreshSite(ctx, DefaultTenant, name, "what the tenant wants has changed"); err != nil {
				// One site that cannot be mended must not keep it from others.
				s.log.Error("documents not renewed", logSite, name, logError, err)
			}
			if ctx.Err() != nil {
				return nil
			}
		}
		if last == "" {
			return nil
		}
		after = last
	}
}

// refreshSite brings charter and admissions of one site to what they shall be.
func (s *Server) refreshSite(ctx context.Context, tenant, name, reason string) error {
	err := s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: "system", now: s.cfg.Now()}
		site, err := t.Site(tenant, name)
		if err != nil {
			return err
		}
		before := site.Ledger.Documents
		if _, _, _, err := s.scribe.charter(t, by, &site, reason); err != nil {
			return err
		}
		if err := eachNodeOf(t, tenant, name, func(n fleet.Node) error {
			_, _, err := s.scribe.admit(t, by, &site, n, reason)
			return err
		}); err != nil {
			return err
		}
		if site.Ledger.Documents == before {
			return nil
		}
		_, err = t.PutSite(site)
		return err
	})
	if err == nil {
		s.hub.changed(eventsTopic(tenant))
	}
	return err
}

// refreshBatch is how many sites one look takes: it holds no lock that a
// writer wants, and one snapshot of the database.
const refreshBatch = 200

// refreshDue looks at the sites after a name without the writer's lock, since
// mostly nothing is due. last is "" at the end.
func (s *Server) refreshDue(ctx context.Context, tenant, after string) (due []string, last string, err error) {
	err = s.store.View(ctx, func(t store.Reader) error {
		due, last = nil, ""
		owner, err := t.Tenant(tenant)
		if err != nil {
			return err
		}
		images, err := t.Images(tenant)
		if err != nil {
			return err
		}
		sites, err := t.Sites(tenant, after, refreshBatch)
		if err != nil {
			return err
		}
		for _, site := range sites {
			is, err := s.isDue(t, site, charterWith(owner, images, site))
			if err != nil {
				return err
			}
			if is {
				due = append(due, site.Name)
			}
		}
		if len(sites) == refreshBatch {
			last = sites[len(sites)-1].Name
		}
		return nil
	})
	return due, last, err
}

// isDue reports whether a document of the site is not as it shall be.
func (s *Server) isDue(t store.Reader, site fleet.Site, want fleet.Charter) (due bool, err error) {
	old, _, err := charterNow(t, site.Tenant, site.Name)
	if err != nil {
		return false, err
	}
	want.Issued = s.cfg.Now().UTC()
	if want.Validate() == nil && (old == nil || !sameCharter(*old, want)) {
		return true, nil
	}
	err = eachNodeOf(t, site.Tenant, site.Name, func(n fleet.Node) error {
		if due || !n.Admitted() {
			return nil
		}
		a, _, err := admissionNow(t, n)
		if err != nil {
			return err
		}
		due = a == nil || a.Address == "" && want.Birth.NodeCIDR != "" || !sameAdmission(*a, admissionOf(n, a.Address))
		return nil
	})
	return due, err
}

// eachNodeOf calls f for every node of the site.
func eachNodeOf(t store.Reader, tenant, site string, f func(fleet.Node) error) error {
	for after := fleet.NodeID(""); ; {
		nodes, err := t.NodesOfSite(tenant, site, after, 500)
		if err != nil || len(nodes) == 0 {
			return err
		}
		for _, n := range nodes {
			if err := f(n); err != nil {
				return err
			}
		}
		after = nodes[len(nodes)-1].ID
	}
}
