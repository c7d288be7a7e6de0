package mdns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

const port = 5353

var (
	group4 = netip.AddrPortFrom(netip.AddrFrom4([4]byte{224, 0, 0, 251}), port)
	group6 = netip.AddrPortFrom(netip.MustParseAddr("ff02::fb"), port)
)

// maxPackets is how many packets wait for the service at most.
const maxPackets = 512

// packet is what a reader hands on.
type packet struct {
	link *link
	from netip.AddrPort
	data []byte
}

// open makes the socket of one link and family. It is bound to the group, not
// to the wildcard address as net.ListenMulticastUDP does it: unicast answers
// to port 5353 then still reach the mDNS program that asked, such as avahi.
// One socket per link, because ff02::fb has a scope and because a link that
// goes away then closes one socket and touches no other.
func open(index int, v6 bool) (*net.UDPConn, error) {
	domain := unix.AF_INET
	if v6 {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_UDP)
	if err != nil {
		return nil, fmt.Errorf("mdns: open socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "mdns")
	defer f.Close() // FilePacketConn works on a copy
	set := func(level, name, value int) {
		if err == nil {
			if e := unix.SetsockoptInt(fd, level, name, value); e != nil {
				err = fmt.Errorf("mdns: set socket option %d/%d: %w", level, name, e)
			}
		}
	}
	// Both, because the programs beside us set one or the other.
	set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	set(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	set(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20) // not root: as much as is allowed
	}
	var addr unix.Sockaddr
	if v6 {
		set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
		set(unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
		set(unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255)
		set(unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 255)
		set(unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP, 1) // for programs on this host
		set(unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, index)
		if err == nil {
			err = unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP,
				&unix.IPv6Mreq{Multiaddr: group6.Addr().As16(), Interface: uint32(index)})
		}
		addr = &unix.SockaddrInet6{Port: port, ZoneId: uint32(index), Addr: group6.Addr().As16()}
	} else {
		mreq := &unix.IPMreqn{Multiaddr: group4.Addr().As4(), Ifindex: int32(index)}
		set(unix.IPPROTO_IP, unix.IP_RECVTTL, 1)
		set(unix.IPPROTO_IP, unix.IP_MULTICAST_TTL, 255)
		set(unix.IPPROTO_IP, unix.IP_TTL, 255)
		set(unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP, 1)
		set(unix.IPPROTO_IP, unix.IP_MULTICAST_ALL, 0) // only what this link's membership brings
		if err == nil {
			err = unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, mreq)
		}
		if err == nil {
			err = unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, mreq)
		}
		addr = &unix.SockaddrInet4{Port: port, Addr: group4.Addr().As4()}
	}
	if err == nil {
		err = unix.Bind(fd, addr)
	}
	if err != nil {
		return nil, fmt.Errorf("mdns: join group: %w", err)
	}
	pc, err := net.FilePacketConn(f)
	if err != nil {
		return nil, fmt.Errorf("mdns: open socket: %w", err)
	}
	conn, ok := pc.(*net.UDPConn)
	if !ok {
		pc.Close()
		return nil, errors.New("mdns: open socket: not UDP")
	}
	return conn, nil
}

// read hands packets on until the socket is closed. It never waits for the
// service: what does not fit is counted.
func (s *Service) read(l *link) {
	defer close(l.done)
	buf := make([]byte, maxPacket+1)
	oob := make([]byte, 256)
	var dropped uint32
	for {
		n, oobn, _, from, err := l.conn.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.c.sendErrors.Add(1) // an ICMP error to something we sent
			continue
		}
		// The zone in from is of a cache of net that interfaces which come
		// and go outdate; the link knows better.
		ip := from.Addr().Unmap().WithZone("")
		from = netip.AddrPortFrom(ip, from.Port())
		b := buf[:n]
		if s.lose != nil && s.lose(b) {
			continue
		}
		s.c.received.Add(1)
		ttl, ovfl := control(oob[:oobn])
		if ovfl != dropped {
			s.c.kernelDrops.Add(uint64(ovfl - dropped))
			dropped = ovfl
		}
		switch {
		case n > maxPacket:
			s.c.oversize.Add(1)
		case !l.onLink(ip):
			s.c.offLink.Add(1)
		case isResponse(b) && ttl != 255:
			s.c.hops.Add(1)
		case !concerns(b, s.label):
			s.c.noise.Add(1)
		default:
			select {
			case s.in <- packet{link: l, from: from, data: append([]byte(nil), b...)}:
			default:
				s.c.queueFull.Add(1)
			}
		}
	}
}

// control reads TTL or hop limit (0 if absent) and the kernel's drop count.
func control(oob []byte) (ttl int, dropped uint32) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, 0
	}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		v := binary.NativeEndian.Uint32(m.Data)
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TTL,
			m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_HOPLIMIT:
			ttl = int(v)
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_RXQ_OVFL:
			dropped = v
		}
	}
	return ttl, dropped
}
