package service

import (
	"context"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect"
)

// The calls of an Observation.
const (
	CallBegin    = "begin"
	CallComplete = "complete"
	CallCollect  = "collect"
	// CallIssue is the part of a Collect that makes and stores a certificate;
	// handing out one that is there already is none.
	CallIssue = "issue"
	// CallRenew is a node's renewal by its certificate.
	CallRenew = "renew"
)

// Observation is one call and how it ended, for metrics. Call, Outcome and
// Check come from fixed lists: they are safe as labels whatever machines send.
type Observation struct {
	// Call is one of the Call constants.
	Call string
	// Outcome is one of Outcomes: "ok", or the word that the caller was told.
	Outcome string
	// Check is one of Checks if Outcome is "not-proven", else "".
	Check string
	// Took is the time from the call to its answer. A Collect may have waited
	// for a person most of it.
	Took time.Duration
}

// Observer is told of each call. It must not block.
type Observer func(Observation)

const (
	outcomeOK       = "ok"
	outcomeCanceled = "canceled"
	outcomeFault    = "fault"
	checkOther      = "other"
)

var outcomes = []string{
	outcomeOK, "tls", "protocol", "bad-request", "too-large", "busy", "begin-again", "not-proven", "denied", "queue-full",
	// not-found is a ticket that is refused.
	"not-found", "not-allowed", "changed", outcomeCanceled, outcomeFault,
}

// Checks of this package, then those of pki.Verify that refuse.
var checks = []string{
	"proof", "parse", "hardware", "evidence",
	"ek", "ak-name", "ak", "ldevid-name", "ldevid", "distinct-keys", "certify", "certify-name", "certify-signature",
	"quote", "quote-pcrs", "quote-signature", "csr-key",
	checkOther,
}

// Outcomes are all values of Observation.Outcome.
func Outcomes() []string { return slices.Clone(outcomes) }

// Checks are all values of Observation.Check but "".
func Checks() []string { return slices.Clone(checks) }

// refusal is the error behind an answer: a short word for programs, the next
// step for people, and the check for metrics, which the caller does not see.
type refusal struct{ word, next, check string }

// Error implements error.
func (r *refusal) Error() string { return r.word + ": " + r.next }

// observe tells the observer how a call ended.
func (s *Service) observe(call string, start time.Time, err error) {
	if s.cfg.Observe == nil {
		return
	}
	o := Observation{Call: call, Outcome: outcomeOK, Took: time.Since(start)}
	var r *refusal
	switch {
	case err == nil:
	case errors.As(err, &r) && slices.Contains(outcomes, r.word):
		o.Outcome, o.Check = r.word, r.check
		if o.Check != "" && !slices.Contains(checks, o.Check) {
			o.Check = checkOther
		}
	case connect.CodeOf(err) == connect.CodeCanceled, connect.CodeOf(err) == connect.CodeDeadlineExceeded,
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		o.Outcome = outcomeCanceled
	default:
		o.Outcome = outcomeFault
	}
	s.cfg.Observe(o)
}
