package central

import (
	"context"
	"sort"
	"strings"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// auditScan bounds the records that one filtered call looks at.
const auditScan = 20000

// ListAudit implements the management service.
func (s management) ListAudit(ctx context.Context, q *musterv1.ListAuditRequest) (*musterv1.ListAuditResponse, error) {
	c := callerOf(ctx)
	limit := limitOf(q.Limit)
	out := &musterv1.ListAuditResponse{}
	filters := q.Actor != "" || q.Kind != "" || q.Object != ""
	if !q.NewestFirst && (filters || q.Before > 0) || q.NewestFirst && q.After > 0 {
		return nil, invalid("before and filters go with the newest record first, after with the oldest")
	}
	err := s.store.View(ctx, func(t store.Reader) error {
		if q.NewestFirst {
			return auditBackwards(t, c.Tenant, q, limit, out)
		}
		records, err := t.Audit(c.Tenant, q.After, limit+1)
		if len(records) > limit {
			records, out.More = records[:limit], true
		}
		for _, r := range records {
			out.Records = append(out.Records, api.AuditRecordToProto(r))
		}
		return err
	})
	return out, s.coded(ctx, "listing the audit log", err)
}

// auditBackwards reads the chain from its end in pages: numbers have no gaps,
// so that a page is found by its number.
func auditBackwards(t store.Reader, tenant string, q *musterv1.ListAuditRequest, limit int, out *musterv1.ListAuditResponse) error {
	before := q.Before
	if before == 0 {
		last, err := lastAudit(t, tenant)
		if err != nil {
			return err
		}
		before = last + 1
	}
	for scanned := 0; before > 1 && len(out.Records) < limit && scanned < auditScan; {
		n := min(uint64(auditPage), before-1)
		records, err := t.Audit(tenant, before-1-n, int(n))
		if err != nil {
			return err
		}
		if len(records) == 0 {
			before = 1 // a gap: what VerifyAudit is for
			break
		}
		for i := len(records) - 1; i >= 0 && len(out.Records) < limit; i-- {
			r := records[i]
			if r.Seq >= before {
				continue
			}
			before = r.Seq
			scanned++
			if wantedRecord(q, r) {
				out.Records = append(out.Records, api.AuditRecordToProto(r))
			}
		}
	}
	if before > 1 {
		out.More, out.Next = true, before
	}
	return nil
}

func wantedRecord(q *musterv1.ListAuditRequest, r fleet.AuditRecord) bool {
	return (q.Actor == "" || r.Actor == q.Actor) && strings.HasPrefix(string(r.Kind), q.Kind) && (q.Object == "" || r.Object == q.Object)
}

// lastAudit is the number of the newest record, found by halving.
func lastAudit(t store.Reader, tenant string) (uint64, error) {
	var failed error
	is := func(n uint64) bool { // there is a record above n
		records, err := t.Audit(tenant, n, 1)
		if err != nil {
			failed = err
		}
		return len(records) > 0
	}
	high := uint64(1)
	for failed == nil && high < 1<<40 && is(high) {
		high *= 2
	}
	n := sort.Search(int(high), func(i int) bool { return failed != nil || !is(uint64(i)) })
	return uint64(n), failed
}
