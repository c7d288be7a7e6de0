package peer

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/muster-edge/muster/api/peer/v1/peerv1connect"
)

// quiet is a server that takes what comes, for measuring.
func quiet(b *testing.B, limits Limits) *node {
	s := newSite(b)
	n := newNode(b, s)
	n.learn(s.signCharter(b, nil), s.admission(b, n, nil))
	return n.start(func(c *Config) { c.Limits, c.Log = limits, nil })
}

// BenchmarkStranger is what one connection of a stranger costs, both ends:
// handshake, a hello that is refused.
func BenchmarkStranger(b *testing.B) {
	n := quiet(b, Limits{PerSource: 1 << 30, Strangers: 1 << 30})
	certificate, err := bare(newKey(b))
	if err != nil {
		b.Fatal(err)
	}
	answer := make([]byte, 4096)
	for b.Loop() {
		c, err := tls.Dial("tcp", n.addr, clientTLS(certificate))
		if err != nil {
			b.Fatal(err)
		}
		fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\nContent-Length: 0\r\n\r\n", peerv1connect.PeerServiceHelloProcedure)
		if _, err := c.Read(answer); err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}

// BenchmarkUnprovenMemory is what the server holds for a stranger who sends the
// largest hello but its last byte: the worst that one place can cost. The
// caller's end is in the number too.
func BenchmarkUnprovenMemory(b *testing.B) {
	const places = 512
	n := quiet(b, Limits{PerSource: 1 << 30, UnprovenPerSource: places, Unproven: places, Hello: time.Hour})
	certificate, err := bare(newKey(b))
	if err != nil {
		b.Fatal(err)
	}
	body := make([]byte, maxHelloBody-1)
	for b.Loop() {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var open []net.Conn
		for range places {
			c, err := tls.Dial("tcp", n.addr, clientTLS(certificate))
			if err != nil {
				b.Fatal(err)
			}
			fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\nContent-Length: %d\r\n\r\n", peerv1connect.PeerServiceHelloProcedure, maxHelloBody)
			if _, err := c.Write(body); err != nil {
				b.Fatal(err)
			}
			open = append(open, c)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(int64(after.HeapInuse+after.StackInuse)-int64(before.HeapInuse+before.StackInuse))/places/1024, "KiB/connection")
		for _, c := range open {
			_ = c.Close()
		}
	}
}

// BenchmarkGateInAFlood is one more connection while all places are taken from
// 250 sources.
func BenchmarkGateInAFlood(b *testing.B) {
	g := newGate(Limits{PerSource: 1 << 30}.withDefaults())
	now := time.Unix(1e9, 0)
	i := 0
	for b.Loop() {
		i++
		g.enter(now, netip.AddrFrom4([4]byte{10, 0, 0, byte(i % 250)}), func() {})
	}
}
