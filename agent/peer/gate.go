package peer

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/fleet"
)

// gate decides which connections live. A connection that is not past hello
// holds a place until it is, or its time is over, or its place is needed: then
// the oldest goes of the source that has most. So whoever opens connections
// and says nothing gets rid of his own. Sources from which an admitted node
// came before are left alone as long as there are others: somebody with many
// addresses would have to take a peer's own address to get in its way.
//
// It knows no network and no clock: time is an argument.
type gate struct {
	limits Limits

	mu        sync.Mutex
	unproven  *list.List // of *place, oldest first
	bySource  map[netip.Addr]*list.List
	proven    map[fleet.NodeID]*list.List
	opened    *buckets[netip.Addr]
	hellos    *buckets[papers.Ref]
	strangers *buckets[struct{}]
	provers   *buckets[papers.Ref]
	turners   *buckets[papers.Ref]
	filers    *buckets[papers.Ref]
	// friends are sources of admitted nodes, the last seen first.
	friends     *list.List // of netip.Addr
	friendPlace map[netip.Addr]*list.Element
}

// place is one connection.
type place struct {
	source netip.Addr
	// close ends the connection; it must not wait for anything.
	close func()

	inAll, inGroup *list.Element // nil once it left
	group          *list.List
	node           fleet.NodeID
}

// maxSources bounds the tables of rates, maxFriends that of sources of nodes.
const (
	maxSources = 4096
	maxFriends = 1024
)

func newGate(l Limits) *gate {
	return &gate{
		limits: l, unproven: list.New(), bySource: map[netip.Addr]*list.List{}, proven: map[fleet.NodeID]*list.List{},
		opened:    newBuckets[netip.Addr](l.PerSource, l.PerSource, maxSources),
		hellos:    newBuckets[papers.Ref](l.HelloPerKey, l.HelloPerKey, maxSources),
		strangers: newBuckets[struct{}](l.Strangers, max(1, l.Strangers/10), 1),
		provers:   newBuckets[papers.Ref](l.ProvePerKey, l.ProvePerKey, maxSources),
		turners:   newBuckets[papers.Ref](l.TurnPerKey, l.TurnPerKey, maxSources),
		filers:    newBuckets[papers.Ref](l.BlobsPerKey, l.BlobsPerKey, maxSources),
		friends:   list.New(), friendPlace: map[netip.Addr]*list.Element{},
	}
}

// enter takes a place for a new connection; nil if its source opens too many.
func (g *gate) enter(now time.Time, source netip.Addr, close func()) *place {
	source = sourceOf(source)
	g.mu.Lock()
	var out *place
	if g.opened.take(now, source) {
		p := &place{source: source, close: close}
		own := g.bySource[source]
		switch {
		case own != nil && own.Len() >= g.limits.UnprovenPerSource:
			out = g.evict(own)
		case g.unproven.Len() >= g.limits.Unproven:
			out = g.evict(g.largest())
		}
		own = g.bySource[source] // the last of it may just have gone
		if own == nil {
			own = list.New()
			g.bySource[source] = own
		}
		p.inAll, p.inGroup, p.group = g.unproven.PushBack(p), own.PushBack(p), own
		g.mu.Unlock()
		if out != nil {
			out.close()
		}
		return p
	}
	g.mu.Unlock()
	return nil
}

// sourceOf is whose share an address uses: for IPv6 its /64, since the rest is
// the caller's choice. Link-local addresses share one, but a scope keeps the
// links apart.
func sourceOf(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if a.Is4() || a.IsLinkLocalUnicast() {
		return a
	}
	p, err := a.WithZone("").Prefix(64)
	if err != nil {
		return a
	}
	return p.Addr()
}

// largest is the group of the source with most unproven connections; of equal
// ones that with the oldest connection; a friend's only if there is no other.
func (g *gate) largest() *list.List {
	var best *list.List
	friend := true
	for e := g.unproven.Front(); e != nil; e = e.Next() {
		p := e.Value.(*place)
		_, f := g.friendPlace[p.source]
		if best == nil || friend && !f || friend == f && p.group.Len() > best.Len() {
			best, friend = p.group, f
		}
	}
	return best
}

// befriend remembers where an admitted node came from.
func (g *gate) befriend(source netip.Addr) {
	if e := g.friendPlace[source]; e != nil {
		g.friends.MoveToFront(e)
		return
	}
	if g.friends.Len() >= maxFriends {
		old := g.friends.Back()
		delete(g.friendPlace, old.Value.(netip.Addr))
		g.friends.Remove(old)
	}
	g.friendPlace[source] = g.friends.PushFront(source)
}

// evict takes the oldest place of a group away.
func (g *gate) evict(group *list.List) *place {
	p := group.Front().Value.(*place)
	g.remove(p)
	return p
}

func (g *gate) remove(p *place) {
	if p.inGroup == nil {
		return
	}
	p.group.Remove(p.inGroup)
	if p.inAll != nil {
		g.unproven.Remove(p.inAll)
		if p.group.Len() == 0 {
			delete(g.bySource, p.source)
		}
	} else if p.group.Len() == 0 {
		delete(g.proven, p.node)
	}
	p.inAll, p.inGroup, p.group = nil, nil, nil
}

// leave gives the place back.
func (g *gate) leave(p *place) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.remove(p)
}

// expire takes an unproven connection's place away; false if it is proven or
// gone.
func (g *gate) expire(p *place) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.inAll == nil {
		return false
	}
	g.remove(p)
	return true
}

// prove moves a connection to the places of its node, of which the oldest goes
// if there are too many. False: it was taken away meanwhile.
func (g *gate) prove(p *place, node fleet.NodeID) bool {
	g.mu.Lock()
	if p.inAll == nil {
		g.mu.Unlock()
		return false
	}
	g.remove(p)
	own := g.proven[node]
	if own == nil {
		own = list.New()
		g.proven[node] = own
	}
	var out *place
	if own.Len() >= g.limits.Proven {
		out = g.evict(own)
		g.proven[node] = own // evict dropped the group if that was the last
	}
	g.befriend(p.source)
	p.node, p.group = node, own
	p.inGroup = own.PushBack(p)
	g.mu.Unlock()
	if out != nil {
		out.close()
	}
	return true
}

// hello says whether a key may say hello now. Keys that nobody knows share one
// rate, since there is no end of them.
func (g *gate) hello(now time.Time, key papers.Ref, known bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !known {
		return g.strangers.take(now, struct{}{})
	}
	return g.hellos.take(now, key)
}

// prover says whether a key may have a proof of this node now.
func (g *gate) prover(now time.Time, key papers.Ref) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.provers.take(now, key)
}

// turner says whether a key may ask for its turn now.
func (g *gate) turner(now time.Time, key papers.Ref) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.turners.take(now, key)
}

// filer says whether a key may ask about a file now.
func (g *gate) filer(now time.Time, key papers.Ref) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.filers.take(now, key)
}

// unprovenNow counts connections that are not past hello.
func (g *gate) unprovenNow() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.unproven.Len()
}

// closeNode ends the connections of a node.
func (g *gate) closeNode(node fleet.NodeID) {
	g.mu.Lock()
	var out []*place
	for own := g.proven[node]; own != nil && own.Len() > 0; {
		out = append(out, g.evict(own))
	}
	g.mu.Unlock()
	for _, p := range out {
		p.close()
	}
}

// nodes lists the nodes with proven connections.
func (g *gate) nodes() []fleet.NodeID {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []fleet.NodeID
	for n := range g.proven {
		out = append(out, n)
	}
	return out
}

// buckets are token buckets in a table of bounded size: when it is full, the
// one that was not used for longest goes.
type buckets[K comparable] struct {
	perMinute, burst, most int
	of                     map[K]*list.Element
	order                  *list.List // of *bucket[K], most recently used first
}

type bucket[K comparable] struct {
	key    K
	tokens float64
	last   time.Time
}

func newBuckets[K comparable](perMinute, burst, most int) *buckets[K] {
	return &buckets[K]{perMinute: perMinute, burst: burst, most: most, of: map[K]*list.Element{}, order: list.New()}
}

func (t *buckets[K]) take(now time.Time, key K) bool {
	e := t.of[key]
	if e == nil {
		for t.order.Len() >= t.most {
			old := t.order.Back()
			delete(t.of, old.Value.(*bucket[K]).key)
			t.order.Remove(old)
		}
		e = t.order.PushFront(&bucket[K]{key: key, tokens: float64(t.burst), last: now})
		t.of[key] = e
	}
	t.order.MoveToFront(e)
	b := e.Value.(*bucket[K])
	if d := now.Sub(b.last); d > 0 {
		b.tokens = min(float64(t.burst), b.tokens+d.Minutes()*float64(t.perMinute))
		b.last = now
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
