package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// hostFiles are what a node sees of the host's /etc: what programs need that
// are linked against a C library, and nothing of the host's identity.
var hostFiles = []string{"passwd", "group", "nsswitch.conf", "protocols", "services", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl", "ca-certificates"}

// diskDirs are the directories of a node that live on its disk; everything
// else is gone when the power is.
var diskDirs = []string{"/var", "/etc/rancher", "/etc/cni"}

// makeRoot builds a node's file tree at root (an empty directory) and makes it
// this process's root: the host's programs read-only, the node's own disk, and
// empty memory for all else.
func makeRoot(b *briefing, root string) error {
	fail := func(what string, err error) error {
		return fmt.Errorf("host: make root of %s: %s: %w", b.Name, what, err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fail("make mounts private", err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID, "mode=0755,size=256m"); err != nil {
		return fail("mount tmpfs", err)
	}
	for _, name := range []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr", "/opt"} {
		if err := mirror(name, root); err != nil {
			return fail(name, err)
		}
	}
	for _, d := range []string{"/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/home", "/etc", "/mnt", "/disk", "/var"} {
		if err := os.MkdirAll(root+d, 0o755); err != nil {
			return fail(d, err)
		}
	}
	if err := unix.Mount("/dev", root+"/dev", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fail("/dev", err)
	}
	// A fresh sysfs shows the node's own network; it would hide the control
	// groups, without which k3s does not start.
	if err := unix.Mount("sysfs", root+"/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fail("/sys", err)
	}
	if _, err := os.Stat("/sys/fs/cgroup"); err == nil {
		if err := unix.Mount("/sys/fs/cgroup", root+"/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fail("/sys/fs/cgroup", err)
		}
	}
	if err := unix.Mount("proc", root+"/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fail("/proc", err)
	}
	for _, d := range []string{"/run", "/tmp"} {
		if err := unix.Mount("tmpfs", root+d, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return fail(d, err)
		}
	}
	for _, name := range hostFiles {
		if err := mirror("/etc/"+name, root); err != nil {
			return fail("/etc/"+name, err)
		}
	}
	for name, text := range map[string]string{
		"/etc/hostname": b.Name + "\n", "/etc/hosts": "127.0.0.1 localhost " + b.Name + "\n",
		"/etc/resolv.conf": "", "/etc/machine-id": b.MachineID + "\n",
	} {
		if err := os.WriteFile(root+name, []byte(text), 0o644); err != nil {
			return fail(name, err)
		}
	}
	if err := b.placeDisk(root); err != nil {
		return fail("disk", err)
	}
	for _, dir := range b.Shared {
		if err := mirror(dir, root); err != nil {
			return fail(dir, err)
		}
	}
	if err := os.MkdirAll(root+tpmDir, 0o700); err != nil {
		return fail(tpmDir, err)
	}
	if err := unix.Mount(b.TPM, root+tpmDir, "", unix.MS_BIND, ""); err != nil {
		return fail(tpmDir, err)
	}
	old := root + "/mnt"
	if err := unix.PivotRoot(root, old); err != nil {
		return fail("pivot", err)
	}
	if err := os.Chdir("/"); err != nil {
		return fail("pivot", err)
	}
	if err := unix.Unmount("/mnt", unix.MNT_DETACH); err != nil {
		return fail("leave the host's files", err)
	}
	return nil
}

// placeDisk mounts the node's disk and puts its directories where they
// belong. A disk that is a directory loses nothing when the power is cut.
func (b *briefing) placeDisk(root string) error {
	disk := root + "/disk"
	if b.DiskFile != "" {
		if err := mountDisk(b.DiskFile, disk); err != nil {
			return err
		}
	} else if err := unix.Mount(b.DiskDir, disk, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	for _, d := range diskDirs {
		if err := errors.Join(os.MkdirAll(disk+d, 0o755), os.MkdirAll(root+d, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount(disk+d, root+d, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, d := range []string{"/var/lib", "/var/log", "/var/tmp"} {
		if err := os.MkdirAll(root+d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// mirror shows a file, directory or link of the host at the same place below
// root, read-only. What the host does not have, the node has not either.
func mirror(name, root string) error {
	info, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	at := root + name
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		to, err := os.Readlink(name)
		if err != nil {
			return err
		}
		return os.Symlink(to, at)
	case info.IsDir():
		err = os.MkdirAll(at, 0o755)
	default:
		var f *os.File
		if f, err = os.Create(at); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(name, at, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}
