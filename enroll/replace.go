package enroll

import (
	"fmt"
	"maps"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Replace approves the request of a new machine for the place of an old node:
// its site and labels, and a link to it. a.Site and a.Labels do not count. A
// request that somebody has approved already gets the old node's place instead
// of what it was approved for. Denying the old machine is the caller's.
//
// The same once more changes nothing: done is true and there is no fact.
func Replace(now time.Time, old fleet.Node, r fleet.Request, a Approval) (out fleet.Request, f Fact, done bool, err error) {
	if old.ID == r.Node {
		return r, Fact{}, false, &Refused{Why: "both are the same machine: its TPM is the same", Do: "approve the request; nothing is replaced"}
	}
	if r.Replaces == old.ID && (r.State == fleet.RequestApproved || r.State == fleet.RequestIssued) {
		return r, Fact{}, true, nil
	}
	if old.ReplacedBy != "" && old.ReplacedBy != r.Node {
		return r, Fact{}, false, &Refused{Why: fmt.Sprintf("node %s has taken the place of %s already", old.ReplacedBy, old.ID),
			Do: fmt.Sprintf("replace %s if that one has failed, too", old.ReplacedBy)}
	}
	a.Site, a.Labels = old.Site, maps.Clone(old.Labels)
	if r.State != fleet.RequestApproved {
		if r, f, err = Approve(now, r, a); err != nil {
			return r, Fact{}, false, err
		}
		r.Replaces = old.ID
		return r, f, false, nil
	}
	if r, err = look(now, r, a.Ruling); err != nil {
		return r, Fact{}, false, err
	}
	if err := a.Policy.Check(r.Identity, r.Boot); err != nil {
		return r, Fact{}, false, err
	}
	r.Site, r.Labels, r.Replaces = a.Site, a.Labels, old.ID
	r.Revision++
	r, f, err = decided(now, r, a.Ruling, FactApproved, r.State)
	return r, f, false, err
}
