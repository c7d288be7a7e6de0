package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
)

// Device is a disk or partition that is open for nobody else.
type Device interface {
	disk.Device
	Close() error
}

// Machine is how disks are reached: Host on a machine, files in tests.
type Machine interface {
	// Disk opens a whole disk. Announce makes its new table known.
	Disk(d fleet.Disk) (dev Device, announce func() error, err error)
	// Part opens a partition by its label.
	Part(d fleet.Disk, label string) (Device, error)
	// Mount mounts the ESP; what was written is on the medium after umount.
	Mount(d fleet.Disk) (files efi.Files, umount func() error, err error)
	// Vars are the firmware's variables; nil where it has none.
	Vars() (vars *efi.Vars, done func(), err error)
}

// Host is the machine that this program runs on.
type Host struct {
	// Run is a volatile folder for mount points.
	Run string
	// NeedModule loads a kernel module by its name; nil: they are there.
	NeedModule func(name string) error
	// Disks says what disks there are at the moment: a path may name another
	// one than before.
	Disks func() []fleet.Disk
}

// ErrOtherDisk: the device is not the disk that was asked for.
var ErrOtherDisk = errors.New("install: the device is not the disk that the order names any more")

func (h Host) name(d fleet.Disk) (string, error) {
	for _, x := range h.Disks() {
		if x.Path == d.Path {
			if x.Serial != d.Serial || x.WWN != d.WWN || x.Model != d.Model || x.SizeBytes != d.SizeBytes {
				return "", fmt.Errorf("%w: %s", ErrOtherDisk, d.Path)
			}
			return filepath.Base(d.Path), nil
		}
	}
	return "", fmt.Errorf("%w: there is no %s", ErrOtherDisk, d.Path)
}

// Disk implements Machine.
func (h Host) Disk(d fleet.Disk) (Device, func() error, error) {
	dev, err := disk.Open(d.Path)
	if err != nil {
		return nil, nil, err
	}
	// Only now nobody can change what the path means for us.
	name, err := h.name(d)
	if err == nil && (dev.KernelName() != name || dev.Size() != d.SizeBytes) {
		err = fmt.Errorf("%w: %s is %s of %d bytes", ErrOtherDisk, d.Path, dev.KernelName(), dev.Size())
	}
	if err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return dev, dev.Announce, nil
}

// nodeWait is how long a partition's device may take to appear.
const nodeWait = 5 * time.Second

func (h Host) part(d fleet.Disk, label string) (string, error) {
	name, err := h.name(d)
	if err != nil {
		return "", err
	}
	for end := time.Now().Add(nodeWait); ; {
		parts, err := disk.Parts("/", name)
		if err != nil {
			return "", err
		}
		if dev, ok := parts[label]; ok {
			if _, err := os.Stat(dev); err == nil {
				return dev, nil
			}
		}
		if time.Now().After(end) {
			return "", fmt.Errorf("install: the kernel shows no partition %q on %s", label, d.Path)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Part implements Machine.
func (h Host) Part(d fleet.Disk, label string) (Device, error) {
	dev, err := h.part(d, label)
	if err != nil {
		return nil, err
	}
	return disk.Open(dev)
}

// Mount implements Machine.
func (h Host) Mount(d fleet.Disk) (efi.Files, func() error, error) {
	dir, umount, err := h.mount(d, 0)
	return dir, umount, err
}

func (h Host) mount(d fleet.Disk, more uintptr) (efi.Dir, func() error, error) {
	dev, err := h.part(d, firmware.LabelESP)
	if err != nil {
		return "", nil, err
	}
	if h.NeedModule != nil {
		// The character sets are those that Debian's kernel asks for.
		for _, m := range []string{"vfat", "nls_cp437", "nls_ascii"} {
			_ = h.NeedModule(m) // built in, or the mount says what is missing
		}
	}
	dir := filepath.Join(h.Run, "esp")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, fmt.Errorf("install: mount the ESP: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOSYMFOLLOW
	if err := unix.Mount(dev, dir, "vfat", flags|more, "umask=0077,codepage=437,iocharset=ascii,errors=remount-ro"); err != nil {
		return "", nil, fmt.Errorf("install: mount the ESP %s: %w", dev, err)
	}
	return efi.Dir(dir), func() error {
		if err := unix.Unmount(dir, 0); err != nil {
			return fmt.Errorf("install: unmount the ESP: %w", err)
		}
		return nil
	}, nil
}

const efivars = "/sys/firmware/efi/efivars"

// Vars implements Machine. Recovery mounts the variables read-only; they can be
// written only between Vars and done.
func (h Host) Vars() (*efi.Vars, func(), error) {
	if _, err := os.Stat("/sys/firmware/efi"); err != nil {
		return nil, func() {}, nil
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_REMOUNT
	if err := unix.Mount("efivarfs", efivars, "efivarfs", flags, ""); err != nil {
		return nil, nil, fmt.Errorf("install: make the firmware's variables writable: %w", err)
	}
	done := func() { _ = unix.Mount("efivarfs", efivars, "efivarfs", flags|unix.MS_RDONLY, "") }
	v, err := efi.OpenVars("")
	if err != nil {
		done()
		return nil, nil, err
	}
	return v, done, nil
}
