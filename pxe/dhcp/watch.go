package dhcp

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/mdlayher/packet"

	"github.com/muster-edge/muster/pxe"
)

// foreign is another server that answered our search.
type foreign struct {
	ip  netip.Addr
	mac pxe.MAC
	// leases: it offered an address. boots: it offered a boot file.
	leases, boots bool
}

func (f foreign) String() string { return fmt.Sprintf("%s (%s)", f.ip, f.mac) }

// cleanRounds is how many searches in a row must find nothing before leasing
// starts again: one answer may be lost.
const cleanRounds = 2

// watch searches for other servers at start, every WatchEvery, and when a
// client names one. In full mode another leasing server stops ours: two
// servers that lease from one network hand out addresses twice.
func (s *Server) watch(ctx context.Context) error {
	clean, alarmed := cleanRounds-1, ""
	for {
		found, err := s.search(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			// Not knowing is no reason to stop what worked, nor to start.
			s.log.Warn("search for other DHCP servers failed", "error", err)
		} else {
			alarmed, clean = s.judge(found, alarmed, clean)
		}
		wait := s.cfg.WatchEvery
		if err != nil {
			wait = min(wait, 5*time.Second)
		}
		pause := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			pause.Stop()
			return nil
		case <-s.hint:
		case <-pause.C:
		}
		pause.Stop()
	}
}

// judge acts on one search. alarmed is what the last alarm was about, clean
// the number of clean searches in a row.
func (s *Server) judge(found []foreign, alarmed string, clean int) (string, int) {
	var bad []string
	for _, f := range found {
		if f.boots || f.leases && s.cfg.Mode == pxe.ModeFull {
			bad = append(bad, f.String())
		}
	}
	leasing := false
	for _, f := range found {
		leasing = leasing || f.leases
	}
	what := strings.Join(bad, ", ")
	now := s.cfg.Now()
	alarm := func(text string) {
		if what != alarmed {
			s.cfg.Decider.Event(pxe.Event{Time: now, Alarm: true, Text: text})
		}
	}
	switch {
	case s.cfg.Mode == pxe.ModeFull && leasing:
		s.setStopped("another DHCP server is on this network: " + what)
		alarm("another DHCP server leases addresses on this network: " + what + "; leasing here has stopped. Remove it, or use proxy mode")
		return what, 0
	case what != "":
		alarm("another network boot server answers on this network: " + what + "; machines may take its image instead of ours")
		clean++
	default:
		clean++
	}
	if s.cfg.Mode == pxe.ModeFull && s.Stopped() != "" && clean >= cleanRounds {
		again := alarmed != ""
		s.setStopped("")
		if again {
			s.cfg.Decider.Event(pxe.Event{Time: now, Text: "the other DHCP server is gone: leasing again"})
		}
	}
	if what == "" && clean < cleanRounds {
		return alarmed, clean
	}
	return what, clean
}

const etherIPv4 = 0x0800

// search broadcasts a DISCOVER from a random local MAC and collects offers
// for WatchWait. It speaks raw Ethernet: the client port may belong to a DHCP
// client of this host, and such frames never reach our own server.
func (s *Server) search(ctx context.Context) ([]foreign, error) {
	conn, err := packet.Listen(s.ifi, packet.Raw, etherIPv4, nil)
	if err != nil {
		return nil, fmt.Errorf("dhcp: open search socket: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// Some servers send to the MAC in the packet and not to everybody.
	if err := conn.SetPromiscuous(true); err != nil {
		s.log.Debug("search cannot listen promiscuously", "error", err)
	}
	var mac pxe.MAC
	var xid dhcpv4.TransactionID
	rand.Read(mac[:]) // never fails (crypto/rand)
	rand.Read(xid[:])
	mac[0] = mac[0]&^1 | 2 // one station, locally administered
	all := &packet.Addr{HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}}
	for _, class := range []string{pxe.VendorPXE, pxe.VendorHTTP} {
		if _, err := conn.WriteTo(frame(mac, discover(mac, xid, class)), all); err != nil {
			return nil, fmt.Errorf("dhcp: send search: %w", err)
		}
	}
	if err := conn.SetReadDeadline(time.Now().Add(s.cfg.WatchWait)); err != nil {
		return nil, fmt.Errorf("dhcp: search: %w", err)
	}
	byIP := map[netip.Addr]foreign{}
	buf := make([]byte, 2048)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			break // the deadline
		}
		f, ok := parseOffer(buf[:n], mac, xid)
		if !ok || s.own(f.ip) || len(byIP) >= 16 {
			continue
		}
		o := byIP[f.ip]
		byIP[f.ip] = foreign{ip: f.ip, mac: f.mac, leases: f.leases || o.leases, boots: f.boots || o.boots}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	out := make([]foreign, 0, len(byIP))
	for _, f := range byIP {
		out = append(out, f)
	}
	sortForeign(out)
	return out, nil
}

func sortForeign(f []foreign) {
	for i := range f {
		for j := i; j > 0 && f[j].ip.Less(f[j-1].ip); j-- {
			f[j], f[j-1] = f[j-1], f[j]
		}
	}
}

// discover is what firmware would send.
func discover(mac pxe.MAC, xid dhcpv4.TransactionID, class string) []byte {
	arch, name := []byte{0, byte(pxe.ArchEFIX64)}, class+":Arch:00007:UNDI:003001"
	if class == pxe.VendorHTTP {
		arch, name = []byte{0, byte(pxe.ArchHTTPX64)}, class+":Arch:00016:UNDI:003001"
	}
	p := &dhcpv4.DHCPv4{OpCode: dhcpv4.OpcodeBootRequest, HWType: iana.HWTypeEthernet, ClientHWAddr: mac[:], TransactionID: xid,
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero, Flags: 0x8000,
		Options: dhcpv4.Options{
			dhcpv4.OptionDHCPMessageType.Code():                  {byte(pxe.Discover)},
			dhcpv4.OptionClassIdentifier.Code():                  []byte(name),
			dhcpv4.OptionClientSystemArchitectureType.Code():     arch,
			dhcpv4.OptionClientNetworkInterfaceIdentifier.Code(): {1, 3, 1},
			dhcpv4.OptionParameterRequestList.Code():             {1, 3, 6, 43, 54, 60, 66, 67},
		}}
	return p.ToBytes()
}

// frame wraps a client's payload in UDP, IPv4 and Ethernet.
func frame(mac pxe.MAC, payload []byte) []byte {
	b := make([]byte, 0, 42+len(payload))
	b = append(b, 255, 255, 255, 255, 255, 255)
	b = append(b, mac[:]...)
	b = binary.BigEndian.AppendUint16(b, etherIPv4)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255}
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(payload)))
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	b = append(b, ip...)
	b = binary.BigEndian.AppendUint16(b, 68)
	b = binary.BigEndian.AppendUint16(b, 67)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	b = append(b, 0, 0) // no UDP checksum (RFC 768)
	return append(b, payload...)
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// parseOffer reads an Ethernet frame and returns the server behind it if it
// is an answer to our search.
func parseOffer(b []byte, mac pxe.MAC, xid dhcpv4.TransactionID) (foreign, bool) {
	const eth = 14
	if len(b) < eth+20 || binary.BigEndian.Uint16(b[12:]) != etherIPv4 {
		return foreign{}, false
	}
	from, ip := pxe.MAC(b[6:12]), b[eth:]
	ihl := int(ip[0]&15) * 4
	// Fragments (other than a lone first one) are no DHCP.
	if ip[0]>>4 != 4 || ihl < 20 || len(ip) < ihl+8 || ip[9] != 17 || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return foreign{}, false
	}
	src, udp := netip.AddrFrom4([4]byte(ip[12:16])), ip[ihl:]
	if binary.BigEndian.Uint16(udp[2:]) != 68 {
		return foreign{}, false
	}
	p, err := dhcpv4.FromBytes(udp[8:])
	if err != nil || p.OpCode != dhcpv4.OpcodeBootReply || p.TransactionID != xid || len(p.ClientHWAddr) != 6 || pxe.MAC(p.ClientHWAddr) != mac {
		return foreign{}, false
	}
	f := foreign{ip: src, mac: from}
	if id := addr(p.Options[dhcpv4.OptionServerIdentifier.Code()]); id.IsValid() {
		f.ip = id
	}
	class := string(p.Options[dhcpv4.OptionClassIdentifier.Code()])
	f.leases = addr(p.YourIPAddr).IsValid()
	f.boots = p.BootFileName != "" || len(p.Options[dhcpv4.OptionBootfileName.Code()]) > 0 ||
		strings.HasPrefix(class, pxe.VendorPXE) || strings.HasPrefix(class, pxe.VendorHTTP)
	return f, true
}
