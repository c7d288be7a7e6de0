package stick

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// mountPoint is in RAM.
const mountPoint = "/run/stick"

// Mounting by name: the medium is FAT, and nothing else is tried.
const (
	mountFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	// No conversion of names that needs a table of characters we lack.
	mountData = "codepage=437,iocharset=ascii,errors=remount-ro"
)

// kernelMount is the file system of a partition, for the time of f.
func kernelMount(device string, write bool, f func(dir string) error) (err error) {
	if err := os.MkdirAll(mountPoint, 0o700); err != nil {
		return fmt.Errorf("stick: mount: %w", err)
	}
	flags := uintptr(mountFlags | unix.MS_RDONLY)
	if write {
		// In order and at once: the stick may be pulled out at any time.
		flags = mountFlags | unix.MS_SYNCHRONOUS | unix.MS_DIRSYNC
	}
	err = unix.Mount("/dev/"+device, mountPoint, "vfat", flags, mountData)
	switch {
	case write && (errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES)):
		return ErrProtected
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("the stick holds no file system that can be read (%w): write it anew", err)
	case err != nil:
		return fmt.Errorf("stick: mount %s: %w", device, err)
	}
	defer func() {
		uerr := unix.Unmount(mountPoint, 0)
		if uerr != nil {
			// It went away, or is busy: it must not stay in the way of the next try.
			_ = unix.Unmount(mountPoint, unix.MNT_DETACH)
		}
		if err == nil && uerr != nil {
			err = fmt.Errorf("stick: unmount: %w", uerr)
		}
	}()
	return f(mountPoint)
}

// forget drops what the kernel remembers of a disk, so that what is read next
// comes from the medium.
func forget(disk string) error {
	f, err := os.Open("/dev/" + disk)
	if err != nil {
		return fmt.Errorf("stick: read %s anew: %w", disk, err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("stick: read %s anew: %w", disk, err)
	}
	return nil
}

// openDisk opens a whole disk for reading its partition table.
func openDisk(name string) (io.ReaderAt, io.Closer, error) {
	f, err := os.Open("/dev/" + name)
	if err != nil {
		return nil, nil, err
	}
	return f, f, nil
}
