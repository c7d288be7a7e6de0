package netup

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/fleet"
)

// metricBase plus the interface index is the metric of its routes: every
// interface may have a default route, and the order is always the same.
const metricBase = 100

// apply makes l the only configured address of device, with its routes. It
// changes nothing that is already as wanted, so renewals cut no connection.
func apply(device string, l Lease) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("netup: find %s: %w", device, err)
	}
	if err := removeAddresses(link, l.Address); err != nil {
		return err
	}
	index := link.Attrs().Index
	// The kernel's own prefix route has metric 0; two interfaces in one
	// subnet would then share it in an order nobody chose.
	addr := &netlink.Addr{IPNet: ipNet(l.Address), Flags: unix.IFA_F_NOPREFIXROUTE}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("netup: set %s on %s: %w", l.Address, device, err)
	}
	wanted := []netlink.Route{{
		LinkIndex: index, Dst: ipNet(l.Address.Masked()), Src: l.Address.Addr().AsSlice(),
		Scope: netlink.SCOPE_LINK, Priority: metricBase + index, Protocol: unix.RTPROT_DHCP,
	}}
	if l.Router.IsValid() {
		wanted = append(wanted, netlink.Route{
			LinkIndex: index, Dst: ipNet(anyOf(l.Router)), Gw: l.Router.AsSlice(), Src: l.Address.Addr().AsSlice(),
			Priority: metricBase + index, Protocol: unix.RTPROT_DHCP,
		})
	}
	if err := removeRoutes(link, wanted); err != nil {
		return err
	}
	for i := range wanted {
		if err := netlink.RouteReplace(&wanted[i]); err != nil {
			return fmt.Errorf("netup: route %s on %s: %w", wanted[i].Dst, device, err)
		}
	}
	return nil
}

// clearAddresses takes every IPv4 address off device. Its routes go along.
func clearAddresses(device string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("netup: find %s: %w", device, err)
	}
	return removeAddresses(link, netip.Prefix{})
}

// removeAddresses removes all IPv4 addresses but keep.
func removeAddresses(link netlink.Link, keep netip.Prefix) error {
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("netup: list addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range addrs {
		if keep.IsValid() && a.IPNet.String() == ipNet(keep).String() {
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("netup: remove %s from %s: %w", a.IPNet, link.Attrs().Name, err)
		}
	}
	return nil
}

// removeRoutes removes routes that we set earlier and no longer want.
func removeRoutes(link netlink.Link, wanted []netlink.Route) error {
	routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("netup: list routes of %s: %w", link.Attrs().Name, err)
	}
	for _, r := range routes {
		if r.Protocol != unix.RTPROT_DHCP || slices.ContainsFunc(wanted, func(w netlink.Route) bool { return sameRoute(r, w) }) {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("netup: remove route %s: %w", r.Dst, err)
		}
	}
	return nil
}

func sameRoute(a, b netlink.Route) bool {
	dst := func(n *net.IPNet) string {
		if n == nil {
			return "0.0.0.0/0"
		}
		return n.String()
	}
	return dst(a.Dst) == dst(b.Dst) && a.Gw.Equal(b.Gw) && a.Priority == b.Priority && a.Src.Equal(b.Src)
}

func anyOf(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// nameServers are site.json's, else those of all interfaces that are up.
func nameServers(site fleet.NetworkConfig, nics []NIC) []netip.Addr {
	if d := parseAddrs(site.DNS); len(d) > 0 {
		return d
	}
	var out []netip.Addr
	for _, n := range nics {
		if n.Phase != Up {
			continue
		}
		for _, d := range n.DNS {
			if len(out) < maxServers && !slices.Contains(out, d) {
				out = append(out, d)
			}
		}
	}
	return out
}

// writeResolvConf replaces the file if its content changes. The root file
// system is RAM: there is nothing to sync.
func writeResolvConf(file string, servers []netip.Addr) error {
	var b bytes.Buffer
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	b.WriteString("options timeout:2 attempts:2\n")
	if old, err := os.ReadFile(file); err == nil && bytes.Equal(old, b.Bytes()) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("netup: write name servers: %w", err)
	}
	if err := os.WriteFile(file+".new", b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("netup: write name servers: %w", err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		return fmt.Errorf("netup: write name servers: %w", err)
	}
	return nil
}
