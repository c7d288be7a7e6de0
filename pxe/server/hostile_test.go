package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/server"
)

// Bad lines, each between one machine and the boot host. The waits of the
// firmware model are EDK2's (4, 8, 16, 32 s), scaled down where a line is dark.
func TestBadLines(t *testing.T) {
	if testing.Short() {
		t.Skip("minutes of bad lines")
	}
	const mb = 1 << 20
	for i, c := range []struct {
		name string
		wire *netlab.Wire
		size int
		edit func(*edk2.Client)
		// boots is how many boot attempts there may be, cost the most bytes
		// on the wire for each byte of the image.
		boots int
		cost  float64
	}{
		{"1 % loss, 40 MB by TFTP", &netlab.Wire{Loss: 0.01, Seed: 1}, 40 * mb, nil, 1, 1.6},
		{"1 % loss, 40 MB by TFTP in blocks of 1024, no window", &netlab.Wire{Loss: 0.01, Seed: 2}, 40 * mb, func(c *edk2.Client) { c.BlockSize, c.Window = 1024, 1 }, 1, 1.3},
		{"1 % loss, 40 MB by HTTP", &netlab.Wire{Loss: 0.01, Seed: 3}, 40 * mb, http, 1, 1.3},
		{"MTU 1280, TFTP", &netlab.Wire{MTU: 1280, MaxFrame: 1294}, mb, nil, 2, 1.3},
		{"MTU 1280, HTTP", &netlab.Wire{MTU: 1280, MaxFrame: 1294}, mb, http, 1, 1.3},
		{"64 kbit/s, TFTP", &netlab.Wire{Rate: 64_000}, 150_000, nil, 1, 1.6},
		{"64 kbit/s, TFTP without a window", &netlab.Wire{Rate: 64_000}, 150_000, func(c *edk2.Client) { c.Window = 1 }, 1, 1.6},
		{"64 kbit/s, HTTP", &netlab.Wire{Rate: 64_000}, 150_000, http, 1, 1.6},
		{"600 ms there and back, TFTP", &netlab.Wire{Delay: 300 * time.Millisecond}, 150_000, func(c *edk2.Client) { c.Wait = []time.Duration{2 * time.Second} }, 1, 1.6},
		{"port dark for 5 s at link up, waits a tenth of EDK2's", &netlab.Wire{Dark: 5 * time.Second}, 100_000,
			func(c *edk2.Client) {
				c.Wait = []time.Duration{400 * time.Millisecond, 800 * time.Millisecond, 1600 * time.Millisecond, 3200 * time.Millisecond}
			}, 3, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			// Side by side in one namespace: a network for each.
			ours := netip.AddrFrom4([4]byte{10, 78, byte(i), 1})
			lan := netlab.NewLAN(t, ours.String()+"/24")
			dir, data := image(t, c.size)
			cfg := full(t, lan, dir)
			cfg.Range = server.Range{From: netip.AddrFrom4([4]byte{10, 78, byte(i), 100}), To: netip.AddrFrom4([4]byte{10, 78, byte(i), 199})}
			_, rec := start(t, cfg)
			h := lan.HostOn(t, c.wire)
			begun := time.Now()
			var res edk2.Result
			var err error
			for range c.boots {
				if res, err = boot(h, c.edit); err == nil {
					break
				}
				t.Logf("this boot option failed: %v", err)
			}
			if err != nil || !bytes.Equal(res.Data, data) {
				t.Fatalf("%d bytes of %d, %v", len(res.Data), len(data), err)
			}
			cost := float64(c.wire.Bytes.Load()) / float64(c.size)
			if cost > c.cost {
				t.Errorf("%.2f bytes on the wire for each byte of the image, want at most %.2f", cost, c.cost)
			}
			netlab.Eventually(t, 25*time.Second, "the machine is reported as served", func() bool { return rec.has(pxe.StateServed, "sent by") })
			t.Logf("%.1f s, %d frames lost, %.2f bytes on the wire per byte", time.Since(begun).Seconds(), c.wire.Lost.Load(), cost)
		})
	}
}

// A line that is dark for good boots nothing: the model does wait, and fails.
func TestDarkLineBootsNothing(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	start(t, full(t, lan, dir))
	h := lan.HostOn(t, &netlab.Wire{Dark: time.Hour})
	if _, err := boot(h, nil); !errors.Is(err, edk2.ErrNoOffer) {
		t.Errorf("booted over a dark line: %v", err)
	}
}

// AMI's size probe as part of a whole boot: one machine, one boot, no error
// told.
func TestAMIFirmwareBoots(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 500_000)
	_, rec := start(t, full(t, lan, dir))
	res, err := boot(lan.Host(t), func(c *edk2.Client) { c.AMI, c.Window = true, 1 })
	if err != nil || !bytes.Equal(res.Data, data) || res.Rounds != 1 {
		t.Fatalf("%d bytes, %d rounds, %v", len(res.Data), res.Rounds, err)
	}
	netlab.Eventually(t, 2*time.Second, "served event", func() bool { return rec.has(pxe.StateServed, "sent by tftp") })
	for _, e := range rec.all() {
		if strings.Contains(e.Text, "broke off") {
			t.Errorf("the probe is told as a failure: %s", e)
		}
	}
}

// A rogue boot server beside our proxy: we go on and raise one alarm that names it.
func TestRogueBootServerIsNamed(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 100_000)
	site(t, lan)
	rogue := lan.Host(t, "10.77.0.66/24")
	log, err := os.Create(filepath.Join(t.TempDir(), "rogue.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cfg := proxy(lan, dir, pxe.Recover)
	cfg.WatchEvery, cfg.WatchWait = 300*time.Millisecond, 200*time.Millisecond
	_, rec := start(t, cfg)
	if _, err := boot(lan.Host(t), nil); err != nil {
		t.Fatalf("before the rogue is there: %v", err)
	}
	if rec.alarm("") {
		t.Error("an alarm before there is a rogue")
	}
	rogue.Run(t, log, "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces", "--user=root", "--pid-file=",
		"--dhcp-range=10.77.0.0,proxy", "--pxe-service=x86-64_EFI,evil,evil.efi", "--pxe-prompt=evil,0", "--dhcp-boot=evil.efi", "--log-dhcp")
	netlab.Eventually(t, 10*time.Second, "the alarm names the rogue", func() bool {
		return rec.alarm("another network boot server answers") && rec.alarm("10.77.0.66 ("+rogue.MAC.String()+")")
	})
	n := 0
	for _, e := range rec.all() {
		if e.Alarm && strings.Contains(e.Text, "another network boot") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d alarms for one rogue", n)
	}
	// The race between two offers is the firmware's to decide; what it loads
	// from elsewhere is no image of ours and proves nothing. We do not fall silent.
	h := lan.Host(t)
	if n := bytesFromUs(t, h, func() error { _, err := boot2(h); return err }); n == 0 {
		t.Error("a rogue silences us")
	}
	_ = data
}

// A full disk: no address is given that is not recorded, files are still
// served, it is said once, and it passes when there is room again.
func TestFullDisk(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 100_000)
	cfg := full(t, lan, dir)
	cfg.StateDir = t.TempDir()
	if err := unix.Mount("tmpfs", cfg.StateDir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no file system of our own to be had: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(cfg.StateDir, unix.MNT_DETACH) })
	s, rec := start(t, cfg)
	if _, err := boot(lan.Host(t), nil); err != nil {
		t.Fatalf("before the disk is full: %v", err)
	}
	filler := filepath.Join(cfg.StateDir, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err = f.Write(make([]byte, 512)); err != nil {
			break
		}
	}
	f.Close()
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	// What is left of the journal's last page takes records still: lease on
	// until it is full. Ten machines, since each may ask five times a second.
	var crowd []*netlab.Host
	for range 10 {
		crowd = append(crowd, lan.Host(t))
	}
	turn := 0
	netlab.Eventually(t, 2*time.Minute, "leases end with the disk", func() bool {
		h := crowd[turn%len(crowd)]
		turn++
		fw := firmware(h)
		fw.Wait, fw.Impatient = []time.Duration{100 * time.Millisecond}, true
		err := h.Do(func() error { _, err := fw.Lease(); return err })
		return err != nil && !errors.Is(err, edk2.ErrNoOffer)
	})
	had := len(s.Leases())
	netlab.Eventually(t, 10*time.Second, "the alarm says why", func() bool { return rec.alarm("cannot be recorded on this host's disk: no space left on device") })
	reader := lan.Host(t, "10.77.0.50/24")
	if err := reader.Do(func() error {
		b, err := (&edk2.Client{Iface: reader.Iface}).TFTPRead(s.Address(), "amd64/recovery.efi")
		if err == nil && !bytes.Equal(b, data) {
			err = errors.New("wrong content")
		}
		return err
	}); err != nil {
		t.Errorf("files: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	netlab.Eventually(t, 10*time.Second, "leasing goes on", func() bool {
		for _, e := range rec.all() {
			if strings.Contains(e.Text, "takes writes again") {
				return true
			}
		}
		return false
	})
	res, err := boot(lan.Host(t), nil)
	if err != nil || !bytes.Equal(res.Data, data) {
		t.Errorf("after there is room again: %v", err)
	}
	if n := len(s.Leases()); n < had {
		t.Errorf("%d leases before, %d after", had, n)
	}
	alarms := 0
	for _, e := range rec.all() {
		if e.Alarm && strings.Contains(e.Text, "cannot be recorded") {
			alarms++
		}
	}
	if alarms != 1 {
		t.Errorf("%d alarms for one full disk", alarms)
	}
}

// bootHost is a boot host as a process of its own in the test's namespace, so
// that it can be killed. It is this test binary: see TestBootHostProcess.
type bootHost struct{ cmd *exec.Cmd }

func newBootHost(t *testing.T, lan *netlab.LAN, dir, state string) *bootHost {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestBootHostProcess$", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), "MUSTER_TEST_BOOTHOST="+strings.Join([]string{lan.Name, dir, state}, "|"))
	out, err := os.Create(filepath.Join(t.TempDir(), "boothost.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := &bootHost{cmd}
	t.Cleanup(b.kill)
	netlab.Eventually(t, 20*time.Second, "the boot host is up", func() bool {
		log, _ := os.ReadFile(out.Name())
		return bytes.Contains(log, []byte("network boot is up"))
	})
	return b
}

func (b *bootHost) kill() {
	_ = b.cmd.Process.Signal(syscall.SIGKILL)
	_ = b.cmd.Wait()
}

// TestBootHostProcess is the body of bootHost.
func TestBootHostProcess(t *testing.T) {
	args := strings.Split(os.Getenv("MUSTER_TEST_BOOTHOST"), "|")
	if len(args) != 3 {
		t.Skip("is started by TestKilledBootHost")
	}
	cfg := server.Config{Interface: args[0], Mode: pxe.ModeFull, Range: server.Range{From: netip.MustParseAddr("10.77.0.100"), To: netip.MustParseAddr("10.77.0.199")},
		Images: server.Dir(args[1]), Policy: as(pxe.Unknown), StateDir: args[2], WatchEvery: -1, ProbeWait: -1, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	s, err := server.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Fatal(s.Run(context.Background()))
}

// kill -9 of the boot host while machines boot, again and again: every machine
// boots in the end, and no address is leased to two, although nothing probes
// for addresses in use.
func TestKilledBootHost(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 2_000_000)
	state := t.TempDir()
	const n = 12
	hosts := make([]*netlab.Host, n)
	for i := range hosts {
		hosts[i] = lan.Host(t)
	}
	b := newBootHost(t, lan, dir, state)
	var mu sync.Mutex
	holder := map[netip.Addr]int{}
	var wg sync.WaitGroup
	booted := make(chan int, n)
	for i, h := range hosts {
		wg.Go(func() {
			for try := range 20 {
				res, err := boot(h, func(c *edk2.Client) {
					c.Wait, c.Impatient = []time.Duration{300 * time.Millisecond, 600 * time.Millisecond}, true
					if i%3 == 0 {
						http(c)
					}
				})
				if res.Addr.IsValid() {
					mu.Lock()
					if other, taken := holder[res.Addr]; taken && other != i {
						t.Errorf("%s was leased to machines %d and %d", res.Addr, other, i)
					}
					holder[res.Addr] = i
					mu.Unlock()
				}
				if err == nil && bytes.Equal(res.Data, data) {
					booted <- try
					return
				}
			}
			t.Errorf("machine %d did not boot", i)
			booted <- -1
		})
	}
	kills := 0
	for range n {
		<-booted
		if kills < 6 {
			b.kill()
			kills++
			b = newBootHost(t, lan, dir, state)
		}
	}
	wg.Wait()
	t.Logf("%d kills, %d addresses for %d machines", kills, len(holder), n)
}

// What a captive portal, or any other box, answers in our place boots nothing:
// firmware takes no redirect and no page. Ours is taken.
func TestHTTPFirmwareBehindAPortal(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	for _, c := range []struct{ name, answer string }{
		{"redirect", "HTTP/1.1 302 Found\r\nLocation: http://10.77.0.1/login\r\nContent-Length: 0\r\n\r\n"},
		{"page", "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello"},
		{"needs sign-in", "HTTP/1.1 511 Network Authentication Required\r\nContent-Length: 0\r\n\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp4", "10.77.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					buf := make([]byte, 4096)
					_, _ = conn.Read(buf)
					_, _ = conn.Write([]byte(c.answer))
					conn.Close()
				}
			}()
			h := lan.Host(t, "10.77.0.30/24")
			err = h.Do(func() error {
				b, err := (&edk2.Client{HTTP: true}).Fetch(fmt.Sprintf("http://%s/amd64/recovery.efi", l.Addr()))
				if err == nil && bytes.HasPrefix(b, []byte("MZ")) {
					// EDK2 goes by the name where the type says nothing, and
					// then finds no program in a page.
					err = fmt.Errorf("%d bytes are taken for a program", len(b))
				} else {
					t.Log(err)
					err = nil
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
