package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"github.com/muster-edge/muster/pxe"
)

const (
	// maxPacket is an Ethernet frame's worth; larger datagrams are dropped
	// unread.
	maxPacket = 1500
	// minMessage is what every client must accept (RFC 2131 section 2), IP
	// and UDP headers included.
	minMessage = 576
	headers    = 28
	maxArchs   = 8
)

// errNotRequest marks packets that are no client's request: they are not
// worth a word.
var errNotRequest = errors.New("not a client's request")

// Parse reads one datagram that came to port. The returned packet is what the
// reply is built from.
func Parse(b []byte, port pxe.Port) (*dhcpv4.DHCPv4, pxe.Request, error) {
	if len(b) > maxPacket {
		return nil, pxe.Request{}, fmt.Errorf("dhcp: read packet: %d bytes, at most %d are read", len(b), maxPacket)
	}
	p, err := dhcpv4.FromBytes(b)
	if err != nil {
		return nil, pxe.Request{}, fmt.Errorf("dhcp: read packet: %w", err)
	}
	if p.OpCode != dhcpv4.OpcodeBootRequest {
		return nil, pxe.Request{}, fmt.Errorf("dhcp: read packet: %w", errNotRequest)
	}
	if p.HWType != iana.HWTypeEthernet || len(p.ClientHWAddr) != 6 {
		return nil, pxe.Request{}, fmt.Errorf("dhcp: read packet: hardware type %d with %d address bytes, only Ethernet is served", p.HWType, len(p.ClientHWAddr))
	}
	mt := p.Options[dhcpv4.OptionDHCPMessageType.Code()]
	if len(mt) != 1 {
		return nil, pxe.Request{}, errors.New("dhcp: read packet: no message type (BOOTP is not served)")
	}
	r := pxe.Request{
		Port:        port,
		Type:        pxe.MessageType(mt[0]),
		XID:         binary.BigEndian.Uint32(p.TransactionID[:]),
		Secs:        p.NumSeconds,
		Client:      addr(p.ClientIPAddr),
		Gateway:     addr(p.GatewayIPAddr),
		RequestedIP: addr(p.Options[dhcpv4.OptionRequestedIPAddress.Code()]),
		ServerID:    addr(p.Options[dhcpv4.OptionServerIdentifier.Code()]),
		VendorClass: printable(p.Options[dhcpv4.OptionClassIdentifier.Code()]),
		UserClass:   printable(p.Options[dhcpv4.OptionUserClassInformation.Code()]),
		Params:      clipBytes(p.Options[dhcpv4.OptionParameterRequestList.Code()]),
		ClientID:    clipBytes(p.Options[dhcpv4.OptionClientIdentifier.Code()]),
		RelayInfo:   clipBytes(p.Options[dhcpv4.OptionRelayAgentInformation.Code()]),
		MachineID:   clipBytes(p.Options[dhcpv4.OptionClientMachineIdentifier.Code()]),
	}
	copy(r.MAC[:], p.ClientHWAddr)
	if v := p.Options[dhcpv4.OptionMaximumDHCPMessageSize.Code()]; len(v) == 2 {
		r.MaxSize = binary.BigEndian.Uint16(v)
	}
	_, r.NetworkInterface = p.Options[dhcpv4.OptionClientNetworkInterfaceIdentifier.Code()]
	v := p.Options[dhcpv4.OptionClientSystemArchitectureType.Code()]
	for i := 0; i+1 < len(v) && len(r.Archs) < maxArchs; i += 2 {
		r.Archs = append(r.Archs, pxe.Arch(binary.BigEndian.Uint16(v[i:])))
	}
	// RFC 4578 section 2.3: type 0 and 16 bytes. Anything else is echoed but
	// not understood; ROMs that omit it exist.
	if len(r.MachineID) == 17 && r.MachineID[0] == 0 {
		copy(r.UUID[:], r.MachineID[1:])
	}
	return p, r, nil
}

// addr returns a valid address or the invalid one for absent and 0.0.0.0.
func addr(b []byte) netip.Addr {
	if v4 := net.IP(b).To4(); v4 != nil {
		if a := netip.AddrFrom4([4]byte(v4)); !a.IsUnspecified() {
			return a
		}
	}
	return netip.Addr{}
}

func clipBytes(b []byte) []byte {
	if len(b) > 255 {
		return b[:255]
	}
	return b
}

// printable keeps classes harmless in logs.
func printable(b []byte) string {
	b = clipBytes(b)
	out := make([]byte, len(b))
	for i, c := range b {
		if c < 0x20 || c > 0x7e {
			c = '?'
		}
		out[i] = c
	}
	return string(out)
}

// answer is everything of a reply that does not come from the request.
type answer struct {
	kind pxe.MessageType
	// server goes into option 54.
	server netip.Addr
	// yours is the leased address, invalid in proxy replies and NAKs.
	yours netip.Addr
	// pool gives mask, router and DNS; nil without a lease.
	pool *Pool
	// lease is the lease time; 0 leaves options 51, 58 and 59 out.
	lease time.Duration
	boot  *pxe.Boot
	// message is option 56, for NAKs.
	message string
}

// build makes the reply to p. It copies xid, chaddr, giaddr, hops and flags
// (RFC 2131 table 3) and echoes options 61 (RFC 6842), 82 (RFC 3046) and 97
// (RFC 4578) verbatim.
func build(p *dhcpv4.DHCPv4, a answer) ([]byte, error) {
	r := &dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootReply,
		HWType:        p.HWType,
		ClientHWAddr:  p.ClientHWAddr,
		TransactionID: p.TransactionID,
		Flags:         p.Flags,
		GatewayIPAddr: p.GatewayIPAddr,
		ClientIPAddr:  net.IPv4zero,
		YourIPAddr:    net.IPv4zero,
		ServerIPAddr:  net.IPv4zero,
		Options:       dhcpv4.Options{},
	}
	put := func(code dhcpv4.OptionCode, v []byte) { r.Options[code.Code()] = v }
	put(dhcpv4.OptionDHCPMessageType, []byte{byte(a.kind)})
	put(dhcpv4.OptionServerIdentifier, a.server.AsSlice())
	for _, c := range []dhcpv4.OptionCode{dhcpv4.OptionClientIdentifier, dhcpv4.OptionRelayAgentInformation, dhcpv4.OptionClientMachineIdentifier} {
		if v, ok := p.Options[c.Code()]; ok {
			put(c, v)
		}
	}
	if a.kind == pxe.Nak {
		if p.GatewayIPAddr != nil && !p.GatewayIPAddr.IsUnspecified() {
			// RFC 2131 section 4.3.2: through a relay the relay must
			// broadcast the NAK.
			r.SetBroadcast()
		}
		put(dhcpv4.OptionMessage, []byte(a.message))
		return finish(p, r)
	}
	if a.kind == pxe.Ack {
		r.ClientIPAddr = p.ClientIPAddr
	}
	if a.yours.IsValid() {
		r.YourIPAddr = a.yours.AsSlice()
	}
	if a.pool != nil {
		put(dhcpv4.OptionSubnetMask, net.CIDRMask(a.pool.Subnet.Bits(), 32))
		if a.pool.Router.IsValid() {
			put(dhcpv4.OptionRouter, a.pool.Router.AsSlice())
		}
		if len(a.pool.DNS) > 0 {
			var v []byte
			for _, d := range a.pool.DNS {
				v = append(v, d.AsSlice()...)
			}
			put(dhcpv4.OptionDomainNameServer, v)
		}
	}
	if a.lease > 0 {
		// T1 and T2 are the RFC's defaults, said aloud.
		put(dhcpv4.OptionIPAddressLeaseTime, seconds(a.lease))
		put(dhcpv4.OptionRenewTimeValue, seconds(a.lease/2))
		put(dhcpv4.OptionRebindingTimeValue, seconds(a.lease*7/8))
	}
	if b := a.boot; b != nil {
		put(dhcpv4.OptionClassIdentifier, []byte(b.VendorClass))
		if b.VendorOptions != nil {
			put(dhcpv4.OptionVendorSpecificInformation, b.VendorOptions)
		}
		r.ServerIPAddr = b.Server.AsSlice()
		if b.File != "" {
			put(dhcpv4.OptionBootfileName, []byte(b.File))
			if !b.URL() {
				// Some firmware reads the header field, some option 67.
				r.BootFileName = b.File
				put(dhcpv4.OptionTFTPServerName, []byte(b.Server.String()))
			}
		}
		if !b.URL() {
			r.ServerHostName = b.Server.String()
		}
	}
	return finish(p, r)
}

func finish(p, r *dhcpv4.DHCPv4) ([]byte, error) {
	limit := minMessage
	if v := p.Options[dhcpv4.OptionMaximumDHCPMessageSize.Code()]; len(v) == 2 {
		limit = max(limit, int(binary.BigEndian.Uint16(v)))
	}
	limit = min(limit, maxPacket)
	b := r.ToBytes()
	// Comfort goes first when the client's buffer is small.
	for _, c := range []dhcpv4.OptionCode{dhcpv4.OptionDomainNameServer, dhcpv4.OptionTFTPServerName, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue, dhcpv4.OptionMessage} {
		if len(b)+headers <= limit {
			break
		}
		delete(r.Options, c.Code())
		b = r.ToBytes()
	}
	if len(b)+headers > limit {
		return nil, fmt.Errorf("dhcp: build reply: %d bytes, the client takes %d", len(b)+headers, limit)
	}
	return b, nil
}

func seconds(d time.Duration) []byte {
	return binary.BigEndian.AppendUint32(nil, uint32(d/time.Second))
}
