package central

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint"
)

// How long pre-approvals hold if nobody says otherwise, and at most.
const (
	preApprovalLife = 30 * 24 * time.Hour
	claimLife       = 7 * 24 * time.Hour
	maxPreApproval  = 366 * 24 * time.Hour
)

// endOf is when something ends that shall hold for so many seconds.
func endOf(now time.Time, seconds uint64, normal time.Duration) (time.Time, error) {
	switch {
	case seconds == 0:
		return now.Add(normal), nil
	case seconds > uint64(maxPreApproval/time.Second):
		return now, invalid("a pre-approval holds for at most %d days", maxPreApproval/(24*time.Hour))
	}
	return now.Add(time.Duration(seconds) * time.Second), nil
}

// nameOr makes up a name such as "claim-k3v9..." if none is given.
func nameOr(name, kind string) string {
	if name != "" {
		return name
	}
	return kind + "-" + strings.ToLower(rand.Text()[:10])
}

// errUndo ends a transaction of which nothing shall stay.
var errUndo = errors.New("central: nothing is kept")

// addPreApproval writes a new pre-approval and its record.
func addPreApproval(t store.Tx, by act, p fleet.PreApproval, reason string) (fleet.PreApproval, error) {
	p.Created, p.Updated, p.Generation = by.now, by.now, 1
	if err := p.Validate(); err != nil {
		return p, invalid("%v", err)
	}
	p, err := t.PutPreApproval(p)
	if errors.Is(err, store.ErrExists) {
		return p, &enroll.Refused{Why: fmt.Sprintf("there is a pre-approval %q already, maybe one that was removed", p.Name), Do: "give another name"}
	}
	if err != nil {
		return p, err
	}
	return p, by.record(t, p.Tenant, audit.PreApprovalCreated, "pre-approval/"+p.Name, nil, p, reason)
}

// create adds a claim code or a rule.
func (s *Server) createPreApproval(ctx context.Context, c caller, p fleet.PreApproval, reason string) (fleet.PreApproval, error) {
	var out fleet.PreApproval
	err := s.store.Update(ctx, func(t store.Tx) (err error) {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		if err := c.part(t).may(access.PreApproval, access.Change, p.Site); err != nil {
			return err
		}
		if _, err := s.ensureSite(t, by, c.Tenant, p.Site, true); err != nil {
			return err
		}
		out, err = addPreApproval(t, by, p, reason)
		return err
	})
	if err == nil {
		s.log.Info("pre-approval created", logObject, out.Name, logActor, c.actor())
	}
	return out, err
}

// listImport is an EK list as an operator sends it.
type listImport struct {
	fleet.PreApproval
	csv         []byte
	createSites bool
	dryRun      bool
	reason      string
}

// listImported is what came of it: problems, or a pre-approval.
type listImported struct {
	p     fleet.PreApproval
	list  enroll.List
	sites []string
}

// importList imports a list as a whole or not at all. In a dry run the same
// is done and undone.
func (s *Server) importList(ctx context.Context, c caller, q listImport) (out listImported, err error) {
	list := enroll.ParseList(q.csv)
	err = s.store.Update(ctx, func(t store.Tx) error {
		out = listImported{list: list}
		out.list.Problems = slices.Clone(list.Problems)
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		if err := c.part(t).mayList(q, out.list); err != nil {
			return err
		}
		if err := checkListed(t, by.now, c.Tenant, q, &out.list); err != nil {
			return err
		}
		if len(out.list.Problems) > 0 {
			return errUndo
		}
		if out.sites, err = s.sitesOf(t, by, c.Tenant, q, out.list); err != nil {
			return err
		}
		p := q.PreApproval
		p.Kind, p.EKs, p.Limit = fleet.PreApproveEKs, out.list.EKs, len(out.list.EKs)
		if out.p, err = addPreApproval(t, by, p, q.reason); err != nil {
			return err
		}
		if q.dryRun {
			return errUndo
		}
		failpoint.Hit("preapprove.import.before-commit")
		return nil
	})
	if errors.Is(err, errUndo) {
		return out, nil
	}
	if err == nil {
		s.log.Info("list imported", logObject, out.p.Name, logActor, c.actor())
	}
	return out, err
}

// mayList allows a list for each site that it names. Lines without one go to
// the list's.
func (p *part) mayList(q listImport, l enroll.List) error {
	sites := map[string]bool{}
	for _, e := range l.EKs {
		sites[cmp.Or(e.Site, q.Site)] = true
	}
	if len(l.EKs) == 0 {
		sites[q.Site] = true
	}
	for _, s := range slices.Sorted(maps.Keys(sites)) {
		if err := p.may(access.PreApproval, access.Change, s); err != nil {
			return err
		}
	}
	return nil
}

// checkListed holds a list against what the centre knows.
func checkListed(t store.Reader, now time.Time, tenant string, q listImport, l *enroll.List) error {
	denials, err := t.Denials(tenant)
	if err != nil {
		return err
	}
	denied := make(map[fleet.EKHash]bool, len(denials))
	for _, d := range denials {
		denied[d.EK] = true
	}
	lists, err := t.PreApprovalsOfKind(tenant, fleet.PreApproveEKs)
	if err != nil {
		return err
	}
	open := make(map[string]bool)
	for _, p := range lists {
		open[p.Name] = p.Open(now)
	}
	sites := make(map[string]bool)
	for i, e := range l.EKs {
		if denied[e.EK] {
			l.Add(l.Lines[i], "the EK %s is on the deny list; `muster allow` takes it off", e.EK)
		}
		if len(open) > 0 {
			lines, err := t.LinesOfEK(tenant, e.EK)
			if err != nil {
				return err
			}
			for _, o := range lines {
				if open[o.PreApproval] && o.Request == "" {
					l.Add(l.Lines[i], "the EK %s is on the list %s already", e.EK, o.PreApproval)
				}
			}
		}
		if e.Site == "" || q.createSites {
			continue
		}
		there, looked := sites[e.Site]
		if !looked {
			_, err := t.Site(tenant, e.Site)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			there = err == nil
			sites[e.Site] = there
		}
		if !there {
			l.Add(l.Lines[i], "there is no site %q; mend the line, or allow its creation", e.Site)
		}
	}
	l.Sort()
	return nil
}

// sitesOf makes the sites of a list that are not there yet.
func (s *Server) sitesOf(t store.Tx, by act, tenant string, q listImport, l enroll.List) (made []string, err error) {
	names := make(map[string]bool)
	if q.Site != "" {
		names[q.Site] = true
	}
	for _, e := range l.EKs {
		if e.Site != "" {
			names[e.Site] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		created, err := s.ensureSite(t, by, tenant, name, true)
		if err != nil {
			return nil, err
		}
		if created {
			made = append(made, name)
		}
	}
	return made, nil
}

// removePreApproval ends a pre-approval. What it approved stays approved.
func (s *Server) removePreApproval(ctx context.Context, c caller, name, reason string) (p fleet.PreApproval, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		none := &errNoSuch{fmt.Sprintf("there is no pre-approval %.80q in tenant %s", name, c.Tenant), "`muster preapprove list` names them"}
		old, err := t.PreApproval(c.Tenant, name)
		if errors.Is(err, store.ErrNotFound) {
			return none
		}
		if err != nil {
			return err
		}
		look := c.part(t)
		if sees, err := look.sees(access.PreApproval, old.Site); err != nil || !sees {
			return cmp.Or(err, error(none))
		}
		if err := look.may(access.PreApproval, access.Change, old.Site); err != nil {
			return err
		}
		if old.Withdrawn {
			return &enroll.Refused{Why: "it was removed already"}
		}
		p = old
		p.Withdrawn, p.Updated = true, by.now
		if p, err = t.PutPreApproval(p); err != nil {
			return err
		}
		return by.record(t, c.Tenant, audit.PreApprovalEnded, "pre-approval/"+p.Name, old, p, reason)
	})
	if err == nil {
		s.log.Info("pre-approval removed", logObject, p.Name, logActor, c.actor())
	}
	return p, err
}

// testPreApprovals evaluates a request as its filing would, and writes
// nothing. The claim code of a machine is not kept, so that none counts here.
func (s *Server) testPreApprovals(ctx context.Context, c caller, id string) (r fleet.Request, o enroll.Outcome, err error) {
	err = s.store.View(ctx, func(t store.Reader) error {
		now := s.cfg.Now()
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		if r, err = c.part(t).findRequest(id); err != nil {
			return err
		}
		if e, _, due := enroll.Expire(now, r); due {
			r = e
		}
		a := enroll.Applicant{Request: r, Policy: s.approvalPolicy(tenant)}
		known, err := t.RequestsOfNode(c.Tenant, r.Node)
		if err != nil {
			return err
		}
		if a.Decided, err = decidedBefore(t, r, known); err != nil {
			return err
		}
		if a.Twins, err = t.LookAlikes(c.Tenant, r.Node, r.Evidence.Serial, r.Evidence.UUID, maxLookAlikes); err != nil {
			return err
		}
		candidates, err := candidatesFor(t, now, a)
		if err != nil {
			return err
		}
		if candidates, err = withOthers(t, c.Tenant, candidates); err != nil {
			return err
		}
		o = enroll.Evaluate(now, a, candidates)
		return nil
	})
	return r, o, err
}
