package enroll

import (
	"fmt"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// How much one machine, or a crowd of unproven ones, may put into the store.
const (
	DefaultMaxUnverified = 1000
	// MaxChanges is how many requests one node may cause in ChangeWindow. A
	// machine can change what it says of itself at will.
	MaxChanges   = 32
	ChangeWindow = 30 * 24 * time.Hour
	// maxWarnings bounds the warnings kept with a request.
	maxWarnings = 32
)

// Action is what File decided.
type Action uint8

const (
	// Keep: the evidence is known, the request stays what it is.
	Keep Action = iota
	// Create: a new request.
	Create
	// Supersede: a new request takes the place of one with other evidence.
	Supersede
	// Reopen: a request that was expired or superseded is pending again.
	Reopen
	// Quarantine: a request is, or starts, in quarantine.
	Quarantine
)

var actionNames = [...]string{"keep", "create", "supersede", "reopen", "quarantine"}

// String returns "keep", "create", "supersede", "reopen" or "quarantine".
func (a Action) String() string {
	if int(a) < len(actionNames) {
		return actionNames[a]
	}
	return fmt.Sprintf("action(%d)", a)
}

// Decision is what is to be written, in one transaction, and why.
type Decision struct {
	Action Action
	// Reason is a sentence for people.
	Reason string
	// Request is the node's live request from now on: write it as it is, with
	// the Revision it has.
	Request fleet.Request
	// Others are other requests of the node that changed: write them too.
	Others []fleet.Request
	// Facts go into the audit log, in order. A replay has none.
	Facts []Fact
}

// Fact is what the audit log shall say about one change of a request. The
// caller adds time, actor and source.
type Fact struct {
	Kind    audit.Kind
	Request fleet.RequestID
	Node    fleet.NodeID
	// Before and After are states; equal for a new request.
	Before, After fleet.RequestState
	Reason        string
}

// Kinds of facts. Release is a reopening, too.
const (
	FactFiled       = audit.RequestFiled
	FactReopened    = audit.RequestReopened
	FactSuperseded  = audit.RequestSuperseded
	FactQuarantined = audit.RequestQuarantined
	FactExpired     = audit.RequestExpired
	FactApproved    = audit.RequestApproved
	FactRejected    = audit.RequestRejected
	FactReleased    = audit.RequestReopened
	FactIssued      = audit.CertificateIssued
	FactRenewed     = audit.CertificateRenewed
)

// File decides what a proved machine's filing means for its requests. The
// same filing once more gives Keep, no facts and the same revision. The error
// is ErrDenied, ErrFull or a fault in the arguments; then nothing is written.
func File(now time.Time, known Known, f Filing) (Decision, error) {
	if known.Denied {
		return Decision{}, ErrDenied
	}
	fresh := newRequest(now, known, f)
	d := Decision{}
	var live, same *fleet.Request
	recent := 0
	requests := slices.Clone(known.Requests)
	for i := range requests {
		r := &requests[i]
		if r.Node != fresh.Node || r.Tenant != fresh.Tenant {
			return Decision{}, fmt.Errorf("enroll: file: request %s of %s/%s is not of node %s/%s", r.ID, r.Tenant, r.Node, fresh.Tenant, fresh.Node)
		}
		if expired, fact, due := Expire(now, *r); due {
			*r = expired
			d.Facts = append(d.Facts, fact)
			if r.ID != fresh.ID {
				d.Others = append(d.Others, *r)
			}
		}
		if r.State.Live() {
			if live != nil {
				return Decision{}, fmt.Errorf("enroll: file: node %s has two live requests, %s and %s", fresh.Node, live.ID, r.ID)
			}
			live = r
		}
		if r.ID == fresh.ID {
			same = r
		}
		if now.Sub(r.FirstSeen) < ChangeWindow {
			recent++
		}
	}
	switch {
	case live != nil && live == same:
		return d.seenAgain(*live, fresh, f), nil
	case live != nil && live.State == fleet.RequestRejected:
		// Rejection is about the machine: new evidence is no way round it.
		r := touched(*live, fresh, false)
		r = warned(r, "The machine was rejected and came back with other evidence; release it to see that")
		d.Action, d.Request = Keep, r
		d.Reason = "the machine was rejected, and other evidence does not change that"
		return d, nil
	case same == nil && recent >= MaxChanges, same != nil && live != nil && same.Revision >= 2*MaxChanges:
		// New evidence each time, or to and fro between old ones.
		if live == nil {
			return Decision{}, ErrFull
		}
		return d.quarantine(touched(*live, fresh, false),
			"It changes its evidence again and again"), nil
	}
	replacesWaiting := live != nil && waitsUnverified(*live)
	if waitsUnverified(fresh) && !replacesWaiting && known.UnverifiedWaiting >= limit(f.MaxUnverified, DefaultMaxUnverified) {
		return Decision{}, ErrFull
	}
	return d.open(now, live, same, fresh, f)
}

// open makes fresh, or the old request with the same evidence, the node's
// live request.
func (d Decision) open(now time.Time, live, same *fleet.Request, fresh fleet.Request, f Filing) (Decision, error) {
	r := fresh
	d.Action, d.Reason = Create, "a machine that was not seen before"
	if same != nil {
		r = touched(*same, fresh, true)
		was := r.State
		var err error
		if r, err = move(r, fleet.RequestPending); err != nil {
			return Decision{}, fmt.Errorf("enroll: reopen %s: %w", r.ID, err)
		}
		// An earlier approval does not carry over.
		r.DecidedBy, r.DecidedAt, r.Reason = "", now, ""
		r.Site, r.Labels, r.Supersedes, r.Replaces = "", nil, "", ""
		d.Action, d.Reason = Reopen, fmt.Sprintf("evidence seen before; the request was %s", was)
		d.Facts = append(d.Facts, fact(FactReopened, r, was, d.Reason))
	}
	doubt := ""
	if live != nil {
		old, err := move(*live, fleet.RequestSuperseded)
		if err != nil {
			return Decision{}, fmt.Errorf("enroll: supersede %s: %w", live.ID, err)
		}
		old.Reason = fmt.Sprintf("superseded by %s", r.ID)
		d.Others = append(d.Others, old)
		d.Facts = append(d.Facts, fact(FactSuperseded, old, live.State, old.Reason))
		changes := Diff(live.Evidence, r.Evidence)
		r.Supersedes = live.ID
		for _, c := range changes {
			r = warned(r, "Changed since request "+string(live.ID)+": "+c)
		}
		if d.Action == Create {
			d.Action = Supersede
		}
		d.Reason = fmt.Sprintf("changed evidence takes the place of %s, which was %s", live.ID, live.State)
		switch {
		case live.State == fleet.RequestQuarantined:
			doubt = "The request it takes the place of was in quarantine: " + live.Reason
		case backwards(*live, f):
			doubt = clockDoubt(live.Source, f.Source)
		}
	}
	if same == nil {
		r.Revision = 1
		d.Facts = append(d.Facts, fact(FactFiled, r, r.State, d.Reason))
	}
	if doubt != "" {
		return d.quarantine(r, doubt), nil
	}
	d.Request = r
	return d, nil
}

// seenAgain handles a filing with the evidence of the live request.
func (d Decision) seenAgain(live, fresh fleet.Request, f Filing) Decision {
	if backwards(live, f) {
		// The clock that is further on stays: it is what to measure by.
		clock := live.Clock
		r := touched(live, fresh, true)
		r.Clock = clock
		return d.quarantine(r, clockDoubt(live.Source, f.Source))
	}
	d.Action, d.Request = Keep, touched(live, fresh, true)
	d.Reason = fmt.Sprintf("the same evidence again; the request stays %s", live.State)
	return d
}

// clockDoubt names both addresses: where to look for the two machines.
func clockDoubt(was, now string) string {
	place := func(source string) string {
		if source == "" {
			return "an unknown address"
		}
		return source
	}
	return fmt.Sprintf("The TPM's clock went backwards: its state was copied or set back, the same TPM may run in two places; "+
		"it called from %s before, and from %s now", place(was), place(now))
}

// quarantine moves r there if its state allows it; a rejected request and one
// in quarantine already stay as they are.
func (d Decision) quarantine(r fleet.Request, why string) Decision {
	was := r.State
	q, err := move(r, fleet.RequestQuarantined)
	if err != nil {
		d.Action, d.Request = Keep, warned(r, why)
		d.Reason = fmt.Sprintf("the request stays %s: %s", r.State, why)
		return d
	}
	q.Reason, q.DecidedBy = why, ""
	revision := q.Revision
	q = warned(q, why)
	q.Revision = revision // the move has counted already
	d.Action, d.Request, d.Reason = Quarantine, q, why
	d.Facts = append(d.Facts, fact(FactQuarantined, q, was, why))
	return d
}

// newRequest is the request that a filing would create.
func newRequest(now time.Time, known Known, f Filing) fleet.Request {
	digest := EvidenceDigest(f.Evidence)
	node := f.Evidence.EK.NodeID()
	r := fleet.Request{
		ID: fleet.RequestIDOf(digest), Tenant: f.Tenant, Node: node, Words: fleet.Words(node),
		State:    fleet.RequestPending,
		Identity: f.Evidence.Identity, Boot: f.Evidence.Boot, Image: f.Evidence.Image,
		EvidenceDigest: digest, Evidence: f.Evidence,
		FirstSeen: now, LastSeen: now, Source: f.Source, Clock: f.Clock,
		Warnings: []string{}, Findings: f.Findings,
	}
	for _, w := range f.Warnings {
		r = warned(r, w)
	}
	for _, w := range LookAlikes(f.Evidence, known.Others) {
		r = warned(r, w)
	}
	r.Revision = 0
	return r
}

// touched brings what may differ between two filings with the same evidence
// up to date. The revision grows only if there is a warning that the person
// who decides has not seen. With evidence false, the filing had other
// evidence and only traces of it are taken.
func touched(r, fresh fleet.Request, evidence bool) fleet.Request {
	if fresh.LastSeen.After(r.LastSeen) {
		r.LastSeen = fresh.LastSeen
	}
	r.Source = fresh.Source
	if !evidence {
		return r
	}
	r.EvidenceDigest, r.Evidence, r.Findings = fresh.EvidenceDigest, fresh.Evidence, fresh.Findings
	if r.Clock == (fleet.TPMClock{}) || fresh.Clock.After(r.Clock) {
		r.Clock = fresh.Clock
	}
	for _, w := range fresh.Warnings {
		r = warned(r, w)
	}
	return r
}

// warned adds a warning once.
func warned(r fleet.Request, w string) fleet.Request {
	if len(r.Warnings) >= maxWarnings || slices.Contains(r.Warnings, w) {
		return r
	}
	r.Warnings = append(slices.Clone(r.Warnings), w)
	r.Revision++
	return r
}

// move changes the state by the table of moves, and the revision with it.
func move(r fleet.Request, to fleet.RequestState) (fleet.Request, error) {
	s, err := r.State.MoveTo(to)
	if err != nil {
		return r, err
	}
	r.State = s
	r.Revision++
	return r, nil
}

func fact(kind audit.Kind, r fleet.Request, before fleet.RequestState, reason string) Fact {
	return Fact{Kind: kind, Request: r.ID, Node: r.Node, Before: before, After: r.State, Reason: reason}
}

func waitsUnverified(r fleet.Request) bool {
	return r.Identity == fleet.IdentityUnverified &&
		(r.State == fleet.RequestPending || r.State == fleet.RequestQuarantined)
}

func limit(n, normal int) int {
	if n > 0 {
		return n
	}
	return normal
}

// backwards reports whether the quote behind f was certainly made after the
// one behind r, and yet the TPM's clock stood earlier. "Certainly": the
// challenge was made after r's quote had arrived, so two calls of one machine
// that overtake each other are no alarm.
func backwards(r fleet.Request, f Filing) bool {
	comparable := r.Clock != (fleet.TPMClock{}) && slices.Equal(r.Evidence.AKName, f.Evidence.AKName)
	return comparable && f.Begun.After(r.LastSeen) && r.Clock.After(f.Clock)
}

// LookAlikes warns of other nodes that claim the same serial number or UUID.
// These are claims, so nothing but a warning comes of them, and the other
// node is not touched. At most three per claim are named.
func LookAlikes(e fleet.Evidence, others []fleet.Request) []string {
	var out []string
	for _, claim := range []struct {
		what  string
		value func(fleet.Evidence) string
	}{
		{"serial number", func(e fleet.Evidence) string { return e.Serial }},
		{"system UUID", func(e fleet.Evidence) string { return e.UUID }},
	} {
		v := claim.value(e)
		var nodes []string
		for _, o := range others {
			if v != "" && o.Evidence.EK != e.EK && claim.value(o.Evidence) == v {
				nodes = append(nodes, string(o.Node))
			}
		}
		slices.Sort(nodes)
		nodes = slices.Compact(nodes)
		for _, n := range nodes[:min(len(nodes), 3)] {
			out = append(out, fmt.Sprintf("Node %s claims the same %s %q; they are different TPMs", n, claim.what, v))
		}
	}
	return out
}
