package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/server"
)

// boot runs firmware on h.
func boot(h *netlab.Host, edit func(*edk2.Client)) (res edk2.Result, err error) {
	c := firmware(h)
	if edit != nil {
		edit(c)
	}
	err = h.Do(func() (err error) {
		res, err = c.Boot()
		return err
	})
	return res, err
}

func http(c *edk2.Client) { c.Arch, c.HTTP = 16, true }

// site adds the site's own DHCP server, a real dnsmasq, at 10.77.0.2.
func site(t *testing.T, lan *netlab.LAN, more ...string) *netlab.Host {
	t.Helper()
	h := lan.Host(t, "10.77.0.2/24")
	log, err := os.Create(t.TempDir() + "/dnsmasq.log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("dnsmasq:\n%s", b)
		}
		log.Close()
	})
	args := append([]string{"--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces", "--no-ping",
		"--dhcp-range=10.77.0.20,10.77.0.90,1h", "--dhcp-leasefile=" + t.TempDir() + "/leases", "--log-dhcp", "--user=root", "--pid-file="}, more...)
	h.Run(t, log, "dnsmasq", args...)
	netlab.Eventually(t, 5*time.Second, "dnsmasq is up", func() bool {
		b, _ := os.ReadFile(log.Name())
		return bytes.Contains(b, []byte("DHCP, IP range"))
	})
	return h
}

func proxy(lan *netlab.LAN, dir string, s pxe.Standing) server.Config {
	return server.Config{Interface: lan.Name, Mode: pxe.ModeProxy, Images: server.Dir(dir), Policy: as(s)}
}

func TestFullModeBootsByHTTP(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 9_000_001)
	_, rec := start(t, full(t, lan, dir))
	res, err := boot(lan.Host(t), http)
	if err != nil {
		t.Fatal(err)
	}
	if res.Kind != "dhcp-http" || res.Rounds != 1 || !bytes.Equal(res.Data, data) || res.File != "http://10.77.0.1:7480/amd64/recovery.efi" {
		t.Errorf("kind %s, rounds %d, %s, %d bytes", res.Kind, res.Rounds, res.File, len(res.Data))
	}
	netlab.Eventually(t, 2*time.Second, "served event", func() bool { return rec.has(pxe.StateServed, "sent by http") })
}

func TestProxyBesideDnsmasq(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 1_000_001)
	site(t, lan)
	_, rec := start(t, proxy(lan, dir, pxe.Recover))
	for _, c := range []struct {
		name   string
		edit   func(*edk2.Client)
		kind   string
		rounds int
	}{
		{"current firmware, one round", nil, "proxy-pxe10", 1},
		{"old firmware, second round by port 4011", func(c *edk2.Client) { c.Old = true; c.Wait[0] = 2100 * time.Millisecond }, "proxy-binl", 2},
		{"HTTP boot", http, "proxy-http", 1},
		{"no UUID", func(c *edk2.Client) { c.NoUUID = true }, "proxy-pxe10", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := lan.Host(t)
			res, err := boot(h, c.edit)
			if err != nil {
				t.Fatal(err)
			}
			if res.Kind != c.kind || res.Rounds != c.rounds || !bytes.Equal(res.Data, data) {
				t.Errorf("kind %s, rounds %d, %d bytes", res.Kind, res.Rounds, len(res.Data))
			}
			if res.Server != netip.MustParseAddr("10.77.0.2") {
				t.Errorf("the address came from %s", res.Server)
			}
			netlab.Eventually(t, 2*time.Second, "the served event names the machine", func() bool {
				for _, e := range rec.all() {
					if e.Step == pxe.StateServed && e.MAC.String() == h.MAC.String() {
						return true
					}
				}
				return false
			})
			if c.kind == "proxy-binl" {
				// The rung that worked is remembered: now it takes one round.
				if res, err := boot(h, c.edit); err != nil || res.Kind != "proxy-binl" || res.Rounds != 1 {
					t.Errorf("second boot: %s, %d rounds, %v", res.Kind, res.Rounds, err)
				}
			}
		})
	}
}

func TestRungThatWorkedSurvivesARestart(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	site(t, lan)
	cfg := proxy(lan, dir, pxe.Recover)
	cfg.StateDir = t.TempDir()
	h := lan.Host(t)
	old := func(c *edk2.Client) { c.Old = true; c.Wait[0] = 2100 * time.Millisecond }
	t.Run("first", func(t *testing.T) {
		start(t, cfg)
		if res, err := boot(h, old); err != nil || res.Rounds != 2 {
			t.Fatalf("%d rounds, %v", res.Rounds, err)
		}
	})
	t.Run("after the restart", func(t *testing.T) {
		start(t, cfg)
		if res, err := boot(h, old); err != nil || res.Rounds != 1 {
			t.Fatalf("%d rounds, %v", res.Rounds, err)
		}
	})
}

func TestDeafFirmwareYieldsAdvice(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	site(t, lan)
	_, rec := start(t, proxy(lan, dir, pxe.Recover))
	_, err := boot(lan.Host(t), func(c *edk2.Client) {
		c.Deaf = true
		c.Wait = []time.Duration{2100 * time.Millisecond, 2100 * time.Millisecond, 300 * time.Millisecond}
	})
	if !errors.Is(err, edk2.ErrNoOffer) {
		t.Fatalf("deaf firmware booted: %v", err)
	}
	if !rec.alarm(`option 66 = 10.77.0.1, option 67 (bootfile-name) = "amd64/recovery.efi"`) {
		t.Error("no alarm with the options to set")
	}
}

// bytesFromUs counts frames with our source address that reach h while f
// runs there.
func bytesFromUs(t *testing.T, h *netlab.Host, f func() error) int {
	t.Helper()
	n := 0
	err := h.Do(func() error {
		proto := uint16(unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, int(proto))
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		ferr := f()
		buf := make([]byte, 2048)
		for {
			k, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				break
			}
			// IPv4, and not the kernel's own IGMP.
			if k >= 34 && buf[12] == 8 && buf[13] == 0 && buf[23] != 2 && bytes.Equal(buf[26:30], []byte{10, 77, 0, 1}) {
				n += k
			}
		}
		return ferr
	})
	if err != nil && !errors.Is(err, edk2.ErrNoOffer) {
		t.Fatal(err)
	}
	return n
}

func TestSilence(t *testing.T) {
	dir, _ := image(t, 1000)
	for _, c := range []struct {
		name   string
		mode   pxe.Mode
		who    pxe.Standing
		window bool
		arch   uint16
		talks  bool
		why    string
	}{
		{name: "full, unknown", mode: pxe.ModeFull, who: pxe.Unknown, arch: 7, talks: true},
		{name: "full, denied", mode: pxe.ModeFull, who: pxe.Denied, arch: 7, why: "denied"},
		{name: "full, healthy", mode: pxe.ModeFull, who: pxe.Healthy, arch: 7, why: "healthy"},
		{name: "full, no image", mode: pxe.ModeFull, who: pxe.Unknown, arch: 11, why: "no recovery image for arm64"},
		{name: "full, unknown platform", mode: pxe.ModeFull, who: pxe.Unknown, arch: 33, why: "no such platform"},
		{name: "proxy, unknown, no window", mode: pxe.ModeProxy, who: pxe.Unknown, arch: 7, why: "no open window"},
		{name: "proxy, unknown, window", mode: pxe.ModeProxy, who: pxe.Unknown, arch: 7, window: true, talks: true},
		{name: "proxy, denied, window", mode: pxe.ModeProxy, who: pxe.Denied, arch: 7, window: true, why: "denied"},
		{name: "proxy, healthy, window", mode: pxe.ModeProxy, who: pxe.Healthy, arch: 7, window: true, why: "healthy"},
		{name: "off", mode: pxe.ModeOff, who: pxe.Recover, arch: 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/24")
			cfg := full(t, lan, dir)
			if c.mode != pxe.ModeFull {
				cfg = proxy(lan, dir, c.who)
				cfg.Mode = c.mode
			}
			cfg.Policy = as(c.who)
			s, rec := start(t, cfg)
			if c.window {
				s.OpenWindow(time.Now().Add(time.Hour), 3)
			}
			h := lan.Host(t)
			n := bytesFromUs(t, h, func() error {
				fw := firmware(h)
				fw.Arch = c.arch
				fw.Wait = fw.Wait[:2]
				_, err := fw.Boot()
				return err
			})
			if (n > 0) != c.talks {
				t.Errorf("%d bytes were sent", n)
			}
			if c.why != "" && !rec.has(pxe.StateRefused, c.why) {
				t.Errorf("no event says %q", c.why)
			}
		})
	}
}

func TestWindowLetsInAsManyAsItSays(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	site(t, lan)
	s, _ := start(t, proxy(lan, dir, pxe.Unknown))
	s.OpenWindow(time.Now().Add(time.Hour), 2)
	a, b, c := lan.Host(t), lan.Host(t), lan.Host(t)
	for i, h := range []*netlab.Host{a, b, a, b} {
		if _, err := boot(h, nil); err != nil {
			t.Fatalf("boot %d: %v", i, err)
		}
	}
	if _, err := boot(c, nil); !errors.Is(err, edk2.ErrNoOffer) {
		t.Errorf("a third machine came in: %v", err)
	}
	if w := s.Window(); w.Left != 0 {
		t.Errorf("%d places left", w.Left)
	}
	s.CloseWindow()
	if _, err := boot(a, nil); !errors.Is(err, edk2.ErrNoOffer) {
		t.Errorf("a closed window lets in: %v", err)
	}
}

func TestFiftyMachinesAtOnce(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 400_001)
	start(t, full(t, lan, dir))
	const n = 50
	hosts := make([]*netlab.Host, n)
	for i := range hosts {
		hosts[i] = lan.Host(t)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	addrs := map[netip.Addr]bool{}
	for i, h := range hosts {
		wg.Go(func() {
			res, err := boot(h, func(c *edk2.Client) {
				c.Wait = []time.Duration{3 * time.Second, time.Second}
				if i%5 == 0 {
					http(c)
				}
			})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				t.Errorf("machine %d: %v", i, err)
			case res.Rounds != 1:
				t.Errorf("machine %d needed %d DISCOVERs", i, res.Rounds)
			case !bytes.Equal(res.Data, data):
				t.Errorf("machine %d got %d bytes", i, len(res.Data))
			}
			addrs[res.Addr] = true
		})
	}
	wg.Wait()
	if len(addrs) != n {
		t.Errorf("%d machines got %d addresses", n, len(addrs))
	}
}

func TestForeignServerStopsLeasing(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	cfg := full(t, lan, dir)
	cfg.WatchEvery, cfg.WatchWait = 300*time.Millisecond, 200*time.Millisecond
	s, rec := start(t, cfg)
	netlab.Eventually(t, 5*time.Second, "leasing begins once the network was searched", func() bool { return s.Stopped() == "" })
	if _, err := boot(lan.Host(t), nil); err != nil {
		t.Fatal(err)
	}
	var foreign *netlab.Host
	t.Run("while it is there", func(t *testing.T) {
		foreign = site(t, lan)
		netlab.Eventually(t, 5*time.Second, "leasing stops", func() bool { return s.Stopped() != "" })
		if !rec.alarm("10.77.0.2 (" + foreign.MAC.String() + ")") {
			t.Error("no alarm names the server's address and MAC")
		}
		h := lan.Host(t)
		if n := bytesFromUs(t, h, func() error { _, err := boot2(h); return err }); n != 0 {
			t.Errorf("%d bytes sent while another server leases", n)
		}
		alarms := 0
		for _, e := range rec.all() {
			if e.Alarm {
				alarms++
			}
		}
		if alarms != 1 {
			t.Errorf("%d alarms for one thing", alarms)
		}
	})
	netlab.Eventually(t, 10*time.Second, "leasing begins again", func() bool { return s.Stopped() == "" })
	if _, err := boot(lan.Host(t), nil); err != nil {
		t.Error(err)
	}
}

// boot2 is boot for use on the host's own thread, without a lease wanted.
func boot2(h *netlab.Host) (edk2.Result, error) {
	c := firmware(h)
	c.HTTP, c.Arch = false, 7
	c.Deaf = true
	c.Wait = c.Wait[:1]
	return c.Boot()
}

func TestOwnSecondAddressIsNoAlarm(t *testing.T) {
	// Two of ours, on two interfaces of one host, in one broadcast domain.
	lan := netlab.NewLAN(t, "10.77.0.1/24", "10.77.0.9/24")
	dir, _ := image(t, 1000)
	cfg := full(t, lan, dir)
	cfg.WatchEvery, cfg.WatchWait = 100*time.Millisecond, 100*time.Millisecond
	s, rec := start(t, cfg)
	netlab.Eventually(t, 5*time.Second, "leasing begins", func() bool { return s.Stopped() == "" })
	if rec.alarm("") {
		t.Error("alarm without a foreign server")
	}
}

func TestLeasesSurviveARestart(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	cfg := full(t, lan, dir)
	cfg.StateDir = t.TempDir()
	a, b := lan.Host(t), lan.Host(t)
	var first edk2.Result
	t.Run("before", func(t *testing.T) {
		start(t, cfg)
		var err error
		if first, err = boot(a, nil); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("after", func(t *testing.T) {
		start(t, cfg)
		second, err := boot(b, nil)
		if err != nil || second.Addr == first.Addr {
			t.Errorf("another machine got %s after the restart: %v", second.Addr, err)
		}
		again, err := boot(a, nil)
		if err != nil || again.Addr != first.Addr {
			t.Errorf("the same machine got %s, had %s: %v", again.Addr, first.Addr, err)
		}
	})
}

func TestSecondServerSaysWhoHoldsThePort(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	start(t, full(t, lan, dir))
	cfg := full(t, lan, dir)
	cfg.StateDir, cfg.HTTPAddr, cfg.WatchEvery = t.TempDir(), "-", -1
	_, err := server.New(cfg)
	if err == nil || !strings.Contains(err.Error(), "port 67") || !strings.Contains(err.Error(), "this program itself") {
		t.Errorf("starting twice: %v", err)
	}
}

func TestStartsBesideNothingThatWasLeftOpen(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	for i := range 3 {
		t.Run(fmt.Sprint(i), func(t *testing.T) { start(t, full(t, lan, dir)) })
	}
}

func TestConfigTellsAllThatIsWrong(t *testing.T) {
	_, err := server.New(server.Config{Mode: pxe.ModeFull})
	if err == nil {
		t.Fatal("an empty config is taken")
	}
	for _, want := range []string{"Interface", "Images", "Policy", "Range", "StateDir"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing is said of %s: %v", want, err)
		}
	}
	if _, err := server.ParseRange("10.77.0.1/24"); err == nil {
		t.Error("a CIDR reads as a range")
	}
	if r, err := server.ParseRange("10.77.0.5 - 10.77.0.9"); err != nil || r.String() != "10.77.0.5-10.77.0.9" {
		t.Errorf("%s, %v", r, err)
	}
}

func TestAdvice(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	cfg := proxy(lan, dir, pxe.Unknown)
	cfg.Mode = pxe.ModeOff
	_, rec := start(t, cfg)
	netlab.Eventually(t, time.Second, "advice is given", func() bool { return len(rec.all()) == 2 })
	if !rec.has(pxe.StateSeen, `"amd64/recovery.efi"`) || !rec.has(pxe.StateSeen, `"http://10.77.0.1:7480/amd64/recovery.efi"`) {
		t.Error("advice lacks the file or the URL")
	}
}
