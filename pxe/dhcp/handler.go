package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/pxe"
)

// datagram is what goes out.
type datagram struct {
	data []byte
	to   netip.AddrPort
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// handle turns one datagram into at most one reply. It returns nil for
// silence. It touches no socket, but may wait for the disk and for an ARP
// probe.
func (s *Server) handle(ctx context.Context, b []byte, from netip.AddrPort, port pxe.Port) *datagram {
	now := s.cfg.Now()
	p, req, err := Parse(b, port)
	if err != nil {
		if !errors.Is(err, errNotRequest) {
			s.log.Debug("packet is not understood", "from", from, "error", err)
		}
		return nil
	}
	if !s.limit.allow(now, req.MAC) {
		s.drops.Add(1)
		return nil
	}
	if req.Gateway.IsValid() && !s.trusted(req.Gateway) {
		s.log.Debug("relay is not in a served network", "mac", req.MAC, "relay", req.Gateway)
		return nil
	}
	if port == pxe.PortBINL && !s.trusted(from.Addr()) {
		return nil
	}
	if port == pxe.PortDHCP && req.Type == pxe.Ask && req.ServerID.IsValid() && !s.own(req.ServerID) {
		// Somebody takes a lease from another server. In full mode that
		// server must not be here; this packet proves nothing, so look.
		if s.cfg.Mode == pxe.ModeFull {
			s.withdraw(req)
			s.lookNow()
		}
		return nil
	}
	known := s.cfg.Decider.Known(req.MAC)
	if asks := req.Type == pxe.Discover || req.Type == pxe.Ask; asks && !known && s.leases != nil && !s.holds(req.MAC, false) && !s.crowd.admit(now, req.Gateway, p.Options[82]) {
		s.turnedAway(now)
		return nil
	}
	rep := s.cfg.Decider.Decide(ctx, now, req, s.Stopped())
	var a *answer
	switch rep.Verb {
	case pxe.OfferBoot:
		a = &answer{kind: pxe.Offer, server: s.cfg.Server, boot: &rep.Boot}
	case pxe.AckBoot:
		a = &answer{kind: pxe.Ack, server: s.cfg.Server, boot: &rep.Boot}
	case pxe.Lease, pxe.LeaseBoot:
		if s.leases == nil {
			return nil
		}
		a = s.lease(ctx, now, req, rep, known)
	}
	if a == nil {
		return nil
	}
	out, err := build(p, *a)
	if err != nil {
		s.log.Warn("no reply fits the client", "mac", req.MAC, "error", err)
		return nil
	}
	s.cfg.Decider.Answered(now, req, rep, a.kind, a.yours)
	return &datagram{data: out, to: destination(req, from, a.kind)}
}

// destination follows RFC 2131 section 4.1. Unicast to an address the client
// does not hold yet needs an ARP entry that a UDP socket cannot make, so such
// replies are broadcast.
func destination(req pxe.Request, from netip.AddrPort, kind pxe.MessageType) netip.AddrPort {
	switch {
	case req.Port == pxe.PortBINL:
		return from
	case req.Gateway.IsValid():
		return netip.AddrPortFrom(req.Gateway, uint16(pxe.PortDHCP))
	case kind == pxe.Ack && req.Client.IsValid():
		return netip.AddrPortFrom(req.Client, 68)
	}
	return netip.AddrPortFrom(broadcast, 68)
}

func (s *Server) own(a netip.Addr) bool {
	if a == s.cfg.Server {
		return true
	}
	for _, o := range s.cfg.Own {
		if o == a {
			return true
		}
	}
	return false
}

// trusted reports whether packets may be sent to a on a claim alone: only
// networks that we serve, so that nobody uses us to hit a third party.
func (s *Server) trusted(a netip.Addr) bool {
	if s.local.Contains(a) {
		return true
	}
	for _, p := range s.cfg.Pools {
		if p.Subnet.Contains(a) {
			return true
		}
	}
	for _, p := range s.cfg.Relays {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// pool picks the range for req: the relay's network, else where the client
// says it is, else the interface's own.
func (s *Server) pool(req pxe.Request) *Pool {
	at := req.Gateway
	if !at.IsValid() {
		at = req.Client
	}
	if !at.IsValid() {
		return &s.cfg.Pools[0]
	}
	for i := range s.cfg.Pools {
		if s.cfg.Pools[i].Subnet.Contains(at) {
			return &s.cfg.Pools[i]
		}
	}
	if req.Gateway.IsValid() {
		return nil
	}
	return &s.cfg.Pools[0]
}

// lease applies the DHCP rules of RFC 2131 section 4.3.
func (s *Server) lease(ctx context.Context, now time.Time, req pxe.Request, rep pxe.Reply, known bool) *answer {
	p := s.pool(req)
	if p == nil {
		s.log.Debug("no range for this relay", "mac", req.MAC, "relay", req.Gateway)
		return nil
	}
	a := &answer{server: s.cfg.Server, pool: p, lease: s.cfg.LeaseTime}
	if rep.Verb == pxe.LeaseBoot {
		a.boot, a.lease = &rep.Boot, s.cfg.BootLeaseTime
	}
	a.lease = s.leaseTime(now, p, known, a.lease)
	switch req.Type {
	case pxe.Discover:
		ip := s.offer(ctx, now, req, p, known)
		if !ip.IsValid() {
			return nil
		}
		a.kind, a.yours = pxe.Offer, ip
		return a
	case pxe.Ask:
		return s.ask(now, req, p, a, known)
	case pxe.Inform:
		if !req.Client.IsValid() || !p.Subnet.Contains(req.Client) {
			return nil
		}
		a.kind, a.lease = pxe.Ack, 0
		return a
	case pxe.Decline:
		s.decline(now, req, p)
	case pxe.Release:
		s.release(req, p)
	}
	return nil
}

// offer promises an address that nobody answers for.
func (s *Server) offer(ctx context.Context, now time.Time, req pxe.Request, p *Pool, friend bool) netip.Addr {
	for range 8 {
		s.mu.Lock()
		ip, known, ok := s.leases.pick(now, req.MAC, req.RequestedIP, p, offerHold, friend)
		_, left := s.leases.count(now, p)
		s.mu.Unlock()
		if !ok {
			s.full(now, req.MAC, p, left)
			return netip.Addr{}
		}
		// Beyond a relay there is no ARP.
		if known || req.Gateway.IsValid() {
			return ip
		}
		other, used := s.probe.inUse(ctx, ip)
		if !used || other == req.MAC {
			return ip
		}
		s.mu.Lock()
		s.leases.bar(ip, now.Add(declineTime))
		s.mu.Unlock()
		s.log.Warn("address is in use by somebody who did not ask us", "address", ip, "mac", other)
	}
	return netip.Addr{}
}

// ask handles DHCPREQUEST, RFC 2131 section 4.3.2. a is the ACK to fill in.
func (s *Server) ask(now time.Time, req pxe.Request, p *Pool, a *answer, known bool) *answer {
	nak := func(why string) *answer {
		return &answer{kind: pxe.Nak, server: s.cfg.Server, message: why}
	}
	s.mu.Lock()
	l, has := s.leases.of(req.MAC, p)
	var ip netip.Addr
	var no *answer
	switch {
	case req.ServerID.IsValid(): // SELECTING: it chose us
		ip = req.RequestedIP
		if !ip.IsValid() || !s.leases.usable(now, req.MAC, ip, p) || has && l.IP != ip && now.Before(l.Expires) {
			ip, no = netip.Addr{}, nak("that address was not offered to you")
		}
	case !req.Client.IsValid() && req.RequestedIP.IsValid(): // INIT-REBOOT
		switch {
		case !p.Subnet.Contains(req.RequestedIP):
			no = nak("wrong network")
		case !has || !l.Bound:
			// No record: the RFC demands silence.
		case l.IP != req.RequestedIP || !s.leases.usable(now, req.MAC, l.IP, p):
			no = nak("that address is not yours")
		default:
			ip = l.IP
		}
	case req.Client.IsValid(): // RENEWING, REBINDING
		switch {
		case !p.Subnet.Contains(req.Client):
			no = nak("wrong network")
		case has && l.IP != req.Client:
			no = nak("that address is not yours")
		case s.leases.usable(now, req.MAC, req.Client, p):
			// Ours, or one we forgot and nobody else has.
			ip = req.Client
		case p.contains(req.Client):
			no = nak("that address is not yours")
		}
	}
	if ip.IsValid() && !known && !(has && l.IP == ip) {
		// Without a promise a stranger gets no more than by asking for one.
		if room, _ := s.leases.count(now, p); room <= 0 {
			ip = netip.Addr{}
		}
	}
	if !ip.IsValid() {
		s.mu.Unlock()
		return no
	}
	l = Lease{MAC: req.MAC, IP: ip, Expires: now.Add(a.lease), Bound: true, Known: known}
	s.leases.set(l)
	s.mu.Unlock()
	// On the disk before the client hears of it.
	if err := s.journal.commit(record{recordBound, l.MAC, l.IP, l.Expires}); err != nil {
		s.log.Error("lease is not granted since it cannot be recorded", "mac", req.MAC, "address", ip, "error", err)
		return nil
	}
	a.kind, a.yours = pxe.Ack, ip
	return a
}

// decline bars the address a client found in use (RFC 2131 section 4.3.3).
func (s *Server) decline(now time.Time, req pxe.Request, p *Pool) {
	s.mu.Lock()
	l, has := s.leases.of(req.MAC, p)
	ok := has && s.own(req.ServerID) && l.IP == req.RequestedIP
	until := now.Add(declineTime)
	if ok {
		s.leases.bar(l.IP, until)
	}
	s.mu.Unlock()
	if !ok {
		return
	}
	s.cfg.Decider.Event(pxe.Event{Time: now, MAC: req.MAC, Addr: l.IP, Alarm: true,
		Text: "says the address is in use by another machine; it is barred for " + declineTime.String()})
	if err := s.journal.commit(record{recordDeclined, req.MAC, l.IP, until}); err != nil {
		s.log.Error("declined address is not recorded", "address", l.IP, "error", err)
	}
}

// release takes an address back (RFC 2131 section 4.3.4).
func (s *Server) release(req pxe.Request, p *Pool) {
	s.mu.Lock()
	l, has := s.leases.of(req.MAC, p)
	ok := has && s.own(req.ServerID) && l.IP == req.Client
	if ok {
		s.leases.free(l.IP)
	}
	s.mu.Unlock()
	if !ok {
		return
	}
	if err := s.journal.commit(record{recordReleased, l.MAC, l.IP, l.Expires}); err != nil {
		s.log.Error("released address is not recorded", "address", l.IP, "error", err)
	}
}

// withdraw ends a promise to a client that took another server's.
func (s *Server) withdraw(req pxe.Request) {
	p := s.pool(req)
	if p == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.leases.of(req.MAC, p); ok && !l.Bound {
		s.leases.free(l.IP)
	}
}

// lookNow asks the watch to search at once.
func (s *Server) lookNow() {
	select {
	case s.hint <- struct{}{}:
	default:
	}
}
