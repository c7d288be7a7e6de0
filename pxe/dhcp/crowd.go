package dhcp

import (
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"github.com/muster-edge/muster/pxe"
)

// Strangers are machines that nobody knows. Their MAC addresses are free to
// invent, so what all of them together may take is bounded, for the sake of
// the machines that are known:
//
//   - an eighth of each range is kept for known machines (as long as these
//     have not taken it);
//   - a stranger's first packet spends a token of the place it came from:
//     strangersBurst at once, strangersPerSecond in the long run;
//   - when half of what strangers may have is taken, their leases are on
//     probation, so that invented machines are gone after minutes;
//   - packets of known machines have a queue and workers of their own.
const (
	keptShare          = 8
	strangersBurst     = 512
	strangersPerSecond = 64
	probation          = 2 * time.Minute
	// fullFor is how long a range is not searched again for strangers after
	// nothing was found in it.
	fullFor = time.Second
	// alarmEvery is the pause between two alarms about the same thing.
	alarmEvery = 10 * time.Minute
	// maxPlaces bounds the places that have tokens of their own; beyond it
	// new places share one.
	maxPlaces = 256
	// crowdAlarm is how many strangers must be turned away between two
	// alarms for the first of them.
	crowdAlarm = 100
)

// crowd counts strangers by the place they ask from: a relay and its circuit
// (option 82, which the relay adds), or the interface's own network. On one
// Ethernet nothing tells two clients apart that invent their addresses.
type crowd struct {
	seed maphash.Seed

	mu     sync.Mutex
	places map[uint64]*bucket
	turned int
	said   map[string]alarmed
}

// alarmed is an alarm that was given.
type alarmed struct {
	at time.Time
	// since counts what would have been alarms.
	since int
}

func newCrowd() *crowd {
	return &crowd{seed: maphash.MakeSeed(), places: map[uint64]*bucket{}, said: map[string]alarmed{}}
}

// admit reports whether a stranger at a place may ask for something new.
func (c *crowd) admit(now time.Time, relay netip.Addr, circuit []byte) bool {
	var key uint64
	if relay.IsValid() {
		var h maphash.Hash
		h.SetSeed(c.seed)
		b := relay.As4()
		h.Write(b[:])
		h.Write(circuit[:min(len(circuit), 255)])
		key = h.Sum64() | 1
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.places[key]
	if !ok {
		if key != 0 && len(c.places) >= maxPlaces {
			for k, b := range c.places {
				if k != 0 && now.Sub(b.at).Seconds()*strangersPerSecond+b.tokens >= strangersBurst {
					delete(c.places, k)
				}
			}
		}
		if len(c.places) >= maxPlaces {
			// All other places share one.
			key = 2
			b = c.places[key]
		}
		if b == nil {
			b = &bucket{tokens: strangersBurst, at: now}
			c.places[key] = b
		}
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(strangersBurst, b.tokens+d.Seconds()*strangersPerSecond)
		b.at = now
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// tell reports whether an alarm may be given now, and how many were kept
// back since the last one.
func (c *crowd) tell(now time.Time, what string) (since int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, again := c.said[what]
	if again && now.Sub(a.at).Abs() < alarmEvery {
		a.since++
		c.said[what] = a
		return 0, false
	}
	c.said[what] = alarmed{at: now}
	return a.since, true
}

// turnedAway counts a stranger that was not served, and raises the alarm when
// there are many.
func (s *Server) turnedAway(now time.Time) {
	s.drops.Add(1)
	s.crowd.mu.Lock()
	s.crowd.turned++
	n := s.crowd.turned
	s.crowd.mu.Unlock()
	if n < crowdAlarm {
		return
	}
	since, ok := s.crowd.tell(now, "crowd")
	if !ok {
		return
	}
	s.crowd.mu.Lock()
	s.crowd.turned = 0
	s.crowd.mu.Unlock()
	s.cfg.Decider.Event(pxe.Event{Time: now, Alarm: true, Text: fmt.Sprintf("more machines that nobody knows ask for an address than a site can hold (%d turned away): "+
		"somebody may be inventing them to use up addresses. Known machines keep theirs and are served first", n+since)})
}

// full raises the alarm that a range has no address left for a machine; left
// is how many are kept for others.
func (s *Server) full(now time.Time, mac pxe.MAC, p *Pool, left int) {
	what := "no free address left in " + p.From.String() + "-" + p.To.String()
	if left > 0 {
		what = "no address left for unknown machines in " + p.From.String() + "-" + p.To.String() + "; the rest is kept for known ones"
	}
	since, ok := s.crowd.tell(now, what)
	if !ok {
		return
	}
	if since > 0 {
		what += fmt.Sprintf(" (and %d more packets since the last alarm)", since)
	}
	s.cfg.Decider.Event(pxe.Event{Time: now, MAC: mac, Alarm: true, Text: what})
}

// familiar reports whether a datagram comes from a machine that is known or
// holds a lease, without parsing more than its hardware address. It decides
// on the queue, on nothing else.
func (s *Server) familiar(b []byte) bool {
	if len(b) < 34 || b[2] != 6 {
		return false
	}
	mac := pxe.MAC(b[28:34])
	return s.holds(mac, true) || s.cfg.Decider.Known(mac)
}

// holds reports whether a machine has a lease, or, unless bound is asked for,
// the promise of one.
func (s *Server) holds(mac pxe.MAC, bound bool) bool {
	if s.leases == nil {
		return false
	}
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.cfg.Pools {
		if l, ok := s.leases.of(mac, &s.cfg.Pools[i]); ok && (l.Bound || !bound) && now.Before(l.Expires) {
			return true
		}
	}
	return false
}

// leaseTime is how long a lease of at most d is given for.
func (s *Server) leaseTime(now time.Time, p *Pool, known bool, d time.Duration) time.Duration {
	if known || d <= probation {
		return d
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leases.pressed(now, p) {
		return probation
	}
	return d
}
