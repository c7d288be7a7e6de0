package enroll

import (
	"errors"
	"fmt"

	"github.com/muster-edge/muster/fleet"
)

// Policy says what the people of a tenant may approve beyond the default.
// The zero value is the default: deny what is not proved.
type Policy struct {
	// Lab: the tenant was marked as a lab, for ever. The two exceptions below
	// count in a lab only.
	Lab bool
	// UnknownBoot lets machines in whose boot is unknown: whatever runs on
	// them, it is not known to be ours.
	UnknownBoot bool
	// Unverified lets machines in whose EK nobody vouches for: it may be a
	// program that pretends to be a TPM.
	Unverified bool
}

// need is what a pair of verdicts needs before a person may approve it.
type need uint8

const (
	unknownBoot need = 1 << iota
	unverified
	labTenant
)

// approvable is the whole policy. Rows are identities, columns boots.
var approvable = [4][3]need{
	//                          unknown                   measured    enforced
	fleet.IdentityUnverified: {unverified | unknownBoot, unverified, unverified},
	fleet.IdentityLab:        {labTenant | unknownBoot, labTenant, labTenant},
	fleet.IdentityListed:     {unknownBoot, 0, 0},
	fleet.IdentityHardware:   {unknownBoot, 0, 0},
}

// Check returns nil if a machine with these verdicts may be approved, else a
// *Refused.
func (p Policy) Check(identity fleet.IdentityTrust, boot fleet.BootTrust) error {
	if int(identity) >= len(approvable) || int(boot) >= len(approvable[0]) {
		return &Refused{Why: fmt.Sprintf("there is no verdict %s/%s", identity, boot), Do: "report this as a fault"}
	}
	n := approvable[identity][boot]
	if n&labTenant != 0 && !p.Lab {
		// Importing a lab root marks its tenant, so that this is a fault or a
		// root meant for another tenant.
		return &Refused{
			Why: "a lab root vouches for this machine's TPM (identity lab), and this tenant is no lab: a software TPM proves nothing about hardware",
			Do:  "enroll it into a lab tenant, or import the root certificate of its TPM's real vendor",
		}
	}
	if n&unverified != 0 && !(p.Lab && p.Unverified) {
		return &Refused{
			Why: "nobody vouches for this machine's TPM (identity unverified): it may be a program that pretends to be one",
			Do: "put its EK hash on a list after checking it at the machine's own screen, or import the root certificate of its TPM's vendor; " +
				"a lab tenant can allow unverified identities in its policy",
		}
	}
	if n&unknownBoot != 0 && !(p.Lab && p.UnknownBoot) {
		return &Refused{
			Why: "it is not proved that this machine runs one of our images (boot unknown)",
			Do: "look at the request's findings: register the image it runs, or start it from the current recovery image; " +
				"a lab tenant can allow unknown boots in its policy",
		}
	}
	return nil
}

// Refused is the error of a decision that the rules do not allow.
type Refused struct {
	// Why is the rule, Do the next step, both for the person who decided.
	Why, Do string
}

// Error implements error.
func (r *Refused) Error() string {
	if r.Do == "" {
		return "enroll: refused: " + r.Why
	}
	return "enroll: refused: " + r.Why + "; what to do: " + r.Do
}

// Errors that callers branch on.
var (
	// ErrConflict: the request is not as the person saw it.
	ErrConflict = errors.New("enroll: the request has changed since it was looked at; look again and decide then")
	// ErrDenied: the node's EK is on the tenant's deny list.
	ErrDenied = errors.New("enroll: the machine is denied")
	// ErrFull: the queue does not take another machine of this kind now.
	ErrFull = errors.New("enroll: the queue is full")
	// ErrNotApproved: there is nothing to collect.
	ErrNotApproved = errors.New("enroll: the request is not approved")
)
