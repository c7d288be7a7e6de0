package central

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/muster-edge/muster/fleet"
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
//
// The bound of a source is for strangers: a connection on which a node has
// proved itself counts for that node from then on, so that a whole chain may
// stand behind one address.
type limitListener struct {
	net.Listener
	total, perSource int
	refused          func()

	mu     sync.Mutex
	count  int
	source map[string]int
	nodes  map[fleet.NodeID]int
}

func newLimitListener(l net.Listener, total, perSource int, refused func()) *limitListener {
	return &limitListener{Listener: l, total: total, perSource: perSource, refused: refused, source: make(map[string]int), nodes: make(map[fleet.NodeID]int)}
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
			return &limitConn{Conn: c, l: l, from: from}, nil
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

// connsPerNode is how many connections a node may have beside those that
// count for its address. A well-behaved one has two.
const connsPerNode = 16

// prove counts the connection for a node and no more for its address. A node
// with many connections gets no more of them this way.
func (l *limitListener) prove(c *limitConn, id fleet.NodeID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.closed || c.node != "" || l.nodes[id] >= connsPerNode {
		return
	}
	c.node = id
	l.nodes[id]++
	l.fewer(c.from)
}

// fewer wants the lock.
func (l *limitListener) fewer(from string) {
	if l.source[from]--; l.source[from] <= 0 {
		delete(l.source, from)
	}
}

func (l *limitListener) leave(c *limitConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	l.count--
	if c.node == "" {
		l.fewer(c.from)
		return
	}
	if l.nodes[c.node]--; l.nodes[c.node] <= 0 {
		delete(l.nodes, c.node)
	}
}

type limitConn struct {
	net.Conn
	l    *limitListener
	from string
	// Both are under the lock of the listener.
	node   fleet.NodeID
	closed bool
}

// Close implements net.Conn.
func (c *limitConn) Close() error {
	c.l.leave(c)
	return c.Conn.Close()
}

type connKey struct{}

// withConn keeps the connection of a call where proved finds it.
func withConn(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// proved notes that the caller is a node: see limitListener.
func proved(ctx context.Context, id fleet.NodeID) {
	if c, ok := ctx.Value(connKey{}).(*limitConn); ok {
		c.l.prove(c, id)
	}
}

// sourceOf is the address without its port.
func sourceOf(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return remote
	}
	return host
}
