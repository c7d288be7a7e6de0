package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// hall is a site on virtual time: nodes with real fetchers, one line to the
// centre for all of them, a LAN between.
type hall struct {
	t     *testing.T
	data  []byte
	blob  Blob
	nodes []*box
	rate  float64 // of the line, bytes a second

	mu   sync.Mutex
	free time.Time // when the line can take the next byte
	cuts []time.Time
	down time.Duration
	wan  int64
	most int // centre transfers at one time
	now  int
}

// box is one node of it.
type box struct {
	h      *hall
	name   string
	team   *Team
	f      *Fetcher
	centre float64 // bytes a second of its own way to the centre; 0: the line's
	dark   bool    // no way to the centre
	lies   bool

	mu   sync.Mutex
	on   bool
	have []byte
	done time.Time
	told []string
}

func newHall(t *testing.T, nodes, size int, chunk int64, rate float64) *hall {
	h := &hall{t: t, data: content(size), rate: rate}
	h.blob = blob(h.data, chunk)
	for i := range nodes {
		b := &box{h: h, name: fmt.Sprintf("node-%02d", i), on: true}
		b.team = &Team{Self: b.name, Mates: b.mates}
		b.f = &Fetcher{Team: b.team, Sources: func() []Source { return []Source{line{b}} }, Progress: func(_, _ int64, waiting string) {
			if waiting != "" && (len(b.told) == 0 || b.told[len(b.told)-1] != waiting) {
				b.told = append(b.told, waiting)
			}
		}}
		h.nodes = append(h.nodes, b)
	}
	return h
}

func (b *box) mates() (out []Mate) {
	for _, x := range b.h.nodes {
		if x != b {
			out = append(out, mateOf{b, x})
		}
	}
	return out
}

func (b *box) alive() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.on }

// mateOf is x as b sees it.
type mateOf struct{ b, x *box }

func (m mateOf) Name() string { return m.x.name }

var errAway = errors.New("no route to host")

func (m mateOf) Standing(ctx context.Context, d Digest) (Standing, error) {
	if !m.x.alive() || !m.b.alive() {
		<-ctx.Done()
		return Standing{}, errAway
	}
	time.Sleep(time.Millisecond)
	st := m.x.team.Standing(d)
	m.x.mu.Lock()
	st.Have = int64(len(m.x.have))
	m.x.mu.Unlock()
	if m.x.lies {
		st.Have = m.b.h.blob.Size
	}
	return st, nil
}

func (m mateOf) Open(_ context.Context, _ Digest, off, n int64) (io.ReadCloser, error) {
	time.Sleep(time.Millisecond)
	if !m.x.alive() || !m.b.alive() {
		return nil, errAway
	}
	if m.x.lies {
		return io.NopCloser(bytes.NewReader(make([]byte, n))), nil
	}
	m.x.mu.Lock()
	have := m.x.have
	m.x.mu.Unlock()
	end := min(off+n, int64(len(have)))
	if off >= end {
		return nil, ErrMissing
	}
	time.Sleep(time.Duration(float64(end-off) / 100e6 * float64(time.Second)))
	return io.NopCloser(bytes.NewReader(have[off:end])), nil
}

// line is the way to the centre.
type line struct{ b *box }

func (line) Name() string { return "centre" }

func (l line) away(now time.Time) bool {
	for _, c := range l.b.h.cuts {
		if !now.Before(c) && now.Before(c.Add(l.b.h.down)) {
			return true
		}
	}
	l.b.mu.Lock()
	defer l.b.mu.Unlock()
	return l.b.dark || !l.b.on
}

func (l line) Open(ctx context.Context, _ Digest, off, n int64) (io.ReadCloser, error) {
	time.Sleep(20 * time.Millisecond)
	if l.away(time.Now()) {
		time.Sleep(time.Second)
		return nil, errors.New("network is unreachable")
	}
	h := l.b.h
	h.mu.Lock()
	h.now++
	h.most = max(h.most, h.now)
	h.mu.Unlock()
	return &lineReader{l: l, ctx: ctx, off: off, end: off + n}, nil
}

type lineReader struct {
	l        line
	ctx      context.Context
	off, end int64
	once     sync.Once
}

func (r *lineReader) Close() error {
	r.once.Do(func() {
		r.l.b.h.mu.Lock()
		r.l.b.h.now--
		r.l.b.h.mu.Unlock()
	})
	return nil
}

func (r *lineReader) Read(b []byte) (int, error) {
	h := r.l.b.h
	n := min(len(b), int(r.end-r.off), 8<<10)
	if n == 0 {
		return 0, io.EOF
	}
	rate := h.rate
	r.l.b.mu.Lock()
	own := r.l.b.centre
	r.l.b.mu.Unlock()
	if own > 0 {
		rate = own
	}
	h.mu.Lock()
	now := time.Now()
	if h.free.Before(now) {
		h.free = now
	}
	at := h.free.Add(time.Duration(float64(n) / rate * float64(time.Second)))
	if own == 0 { // a way of its own does not fill the line
		h.free = at
	}
	h.mu.Unlock()
	select {
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	case <-time.After(at.Sub(now)):
	}
	if r.l.away(time.Now()) {
		return 0, errors.New("connection reset by peer")
	}
	h.mu.Lock()
	h.wan += int64(n)
	h.mu.Unlock()
	copy(b, h.data[r.off:r.off+int64(n)])
	r.off += int64(n)
	return n, nil
}

// run has all nodes fetch; start delays each, ctx of a node may end before.
func (h *hall) run(start func(i int) time.Duration, ctxs map[int]context.Context) {
	h.t.Helper()
	var wg sync.WaitGroup
	for i, b := range h.nodes {
		ctx := h.t.Context()
		if c, ok := ctxs[i]; ok {
			ctx = c
		}
		wg.Go(func() {
			time.Sleep(start(i))
			first := len(b.have) / int(max(h.blob.ChunkSize, 1))
			err := b.f.Chunks(ctx, h.blob, first, func(_ int, _ int64, c []byte) error {
				time.Sleep(5 * time.Millisecond) // the disk
				b.mu.Lock()
				b.have = append(b.have, c...)
				b.mu.Unlock()
				return nil
			})
			if err == nil {
				b.done = time.Now()
			} else if ctx.Err() == nil {
				h.t.Errorf("%s: %v", b.name, err)
			}
		})
	}
	wg.Wait()
}

func (h *hall) judge(most float64, except ...int) {
	h.t.Helper()
	for i, b := range h.nodes {
		skip := false
		for _, x := range except {
			skip = skip || x == i
		}
		if !skip && !bytes.Equal(b.have, h.data) {
			h.t.Errorf("%s has %d bytes of %d: %s", b.name, len(b.have), len(h.data), strings.Join(b.told, "; "))
		}
	}
	ratio := float64(h.wan) / float64(len(h.data))
	h.t.Logf("%d nodes, %d bytes: WAN %.3f x image, at most %d transfers at once", len(h.nodes), len(h.data), ratio, h.most)
	if ratio > most {
		h.t.Errorf("the line carried %.3f x the image, at most %.2f is right", ratio, most)
	}
}

func at(d ...time.Duration) func(int) time.Duration {
	return func(i int) time.Duration { return d[i%len(d)] }
}

// What the whole is about: one download for a site.
func TestSiteFetchesOnce(t *testing.T) {
	for _, c := range []struct {
		name        string
		nodes, size int
		start       func(int) time.Duration
	}{
		{"3 nodes at the same moment", 3, 8 << 20, at(0)},
		{"3 nodes one after the other", 3, 8 << 20, at(0, 7*time.Second, time.Hour)},
		{"30 nodes within a minute", 30, 4 << 20, func(i int) time.Duration { return time.Duration(i*7%30) * 2 * time.Second }},
		{"30 nodes at the same moment", 30, 4 << 20, at(0)},
		{"a file without chunks", 3, 4 << 20, at(0, time.Second, 2*time.Second)},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				chunk := int64(128 << 10)
				if c.name == "a file without chunks" {
					chunk = 0
				}
				h := newHall(t, c.nodes, c.size, chunk, 5e5)
				h.run(c.start, nil)
				h.judge(1.05)
			})
		})
	}
}

// The line is cut 20 times, and the centre is away for an hour: still once.
func TestSiteFetchesOnceOverBadLines(t *testing.T) {
	for name, c := range map[string]struct {
		size  int
		rate  float64
		every time.Duration
		down  time.Duration
		cuts  int
	}{
		"64 kbit/s, 20 cuts":           {4 << 20, 8e3, 25 * time.Second, 3 * time.Second, 20},
		"20 Mbit/s, 20 cuts":           {16 << 20, 2.5e6, 300 * time.Millisecond, 100 * time.Millisecond, 20},
		"the centre away for an hour":  {8 << 20, 5e5, 4 * time.Second, time.Hour, 1},
		"three times for five minutes": {8 << 20, 5e5, 304 * time.Second, 5 * time.Minute, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHall(t, 3, c.size, 256<<10, c.rate)
				h.down = c.down
				for i := range c.cuts {
					h.cuts = append(h.cuts, time.Now().Add(time.Duration(i+1)*c.every))
				}
				h.run(at(0, time.Second, 3*time.Second), nil)
				// Two that begin in one moment see it within half a second; until
				// then the line carries some of so small a file twice.
				twice := c.rate + 2*256<<10
				h.judge(1 + max(0.05, twice/float64(c.size)))
			})
		})
	}
}

// Who fetches dies, has no way to the centre, or a bad one: another goes on.
func TestSiteGoesOnWithoutTheOneThatFetches(t *testing.T) {
	for name, c := range map[string]struct {
		bad  func(b *box)
		most float64
	}{
		"it dies":                    {func(b *box) { b.on = false }, 1.05},
		"it loses its way":           {func(b *box) { b.dark = true }, 1.05},
		"its way becomes a trickle":  {func(b *box) { b.centre = 500 }, 1.05},
		"its way was always missing": {func(*box) {}, 1.05},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHall(t, 3, 8<<20, 64<<10, 1.25e5)
				var victim *box
				if name == "its way was always missing" {
					h.nodes[0].dark = true
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go func() {
					time.Sleep(4 * time.Second)
					for _, b := range h.nodes {
						if b.team.Standing(h.blob.Digest).Direct && victim == nil {
							victim = b
							b.mu.Lock()
							c.bad(b)
							b.mu.Unlock()
						}
					}
				}()
				start := time.Now()
				ctxs := map[int]context.Context{}
				if name == "it dies" {
					for i, b := range h.nodes { // a dead node does not run on
						nctx, stop := context.WithCancel(ctx)
						defer stop()
						ctxs[i] = nctx
						go func() {
							for nctx.Err() == nil && b.alive() {
								select {
								case <-nctx.Done():
								case <-time.After(100 * time.Millisecond):
								}
							}
							if !b.alive() {
								stop()
							}
						}()
					}
				}
				h.run(at(0, time.Second, 2*time.Second), ctxs)
				cancel()
				var except []int
				for i, b := range h.nodes {
					if !b.alive() {
						except = append(except, i)
					}
				}
				if name == "it dies" && len(except) != 1 {
					t.Errorf("%d nodes died", len(except))
				}
				h.judge(c.most, except...)
				if took := time.Since(start); took > 5*time.Minute {
					t.Errorf("it took %s", took)
				}
			})
		})
	}
}

// A mate that lies is dropped, and it is told who and why.
func TestSiteDropsALiar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHall(t, 3, 8<<20, 1<<20, 2.5e6)
		h.nodes[2].lies = true
		h.run(at(0, time.Second, 2*time.Second), nil)
		h.judge(1.1)
		for _, b := range h.nodes[:2] {
			if b.f.Lies("node-02") != 1 || !strings.Contains(strings.Join(b.told, "\n"), "node-02 sent other bytes") {
				t.Errorf("%s: %d lies, told %v", b.name, b.f.Lies("node-02"), b.told)
			}
		}
	})
}

// A mate that says it fetches, with numbers that grow, and never brings
// anything, holds nobody up for ever.
func TestSiteIsNotHeldUpByTalk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHall(t, 1, 4<<20, 1<<20, 2.5e6)
		b, start := h.nodes[0], time.Now()
		b.team.Mates = func() []Mate { return []Mate{talker{start}} }
		h.run(at(0), nil)
		h.judge(1.05)
		if took := time.Since(start); took > time.Hour || took < time.Minute {
			t.Errorf("it took %s", took)
		}
	})
}

type talker struct{ start time.Time }

func (talker) Name() string { return "talker" }

func (m talker) Standing(context.Context, Digest) (Standing, error) {
	return Standing{Wants: true, Direct: true, Got: int64(time.Since(m.start).Seconds()) * 1e5}, nil
}

func (talker) Open(context.Context, Digest, int64, int64) (io.ReadCloser, error) {
	return nil, ErrMissing
}

// Who serves others says so for a while, and not for ever.
func TestServing(t *testing.T) {
	var x Team
	now := time.Unix(1e9, 0)
	if x.Serving(now) {
		t.Error("nobody asked")
	}
	x.Asked(now, Digest{1})
	if !x.Serving(now.Add(10*time.Second)) || x.Serving(now.Add(time.Minute)) {
		t.Error("twenty seconds are meant")
	}
	for i := range 400 {
		x.Asked(now.Add(time.Duration(i)*10*time.Second), Digest{1})
	}
	if x.Serving(now.Add(4000 * time.Second)) {
		t.Error("one file holds a node up for ever")
	}
}

// Whatever mates say: somebody asks the centre in the end, and of nodes that
// see each other well one alone does.
func TestShareProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1e9, 0)
		n := rapid.IntRange(1, 6).Draw(t, "n")
		file := Digest{byte(rapid.IntRange(0, 255).Draw(t, "file"))}
		names := make([]string, n)
		all := make([]*Share, n)
		for i := range n {
			names[i] = fmt.Sprint("n", i)
		}
		pos := make([]int64, n)
		for i := range n {
			all[i] = NewShare(now, names[i], file)
			all[i].Only(append(append([]string{}, names[:i]...), names[i+1:]...))
		}
		r := rand.New(rand.NewPCG(uint64(rapid.IntRange(0, 1<<30).Draw(t, "seed")), 1))
		see := func() {
			for i := range all {
				for j := range all {
					if i != j {
						all[i].Heard(now, names[j], Standing{Wants: true, Direct: all[j].Direct(), Got: pos[j]}, pos[i])
					}
				}
			}
		}
		// A while in which they hear each other by chance.
		for range rapid.IntRange(0, 50).Draw(t, "steps") {
			i := r.IntN(n)
			j := r.IntN(n)
			if i != j {
				all[i].Heard(now, names[j], Standing{Wants: true, Direct: all[j].Direct(), Got: pos[j]}, pos[i])
			}
			if ok, why := all[i].MayAsk(now, 0, 1<<20); ok {
				pos[i] += int64(r.IntN(100 << 10))
			} else if why == "" {
				t.Fatal("no reason")
			}
			if _, y := all[i].Yield(now); y {
				all[i].Takes()
			}
			now = now.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
		}
		// They see each other well: after the longest wait one alone asks.
		for range 200 {
			see()
			for i := range all {
				if ok, _ := all[i].MayAsk(now, 0, 1<<20); ok {
					pos[i] += slowBytes
				}
				see()
			}
			now = now.Add(time.Second)
		}
		direct := 0
		for _, s := range all {
			if s.Direct() {
				direct++
			}
		}
		if direct != 1 {
			t.Fatalf("%d nodes ask the centre", direct)
		}
	})
}

func FuzzStanding(f *testing.F) {
	f.Add([]byte(`{"have":4194304,"wants":true,"direct":true,"got":5000000}`))
	f.Add([]byte(`{"have":-1}`))
	f.Add([]byte(`{"direct":true}`))
	f.Add(bytes.Repeat([]byte("["), 300))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseStanding(b)
		if err == nil && s.Validate() != nil {
			t.Fatalf("%+v was taken", s)
		}
		if err != nil && s != (Standing{}) {
			t.Fatalf("%+v with %v", s, err)
		}
	})
}
