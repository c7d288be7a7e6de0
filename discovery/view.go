package discovery

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Peer is a node that has proven itself, now or in an earlier run.
type Peer struct {
	Node fleet.NodeID
	// State is that of its best address.
	State State
	// Addrs are its addresses, the best to use first.
	Addrs []netip.AddrPort
	// Proven is its last authenticated answer in this run; zero if none.
	Proven time.Time
	// Heard is when a hint of it or an answer last came; zero if never.
	Heard time.Time
}

// Peers returns all nodes that have proven themselves, by node ID.
func (t *Table) Peers() []Peer {
	out := make([]Peer, 0, len(t.nodes))
	for id, n := range t.nodes {
		p := Peer{Node: id, Proven: n.proven, Heard: n.heard}
		list := slices.Clone(n.addrs)
		slices.SortFunc(list, prefer)
		for _, e := range list {
			p.Addrs = append(p.Addrs, e.addr)
		}
		p.State = list[0].state
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return cmp.Compare(a.Node, b.Node) })
	return out
}

// best returns the address to use.
func (n *node) best() *entry {
	best := n.addrs[0]
	for _, e := range n.addrs[1:] {
		if prefer(e, best) < 0 {
			best = e
		}
	}
	return best
}

// prefer orders addresses: answering before doubted, addresses that work from
// everywhere before link-local ones (k3s cannot use a zone), then the latest.
func prefer(a, b *entry) int {
	rank := func(e *entry) int {
		r := 0
		if e.state != Proven {
			r += 2
		}
		if e.addr.Addr().IsLinkLocalUnicast() {
			r++
		}
		return r
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), b.proven.Compare(a.proven), a.addr.Compare(b.addr))
}

// Address is an address and what is known of it.
type Address struct {
	Addr  netip.AddrPort
	State State
	Node  fleet.NodeID
	// Tries counts dials since the last answer; Next is when the next is due, zero
	// if none is.
	Tries int
	Next  time.Time
}

// Addresses returns every address in the table, for people who ask why a peer
// is not found.
func (t *Table) Addresses() []Address {
	out := make([]Address, 0, len(t.entries))
	for _, e := range t.entries {
		next, _ := t.due(e)
		out = append(out, Address{Addr: e.addr, State: e.state, Node: e.node, Tries: e.tries, Next: next})
	}
	slices.SortFunc(out, func(a, b Address) int { return a.Addr.Compare(b.Addr) })
	return out
}

// Told is an address to pass on to a peer.
type Told struct {
	Node fleet.NodeID
	Addr netip.AddrPort
}

// Share returns what to pass on to a peer: addresses that answered in this
// run, at most limit, the latest first. Link-local ones go only to a peer on
// the same link, which is named by zone (the interface the peer is connected
// over; empty for none), and without their zone: the peer puts in its own.
func (t *Table) Share(zone string, limit int) []Told {
	var list []*entry
	for _, e := range t.entries {
		if e.state != Proven || e.addr.Addr().IsLoopback() {
			continue
		}
		if ip := e.addr.Addr(); ip.Zone() != "" && ip.Zone() != zone {
			continue
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b *entry) int { return cmp.Or(b.proven.Compare(a.proven), a.addr.Compare(b.addr)) })
	out := []Told{}
	for _, e := range list[:min(limit, len(list))] {
		out = append(out, Told{Node: e.node, Addr: netip.AddrPortFrom(e.addr.Addr().WithZone(""), e.addr.Port())})
	}
	return out
}

// Counters are sums since the table was made.
type Counters struct {
	// Hints counts hints by what became of them.
	Hints map[string]uint64
	// Dials were handed out; Evicted were addresses that made room.
	Dials, Evicted uint64
	// Addresses and Nodes are how many there are now.
	Addresses, Nodes int
}

// Counters returns the table's sums.
func (t *Table) Counters() Counters {
	c := Counters{Hints: map[string]uint64{}, Dials: t.dials, Evicted: t.evicted, Addresses: len(t.entries), Nodes: len(t.nodes)}
	for o, n := range t.outcomes {
		c.Hints[Outcome(o).String()] = n
	}
	return c
}
