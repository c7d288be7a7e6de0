package scenario

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// apart forms two clusters on the two halves of a LAN that is split from the
// beginning.
func (s *shop) apart(ctx context.Context) (a, b []*box, err error) {
	half := len(s.nodes) / 2
	a, b = s.nodes[:half], s.nodes[half:]
	s.sw.Partition(names(a), names(b))
	s.watch.split()
	s.l.Say("lab", "partition", fmt.Sprintf("the LAN is in two parts: %v | %v", names(a), names(b)))
	if err := s.on(ctx, s.nodes...); err != nil {
		return a, b, err
	}
	_, err = s.watch.until(ctx, "two clusters", formLimit, func(v view) bool {
		ready := 0
		for _, t := range v.truths {
			if t.API && t.ready() == half {
				ready++
			}
		}
		return ready == 2 && len(v.growing()) == 2
	})
	return a, b, s.l.Check("each part founds a cluster of its own, since either could be alone", err)
}

// server is the one server of a part.
func (s *shop) server(part []*box) *box {
	v := s.watch.now()
	for _, b := range part {
		if v.role(b) == roleServer {
			return b
		}
	}
	return nil
}

func (s *shop) together() {
	s.sw.Partition()
	s.watch.joined()
	s.l.Say("lab", "together", "the LAN is whole")
}

// meetVirgin: two clusters with nothing in them meet. One dissolves, and its
// nodes join the other.
func meetVirgin(ctx context.Context, s *shop) error {
	if _, _, err := s.apart(ctx); err != nil {
		return err
	}
	s.watch.mayDemote(s.nodes...)
	s.together()
	met := time.Now()
	v, err := s.watch.until(ctx, "one cluster", healLimit, func(v view) bool { return len(v.growing()) == 1 })
	if err := s.l.Check("one of the two stops growing", err); err != nil {
		return err
	}
	s.l.Timing("", "met_to_one_grows_s", v.at.Sub(met))
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	_, err = s.uid(s.watch.now())
	return s.l.Check("all nodes are in one cluster", err)
}

// meetUsed: two clusters with data meet. Nobody merges or throws away data:
// one is fenced, and a person is asked.
func meetUsed(ctx context.Context, s *shop) error {
	a, b, err := s.apart(ctx)
	if err != nil {
		return err
	}
	for i, part := range [][]*box{a, b} {
		server := s.server(part)
		if server == nil {
			return fmt.Errorf("scenario: part %d has no server", i+1)
		}
		if err := s.l.Check(fmt.Sprintf("somebody uses the cluster of part %d", i+1), s.claimVolume(ctx, server, fmt.Sprintf("data-%d", i+1))); err != nil {
			return err
		}
	}
	s.together()
	_, err = s.watch.rests(ctx, "fenced", healLimit, 30*time.Second, func(v view) bool {
		return len(v.growing()) == 1 && slices.Contains(v.states(), "fenced") && slices.Contains(v.blockers(), "two-clusters")
	})
	if err := s.l.Check("one of the two is fenced, and says that a person must decide", err); err != nil {
		return err
	}
	var errs []error
	for i, part := range [][]*box{a, b} {
		errs = append(errs, s.hasVolume(ctx, s.server(part), fmt.Sprintf("data-%d", i+1)))
	}
	return s.l.Check("both still have their data", errors.Join(errs...))
}

func (v view) states() (out []string) {
	for _, st := range v.status {
		out = append(out, st.State)
	}
	return out
}

// claimVolume makes what no cluster has that nobody uses.
func (s *shop) claimVolume(ctx context.Context, b *box, name string) error {
	k, err := b.kube(b)
	if err != nil {
		return err
	}
	return post(ctx, k.client, k.base+"/api/v1/namespaces/default/persistentvolumeclaims", fmt.Sprintf(
		`{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":%q},"spec":{"accessModes":["ReadWriteOnce"],"resources":{"requests":{"storage":"1Mi"}}}}`, name))
}

func (s *shop) hasVolume(ctx context.Context, b *box, name string) error {
	if b == nil {
		return errors.New("there is no server")
	}
	k, err := b.kube(b)
	if err != nil {
		return err
	}
	return get(ctx, k.client, k.base+"/api/v1/namespaces/default/persistentvolumeclaims/"+name, nil)
}
