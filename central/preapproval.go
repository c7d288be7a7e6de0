package central

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// approvalsOf is what a tenant's pre-approvals may approve at most.
func (e *enrollment) approvalsOf(t fleet.Tenant) enroll.Policy {
	if e.approvals == nil {
		return enroll.Policy{}
	}
	return e.approvals(t)
}

// preDecision is what the pre-approvals made of a filing.
type preDecision struct {
	outcome enroll.Outcome
	// wrongCode: the machine brought a claim code that nobody gave out.
	wrongCode bool
}

// preApprove lets the pre-approvals decide about a request that waits, and
// changes d accordingly. It only reads: the use is written after the request.
func (e *enrollment) preApprove(t store.Reader, now time.Time, f enroll.Filing, known enroll.Known, d *enroll.Decision) (preDecision, error) {
	var p preDecision
	if d.Request.State != fleet.RequestPending {
		return p, nil
	}
	tenant, err := t.Tenant(f.Tenant)
	if err != nil {
		return p, err
	}
	a := enroll.Applicant{Request: d.Request, Twins: known.Others, Policy: e.approvalsOf(tenant)}
	if a.Decided, err = decidedBefore(t, d.Request, known.Requests); err != nil {
		return p, err
	}
	warning := ""
	if f.Claim != "" {
		switch hash, err := enroll.HashClaim(f.Claim); {
		case err != nil:
			warning = "it is not one; there is a slip in it"
		case !e.wrongCodes.allow(now, f.Source):
			warning = "too many wrong codes came from its address lately"
		default:
			a.Claim = hash
		}
	}
	candidates, err := candidatesFor(t, now, a)
	if err != nil {
		return p, err
	}
	p.outcome = enroll.Evaluate(now, a, candidates)
	if len(a.Claim) > 0 && !slices.ContainsFunc(candidates, func(c enroll.Candidate) bool { return c.Kind == fleet.PreApproveClaim }) {
		p.wrongCode, warning = true, "nobody gave out this code"
	}
	if p.outcome.Approve {
		r, fact, err := enroll.PreApprove(now, d.Request, p.outcome, a.Policy)
		if err != nil {
			return p, fmt.Errorf("central: pre-approve by %s: %w", p.outcome.Which, err)
		}
		d.Request, d.Facts = r, append(d.Facts, fact)
		return p, nil
	}
	for _, x := range p.outcome.Tried {
		if x.Kind == fleet.PreApproveClaim {
			warning = x.Why
		}
	}
	if warning != "" {
		d.Request = enroll.WarnClaim(d.Request, warning)
	}
	return p, nil
}

// decidedBefore tells whether this machine is not new: it is or was a node,
// somebody decided about a request of it, or a pre-approval was used for it.
func decidedBefore(t store.Reader, r fleet.Request, known []fleet.Request) (bool, error) {
	for _, k := range known {
		if k.DecidedBy != "" {
			return true, nil
		}
	}
	if n, err := t.CountUsesOfNode(r.Tenant, r.Node); err != nil || n > 0 {
		return n > 0, err
	}
	_, err := t.Node(r.Tenant, r.Node)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// candidatesFor reads the pre-approvals that could be meant: lists with the
// machine's EK, the claim with its code, and every rule.
func candidatesFor(t store.Reader, now time.Time, a enroll.Applicant) ([]enroll.Candidate, error) {
	var out []enroll.Candidate
	tenant := a.Request.Tenant
	lines, err := t.LinesOfEK(tenant, a.Request.Evidence.EK)
	if err != nil {
		return nil, err
	}
	for _, l := range lines {
		p, err := t.PreApproval(tenant, l.PreApproval)
		if err != nil {
			return nil, err
		}
		out = append(out, enroll.Candidate{PreApproval: p, Line: &l.ListedEK})
	}
	if len(a.Claim) > 0 {
		p, err := t.PreApprovalByClaim(tenant, a.Claim)
		if err == nil {
			out = append(out, enroll.Candidate{PreApproval: p})
		} else if !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
	}
	rules, err := t.PreApprovalsOfKind(tenant, fleet.PreApproveRule)
	if err != nil {
		return nil, err
	}
	for _, p := range rules {
		c := enroll.Candidate{PreApproval: p}
		if p.PerDay > 0 {
			if c.Recent, err = t.CountUses(tenant, p.Name, now.Add(-enroll.UseWindow)); err != nil {
				return nil, err
			}
		}
		out = append(out, c)
	}
	return out, nil
}

// withOthers adds, for people who ask why not, lists without the machine and
// claim codes that it did not bring; at most maxOthers of each.
func withOthers(t store.Reader, tenant string, out []enroll.Candidate) ([]enroll.Candidate, error) {
	for _, kind := range []fleet.PreApprovalKind{fleet.PreApproveEKs, fleet.PreApproveClaim} {
		all, err := t.PreApprovalsOfKind(tenant, kind)
		if err != nil {
			return nil, err
		}
		added := 0
		for _, p := range all {
			if added < maxOthers && !slices.ContainsFunc(out, func(c enroll.Candidate) bool { return c.Name == p.Name }) {
				out = append(out, enroll.Candidate{PreApproval: p})
				added++
			}
		}
	}
	return out, nil
}

const maxOthers = 50

// wrongCodes makes guessing claim codes slow: after maxWrongCodes that nobody
// gave out, codes from that source count again when some time has passed. It
// is bounded: a full table forgets whoever has been quiet for longest. What
// protects the codes is their length; this keeps the log readable.
type wrongCodes struct {
	mu     sync.Mutex
	source map[netip.Prefix]wrongCount
}

type wrongCount struct {
	left float64
	at   time.Time
}

const (
	maxWrongCodes   = 10
	wrongCodesAgain = time.Hour
	maxWrongSources = 4096
)

// networkOf is the address, or for IPv6 the /64, that codes are counted for.
func networkOf(source string) netip.Prefix {
	a, err := netip.ParseAddr(source)
	if err != nil {
		return netip.Prefix{}
	}
	a = a.Unmap().WithZone("")
	if a.Is6() {
		return netip.PrefixFrom(a, 64).Masked()
	}
	return netip.PrefixFrom(a, a.BitLen())
}

func (w *wrongCodes) now(now time.Time, network netip.Prefix) wrongCount {
	c, there := w.source[network]
	if !there {
		return wrongCount{maxWrongCodes, now}
	}
	if d := now.Sub(c.at); d > 0 {
		c.left = min(maxWrongCodes, c.left+maxWrongCodes*float64(d)/float64(wrongCodesAgain))
		c.at = now
	}
	return c
}

// allow reports whether a code from the source counts.
func (w *wrongCodes) allow(now time.Time, source string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now(now, networkOf(source)).left >= 1
}

// failed notes a wrong code.
func (w *wrongCodes) failed(now time.Time, source string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	network := networkOf(source)
	c := w.now(now, network)
	c.left--
	if w.source == nil {
		w.source = make(map[netip.Prefix]wrongCount)
	}
	if _, there := w.source[network]; !there && len(w.source) >= maxWrongSources {
		var oldest netip.Prefix
		first := true
		for n, o := range w.source {
			if first || o.at.Before(w.source[oldest].at) {
				oldest, first = n, false
			}
		}
		delete(w.source, oldest)
	}
	w.source[network] = c
}
