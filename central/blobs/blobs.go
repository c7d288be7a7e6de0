// Package blobs keeps files by the SHA-256 of their content. A file comes in
// pieces, in any number of attempts; it gets its name only when its digest is
// right, and what was acknowledged is on the disk.
//
//	DIR/ab/abcd...        a whole file, named by its digest
//	DIR/partial/abcd...   what came of one so far
//
// Which files count is not known here: the database says so.
package blobs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/internal/flush"
)

var (
	// ErrBusy: somebody else sends this very file just now.
	ErrBusy = errors.New("blobs: this file is being received just now; try again in a moment")
	// ErrDigest: the whole file came, and its content is not what its name
	// says. Nothing of it is kept.
	ErrDigest = errors.New("blobs: the bytes are not those that the digest names; the file was changed while it was read, or on its way")
)

// OffsetError: a piece does not begin where the last one ended.
type OffsetError struct{ Have int64 }

// Error implements error.
func (e *OffsetError) Error() string {
	return fmt.Sprintf("blobs: go on at byte %d", e.Have)
}

// Digest is a SHA-256 value; its text is 64 lower-case hex digits.
type Digest [sha256.Size]byte

// String returns lower-case hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// ParseDigest reads 64 lower-case hex digits and nothing else, so that no name
// leads out of the directory and each file has one name.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	if len(s) == 2*len(d) {
		if _, err := hex.Decode(d[:], []byte(s)); err == nil && d.String() == s {
			return d, nil
		}
	}
	return Digest{}, fmt.Errorf("blobs: %.80q is no SHA-256 digest: want 64 digits 0-9 a-f", s)
}

const partialDir = "partial"

// Dir is a directory of blobs. All methods are safe for concurrent use.
type Dir struct {
	path string

	mu   sync.Mutex
	busy map[Digest]bool
}

// Open makes what is missing of the directory.
func Open(path string) (*Dir, error) {
	if err := os.MkdirAll(filepath.Join(path, partialDir), 0o700); err != nil {
		return nil, fmt.Errorf("blobs: make directory: %w", err)
	}
	return &Dir{path: path, busy: make(map[Digest]bool)}, nil
}

func (d *Dir) whole(id Digest) string {
	name := id.String()
	return filepath.Join(d.path, name[:2], name)
}

func (d *Dir) partial(id Digest) string { return filepath.Join(d.path, partialDir, id.String()) }

// File opens a whole file.
func (d *Dir) File(id Digest) (*os.File, error) {
	f, err := os.Open(d.whole(id))
	if err != nil {
		return nil, fmt.Errorf("blobs: open %s: %w", id, err)
	}
	return f, nil
}

// State tells how much of a file is there.
func (d *Dir) State(id Digest) (have int64, whole bool, err error) {
	info, err := os.Stat(d.whole(id))
	if err == nil {
		return info.Size(), true, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return 0, false, fmt.Errorf("blobs: look at %s: %w", id, err)
	}
	info, err = os.Stat(d.partial(id))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, false, nil
	case err != nil:
		return 0, false, fmt.Errorf("blobs: look at %s: %w", id, err)
	}
	return info.Size(), false, nil
}

func (d *Dir) enter(id Digest) (leave func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy[id] {
		return nil, ErrBusy
	}
	d.busy[id] = true
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.busy, id)
	}, nil
}

// Append adds a piece that begins at offset to a file of size bytes. What it
// returns as have is on the disk, also beside an error of the sender. whole is
// true once the file is complete and named.
func (d *Dir) Append(id Digest, size, offset int64, piece io.Reader) (have int64, whole bool, err error) {
	leave, err := d.enter(id)
	if err != nil {
		return 0, false, err
	}
	defer leave()
	if have, whole, err = d.State(id); err != nil || whole {
		return have, whole, err
	}
	if offset != have {
		return have, false, &OffsetError{have}
	}
	f, err := os.OpenFile(d.partial(id), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return have, false, fmt.Errorf("blobs: write %s: %w", id, err)
	}
	// One byte more than there may be shows that the sender has another file.
	n, readErr := io.Copy(f, io.LimitReader(piece, size-have+1))
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return have, false, fmt.Errorf("blobs: write %s: %w", id, err)
	}
	have += n
	failpoint.Hit("blob.after-piece")
	switch {
	case have > size:
		return 0, false, errors.Join(ErrDigest, os.Remove(d.partial(id)))
	case readErr != nil:
		return have, false, fmt.Errorf("blobs: receive %s: %w", id, readErr)
	case have < size:
		return have, false, nil
	}
	if err := d.finish(id); err != nil {
		return 0, false, err
	}
	return have, true, nil
}

// finish checks a complete file and gives it its name.
func (d *Dir) finish(id Digest) error {
	sum, err := digestFile(d.partial(id))
	if err != nil {
		return fmt.Errorf("blobs: check %s: %w", id, err)
	}
	if sum != id {
		return errors.Join(ErrDigest, os.Remove(d.partial(id)))
	}
	name := d.whole(id)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return fmt.Errorf("blobs: store %s: %w", id, err)
	}
	if err := syncDir(d.path); err != nil {
		return err
	}
	failpoint.Hit("blob.before-rename")
	if err := os.Rename(d.partial(id), name); err != nil {
		return fmt.Errorf("blobs: store %s: %w", id, err)
	}
	failpoint.Hit("blob.after-rename")
	return syncDir(filepath.Dir(name))
}

func syncDir(dir string) error {
	if err := flush.Dir(dir); err != nil {
		return fmt.Errorf("blobs: %w", err)
	}
	return nil
}

// Remove removes a whole file. One that is not there is no error.
func (d *Dir) Remove(id Digest) error {
	leave, err := d.enter(id)
	if err != nil {
		return err
	}
	defer leave()
	if err := os.Remove(d.whole(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("blobs: remove %s: %w", id, err)
	}
	return nil
}

// Check reads a whole file once more. One that is not what its name says, on a
// disk that went bad or by somebody's hand, is removed, so that it can come
// again; sound is false then, and when there is no file.
func (d *Dir) Check(id Digest) (sound bool, err error) {
	leave, err := d.enter(id)
	if err != nil {
		return false, err
	}
	defer leave()
	sum, err := digestFile(d.whole(id))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	// What the disk cannot give back is damaged; any other error, such as too
	// many open files, says nothing about the file.
	if err != nil && !errors.Is(err, syscall.EIO) {
		return false, fmt.Errorf("blobs: check %s: %w", id, err)
	}
	if err == nil && sum == id {
		return true, nil
	}
	if err := os.Remove(d.whole(id)); err != nil {
		return false, fmt.Errorf("blobs: remove the damaged %s: %w", id, err)
	}
	return false, syncDir(filepath.Dir(d.whole(id)))
}

func digestFile(path string) (d Digest, err error) {
	f, err := os.Open(path)
	if err != nil {
		return d, err
	}
	sum := sha256.New()
	_, err = io.Copy(sum, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return d, err
	}
	return Digest(sum.Sum(nil)), nil
}

// Pending is the number of bytes of all files that are not whole.
func (d *Dir) Pending() (bytes int64, err error) {
	err = d.eachPartial(func(_ Digest, info fs.FileInfo) error {
		bytes += info.Size()
		return nil
	})
	return bytes, err
}

// Tidy removes what came of files to which nothing was added since a time, and
// what has no proper name.
func (d *Dir) Tidy(before time.Time) (removed int, err error) {
	err = d.eachPartial(func(id Digest, info fs.FileInfo) error {
		leave, err := d.enter(id)
		if err != nil {
			return nil // somebody is adding to it
		}
		defer leave()
		if !info.ModTime().Before(before) {
			return nil
		}
		removed++
		if err := os.Remove(filepath.Join(d.path, partialDir, info.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("blobs: tidy: %w", err)
		}
		return nil
	})
	return removed, err
}

func (d *Dir) eachPartial(f func(Digest, fs.FileInfo) error) error {
	entries, err := os.ReadDir(filepath.Join(d.path, partialDir))
	if err != nil {
		return fmt.Errorf("blobs: list: %w", err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("blobs: list: %w", err)
		}
		id, _ := ParseDigest(e.Name()) // a name that is none is nobody's
		if err := f(id, info); err != nil {
			return err
		}
	}
	return nil
}

// Whole calls f for each whole file.
func (d *Dir) Whole(f func(Digest, fs.FileInfo) error) error {
	return filepath.WalkDir(d.path, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("blobs: list: %w", err)
		}
		if e.IsDir() {
			if e.Name() == partialDir {
				return fs.SkipDir
			}
			return nil
		}
		id, err := ParseDigest(e.Name())
		if err != nil {
			return nil // not ours
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("blobs: list: %w", err)
		}
		return f(id, info)
	})
}
