package central

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint"
)

// enrollment is the store as the enrollment service sees it. Each method is
// one transaction that holds the decision of package enroll, the audit
// records of it and the events for those who watch.
type enrollment struct {
	store   store.Store
	hub     *hub
	index   *nodeIndex
	metrics *metrics
	now     func() time.Time
	// scribe signs what goes with a certificate; nil: nothing does.
	scribe *scribe
	// approvals is what people of a tenant may approve today; nil: anything
	// that was approved once is good for a new certificate.
	approvals  func(fleet.Tenant) enroll.Policy
	wrongCodes wrongCodes
	// filed is told of machines that called home, refitted of nodes that came
	// back with other hardware; may be nil.
	filed    func(fleet.Request)
	refitted func(context.Context, fleet.Node)
}

var _ service.Store = (*enrollment)(nil)

const maxLookAlikes = 16

// File implements service.Store.
func (e *enrollment) File(ctx context.Context, f enroll.Filing) (fleet.Request, error) {
	var d enroll.Decision
	var pre preDecision
	var node fleet.Node
	refitted := false
	err := e.store.Update(ctx, func(t store.Tx) error {
		known, err := knownOf(t, f)
		if err != nil {
			return err
		}
		now := e.now()
		if d, err = enroll.File(now, known, f); err != nil {
			return err
		}
		seen := make(map[fleet.RequestID]int64, len(known.Requests))
		for _, r := range known.Requests {
			seen[r.ID] = r.Revision
		}
		if pre, err = e.preApprove(t, now, f, known, &d); err != nil {
			return err
		}
		// Those that end come first: a node never has two live requests, not
		// even between two statements.
		for _, r := range append(d.Others[:len(d.Others):len(d.Others)], d.Request) {
			if err := writeRequest(t, r, seen); err != nil {
				return err
			}
		}
		// Whoever sent the filing is the machine itself; the verdict is ours.
		by := act{actor: "system", source: f.Source, now: now}
		for _, fact := range d.Facts {
			if fact.Kind == enroll.FactPreApproved {
				by.actor = pre.outcome.Actor()
			}
			if err := by.facts(t, []enroll.Fact{fact}, append(d.Others, d.Request)); err != nil {
				return err
			}
		}
		if pre.outcome.Approve {
			if err := t.UsePreApproval(store.Use{
				Tenant: f.Tenant, PreApproval: pre.outcome.Which, EK: f.Evidence.EK, Request: d.Request.ID, At: now,
			}); err != nil {
				return fmt.Errorf("central: use pre-approval %s: %w", pre.outcome.Which, err)
			}
			failpoint.Hit("preapprove.before-commit")
		}
		if node, refitted, err = e.hardware(t, act{actor: "system", source: f.Source, now: now}, d.Request); err != nil {
			return err
		}
		failpoint.Hit("file.before-commit")
		return nil
	})
	switch {
	case errors.Is(err, enroll.ErrDenied):
		e.metrics.filed.WithLabelValues("denied").Inc()
	case errors.Is(err, enroll.ErrFull):
		e.metrics.filed.WithLabelValues("full").Inc()
	case err != nil:
		e.metrics.filed.WithLabelValues("failed").Inc()
	default:
		if pre.outcome.Approve {
			failpoint.Hit("preapprove.after-commit")
		}
		failpoint.Hit("file.after-commit")
		if pre.wrongCode {
			e.wrongCodes.failed(e.now(), f.Source)
		}
		e.metrics.filed.WithLabelValues("filed").Inc()
		e.hub.changed(eventsTopic(f.Tenant))
		for _, r := range append(d.Others, d.Request) {
			e.hub.changed(requestTopic(r.ID))
		}
		if e.filed != nil {
			e.filed(d.Request)
		}
		if refitted {
			e.index.put(node)
			if e.refitted != nil {
				e.refitted(ctx, node)
			}
		}
		return d.Request, nil
	}
	return fleet.Request{}, err
}

func writeRequest(t store.Tx, r fleet.Request, seen map[fleet.RequestID]int64) error {
	revision, there := seen[r.ID]
	if !there {
		return t.AddRequest(r)
	}
	return t.PutRequest(r, revision)
}

func knownOf(t store.Reader, f enroll.Filing) (enroll.Known, error) {
	var known enroll.Known
	var err error
	if known.Requests, err = t.RequestsOfNode(f.Tenant, f.Evidence.EK.NodeID()); err != nil {
		return known, err
	}
	if known.Others, err = t.LookAlikes(f.Tenant, f.Evidence.EK.NodeID(), f.Evidence.Serial, f.Evidence.UUID, maxLookAlikes); err != nil {
		return known, err
	}
	if known.UnverifiedWaiting, err = t.CountUnverified(f.Tenant); err != nil {
		return known, err
	}
	known.Denied, err = denied(t, f.Tenant, []fleet.EKHash{f.Evidence.EK})
	return known, err
}

func denied(t store.Reader, tenant string, eks []fleet.EKHash) (bool, error) {
	for _, ek := range eks {
		_, err := t.Denial(tenant, ek)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, store.ErrNotFound) {
			return false, err
		}
	}
	return false, nil
}

// Request implements service.Store.
func (e *enrollment) Request(ctx context.Context, tenant string, id fleet.RequestID) (r fleet.Request, err error) {
	err = e.store.View(ctx, func(t store.Reader) error {
		r, err = t.Request(tenant, id)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return r, fmt.Errorf("%w: %w", service.ErrNotFound, err)
	}
	return r, err
}

// Issue implements service.Store. The certificate is made inside the
// transaction, so that no other decision comes between the look at the
// request and the commit; it costs the writer one ECDSA signature.
func (e *enrollment) Issue(ctx context.Context, tenant string, id fleet.RequestID, make func(fleet.Request) (enroll.Issued, error)) (enroll.Issued, error) {
	var out enroll.Issued
	var node fleet.Node
	reused := false
	err := e.store.Update(ctx, func(t store.Tx) error {
		now := e.now()
		r, err := t.Request(tenant, id)
		if err != nil {
			return err
		}
		if no, err := denied(t, tenant, append([]fleet.EKHash{r.Evidence.EK}, r.Evidence.Aliases...)); err != nil {
			return err
		} else if no {
			return enroll.ErrDenied
		}
		if err := enroll.MayIssue(now, r, r.Evidence.LDevIDKey); err != nil {
			return err
		}
		last, err := t.Issued(tenant, id)
		switch {
		case errors.Is(err, store.ErrNotFound):
		case err != nil:
			return err
		default:
			// Only what this approval led to: after another decision about the
			// machine it gets a certificate and documents of its own.
			if old := issuedFrom(last); r.State == fleet.RequestIssued && old.Reusable(r.Evidence.LDevIDKey, now) {
				out, reused = old, true
				return nil
			}
		}
		if err := e.allowedToday(t, r); err != nil {
			return err
		}
		if out, err = make(r); err != nil {
			return err
		}
		failpoint.Hit("issue.after-sign")
		issued, fact, err := enroll.Issue(now, r, out)
		if err != nil {
			return err
		}
		var was fleet.Node
		if was, node, err = nodeFor(t, r, out, now); err != nil {
			return err
		}
		if e.scribe != nil {
			documents, err := e.scribe.settle(t, act{actor: "system", now: now}, was, &node)
			if err != nil {
				return err
			}
			out.Documents = append(out.Documents[:len(out.Documents):len(out.Documents)], documents...)
		}
		if err := t.AddIssued(store.Issued{
			Tenant: tenant, Request: id, Node: r.Node, LDevIDKey: out.LDevIDKey, Serial: out.Serial,
			NotBefore: out.NotBefore, NotAfter: out.NotAfter, Certificates: out.Certificates, Documents: out.Documents,
		}); err != nil {
			return err
		}
		if err := t.PutRequest(issued, r.Revision); err != nil {
			return err
		}
		if node, err = t.PutNode(node); err != nil {
			return err
		}
		by := act{actor: "system", source: r.Source, now: now}
		if err := by.facts(t, []enroll.Fact{fact}, []fleet.Request{issued}); err != nil {
			return err
		}
		failpoint.Hit("issue.before-commit")
		return nil
	})
	if errors.Is(err, store.ErrNotFound) {
		return enroll.Issued{}, fmt.Errorf("%w: %w", service.ErrNotFound, err)
	}
	if err != nil {
		return enroll.Issued{}, err
	}
	failpoint.Hit("issue.after-commit")
	if !reused {
		e.index.put(node)
		e.hub.changed(eventsTopic(tenant))
		e.hub.changed(requestTopic(id))
	}
	return out, nil
}

func issuedFrom(i store.Issued) enroll.Issued {
	return enroll.Issued{
		Certificates: i.Certificates, Documents: i.Documents, Serial: i.Serial,
		NotBefore: i.NotBefore, NotAfter: i.NotAfter, LDevIDKey: i.LDevIDKey,
	}
}

// nodeFor is the node as it is before and after the certificate was made. A
// node that was denied stays denied.
func nodeFor(t store.Reader, r fleet.Request, i enroll.Issued, now time.Time) (was, n fleet.Node, err error) {
	n, err = t.Node(r.Tenant, r.Node)
	switch {
	case errors.Is(err, store.ErrNotFound):
		n = fleet.Node{ID: r.Node, Tenant: r.Tenant, Words: r.Words, Created: now, EK: r.Evidence.EK}
	case err != nil:
		return n, n, err
	}
	was = n
	if n.State == fleet.NodeDenied {
		return was, n, enroll.ErrDenied
	}
	if n.Incarnation == 0 && r.Site != "" {
		n.Incarnation = 1
	}
	if n.Site != r.Site || n.Revision == 0 {
		n.Generation++
		n.MayServe = r.Site != ""
	}
	// A renewal (same request, same key) does not make the node wait for its
	// first call again.
	if n.State != fleet.NodeActive || n.Request != r.ID || !slices.Equal(n.LDevIDKey, r.Evidence.LDevIDKey) {
		n.State = fleet.NodeApproved
	}
	n.Site, n.Labels = r.Site, r.Labels
	n.Aliases, n.AKName, n.LDevIDName, n.LDevIDKey = r.Evidence.Aliases, r.Evidence.AKName, r.Evidence.LDevIDName, r.Evidence.LDevIDKey
	n.Identity, n.Boot, n.Image, n.Hardware = r.Identity, r.Boot, r.Image, r.Evidence.Hardware
	n.Request, n.Source, n.LastSeen = r.ID, r.Source, now
	if r.Replaces != "" {
		n.Replaces = r.Replaces
	}
	n.Certificate = fleet.Certificate{Serial: i.Serial, NotBefore: i.NotBefore, NotAfter: i.NotAfter}
	return was, n, nil
}

// Denied implements service.Store.
func (e *enrollment) Denied(ctx context.Context, tenant string, eks []fleet.EKHash) (no bool, err error) {
	err = e.store.View(ctx, func(t store.Reader) error {
		no, err = denied(t, tenant, eks)
		return err
	})
	return no, err
}

// Changed implements service.Store.
func (e *enrollment) Changed(id fleet.RequestID) (<-chan struct{}, func()) {
	return e.hub.wait(requestTopic(id))
}

// act is who does something, from where, when.
type act struct {
	actor, source string
	now           time.Time
}

// auditJSON is how before and after look in an audit record. Nothing is
// nothing, also when it is a nil pointer to something: the audit log refuses
// a bare null.
func auditJSON(v any) (json.RawMessage, error) {
	if v == nil {
		return nil, nil
	}
	b, err := json.Marshal(v)
	if err != nil || string(b) == "null" {
		return nil, err
	}
	return b, nil
}

// record adds an audit record. before and after may be nil.
func (a act) record(t store.Tx, tenant string, kind audit.Kind, object string, before, after any, reason string) error {
	rec := fleet.AuditRecord{Tenant: tenant, Time: a.now, Actor: a.actor, Source: a.source, Kind: kind, Object: object, Reason: reason}
	var err error
	if rec.Before, err = auditJSON(before); err != nil {
		return fmt.Errorf("central: record %s: %w", kind, err)
	}
	if rec.After, err = auditJSON(after); err != nil {
		return fmt.Errorf("central: record %s: %w", kind, err)
	}
	if _, err := t.AddAudit(rec); err != nil {
		return fmt.Errorf("central: record %s: %w", kind, err)
	}
	return nil
}

// facts writes one audit record and one event per fact.
func (a act) facts(t store.Tx, facts []enroll.Fact, requests []fleet.Request) error {
	for _, f := range facts {
		var of fleet.Request
		for _, r := range requests {
			if r.ID == f.Request {
				of = r
			}
		}
		var before any
		if f.Before != f.After {
			before = stateOf{State: f.Before}
		}
		after := stateOf{State: f.After, Node: f.Node, Site: of.Site, Labels: of.Labels, Identity: of.Identity.String(), Boot: of.Boot.String(), Image: of.Image}
		if err := a.record(t, of.Tenant, f.Kind, "request/"+string(f.Request), before, after, f.Reason); err != nil {
			return err
		}
		if _, err := t.AddEvent(cleanEvent(eventOf(a.now, f, of))); err != nil {
			return err
		}
	}
	return nil
}

// stateOf is what the audit log keeps of a request.
type stateOf struct {
	State    fleet.RequestState `json:"state"`
	Node     fleet.NodeID       `json:"node,omitempty"`
	Site     string             `json:"site,omitempty"`
	Labels   map[string]string  `json:"labels,omitempty"`
	Identity string             `json:"identity,omitempty"`
	Boot     string             `json:"boot,omitempty"`
	Image    string             `json:"image,omitempty"`
}

func eventOf(now time.Time, f enroll.Fact, r fleet.Request) fleet.Event {
	e := fleet.Event{
		Tenant: r.Tenant, Time: now, Kind: string(f.Kind), Node: f.Node, Request: f.Request, Site: r.Site,
		MAC: macOf(r.Evidence.Hardware), Text: fmt.Sprintf("%s: %s", r.Words, f.Reason),
	}
	switch f.Kind {
	case enroll.FactFiled:
		e.Text = fmt.Sprintf("%s waits for approval (identity %s, boot %s): %s", r.Words, r.Identity, r.Boot, f.Reason)
	case enroll.FactApproved:
		e.Text = fmt.Sprintf("%s was approved by %s", r.Words, r.DecidedBy)
	case enroll.FactPreApproved:
		e.Text = fmt.Sprintf("%s was approved by %s: %s", r.Words, r.DecidedBy, f.Reason)
	case enroll.FactRejected:
		e.Text, e.Level = fmt.Sprintf("%s was rejected by %s: %s", r.Words, r.DecidedBy, f.Reason), fleet.EventWarning
	case enroll.FactIssued:
		e.Text = fmt.Sprintf("%s got its certificate", r.Words)
	case enroll.FactQuarantined:
		e.Level = fleet.EventAlarm
	case enroll.FactSuperseded:
		e.Level = fleet.EventWarning
	}
	return e
}

// macOf is the address the machine most likely booted from: the first with a
// link. It ties the steps of booting to the request for people who watch.
func macOf(h fleet.Hardware) string {
	first := ""
	for _, n := range h.NICs {
		if n.Link && n.MAC != "" {
			return n.MAC
		}
		if first == "" {
			first = n.MAC
		}
	}
	return first
}
