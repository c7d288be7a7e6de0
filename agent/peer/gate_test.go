package peer

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/fleet"
)

const aNode = fleet.NodeID("n-aaaaaaaaaaaaaaaaaaaaaaaa")

func source(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }

// A thousand connections a second that say nothing, for 15 s, and beside
// them a peer that connects every second and needs most of a second for its
// hello: a slow TPM. It must always get through.
func TestFloodOfUnprovenConnections(t *testing.T) {
	for _, c := range []struct {
		sources int
		known   bool // the peer was here before
		served  bool
	}{
		{1, false, true}, {16, false, true}, {250, false, true}, {250, true, true}, {4000, true, true},
		// A whole /20 against a newcomer: not promised. It shows that the
		// test can fail.
		{4000, false, false},
	} {
		t.Run(fmt.Sprintf("%d sources, known %v", c.sources, c.known), func(t *testing.T) {
			g := newGate(Limits{}.withDefaults())
			now := time.Unix(1e9, 0)
			honest := netip.AddrFrom4([4]byte{192, 0, 2, 1})
			if c.known {
				p := g.enter(now, honest, func() {})
				g.prove(p, aNode)
				g.leave(p)
			}
			lost, most := 0, 0
			var mine *place
			for ms := range 15_000 {
				now = now.Add(time.Millisecond)
				g.enter(now, source(ms%c.sources), func() {})
				most = max(most, g.unproven.Len())
				switch ms % 1000 {
				case 0:
					if mine = g.enter(now, honest, func() { lost++ }); mine == nil {
						t.Fatal("the peer may not even connect")
					}
				case 900:
					if g.prove(mine, aNode) {
						g.leave(mine)
					}
				}
			}
			if (lost == 0) != c.served {
				t.Errorf("the peer lost %d of 15 connections", lost)
			}
			if limit := g.limits.Unproven; most > limit {
				t.Errorf("%d connections were open, at most %d are allowed", most, limit)
			}
			if n := len(g.opened.of) + len(g.hellos.of); n > 2*maxSources {
				t.Errorf("%d entries in the tables", n)
			}
		})
	}
}

func TestStrangersShareOneRate(t *testing.T) {
	g := newGate(Limits{}.withDefaults())
	now := time.Unix(1e9, 0)
	looked := 0
	for ms := range 60_000 {
		if g.hello(now.Add(time.Duration(ms)*time.Millisecond), papers.Ref{byte(ms), byte(ms >> 8)}, false) {
			looked++
		}
	}
	if looked < 600 || looked > 670 {
		t.Errorf("%d of 60,000 hellos of strangers were looked at, want about 600", looked)
	}
	// Admitted keys have a rate each, whatever strangers do.
	known := 0
	for range 1000 {
		if g.hello(now, papers.Ref{1}, true) {
			known++
		}
	}
	if known != 60 || !g.hello(now, papers.Ref{2}, true) {
		t.Errorf("%d hellos of one key were taken, want 60", known)
	}
}

func TestANodeHasABoundedNumberOfConnections(t *testing.T) {
	g := newGate(Limits{Proven: 2}.withDefaults())
	var closed []int
	for i := range 3 {
		p := g.enter(time.Unix(1e9, 0), source(1), func() { closed = append(closed, i) })
		if !g.prove(p, aNode) {
			t.Fatal("a place was lost")
		}
	}
	if len(closed) != 1 || closed[0] != 0 {
		t.Errorf("closed %v, want the oldest", closed)
	}
	g.closeNode(aNode)
	if len(closed) != 3 || len(g.nodes()) != 0 {
		t.Errorf("closed %v, left %v", closed, g.nodes())
	}
}

// Whatever happens in whatever order, the books agree.
func TestGateKeepsItsBooks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := newGate(Limits{Unproven: 5, UnprovenPerSource: 3, PerSource: 1000, Proven: 2}.withDefaults())
		now := time.Unix(1e9, 0)
		open := map[*place]bool{}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			var any *place
			for p := range open {
				any = p
				break
			}
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0, 1:
				var p *place
				p = g.enter(now, source(rapid.IntRange(0, 3).Draw(t, "source")), func() { delete(open, p) })
				if p != nil {
					open[p] = true
				}
			case 2:
				if any != nil {
					g.prove(any, fleet.NodeID(rapid.SampledFrom([]string{"a", "b"}).Draw(t, "node")))
				}
			case 3:
				if any != nil {
					g.leave(any)
					delete(open, any)
				}
			case 4:
				if any != nil && g.expire(any) {
					delete(open, any)
				}
			}
			unproven, bySource, proven := 0, map[netip.Addr]int{}, map[fleet.NodeID]int{}
			for p := range open {
				if p.inAll != nil {
					unproven++
					bySource[p.source]++
				} else {
					proven[p.node]++
				}
			}
			if unproven != g.unproven.Len() || unproven > 5 || len(bySource) != len(g.bySource) || len(proven) != len(g.proven) {
				t.Fatalf("%d unproven of %d sources, the gate has %d of %d; %d nodes, the gate has %d", unproven, len(bySource), g.unproven.Len(), len(g.bySource), len(proven), len(g.proven))
			}
			for s, n := range bySource {
				if g.bySource[s].Len() != n || n > 3 {
					t.Fatalf("source %s has %d, the gate says %d", s, n, g.bySource[s].Len())
				}
			}
			for s, n := range proven {
				if g.proven[s].Len() != n || n > 2 {
					t.Fatalf("node %s has %d, the gate says %d", s, n, g.proven[s].Len())
				}
			}
		}
	})
}
