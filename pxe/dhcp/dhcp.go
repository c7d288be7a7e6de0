// Package dhcp speaks DHCP for package pxe: a small authoritative server with
// durable leases for provisioning networks (full mode) and a proxyDHCP server
// for ports 67 and 4011 beside the site's own server (proxy mode).
//
// It owns its sockets. They are bound to one interface, without SO_REUSEADDR
// and SO_REUSEPORT, so that a second server on the host is an error at start
// and not a silent race. Every reply leaves by the interface its request came
// in by. Who is answered is not decided here: see Decider.
package dhcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/pxe"
)

// Decider says what to do with each packet. Its methods are called from many
// goroutines.
type Decider interface {
	// Decide answers one packet. stopped is the reason why leasing has
	// stopped, "" if it has not.
	Decide(ctx context.Context, now time.Time, req pxe.Request, stopped string) pxe.Reply
	// Answered tells that a message of the given kind was sent to req's
	// machine, with the address leased or promised to it (invalid in proxy
	// mode).
	Answered(now time.Time, req pxe.Request, rep pxe.Reply, kind pxe.MessageType, ip netip.Addr)
	// Known reports whether a machine is one of the operator's. It is asked
	// for every packet, so it answers from memory.
	Known(mac pxe.MAC) bool
	// Event tells of something that concerns no single packet.
	Event(pxe.Event)
}

// Config says where and how to serve.
type Config struct {
	// Mode is full or proxy.
	Mode pxe.Mode
	// Interface is the name of the network interface to serve on.
	Interface string
	// Server is our address on it; by default its first IPv4 address.
	Server netip.Addr
	// Pools are the ranges to lease (full mode). The first is the
	// interface's own network, the others are reached through relays.
	Pools []Pool
	// Relays are the networks whose relay agents are answered, besides the
	// pools and the interface's own network.
	Relays []netip.Prefix
	// Leases is the path of the lease journal (full mode).
	Leases string
	// LeaseTime is for operating systems (1 h by default), BootLeaseTime for
	// firmware (10 min): boot storms must not use up the range.
	LeaseTime, BootLeaseTime time.Duration
	// ProbeWait is how long an ARP probe listens (200 ms by default). A
	// negative value switches probing off.
	ProbeWait time.Duration
	// WatchEvery is the pause between searches for foreign servers (2 min by
	// default), WatchWait how long each listens (3 s). A negative WatchEvery
	// switches the watch off.
	WatchEvery, WatchWait time.Duration
	// Own are further addresses of ours (VIPs): never an alarm.
	Own []netip.Addr
	// Decider is required.
	Decider Decider
	// Log is slog.Default() by default.
	Log *slog.Logger
	// Now is time.Now by default.
	Now func() time.Time
}

const (
	offerHold   = time.Minute
	declineTime = 10 * time.Minute
	workers     = 64
	queueLen    = 512
	// friends are workers that serve known machines only.
	friends = 16
	// healEvery is the pause between attempts to write a failed journal.
	healEvery = 2 * time.Second
)

func (c *Config) defaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.LeaseTime, time.Hour)
	set(&c.BootLeaseTime, 10*time.Minute)
	set(&c.ProbeWait, 200*time.Millisecond)
	set(&c.WatchEvery, 2*time.Minute)
	set(&c.WatchWait, 3*time.Second)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

func (c *Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("dhcp: config: "+format, args...)) }
	if c.Decider == nil {
		bad("Decider is missing")
	}
	if c.Interface == "" {
		bad("Interface is missing")
	}
	switch c.Mode {
	case pxe.ModeFull:
		if len(c.Pools) == 0 {
			bad("full mode needs a range of addresses")
		}
		if c.Leases == "" {
			bad("full mode needs a path for its leases")
		}
		for i, p := range c.Pools {
			if err := p.validate(); err != nil {
				errs = append(errs, err)
				continue
			}
			for _, q := range c.Pools[:i] {
				if q.Subnet.Overlaps(p.Subnet) {
					bad("pools %s and %s overlap", q.Subnet, p.Subnet)
				}
			}
		}
	case pxe.ModeProxy:
		if len(c.Pools) > 0 {
			bad("proxy mode leases nothing, but a range was given")
		}
	default:
		bad("mode %s cannot be served", c.Mode)
	}
	if c.LeaseTime < time.Minute || c.BootLeaseTime < time.Minute {
		bad("lease times below one minute are not served")
	}
	return errors.Join(errs...)
}

// Server is one DHCP or proxyDHCP server on one interface.
type Server struct {
	cfg   Config
	log   *slog.Logger
	ifi   *net.Interface
	local netip.Prefix

	socks   []*socket
	journal *journal
	probe   prober

	mu     sync.Mutex
	leases *table

	limit   *limiter
	crowd   *crowd
	stopped atomic.Pointer[string]
	// hint asks the watch to look now.
	hint  chan struct{}
	drops atomic.Int64
}

// New opens the lease journal and all sockets, so that what is wrong is said
// at once. Run serves; Close is for a server that is never run.
func New(cfg Config) (*Server, error) {
	cfg.defaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Log, limit: newLimiter(), crowd: newCrowd(), hint: make(chan struct{}, 1), probe: noProbe{}}
	if err := s.findInterface(); err != nil {
		return nil, err
	}
	if err := s.open(); err != nil {
		s.Close()
		return nil, err
	}
	if s.cfg.Mode == pxe.ModeFull && cfg.WatchEvery > 0 {
		s.setStopped("looking for other DHCP servers first")
	}
	return s, nil
}

// Server returns our address.
func (s *Server) Server() netip.Addr { return s.cfg.Server }

// Subnet returns the network of the interface.
func (s *Server) Subnet() netip.Prefix { return s.local }

func (s *Server) findInterface() error {
	ifi, err := net.InterfaceByName(s.cfg.Interface)
	if err != nil {
		return fmt.Errorf("dhcp: find interface %s: %w", s.cfg.Interface, err)
	}
	s.ifi = ifi
	addrs, err := ifi.Addrs()
	if err != nil {
		return fmt.Errorf("dhcp: read addresses of %s: %w", ifi.Name, err)
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !p.Addr().Is4() {
			continue
		}
		if !s.cfg.Server.IsValid() || s.cfg.Server == p.Addr() {
			s.cfg.Server, s.local = p.Addr(), p
			break
		}
	}
	if !s.local.IsValid() {
		if s.cfg.Server.IsValid() {
			return fmt.Errorf("dhcp: interface %s does not have the address %s", ifi.Name, s.cfg.Server)
		}
		return fmt.Errorf("dhcp: interface %s has no IPv4 address: give it one first", ifi.Name)
	}
	if s.cfg.Mode == pxe.ModeFull {
		if p := s.cfg.Pools[0]; p.Subnet.Masked() != s.local.Masked() {
			return fmt.Errorf("dhcp: the first range is in %s, but %s is in %s", p.Subnet.Masked(), ifi.Name, s.local.Masked())
		}
	}
	return nil
}

func (s *Server) open() error {
	if s.cfg.Mode == pxe.ModeFull {
		reserved := append([]netip.Addr{s.cfg.Server}, s.cfg.Own...)
		for _, p := range s.cfg.Pools {
			reserved = append(reserved, p.Router)
		}
		s.leases = newTable(s.cfg.Pools, reserved...)
		j, recs, dropped, err := openJournal(s.cfg.Leases)
		if err != nil {
			return err
		}
		s.journal = j
		for _, r := range recs {
			s.leases.apply(r)
		}
		if dropped > 0 {
			// The ARP probe guards the addresses that were forgotten.
			s.log.Warn("lease journal had a torn tail, which was cut off", "path", s.cfg.Leases, "bytes", dropped, "records", len(recs))
		}
		if s.cfg.ProbeWait > 0 {
			p, err := newARPProber(s.ifi, s.cfg.ProbeWait)
			if err != nil {
				return err
			}
			s.probe = p
		}
	}
	ports := []pxe.Port{pxe.PortDHCP}
	if s.cfg.Mode == pxe.ModeProxy {
		ports = append(ports, pxe.PortBINL)
	}
	for _, port := range ports {
		k, err := openSocket(s.ifi, port)
		if err != nil {
			return err
		}
		s.socks = append(s.socks, k)
	}
	return nil
}

// Close releases everything of a server that is not running.
func (s *Server) Close() error {
	var errs []error
	for _, k := range s.socks {
		errs = append(errs, k.close())
	}
	errs = append(errs, s.probe.close())
	if s.journal != nil {
		errs = append(errs, s.journal.close())
	}
	return errors.Join(errs...)
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	jobs, first := make(chan job, queueLen), make(chan job, queueLen)
	for _, k := range s.socks {
		g.Go(func() error { return s.read(ctx, k, jobs, first) })
	}
	for range friends {
		g.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case j := <-first:
					s.serve(ctx, j)
				}
			}
		})
	}
	for range workers {
		g.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case j := <-jobs:
					s.serve(ctx, j)
				}
			}
		})
	}
	g.Go(func() error { return s.probe.run(ctx) })
	if s.cfg.WatchEvery > 0 {
		g.Go(func() error { return s.watch(ctx) })
	}
	if s.journal != nil {
		g.Go(func() error { return s.housekeep(ctx) })
	}
	// Sockets close first, so that readers return; the journal closes last,
	// when no worker can commit any more.
	g.Go(func() error {
		<-ctx.Done()
		for _, k := range s.socks {
			k.close()
		}
		s.probe.close()
		return nil
	})
	err := g.Wait()
	if s.journal != nil {
		err = errors.Join(err, s.journal.close())
	}
	return err
}

// housekeep compacts the journal now and then, and writes it anew when the
// disk was full and no longer is.
func (s *Server) housekeep(ctx context.Context) error {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	heal := time.NewTicker(healEvery)
	defer heal.Stop()
	sick := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-heal.C:
			sick = s.heal(sick)
			continue
		case <-t.C:
		}
		if err := s.compact(); err != nil {
			s.log.Error("lease journal is not compacted", "error", err)
		}
	}
}

// heal mends a failed journal and tells of both its failure and its end.
func (s *Server) heal(sick bool) bool {
	err := s.journal.failed()
	if err == nil {
		return false
	}
	if !sick {
		s.cfg.Decider.Event(pxe.Event{Time: s.cfg.Now(), Alarm: true, Text: "no addresses are given out, since they cannot be recorded on this host's disk: " + reason(err)})
	}
	err = s.journal.heal(func() []record {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.leases.live(s.cfg.Now())
	})
	if err != nil {
		return true
	}
	s.cfg.Decider.Event(pxe.Event{Time: s.cfg.Now(), Text: "the disk takes writes again: addresses are given out"})
	return false
}

// reason is the system's part of an error, without paths.
func reason(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return "it cannot be written"
}

func (s *Server) compact() error {
	return s.journal.compact(func() []record {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.leases.live(s.cfg.Now())
	})
}

// Leases returns the bound leases that have not expired.
func (s *Server) Leases() []Lease {
	if s.leases == nil {
		return nil
	}
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Lease
	for _, l := range s.leases.byMAC {
		if l.Bound && now.Before(l.Expires) {
			out = append(out, l)
		}
	}
	return out
}

// Holder returns the machine that holds ip.
func (s *Server) Holder(ip netip.Addr) (pxe.MAC, bool) {
	if s.leases == nil {
		return pxe.MAC{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leases.holder(s.cfg.Now(), ip)
}

// Stopped says why leasing has stopped, "" if it has not.
func (s *Server) Stopped() string {
	if p := s.stopped.Load(); p != nil {
		return *p
	}
	return ""
}

func (s *Server) setStopped(why string) { s.stopped.Store(&why) }
