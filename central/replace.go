package central

import (
	"context"
	"errors"
	"fmt"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint"
)

// release puts a rejected or quarantined request back into the queue.
func (s *Server) release(ctx context.Context, c caller, id string, revision int64, reason string) (r fleet.Request, err error) {
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
		if no, err := denied(t, c.Tenant, []fleet.EKHash{old.Evidence.EK}); err != nil {
			return err
		} else if no {
			return &enroll.Refused{Why: "its machine is denied", Do: "muster allow " + string(old.Node)}
		}
		if revision == 0 {
			revision = old.Revision
		}
		var fact enroll.Fact
		if r, fact, err = enroll.Release(by.now, old, enroll.Ruling{Revision: revision, Actor: by.actor, Reason: reason}); err != nil {
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

// replacement is what a person says about a machine that takes another's
// place.
type replacement struct {
	old, new string
	revision int64 // of the new one's request; 0: whatever is there
	reason   string
	dry      bool
}

// errDry ends the transaction of a dry run.
var errDry = errors.New("central: dry run")

// replace lets a new machine take a node's place, in one transaction: site and
// labels go to its request, which is approved; the old machine is denied; both
// name each other. changes is empty if all of it had been done before.
func (s *Server) replace(ctx context.Context, c caller, p replacement) (old fleet.Node, r fleet.Request, changes []string, err error) {
	var ended []fleet.Request
	err = s.store.Update(ctx, func(t store.Tx) error {
		ended, changes = nil, nil
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		var err error
		look := c.part(t)
		if old, err = look.findNode(p.old); err != nil {
			return err
		}
		seen, err := look.findRequest(p.new)
		if err != nil {
			return err
		}
		// The old machine's site is where the new one goes.
		if err := look.may(access.Node, access.Change, old.Site); err != nil {
			return err
		}
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		revision := p.revision
		if revision == 0 {
			revision = seen.Revision
		}
		var fact enroll.Fact
		var done bool
		r, fact, done, err = enroll.Replace(by.now, old, seen, enroll.Approval{
			Ruling: enroll.Ruling{Revision: revision, Actor: by.actor, Reason: p.reason}, Policy: s.approvalPolicy(tenant),
		})
		if err != nil {
			return err
		}
		if !done {
			if err := t.PutRequest(r, seen.Revision); err != nil {
				return err
			}
			if err := by.facts(t, []enroll.Fact{fact}, []fleet.Request{r}); err != nil {
				return err
			}
			place := "the pool"
			if old.Site != "" {
				place = "site " + old.Site
			}
			changes = append(changes, fmt.Sprintf("request %s is approved for %s, with %d labels of %s", r.ID, place, len(old.Labels), old.ID))
		}
		failpoint.Hit("replace.after-approval")
		if ended, err = s.retire(t, by, &old, r, p.reason, &changes); err != nil {
			return err
		}
		if p.dry {
			return errDry
		}
		failpoint.Hit("replace.before-commit")
		return nil
	})
	if errors.Is(err, errDry) {
		return old, r, changes, nil
	}
	if err != nil {
		return old, r, nil, err
	}
	if len(changes) == 0 {
		return old, r, nil, nil
	}
	failpoint.Hit("replace.after-commit")
	s.index.put(old)
	for _, e := range append(ended, r) {
		s.changed(e)
	}
	s.log.Info("node replaced", logNode, old.ID, logRequest, r.ID, logActor, c.actor())
	return old, r, changes, nil
}

// retire denies the old machine if that is not done, and links it to the new
// one.
func (s *Server) retire(t store.Tx, by act, old *fleet.Node, r fleet.Request, reason string, changes *[]string) (ended []fleet.Request, err error) {
	deny, link := old.State != fleet.NodeDenied, old.ReplacedBy != r.Node
	if !deny && !link {
		return nil, nil
	}
	before := map[string]any{"state": old.State, "site": old.Site}
	if deny {
		if old.State, err = old.State.MoveTo(fleet.NodeDenied); err != nil {
			return nil, err
		}
		old.Reason = reason
		*changes = append(*changes, fmt.Sprintf("node %s and its TPM's endorsement keys are denied", old.ID))
	}
	if link {
		*changes = append(*changes, fmt.Sprintf("node %s is replaced by %s", old.ID, r.Node))
	}
	if deny {
		if _, err := s.scribe.expel(t, by, old, "replaced by "+string(r.Node)+": "+reason); err != nil {
			return nil, err
		}
	}
	old.ReplacedBy = r.Node
	if *old, err = t.PutNode(*old); err != nil {
		return nil, err
	}
	if deny {
		if ended, err = denyMachine(t, by, *old, reason); err != nil {
			return nil, err
		}
	}
	after := map[string]any{"state": old.State, "replaced_by": r.Node, "request": r.ID, "site": r.Site, "labels": r.Labels}
	if err := by.record(t, old.Tenant, audit.NodeReplaced, "node/"+string(old.ID), before, after, reason); err != nil {
		return nil, err
	}
	_, err = t.AddEvent(cleanEvent(fleet.Event{
		Tenant: old.Tenant, Time: by.now, Level: fleet.EventWarning, Kind: "node.replaced", Node: old.ID, Request: r.ID, Site: r.Site,
		Text: fmt.Sprintf("%s takes the place of %s (%s): %s", r.Words, old.Words, by.actor, reason),
	}))
	return ended, err
}

// Release implements the management service.
func (s management) Release(ctx context.Context, q *musterv1.ReleaseRequest) (*musterv1.ReleaseResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	r, err := s.release(ctx, callerOf(ctx), q.Id, q.Revision, reason)
	if err != nil {
		return nil, s.coded(ctx, "releasing", err)
	}
	return &musterv1.ReleaseResponse{Request: api.RequestToProto(r)}, nil
}

// Replace implements the management service.
func (s management) Replace(ctx context.Context, q *musterv1.ReplaceRequest) (*musterv1.ReplaceResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	old, r, changes, err := s.replace(ctx, callerOf(ctx), replacement{old: q.Old, new: q.New, revision: q.Revision, reason: reason, dry: q.DryRun})
	if err != nil {
		return nil, s.coded(ctx, "replacing", err)
	}
	return &musterv1.ReplaceResponse{Old: api.NodeToProto(old), New: api.RequestToProto(r), Changes: changes}, nil
}
