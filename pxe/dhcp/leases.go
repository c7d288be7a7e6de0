package dhcp

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/pxe"
)

// Pool is one range of addresses on one subnet.
type Pool struct {
	// Subnet is the network with its prefix length.
	Subnet netip.Prefix
	// From and To are the first and last address leased, both inside Subnet.
	From, To netip.Addr
	// Router and DNS are handed out if set.
	Router netip.Addr
	DNS    []netip.Addr
}

// maxPool bounds the table: a /16.
const maxPool = 1 << 16

func (p Pool) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("dhcp: pool: "+format, args...)) }
	if !p.Subnet.IsValid() || !p.Subnet.Addr().Is4() {
		bad("subnet %s is not IPv4", p.Subnet)
		return errors.Join(errs...)
	}
	for name, a := range map[string]netip.Addr{"first": p.From, "last": p.To} {
		if !a.Is4() || !p.Subnet.Contains(a) {
			bad("%s address %s is outside %s", name, a, p.Subnet)
		}
	}
	if len(errs) == 0 {
		switch n := int64(num(p.To)) - int64(num(p.From)) + 1; {
		case n < 1:
			bad("range %s-%s is empty", p.From, p.To)
		case n > maxPool:
			bad("range %s-%s has %d addresses, at most %d are served", p.From, p.To, n, maxPool)
		}
	}
	if p.Router.IsValid() && !p.Subnet.Contains(p.Router) {
		bad("router %s is outside %s", p.Router, p.Subnet)
	}
	return errors.Join(errs...)
}

func (p Pool) contains(a netip.Addr) bool {
	return a.Is4() && !a.Less(p.From) && !p.To.Less(a)
}

func num(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func fromNum(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// Lease is one address given or promised to one machine.
type Lease struct {
	MAC pxe.MAC
	IP  netip.Addr
	// Expires ends the lease (Bound) or the promise (not Bound).
	Expires time.Time
	// Bound is true once a REQUEST was committed.
	Bound bool
	// Known: the machine was known when this was given. It is not kept on
	// disk, so after a restart it is false until the machine renews.
	Known bool
}

// table is the leases as a pure data structure: callers lock it and give it
// the time. Two indexes hold the same leases; every change goes through set
// and drop.
//
// The key is the MAC, not option 61: firmware and operating system of one
// machine send different client identifiers and would take two addresses. A
// machine has one lease per pool, so that a packet forged in one network
// cannot end its lease in another.
type table struct {
	pools []Pool
	byMAC map[client]Lease
	byIP  map[netip.Addr]client
	// barred addresses are in use by somebody who did not ask us.
	barred map[netip.Addr]time.Time
	// reserved addresses are our own and the router's.
	reserved map[netip.Addr]bool
	// cursor walks the range, so that a freed address rests longest.
	cursor map[netip.Addr]uint32
	// full is until when a range, by its first address, has nothing for
	// strangers; counts remembers a count for as long.
	full   map[netip.Addr]time.Time
	counts map[netip.Addr]counted
}

// counted is what a range held at a time.
type counted struct {
	at                         time.Time
	strangers, known, unusable int
}

// client is a machine in one pool, known by the pool's first address.
type client struct {
	mac  pxe.MAC
	pool netip.Addr
}

func newTable(pools []Pool, reserved ...netip.Addr) *table {
	t := &table{pools: pools, byMAC: map[client]Lease{}, byIP: map[netip.Addr]client{}, barred: map[netip.Addr]time.Time{},
		reserved: map[netip.Addr]bool{}, cursor: map[netip.Addr]uint32{},
		full: map[netip.Addr]time.Time{}, counts: map[netip.Addr]counted{}}
	for _, a := range reserved {
		t.reserved[a] = true
	}
	return t
}

// of returns mac's lease in p.
func (t *table) of(mac pxe.MAC, p *Pool) (Lease, bool) {
	l, ok := t.byMAC[client{mac, p.From}]
	return l, ok
}

// free forgets the lease on ip, if there is one.
func (t *table) free(ip netip.Addr) {
	if c, ok := t.byIP[ip]; ok {
		delete(t.byMAC, c)
		delete(t.byIP, ip)
		delete(t.full, c.pool)
	}
}

// set records l, replacing what l.MAC had in this pool and what others had on
// l.IP: the caller made sure that it is free or l.MAC's own. An address of no
// pool is not recorded (the ranges were changed since it was leased).
func (t *table) set(l Lease) {
	for i := range t.pools {
		if p := &t.pools[i]; p.contains(l.IP) {
			c := client{l.MAC, p.From}
			t.free(l.IP)
			if old, ok := t.byMAC[c]; ok {
				t.free(old.IP)
			}
			t.byMAC[c], t.byIP[l.IP] = l, c
			return
		}
	}
}

// apply replays a record from the journal. A record is newer than all before
// it, so it wins over another machine's claim on the same address.
func (t *table) apply(r record) {
	switch r.kind {
	case recordBound:
		t.set(Lease{MAC: r.mac, IP: r.ip, Expires: r.expiry, Bound: true})
		delete(t.barred, r.ip)
	case recordReleased:
		if t.byIP[r.ip].mac == r.mac {
			t.free(r.ip)
		}
	case recordDeclined:
		t.bar(r.ip, r.expiry)
	}
}

// live is the table as records.
func (t *table) live(now time.Time) []record {
	recs := make([]record, 0, len(t.byMAC))
	for _, l := range t.byMAC {
		if l.Bound && now.Before(l.Expires) {
			recs = append(recs, record{recordBound, l.MAC, l.IP, l.Expires})
		}
	}
	for ip, until := range t.barred {
		if now.Before(until) {
			recs = append(recs, record{recordDeclined, pxe.MAC{}, ip, until})
		}
	}
	return recs
}

// holder returns who holds ip at now.
func (t *table) holder(now time.Time, ip netip.Addr) (pxe.MAC, bool) {
	c, ok := t.byIP[ip]
	if !ok || !now.Before(t.byMAC[c].Expires) {
		return pxe.MAC{}, false
	}
	return c.mac, true
}

// usable reports whether ip may be given to mac at now.
func (t *table) usable(now time.Time, mac pxe.MAC, ip netip.Addr, p *Pool) bool {
	if !p.contains(ip) || t.reserved[ip] || now.Before(t.barred[ip]) {
		return false
	}
	first, last := p.Subnet.Masked().Addr(), num(p.Subnet.Masked().Addr())|^mask(p.Subnet.Bits())
	if p.Subnet.Bits() < 31 && (ip == first || num(ip) == last) {
		return false
	}
	other, held := t.holder(now, ip)
	return !held || other == mac
}

func mask(bits int) uint32 { return ^uint32(0) << (32 - bits) }

// pick promises an address to mac until now+hold and returns it. It prefers
// the machine's own, even expired (RFC 2131 section 4.3.1), then the one it
// asks for, then a never-used one, then the next free. known is true when the
// address is the machine's current lease, so that no probe is needed. friend is
// a machine that is known: it may have the addresses kept for such, and, when
// all else is gone, one that is only promised to a stranger.
func (t *table) pick(now time.Time, mac pxe.MAC, want netip.Addr, p *Pool, hold time.Duration, friend bool) (ip netip.Addr, known, ok bool) {
	if l, has := t.of(mac, p); has && t.usable(now, mac, l.IP, p) {
		if now.Before(l.Expires) {
			if !l.Bound {
				l.Expires = now.Add(hold)
				t.set(l)
			}
			return l.IP, l.Bound, true
		}
		want = l.IP
	}
	if !friend {
		if now.Before(t.full[p.From]) {
			return netip.Addr{}, false, false
		}
		if room, _ := t.count(now, p); room <= 0 {
			t.full[p.From] = now.Add(fullFor)
			return netip.Addr{}, false, false
		}
	}
	if !want.IsValid() || !t.usable(now, mac, want, p) {
		want = t.next(now, mac, p)
	}
	if !want.IsValid() && friend {
		want = t.promised(now, p)
	}
	if !want.IsValid() {
		t.full[p.From] = now.Add(fullFor)
		return netip.Addr{}, false, false
	}
	// If somebody else had it, that lease has expired: usable said so.
	t.set(Lease{MAC: mac, IP: want, Expires: now.Add(hold), Known: friend})
	return want, false, true
}

// next walks the range once from the cursor: first for an address nobody is
// remembered for, then for one whose lease has expired.
func (t *table) next(now time.Time, mac pxe.MAC, p *Pool) netip.Addr {
	from, to := num(p.From), num(p.To)
	size := to - from + 1
	start := t.cursor[p.From]
	var second netip.Addr
	for i := range size {
		off := (start + i) % size
		ip := fromNum(from + off)
		if !t.usable(now, mac, ip, p) {
			continue
		}
		if _, remembered := t.byIP[ip]; !remembered {
			t.cursor[p.From] = off + 1
			return ip
		}
		if !second.IsValid() {
			second = ip
		}
	}
	return second
}

// bar keeps ip from being leased until the given time.
func (t *table) bar(ip netip.Addr, until time.Time) {
	t.free(ip)
	t.barred[ip] = until
}

// promised finds the address that was promised to a stranger longest ago and
// not taken.
func (t *table) promised(now time.Time, p *Pool) netip.Addr {
	var oldest Lease
	for c, l := range t.byMAC {
		if c.pool == p.From && !l.Bound && !l.Known && now.Before(l.Expires) && (!oldest.IP.IsValid() || l.Expires.Before(oldest.Expires)) {
			oldest = l
		}
	}
	return oldest.IP
}

// count returns how many more addresses strangers may have, and how many are
// free at all. Both are up to fullFor old in a large range.
func (t *table) count(now time.Time, p *Pool) (room, free int) {
	size := int(num(p.To)-num(p.From)) + 1
	n, ok := t.counts[p.From]
	if !ok || size <= 1024 || now.Sub(n.at).Abs() >= fullFor {
		n = counted{at: now}
		for c, l := range t.byMAC {
			switch {
			case c.pool != p.From || !now.Before(l.Expires):
			case l.Known:
				n.known++
			default:
				n.strangers++
			}
		}
		for ip, until := range t.barred {
			if p.contains(ip) && now.Before(until) {
				n.unusable++
			}
		}
		for ip := range t.reserved {
			if p.contains(ip) {
				n.unusable++
			}
		}
		t.counts[p.From] = n
	}
	free = size - n.unusable - n.known - n.strangers
	return free - max(0, size/keptShare-n.known), free
}

// pressed reports whether strangers have more than half of what they may.
func (t *table) pressed(now time.Time, p *Pool) bool {
	room, _ := t.count(now, p)
	return t.counts[p.From].strangers > room
}
