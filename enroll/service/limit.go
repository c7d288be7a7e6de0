package service

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// limiter is a token bucket per source address and per network, in a table of
// bounded size. When the table is full the longest unused bucket goes: who
// floods from many networks gets rid of limits, not of memory; the workers'
// queues bound the rest.
type limiter struct {
	perMinute, most int

	mu      sync.Mutex
	buckets map[netip.Prefix]*list.Element
	order   *list.List // of *bucket, most recently used first
}

type bucket struct {
	source netip.Prefix
	tokens float64
	last   time.Time
}

// networkFactor is how many addresses' worth of calls a network may make. A
// site behind one NAT address has the address's share only: 120 calls a
// minute are 50 machines switched on together.
const networkFactor = 8

// placesOf returns whose share an address uses: its own and its network's.
func placesOf(source netip.Addr) (host, network netip.Prefix) {
	source = source.Unmap().WithZone("")
	host = netip.PrefixFrom(source, source.BitLen())
	bits := 24
	if source.Is6() {
		// The smallest thing an IPv6 site has is a /64: the single address
		// is the caller's choice.
		bits = 64
		host = netip.PrefixFrom(source, bits).Masked()
	}
	return host, netip.PrefixFrom(source, bits).Masked()
}

func newLimiter(perMinute, most int) *limiter {
	return &limiter{perMinute: perMinute, most: most, buckets: map[netip.Prefix]*list.Element{}, order: list.New()}
}

// take spends one call of the source; wait is how long until the next is
// free when there is none.
func (l *limiter) take(now time.Time, source netip.Addr) (wait time.Duration, ok bool) {
	if l.perMinute < 0 || !source.IsValid() {
		return 0, true
	}
	host, network := placesOf(source)
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.bucket(now, host, float64(l.perMinute))
	b := a
	if network != host {
		b = l.bucket(now, network, float64(l.perMinute*networkFactor))
	}
	for _, c := range []*bucket{a, b} {
		if c.tokens < 1 {
			rate := float64(l.perMinute) / 60
			if c != a {
				rate *= networkFactor
			}
			return time.Duration((1 - c.tokens) / rate * float64(time.Second)), false
		}
	}
	a.tokens--
	if b != a {
		b.tokens--
	}
	return 0, true
}

// bucket finds or makes a bucket and fills it up for the time that passed.
func (l *limiter) bucket(now time.Time, source netip.Prefix, full float64) *bucket {
	e, ok := l.buckets[source]
	if !ok {
		for l.order.Len() >= l.most {
			old := l.order.Back()
			delete(l.buckets, old.Value.(*bucket).source)
			l.order.Remove(old)
		}
		e = l.order.PushFront(&bucket{source: source, tokens: full, last: now})
		l.buckets[source] = e
	}
	l.order.MoveToFront(e)
	b := e.Value.(*bucket)
	if d := now.Sub(b.last); d > 0 {
		b.tokens = min(full, b.tokens+d.Minutes()*full)
		b.last = now
	}
	return b
}

// budget bounds the bytes of bodies on their way in. Bytes are taken before
// they arrive, since the caller says how many come; so that nobody keeps all
// others out by announcing much and sending slowly, a network gets a share.
type budget struct {
	share int64

	mu   sync.Mutex
	left int64
	held map[netip.Prefix]int64
}

// shares is how many networks it takes to use the whole budget up.
const shares = 8

func newBudget(total int64) *budget {
	// At least one whole message must fit.
	return &budget{share: max(total/shares, min(total, maxBody)), left: total, held: map[netip.Prefix]int64{}}
}

func (b *budget) take(source netip.Addr, n int64) bool {
	_, network := placesOf(source)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < n || b.held[network]+n > b.share {
		return false
	}
	b.left -= n
	b.held[network] += n
	return true
}

func (b *budget) give(source netip.Addr, n int64) {
	_, network := placesOf(source)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left += n
	if b.held[network] -= n; b.held[network] <= 0 {
		delete(b.held, network)
	}
}

// polls bounds who waits and looks: in all, and for one request. A machine
// waits once; the old wait of one that lost its connection ends by itself.
type polls struct {
	mu   sync.Mutex
	left int
	of   map[fleet.RequestID]int
}

const pollsPerRequest = 4

func newPolls(most int) *polls { return &polls{left: most, of: map[fleet.RequestID]int{}} }

// enter takes a place. busy: the request has its share already; full: nobody
// gets a place, so that the answer must come at once.
func (p *polls) enter(id fleet.RequestID) (full, busy bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.of[id] >= pollsPerRequest {
		return false, true
	}
	if p.left == 0 {
		return true, false
	}
	p.left--
	p.of[id]++
	return false, false
}

func (p *polls) leave(id fleet.RequestID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left++
	if p.of[id]--; p.of[id] == 0 {
		delete(p.of, id)
	}
}
