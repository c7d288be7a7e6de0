// Package netlab gives tests a LAN of their own: the test binary runs itself
// again inside a new network namespace, where it is the boot host, and every
// client is a thread in a further namespace behind a bridge. Nothing touches
// the host's network, and everything is gone when the process ends.
package netlab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const marker = "MUSTER_TEST_NETNS"

// Main is for TestMain. As root it runs the tests in a network namespace of
// their own; otherwise, and when fuzzing, it runs them where they are, and
// Need skips.
func Main(m *testing.M) {
	fuzzing := false
	for _, a := range os.Args {
		fuzzing = fuzzing || strings.HasPrefix(a, "-test.fuzz=") || strings.HasPrefix(a, "-test.fuzzworker")
	}
	if os.Getenv(marker) != "" || os.Getuid() != 0 || fuzzing {
		if os.Getenv(marker) != "" {
			if lo, err := netlink.LinkByName("lo"); err == nil {
				_ = netlink.LinkSetUp(lo)
			}
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig watches the thread
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	}
	fmt.Fprintf(os.Stderr, "netlab: no network namespace to be had, network tests are skipped: %v\n", err)
	os.Exit(m.Run())
}

// Need skips a test that has no namespace to run in.
func Need(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("network namespaces are left out with -short")
	}
	if os.Getenv(marker) == "" {
		t.Skip("needs root and network namespaces")
	}
}

var serial atomic.Int32

// LAN is a bridge in the boot host's namespace.
type LAN struct {
	// Name is the bridge's interface name.
	Name   string
	bridge netlink.Link
	t      testing.TB
}

// NewLAN makes a bridge with the addresses (CIDR) on it.
func NewLAN(t testing.TB, cidr ...string) *LAN {
	t.Helper()
	Need(t)
	name := fmt.Sprintf("lan%d", serial.Add(1))
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	must(t, netlink.LinkAdd(br))
	t.Cleanup(func() { _ = netlink.LinkDel(br) })
	for _, c := range cidr {
		a, err := netlink.ParseAddr(c)
		must(t, err)
		must(t, netlink.AddrAdd(br, a))
	}
	must(t, netlink.LinkSetUp(br))
	return &LAN{Name: name, bridge: br, t: t}
}

// Host is a machine on a LAN: one thread in its own namespace.
type Host struct {
	// Iface is its interface's name, inside its namespace.
	Iface string
	MAC   net.HardwareAddr
	work  chan func()
}

// Host plugs a machine in.
func (l *LAN) Host(t testing.TB, cidr ...string) *Host {
	t.Helper()
	h, fd := newHost(t)
	defer unix.Close(fd)
	n := serial.Add(1)
	name := fmt.Sprintf("p%d", n)
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: l.bridge.Attrs().Index},
		PeerName: h.Iface, PeerHardwareAddr: h.MAC, PeerNamespace: netlink.NsFd(fd)}))
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	port, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.LinkSetUp(port))
	must(t, h.up(cidr))
	h.settle(t, l.Name, name)
	return h
}

// Tap plugs in a tap device for a virtual machine and returns its name.
func (l *LAN) Tap(t testing.TB) string {
	t.Helper()
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("tap%d", serial.Add(1))}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(tap); err != nil {
		t.Skipf("no tap device to be had: %v", err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(tap) })
	must(t, netlink.LinkSetMaster(tap, l.bridge))
	must(t, netlink.LinkSetUp(tap))
	return tap.Name
}

// Do runs f on the host's thread: sockets that f itself opens, and programs
// it starts, live in the host's namespace.
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	h.work <- func() { done <- f() }
	return <-done
}

// Run starts a program in the host's namespace and stops it when the test
// ends. It skips the test if the program is not installed.
func (h *Host) Run(t testing.TB, out *os.File, name string, args ...string) {
	t.Helper()
	launch(t, h.Do, out, name, args)
}

// Start is Run in the boot host's namespace.
func Start(t testing.TB, out *os.File, name string, args ...string) {
	t.Helper()
	Need(t)
	// A thread of its own, that lives as long as the program: see launch.
	h := &Host{work: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range h.work {
			f()
		}
	}()
	t.Cleanup(func() { close(h.work) })
	launch(t, h.Do, out, name, args)
}

func launch(t testing.TB, do func(func() error) error, out *os.File, name string, args []string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			t.Skipf("%s is not installed", name)
		}
	}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = out, out
	// It ends with this process even if that is killed. The kernel watches
	// the thread that started it, so do must use one that stays.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, do(cmd.Start))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// Eventually polls until ok or the time is over; it is for things outside
// this process.
func Eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("after %s: not yet: %s", within, what)
		}
		<-tick.C
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Add puts a further address on the bridge.
func (l *LAN) Add(t testing.TB, cidr string) {
	t.Helper()
	a, err := netlink.ParseAddr(cidr)
	must(t, err)
	must(t, netlink.AddrAdd(l.bridge, a))
}
