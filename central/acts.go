package central

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint"
)

// errAmbiguous: a prefix fits more than one object.
type errAmbiguous struct {
	prefix string
	fits   []string
}

func (e *errAmbiguous) Error() string {
	return fmt.Sprintf("%q fits more than one: %s; give more of it", e.prefix, strings.Join(e.fits, ", "))
}

// errNoSuch names what was looked for, and where to look next.
type errNoSuch struct{ what, next string }

func (e *errNoSuch) Error() string { return e.what + "; " + e.next }
func (e *errNoSuch) Unwrap() error { return store.ErrNotFound }

// wanted brings what people type to the form of IDs and words.
func wanted(id string) string { return strings.Join(strings.Fields(strings.ToLower(id)), " ") }

// findRequest finds what the caller sees.
func (p *part) findRequest(id string) (fleet.Request, error) {
	id = wanted(id)
	t, tenant := p.t, p.Tenant
	none := &errNoSuch{fmt.Sprintf("there is no request %.80q in tenant %s", id, tenant), "`muster get requests` lists them"}
	if id == "" || len(id) > 128 {
		return fleet.Request{}, none
	}
	if fleet.RequestID(id).Validate() == nil {
		r, err := t.Request(tenant, fleet.RequestID(id))
		if errors.Is(err, store.ErrNotFound) {
			return r, none
		}
		if err != nil {
			return r, err
		}
		if sees, err := p.sees(access.Request, r.Site); err != nil || !sees {
			return fleet.Request{}, cmp.Or(err, error(none))
		}
		return r, nil
	}
	ids, err := t.FindRequests(tenant, id, 50)
	if err != nil {
		return fleet.Request{}, err
	}
	// A node's ended requests do not make its words ambiguous.
	var found []fleet.Request
	for _, i := range ids {
		r, err := t.Request(tenant, i)
		if err != nil {
			return r, err
		}
		if sees, err := p.sees(access.Request, r.Site); err != nil {
			return r, err
		} else if !sees {
			continue
		}
		if r.State.Live() || len(found) == 0 || !found[0].State.Live() {
			found = append(found, r)
		}
	}
	switch len(found) {
	case 0:
		return fleet.Request{}, none
	case 1:
		return found[0], nil
	}
	var fits []string
	for _, r := range found[:min(len(found), 5)] {
		fits = append(fits, fmt.Sprintf("%s (%s)", r.ID, r.Words))
	}
	return fleet.Request{}, &errAmbiguous{id, fits}
}

// findNode finds what the caller sees.
func (p *part) findNode(id string) (fleet.Node, error) {
	id = wanted(id)
	t, tenant := p.t, p.Tenant
	none := &errNoSuch{fmt.Sprintf("there is no node %.80q in tenant %s", id, tenant), "`muster get nodes` lists them"}
	if id == "" || len(id) > 128 {
		return fleet.Node{}, none
	}
	ids, err := t.FindNodes(tenant, id, 50)
	if err != nil {
		return fleet.Node{}, err
	}
	var found []fleet.Node
	for _, i := range ids {
		n, err := t.Node(tenant, i)
		if err != nil {
			return n, err
		}
		if sees, err := p.sees(access.Node, n.Site); err != nil {
			return n, err
		} else if sees {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return fleet.Node{}, none
	case 1:
		return found[0], nil
	}
	var fits []string
	for _, n := range found[:min(len(found), 6)] {
		fits = append(fits, fmt.Sprintf("%s (%s)", n.ID, n.Words))
	}
	return fleet.Node{}, &errAmbiguous{id, fits}
}

// approval is what a person says about a request.
type approval struct {
	id         string
	revision   int64 // 0: whatever is there
	site       string
	labels     map[string]string
	reason     string
	createSite bool
}

// approve lets a machine become a node: policy, request, audit and events in
// one transaction.
func (s *Server) approve(ctx context.Context, c caller, a approval) (r fleet.Request, created bool, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		created = false
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		look := c.part(t)
		old, err := look.findRequest(a.id)
		if err != nil {
			return err
		}
		if err := look.may(access.Request, access.Decide, a.site); err != nil {
			return err
		}
		if old.Supersedes != "" && wanted(a.id) != string(old.ID) {
			return &enroll.Refused{
				Why: fmt.Sprintf("words and beginnings of IDs name a machine, and this one has changed its evidence since request %s", old.Supersedes),
				Do:  fmt.Sprintf("look at what changed (`muster describe request %s`), then approve that whole ID", old.ID),
			}
		}
		if a.revision == 0 {
			a.revision = old.Revision
		}
		var fact enroll.Fact
		r, fact, err = enroll.Approve(by.now, old, enroll.Approval{
			Ruling: enroll.Ruling{Revision: a.revision, Actor: by.actor, Reason: a.reason},
			Site:   a.site, Labels: a.labels, Policy: s.approvalPolicy(tenant),
		})
		if err != nil {
			return err
		}
		if a.site != "" {
			if created, err = s.ensureSite(t, by, c.Tenant, a.site, a.createSite); err != nil {
				return err
			}
		}
		if err := t.PutRequest(r, old.Revision); err != nil {
			return err
		}
		if err := by.facts(t, []enroll.Fact{fact}, []fleet.Request{r}); err != nil {
			return err
		}
		failpoint.Hit("approve.before-commit")
		return nil
	})
	if err != nil {
		return r, false, err
	}
	failpoint.Hit("approve.after-commit")
	s.log.Info("request approved", logRequest, r.ID, logNode, r.Node, logActor, c.actor())
	s.changed(r)
	return r, created, nil
}

func (s *Server) changed(r fleet.Request) {
	s.hub.changed(requestTopic(r.ID))
	s.hub.changed(eventsTopic(r.Tenant))
}

// approvalPolicy is the tenant's policy beyond the default; there is no
// exception so far but for lab tenants whose centre was told so at its start.
func (s *Server) approvalPolicy(t fleet.Tenant) enroll.Policy {
	return enroll.Policy{Lab: t.Lab, UnknownBoot: s.cfg.LabUnknownBoot, Unverified: s.cfg.LabUnverified}
}

// ensureSite makes the site if it is not there and create says so.
func (s *Server) ensureSite(t store.Tx, by act, tenant, name string, create bool) (bool, error) {
	_, err := t.Site(tenant, name)
	if !errors.Is(err, store.ErrNotFound) {
		return false, err
	}
	if !create {
		return false, &errNoSuch{fmt.Sprintf("there is no site %q in tenant %s", name, tenant), "give the name of one in `muster get sites`, or allow its creation"}
	}
	_, _, _, err = s.makeSite(t, by, fleet.Site{Meta: fleet.Meta{Tenant: tenant, Name: name}}, "first use in an approval")
	return err == nil, err
}

// reject turns a request down.
func (s *Server) reject(ctx context.Context, c caller, id string, revision int64, reason string) (r fleet.Request, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		look := c.part(t)
		old, err := look.findRequest(id)
		if err != nil {
			return err
		}
		if err := look.may(access.Request, access.Decide, old.Site); err != nil {
			return err
		}
		if revision == 0 {
			revision = old.Revision
		}
		var fact enroll.Fact
		if r, fact, err = enroll.Reject(by.now, old, enroll.Ruling{Revision: revision, Actor: by.actor, Reason: reason}); err != nil {
			return err
		}
		if err := t.PutRequest(r, old.Revision); err != nil {
			return err
		}
		return by.facts(t, []enroll.Fact{fact}, []fleet.Request{r})
	})
	if err != nil {
		return r, err
	}
	s.changed(r)
	return r, nil
}

// deny puts a node and the EKs it showed, but for those of other machines, on
// the deny list and rejects its live request. id may also be that of a machine that is no node yet.
func (s *Server) deny(ctx context.Context, c caller, id string, revision int64, reason string) (n fleet.Node, err error) {
	var ended []fleet.Request
	err = s.store.Update(ctx, func(t store.Tx) error {
		ended = nil
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		look := c.part(t)
		n, err = look.findNode(id)
		switch {
		case errors.Is(err, store.ErrNotFound):
			// No node yet: deny the machine behind the request.
			r, rerr := look.findRequest(id)
			if rerr != nil {
				return errors.Join(err, rerr)
			}
			if err := look.mayMachine(r); err != nil {
				return err
			}
			n = fleet.Node{ID: r.Node, Tenant: c.Tenant, Words: r.Words, State: fleet.NodeDenied, EK: r.Evidence.EK, Aliases: r.Evidence.Aliases, Hardware: r.Evidence.Hardware, Reason: reason}
		case err != nil:
			return err
		default:
			if err := look.may(access.Node, access.Change, n.Site); err != nil {
				return err
			}
			if revision != 0 && revision != n.Revision {
				return fmt.Errorf("%w: node %s is at revision %d", store.ErrConflict, n.ID, n.Revision)
			}
			before := n.State
			if n.State, err = n.State.MoveTo(fleet.NodeDenied); err != nil {
				return &enroll.Refused{Why: fmt.Sprintf("node %s is %s already", n.ID, before)}
			}
			n.Reason = reason
			if _, err := s.scribe.expel(t, by, &n, "denied: "+reason); err != nil {
				return err
			}
			if n, err = t.PutNode(n); err != nil {
				return err
			}
		}
		ended, err = denyMachine(t, by, n, reason)
		return err
	})
	if err != nil {
		return n, err
	}
	s.index.put(n)
	for _, r := range ended {
		s.changed(r)
	}
	s.hub.changed(eventsTopic(c.Tenant))
	s.log.Info("node denied", logNode, n.ID, logActor, c.actor())
	return n, nil
}

// denyMachine puts the machine's EKs on the deny list and rejects its live
// request; the node's row is the caller's.
func denyMachine(t store.Tx, by act, n fleet.Node, reason string) (ended []fleet.Request, err error) {
	var eks []fleet.EKHash
	var spared []fleet.EKHash
	for i, ek := range append([]fleet.EKHash{n.EK}, n.Aliases...) {
		// Aliases are the machine's word: it must not take another
		// machine down with it by naming that one's EK.
		if others, err := t.RequestsOfNode(n.Tenant, ek.NodeID()); err != nil {
			return nil, err
		} else if i > 0 && len(others) > 0 {
			spared = append(spared, ek)
			continue
		}
		eks = append(eks, ek)
		if err := t.PutDenial(store.Denial{Tenant: n.Tenant, EK: ek, Node: n.ID, Reason: reason, Actor: by.actor, At: by.now}); err != nil {
			return nil, err
		}
	}
	after := map[string]any{"eks": eks}
	text := fmt.Sprintf("%s was denied by %s: %s", n.Words, by.actor, reason)
	if len(spared) > 0 {
		after["not_denied"] = spared
		text += fmt.Sprintf(" (it also named an EK of %s, which is a machine of its own here and was not denied)", spared[0].NodeID())
	}
	if err := by.record(t, n.Tenant, audit.NodeDenied, "node/"+string(n.ID), nil, after, reason); err != nil {
		return nil, err
	}
	requests, err := t.RequestsOfNode(n.Tenant, n.ID)
	if err != nil {
		return nil, err
	}
	if r, fact, ok := enroll.Deny(by.now, requests, enroll.Ruling{Actor: by.actor, Reason: reason}); ok {
		seen := make(map[fleet.RequestID]int64)
		for _, q := range requests {
			seen[q.ID] = q.Revision
		}
		if err := writeRequest(t, r, seen); err != nil {
			return nil, err
		}
		if err := by.facts(t, []enroll.Fact{fact}, []fleet.Request{r}); err != nil {
			return nil, err
		}
		ended = append(ended, r)
	}
	_, err = t.AddEvent(cleanEvent(fleet.Event{Tenant: n.Tenant, Time: by.now, Level: fleet.EventWarning, Kind: "node.denied", Node: n.ID, Text: text}))
	return ended, err
}

// allow takes a node off the deny list. It has to enroll again: its rejected
// request goes back into the queue.
func (s *Server) allow(ctx context.Context, c caller, id string, revision int64, reason string) (n fleet.Node, err error) {
	var reopened []fleet.Request
	err = s.store.Update(ctx, func(t store.Tx) error {
		reopened = nil
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		look := c.part(t)
		n, err = look.findNode(id)
		switch {
		case errors.Is(err, store.ErrNotFound):
			r, rerr := look.findRequest(id)
			if rerr != nil {
				return errors.Join(err, rerr)
			}
			if err := look.mayMachine(r); err != nil {
				return err
			}
			if _, derr := t.Denial(c.Tenant, r.Evidence.EK); errors.Is(derr, store.ErrNotFound) {
				return &enroll.Refused{Why: fmt.Sprintf("machine %s is not denied", r.Node)}
			} else if derr != nil {
				return derr
			}
			n = fleet.Node{ID: r.Node, Tenant: c.Tenant, Words: r.Words, EK: r.Evidence.EK, Aliases: r.Evidence.Aliases}
		case err != nil:
			return err
		default:
			if err := look.may(access.Node, access.Change, n.Site); err != nil {
				return err
			}
			if revision != 0 && revision != n.Revision {
				return fmt.Errorf("%w: node %s is at revision %d", store.ErrConflict, n.ID, n.Revision)
			}
			before := n.State
			if before != fleet.NodeDenied {
				return &enroll.Refused{Why: fmt.Sprintf("node %s is not denied, it is %s", n.ID, before)}
			}
			if n.State, err = before.MoveTo(fleet.NodeApproved); err != nil {
				return err
			}
			// Its certificate was refused meanwhile and stays so.
			n.Reason, n.Certificate = "", fleet.Certificate{}
			if n, err = t.PutNode(n); err != nil {
				return err
			}
		}
		if err := t.RemoveDenials(c.Tenant, n.ID); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, audit.NodeAllowed, "node/"+string(n.ID), nil, nil, reason); err != nil {
			return err
		}
		requests, err := t.RequestsOfNode(c.Tenant, n.ID)
		if err != nil {
			return err
		}
		for _, old := range requests {
			if old.State != fleet.RequestRejected {
				continue
			}
			r, fact, err := enroll.Release(by.now, old, enroll.Ruling{Revision: old.Revision, Actor: by.actor, Reason: reason})
			if err != nil {
				return err
			}
			if err := t.PutRequest(r, old.Revision); err != nil {
				return err
			}
			if err := by.facts(t, []enroll.Fact{fact}, []fleet.Request{r}); err != nil {
				return err
			}
			reopened = append(reopened, r)
		}
		_, err = t.AddEvent(cleanEvent(fleet.Event{Tenant: c.Tenant, Time: by.now, Kind: "node.allowed", Node: n.ID, Text: fmt.Sprintf("%s was allowed again by %s", n.Words, by.actor)}))
		return err
	})
	if err != nil {
		return n, err
	}
	s.index.put(n)
	for _, r := range reopened {
		s.changed(r)
	}
	s.hub.changed(eventsTopic(c.Tenant))
	return n, nil
}
