package discovery

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// class is a kind of dial with a rate of its own.
type class uint8

const (
	classKnown class = iota // proven, remembered, configured
	classTold               // passed on by a peer
	classHeard              // adverts alone
	numClasses = int(classHeard) + 1
)

// Why is the reason of a dial.
type Why uint8

const (
	// Recheck: a proven node was not spoken to for a while.
	Recheck Why = iota
	// Doubt: it said goodbye, or a dial of it failed.
	Doubt
	// FromConfig, FromMemory, FromPeer and FromAdvert name the best source of
	// an address where nobody has answered in this run.
	FromConfig
	FromMemory
	FromPeer
	FromAdvert
)

func (w Why) String() string {
	switch w {
	case Recheck:
		return "recheck"
	case Doubt:
		return "doubt"
	case FromConfig:
		return "configured"
	case FromMemory:
		return "remembered"
	case FromPeer:
		return "told by a peer"
	case FromAdvert:
		return "advert"
	}
	return fmt.Sprintf("why(%d)", uint8(w))
}

// Dial is an address to dial now.
type Dial struct {
	Addr netip.AddrPort
	// Node is who answered there last; empty if nobody has. Another node of
	// the site may answer as well.
	Node fleet.NodeID
	Why  Why
	// Try counts the dials of this address since it last answered, from 1.
	Try int
}

// Failure says how a dial ended that proved nobody.
type Failure uint8

const (
	// Unreachable: no connection, or it broke.
	Unreachable Failure = iota
	// Stranger: somebody answered and could not prove to be of our site.
	Stranger
	// Self: we reached ourselves.
	Self
)

func (t *Table) classOf(e *entry) class {
	switch {
	case e.node != "" || !e.until[SourceConfigured].IsZero() || !e.until[SourceRemembered].IsZero():
		return classKnown
	case !e.until[SourcePeer].IsZero():
		return classTold
	}
	return classHeard
}

func (t *Table) why(e *entry) Why {
	switch {
	case !e.proven.IsZero() && t.nodes[e.node].doubt:
		return Doubt
	case !e.proven.IsZero():
		return Recheck
	case !e.until[SourceConfigured].IsZero():
		return FromConfig
	case !e.until[SourceRemembered].IsZero():
		return FromMemory
	case !e.until[SourcePeer].IsZero():
		return FromPeer
	}
	return FromAdvert
}

// due returns when an address wants to be dialled; false if there is no need.
// A node that has answered lately is left alone, and while it is not doubted
// only its best address is looked at.
func (t *Table) due(e *entry) (time.Time, bool) {
	n := t.nodes[e.node]
	if n == nil || n.doubt || n.proven.IsZero() {
		return e.next, true
	}
	if n.best() != e {
		return time.Time{}, false
	}
	if rest := n.proven.Add(t.cfg.Recheck); rest.After(e.next) {
		return rest, true
	}
	return e.next, true
}

// Dials returns the addresses to dial now, the best known first. Each counts
// as tried from here on, whether or not its end is reported.
//
// Bounds, whatever the hints: each kind of dial keeps to its Config rate, and
// one address is dialled at most every 3/4 of Config.BackOffMin.
func (t *Table) Dials(now time.Time) []Dial {
	now = t.tick(now)
	var ready [numClasses][]*entry
	for _, e := range t.entries {
		if at, ok := t.due(e); ok && !at.After(now) {
			c := t.classOf(e)
			ready[c] = append(ready[c], e)
		}
	}
	var out []Dial
	for c, list := range ready {
		// In the order in which they came due, so that nothing starves.
		slices.SortFunc(list, func(a, b *entry) int {
			if o := a.next.Compare(b.next); o != 0 {
				return o
			}
			if a.luck < b.luck {
				return -1
			}
			return 1
		})
		for len(list) > 0 && t.dialTokens[c].take(now) {
			i := 0
			if class(c) == classHeard {
				i = t.pick(list)
			}
			out = append(out, t.dial(now, list[i]))
			list = slices.Delete(list, i, i+1)
		}
	}
	return out
}

// pick chooses among the advertised: every other time the latest that was
// never dialled, so that after a flood a newcomer need not wait until all that
// was forged has been tried again and again.
func (t *Table) pick(list []*entry) int {
	if t.newest = !t.newest; t.newest {
		for i, e := range slices.Backward(list) {
			if e.tries == 0 {
				return i
			}
		}
	}
	return 0
}

func (t *Table) dial(now time.Time, e *entry) Dial {
	why := t.why(e)
	e.tries++
	e.last = now
	e.next = now.Add(t.backOff(e))
	e.state = moves[e.state][dialled]
	t.dials++
	return Dial{Addr: e.addr, Node: e.node, Why: why, Try: e.tries}
}

// backOff doubles with each try, within a quarter of jitter either way.
func (t *Table) backOff(e *entry) time.Duration {
	most := t.cfg.BackOffHint
	if t.classOf(e) == classKnown {
		most = t.cfg.BackOffKnown
	}
	d := t.cfg.BackOffMin
	for i := 1; i < e.tries && d < most; i++ {
		d *= 2
	}
	d = min(d, most)
	return between(t.rng, d-d/4, d+d/4)
}

// Proven reports that an authenticated hello with the node succeeded at the
// address. Only this makes a peer.
func (t *Table) Proven(now time.Time, addr netip.AddrPort, id fleet.NodeID) {
	now = t.tick(now)
	addr, ok := dialable(addr, SourceConfigured)
	if !ok || id.Validate() != nil {
		return
	}
	e := t.byAddr[addr]
	if e == nil {
		e = t.add(now, addr) // it ran out while we dialled
	}
	if e.node != id {
		t.unlink(e) // the address went to another machine
	}
	t.link(e, id)
	n := t.nodes[id]
	n.proven, n.heard, n.doubt = now, now, false
	e.proven = now
	e.state = moves[e.state][answered]
	e.tries = 0
	e.last = now
	t.release(e, SourceMulticast)
	e.next = now.Add(between(t.rng, t.cfg.Recheck, t.cfg.Recheck+t.cfg.Recheck/10))
	t.trim(now, n, id)
}

// link makes e the node's latest address.
func (t *Table) link(e *entry, id nodeID) {
	n := t.nodes[id]
	if n == nil {
		n = &node{}
		t.nodes[id] = n
	}
	n.addrs = slices.DeleteFunc(n.addrs, func(x *entry) bool { return x == e })
	n.addrs = slices.Insert(n.addrs, 0, e)
	e.node = id
}

// trim keeps to MaxAddrs and MaxPeers. Only nodes with an Admission come this
// far, so the bound is one of the site's size, not of an attacker's patience.
func (t *Table) trim(now time.Time, n *node, id nodeID) {
	for len(n.addrs) > t.cfg.MaxAddrs {
		e := n.addrs[len(n.addrs)-1]
		t.unlink(e)
		t.release(e, SourceRemembered)
		t.dropIfLoose(now, e)
		t.evicted++
	}
	if len(t.nodes) <= t.cfg.MaxPeers {
		return
	}
	var oldest nodeID
	for o, x := range t.nodes {
		if o == id {
			continue
		}
		y := t.nodes[oldest]
		if y == nil || x.proven.Before(y.proven) || (x.proven.Equal(y.proven) && o < oldest) {
			oldest = o
		}
	}
	t.Forget(now, oldest)
	t.evicted++
}

// Failed reports that a dial of the address proved nobody. A node that was
// proven there is tried at its other addresses at once.
func (t *Table) Failed(now time.Time, addr netip.AddrPort, f Failure) {
	now = t.tick(now)
	addr, _ = dialable(addr, SourceConfigured)
	e := t.byAddr[addr]
	if e == nil {
		return
	}
	e.state = moves[e.state][failed]
	if n := t.nodes[e.node]; n != nil {
		if !n.doubt {
			n.doubt = true
			for _, other := range n.addrs {
				if other != e {
					t.pull(now, other)
				}
			}
		}
		if at := now.Add(t.cfg.BackOffMin); at.Before(e.next) && e.tries == 0 {
			e.next = at // a connection broke that we did not dial just now
		}
		return
	}
	if f == Stranger || f == Self {
		e.tries = max(e.tries, 16) // nothing to gain soon
		e.next = now.Add(t.backOff(e))
	}
}

// Wake returns when Dials may have something next; false if never.
func (t *Table) Wake(now time.Time) (time.Time, bool) {
	now = t.tick(now)
	var best [numClasses]time.Time
	for _, e := range t.entries {
		c := t.classOf(e)
		if d, ok := t.due(e); ok && (best[c].IsZero() || d.Before(best[c])) {
			best[c] = d
		}
	}
	var wake time.Time
	for c, d := range best {
		if d.IsZero() {
			continue
		}
		if at := t.dialTokens[c].next(now); at.After(d) {
			d = at
		}
		if wake.IsZero() || d.Before(wake) {
			wake = d
		}
	}
	return wake, !wake.IsZero()
}
