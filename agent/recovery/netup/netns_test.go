package netup

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/fleet"
)

// These tests run the test binary again in network namespaces of its own:
// one for the machine, one for the far end of the cable. Nothing of the
// host's network is touched, and nothing is left behind.

const inside = "MUSTER_TEST_INSIDE"

func TestMain(m *testing.M) {
	switch os.Getenv(inside) {
	case "far": // keeps a namespace alive until its parent goes
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	case "rogue":
		rogue()
		return
	}
	os.Exit(m.Run())
}

// machineTest runs f in a fresh network namespace.
func machineTest(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	if os.Getenv(inside) == "machine" {
		f(t, newWorld(t))
		return
	}
	if testing.Short() {
		t.Skip("network namespaces are left out with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	for _, p := range []string{"dnsmasq", "nsenter", "ip"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: %v", p, err)
		}
	}
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=120s")
	cmd.Env = append(os.Environ(), inside+"=machine")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("--- SKIP: "+t.Name())) {
		t.Skipf("inside: %s", out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("the inner test did not run:\n%s", out)
	}
}

// world is a machine with nic0 and the far end of its cable, far0, in another
// namespace.
type world struct {
	t   *testing.T
	far int // pid that owns the far namespace
	dir string
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, dir: t.TempDir()}
	far := exec.Command(os.Args[0])
	far.Env = append(os.Environ(), inside+"=far")
	far.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	in, err := far.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := far.Start(); err != nil {
		t.Skipf("no network namespaces here: %v", err)
	}
	t.Cleanup(func() { in.Close(); _ = far.Wait() })
	w.far = far.Process.Pid
	w.cable("nic0", "far0")
	w.inFar("ip", "link", "set", "lo", "up")
	w.inFar("ip", "addr", "add", "192.0.2.1/24", "dev", "far0")
	return w
}

// cable plugs a new interface into the machine, with the far end down: no
// carrier yet.
func (w *world) cable(near, far string) {
	w.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = near
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: far}
	if err := netlink.LinkAdd(veth); err != nil {
		w.t.Fatal(err)
	}
	peer, err := netlink.LinkByName(far)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := netlink.LinkSetNsPid(peer, w.far); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) enter(args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"-t", fmt.Sprint(w.far), "-n"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (w *world) inFar(args ...string) {
	w.t.Helper()
	if out, err := w.enter(args...).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// plug and unplug change the carrier of nic0.
func (w *world) plug()   { w.t.Helper(); w.inFar("ip", "link", "set", "far0", "up") }
func (w *world) unplug() { w.t.Helper(); w.inFar("ip", "link", "set", "far0", "down") }

// start runs a helper at the far end until the returned function is called.
func (w *world) start(env string, args ...string) (stop func()) {
	w.t.Helper()
	cmd := w.enter(args...)
	cmd.Env = append(os.Environ(), env)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	done := false
	stop = func() {
		if done {
			return
		}
		done = true
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if w.t.Failed() {
			w.t.Logf("%v said:\n%s", args, out.String())
		}
	}
	w.t.Cleanup(stop)
	return stop
}

// dnsmasq serves addresses and names on far0.
func (w *world) dnsmasq(extra ...string) (stop func()) {
	w.t.Helper()
	return w.start("X=y", append([]string{"dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
		"--bind-interfaces", "--interface=far0", "--except-interface=lo", "--dhcp-range=192.0.2.50,192.0.2.60,255.255.255.0,2m",
		"--dhcp-leasefile=" + filepath.Join(w.dir, "leases"), "--pid-file=", "--dhcp-authoritative", "--no-ping", "--log-dhcp",
		"--address=/centre.test/192.0.2.1"}, extra...)...)
}

// manage starts a Manager and returns it with a function that waits until
// ok holds for its interfaces.
func (w *world) manage(cfg Config) (*Manager, func(what string, ok func([]NIC) bool) []NIC) {
	changed := make(chan []NIC, 1)
	cfg.Changed = func(n []NIC) {
		select {
		case <-changed:
		default:
		}
		changed <- n
	}
	m := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { _ = m.Run(ctx); close(done) }()
	w.t.Cleanup(func() { cancel(); <-done })
	return m, func(what string, ok func([]NIC) bool) []NIC {
		w.t.Helper()
		late := time.After(40 * time.Second)
		var last []NIC
		for {
			select {
			case last = <-changed:
				if ok(last) {
					return last
				}
			case <-late:
				w.t.Fatalf("waited in vain for: %s; interfaces are %v", what, last)
			}
		}
	}
}

// quietFor fails the test when bad holds within d.
func quietFor(t *testing.T, m *Manager, d time.Duration, what string, bad func([]NIC) bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	end := time.After(d)
	for {
		select {
		case <-tick.C:
			if n := m.NICs(); bad(n) {
				t.Fatalf("%s: %v", what, n)
			}
		case <-end:
			return
		}
	}
}

func isUp(name string) func([]NIC) bool {
	return func(nics []NIC) bool {
		for _, n := range nics {
			if n.Name == name && n.Phase == Up {
				return true
			}
		}
		return false
	}
}

func in(phase Phase) func([]NIC) bool {
	return func(nics []NIC) bool { return len(nics) == 1 && nics[0].Phase == phase }
}

// TestWhenTheCarrierComesLateThenDHCPStillWorks: and when it goes and
// returns, and the link is never taken down by us.
func TestWhenTheCarrierComesLateThenDHCPStillWorks(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.dnsmasq()
		resolv := filepath.Join(w.dir, "resolv.conf")
		m, wait := w.manage(Config{ResolvConf: resolv})
		wait("no link", in(NoLink))
		quietFor(t, m, time.Second, "left no-link without a carrier", func(n []NIC) bool { return len(n) == 1 && n[0].Phase != NoLink })
		downs := watchDowns(t)
		w.plug()
		n := wait("an address", isUp("nic0"))[0]
		if !netip.MustParsePrefix("192.0.2.0/24").Contains(n.Address.Addr()) || n.Address.Bits() != 24 || n.Router.String() != "192.0.2.1" {
			t.Errorf("got %v", n)
		}
		checkKernel(t, "nic0", n)
		if b, _ := os.ReadFile(resolv); !strings.Contains(string(b), "nameserver 192.0.2.1\n") {
			t.Errorf("name servers: %q", b)
		}
		c, err := m.Dial(t.Context(), "tcp", "centre.test:53")
		if err != nil {
			t.Errorf("dial by name: %v", err)
		} else {
			c.Close()
		}
		if _, err := m.Dial(t.Context(), "tcp", "nowhere.test:53"); err == nil {
			t.Error("a name that does not exist was dialled")
		}
		w.unplug()
		wait("no link again", in(NoLink))
		w.plug()
		again := wait("an address again", isUp("nic0"))[0]
		if again.Address != n.Address {
			t.Errorf("address changed from %s to %s", n.Address, again.Address)
		}
		if downs() > 0 {
			t.Error("the link was taken down by us: spanning tree would start again")
		}
	})
}

// watchDowns counts how often nic0 lost IFF_UP, which only we control.
func watchDowns(t *testing.T) func() int {
	updates, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		t.Fatal(err)
	}
	downs := 0
	return func() int {
		for {
			select {
			case u := <-updates:
				if u.Link != nil && u.Attrs().Name == "nic0" && u.Attrs().RawFlags&unix.IFF_UP == 0 {
					downs++
				}
			default:
				close(done)
				return downs
			}
		}
	}
}

// checkKernel compares the kernel's routes with what n says.
func checkKernel(t *testing.T, device string, n NIC) {
	t.Helper()
	link, err := netlink.LinkByName(device)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != n.Address.String() {
		t.Errorf("kernel has addresses %v (%v), want %s alone", addrs, err, n.Address)
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
	if err != nil || len(routes) != 2 {
		t.Fatalf("kernel has routes %v (%v), want two", routes, err)
	}
	for _, r := range routes {
		if r.Priority != metricBase+link.Attrs().Index {
			t.Errorf("route %v has metric %d", r, r.Priority)
		}
	}
}

// TestWhenTheServerComesLateThenItIsAsked: a site's router often boots slower
// than a PC.
func TestWhenTheServerComesLateThenItIsAsked(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.plug()
		_, wait := w.manage(Config{})
		wait("a round without an answer", func(n []NIC) bool { return len(n) == 1 && n[0].Phase == Asking && n[0].Attempts >= 1 })
		w.dnsmasq()
		wait("an address", isUp("nic0"))
	})
}

// TestWhenOffersAreMalformedThenAGoodOneWins: a hostile server answers every
// message at once, with rubbish; the good one answers too.
func TestWhenOffersAreMalformedThenAGoodOneWins(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.plug()
		// A second address for the rogue; both share the wire.
		w.inFar("ip", "addr", "add", "192.0.2.66/24", "dev", "far0")
		stop := w.start(inside+"=rogue", os.Args[0])
		m, wait := w.manage(Config{})
		wait("a complaint about the offers", func(n []NIC) bool {
			return len(n) == 1 && n[0].Phase == Asking && strings.Contains(n[0].Detail, "not usable")
		})
		if a := m.NICs()[0].Address; a.IsValid() {
			t.Errorf("took %s from rubbish", a)
		}
		stop() // two programs cannot share port 67 politely
		w.dnsmasq()
		wait("an address", isUp("nic0"))
	})
}

// rogue answers DHCP with bytes that are wrong in several ways.
func rogue() {
	c, err := net.ListenPacket("udp4", ":67")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	rc, _ := c.(*net.UDPConn).SyscallConn()
	_ = rc.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
		_ = unix.BindToDevice(int(fd), "far0")
	})
	to := &net.UDPAddr{IP: net.IPv4bcast, Port: 68}
	buf := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		req, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			continue
		}
		reply, err := dhcpv4.NewReplyFromRequest(req, dhcpv4.WithMessageType(dhcpv4.MessageTypeOffer),
			dhcpv4.WithYourIP(net.IPv4(192, 0, 2, 255)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 66))))
		if err != nil {
			continue
		}
		good := reply.ToBytes()
		for _, b := range [][]byte{good[:200], good[:241], append(append([]byte{}, good[:240]...), 53, 255, 2), bytes.Repeat([]byte{0xff}, 1400), good} {
			_, _ = c.WriteTo(b, to)
		}
	}
}

// TestWhenAnInterfaceComesLaterThenItIsTakenUp: USB adapters, slow drivers.
func TestWhenAnInterfaceComesLaterThenItIsTakenUp(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.dnsmasq()
		w.plug()
		m, wait := w.manage(Config{})
		wait("nic0", isUp("nic0"))
		w.cable("nic1", "far1")
		wait("nic1 without link", func(n []NIC) bool { return len(n) == 2 && n[1].Name == "nic1" && n[1].Phase == NoLink })
		l, err := netlink.LinkByName("nic1")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkDel(l); err != nil {
			t.Fatal(err)
		}
		wait("nic1 gone", func(n []NIC) bool { return len(n) == 1 })
		if !isUp("nic0")(m.NICs()) {
			t.Error("nic0 suffered")
		}
	})
}

// TestWhenNoServerEverAnswersThenTheManagerKeepsTrying has no end to wait for.
func TestWhenNoServerEverAnswersThenTheManagerKeepsTrying(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.plug()
		_, wait := w.manage(Config{})
		wait("two rounds", func(n []NIC) bool { return len(n) == 1 && n[0].Attempts >= 2 && n[0].Phase == Asking })
	})
}

func TestStaticAddressAndVLAN(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.plug()
		site := fleet.NetworkConfig{Address: "198.51.100.10/24", Gateway: "198.51.100.1", DNS: []string{"198.51.100.1"}, VLAN: 7}
		probe := netlink.NewLinkAttrs()
		probe.Name, probe.ParentIndex = "probe", mustIndex(t, "nic0")
		if err := netlink.LinkAdd(&netlink.Vlan{LinkAttrs: probe, VlanId: 9}); err != nil {
			t.Logf("no VLANs in this kernel (%v): testing without", err)
			site.VLAN = 0
		} else if l, err := netlink.LinkByName("probe"); err == nil {
			_ = netlink.LinkDel(l)
		}
		asked := ""
		m, wait := w.manage(Config{Network: site, NeedModule: func(n string) error { asked = n; return nil }})
		n := wait("the static address", isUp("nic0"))[0]
		device := "nic0"
		if site.VLAN != 0 {
			device = "nic0.7"
			if asked != "8021q" {
				t.Errorf("asked for module %q", asked)
			}
		}
		if n.Device != device || n.Address.String() != site.Address {
			t.Errorf("got %+v", n)
		}
		checkKernel(t, device, n)
		if got := nameServers(site, m.NICs()); len(got) != 1 || got[0].String() != "198.51.100.1" {
			t.Errorf("name servers %v", got)
		}
	})
}

func mustIndex(t *testing.T, name string) int {
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Index
}

// TestWhenSiteNamesAMACThenOnlyThatInterfaceIsStatic: a typo must not make a
// machine mute.
func TestWhenSiteNamesAMACThenOnlyThatInterfaceIsStatic(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		w.dnsmasq()
		w.plug()
		_, wait := w.manage(Config{Network: fleet.NetworkConfig{Address: "198.51.100.10/24", MAC: "02:00:00:00:00:99"}})
		n := wait("DHCP on the other", isUp("nic0"))[0]
		if n.Address.String() == "198.51.100.10/24" {
			t.Error("the static address went to the wrong interface")
		}
	})
}

// TestWhenOneInterfaceLeadsNowhereThenDialTakesTheOther: a lease alone does
// not mean that the centre is behind it.
func TestWhenOneInterfaceLeadsNowhereThenDialTakesTheOther(t *testing.T) {
	machineTest(t, func(t *testing.T, w *world) {
		stop := w.dnsmasq()
		w.plug()
		m, wait := w.manage(Config{})
		wait("nic0", isUp("nic0"))
		stop()
		w.inFar("ip", "addr", "flush", "dev", "far0") // nobody answers there any more
		w.cable("nic1", "far1")
		w.inFar("ip", "addr", "add", "198.51.100.1/24", "dev", "far1")
		w.inFar("ip", "link", "set", "far1", "up")
		if _, err := m.Dial(t.Context(), "tcp", "198.51.100.1:53"); err == nil {
			t.Fatal("reached something that only nic1 can reach")
		}
		w.start("X=y", "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
			"--bind-interfaces", "--interface=far1", "--except-interface=lo", "--dhcp-range=198.51.100.50,198.51.100.60,255.255.255.0,2m",
			"--dhcp-leasefile="+filepath.Join(w.dir, "leases1"), "--pid-file=", "--dhcp-authoritative", "--no-ping",
			"--address=/centre.test/198.51.100.1")
		wait("nic1", isUp("nic1"))
		for i := range 2 { // the second time the good one is known
			start := time.Now()
			c, err := m.Dial(t.Context(), "tcp", "centre.test:53")
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			if took := time.Since(start); i == 1 && took > 2*time.Second {
				t.Errorf("took %s although the good interface was known", took)
			}
		}
	})
}
