package mdns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/discovery"
)

const (
	// maxLinks bounds sockets: interface and family pairs.
	maxLinks = 32
	// maxKnown bounds the known answers of a link.
	maxKnown = 128
	// unicastBurst and unicastRate bound answers to single askers, per link.
	unicastBurst, unicastRate = 20, 20
)

// linkKey tells links apart; a name can come back with another index.
type linkKey struct {
	index int
	name  string
	v6    bool
}

// link is one interface and family. All but prefixes belongs to Run's
// goroutine.
type link struct {
	linkKey
	conn     *net.UDPConn
	write    func(b []byte, to netip.AddrPort) error
	done     chan struct{} // closed when the reader has ended
	prefixes atomic.Pointer[[]netip.Prefix]
	zone     zone

	queries, announce discovery.Schedule
	lastQuery         []byte // to know our own when it comes back
	known             []known
	multicast         time.Time // when our records were last multicast
	reply             reply
	unicasts          float64 // tokens
	unicastsAt        time.Time
}

// known is an advert heard on a link. Disputed: two addresses claim it, so it
// is not listed as a known answer; otherwise a forger could silence its owner.
type known struct {
	label    string
	from     netip.Addr
	expires  time.Time
	disputed bool
}

// reply is a multicast answer that waits for its time.
type reply struct {
	at        time.Time // zero: none
	asker     netip.Addr
	several   bool // askers
	questions []dns.Question
}

func (l *link) group() netip.AddrPort {
	if l.v6 {
		return group6
	}
	return group4
}

// onLink reports whether a source is a neighbour (RFC 6762 §11).
func (l *link) onLink(ip netip.Addr) bool {
	if ip.IsLinkLocalUnicast() {
		return true
	}
	for _, p := range *l.prefixes.Load() {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

func (l *link) own(ip netip.Addr) bool {
	for _, p := range *l.prefixes.Load() {
		if p.Addr() == ip {
			return true
		}
	}
	return false
}

// learn keeps known answers, and reports nothing: hints do that.
func (l *link) learn(now time.Time, a advert, from netip.Addr) {
	l.known = slices.DeleteFunc(l.known, func(k known) bool { return now.After(k.expires) })
	i := slices.IndexFunc(l.known, func(k known) bool { return k.label == a.label })
	switch {
	case i >= 0 && l.known[i].from != from:
		l.known[i].disputed = true
	case i >= 0 && a.ttl == 0:
		l.known = slices.Delete(l.known, i, i+1)
	case i >= 0:
		l.known[i].expires = now.Add(a.ttl)
	case a.ttl > 0 && len(l.known) < maxKnown:
		l.known = append(l.known, known{label: a.label, from: from, expires: now.Add(a.ttl)})
	}
}

// mayUnicast takes a token for an answer to a single asker.
func (l *link) mayUnicast(now time.Time) bool {
	if !l.unicastsAt.IsZero() {
		l.unicasts = min(unicastBurst, l.unicasts+now.Sub(l.unicastsAt).Seconds()*unicastRate)
	}
	l.unicastsAt = now
	if l.unicasts < 1 {
		return false
	}
	l.unicasts--
	return true
}

// rescan opens links that appeared, closes those that went, and announces
// anew where addresses changed (RFC 6762 §8.4).
func (s *Service) rescan(now time.Time) {
	ifaces, err := net.Interfaces()
	if err != nil {
		s.log.Warn("cannot list interfaces", "err", err)
		return
	}
	seen := map[linkKey]bool{}
	for _, ifi := range ifaces {
		const need = net.FlagUp | net.FlagRunning | net.FlagMulticast
		if ifi.Flags&need != need || ifi.Flags&(net.FlagLoopback|net.FlagPointToPoint) != 0 || !s.cfg.Use(ifi.Name) {
			continue
		}
		prefixes := addresses(ifi)
		for _, v6 := range []bool{false, true} {
			if !slices.ContainsFunc(prefixes, func(p netip.Prefix) bool {
				return p.Addr().Is4() != v6 && (!v6 || p.Addr().IsLinkLocalUnicast())
			}) {
				continue
			}
			k := linkKey{ifi.Index, ifi.Name, v6}
			if l := s.links[k]; l != nil {
				seen[k] = true
				if !slices.Equal(*l.prefixes.Load(), prefixes) {
					s.readdress(now, l, prefixes)
				}
			} else if len(s.links) < maxLinks {
				seen[k] = s.join(now, k, prefixes)
			}
		}
	}
	for k, l := range s.links {
		if !seen[k] {
			s.leave(l)
			s.log.Info("link left", "interface", k.name, "ipv6", k.v6)
		}
	}
}

func addresses(ifi net.Interface) []netip.Prefix {
	list, err := ifi.Addrs()
	if err != nil {
		return nil // it has just gone
	}
	var out []netip.Prefix
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

func (s *Service) join(now time.Time, k linkKey, prefixes []netip.Prefix) bool {
	conn, err := open(k.index, k.v6)
	if err != nil {
		s.c.openErrors.Add(1)
		s.log.Warn("cannot open link", "interface", k.name, "ipv6", k.v6, "err", err)
		return false
	}
	l := &link{linkKey: k, conn: conn, done: make(chan struct{}), unicasts: unicastBurst}
	l.write = func(b []byte, to netip.AddrPort) error {
		_, err := conn.WriteToUDPAddrPort(b, to)
		return err
	}
	l.queries = discovery.Queries(now, s.rng)
	s.readdress(now, l, prefixes)
	s.links[k] = l
	s.c.links.Add(1)
	go s.read(l)
	s.log.Info("link joined", "interface", k.name, "ipv6", k.v6)
	return true
}

// readdress takes the addresses of the link and announces them.
func (s *Service) readdress(now time.Time, l *link, prefixes []netip.Prefix) {
	l.prefixes.Store(&prefixes)
	var ips []netip.Addr
	for _, p := range prefixes {
		if len(ips) < 16 { // a packet's worth
			ips = append(ips, p.Addr())
		}
	}
	z, err := newZone(s.label, s.cfg.Port, s.cfg.Tag, ips)
	if err != nil {
		s.log.Warn("cannot advertise", "interface", l.name, "err", err)
		return
	}
	l.zone = z
	l.announce = discovery.Announcements(now, s.rng)
}

func (s *Service) leave(l *link) {
	l.conn.Close()
	<-l.done
	delete(s.links, l.linkKey)
	s.c.links.Add(-1)
}

// watch tells of changes of links and addresses until stop is called. It is
// the kernel's word (rtnetlink) that a look is worth it, no more: rescan reads
// the state itself.
func watch() (changed <-chan struct{}, stop func(), err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("mdns: watch links: %w", err)
	}
	f := os.NewFile(uintptr(fd), "rtnetlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK,
		Groups: unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR}); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("mdns: watch links: %w", err)
	}
	ch := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 1<<16)
		for {
			// ENOBUFS says that changes were lost: a reason to look as well.
			if _, err := f.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return // closed; should it be anything else, Config.Rescan goes on
			}
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}()
	return ch, func() { f.Close(); <-ended }, nil
}
