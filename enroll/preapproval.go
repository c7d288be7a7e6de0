package enroll

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// FactPreApproved is an approval that nobody but a pre-approval gave.
const FactPreApproved = audit.RequestPreApproved

// UseWindow is what PreApproval.PerDay counts in: any 24 hours, so that
// nobody needs to know whose midnight is meant.
const UseWindow = 24 * time.Hour

// Applicant is a request as pre-approvals see it.
type Applicant struct {
	Request fleet.Request
	// Claim is the hash of the claim code that came with the request; nil if
	// none did.
	Claim fleet.HexBytes
	// Decided: somebody, or a pre-approval, has decided about this machine
	// before. Then it is no new machine, and a person decides again.
	Decided bool
	// Twins are live requests of other machines that claim the same serial
	// number or UUID.
	Twins  []fleet.Request
	Policy Policy
}

// Candidate is a pre-approval that could be meant, as the store has it now.
type Candidate struct {
	fleet.PreApproval
	// Line is the list's line for the machine's EK; nil if there is none.
	Line *fleet.ListedEK
	// Recent is how often it was used within UseWindow.
	Recent int
}

// Tried is a pre-approval that did not match.
type Tried struct {
	ID   string
	Kind fleet.PreApprovalKind
	// Why is what is in its way, a sentence without a full stop.
	Why string
}

// Outcome is what the pre-approvals make of an applicant.
type Outcome struct {
	Approve bool
	// Which is the name of the one that matches, with its Kind.
	Which string
	Kind  fleet.PreApprovalKind
	// Reason is a sentence for the audit log, or why nothing is approved.
	Reason string
	Site   string
	Labels map[string]string
	// Tried are those before the one that matched, in order; all if none did.
	Tried []Tried
}

// Actor is how the audit log names a pre-approval that decides.
func (o Outcome) Actor() string { return "preapproval:" + o.Which }

// kindOrder: what names the machine goes before what somebody typed, and that
// before what is true of many machines.
var kindOrder = map[fleet.PreApprovalKind]int{fleet.PreApproveEKs: 0, fleet.PreApproveClaim: 1, fleet.PreApproveRule: 2}

// Evaluate finds the first pre-approval that lets the applicant in: lists,
// then claim codes, then rules, each kind by age and name. It changes nothing,
// so that a test of pre-approvals is the same call.
func Evaluate(now time.Time, a Applicant, candidates []Candidate) Outcome {
	o := Outcome{}
	r := a.Request
	general := ""
	switch {
	case r.State != fleet.RequestPending:
		general = fmt.Sprintf("the request is %s; only a pending one can be approved", r.State)
	case a.Decided:
		general = "somebody has decided about this machine before; a person must do so again"
	default:
		if err := a.Policy.Check(r.Identity, r.Boot); err != nil {
			general = err.(*Refused).Why
		} else if r.Identity <= fleet.IdentityUnverified {
			// Policy of a lab may let people approve such; not us.
			general = "nobody vouches for this machine's TPM (identity unverified); a person must decide"
		}
	}
	ordered := slices.Clone(candidates)
	slices.SortStableFunc(ordered, func(a, b Candidate) int {
		if d := kindOrder[a.Kind] - kindOrder[b.Kind]; d != 0 {
			return d
		}
		if d := a.Created.Compare(b.Created); d != 0 {
			return d
		}
		return bytes.Compare([]byte(a.Name), []byte(b.Name))
	})
	for _, c := range ordered {
		why := obstacle(now, a, c)
		if why == "" {
			why = general
		}
		if why != "" {
			o.Tried = append(o.Tried, Tried{ID: c.Name, Kind: c.Kind, Why: why})
			continue
		}
		o.Approve, o.Which, o.Kind, o.Site = true, c.Name, c.Kind, c.Site
		o.Labels = map[string]string{}
		maps.Copy(o.Labels, c.NodeLabels)
		switch c.Kind {
		case fleet.PreApproveEKs:
			if c.Line.Site != "" {
				o.Site = c.Line.Site
			}
			maps.Copy(o.Labels, c.Line.Labels)
			o.Reason = "its EK is on the list " + c.Name
		case fleet.PreApproveClaim:
			o.Reason = "it brought the claim code of " + c.Name
		default:
			o.Reason = fmt.Sprintf("rule %s: identity at least %s, boot at least %s; machine %d of %d",
				c.Name, c.MinIdentity, c.MinBoot, c.Used+1, c.Limit)
		}
		return o
	}
	switch {
	case general != "":
		o.Reason = general
	case len(o.Tried) == 0:
		o.Reason = "there is no pre-approval for this machine"
	default:
		o.Reason = "no pre-approval matches"
	}
	return o
}

// obstacle says what keeps the candidate from approving; "" if nothing does.
func obstacle(now time.Time, a Applicant, c Candidate) string {
	r := a.Request
	switch {
	case c.Tenant != r.Tenant:
		return "it is of another tenant"
	case c.Withdrawn:
		return "it was removed"
	case !now.Before(c.NotAfter):
		return "it ended at " + c.NotAfter.UTC().Format("2006-01-02 15:04 UTC")
	}
	switch c.Kind {
	case fleet.PreApproveEKs:
		switch {
		case c.Line == nil || c.Line.EK != r.Evidence.EK:
			return "it does not list the EK that this machine proved"
		case c.Line.Request != "":
			return fmt.Sprintf("its line was used for %s; a line is good once", c.Line.Request)
		}
	case fleet.PreApproveClaim:
		if len(a.Claim) == 0 || !bytes.Equal(a.Claim, c.ClaimHash) {
			return "the machine did not bring its code"
		}
	case fleet.PreApproveRule:
		// The object's own check forbids such a rule; here is where it counts.
		if c.MinIdentity <= fleet.IdentityUnverified || c.MinBoot <= fleet.BootUnknown {
			return "it demands too little: a rule must demand a proved identity and a measured boot"
		}
		if why := claims(a, c); why != "" {
			return why
		}
	default:
		return fmt.Sprintf("its kind %.40q is not known", c.Kind)
	}
	switch {
	case r.Identity < c.MinIdentity:
		return fmt.Sprintf("identity is %s, it wants %s", r.Identity, c.MinIdentity)
	case r.Boot < c.MinBoot:
		return fmt.Sprintf("boot is %s, it wants %s", r.Boot, c.MinBoot)
	case c.Used >= c.Limit:
		return fmt.Sprintf("it is used up: %d of %d", c.Used, c.Limit)
	case c.PerDay > 0 && c.Recent >= c.PerDay:
		return fmt.Sprintf("it was used %d times within 24 hours, its cap is %d", c.Recent, c.PerDay)
	}
	return ""
}

// claims holds what the machine says of itself against the rule. It only ever
// narrows.
func claims(a Applicant, c Candidate) string {
	hw := a.Request.Evidence.Hardware
	switch {
	case c.Vendor != "" && hw.Vendor != c.Vendor:
		return fmt.Sprintf("the machine's vendor is %.80q, it wants %.80q", hw.Vendor, c.Vendor)
	case len(c.Serials) > 0 && (a.Request.Evidence.Serial == "" || !slices.Contains(c.Serials, a.Request.Evidence.Serial)):
		return fmt.Sprintf("the serial number %.80q is not among its %d", a.Request.Evidence.Serial, len(c.Serials))
	case len(LookAlikes(a.Request.Evidence, a.Twins)) > 0:
		return "another machine claims the same serial number or UUID; a person must look at that"
	}
	return ""
}

// PreApprove makes the request approved by what Evaluate found.
func PreApprove(now time.Time, r fleet.Request, o Outcome, p Policy) (fleet.Request, Fact, error) {
	if !o.Approve {
		return r, Fact{}, &Refused{Why: o.Reason}
	}
	out, f, err := Approve(now, r, Approval{
		Ruling: Ruling{Revision: r.Revision, Actor: o.Actor(), Reason: o.Reason},
		Site:   o.Site, Labels: o.Labels, Policy: p,
	})
	f.Kind = FactPreApproved
	return out, f, err
}

// WarnClaim notes on the request that its claim code was of no use. The same
// warning twice changes nothing.
func WarnClaim(r fleet.Request, why string) fleet.Request {
	return warned(r, "The claim code that it brought did not count: "+why)
}
