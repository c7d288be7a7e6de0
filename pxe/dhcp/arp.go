package dhcp

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/packet"

	"github.com/muster-edge/muster/pxe"
)

// prober finds out whether an address is in use before it is offered
// (RFC 2131 section 2.2, with ARP in place of ping: hosts may not answer a
// ping, but they must answer ARP).
type prober interface {
	// inUse returns who answers for ip, if anybody does in time.
	inUse(ctx context.Context, ip netip.Addr) (pxe.MAC, bool)
	run(ctx context.Context) error
	close() error
}

// noProbe is for networks where ARP is of no use.
type noProbe struct{}

func (noProbe) inUse(context.Context, netip.Addr) (pxe.MAC, bool) { return pxe.MAC{}, false }
func (noProbe) run(context.Context) error                         { return nil }
func (noProbe) close() error                                      { return nil }

const (
	etherARP = 0x0806
	arpLen   = 28
)

// arpProber asks with sender address 0.0.0.0 (RFC 5227 section 2.1.1), which
// leaves no trace in anybody's ARP cache.
type arpProber struct {
	conn *packet.Conn
	mac  pxe.MAC
	wait time.Duration

	mu      sync.Mutex
	waiting map[netip.Addr][]chan pxe.MAC
}

func newARPProber(ifi *net.Interface, wait time.Duration) (*arpProber, error) {
	if len(ifi.HardwareAddr) != 6 {
		return nil, fmt.Errorf("dhcp: open ARP probe: %s is no Ethernet interface", ifi.Name)
	}
	conn, err := packet.Listen(ifi, packet.Datagram, etherARP, nil)
	if err != nil {
		return nil, fmt.Errorf("dhcp: open ARP probe on %s: %w", ifi.Name, err)
	}
	p := &arpProber{conn: conn, wait: wait, waiting: map[netip.Addr][]chan pxe.MAC{}}
	copy(p.mac[:], ifi.HardwareAddr)
	return p, nil
}

func (p *arpProber) close() error { return p.conn.Close() }

// run hands answers to those who wait for them.
func (p *arpProber) run(ctx context.Context) error {
	buf := make([]byte, 128)
	for {
		n, _, err := p.conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			// A link that is down answers nobody; the socket stays good.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(p.wait):
			}
			continue
		}
		mac, ip, ok := parseARP(buf[:n])
		if !ok || mac == p.mac {
			continue
		}
		p.mu.Lock()
		for _, c := range p.waiting[ip] {
			select {
			case c <- mac:
			default:
			}
		}
		p.mu.Unlock()
	}
}

func (p *arpProber) inUse(ctx context.Context, ip netip.Addr) (pxe.MAC, bool) {
	c := make(chan pxe.MAC, 1)
	p.mu.Lock()
	p.waiting[ip] = append(p.waiting[ip], c)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		l := p.waiting[ip]
		for i := range l {
			if l[i] == c {
				l = append(l[:i:i], l[i+1:]...)
				break
			}
		}
		if len(l) == 0 {
			delete(p.waiting, ip)
		} else {
			p.waiting[ip] = l
		}
	}()
	// Two tries: one frame may be lost.
	for range 2 {
		all := &packet.Addr{HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}}
		if _, err := p.conn.WriteTo(arpRequest(p.mac, ip), all); err != nil {
			return pxe.MAC{}, false
		}
		t := time.NewTimer(p.wait / 2)
		select {
		case mac := <-c:
			t.Stop()
			return mac, true
		case <-ctx.Done():
			t.Stop()
			return pxe.MAC{}, false
		case <-t.C:
		}
	}
	return pxe.MAC{}, false
}

// arpRequest is an ARP probe for ip (RFC 826, RFC 5227).
func arpRequest(mac pxe.MAC, ip netip.Addr) []byte {
	b := make([]byte, arpLen)
	binary.BigEndian.PutUint16(b[0:], 1)      // Ethernet
	binary.BigEndian.PutUint16(b[2:], 0x0800) // IPv4
	b[4], b[5] = 6, 4
	binary.BigEndian.PutUint16(b[6:], 1) // request
	copy(b[8:], mac[:])
	copy(b[24:], ip.AsSlice())
	return b
}

// parseARP returns the sender of an ARP packet, request or reply: both show
// that somebody uses the address. A probe's sender is 0.0.0.0 and not ok.
func parseARP(b []byte) (pxe.MAC, netip.Addr, bool) {
	if len(b) < arpLen || binary.BigEndian.Uint16(b) != 1 || binary.BigEndian.Uint16(b[2:]) != 0x0800 || b[4] != 6 || b[5] != 4 {
		return pxe.MAC{}, netip.Addr{}, false
	}
	ip := netip.AddrFrom4([4]byte(b[14:18]))
	return pxe.MAC(b[8:14]), ip, !ip.IsUnspecified()
}
