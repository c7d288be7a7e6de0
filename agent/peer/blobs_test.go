package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/fleet"
)

// shelf is a node's files in memory.
type shelf struct {
	mu    sync.Mutex
	files map[fetch.Digest][]byte
	have  map[fetch.Digest]int64
	// hold blocks reads until it is closed.
	hold  chan struct{}
	begun chan struct{}
	reads int
}

func newShelf() *shelf {
	return &shelf{files: map[fetch.Digest][]byte{}, have: map[fetch.Digest]int64{}}
}

func (s *shelf) put(b []byte) fetch.Digest {
	d := fetch.Digest(sha256.Sum256(b))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[d], s.have[d] = b, int64(len(b))
	return d
}

func (s *shelf) Standing(d fetch.Digest) fetch.Standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fetch.Standing{Have: s.have[d]}
}

func (s *shelf) Read(ctx context.Context, d fetch.Digest, off int64) ([]byte, error) {
	s.mu.Lock()
	s.reads++
	b, hold := s.files[d], s.hold
	s.mu.Unlock()
	if hold != nil {
		s.begun <- struct{}{}
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if off >= int64(len(b)) {
		return nil, fetch.ErrMissing
	}
	const piece = 64 << 10
	return b[off:min(off/piece*piece+piece, int64(len(b)))], nil
}

func (s *shelf) Manifest(d fetch.Digest) ([]byte, error) {
	if _, ok := s.files[d]; !ok {
		return nil, fetch.ErrMissing
	}
	return []byte("envelope"), nil
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(b)
	return b
}

// files makes a site in which b has files and a asks.
func files(t *testing.T, edit func(*Config)) (s *site, a, b *node, sh *shelf) {
	s, sh = newSite(t), newShelf()
	a, b = newNode(t, s), newNode(t, s)
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil)
	a.learn(charter, forA, forB)
	b.learn(charter, forA, forB)
	a.start(nil)
	b.start(func(c *Config) {
		c.Blobs = sh
		if edit != nil {
			edit(c)
		}
	})
	return s, a, b, sh
}

func TestPeersReadFiles(t *testing.T) {
	_, a, b, sh := files(t, nil)
	data := noise(700_001)
	d := sh.put(data)
	c := a.meet(b)
	for _, x := range []struct{ off, n, want int64 }{
		{0, 700_001, 700_001}, {0, 1, 1}, {65_535, 3, 3}, {700_000, 1, 1}, {700_000, 50, 1}, {300_000, 1 << 40, 400_001},
	} {
		r, err := c.Blob(t.Context(), d, x.off, x.n)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || int64(len(got)) != x.want || !bytes.Equal(got, data[x.off:x.off+x.want]) {
			t.Errorf("%+v: %d bytes, %v", x, len(got), err)
		}
		_ = r.Close()
	}
	if st, err := c.Standing(t.Context(), d); err != nil || st.Have != int64(len(data)) {
		t.Errorf("%+v %v", st, err)
	}
	if m, err := c.Manifest(t.Context(), d); err != nil || string(m) != "envelope" {
		t.Errorf("%s %v", m, err)
	}
	// What is not here, or not yet: on the same connection.
	for _, off := range []int64{700_001, 1 << 50} {
		if _, err := c.Blob(t.Context(), d, off, 10); !errors.Is(err, fetch.ErrMissing) {
			t.Errorf("at %d: %v", off, err)
		}
	}
	sh.have[d] = 100_000
	if _, err := c.Blob(t.Context(), d, 100_000, 10); !errors.Is(err, fetch.ErrMissing) {
		t.Errorf("what is not verified: %v", err)
	}
	if _, err := c.Manifest(t.Context(), fetch.Digest{9}); !errors.Is(err, fetch.ErrMissing) {
		t.Error(err)
	}
	if st, err := c.Standing(t.Context(), fetch.Digest{9}); err != nil || st != (fetch.Standing{}) {
		t.Errorf("%+v %v", st, err)
	}
	// The calls of the protocol go on, on the same connection.
	if _, err := c.Exchange(t.Context()); err != nil {
		t.Error(err)
	}
}

// The gate of all other calls: strangers and removed nodes read the refusal.
func TestFilesAreForAdmittedNodes(t *testing.T) {
	s, a, b, sh := files(t, nil)
	d := sh.put(noise(1000))
	for _, path := range []string{blobsPath, manifestsPath, standingsPath} {
		c, err := stranger(t, b, newKey(t), nil)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "GET %s%x HTTP/1.1\r\nHost: x\r\n\r\n", path, d)
		got, err := io.ReadAll(c)
		if !bytes.Contains(got, refusal) || bytes.Contains(got, []byte("Range")) {
			t.Errorf("%s: %q %v", path, got, err)
		}
		// Not even a node that is admitted, before hello.
		before := a.dial(b)
		if _, err := before.file(t.Context(), path, d, ""); err == nil {
			t.Errorf("%s was answered before hello", path)
		}
	}
	c := a.meet(b)
	if _, err := c.Standing(t.Context(), d); err != nil {
		t.Fatal("the negative twin:", err)
	}
	// A node without files answers as to any unknown call.
	if _, err := b.meet(a).Standing(t.Context(), d); !errors.Is(err, ErrRefused) {
		t.Error("it has no files and answers:", err)
	}
	b.learn(s.removal(t, a))
	if _, err := c.Standing(t.Context(), d); err == nil {
		t.Error("a removed node reads")
	}
	if sh.reads != 0 {
		t.Errorf("%d reads", sh.reads)
	}
}

func TestFilesAskedForStrangely(t *testing.T) {
	_, a, b, sh := files(t, nil)
	d := sh.put(noise(1000))
	for _, span := range []string{"bytes=", "bytes=5", "bytes=-5", "bytes=5-", "bytes=9-3", "bytes=0-1,4-5", "items=0-5", "bytes=+1-5", "bytes=99999999999999999999-1", strings.Repeat("9", 4000)} {
		c := a.meet(b)
		if res, err := c.file(t.Context(), blobsPath, d, span); err == nil {
			_ = res.Body.Close()
			t.Errorf("range %.40q was served", span)
		}
		_ = c.Close()
	}
	c := a.meet(b)
	for _, path := range []string{blobsPath + "../../etc", manifestsPath, standingsPath + strings.Repeat("Ab", 32), "/v1/nothing/" + strings.Repeat("ab", 32)} {
		if _, _, ok := blobPath(path); ok {
			t.Errorf("%s is a file's path", path)
		}
	}
	if _, err := c.Blob(t.Context(), d, 0, 1000); err != nil {
		t.Error("the negative twin:", err)
	}
	if sh.reads != 1 {
		t.Errorf("%d reads", sh.reads)
	}
}

func TestFilesAreBounded(t *testing.T) {
	_, a, b, sh := files(t, func(c *Config) { c.Limits.BlobsPerNode = 1; c.Limits.BlobsPerKey = 6 })
	d := sh.put(noise(1000))
	sh.hold, sh.begun = make(chan struct{}), make(chan struct{}, 1)
	first, second := a.meet(b), a.meet(b)
	got := make(chan error, 1)
	go func() {
		r, err := first.Blob(context.WithoutCancel(t.Context()), d, 0, 1000)
		if err == nil {
			_, err = io.Copy(io.Discard, r)
			_ = r.Close()
		}
		got <- err
	}()
	<-sh.begun
	if _, err := second.Blob(t.Context(), d, 0, 1000); !errors.Is(err, ErrBusy) {
		t.Error("a second one at once:", err)
	}
	close(sh.hold)
	if err := <-got; err != nil {
		t.Error(err)
	}
	busy := false
	for range 10 {
		_, err := second.Standing(t.Context(), d)
		busy = busy || errors.Is(err, ErrBusy)
	}
	if !busy {
		t.Error("a node may ask for ever")
	}
}

// Three nodes and a centre that counts: a file crosses the line once, over real
// connections, and a peer that lies is dropped.
func TestMatesShareAFile(t *testing.T) {
	s := newSite(t)
	data := noise(1 << 20)
	const chunk = 64 << 10
	blob := fetch.Blob{Digest: sha256.Sum256(data), Size: int64(len(data)), ChunkSize: chunk}
	for off := 0; off < len(data); off += chunk {
		blob.Chunks = append(blob.Chunks, sha256.Sum256(data[off:off+chunk]))
	}
	var nodes []*node
	docs := [][]byte{s.signCharter(t, nil)}
	for range 4 {
		n := newNode(t, s)
		nodes = append(nodes, n)
		docs = append(docs, s.admission(t, n, nil))
	}
	centre := &counted{data: data}
	var at []Address
	type part struct {
		shelf *shelf
		team  *fetch.Team
	}
	parts := make([]part, len(nodes))
	liar := newShelf()
	for i, n := range nodes {
		n.learn(docs...)
		parts[i] = part{newShelf(), &fetch.Team{Self: string(n.id)}}
		if i == 3 {
			bad := append([]byte{}, data...)
			bad[5]++
			liar.files[blob.Digest], liar.have[blob.Digest] = bad, int64(len(bad))
			n.start(func(c *Config) { c.Blobs = liar })
		} else {
			n.start(func(c *Config) { c.Blobs = shared{parts[i].shelf, parts[i].team} })
		}
		at = append(at, Address{Node: n.id, At: netip.MustParseAddrPort(n.addr)})
	}
	var wg sync.WaitGroup
	var lies atomic.Int64
	for i, n := range nodes[:3] {
		m := &Mates{Peer: n.peer, Addresses: func() []Address { return at }}
		t.Cleanup(m.Close)
		if got := len(m.List()); got != 3 {
			t.Fatalf("%d mates", got)
		}
		parts[i].team.Mates = m.List
		wg.Go(func() {
			f := &fetch.Fetcher{Team: parts[i].team, Sources: func() []fetch.Source { return []fetch.Source{centre} }}
			var out []byte
			err := f.Chunks(t.Context(), blob, 0, func(_ int, _ int64, c []byte) error {
				out = append(out, c...)
				sh := parts[i].shelf
				sh.mu.Lock()
				defer sh.mu.Unlock()
				sh.files[blob.Digest], sh.have[blob.Digest] = bytes.Clone(out), int64(len(out))
				return nil
			})
			if err != nil || !bytes.Equal(out, data) {
				t.Errorf("node %d: %d bytes, %v", i, len(out), err)
			}
			lies.Add(int64(f.Lies(string(nodes[3].id))))
		})
	}
	wg.Wait()
	if lies.Load() == 0 {
		t.Error("nobody noticed the liar")
	}
	centre.mu.Lock()
	defer centre.mu.Unlock()
	// Real clocks: two may begin at the same moment; more than a second
	// download of everything is a fault whatever the machine.
	t.Logf("the centre sent %.3f x the file", float64(centre.sent)/float64(len(data)))
	if centre.sent > 2*int64(len(data)) {
		t.Errorf("the centre sent %d bytes for %d", centre.sent, len(data))
	}
}

// shared is what a node says: its files and its fetches.
type shared struct {
	*shelf
	team *fetch.Team
}

func (s shared) Standing(d fetch.Digest) fetch.Standing {
	st := s.team.Standing(d)
	st.Have = s.shelf.Standing(d).Have
	return st
}

type counted struct {
	data []byte
	mu   sync.Mutex
	sent int64
}

func (*counted) Name() string { return "centre" }

func (c *counted) Open(_ context.Context, _ fetch.Digest, off, n int64) (io.ReadCloser, error) {
	c.mu.Lock()
	c.sent += n
	c.mu.Unlock()
	return io.NopCloser(bytes.NewReader(c.data[off : off+n])), nil
}

// Who is removed, or was never admitted, is no mate.
func TestMatesAreAdmitted(t *testing.T) {
	s, a, b, _ := files(t, nil)
	m := &Mates{Peer: a.peer, Addresses: func() []Address {
		return []Address{{Node: a.id}, {Node: b.id, At: netip.MustParseAddrPort(b.addr)}, {Node: b.id}, {Node: fleet.NodeID("n-stranger")}}
	}}
	defer m.Close()
	if l := m.List(); len(l) != 1 || l[0].Name() != string(b.id) {
		t.Fatalf("%v", l)
	}
	if _, err := m.List()[0].Standing(t.Context(), fetch.Digest{1}); err != nil {
		t.Error(err)
	}
	a.learn(s.removal(t, b))
	if l := m.List(); len(l) != 0 {
		t.Errorf("%v", l)
	}
}

func FuzzFileRequest(f *testing.F) {
	f.Add(blobsPath+strings.Repeat("ab", 32), "bytes=0-4194303")
	f.Add(standingsPath+strings.Repeat("0", 64), "")
	f.Add(manifestsPath+"zz", "bytes=5-")
	f.Add("/", "bytes=18446744073709551615-18446744073709551616")
	f.Fuzz(func(t *testing.T, path, span string) {
		what, d, ok := blobPath(path)
		if ok && fmt.Sprintf("%s%x", what, d) != path {
			t.Fatalf("%q is read as %s%x", path, what, d)
		}
		from, to, err := parseRange(span)
		if err == nil && (from < 0 || to < from) {
			t.Fatalf("%q is read as %d-%d", span, from, to)
		}
		if err == nil && span != "" && strings.Trim(span, "bytes=-0123456789") != "" {
			t.Fatalf("%q was taken", span)
		}
	})
}
