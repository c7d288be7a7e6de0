package central

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

// hub wakes those who wait for something to change. It carries no data: who
// is woken reads the store, so that a lost wake-up costs time, not truth.
type hub struct {
	mu      sync.Mutex
	waiting map[string]map[chan struct{}]struct{}
}

func newHub() *hub { return &hub{waiting: make(map[string]map[chan struct{}]struct{})} }

// wait returns a channel that gets a value when topic changes, and the
// function that ends the wait.
func (h *hub) wait(topic string) (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.waiting[topic] == nil {
		h.waiting[topic] = make(map[chan struct{}]struct{})
	}
	h.waiting[topic][c] = struct{}{}
	return c, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.waiting[topic], c)
		if len(h.waiting[topic]) == 0 {
			delete(h.waiting, topic)
		}
	}
}

func (h *hub) changed(topic string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.waiting[topic] {
		select {
		case c <- struct{}{}:
		default: // it is awake already
		}
	}
}

func eventsTopic(tenant string) string { return "events/" + tenant }

func requestTopic(id fleet.RequestID) string { return "request/" + string(id) }

const (
	eventQueue = 4096
	eventBatch = 256
	eventDelay = 200 * time.Millisecond
)

// journal writes events that belong to no transaction, such as the steps of
// booting machines: in batches, from a bounded queue, dropping what a storm
// brings beyond that. Its metrics count the dropped.
type journal struct {
	store   store.Store
	hub     *hub
	log     *slog.Logger
	dropped func()
	queue   chan fleet.Event
}

func newJournal(s store.Store, h *hub, log *slog.Logger, dropped func()) *journal {
	return &journal{store: s, hub: h, log: log, dropped: dropped, queue: make(chan fleet.Event, eventQueue)}
}

// add never blocks. Text from machines is cleaned here, once for all.
func (j *journal) add(e fleet.Event) {
	select {
	case j.queue <- cleanEvent(e):
	default:
		j.dropped()
	}
}

// run writes until ctx ends, then writes what is left.
func (j *journal) run(ctx context.Context) {
	tick := time.NewTicker(eventDelay)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			j.flush(ctx)
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			j.flush(end)
			return
		}
	}
}

func (j *journal) flush(ctx context.Context) {
	for len(j.queue) > 0 {
		batch := make([]fleet.Event, 0, eventBatch)
		for len(batch) < eventBatch && len(j.queue) > 0 {
			batch = append(batch, <-j.queue)
		}
		err := j.store.Update(ctx, func(t store.Tx) error {
			for _, e := range batch {
				if _, err := t.AddEvent(e); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			j.log.Error("events lost", logError, err, logCount, len(batch))
			return
		}
		for _, e := range batch {
			j.hub.changed(eventsTopic(e.Tenant))
		}
	}
}

func cleanEvent(e fleet.Event) fleet.Event {
	e.Text = text.Clean(e.Text, 512)
	e.MAC = text.Clean(e.MAC, 32)
	if len(e.Fields) > 0 {
		fields := make(map[string]string, len(e.Fields))
		for k, v := range e.Fields {
			if len(fields) == 32 {
				break
			}
			fields[text.Clean(k, 64)] = text.Clean(v, 256)
		}
		e.Fields = fields
	}
	return e
}

// eventGap says why what came after an event is not known any more, "" if it
// is: the ring has dropped the next one, or numbers ended below, since the
// database was restored from a backup.
func (s *Server) eventGap(ctx context.Context, tenant string, after uint64) (gap string, err error) {
	err = s.store.View(ctx, func(t store.Reader) error {
		last, err := t.LastEvent(tenant)
		if err != nil {
			return err
		}
		first, err := t.Events(tenant, 0, 1)
		if err != nil {
			return err
		}
		switch {
		case after > last:
			gap = fmt.Sprintf("event %d is not known here, the last one is %d: a backup was restored", after, last)
		case len(first) > 0 && first[0].Seq > after+1:
			gap = fmt.Sprintf("what came after event %d is not kept any more, the oldest one is %d", after, first[0].Seq)
		}
		return nil
	})
	return gap, err
}

// objectEvent tells those who watch that people changed something that has no
// event of its own.
func objectEvent(t store.Tx, by act, e fleet.Event) error {
	e.Time = by.now
	_, err := t.AddEvent(cleanEvent(e))
	return err
}
