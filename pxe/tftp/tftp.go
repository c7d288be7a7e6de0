// Package tftp hands the recovery image to PXE firmware: read only, a short
// list of names, bounded in number, with the options of RFC 2348 and 2349
// (blksize, tsize) and the windows of RFC 7440.
//
// TFTP is for the machine's own network. Its speed is one window per round
// trip, and most firmware asks for a window of one or four blocks, so anything
// far away uses HTTP boot.
package tftp

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// File is an image being read. *os.File is one.
type File interface {
	io.ReadSeekCloser
	Stat() (fs.FileInfo, error)
}

// Source opens files by their clean, slash-separated names. It returns an
// error that is fs.ErrNotExist for a name that is not on its list.
type Source interface {
	Open(name string) (File, error)
}

// Progress is one step of one transfer.
type Progress struct {
	Client netip.Addr
	Name   string
	// Sent and Size are bytes.
	Sent, Size int64
	// Done: the last block was acknowledged.
	Done bool
	// Err ends a transfer that failed; Probe ends one in which the client
	// only asked for the size, as EDK2 does before every download.
	Err   error
	Probe bool
}

// Config says where and what to serve.
type Config struct {
	// Interface to bind to; "" for all.
	Interface string
	// Addr is the address and port to listen on, ":69" by default.
	Addr string
	// Subnets are the networks that are answered. Requests from elsewhere
	// are dropped: their source may be forged.
	Subnets []netip.Prefix
	// Source is required.
	Source Source
	// Progress, if set, is called at the start, every tenth part and the end
	// of each transfer.
	Progress func(Progress)
	// MaxTransfers bounds simultaneous transfers (128 by default) to clients
	// that have answered. Eight times as many may be waiting for a first
	// answer; beyond that the oldest of them is forgotten.
	MaxTransfers int
	// BlockSize caps the negotiated block size (1468 by default, which with
	// its headers fills an Ethernet frame; less on an interface of smaller MTU).
	BlockSize int
	// Window caps the number of blocks under way (RFC 7440; 16 by default).
	// A client that asks for no window gets one block at a time.
	Window int
	// Timeout is how long the first block waits for its acknowledgement
	// before it is sent again (150 ms by default); later ones go by the
	// round trips that were measured.
	Timeout time.Duration
	Log     *slog.Logger
}

const (
	maxName = 128
	// perClient bounds one client's transfers; firmware has one or two.
	perClient = 8
	// clientBurst and clientEvery bound one client's requests.
	clientBurst = 60
	clientEvery = 50 * time.Millisecond
	// maxKnown bounds what is kept per client address.
	maxKnown = 4096
	// stalledFor is the silence after which a transfer gives way when there
	// are MaxTransfers of them.
	stalledFor = 3 * time.Second
	// smallBlock is for clients that took the options but never the first
	// full block: something on the way drops large packets without a word.
	smallBlock = 1200
)

// Server serves TFTP.
type Server struct {
	cfg  Config
	log  *slog.Logger
	conn *net.UDPConn
	pool sync.Pool
	// refused counts requests that got an error or nothing.
	refused atomic.Int64

	mu       sync.Mutex
	byPort   map[netip.AddrPort]*transfer
	byClient map[netip.Addr]*client
	half     list.List // of *transfer, oldest first
	active   map[*transfer]bool
	// alive counts all that have not ended.
	alive int
}

// client is what is known of one address.
type client struct {
	transfers int
	// spent and at are a bucket of requests.
	spent int
	at    time.Time
	// block caps its block size, 0 if nothing is known.
	block int
}

func (c *Config) defaults() {
	if c.Addr == "" {
		c.Addr = ":69"
	}
	if c.MaxTransfers == 0 {
		c.MaxTransfers = 128
	}
	if c.BlockSize == 0 {
		c.BlockSize = 1468
	}
	if c.Window == 0 {
		c.Window = 16
	}
	if c.Timeout == 0 {
		c.Timeout = 150 * time.Millisecond
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
}

func (c *Config) validate() error {
	var errs []error
	if c.Source == nil {
		errs = append(errs, errors.New("tftp: config: Source is missing"))
	}
	if len(c.Subnets) == 0 {
		errs = append(errs, errors.New("tftp: config: Subnets is empty, so nobody would be answered"))
	}
	if c.BlockSize < 512 || c.BlockSize > 65464 {
		errs = append(errs, fmt.Errorf("tftp: config: block size %d is outside 512-65464 (RFC 2348)", c.BlockSize))
	}
	if c.Window < 1 || c.Window > 64 {
		errs = append(errs, fmt.Errorf("tftp: config: window %d is outside 1-64", c.Window))
	}
	if c.MaxTransfers < 1 {
		errs = append(errs, fmt.Errorf("tftp: config: MaxTransfers is %d", c.MaxTransfers))
	}
	return errors.Join(errs...)
}

// New opens the socket. Run serves; Close is for a server that is never run.
func New(cfg Config) (*Server, error) {
	cfg.defaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Interface != "" {
		ifi, err := net.InterfaceByName(cfg.Interface)
		if err != nil {
			return nil, fmt.Errorf("tftp: find interface %s: %w", cfg.Interface, err)
		}
		// IP, UDP and TFTP headers.
		cfg.BlockSize = max(min(cfg.BlockSize, ifi.MTU-32), defaultBlock)
	}
	lc := net.ListenConfig{Control: bindTo(cfg.Interface)}
	pc, err := lc.ListenPacket(context.Background(), "udp4", cfg.Addr)
	if err != nil {
		hint := ""
		if errors.Is(err, unix.EADDRINUSE) {
			hint = " (another TFTP server runs on this host: likely tftpd-hpa, atftpd or dnsmasq)"
		}
		return nil, fmt.Errorf("tftp: open %s: %w%s", cfg.Addr, err, hint)
	}
	return &Server{cfg: cfg, log: cfg.Log, conn: pc.(*net.UDPConn), pool: sync.Pool{New: func() any { b := make([]byte, 600); return &b }},
		byPort: map[netip.AddrPort]*transfer{}, byClient: map[netip.Addr]*client{}, active: map[*transfer]bool{}}, nil
}

// bindTo keeps a socket on one interface, and lets the kernel split packets
// that a route is too narrow for: TFTP cannot react to "too big".
func bindTo(name string) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
			if name != "" {
				err = errors.Join(err, unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, name))
			}
		})
		return errors.Join(cerr, err)
	}
}

// Addr is the address being listened on.
func (s *Server) Addr() netip.AddrPort {
	return s.conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Refused counts requests that were not served.
func (s *Server) Refused() int64 { return s.refused.Load() }

// Close releases the socket of a server that is not running.
func (s *Server) Close() error { return s.conn.Close() }

// Transfers counts those whose client has answered, and those waiting for a
// first answer.
func (s *Server) Transfers() (active, waiting int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.active), s.half.Len()
}

// Run serves until ctx ends. Transfers under way are told that the server
// stops.
func (s *Server) Run(ctx context.Context) error {
	ctx, end := context.WithCancelCause(ctx)
	var transfers sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	// Transfers end with a reason of their own, so that they can tell it.
	life, cut := context.WithCancelCause(context.Background())
	err := s.listen(ctx, life, &transfers)
	end(nil)
	cut(errStopping)
	_ = s.conn.Close()
	transfers.Wait()
	return err
}

func (s *Server) listen(ctx, life context.Context, transfers *sync.WaitGroup) error {
	// The control message says which of our addresses was asked: the answer
	// comes from the same.
	pc := ipv4.NewPacketConn(s.conn)
	if err := pc.SetControlMessage(ipv4.FlagDst, true); err != nil {
		return fmt.Errorf("tftp: ask for packet information: %w", err)
	}
	buf := make([]byte, 2048)
	for {
		n, cm, src, err := pc.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, unix.ENETDOWN) {
				continue // a link that comes back
			}
			return fmt.Errorf("tftp: read requests: %w", err)
		}
		u, ok := src.(*net.UDPAddr)
		if !ok || cm == nil || cm.Dst.To4() == nil || cm.Dst.IsMulticast() || cm.Dst.Equal(net.IPv4bcast) {
			continue
		}
		from := netip.AddrPortFrom(u.AddrPort().Addr().Unmap(), u.AddrPort().Port())
		t, req, code, why := s.accept(life, time.Now(), from, buf[:n])
		switch {
		case why != nil:
			s.refused.Add(1)
			// A source that we do not serve may be forged: it hears that it
			// is refused, in fewer bytes than it sent.
			_, _ = s.conn.WriteToUDPAddrPort(errorPacket(code, why.Error()), from)
		case t == nil:
			s.refused.Add(1)
		default:
			transfers.Go(func() { s.handle(t, req, cm.Dst) })
		}
	}
}

// errors that go out to clients: short, and nothing about this host.
var (
	errNoFile   = errors.New("file not found")
	errBusy     = errors.New("server busy, try again")
	errStranger = errors.New("access violation")
	errStopping = errors.New("server is stopping")
)

// accept decides on one packet to the well-known port. With an error the client is
// told why; without one and without a transfer nothing is said.
func (s *Server) accept(life context.Context, now time.Time, from netip.AddrPort, b []byte) (*transfer, request, uint16, error) {
	if !s.served(from.Addr()) {
		if len(b) < 24 {
			return nil, request{}, 0, nil
		}
		return nil, request{}, codeViolation, errStranger
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.client(from.Addr())
	if !c.take(now) {
		return nil, request{}, 0, nil
	}
	req, err := parseRequest(b)
	switch {
	case errors.Is(err, errNotRead):
		return nil, req, codeViolation, errStranger
	case errors.Is(err, errNotOctet):
		return nil, req, codeIllegal, errors.New("only octet mode")
	case err != nil && len(b) > 2 && b[0] == 0 && b[1] == opRead:
		return nil, req, codeNotFound, errNoFile
	case err != nil:
		return nil, req, 0, nil
	}
	name, ok := Clean(req.name)
	if !ok {
		return nil, req, codeNotFound, errNoFile
	}
	req.name = name
	if old := s.byPort[from]; old != nil {
		// The client repeats its request, or has begun again: some firmware
		// probes and reads from one port.
		old.cancel(errReplace)
	} else if c.transfers >= perClient {
		return nil, req, codeUndefined, errBusy
	}
	if s.alive >= 16*s.cfg.MaxTransfers {
		return nil, req, 0, nil // those pushed out have not all ended yet
	}
	if s.half.Len() >= 8*s.cfg.MaxTransfers {
		// Who means it answers within a round trip, so the oldest is the
		// least likely to.
		old := s.half.Front().Value.(*transfer)
		old.cancel(errPushed)
		s.half.Remove(old.waiting)
		old.waiting = nil
	}
	t := &transfer{s: s, client: from, capped: c.block}
	t.ctx, t.cancel = context.WithCancelCause(life)
	t.waiting = s.half.PushBack(t)
	s.byPort[from] = t
	c.transfers++
	s.alive++
	return t, req, 0, nil
}

// client returns what is known of a, making room if needed. The caller holds
// mu.
func (s *Server) client(a netip.Addr) *client {
	c, ok := s.byClient[a]
	if !ok {
		if len(s.byClient) >= maxKnown {
			for k, c := range s.byClient {
				if c.transfers == 0 {
					delete(s.byClient, k)
				}
			}
		}
		c = &client{}
		s.byClient[a] = c
	}
	return c
}

func (c *client) take(now time.Time) bool {
	if n := now.Sub(c.at) / clientEvery; n > 0 {
		c.spent, c.at = max(0, c.spent-int(min(n, clientBurst))), now
	}
	if c.spent >= clientBurst {
		return false
	}
	c.spent++
	return true
}

// admit makes t one of the transfers that count, if there is room.
func (s *Server) admit(t *transfer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.waiting != nil {
		s.half.Remove(t.waiting)
		t.waiting = nil
	}
	if len(s.active) >= s.cfg.MaxTransfers {
		var worst *transfer
		for o := range s.active {
			if worst == nil || o.moved.Load() < worst.moved.Load() {
				worst = o
			}
		}
		if time.Since(time.Unix(0, worst.moved.Load())) < stalledFor {
			return false
		}
		worst.cancel(errPushed)
		delete(s.active, worst)
	}
	s.active[t] = true
	return true
}

// done forgets t.
func (s *Server) done(t *transfer, err error) {
	t.cancel(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.waiting != nil {
		s.half.Remove(t.waiting)
		t.waiting = nil
	}
	delete(s.active, t)
	if s.byPort[t.client] == t {
		delete(s.byPort, t.client)
	}
	s.alive--
	c := s.byClient[t.client.Addr()]
	c.transfers--
	if errors.Is(err, errSilent) && t.proven && t.p.Sent == 0 && t.block > defaultBlock {
		c.block = defaultBlock
		if t.block > smallBlock {
			c.block = smallBlock
		}
	}
}

// handle serves one request.
func (s *Server) handle(t *transfer, req request, local net.IP) {
	err := s.transfer(t, req, local)
	s.done(t, err)
	var said *clientError
	p := t.p
	switch {
	case p.Name == "":
		// It never began.
		s.refused.Add(1)
		return
	case err == nil:
		p.Done = true
	case errors.As(err, &said) && said.probe(), errors.Is(err, errReplace) && p.Sent == 0:
		p.Probe = true
	case !t.proven && !errors.As(err, &said):
		// Never heard of again, or pushed out: nobody need read of it.
		s.refused.Add(1)
		return
	default:
		p.Err = err
	}
	s.report(p)
}

func (s *Server) transfer(t *transfer, req request, local net.IP) error {
	d := net.Dialer{LocalAddr: &net.UDPAddr{IP: local}, Control: bindTo(s.cfg.Interface)}
	c, err := d.DialContext(t.ctx, "udp4", t.client.String())
	if err != nil {
		return fmt.Errorf("tftp: open a port for %s: %w", t.client, err)
	}
	defer c.Close()
	t.conn = c.(*net.UDPConn)
	f, err := s.cfg.Source.Open(req.name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.log.Error("image cannot be opened", "name", req.name, "error", err)
		}
		t.send(errorPacket(codeNotFound, errNoFile.Error()))
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		s.log.Error("image cannot be read", "name", req.name, "error", err)
		t.send(errorPacket(codeNotFound, errNoFile.Error()))
		return err
	}
	t.file, t.block, t.window = f, defaultBlock, 1
	t.p = Progress{Client: t.client.Addr(), Name: req.name, Size: st.Size()}
	size, block, window := int64(-1), 0, 0
	if req.size {
		size = st.Size()
	}
	if req.block > 0 {
		block = min(req.block, s.cfg.BlockSize)
		if t.capped > 0 {
			block = min(block, t.capped)
		}
		t.block = block
	}
	if req.window > 0 {
		window = min(req.window, s.cfg.Window)
		t.window = window
	}
	return t.run(oack(block, window, size))
}

func (s *Server) served(a netip.Addr) bool {
	for _, p := range s.cfg.Subnets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func (s *Server) report(p Progress) {
	if s.cfg.Progress != nil {
		s.cfg.Progress(p)
	}
}

// Clean turns a name from the network into a clean relative path, or says
// no. Firmware sends leading slashes, and some sends backslashes.
func Clean(raw string) (string, bool) {
	if raw == "" || len(raw) > maxName {
		return "", false
	}
	for i := range len(raw) {
		if raw[i] < 0x20 || raw[i] > 0x7e {
			return "", false
		}
	}
	n := strings.TrimLeft(strings.ReplaceAll(raw, `\`, "/"), "/")
	if n == "" || n == "." || path.Clean(n) != n || strings.HasPrefix(n, "..") || !fs.ValidPath(n) {
		return "", false
	}
	return n, true
}
