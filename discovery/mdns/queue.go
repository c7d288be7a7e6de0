package mdns

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/muster-edge/muster/discovery"
)

// queue holds hints for a caller that may be slow: one per address, the latest.
type queue struct {
	most    int
	ready   chan struct{} // has room for one token
	dropped atomic.Uint64

	mu   sync.Mutex
	list []discovery.Hint
	at   map[netip.AddrPort]int
}

func newQueue(most int) *queue {
	return &queue{most: most, ready: make(chan struct{}, 1), at: map[netip.AddrPort]int{}}
}

// put never blocks. A full queue gives up a random hint, so that a flood does
// not shut out what comes after it.
func (q *queue) put(h discovery.Hint) {
	q.mu.Lock()
	i, ok := q.at[h.Addr]
	switch {
	case ok:
	case len(q.list) < q.most:
		i = len(q.list)
		q.list = append(q.list, discovery.Hint{})
	default:
		i = rand.IntN(len(q.list))
		delete(q.at, q.list[i].Addr)
		q.dropped.Add(1)
	}
	q.list[i] = h
	q.at[h.Addr] = i
	q.mu.Unlock()
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

func (q *queue) wait(ctx context.Context) ([]discovery.Hint, error) {
	for {
		q.mu.Lock()
		list := q.list
		if len(list) > 0 {
			q.list, q.at = nil, map[netip.AddrPort]int{}
		}
		q.mu.Unlock()
		if len(list) > 0 {
			return list, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-q.ready:
		}
	}
}
