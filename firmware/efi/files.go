package efi

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Files is what an ESP is made of. Names are slash-separated and relative.
type Files interface {
	// List returns the names in a folder; a missing folder has none.
	List(dir string) ([]string, error)
	Open(name string) (io.ReadCloser, error)
	// Create makes an empty file, in place of one that is there.
	Create(name string) (File, error)
	// Rename replaces what has the new name.
	Rename(from, to string) error
	Remove(name string) error
	// Mkdir makes a folder and those above it.
	Mkdir(dir string) error
	// Sync returns when all that was done is on the medium.
	Sync() error
	// Space returns the free bytes, and whether nothing can be written.
	Space() (free int64, readOnly bool, err error)
}

// File is one that is being written. Sync makes its bytes durable.
type File interface {
	io.Writer
	Sync() error
	Close() error
}

// Dir is the mounted file system below a folder.
type Dir string

func (d Dir) path(name string) string { return filepath.Join(string(d), filepath.FromSlash(name)) }

// List implements Files.
func (d Dir) List(dir string) ([]string, error) {
	f, err := os.Open(d.path(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxNames)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// Open implements Files.
func (d Dir) Open(name string) (io.ReadCloser, error) {
	f, err := os.OpenFile(d.path(name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	// What was written must come from the medium, not from memory.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	return f, nil
}

// Create implements Files.
func (d Dir) Create(name string) (File, error) {
	return os.OpenFile(d.path(name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o644)
}

// Rename implements Files.
func (d Dir) Rename(from, to string) error { return os.Rename(d.path(from), d.path(to)) }

// Remove implements Files.
func (d Dir) Remove(name string) error { return os.Remove(d.path(name)) }

// Mkdir implements Files.
func (d Dir) Mkdir(dir string) error { return os.MkdirAll(d.path(dir), 0o755) }

// Sync implements Files: FAT keeps folders and the allocation table apart, so
// that one file's fsync is not enough.
func (d Dir) Sync() error {
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Syncfs(int(f.Fd()))
}

// Space implements Files. The kernel makes a FAT read-only when it finds
// damage.
func (d Dir) Space() (int64, bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(string(d), &st); err != nil {
		return 0, false, fmt.Errorf("efi: look at %s: %w", string(d), err)
	}
	return int64(st.Bavail) * st.Bsize, st.Flags&unix.ST_RDONLY != 0, nil
}
