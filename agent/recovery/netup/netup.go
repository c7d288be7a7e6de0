// Package netup gives a machine its addresses: every interface in parallel,
// by DHCP or as site.json says, for ever.
//
// A link is brought up once and never bounced: spanning tree and LACP need up
// to 50 s after a link comes up, and each bounce starts that again. Waiting
// has no end, since power often returns to a machine before it returns to its
// switch. Interfaces that appear later are taken up too. What DHCP says is a
// hint: it is capped and checked, and everything but address, router, name
// servers and lease time is ignored.
//
// It leaves out IPv6 configuration: the kernel's own router solicitation
// gives addresses and routes; name servers are then those of site.json.
package netup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime/debug"
	"sort"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
)

// Config of a Manager. The zero value runs DHCP on every interface.
type Config struct {
	// Network is the part of site.json that concerns us. It must have been
	// validated.
	Network fleet.NetworkConfig
	// ResolvConf is the file to write name servers to; empty writes none.
	ResolvConf string
	// NeedModule loads a kernel module by name; nil does nothing.
	NeedModule func(name string) error
	// Changed is called with a copy of all interface states after each
	// change, from one goroutine at a time. It must not block for long.
	Changed func([]NIC)
	// Log is for details; nil discards.
	Log *slog.Logger
}

// Phase is where one interface stands.
type Phase uint8

const (
	// NoLink: no carrier (no cable, or the switch is not up yet).
	NoLink Phase = iota
	// Asking: carrier, and DHCP has not answered usefully yet.
	Asking
	// Up: an address is set.
	Up
	// Broken: the kernel refuses; tried again.
	Broken
)

var phaseNames = [...]string{"no link", "asking DHCP", "up", "broken"}

// String returns the words for the screen.
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

// NIC is one interface's state.
type NIC struct {
	Name, MAC string
	Index     int
	Phase     Phase
	Address   netip.Prefix
	Router    netip.Addr
	DNS       []netip.Addr
	// Attempts counts unanswered DHCP rounds since the link came up.
	Attempts int
	// Detail says what went wrong last, for the screen.
	Detail string
	// Device is the interface that carries the address: Name, or the VLAN
	// interface on top of it.
	Device string
}

// String is one line for the screen.
func (n NIC) String() string {
	switch n.Phase {
	case Up:
		s := n.Address.String()
		if n.Router.IsValid() {
			s += " via " + n.Router.String()
		}
		if n.Device != n.Name {
			s += " on " + n.Device
		}
		return s
	case Asking:
		s := n.Phase.String()
		if n.Attempts > 0 {
			s += fmt.Sprintf(", no answer in %d rounds", n.Attempts)
		}
		if n.Detail != "" {
			s += ": " + n.Detail
		}
		return s
	case Broken:
		return n.Phase.String() + ": " + n.Detail
	}
	return n.Phase.String()
}

// Manager runs the interfaces.
type Manager struct {
	cfg Config
	log *slog.Logger

	mu   sync.Mutex
	nics map[int]*nic // by interface index
	// good is the interface that reached something last; tried first.
	good int
	// report orders the calls of Changed.
	report sync.Mutex
}

// nic is an interface with the goroutine that serves it.
type nic struct {
	state   NIC
	carrier chan bool // latest carrier, capacity 1
	cancel  context.CancelFunc
	done    chan struct{}
}

// New makes a Manager.
func New(cfg Config) *Manager {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Manager{cfg: cfg, log: log, nics: map[int]*nic{}}
}

// maxInterfaces bounds goroutines; a machine with more has them by mistake.
const maxInterfaces = 64

// Run serves all interfaces until ctx ends. It returns only ctx's error: it
// outlives everything else.
func (m *Manager) Run(ctx context.Context) error {
	var wait agent.Backoff
	for ctx.Err() == nil {
		if err := m.follow(ctx); err != nil && ctx.Err() == nil {
			m.log.Warn("link events ended", "err", err)
			_ = sleep.For(ctx, wait.Next(rand.Float64()))
		}
	}
	m.mu.Lock()
	var all []*nic
	for _, n := range m.nics {
		all = append(all, n)
	}
	m.mu.Unlock()
	for _, n := range all {
		<-n.done
	}
	return ctx.Err()
}

// follow subscribes to link changes until the subscription breaks. A broken
// one (receive buffer overrun) is replaced: the new one lists all links.
// Interfaces live as long as life, not as long as the subscription.
func (m *Manager) follow(life context.Context) error {
	ctx, cancel := context.WithCancel(life)
	defer cancel()
	updates := make(chan netlink.LinkUpdate, 64)
	failed := make(chan error, 1)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ListExisting: true,
		ErrorCallback: func(err error) {
			select {
			case failed <- err:
			default:
			}
		},
	})
	if err != nil {
		return fmt.Errorf("netup: subscribe to links: %w", err)
	}
	defer func() { // the library writes until it sees ctx.Done
		go func() {
			for range updates {
			}
		}()
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case u, ok := <-updates:
			if !ok {
				return errors.New("netup: link subscription closed")
			}
			const rtmDelLink = 17 // linux/rtnetlink.h
			if u.Header.Type == rtmDelLink {
				m.forget(int(u.Index))
			} else if u.Link != nil {
				m.see(life, u.Link)
			}
		}
	}
}

// ours tells interfaces that can lead to a network from loopback, bridges,
// bonds, tunnels, and the VLAN interfaces that we create ourselves.
func ours(l netlink.Link) bool {
	a := l.Attrs()
	if len(a.HardwareAddr) != 6 || a.MasterIndex != 0 || a.EncapType != "ether" {
		return false
	}
	switch l.Type() {
	case "device", "veth":
		return true
	}
	return false
}

// carrier: lower-up means that the physical layer has a link. Operational
// state would stay "unknown" for drivers that do not report it.
func carrier(a *netlink.LinkAttrs) bool {
	const iffLowerUp = 1 << 16 // IFF_LOWER_UP, linux/if.h
	return a.RawFlags&iffLowerUp != 0
}

// see takes up a new interface or tells a known one about its carrier.
func (m *Manager) see(life context.Context, l netlink.Link) {
	if !ours(l) {
		return
	}
	a := l.Attrs()
	m.mu.Lock()
	n := m.nics[a.Index]
	if n == nil {
		if len(m.nics) >= maxInterfaces {
			m.mu.Unlock()
			return
		}
		ctx, cancel := context.WithCancel(life)
		n = &nic{
			state:   NIC{Name: a.Name, Device: a.Name, MAC: a.HardwareAddr.String(), Index: a.Index},
			carrier: make(chan bool, 1),
			cancel:  cancel,
			done:    make(chan struct{}),
		}
		m.nics[a.Index] = n
		go m.serve(ctx, n)
	}
	if n.state.Name != a.Name { // udev-less kernels rename too, once
		if n.state.Device == n.state.Name {
			n.state.Device = a.Name
		}
		n.state.Name = a.Name
	}
	m.mu.Unlock()
	// Only the newest reading counts.
	select {
	case <-n.carrier:
	default:
	}
	n.carrier <- carrier(a)
}

func (m *Manager) forget(index int) {
	m.mu.Lock()
	n := m.nics[index]
	delete(m.nics, index)
	m.mu.Unlock()
	if n != nil {
		n.cancel()
		m.log.Info("interface gone", "nic", n.state.Name)
		m.changed()
	}
}

// serve contains a panic of one interface and starts it again.
func (m *Manager) serve(ctx context.Context, n *nic) {
	defer close(n.done)
	var wait agent.Backoff
	for ctx.Err() == nil {
		err := func() (err error) {
			defer func() {
				if r := recover(); r != nil {
					err = fmt.Errorf("netup: serve interface: panic: %v\n%s", r, debug.Stack())
				}
			}()
			return m.run(ctx, n)
		}()
		if ctx.Err() != nil {
			return
		}
		m.log.Warn("interface failed", "nic", n.state.Name, "err", err)
		m.set(n, func(s *NIC) { s.Phase, s.Detail = Broken, firstLine(err) })
		_ = sleep.For(ctx, wait.Next(rand.Float64()))
	}
}

func firstLine(err error) string {
	if err == nil {
		return "stopped"
	}
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}

// set changes an interface's state and reports.
func (m *Manager) set(n *nic, change func(*NIC)) {
	m.mu.Lock()
	change(&n.state)
	m.mu.Unlock()
	m.changed()
}

func (m *Manager) get(n *nic) NIC {
	m.mu.Lock()
	defer m.mu.Unlock()
	return n.state
}

// NICs returns a copy of all states, ordered by index.
func (m *Manager) NICs() []NIC {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]NIC, 0, len(m.nics))
	for _, n := range m.nics {
		s := n.state
		s.DNS = append([]netip.Addr(nil), s.DNS...)
		out = append(out, s)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Index < out[j].Index })
	return out
}

func (m *Manager) changed() {
	m.report.Lock()
	defer m.report.Unlock()
	nics := m.NICs()
	if m.cfg.ResolvConf != "" {
		if err := writeResolvConf(m.cfg.ResolvConf, nameServers(m.cfg.Network, nics)); err != nil {
			m.log.Warn("name servers not written", "err", err)
		}
	}
	if m.cfg.Changed != nil {
		m.cfg.Changed(nics)
	}
}
