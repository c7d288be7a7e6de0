package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// content is n bytes that are the same each time.
func content(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
	return b
}

func blob(b []byte, chunk int64) Blob {
	out := Blob{Digest: sha256.Sum256(b), Size: int64(len(b)), ChunkSize: chunk}
	for off := int64(0); chunk > 0 && off < out.Size; off += chunk {
		out.Chunks = append(out.Chunks, sha256.Sum256(b[off:min(off+chunk, out.Size)]))
	}
	return out
}

// link is a source behind a line with a rate. cuts are the times at which the
// line breaks; down is for how long.
type link struct {
	name    string
	data    []byte
	rate    float64 // bytes a second; 0: at once
	cuts    []time.Time
	down    time.Duration
	lie     func(off int64, b []byte)
	missing bool
	silent  bool
	extra   bool
	early   bool
	sent    int64
	asked   int
}

func (l *link) Name() string { return l.name }

func (l *link) away(now time.Time) bool {
	for _, c := range l.cuts {
		if !now.Before(c) && now.Before(c.Add(l.down)) {
			return true
		}
	}
	return false
}

func (l *link) Open(ctx context.Context, _ Digest, off, n int64) (io.ReadCloser, error) {
	l.asked++
	if l.away(time.Now()) {
		time.Sleep(100 * time.Millisecond)
		return nil, errors.New("network is unreachable")
	}
	if l.missing {
		return nil, ErrMissing
	}
	end := off + n
	if l.extra {
		end = int64(len(l.data))
	}
	return &reader{l: l, ctx: ctx, off: off, end: end, opened: time.Now()}, nil
}

type reader struct {
	l        *link
	ctx      context.Context
	off, end int64
	opened   time.Time
}

func (r *reader) Close() error { return nil }

func (r *reader) Read(b []byte) (int, error) {
	if r.l.early {
		return 0, io.EOF
	}
	if r.l.silent {
		<-r.ctx.Done()
		return 0, r.ctx.Err()
	}
	if r.off == r.end {
		return 0, io.EOF
	}
	n := min(len(b), int(r.end-r.off), 1400)
	if r.l.rate > 0 {
		select {
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		case <-time.After(time.Duration(float64(n) / r.l.rate * float64(time.Second))):
		}
	}
	now := time.Now()
	for _, c := range r.l.cuts {
		if c.After(r.opened) && !now.Before(c) {
			return 0, errors.New("connection reset by peer")
		}
	}
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	copy(b, r.l.data[r.off:r.off+int64(n)])
	if r.l.lie != nil {
		r.l.lie(r.off, b[:n])
	}
	r.off += int64(n)
	r.l.sent += int64(n)
	return n, nil
}

func fetcher(links ...*link) *Fetcher {
	return &Fetcher{Sources: func() []Source {
		var out []Source
		for _, l := range links {
			out = append(out, l)
		}
		return out
	}}
}

// collect takes chunks as an installer does, and can lose power: then it
// forgets what was not noted.
func collect(t *testing.T, f *Fetcher, b Blob) []byte {
	t.Helper()
	var out []byte
	if err := f.Chunks(t.Context(), b, 0, func(i int, off int64, c []byte) error {
		if off != int64(len(out)) {
			t.Fatalf("chunk %d comes at %d, want %d", i, off, len(out))
		}
		out = append(out, c...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// Four megabytes over 64 kbit/s and over 20 Mbit/s a whole image, the line cut
// 20 times: nothing is sent twice, and it takes what the line needs.
func TestThinLineCutOften(t *testing.T) {
	for _, c := range []struct {
		name  string
		size  int
		rate  float64
		chunk int64
		every time.Duration
		down  time.Duration
	}{
		{"4 MB at 64 kbit/s", 4 << 20, 8000, 4 << 20, 25 * time.Second, 3 * time.Second},
		{"96 MB at 20 Mbit/s", 96 << 20, 2.5e6, 4 << 20, 1500 * time.Millisecond, 200 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := content(c.size)
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				l := &link{name: "centre", data: data, rate: c.rate, down: c.down}
				for i := range 20 {
					l.cuts = append(l.cuts, start.Add(time.Duration(i+1)*c.every))
				}
				got := collect(t, fetcher(l), blob(data, c.chunk))
				if !bytes.Equal(got, data) {
					t.Fatal("other bytes")
				}
				took, bare := time.Since(start), time.Duration(float64(c.size)/c.rate*float64(time.Second))
				t.Logf("%d bytes in %s, the line alone needs %s; %d bytes were sent in %d requests", c.size, took, bare, l.sent, l.asked)
				if over := float64(l.sent) / float64(c.size); over > 1.001 {
					t.Errorf("%.3f times the bytes were sent", over)
				}
				if l.asked < 20 {
					t.Errorf("the line was not cut: %d requests", l.asked)
				}
				if took > bare+20*(c.down+3*time.Second) {
					t.Errorf("it took %s", took)
				}
			})
		})
	}
}

// The power fails 20 times: each time at most one chunk is fetched again.
func TestPowerCutCostsAChunk(t *testing.T) {
	const chunk = 64 << 10
	data := content(40 * chunk)
	b := blob(data, chunk)
	synctest.Test(t, func(t *testing.T) {
		l := &link{name: "centre", data: data, rate: 8000}
		var disk []byte
		cuts := 0
		for len(disk) < len(data) {
			ctx, cancel := context.WithCancel(t.Context())
			if cuts < 20 {
				cuts++
				ctx, cancel = context.WithTimeout(t.Context(), time.Duration(rand.N(30))*time.Second)
			}
			err := fetcher(l).Chunks(ctx, b, len(disk)/chunk, func(_ int, off int64, c []byte) error {
				disk = append(disk[:off], c...)
				return nil
			})
			cancel()
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(disk, data) {
			t.Fatal("other bytes")
		}
		if most := int64(len(data) + cuts*chunk); l.sent > most {
			t.Errorf("%d bytes were sent, at most %d should have been", l.sent, most)
		}
	})
}

func flip(from int64) func(int64, []byte) {
	return func(off int64, b []byte) {
		if off >= from {
			b[0] ^= 1
		}
	}
}

// Whoever lies is marked and passed over; whoever is honest is not blamed.
func TestLiars(t *testing.T) {
	const chunk = 64 << 10
	data := content(20*chunk + 77)
	b := blob(data, chunk)
	synctest.Test(t, func(t *testing.T) {
		peer := &link{name: "peer", data: data, lie: flip(5 * chunk), rate: 1e6}
		centre := &link{name: "centre", data: data, rate: 1e5}
		f := fetcher(peer, centre)
		if !bytes.Equal(collect(t, f, b), data) {
			t.Fatal("other bytes")
		}
		if f.Lies("peer") != 1 || f.Lies("centre") != 0 {
			t.Errorf("peer %d, centre %d", f.Lies("peer"), f.Lies("centre"))
		}
		if centre.sent > 16*chunk {
			t.Errorf("the centre sent %d bytes", centre.sent)
		}
	})
	// Everybody lies until an hour is over: it waits and is not fooled.
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		centre := &link{name: "centre", data: data}
		centre.lie = func(off int64, b []byte) {
			if time.Since(start) < time.Hour {
				b[0] ^= 1
			}
		}
		waited := ""
		f := fetcher(centre)
		f.Progress = func(_, _ int64, w string) {
			if w != "" {
				waited = w
			}
		}
		if !bytes.Equal(collect(t, f, b), data) {
			t.Fatal("other bytes")
		}
		if !strings.Contains(waited, "other bytes") {
			t.Errorf("waited for %q", waited)
		}
	})
}

// A liar that breaks off in mid-chunk does not get an honest source blamed.
func TestMixedChunkBlamesNobody(t *testing.T) {
	const chunk = 256 << 10
	data := content(4 * chunk)
	b := blob(data, chunk)
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		peer := &link{name: "peer", data: data, lie: flip(0), rate: 1e5, down: 24 * time.Hour, cuts: []time.Time{start.Add(time.Second)}}
		centre := &link{name: "centre", data: data, rate: 1e5}
		f := fetcher(peer, centre)
		if !bytes.Equal(collect(t, f, b), data) {
			t.Fatal("other bytes")
		}
		if f.Lies("centre") != 0 {
			t.Error("the centre is blamed")
		}
	})
}

func TestOddSources(t *testing.T) {
	const chunk = 64 << 10
	data := content(8 * chunk)
	b := blob(data, chunk)
	for name, odd := range map[string]*link{
		"has it not":      {name: "odd", missing: true},
		"is silent":       {name: "odd", silent: true},
		"sends too much":  {name: "odd", data: data, extra: true},
		"ends early":      {name: "odd", data: data, early: true},
		"is always away":  {name: "odd", cuts: []time.Time{time.Unix(0, 0)}, down: 1 << 62},
		"a byte a minute": {name: "odd", data: data, rate: 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			good := &link{name: "good", data: data, rate: 1e5}
			f := fetcher(odd, good)
			start := time.Now()
			if !bytes.Equal(collect(t, f, b), data) {
				t.Fatalf("%s: other bytes", name)
			}
			if took := time.Since(start); took > 25*time.Minute {
				t.Errorf("%s: it took %s", name, took)
			}
		})
	}
	// Nobody at all: only ctx ends it.
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := fetcher().Chunks(ctx, b, 0, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	})
}

func TestRate(t *testing.T) {
	data := content(1 << 20)
	synctest.Test(t, func(t *testing.T) {
		f := fetcher(&link{name: "lan", data: data})
		f.Rate = 64 << 10
		start := time.Now()
		collect(t, f, blob(data, 64<<10))
		if took := time.Since(start); took < 14*time.Second || took > 17*time.Second {
			t.Errorf("1 MiB at 64 KiB/s took %s", took)
		}
	})
}

// A file without chunks goes on where a power cut left it, and starts over
// when what was left is not what was written.
func TestWholeIntoFile(t *testing.T) {
	data := content(3<<20 + 5)
	b := blob(data, 0)
	for name, damage := range map[string]func(string) error{
		"as it was": func(string) error { return nil },
		"damaged": func(n string) error {
			return os.WriteFile(n, []byte("rubbish"), 0o600)
		},
		"too long": func(n string) error { return os.WriteFile(n, make([]byte, 5<<20), 0o600) },
	} {
		synctest.Test(t, func(t *testing.T) {
			n := filepath.Join(t.TempDir(), "spool")
			l := &link{name: "centre", data: data, rate: 1e5}
			s, err := OpenFile(n)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			if err := fetcher(l).Whole(ctx, b, s); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			cancel()
			half := l.sent
			if err := errors.Join(s.Close(), damage(n)); err != nil {
				t.Fatal(err)
			}
			if s, err = OpenFile(n); err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := fetcher(l).Whole(t.Context(), b, s); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(s.Reader())
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%s: other bytes (%v)", name, err)
			}
			if name == "as it was" && l.sent > int64(len(data))+half/10 {
				t.Errorf("%d bytes sent for %d", l.sent, len(data))
			}
		})
	}
}

func TestBlobValidate(t *testing.T) {
	for name, b := range map[string]Blob{
		"empty":         {},
		"negative":      {Size: -1},
		"chunks absent": {Size: 10, ChunkSize: 5, Chunks: make([]Digest, 1)},
		"huge chunks":   {Size: 1 << 40, ChunkSize: 1 << 39, Chunks: make([]Digest, 2)},
	} {
		if err := fetcher().Chunks(t.Context(), b, 0, nil); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := fetcher().Chunks(t.Context(), Blob{Size: maxChunk + 1}, 0, nil); err == nil {
		t.Error("a large file into memory")
	}
}

func TestHTTP(t *testing.T) {
	data := content(300 << 10)
	b := blob(data, 64<<10)
	var mode string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/v1/blobs/"+fmt.Sprintf("%x", b.Digest)) && !strings.HasPrefix(r.URL.Path, "/v1/manifests/") {
			t.Errorf("asked for %s", r.URL.Path)
		}
		switch mode {
		case "absent":
			http.NotFound(w, r)
		case "broken":
			http.Error(w, "no", http.StatusBadGateway)
		case "whole":
			_, _ = w.Write(data)
		case "elsewhere":
			w.Header().Set("Content-Range", "bytes 7-9/300")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(data[7:9])
		default:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
		}
	}))
	defer srv.Close()
	h := HTTP{Label: "centre", Base: srv.URL, Client: srv.Client()}
	f := &Fetcher{Sources: func() []Source { return []Source{h} }}
	if !bytes.Equal(collect(t, f, b), data) {
		t.Fatal("other bytes")
	}
	for m, want := range map[string]bool{"absent": false, "broken": false, "whole": false, "elsewhere": false, "": true} {
		mode = m
		r, err := h.Open(t.Context(), b.Digest, 100, 50)
		if (err == nil) != want {
			t.Errorf("%q: %v", m, err)
		}
		if m == "absent" && !errors.Is(err, ErrMissing) {
			t.Errorf("%v", err)
		}
		if err == nil {
			got, err := io.ReadAll(r)
			r.Close()
			if err != nil || !bytes.Equal(got, data[100:150]) {
				t.Errorf("%q: %d bytes, %v", m, len(got), err)
			}
		}
	}
	mode = "" // the map above has no order
	if _, err := h.Manifest(t.Context(), b.Digest, 1000); err == nil {
		t.Error("a manifest of 300 kB was read")
	}
	if got, err := h.Manifest(t.Context(), b.Digest, 1<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v", err)
	}
	mode = "absent"
	if _, err := h.Manifest(t.Context(), b.Digest, 1000); !errors.Is(err, ErrMissing) {
		t.Errorf("%v", err)
	}
}

func TestPicker(t *testing.T) {
	now := time.Unix(1e9, 0)
	var p Picker
	names := []string{"peer", "centre"}
	pick := func() string {
		i, wait, why, ok := p.Pick(now, names)
		if !ok {
			return fmt.Sprintf("wait %s: %s", wait, why)
		}
		return names[i]
	}
	if got := pick(); got != "peer" {
		t.Error(got)
	}
	p.Note(now, "peer", Missing, "it does not have the file", 0)
	if got := pick(); got != "centre" {
		t.Error(got)
	}
	p.Note(now, "centre", Nothing, "no route", 0)
	if got := pick(); got != "wait 500ms: centre: no route" {
		t.Error(got)
	}
	now = now.Add(time.Minute)
	p.Note(now, "peer", Lied, "it sent other bytes", 0)
	if got := pick(); got != "centre" {
		t.Error(got)
	}
	if _, wait, why, ok := p.Pick(now, nil); ok || wait != time.Minute || why == "" {
		t.Error("nobody is known")
	}
}

// Whatever happened: a pause ends, is never longer than the longest, and the
// first source that may be asked is asked.
func TestPickerProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1e9, 0)
		var p Picker
		names := []string{"a", "b", "c"}
		for range rapid.IntRange(1, 60).Draw(t, "n") {
			now = now.Add(time.Duration(rapid.IntRange(0, 1000).Draw(t, "s")) * time.Second)
			i, wait, why, ok := p.Pick(now, names)
			switch {
			case !ok && (wait <= 0 || wait > pauseMost || why == ""):
				t.Fatalf("wait %s: %q", wait, why)
			case ok:
				p.Note(now, names[i], Outcome(rapid.IntRange(0, 4).Draw(t, "o")), "x", rapid.Float64Range(0, 0.999).Draw(t, "r"))
			}
		}
		if i, _, _, ok := p.Pick(now.Add(pauseLieMost), names); !ok || i != 0 {
			t.Fatal("a pause does not end")
		}
	})
}
