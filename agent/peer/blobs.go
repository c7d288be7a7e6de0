package peer

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/fleet"
)

// Blobs are the files that this node has for its peers: parts of the systems on
// its disk, and what it is fetching. All methods may be called at once.
type Blobs interface {
	// Standing is what this node says of a file.
	Standing(file fetch.Digest) fetch.Standing
	// Read returns bytes of a file from off on, at least one and at most
	// MaxPiece, that were verified a moment ago. fetch.ErrMissing: not here.
	Read(ctx context.Context, file fetch.Digest, off int64) ([]byte, error)
	// Manifest returns the signed manifest of an image.
	Manifest(image fetch.Digest) ([]byte, error)
}

// MaxPiece bounds what Blobs.Read returns.
const MaxPiece = 16 << 20

// Paths of files, with a SHA-256 in hex behind.
const (
	blobsPath     = "/v1/blobs/"
	manifestsPath = "/v1/manifests/"
	standingsPath = "/v1/standings/"
)

// blobStep is what is written under one deadline.
const blobStep = 256 << 10

// blobPath takes a path apart; ok is false for all that is no file's.
func blobPath(path string) (what string, d fetch.Digest, ok bool) {
	for _, what = range []string{blobsPath, manifestsPath, standingsPath} {
		if rest, found := strings.CutPrefix(path, what); found {
			if len(rest) != hex.EncodedLen(len(d)) || strings.ToLower(rest) != rest {
				return "", d, false
			}
			_, err := hex.Decode(d[:], []byte(rest))
			return what, d, err == nil
		}
	}
	return "", d, false
}

// parseRange reads "bytes=A-B" (RFC 9110, 14.1.2), one range with both ends:
// all that our own client sends. An empty one is the whole file.
func parseRange(s string) (from, to int64, err error) {
	if s == "" {
		return 0, 1<<62 - 1, nil
	}
	bad := fmt.Errorf("peer: range %.40q: want bytes=FROM-TO", s)
	a, b, ok := strings.Cut(strings.TrimPrefix(s, "bytes="), "-")
	if !ok || !strings.HasPrefix(s, "bytes=") {
		return 0, 0, bad
	}
	for _, x := range []string{a, b} {
		if x == "" || strings.Trim(x, "0123456789") != "" {
			return 0, 0, bad
		}
	}
	if from, err = strconv.ParseInt(a, 10, 62); err != nil {
		return 0, 0, bad
	}
	if to, err = strconv.ParseInt(b, 10, 62); err != nil || to < from {
		return 0, 0, bad
	}
	return from, to, nil
}

// readers bounds what is read for peers at a time, and how fast.
type readers struct {
	slots chan struct{}
	rate  int64

	mu   sync.Mutex
	free time.Time
	of   map[fleet.NodeID]int
}

// enter takes a place for a node; false: there is none.
func (r *readers) enter(n fleet.NodeID, most int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[n] >= most {
		return false
	}
	select {
	case r.slots <- struct{}{}:
	default:
		return false
	}
	if r.of == nil {
		r.of = map[fleet.NodeID]int{}
	}
	r.of[n]++
	return true
}

func (r *readers) leave(n fleet.NodeID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[n]--; r.of[n] <= 0 {
		delete(r.of, n)
	}
	<-r.slots
}

// pace returns how long to wait after n bytes, so that all together stay below
// the rate.
func (r *readers) pace(now time.Time, n int) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.free.Before(now) {
		r.free = now
	}
	r.free = r.free.Add(time.Duration(float64(n) / float64(r.rate) * float64(time.Second)))
	return r.free.Sub(now)
}

// serveFile answers an admitted node.
func (p *Peer) serveFile(w http.ResponseWriter, r *http.Request, l *link, what string, d fetch.Digest) {
	node, _ := l.greeted()
	if r.Method != http.MethodGet {
		http.Error(w, "peers read files and write none", http.StatusMethodNotAllowed)
		return
	}
	if !p.gate.filer(p.cfg.Now(), l.key) {
		http.Error(w, "this node asked for files often enough; later", http.StatusTooManyRequests)
		return
	}
	p.extend(l)
	switch what {
	case standingsPath:
		b, err := json.Marshal(p.cfg.Blobs.Standing(d))
		if err != nil {
			http.Error(w, "this node has a problem of its own", http.StatusInternalServerError)
			return
		}
		answer(w, "application/json", b)
	case manifestsPath:
		b, err := p.cfg.Blobs.Manifest(d)
		if err != nil {
			p.noFile(w, r, node, err)
			return
		}
		answer(w, "application/octet-stream", b)
	default:
		p.serveBlob(w, r, l, node, d)
	}
}

func answer(w http.ResponseWriter, kind string, b []byte) {
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b)
}

// noFile says that a file is not here.
func (p *Peer) noFile(w http.ResponseWriter, r *http.Request, node fleet.NodeID, err error) {
	if errors.Is(err, fetch.ErrMissing) {
		http.Error(w, "it is not here", http.StatusNotFound)
		return
	}
	if r.Context().Err() == nil {
		p.cfg.Log.Warn("a file cannot be served", slog.String(keyNode, string(node)), slog.String(keyBlob, r.URL.Path), slog.Any(keyError, err))
	}
	http.Error(w, "this node has a problem of its own", http.StatusServiceUnavailable)
}

func (p *Peer) serveBlob(w http.ResponseWriter, r *http.Request, l *link, node fleet.NodeID, d fetch.Digest) {
	from, to, err := parseRange(r.Header.Get("Range"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if !p.readers.enter(node, p.cfg.Limits.BlobsPerNode) {
		http.Error(w, "others are served; later", http.StatusTooManyRequests)
		return
	}
	defer p.readers.leave(node)
	have := p.cfg.Blobs.Standing(d).Have
	if from >= have {
		p.noFile(w, r, node, fetch.ErrMissing)
		return
	}
	to = min(to, have-1)
	b, err := p.cfg.Blobs.Read(r.Context(), d, from)
	if err != nil || len(b) == 0 {
		p.noFile(w, r, node, errors.Join(err))
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", from, to))
	w.Header().Set("Content-Length", strconv.FormatInt(to-from+1, 10))
	w.WriteHeader(http.StatusPartialContent)
	for at := from; ; {
		b = b[:min(int64(len(b)), to-at+1)]
		at += int64(len(b))
		for len(b) > 0 {
			n := min(len(b), blobStep)
			p.extend(l)
			if _, err := w.Write(b[:n]); err != nil {
				return // the peer is gone, or too slow
			}
			b = b[n:]
			if !pause(r.Context(), p.readers.pace(time.Now(), n)) {
				return
			}
		}
		if at > to {
			return
		}
		// A removal in the middle ends the connection, and with it this.
		if b, err = p.cfg.Blobs.Read(r.Context(), d, at); err != nil || len(b) == 0 {
			p.cfg.Log.Warn("a file cannot be served any further", slog.String(keyNode, string(node)), slog.String(keyBlob, r.URL.Path), slog.Any(keyError, err))
			panic(http.ErrAbortHandler) // ends the connection: it is short
		}
	}
}

// pause waits; false: the caller is gone.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// file asks the peer for a file, from which the answer is still to be read.
func (c *Conn) file(ctx context.Context, what string, d fetch.Digest, span string) (*http.Response, error) {
	if err := c.ready(); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://peer"+what+hex.EncodeToString(d[:]), nil)
	if err != nil {
		return nil, fmt.Errorf("peer: ask for a file: %w", err)
	}
	if span != "" {
		req.Header.Set("Range", span)
	}
	res, err := c.transport.RoundTrip(req)
	if err != nil {
		return nil, failed("ask for a file", err)
	}
	switch res.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
		return res, nil
	case http.StatusNotFound:
		err = fetch.ErrMissing
	case http.StatusTooManyRequests:
		err = fmt.Errorf("peer: ask for a file: %w", ErrBusy)
	case http.StatusForbidden:
		err = fmt.Errorf("peer: ask for a file: %w", ErrRefused)
	default:
		err = fmt.Errorf("peer: ask for a file: it answers %d", res.StatusCode)
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 4<<10)) // so that the connection can be used again
	_ = res.Body.Close()
	return nil, err
}

// small reads a short answer.
func (c *Conn) small(ctx context.Context, what string, d fetch.Digest, most int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	res, err := c.file(ctx, what, d, "")
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, most+1))
	if err != nil {
		return nil, failed("read a file", err)
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("peer: read a file: more than %d bytes", most)
	}
	return b, nil
}

// Standing asks what the peer has of a file.
func (c *Conn) Standing(ctx context.Context, d fetch.Digest) (fetch.Standing, error) {
	b, err := c.small(ctx, standingsPath, d, fetch.MaxStanding)
	if err != nil {
		return fetch.Standing{}, err
	}
	return fetch.ParseStanding(b)
}

// Manifest asks for the manifest of an image. Nothing of it is believed.
func (c *Conn) Manifest(ctx context.Context, d fetch.Digest) ([]byte, error) {
	return c.small(ctx, manifestsPath, d, fleet.MaxManifest)
}

// Blob returns bytes of a file from off on, at most n. Nothing is believed:
// the caller compares digests.
func (c *Conn) Blob(ctx context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	res, err := c.file(ctx, blobsPath, d, fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusPartialContent || !strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", off)) {
		_ = res.Body.Close()
		return nil, errors.New("peer: read a file: other bytes than those asked for")
	}
	return res.Body, nil
}

// Mates are the peers of the site as sources of files: one connection to each,
// made when it is needed. A connection serves one at a time.
type Mates struct {
	Peer *Peer
	// Addresses are where peers are, the best of a node first.
	Addresses func() []Address

	mu sync.Mutex
	of map[fleet.NodeID]*mateConn
}

// redial is the pause after a peer that could not be reached.
const redial = 5 * time.Second

type mateConn struct {
	m    *Mates
	node fleet.NodeID
	// busy has one place: who holds it uses conn.
	busy   chan struct{}
	conn   *Conn
	failed time.Time
}

// List returns who can be asked now.
func (m *Mates) List() []fetch.Mate {
	docs := m.Peer.cfg.Papers.Documents()
	var out []fetch.Mate
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.of == nil {
		m.of = map[fleet.NodeID]*mateConn{}
	}
	known := map[fleet.NodeID]bool{}
	for _, a := range m.Addresses() {
		if _, ok := docs.Admitted(a.Node); !ok || known[a.Node] || a.Node == m.Peer.cfg.Self {
			continue
		}
		known[a.Node] = true
		c := m.of[a.Node]
		if c == nil {
			c = &mateConn{m: m, node: a.Node, busy: make(chan struct{}, 1)}
			m.of[a.Node] = c
		}
		out = append(out, c)
	}
	for n, c := range m.of {
		if !known[n] {
			delete(m.of, n)
			go c.hangUp() // it may be in use
		}
	}
	return out
}

// Close ends all connections.
func (m *Mates) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, c := range m.of {
		delete(m.of, n)
		go c.hangUp()
	}
}

func (c *mateConn) hangUp() {
	c.busy <- struct{}{}
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
	<-c.busy
}

// Name implements fetch.Source.
func (c *mateConn) Name() string { return string(c.node) }

// use takes the connection; give it back with done. broken: it is not used
// again.
func (c *mateConn) use(ctx context.Context) (conn *Conn, done func(broken bool), err error) {
	select {
	case c.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("peer: ask %s: %w", c.node, context.Cause(ctx))
	}
	done = sync.OnceValue(func() func(bool) {
		return func(broken bool) {
			if broken && c.conn != nil {
				_ = c.conn.Close()
				c.conn = nil
			}
			<-c.busy
		}
	})()
	if c.conn == nil {
		if !c.failed.IsZero() && time.Since(c.failed) < redial {
			done(false)
			return nil, nil, fmt.Errorf("peer: ask %s: it could not be reached a moment ago", c.node)
		}
		if c.conn, err = c.dial(ctx); err != nil {
			c.failed = time.Now()
			done(false)
			return nil, nil, err
		}
		c.failed = time.Time{}
	}
	return c.conn, done, nil
}

// dial tries the addresses of the node.
func (c *mateConn) dial(ctx context.Context) (*Conn, error) {
	errs := []error{fmt.Errorf("peer: ask %s: it cannot be reached", c.node)}
	for _, a := range c.m.Addresses() {
		if a.Node != c.node || len(errs) > 3 {
			continue
		}
		conn, err := c.m.Peer.Dial(ctx, a.At.String())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		g, err := conn.Hello(ctx)
		if err == nil && g.Node == c.node {
			return conn, nil
		}
		_ = conn.Close()
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// broken reports whether the connection is of no more use after err.
func broken(err error) bool {
	return err != nil && !errors.Is(err, fetch.ErrMissing) && !errors.Is(err, ErrBusy)
}

// Standing implements fetch.Mate.
func (c *mateConn) Standing(ctx context.Context, d fetch.Digest) (fetch.Standing, error) {
	conn, done, err := c.use(ctx)
	if err != nil {
		return fetch.Standing{}, err
	}
	st, err := conn.Standing(ctx, d)
	done(broken(err))
	return st, err
}

// Manifest asks the peer for a manifest.
func (c *mateConn) Manifest(ctx context.Context, d fetch.Digest) ([]byte, error) {
	conn, done, err := c.use(ctx)
	if err != nil {
		return nil, err
	}
	b, err := conn.Manifest(ctx, d)
	done(broken(err))
	return b, err
}

// Open implements fetch.Source.
func (c *mateConn) Open(ctx context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	conn, done, err := c.use(ctx)
	if err != nil {
		return nil, err
	}
	r, err := conn.Blob(ctx, d, off, n)
	if err != nil {
		done(broken(err))
		return nil, err
	}
	return &mateReader{ReadCloser: r, done: done}, nil
}

// mateReader gives the connection back when it is closed.
type mateReader struct {
	io.ReadCloser
	done  func(bool)
	once  sync.Once
	ended bool
	mu    sync.Mutex
}

// Read implements io.Reader.
func (r *mateReader) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	if errors.Is(err, io.EOF) {
		r.mu.Lock()
		r.ended = true
		r.mu.Unlock()
	}
	return n, err
}

// Close implements io.Closer. An answer that was not read to its end is of no
// use to anybody, and neither is its connection.
func (r *mateReader) Close() error {
	err := r.ReadCloser.Close()
	r.once.Do(func() {
		r.mu.Lock()
		ended := r.ended
		r.mu.Unlock()
		r.done(!ended)
	})
	return err
}
