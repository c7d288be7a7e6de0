package host

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OpenTap makes a tap device in this network namespace and returns its other
// end, which reads and writes one frame per call. The device is there for as
// long as somebody holds that end.
func OpenTap(name string, mac net.HardwareAddr) (*os.File, error) {
	if len(name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("host: make tap %s: the name is too long", name)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("host: make tap %s: %w", name, err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		var l netlink.Link
		if l, err = netlink.LinkByName(name); err == nil {
			err = netlink.LinkSetHardwareAddr(l, mac)
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("host: make tap %s: %w", name, err)
	}
	// Only now: a descriptor is watched by the runtime from NewFile on.
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

// Address is what a link gets.
type Address struct {
	// CIDR is the address with its prefix, Gateway the default route ("": none).
	CIDR, Gateway string
}

// up sets a link up; loopback gets its address by that.
func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("host: set %s up: %w", name, err)
	}
	return nil
}

// ConfigureLink sets a link up with exactly these addresses.
func ConfigureLink(name string, want ...Address) error {
	fail := func(err error) error { return fmt.Errorf("host: set up link %s: %w", name, err) }
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fail(err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fail(err)
	}
	old, err := netlink.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		return fail(err)
	}
	// The old ones go first: with the first address of a network the kernel
	// removes all others of the same network.
	var addrs []*netlink.Addr
	for _, a := range want {
		parsed, err := netlink.ParseAddr(a.CIDR)
		if err != nil {
			return fail(err)
		}
		addrs = append(addrs, parsed)
	}
	for _, o := range old {
		if !slices.ContainsFunc(addrs, func(a *netlink.Addr) bool { return a.IPNet.String() == o.IPNet.String() }) {
			if err := netlink.AddrDel(l, &o); err != nil {
				return fail(err)
			}
		}
	}
	for _, a := range addrs {
		if err := netlink.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
			return fail(err)
		}
	}
	for _, a := range want {
		if a.Gateway == "" {
			continue
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(a.Gateway)}); err != nil {
			return fail(err)
		}
	}
	return nil
}

// sendFile passes an open file to the other end of a unix socket.
func sendFile(c *net.UnixConn, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("host: pass file on: %w", err)
	}
	var werr error
	err = raw.Control(func(fd uintptr) {
		_, _, werr = c.WriteMsgUnix([]byte{'f'}, unix.UnixRights(int(fd)), nil)
	})
	if err = errors.Join(err, werr); err != nil {
		return fmt.Errorf("host: pass file on: %w", err)
	}
	return nil
}

// receiveFile takes what sendFile passed.
func receiveFile(c *net.UnixConn) (io.ReadWriteCloser, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(b[:], oob)
	if err != nil {
		return nil, fmt.Errorf("host: receive file: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("host: receive file: %d messages, %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("host: receive file: %d files, %w", len(fds), err)
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, fmt.Errorf("host: receive file: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "/dev/net/tun"), nil
}
