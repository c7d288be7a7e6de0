package ether

import (
	"container/heap"
	"time"
)

// queue holds the frames on their way to one port, the next due first. It is
// guarded by the switch's lock.
type queue struct {
	items waiting
	n     uint64
	wake  chan struct{}
}

type item struct {
	due   time.Time
	n     uint64 // frames that are due at once keep their order
	frame []byte
}

func (q *queue) len() int { return len(q.items) }

func (q *queue) push(due time.Time, frame []byte) {
	q.n++
	heap.Push(&q.items, item{due, q.n, frame})
	if q.items[0].n == q.n { // it is the next: whoever waits must look again
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
}

// pop returns the next frame if it is due, else how long to wait.
func (q *queue) pop(now time.Time) (frame []byte, wait time.Duration, ok bool) {
	if len(q.items) == 0 {
		return nil, time.Hour, false
	}
	if wait := q.items[0].due.Sub(now); wait > 0 {
		return nil, wait, false
	}
	return heap.Pop(&q.items).(item).frame, 0, true
}

// waiting implements heap.Interface.
type waiting []item

func (w waiting) Len() int { return len(w) }
func (w waiting) Less(i, j int) bool {
	if w[i].due.Equal(w[j].due) {
		return w[i].n < w[j].n
	}
	return w[i].due.Before(w[j].due)
}
func (w waiting) Swap(i, j int) { w[i], w[j] = w[j], w[i] }
func (w *waiting) Push(x any)   { *w = append(*w, x.(item)) }
func (w *waiting) Pop() any {
	old := *w
	last := old[len(old)-1]
	old[len(old)-1] = item{}
	*w = old[:len(old)-1]
	return last
}
