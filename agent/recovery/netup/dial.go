package netup

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// viaTimeout is how long one interface may try before the next one does.
const viaTimeout = 10 * time.Second

// Dial connects to addr ("host:port"), trying interface after interface: one
// with a lease may still lead nowhere. The one that worked last is tried
// first. Names are resolved by the interface's own name servers (or those of
// site.json). A proxy is the caller's business.
func (m *Manager) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var errs []error
	for _, n := range m.candidates() {
		nctx, cancel := context.WithTimeout(ctx, viaTimeout)
		c, err := m.via(n).DialContext(nctx, network, addr)
		cancel()
		if err == nil {
			m.mu.Lock()
			m.good = n.Index
			m.mu.Unlock()
			return c, nil
		}
		errs = append(errs, fmt.Errorf("netup: by %s: %w", n.Device, err))
		if ctx.Err() != nil {
			return nil, errors.Join(errs...)
		}
	}
	// Without a lease the kernel may still have a way: IPv6 by router
	// advertisement, or the loopback.
	c, err := m.plain().DialContext(ctx, network, addr)
	if err != nil {
		return nil, errors.Join(append(errs, fmt.Errorf("netup: dial: %w", err))...)
	}
	return c, nil
}

// candidates are the interfaces that are up, the good one first.
func (m *Manager) candidates() []NIC {
	var out []NIC
	m.mu.Lock()
	good := m.good
	m.mu.Unlock()
	for _, n := range m.NICs() {
		switch {
		case n.Phase != Up:
		case n.Index == good:
			out = append([]NIC{n}, out...)
		default:
			out = append(out, n)
		}
	}
	return out
}

// via is a dialer whose sockets, the resolver's too, leave by one interface.
func (m *Manager) via(n NIC) *net.Dialer {
	bind := func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), n.Device) }); e != nil {
			return e
		}
		return err
	}
	d := &net.Dialer{Control: bind}
	d.Resolver = resolver(d, nameServers(m.cfg.Network, []NIC{n}))
	return d
}

func (m *Manager) plain() *net.Dialer {
	d := &net.Dialer{Timeout: viaTimeout}
	d.Resolver = resolver(d, nameServers(m.cfg.Network, m.NICs()))
	return d
}

// resolver asks the given servers in turn instead of those in a file.
func resolver(d *net.Dialer, servers []netip.Addr) *net.Resolver {
	plain := &net.Dialer{Control: d.Control}
	var next atomic.Uint32 // A and AAAA are asked in parallel
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			if len(servers) == 0 {
				return nil, errors.New("netup: resolve: no name server known")
			}
			s := servers[int(next.Add(1)-1)%len(servers)]
			return plain.DialContext(ctx, network, netip.AddrPortFrom(s, 53).String())
		},
	}
}
