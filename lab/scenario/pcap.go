package scenario

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
)

// tlsSent is what one side of a TLS connection has sent.
type tlsSent struct {
	// hello: it began with a ClientHello.
	hello bool
	// data is the bytes of records that hold encrypted messages; in TLS 1.3
	// the end of a handshake and alerts, too.
	data int
}

// Caps of what is read of a capture.
const (
	maxPacket = 256 << 10
	maxFlows  = 4096
	maxFlow   = 16 << 20
)

// flow is one direction of a TCP connection: what was sent, by sequence
// number, counted from the SYN.
type flow struct {
	first    uint32 // sequence number of the first byte
	segments map[uint32][]byte
	bytes    int
}

// tlsSentTo reads a capture (libpcap format, Ethernet) and tells of every TCP
// connection to address and port what the caller sent. Connections whose
// beginning is not in it are left out.
func tlsSentTo(path, address string, port uint16) ([]tlsSent, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("scenario: read capture: %w", err)
	}
	defer f.Close()
	flows, err := tcpFlows(bufio.NewReader(f), netip.MustParseAddr(address), port)
	if err != nil {
		return nil, fmt.Errorf("scenario: read capture %s: %w", path, err)
	}
	var out []tlsSent
	for _, f := range flows {
		if stream := f.stream(); len(stream) > 0 {
			out = append(out, tlsRecords(stream))
		}
	}
	return out, nil
}

func tcpFlows(r io.Reader, to netip.Addr, port uint16) ([]*flow, error) {
	var head [24]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	var order binary.ByteOrder = binary.LittleEndian
	if binary.BigEndian.Uint32(head[:]) == 0xa1b2c3d4 {
		order = binary.BigEndian
	} else if binary.LittleEndian.Uint32(head[:]) != 0xa1b2c3d4 {
		return nil, errors.New("this is no capture")
	}
	var flows []*flow
	now := map[netip.AddrPort]*flow{} // a port may be used again
	for {
		var record [16]byte
		if _, err := io.ReadFull(r, record[:]); err != nil {
			// QEMU may be writing the last one.
			return flows, nil
		}
		n := order.Uint32(record[8:])
		if n > maxPacket {
			return nil, fmt.Errorf("a packet of %d bytes", n)
		}
		packet := make([]byte, n)
		if _, err := io.ReadFull(r, packet); err != nil {
			return flows, nil
		}
		from, s, ok := tcpSegment(packet, to, port)
		if !ok {
			continue
		}
		if s.syn {
			if old := now[from]; len(flows) < maxFlows && (old == nil || old.first != s.seq+1) {
				f := &flow{first: s.seq + 1, segments: map[uint32][]byte{}}
				now[from], flows = f, append(flows, f)
			}
			continue
		}
		if f := now[from]; f != nil && len(s.data) > 0 && f.bytes < maxFlow {
			f.bytes += len(s.data)
			if at := s.seq - f.first; len(s.data) > len(f.segments[at]) {
				f.segments[at] = s.data
			}
		}
	}
}

type segment struct {
	seq  uint32
	syn  bool
	data []byte
}

// tcpSegment takes an Ethernet frame apart (RFC 791, RFC 9293).
func tcpSegment(p []byte, to netip.Addr, port uint16) (netip.AddrPort, segment, bool) {
	var none netip.AddrPort
	if len(p) < 14+20 || binary.BigEndian.Uint16(p[12:]) != 0x0800 {
		return none, segment{}, false
	}
	ip := p[14:]
	ihl, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || ihl < 20 || total < ihl+20 || len(ip) < total || ip[9] != 6 || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 {
		return none, segment{}, false
	}
	if netip.AddrFrom4([4]byte(ip[16:20])) != to {
		return none, segment{}, false
	}
	tcp := ip[ihl:total]
	offset := int(tcp[12]>>4) * 4
	if offset < 20 || offset > len(tcp) || binary.BigEndian.Uint16(tcp[2:]) != port {
		return none, segment{}, false
	}
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[12:16])), binary.BigEndian.Uint16(tcp))
	return from, segment{binary.BigEndian.Uint32(tcp[4:]), tcp[13]&2 != 0, tcp[offset:]}, true
}

// stream puts the segments together, up to the first gap.
func (f *flow) stream() []byte {
	var at []uint32
	for seq := range f.segments {
		at = append(at, seq)
	}
	slices.Sort(at)
	var out []byte
	for _, seq := range at {
		data := f.segments[seq]
		if int(seq) > len(out) {
			break
		}
		if skip := len(out) - int(seq); skip < len(data) {
			out = append(out, data[skip:]...)
		}
	}
	return out
}

// tlsRecords counts what is in a stream of TLS records (RFC 8446, 5.1).
func tlsRecords(stream []byte) tlsSent {
	out := tlsSent{hello: len(stream) > 5 && stream[0] == 22 && stream[5] == 1}
	for len(stream) >= 5 {
		n := min(int(binary.BigEndian.Uint16(stream[3:])), len(stream)-5)
		if stream[0] == 23 {
			out.data += n
		}
		stream = stream[5+n:]
	}
	return out
}
