package central

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/storetest"
)

// counting counts commits, and holds the first until it is let go.
type counting struct {
	store.Store
	n    atomic.Int64
	hold chan struct{}
}

func (c *counting) Update(ctx context.Context, f func(store.Tx) error) error {
	if c.n.Add(1) == 1 {
		<-c.hold
	}
	return c.Store.Update(ctx, f)
}

// TestGather: many share a commit; one that fails or panics harms nobody else,
// and each counts once.
func TestGather(t *testing.T) {
	h := newHarness(t, t.TempDir())
	c := &counting{Store: h.s.store, hold: make(chan struct{})}
	g := &gather{store: c}
	boom := errors.New("no")
	const n = 100
	var wg sync.WaitGroup
	var failed, panicked atomic.Int64
	for i := range n {
		wg.Go(func() {
			defer func() {
				if recover() != nil {
					panicked.Add(1)
				}
			}()
			err := g.update(context.Background(), func(tx store.Tx) error {
				switch i {
				case 50:
					return boom
				case 51:
					panic("bad")
				}
				_, err := tx.PutSite(storetest.Site(DefaultTenant, fmt.Sprintf("g%03d", i)))
				return err
			})
			switch {
			case errors.Is(err, boom):
				failed.Add(1)
			case err != nil:
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	close(c.hold)
	wg.Wait()
	if failed.Load() != 1 || panicked.Load() != 1 {
		t.Errorf("%d failed and %d panicked, want one each", failed.Load(), panicked.Load())
	}
	var sites int
	if err := h.s.store.View(context.Background(), func(r store.Reader) error {
		all, err := r.Sites(DefaultTenant, "g", 1000)
		sites = len(all)
		return err
	}); err != nil || sites != n-2 {
		t.Errorf("%d sites, want %d (%v)", sites, n-2, err)
	}
	// Without a failure they do share.
	c.n.Store(1)
	c.Store = h.s.store
	// The runner is away until all wait: how a machine schedules does not
	// matter.
	g.mu.Lock()
	g.busy = true
	g.mu.Unlock()
	for i := range n {
		wg.Go(func() {
			if err := g.update(context.Background(), func(tx store.Tx) error {
				_, err := tx.PutSite(storetest.Site(DefaultTenant, fmt.Sprintf("h%03d", i)))
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	for all := 0; all < n; runtime.Gosched() {
		g.mu.Lock()
		all = len(g.waiting)
		g.mu.Unlock()
	}
	go g.run()
	wg.Wait()
	if commits := c.n.Load() - 1; commits != 1 {
		t.Errorf("%d transactions took %d commits, want one", n, commits)
	}
}
