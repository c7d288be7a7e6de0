package netlab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Wire is a bad cable: it stands between a host and its switch port, and every
// frame passes through this process.
type Wire struct {
	// Loss is the share of frames lost in each direction, 0 to 1. Losses are
	// drawn from Seed, so that a test always loses the same ones.
	Loss float64
	Seed uint64
	// Delay is how long a frame is under way in each direction.
	Delay time.Duration
	// Rate is bits per second in each direction, 0 for no limit. A queue of
	// Queue bytes (64 KiB by default) stands before it; what does not fit is lost.
	Rate  int
	Queue int
	// MaxFrame drops larger frames without a word, as a tunnel does that is
	// narrower than it says; 0 for no limit.
	MaxFrame int
	// Dark is how long nothing passes after the link is up, as on a switch
	// port that listens and learns (STP).
	Dark time.Duration
	// MTU of the host's interface, 0 for 1500.
	MTU int

	// Lost, Passed and Bytes count what happened on it.
	Lost, Passed, Bytes atomic.Int64
}

// HostOn plugs a machine in by a bad cable.
func (l *LAN) HostOn(t testing.TB, w *Wire, cidr ...string) *Host {
	t.Helper()
	h, ns := newHost(t)
	defer unix.Close(ns)
	n := serial.Add(1)
	a, inside := tap(t, fmt.Sprintf("w%d", n))
	b, port := tap(t, fmt.Sprintf("p%d", n))
	must(t, netlink.LinkSetMaster(port, l.bridge))
	must(t, netlink.LinkSetUp(port))
	must(t, netlink.LinkSetHardwareAddr(inside, h.MAC))
	if w.MTU != 0 {
		must(t, netlink.LinkSetMTU(inside, w.MTU))
	}
	must(t, netlink.LinkSetNsFd(inside, ns))
	must(t, h.Do(func() error {
		in, err := netlink.LinkByName(fmt.Sprintf("w%d", n))
		if err != nil {
			return err
		}
		return netlink.LinkSetName(in, h.Iface)
	}))
	must(t, h.up(cidr))
	var done sync.WaitGroup
	begun := time.Now()
	done.Go(func() { w.carry(a, b, begun, w.Seed) })
	done.Go(func() { w.carry(b, a, begun, w.Seed+1) })
	t.Cleanup(func() {
		a.Close()
		b.Close()
		done.Wait()
	})
	h.settle(t, l.Name)
	return h
}

// carry takes frames from one end to the other.
func (w *Wire) carry(from, to *os.File, begun time.Time, seed uint64) {
	type frame struct {
		b   []byte
		due time.Time
	}
	queue := make(chan frame, 4096)
	var out sync.WaitGroup
	var waiting atomic.Int64
	out.Go(func() {
		for f := range queue {
			if d := time.Until(f.due); d > 0 {
				time.Sleep(d)
			}
			waiting.Add(-int64(len(f.b)))
			// An end that is gone ends the reader too.
			_, _ = to.Write(f.b)
		}
	})
	defer out.Wait()
	defer close(queue)
	limit := int64(w.Queue)
	if limit == 0 {
		limit = 64 << 10
	}
	rnd := rand.New(rand.NewPCG(seed, 1))
	free := begun // when the line is free again
	buf := make([]byte, 65536)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		now := time.Now()
		if w.Dark > 0 && now.Sub(begun) < w.Dark || w.MaxFrame > 0 && n > w.MaxFrame || w.Loss > 0 && rnd.Float64() < w.Loss ||
			w.Rate > 0 && waiting.Load()+int64(n) > limit {
			w.Lost.Add(1)
			continue
		}
		due := now
		if w.Rate > 0 {
			if free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(int64(n) * 8 * int64(time.Second) / int64(w.Rate)))
			due = free
		}
		w.Passed.Add(1)
		w.Bytes.Add(int64(n))
		if w.Rate == 0 && w.Delay == 0 {
			_, _ = to.Write(buf[:n])
			continue
		}
		waiting.Add(int64(n))
		queue <- frame{append([]byte(nil), buf[:n]...), due.Add(w.Delay)}
	}
}

// tap makes a tap device and returns the end that this process holds.
func tap(t testing.TB, name string) (*os.File, netlink.Link) {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("no tap device to be had: %v", err)
	}
	req, err := unix.NewIfreq(name)
	must(t, err)
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		unix.Close(fd)
		t.Skipf("no tap device to be had: %v", err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	link, err := netlink.LinkByName(name)
	must(t, err)
	return f, link
}

// newHost starts the thread of a machine with nothing plugged in, and returns
// it with its namespace.
func newHost(t testing.TB) (*Host, int) {
	t.Helper()
	n := serial.Add(1)
	h := &Host{Iface: "eth0", work: make(chan func()), MAC: net.HardwareAddr{0x52, 0x54, 0, byte(n >> 16), byte(n >> 8), byte(n)}}
	ns := make(chan any, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its
		// namespace with it.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ns <- err
			return
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			ns <- err
			return
		}
		ns <- fd
		for f := range h.work {
			f()
		}
	}()
	switch v := (<-ns).(type) {
	case error:
		t.Fatal(v)
	case int:
		t.Cleanup(func() { close(h.work) })
		return h, v
	}
	panic("unreachable")
}

// up gives the host's interface its addresses.
func (h *Host) up(cidr []string) error {
	return h.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		eth, err := netlink.LinkByName(h.Iface)
		if err != nil {
			return err
		}
		for _, c := range cidr {
			a, err := netlink.ParseAddr(c)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(eth, a); err != nil {
				return err
			}
		}
		return errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetUp(eth))
	})
}

// settle waits until the links are up. The kernel may take a second to tell
// the bridge of its first carrier, and drops frames until then.
func (h *Host) settle(t testing.TB, names ...string) {
	t.Helper()
	up := func(name string) bool {
		l, err := netlink.LinkByName(name)
		return err == nil && (l.Attrs().OperState == netlink.OperUp || l.Type() == "tuntap" || l.Type() == "tun")
	}
	for _, name := range names {
		Eventually(t, 5*time.Second, "link is up", func() bool { return up(name) })
	}
	Eventually(t, 5*time.Second, "link is up", func() (ok bool) {
		must(t, h.Do(func() error { ok = up(h.Iface); return nil }))
		return ok
	})
}

// VLAN makes an 802.1Q interface on link in the boot host's namespace and
// returns its name.
func (l *LAN) VLAN(t testing.TB, id int, cidr ...string) string {
	t.Helper()
	v, err := addVLAN(l.Name, id, cidr)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(func() {
		if link, err := netlink.LinkByName(v); err == nil {
			_ = netlink.LinkDel(link)
		}
	})
	return v
}

// VLAN makes an 802.1Q interface on the host's own and returns its name.
func (h *Host) VLAN(t testing.TB, id int, cidr ...string) (name string) {
	t.Helper()
	must(t, h.Do(func() (err error) {
		name, err = addVLAN(h.Iface, id, cidr)
		return err
	}))
	return name
}

func addVLAN(parent string, id int, cidr []string) (string, error) {
	p, err := netlink.LinkByName(parent)
	if err != nil {
		return "", err
	}
	v := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("%s.%d", parent, id), ParentIndex: p.Attrs().Index}, VlanId: id}
	if err := netlink.LinkAdd(v); err != nil {
		if errors.Is(err, syscall.EOPNOTSUPP) {
			return "", fmt.Errorf("netlab: this kernel has no 802.1Q: %w", err)
		}
		return "", err
	}
	for _, c := range cidr {
		a, err := netlink.ParseAddr(c)
		if err != nil {
			return "", err
		}
		if err := netlink.AddrAdd(v, a); err != nil {
			return "", err
		}
	}
	return v.Name, netlink.LinkSetUp(v)
}
