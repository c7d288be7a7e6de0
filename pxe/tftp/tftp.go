// Package tftp hands the recovery image to PXE firmware: read only, a short
// list of names, lock-step transfers, bounded in number.
//
// TFTP is for the machine's own network. Its speed is one block per round
// trip (RFC 1350), so anything far away uses HTTP boot.
package tftp

import (
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
	"sync/atomic"
	"syscall"
	"time"

	tftp "github.com/pin/tftp/v3"
	"golang.org/x/sync/errgroup"
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
	// MaxTransfers bounds simultaneous transfers (128 by default).
	MaxTransfers int
	// BlockSize caps the negotiated block size (1468 by default, which with
	// its headers fills an Ethernet frame).
	BlockSize int
	// Timeout is how long one block waits for its acknowledgement before it
	// is sent again (150 ms by default).
	Timeout time.Duration
	Log     *slog.Logger
}

const (
	// patience is the number of times one block is sent.
	patience = 24
	// slowFrom is the try from which there is a pause in between: firmware
	// that is busy (hashing, drawing) comes back after seconds.
	slowFrom = 4
	maxName  = 128
)

// Server serves TFTP.
type Server struct {
	cfg   Config
	log   *slog.Logger
	conn  *net.UDPConn
	tftp  *tftp.Server
	slots chan struct{}
	stop  atomic.Bool
	// refused counts requests that got an error or nothing.
	refused atomic.Int64
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
	return errors.Join(errs...)
}

// New opens the socket. Run serves; Close is for a server that is never run.
func New(cfg Config) (*Server, error) {
	if cfg.Addr == "" {
		cfg.Addr = ":69"
	}
	if cfg.MaxTransfers == 0 {
		cfg.MaxTransfers = 128
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = 1468
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 150 * time.Millisecond
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		if cfg.Interface == "" {
			return nil
		}
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, cfg.Interface)
		})
		return errors.Join(cerr, err)
	}}
	pc, err := lc.ListenPacket(context.Background(), "udp4", cfg.Addr)
	if err != nil {
		hint := ""
		if errors.Is(err, unix.EADDRINUSE) {
			hint = " (another TFTP server runs on this host: likely tftpd-hpa, atftpd or dnsmasq)"
		}
		return nil, fmt.Errorf("tftp: open %s: %w%s", cfg.Addr, err, hint)
	}
	s := &Server{cfg: cfg, log: cfg.Log, conn: pc.(*net.UDPConn), slots: make(chan struct{}, cfg.MaxTransfers)}
	s.tftp = tftp.NewServer(s.read, nil)
	s.tftp.SetBlockSize(cfg.BlockSize)
	s.tftp.SetTimeout(cfg.Timeout)
	s.tftp.SetRetries(patience)
	s.tftp.SetBackoff(backoff)
	return s, nil
}

// backoff is the extra pause before a block is sent again: none for the first
// tries, since a lost frame on a LAN should cost one timeout, then up to 1 s.
// Duplicate acknowledgements are ignored by the sender, so a hasty resend
// doubles one block and no more (RFC 1123 section 4.2.3.1).
func backoff(attempt int) time.Duration {
	if attempt < slowFrom {
		return 0
	}
	return min(time.Duration(attempt-slowFrom+1)*200*time.Millisecond, time.Second)
}

// Addr is the address being listened on.
func (s *Server) Addr() netip.AddrPort {
	return s.conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Refused counts requests that were not served.
func (s *Server) Refused() int64 { return s.refused.Load() }

// Close releases the socket of a server that is not running.
func (s *Server) Close() error { return s.conn.Close() }

// Run serves until ctx ends. Transfers under way then get their file cut off:
// their sources return an error.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := s.tftp.Serve(s.conn); err != nil {
			return fmt.Errorf("tftp: serve: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		s.stop.Store(true)
		// Always Shutdown, never conn.Close: the library's read loop would
		// spin on a closed socket.
		s.tftp.Shutdown()
		return nil
	})
	err := g.Wait()
	// Shutdown does not know the socket if it came before Serve.
	_ = s.conn.Close()
	return err
}

// errors that go out to clients: short, and nothing about this host.
var (
	errNoFile   = errors.New("file not found")
	errBusy     = errors.New("server busy, try again")
	errStranger = errors.New("access violation")
	errStopping = errors.New("server is stopping")
)

// read handles one request.
func (s *Server) read(raw string, rf io.ReaderFrom) error {
	t, ok := rf.(tftp.OutgoingTransfer)
	if !ok {
		return errNoFile
	}
	ra := t.RemoteAddr()
	client := ra.AddrPort().Addr().Unmap()
	if !s.served(client) {
		s.refused.Add(1)
		return errStranger
	}
	name, ok := Clean(raw)
	if !ok {
		s.refused.Add(1)
		return errNoFile
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		s.refused.Add(1)
		return errBusy
	}
	f, err := s.cfg.Source.Open(name)
	if err != nil {
		s.refused.Add(1)
		if !errors.Is(err, fs.ErrNotExist) {
			s.log.Error("image cannot be opened", "name", name, "error", err)
		}
		return errNoFile
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		s.log.Error("image cannot be read", "name", name, "error", err)
		return errNoFile
	}
	t.SetSize(st.Size())
	r := &reader{s: s, f: f, p: Progress{Client: client, Name: name, Size: st.Size()}}
	_, err = rf.ReadFrom(r)
	p := r.p
	switch {
	case err == nil:
		p.Done = true
	case isProbe(err):
		// EDK2 asks for the size, says "User aborted" and asks again.
		p.Probe = true
	default:
		p.Err = err
	}
	s.report(p)
	// The library has told the client already.
	return nil
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

// isProbe recognises the end of a size probe: an ERROR packet in answer to
// the OACK (block 0) with code 8 (RFC 2347) or code 0 and "User aborted".
func isProbe(err error) bool {
	m := err.Error()
	return strings.HasPrefix(m, "sending block 0: code=8,") ||
		strings.HasPrefix(m, "sending block 0: code=0,") && strings.Contains(strings.ToLower(m), "abort")
}

// reader counts what is sent and stops when the server does.
type reader struct {
	s    *Server
	f    File
	p    Progress
	last int64
}

func (r *reader) Read(b []byte) (int, error) {
	if r.s.stop.Load() {
		return 0, errStopping
	}
	n, err := r.f.Read(b)
	first := r.p.Sent == 0 && n > 0
	r.p.Sent += int64(n)
	if first || r.p.Size > 0 && r.p.Sent-r.last >= (r.p.Size+9)/10 && r.p.Sent < r.p.Size {
		r.last = r.p.Sent
		r.s.report(r.p)
	}
	return n, err
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
