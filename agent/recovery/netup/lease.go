package netup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Bounds of what a DHCP server may tell us.
const (
	minLease     = time.Minute
	maxLease     = 7 * 24 * time.Hour
	defaultLease = time.Hour
	maxServers   = 3
)

// Lease is what is kept of a DHCP answer: everything else in it is ignored,
// boot files, host names, routes and proxies first of all. Whoever answers
// first on an untrusted LAN can make this machine mute, nothing more: the
// centre is recognised by the root inside the image.
type Lease struct {
	Address netip.Prefix
	// Router is invalid when the server gave none that could be reached.
	Router netip.Addr
	DNS    []netip.Addr
	Server netip.Addr
	// For is how long the address may be used.
	For time.Duration
}

// leaseOf validates an offer or acknowledgement (RFC 2131 section 4.3.1). It
// fails when the address itself is unusable and drops single options that
// make no sense.
func leaseOf(m *dhcpv4.DHCPv4) (Lease, error) {
	if m == nil {
		return Lease{}, errors.New("netup: read lease: no message")
	}
	addr, ok := hostAddr(m.YourIPAddr)
	if !ok {
		return Lease{}, fmt.Errorf("netup: read lease: %v is no address for a host", m.YourIPAddr)
	}
	bits, ok := maskBits(m.Options.Get(dhcpv4.OptionSubnetMask))
	if !ok {
		return Lease{}, errors.New("netup: read lease: no usable subnet mask")
	}
	l := Lease{Address: netip.PrefixFrom(addr, bits), For: defaultLease}
	if bits < 31 && (addr == l.Address.Masked().Addr() || addr == broadcast(l.Address)) {
		return Lease{}, fmt.Errorf("netup: read lease: %s is the network or broadcast address", l.Address)
	}
	if l.Server, ok = hostAddr(m.Options.Get(dhcpv4.OptionServerIdentifier)); !ok {
		return Lease{}, errors.New("netup: read lease: no usable server identifier")
	}
	for _, r := range addresses(m.Options.Get(dhcpv4.OptionRouter)) {
		if l.Address.Contains(r) && r != addr && (bits >= 31 || r != broadcast(l.Address) && r != l.Address.Masked().Addr()) {
			l.Router = r
			break
		}
	}
	for _, d := range addresses(m.Options.Get(dhcpv4.OptionDomainNameServer)) {
		if len(l.DNS) < maxServers && d != addr {
			l.DNS = append(l.DNS, d)
		}
	}
	if b := m.Options.Get(dhcpv4.OptionIPAddressLeaseTime); len(b) == 4 {
		l.For = time.Duration(binary.BigEndian.Uint32(b)) * time.Second
	}
	l.For = min(max(l.For, minLease), maxLease)
	return l, nil
}

// hostAddr accepts IPv4 addresses that a host can have.
func hostAddr(b net.IP) (netip.Addr, bool) {
	b4 := b.To4()
	if b4 == nil {
		return netip.Addr{}, false
	}
	a := netip.AddrFrom4([4]byte(b4))
	// 0/8 is "this network", 240/4 is reserved and holds the broadcast
	// address (RFC 6890).
	if b4[0] == 0 || b4[0] >= 240 || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return netip.Addr{}, false
	}
	return a, true
}

// addresses reads an option that is a list of IPv4 addresses, keeping those
// a host can have; at most 16 are looked at.
func addresses(b []byte) []netip.Addr {
	var out []netip.Addr
	for i := 0; i+4 <= len(b) && i < 64; i += 4 {
		if a, ok := hostAddr(net.IP(b[i : i+4])); ok {
			out = append(out, a)
		}
	}
	return out
}

// maskBits reads a contiguous netmask between /8 and /31.
func maskBits(b []byte) (int, bool) {
	if len(b) != 4 {
		return 0, false
	}
	ones, size := net.IPMask(b).Size()
	return ones, size == 32 && ones >= 8 && ones <= 31
}

func broadcast(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	v := binary.BigEndian.Uint32(a[:]) | (1<<(32-p.Bits()) - 1)
	binary.BigEndian.PutUint32(a[:], v)
	return netip.AddrFrom4(a)
}
