package dhcp

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/netlab"
)

func live(t testing.TB, lan *netlab.LAN, mode pxe.Mode) Config {
	cfg := Config{Mode: mode, Interface: lan.Name, Decider: newWorld(mode), WatchEvery: -1, ProbeWait: 100 * time.Millisecond,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	if mode == pxe.ModeFull {
		cfg.Pools = []Pool{lanPool("10.77.0.100", "10.77.0.109")}
		cfg.Leases = t.TempDir() + "/leases"
	}
	return cfg
}

func TestARPProbe(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	user := lan.Host(t, "10.77.0.100/24")
	ifi, err := net.InterfaceByName(lan.Name)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newARPProber(ifi, 400*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.run(ctx) }()
	mac, used := p.inUse(ctx, ip("10.77.0.100"))
	if !used || mac.String() != user.MAC.String() {
		t.Errorf("10.77.0.100 is used by %s: got %v, %s", user.MAC, used, mac)
	}
	if mac, used := p.inUse(ctx, ip("10.77.0.101")); used {
		t.Errorf("10.77.0.101 is free, but %s is said to use it", mac)
	}
	if len(p.waiting) != 0 {
		t.Error("somebody still waits")
	}
	cancel()
	p.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestPortTakenByDnsmasqIsNamed(t *testing.T) {
	for _, mode := range []pxe.Mode{pxe.ModeFull, pxe.ModeProxy} {
		t.Run(mode.String(), func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/24")
			// A LAN's boot host is this process; dnsmasq shares its namespace.
			null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			netlab.Start(t, null, "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface="+lan.Name, "--bind-interfaces",
				"--dhcp-range=10.77.0.20,10.77.0.30,1h", "--dhcp-leasefile="+t.TempDir()+"/l", "--user=root", "--pid-file=")
			netlab.Eventually(t, 5*time.Second, "dnsmasq has the port", func() bool { return len(udpInodes(67)) > 0 })
			s, err := New(live(t, lan, mode))
			if err == nil {
				s.Close()
				t.Fatal("a second DHCP server starts beside dnsmasq without a word")
			}
			if !strings.Contains(err.Error(), "dnsmasq, process") || !strings.Contains(err.Error(), "port 67") {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestWrongPlacesAreNamed(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	bare := netlab.NewLAN(t)
	for _, c := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"no such interface", func(c *Config) { c.Interface = "nosuch0" }, "find interface nosuch0"},
		{"no address", func(c *Config) { c.Interface = bare.Name }, "has no IPv4 address"},
		{"another address", func(c *Config) { c.Server = ip("10.77.0.9") }, "does not have the address 10.77.0.9"},
		{"range elsewhere", func(c *Config) {
			c.Pools[0] = Pool{Subnet: netip.MustParsePrefix("10.9.0.0/24"), From: ip("10.9.0.1"), To: ip("10.9.0.2")}
		}, "first range is in 10.9.0.0/24"},
		{"range out of its subnet", func(c *Config) { c.Pools[0].To = ip("10.78.0.1") }, "outside 10.77.0.0/24"},
		{"range backwards", func(c *Config) { c.Pools[0].From, c.Pools[0].To = c.Pools[0].To, c.Pools[0].From }, "is empty"},
		{"pools overlap", func(c *Config) { c.Pools = append(c.Pools, c.Pools[0]) }, "overlap"},
		{"no range", func(c *Config) { c.Pools = nil }, "needs a range"},
		{"no journal", func(c *Config) { c.Leases = "" }, "needs a path"},
		{"journal in no folder", func(c *Config) { c.Leases = "/nosuch/leases" }, "open lease journal"},
		{"mode off", func(c *Config) { c.Mode = pxe.ModeOff }, "mode off cannot be served"},
		{"short leases", func(c *Config) { c.LeaseTime = time.Second }, "lease times"},
		{"no decider", func(c *Config) { c.Decider = nil }, "Decider is missing"},
		{"all is well", func(*Config) {}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := live(t, lan, pxe.ModeFull)
			c.edit(&cfg)
			s, err := New(cfg)
			if err == nil {
				s.Close()
			}
			if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// A host with two networks: the answer leaves by the one the question came
// from, and only there.
func TestReplyLeavesTheReceivingInterface(t *testing.T) {
	served, other := netlab.NewLAN(t, "10.77.0.1/24"), netlab.NewLAN(t, "10.88.0.1/24")
	s, err := New(live(t, served, pxe.ModeFull))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct {
		lan  *netlab.LAN
		want bool
	}{{served, true}, {other, false}} {
		h := c.lan.Host(t)
		got := false
		err := h.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			tv := unix.Timeval{Usec: 600_000}
			for _, err := range []error{
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, h.Iface),
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
				unix.Bind(fd, &unix.SockaddrInet4{Port: 68}),
				unix.Sendto(fd, discover(pxe.MAC(h.MAC), dhcpv4.TransactionID{9}, pxe.VendorPXE), 0, &unix.SockaddrInet4{Port: 67, Addr: [4]byte{255, 255, 255, 255}}),
			} {
				if err != nil {
					return err
				}
			}
			buf := make([]byte, 1500)
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return nil // the timeout
			}
			p, err := dhcpv4.FromBytes(buf[:n])
			if err != nil {
				return err
			}
			got = p.MessageType() == dhcpv4.MessageTypeOffer
			if a := from.(*unix.SockaddrInet4).Addr; a != [4]byte{10, 77, 0, 1} {
				t.Errorf("the offer comes from %v", a)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got != c.want {
			t.Errorf("on %s an offer came: %v, want %v", c.lan.Name, got, c.want)
		}
	}
}

func TestJudge(t *testing.T) {
	dhcpOnly, boots, both := foreign{ip: ip("10.77.0.2"), leases: true}, foreign{ip: ip("10.77.0.3"), boots: true}, foreign{ip: ip("10.77.0.4"), leases: true, boots: true}
	type round struct {
		found   []foreign
		stopped bool
		alarms  int // in all, so far
	}
	for _, c := range []struct {
		name   string
		mode   pxe.Mode
		rounds []round
	}{
		{"full, alone", pxe.ModeFull, []round{{nil, false, 0}, {nil, false, 0}}},
		{"full, another leases from the start", pxe.ModeFull, []round{{[]foreign{dhcpOnly}, true, 1}, {[]foreign{dhcpOnly}, true, 1}, {nil, true, 1}, {nil, false, 1}}},
		{"full, another comes and goes and comes", pxe.ModeFull, []round{{nil, false, 0}, {[]foreign{dhcpOnly}, true, 1}, {nil, true, 1}, {[]foreign{dhcpOnly}, true, 1}, {nil, true, 1}, {nil, false, 1}, {[]foreign{dhcpOnly}, true, 2}}},
		{"full, a proxy is no reason to stop", pxe.ModeFull, []round{{[]foreign{boots}, false, 1}, {[]foreign{boots}, false, 1}}},
		{"full, a second one joins", pxe.ModeFull, []round{{[]foreign{dhcpOnly}, true, 1}, {[]foreign{dhcpOnly, both}, true, 2}}},
		{"proxy, the site's server", pxe.ModeProxy, []round{{[]foreign{dhcpOnly}, false, 0}}},
		{"proxy, another boot server", pxe.ModeProxy, []round{{[]foreign{dhcpOnly, boots}, false, 1}, {[]foreign{dhcpOnly, boots}, false, 1}, {[]foreign{dhcpOnly}, false, 1}}},
		{"proxy, the site's server boots too", pxe.ModeProxy, []round{{[]foreign{both}, false, 1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(c.mode)
			var pools []Pool
			if c.mode == pxe.ModeFull {
				pools = []Pool{lanPool("10.77.0.100", "10.77.0.109")}
			}
			s := bare(t, w, "", pools...)
			if c.mode == pxe.ModeFull {
				s.setStopped("looking")
			}
			alarmed, clean := "", cleanRounds-1
			for i, r := range c.rounds {
				alarmed, clean = s.judge(r.found, alarmed, clean)
				if (s.Stopped() != "") != r.stopped {
					t.Errorf("round %d: stopped %q, want %v", i, s.Stopped(), r.stopped)
				}
				if n := len(w.alarms()); n != r.alarms {
					t.Errorf("round %d: %d alarms, want %d", i, n, r.alarms)
				}
			}
		})
	}
}

func TestOurOwnSearchReadsBack(t *testing.T) {
	mac, xid := pxe.MAC{2, 1, 2, 3, 4, 5}, dhcpv4.TransactionID{1, 2, 3, 4}
	d := discover(mac, xid, pxe.VendorPXE)
	_, req, err := Parse(d, 67)
	if err != nil || req.MAC != mac || req.Class() != pxe.ClassPXE {
		t.Fatalf("%+v, %v", req, err)
	}
	// An offer to it, as a server would frame it.
	w := newWorld(pxe.ModeFull)
	s := bare(t, w, "", lanPool("10.77.0.100", "10.77.0.109"))
	out := s.handle(t.Context(), d, netip.AddrPort{}, 67)
	f := frame(pxe.MAC{2, 9}, out.data)
	copy(f[34:], []byte{0, 67, 0, 68})
	got, ok := parseOffer(f, mac, xid)
	if !ok || got.ip != self || !got.leases || !got.boots {
		t.Errorf("%+v, %v", got, ok)
	}
	if _, ok := parseOffer(f, mac, dhcpv4.TransactionID{9}); ok {
		t.Error("an offer to somebody else counts")
	}
	if _, ok := parseOffer(frame(mac, d), mac, xid); ok {
		t.Error("our own DISCOVER counts as an offer")
	}
	if checksum(f[14:34]) != 0 {
		t.Error("the IP header's checksum is wrong")
	}
}

func FuzzFrames(f *testing.F) {
	mac, xid := pxe.MAC{2, 1, 2, 3, 4, 5}, dhcpv4.TransactionID{1, 2, 3, 4}
	b := frame(mac, discover(mac, xid, pxe.VendorPXE))
	b[42] = 2
	copy(b[34:], []byte{0, 67, 0, 68})
	f.Add(b)
	f.Add(b[:50])
	f.Add(arpRequest(mac, self))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		if o, ok := parseOffer(b, mac, xid); ok && !o.ip.Is4() {
			t.Fatal("an offer from nowhere")
		}
		if _, a, ok := parseARP(b); ok && (!a.Is4() || a.IsUnspecified()) {
			t.Fatal("ARP from nowhere")
		}
		if !bytes.Equal(before, b) {
			t.Fatal("the frame was changed")
		}
	})
}
