package central

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/failpoint"
)

// maxSiteNodes bounds the nodes a site ever had: each leaves an admission and
// perhaps a removal on every other node's disk.
const maxSiteNodes = 1000

// Labels that the centre makes from a machine's hardware. A label that a
// person gave the node wins.
const (
	labelCPUs   = "muster/cpus"
	labelMemory = "muster/memory-gib"
	labelGPU    = "muster/gpu"
	labelCamera = "muster/camera"
	labelVendor = "muster/vendor"
	labelModel  = "muster/model"
	labelSpin   = "muster/disk"
)

// hardwareLabels turns claims about hardware into labels that the site's
// scheduler can use. They are as true as the machine is honest.
func hardwareLabels(h fleet.Hardware) map[string]string {
	out := make(map[string]string)
	if h.CPUs > 0 {
		out[labelCPUs] = strconv.Itoa(h.CPUs)
	}
	if gib := h.MemoryBytes >> 30; gib > 0 {
		out[labelMemory] = strconv.FormatInt(gib, 10)
	}
	for key, claim := range map[string]string{labelVendor: h.Vendor, labelModel: h.Product} {
		if v := text.ForLabel(claim); v != "" {
			out[key] = v
		}
	}
	for _, d := range h.Devices {
		switch class := strings.ToLower(d.Class); {
		// PCI class 03 is display, 12 processing accelerators; USB class 0e
		// is video.
		case d.Bus == "pci" && (strings.HasPrefix(class, "0x03") || strings.HasPrefix(class, "03") || strings.HasPrefix(class, "0x12") || strings.HasPrefix(class, "12")):
			out[labelGPU] = "true"
		case d.Bus == "usb" && (strings.HasPrefix(class, "0x0e") || strings.HasPrefix(class, "0e")):
			out[labelCamera] = "true"
		}
	}
	for _, d := range h.Disks {
		switch {
		case d.Removable:
		case d.Rotational && out[labelSpin] == "":
			out[labelSpin] = "spinning"
		case !d.Rotational:
			out[labelSpin] = "flash"
		}
	}
	return out
}

// admissionOf is the admission that the node shall have, without version and
// time.
func admissionOf(n fleet.Node, address string) fleet.Admission {
	labels := hardwareLabels(n.Hardware)
	maps.Copy(labels, n.Labels)
	for key := range hardwareLabels(n.Hardware) {
		if len(labels) <= fleet.MaxLabels {
			break
		}
		if _, chosen := n.Labels[key]; !chosen {
			delete(labels, key)
		}
	}
	return fleet.Admission{
		Format: fleet.AdmissionFormat, Tenant: n.Tenant, Site: n.Site, Node: n.ID, Incarnation: n.Incarnation,
		LDevIDKey: n.LDevIDKey, Labels: labels, MayServe: n.MayServe, Address: address,
	}
}

func sameAdmission(a, b fleet.Admission) bool {
	a.Version, a.Issued = b.Version, b.Issued
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

func admissionNow(t store.Reader, n fleet.Node) (*fleet.Admission, []byte, error) {
	d, err := t.DocumentOfSite(n.Tenant, n.Site, docAdmission, string(n.ID))
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var a fleet.Admission
	if err := said(d.Envelope, &a); err != nil {
		return nil, nil, err
	}
	return &a, d.Envelope, nil
}

// admit brings the node's admission to what it shall be and returns it. The
// caller writes the site.
func (w scribe) admit(t store.Tx, by act, site *fleet.Site, n fleet.Node, reason string) (envelope []byte, a fleet.Admission, err error) {
	if !n.Admitted() || n.Site != site.Name {
		return nil, a, nil
	}
	address, err := addressOf(t, *site, n.ID)
	if err != nil {
		return nil, a, err
	}
	a = admissionOf(n, address)
	old, envelope, err := admissionNow(t, n)
	if err != nil {
		return nil, a, err
	}
	if old != nil && sameAdmission(*old, a) {
		return envelope, *old, nil
	}
	if a.Version, err = t.NextVersion(); err != nil {
		return nil, a, err
	}
	a.Issued = by.now.UTC()
	envelope, err = w.issue(t, by, site, docAdmission, string(n.ID), fleet.AdmissionPayload, a, a.Version, reason)
	return envelope, a, err
}

// addressOf returns the node's in-site address, and gives it one if it has
// none. "" if the site does without.
func addressOf(t store.Tx, site fleet.Site, id fleet.NodeID) (string, error) {
	cidr := site.Spec.Chosen().Birth.NodeCIDR
	all, err := t.Addresses(site.Tenant, site.Name)
	if err != nil {
		return "", err
	}
	if cidr == "" {
		return "", nil
	}
	if a, there := all[id]; there {
		return a.String(), nil
	}
	if len(all) >= maxSiteNodes {
		return "", &enroll.Refused{Why: fmt.Sprintf("site %s has had %d nodes, which is all a site can have", site.Name, len(all)), Do: "start another site"}
	}
	network, err := netip.ParsePrefix(cidr)
	if err != nil {
		return "", fmt.Errorf("central: give address: %w", err)
	}
	// The last one given and one more; addresses are never given twice.
	last := network.Addr()
	for _, a := range all {
		if network.Contains(a) && last.Less(a) {
			last = a
		}
	}
	next := last.Next()
	if !network.Contains(next) || !network.Contains(next.Next()) {
		return "", &enroll.Refused{
			Why: fmt.Sprintf("the node network %s of site %s is used up: addresses are never given twice", cidr, site.Name),
			Do:  "a wider one can be chosen only for a new cluster: muster site set " + site.Name + " --node-cidr",
		}
	}
	return next.String(), t.AddAddress(site.Tenant, site.Name, id, next)
}

// remove signs the end of the node's admission; caller writes node and site.
// A node without a standing admission stays as it is.
func (w scribe) remove(t store.Tx, by act, site *fleet.Site, n *fleet.Node, reason string) (*fleet.Removal, error) {
	if !n.Admitted() || n.Site != site.Name {
		return nil, nil
	}
	version, err := t.NextVersion()
	if err != nil {
		return nil, err
	}
	r := fleet.Removal{
		Format: fleet.RemovalFormat, Tenant: n.Tenant, Site: n.Site, Node: n.ID, Incarnation: n.Incarnation, LDevIDKey: n.LDevIDKey,
		Reason: text.Clean(reason, maxReason), Version: version, Issued: by.now.UTC(),
	}
	if _, err := w.issue(t, by, site, docRemoval, string(n.ID), fleet.RemovalPayload, r, version, reason); err != nil {
		return nil, err
	}
	n.Removed = n.Incarnation
	n.Generation++
	// A founding right of a node that is gone would stand in the way.
	if g := site.Ledger.Grant; g != nil && g.Node == n.ID && site.Status.ClusterUID == "" {
		site.Ledger.Grant = nil
	}
	if err := t.DropSystem(n.Tenant, n.ID); err != nil {
		return nil, err
	}
	return &r, t.DropReport(n.Tenant, n.ID)
}

// expel removes the node from its site, which it also writes. The caller
// writes the node.
func (w scribe) expel(t store.Tx, by act, n *fleet.Node, reason string) (*fleet.Removal, error) {
	if !n.Admitted() {
		return nil, nil
	}
	site, err := t.Site(n.Tenant, n.Site)
	if err != nil {
		return nil, err
	}
	r, err := w.remove(t, by, &site, n, reason)
	if err != nil {
		return nil, err
	}
	_, err = t.PutSite(site)
	return r, err
}

// settle makes what goes with a node's certificate: its admission and the
// charter of its site. was is the node as it was before.
func (w scribe) settle(t store.Tx, by act, was fleet.Node, n *fleet.Node) (documents [][]byte, err error) {
	if was.Admitted() && was.Site != n.Site {
		if _, err := w.expel(t, by, &was, "the node was approved for another place"); err != nil {
			return nil, err
		}
		n.Removed, n.Generation = was.Removed, was.Generation+1
	}
	if n.Site == "" {
		return nil, nil
	}
	if n.Incarnation <= n.Removed {
		n.Incarnation = n.Removed + 1
	}
	site, err := t.Site(n.Tenant, n.Site)
	if err != nil {
		return nil, err
	}
	before := site.Ledger.Documents
	if _, _, _, err := w.charter(t, by, &site, "first node of the site"); err != nil {
		return nil, err
	}
	admission, _, err := w.admit(t, by, &site, *n, "approved")
	if err != nil {
		return nil, err
	}
	documents = append(documents, admission)
	_, charter, err := charterNow(t, n.Tenant, n.Site)
	if err != nil {
		return nil, err
	}
	if charter != nil {
		documents = append(documents, charter)
	}
	if site.Ledger.Documents != before {
		_, err = t.PutSite(site)
	}
	return documents, err
}

// assignment is what a person says about a node and a site.
type assignment struct {
	id, site, reason string
	revision         int64
	worker           bool
	labels           map[string]string
	createSite       bool
}

// assign admits a node of the pool to a site.
func (s *Server) assign(ctx context.Context, c caller, a assignment) (n fleet.Node, admission fleet.Admission, created bool, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		n, admission, created, err = s.assignIn(t, c.act(s.cfg.Now()), c, a)
		if err == nil {
			failpoint.Hit("assign.before-commit")
		}
		return err
	})
	if err == nil {
		failpoint.Hit("assign.after-commit")
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return n, admission, created, err
}

// assignIn is assign inside a transaction.
func (s *Server) assignIn(t store.Tx, by act, c caller, a assignment) (n fleet.Node, admission fleet.Admission, created bool, err error) {
	look := c.part(t)
	if n, err = look.findNode(a.id); err != nil {
		return n, admission, created, err
	}
	if err := look.may(access.Node, access.Change, a.site); err != nil {
		return n, admission, created, err
	}
	if a.revision != 0 && a.revision != n.Revision {
		return n, admission, created, fmt.Errorf("%w: node %s is at revision %d", store.ErrConflict, n.ID, n.Revision)
	}
	switch {
	case n.State == fleet.NodeDenied:
		return n, admission, created, &enroll.Refused{Why: fmt.Sprintf("node %s is denied", n.ID), Do: "muster allow " + string(n.ID)}
	case n.Site != "" && n.Site != a.site:
		return n, admission, created, &enroll.Refused{Why: fmt.Sprintf("node %s belongs to site %s", n.ID, n.Site), Do: fmt.Sprintf("muster remove %s --reason ..., then assign it", n.ID)}
	}
	if created, err = s.ensureSite(t, by, c.Tenant, a.site, a.createSite); err != nil {
		return n, admission, created, err
	}
	before := map[string]any{"site": n.Site, "may_serve": n.MayServe, "labels": n.Labels}
	n.Site, n.MayServe = a.site, !a.worker
	if a.labels != nil {
		n.Labels = a.labels
	}
	if n.Incarnation <= n.Removed {
		n.Incarnation = n.Removed + 1
	}
	n.Generation++
	site, err := t.Site(c.Tenant, a.site)
	if err != nil {
		return n, admission, created, err
	}
	if _, _, _, err := s.scribe.charter(t, by, &site, "first node of the site"); err != nil {
		return n, admission, created, err
	}
	if _, admission, err = s.scribe.admit(t, by, &site, n, a.reason); err != nil {
		return n, admission, created, err
	}
	if _, err := t.PutSite(site); err != nil {
		return n, admission, created, err
	}
	if n, err = s.place(t, n); err != nil {
		return n, admission, created, err
	}
	if err := by.record(t, c.Tenant, audit.NodeAssigned, "node/"+string(n.ID), before,
		map[string]any{"site": n.Site, "may_serve": n.MayServe, "labels": n.Labels, "incarnation": n.Incarnation}, a.reason); err != nil {
		return n, admission, created, err
	}
	if _, err := t.AddEvent(cleanEvent(fleet.Event{
		Tenant: c.Tenant, Time: by.now, Kind: "node.assigned", Node: n.ID, Site: n.Site,
		Text: fmt.Sprintf("%s belongs to site %s now (%s)", n.Words, n.Site, by.actor),
	})); err != nil {
		return n, admission, created, err
	}
	return n, admission, created, nil
}

// place writes the node, and its live request as well: what a later
// certificate says about site and labels comes from there.
func (s *Server) place(t store.Tx, n fleet.Node) (fleet.Node, error) {
	r, err := t.Request(n.Tenant, n.Request)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return n, err
	case r.State.Live() && (r.Site != n.Site || !maps.Equal(r.Labels, n.Labels)):
		seen := r.Revision
		r.Site, r.Labels = n.Site, n.Labels
		r.Revision++
		if err := t.PutRequest(r, seen); err != nil {
			return n, err
		}
	}
	return t.PutNode(n)
}

// removeNode takes a node out of its site, into the pool.
func (s *Server) removeNode(ctx context.Context, c caller, id string, revision int64, reason string) (n fleet.Node, removal *fleet.Removal, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		look := c.part(t)
		if n, err = look.findNode(id); err != nil {
			return err
		}
		if err := look.may(access.Node, access.Change, n.Site); err != nil {
			return err
		}
		if revision != 0 && revision != n.Revision {
			return fmt.Errorf("%w: node %s is at revision %d", store.ErrConflict, n.ID, n.Revision)
		}
		if !n.Admitted() {
			return &enroll.Refused{Why: fmt.Sprintf("node %s belongs to no site", n.ID)}
		}
		from := n.Site
		if removal, err = s.scribe.expel(t, by, &n, reason); err != nil {
			return err
		}
		n.Site, n.MayServe = "", false
		if n, err = s.place(t, n); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, audit.NodeRemoved, "node/"+string(n.ID), map[string]any{"site": from}, map[string]any{"incarnation": n.Removed}, reason); err != nil {
			return err
		}
		if _, err := t.AddEvent(cleanEvent(fleet.Event{
			Tenant: c.Tenant, Time: by.now, Level: fleet.EventWarning, Kind: "node.removed", Node: n.ID, Site: from,
			Text: fmt.Sprintf("%s was removed from site %s by %s: %s", n.Words, from, by.actor, reason),
		})); err != nil {
			return err
		}
		failpoint.Hit("remove.before-commit")
		return nil
	})
	if err == nil {
		failpoint.Hit("remove.after-commit")
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return n, removal, err
}
