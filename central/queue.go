package central

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// The approval queue by trust: those come first for whom somebody vouches,
// whatever number of strangers waits beside them.

// trusted are the identities in the order of the queue.
var trusted = []fleet.IdentityTrust{fleet.IdentityHardware, fleet.IdentityListed, fleet.IdentityLab, fleet.IdentityUnverified}

// checkListing refuses what would mean nothing.
func checkListing(q *musterv1.ListRequestsRequest) error {
	switch {
	case q.Search != "" && (q.State != "" || q.ByTrust || q.After != "" || len(q.Identities) > 0):
		return invalid("a search goes over all requests: leave state, order and identities out")
	case q.ByTrust && q.State == "":
		return invalid("the order by trust is for one state: give it")
	case !q.ByTrust && len(q.Identities) > 0:
		return invalid("identities want the order by trust")
	case !q.ByTrust && q.After != "" && fleet.RequestID(q.After).Validate() != nil:
		return invalid("after is no request ID")
	case len(q.Identities) > len(trusted):
		return invalid("there are %d identities", len(trusted))
	case len(q.Search) > 128:
		return invalid("a search has at most 128 bytes")
	}
	return nil
}

// refusalOf is what policy says about approving the request now.
func refusalOf(p enroll.Policy, r fleet.Request) string {
	if r.State != fleet.RequestPending {
		return ""
	}
	if err := p.Check(r.Identity, r.Boot); err != nil {
		return err.Error()
	}
	return ""
}

// queueKey says where in the queue a request stands.
func queueKey(r fleet.Request) string {
	return fmt.Sprintf("%s.%d.%s", r.Identity, r.FirstSeen.UnixNano(), r.ID)
}

func parseQueueKey(s string) (i fleet.IdentityTrust, after store.QueueKey, err error) {
	parts := strings.Split(s, ".")
	bad := invalid("after %.80q is not what an answer said as next", s)
	if len(parts) != 3 || i.UnmarshalText([]byte(parts[0])) != nil {
		return i, after, bad
	}
	n, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil || fleet.RequestID(parts[2]).Validate() != nil {
		return i, after, bad
	}
	return i, store.QueueKey{FirstSeen: time.Unix(0, n), ID: fleet.RequestID(parts[2])}, nil
}

func siteOfRequest(r fleet.Request) string { return r.Site }

// listRequests reads what a call asks for, as far as the caller sees it.
func listRequests(p *part, state *fleet.RequestState, q *musterv1.ListRequestsRequest, count int, out *musterv1.ListRequestsResponse) ([]fleet.Request, error) {
	switch {
	case q.Search != "":
		found, err := searchRequests(p, q.Search, count)
		if err != nil {
			return nil, err
		}
		return filter(p, access.Request, found, siteOfRequest)
	case q.ByTrust:
		return requestsByTrust(p, *state, q, count, out)
	}
	return some(p, access.Request, count, func(count int) ([]fleet.Request, error) {
		if q.After != "" {
			return p.t.RequestsAfter(p.Tenant, state, fleet.RequestID(q.After), count)
		}
		return p.t.Requests(p.Tenant, state, count)
	}, siteOfRequest)
}

// requestsByTrust reads one page of the queue, and counts the whole.
func requestsByTrust(p *part, state fleet.RequestState, q *musterv1.ListRequestsRequest, count int, out *musterv1.ListRequestsResponse) (found []fleet.Request, err error) {
	var from fleet.IdentityTrust
	var behind store.QueueKey
	if q.After != "" {
		if from, behind, err = parseQueueKey(q.After); err != nil {
			return nil, err
		}
	}
	counts, err := p.t.CountQueue(p.Tenant, state)
	if err != nil {
		return nil, err
	}
	for _, i := range trusted {
		if len(q.Identities) > 0 && !slices.Contains(q.Identities, musterv1.IdentityTrust(i)) {
			continue
		}
		after := store.QueueKey{}
		if q.After != "" && i == from {
			after = behind
		}
		if p.seesAll(access.Request) {
			out.Total += uint32(counts[i])
		}
		switch {
		case !p.seesAll(access.Request):
			// Whoever sees a part gets its number, which takes looking at it.
			all, err := p.t.Queue(p.Tenant, state, i, store.QueueKey{}, maxFiltered)
			if err != nil {
				return nil, err
			}
			visible, err := filter(p, access.Request, all, siteOfRequest)
			if err != nil {
				return nil, err
			}
			out.Total += uint32(len(visible))
			if q.After != "" && i > from {
				continue
			}
			for _, r := range visible {
				if len(found) < count && (r.FirstSeen.After(after.FirstSeen) || r.FirstSeen.Equal(after.FirstSeen) && r.ID > after.ID) {
					found = append(found, r)
				}
			}
		case q.After != "" && i > from, len(found) >= count:
		default:
			more, err := p.t.Queue(p.Tenant, state, i, after, count-len(found))
			if err != nil {
				return nil, err
			}
			found = append(found, more...)
		}
	}
	return found, nil
}

// searchRequests finds what a person typed: an ID, words, a node, or a serial
// number or UUID as a sticker has it.
func searchRequests(p *part, search string, count int) (found []fleet.Request, err error) {
	seen := make(map[fleet.RequestID]bool)
	add := func(r fleet.Request) {
		if !seen[r.ID] && len(found) < count {
			seen[r.ID] = true
			found = append(found, r)
		}
	}
	if id := wanted(search); id != "" {
		ids, err := p.t.FindRequests(p.Tenant, id, count)
		if err != nil {
			return nil, err
		}
		for _, i := range ids {
			r, err := p.t.Request(p.Tenant, i)
			if err != nil {
				return nil, err
			}
			add(r)
		}
	}
	claimed, err := p.t.LookAlikes(p.Tenant, "", search, search, count)
	for _, r := range claimed {
		add(r)
	}
	return found, err
}
