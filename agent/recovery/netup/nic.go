package netup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/internal/sleep"
)

// run serves one interface until ctx ends or the kernel refuses something.
func (m *Manager) run(ctx context.Context, n *nic) error {
	link, err := netlink.LinkByIndex(m.get(n).Index)
	if err != nil {
		return fmt.Errorf("netup: find interface: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("netup: bring up %s: %w", link.Attrs().Name, err)
	}
	m.set(n, func(s *NIC) { s.Phase, s.Detail = NoLink, "" })
	// After a restart the carrier message was consumed long ago.
	up := false
	if l, err := netlink.LinkByIndex(link.Attrs().Index); err == nil {
		up = carrier(l.Attrs())
	}
	for {
		for !up {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case up = <-n.carrier:
			}
		}
		if err := m.whileUp(ctx, n); err != nil {
			return err
		}
		up = false
		// The address stays: a flapping cable must not end connections.
		m.set(n, func(s *NIC) { s.Phase, s.Detail, s.Attempts = NoLink, "", 0 })
	}
}

// whileUp configures the interface until its carrier is lost (nil) or an
// error occurs.
func (m *Manager) whileUp(ctx context.Context, n *nic) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				ended <- fmt.Errorf("netup: configure interface: panic: %v", r)
			}
		}()
		ended <- m.configure(ctx, n)
	}()
	for {
		select {
		case err := <-ended:
			if err == nil {
				err = errors.New("netup: configuration ended")
			}
			return err
		case up := <-n.carrier:
			if !up {
				cancel()
				<-ended
				return nil
			}
		}
	}
}

// configure sets the address as site.json says, or by DHCP. A MAC in
// site.json narrows the static address and the VLAN to that interface; the
// others run plain DHCP, so that a typo there leaves a machine reachable.
func (m *Manager) configure(ctx context.Context, n *nic) error {
	s := m.get(n)
	site := m.cfg.Network
	device := s.Name
	if site.MAC == "" || strings.EqualFold(site.MAC, s.MAC) {
		if site.VLAN > 0 {
			d, err := m.vlan(s.Name, site.VLAN)
			if err != nil {
				return err
			}
			device = d
		}
		m.set(n, func(s *NIC) { s.Device = device })
		if site.Address != "" {
			return m.static(ctx, n, device)
		}
	}
	return m.dynamic(ctx, n, device)
}

func (m *Manager) static(ctx context.Context, n *nic, device string) error {
	p, err := netip.ParsePrefix(m.cfg.Network.Address)
	if err != nil {
		return fmt.Errorf("netup: read static address: %w", err)
	}
	l := Lease{Address: p, DNS: parseAddrs(m.cfg.Network.DNS)}
	if g, err := netip.ParseAddr(m.cfg.Network.Gateway); err == nil {
		l.Router = g
	}
	if err := apply(device, l); err != nil {
		return err
	}
	m.use(n, l)
	<-ctx.Done()
	return ctx.Err()
}

// dynamic gets a lease, holds it, and starts over when it is lost. It ends
// only with ctx or when the kernel refuses an address.
func (m *Manager) dynamic(ctx context.Context, n *nic, device string) error {
	for ctx.Err() == nil {
		m.set(n, func(s *NIC) { s.Phase, s.Attempts = Asking, 0 })
		lease, offer, err := m.acquire(ctx, n, device)
		if err != nil {
			return err
		}
		if err := apply(device, lease); err != nil {
			return err
		}
		m.use(n, lease)
		renew := func(ctx context.Context) (Lease, error) { return renewLease(ctx, device, offer, lease) }
		lost := hold(ctx, lease, renew, func(l Lease) error {
			lease = l
			if err := apply(device, l); err != nil {
				return err
			}
			m.use(n, l)
			return nil
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		m.log.Info("lease lost", "nic", device, "err", lost)
		if err := clearAddresses(device); err != nil {
			return err
		}
		m.set(n, func(s *NIC) {
			s.Address, s.Router, s.DNS, s.Detail = netip.Prefix{}, netip.Addr{}, nil, firstLine(lost)
		})
	}
	return ctx.Err()
}

func (m *Manager) use(n *nic, l Lease) {
	m.log.Info("address set", "nic", m.get(n).Device, "address", l.Address, "router", l.Router, "lease", l.For)
	m.set(n, func(s *NIC) {
		s.Phase, s.Detail, s.Attempts = Up, "", 0
		s.Address, s.Router, s.DNS = l.Address, l.Router, l.DNS
	})
}

// roundTimeout is how long the first message of a round waits; each repeat
// waits twice as long, so a round of silence lasts 6 s. Then comes a pause of
// at most 5 s: a switch port may open at any moment.
const (
	roundTimeout = 2 * time.Second
	roundTries   = 2
)

// acquire asks until a usable lease is granted. A server whose offer is
// unusable, or that offers and then refuses, is passed over in favour of
// others: on an open LAN it may be anyone's.
func (m *Manager) acquire(ctx context.Context, n *nic, device string) (Lease, *nclient4.Lease, error) {
	wait := agent.Backoff{First: 500 * time.Millisecond, Most: 5 * time.Second}
	avoid := map[netip.Addr]bool{}
	for {
		lease, raw, from, err := ask(ctx, device, avoid)
		if err == nil {
			return lease, raw, nil
		}
		if ctx.Err() != nil {
			return Lease{}, nil, ctx.Err()
		}
		if from.IsValid() && len(avoid) < 16 {
			avoid[from] = true
		} else {
			clear(avoid) // nobody else is there: give them another chance
		}
		m.log.Debug("no lease", "nic", device, "err", err)
		m.set(n, func(s *NIC) { s.Attempts++; s.Detail = reason(err) })
		_ = sleep.For(ctx, wait.Next(rand.Float64()))
	}
}

// reason shortens an error for the screen; silence is no error there.
func reason(err error) string {
	if errors.Is(err, nclient4.ErrNoResponse) || errors.Is(err, context.DeadlineExceeded) {
		return ""
	}
	return firstLine(err)
}

// ask makes one round of discover, offer, request, acknowledge. from is the
// server to blame when the round fails after its offer.
func ask(ctx context.Context, device string, avoid map[netip.Addr]bool) (l Lease, raw *nclient4.Lease, from netip.Addr, err error) {
	c, err := nclient4.New(device, nclient4.WithTimeout(roundTimeout), nclient4.WithRetry(roundTries))
	if err != nil {
		return l, nil, from, fmt.Errorf("netup: open DHCP client on %s: %w", device, err)
	}
	defer c.Close()
	discover, err := dhcpv4.NewDiscovery(c.InterfaceAddr(), wants()...)
	if err != nil {
		return l, nil, from, fmt.Errorf("netup: make discover: %w", err)
	}
	// unusable is written and read by this goroutine: SendAndRead calls the
	// matcher from the caller's.
	var unusable error
	usable := func(p *dhcpv4.DHCPv4) bool {
		o, err := leaseOf(p)
		if err != nil {
			unusable = err
		}
		return err == nil && !avoid[o.Server]
	}
	offer, err := c.SendAndRead(ctx, nclient4.DefaultServers, discover,
		nclient4.IsAll(nclient4.IsMessageType(dhcpv4.MessageTypeOffer), usable))
	if err != nil {
		if unusable != nil {
			err = fmt.Errorf("offer not usable: %w", unusable)
		}
		return l, nil, from, err
	}
	o, _ := leaseOf(offer)
	raw, err = c.RequestFromOffer(ctx, offer, wants()...)
	if err != nil {
		return l, nil, o.Server, fmt.Errorf("netup: request %s from %s: %w", o.Address.Addr(), o.Server, err)
	}
	l, err = leaseOf(raw.ACK)
	if err != nil {
		return l, nil, o.Server, err
	}
	return l, raw, from, nil
}

// wants lists the options we use, and says who is asking.
func wants() []dhcpv4.Modifier {
	return []dhcpv4.Modifier{
		dhcpv4.WithOption(dhcpv4.OptParameterRequestList(
			dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer)),
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier("muster-node")),
	}
}

// errRefused: the server said that the address is no longer ours.
var errRefused = errors.New("netup: renew lease: server refused")

// renewLease asks for more time. Servers may leave options out of a renewal
// that they gave in the offer: then the old values stay.
func renewLease(ctx context.Context, device string, raw *nclient4.Lease, old Lease) (Lease, error) {
	c, err := nclient4.New(device, nclient4.WithTimeout(roundTimeout), nclient4.WithRetry(roundTries))
	if err != nil {
		return Lease{}, fmt.Errorf("netup: open DHCP client on %s: %w", device, err)
	}
	defer c.Close()
	r, err := c.Renew(ctx, raw, wants()...)
	var nak *nclient4.ErrNak
	if errors.As(err, &nak) {
		return Lease{}, errRefused
	}
	if err != nil {
		return Lease{}, fmt.Errorf("netup: renew lease: %w", err)
	}
	l, err := leaseOf(r.ACK)
	if err != nil {
		l = old
	}
	return l, nil
}

// hold renews at half the lease time and then ever more often until it
// expires (RFC 2131 section 4.4.5; renewals are broadcast, so that T2 needs
// no case of its own). It returns why the lease was lost.
func hold(ctx context.Context, l Lease, renew func(context.Context) (Lease, error), renewed func(Lease) error) error {
	expires := time.Now().Add(l.For)
	wait := l.For / 2
	for {
		_ = sleep.For(ctx, wait)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		next, err := renew(ctx)
		switch {
		case err == nil:
			if err := renewed(next); err != nil {
				return err
			}
			l, expires = next, time.Now().Add(next.For)
			wait = l.For / 2
			continue
		case errors.Is(err, errRefused):
			return err
		}
		left := time.Until(expires)
		if left <= 0 {
			return fmt.Errorf("netup: lease of %s ended: %w", l.Address, err)
		}
		wait = min(max(left/2, 10*time.Second), left)
	}
}

// vlan makes the tagged interface on top of parent, once.
func (m *Manager) vlan(parent string, id int) (string, error) {
	name := fmt.Sprintf("%.10s.%d", parent, id) // names have at most 15 bytes
	if m.cfg.NeedModule != nil {
		if err := m.cfg.NeedModule("8021q"); err != nil {
			m.log.Warn("VLAN module", "err", err)
		}
	}
	p, err := netlink.LinkByName(parent)
	if err != nil {
		return "", fmt.Errorf("netup: find %s: %w", parent, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex = name, p.Attrs().Index
		l = &netlink.Vlan{LinkAttrs: attrs, VlanId: id}
		if err := netlink.LinkAdd(l); err != nil {
			return "", fmt.Errorf("netup: make VLAN %d on %s: %w", id, parent, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return "", fmt.Errorf("netup: bring up %s: %w", name, err)
	}
	return name, nil
}

func parseAddrs(in []string) []netip.Addr {
	var out []netip.Addr
	for _, s := range in {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}
