package central

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-edge/muster/central/store"
)

const (
	// usageEvery is how often uses of credentials go to disk, usageStep how
	// much later a use must be than the last one on disk. Both are small
	// beside the shortest idle time.
	usageEvery = 5 * time.Second
	usageStep  = time.Minute
)

// usage notes when credentials were used last, in batches: reading must not
// cost a write. A crash loses a few seconds of it.
type usage struct {
	store store.Store
	log   *slog.Logger

	mu      sync.Mutex
	last    map[string]time.Time // newest use
	written map[string]time.Time // of it, what is on disk
}

func newUsage(s store.Store, log *slog.Logger) *usage {
	return &usage{store: s, log: log, last: make(map[string]time.Time), written: make(map[string]time.Time)}
}

// maxUsage bounds the memory; what is forgotten is written once more.
const maxUsage = 10000

func (u *usage) note(id string, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.last) >= maxUsage {
		clear(u.last)
		clear(u.written)
	}
	if u.last[id].Before(at) {
		u.last[id] = at
	}
}

// newer is the newest use known.
func (u *usage) newer(id string, onDisk time.Time) time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	if t := u.last[id]; t.After(onDisk) {
		return t
	}
	return onDisk
}

// run writes until ctx ends, then what is left.
func (u *usage) run(ctx context.Context) {
	tick := time.NewTicker(usageEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			u.flush(ctx, usageStep)
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), usageEvery)
			defer cancel()
			u.flush(end, 0)
			return
		}
	}
}

func (u *usage) flush(ctx context.Context, step time.Duration) {
	due := make(map[string]time.Time)
	u.mu.Lock()
	for id, at := range u.last {
		if at.Sub(u.written[id]) > step {
			due[id] = at
		}
	}
	u.mu.Unlock()
	if len(due) == 0 {
		return
	}
	err := u.store.Update(ctx, func(t store.Tx) error {
		for id, at := range due {
			if err := t.UseCredential(id, at); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		u.log.Error("use of credentials not kept", logError, err, logCount, len(due))
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, at := range due {
		u.written[id] = at
	}
}
