package central

import (
	"log/slog"
	"sync"
	"time"
)

const (
	refusalBurst = 100
	refusalEvery = 200 * time.Millisecond
)

// refusals writes log lines about strangers whose calls are refused, and not
// more of them than a disk and a person bear: who proves nothing decides how
// many there are. The metrics count them all.
type refusals struct {
	log *slog.Logger
	now func() time.Time

	mu     sync.Mutex
	spent  int
	at     time.Time
	unsaid int
}

func newRefusals(log *slog.Logger, now func() time.Time) *refusals {
	return &refusals{log: log, now: now}
}

// say writes one line, or counts it.
func (r *refusals) say(text string, args ...any) {
	r.mu.Lock()
	now := r.now()
	if n := now.Sub(r.at).Abs() / refusalEvery; n > 0 {
		r.spent = max(0, r.spent-int(min(n, refusalBurst)))
		r.at = now
	}
	if r.spent >= refusalBurst {
		r.unsaid++
		r.mu.Unlock()
		return
	}
	r.spent++
	unsaid := r.unsaid
	r.unsaid = 0
	r.mu.Unlock()
	if unsaid > 0 {
		args = append(args, logUnsaid, unsaid)
	}
	r.log.Info(text, args...)
}
