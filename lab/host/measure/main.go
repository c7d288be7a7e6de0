// Command measure prints numbers of whole sites that need no cluster: how long
// nodes take to find each other by multicast on a LAN with and without loss,
// and what that costs. The nodes are network namespaces at our own switch; the
// code in them is the node's.
//
//	go run ./lab/host/measure discovery -nodes 10 -loss 0.3 -rounds 5
//	go run ./lab/host/measure discovery -nodes 50 -steady 3m
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/discovery"
	"github.com/muster-edge/muster/discovery/mdns"
	"github.com/muster-edge/muster/lab/host"
	"github.com/muster-edge/muster/lab/host/ether"
)

func main() {
	if len(os.Args) < 2 || os.Args[1] != "discovery" {
		fmt.Fprintln(os.Stderr, "usage: measure discovery [-peer avahi] [-nodes N] [-loss P] [-rounds N] [-steady D] [-limit D] [-seed S]")
		os.Exit(2)
	}
	var m discoveries
	f := flag.NewFlagSet("measure discovery", flag.ExitOnError)
	f.IntVar(&m.Nodes, "nodes", 10, "how many nodes are switched on at once")
	f.Float64Var(&m.Loss, "loss", 0, "share of packets that get lost, 0 to 1")
	f.IntVar(&m.Rounds, "rounds", 3, "how often they are switched on")
	f.DurationVar(&m.steady, "steady", 0, "how long the traffic is counted after all know all (0: not at all)")
	f.DurationVar(&m.limit, "limit", 2*time.Minute, "how long a round may take")
	f.Uint64Var(&m.Seed, "seed", 1, "decides which packets get lost")
	f.StringVar(&m.Peer, "peer", "", "avahi: the nodes run avahi-daemon with avahi-publish and avahi-browse instead of ours")
	_ = f.Parse(os.Args[2:]) // ExitOnError
	if err := m.run(); err != nil {
		fmt.Fprintln(os.Stderr, "measure:", err)
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(m)
}

// discoveries is what is asked for and what came out, as JSON.
type discoveries struct {
	Nodes  int     `json:"nodes"`
	Loss   float64 `json:"loss"`
	Rounds int     `json:"rounds"`
	Seed   uint64  `json:"seed"`
	// Pairs that were to find each other in all rounds, and those that did
	// not within the limit.
	Pairs  int `json:"pairs"`
	Missed int `json:"missed"`
	// How long one node took to hear of one other, and of all others.
	PairP50  float64 `json:"pair_p50_s"`
	PairP99  float64 `json:"pair_p99_s"`
	PairMax  float64 `json:"pair_max_s"`
	FullView float64 `json:"full_view_max_s"`
	// Multicast DNS sent by all nodes together: in the round's beginning, and
	// a minute after.
	StartBytes     uint64  `json:"start_bytes"`
	SteadyPerMin   float64 `json:"steady_bytes_per_min"`
	SteadyPackets  float64 `json:"steady_packets_per_min"`
	SteadyMeasured float64 `json:"steady_measured_s"`
	// Peer is who was measured: "" is ours.
	Peer string `json:"peer,omitempty"`

	steady, limit time.Duration
}

func (m *discoveries) run() error {
	if m.Nodes < 2 || m.Nodes > 200 || m.Rounds < 1 {
		return errors.New("want 2 to 200 nodes and at least one round")
	}
	if m.Peer != "" && m.Peer != "avahi" {
		return fmt.Errorf("no peer %q (have: avahi)", m.Peer)
	}
	var pairs []time.Duration
	for round := range m.Rounds {
		found, err := m.round(uint64(round), round == m.Rounds-1)
		if err != nil {
			return err
		}
		pairs = append(pairs, found...)
	}
	sort.Slice(pairs, func(i, j int) bool { return pairs[i] < pairs[j] })
	m.Pairs = m.Nodes * (m.Nodes - 1) * m.Rounds
	m.Missed = m.Pairs - len(pairs)
	if len(pairs) > 0 {
		// A pair that was missed counts as longer than all others.
		at := func(q float64) float64 { return pairs[min(int(q*float64(m.Pairs)), len(pairs)-1)].Seconds() }
		m.PairP50, m.PairP99, m.PairMax = at(0.5), at(0.99), pairs[len(pairs)-1].Seconds()
	}
	return nil
}

// station is a node in a namespace of its own.
type station struct {
	addr  netip.Addr
	found map[netip.Addr]time.Duration
}

// round switches all nodes on and waits until all know all.
func (m *discoveries) round(n uint64, last bool) ([]time.Duration, error) {
	var bytes, packets atomic.Uint64
	sw := ether.New(ether.Config{Seed: m.Seed + n, Watch: func(port string, in bool, frame []byte) {
		if in && isMDNS(frame) {
			bytes.Add(uint64(len(frame)))
			packets.Add(1)
		}
	}})
	var names []string
	for i := range m.Nodes {
		names = append(names, fmt.Sprintf("n%d", i))
	}
	if err := sw.SetAll(names, ether.Faults{Loss: m.Loss}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), m.limit+m.steady)
	defer cancel()
	var mu sync.Mutex
	var stations []*station
	var wg sync.WaitGroup
	errs := make(chan error, 2*m.Nodes)
	var ready sync.WaitGroup
	ready.Add(m.Nodes)
	start := make(chan struct{})
	var began time.Time
	complete := make(chan struct{}, m.Nodes)
	for i := range m.Nodes {
		st := &station{addr: netip.AddrFrom4([4]byte{10, 90, byte(i / 250), byte(i%250 + 1)}), found: map[netip.Addr]time.Duration{}}
		stations = append(stations, st)
		wg.Go(func() {
			errs <- inNamespace(func() error {
				mac := net.HardwareAddr{0x52, 0x54, 0, 1, byte(i >> 8), byte(i)}
				tap, err := host.OpenTap(host.Link, mac)
				if err != nil {
					ready.Done()
					return err
				}
				err = errors.Join(sw.Attach(names[i], tap), host.ConfigureLink(host.Link, host.Address{CIDR: st.addr.String() + "/16"}))
				ready.Done()
				if err != nil {
					return err
				}
				<-start
				heard := func(a netip.Addr) {
					mu.Lock()
					defer mu.Unlock()
					if _, known := st.found[a]; !known && a.Is4() && a != st.addr {
						st.found[a] = time.Since(began)
						if len(st.found) == m.Nodes-1 {
							complete <- struct{}{}
						}
					}
				}
				if m.Peer == "avahi" {
					return avahi(ctx, names[i], heard)
				}
				return ours(ctx, heard)
			})
		})
	}
	ready.Wait()
	mu.Lock()
	began = time.Now()
	mu.Unlock()
	close(start)
	limit := time.NewTimer(m.limit)
	defer limit.Stop()
	for range m.Nodes {
		select {
		case <-complete:
		case <-limit.C:
		case err := <-errs:
			cancel()
			return nil, err
		}
	}
	mu.Lock()
	m.FullView = max(m.FullView, time.Since(began).Seconds())
	mu.Unlock()
	if last {
		m.StartBytes = bytes.Load()
		if m.steady > 0 {
			timer := time.NewTimer(m.steady)
			b, p := bytes.Load(), packets.Load()
			<-timer.C
			m.SteadyMeasured = m.steady.Seconds()
			m.SteadyPerMin = float64(bytes.Load()-b) / m.steady.Minutes()
			m.SteadyPackets = float64(packets.Load()-p) / m.steady.Minutes()
		}
	}
	cancel()
	wg.Wait()
	var out []time.Duration
	for _, st := range stations {
		for _, d := range st.found {
			out = append(out, d)
		}
	}
	return out, sw.Close()
}

// ours is the node's own search.
func ours(ctx context.Context, heard func(netip.Addr)) error {
	s, err := mdns.New(mdns.Config{Tag: discovery.Tag("lab", "measure"), Port: 7445})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			hints, err := s.Wait(ctx)
			if err != nil {
				return
			}
			for _, h := range hints {
				heard(h.Addr.Addr().Unmap())
			}
		}
	})
	if err := s.Run(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// inNamespace runs f on a thread with a network of its own, which ends with
// it.
func inNamespace(f func() error) error {
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		ch <- f()
	}()
	return <-ch
}

// isMDNS tells UDP to port 5353, over IPv4 or IPv6.
func isMDNS(f []byte) bool {
	if len(f) < 14+20+8 {
		return false
	}
	switch kind := int(f[12])<<8 | int(f[13]); kind {
	case 0x0800:
		ihl := int(f[14]&15) * 4
		return f[23] == 17 && len(f) >= 14+ihl+4 && int(f[14+ihl+2])<<8|int(f[14+ihl+3]) == 5353
	case 0x86dd:
		return f[20] == 17 && len(f) >= 14+40+4 && int(f[14+42])<<8|int(f[14+43]) == 5353
	}
	return false
}
