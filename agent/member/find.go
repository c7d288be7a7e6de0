package member

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/agent/hostnet"
	"github.com/muster-edge/muster/agent/peer"
	"github.com/muster-edge/muster/discovery"
	"github.com/muster-edge/muster/discovery/mdns"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
)

const (
	// visitLimit bounds a dial with hello and the first exchange.
	visitLimit = 20 * time.Second
	// statusLimit bounds one exchange of statuses: an answer that comes later
	// than a status is believed is worth nothing.
	statusLimit = 8 * time.Second
	// maxVisits bounds dials at a time.
	maxVisits = 16
	// leastGap is the least pause between two statuses to one peer.
	leastGap = 300 * time.Millisecond
	// maxRefused bounds the addresses where this node was refused.
	maxRefused  = 256
	memoryFile  = "peers.json"
	memoryEvery = time.Minute
)

// discover is what the node knows about where peers are. Its fields are
// guarded by Member.mu unless they say otherwise.
type discover struct {
	own       netip.Addr // of this node on the LAN
	applied   hostnet.Desired
	appliedAt time.Duration
	sessions  map[fleet.NodeID]*session
	refused   map[netip.AddrPort]bool

	// tableMu guards table, which is nil until the site is known.
	tableMu sync.Mutex
	table   *discovery.Table
	tag     discovery.SiteTag
	saved   string        // the memory as it is on the disk
	poke    chan struct{} // something to dial
}

func (d *discover) init() {
	d.appliedAt = -1
	d.sessions = map[fleet.NodeID]*session{}
	d.refused = map[netip.AddrPort]bool{}
	d.poke = make(chan struct{}, 1)
}

// session is a connection to a peer that statuses go over.
type session struct {
	node fleet.NodeID
	conn Conn
	at   netip.AddrPort
	// good is when (Mono) it last worked; guarded by Member.mu.
	good time.Duration
	stop context.CancelFunc
}

// find looks for peers until ctx ends. It starts over when the site changes.
func (m *Member) find(ctx context.Context) error {
	for ctx.Err() == nil {
		changed := m.cfg.Papers.Changed()
		docs := m.cfg.Papers.Documents()
		var tag discovery.SiteTag
		if self, ok := docs.Admitted(m.cfg.Self); ok {
			tag = discovery.Tag(self.Tenant, self.Site)
		}
		if tag == "" {
			// Without a site there is no tag to look for; the centre names it.
			select {
			case <-ctx.Done():
			case <-changed:
			}
			continue
		}
		sctx, cancel := context.WithCancel(ctx)
		go func() { // another site: start over
			defer cancel()
			for sctx.Err() == nil {
				changed := m.cfg.Papers.Changed()
				if self, ok := m.cfg.Papers.Documents().Admitted(m.cfg.Self); ok && discovery.Tag(self.Tenant, self.Site) != tag {
					return
				}
				select {
				case <-sctx.Done():
				case <-changed:
				}
			}
		}()
		err := m.findIn(sctx, tag)
		cancel()
		if err != nil && ctx.Err() == nil {
			m.outcome("look for peers", err)
			if sleep.For(ctx, longest) != nil {
				return nil
			}
		}
	}
	return nil
}

func (m *Member) findIn(ctx context.Context, tag discovery.SiteTag) error {
	port, err := listenPort(m.cfg.Listen)
	if err != nil {
		return err
	}
	table, err := discovery.New(discovery.Config{Tag: tag, Port: port}, rand.NewPCG(rand.Uint64(), rand.Uint64()))
	if err != nil {
		return err
	}
	d := &m.discover
	d.tableMu.Lock()
	d.table, d.tag = table, tag
	now := time.Now()
	if b, err := os.ReadFile(filepath.Join(m.cfg.StateDir, memoryFile)); err == nil {
		mem, err := discovery.ParseMemory(b)
		if err != nil { // costs no more than a search
			m.log.Warn("remembered addresses are damaged", "err", err)
		} else {
			table.Restore(now, mem)
			d.saved = string(b)
		}
	}
	for _, a := range m.cfg.Configured {
		table.Observe(now, discovery.Hint{Source: discovery.SourceConfigured, Addr: a})
	}
	d.tableMu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.dialAll(ctx) })
	g.Go(func() error { return m.whenPapersChange(ctx) })
	if m.cfg.Multicast != nil {
		mc, err := m.cfg.Multicast(tag)
		if err != nil {
			m.outcome("multicast", err)
		} else {
			g.Go(func() error { m.outcome("multicast", mc.Run(ctx)); return nil })
			g.Go(func() error {
				for {
					hints, err := mc.Wait(ctx)
					if err != nil {
						return nil
					}
					m.hints(hints)
				}
			})
		}
	}
	err = g.Wait()
	m.hangUp()
	return err
}

// hints feeds the table.
func (m *Member) hints(list []discovery.Hint) {
	d := &m.discover
	d.tableMu.Lock()
	if d.table != nil {
		for _, h := range list {
			d.table.Observe(time.Now(), h)
		}
	}
	d.tableMu.Unlock()
	m.dialSoon()
}

func (m *Member) dialSoon() {
	select {
	case m.discover.poke <- struct{}{}:
	default:
	}
}

// dialAll dials what the table wants dialled.
func (m *Member) dialAll(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxVisits)
	defer g.Wait() //nolint:errcheck // visits report by the table
	var saved, looked time.Duration
	m.lookAround()
	for ctx.Err() == nil {
		d := &m.discover
		d.tableMu.Lock()
		now := time.Now()
		dials := d.table.Dials(now)
		pause := longest
		if at, ok := d.table.Wake(now); ok {
			pause = min(pause, max(at.Sub(now), 10*time.Millisecond))
		}
		d.tableMu.Unlock()
		for _, x := range dials {
			g.Go(func() error { m.visit(ctx, x); return nil })
		}
		if m.mono()-saved >= memoryEvery {
			saved = m.mono()
			m.outcome("remember addresses", m.saveMemory())
		}
		if m.mono()-looked >= longest {
			looked = m.mono()
			m.lookAround()
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-d.poke:
		}
		t.Stop()
	}
	return nil
}

// saveMemory writes the proven addresses for the next start. They are hints:
// nothing depends on their being there.
func (m *Member) saveMemory() error {
	d := &m.discover
	d.tableMu.Lock()
	d.table.Expire(time.Now())
	b, err := json.Marshal(d.table.Memory())
	same := string(b) == d.saved
	d.tableMu.Unlock()
	if err != nil || same {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(m.cfg.StateDir, memoryFile), b, 0o600); err != nil {
		return fmt.Errorf("member: remember addresses: %w", err)
	}
	d.tableMu.Lock()
	d.saved = string(b)
	d.tableMu.Unlock()
	return nil
}

// visit dials one address and finds out who is there.
func (m *Member) visit(ctx context.Context, x discovery.Dial) {
	vctx, cancel := context.WithTimeout(ctx, visitLimit)
	defer cancel()
	conn, g, err := m.greet(vctx, x.Addr)
	d := &m.discover
	d.tableMu.Lock()
	now := time.Now()
	switch {
	case err == nil && g.Node == m.cfg.Self:
		d.table.Failed(now, x.Addr, discovery.Self)
	case err == nil:
		d.table.Proven(now, x.Addr, g.Node)
	case errors.Is(err, peer.ErrSelf):
		d.table.Failed(now, x.Addr, discovery.Self)
	case errors.Is(err, peer.ErrStranger), errors.Is(err, peer.ErrRemoved):
		d.table.Failed(now, x.Addr, discovery.Stranger)
	default:
		d.table.Failed(now, x.Addr, discovery.Unreachable)
	}
	d.tableMu.Unlock()
	m.mu.Lock()
	if errors.Is(err, peer.ErrRefused) && len(d.refused) < maxRefused {
		d.refused[x.Addr] = true
	} else {
		delete(d.refused, x.Addr)
	}
	m.mu.Unlock()
	if err != nil || g.Node == m.cfg.Self {
		if err != nil {
			m.log.Debug("nobody of ours", "addr", x.Addr.String(), "why", x.Why.String(), "err", err)
		} else {
			_ = conn.Close()
		}
		return
	}
	m.keep(ctx, conn, g, x.Addr)
}

// greet dials, says hello, and exchanges documents.
func (m *Member) greet(ctx context.Context, at netip.AddrPort) (Conn, peer.Greeting, error) {
	conn, err := m.dialer.Dial(ctx, at.String())
	if err != nil {
		return nil, peer.Greeting{}, err
	}
	g, err := conn.Hello(ctx)
	if err == nil && g.Node != m.cfg.Self {
		_, err = conn.Exchange(ctx)
	}
	if err != nil {
		_ = conn.Close()
		return nil, peer.Greeting{}, err
	}
	return conn, g, nil
}

// keep makes a connection the session with its peer. An older session that
// works is kept instead.
func (m *Member) keep(ctx context.Context, conn Conn, g peer.Greeting, at netip.AddrPort) {
	sctx, stop := context.WithCancel(ctx)
	s := &session{node: g.Node, conn: conn, at: at, stop: stop, good: m.mono()}
	m.mu.Lock()
	old := m.discover.sessions[g.Node]
	if old != nil && m.mono()-old.good <= 2*m.cfg.Hello {
		m.mu.Unlock()
		stop()
		_ = conn.Close()
		return
	}
	m.discover.sessions[g.Node] = s
	m.mu.Unlock()
	if old != nil {
		old.stop()
	}
	m.log.Info("peer found", "peer", string(g.Node), "words", fleet.Words(g.Node), "addr", at.String())
	m.jobs.Go(func() { m.talk(sctx, s) })
}

// talk shows the status and hears the peer's, until one of them fails.
func (m *Member) talk(ctx context.Context, s *session) {
	err := m.talking(ctx, s)
	_ = s.conn.Close()
	m.mu.Lock()
	if m.discover.sessions[s.node] == s {
		delete(m.discover.sessions, s.node)
	}
	m.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	m.log.Info("peer lost", "peer", string(s.node), "addr", s.at.String(), "err", err)
	d := &m.discover
	d.tableMu.Lock()
	d.table.Failed(time.Now(), s.at, discovery.Unreachable)
	d.tableMu.Unlock()
	m.dialSoon()
}

func (m *Member) talking(ctx context.Context, s *session) error {
	revision := m.cfg.Papers.Revision()
	for {
		m.mu.Lock()
		changed := m.view.changed
		m.mu.Unlock()
		papers := m.cfg.Papers.Changed()
		if err := m.exchange(ctx, s, &revision); err != nil {
			return err
		}
		m.mu.Lock()
		s.good = m.mono()
		m.mu.Unlock()
		d := &m.discover
		d.tableMu.Lock()
		d.table.Proven(time.Now(), s.at, s.node)
		d.tableMu.Unlock()
		t := time.NewTimer(m.cfg.Hello - m.jitter(m.cfg.Hello/5))
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-changed:
		case <-papers:
		}
		t.Stop()
		if sleep.For(ctx, leastGap) != nil {
			return ctx.Err()
		}
		if _, ok := m.cfg.Papers.Documents().Admitted(s.node); !ok {
			return errors.New("it was removed from the site")
		}
	}
}

// exchange is one status each way, and the documents if they differ.
func (m *Member) exchange(ctx context.Context, s *session, revision *uint64) error {
	ctx, cancel := context.WithTimeout(ctx, statusLimit)
	defer cancel()
	_, differ, err := s.conn.Status(ctx)
	if err != nil {
		return err
	}
	if now := m.cfg.Papers.Revision(); !differ && now == *revision {
		return nil
	}
	*revision = m.cfg.Papers.Revision()
	_, err = s.conn.Exchange(ctx)
	return err
}

// ask runs do over the session with node, or over a new connection.
func (m *Member) ask(ctx context.Context, node fleet.NodeID, do func(Conn) (any, error)) (any, error) {
	m.mu.Lock()
	s := m.discover.sessions[node]
	m.mu.Unlock()
	if s != nil {
		got, err := do(s.conn)
		if err == nil || !errors.Is(err, peer.ErrClosed) {
			return got, err
		}
		s.stop()
	}
	var errs []error
	for _, at := range m.addressesOf(node) {
		conn, g, err := m.greet(ctx, at)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if g.Node != node {
			_ = conn.Close()
			errs = append(errs, fmt.Errorf("another node answers at %s", at))
			continue
		}
		got, err := do(conn)
		_ = conn.Close()
		return got, err
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("no address of it is known"))
	}
	return nil, errors.Join(errs...)
}

func (m *Member) addressesOf(node fleet.NodeID) []netip.AddrPort {
	d := &m.discover
	d.tableMu.Lock()
	defer d.tableMu.Unlock()
	if d.table == nil {
		return nil
	}
	for _, p := range d.table.Peers() {
		if p.Node == node {
			return p.Addrs[:min(len(p.Addrs), 3)]
		}
	}
	return nil
}

// whenPapersChange forgets removed nodes and dials again where this node was
// refused: it may be admitted by now.
func (m *Member) whenPapersChange(ctx context.Context) error {
	for ctx.Err() == nil {
		changed := m.cfg.Papers.Changed()
		docs := m.cfg.Papers.Documents()
		d := &m.discover
		m.mu.Lock()
		var again []netip.AddrPort
		for a := range d.refused {
			again = append(again, a)
		}
		clear(d.refused)
		var gone []fleet.NodeID
		for _, r := range docs.Removals {
			if _, ok := docs.Admitted(r.Node); !ok {
				gone = append(gone, r.Node)
				delete(m.peers, r.Node)
				if s := d.sessions[r.Node]; s != nil {
					s.stop()
				}
			}
		}
		m.mu.Unlock()
		d.tableMu.Lock()
		for _, id := range gone {
			d.table.Forget(time.Now(), id)
		}
		for _, a := range again {
			// A new instance at a known address brings its next dial forward.
			d.table.Observe(time.Now(), discovery.Hint{Source: discovery.SourceMulticast, Addr: a, Tag: d.tag,
				Instance: m.cfg.Fresh()[:16], TTL: discovery.HostTTL})
		}
		d.tableMu.Unlock()
		if len(again) > 0 {
			m.dialSoon()
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return nil
}

// hangUp ends all sessions.
func (m *Member) hangUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.discover.sessions {
		s.stop()
	}
}

// heardAt is a hint: a peer that called us serves there.
func (m *Member) heardAt(from fleet.NodeID, at netip.AddrPort) {
	d := &m.discover
	m.mu.Lock()
	known := d.sessions[from] != nil
	m.mu.Unlock()
	if known || !at.IsValid() || at.Port() == 0 {
		return
	}
	m.hints([]discovery.Hint{{Source: discovery.SourcePeer, Addr: at, Via: from, Node: from, TTL: discovery.AdvertTTL}})
}

// Hinted implements peer.Node.
func (m *Member) Hinted(from fleet.NodeID, list []peer.Address) {
	hints := make([]discovery.Hint, 0, len(list))
	for _, a := range list {
		if a.Node != m.cfg.Self {
			hints = append(hints, discovery.Hint{Source: discovery.SourcePeer, Addr: a.At, Via: from, Node: a.Node, TTL: discovery.AdvertTTL})
		}
	}
	if len(hints) > 0 {
		m.hints(hints)
	}
}

// maxShared bounds the addresses that are passed on.
const maxShared = 32

// Addresses implements peer.Node.
func (m *Member) Addresses() []peer.Address {
	d := &m.discover
	d.tableMu.Lock()
	defer d.tableMu.Unlock()
	if d.table == nil {
		return nil
	}
	var out []peer.Address
	for _, t := range d.table.Share("", maxShared) {
		out = append(out, peer.Address{Node: t.Node, At: t.Addr})
	}
	return out
}

// lookAround finds this node's own address on the LAN.
func (m *Member) lookAround() {
	own := m.cfg.Own()
	m.mu.Lock()
	changed := own != m.discover.own
	m.discover.own = own
	m.mu.Unlock()
	if changed {
		m.wake()
	}
}

// OwnAddress returns this host's address on the LAN: the first IPv4 address of
// the interface link, or of the first one that is up and that no container
// network made; else an IPv6 address that is valid beyond its link.
func OwnAddress(link string) netip.Addr {
	list, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}
	}
	slices.SortFunc(list, func(a, b net.Interface) int { return a.Index - b.Index })
	var v6 netip.Addr
	for _, i := range list {
		if link != "" && i.Name != link || i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 || !UsableLink(i.Name) {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || p.Addr().IsLinkLocalUnicast() {
				continue
			}
			if p.Addr().Is4() {
				return p.Addr()
			}
			if !v6.IsValid() {
				v6 = p.Addr()
			}
		}
	}
	return v6
}

// UsableLink reports whether peers may be on the interface.
func UsableLink(name string) bool { return mdns.Usable(name) && !strings.HasPrefix(name, "muster") }
