package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// StartForeignDHCP puts another host on the lab network: a network namespace
// of its own with a dnsmasq that leases addresses and knows nothing of network
// boot, like the router of a shop. Its log is foreign-dhcp.log.
func (l *Lab) StartForeignDHCP() (*Child, error) {
	dnsmasq, err := exec.LookPath("dnsmasq")
	if err != nil {
		return nil, &Unable{Reason: "--dhcp proxy plays a site's own DHCP server with dnsmasq, which is not installed", Packages: []string{"dnsmasq-base"}}
	}
	// The end on the bridge must exist before the other one can be moved.
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: foreignPort, MTU: 1500}, PeerName: foreignPort + "p"}
	if err := netlink.LinkAdd(pair); err != nil {
		return nil, fmt.Errorf("lab: add foreign host: %w", err)
	}
	if err := enslave(foreignPort); err != nil {
		return nil, err
	}
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("lab: add foreign host: %w", err)
	}
	defer home.Close()
	argv := []string{dnsmasq, "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--port=0",
		"--user=root", "--pid-file=", "--leasefile-ro", "--log-dhcp", "--log-facility=-",
		"--interface=" + foreignInside, "--bind-interfaces", "--no-ping",
		"--dhcp-range=" + LeaseFrom + "," + LeaseTo + ",255.255.255.0,1h",
		"--dhcp-option=option:router," + ForeignDHCP}
	child, err := l.start("foreign-dhcp", argv, func() error { return moveToForeignHost(int(home.Fd())) })
	if err != nil {
		return nil, err
	}
	l.Say("lab", "foreign-dhcp", "another host leases addresses ("+ForeignDHCP+"), as a site's router does; ours only adds boot data")
	return child, nil
}

// moveToForeignHost gives this thread a network namespace of its own and
// brings the veth's other end there. The thread never returns.
func moveToForeignHost(home int) error {
	from, err := netlink.NewHandle()
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer from.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer here.Close()
	// from was opened before, so it still speaks to the lab's namespace.
	peer, err := from.LinkByName(foreignPort + "p")
	if err != nil {
		return fmt.Errorf("find veth: %w", err)
	}
	if err := from.LinkSetNsFd(peer, int(here.Fd())); err != nil {
		return fmt.Errorf("move veth: %w", err)
	}
	to, err := netlink.NewHandle()
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer to.Close()
	moved, err := to.LinkByName(foreignPort + "p")
	if err != nil {
		return fmt.Errorf("find moved veth: %w", err)
	}
	address, err := netlink.ParseAddr(foreignCIDR)
	if err != nil {
		return err
	}
	lo, err := to.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	return errors.Join(to.LinkSetUp(lo), to.LinkSetName(moved, foreignInside), to.AddrAdd(moved, address), to.LinkSetUp(moved))
}
