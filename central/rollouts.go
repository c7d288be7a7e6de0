package central

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/drift"
	"github.com/muster-edge/muster/fleet/placement"
	"github.com/muster-edge/muster/fleet/rollout"
	"github.com/muster-edge/muster/fleet/text"
)

// rolloutEvery is how often the leader looks at the rollouts that run.
const rolloutEvery = 10 * time.Second

// rollOut moves rollouts on. All there is to know is in the store: who leads
// next goes on from there.
func (s *Server) rollOut(ctx context.Context) error {
	tick := time.NewTicker(rolloutEvery)
	defer tick.Stop()
	for {
		if err := s.stepRollouts(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("rollouts not looked at", logError, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Server) stepRollouts(ctx context.Context) error {
	var running []rollout.Rollout
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		running, err = t.RolloutsOfState(rollout.Running)
		return err
	})
	for _, r := range running {
		if one := s.stepRollout(ctx, r); one != nil {
			err = errors.Join(err, fmt.Errorf("central: move rollout %s on: %w", r.Name, one))
		}
	}
	return err
}

// stepRollout decides once about one rollout. The facts are read before, by
// pages; the decision and what it changes are one transaction for each batch of
// sites, and a rollout that a person changed meanwhile is left for the next
// time.
func (s *Server) stepRollout(ctx context.Context, r rollout.Rollout) error {
	facts, err := s.rolloutFacts(ctx, r)
	if err != nil {
		return err
	}
	var given []string
	err = s.store.Update(ctx, func(t store.Tx) error {
		given = nil
		by := act{actor: "rollout:" + r.Name, now: s.cfg.Now()}
		now, err := t.Rollout(r.Tenant, r.Name)
		if err != nil || now.Revision != r.Revision {
			return missing(err)
		}
		next, assign, changed := rollout.Decide(by.now, r, facts)
		if assign, err = s.giveVersion(t, by, &next, assign[:min(len(assign), assignBatch)]); err != nil {
			return err
		}
		given = assign
		if !changed && len(assign) == 0 && next.Failed() == r.Failed() {
			return nil
		}
		next.Updated = by.now
		if _, err := t.PutRollout(next); err != nil {
			return err
		}
		if next.State == r.State && next.Wave == r.Wave {
			return nil
		}
		words := rollout.Explain(by.now, next)
		if err := by.record(t, r.Tenant, audit.RolloutMoved, "rollout/"+r.Name, rolloutForAudit(r), rolloutForAudit(next), text.Clean(words, maxReason)); err != nil {
			return err
		}
		level := fleet.EventInfo
		if next.State == rollout.Stopped {
			level = fleet.EventAlarm
		}
		return objectEvent(t, by, fleet.Event{
			Tenant: r.Tenant, Level: level, Kind: "rollout." + next.State.String(), Text: fmt.Sprintf("rollout %s of %s: %s", r.Name, r.Plan.Stack.ID(), words),
		})
	})
	if err != nil {
		return err
	}
	if len(given) > 0 {
		s.hub.changed(eventsTopic(r.Tenant))
		for _, name := range given {
			s.installs(ctx, r.Tenant, name)
		}
	}
	return nil
}

// giveVersion assigns the version to sites, as a person would. A site that
// refuses it has failed.
func (s *Server) giveVersion(t store.Tx, by act, r *rollout.Rollout, names []string) (given []string, err error) {
	if len(names) == 0 {
		return nil, nil
	}
	// The rollout acts for the tenant: who started it was allowed everywhere.
	c := caller{Principal: access.Principal{Name: by.actor, Tenant: r.Tenant, Bindings: []access.Binding{{Tenant: r.Tenant, Role: access.Operator}}}}
	v, ref, err := s.assignableVersion(t, r.Tenant, r.Plan.Stack.Name, r.Plan.Stack.Version)
	if err != nil {
		why, known := whyNot(err)
		for _, name := range names {
			r.Refused(by.now, name, why)
		}
		if !known {
			return nil, err
		}
		return nil, nil
	}
	// Labels are set, so that a refusal is an answer and no error.
	q := stackAssignment{labels: map[string]string{"": ""}, stack: ref.Name, version: ref.Version, reason: "rollout " + r.Name, noReturn: r.Plan.AcceptNoReturn}
	for _, name := range names {
		one, err := s.assignOne(t, by, c, name, &v, &ref, q)
		switch {
		case errors.Is(err, store.ErrNotFound):
			continue // it is skipped the next time
		case err != nil:
			return nil, err
		case one.refused != "":
			r.Refused(by.now, name, text.Clean(one.refused, maxSentence))
		default:
			r.Assigned(by.now, name, one.before)
			given = append(given, name)
		}
	}
	return given, nil
}

func whyNot(err error) (string, bool) {
	var refused *enroll.Refused
	var none *errNoSuch
	switch {
	case errors.As(err, &refused):
		return refused.Why, true
	case errors.As(err, &none):
		return none.what, true
	}
	return err.Error(), false
}

func rolloutForAudit(r rollout.Rollout) any {
	return map[string]any{"state": r.State, "wave": r.Wave + 1, "reason": r.Reason, "failed": r.Failed()}
}

// rolloutFacts are the facts about the sites that have come so far, and those
// that come next.
func (s *Server) rolloutFacts(ctx context.Context, r rollout.Rollout) (map[string]rollout.Fact, error) {
	facts := make(map[string]rollout.Fact)
	images := make(map[string][]fleet.ImageRef)
	for batch := range slices.Chunk(r.Sites[:r.Target(r.Wave)], refreshBatch) {
		err := s.store.View(ctx, func(t store.Reader) error {
			for _, x := range batch {
				site, err := t.Site(r.Tenant, x.Name)
				if errors.Is(err, store.ErrNotFound) {
					facts[x.Name] = rollout.Fact{Gone: true}
					continue
				}
				if err != nil {
					return err
				}
				d, err := s.driftOf(t, site, images)
				if err != nil {
					return err
				}
				f := rollout.Fact{Healthy: d.State == drift.Current, Broken: d.State == drift.Blocked, Empty: d.Nodes == 0, Why: text.Clean(d.Why, maxSentence)}
				if ref := site.Spec.StackRef(); ref != nil {
					f.Desired = ref.ID()
				}
				facts[x.Name] = f
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return facts, nil
}

func findRollout(t store.Reader, tenant, name string) (rollout.Rollout, error) {
	r, err := t.Rollout(tenant, name)
	if errors.Is(err, store.ErrNotFound) {
		return r, &errNoSuch{fmt.Sprintf("there is no rollout %.80q in tenant %s", name, tenant), "`muster rollout status` lists them"}
	}
	return r, err
}

// StartRollout implements the management service.
func (s management) StartRollout(ctx context.Context, q *musterv1.StartRolloutRequest) (*musterv1.StartRolloutResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if err := fleet.ValidateName("rollout", q.Name); err != nil {
		return nil, invalid("%v", err)
	}
	c := callerOf(ctx)
	r := rollout.Rollout{Meta: fleet.Meta{Tenant: c.Tenant, Name: q.Name, Generation: 1}, By: c.actor(), Plan: rollout.Plan{
		Soak: q.SoakSeconds, MaxFailed: int(min(q.MaxFailed, rollout.MaxSites)), Timeout: q.TimeoutSeconds, AcceptNoReturn: q.AcceptNoReturn,
	}}
	for _, w := range q.Waves[:min(len(q.Waves), rollout.MaxWaves+1)] {
		r.Plan.Waves = append(r.Plan.Waves, rollout.Wave{Sites: int(min(w.Sites, rollout.MaxSites+1)), Percent: int(min(w.Percent, 101))})
	}
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := c.act(s.cfg.Now())
		look := c.part(t)
		if err := look.may(access.Rollout, access.Change, ""); err != nil {
			return err
		}
		_, ref, err := s.assignableVersion(t, c.Tenant, q.Stack, q.Version)
		if err != nil {
			return err
		}
		r.Plan.Stack, r.Created, r.Updated = ref, by.now, by.now
		if r.Sites, err = look.rolloutSites(q); err != nil {
			return err
		}
		if err := r.Validate(); err != nil {
			return invalid("%s", strings.ReplaceAll(strings.TrimPrefix(err.Error(), "rollout: "), "\n", "; "))
		}
		if r, err = t.PutRollout(r); errors.Is(err, store.ErrExists) {
			return &enroll.Refused{Why: fmt.Sprintf("there is a rollout %s already", r.Name), Do: "give another name"}
		} else if err != nil {
			return err
		}
		if q.DryRun {
			return errDry
		}
		if err := by.record(t, c.Tenant, audit.RolloutStarted, "rollout/"+r.Name, nil, r.Plan, reason); err != nil {
			return err
		}
		return objectEvent(t, by, fleet.Event{Tenant: c.Tenant, Kind: "rollout.started", Text: fmt.Sprintf("rollout %s of %s to %d sites was started by %s", r.Name, ref.ID(), len(r.Sites), by.actor)})
	})
	if err != nil && !errors.Is(err, errDry) {
		return nil, s.coded(ctx, "starting the rollout", err)
	}
	s.hub.changed(eventsTopic(c.Tenant))
	return &musterv1.StartRolloutResponse{Rollout: rolloutToProto(s.cfg.Now(), r, r.Sites)}, nil
}

// rolloutSites chooses the sites and their order: those with the labels that
// come first, then those with nodes, since an empty one proves nothing, each by
// name. A site belongs to one live rollout.
func (p *part) rolloutSites(q *musterv1.StartRolloutRequest) ([]rollout.Site, error) {
	taken := make(map[string]string)
	all, err := p.t.Rollouts(p.Tenant)
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		for _, s := range r.Sites {
			if r.State.Live() {
				taken[s.Name] = r.Name
			}
		}
	}
	var ranks [3][]rollout.Site
	if err := eachSite(p.t, p.Tenant, func(site fleet.Site) error {
		if !placement.Fits(q.Labels, site.Labels) {
			return nil
		}
		if other := taken[site.Name]; other != "" {
			return &enroll.Refused{Why: fmt.Sprintf("site %s is in the rollout %s, which is not at its end", site.Name, other), Do: "let it end, or: muster rollout abort " + other}
		}
		nodes, err := p.t.NodesOfSite(p.Tenant, site.Name, "", 1)
		rank := 2
		switch {
		case len(q.First) > 0 && placement.Fits(q.First, site.Labels):
			rank = 0
		case len(nodes) > 0:
			rank = 1
		}
		ranks[rank] = append(ranks[rank], rollout.Site{Name: site.Name})
		return err
	}); err != nil {
		return nil, err
	}
	out := slices.Concat(ranks[:]...)
	if len(out) == 0 {
		return nil, &enroll.Refused{Why: "no site has these labels", Do: "`muster get sites -o wide` lists them"}
	}
	return out, nil
}

// ListRollouts implements the management service.
func (s management) ListRollouts(ctx context.Context, _ *musterv1.ListRolloutsRequest) (*musterv1.ListRolloutsResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListRolloutsResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		all, err := t.Rollouts(c.Tenant)
		for _, r := range all {
			m := rolloutToProto(s.cfg.Now(), r, nil)
			if !c.part(t).seesAll(access.Site) {
				m.Explanation = "" // it names sites
			}
			out.Rollouts = append(out.Rollouts, m)
		}
		return err
	})
	return out, s.coded(ctx, "listing rollouts", err)
}

// GetRollout implements the management service.
func (s management) GetRollout(ctx context.Context, q *musterv1.GetRolloutRequest) (*musterv1.GetRolloutResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetRolloutResponse{}
	err := s.store.View(ctx, func(t store.Reader) error {
		r, err := findRollout(t, c.Tenant, q.Name)
		if err != nil {
			return err
		}
		look := c.part(t)
		sites, err := filter(look, access.Site, r.Sites, func(x rollout.Site) string { return x.Name })
		if err != nil {
			return err
		}
		out.Rollout = rolloutToProto(s.cfg.Now(), r, sites)
		if !look.seesAll(access.Site) {
			out.Rollout.Explanation = ""
		}
		return nil
	})
	return out, s.coded(ctx, "reading the rollout", err)
}

// ChangeRollout implements the management service.
func (s management) ChangeRollout(ctx context.Context, q *musterv1.ChangeRolloutRequest) (*musterv1.ChangeRolloutResponse, error) {
	acts := map[string]struct {
		do   func(rollout.Rollout, string) (rollout.Rollout, error)
		kind audit.Kind
	}{"pause": {rollout.Pause, audit.RolloutPaused}, "resume": {rollout.Resume, audit.RolloutResumed}, "abort": {rollout.Abort, audit.RolloutAborted}}
	act, known := acts[q.Act]
	if !known {
		return nil, invalid("%.40q is none of pause, resume, abort", q.Act)
	}
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	var r rollout.Rollout
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := c.act(s.cfg.Now())
		if err := c.part(t).may(access.Rollout, access.Change, ""); err != nil {
			return err
		}
		old, err := findRollout(t, c.Tenant, q.Name)
		if err != nil {
			return err
		}
		if err := unchangedSince("rollout", old.Name, q.Revision, old.Revision); err != nil {
			return err
		}
		if r, err = act.do(old, reason); err != nil {
			return &enroll.Refused{Why: strings.TrimPrefix(err.Error(), "rollout: ")}
		}
		r.Updated = by.now
		if r, err = t.PutRollout(r); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, act.kind, "rollout/"+r.Name, rolloutForAudit(old), rolloutForAudit(r), reason); err != nil {
			return err
		}
		return objectEvent(t, by, fleet.Event{Tenant: c.Tenant, Kind: string(act.kind), Text: fmt.Sprintf("rollout %s: %s by %s: %s", r.Name, q.Act, by.actor, reason)})
	})
	if err != nil {
		return nil, s.coded(ctx, "changing the rollout", err)
	}
	s.hub.changed(eventsTopic(c.Tenant))
	return &musterv1.ChangeRolloutResponse{Rollout: rolloutToProto(s.cfg.Now(), r, r.Sites)}, nil
}

func rolloutToProto(now time.Time, r rollout.Rollout, sites []rollout.Site) *musterv1.Rollout {
	m := &musterv1.Rollout{
		Name: r.Name, Revision: r.Revision, Stack: api.StackRefToProto(&r.Plan.Stack), SoakSeconds: r.Plan.Soak, MaxFailed: uint32(r.Plan.MaxFailed),
		TimeoutSeconds: r.Plan.Timeout, AcceptNoReturn: r.Plan.AcceptNoReturn, State: r.State.String(), Explanation: rollout.Explain(now, r), By: r.By,
		Created: timestamppb.New(r.Created), Updated: timestamppb.New(r.Updated), Wave: uint32(r.Wave + 1), WaveSites: uint32(r.Target(r.Wave)),
		SitesTotal: uint32(len(r.Sites)), SitesHealthy: uint32(r.Count(rollout.SiteHealthy)), SitesFailed: uint32(r.Count(rollout.SiteFailed)),
	}
	for _, w := range r.Plan.Waves {
		m.Waves = append(m.Waves, &musterv1.RolloutWave{Sites: uint32(w.Sites), Percent: uint32(w.Percent)})
	}
	for _, x := range sites {
		y := &musterv1.RolloutSite{Name: x.Name, State: x.State.String(), Before: x.Before, Reason: x.Reason, Forgiven: x.Forgiven}
		if !x.Since.IsZero() {
			y.Since = timestamppb.New(x.Since)
		}
		m.Sites = append(m.Sites, y)
	}
	return m
}
