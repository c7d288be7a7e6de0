package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Device is a disk or a part of one. Offsets are in bytes. What WriteAt wrote
// is on the medium after Sync; ReadAt may answer from memory, Reread does not.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Reread is ReadAt from the medium.
	Reread(b []byte, off int64) (int, error)
	Sync() error
	Size() int64
	// Sector is the size of a logical sector.
	Sector() int64
}

// Disk is an open block device, or a file in its place.
type Disk struct {
	f, direct *os.File
	path      string
	size      int64
	sector    int64
	block     bool
}

// direct reads are at multiples of this, into memory at multiples of it.
const directAlign = 4096

// Open opens a disk for nobody else: a device of which a partition is mounted
// or otherwise in use is refused.
func Open(path string) (*Disk, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("disk: open %s: it is in use (mounted, or part of an array): %w", path, err)
		}
		return nil, fmt.Errorf("disk: open %s: %w", path, err)
	}
	d := &Disk{f: f, path: path, sector: 512}
	if err := d.look(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// Some file systems know no direct I/O; then memory is emptied instead.
	d.direct, _ = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	return d, nil
}

func (d *Disk) look() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.f.Fd()), &st); err != nil {
		return fmt.Errorf("disk: look at %s: %w", d.path, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		d.size = st.Size
	case unix.S_IFBLK:
		d.block = true
		var size uint64
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, d.f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); e != 0 {
			return fmt.Errorf("disk: ask %s for its size: %w", d.path, e)
		}
		sector, err := unix.IoctlGetInt(int(d.f.Fd()), unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("disk: ask %s for its sectors: %w", d.path, err)
		}
		d.size, d.sector = int64(size), int64(sector)
	default:
		return fmt.Errorf("disk: open %s: it is neither a block device nor a file", d.path)
	}
	return nil
}

// SetSector says which logical sectors a file stands for.
func (d *Disk) SetSector(n int64) {
	if !d.block {
		d.sector = n
	}
}

// Path is the name it was opened by.
func (d *Disk) Path() string { return d.path }

// KernelName returns the name below /sys/block of the device that is open,
// whatever its path means by now; "" for a file.
func (d *Disk) KernelName() string {
	var st unix.Stat_t
	if !d.block || unix.Fstat(int(d.f.Fd()), &st) != nil {
		return ""
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return ""
	}
	return filepath.Base(link)
}

// ReadAt implements Device.
func (d *Disk) ReadAt(b []byte, off int64) (int, error) { return d.f.ReadAt(b, off) }

// WriteAt implements Device.
func (d *Disk) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > d.size {
		return 0, fmt.Errorf("disk: write %d bytes at %d: outside of the %d bytes of %s", len(b), off, d.size, d.path)
	}
	return d.f.WriteAt(b, off)
}

// Reread implements Device.
func (d *Disk) Reread(b []byte, off int64) (int, error) {
	_ = unix.Fadvise(int(d.f.Fd()), off, int64(len(b)), unix.FADV_DONTNEED)
	if d.direct == nil {
		return d.f.ReadAt(b, off)
	}
	from := off / directAlign * directAlign
	to := (off + int64(len(b)) + directAlign - 1) / directAlign * directAlign
	if to > d.size && d.size%directAlign != 0 {
		return d.f.ReadAt(b, off) // the odd end of a file
	}
	buf := aligned(int(to - from))
	n, err := d.direct.ReadAt(buf, from)
	if errors.Is(err, unix.EINVAL) {
		return d.f.ReadAt(b, off)
	}
	if n < int(off-from) {
		return 0, err
	}
	got := copy(b, buf[off-from:n])
	if got == len(b) {
		err = nil
	}
	return got, err
}

// aligned returns n bytes that begin at a multiple of directAlign.
func aligned(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := directAlign - int(uintptr(unsafe.Pointer(&b[0]))%directAlign)
	return b[skip%directAlign:][:n]
}

// Sync implements Device.
func (d *Disk) Sync() error { return d.f.Sync() }

// Size implements Device.
func (d *Disk) Size() int64 { return d.size }

// Sector implements Device.
func (d *Disk) Sector() int64 { return d.sector }

// Close closes it.
func (d *Disk) Close() error {
	err := d.f.Close()
	if d.direct != nil {
		err = errors.Join(err, d.direct.Close())
	}
	return err
}

// Announce makes the kernel read the partition table anew. Nothing may be
// mounted from it.
func (d *Disk) Announce() error {
	if !d.block {
		return nil
	}
	if err := unix.IoctlSetInt(int(d.f.Fd()), unix.BLKRRPART, 0); err != nil {
		return fmt.Errorf("disk: make the kernel read the table of %s: %w", d.path, err)
	}
	return nil
}

// Section is a part of a device.
type Section struct {
	d        Device
	off, len int64
}

// Sub returns the part [off, off+size) of d.
func Sub(d Device, off, size int64) (Section, error) {
	if off < 0 || size < 0 || off > d.Size() || size > d.Size()-off {
		return Section{}, fmt.Errorf("disk: a part of %d bytes at %d is outside of %d bytes", size, off, d.Size())
	}
	return Section{d, off, size}, nil
}

func (s Section) inside(b []byte, off int64) error {
	if off < 0 || off > s.len || int64(len(b)) > s.len-off {
		return fmt.Errorf("disk: %d bytes at %d are outside of a partition of %d bytes", len(b), off, s.len)
	}
	return nil
}

// ReadAt implements Device.
func (s Section) ReadAt(b []byte, off int64) (int, error) {
	if err := s.inside(b, off); err != nil {
		return 0, err
	}
	return s.d.ReadAt(b, s.off+off)
}

// Reread implements Device.
func (s Section) Reread(b []byte, off int64) (int, error) {
	if err := s.inside(b, off); err != nil {
		return 0, err
	}
	return s.d.Reread(b, s.off+off)
}

// WriteAt implements Device.
func (s Section) WriteAt(b []byte, off int64) (int, error) {
	if err := s.inside(b, off); err != nil {
		return 0, err
	}
	return s.d.WriteAt(b, s.off+off)
}

// Sync implements Device.
func (s Section) Sync() error { return s.d.Sync() }

// Size implements Device.
func (s Section) Size() int64 { return s.len }

// Sector implements Device.
func (s Section) Sector() int64 { return s.d.Sector() }
