package mdns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/discovery"
	"github.com/muster-edge/muster/fleet"
)

// The tests' LAN: the test binary runs itself again in a network namespace,
// hosts are further namespaces behind a bridge. Nothing touches the host's
// network, and all is gone when the process ends.

const marker = "MUSTER_TEST_NETNS"

func TestMain(m *testing.M) {
	fuzzing := slices.ContainsFunc(os.Args, func(a string) bool {
		return strings.HasPrefix(a, "-test.fuzz=") || strings.HasPrefix(a, "-test.fuzzworker")
	})
	if os.Getenv(marker) != "" || os.Getuid() != 0 || fuzzing {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig watches the thread
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "no network namespace to be had, network tests are skipped: %v\n", err)
		os.Exit(m.Run())
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually polls; it is for what happens outside this goroutine.
func eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("after %s: not yet: %s", within, what)
		}
		<-tick.C
	}
}

var serial atomic.Int32

type lan struct{ bridge netlink.Link }

func newLAN(t testing.TB) *lan {
	t.Helper()
	if testing.Short() {
		t.Skip("network namespaces are left out with -short")
	}
	if os.Getenv(marker) == "" {
		t.Skip("needs root and network namespaces")
	}
	snoop := false // no querier here; the bridge is a plain switch
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("lan%d", serial.Add(1))}, MulticastSnooping: &snoop}
	must(t, netlink.LinkAdd(br))
	t.Cleanup(func() { _ = netlink.LinkDel(br) })
	must(t, netlink.LinkSetUp(br))
	return &lan{br}
}

// host is a network namespace.
type host struct {
	ns int // file descriptor
	n  int
}

// newHost makes a host with nothing plugged in. Without v6 it has no IPv6.
func newHost(t testing.TB, v6 bool) *host {
	t.Helper()
	got := make(chan any, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			got <- err
			return
		}
		if !v6 {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0); err != nil {
				got <- err
				return
			}
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			got <- err
			return
		}
		got <- fd
	}()
	switch v := (<-got).(type) {
	case int:
		t.Cleanup(func() { unix.Close(v) })
		h := &host{ns: v, n: int(serial.Add(1))}
		must(t, h.in(func() error { return up("lo") }))
		return h
	case error:
		t.Fatal(v)
	}
	return nil
}

// spawn runs f on a thread in the host's namespace and returns at once.
func (h *host) spawn(f func()) {
	go func() {
		runtime.LockOSThread() // never unlocked
		if err := unix.Setns(h.ns, unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
		f()
	}()
}

// in runs f there and waits.
func (h *host) in(f func() error) error {
	done := make(chan error, 1)
	h.spawn(func() { done <- f() })
	return <-done
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// plug connects the host by a new interface and returns a way to unplug it.
func (l *lan) plug(t testing.TB, h *host, iface string, cidr ...string) (unplug func()) {
	t.Helper()
	name := fmt.Sprintf("p%d", serial.Add(1))
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: l.bridge.Attrs().Index},
		PeerName: iface, PeerNamespace: netlink.NsFd(h.ns)}))
	unplug = func() {
		if p, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(p)
		}
	}
	t.Cleanup(unplug)
	must(t, up(name))
	must(t, h.in(func() error {
		p, err := netlink.LinkByName(iface)
		if err != nil {
			return err
		}
		for _, c := range cidr {
			a, err := netlink.ParseAddr(c)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(p, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(p)
	}))
	eventually(t, 5*time.Second, "carrier", func() bool {
		p, err := netlink.LinkByName(name)
		return err == nil && p.Attrs().OperState == netlink.OperUp
	})
	return unplug
}

var siteTag = discovery.Tag("default", "shop-1")

func seeded(n int) rand.Source { return rand.NewPCG(uint64(n), 0x6d7573746572) }

// node is what the agent does with table and service: it dials as told, and
// the hello is the exchange of a name. (The real one is TLS with an Admission.)
type node struct {
	t   testing.TB
	h   *host
	id  fleet.NodeID
	svc *Service

	mu    sync.Mutex
	tab   *discovery.Table
	began time.Time
	found map[fleet.NodeID]time.Duration
	dials int
	stop  func()
}

type opt func(*node)

func losing(f func([]byte) bool) opt { return func(n *node) { n.svc.lose = f } }
func remembering(m discovery.Memory) opt {
	return func(n *node) { n.tab.Restore(time.Now(), m) }
}

func (h *host) id() fleet.NodeID {
	var e fleet.EKHash
	e[0], e[1] = byte(h.n>>8), byte(h.n)
	return e.NodeID()
}

func startNode(t testing.TB, h *host, opts ...opt) *node {
	t.Helper()
	n := &node{t: t, h: h, id: h.id(), found: map[fleet.NodeID]time.Duration{}}
	var err error
	n.svc, err = New(Config{Tag: siteTag, Source: seeded(h.n)})
	must(t, err)
	n.tab, err = discovery.New(discovery.Config{Tag: siteTag}, seeded(h.n))
	must(t, err)
	for _, o := range opts {
		o(n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var ln net.Listener
	must(t, h.in(func() (err error) {
		ln, err = net.Listen("tcp", ":7445")
		return err
	}))
	wg.Add(4)
	n.began = time.Now()
	go func() { // the peers' API
		defer wg.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, string(n.id))
			c.Close()
		}
	}()
	h.spawn(func() {
		defer wg.Done()
		if err := n.svc.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	wake := make(chan struct{}, 1)
	go func() {
		defer wg.Done()
		for {
			hints, err := n.svc.Wait(ctx)
			if err != nil {
				return
			}
			n.mu.Lock()
			for _, h := range hints {
				n.tab.Observe(time.Now(), h)
			}
			n.mu.Unlock()
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}()
	go func() {
		defer wg.Done()
		for {
			now := time.Now()
			n.mu.Lock()
			for _, d := range n.tab.Dials(now) {
				n.dials++
				wg.Add(1)
				h.spawn(func() { defer wg.Done(); n.hello(ctx, d.Addr) })
			}
			at, ok := n.tab.Wake(now)
			n.mu.Unlock()
			wait := time.Hour
			if ok {
				wait = at.Sub(now)
			}
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-wake:
			case <-timer.C:
			}
			timer.Stop()
		}
	}()
	n.stop = sync.OnceFunc(func() {
		cancel()
		ln.Close()
		wg.Wait()
	})
	t.Cleanup(n.stop)
	return n
}

func (n *node) hello(ctx context.Context, addr netip.AddrPort) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var b []byte
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr.String())
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		b, err = io.ReadAll(io.LimitReader(c, 64))
		c.Close()
	}
	id := fleet.NodeID(b)
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case err != nil:
		n.tab.Failed(now, addr, discovery.Unreachable)
	case id == n.id:
		n.tab.Failed(now, addr, discovery.Self)
	case id.Validate() != nil:
		n.tab.Failed(now, addr, discovery.Stranger)
	default:
		n.tab.Proven(now, addr, id)
		if _, ok := n.found[id]; !ok {
			n.found[id] = now.Sub(n.began)
		}
	}
}

func (n *node) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.found)
}

func (n *node) memory() discovery.Memory {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.tab.Memory()
}

// spread returns how long the nodes took to find each other: p50, p99, worst.
func spread(nodes []*node) (p50, p99, worst time.Duration) {
	var all []time.Duration
	for _, n := range nodes {
		n.mu.Lock()
		for _, d := range n.found {
			all = append(all, d)
		}
		n.mu.Unlock()
	}
	if len(all) == 0 {
		return
	}
	slices.Sort(all)
	return all[len(all)/2], all[len(all)*99/100], all[len(all)-1]
}

func waitAll(t testing.TB, nodes []*node, within time.Duration) {
	t.Helper()
	eventually(t, within, fmt.Sprintf("all %d know each other", len(nodes)), func() bool {
		for _, n := range nodes {
			if n.count() < len(nodes)-1 {
				return false
			}
		}
		return true
	})
}
