package netlab

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Raw sends Ethernet frames with any content: the attacker's socket.
type Raw struct {
	fd, ifi int
	mac     net.HardwareAddr
	// To is the Ethernet destination of Send, broadcast by default: every
	// station takes it up, and IP sorts out the rest.
	To net.HardwareAddr
}

// RawUDP opens a raw socket on an interface of the calling thread's namespace.
func RawUDP(iface string) (*Raw, error) {
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &Raw{fd: fd, ifi: ifi.Index, mac: ifi.HardwareAddr, To: net.HardwareAddr{255, 255, 255, 255, 255, 255}}, nil
}

// Close releases the socket.
func (r *Raw) Close() error { return unix.Close(r.fd) }

// Frame sends b as it is.
func (r *Raw) Frame(b []byte) error {
	return unix.Sendto(r.fd, b, 0, &unix.SockaddrLinklayer{Ifindex: r.ifi, Halen: 6})
}

// Send sends a UDP datagram that claims any source.
func (r *Raw) Send(from, to netip.AddrPort, payload []byte) error {
	return r.Frame(UDPFrame(r.mac, r.To, from, to, payload))
}

// UDPFrame is a datagram with its IPv4 and Ethernet headers. It carries no UDP
// checksum, which IPv4 allows.
func UDPFrame(src, dst net.HardwareAddr, from, to netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 0, 42+len(payload))
	b = append(append(b, dst...), src...)
	b = append(b, 8, 0, 0x45, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(28+len(payload)))
	b = append(b, 0, 0, 0, 0, 64, 17, 0, 0)
	b = append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	var sum uint32
	for i := 14; i < 34; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[24:], ^uint16(sum))
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}
