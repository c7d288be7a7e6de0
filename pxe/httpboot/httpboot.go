// Package httpboot hands the recovery image to UEFI HTTP boot firmware.
//
// Firmware is a poor HTTP client: EDK2 takes no redirect, asks HEAD for the
// size, tells the kind of file by Content-Type, and resumes with Range. So
// this server never redirects (no ServeMux, which cleans paths by 301) and
// answers everything that is not on its list with 404.
package httpboot

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// File is an image being read. *os.File is one, and only with it does the
// kernel copy the bytes by itself (sendfile).
type File interface {
	io.ReadSeekCloser
	Stat() (fs.FileInfo, error)
}

// Source opens files by their clean, slash-separated names. It returns an
// error that is fs.ErrNotExist for a name that is not on its list.
type Source interface {
	Open(name string) (File, error)
}

// Progress is one step of one download.
type Progress struct {
	Client netip.Addr
	Name   string
	// Sent counts bytes of this response, from Offset on; Size is the whole
	// file's.
	Sent, Offset, Size int64
	// Done: the last byte of the file was written to the connection.
	Done bool
	// Err ends a download that failed.
	Err error
}

// Config says where and what to serve.
type Config struct {
	// Addr to listen on, ":7480" by default.
	Addr string
	// Source is required.
	Source Source
	// Allow, if set, says who is answered at all; others are disconnected.
	Allow func(netip.Addr) bool
	// Progress, if set, is called at the start, every tenth part and the end
	// of each download.
	Progress func(Progress)
	// TLS, if set, serves HTTPS alone. Firmware knows TLS 1.2 and seldom
	// more, and checks the address in the URL against the certificate.
	TLS *tls.Config
	// MaxConns bounds open connections (1024 by default).
	MaxConns int
	Log      *slog.Logger
}

func (c *Config) validate() error {
	var errs []error
	if c.Source == nil {
		errs = append(errs, errors.New("httpboot: config: Source is missing"))
	}
	if c.MaxConns < 1 {
		errs = append(errs, fmt.Errorf("httpboot: config: MaxConns is %d", c.MaxConns))
	}
	return errors.Join(errs...)
}

// Server serves images by HTTP.
type Server struct {
	cfg  Config
	log  *slog.Logger
	ln   net.Listener
	http *http.Server
}

const (
	maxName = 256
	// chunk is what the kernel is given at a time; a download that does not
	// move one chunk in stall is dropped.
	chunk = 4 << 20
	stall = 2 * time.Minute
)

// FirmwareTLS is a configuration that firmware can talk to; its owner adds a
// certificate. TLS 1.2 is the newest that EDK2 before 2023 knows, and builds
// without elliptic curves offer plain RSA key exchange alone, which Go leaves
// out by default. What passes here is public and is verified again by Secure
// Boot and by measurement; TLS keeps others from standing in for us.
func FirmwareTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_RSA_WITH_AES_256_CBC_SHA, tls.TLS_RSA_WITH_AES_128_CBC_SHA,
		},
	}
}

// New opens the listener. Run serves; Close is for a server that is never
// run.
func New(cfg Config) (*Server, error) {
	if cfg.Addr == "" {
		cfg.Addr = ":7480"
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 1024
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp4", cfg.Addr)
	if err != nil {
		hint := ""
		if errors.Is(err, unix.EADDRINUSE) {
			hint = " (another program listens there: choose another HTTP boot port)"
		}
		return nil, fmt.Errorf("httpboot: open %s: %w%s", cfg.Addr, err, hint)
	}
	s := &Server{cfg: cfg, log: cfg.Log, ln: ln}
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		// What clients do wrong is not this host's error.
		ErrorLog:                     log.New(io.Discard, "", 0),
		DisableGeneralOptionsHandler: true,
		// HTTP/2 is nothing firmware speaks.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	return s, nil
}

// Addr is the address being listened on.
func (s *Server) Addr() netip.AddrPort { return s.ln.Addr().(*net.TCPAddr).AddrPort() }

// Close releases the listener of a server that is not running.
func (s *Server) Close() error { return s.ln.Close() }

// Run serves until ctx ends; downloads under way then are cut off.
func (s *Server) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.http.Close() })
	defer stop()
	var ln net.Listener = newLimit(s.ln.(*net.TCPListener), s.cfg.MaxConns)
	if s.cfg.TLS != nil {
		// The handshake takes part in ReadHeaderTimeout.
		ln = tls.NewListener(ln, s.cfg.TLS)
	}
	err := s.http.Serve(ln)
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("httpboot: serve: %w", err)
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	client := ap.Addr().Unmap()
	if err != nil || s.cfg.Allow != nil && !s.cfg.Allow(client) {
		h.Set("Connection", "close")
		notFound(w)
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		h.Set("Connection", "close")
		h.Set("Content-Length", "0")
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	name, ok := Clean(r.URL.Path)
	if !ok {
		notFound(w)
		return
	}
	f, err := s.cfg.Source.Open(name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.log.Error("image cannot be opened", "name", name, "error", err)
		}
		notFound(w)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		s.log.Error("image cannot be read", "name", name, "error", err)
		notFound(w)
		return
	}
	// ServeContent would answer 304 to a conditional request: firmware sends
	// none, caches in between might.
	for _, k := range []string{"If-Modified-Since", "If-None-Match", "If-Match", "If-Unmodified-Since", "If-Range"} {
		r.Header.Del(k)
	}
	// One range resumes a download; several are nothing firmware asks for.
	if strings.Contains(r.Header.Get("Range"), ",") {
		r.Header.Del("Range")
	}
	h.Set("Content-Type", contentType(name))
	h.Set("Cache-Control", "no-store")
	out := &writer{ResponseWriter: w, s: s, p: Progress{Client: client, Name: name, Size: st.Size()}}
	http.ServeContent(out, r, "", time.Time{}, f)
	out.finish(r)
}

func notFound(w http.ResponseWriter) {
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusNotFound)
}

// contentType is how EDK2 tells a program from a disk image.
func contentType(name string) string {
	switch {
	case strings.HasSuffix(name, ".efi"):
		return "application/efi"
	case strings.HasSuffix(name, ".iso"):
		return "application/vnd.efi-iso"
	case strings.HasSuffix(name, ".img"):
		return "application/vnd.efi-img"
	}
	return "application/octet-stream"
}

// Clean turns a URL path into a name, or says no. Repeated slashes are
// tolerated: firmware and people join URLs carelessly.
func Clean(p string) (string, bool) {
	if len(p) > maxName {
		return "", false
	}
	var parts []string
	for part := range strings.SplitSeq(p, "/") {
		if part != "" {
			parts = append(parts, part)
		}
	}
	n := strings.Join(parts, "/")
	if n == "" || n == "." || !fs.ValidPath(n) {
		return "", false
	}
	for i := range len(n) {
		if n[i] < 0x20 || n[i] > 0x7e || n[i] == '\\' {
			return "", false
		}
	}
	return n, true
}

// writer counts bytes without breaking sendfile: its ReadFrom hands the
// *os.File on, a chunk at a time.
type writer struct {
	http.ResponseWriter
	s      *Server
	p      Progress
	status int
	last   int64
}

// Unwrap lets http.ResponseController through.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *writer) WriteHeader(status int) {
	w.status = status
	if status == http.StatusPartialContent {
		// "bytes 100-199/1000"
		fmt.Sscanf(w.Header().Get("Content-Range"), "bytes %d-", &w.p.Offset)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(b []byte) (int, error) {
	w.alive()
	n, err := w.ResponseWriter.Write(b)
	w.count(int64(n), err)
	return n, err
}

// ReadFrom is what io.Copy calls.
func (w *writer) ReadFrom(src io.Reader) (int64, error) {
	rf, ok := w.ResponseWriter.(io.ReaderFrom)
	lr, limited := src.(*io.LimitedReader)
	if !ok || !limited {
		return io.Copy(struct{ io.Writer }{w}, src)
	}
	var total int64
	for lr.N > 0 {
		w.alive()
		part := &io.LimitedReader{R: lr.R, N: min(chunk, lr.N)}
		n, err := rf.ReadFrom(part)
		lr.N -= n
		total += n
		w.count(n, err)
		if err != nil || n == 0 {
			return total, err
		}
	}
	return total, nil
}

// alive moves the deadline: slow is allowed, stuck is not.
func (w *writer) alive() {
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(stall))
}

func (w *writer) count(n int64, err error) {
	first := w.p.Sent == 0 && n > 0
	w.p.Sent += n
	if err != nil {
		w.p.Err = err
		return
	}
	if first || w.p.Sent-w.last >= (w.p.Size+9)/10 && w.p.Offset+w.p.Sent < w.p.Size {
		w.last = w.p.Sent
		w.s.report(w.p)
	}
}

func (w *writer) finish(r *http.Request) {
	if r.Method == http.MethodHead || w.status >= 300 {
		return
	}
	w.p.Done = w.p.Err == nil && w.p.Offset+w.p.Sent == w.p.Size
	w.s.report(w.p)
}

func (s *Server) report(p Progress) {
	if s.cfg.Progress != nil {
		s.cfg.Progress(p)
	}
}
