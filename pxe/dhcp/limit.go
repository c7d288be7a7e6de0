package dhcp

import (
	"sync"
	"time"

	"github.com/muster-edge/muster/pxe"
)

const (
	// A boot is some ten packets; EDK2 repeats each at 4, 8, 16 and 32 s.
	burst     = 20
	perSecond = 5
	// maxBuckets bounds memory; beyond it the emptiest are forgotten, which
	// only ever lets more through.
	maxBuckets = 8192
)

// limiter is a token bucket per MAC.
type limiter struct {
	mu      sync.Mutex
	buckets map[pxe.MAC]bucket
}

type bucket struct {
	tokens float64
	at     time.Time
}

func newLimiter() *limiter { return &limiter{buckets: map[pxe.MAC]bucket{}} }

// allow reports whether a packet of mac may be handled at now.
func (l *limiter) allow(now time.Time, mac pxe.MAC) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.buckets[mac]
	if !ok {
		if len(l.buckets) >= maxBuckets {
			l.trim(now)
		}
		b = bucket{tokens: burst, at: now}
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(burst, b.tokens+d.Seconds()*perSecond)
		b.at = now
	}
	allowed := b.tokens >= 1
	if allowed {
		b.tokens--
	}
	l.buckets[mac] = b
	return allowed
}

// trim forgets buckets that are full again, and if a flood of MACs left none,
// all of them.
func (l *limiter) trim(now time.Time) {
	for m, b := range l.buckets {
		if now.Sub(b.at).Seconds()*perSecond+b.tokens >= burst {
			delete(l.buckets, m)
		}
	}
	if len(l.buckets) >= maxBuckets {
		clear(l.buckets)
	}
}
