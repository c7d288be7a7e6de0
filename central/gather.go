package central

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/muster-edge/muster/central/store"
)

// gatherBatch bounds how many wait for one commit together.
const gatherBatch = 200

// gather joins small transactions into one commit when they come faster than a
// disk flushes: after a restart every node of the fleet reports whole. Each is
// acknowledged only after the commit that holds it. If one of them fails, none
// counts, and each is run alone.
type gather struct {
	store store.Store

	mu      sync.Mutex
	waiting []*gathered
	busy    bool
}

type gathered struct {
	f    func(store.Tx) error
	done chan error
}

// errAlone tells one that waits to run by itself.
var errAlone = errors.New("central: run alone")

// update runs f as store.Update does. f may run more than once.
func (g *gather) update(ctx context.Context, f func(store.Tx) error) error {
	w := &gathered{f, make(chan error, 1)}
	g.mu.Lock()
	g.waiting = append(g.waiting, w)
	first := !g.busy
	g.busy = true
	g.mu.Unlock()
	if first {
		go g.run()
	}
	// Not shorter for an impatient caller: f may be running.
	if err := <-w.done; !errors.Is(err, errAlone) {
		return err
	}
	return g.store.Update(ctx, f)
}

func (g *gather) run() {
	for {
		g.mu.Lock()
		batch := g.waiting[:min(len(g.waiting), gatherBatch)]
		g.waiting = g.waiting[len(batch):]
		if len(batch) == 0 {
			g.busy, g.waiting = false, nil
			g.mu.Unlock()
			return
		}
		g.mu.Unlock()
		err := g.commit(batch)
		if err != nil {
			err = errAlone
		}
		for _, w := range batch {
			w.done <- err
		}
	}
}

// commit runs all of a batch in one transaction. A panic of one is an error
// here: it comes again where that one runs alone.
func (g *gather) commit(batch []*gathered) (err error) {
	if len(batch) == 1 {
		return errAlone
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("central: a gathered transaction panicked: %v", p)
		}
	}()
	return g.store.Update(context.Background(), func(t store.Tx) error {
		for _, w := range batch {
			if err := w.f(t); err != nil {
				return err
			}
		}
		return nil
	})
}
