package dhcp

import (
	"bytes"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe"
)

// script is a row of records that uses every kind.
func script() []record {
	m := func(n byte) pxe.MAC { return pxe.MAC{2, 0, 0, 0, 0, n} }
	a := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 0, n}) }
	until := t0.Add(time.Hour).Truncate(time.Second).Local()
	return []record{
		{recordBound, m(1), a(100), until},
		{recordBound, m(2), a(101), until},
		{recordReleased, m(1), a(100), until},
		{recordBound, m(3), a(100), until},
		{recordDeclined, m(2), a(101), until},
		{recordBound, m(2), a(102), until},
		{recordBound, m(2), a(102), until.Add(time.Minute)},
		{recordBound, m(3), a(103), until},
	}
}

func tableOf(recs []record) *table {
	t := newTable([]Pool{lanPool("10.77.0.2", "10.77.0.250")})
	for _, r := range recs {
		t.apply(r)
	}
	return t
}

func same(a, b *table) bool {
	return maps.EqualFunc(a.byMAC, b.byMAC, func(x, y Lease) bool { return x.IP == y.IP && x.Expires.Equal(y.Expires) && x.Bound == y.Bound }) &&
		maps.Equal(a.byIP, b.byIP) &&
		maps.EqualFunc(a.barred, b.barred, func(x, y time.Time) bool { return x.Equal(y) })
}

func write(t *testing.T, path string, recs []record) {
	t.Helper()
	j, _, _, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	for _, r := range recs {
		if err := j.commit(r); err != nil {
			t.Fatal(err)
		}
	}
}

// The power goes at every byte: what was committed before is there, what was
// not is not, and the journal can be used on.
func TestPowerCutAtEveryByte(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "leases")
	recs := script()
	write(t, path, recs)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) + 1 {
		// What follows the cut may be missing, or be garbage that the disk
		// had there before.
		for _, tail := range [][]byte{nil, bytes.Repeat([]byte{0}, 40), bytes.Repeat([]byte{0xff}, recordLen)} {
			if n < len(journalHeader) && tail != nil {
				continue
			}
			cut := filepath.Join(dir, "cut")
			if err := os.WriteFile(cut, append(append([]byte(nil), whole[:n]...), tail...), 0o600); err != nil {
				t.Fatal(err)
			}
			complete := max(0, n-len(journalHeader)) / recordLen
			j, got, dropped, err := openJournal(cut)
			if err != nil {
				t.Fatalf("cut at %d: %v", n, err)
			}
			if !same(tableOf(got), tableOf(recs[:complete])) {
				t.Fatalf("cut at %d: %d records came back, want the first %d", n, len(got), complete)
			}
			if want := n >= len(journalHeader) && n-len(journalHeader)-complete*recordLen+len(tail) > 0; want != (dropped > 0) {
				t.Errorf("cut at %d with %d bytes of garbage: dropped %d", n, len(tail), dropped)
			}
			if err := j.commit(recs[0]); err != nil {
				t.Fatal(err)
			}
			j.close()
			j, got, dropped, err = openJournal(cut)
			if err != nil || dropped != 0 || len(got) != complete+1 {
				t.Fatalf("cut at %d: after one more record: %d records, %d dropped, %v", n, len(got), dropped, err)
			}
			j.close()
		}
	}
}

func TestFlippedBitIsNoLease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases")
	recs := script()
	write(t, path, recs)
	whole, _ := os.ReadFile(path)
	for i := len(journalHeader); i < len(whole); i++ {
		b := bytes.Clone(whole)
		b[i] ^= 4
		got, good, err := readJournal(b)
		at := (i - len(journalHeader)) / recordLen
		if err != nil || len(got) != at || good != len(journalHeader)+at*recordLen {
			t.Fatalf("bit flipped at %d: %d records, good %d, %v", i, len(got), good, err)
		}
	}
}

func TestForeignFileIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases")
	text := []byte("1700000000 52:54:00:01:02:03 10.0.0.5 dnsmasq *\n")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := openJournal(path); err == nil {
		t.Error("a file of another program was opened")
	}
	if b, _ := os.ReadFile(path); !bytes.Equal(b, text) {
		t.Error("a file of another program was changed")
	}
}

func TestCompaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases")
	j, _, _, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	j.sync = func(*os.File) error { return nil }
	tab := newTable([]Pool{lanPool("10.77.0.2", "10.77.0.250")})
	now := t0
	for i := range compactAt + 10 {
		r := record{recordBound, pxe.MAC{2, 0, 0, 0, 0, byte(i % 5)}, netip.AddrFrom4([4]byte{10, 77, 0, byte(100 + i%5)}), now.Add(time.Hour).Truncate(time.Second)}
		tab.apply(r)
		if err := j.commit(r); err != nil {
			t.Fatal(err)
		}
	}
	before, _ := os.Stat(path)
	if err := j.compact(func() []record { return tab.live(now) }); err != nil {
		t.Fatal(err)
	}
	after, _ := os.Stat(path)
	if want := int64(len(journalHeader) + 5*recordLen); after.Size() != want || before.Size() <= want {
		t.Errorf("journal went from %d to %d bytes, want %d", before.Size(), after.Size(), want)
	}
	// It goes on in the new file.
	r := record{recordBound, pxe.MAC{2, 9}, ip("10.77.0.200"), now.Add(time.Hour)}
	tab.apply(r)
	if err := j.commit(r); err != nil {
		t.Fatal(err)
	}
	j.close()
	// A compaction that a power cut stopped leaves a file beside it.
	if err := os.WriteFile(path+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	j, recs, dropped, err := openJournal(path)
	if err != nil || dropped != 0 || !same(tableOf(recs), tab) {
		t.Errorf("%d records, %d dropped, %v", len(recs), dropped, err)
	}
	j.close()
	if _, err := os.Stat(path + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Error("the leftover stays")
	}
}

func TestNothingIsCompactedBelowTheMark(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases")
	write(t, path, script())
	j, recs, _, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	before, _ := os.ReadFile(path)
	if err := j.compact(func() []record { return tableOf(recs).live(t0) }); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("a small journal was rewritten")
	}
}

func TestCommitsShareSyncs(t *testing.T) {
	j, _, _, err := openJournal(filepath.Join(t.TempDir(), "leases"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	var syncs atomic.Int32
	gate := make(chan struct{})
	j.sync = func(*os.File) error {
		if syncs.Add(1) == 1 {
			<-gate
		}
		return nil
	}
	var wg sync.WaitGroup
	const n = 40
	for range n {
		wg.Go(func() {
			if err := j.commit(script()[0]); err != nil {
				t.Error(err)
			}
		})
	}
	for {
		j.mu.Lock()
		q := j.queued
		j.mu.Unlock()
		if q == n {
			break
		}
	}
	close(gate)
	wg.Wait()
	if s := syncs.Load(); s > 3 {
		t.Errorf("%d syncs for %d commits that waited together", s, n)
	}
	if j.records != n {
		t.Errorf("%d records counted", j.records)
	}
}

// After a failed write nothing is granted until the journal was written anew,
// and then only what was granted is in it.
func TestJournalHeals(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases")
	w := newWorld(pxe.ModeFull)
	s := bare(t, w, path, lanPool("10.77.0.100", "10.77.0.109"))
	kept := newStation(t, s, 1).dora()
	full := errors.New("disk full")
	s.journal.sync = func(*os.File) error { return full }
	lost := newStation(t, s, 2)
	if lost.bound() || !errors.Is(s.journal.failed(), full) {
		t.Fatal("a lease was granted that is on no disk")
	}
	if !s.heal(false) || !s.heal(true) || s.journal.failed() == nil {
		t.Error("a disk that is still full is taken for well")
	}
	if a := w.alarms(); len(a) != 1 {
		t.Errorf("%d alarms about one full disk", len(a))
	}
	s.journal.sync = (*os.File).Sync
	if s.heal(true) || s.journal.failed() != nil {
		t.Fatal("the journal does not come back")
	}
	if !lost.bound() || !newStation(t, s, 3).bound() {
		t.Error("nothing is granted after the disk came back")
	}
	again := bare(t, newWorld(pxe.ModeFull), path, lanPool("10.77.0.100", "10.77.0.109"))
	if mac, ok := again.leases.holder(t0, kept); !ok || mac != newStation(t, s, 1).mac {
		t.Error("what was granted before was lost")
	}
	if _, err := os.Stat(path + ".new"); err == nil {
		t.Error("a half-written file is left")
	}
	// The end is the end.
	s.journal.close()
	if err := s.journal.heal(nil); err != nil || s.journal.failed() == nil {
		t.Error("a closed journal comes back")
	}
}

func TestFailedSyncFailsForEver(t *testing.T) {
	j, _, _, err := openJournal(filepath.Join(t.TempDir(), "leases"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	boom := errors.New("boom")
	j.sync = func(*os.File) error { return boom }
	if err := j.commit(script()[0]); !errors.Is(err, boom) {
		t.Errorf("commit: %v", err)
	}
	j.sync = (*os.File).Sync
	if err := j.commit(script()[0]); err == nil {
		t.Error("a journal whose disk failed goes on as if nothing had happened")
	}
}

func FuzzJournal(f *testing.F) {
	b := []byte(journalHeader)
	for _, r := range script() {
		b = r.append(b)
	}
	f.Add(b)
	f.Add(b[:len(b)-5])
	f.Add([]byte("muster"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		recs, good, err := readJournal(b)
		if err != nil {
			return
		}
		if good > len(b) || good != 0 && good != len(journalHeader)+len(recs)*recordLen {
			t.Fatalf("good %d of %d with %d records", good, len(b), len(recs))
		}
		if good > 0 {
			out := []byte(journalHeader)
			for _, r := range recs {
				out = r.append(out)
			}
			if !bytes.Equal(out, b[:good]) {
				t.Fatal("records do not write back the same")
			}
		}
		tab := tableOf(recs)
		for mac, l := range tab.byMAC {
			if tab.byIP[l.IP] != mac {
				t.Fatal("the two indexes differ")
			}
		}
		if len(tab.byIP) != len(tab.byMAC) {
			t.Fatal("an address is leased twice")
		}
	})
}
