package agent

import (
	"sync"
	"time"
)

// Heartbeat tells whether the main loop is alive. The loop beats; the
// watchdog asks before it pets the hardware. Durations are on a clock that
// never jumps (time since start), so that setting the time kills nobody.
type Heartbeat struct {
	// Patience is how long without a beat counts as alive.
	Patience time.Duration

	mu   sync.Mutex
	last time.Duration
}

// Beat renews the heartbeat at uptime now.
func (h *Heartbeat) Beat(now time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = max(h.last, now)
}

// Alive reports whether the last beat is recent enough at uptime now, and
// how old it is.
func (h *Heartbeat) Alive(now time.Duration) (bool, time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	age := max(0, now-h.last)
	return age <= h.Patience, age
}
