package launch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrLocked: another launcher, or a reset, runs on this node.
var ErrLocked = errors.New("launch: another launcher runs on this node")

// lock takes the node's lock. It ends with the file's closing, so with the
// process at the latest; children do not inherit it. OFD locks, unlike
// flock(2), can be asked about without taking them.
func lock(p Paths) (*os.File, error) {
	path := p.LockFile()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("launch: lock: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("launch: lock: %w", err)
	}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart})
	if err == nil {
		return f, nil
	}
	_ = f.Close()
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return nil, ErrLocked
	}
	return nil, fmt.Errorf("launch: lock: %w", err)
}

// locked reports whether somebody holds the lock.
func locked(p Paths) (bool, error) {
	f, err := os.OpenFile(p.LockFile(), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("launch: ask for the lock: %w", err)
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, fmt.Errorf("launch: ask for the lock: %w", err)
	}
	return l.Type != unix.F_UNLCK, nil
}
