package scenario

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/host"
)

// Limits of what a site may take. They are for broken runs: a good one is much
// faster, and nothing is judged by them but that it ends.
const (
	formLimit = 6 * time.Minute
	healLimit = 6 * time.Minute
	// rest is how long a site must stay as it is to be at rest.
	rest = 15 * time.Second
)

// shopScenario runs steps in a shop, with the centre alive, the watch looking
// all the time, and the same checks at the end of each scenario.
func shopScenario(o shopOptions, steps func(context.Context, *shop) error) func(context.Context, *lab.Lab) error {
	return func(ctx context.Context, l *lab.Lab) error {
		s, err := openShop(ctx, l, o)
		if err != nil {
			return err
		}
		l.Say("lab", "k3s", map[bool]string{true: "nodes run the STAND-IN for k3s (" + l.Spec.K3sVersion + "): what holds here is not proved of a real k3s",
			false: "nodes run a real k3s: " + l.Spec.K3sVersion}[l.Spec.StandIn])
		err = s.c.alive(ctx, func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			var g sync.WaitGroup
			defer g.Wait()
			defer cancel()
			g.Go(func() { s.person(ctx) })
			if err := steps(ctx, s); err != nil {
				return err
			}
			return s.last(ctx)
		})
		s.report()
		return err
	}
}

// last are the checks that every scenario ends with.
func (s *shop) last(ctx context.Context) error {
	if err := s.l.Check("all the time: never two growing clusters, voters 1 or 3 or a named blocker, no role flips by itself", s.watch.verdict()); err != nil {
		return err
	}
	return s.checkSecrets()
}

// report puts what is at the end into the result, whether it held or not.
func (s *shop) report() {
	v := s.watch.now()
	s.l.Site(func(r *lab.SiteResult) {
		r.Servers, r.Voters, r.Clusters = len(v.with(s, roleServer)), v.best.voters(), len(v.growing())
		if r.APIGap["pod"] == nil && s.l.Spec.StandIn {
			r.Remarks = append(r.Remarks, "api_gap_ms.pod: the stand-in runs no containers, so there is no pod to look from")
		}
	})
	for _, b := range s.nodes {
		s.l.Note(b.Name(), "counters", fmt.Sprintf("%+v", s.sw.Counters()[b.Name()]))
	}
	s.l.Note("lab", "end-view", v.String())
}

// person approves what waits in the queue, as an operator does, until ctx
// ends.
func (s *shop) person(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		list, err := s.c.requests(ctx)
		if err != nil && ctx.Err() == nil {
			s.l.Note("person", "failed", err.Error())
		}
		for _, r := range list {
			if r.State == fleet.RequestPending && s.wanted(r) {
				s.let(ctx, r)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// wanted reports whether a person approves this request.
func (s *shop) wanted(r fleet.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.byID(string(r.Node))
	return b != nil && !s.opts.strangers[b.Name()] && !s.approved[seen(r)]
}

// seen names what a person decided on: a request whose evidence changed is to
// be decided anew.
func seen(r fleet.Request) string { return fmt.Sprintf("%s@%d", r.ID, r.Revision) }

func (s *shop) let(ctx context.Context, r fleet.Request) {
	b := s.byID(string(r.Node))
	_, err := s.c.muster(ctx, "approve", string(r.ID), "--site", site)
	var refused *lab.CommandError
	if err == nil || errors.As(err, &refused) {
		s.mu.Lock()
		s.approved[seen(r)] = true // a person reads a refusal and does not ask again
		s.mu.Unlock()
	}
	if err != nil {
		s.l.Note("person", "refused", err.Error())
		return
	}
	s.l.Say("person", "approved", fmt.Sprintf("%s (%s) is approved for site %s: identity %s, boot %s", b.Name(), r.Words, site, r.Identity, r.Boot))
}

// admit makes a stranger wanted.
func (s *shop) admit(b *box) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.opts.strangers, b.Name())
}

// Facts about a view.

// healthy: one cluster with an API, so many servers, all voters, and so many
// ready nodes.
func healthy(s *shop, servers, ready int) func(view) bool {
	return func(v view) bool {
		return v.any && v.best.API && len(v.growing()) == 1 && len(v.with(s, roleServer)) == servers &&
			v.best.voters() == servers && len(v.best.Members) == servers && v.best.ready() >= ready && len(v.with(s, roleCandidate)) == 0
	}
}

// form waits until the nodes that are on are a site with as many servers as
// they should be, and notes the times.
func (s *shop) form(ctx context.Context, began time.Time, nodes int) error {
	servers := 1
	if nodes >= 3 {
		servers = 3
	}
	var waited time.Duration // for what policy wants, not for work
	founding := time.Time{}
	v, err := s.watch.until(ctx, "the first server", formLimit, func(v view) bool {
		if founding.IsZero() && (slices.Contains(v.states(), "founding") || len(v.with(s, roleServer)) > 0) {
			founding = v.at
		}
		return v.any && v.best.API && len(v.with(s, roleServer)) > 0
	})
	if err := s.l.Check("a first server is up", err); err != nil {
		return err
	}
	s.l.Timing("", "start_to_first_server_s", v.at.Sub(began))
	if s.opts.founding == fleet.FoundFirst {
		waited = founding.Sub(began) // the survey: looking around before anybody claims
	}
	gaps := s.probe(ctx)
	defer gaps.end()
	v, err = s.watch.until(ctx, "all nodes ready", formLimit, func(v view) bool { return v.best.ready() >= nodes })
	if err := s.l.Check(fmt.Sprintf("all %d nodes are ready in one cluster", nodes), err); err != nil {
		return err
	}
	ready := v.at
	s.l.Timing("", "start_to_all_ready_s", ready.Sub(began))
	var voting time.Time // the third vote: what a script would call done; ours still confirms
	var begun time.Time  // the promotion: until then it was policy that waited
	v, err = s.watch.until(ctx, "servers", formLimit, func(v view) bool {
		if begun.IsZero() && (slices.Contains(v.states(), "leading") || len(v.with(s, roleServer)) > 1) {
			begun = v.at
		}
		if voting.IsZero() && v.best.API && v.best.voters() == 3 && len(v.best.Members) == 3 {
			voting = v.at
		}
		return healthy(s, servers, nodes)(v)
	})
	if err := s.l.Check(fmt.Sprintf("%d servers, all of them voters", servers), err); err != nil {
		return err
	}
	if servers == 3 {
		s.l.Timing("", "ready_to_three_voters_s", v.at.Sub(ready))
		if !voting.IsZero() {
			s.l.Timing("", "ready_to_votes_s", voting.Sub(ready))
		}
		s.l.Timing("", "policy_wait_s", waited+max(begun.Sub(ready), 0))
	}
	gaps.end()
	gaps.report()
	return nil
}

// atRest waits until the site is healthy and stays so.
func (s *shop) atRest(ctx context.Context, servers, ready int) error {
	// A power cut in k3s's first minute can cost the first server its keys; it
	// is then made anew.
	_, err := s.watch.rests(ctx, "rest", healLimit+clusterbootstrap.Policy{}.WithDefaults().FoundLimit, rest, healthy(s, servers, ready))
	return s.l.Check(fmt.Sprintf("at rest: one cluster, %d servers that are voters, %d nodes ready", servers, ready), err)
}

// shuffled is the shop's nodes in an order that the seed decides.
func (s *shop) shuffled(boxes []*box) []*box {
	out := append([]*box(nil), boxes...)
	r := rand.New(rand.NewPCG(s.l.Spec.Seed, 1))
	r.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// staggered switches nodes on one after the other.
func (s *shop) staggered(ctx context.Context, every time.Duration, boxes ...*box) error {
	if every == 0 {
		return s.on(ctx, boxes...)
	}
	for i, b := range boxes {
		if i > 0 {
			if err := sleep.For(ctx, every); err != nil {
				return err
			}
		}
		if err := s.on(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// Marks in the cluster's data: what must still be there after whatever
// happened.

// mark writes a ConfigMap by the API of a server.
func (s *shop) mark(ctx context.Context, b *box, name string) error {
	k, err := b.kube(b)
	if err != nil {
		return err
	}
	body := fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":%q},"data":{"mark":%q}}`, name, name)
	return post(ctx, k.client, k.base+"/api/v1/namespaces/default/configmaps", body)
}

// hasMark reports whether a mark is there, seen from b.
func (s *shop) hasMark(ctx context.Context, b *box, name string) error {
	k, err := b.kube(b)
	if err != nil {
		return err
	}
	var out struct {
		Data map[string]string `json:"data"`
	}
	if err := get(ctx, k.client, k.base+"/api/v1/namespaces/default/configmaps/"+name, &out); err != nil {
		return err
	}
	if out.Data["mark"] != name {
		return fmt.Errorf("the mark %s says %q", name, out.Data["mark"])
	}
	return nil
}

// uid is the cluster's UID as the nodes say; an error if they do not agree.
func (s *shop) uid(v view) (string, error) {
	uid := ""
	for name, st := range v.status {
		switch {
		case st.ClusterUID == "":
		case uid == "":
			uid = st.ClusterUID
		case uid != st.ClusterUID:
			return "", fmt.Errorf("%s says cluster %s, others %s", name, st.ClusterUID, uid)
		}
	}
	if uid == "" {
		return "", errors.New("no node names a cluster")
	}
	return uid, nil
}

// gotNothing returns an error if a node that nobody admitted has anything of
// the cluster.
func (b *box) gotNothing(secrets []canary) error {
	root := b.Files()
	var errs []error
	for _, path := range []string{k3sData, "/etc/rancher/k3s/config.yaml", kubeconfig} {
		entries, err := os.ReadDir(root + path)
		if err == nil && len(entries) == 0 {
			continue
		}
		if _, err := os.Stat(root + path); err == nil {
			errs = append(errs, fmt.Errorf("%s has %s", b.Name(), path))
		}
	}
	return errors.Join(append(errs, b.holds(secrets))...)
}

// stranger adds what is not ours to what a node measured.
func foreignBoot(c *host.Config) {
	c.Extra = []host.Event{host.Measured(4, []byte("somebody else's operating system"))}
}
