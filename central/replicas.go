package central

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

const (
	// followEvery is how often a replica asks what others committed: one short
	// question to the database.
	followEvery = 250 * time.Millisecond
	// followLimit is how long a replica serves nodes from memory without
	// having heard of others. A denial reaches every node within it, or the
	// replica falls silent.
	followLimit = 15 * time.Second
)

// follower keeps what is in memory in step with what other replicas commit.
type follower struct {
	s      *Server
	shared store.Shared
	last   uint64
	// heard is when it last succeeded, in nanoseconds.
	heard atomic.Int64
}

// newFollower returns nil when nobody else uses the database. It notes where
// the log of changes stands: what is read after that is not older.
func newFollower(ctx context.Context, s *Server, st store.Store) (*follower, error) {
	shared, ok := st.(store.Shared)
	if !ok {
		return nil, nil
	}
	f := &follower{s: s, shared: shared}
	var err error
	f.last, err = shared.LastChange(ctx)
	f.heard.Store(time.Now().UnixNano())
	return f, err
}

// behind reports that others may have said something long ago that we do not
// know.
func (f *follower) behind() bool {
	return f != nil && time.Since(time.Unix(0, f.heard.Load())) > followLimit
}

// errNewLife: a backup was restored under us.
var errNewLife = errors.New("central: the database was restored from a backup meanwhile: start again")

func (f *follower) run(ctx context.Context) error {
	if f == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		switch err := f.catchUp(ctx); {
		case errors.Is(err, errNewLife):
			return err
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			failing = true
			f.s.log.Warn("other replicas are not heard of", logError, err)
		case err == nil && failing:
			failing = false
			f.s.log.Info("other replicas are heard of again")
		}
	}
}

func (f *follower) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, followLimit/2)
	defer cancel()
	for {
		asked := time.Now()
		c, err := f.shared.Changes(ctx, f.last)
		if errors.Is(err, store.ErrForgotten) {
			if c.Epoch != f.s.epoch {
				return errNewLife
			}
			if c.Last, err = f.shared.LastChange(ctx); err != nil {
				return err
			}
			if err := f.s.loadIndexes(ctx); err != nil {
				return err
			}
			f.last = c.Last
			f.heard.Store(asked.UnixNano())
			return nil
		}
		if err != nil {
			return err
		}
		if c.Epoch != f.s.epoch {
			return errNewLife
		}
		if err := f.apply(ctx, c.All); err != nil {
			return err
		}
		f.last = c.Last
		if !c.More {
			f.heard.Store(asked.UnixNano())
			return nil
		}
	}
}

// apply reads again what others wrote, and wakes who waits for it.
func (f *follower) apply(ctx context.Context, all []store.Change) error {
	if len(all) == 0 {
		return nil
	}
	done := make(map[store.Change]bool, len(all))
	err := f.shared.View(ctx, func(t store.Reader) error {
		clear(done)
		for _, c := range all {
			if done[c] {
				continue
			}
			done[c] = true
			if err := f.read(t, c); err != nil {
				return fmt.Errorf("central: read again %s %s: %w", c.Kind, c.Key, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for c := range done {
		switch c.Kind {
		case store.ChangedRequest:
			f.s.hub.changed(requestTopic(fleet.RequestID(c.Key)))
		case store.ChangedEvents:
			f.s.hub.changed(eventsTopic(c.Tenant))
		case store.ChangedTenant:
			f.s.trust.forget()
		}
	}
	return nil
}

func (f *follower) read(t store.Reader, c store.Change) error {
	switch c.Kind {
	case store.ChangedSite:
		site, err := t.Site(c.Tenant, c.Key)
		if err == nil {
			f.s.sites.put(site)
		} else if errors.Is(err, store.ErrNotFound) {
			f.s.sites.drop(siteKey{c.Tenant, c.Key})
		}
		return missing(err)
	case store.ChangedNode:
		n, err := t.Node(c.Tenant, fleet.NodeID(c.Key))
		if err == nil {
			f.s.index.put(n)
		}
		return missing(err)
	case store.ChangedDenial:
		return f.s.index.readDenied(t, c.Tenant, fleet.NodeID(c.Key))
	}
	return nil
}

// missing takes away that something is not there.
func missing(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// readDenied brings a machine that is no node yet to what the deny list says.
func (x *nodeIndex) readDenied(t store.Reader, tenant string, id fleet.NodeID) error {
	n, err := t.Node(tenant, id)
	if err == nil {
		x.put(n)
		return nil
	}
	if missing(err) != nil {
		return err
	}
	n = fleet.Node{ID: id, Tenant: tenant}
	requests, err := t.RequestsOfNode(tenant, id)
	if err != nil {
		return err
	}
	if len(requests) > 0 {
		r := requests[len(requests)-1]
		n.Hardware = r.Evidence.Hardware
		no, err := denied(t, tenant, []fleet.EKHash{r.Evidence.EK})
		if err != nil {
			return err
		}
		if no {
			n.State = fleet.NodeDenied
		}
	}
	x.put(n)
	return nil
}

// loadIndexes reads all that is kept in memory.
func (s *Server) loadIndexes(ctx context.Context) error {
	if err := s.sites.load(ctx, s.store, DefaultTenant); err != nil {
		return err
	}
	return s.index.load(ctx, s.store, DefaultTenant)
}

// lead does what one replica does for all: it ends what waited too long and
// looks after documents once an hour.
func (s *Server) lead(ctx context.Context) error {
	work := func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return s.sweep(ctx) })
		g.Go(func() error { return s.refreshHourly(ctx) })
		g.Go(func() error { return s.rollOut(ctx) })
		return g.Wait()
	}
	if s.follower == nil {
		return work(ctx)
	}
	return s.follower.shared.Lead(ctx, func(ctx context.Context) error {
		s.log.Info("this replica leads")
		s.leads.Store(true)
		defer s.leads.Store(false)
		return work(ctx)
	})
}
