package fetch

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// flushEvery is how many bytes of a File may be lost by a power cut.
const flushEvery = 1 << 20

// File is a Spool on disk. What an earlier run left is read and hashed, and
// gone on with; the digest of the whole says whether it was any good.
type File struct {
	f     *os.File
	size  int64
	dirty int64
	sum   hash.Hash
}

// OpenFile opens or makes the file.
func OpenFile(name string) (*File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("fetch: open spool: %w", err)
	}
	s := &File{f: f, sum: sha256.New()}
	if s.size, err = io.Copy(s.sum, f); err != nil {
		f.Close()
		return nil, fmt.Errorf("fetch: read spool: %w", err)
	}
	return s, nil
}

// Len implements Spool.
func (s *File) Len() int64 { return s.size }

// Write implements Spool.
func (s *File) Write(b []byte) (int, error) {
	n, err := s.f.WriteAt(b, s.size)
	s.size += int64(n)
	s.sum.Write(b[:n])
	s.dirty += int64(n)
	if err == nil && s.dirty >= flushEvery {
		s.dirty = 0
		err = s.f.Sync()
	}
	if err != nil {
		return n, fmt.Errorf("fetch: write spool: %w", err)
	}
	return n, nil
}

// Sum implements Spool.
func (s *File) Sum() (Digest, error) { return Digest(s.sum.Sum(nil)), nil }

// Reset implements Spool.
func (s *File) Reset() error {
	s.size, s.dirty = 0, 0
	s.sum.Reset()
	if err := s.f.Truncate(0); err != nil {
		return fmt.Errorf("fetch: empty spool: %w", err)
	}
	return nil
}

// Reader returns the whole file from its beginning.
func (s *File) Reader() io.Reader { return io.NewSectionReader(s.f, 0, s.size) }

// Close closes it.
func (s *File) Close() error { return s.f.Close() }
