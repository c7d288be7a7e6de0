package central

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of both HTTPS endpoints. They are generous for people and machines
// and small for somebody who wants to sit on our sockets.
const (
	handshakeTimeout = 10 * time.Second
	idleTimeout      = 90 * time.Second
	maxHeaderBytes   = 16 << 10
	maxStreams       = 64
	defaultConns     = 8192
	// A site behind one address may have hundreds of nodes; more sockets
	// than this from one address is no site.
	defaultConnsPerSource = 1024
)

// httpServer returns a server with our limits. read bounds reading one
// request whole, write answering it (0: no bound, for event streams).
func httpServer(h http.Handler, t *tls.Config, base context.Context, log *slog.Logger, read, write time.Duration) *http.Server {
	return &http.Server{
		Handler:   h,
		TLSConfig: t,
		// net/http bounds the TLS handshake by the smallest of these three.
		ReadHeaderTimeout: handshakeTimeout,
		ReadTimeout:       read,
		WriteTimeout:      write,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		BaseContext:       func(net.Listener) context.Context { return base },
		// Handshakes fail all day at an endpoint that the world can reach.
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// limitListener closes connections beyond the limits at once, instead of
// leaving them in the queue where they would hold up honest ones.
type limitListener struct {
	net.Listener
	total, perSource int
	refused          func()

	mu     sync.Mutex
	count  int
	source map[string]int
}

func newLimitListener(l net.Listener, total, perSource int, refused func()) *limitListener {
	return &limitListener{Listener: l, total: total, perSource: perSource, refused: refused, source: make(map[string]int)}
}

// Accept implements net.Listener.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := sourceOf(c.RemoteAddr().String())
		if l.enter(from) {
			return &limitConn{Conn: c, leave: func() { l.leave(from) }}, nil
		}
		l.refused()
		_ = c.Close() // refused: nobody waits for it
	}
}

func (l *limitListener) enter(from string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count >= l.total || l.source[from] >= l.perSource {
		return false
	}
	l.count++
	l.source[from]++
	return true
}

func (l *limitListener) leave(from string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count--
	if l.source[from]--; l.source[from] <= 0 {
		delete(l.source, from)
	}
}

type limitConn struct {
	net.Conn
	once  sync.Once
	leave func()
}

// Close implements net.Conn.
func (c *limitConn) Close() error {
	c.once.Do(c.leave)
	return c.Conn.Close()
}

// sourceOf is the address without its port.
func sourceOf(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return remote
	}
	return host
}
