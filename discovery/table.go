package discovery

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

type (
	key    = netip.AddrPort
	ipAddr = netip.Addr
	nodeID = fleet.NodeID
)

// Table is what a node knows of where its peers may be. It is not safe for
// concurrent use. Times given to it should carry Go's monotonic reading, so
// that setting the wall clock moves no deadline; a time before the last one
// given counts as that one.
type Table struct {
	cfg Config
	rng *rand.Rand
	now time.Time

	byAddr  map[key]*entry
	entries []*entry // all of byAddr; its order depends on the calls alone
	nodes   map[nodeID]*node

	heard      [2][]*entry // advertised, by family: IPv4, IPv6
	heardHosts [2]int      // distinct hosts in heard
	heardPorts map[ipAddr][]*entry
	toldBy     map[nodeID]int
	held       [numSources]int

	dialTokens [numClasses]bucket
	swapTokens [2]bucket
	newest     bool // see pick
	outcomes   [numOutcomes]uint64
	dials      uint64
	evicted    uint64
}

// entry is one address.
type entry struct {
	addr  key
	state State
	slot  int // in entries
	heard int // in heard[family]; meaningful while held by SourceMulticast

	until    [numSources]time.Time // zero: this source does not hold it
	via      nodeID                // who told, while held by SourcePeer
	instance string

	node   nodeID    // who answered there last
	proven time.Time // when; zero if in an earlier run

	tries int // dials since the last answer
	last  time.Time
	next  time.Time
	luck  uint64 // breaks ties, so that an address does not choose its place
}

// node is an authenticated peer; addrs has the latest proven first.
type node struct {
	addrs  []*entry
	proven time.Time // zero: only in an earlier run
	heard  time.Time // last advert or answer
	doubt  bool      // look at it before Recheck is over
}

// maxTTL bounds how long a hint holds without being repeated.
var maxTTL = [numSources]time.Duration{
	SourceMulticast:  AdvertTTL,
	SourcePeer:       24 * time.Hour,
	SourceConfigured: 0, // holds for good
	SourceRemembered: 0, // Config.ForgetAfter
}

// maxPorts is how many ports one host may advertise.
const maxPorts = 2

// tick moves the table's clock, never backwards.
func (t *Table) tick(now time.Time) time.Time {
	if now.After(t.now) {
		t.now = now
	}
	return t.now
}

// Observe takes a hint. It never dials and never lets a hint displace what
// comes from a better source.
func (t *Table) Observe(now time.Time, h Hint) Outcome {
	o := t.observe(t.tick(now), h)
	t.outcomes[o]++
	return o
}

func (t *Table) observe(now time.Time, h Hint) Outcome {
	if int(h.Source) >= numSources || (h.Source == SourcePeer && h.Via.Validate() != nil) {
		return BadSource
	}
	if (h.Source == SourceMulticast || h.Tag != "") && h.Tag != t.cfg.Tag {
		return WrongSite
	}
	addr, ok := dialable(h.Addr, h.Source)
	if !ok {
		return BadAddress
	}
	e := t.byAddr[addr]
	if h.Goodbye {
		return t.goodbye(now, e, h.Source)
	}
	if e != nil && e.node != "" && h.Source == SourceMulticast {
		// Who has proven itself needs no place among the advertised.
		t.refresh(now, e, h)
		return Refreshed
	}
	until := now.Add(t.ttl(h))
	if e != nil && !e.until[h.Source].IsZero() {
		e.until[h.Source] = until
		t.refresh(now, e, h)
		return Refreshed
	}
	if o := t.room(now, addr, h); o != Added {
		return o
	}
	outcome := Refreshed
	if e = t.byAddr[addr]; e == nil {
		e = t.add(now, addr)
		outcome = Added
	}
	t.hold(e, h, until)
	t.refresh(now, e, h)
	return outcome
}

func (t *Table) ttl(h Hint) time.Duration {
	most := maxTTL[h.Source]
	switch {
	case h.Source == SourceConfigured:
		return 200 * 365 * 24 * time.Hour
	case h.Source == SourceRemembered:
		return t.cfg.ForgetAfter
	case h.TTL > 0 && h.TTL < most:
		return h.TTL
	}
	return most
}

func (t *Table) refresh(now time.Time, e *entry, h Hint) {
	if n := t.nodes[e.node]; n != nil && h.Source != SourceRemembered {
		n.heard = now
	}
	if h.Source != SourceMulticast || h.Instance == e.instance {
		return
	}
	if e.tries > 0 && e.state != Proven {
		// A program started there, or came back: do not sit out the back-off.
		t.pull(now, e)
	}
	e.instance = clip(h.Instance)
}

// pull brings the next dial forward, as far as adverts may.
func (t *Table) pull(now time.Time, e *entry) {
	at := now
	if soonest := e.last.Add(t.cfg.MinGap); !e.last.IsZero() && soonest.After(now) {
		at = soonest
	}
	if at.Before(e.next) {
		e.next = at
	}
}

// goodbye ends an advert's hold at once. A proven peer is only doubted: it is
// dialled soon, so that a forged goodbye costs one dial.
func (t *Table) goodbye(now time.Time, e *entry, s Source) Outcome {
	if e == nil || s != SourceMulticast {
		return Withdrawn
	}
	e.state = moves[e.state][goodbye]
	if n := t.nodes[e.node]; n != nil && !n.doubt {
		n.doubt = true
		t.pull(now, e)
	}
	t.release(e, SourceMulticast)
	t.dropIfLoose(now, e)
	return Withdrawn
}

// room makes room for a new address in the pool of the hint's source, or says
// why there is none.
func (t *Table) room(now time.Time, addr key, h Hint) Outcome {
	switch h.Source {
	case SourceMulticast:
		return t.roomHeard(now, addr)
	case SourcePeer:
		return t.roomTold(h.Via)
	case SourceConfigured:
		if t.held[SourceConfigured] >= t.cfg.MaxConfigured {
			return PoolFull
		}
	case SourceRemembered:
		if t.held[SourceRemembered] >= t.cfg.MaxPeers*t.cfg.MaxAddrs {
			return PoolFull
		}
	}
	return Added
}

func family(ip ipAddr) int {
	if ip.Is4() {
		return 0
	}
	return 1
}

// roomHeard admits an advertised address. A host has two places, and the usual
// port goes before others. When all hosts' places are taken a new host replaces
// one that does not answer, or any, but only as fast as we dial: faster would
// only mean to drop addresses undialled.
func (t *Table) roomHeard(now time.Time, addr key) Outcome {
	ip, f := addr.Addr(), family(addr.Addr())
	if ports := t.heardPorts[ip]; len(ports) >= maxPorts {
		var victim *entry
		for _, e := range ports {
			usual := e.addr.Port() == t.cfg.Port
			if usual || (e.tries == 0 && addr.Port() != t.cfg.Port) {
				continue
			}
			if victim == nil || e.tries > victim.tries {
				victim = e
			}
		}
		if victim == nil {
			return ManyPorts
		}
		t.evict(now, victim, SourceMulticast)
		return Added
	} else if len(ports) > 0 || t.heardHosts[f] < t.cfg.MaxHeard {
		return Added
	}
	if !t.swapTokens[f].take(now) {
		return PoolFull
	}
	pool := t.heard[f]
	var victim *entry
	for range 8 {
		e := pool[t.rng.IntN(len(pool))]
		if victim == nil || now.After(e.until[SourceMulticast]) || e.tries > victim.tries {
			victim = e
		}
	}
	for _, e := range slices.Clone(t.heardPorts[victim.addr.Addr()]) {
		t.evict(now, e, SourceMulticast)
	}
	return Added
}

// roomTold admits an address that a peer passed on. A peer that has used up
// its share replaces its own; when all is full, who holds most gives way.
func (t *Table) roomTold(via nodeID) Outcome {
	from := via
	switch {
	case t.toldBy[via] >= t.cfg.MaxToldBy:
	case t.held[SourcePeer] < t.cfg.MaxTold:
		return Added
	default:
		for id, n := range t.toldBy {
			if n > t.toldBy[from] || (n == t.toldBy[from] && id < from) {
				from = id
			}
		}
		if t.toldBy[from] <= t.toldBy[via]+1 && from != via {
			return PoolFull
		}
	}
	var victim *entry
	for _, e := range t.entries {
		if e.via == from && !e.until[SourcePeer].IsZero() && (victim == nil || e.until[SourcePeer].Before(victim.until[SourcePeer])) {
			victim = e
		}
	}
	if victim == nil {
		return PoolFull
	}
	t.evict(t.now, victim, SourcePeer)
	return Added
}

func (t *Table) evict(now time.Time, e *entry, s Source) {
	t.evicted++
	t.release(e, s)
	t.dropIfLoose(now, e)
}

func (t *Table) add(now time.Time, addr key) *entry {
	e := &entry{addr: addr, slot: len(t.entries), luck: t.rng.Uint64()}
	e.next = now.Add(between(t.rng, 0, 250*time.Millisecond))
	t.byAddr[addr] = e
	t.entries = append(t.entries, e)
	return e
}

func (t *Table) hold(e *entry, h Hint, until time.Time) {
	t.held[h.Source]++
	e.until[h.Source] = until
	switch h.Source {
	case SourceMulticast:
		ip := e.addr.Addr()
		f := family(ip)
		if len(t.heardPorts[ip]) == 0 {
			t.heardHosts[f]++
		}
		t.heardPorts[ip] = append(t.heardPorts[ip], e)
		e.heard = len(t.heard[f])
		t.heard[f] = append(t.heard[f], e)
	case SourcePeer:
		e.via = h.Via
		t.toldBy[h.Via]++
	}
}

// release ends a source's hold on an address.
func (t *Table) release(e *entry, s Source) {
	if e.until[s].IsZero() {
		return
	}
	e.until[s] = time.Time{}
	t.held[s]--
	switch s {
	case SourceMulticast:
		ip := e.addr.Addr()
		f := family(ip)
		last := t.heard[f][len(t.heard[f])-1]
		t.heard[f][e.heard], last.heard = last, e.heard
		t.heard[f] = shorten(t.heard[f])
		left := slices.DeleteFunc(t.heardPorts[ip], func(x *entry) bool { return x == e })
		t.heardPorts[ip] = left
		if len(left) == 0 {
			delete(t.heardPorts, ip)
			t.heardHosts[f]--
		}
	case SourcePeer:
		if t.toldBy[e.via]--; t.toldBy[e.via] == 0 {
			delete(t.toldBy, e.via)
		}
		e.via = ""
	}
}

// dropIfLoose removes an address that nothing holds.
func (t *Table) dropIfLoose(now time.Time, e *entry) {
	if t.byAddr[e.addr] != e || (e.node != "" && now.Sub(e.proven) <= t.cfg.ForgetAfter && !e.proven.IsZero()) {
		return
	}
	for _, u := range e.until {
		if !u.IsZero() {
			return
		}
	}
	t.unlink(e)
	delete(t.byAddr, e.addr)
	last := t.entries[len(t.entries)-1]
	t.entries[e.slot], last.slot = last, e.slot
	t.entries = shorten(t.entries)
}

func shorten(s []*entry) []*entry {
	s[len(s)-1] = nil
	return s[:len(s)-1]
}

// unlink takes an address from its node, and the node away with its last one.
func (t *Table) unlink(e *entry) {
	n := t.nodes[e.node]
	if n == nil {
		return
	}
	n.addrs = slices.DeleteFunc(n.addrs, func(x *entry) bool { return x == e })
	if len(n.addrs) == 0 {
		delete(t.nodes, e.node)
	}
	e.node = ""
	e.proven = time.Time{}
	if e.state == Proven || e.state == Doubted {
		e.state = Tried
	}
}

// Expire forgets what has run out: adverts past their lifetime, nodes that
// have not answered for Config.ForgetAfter. Call it now and then; every minute
// is often enough.
func (t *Table) Expire(now time.Time) {
	now = t.tick(now)
	for i := len(t.entries) - 1; i >= 0; i-- {
		e := t.entries[i]
		for s := range e.until {
			if u := e.until[s]; !u.IsZero() && now.After(u) {
				t.release(e, Source(s))
			}
		}
		t.dropIfLoose(now, e)
	}
}

// Forget drops a node, its addresses and what it told, as after its Removal.
// Addresses that others' hints hold stay, as hints.
func (t *Table) Forget(now time.Time, id fleet.NodeID) {
	now = t.tick(now)
	if n := t.nodes[id]; n != nil {
		for _, e := range slices.Clone(n.addrs) {
			t.unlink(e)
			t.release(e, SourceRemembered)
			t.dropIfLoose(now, e)
		}
	}
	for i := len(t.entries) - 1; i >= 0 && t.toldBy[id] > 0; i-- {
		if e := t.entries[i]; e.via == id {
			t.release(e, SourcePeer)
			t.dropIfLoose(now, e)
		}
	}
}
