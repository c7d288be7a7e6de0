package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/api/peer/v1/peerv1connect"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
)

// Constant keys of log lines.
const (
	keyNode   = "node"
	keySource = "source"
	keyWhy    = "why"
	keyError  = "error"
	keyCall   = "call"
	keyBlob   = "blob"
	keyBoot   = "boot"
	keyImage  = "image"
)

// Caps of bodies in bytes, by procedure.
const (
	maxHelloBody     = 32 << 10
	maxDocumentsBody = 2 << 20
	maxStatusBody    = 64 << 10
	maxAttestBody    = maxEventLog + 64<<10
	maxSmallBody     = 16 << 10
	maxChunk         = 256 << 10
)

// callTime is how long one call may take to arrive and to be answered; calls
// that carry blobs have it for each chunk.
const callTime = 30 * time.Second

// maxHandshake is how many bytes a caller may send before its handshake is
// done. An honest one takes three thousand; TLS alone would take in hundreds of
// thousands.
const maxHandshake = 16 << 10

// capped bounds what is read from a connection until it is set free.
type capped struct {
	net.Conn
	left atomic.Int64
	free atomic.Bool
}

func (c *capped) Read(b []byte) (int, error) {
	if c.free.Load() {
		return c.Conn.Read(b)
	}
	left := c.left.Load()
	if left <= 0 {
		return 0, errors.New("peer: the handshake is too long")
	}
	n, err := c.Conn.Read(b[:min(int64(len(b)), left)])
	c.left.Add(-int64(n))
	return n, err
}

// link is the server's side of one connection.
type link struct {
	conn     *tls.Conn
	place    *place
	public   *ecdsa.PublicKey
	key      papers.Ref
	exporter [exporterLength]byte
	source   netip.AddrPort

	mu sync.Mutex
	// node is set once hello has succeeded, at when that was.
	node      fleet.NodeID
	helloAt   time.Time
	serves    netip.AddrPort
	challenge *challenge
	proof     *proof
	// secrets are wiped when the call is over.
	secrets [][]byte
}

type linkKey struct{}

func linkOf(ctx context.Context) *link {
	l, _ := ctx.Value(linkKey{}).(*link)
	return l
}

// greeted returns the node at the other end, "" before hello.
func (l *link) greeted() (fleet.NodeID, netip.AddrPort) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.node, l.serves
}

// Run serves peers on ln until ctx ends, and closes ln.
func (p *Peer) Run(ctx context.Context, ln net.Listener) error {
	config, err := serverTLS()
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ready := &handed{addr: ln.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	server := &http.Server{
		Handler:           p.handler(),
		ReadHeaderTimeout: p.cfg.Limits.Hello,
		IdleTimeout:       p.cfg.Limits.Idle,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(p.cfg.Log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, linkKey{}, c.(*serverConn).link)
		},
	}
	var wg sync.WaitGroup
	var fault error
	wg.Go(func() { fault = p.accept(ctx, ln, config, ready) })
	wg.Go(func() { p.watchRemovals(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		_ = ln.Close()
		_ = server.Close()
	})
	err = server.Serve(ready)
	cancel()
	wg.Wait()
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return fault
	}
	return fmt.Errorf("peer: serve: %w", err)
}

// handed is a listener that hands over connections whose handshake is done.
type handed struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handed) Close() error   { h.once.Do(func() { close(h.done) }); return nil }
func (h *handed) Addr() net.Addr { return h.addr }

// serverConn gives the place back when the connection ends.
type serverConn struct {
	*tls.Conn
	link  *link
	leave func()
}

func (c *serverConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// accept takes connections until the listener ends.
func (p *Peer) accept(ctx context.Context, ln net.Listener, config *tls.Config, ready *handed) error {
	defer ready.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	for pause := time.Duration(0); ; {
		raw, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("peer: accept: %w", err)
			}
			// Out of descriptors, as a rule: it passes.
			pause = min(max(5*time.Millisecond, 2*pause), time.Second)
			p.cfg.Log.Warn("no connection can be taken", slog.Any(keyError, err))
			if sleep.For(ctx, pause) != nil {
				return nil
			}
			continue
		}
		pause = 0
		source := addrOf(raw.RemoteAddr())
		at := p.gate.enter(p.cfg.Now(), source.Addr(), func() { abort(raw) })
		if at == nil {
			abort(raw)
			continue
		}
		wg.Go(func() { p.handshake(ctx, raw, source, at, config, ready) })
	}
}

// abort ends a connection without waiting for anything.
func abort(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = t.SetLinger(0) // nothing unsent is worth a buffer
	}
	_ = c.Close()
}

func addrOf(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// handshake proves the caller's key and hands the connection over. From its
// beginning to the end of hello there is one deadline.
func (p *Peer) handshake(ctx context.Context, raw net.Conn, source netip.AddrPort, at *place, config *tls.Config, ready *handed) {
	timer := time.AfterFunc(p.cfg.Limits.Hello, func() {
		if p.gate.expire(at) {
			abort(raw)
		}
	})
	leave := sync.OnceFunc(func() { timer.Stop(); p.gate.leave(at) })
	bounded := &capped{Conn: raw}
	bounded.left.Store(maxHandshake)
	conn := tls.Server(bounded, config)
	hctx, cancel := context.WithTimeout(ctx, p.cfg.Limits.Hello)
	defer cancel()
	l, err := func() (*link, error) {
		if err := conn.HandshakeContext(hctx); err != nil {
			return nil, err
		}
		bounded.free.Store(true)
		public, err := keyOf(conn.ConnectionState())
		if err != nil {
			return nil, err
		}
		key, err := papers.KeyRef(public)
		if err != nil {
			return nil, err
		}
		exporter, err := exporterOf(conn)
		if err != nil {
			return nil, err
		}
		return &link{conn: conn, place: at, public: public, key: key, exporter: exporter, source: source}, nil
	}()
	if err != nil {
		leave()
		abort(raw)
		p.cfg.Log.Debug("handshake failed", slog.String(keySource, source.String()), slog.Any(keyError, err))
		return
	}
	select {
	case ready.conns <- &serverConn{Conn: conn, link: l, leave: leave}:
	case <-ready.done:
		leave()
		abort(raw)
	}
}

// watchRemovals ends the connections of nodes that are admitted no longer.
func (p *Peer) watchRemovals(ctx context.Context) {
	for {
		changed := p.cfg.Papers.Changed()
		docs := p.cfg.Papers.Documents()
		for _, n := range p.gate.nodes() {
			if _, ok := docs.Admitted(n); !ok {
				p.cfg.Log.Info("node is admitted no longer", slog.String(keyNode, string(n)))
				p.gate.closeNode(n)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

var procedures = map[string]int{
	peerv1connect.PeerServiceHelloProcedure:        maxHelloBody,
	peerv1connect.PeerServiceDocumentsProcedure:    maxDocumentsBody,
	peerv1connect.PeerServiceStatusProcedure:       maxStatusBody,
	peerv1connect.PeerServiceChallengeProcedure:    maxSmallBody,
	peerv1connect.PeerServiceAttestProcedure:       maxAttestBody,
	peerv1connect.PeerServiceKeysProcedure:         maxSmallBody,
	peerv1connect.PeerServiceProveProcedure:        maxSmallBody,
	peerv1connect.PeerServiceJoinMaterialProcedure: maxSmallBody,
	peerv1connect.PeerServiceLeaseProcedure:        maxSmallBody,
	peerv1connect.PeerServiceTurnProcedure:         maxSmallBody,
	peerv1connect.PeerServiceKeepEscrowProcedure:   maxChunk + maxSmallBody,
	peerv1connect.PeerServiceGetEscrowProcedure:    maxSmallBody,
	peerv1connect.PeerServiceListEscrowProcedure:   maxSmallBody,
}

// handler puts hello before everything else. Whoever is not past it gets the
// same bytes, whatever he asks for.
func (p *Peer) handler() http.Handler {
	path, rpc := peerv1connect.NewPeerServiceHandler(service{p},
		connect.WithCompression("gzip", nil, nil), // nothing of a stranger is decompressed
		connect.WithConditionalHandlerOptions(func(s connect.Spec) []connect.HandlerOption {
			return []connect.HandlerOption{connect.WithReadMaxBytes(procedures[s.Procedure])}
		}),
		connect.WithRecover(func(_ context.Context, s connect.Spec, _ http.Header, v any) error {
			p.cfg.Log.Error("call failed", slog.String(keyCall, s.Procedure), slog.Any(keyError, fmt.Errorf("peer: panic: %v", v)))
			return connect.NewError(connect.CodeInternal, errors.New("fault"))
		}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l := linkOf(r.Context())
		w.Header()["Date"] = nil // not even the time
		most, known := procedures[r.URL.Path]
		hello := r.URL.Path == peerv1connect.PeerServiceHelloProcedure
		node, _ := l.greeted()
		what, file, isFile := blobPath(r.URL.Path)
		if isFile = isFile && p.cfg.Blobs != nil; isFile {
			known = true
		}
		if hello == (node != "") || !known || !isFile && !strings.HasPrefix(r.URL.Path, path) {
			refuse(w)
			return
		}
		if !hello {
			if a, s := p.cfg.Papers.Standing(l.key); s != papers.Admitted || a.Node != node {
				refuse(w)
				return
			}
		}
		if isFile {
			r.Body = http.MaxBytesReader(w, r.Body, 0)
			p.serveFile(w, r, l, what, file)
			return
		}
		if r.URL.Path != peerv1connect.PeerServiceKeepEscrowProcedure {
			r.Body = http.MaxBytesReader(w, r.Body, int64(most)+maxSmallBody)
		}
		p.extend(l)
		if hello {
			p.serveHello(w, r, l, rpc)
			return
		}
		rpc.ServeHTTP(w, r)
		l.wipe()
	})
}

// extend gives a call its time. An unproven connection keeps the deadline it
// has from its beginning.
func (p *Peer) extend(l *link) {
	_ = l.conn.SetDeadline(time.Now().Add(callTime))
}

// serveHello turns every failure of hello into the one refusal, and ends the
// connection.
func (p *Peer) serveHello(w http.ResponseWriter, r *http.Request, l *link, rpc http.Handler) {
	held := &kept{header: http.Header{}}
	rpc.ServeHTTP(held, r)
	if node, _ := l.greeted(); node == "" {
		refuse(w)
		return
	}
	for k, v := range held.header {
		w.Header()[k] = v
	}
	if held.code != 0 {
		w.WriteHeader(held.code)
	}
	_, _ = w.Write(held.body)
}

// kept holds an answer back until it is known to be one.
type kept struct {
	header http.Header
	code   int
	body   []byte
}

func (k *kept) Header() http.Header         { return k.header }
func (k *kept) WriteHeader(code int)        { k.code = code }
func (k *kept) Write(b []byte) (int, error) { k.body = append(k.body, b...); return len(b), nil }

// refusal is all that an unproven caller ever reads.
var refusal = func() []byte {
	b, err := json.Marshal(map[string]string{"code": connect.CodePermissionDenied.String(), "message": "refused"})
	if err != nil {
		panic(err) // two constant strings
	}
	return b
}()

func refuse(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusForbidden)
	_, _ = w.Write(refusal)
}

// wipe overwrites what must not stay in memory. What the encoder and TLS made
// of it is out of reach.
func (l *link) wipe() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.secrets {
		clear(s)
	}
	l.secrets = nil
}
