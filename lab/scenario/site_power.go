package scenario

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/host"
)

// step is a line of the node agent at which the power is cut: the process
// stops there by itself (a build with the tag failpoint), and the lab pulls
// the plug.
type step struct {
	name string
	// founder and candidate are the lines at which each of them is struck, ""
	// if the step is none of theirs.
	founder, candidate string
	// window: the promotion's window may be open, so that a founder that
	// never comes back needs a signed order.
	window bool
}

// steps are in the order of a site's life.
var powerSteps = []step{
	{name: "intent", founder: "member.after.found-cluster"},
	{name: "started", founder: "member.after.start-server"},
	{name: "recorded", founder: "member.after.keep-record"},
	{name: "ledger", founder: "member.after.write-ledger"},
	{name: "joining", candidate: "member.before.start-worker"},
	{name: "joined", candidate: "member.after.start-worker"},
	{name: "prepared", candidate: "member.after.step-plan"},
	{name: "opened", founder: "member.after.lead-plan", window: true},
	{name: "switching", candidate: "member.before.step-plan,2", window: true},
	{name: "switch", candidate: "member.after.step-plan,2", window: true},
	{name: "serving", candidate: "member.after.start-server", window: true},
	{name: "snapshot", founder: "member.after.take-snapshot", window: true},
	{name: "confirming", founder: "member.after.lead-plan,2", window: true},
	{name: "confirmed", founder: "member.before.lead-plan,3"},
}

func stepNames() string {
	var out []string
	for _, s := range powerSteps {
		out = append(out, s.name)
	}
	return strings.Join(out, ", ")
}

// chosenStep finds --step: a name, or the agent's own name of a line.
func chosenStep(spec lab.Spec) (step, string, error) {
	name, who := spec.Step, spec.Who
	if name == "" {
		name = "switch"
	}
	if strings.HasPrefix(name, "member.") {
		if who == "" {
			who = lab.WhoFounder
		}
		return step{name: name, founder: name, candidate: name, window: true}, who, nil
	}
	i := slices.IndexFunc(powerSteps, func(s step) bool { return s.name == name })
	if i < 0 {
		return step{}, "", &lab.UsageError{Err: fmt.Errorf("--step %q: want one of %s", name, stepNames())}
	}
	st := powerSteps[i]
	if who == "" {
		who = lab.WhoFounder
		if st.founder == "" {
			who = lab.WhoCandidate
		}
	}
	if who == lab.WhoFounder && st.founder == "" || who == lab.WhoCandidate && st.candidate == "" {
		return step{}, "", &lab.UsageError{Err: fmt.Errorf("--step %s is no step of the %s", st.name, who)}
	}
	return st, who, nil
}

// powercut: three boxes; while they form a site, the power of one or two of
// them is cut at a certain line of their work.
func powercut(ctx context.Context, s *shop) error {
	st, who, err := chosenStep(s.l.Spec)
	if err != nil {
		return err
	}
	founder, candidate, other := s.box(1), s.box(2), s.box(3)
	struck, at := founder, st.founder
	if who == lab.WhoCandidate || who == lab.WhoBoth && st.founder == "" {
		struck, at = candidate, st.candidate
	}
	lost := []*box{struck}
	if who == lab.WhoBoth {
		lost = []*box{founder, candidate}
	}
	if s.l.Spec.CrashProgram == "" {
		return &lab.Unable{Reason: "powercut wants a node agent that stops at a named line: build bin/muster-node-crash (`make bin/muster-node-crash`)"}
	}
	hit := make(chan struct{}, 1)
	s.onLine(func(node, line string) {
		if node == struck.Name() && strings.HasPrefix(line, "failpoint: killed at ") {
			select {
			case hit <- struct{}{}:
			default:
			}
		}
	})
	struck.Configure(func(c *host.Config) { c.Services = []host.Service{s.crashing(at)} })
	s.watch.mayDemote(s.nodes...) // a reset in the window makes servers workers
	if err := s.on(ctx, founder); err != nil {
		return err
	}
	// The first box is the founder: the others come when it has the right.
	if struck != founder || st.window {
		if _, err := s.watch.until(ctx, "founder", formLimit, func(v view) bool { return v.role(founder) == roleServer }); err != nil {
			return s.l.Check("the first box founds", err)
		}
	} else if err := sleep.For(ctx, 3*time.Second); err != nil {
		return err
	}
	if err := s.on(ctx, candidate, other); err != nil {
		return err
	}
	select {
	case <-hit:
	case <-time.After(formLimit):
		return s.l.Check("the step "+st.name+" is reached by "+struck.Name(), errors.New("it never was"))
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := s.l.Check(fmt.Sprintf("the step %s (%s) is reached by %s, and the power of %d is cut there", st.name, at, struck.Name(), len(lost)), s.cut(lost...)); err != nil {
		return err
	}
	cut := time.Now()
	struck.Configure(func(c *host.Config) { c.Services = []host.Service{s.agent()} })
	if !s.l.Spec.Never {
		if err := sleep.For(ctx, 5*time.Second); err != nil {
			return err
		}
		if err := s.on(ctx, lost...); err != nil {
			return err
		}
		if err := s.atRest(ctx, 3, 3); err != nil {
			return err
		}
		s.l.Timing("", "cut_to_healed_s", time.Since(cut)-rest)
		return nil
	}
	return s.neverBack(ctx, st, founder, lost)
}

// neverBack: who was struck never returns. The rest must not be stuck in
// silence: it serves, or it names what it waits for.
func (s *shop) neverBack(ctx context.Context, st step, founder *box, lost []*box) error {
	left := len(s.nodes) - len(lost)
	founderLost := slices.Contains(lost, founder)
	if !founderLost {
		// The founder's API comes back in any case: from quorum or from a
		// reset to its own data. While a plan is open those that it names may
		// hold what servers hold, so it is waited for that it ends.
		_, err := s.watch.rests(ctx, "API", healLimit, rest, func(v view) bool {
			return v.any && v.best.API && len(v.growing()) == 1 && !slices.Contains(v.states(), "leading") && (oddVoters(v) || len(v.blockers()) > 0) && v.best.ready() >= left
		})
		return s.l.Check("without the lost box the site serves, with 1 or 3 voters or a named blocker", err)
	}
	_, err := s.watch.rests(ctx, "blocker", healLimit, rest, func(v view) bool {
		return len(v.status) == left && (len(v.blockers()) > 0 || healthySome(v))
	})
	if err := s.l.Check("without its founder the rest goes on, or names what it waits for", err); err != nil || st.name != "opened" || healthySome(s.watch.now()) {
		return err
	}
	return s.ordered(ctx, left)
}

// ordered is the way out of a promotion whose founder is lost for good before
// anybody else has the data: a person says so, and the rest begins anew.
func (s *shop) ordered(ctx context.Context, left int) error {
	was, err := s.uid(s.watch.now())
	if err != nil {
		return err
	}
	heir := s.box(2)
	_, err = s.c.muster(ctx, "order", "found", string(heir.ID()), "--site", site, "--reason", "the founder burnt in the middle of the promotion", "--yes")
	if err := s.l.Check("a person orders "+heir.Name()+" to found", err); err != nil {
		return err
	}
	_, err = s.watch.rests(ctx, "rest", orderSilence+healLimit, rest, healthy(s, 1, left))
	if err := s.l.Check(fmt.Sprintf("at rest: one cluster, 1 server that is a voter, %d nodes ready", left), err); err != nil {
		return err
	}
	is, err := s.uid(s.watch.now())
	if err == nil && is == was {
		err = fmt.Errorf("it is still %s", was)
	}
	return s.l.Check("it is a new cluster", err)
}

func oddVoters(v view) bool { n := v.best.voters(); return n == 1 || n == 3 }

func healthySome(v view) bool { return v.any && v.best.API && oddVoters(v) }

// crashing is the node agent that stops at a line.
func (s *shop) crashing(at string) host.Service {
	service := s.agent()
	service.Argv[0] = s.l.Spec.CrashProgram
	service.Env = append(service.Env, "MUSTER_FAILPOINT="+at)
	return service
}
