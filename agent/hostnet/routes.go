package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fallbackMetric is the worst there is: any other default route wins.
const fallbackMetric = 0xfffffffe

// applyRoutes brings link, address and routes to what d says.
func applyRoutes(d Desired, log *slog.Logger) error {
	if !d.Self.IsValid() {
		return removeLink()
	}
	link, err := ensureLink(d)
	if err != nil {
		return err
	}
	if err := ensureAddress(link, d.Self); err != nil {
		return err
	}
	var errs []error
	wanted := make([]netlink.Route, 0, len(d.Peers)+1)
	lost := map[netip.Addr]bool{} // keep what they have
	for in, lan := range d.Peers {
		if !lan.IsValid() {
			continue
		}
		r, err := routeTo(d, in, lan)
		if err != nil {
			log.Warn("no route to a peer", "in_site", in.String(), "lan", lan.String(), "err", err)
			lost[in] = true
			continue
		}
		wanted = append(wanted, r)
	}
	old, err := ourRoutes()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	if d.FallbackDefault {
		other, err := otherDefault()
		errs = append(errs, err)
		if err == nil && !other {
			wanted = append(wanted, netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
				Scope: netlink.SCOPE_LINK, Priority: fallbackMetric, Protocol: routeProtocol, Src: d.Self.AsSlice()})
		}
	}
	// First what is new or different, replaced in one step, then what is too
	// much: at no time is a peer without a route that had one.
	for i := range wanted {
		if containsRoute(old, &wanted[i]) {
			continue
		}
		if err := netlink.RouteReplace(&wanted[i]); err != nil {
			errs = append(errs, fmt.Errorf("hostnet: route %s: %w", wanted[i].Dst, err))
		}
	}
	for i := range old {
		if keptRoute(wanted, &old[i]) || !isDefault(&old[i]) && lost[addrOf(old[i].Dst)] {
			continue
		}
		if err := netlink.RouteDel(&old[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("hostnet: delete route %s: %w", old[i].Dst, err))
		}
	}
	return errors.Join(errs...)
}

// ensureLink makes the dummy link with the MTU of the LAN.
func ensureLink(d Desired) (netlink.Link, error) {
	mtu := 0
	if d.Link != "" {
		l, err := netlink.LinkByName(d.Link)
		if err != nil {
			return nil, fmt.Errorf("hostnet: find %s: %w", d.Link, err)
		}
		mtu = l.Attrs().MTU
	}
	link, err := netlink.LinkByName(Link)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		if link, err = makeLink(mtu); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("hostnet: find %s: %w", Link, err)
	}
	if half := link.Attrs(); half.Alias == "" && half.Flags&net.FlagUp == 0 && (link.Type() == "dummy" || link.Type() == "bridge") {
		// Made a moment before this program was killed.
		if err := netlink.LinkSetAlias(link, linkAlias); err != nil {
			return nil, fmt.Errorf("hostnet: mark %s: %w", Link, err)
		}
	} else if half.Alias != linkAlias {
		return nil, fmt.Errorf("hostnet: the link %s is a %s that somebody else made", Link, link.Type())
	}
	if mtu != 0 && link.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return nil, fmt.Errorf("hostnet: set MTU of %s: %w", Link, err)
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("hostnet: set %s up: %w", Link, err)
		}
	}
	return link, nil
}

// linkAlias says that a link is ours.
const linkAlias = "muster: in-site address"

// makeLink makes a dummy link, or a bridge without ports where the kernel has
// no dummies: either only has to exist and carry an address.
func makeLink(mtu int) (netlink.Link, error) {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = Link, mtu
	err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: a})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: a})
	}
	if err != nil {
		return nil, fmt.Errorf("hostnet: make %s: %w", Link, err)
	}
	link, err := netlink.LinkByName(Link)
	if err != nil {
		return nil, fmt.Errorf("hostnet: find %s: %w", Link, err)
	}
	if err := netlink.LinkSetAlias(link, linkAlias); err != nil {
		return nil, fmt.Errorf("hostnet: mark %s: %w", Link, errors.Join(err, netlink.LinkDel(link)))
	}
	link.Attrs().Alias = linkAlias
	return link, nil
}

func ensureAddress(link netlink.Link, self netip.Addr) error {
	have, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("hostnet: list addresses of %s: %w", Link, err)
	}
	want := ipNet(self)
	found := false
	for i := range have {
		ones, _ := have[i].Mask.Size()
		if have[i].IP.Equal(want.IP) && ones == 32 {
			found = true
		}
	}
	if !found {
		if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: want}); err != nil {
			return fmt.Errorf("hostnet: set %s on %s: %w", self, Link, err)
		}
	}
	for i := range have {
		if have[i].IP.Equal(want.IP) {
			continue
		}
		if err := netlink.AddrDel(link, &have[i]); err != nil {
			return fmt.Errorf("hostnet: delete %s from %s: %w", have[i].IP, Link, err)
		}
	}
	return nil
}

// routeTo is the route to a peer's in-site address. Its source is this node's
// in-site address, so that peers see connections come from there.
func routeTo(d Desired, in, lan netip.Addr) (netlink.Route, error) {
	if err := d.checkLAN(lan); err != nil {
		return netlink.Route{}, err
	}
	r := netlink.Route{Dst: ipNet(in), Src: d.Self.AsSlice(), Protocol: routeProtocol}
	name := d.Link
	if lan.Zone() != "" {
		name = lan.Zone()
	}
	hop := lan.WithZone("")
	if name != "" {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return r, fmt.Errorf("hostnet: route to %s by %s: %w", in, lan, err)
		}
		r.LinkIndex = l.Attrs().Index
	}
	// Behind a router, the next hop is the router.
	got, err := netlink.RouteGet(hop.AsSlice())
	switch {
	case err == nil && len(got) > 0 && (r.LinkIndex == 0 || got[0].LinkIndex == r.LinkIndex) && got[0].Type == unix.RTN_UNICAST:
		r.LinkIndex = got[0].LinkIndex
		if gw, ok := netip.AddrFromSlice(got[0].Gw); ok && !gw.IsUnspecified() {
			hop = gw.Unmap()
		}
	case r.LinkIndex == 0:
		return r, fmt.Errorf("hostnet: route to %s by %s: this host has no way there: %w", in, lan, errors.Join(err))
	}
	if hop.Is4() {
		r.Gw = hop.AsSlice()
	} else {
		r.Via = &netlink.Via{AddrFamily: netlink.FAMILY_V6, Addr: hop.AsSlice()} // Linux 5.2
	}
	r.SetFlag(netlink.FLAG_ONLINK)
	return r, nil
}

// ourRoutes lists the routes that this package made.
func ourRoutes() ([]netlink.Route, error) {
	list, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("hostnet: list routes: %w", err)
	}
	return list, nil
}

// otherDefault reports whether somebody else made a default route.
func otherDefault() (bool, error) {
	list, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return false, fmt.Errorf("hostnet: list routes: %w", err)
	}
	for _, r := range list {
		if isDefault(&r) && r.Protocol != routeProtocol {
			return true, nil
		}
	}
	return false, nil
}

func isDefault(r *netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}

// containsRoute reports whether list has w as it should be.
func containsRoute(list []netlink.Route, w *netlink.Route) bool {
	for i := range list {
		r := &list[i]
		if sameDst(r, w) && r.Priority == w.Priority && r.LinkIndex == w.LinkIndex && r.Gw.Equal(w.Gw) && sameVia(r.Via, w.Via) && r.Src.Equal(w.Src) {
			return true
		}
	}
	return false
}

// keptRoute reports whether r is one of wanted or was replaced by one.
func keptRoute(wanted []netlink.Route, r *netlink.Route) bool {
	for i := range wanted {
		if sameDst(r, &wanted[i]) && r.Priority == wanted[i].Priority {
			return true
		}
	}
	return false
}

func sameDst(a, b *netlink.Route) bool {
	if isDefault(a) || isDefault(b) {
		return isDefault(a) && isDefault(b)
	}
	return a.Dst.IP.Equal(b.Dst.IP) && bytes.Equal(a.Dst.Mask, b.Dst.Mask)
}

func sameVia(a, b netlink.Destination) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Equal(b)
}

func addrOf(n *net.IPNet) netip.Addr {
	a, _ := netip.AddrFromSlice(n.IP) // the zero address is nobody's
	return a.Unmap()
}

func ipNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// removeLink takes our routes and the link away.
func removeLink() error {
	old, err := ourRoutes()
	if err != nil {
		return err
	}
	var errs []error
	for i := range old {
		if err := netlink.RouteDel(&old[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("hostnet: delete route %s: %w", old[i].Dst, err))
		}
	}
	link, err := netlink.LinkByName(Link)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
	case err != nil:
		errs = append(errs, fmt.Errorf("hostnet: find %s: %w", Link, err))
	case link.Attrs().Alias == linkAlias:
		if err := netlink.LinkDel(link); err != nil {
			errs = append(errs, fmt.Errorf("hostnet: delete %s: %w", Link, err))
		}
	}
	return errors.Join(errs...)
}
