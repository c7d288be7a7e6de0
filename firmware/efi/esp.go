package efi

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
)

const (
	// maxNames bounds a folder that we read.
	maxNames = 4096
	// maxSmall bounds a file that is read whole.
	maxSmall = 1 << 20
	// tempSuffix marks a file of Put that has not got its name yet.
	tempSuffix = ".tmp"
)

// ErrBroken: the bytes on the medium are not those that were written.
var ErrBroken = errors.New("efi: what is on the medium differs from what was written")

// ESP is an EFI system partition.
type ESP struct{ files Files }

// NewESP is the partition mounted at dir.
func NewESP(dir string) *ESP { return &ESP{Dir(dir)} }

// On is an ESP on other files than mounted ones.
func On(f Files) *ESP { return &ESP{f} }

// BootFiles returns all files below EFI/Linux, sorted by name.
func (e *ESP) BootFiles() ([]firmware.BootFile, error) {
	names, err := e.files.List(bootmodel.Entries)
	if err != nil {
		return nil, fmt.Errorf("efi: list boot files: %w", err)
	}
	if len(names) >= maxNames {
		return nil, fmt.Errorf("efi: list boot files: %d and more; the partition is damaged or not ours", maxNames)
	}
	slices.Sort(names)
	var out []firmware.BootFile
	for _, n := range names {
		f := firmware.BootFile{Name: n}
		f.Base, f.Left, f.Done = bootmodel.Counter(n)
		out = append(out, f)
	}
	return out, nil
}

// Space returns the free bytes and whether the partition can be written.
func (e *ESP) Space() (free int64, writable bool, err error) {
	free, readOnly, err := e.files.Space()
	return free, !readOnly, err
}

// entry checks a name below EFI/Linux.
func entry(name string) (string, error) {
	if name == "" || path.Base(name) != name || strings.ContainsAny(name, "\\\x00") || name == "." || name == ".." {
		return "", fmt.Errorf("efi: %q is no file name", name)
	}
	return path.Join(bootmodel.Entries, name), nil
}

// Stage writes a boot file under a hidden name (firmware.StagedPrefix), makes
// it durable and reads it back. An error leaves no file of that name.
func (e *ESP) Stage(name string, src io.Reader, size int64, digest firmware.Digest) error {
	full, err := entry(name)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(name, firmware.StagedPrefix) {
		return fmt.Errorf("efi: stage %s: the name does not begin with %s, so that a power cut could start half a file", name, firmware.StagedPrefix)
	}
	return e.write(full, src, size, digest)
}

// Whole reports whether the boot file is there with exactly these bytes.
func (e *ESP) Whole(name string, size int64, digest firmware.Digest) (bool, error) {
	full, err := entry(name)
	if err != nil {
		return false, err
	}
	return e.HasFile(full, size, digest)
}

// HasFile reports whether the file at this path has exactly these bytes.
func (e *ESP) HasFile(full string, size int64, digest firmware.Digest) (bool, error) {
	f, err := e.files.Open(full)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("efi: read %s: %w", full, err)
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, size+1))
	if err != nil {
		return false, fmt.Errorf("efi: read %s: %w", full, err)
	}
	return n == size && firmware.Digest(h.Sum(nil)) == digest, nil
}

// Rename gives a boot file another name. It returns when that is on the
// medium; this is the step that makes an update happen.
func (e *ESP) Rename(from, to string) error {
	a, err := entry(from)
	if err != nil {
		return err
	}
	b, err := entry(to)
	if err != nil {
		return err
	}
	return e.rename(a, b)
}

func (e *ESP) rename(from, to string) error {
	if err := e.files.Rename(from, to); err != nil {
		return fmt.Errorf("efi: rename %s to %s: %w", from, to, err)
	}
	if err := e.files.Sync(); err != nil {
		return fmt.Errorf("efi: rename %s to %s: %w", from, to, err)
	}
	return nil
}

// Remove removes a boot file; one that is not there is removed.
func (e *ESP) Remove(name string) error {
	full, err := entry(name)
	if err != nil {
		return err
	}
	return e.RemoveFile(full)
}

// RemoveFile removes the file at this path.
func (e *ESP) RemoveFile(full string) error {
	if err := e.files.Remove(full); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("efi: remove %s: %w", full, err)
	}
	if err := e.files.Sync(); err != nil {
		return fmt.Errorf("efi: remove %s: %w", full, err)
	}
	return nil
}

// Put brings a file to a path outside of EFI/Linux: beside it first, then by
// rename over what is there. The same bytes are not written again.
func (e *ESP) Put(full string, src io.Reader, size int64, digest firmware.Digest) error {
	if whole, err := e.HasFile(full, size, digest); err == nil && whole {
		return nil
	}
	if err := e.files.Mkdir(path.Dir(full)); err != nil {
		return fmt.Errorf("efi: make %s: %w", path.Dir(full), err)
	}
	temp := full + tempSuffix
	if err := e.write(temp, src, size, digest); err != nil {
		return err
	}
	return e.rename(temp, full)
}

// PutBytes is Put of a small file.
func (e *ESP) PutBytes(full string, b []byte) error {
	return e.Put(full, bytes.NewReader(b), int64(len(b)), sha256.Sum256(b))
}

// ReadSmall reads a file of at most 1 MiB.
func (e *ESP) ReadSmall(full string) ([]byte, error) {
	f, err := e.files.Open(full)
	if err != nil {
		return nil, fmt.Errorf("efi: read %s: %w", full, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSmall+1))
	if err != nil {
		return nil, fmt.Errorf("efi: read %s: %w", full, err)
	}
	if len(b) > maxSmall {
		return nil, fmt.Errorf("efi: read %s: more than %d bytes", full, maxSmall)
	}
	return b, nil
}

// List returns the names in a folder, sorted.
func (e *ESP) List(dir string) ([]string, error) {
	names, err := e.files.List(dir)
	if err != nil {
		return nil, fmt.Errorf("efi: list %s: %w", dir, err)
	}
	slices.Sort(names)
	return names, nil
}

// write writes, makes durable, reads back and compares.
func (e *ESP) write(full string, src io.Reader, size int64, digest firmware.Digest) (err error) {
	if err := e.files.Mkdir(path.Dir(full)); err != nil {
		return fmt.Errorf("efi: make %s: %w", path.Dir(full), err)
	}
	f, err := e.files.Create(full)
	if err != nil {
		return fmt.Errorf("efi: write %s: %w", full, err)
	}
	defer func() {
		if err != nil {
			_ = e.files.Remove(full) // what matters is the first error
		}
	}()
	n, err := io.Copy(f, io.LimitReader(src, size+1))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes came, %d were said", n, size)
	}
	if err == nil {
		err = e.files.Sync()
	}
	if err != nil {
		return fmt.Errorf("efi: write %s: %w", full, err)
	}
	whole, err := e.HasFile(full, size, digest)
	if err != nil {
		return err
	}
	if !whole {
		return fmt.Errorf("efi: write %s: %w", full, ErrBroken)
	}
	return nil
}
