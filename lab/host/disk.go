package host

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DiskBytes is the size of a node's disk; the file is sparse.
const DiskBytes = 8 << 30

// The shutdown of a mounted file system, as xfstests uses it to play power
// failures (ext4 and xfs: linux/fs/ext4/ioctl.c).
const (
	fsShutdown   = 0x8004587d // _IOR('X', 125, __u32)
	noJournalToo = 2          // EXT4_GOING_FLAGS_NOLOGFLUSH
)

// diskNeeds returns what is missing for disks that lose what was not synced,
// nil if nothing is.
func diskNeeds() error {
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		return errors.New("mkfs.ext4 is not installed")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return errors.New("there are no loop devices (/dev/loop-control)")
	}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(b), "\text4\n") {
		return errors.New("the kernel has no ext4")
	}
	return nil
}

// makeDisk makes a new, empty disk: a file with an ext4 in it.
func makeDisk(path string) error {
	_ = os.Remove(path)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("host: make disk: %w", err)
	}
	err = errors.Join(f.Truncate(DiskBytes), f.Close())
	if err != nil {
		return fmt.Errorf("host: make disk: %w", err)
	}
	out, err := exec.Command("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("host: make disk: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// mountDisk mounts a disk's file by a loop device that the kernel frees with
// the last mount, however that ends.
func mountDisk(path, at string) error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("host: mount disk: %w", err)
	}
	defer control.Close()
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("host: mount disk: %w", err)
	}
	defer backing.Close()
	// Somebody else may take the free device before we do.
	for range 50 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("host: mount disk: find a loop device: %w", err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("host: mount disk: %w", err)
		}
		cfg := unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if errors.Is(err, unix.EBUSY) {
			_ = dev.Close()
			continue
		}
		if err == nil {
			err = unix.Mount(name, at, "ext4", unix.MS_NOATIME, "")
		}
		if cerr := dev.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("host: mount disk %s: %w", path, err)
		}
		return nil
	}
	return errors.New("host: mount disk: no free loop device")
}

// loseUnsynced shuts the file system that dir is on down: no byte more gets
// to the disk, and what programs wrote since the last sync is lost.
func loseUnsynced(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("host: shut disk down: %w", err)
	}
	defer f.Close()
	how := uint32(noJournalToo)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsShutdown, uintptr(unsafe.Pointer(&how))); errno != 0 {
		return fmt.Errorf("host: shut disk of %s down: %w", filepath.Base(dir), errno)
	}
	return nil
}
