package recovery

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mountPoint is one file system that PID 1 needs.
type mountPoint struct {
	source, target, kind string
	flags                uintptr
	data                 string
	// optional ones may be missing: no UEFI, no TPM support.
	optional bool
}

// earlyMounts come before anything else; consoles and clocks need them.
var earlyMounts = []mountPoint{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "", false},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "", false},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755", false},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=64m", false},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777,size=64m", false},
	{"securityfs", "/sys/kernel/security", "securityfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "", true},
}

// lateMounts need a module first. Variables are mounted read-only: recovery
// reads how it was booted and changes nothing.
var lateMounts = []mountPoint{
	{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY, "", true},
}

// mountAll mounts what is not mounted yet. It goes on after an error, since a
// machine with half its file systems can still say what is wrong, and returns
// the errors of those that are not optional.
func mountAll(points []mountPoint) error {
	var errs []error
	for _, m := range points {
		if err := mount(m); err != nil && !m.optional {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func mount(m mountPoint) error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("recovery: mount %s: %w", m.target, err)
	}
	if mounted(m) {
		return nil
	}
	err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data)
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("recovery: mount %s on %s: %w", m.kind, m.target, err)
	}
	return nil
}

// File system types of statfs(2), linux/magic.h.
var magic = map[string]int64{
	"proc": 0x9fa0, "sysfs": 0x62656572, "securityfs": 0x73636673, "efivarfs": 0xde5e81e4,
}

// mounted tells whether the target is there already. devtmpfs and tmpfs share
// a type with other file systems: for them the device number must differ from
// the parent's.
func mounted(m mountPoint) bool {
	if want, ok := magic[m.kind]; ok {
		var s unix.Statfs_t
		return unix.Statfs(m.target, &s) == nil && int64(s.Type) == want
	}
	var here, above unix.Stat_t
	return unix.Stat(m.target, &here) == nil && unix.Stat(m.target+"/..", &above) == nil && here.Dev != above.Dev
}
