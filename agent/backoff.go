package agent

import "time"

// Backoff grows waits from First to Most by doubling. The zero value waits
// one second at first and a minute at most.
type Backoff struct {
	First, Most time.Duration
	next        time.Duration
}

// Next returns how long to wait now. jitter is in [0,1): it takes away up to
// a quarter, so that machines powered on together spread out.
func (b *Backoff) Next(jitter float64) time.Duration {
	first, most := b.First, b.Most
	if first <= 0 {
		first = time.Second
	}
	if most <= 0 {
		most = time.Minute
	}
	if b.next < first {
		b.next = first
	}
	d := min(b.next, most)
	b.next = min(d*2, most)
	if jitter > 0 && jitter < 1 {
		d -= time.Duration(float64(d) / 4 * jitter)
	}
	return d
}

// Reset starts over after a success.
func (b *Backoff) Reset() { b.next = 0 }
