package disktest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/diskfs/go-diskfs/filesystem"
	"github.com/diskfs/go-diskfs/filesystem/fat32"

	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/efi"
)

// FAT is the FAT32 on a device, without a kernel.
type FAT struct {
	dev disk.Device
	fs  *fat32.FileSystem
	// ReadOnly refuses writes.
	ReadOnly bool
}

var _ efi.Files = (*FAT)(nil)

// OpenFAT reads the FAT32 on dev. The library panics on some damage.
func OpenFAT(dev disk.Device) (f *FAT, err error) {
	defer contain(&err)
	x, err := fat32.Read(disk.Storage(dev), dev.Size(), 0, dev.Sector())
	if err != nil {
		return nil, fmt.Errorf("disktest: open FAT: %w", err)
	}
	return &FAT{dev: dev, fs: x}, nil
}

func contain(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("disktest: the FAT is damaged: %v", r)
	}
}

// List implements efi.Files.
func (f *FAT) List(dir string) (out []string, err error) {
	defer contain(&err)
	all, err := f.fs.ReadDir(dir)
	if err != nil {
		return nil, nil // the library has no error of its own for "none"
	}
	for _, e := range all {
		if n := e.Name(); n != "." && n != ".." {
			out = append(out, n)
		}
	}
	return out, nil
}

func (f *FAT) there(name string) bool {
	all, err := f.List(path.Dir(name))
	if err != nil {
		return false
	}
	for _, n := range all {
		if strings.EqualFold(n, path.Base(name)) {
			return true
		}
	}
	return false
}

// Open implements efi.Files.
func (f *FAT) Open(name string) (r io.ReadCloser, err error) {
	defer contain(&err)
	if !f.there(name) {
		return nil, fs.ErrNotExist
	}
	x, err := f.fs.OpenFile(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	return reader{x}, nil
}

type reader struct{ filesystem.File }

func (r reader) Read(b []byte) (n int, err error) {
	defer contain(&err)
	return r.File.Read(b)
}

// Create implements efi.Files.
func (f *FAT) Create(name string) (file efi.File, err error) {
	defer contain(&err)
	if f.ReadOnly {
		return nil, errors.New("read-only file system")
	}
	if f.there(name) {
		if err := f.fs.Remove(name); err != nil {
			return nil, err
		}
	}
	x, err := f.fs.OpenFile(name, os.O_CREATE|os.O_RDWR)
	if err != nil {
		return nil, err
	}
	return writer{x, f}, nil
}

type writer struct {
	filesystem.File
	f *FAT
}

func (w writer) Write(b []byte) (n int, err error) {
	defer contain(&err)
	return w.File.Write(b)
}

func (w writer) Sync() error { return w.f.dev.Sync() }

// Rename implements efi.Files. Where there is something of that name it goes
// first, as the kernel's vfat does in one folder.
func (f *FAT) Rename(from, to string) (err error) {
	defer contain(&err)
	if f.ReadOnly {
		return errors.New("read-only file system")
	}
	if f.there(to) && !strings.EqualFold(from, to) {
		if err := f.fs.Remove(to); err != nil {
			return err
		}
	}
	return f.fs.Rename(from, to)
}

// Remove implements efi.Files.
func (f *FAT) Remove(name string) (err error) {
	defer contain(&err)
	if f.ReadOnly {
		return errors.New("read-only file system")
	}
	if !f.there(name) {
		return fs.ErrNotExist
	}
	return f.fs.Remove(name)
}

// Mkdir implements efi.Files.
func (f *FAT) Mkdir(dir string) (err error) {
	defer contain(&err)
	if dir == "." || f.there(dir) {
		return nil
	}
	return f.fs.Mkdir(dir)
}

// Sync implements efi.Files.
func (f *FAT) Sync() error { return f.dev.Sync() }

// Space implements efi.Files. How much is free does not matter to tests that
// write a few kilobytes.
func (f *FAT) Space() (int64, bool, error) { return f.dev.Size() / 2, f.ReadOnly, nil }
