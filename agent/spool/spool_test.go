package spool

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func open(t testing.TB, cfg Config) *Spool {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func keep(t testing.TB, s *Spool, object string) uint64 {
	t.Helper()
	n, err := s.Keep(Entry{Kind: "order.finished", Object: object, Text: "done"})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func objects(s *Spool) (out []string) {
	for _, e := range s.Entries("", 1<<20) {
		out = append(out, e.Object)
	}
	return out
}

func TestActsSurviveAndEnd(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a, b := keep(t, s, "a"), keep(t, s, "b")
	if err := s.Done(a); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir}) // as after a power cut
	if got := objects(s); !slices.Equal(got, []string{"b"}) {
		t.Fatalf("kept %v", got)
	}
	if n := keep(t, s, "c"); n <= b {
		t.Errorf("number %d was given before (%d)", n, b)
	}
	if err := s.Done(b, 99); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir})
	if got := objects(s); !slices.Equal(got, []string{"c"}) {
		t.Fatalf("kept %v", got)
	}
}

func TestPutNeverWaits(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, Queue: 2})
	got := []bool{}
	for i := range 4 { // nobody writes
		got = append(got, s.Put(Entry{Kind: "state.changed", Object: fmt.Sprint(i)}))
	}
	if !slices.Equal(got, []bool{true, true, false, false}) {
		t.Fatalf("taken: %v", got)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil { // what waits is written at the end
		t.Fatal(err)
	}
	es := open(t, Config{Dir: dir}).Entries("state.changed", 9)
	if len(es) != 2 || es[0].Lost != 2 || es[1].Lost != 0 {
		t.Fatalf("kept %+v", es)
	}
}

func TestNotesGoFirst(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, MaxEntries: 3}
	s := open(t, cfg)
	keep(t, s, "act1")
	for i := range 3 {
		if _, err := s.store([]Entry{{Kind: "state.changed", Object: fmt.Sprint("note", i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if got := objects(s); !slices.Equal(got, []string{"act1", "note1", "note2"}) {
		t.Fatalf("kept %v", got)
	}
	for i := 2; i < 5; i++ {
		keep(t, s, fmt.Sprint("act", i))
	}
	want := []string{"act2", "act3", "act4"}
	if got := objects(s); !slices.Equal(got, want) {
		t.Fatalf("kept %v, want %v", got, want)
	}
	if got := objects(open(t, cfg)); !slices.Equal(got, want) {
		t.Fatalf("after a restart %v, want %v", got, want)
	}
	if s.Stats().Lost != 4 {
		t.Errorf("lost %d, want 4", s.Stats().Lost)
	}
}

func TestDamageCostsTheDamagedLine(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	for _, o := range []string{"a", "b", "c"} {
		keep(t, s, o)
	}
	name := filepath.Join(dir, fileName)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	hurt := strings.Replace(string(b), `"object":"b"`, `"object":"x"`, 1) + "torn at the e"
	if err := os.WriteFile(name, []byte(hurt), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir})
	if got := objects(s); !slices.Equal(got, []string{"a", "c"}) {
		t.Fatalf("kept %v", got)
	}
	keep(t, s, "d")
	if es := s.Entries("", 9); es[len(es)-1].Lost != 2 {
		t.Errorf("the gap was not told: %+v", es)
	}
}

func TestTheFileStaysSmall(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, MaxBytes: 16 << 10})
	for range 200 {
		n, err := s.store([]Entry{{Kind: "state.changed", Text: strings.Repeat("long ", 200)}})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Done(n); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(filepath.Join(dir, fileName))
		if err != nil || fi.Size() > s.maxRead() {
			t.Fatalf("%d bytes, %v", fi.Size(), err)
		}
	}
}

func TestHostileTextIsCleaned(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	if _, err := s.Keep(Entry{Kind: "x", Text: "a\x1b[2J\u202e" + strings.Repeat("y", 1<<16), Time: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	e := s.Entries("", 1)[0]
	if len(e.Text) > maxText+8 || strings.ContainsAny(e.Text, "\x1b\u202e") {
		t.Errorf("kept %d bytes: %.40q", len(e.Text), e.Text)
	}
}

// TestTornAtAnyByte cuts the file at any length: entries whose write was
// acknowledged before that length are there, in order, and nothing is invented.
func TestTornAtAnyByte(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	sizes := []int64{s.size}
	for i := range 6 {
		keep(t, s, fmt.Sprint(i))
		sizes = append(sizes, s.size)
	}
	b, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		cut := rapid.IntRange(0, len(b)).Draw(t, "cut")
		d, err := os.MkdirTemp(dir, "cut")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(d)
		if err := os.WriteFile(filepath.Join(d, fileName), b[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		again, err := Open(Config{Dir: d})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		whole := 0
		for whole < 6 && sizes[whole+1] <= int64(cut) {
			whole++
		}
		got := objects(again)
		// A cut just before a newline loses nothing of the line.
		if len(got) != whole && len(got) != whole+1 {
			t.Fatalf("cut at %d: %v, want %d entries", cut, got, whole)
		}
		for i, o := range got {
			if o != fmt.Sprint(i) {
				t.Fatalf("cut at %d: %v", cut, got)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	b, err := line{Entry: &Entry{Seq: 3, Kind: "k", Text: "t"}}.bytes()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-1])
	f.Add([]byte(`00000000 {"next":18446744073709551615}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, ok := parse(b); ok {
			if _, err := l.bytes(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
