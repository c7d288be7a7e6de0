package lab

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The lab network. It exists in the run's own network namespace only, so
// every run has the same addresses.
const (
	Bridge        = "mbr0"
	BootHost      = "10.77.0.1"
	Subnet        = "10.77.0.0/24"
	LeaseFrom     = "10.77.0.100"
	LeaseTo       = "10.77.0.199"
	ForeignDHCP   = "10.77.0.2"
	bootHostCIDR  = BootHost + "/24"
	foreignCIDR   = ForeignDHCP + "/24"
	foreignPort   = "foreign0" // the end on the bridge
	foreignInside = "eth0"     // the end in the other host
)

// makeNetwork sets up loopback and the bridge of a fresh network namespace.
func makeNetwork() error {
	if err := up("lo"); err != nil {
		return err
	}
	// The bridge has the boot host's address itself; without learning delay
	// and spanning tree a port forwards at once.
	off := false
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge, MTU: 1500}, MulticastSnooping: &off}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("lab: add bridge: %w", err)
	}
	address, err := netlink.ParseAddr(bootHostCIDR)
	if err != nil {
		return fmt.Errorf("lab: add bridge: %w", err)
	}
	if err := netlink.AddrAdd(bridge, address); err != nil {
		return fmt.Errorf("lab: add address to bridge: %w", err)
	}
	return up(Bridge)
}

// makeHostNetwork sets up what the host lab has in the run's own namespace:
// the centre's address. Nodes have namespaces and cables of their own.
func makeHostNetwork() error {
	if err := up("lo"); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lab: find interface lo: %w", err)
	}
	address, err := netlink.ParseAddr(BootHost + "/32")
	if err == nil {
		err = netlink.AddrAdd(lo, address)
	}
	if err != nil {
		return fmt.Errorf("lab: give the centre its address: %w", err)
	}
	return nil
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("lab: find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("lab: set %s up: %w", name, err)
	}
	return nil
}

// openTap makes a tap, one queue, that is there for as long as the file is
// open. A read or a write is one frame.
func openTap(name string) (*os.File, error) {
	if len(name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("lab: add tap %s: the name is too long", name)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lab: add tap %s: %w", name, err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("lab: add tap %s: %w", name, err)
	}
	// Only now: a descriptor is watched by the runtime from NewFile on.
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

// addTap makes a tap on the bridge, for QEMU. It goes with the namespace.
func addTap(name string) error {
	tun, err := openTap(name)
	if err != nil {
		return err
	}
	defer tun.Close()
	if err := unix.IoctlSetInt(int(tun.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("lab: keep tap %s: %w", name, err)
	}
	return enslave(name)
}

func enslave(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("lab: find interface %s: %w", name, err)
	}
	bridge, err := netlink.LinkByName(Bridge)
	if err != nil {
		return fmt.Errorf("lab: find bridge: %w", err)
	}
	if err := netlink.LinkSetMaster(l, bridge); err != nil {
		return fmt.Errorf("lab: put %s on the bridge: %w", name, err)
	}
	return up(name)
}

// macOf is the address of the n-th machine (from 1). 52:54:00 is QEMU's.
func macOf(n int) string {
	return net.HardwareAddr{0x52, 0x54, 0x00, 0x6d, 0x75, byte(n)}.String()
}

// hostLinks lists the names of all interfaces, sorted by index.
func hostLinks() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("lab: list interfaces: %w", err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names, nil
}

// checkNetworkRights returns why this process cannot make namespaces and
// taps, nil if it can.
func checkNetworkRights() error {
	if os.Geteuid() != 0 {
		return &Unable{Reason: "making a network of its own needs root (try sudo)"}
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return &Unable{Reason: "/dev/net/tun does not exist: the kernel module tun is not loaded (modprobe tun), or a container hides it (--device /dev/net/tun)"}
	}
	if err != nil {
		return &Unable{Reason: fmt.Sprintf("/dev/net/tun cannot be opened: %v", err)}
	}
	_ = f.Close()
	return nil
}
