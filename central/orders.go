package central

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/failpoint"
)

const (
	defaultOrderLife = 24 * time.Hour
	maxOrderLife     = 30 * 24 * time.Hour
)

// clusterOrders are the kinds that `muster order` gives.
var clusterOrders = []fleet.OrderKind{fleet.OrderFound, fleet.OrderReset, fleet.OrderRestore, fleet.OrderDissolve}

// newOrderID draws an ID that people can type.
func newOrderID() string {
	b := make([]byte, 10)
	rand.Read(b)
	return "o-" + strings.ToLower(base32.StdEncoding.EncodeToString(b))
}

// wish is what a person wants a node to do.
type wish struct {
	kind                            fleet.OrderKind
	node, site                      string
	snapshot, cluster, into, reason string
	// disk and image are as a person names them: see describeSystemOrder.
	disk, image         string
	keepData, overwrite bool
	life                time.Duration
	seenEpoch           uint64
	dry                 bool
}

// promise is an order with what a person should know of it.
type promise struct {
	order    fleet.IssuedOrder
	sentence string
	warnings []string
	epoch    uint64
}

// order signs an order for a node: what it says, the founding right that goes
// with it, and its audit record are one transaction.
func (s *Server) order(ctx context.Context, c caller, w wish) (p promise, err error) {
	id := newOrderID()
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		onSystem := slices.Contains(systemOrders, w.kind)
		if !onSystem && !slices.Contains(clusterOrders, w.kind) {
			return &enroll.Refused{Why: fmt.Sprintf("there are no orders of kind %.40q", w.kind), Do: "one of install, wipe, recover, downgrade, clear-failed, found, reset, restore, dissolve"}
		}
		look := c.part(t)
		n, err := look.findNode(w.node)
		if err != nil {
			return err
		}
		at := w.site
		if at == "" && onSystem {
			if at = n.Site; at == "" {
				return &enroll.Refused{Why: fmt.Sprintf("node %s belongs to no site, and orders are for nodes of a site", n.ID), Do: "muster assign " + string(n.ID) + " --site SITE"}
			}
		}
		site, err := look.findSite(at)
		if err != nil {
			return err
		}
		if err := look.may(access.Order, access.Change, site.Name); err != nil {
			return err
		}
		if !n.Admitted() || n.Site != site.Name {
			return &enroll.Refused{Why: fmt.Sprintf("node %s does not belong to site %s", n.ID, site.Name), Do: "`muster describe site " + site.Name + "` lists its nodes"}
		}
		if !n.MayServe && w.kind != fleet.OrderDissolve && !onSystem {
			return &enroll.Refused{Why: fmt.Sprintf("node %s may not be a server", n.ID), Do: "assign it again with --role-hint server, or choose another node"}
		}
		if w.life <= 0 {
			w.life = defaultOrderLife
		}
		o := fleet.Order{
			Format: fleet.OrderFormat, ID: id, Tenant: c.Tenant, Site: site.Name, Node: n.ID, Kind: w.kind, Reason: text.Clean(w.reason, maxReason),
			Issued: by.now.UTC(), NotAfter: by.now.Add(min(w.life, maxOrderLife)).UTC(),
		}
		if onSystem {
			p, err = s.describeSystemOrder(t, site, n, w, &o)
		} else {
			p, err = describeOrder(t, site, n, w, &o)
		}
		if err != nil {
			return err
		}
		if err := o.Validate(); err != nil {
			return &enroll.Refused{Why: err.Error()}
		}
		open, err := t.OpenOrders(c.Tenant, site.Name, "", maxNodeOrders)
		if err != nil {
			return err
		}
		for _, other := range open {
			if onSystem && by.now.Before(other.NotAfter) && other.Node == n.ID && other.Kind == w.kind && w.kind != fleet.OrderClearFailed {
				return &enroll.Refused{
					Why: fmt.Sprintf("order %s (%s) for %s stands already", other.ID, other.Kind, fleet.Words(n.ID)),
					Do:  "let it end, or: muster order withdraw " + other.ID,
				}
			}
			if !onSystem && by.now.Before(other.NotAfter) && slices.Contains(clusterOrders, other.Kind) && other.Kind != fleet.OrderDissolve && w.kind != fleet.OrderDissolve {
				return &enroll.Refused{
					Why: fmt.Sprintf("order %s (%s) for %s stands at this site: two of them could make two clusters", other.ID, other.Kind, fleet.Words(other.Node)),
					Do:  "let it end, or: muster order withdraw " + other.ID,
				}
			}
		}
		if len(open) >= maxNodeOrders {
			return &enroll.Refused{Why: fmt.Sprintf("%d orders stand at site %s", len(open), site.Name), Do: "withdraw some: muster get orders"}
		}
		p.order = fleet.IssuedOrder{Order: o, State: fleet.OrderOpen, By: by.actor, Changed: by.now.UTC()}
		if w.dry {
			return errDry
		}
		if o.Version, err = t.NextVersion(); err != nil {
			return err
		}
		p.order.Order = o
		envelope, err := s.scribe.sign(c.Tenant, fleet.OrderPayload, o)
		if err != nil {
			return err
		}
		if err := t.AddOrder(store.Order{IssuedOrder: p.order, Envelope: envelope}); err != nil {
			return err
		}
		before := clusterForAudit(site)
		if w.kind == fleet.OrderFound {
			// The old right and the old cluster end with the person's word.
			endCluster(&site, site.Status.ClusterUID)
			site.Ledger.Grant = &fleet.FoundingGrant{Node: n.ID, At: by.now.UTC()}
			site.Status.ClusterUID, site.Status.ClusterEpoch, site.Status.ClusterVersion, site.Status.Founder, site.Status.Members = "", 0, 0, "", nil
			epoch, err := t.Epoch()
			if err != nil {
				return err
			}
			site.Ledger.Sure, site.Ledger.Doubt = epoch, ""
		}
		site.Ledger.Documents = o.Version
		if _, err := t.PutSite(site); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, audit.OrderIssued, "order/"+o.ID, before, o, w.reason); err != nil {
			return err
		}
		if _, err := t.AddEvent(cleanEvent(fleet.Event{
			Tenant: c.Tenant, Time: by.now, Level: fleet.EventWarning, Kind: "order.issued", Node: n.ID, Site: site.Name,
			Text: fmt.Sprintf("%s ordered %s at site %s: %s", by.actor, o.Kind, site.Name, p.sentence),
		})); err != nil {
			return err
		}
		failpoint.Hit("order.before-commit")
		return nil
	})
	if errors.Is(err, errDry) {
		return p, nil
	}
	if err == nil {
		failpoint.Hit("order.after-commit")
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return p, err
}

// describeOrder fills the cluster's part of the order and says in a sentence
// what it does.
func describeOrder(t store.Reader, site fleet.Site, n fleet.Node, w wish, o *fleet.Order) (p promise, err error) {
	st, who := site.Status, fleet.Words(n.ID)
	warn := func(format string, args ...any) { p.warnings = append(p.warnings, fmt.Sprintf(format, args...)) }
	p.epoch = st.ClusterEpoch
	uid := w.cluster
	if uid == "" {
		uid = st.ClusterUID
	}
	if w.seenEpoch != 0 && w.seenEpoch != st.ClusterEpoch {
		return p, fmt.Errorf("%w: the cluster of site %s is in epoch %d", store.ErrConflict, site.Name, st.ClusterEpoch)
	}
	unknown := &enroll.Refused{
		Why: fmt.Sprintf("the centre knows no cluster of site %s", site.Name),
		Do:  "wait until a node reports it, or name it: --cluster UID",
	}
	// An order's epoch is above all that nodes can have reached alone since
	// they reported: each of their resets adds one.
	next := st.ClusterEpoch + orderEpochStep
	switch w.kind {
	case fleet.OrderFound:
		p.sentence = fmt.Sprintf("%s starts a new, empty cluster at site %s.", who, site.Name)
		if st.ClusterUID != "" {
			p.sentence = fmt.Sprintf("%s starts a new, empty cluster at site %s; cluster %s is declared lost, with all that it stored.", who, site.Name, st.ClusterUID)
			warn("If a server of cluster %s comes back, it stays fenced and its data is not used.", st.ClusterUID)
			for _, id := range st.Members {
				m, err := t.Node(n.Tenant, id)
				if err == nil && m.Admitted() {
					warn("%s was a server of it: if it lives, `muster order reset` loses less.", fleet.Words(id))
				}
			}
		}
	case fleet.OrderReset:
		if uid == "" {
			return p, unknown
		}
		o.Cluster, o.Epoch = uid, next
		p.sentence = fmt.Sprintf("%s goes on as the only server of cluster %s with its own data, in epoch %d; all others come back as workers.", who, uid, o.Epoch)
		if st.ClusterUID == uid && !slices.Contains(st.Members, n.ID) {
			warn("%s is not known as a confirmed server: it may have no data, or old data.", who)
		}
		if len(st.Members) > 1 {
			warn("What other servers acknowledged and %s had not stored is lost.", who)
		}
	case fleet.OrderRestore:
		if uid == "" {
			return p, unknown
		}
		o.Cluster, o.Epoch, o.Snapshot = uid, next, w.snapshot
		from := fmt.Sprintf("snapshot %s on its own disk", w.snapshot)
		if fleet.ValidateEscrowID(w.snapshot) == nil {
			b, err := t.Escrow(n.Tenant, w.snapshot)
			if errors.Is(err, store.ErrNotFound) || err == nil && (b.For != n.ID || b.Site != site.Name) {
				return p, &enroll.Refused{
					Why: fmt.Sprintf("snapshot %s was not handed to %s", w.snapshot, who),
					Do:  fmt.Sprintf("open the sealed snapshot and hand it over: muster escrow open ID --key FILE --for %s", n.ID),
				}
			}
			if err != nil {
				return p, err
			}
			if b.Cluster != "" && b.Cluster != uid {
				return p, &enroll.Refused{Why: fmt.Sprintf("snapshot %s is of cluster %s, not of %s", w.snapshot, b.Cluster, uid), Do: "name the cluster it is of: --cluster " + b.Cluster}
			}
			from = fmt.Sprintf("snapshot %s, taken %s", w.snapshot, b.Taken.UTC().Format(time.RFC3339))
		}
		p.sentence = fmt.Sprintf("%s becomes the only server of cluster %s with the data of %s, in epoch %d; what came later is lost, and all others come back as workers.", who, uid, from, o.Epoch)
	case fleet.OrderDissolve:
		if uid == "" {
			return p, unknown
		}
		o.Cluster, o.Into = uid, w.into
		p.sentence = fmt.Sprintf("Cluster %s is given up, with all that it stored; its nodes join cluster %s.", uid, w.into)
		if w.into != st.ClusterUID && w.into != st.Second {
			warn("No node of site %s has shown cluster %s.", site.Name, w.into)
		}
	}
	return p, nil
}

// orderEpochStep is how far above the last known epoch an order's is.
const orderEpochStep = 16

// findOrder finds what the caller sees.
func (p *part) findOrder(id string) (store.Order, error) {
	id = wanted(id)
	t, tenant := p.t, p.Tenant
	none := &errNoSuch{fmt.Sprintf("there is no order %.80q in tenant %s", id, tenant), "`muster get orders` lists them"}
	if id == "" || len(id) > 64 {
		return store.Order{}, none
	}
	ids, err := t.FindOrders(tenant, id, 50)
	if err != nil {
		return store.Order{}, err
	}
	var found []store.Order
	for _, i := range ids {
		o, err := t.Order(tenant, i)
		if err != nil {
			return o, err
		}
		if sees, err := p.sees(access.Order, o.Site); err != nil {
			return o, err
		} else if sees {
			found = append(found, o)
		}
	}
	switch {
	case len(found) == 0:
		return store.Order{}, none
	case len(found) > 1 && found[0].ID != id:
		var fits []string
		for _, o := range found[:min(len(found), 6)] {
			fits = append(fits, o.ID)
		}
		return store.Order{}, &errAmbiguous{id, fits}
	}
	return found[0], nil
}

// withdraw ends an order that its node has not begun. A node that has it and
// is out of reach may carry it out all the same: the answer says so.
func (s *Server) withdraw(ctx context.Context, c caller, id, reason string) (o fleet.IssuedOrder, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		look := c.part(t)
		found, err := look.findOrder(id)
		if err != nil {
			return err
		}
		if err := look.may(access.Order, access.Change, found.Site); err != nil {
			return err
		}
		o = found.IssuedOrder
		before := o.State
		if o.State, err = o.State.MoveTo(fleet.OrderWithdrawn); err != nil {
			return &enroll.Refused{Why: fmt.Sprintf("order %s is %s: it cannot be withdrawn", o.ID, before)}
		}
		o.Changed = by.now.UTC()
		if o, err = t.PutOrder(o); err != nil {
			return err
		}
		site, err := t.Site(c.Tenant, o.Site)
		if err != nil {
			return err
		}
		// The nodes notice by the revision that something is to be fetched.
		if site.Ledger.Documents, err = t.NextVersion(); err != nil {
			return err
		}
		if g := site.Ledger.Grant; o.Kind == fleet.OrderFound && g != nil && g.Node == o.Node && g.UID == "" {
			site.Ledger.Grant = nil
		}
		if _, err := t.PutSite(site); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, audit.OrderWithdrawn, "order/"+o.ID, map[string]any{"state": before}, map[string]any{"state": o.State}, reason); err != nil {
			return err
		}
		_, err = t.AddEvent(cleanEvent(fleet.Event{
			Tenant: c.Tenant, Time: by.now, Kind: "order.withdrawn", Node: o.Node, Site: o.Site,
			Text: fmt.Sprintf("order %s (%s) was withdrawn by %s: %s", o.ID, o.Kind, by.actor, reason),
		}))
		return err
	})
	if err == nil {
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return o, err
}

// outcome keeps what a node says of one of its orders. What is not known or
// not the node's is passed over: the node shall stop saying it.
func (s *Server) outcome(t store.Tx, by act, e nodeEntry, id fleet.NodeID, m *musterv1.OrderOutcome) error {
	if len(m.Id) > 64 {
		return nil
	}
	o, err := t.Order(e.tenant, m.Id)
	if errors.Is(err, store.ErrNotFound) || err == nil && o.Node != id {
		return nil
	}
	if err != nil {
		return err
	}
	to := fleet.OrderState(m.State)
	if m.State < 0 || m.State > musterv1.OrderState_ORDER_STATE_WITHDRAWN || to != fleet.OrderRunning && to != fleet.OrderDone && to != fleet.OrderFailed {
		return nil
	}
	before := o.State
	if before == fleet.OrderOpen {
		// It came on another way: from a peer.
		before = fleet.OrderDelivered
	}
	next, err := before.MoveTo(to)
	if err != nil {
		return nil // it said so before, or it ended otherwise
	}
	o.State, o.Text, o.Changed = next, text.Clean(m.Text, maxSentence), by.now.UTC()
	if _, err := t.PutOrder(o.IssuedOrder); err != nil {
		return err
	}
	level := fleet.EventInfo
	if next == fleet.OrderFailed {
		level = fleet.EventAlarm
	}
	if next != fleet.OrderRunning {
		if err := by.record(t, e.tenant, audit.OrderFinished, "order/"+o.ID, map[string]any{"state": before}, map[string]any{"state": next, "text": o.Text}, ""); err != nil {
			return err
		}
	}
	_, err = t.AddEvent(cleanEvent(fleet.Event{
		Tenant: e.tenant, Time: by.now, Level: level, Kind: "order." + next.String(), Node: id, Site: o.Site,
		Text: fmt.Sprintf("order %s (%s) is %s at %s: %s", o.ID, o.Kind, next, fleet.Words(id), o.Text),
	}))
	return err
}

// expireOrders ends orders that were not begun in time.
func (s *Server) expireOrders(ctx context.Context) error {
	tenants := make(map[string]bool)
	err := s.store.Update(ctx, func(t store.Tx) error {
		ended, err := t.EndedOrders(DefaultTenant, s.cfg.Now(), sweepBatch)
		if err != nil {
			return err
		}
		for _, o := range ended {
			before := o.State
			if o.State, err = o.State.MoveTo(fleet.OrderExpired); err != nil {
				return err
			}
			o.Changed = s.cfg.Now().UTC()
			if _, err := t.PutOrder(o.IssuedOrder); err != nil {
				return err
			}
			if _, err := t.AddEvent(cleanEvent(fleet.Event{
				Tenant: o.Tenant, Time: o.Changed, Level: fleet.EventWarning, Kind: "order.expired", Node: o.Node, Site: o.Site,
				Text: fmt.Sprintf("order %s (%s) for %s has expired; it was %s", o.ID, o.Kind, fleet.Words(o.Node), before),
			})); err != nil {
				return err
			}
			tenants[o.Tenant] = true
		}
		return nil
	})
	for t := range tenants {
		s.hub.changed(eventsTopic(t))
	}
	return err
}
