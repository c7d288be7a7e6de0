package dhcp

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

var (
	t0   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	self = netip.MustParseAddr("10.77.0.1")
	ip   = netip.MustParseAddr
)

// world is a Decider over pxe.Decide with settable policy, and a clock.
type world struct {
	mu      sync.Mutex
	now     time.Time
	policy  pxe.Policy
	ladders map[pxe.MAC]pxe.Ladder
	events  []pxe.Event
	sent    []pxe.MessageType
	friends map[pxe.MAC]bool
}

func newWorld(mode pxe.Mode) *world {
	return &world{now: t0, ladders: map[pxe.MAC]pxe.Ladder{}, policy: pxe.Policy{Mode: mode, Server: self, HTTPPort: 7480, Standing: pxe.Recover,
		Images: map[string]pxe.Image{"amd64": {Path: "amd64/recovery.efi", Size: 1}}}}
}

func (w *world) Decide(_ context.Context, now time.Time, req pxe.Request, stopped string) pxe.Reply {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.policy
	p.Stopped, p.Ladder = stopped, w.ladders[req.MAC]
	rep := pxe.Decide(now, req, p)
	w.ladders[req.MAC] = rep.Ladder
	return rep
}

func (w *world) Answered(_ time.Time, _ pxe.Request, _ pxe.Reply, kind pxe.MessageType, _ netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, kind)
}

// known machines are those that were told to recover, and the healthy.
func (w *world) Known(mac pxe.MAC) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.policy.Standing == pxe.Recover || w.policy.Standing == pxe.Healthy || w.friends[mac]
}

func (w *world) Event(e pxe.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, e)
}

func (w *world) alarms() []pxe.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []pxe.Event
	for _, e := range w.events {
		if e.Alarm {
			out = append(out, e)
		}
	}
	return out
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// users is a prober for a network on which these addresses are in use.
type users map[netip.Addr]pxe.MAC

func (u users) inUse(_ context.Context, a netip.Addr) (pxe.MAC, bool) { m, ok := u[a]; return m, ok }
func (u users) run(context.Context) error                             { return nil }
func (u users) close() error                                          { return nil }

func lanPool(from, to string) Pool {
	return Pool{Subnet: netip.MustParsePrefix("10.77.0.0/24"), From: ip(from), To: ip(to), Router: self, DNS: []netip.Addr{ip("10.77.0.53")}}
}

// bare is a server without sockets, on virtual time.
func bare(t testing.TB, w *world, path string, pools ...Pool) *Server {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "leases")
	}
	cfg := Config{Mode: w.policy.Mode, Interface: "none", Server: self, Pools: pools, Leases: path, Decider: w,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Now: w.clock}
	cfg.defaults()
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	s := &Server{cfg: cfg, log: cfg.Log, limit: newLimiter(), crowd: newCrowd(), hint: make(chan struct{}, 1), probe: noProbe{},
		local: netip.MustParsePrefix("10.77.0.1/24")}
	if w.policy.Mode == pxe.ModeFull {
		s.leases = newTable(pools, self)
		j, recs, _, err := openJournal(path)
		if err != nil {
			t.Fatal(err)
		}
		s.journal = j
		for _, r := range recs {
			s.leases.apply(r)
		}
		t.Cleanup(func() { j.close() })
	}
	return s
}

// station sends packets to a bare server.
type station struct {
	t    testing.TB
	s    *Server
	mac  pxe.MAC
	arch uint16
	xid  dhcpv4.TransactionID
	// relay is giaddr.
	relay netip.Addr
	// host: an operating system, no firmware.
	host bool
}

func newStation(t testing.TB, s *Server, n int) *station {
	return &station{t: t, s: s, mac: pxe.MAC{0x52, 0x54, 0, byte(n >> 16), byte(n >> 8), byte(n)}, arch: 7, xid: dhcpv4.TransactionID{1, 2, byte(n >> 8), byte(n)}}
}

func (c *station) packet(kind dhcpv4.MessageType, edit func(*dhcpv4.DHCPv4)) *dhcpv4.DHCPv4 {
	fw := &edk2.Client{MAC: c.mac[:], Arch: c.arch, HTTP: c.arch >= 15 && c.arch <= 20}
	p := fw.Packet(kind, c.xid)
	if c.host {
		p.Options = dhcpv4.Options{53: {byte(kind)}, 60: []byte("linux"), 61: append([]byte{1}, c.mac[:]...)}
	}
	if c.relay.IsValid() {
		p.GatewayIPAddr = c.relay.AsSlice()
		p.Options[82] = []byte{1, 4, 'p', 'o', 'r', 't'}
	}
	if edit != nil {
		edit(p)
	}
	return p
}

// send returns the reply and where it goes; nil for silence.
func (c *station) send(port pxe.Port, p *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, netip.AddrPort) {
	c.t.Helper()
	from := netip.AddrPortFrom(ip("0.0.0.0"), 68)
	switch {
	case port == pxe.PortBINL:
		from = netip.AddrPortFrom(ip("10.77.0.222"), 4011)
	case c.relay.IsValid():
		from = netip.AddrPortFrom(c.relay, 67)
	}
	d := c.s.handle(context.Background(), p.ToBytes(), from, port)
	if d == nil {
		return nil, netip.AddrPort{}
	}
	out, err := dhcpv4.FromBytes(d.data)
	if err != nil {
		c.t.Fatalf("our own reply does not parse: %v", err)
	}
	return out, d.to
}

func (c *station) discover() *dhcpv4.DHCPv4 {
	c.t.Helper()
	p, _ := c.send(pxe.PortDHCP, c.packet(dhcpv4.MessageTypeDiscover, nil))
	return p
}

func opt(code uint8, v ...byte) func(*dhcpv4.DHCPv4) {
	return func(p *dhcpv4.DHCPv4) { p.Options[code] = v }
}

func edits(f ...func(*dhcpv4.DHCPv4)) func(*dhcpv4.DHCPv4) {
	return func(p *dhcpv4.DHCPv4) {
		for _, e := range f {
			e(p)
		}
	}
}

func asks(a netip.Addr) func(*dhcpv4.DHCPv4)  { return opt(50, a.AsSlice()...) }
func picks(s netip.Addr) func(*dhcpv4.DHCPv4) { return opt(54, s.AsSlice()...) }
func holds(a netip.Addr) func(*dhcpv4.DHCPv4) {
	return func(p *dhcpv4.DHCPv4) { p.ClientIPAddr = a.AsSlice() }
}

// dora takes a lease and returns the address.
func (c *station) dora() netip.Addr {
	c.t.Helper()
	o := c.discover()
	if o == nil || o.MessageType() != dhcpv4.MessageTypeOffer {
		c.t.Fatalf("%s: no OFFER: %v", c.mac, o)
	}
	a := addr(o.YourIPAddr)
	k, _ := c.send(pxe.PortDHCP, c.packet(dhcpv4.MessageTypeRequest, edits(asks(a), picks(self))))
	if k == nil || k.MessageType() != dhcpv4.MessageTypeAck || addr(k.YourIPAddr) != a {
		c.t.Fatalf("%s: no ACK of %s: %v", c.mac, a, k)
	}
	return a
}
