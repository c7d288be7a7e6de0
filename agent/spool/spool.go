// Package spool keeps what the centre must learn until the centre has it: a
// bounded store on disk that survives restarts and never makes the node wait.
//
// There are two kinds of entries. Acts (an order that was carried out, a
// cluster that was founded) matter to somebody's records: Keep returns after
// they are flushed. Notes (a change of state) are worth having: Put hands them
// to a writer and returns at once.
//
// When the spool is full, the oldest note goes first; only when nothing but
// acts is left, the oldest act goes. How many were dropped is remembered and
// told with the next entries, so that a gap is seen as a gap. A damaged line is
// skipped and counted in the same way.
package spool

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/fleet/text"
)

// Config says how much a spool keeps.
type Config struct {
	// Dir holds the file; made if needed.
	Dir string
	// MaxEntries and MaxBytes bound what is kept (1024 entries, 1 MiB of
	// their JSON).
	MaxEntries, MaxBytes int
	// Queue is how many notes may wait for the writer (256).
	Queue int
	Log   *slog.Logger
}

// maxEntry bounds one entry, in bytes of JSON; maxText its sentence.
const (
	maxEntry = 8 << 10
	maxText  = 512
	fileName = "log"
)

// Entry is one thing that happened on the node.
type Entry struct {
	// Seq grows by one with each entry of this node, also over restarts.
	Seq uint64 `json:"seq"`
	// Time is the node's clock at that moment: a claim, not a proof.
	Time time.Time `json:"time"`
	// Kind is a dotted word: "state.changed", "order.finished".
	Kind string `json:"kind"`
	// Act: it must not be lost while there is room for acts.
	Act bool `json:"act,omitempty"`
	// Object is what it is about: the ID of an order, a cluster.
	Object string `json:"object,omitempty"`
	// Text is one sentence for a person.
	Text string `json:"text"`
	// Fields are further facts.
	Fields map[string]string `json:"fields,omitempty"`
	// Lost is how many entries were dropped before this one.
	Lost uint64 `json:"lost,omitempty"`
}

// line is one line of the file: an entry, or the end of some.
type line struct {
	Entry *Entry   `json:"entry,omitempty"`
	Done  []uint64 `json:"done,omitempty"`
	// Next is the next Seq; the first line after a compaction says it.
	Next uint64 `json:"next,omitempty"`
	Lost uint64 `json:"lost,omitempty"`
}

// Spool is an open spool. Its methods may be called from several goroutines.
type Spool struct {
	cfg   Config
	notes chan Entry
	// more tells the writer of room, and a reader of new entries.
	mu      sync.Mutex
	file    *os.File
	size    int64
	entries []Entry // by Seq
	bytes   int
	next    uint64
	lost    uint64 // dropped since the last entry that was kept
	total   uint64 // dropped since Open
	broken  error
}

// Open reads what an earlier run left. Damage costs the damaged lines only.
func Open(cfg Config) (*Spool, error) {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&cfg.MaxEntries, 1024)
	def(&cfg.MaxBytes, 1<<20)
	def(&cfg.Queue, 256)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxBytes < maxEntry {
		return nil, fmt.Errorf("spool: open: MaxBytes is %d, want at least %d", cfg.MaxBytes, maxEntry)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("spool: open: %w", err)
	}
	s := &Spool{cfg: cfg, notes: make(chan Entry, cfg.Queue), next: 1}
	if err := s.load(); err != nil {
		return nil, err
	}
	// A new file: what was torn is gone, and the place is bounded.
	if err := s.compact(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Spool) path() string { return filepath.Join(s.cfg.Dir, fileName) }

// maxRead bounds what is read back: compaction keeps the file below it.
func (s *Spool) maxRead() int64 { return 4 * int64(s.cfg.MaxBytes) }

func (s *Spool) load() error {
	left, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "."+fileName+"*"))
	for _, f := range left {
		_ = os.Remove(f)
	}
	f, err := os.Open(s.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("spool: open: %w", err)
	}
	defer f.Close()
	r := bufio.NewScanner(io.LimitReader(f, s.maxRead()))
	r.Buffer(nil, maxEntry+1024)
	for r.Scan() {
		l, ok := parse(r.Bytes())
		if !ok {
			s.lost++
			continue
		}
		s.apply(l)
	}
	if r.Err() != nil { // a line longer than any of ours: the rest is lost
		s.lost++
	}
	return nil
}

// apply takes over a line of the file.
func (s *Spool) apply(l line) {
	s.next = max(s.next, l.Next)
	if l.Next > 0 {
		s.lost += l.Lost
	}
	for _, n := range l.Done {
		s.forget(n)
	}
	if e := l.Entry; e != nil && e.Seq >= s.next {
		s.next = e.Seq + 1
		s.add(*e)
	}
}

// parse reads "CRC32 JSON".
func parse(b []byte) (line, bool) {
	head, body, ok := bytes.Cut(b, []byte{' '})
	if !ok || string(head) != sum(body) {
		return line{}, false
	}
	var l line
	if json.Unmarshal(body, &l) != nil {
		return line{}, false
	}
	return l, true
}

func sum(b []byte) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE(b)) }

func (l line) bytes() ([]byte, error) {
	b, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	return append(append([]byte(sum(b)+" "), b...), '\n'), nil
}

func weight(e Entry) int {
	n := 128 + len(e.Kind) + len(e.Object) + len(e.Text)
	for k, v := range e.Fields {
		n += len(k) + len(v) + 8
	}
	return n
}

// add puts e into memory and makes room.
func (s *Spool) add(e Entry) {
	s.entries = append(s.entries, e)
	s.bytes += weight(e)
	for len(s.entries) > s.cfg.MaxEntries || s.bytes > s.cfg.MaxBytes {
		i := slices.IndexFunc(s.entries, func(x Entry) bool { return !x.Act })
		if i < 0 {
			i = 0
		}
		s.bytes -= weight(s.entries[i])
		s.entries = slices.Delete(s.entries, i, i+1)
		s.lost++
		s.total++
	}
}

func (s *Spool) forget(seq uint64) bool {
	i, ok := slices.BinarySearchFunc(s.entries, seq, func(e Entry, n uint64) int {
		switch {
		case e.Seq < n:
			return -1
		case e.Seq > n:
			return 1
		}
		return 0
	})
	if ok {
		s.bytes -= weight(s.entries[i])
		s.entries = slices.Delete(s.entries, i, i+1)
	}
	return ok
}

// Put hands a note to the writer. It never waits; false: there was no room,
// and the note is counted as lost.
func (s *Spool) Put(e Entry) bool {
	e.Act = false
	select {
	case s.notes <- e:
		return true
	default:
		s.mu.Lock()
		s.lost++
		s.total++
		s.mu.Unlock()
		return false
	}
}

// Keep stores an act and returns its number after it is flushed.
func (s *Spool) Keep(e Entry) (uint64, error) {
	e.Act = true
	return s.store([]Entry{e})
}

// Run writes notes until ctx ends, then those that still wait.
func (s *Spool) Run(ctx context.Context) error {
	for {
		var batch []Entry
		select {
		case e := <-s.notes:
			batch = append(batch, e)
		case <-ctx.Done():
			if batch = s.waiting(batch); len(batch) > 0 {
				if _, err := s.store(batch); err != nil {
					s.cfg.Log.Warn("notes not kept", "err", err)
				}
			}
			return nil
		}
		if _, err := s.store(s.waiting(batch)); err != nil {
			s.cfg.Log.Warn("notes not kept", "err", err)
		}
	}
}

// waiting takes what is in the queue now, so that a burst is one flush.
func (s *Spool) waiting(batch []Entry) []Entry {
	for len(batch) < s.cfg.Queue {
		select {
		case e := <-s.notes:
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// clean bounds an entry, whatever was quoted in it.
func clean(e Entry) Entry {
	e.Kind, e.Object, e.Text = text.Clean(e.Kind, 64), text.Clean(e.Object, 128), text.Clean(e.Text, maxText)
	e.Time = e.Time.UTC()
	if len(e.Fields) > 0 {
		f := map[string]string{}
		for k, v := range e.Fields {
			if len(f) < 16 {
				f[text.Clean(k, 32)] = text.Clean(v, 256)
			}
		}
		e.Fields = f
	}
	return e
}

func (s *Spool) store(batch []Entry) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		if err := s.compact(); err != nil {
			s.lost += uint64(len(batch))
			s.total += uint64(len(batch))
			return 0, err
		}
	}
	var out []byte
	var kept []Entry
	for _, e := range batch {
		e = clean(e)
		e.Seq, e.Lost = s.next+uint64(len(kept)), 0
		if len(kept) == 0 {
			e.Lost = s.lost
		}
		b, err := line{Entry: &e}.bytes()
		if err != nil {
			return 0, fmt.Errorf("spool: store: %w", err)
		}
		out, kept = append(out, b...), append(kept, e)
	}
	if err := s.append(out); err != nil {
		s.lost += uint64(len(batch))
		s.total += uint64(len(batch))
		return 0, err
	}
	s.lost = 0
	for _, e := range kept {
		s.next = e.Seq + 1
		s.add(e)
	}
	return s.next - 1, s.shrink()
}

// append writes and flushes. After a failure the file's end is not known, and
// the next store writes the file anew.
func (s *Spool) append(b []byte) error {
	_, err := s.file.Write(b)
	if err == nil {
		err = s.file.Sync()
	}
	if err != nil {
		s.broken = fmt.Errorf("spool: write: %w", err)
		return s.broken
	}
	s.size += int64(len(b))
	return nil
}

func (s *Spool) shrink() error {
	if s.size < 2*int64(s.cfg.MaxBytes) && (s.size < 64<<10 || s.size < 4*int64(s.bytes)) {
		return nil
	}
	return s.compact()
}

// compact writes the file anew with what is kept.
func (s *Spool) compact() error {
	f, err := renameio.NewPendingFile(s.path(), renameio.WithPermissions(0o600), renameio.WithTempDir(s.cfg.Dir))
	if err != nil {
		return fmt.Errorf("spool: compact: %w", err)
	}
	defer f.Cleanup() //nolint:errcheck // a leftover is swept by the next start
	// Entries keep their numbers, which are below next: the line that says
	// next comes last.
	var out []byte
	lines := make([]line, 0, len(s.entries)+1)
	for i := range s.entries {
		lines = append(lines, line{Entry: &s.entries[i]})
	}
	for _, l := range append(lines, line{Next: s.next, Lost: s.lost}) {
		b, err := l.bytes()
		if err != nil {
			return fmt.Errorf("spool: compact: %w", err)
		}
		out = append(out, b...)
	}
	if _, err := f.Write(out); err != nil {
		return fmt.Errorf("spool: compact: %w", err)
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("spool: compact: %w", err)
	}
	if d, err := os.Open(s.cfg.Dir); err == nil {
		err = d.Sync()
		_ = d.Close()
		if err != nil {
			return fmt.Errorf("spool: compact: %w", err)
		}
	}
	w, err := os.OpenFile(s.path(), os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("spool: compact: %w", err)
	}
	if s.file != nil {
		_ = s.file.Close()
	}
	s.file, s.size, s.broken = w, int64(len(out)), nil
	return nil
}

// Entries returns up to n of the oldest entries of a kind; "" is every kind.
func (s *Spool) Entries(kind string, n int) []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Entry
	for _, e := range s.entries {
		if len(out) == n {
			break
		}
		if kind == "" || e.Kind == kind {
			out = append(out, e)
		}
	}
	return out
}

// Done forgets entries that the centre has. It returns after that is flushed.
func (s *Spool) Done(seqs ...uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var gone []uint64
	for _, n := range seqs {
		if s.forget(n) {
			gone = append(gone, n)
		}
	}
	if s.broken != nil {
		return s.compact()
	}
	for chunk := range slices.Chunk(gone, 256) {
		b, err := line{Done: chunk}.bytes()
		if err != nil {
			return fmt.Errorf("spool: done: %w", err)
		}
		if err := s.append(b); err != nil {
			return err
		}
	}
	return s.shrink()
}

// Stats are for people.
type Stats struct {
	Entries int `json:"entries"`
	// Lost counts entries dropped since the agent started.
	Lost uint64 `json:"lost,omitempty"`
}

// Stats returns how full the spool is.
func (s *Spool) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{Entries: len(s.entries), Lost: s.total}
}

// Close closes the file. Run must have ended.
func (s *Spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.file.Close(); err != nil {
		return fmt.Errorf("spool: close: %w", err)
	}
	return nil
}
