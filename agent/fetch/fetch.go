package fetch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
)

// Digest is SHA-256.
type Digest = [sha256.Size]byte

// Blob is a file that is wanted.
type Blob struct {
	Digest Digest
	Size   int64
	// ChunkSize and Chunks are the digests of its chunks, the last of which
	// may be shorter. Without chunks the file is one chunk.
	ChunkSize int64
	Chunks    []Digest
}

// Validate reports what cannot be.
func (b Blob) Validate() error {
	switch {
	case b.Size <= 0:
		return fmt.Errorf("fetch: a file of %d bytes", b.Size)
	case len(b.Chunks) == 0:
		return nil
	case b.ChunkSize <= 0 || b.ChunkSize > maxChunk || (b.Size+b.ChunkSize-1)/b.ChunkSize != int64(len(b.Chunks)):
		return fmt.Errorf("fetch: %d chunks of %d bytes for %d bytes", len(b.Chunks), b.ChunkSize, b.Size)
	}
	return nil
}

func (b Blob) chunk(i int) (off, size int64, want Digest) {
	if len(b.Chunks) == 0 {
		return 0, b.Size, b.Digest
	}
	off = int64(i) * b.ChunkSize
	return off, min(b.ChunkSize, b.Size-off), b.Chunks[i]
}

// maxChunk bounds what is held in memory.
const maxChunk = 16 << 20

// ErrMissing is what a source says that does not have the file.
var ErrMissing = errors.New("fetch: the source does not have it")

const (
	// minAlive bytes must come within Stall.
	minAlive = 1 << 10
	// muchBytes in one transfer make a source one to go on with at once.
	muchBytes = 64 << 10
)

// Source is one place where a file may be.
type Source interface {
	// Name tells sources apart, for people too.
	Name() string
	// Open returns the bytes from off on, at least until off+n or until the
	// connection ends.
	Open(ctx context.Context, digest Digest, off, n int64) (io.ReadCloser, error)
}

// Spool holds the part of a chunk that is there. A memory spool is for chunks;
// for a file without chunks a spool on disk survives a power cut.
type Spool interface {
	Len() int64
	// Write appends.
	Write(b []byte) (int, error)
	// Sum returns the digest of what is there.
	Sum() (Digest, error)
	// Reset throws it away.
	Reset() error
}

// Fetcher fetches. It is for one goroutine.
type Fetcher struct {
	// Sources returns who may be asked at the moment, the preferred first.
	Sources func() []Source
	// Team are the peers of the site: whoever of them has a piece is asked
	// before Sources, and Sources by one node of the site at a time. nil: alone.
	Team *Team
	// Rate is the most bytes in a second from Sources; 0: as fast as it goes.
	Rate int64
	// Stall is how long a connection may be silent (60 s).
	Stall time.Duration
	// Progress is told about bytes that came and what is waited for; nil is
	// allowed.
	Progress func(got, size int64, waiting string)
	Log      *slog.Logger
	picker   Picker
	limit    limiter
	want     *want
}

// Lies returns how often a source sent what was not asked for.
func (f *Fetcher) Lies(name string) int { return f.picker.Lies(name) }

// Chunks fetches the chunks of b from number first on and hands each to take,
// in order, verified. An error of take ends it; the network alone never does,
// only ctx.
func (f *Fetcher) Chunks(ctx context.Context, b Blob, first int, take func(i int, off int64, chunk []byte) error) error {
	if err := b.Validate(); err != nil {
		return err
	}
	n := max(len(b.Chunks), 1)
	if len(b.Chunks) == 0 && b.Size > maxChunk {
		return fmt.Errorf("fetch: %d bytes without digests of chunks are too much for memory; use a spool", b.Size)
	}
	defer f.join(b)()
	mem := NewMemory()
	for i := first; i < n; i++ {
		off, size, want := b.chunk(i)
		if err := f.piece(ctx, b, off, size, want, mem); err != nil {
			return err
		}
		if err := take(i, off, mem.buf); err != nil {
			return err
		}
		if err := mem.Reset(); err != nil {
			return err
		}
	}
	return nil
}

// Whole fetches b into a spool, going on with what is there.
func (f *Fetcher) Whole(ctx context.Context, b Blob, s Spool) error {
	if err := b.Validate(); err != nil {
		return err
	}
	defer f.join(b)()
	return f.piece(ctx, b, 0, b.Size, b.Digest, s)
}

// join tells the team what is wanted.
func (f *Fetcher) join(b Blob) (leave func()) {
	if f.Team == nil {
		return func() {}
	}
	f.want = f.Team.begin(b.Digest)
	return func() {
		f.want.end()
		f.want = nil
	}
}

// piece brings size bytes at off into s.
func (f *Fetcher) piece(ctx context.Context, b Blob, off, size int64, want Digest, s Spool) error {
	// Who sent it: one name, or "" when it came from several or from before.
	// Then nobody can be blamed, and the next attempt asks one alone.
	from, alone := "", s.Len() == 0
	for {
		if s.Len() > size {
			if err := s.Reset(); err != nil {
				return err
			}
		}
		if s.Len() == size {
			sum, err := s.Sum()
			if err != nil {
				return err
			}
			if sum == want {
				return nil
			}
			if err := s.Reset(); err != nil {
				return err
			}
			if alone && from != "" {
				f.note(from, Lied, "it sent other bytes than those asked for, so its file is damaged or was altered; it is asked again later")
				f.distrust(from)
				f.log().Warn("a source sent wrong bytes: it is not asked again for a while", "source", from, "digest", hex.EncodeToString(b.Digest[:8]), "offset", off)
				f.progress(off, b.Size, from+" sent other bytes than those asked for; somebody else is asked")
			}
			from, alone = "", true
		}
		src, direct, err := f.choose(ctx, b, off, size, off+s.Len())
		if err != nil {
			return err
		}
		if s.Len() > 0 && src.Name() != from {
			if alone && from != "" && f.picker.Lies(from)+f.picker.Lies(src.Name()) > 0 {
				// One of the two is known to lie: mixed, no blame were possible.
				if err := s.Reset(); err != nil {
					return err
				}
			} else {
				alone = false
			}
		}
		from = src.Name()
		if err := f.some(ctx, src, direct, b, off, size, s); err != nil {
			return err
		}
	}
}

// choose waits until somebody may be asked for what is behind pos in the piece
// of size bytes at off. direct: it is one of Sources.
func (f *Fetcher) choose(ctx context.Context, b Blob, off, size, pos int64) (src Source, direct bool, err error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		f.want.at(pos)
		pause := 5 * time.Second
		if f.want != nil {
			src, why := f.mate(ctx, off, size, pos)
			if src != nil {
				return src, false, nil
			}
			if pause = lookOften; why != "" {
				f.progress(pos, b.Size, why)
				if err := sleep.For(ctx, pause); err != nil {
					return nil, false, err
				}
				continue
			}
		}
		all := f.Sources()
		i, wait, why, ok := f.picker.Pick(time.Now(), namesOf(all))
		if ok {
			return all[i], true, nil
		}
		f.progress(pos, b.Size, why)
		// Sources come and go: look again soon.
		if err := sleep.For(ctx, min(wait, pause)); err != nil {
			return nil, false, err
		}
	}
}

func namesOf[S Source](all []S) []string {
	names := make([]string, len(all))
	for i, s := range all {
		names[i] = s.Name()
	}
	return names
}

// mate returns a mate to ask, or why this node waits for one; neither: it asks
// the centre itself.
func (f *Fetcher) mate(ctx context.Context, off, size, pos int64) (Source, string) {
	w := f.want
	for _, all := range []bool{false, true} {
		mates := w.look(ctx, all)
		with := w.whoHas(mates, pos)
		now := time.Now()
		if i, _, _, ok := f.picker.Pick(now, namesOf(with)); ok {
			w.mu.Lock()
			w.share.Takes()
			w.mu.Unlock()
			return with[i], ""
		}
		w.mu.Lock()
		was := w.share.Direct()
		ok, why := w.share.MayAsk(now, off, size)
		if ok && !was && !all {
			w.share.Takes() // not before all were asked once more
		}
		w.mu.Unlock()
		if !ok {
			return nil, why
		}
		if was {
			return nil, ""
		}
	}
	return nil, ""
}

// distrust ends a liar's say in who asks the centre.
func (f *Fetcher) distrust(name string) {
	if w := f.want; w != nil {
		w.mu.Lock()
		w.share.Distrust(time.Now(), name)
		w.mu.Unlock()
	}
}

// some asks src for the rest of a piece. It returns an error only of the spool
// or of ctx.
func (f *Fetcher) some(ctx context.Context, src Source, direct bool, b Blob, off, size int64, s Spool) error {
	rctx, cancel := context.WithCancelCause(ctx)
	rate := f.Rate
	if f.want != nil {
		if direct {
			done := make(chan struct{})
			go func() {
				defer close(done)
				f.want.watch(rctx, cancel)
			}()
			defer func() {
				cancel(nil)
				<-done
			}()
		} else {
			rate = 0 // the LAN is not what is to be spared
		}
	}
	defer cancel(nil)
	stall := f.Stall
	if stall == 0 {
		stall = time.Minute
	}
	guard := time.AfterFunc(stall, func() { cancel(fmt.Errorf("it was silent for %s", stall)) })
	defer guard.Stop()
	before := s.Len()
	err := func() error {
		r, err := src.Open(rctx, b.Digest, off+before, size-before)
		if err != nil {
			return err
		}
		defer r.Close()
		// A read that does not know the context ends when its source is closed.
		stop := context.AfterFunc(rctx, func() { r.Close() })
		defer stop()
		buf := make([]byte, 32<<10)
		fed := int64(0)
		for s.Len() < size {
			n, err := r.Read(buf[:min(int64(len(buf)), size-s.Len(), f.limit.most(rate))])
			if n > 0 {
				if _, werr := s.Write(buf[:n]); werr != nil {
					return spoolError{werr}
				}
				f.want.at(off + s.Len())
				f.progress(off+s.Len(), b.Size, "")
				if werr := f.limit.wait(rctx, rate, n); werr != nil {
					return werr
				}
				// A byte now and then is no life: a source must not hold us up
				// for ever.
				if fed += int64(n); fed >= minAlive {
					fed = 0
					guard.Reset(stall)
				}
			}
			if err != nil {
				return err
			}
		}
		return nil
	}()
	if cerr := ctx.Err(); cerr != nil {
		return cerr
	}
	var bad spoolError
	if errors.As(err, &bad) {
		return bad.error
	}
	why := "it ended early"
	if cause := context.Cause(rctx); cause != nil {
		why = cause.Error()
	} else if err != nil && !errors.Is(err, io.EOF) {
		why = err.Error()
	}
	var yields errYield
	switch {
	case errors.As(context.Cause(rctx), &yields):
		// Nothing is wrong with the source.
	case s.Len() == size || s.Len()-before >= muchBytes:
		f.note(src.Name(), Progress, why)
	case s.Len() > before:
		f.note(src.Name(), Little, why)
	case errors.Is(err, ErrMissing):
		f.note(src.Name(), Missing, "it does not have the file")
	default:
		f.note(src.Name(), Nothing, why)
	}
	if w := f.want; w != nil && direct && s.Len() == before && yields.why == "" {
		w.mu.Lock()
		w.share.Vain(time.Now())
		w.mu.Unlock()
	}
	if s.Len() < size {
		f.log().Debug("a transfer ended early", "source", src.Name(), "got", s.Len()-before, "why", why)
		f.progress(off+s.Len(), b.Size, src.Name()+": "+why)
	}
	return nil
}

type spoolError struct{ error }

func (f *Fetcher) note(name string, o Outcome, why string) {
	f.picker.Note(time.Now(), name, o, why, rand.Float64())
}

func (f *Fetcher) progress(got, size int64, waiting string) {
	if f.Progress != nil {
		f.Progress(got, size, waiting)
	}
}

func (f *Fetcher) log() *slog.Logger {
	if f.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return f.Log
}

// limiter keeps a rate: after n bytes it waits as long as these may take. What
// was not used is not saved up for longer than a second.
type limiter struct{ free time.Time }

func (l *limiter) most(rate int64) int64 {
	if rate <= 0 {
		return 1 << 30
	}
	return max(rate/4, 512)
}

func (l *limiter) wait(ctx context.Context, rate int64, n int) error {
	if rate <= 0 {
		return nil
	}
	now := time.Now()
	if l.free.Before(now.Add(-time.Second)) {
		l.free = now.Add(-time.Second)
	}
	l.free = l.free.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	d := l.free.Sub(now)
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Memory is a Spool in memory.
type Memory struct {
	buf []byte
	sum hash.Hash
}

// NewMemory returns an empty one.
func NewMemory() *Memory { return &Memory{sum: sha256.New()} }

// Len implements Spool.
func (m *Memory) Len() int64 { return int64(len(m.buf)) }

// Bytes returns what is there, until the next Reset.
func (m *Memory) Bytes() []byte { return m.buf }

// Write implements Spool.
func (m *Memory) Write(b []byte) (int, error) {
	if len(m.buf)+len(b) > maxMemory {
		return 0, errors.New("fetch: too much for memory")
	}
	m.buf = append(m.buf, b...)
	return m.sum.Write(b)
}

// maxMemory bounds a Memory: the largest hash tree of a slot.
const maxMemory = 64 << 20

// Sum implements Spool.
func (m *Memory) Sum() (Digest, error) { return Digest(m.sum.Sum(nil)), nil }

// Reset implements Spool. The memory is used again.
func (m *Memory) Reset() error {
	m.buf = m.buf[:0]
	m.sum.Reset()
	return nil
}
