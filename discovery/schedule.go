package discovery

import (
	"math/rand/v2"
	"time"
)

// Lifetimes of records (RFC 6762 §10): 75 minutes for what names no host, 120
// seconds for what does.
const (
	AdvertTTL = 75 * time.Minute
	HostTTL   = 120 * time.Second
)

const (
	// firstGap is the least distance of the first two queries (§5.2) and of
	// the first two announcements (§8.3).
	firstGap = time.Second
	// longestGap is where queries stop growing (§5.2). It is shorter than
	// AdvertTTL, with its jitter too, so that one query renews what is cached
	// and no query per record is needed.
	longestGap = 60 * time.Minute
	// announcements: at 0, 1, 3, 7 and 15 s. Two are the least and eight the
	// most (§8.3); with five, one host in 400 that loses 30 % of the packets
	// hears none of them.
	announcements = 5
)

// Schedule says when to send the next packet of a growing series. The zero
// value is finished.
type Schedule struct {
	at   time.Time
	gap  time.Duration
	left int // packets still to send; < 0 is without end
	rng  *rand.Rand
}

// Queries starts the query series of a link (RFC 6762 §5.2): first after 20
// to 120 ms, then after at least 1 s, each gap at least twice the one before,
// up to an hour.
func Queries(now time.Time, rng *rand.Rand) Schedule {
	return Schedule{at: now.Add(between(rng, 20*time.Millisecond, 120*time.Millisecond)), left: -1, rng: rng}
}

// Announcements starts the announcements of a link (RFC 6762 §8.3). The first
// waits up to 250 ms, since a power cut starts all hosts at once.
func Announcements(now time.Time, rng *rand.Rand) Schedule {
	return Schedule{at: now.Add(between(rng, 0, 250*time.Millisecond)), left: announcements, rng: rng}
}

// At returns when the next packet is due; false when the series is over.
func (s *Schedule) At() (time.Time, bool) { return s.at, s.left != 0 }

// Due reports whether a packet is to be sent now.
func (s *Schedule) Due(now time.Time) bool { return s.left != 0 && !now.Before(s.at) }

// Sent moves on to the next packet.
func (s *Schedule) Sent(now time.Time) {
	if s.left == 0 {
		return
	}
	if s.left > 0 {
		s.left--
	}
	switch {
	case s.gap == 0:
		s.gap = firstGap + between(s.rng, 0, firstGap/10)
	default:
		s.gap = min(2*s.gap+between(s.rng, 0, s.gap/5), longestGap)
	}
	s.at = now.Add(s.gap)
	if s.gap == longestGap {
		s.at = s.at.Add(between(s.rng, 0, longestGap/12))
	}
}

// Failed puts the same packet off by a second: the link had no address yet.
func (s *Schedule) Failed(now time.Time) { s.at = now.Add(firstGap) }

// ReplyAt says when to multicast an answer: shared records wait 20 to 120 ms
// (RFC 6762 §6), after a truncated query 400 to 500 ms, in which further known
// answers arrive (§7.2), and never sooner than a second after the last time
// (§6).
func ReplyAt(now, last time.Time, truncated bool, rng *rand.Rand) time.Time {
	at := now.Add(between(rng, 20*time.Millisecond, 120*time.Millisecond))
	if truncated {
		at = now.Add(between(rng, 400*time.Millisecond, 500*time.Millisecond))
	}
	if next := last.Add(firstGap); !last.IsZero() && at.Before(next) {
		return next
	}
	return at
}

// between draws from [lo, hi].
func between(rng *rand.Rand, lo, hi time.Duration) time.Duration {
	return lo + time.Duration(rng.Int64N(int64(hi-lo)+1))
}
