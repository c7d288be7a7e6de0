package central

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/pki/ekcert"
)

// Names inside the data directory.
const (
	databaseFile = "muster.db"
	sealKeyFile  = "seal.key"
	lockFile     = "lock"
	rootsDir     = "roots"
	// AdminFile is what the first start writes for the administrator.
	AdminFile = "admin.yaml"
)

// ErrRunning: another process serves from the data directory.
var ErrRunning = errors.New("central: the data directory is in use by a running muster serve")

// dataDir is a locked data directory.
type dataDir struct {
	path string
	lock *os.File
}

// openDataDir creates what is missing and takes the lock, so that no two
// processes give out numbers or keys from one directory. The lock goes with
// the process, however it ends.
func openDataDir(path string) (*dataDir, error) {
	for _, d := range []string{path, filepath.Join(path, rootsDir), filepath.Join(path, rootsDir, ekcert.LabDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("central: make data directory: %w", err)
		}
	}
	f, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("central: lock data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrRunning, path)
		}
		return nil, fmt.Errorf("central: lock data directory: %w", err)
	}
	return &dataDir{path: path, lock: f}, nil
}

func (d *dataDir) file(name string) string { return filepath.Join(d.path, name) }

func (d *dataDir) close() error { return d.lock.Close() }

// sealKey returns the key that seals the secrets in the database: who has
// the database file alone (a backup) does not have them.
func (d *dataDir) sealKey() ([]byte, error) {
	name := d.file(sealKeyFile)
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		b = make([]byte, 32)
		rand.Read(b)
		if err := renameio.WriteFile(name, b, 0o600); err != nil {
			return nil, fmt.Errorf("central: write sealing key: %w", err)
		}
		return b, nil
	}
	if err != nil {
		return nil, fmt.Errorf("central: read sealing key: %w", err)
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("central: read sealing key: %s has %d bytes, want 32; restore it from the backup", name, len(b))
	}
	return b, nil
}
