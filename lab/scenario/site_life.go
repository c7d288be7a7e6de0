package scenario

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab/host"
	"github.com/muster-edge/muster/lab/host/ether"
)

// race: all boxes get power in the same moment, on a bad LAN, and agree among
// themselves who founds.
func race(ctx context.Context, s *shop) error {
	if err := s.sw.SetAll(s.names(), ether.Faults{Delay: 5 * time.Millisecond, Jitter: 20 * time.Millisecond, Loss: 0.05, Duplicate: 0.02, Reorder: 0.02}); err != nil {
		return err
	}
	s.l.Say("lab", "lan", "5 % of packets get lost, 2 % come twice, 2 % too late")
	began := time.Now()
	if err := s.on(ctx, s.shuffled(s.nodes)...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	return s.l.Check("the bad LAN was bad", func() error {
		for name, c := range s.sw.Counters() {
			if name != wanPort && (c.Lost == 0 || c.Doubled == 0 || c.Overtaken == 0) {
				return fmt.Errorf("nothing befell the packets to %s: %+v", name, c)
			}
		}
		return nil
	}())
}

// late: boxes that come when the site is complete become workers; one that
// nobody approves gets nothing until somebody does.
func late(ctx context.Context, s *shop) error {
	first, later := s.nodes[:3], s.nodes[3:]
	unwanted := later[len(later)-1]
	s.refuse(unwanted)
	began := time.Now()
	if err := s.on(ctx, first...); err != nil {
		return err
	}
	if err := s.form(ctx, began, 3); err != nil {
		return err
	}
	uid, err := s.uid(s.watch.now())
	if err != nil {
		return err
	}
	if err := s.staggered(ctx, 2*time.Second, later...); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)-1); err != nil {
		return err
	}
	secrets, err := s.watch.now().with(s, roleServer)[0].clusterSecrets()
	if err != nil {
		return err
	}
	if err := s.l.Check("who is not approved has nothing of the cluster", unwanted.gotNothing(secrets)); err != nil {
		return err
	}
	s.admit(unwanted)
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	v := s.watch.now()
	var errs []error
	for _, b := range later {
		if v.role(b) != roleWorker {
			errs = append(errs, fmt.Errorf("%s is %s", b.Name(), v.role(b)))
		}
	}
	if got, err := s.uid(v); err != nil || got != uid {
		errs = append(errs, fmt.Errorf("the cluster is %s, it was %s (%w)", got, uid, err))
	}
	return s.l.Check("who came late is a worker of the same cluster", errors.Join(errs...))
}

// partition: the LAN falls apart. The smaller part founds nothing and promotes
// nobody; the larger one goes on; together again all is as before.
func partition(ctx context.Context, s *shop) error {
	began := time.Now()
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	v := s.watch.now()
	servers, workers := v.with(s, roleServer), v.with(s, roleWorker)
	small := []*box{servers[0], workers[0]}
	large := []*box{servers[1], servers[2], workers[1]}
	s.sw.Partition(names(small), names(large))
	s.l.Say("lab", "partition", fmt.Sprintf("the LAN falls apart: %v | %v", names(small), names(large)))
	_, err := s.watch.rests(ctx, "majority", healLimit, 30*time.Second, func(v view) bool {
		return v.best.API && v.best.From != small[0] && v.best.voters() == 3
	})
	if err := s.l.Check("the larger part serves", err); err != nil {
		return err
	}
	if err := s.l.Check("it takes writes", s.mark(ctx, large[0], "while-apart")); err != nil {
		return err
	}
	v = s.watch.now()
	var errs []error
	for _, t := range v.truths {
		if t.From == small[0] && t.API {
			errs = append(errs, fmt.Errorf("%s serves without a majority", t.From.Name()))
		}
	}
	if v.role(small[1]) != roleWorker {
		errs = append(errs, fmt.Errorf("%s is %s", small[1].Name(), v.role(small[1])))
	}
	if v.status[small[0].Name()].Blocker == "" && v.status[small[1].Name()].Blocker == "" {
		errs = append(errs, errors.New("nobody in the smaller part names a blocker"))
	}
	if err := s.l.Check("the smaller part founds and promotes nothing, and says what it waits for", errors.Join(errs...)); err != nil {
		return err
	}
	s.sw.Partition()
	s.l.Say("lab", "together", "the LAN is whole again")
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	return s.l.Check("what was written meanwhile is seen from the smaller part", s.hasMark(ctx, small[0], "while-apart"))
}

// replace: a server never comes back. It is replaced; when it returns after
// all, it is a worker.
func replace(ctx context.Context, s *shop) error {
	began := time.Now()
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	servers := s.watch.now().with(s, roleServer)
	dead := servers[len(servers)-1]
	if err := s.l.Check("something is written into the cluster", s.mark(ctx, servers[0], "before-the-loss")); err != nil {
		return err
	}
	if err := s.cut(dead); err != nil {
		return err
	}
	cut := time.Now()
	v, err := s.watch.until(ctx, "replacement", healLimit+2*time.Minute, func(v view) bool {
		return v.at.After(cut) && v.role(dead) == "" && v.best.API && v.best.voters() == 3 && len(v.with(s, roleServer)) == 3 && !v.best.has(dead)
	})
	if err := s.l.Check("the dead server is replaced by a worker", err); err != nil {
		return err
	}
	s.l.Timing("", "loss_to_replaced_s", v.at.Sub(cut))
	s.watch.mayDemote(dead)
	if err := s.on(ctx, dead); err != nil {
		return err
	}
	_, err = s.watch.rests(ctx, "return", healLimit, rest, func(v view) bool {
		return healthy(s, 3, len(s.nodes))(v) && v.role(dead) == roleWorker
	})
	if err := s.l.Check("who was replaced comes back as a worker", err); err != nil {
		return err
	}
	return s.l.Check("nothing was lost", s.hasMark(ctx, s.watch.now().with(s, roleServer)[0], "before-the-loss"))
}

// coldstart: the power of the whole site fails, and comes back in any order.
func coldstart(ctx context.Context, s *shop) error {
	began := time.Now()
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	v := s.watch.now()
	uid, err := s.uid(v)
	if err != nil {
		return err
	}
	servers := v.with(s, roleServer)
	if err := s.l.Check("something is written into the cluster", s.mark(ctx, servers[0], "before-the-night")); err != nil {
		return err
	}
	if err := s.cut(s.nodes...); err != nil {
		return err
	}
	// No centre either: the street has no power.
	if err := s.centreAway(); err != nil {
		return err
	}
	back := time.Now()
	if err := s.staggered(ctx, 5*time.Second, s.shuffled(s.nodes)...); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	s.l.Timing("", "power_back_to_rest_s", time.Since(back)-rest)
	now := s.watch.now()
	var errs []error
	if got, err := s.uid(now); err != nil || got != uid {
		errs = append(errs, fmt.Errorf("the cluster is %s, it was %s (%w)", got, uid, err))
	}
	for _, b := range servers {
		if now.role(b) != roleServer {
			errs = append(errs, fmt.Errorf("%s was a server and is %s", b.Name(), now.role(b)))
		}
	}
	errs = append(errs, s.hasMark(ctx, servers[1], "before-the-night"))
	if err := s.l.Check("it is the same cluster with the same servers and the same data", errors.Join(errs...)); err != nil {
		return err
	}
	s.centreBack()
	return nil
}

// readdress: first one box, then all get other addresses.
func readdress(ctx context.Context, s *shop) error {
	began := time.Now()
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	servers := s.watch.now().with(s, roleServer)
	if err := s.l.Check("something is written into the cluster", s.mark(ctx, servers[0], "before-the-move")); err != nil {
		return err
	}
	one := servers[1]
	if err := one.SetAddress(ctx, oldLAN+"77"+prefix, oldLAN+routerAt); err != nil {
		return err
	}
	s.l.Say(one.Name(), "address", "its address is "+oldLAN+"77 now")
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	for _, b := range s.nodes {
		if err := b.SetAddress(ctx, newLAN+fmt.Sprint(b.n)+prefix, newLAN+routerAt); err != nil {
			return err
		}
	}
	s.l.Say("lab", "address", "everybody's address is in another network now")
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	return s.l.Check("nothing was lost", s.hasMark(ctx, servers[2], "before-the-move"))
}

// nocentre: the centre goes away when the boxes hold their papers, and is
// never needed again: they found, join, promote, lose power and come back.
func nocentre(ctx context.Context, s *shop) error {
	began := time.Now()
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	_, err := s.watch.until(ctx, "founder", formLimit, func(v view) bool {
		return len(v.with(s, roleServer)) == 1 && admitted(v) == len(s.nodes)
	})
	if err := s.l.Check("all boxes hold their papers, one has the right to found", err); err != nil {
		return err
	}
	if err := s.centreAway(); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	// The twin: what only the centre can give does not come by itself.
	stranger := s.watch.now().with(s, roleWorker)[0]
	if err := errors.Join(s.cut(stranger), stranger.ReplaceDisk()); err != nil {
		return err
	}
	s.l.Say(stranger.Name(), "disk", "its disk is replaced by an empty one")
	if err := s.on(ctx, stranger); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)-1); err != nil {
		return err
	}
	s.centreBack()
	return s.atRest(ctx, 3, len(s.nodes))
}

// admitted counts nodes that know their site.
func admitted(v view) (n int) {
	for _, st := range v.status {
		if st.Site != "" {
			n++
		}
	}
	return n
}

func names(boxes []*box) []string {
	var out []string
	for _, b := range boxes {
		out = append(out, b.Name())
	}
	return out
}

func (s *shop) names() []string { return names(s.nodes) }

// refuse makes a node unwanted until admit.
func (s *shop) refuse(b *box) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.strangers == nil {
		s.opts.strangers = map[string]bool{}
	}
	s.opts.strangers[b.Name()] = true
}

// rogue: a box that nobody approved, and an approved one that runs somebody
// else's system, get nothing.
func rogue(ctx context.Context, s *shop) error {
	members, stranger := s.nodes[:len(s.nodes)-1], s.nodes[len(s.nodes)-1]
	s.refuse(stranger)
	began := time.Now()
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(members)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(members)); err != nil {
		return err
	}
	v := s.watch.now()
	altered := v.with(s, roleWorker)[0]
	secrets, err := v.with(s, roleServer)[0].clusterSecrets()
	if err != nil {
		return err
	}
	if err := s.l.Check("a box that nobody approved has nothing of the cluster", stranger.gotNothing(secrets)); err != nil {
		return err
	}
	if err := s.l.Check("from it no port of k3s can be reached, and peers refuse it", s.knock(ctx, stranger, members)); err != nil {
		return err
	}
	// An approved box boots somebody else's system, with an empty disk: its
	// papers come from the centre or its peers, its join material never.
	s.watch.mayDemote(altered)
	if err := errors.Join(s.cut(altered), altered.ReplaceDisk()); err != nil {
		return err
	}
	altered.Configure(foreignBoot)
	s.l.Say(altered.Name(), "foreign", "it boots somebody else's system")
	if err := s.on(ctx, altered); err != nil {
		return err
	}
	_, err = s.watch.until(ctx, "altered", healLimit, func(v view) bool {
		return v.status[altered.Name()].State != "" && v.best.API
	})
	if err == nil {
		err = sleep.For(ctx, 45*time.Second)
	}
	if err == nil {
		err = altered.gotNothing(secrets)
	}
	if err := s.l.Check("an approved box with somebody else's system gets no join material", err); err != nil {
		return err
	}
	// The twin: the same box with our system is one of us again.
	if err := s.cut(altered); err != nil {
		return err
	}
	altered.Configure(func(c *host.Config) { c.Extra = nil })
	if err := s.on(ctx, altered); err != nil {
		return err
	}
	return s.atRest(ctx, 3, len(members))
}
