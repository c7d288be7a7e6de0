package dhcp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/pxe"
)

// socket is one UDP port on one interface.
type socket struct {
	port pxe.Port
	ifi  int
	conn *ipv4.PacketConn
}

// openSocket binds port on ifi alone. SO_REUSEADDR and SO_REUSEPORT stay off:
// with them a second server would start without a word and steal packets.
func openSocket(ifi *net.Interface, port pxe.Port) (*socket, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 0),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, ifi.Name),
			)
			// Room for a burst while this process does not run; where the
			// right to ask for more is missing the default does.
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
		})
		return errors.Join(cerr, err)
	}}
	// A plain context: opening does not wait.
	pc, err := lc.ListenPacket(context.Background(), "udp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return nil, fmt.Errorf("dhcp: open UDP port %d on %s: %w%s", port, ifi.Name, err, explain(err, int(port)))
	}
	k := &socket{port: port, ifi: ifi.Index, conn: ipv4.NewPacketConn(pc)}
	if err := k.conn.SetControlMessage(ipv4.FlagInterface|ipv4.FlagDst, true); err != nil {
		pc.Close()
		return nil, fmt.Errorf("dhcp: ask for packet information on port %d: %w", port, err)
	}
	return k, nil
}

func (k *socket) close() error { return k.conn.Close() }

// send lets p leave by the interface, from our address.
func (k *socket) send(p *datagram, from netip.Addr) error {
	cm := &ipv4.ControlMessage{Src: from.AsSlice(), IfIndex: k.ifi}
	_, err := k.conn.WriteTo(p.data, cm, net.UDPAddrFromAddrPort(p.to))
	return err
}

// job is one datagram waiting for a worker.
type job struct {
	sock *socket
	data []byte
	from netip.AddrPort
}

// read feeds the workers: machines that are known, or hold a lease, by a queue of their own,
// so that no flood stands before them. With all workers busy and the queue
// full a packet is dropped: clients repeat.
func (s *Server) read(ctx context.Context, k *socket, jobs, first chan<- job) error {
	buf := make([]byte, maxPacket+1)
	for {
		n, cm, src, err := k.conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			// A link that goes down and comes back is no reason to end.
			if errors.Is(err, unix.ENETDOWN) {
				continue
			}
			return fmt.Errorf("dhcp: read from port %d: %w", k.port, err)
		}
		u, ok := src.(*net.UDPAddr)
		if !ok || n > maxPacket || cm == nil || cm.IfIndex != k.ifi {
			continue
		}
		from := netip.AddrPortFrom(u.AddrPort().Addr().Unmap(), u.AddrPort().Port())
		to := jobs
		if s.familiar(buf[:n]) {
			to = first
		}
		select {
		case to <- job{sock: k, data: append([]byte(nil), buf[:n]...), from: from}:
		default:
			s.drops.Add(1)
		}
	}
}

func (s *Server) serve(ctx context.Context, j job) {
	p := s.handle(ctx, j.data, j.from, j.sock.port)
	if p == nil {
		return
	}
	if err := j.sock.send(p, s.cfg.Server); err != nil && ctx.Err() == nil {
		s.log.Warn("reply is not sent", "to", p.to, "error", err)
	}
}

// explain names the program that has the port, where the system tells.
func explain(err error, port int) string {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return " (ports below 1024 and binding to an interface need root or CAP_NET_BIND_SERVICE and CAP_NET_RAW)"
	case !errors.Is(err, unix.EADDRINUSE):
		return ""
	}
	if name := portOwner(port); name != "" {
		return fmt.Sprintf(" (the port is held by %s: stop it, or let it serve and use proxy mode on another host)", name)
	}
	if port == int(pxe.PortDHCP) {
		return " (another DHCP server runs on this host: likely dnsmasq, dhcpd, kea, systemd-networkd or libvirt)"
	}
	return " (another PXE server runs on this host: likely dnsmasq)"
}

// portOwner finds the program with a UDP socket on port, "" if unknown.
func portOwner(port int) string {
	inodes := udpInodes(port)
	if len(inodes) == 0 {
		return ""
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		t, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(t, "socket:[") {
			continue
		}
		if inodes[strings.TrimSuffix(strings.TrimPrefix(t, "socket:["), "]")] {
			pid := strings.Split(fd, "/")[2]
			name, err := os.ReadFile("/proc/" + pid + "/comm")
			if err != nil {
				continue
			}
			if pid == strconv.Itoa(os.Getpid()) {
				return "this program itself"
			}
			return fmt.Sprintf("%s, process %s", strings.TrimSpace(string(name)), pid)
		}
	}
	return ""
}

// udpInodes reads the inodes of UDP sockets on port from /proc/net/udp.
func udpInodes(port int) map[string]bool {
	out := map[string]bool{}
	for _, path := range []string{"/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"} {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			col := strings.Fields(sc.Text())
			if len(col) > 9 && strings.HasSuffix(col[1], fmt.Sprintf(":%04X", port)) {
				out[col[9]] = true
			}
		}
		f.Close()
	}
	return out
}
