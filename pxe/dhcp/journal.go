package dhcp

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/muster-edge/muster/internal/flush"
	"github.com/muster-edge/muster/pxe"
)

// The lease journal is a header and a row of records, only ever appended to:
//
//	header   "muster-leases 1\n"
//	record   kind(1) mac(6) ipv4(4) expiry(8, Unix seconds, big endian) crc(4)
//
// crc is CRC-32C over the 19 bytes before it. A record counts when it is
// whole; reading stops at the first that is not, and what follows is cut off.
// A lease is acknowledged to its client only after its record was synced.
const (
	journalHeader = "muster-leases 1\n"
	recordLen     = 1 + 6 + 4 + 8 + 4
	// compactAt is the number of records beyond the live ones at which the
	// journal is written anew.
	compactAt = 4096
	// maxJournal bounds what is read at start (a million records).
	maxJournal = 24 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// recordKind is what a record says about (mac, ip).
type recordKind uint8

const (
	recordBound    recordKind = 1
	recordReleased recordKind = 2
	// recordDeclined: somebody else uses ip; mac is the one that noticed.
	recordDeclined recordKind = 3
)

type record struct {
	kind   recordKind
	mac    pxe.MAC
	ip     netip.Addr
	expiry time.Time
}

func (r record) append(b []byte) []byte {
	start := len(b)
	b = append(b, byte(r.kind))
	b = append(b, r.mac[:]...)
	ip := r.ip.As4()
	b = append(b, ip[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(r.expiry.Unix()))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// parseRecord reads one record of exactly recordLen bytes.
func parseRecord(b []byte) (record, bool) {
	body, sum := b[:recordLen-4], binary.BigEndian.Uint32(b[recordLen-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return record{}, false
	}
	r := record{kind: recordKind(b[0]), ip: netip.AddrFrom4([4]byte(b[7:11]))}
	if r.kind < recordBound || r.kind > recordDeclined {
		return record{}, false
	}
	copy(r.mac[:], b[1:7])
	r.expiry = time.Unix(int64(binary.BigEndian.Uint64(b[11:19])), 0)
	return r, true
}

// readJournal returns the whole records and the length of the good part. The
// error is for content that is no journal at all, never for a torn tail.
func readJournal(b []byte) (recs []record, good int, err error) {
	if len(b) < len(journalHeader) {
		if bytes.HasPrefix([]byte(journalHeader), b) {
			return nil, 0, nil
		}
		return nil, 0, errors.New("dhcp: read lease journal: not a lease journal")
	}
	if string(b[:len(journalHeader)]) != journalHeader {
		return nil, 0, errors.New("dhcp: read lease journal: not a lease journal of version 1")
	}
	good = len(journalHeader)
	for len(b)-good >= recordLen {
		r, ok := parseRecord(b[good : good+recordLen])
		if !ok {
			break
		}
		recs = append(recs, r)
		good += recordLen
	}
	return recs, good, nil
}

// journal appends records durably. Concurrent callers share one fsync: the
// first to arrive writes for all that queue up while it syncs.
type journal struct {
	path string
	sync func(*os.File) error

	mu      sync.Mutex
	flushed *sync.Cond
	f       *os.File
	pending []byte
	// queued and done count records handed in and records synced.
	queued, done uint64
	busy, closed bool
	err          error
	records      int
	// healed counts heals: who waited through one does not know whether its
	// record was written.
	healed int
}

var errUnknown = errors.New("dhcp: write lease journal: the disk failed meanwhile")

// openJournal reads path (creating it if absent), cuts a torn tail off and
// returns the records. dropped is the number of bytes cut off.
func openJournal(path string) (j *journal, recs []record, dropped int, err error) {
	fail := func(err error) (*journal, []record, int, error) {
		return nil, nil, 0, fmt.Errorf("dhcp: open lease journal: %w", err)
	}
	// A leftover of a compaction that never finished holds nothing that the
	// journal does not.
	_ = os.Remove(path + ".new")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fail(err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxJournal+1))
	if err == nil && len(b) > maxJournal {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxJournal)
	}
	var good int
	if err == nil {
		recs, good, err = readJournal(b)
	}
	if err != nil {
		f.Close()
		return fail(err)
	}
	j = &journal{path: path, f: f, records: len(recs), sync: (*os.File).Sync}
	j.flushed = sync.NewCond(&j.mu)
	dropped = len(b) - good
	if good == 0 {
		dropped = 0
		err = errors.Join(f.Truncate(0), writeAt(f, []byte(journalHeader), 0), f.Sync(), flush.Dir(filepath.Dir(path)))
	} else if dropped > 0 {
		err = errors.Join(f.Truncate(int64(good)), f.Sync())
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekEnd)
	}
	if err != nil {
		f.Close()
		return fail(err)
	}
	return j, recs, dropped, nil
}

func writeAt(f *os.File, b []byte, at int64) error {
	_, err := f.WriteAt(b, at)
	return err
}

// commit returns once r is on the disk. After a write error the journal
// stays failed until heal: what is on the disk is unknown from there on.
func (j *journal) commit(r record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pending = r.append(j.pending)
	j.queued++
	mine, life := j.queued, j.healed
	for j.done < mine && j.err == nil && j.healed == life {
		if j.busy {
			j.flushed.Wait()
			continue
		}
		j.busy = true
		batch, upTo := j.pending, j.queued
		j.pending = nil
		f := j.f
		j.mu.Unlock()
		_, err := f.Write(batch)
		if err == nil {
			err = j.sync(f)
		}
		j.mu.Lock()
		j.busy = false
		if err != nil {
			j.err = fmt.Errorf("dhcp: write lease journal: %w", err)
		} else {
			j.done = upTo
			j.records += len(batch) / recordLen
		}
		j.flushed.Broadcast()
	}
	if j.done >= mine && j.healed == life {
		return nil
	}
	return cmp.Or(j.err, errUnknown)
}

// compact replaces the journal by one that holds live() alone, if it has
// grown. live is called with no commit in flight and none starting, so it
// sees exactly what the records so far add up to.
func (j *journal) compact(live func() []record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.busy {
		j.flushed.Wait()
	}
	if j.err != nil || len(j.pending) > 0 {
		return j.err
	}
	recs := live()
	if j.records-len(recs) < compactAt {
		return nil
	}
	return j.replace(recs)
}

// failed returns the error that stops commits, nil if there is none.
func (j *journal) failed() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.err
}

// heal writes a failed journal anew, once the disk takes writes again. What
// commits failed to record was never granted; if live holds it all the same,
// an address is held for nobody until it ends, and no more.
func (j *journal) heal(live func() []record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err == nil || j.closed {
		return nil
	}
	for j.busy {
		j.flushed.Wait()
	}
	if err := j.replace(live()); err != nil {
		return err
	}
	j.pending, j.done, j.err = nil, j.queued, nil
	j.healed++
	return nil
}

// replace makes recs the whole journal. The caller holds mu, with nothing in
// flight.
func (j *journal) replace(recs []record) error {
	b := []byte(journalHeader)
	for _, r := range recs {
		b = r.append(b)
	}
	f, err := os.OpenFile(j.path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("dhcp: compact lease journal: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = j.sync(f)
	}
	if err == nil {
		err = os.Rename(j.path+".new", j.path)
	}
	if err != nil {
		f.Close()
		// It would take up room on a disk that has none.
		_ = os.Remove(j.path + ".new")
		return fmt.Errorf("dhcp: compact lease journal: %w", err)
	}
	j.f.Close()
	j.f, j.records = f, len(recs)
	// The old file holds the same leases, so a rename that a power cut
	// undoes loses only what was committed after it: hence sync it now.
	if err := flush.Dir(filepath.Dir(j.path)); err != nil {
		j.err = fmt.Errorf("dhcp: compact lease journal: %w", err)
		return j.err
	}
	return nil
}

func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.busy {
		j.flushed.Wait()
	}
	j.closed = true
	if j.err == nil {
		j.err = errors.New("dhcp: lease journal is closed")
	}
	return j.f.Close()
}
