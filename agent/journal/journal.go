package journal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/internal/failpoint"
)

var (
	// ErrDamaged says that there is a journal and no copy of it can be read.
	// It must not be taken for an empty one.
	ErrDamaged = errors.New("journal: damaged")
	// ErrNewer says that a newer program wrote the journal.
	ErrNewer = errors.New("journal: written by a newer version of this program")
	// ErrInUse says that another process has the journal open.
	ErrInUse = errors.New("journal: in use by another process")
	// ErrFailed says that an earlier write failed, so that it is not known
	// what is on the disk. Opening the journal again finds out.
	ErrFailed = errors.New("journal: an earlier write failed")
)

// copies are the names of the two copies, in the order of writing.
var copies = [2]string{"cluster.a", "cluster.b"}

const lockName = "lock"

var errClosed = errors.New("journal: closed")

// Journal is an open journal. Its methods may be called from several
// goroutines.
type Journal struct {
	dir  string
	lock *os.File
	// cut is a test's power cut: an error ends the write there.
	cut func(point string) error

	mu         sync.Mutex
	now        state
	generation uint64
	failed     error
	mended     []string
}

// Open opens the journal in dir, made if needed, and counts the start of the
// agent. One process can have it open. The error is ErrDamaged, ErrNewer or
// ErrInUse (wrapped), or that of the file system.
func Open(dir string) (*Journal, error) { return open(dir, nil) }

func open(dir string, cut func(string) error) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: open: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: open: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w (%s)", ErrInUse, dir)
		}
		return nil, fmt.Errorf("journal: lock: %w", err)
	}
	j := &Journal{dir: dir, lock: lock, cut: cut}
	j.sweep()
	if err := j.load(); err != nil {
		_ = lock.Close()
		return nil, err
	}
	// This write also brings both copies to one generation: what was read may
	// stand in only one of them, and must survive the loss of that one before
	// anything is done because of it.
	if err := j.write(func(s *state) { s.Boots++ }); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return j, nil
}

// sweep removes what a write that was cut off left behind.
func (j *Journal) sweep() {
	for _, name := range copies {
		left, err := filepath.Glob(filepath.Join(j.dir, "."+name+"*"))
		if err != nil {
			continue
		}
		for _, f := range left {
			_ = os.Remove(f) // it only takes room
		}
	}
}

// load reads the newest copy that is whole.
func (j *Journal) load() error {
	var problems []error
	j.now, j.generation = state{}, 0
	found, missing := 0, 0
	for _, name := range copies {
		b, err := read(filepath.Join(j.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			missing++
			continue
		}
		var s state
		var generation uint64
		if err == nil {
			s, generation, err = decode(b)
		}
		if errors.Is(err, ErrNewer) {
			// The other copy may be older and readable: using it would undo
			// what the newer program did.
			return fmt.Errorf("%s: %w", filepath.Join(j.dir, name), err)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", filepath.Join(j.dir, name), err))
			j.mended = append(j.mended, name)
			continue
		}
		if found++; found == 1 || generation > j.generation {
			j.now, j.generation = s, generation
		}
	}
	if found == 0 && missing < len(copies) {
		return fmt.Errorf("%w: %w", ErrDamaged, errors.Join(problems...))
	}
	return nil
}

func read(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// Close gives the journal to the next process.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.failed = errClosed
	if err := j.lock.Close(); err != nil {
		return fmt.Errorf("journal: close: %w", err)
	}
	return nil
}

// Boots returns how often the journal was opened, this time included.
func (j *Journal) Boots() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.now.Boots
}

// Mended names copies that were damaged and have been replaced by Open: a
// sign of a bad disk.
func (j *Journal) Mended() []string { return slices.Clone(j.mended) }

// Disk returns what is on the disk and flushed. Fields that others observe
// (Datastore to Mark) are empty. The caller must not change what it points to.
func (j *Journal) Disk() cb.Disk {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.now.Disk
}

// Failed returns why an earlier write failed, nil if none did. Until Mend
// succeeds it is not known what is on the disk.
func (j *Journal) Failed() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.failed
}

// Mend reads the disk again after a failed write, and writes both copies
// anew. A change whose Update failed may turn out to have been made.
func (j *Journal) Mend() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.failed == nil || errors.Is(j.failed, errClosed) {
		return j.failed
	}
	j.sweep()
	if err := j.load(); err != nil {
		return err
	}
	was := j.failed
	j.failed = nil
	if err := j.write(func(*state) {}); err != nil {
		j.failed = was
		return err
	}
	return nil
}

// Update changes the journal; when it returns nil the change survives a power
// cut. Pointers in the Disk must be replaced, not written through. After an
// error nothing may be done on the strength of the change, and all further
// updates fail until Mend found out what is on the disk.
func (j *Journal) Update(change func(*cb.Disk)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.write(func(s *state) {
		s.Disk.Addrs = maps.Clone(s.Disk.Addrs)
		change(&s.Disk)
		d := &s.Disk
		d.Datastore, d.Tombstone, d.ResetFlag, d.AgentCert, d.Mark = false, false, false, false, ""
	})
}

func (j *Journal) write(change func(*state)) error {
	if j.failed != nil {
		return fmt.Errorf("%w: %w", ErrFailed, j.failed)
	}
	next := j.now
	change(&next)
	b, err := next.encode(j.generation + 1)
	if err != nil {
		return err // nothing was touched
	}
	for _, name := range copies {
		if err := j.put(name, b); err != nil {
			j.failed = err
			return fmt.Errorf("journal: write: %w", err)
		}
	}
	j.now, j.generation = next, j.generation+1
	return nil
}

// put replaces one copy.
func (j *Journal) put(name string, b []byte) error {
	if err := j.at("journal." + name + ".begin"); err != nil {
		return err
	}
	f, err := renameio.NewPendingFile(filepath.Join(j.dir, name), renameio.WithPermissions(0o600), renameio.WithTempDir(j.dir))
	if err != nil {
		return err
	}
	defer f.Cleanup() //nolint:errcheck // a leftover is swept by the next start
	half := len(b) / 2
	if _, err := f.Write(b[:half]); err != nil {
		return err
	}
	if err := j.at("journal." + name + ".half"); err != nil {
		return err
	}
	if _, err := f.Write(b[half:]); err != nil {
		return err
	}
	if err := j.at("journal." + name + ".before-rename"); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil { // fsync, then rename
		return err
	}
	if err := j.at("journal." + name + ".before-dirsync"); err != nil {
		return err
	}
	d, err := os.Open(j.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return err
	}
	return j.at("journal." + name + ".end")
}

func (j *Journal) at(point string) error {
	failpoint.Hit(point)
	if j.cut != nil {
		return j.cut(point)
	}
	return nil
}

// Peek says in one line what the journal in dir holds. It changes nothing and
// takes no lock.
func Peek(dir string) (string, error) {
	j := &Journal{dir: dir}
	if err := j.load(); err != nil {
		return "", err
	}
	if j.generation == 0 {
		return "none: this agent never ran here", nil
	}
	d := j.now.Disk
	s := fmt.Sprintf("role %s, started %d times", d.Role, j.now.Boots)
	if d.Record != nil {
		s += fmt.Sprintf(", cluster %s epoch %d", d.Record.UID, d.Record.Epoch)
	}
	return s, nil
}
