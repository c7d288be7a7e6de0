package enroll

import (
	"bytes"
	"fmt"
	"maps"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// How long a request waits.
const (
	// PendingFor: nobody decided.
	PendingFor = 14 * 24 * time.Hour
	// ApprovedFor: approved, and the machine did not collect.
	ApprovedFor = 24 * time.Hour
)

// Ruling is what a person or a rule decided.
type Ruling struct {
	// Revision of the request that the person looked at.
	Revision int64
	// Actor is "user:NAME" or "preapproval:NAME".
	Actor string
	// Reason is free text for the audit log; may be empty for an approval.
	Reason string
}

// Approval is a Ruling in favour.
type Approval struct {
	Ruling
	// Site is "" for the pool of unassigned nodes.
	Site   string
	Labels map[string]string
	Policy Policy
}

// Approve lets the machine become a node. The error is ErrConflict, or a
// *Refused that says why and what to do.
func Approve(now time.Time, r fleet.Request, a Approval) (fleet.Request, Fact, error) {
	r, err := look(now, r, a.Ruling)
	if err != nil {
		return r, Fact{}, err
	}
	switch r.State {
	case fleet.RequestPending:
	case fleet.RequestApproved, fleet.RequestIssued:
		return r, Fact{}, &Refused{Why: fmt.Sprintf("it is %s already (%s)", r.State, by(r))}
	case fleet.RequestQuarantined:
		return r, Fact{}, &Refused{Why: "it is in quarantine: " + r.Reason,
			Do: "find out why; then release it, or deny the machine"}
	case fleet.RequestRejected:
		return r, Fact{}, &Refused{Why: fmt.Sprintf("it was rejected (%s)", by(r)), Do: "release it first if that was a mistake"}
	default:
		return r, Fact{}, notLive(r)
	}
	// The digest is computed again from what is shown: the ID that a person
	// approves names this evidence and no other.
	if fleet.RequestIDOf(EvidenceDigest(r.Evidence)) != r.ID ||
		r.Identity != r.Evidence.Identity || r.Boot != r.Evidence.Boot || r.Evidence.EK.NodeID() != r.Node {
		return r, Fact{}, &Refused{Why: "its evidence is not what its ID names", Do: "report this as a fault; do not approve it"}
	}
	if err := a.Policy.Check(r.Identity, r.Boot); err != nil {
		return r, Fact{}, err
	}
	if a.Site != "" {
		if err := fleet.ValidateName("site", a.Site); err != nil {
			return r, Fact{}, &Refused{Why: err.Error()}
		}
	}
	if err := fleet.ValidateLabels(a.Labels); err != nil {
		return r, Fact{}, &Refused{Why: err.Error()}
	}
	was := r.State
	if r, err = move(r, fleet.RequestApproved); err != nil {
		return r, Fact{}, err
	}
	r.Site, r.Labels = a.Site, maps.Clone(a.Labels)
	return decided(now, r, a.Ruling, FactApproved, was)
}

// Reject turns the machine down: this and any other evidence of it, until the
// request is released. An issued request may be rejected, too: it gets no new
// certificate (the old one is ended by denying the node).
func Reject(now time.Time, r fleet.Request, v Ruling) (fleet.Request, Fact, error) {
	return person(now, r, v, fleet.RequestRejected, FactRejected)
}

// Release puts a rejected or quarantined request back into the queue.
// Somebody must still approve it. Requests that are not live come back by
// their machine alone: only it can say that the old evidence holds, and a
// node would else have two live requests.
func Release(now time.Time, r fleet.Request, v Ruling) (fleet.Request, Fact, error) {
	if !r.State.Live() {
		return r, Fact{}, notLive(r)
	}
	// The clock of the next quote is taken as it comes: who releases accepts
	// that it may be behind.
	released := r
	released.Site, released.Labels, released.Replaces, released.Clock = "", nil, "", fleet.TPMClock{}
	return person(now, released, v, fleet.RequestPending, FactReleased)
}

// Isolate puts a live request into quarantine by hand.
func Isolate(now time.Time, r fleet.Request, v Ruling) (fleet.Request, Fact, error) {
	return person(now, r, v, fleet.RequestQuarantined, FactQuarantined)
}

// Deny rejects whatever live request the node has, without asking for a
// revision: denying a node must not lose a race. ok is false if there was
// nothing to change. The deny list itself is the caller's.
func Deny(now time.Time, requests []fleet.Request, v Ruling) (r fleet.Request, f Fact, ok bool) {
	for _, r := range requests {
		if !r.State.Live() || r.State == fleet.RequestRejected {
			continue
		}
		v.Revision = r.Revision
		if out, f, err := person(now, r, v, fleet.RequestRejected, FactRejected); err == nil {
			return out, f, true
		}
	}
	return fleet.Request{}, Fact{}, false
}

// Expire ends a request that waited too long; due is false if it did not. An
// expired request comes back when its machine does.
func Expire(now time.Time, r fleet.Request) (out fleet.Request, f Fact, due bool) {
	since, reason := r.FirstSeen, fmt.Sprintf("nobody decided within %d days", PendingFor/(24*time.Hour))
	if r.DecidedAt.After(since) {
		since = r.DecidedAt
	}
	longest := PendingFor
	switch r.State {
	case fleet.RequestPending:
	case fleet.RequestApproved:
		longest, reason = ApprovedFor, fmt.Sprintf("approved, and the machine did not collect within %d hours", ApprovedFor/time.Hour)
	default:
		return r, Fact{}, false
	}
	if now.Sub(since) < longest {
		return r, Fact{}, false
	}
	was := r.State
	e, err := move(r, fleet.RequestExpired)
	if err != nil {
		return r, Fact{}, false
	}
	e.Reason = reason
	return e, fact(FactExpired, e, was, reason), true
}

// MayIssue returns nil if a certificate for exactly this key may be made for
// the request now. It is asked inside the transaction that issues.
func MayIssue(now time.Time, r fleet.Request, ldevidKey []byte) error {
	if _, _, due := Expire(now, r); due {
		return fmt.Errorf("%w: the approval has expired", ErrNotApproved)
	}
	if r.State != fleet.RequestApproved && r.State != fleet.RequestIssued {
		return fmt.Errorf("%w: it is %s", ErrNotApproved, r.State)
	}
	if len(ldevidKey) == 0 || !bytes.Equal(ldevidKey, r.Evidence.LDevIDKey) {
		return fmt.Errorf("%w: not for this key", ErrNotApproved)
	}
	if fleet.RequestIDOf(EvidenceDigest(r.Evidence)) != r.ID {
		return fmt.Errorf("%w: not for this evidence", ErrNotApproved)
	}
	return nil
}

// Issue is what becomes of a request when its certificate is made: written in
// the same transaction. Issued again (renewal at boot) it stays issued.
func Issue(now time.Time, r fleet.Request, i Issued) (fleet.Request, Fact, error) {
	if err := MayIssue(now, r, i.LDevIDKey); err != nil {
		return r, Fact{}, err
	}
	was, kind := r.State, FactRenewed
	if was == fleet.RequestApproved {
		kind = FactIssued
		var err error
		if r, err = move(r, fleet.RequestIssued); err != nil {
			return r, Fact{}, err
		}
	}
	return r, fact(kind, r, was, "certificate "+i.Serial), nil
}

// Message is the sentence for the screen of a machine whose request is r. It
// holds nothing that people wrote about the machine.
func Message(r fleet.Request) string {
	switch r.State {
	case fleet.RequestPending:
		return "This machine is known and waits for approval."
	case fleet.RequestApproved:
		return "Approved. The certificate is being made."
	case fleet.RequestIssued:
		return "This machine is enrolled."
	case fleet.RequestRejected:
		return "This machine was turned down. Ask your operator."
	case fleet.RequestQuarantined:
		return "Something about this machine must be looked at first. Your operator sees what."
	case fleet.RequestExpired:
		return "The request has run out. The machine asks again by itself."
	case fleet.RequestSuperseded:
		return "Something about this machine has changed. It asks again by itself."
	}
	return ""
}

// look checks that the person decides on what is there.
func look(now time.Time, r fleet.Request, v Ruling) (fleet.Request, error) {
	if v.Actor == "" {
		return r, &Refused{Why: "nobody is named who decides"}
	}
	if v.Revision != r.Revision {
		return r, fmt.Errorf("%w (it was revision %d, is %d)", ErrConflict, v.Revision, r.Revision)
	}
	if _, f, due := Expire(now, r); due {
		return r, &Refused{Why: "it has expired: " + f.Reason,
			Do: "the machine files again by itself when it is switched on; decide on that request"}
	}
	return r, nil
}

func notLive(r fleet.Request) error {
	if r.State == fleet.RequestSuperseded {
		return &Refused{Why: "the machine has shown other evidence since", Do: "decide on the request that took its place"}
	}
	return &Refused{Why: fmt.Sprintf("it is %s", r.State), Do: "the machine files again by itself when it is switched on; decide then"}
}

func person(now time.Time, r fleet.Request, v Ruling, to fleet.RequestState, kind audit.Kind) (fleet.Request, Fact, error) {
	r, err := look(now, r, v)
	if err != nil {
		return r, Fact{}, err
	}
	was := r.State
	moved, err := move(r, to)
	if err != nil {
		return r, Fact{}, &Refused{Why: fmt.Sprintf("it is %s (%s), and cannot become %s", r.State, by(r), to)}
	}
	return decided(now, moved, v, kind, was)
}

func decided(now time.Time, r fleet.Request, v Ruling, kind audit.Kind, was fleet.RequestState) (fleet.Request, Fact, error) {
	r.DecidedBy, r.DecidedAt, r.Reason = v.Actor, now, v.Reason
	return r, fact(kind, r, was, v.Reason), nil
}

func by(r fleet.Request) string {
	if r.DecidedBy == "" {
		return "by itself"
	}
	return fmt.Sprintf("by %s, %s", r.DecidedBy, r.DecidedAt.UTC().Format("2006-01-02 15:04 UTC"))
}
