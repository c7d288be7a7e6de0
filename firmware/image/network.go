package image

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"

	"github.com/muster-edge/muster/fleet"
)

// checkNetwork returns all problems of the settings joined: values that are
// none, and combinations that no machine could use. They are found here, by a
// person at a desk, since the machine would only say that nobody answers.
func checkNetwork(n fleet.NetworkConfig) error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	var own netip.Prefix
	if n.Address != "" {
		var err error
		own, err = netip.ParsePrefix(n.Address)
		check(err == nil, "--address %q: want an address with its prefix length, such as 192.0.2.10/24", n.Address)
		if err == nil {
			check(usable(own.Addr()) && hostOf(own.Addr(), own), "--address %s is no address that a machine can have in its network", n.Address)
		}
	}
	if n.Gateway != "" {
		g, err := netip.ParseAddr(n.Gateway)
		check(err == nil, "--gateway %q is not an IP address", n.Gateway)
		check(n.Address != "", "--gateway needs --address")
		if err == nil && own.IsValid() {
			switch {
			case g == own.Addr():
				check(false, "--gateway %s is the machine's own --address", g)
			case g.Is6() && g.IsLinkLocalUnicast() && own.Addr().Is6():
				// A router's usual address (RFC 4861, section 4.2).
			default:
				check(hostOf(g, own), "--gateway %s is not a machine in the network of --address %s, so it cannot be reached", g, n.Address)
			}
		}
	}
	for _, d := range n.DNS {
		a, err := netip.ParseAddr(d)
		check(err == nil, "--dns %q is not an IP address", d)
		if err == nil {
			check(usable(a), "--dns %s is no address of a name server", d)
			check(!own.IsValid() || n.Gateway != "" || own.Contains(a), "--dns %s is outside of the network of --address %s: it needs --gateway", d, n.Address)
		}
	}
	check(len(n.DNS) == 0 || n.Address != "", "--dns needs --address: with DHCP, name servers come from there")
	check(n.VLAN >= 0 && n.VLAN <= 4094, "--vlan %d is not between 1 and 4094", n.VLAN)
	if n.Proxy != "" {
		problems = append(problems, checkProxy(n.Proxy))
	}
	if n.MAC != "" {
		mac, err := net.ParseMAC(n.MAC)
		check(err == nil && len(mac) == 6, "--mac %q is not a hardware address such as 52:54:00:12:34:56", n.MAC)
		check(err != nil || mac[0]&1 == 0, "--mac %s is a multicast address: no interface has it", n.MAC)
		check(n.Address != "" || n.VLAN != 0, "--mac needs --address or --vlan: it says which interface gets them")
	}
	return errors.Join(problems...)
}

func checkProxy(proxy string) error {
	u, err := url.Parse(proxy)
	if err != nil || u.Scheme != "http" || u.Hostname() == "" || u.Opaque != "" {
		return fmt.Errorf("--proxy %q: want http://host:port", proxy)
	}
	if u.User != nil {
		return errors.New("--proxy must not hold a password: the image can be read by everybody")
	}
	if u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("--proxy %q: want http://host:port and nothing after it", proxy)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("--proxy %q: port %s is not between 1 and 65535", proxy, p)
		}
	}
	return nil
}

// checkReach finds settings each of which is right, but with which a machine
// cannot find the centre.
func checkReach(site fleet.SiteConfig) error {
	n := site.Network
	if n.Address == "" {
		return nil // DHCP may bring everything
	}
	own, err := netip.ParsePrefix(n.Address)
	if err != nil {
		return nil // said by checkNetwork
	}
	var problems []error
	reach := func(flag, raw string) {
		u, err := url.Parse(raw)
		if err != nil || u.Hostname() == "" {
			return // said elsewhere
		}
		a, err := netip.ParseAddr(u.Hostname())
		switch {
		case err != nil && len(n.DNS) == 0:
			problems = append(problems, fmt.Errorf("%s %s is a name, and with --address no name server is known: give --dns, or an address", flag, u.Host))
		case err == nil && n.Gateway == "" && !own.Contains(a):
			problems = append(problems, fmt.Errorf("%s %s is outside of the network of --address %s: it needs --gateway", flag, u.Host, n.Address))
		}
	}
	if n.Proxy != "" {
		// The proxy finds the centre.
		reach("--proxy", n.Proxy)
		return errors.Join(problems...)
	}
	for _, centre := range site.Centre {
		reach("--centre", centre)
	}
	return errors.Join(problems...)
}

// usable is an address that one machine can have and another can reach.
func usable(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.Is4In6() && a.Zone() == "" && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// hostOf says whether a is a machine's address in the network of p: inside,
// and of IPv4 neither network nor broadcast address. Networks of two and of
// one have neither (RFC 3021).
func hostOf(a netip.Addr, p netip.Prefix) bool {
	if !p.Contains(a) {
		return false
	}
	if !a.Is4() || p.Bits() >= 31 {
		return true
	}
	inverse := uint32(1)<<(32-p.Bits()) - 1
	b := a.As4()
	host := (uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])) & inverse
	return host != 0 && host != inverse
}
