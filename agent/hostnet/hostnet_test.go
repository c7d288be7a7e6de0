package hostnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ns is a network namespace, kept by a thread that never leaves it.
type ns struct {
	t    *testing.T
	name string
	fd   int
	work chan func()
}

// newNS makes a namespace with loopback up.
func newNS(t *testing.T, name string) *ns {
	t.Helper()
	n := &ns{t: t, name: name, work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- err
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		n.fd = fd
		ready <- err
		for f := range n.work {
			f()
		}
	}()
	if err := <-ready; errors.Is(err, unix.EPERM) {
		t.Skipf("new network namespaces are refused here (%v): root is needed", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(n.work); unix.Close(n.fd) })
	n.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return n
}

// try runs f inside.
func (n *ns) try(f func() error) error {
	done := make(chan error)
	n.work <- func() { done <- f() }
	return <-done
}

func (n *ns) do(f func() error) {
	n.t.Helper()
	if err := n.try(f); err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
}

// lan is a bridge in a namespace of its own, with the hosts plugged in.
func lan(t *testing.T, hosts ...*ns) {
	t.Helper()
	sw := newNS(t, "switch")
	sw.do(func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		off := false
		br.MulticastSnooping = &off
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		for i, h := range hosts {
			a := netlink.NewLinkAttrs()
			a.Name, a.MasterIndex = fmt.Sprintf("port%d", i), br.Attrs().Index
			v := &netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(h.fd)}
			if err := netlink.LinkAdd(v); err != nil {
				return fmt.Errorf("veth: %w", err)
			}
			if err := netlink.LinkSetUp(v); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(br)
	})
	for _, h := range hosts {
		h.do(func() error {
			// No waiting for duplicate addresses: nobody else is here.
			if err := os.WriteFile("/proc/thread-self/../../sys/net/ipv6/conf/eth0/accept_dad", []byte("0"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(l)
		})
	}
}

// setAddr gives eth0 this address and no other (of its version).
func (n *ns) setAddr(cidr string) {
	n.t.Helper()
	n.do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		p := netip.MustParsePrefix(cidr)
		family := netlink.FAMILY_V4
		if p.Addr().Is6() {
			family = netlink.FAMILY_V6
		}
		have, err := netlink.AddrList(l, family)
		if err != nil {
			return err
		}
		for i := range have {
			if have[i].IP.IsLinkLocalUnicast() {
				continue
			}
			if err := netlink.AddrDel(l, &have[i]); err != nil {
				return err
			}
		}
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		return netlink.AddrAdd(l, a)
	})
}

func (n *ns) apply(d Desired) {
	n.t.Helper()
	n.do(func() error { return (&Host{}).Apply(d) })
}

// listen serves an echo on addr inside.
func (n *ns) listen(addr string) {
	n.t.Helper()
	n.do(func() error {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		n.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { _, _ = io.Copy(c, c); c.Close() }()
			}
		}()
		return nil
	})
}

func (n *ns) dial(addr string, patience time.Duration) (c net.Conn, err error) {
	err = n.try(func() error {
		d := net.Dialer{Timeout: patience}
		var err error
		c, err = d.Dial("tcp", addr)
		return err
	})
	return c, err
}

// echo sends a line there and back over a connection that lives.
func echo(t *testing.T, c net.Conn, line string) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil { // TCP's own retries fit in easily
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, line); err != nil {
		t.Fatalf("send %q: %v", line, err)
	}
	b := make([]byte, len(line))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != line {
		t.Fatalf("echo of %q: %q %v", line, b, err)
	}
}

var (
	inA, inB, inC = netip.MustParseAddr("100.96.0.1"), netip.MustParseAddr("100.96.0.2"), netip.MustParseAddr("100.96.0.3")
	pods          = netip.MustParsePrefix("10.42.0.0/16")
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// site applies for each node where the others are.
func site(hosts map[netip.Addr]*ns, at map[netip.Addr]netip.Addr) {
	for self, h := range hosts {
		d := Desired{Self: self, Peers: map[netip.Addr]netip.Addr{}, Firewall: &Firewall{Networks: []netip.Prefix{pods}}}
		for in, lan := range at {
			if in != self {
				d.Peers[in] = lan
			}
		}
		h.apply(d)
	}
}

func TestNewAddressesUnderALivingConnection(t *testing.T) {
	a, b, c := newNS(t, "a"), newNS(t, "b"), newNS(t, "c")
	lan(t, a, b, c)
	a.setAddr("192.168.1.11/24")
	b.setAddr("192.168.1.12/24")
	c.setAddr("192.168.1.13/24")
	hosts := map[netip.Addr]*ns{inA: a, inB: b, inC: c}
	site(hosts, map[netip.Addr]netip.Addr{inA: ip("192.168.1.11"), inB: ip("192.168.1.12"), inC: ip("192.168.1.13")})
	b.listen(inB.String() + ":2380")
	conn, err := a.dial(inB.String()+":2380", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.LocalAddr().(*net.TCPAddr).IP.String(); got != inA.String() {
		t.Errorf("the connection comes from %s, not from the in-site address", got)
	}
	echo(t, conn, "before")

	// One node gets another address.
	b.setAddr("192.168.1.77/24")
	site(hosts, map[netip.Addr]netip.Addr{inA: ip("192.168.1.11"), inB: ip("192.168.1.77"), inC: ip("192.168.1.13")})
	echo(t, conn, "one moved")

	// All of them do, into another network.
	a.setAddr("10.9.0.1/16")
	b.setAddr("10.9.0.2/16")
	c.setAddr("10.9.0.3/16")
	site(hosts, map[netip.Addr]netip.Addr{inA: ip("10.9.0.1"), inB: ip("10.9.0.2"), inC: ip("10.9.0.3")})
	echo(t, conn, "all moved")
	c2, err := c.dial(inB.String()+":2380", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, c2, "third node")
	c2.Close()

	// The test can fail: with the old routes nothing arrives.
	a.setAddr("10.9.0.1/16")
	b.setAddr("10.9.0.99/16")
	if c3, err := c.dial(inB.String()+":2380", time.Second); err == nil {
		c3.Close()
		t.Error("a connection without a route to the new address")
	}
}

func TestIPv6LAN(t *testing.T) {
	a, b := newNS(t, "a"), newNS(t, "b")
	lan(t, a, b)
	a.setAddr("fd00::1/64")
	b.setAddr("fd00::2/64")
	hosts := map[netip.Addr]*ns{inA: a, inB: b}
	site(hosts, map[netip.Addr]netip.Addr{inA: ip("fd00::1"), inB: ip("fd00::2")})
	b.listen(inB.String() + ":6443")
	conn, err := a.dial(inB.String()+":6443", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo(t, conn, "IPv4 over an IPv6 next hop")
	// From IPv6 to IPv4.
	a.setAddr("192.168.1.11/24")
	b.setAddr("192.168.1.12/24")
	site(hosts, map[netip.Addr]netip.Addr{inA: ip("192.168.1.11"), inB: ip("192.168.1.12")})
	echo(t, conn, "now IPv4")
}

func TestStrangerIsRefused(t *testing.T) {
	a, b, s := newNS(t, "a"), newNS(t, "b"), newNS(t, "stranger")
	lan(t, a, b, s)
	a.setAddr("192.168.1.11/24")
	b.setAddr("192.168.1.12/24")
	s.setAddr("192.168.1.66/24")
	at := map[netip.Addr]netip.Addr{inA: ip("192.168.1.11"), inB: ip("192.168.1.12")}
	site(map[netip.Addr]*ns{inA: a, inB: b}, at)
	for _, p := range []int{6443, 2379, 10250, 8080} {
		b.listen(fmt.Sprintf("0.0.0.0:%d", p))
	}
	for _, p := range []int{6443, 2379, 10250} {
		if c, err := s.dial(fmt.Sprintf("192.168.1.12:%d", p), 300*time.Millisecond); err == nil {
			c.Close()
			t.Errorf("a stranger reached port %d", p)
		}
		c, err := a.dial(fmt.Sprintf("%s:%d", inB, p), 10*time.Second)
		if err != nil {
			t.Errorf("an admitted node: %v", err)
			continue
		}
		c.Close()
		// By its LAN address it is a stranger too: nothing uses it, and
		// anybody can take it.
		if c, err := a.dial(fmt.Sprintf("192.168.1.12:%d", p), 300*time.Millisecond); err == nil {
			c.Close()
			t.Errorf("port %d is reached from a LAN address", p)
		}
		// The node itself.
		c, err = b.dial(fmt.Sprintf("127.0.0.1:%d", p), 10*time.Second)
		if err != nil {
			t.Errorf("loopback: %v", err)
			continue
		}
		c.Close()
	}
	c, err := s.dial("192.168.1.12:8080", 10*time.Second)
	if err != nil {
		t.Fatalf("a port that is none of ours: %v", err)
	}
	c.Close()

	// Admitted by its LAN address (a site without in-site addresses).
	d := Desired{Self: inB, Peers: map[netip.Addr]netip.Addr{inA: at[inA]}, Firewall: &Firewall{Nodes: []netip.Addr{{}, ip("192.168.1.66"), ip("127.0.0.1")}, Networks: []netip.Prefix{pods}}}
	b.apply(d)
	if c, err = s.dial("192.168.1.12:6443", 10*time.Second); err != nil {
		t.Fatalf("after its admission: %v", err)
	}
	echo(t, c, "hello")
	// Removed: the open connection ends to be heard, too.
	d.Firewall.Nodes = nil
	b.apply(d)
	if err := c.SetDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "x"); err == nil {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a removed node is still answered")
		}
	}
	c.Close()
}

func TestPeerPortIsRateLimited(t *testing.T) {
	a, b, s := newNS(t, "a"), newNS(t, "b"), newNS(t, "stranger")
	lan(t, a, b, s)
	a.setAddr("192.168.1.11/24")
	b.setAddr("192.168.1.12/24")
	s.setAddr("192.168.1.66/24")
	b.apply(Desired{Firewall: &Firewall{PeerPort: 7445, PeerRate: 20}})
	b.listen("0.0.0.0:7445")
	refused := false
	for range 40 { // the burst is 10, and 20 a minute come after it
		c, err := s.dial("192.168.1.12:7445", 200*time.Millisecond)
		if err != nil {
			refused = true
			break
		}
		c.Close()
	}
	if !refused {
		t.Error("40 connections in a row were let in")
	}
	c, err := a.dial("192.168.1.12:7445", 10*time.Second)
	if err != nil {
		t.Fatalf("another source pays for it: %v", err)
	}
	c.Close()
}

// rules counts the rules of our table, with their handles: an untouched table
// keeps them.
func rules(t *testing.T) string {
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, ch := range []string{"guarded", "input"} {
		rs, err := c.GetRules(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table}, &nftables.Chain{Name: ch})
		if err != nil {
			return err.Error()
		}
		for _, r := range rs {
			fmt.Fprintf(&out, "%s/%d ", ch, r.Handle)
		}
	}
	return out.String()
}

func TestReconciles(t *testing.T) {
	a, b := newNS(t, "a"), newNS(t, "b")
	lan(t, a, b)
	a.setAddr("192.168.1.11/24")
	d := Desired{Self: inA, Link: "eth0", Peers: map[netip.Addr]netip.Addr{inB: ip("192.168.1.12"), inC: {}}, FallbackDefault: true,
		Firewall: &Firewall{Networks: []netip.Prefix{pods, netip.MustParsePrefix("10.42.3.0/24"), netip.MustParsePrefix("fd00:42::/56")}}}
	a.apply(d)
	state := func() (s string) {
		a.do(func() error {
			s = rules(t)
			rs, err := ourRoutes()
			for _, r := range rs {
				s += r.String() + "\n"
			}
			l, err2 := netlink.LinkByName(Link)
			if err2 == nil {
				as, err3 := netlink.AddrList(l, netlink.FAMILY_V4)
				err = errors.Join(err, err3)
				s += fmt.Sprint(l.Attrs().Index, l.Attrs().MTU, as)
			}
			return errors.Join(err, err2)
		})
		return s
	}
	first := state()
	if strings.Count(first, "100.96.0.2") != 1 || strings.Contains(first, "100.96.0.3") || strings.Count(first, "Dst: 0.0.0.0/0") != 1 {
		t.Fatalf("state: %s", first)
	}
	a.apply(d)
	if again := state(); again != first {
		t.Errorf("a second time changed something:\n%s\n%s", first, again)
	}

	// What others break comes back; what others made stays.
	a.do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		other := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "theirs"})
		c.AddChain(&nftables.Chain{Name: "x", Table: other})
		rs, err := c.GetRules(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table}, &nftables.Chain{Name: "guarded"})
		if err != nil {
			return err
		}
		if err := c.DelRule(rs[len(rs)-1]); err != nil {
			return err
		}
		if err := c.Flush(); err != nil {
			return err
		}
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mine := netlink.Route{LinkIndex: eth.Attrs().Index, Dst: ipNet(ip("8.8.8.8")), Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_STATIC}
		if err := netlink.RouteAdd(&mine); err != nil {
			return err
		}
		l, err := netlink.LinkByName(Link)
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	a.apply(d)
	if n := strings.Count(state(), "/"); n == 0 || strings.Count(first, "guarded/") != strings.Count(state(), "guarded/") {
		t.Errorf("rules were not mended: %s", state())
	}
	if s := state(); strings.Count(s, "100.96.0.2") != 1 || strings.Count(s, "Dst: 0.0.0.0/0") != 1 {
		t.Errorf("routes were not mended: %s", s)
	}
	a.do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		ts, err := c.ListTables()
		if err != nil {
			return err
		}
		if len(ts) != 2 {
			return fmt.Errorf("%d tables; the other's should stay", len(ts))
		}
		rs, err := netlink.RouteGet(net.IPv4(8, 8, 8, 8))
		if err != nil || rs[0].Protocol == routeProtocol {
			return fmt.Errorf("the other's route is gone: %v %v", rs, err)
		}
		return nil
	})

	// A real default route sends the fallback away.
	a.do(func() error {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.IPv4(192, 168, 1, 1)})
	})
	a.apply(d)
	if s := state(); strings.Contains(s, "Dst: 0.0.0.0/0") {
		t.Errorf("the fallback stays beside a default route: %s", s)
	}
	// A peer that left loses its route.
	d.Peers = nil
	a.apply(d)
	if s := state(); strings.Contains(s, "100.96.0.2") {
		t.Errorf("a route to nobody: %s", s)
	}

	a.do(func() error { return (&Host{}).Remove() })
	a.do(func() error { return (&Host{}).Remove() }) // nothing is left to remove
	a.do(func() error {
		if _, err := netlink.LinkByName(Link); err == nil {
			return errors.New("the link is still there")
		}
		if s := rules(t); s != "" && !strings.Contains(s, "no such file") {
			return fmt.Errorf("rules are still there: %s", s)
		}
		return nil
	})
}

func TestForeignLinkIsLeftAlone(t *testing.T) {
	a := newNS(t, "a")
	a.do(func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Link}}
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		return netlink.LinkSetUp(br)
	})
	err := a.try(func() error { return (&Host{}).Apply(Desired{Self: inA}) })
	if err == nil || !strings.Contains(err.Error(), "somebody else") {
		t.Errorf("%v", err)
	}
	a.do(func() error { return (&Host{}).Remove() })
	a.do(func() error { _, err := netlink.LinkByName(Link); return err })
}

func TestUnreachablePeerDoesNotStopTheOthers(t *testing.T) {
	a, b := newNS(t, "a"), newNS(t, "b")
	lan(t, a, b)
	a.setAddr("192.168.1.11/24")
	dst := func(want ...netip.Addr) {
		t.Helper()
		a.do(func() error {
			rs, err := ourRoutes()
			var got []netip.Addr
			for _, r := range rs {
				got = append(got, addrOf(r.Dst))
			}
			slices.SortFunc(got, netip.Addr.Compare)
			if err == nil && !slices.Equal(got, want) {
				err = fmt.Errorf("routes to %v, want %v", got, want)
			}
			return err
		})
	}
	for _, bad := range []string{"172.20.0.1", "127.0.0.1", "100.96.0.3", "100.96.0.1", "224.0.0.1", "fe80::1", "0.0.0.0", "::ffff:10.0.0.1"} {
		a.apply(Desired{Self: inA, Peers: map[netip.Addr]netip.Addr{inB: ip(bad), inC: ip("192.168.1.13")}})
		dst(inC)
	}
	// One that was reached keeps its route until there is a better one.
	a.apply(Desired{Self: inA, Peers: map[netip.Addr]netip.Addr{inB: ip("192.168.1.12"), inC: ip("192.168.1.13")}})
	a.apply(Desired{Self: inA, Peers: map[netip.Addr]netip.Addr{inB: ip("172.20.0.1"), inC: ip("192.168.1.13")}})
	dst(inB, inC)
	a.apply(Desired{Self: inA, Peers: map[netip.Addr]netip.Addr{inB: {}, inC: ip("192.168.1.13")}})
	dst(inC)
}

func TestDesiredValidate(t *testing.T) {
	good := Desired{Self: inA, Peers: map[netip.Addr]netip.Addr{inB: ip("192.168.1.2"), inC: {}}, Firewall: &Firewall{Networks: []netip.Prefix{pods}}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, d := range map[string]Desired{
		"self is IPv6":              {Self: ip("fd00::1")},
		"self is loopback":          {Self: ip("127.0.0.1")},
		"peers without self":        {Peers: map[netip.Addr]netip.Addr{inB: ip("192.168.1.2")}},
		"a peer is self":            {Self: inA, Peers: map[netip.Addr]netip.Addr{inA: ip("192.168.1.2")}},
		"the whole world is inside": {Firewall: &Firewall{Networks: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}},
		"a network with host bits":  {Firewall: &Firewall{Networks: []netip.Prefix{netip.MustParsePrefix("10.42.1.0/16")}}},
	} {
		if err := d.Validate(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestAfter(t *testing.T) {
	for p, want := range map[string]string{"10.42.0.0/16": "10.43.0.0", "10.255.255.0/24": "11.0.0.0", "fd00::/8": "fe00::", "255.0.0.0/8": "0.0.0.0", "10.0.0.1/32": "10.0.0.2"} {
		if got, _ := netip.AddrFromSlice(after(netip.MustParsePrefix(p))); got.String() != want {
			t.Errorf("%s: %s, want %s", p, got, want)
		}
	}
}
