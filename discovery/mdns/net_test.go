package mdns

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/discovery"
)

// site plugs n hosts into one LAN.
func site(t testing.TB, n int, v6 bool) (*lan, []*host) {
	l := newLAN(t)
	var hosts []*host
	for i := range n {
		h := newHost(t, v6)
		if v6 {
			l.plug(t, h, "eth0")
		} else {
			l.plug(t, h, "eth0", fmt.Sprintf("10.78.0.%d/24", i+1))
		}
		hosts = append(hosts, h)
	}
	return l, hosts
}

func startAll(t testing.TB, hosts []*host, opts func(int) []opt) []*node {
	var nodes []*node
	for i, h := range hosts {
		nodes = append(nodes, startNode(t, h, opts(i)...))
	}
	return nodes
}

func report(t testing.TB, what string, nodes []*node) {
	p50, p99, worst := spread(nodes)
	verdict := "reached"
	if p99 > 10*time.Second {
		verdict = "MISSED"
	}
	t.Logf("%s: p50 %s, p99 %s, worst %s (target p99 <= 10s: %s)", what, p50.Round(time.Millisecond), p99.Round(time.Millisecond), worst.Round(time.Millisecond), verdict)
	t.Logf("first host: %+v", nodes[0].svc.Counters())
}

func none(int) []opt { return nil }

func TestTenHostsFindEachOther(t *testing.T) {
	_, hosts := site(t, 10, false)
	nodes := startAll(t, hosts, none)
	waitAll(t, nodes, 60*time.Second)
	report(t, "10 hosts", nodes)
}

// lossy drops a share of packets, the same ones for the same seed.
func lossy(seed int, share float64) opt {
	rng := rand.New(seeded(seed))
	lock := make(chan struct{}, 1)
	return losing(func([]byte) bool {
		lock <- struct{}{}
		defer func() { <-lock }()
		return rng.Float64() < share
	})
}

func TestTenHostsWithLoss(t *testing.T) {
	_, hosts := site(t, 10, false)
	nodes := startAll(t, hosts, func(i int) []opt { return []opt{lossy(i, 0.3)} })
	waitAll(t, nodes, 60*time.Second)
	report(t, "10 hosts, 30 % multicast loss", nodes)
}

func TestMulticastFiltered(t *testing.T) {
	_, hosts := site(t, 10, false)
	nodes := startAll(t, hosts, none)
	waitAll(t, nodes, 60*time.Second)
	var memories []discovery.Memory
	for _, n := range nodes {
		memories = append(memories, n.memory())
		n.stop()
	}
	var lost atomic.Int64
	deaf := losing(func([]byte) bool { lost.Add(1); return true })

	// Without known addresses nobody is found, however much is sent.
	blind := startAll(t, hosts, func(int) []opt { return []opt{deaf} })
	eventually(t, 30*time.Second, "much was sent and lost", func() bool { return lost.Load() > 300 })
	for _, n := range blind {
		if n.count() != 0 {
			t.Fatal("found somebody without hearing anything: the filter does not filter")
		}
		n.stop()
	}
	nodes = startAll(t, hosts, func(i int) []opt { return []opt{deaf, remembering(memories[i])} })
	waitAll(t, nodes, 60*time.Second)
	report(t, "10 hosts, multicast filtered, known addresses", nodes)
}

// listen runs a service alone and feeds a table, without dialling.
func listen(t testing.TB, h *host, opts ...opt) (*Service, func(func(*discovery.Table)), func()) {
	t.Helper()
	n := &node{t: t, h: h}
	var err error
	n.svc, err = New(Config{Tag: siteTag, Source: seeded(h.n)})
	must(t, err)
	n.tab, err = discovery.New(discovery.Config{Tag: siteTag}, seeded(h.n))
	must(t, err)
	for _, o := range opts {
		o(n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{}, 2)
	h.spawn(func() {
		if err := n.svc.Run(ctx); err != nil {
			t.Error(err)
		}
		ended <- struct{}{}
	})
	go func() {
		defer func() { ended <- struct{}{} }()
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
		}
	}()
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			cancel()
			<-ended
			<-ended
		}
	}
	t.Cleanup(stop)
	return n.svc, func(f func(*discovery.Table)) { n.mu.Lock(); defer n.mu.Unlock(); f(n.tab) }, stop
}

func knows1(with func(func(*discovery.Table)), addr string) func() bool {
	return func() (ok bool) {
		with(func(tab *discovery.Table) {
			ok = slices.ContainsFunc(tab.Addresses(), func(a discovery.Address) bool { return a.Addr.String() == addr })
		})
		return ok
	}
}

func TestGoodbyeRemovesAtOnce(t *testing.T) {
	_, hosts := site(t, 3, false)
	_, with, _ := listen(t, hosts[0])
	_, _, stop1 := listen(t, hosts[1])
	listen(t, hosts[2])
	knows1, knows2 := knows1(with, "10.78.0.2:7445"), knows1(with, "10.78.0.3:7445")
	eventually(t, 20*time.Second, "adverts heard", func() bool { return knows1() && knows2() })
	stop1()
	began := time.Now()
	eventually(t, 5*time.Second, "gone", func() bool { return !knows1() })
	t.Logf("gone %s after the goodbye", time.Since(began).Round(time.Millisecond))
	if !knows2() {
		t.Error("the host that stayed is gone too")
	}
}

func TestIPv6Only(t *testing.T) {
	_, hosts := site(t, 4, true)
	nodes := startAll(t, hosts, none)
	waitAll(t, nodes, 60*time.Second)
	report(t, "4 hosts, IPv6 link-local only, from link-up (duplicate address detection included)", nodes)
	for _, n := range nodes {
		n.mu.Lock()
		for _, p := range n.tab.Peers() {
			if a := p.Addrs[0].Addr(); !a.Is6() || a.Zone() != "eth0" {
				t.Errorf("peer at %s, want link-local with zone", a)
			}
		}
		n.mu.Unlock()
	}
}

func TestInterfaceAppearsLater(t *testing.T) {
	l := newLAN(t)
	a, b := newHost(t, false), newHost(t, false)
	l.plug(t, a, "eth0", "10.78.0.1/24")
	svcA, withA, _ := listen(t, a)
	svcB, withB, _ := listen(t, b)
	eventually(t, 10*time.Second, "a sends", func() bool { return svcA.Counters().Announcements > 0 })
	if c := svcB.Counters(); c.Links != 0 {
		t.Fatalf("b has links without an interface: %+v", c)
	}
	began := time.Now()
	unplug := l.plug(t, b, "eth3", "10.78.0.2/24")
	eventually(t, 20*time.Second, "both know each other", func() bool {
		return knows1(withA, "10.78.0.2:7445")() && knows1(withB, "10.78.0.1:7445")()
	})
	t.Logf("found %s after plugging in", time.Since(began).Round(time.Millisecond))
	unplug()
	eventually(t, 20*time.Second, "b left the link", func() bool { return svcB.Counters().Links == 0 })
	l.plug(t, b, "eth4", "10.78.0.3/24")
	eventually(t, 20*time.Second, "found on another interface and address", knows1(withA, "10.78.0.3:7445"))
}

func TestAddressChanges(t *testing.T) {
	l := newLAN(t)
	a, b := newHost(t, false), newHost(t, false)
	l.plug(t, a, "eth0", "10.78.0.1/24")
	l.plug(t, b, "eth0", "10.78.0.2/24")
	_, withA, _ := listen(t, a)
	svcB, withB, _ := listen(t, b)
	eventually(t, 20*time.Second, "found", knows1(withA, "10.78.0.2:7445"))
	// Both move to another network, and are never without an address.
	for i, h := range []*host{a, b} {
		must(t, h.in(func() error {
			eth, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(fmt.Sprintf("10.80.0.%d/24", i+1))
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(eth, addr); err != nil {
				return err
			}
			old, err := netlink.ParseAddr(fmt.Sprintf("10.78.0.%d/24", i+1))
			if err != nil {
				return err
			}
			return netlink.AddrDel(eth, old)
		}))
	}
	eventually(t, 20*time.Second, "found at the new addresses", func() bool {
		return knows1(withA, "10.80.0.2:7445")() && knows1(withB, "10.80.0.1:7445")()
	})
	if c := svcB.Counters(); c.Links != 1 {
		t.Errorf("%+v", c)
	}
}

func rawSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return -1, err
	}
	return fd, unix.BindToDevice(fd, "eth0")
}

// inject multicasts a message with any source and TTL.
func inject(fd int, src netip.Addr, ttl byte, dns []byte) error {
	p := make([]byte, 28+len(dns))
	p[0], p[8], p[9] = 0x45, ttl, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], group4.Addr().AsSlice())
	binary.BigEndian.PutUint16(p[20:], port)
	binary.BigEndian.PutUint16(p[22:], port)
	binary.BigEndian.PutUint16(p[24:], uint16(8+len(dns)))
	copy(p[28:], dns)
	return unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: group4.Addr().As4()})
}

// TestOnlyNeighboursAreHeard: what could come from beyond the link is no hint.
func TestOnlyNeighboursAreHeard(t *testing.T) {
	_, hosts := site(t, 2, false)
	svc, with, _ := listen(t, hosts[0])
	eventually(t, 10*time.Second, "listening", func() bool { return svc.Counters().Announcements > 0 })
	send := func(src string, ttl byte, port uint16) {
		t.Helper()
		ip := netip.MustParseAddr(src)
		z, err := newZone(labelB, port, siteTag, []netip.Addr{ip})
		must(t, err)
		b := packed(t, response(oneAdvert, z))
		must(t, hosts[1].in(func() error {
			fd, err := rawSocket()
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return inject(fd, ip, ttl, b)
		}))
	}
	send("10.78.0.2", 64, 1)    // routed, or meant to look so
	send("10.99.0.2", 255, 2)   // of no prefix of the link
	send("169.254.7.7", 255, 3) // link-local is a neighbour
	send("10.78.0.2", 255, 4)   // a neighbour
	eventually(t, 10*time.Second, "the neighbours are heard", func() bool {
		return knows1(with, "10.78.0.2:4")() && knows1(with, "169.254.7.7:3")()
	})
	if c := svc.Counters(); c.Hops != 1 || c.OffLink != 1 || c.Hints != 2 {
		t.Errorf("%+v: want one by hops, one off the link, two hints", c)
	}
}

// forge sends adverts from made-up neighbours at a rate, as many as are asked
// for: a slow machine takes longer.
func forge(t testing.TB, h *host, perSecond, count int) {
	t.Helper()
	must(t, h.in(func() error {
		fd, err := rawSocket()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		rng := rand.New(seeded(99))
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		began, sent := time.Now(), 0
		for sent < count {
			<-tick.C
			for due := min(count, int(time.Since(began).Seconds()*float64(perSecond))); sent < due; sent++ {
				src := netip.AddrFrom4([4]byte{10, 79, byte(rng.Uint32()), byte(rng.Uint32())})
				if err := inject(fd, src, 255, forgedAdvert(rng, src)); err != nil {
					return err
				}
			}
		}
		return nil
	}))
}

func forgedAdvert(rng *rand.Rand, src netip.Addr) []byte {
	z, err := newZone(discovery.NewLabel(rng), uint16(1+rng.IntN(65535)), siteTag, []netip.Addr{src})
	if err != nil {
		panic(err)
	}
	m := response(oneAdvert, z)
	if rng.IntN(4) == 0 {
		m = withdrawal(z)
	}
	b, err := pack(m)
	if err != nil {
		panic(err)
	}
	return b
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestFloodOfForgedAdverts(t *testing.T) {
	l := newLAN(t)
	var hosts []*host
	for i := range 5 {
		h := newHost(t, false)
		l.plug(t, h, "eth0", fmt.Sprintf("10.79.0.%d/16", i+1))
		hosts = append(hosts, h)
	}
	nodes := startAll(t, hosts[:3], none)
	waitAll(t, nodes, 60*time.Second)
	before := heap()
	threads := runtime.NumGoroutine()
	const sent = 24_000
	began := time.Now()
	forge(t, hosts[3], 10_000, sent)
	eventually(t, time.Minute, "the flood has arrived, or was dropped", func() bool {
		c := nodes[0].svc.Counters()
		return c.Received+c.KernelDrops >= sent/2
	})
	c := nodes[0].svc.Counters()
	after := heap()
	seconds := int(time.Since(began).Seconds()) + 1
	t.Logf("%d forged in %d s; first host: %+v", sent, seconds, c)
	t.Logf("heap %d KiB before, %d KiB after, for 3 hosts; goroutines %d, %d", before>>10, after>>10, threads, runtime.NumGoroutine())
	if c.Received < 1000 {
		t.Fatalf("no flood: %d received", c.Received)
	}
	if after > before+8<<20 {
		t.Errorf("the heap grew from %d to %d bytes", before, after)
	}
	for _, n := range nodes {
		n.mu.Lock()
		tc := n.tab.Counters()
		dials := n.dials
		peers := n.tab.Peers()
		n.mu.Unlock()
		t.Logf("table: %+v", tc)
		if len(peers) != 2 {
			t.Errorf("%d peers left, want 2", len(peers))
		}
		for _, p := range peers {
			if p.Addrs[0].Port() != 7445 {
				t.Errorf("peer %+v", p)
			}
		}
		if tc.Addresses > 2*256+2*256+32 {
			t.Errorf("%d addresses", tc.Addresses)
		}
		if dials > 32+8*(27+seconds) { // a burst, then 8 a second; before the flood, too
			t.Errorf("%d dials", dials)
		}
	}
	// A newcomer is found by adverts all the same, and finds the others.
	late := startNode(t, hosts[4])
	waitAll(t, append(nodes, late), 60*time.Second)
	p50, _, worst := spread([]*node{late})
	t.Logf("a newcomer right after the flood finds them in %s (p50), %s (worst)", p50.Round(time.Millisecond), worst.Round(time.Millisecond))
}

// tool finds a program, or skips.
func tool(t testing.TB, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/usr/bin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	t.Skipf("%s is not installed (apt-get install avahi-daemon avahi-utils)", name)
	return ""
}

// avahi runs a real avahi-daemon on the host, with a bus of its own, and
// returns a way to run its tools there.
func avahi(t testing.TB, h *host) func(name string, args ...string) (string, error) {
	t.Helper()
	daemon, bus := tool(t, "avahi-daemon"), tool(t, "dbus-daemon")
	tool(t, "avahi-browse")
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} { // for the user avahi
		must(t, os.Chmod(d, 0o755))
	}
	sock := filepath.Join(dir, "bus")
	must(t, os.WriteFile(filepath.Join(dir, "bus.conf"), []byte(`<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=`+sock+`</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>`), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "avahi.conf"), []byte(fmt.Sprintf(`[server]
host-name=host%d
use-ipv4=yes
use-ipv6=no
enable-dbus=yes
ratelimit-interval-usec=1000000
ratelimit-burst=1000
[wide-area]
enable-wide-area=no
[publish]
publish-hinfo=no
publish-workstation=yes
`, h.n)), 0o644))
	env := append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+sock)
	start := func(own bool, name string, args ...string) {
		out, err := os.Create(filepath.Join(dir, filepath.Base(name)+".log"))
		must(t, err)
		defer out.Close()
		cmd := exec.Command(name, args...)
		cmd.Env, cmd.Stdout, cmd.Stderr = env, out, out
		attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if own { // a /run of its own
			attr.Cloneflags = syscall.CLONE_NEWNS
		}
		cmd.SysProcAttr = attr
		began, over := make(chan error, 1), make(chan struct{})
		h.spawn(func() { // the thread must outlive the program: Pdeathsig
			began <- cmd.Start()
			<-over
		})
		must(t, <-began)
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			close(over)
			if t.Failed() {
				b, _ := os.ReadFile(out.Name())
				t.Logf("%s:\n%s", filepath.Base(name), b)
			}
		})
	}
	start(false, bus, "--config-file="+filepath.Join(dir, "bus.conf"), "--nofork", "--nopidfile")
	eventually(t, 10*time.Second, "bus", func() bool { _, err := os.Stat(sock); return err == nil })
	// It opens its sockets as the user avahi, as on any host: another user
	// than ours, which SO_REUSEPORT alone would not let onto the port.
	start(true, "/bin/sh", "-c", "mkdir -p /run/avahi-daemon && mount --make-rprivate / && mount -t tmpfs none /run/avahi-daemon && exec "+daemon+
		" --no-chroot --no-rlimits --no-proc-title -f "+filepath.Join(dir, "avahi.conf"))
	run := func(name string, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = env
		var out []byte
		err := h.in(func() (err error) { out, err = cmd.CombinedOutput(); return err })
		return string(out), err
	}
	eventually(t, 20*time.Second, "avahi is up", func() bool {
		_, err := run("avahi-browse", "-apt")
		return err == nil
	})
	return run
}

func TestBesideAvahi(t *testing.T) {
	_, hosts := site(t, 2, false)
	toolA := avahi(t, hosts[0]) // before ours
	nodes := startAll(t, hosts, none)
	waitAll(t, nodes, 60*time.Second)
	toolB := avahi(t, hosts[1]) // after ours
	report(t, "2 hosts, avahi on 5353 beside one", nodes)

	// Each avahi resolves both of our adverts: that of its own host, which
	// it hears by loopback, and the other.
	for who, run := range map[string]func(string, ...string) (string, error){"first": toolA, "second": toolB} {
		var out string
		eventually(t, 30*time.Second, "avahi resolves our adverts", func() bool {
			out, _ = run("avahi-browse", "-rpt", "_muster._tcp")
			resolved := map[string]bool{}
			for line := range strings.Lines(out) {
				if f := strings.Split(line, ";"); f[0] == "=" && len(f) > 9 && f[8] == "7445" && strings.Contains(f[9], string(siteTag)) {
					resolved[f[7]] = true
				}
			}
			return resolved["10.78.0.1"] && resolved["10.78.0.2"]
		})
		t.Logf("%s host's avahi:\n%s", who, out)
	}
	// And avahi still finds avahi.
	eventually(t, 30*time.Second, "avahi finds avahi's workstations", func() bool {
		out, _ := toolA("avahi-browse", "-rpt", "_workstation._tcp")
		return strings.Contains(out, fmt.Sprintf("host%d", hosts[1].n))
	})
}

var oneAdvert = []dnsQuestion{ourAdvert}

// BenchmarkSite starts whole sites and reports how long their hosts take to
// find each other, and what each host receives for it. More than 32 hosts in one
// kernel overflow its table of neighbours (gc_thresh3 is 1024 for all namespaces).
func BenchmarkSite(b *testing.B) {
	for _, n := range []int{10, 30} {
		b.Run(fmt.Sprintf("hosts=%d", n), func(b *testing.B) {
			_, hosts := site(b, n, false)
			var nodes []*node
			for b.Loop() {
				for _, old := range nodes {
					old.stop()
				}
				nodes = startAll(b, hosts, none)
				waitAll(b, nodes, 2*time.Minute)
			}
			p50, p99, worst := spread(nodes)
			received := uint64(0)
			for _, x := range nodes {
				received += x.svc.Counters().Received
			}
			b.ReportMetric(p50.Seconds(), "p50-s")
			b.ReportMetric(p99.Seconds(), "p99-s")
			b.ReportMetric(worst.Seconds(), "worst-s")
			b.ReportMetric(float64(received)/float64(n), "packets/host")
		})
	}
}
