package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/firmware"
)

// System is the installed system that runs: which disk and which slot.
type System struct {
	// Disk is the device, Name its name below /sys/block.
	Disk, Name string
	Slot       firmware.SlotID
	// Parts are the devices of its partitions by label.
	Parts map[string]string
}

// ErrNoSlot: the root file system is on no slot, as in recovery.
var ErrNoSlot = errors.New("disk: the running system is on no slot of a disk")

// maxSysfs bounds a file of sysfs, maxHolders a folder of it.
const (
	maxSysfs   = 64 << 10
	maxHolders = 1024
)

// Running finds the slot under the root file system: the devices below
// dm-verity. A file name on the ESP says only what somebody meant to start.
// root is "/" on a node.
func Running(root string) (System, error) {
	at := func(p ...string) string { return filepath.Join(append([]string{root}, p...)...) }
	mounts, err := read(at("proc/self/mountinfo"))
	if err != nil {
		return System{}, err
	}
	dev := rootDevice(mounts)
	link, err := os.Readlink(at("sys/dev/block", dev))
	if dev == "" || err != nil {
		return System{}, ErrNoSlot
	}
	below, err := names(at("sys/class/block", filepath.Base(link), "slaves"))
	if err != nil || len(below) != 2 {
		return System{}, fmt.Errorf("%w: %s has %d devices below it, dm-verity has two", ErrNoSlot, filepath.Base(link), len(below))
	}
	labels := map[string]bool{}
	disk := ""
	for _, part := range below {
		label, parent, err := partition(at, part)
		if err != nil {
			return System{}, err
		}
		if disk != "" && disk != parent {
			return System{}, fmt.Errorf("%w: its parts are on two disks, %s and %s", ErrNoSlot, disk, parent)
		}
		disk, labels[label] = parent, true
	}
	s := System{Disk: "/dev/" + disk, Name: disk, Parts: map[string]string{}}
	switch {
	case labels[firmware.LabelRootA] && labels[firmware.LabelVerityA]:
		s.Slot = firmware.SlotA
	case labels[firmware.LabelRootB] && labels[firmware.LabelVerityB]:
		s.Slot = firmware.SlotB
	default:
		return System{}, fmt.Errorf("%w: the devices below its root are %v", ErrNoSlot, below)
	}
	s.Parts, err = parts(at, disk)
	return s, err
}

// Parts returns the devices of a disk's partitions by label, as the kernel
// sees them now. name is that below /sys/block.
func Parts(root, name string) (map[string]string, error) {
	return parts(func(p ...string) string { return filepath.Join(append([]string{root}, p...)...) }, name)
}

func parts(at func(...string) string, disk string) (map[string]string, error) {
	all, err := names(at("sys/class/block", disk))
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, n := range all {
		if !strings.HasPrefix(n, disk) {
			continue
		}
		if _, err := os.Stat(at("sys/class/block", disk, n, "partition")); err != nil {
			continue
		}
		label, _, err := partition(at, n)
		if err != nil {
			return nil, err
		}
		if label != "" {
			out[label] = "/dev/" + n
		}
	}
	return out, nil
}

// partition returns the label of a partition and the disk that it is on.
func partition(at func(...string) string, name string) (label, disk string, err error) {
	link, err := os.Readlink(at("sys/class/block", name))
	if err != nil {
		return "", "", fmt.Errorf("disk: look at %s: %w", name, err)
	}
	b, err := read(at("sys/class/block", name, "uevent"))
	if err != nil {
		return "", "", err
	}
	n := 0
	for _, line := range strings.Split(b, "\n") {
		if v, ok := strings.CutPrefix(line, "PARTNAME="); ok {
			label = v
		}
		if v, ok := strings.CutPrefix(line, "PARTN="); ok {
			n, _ = strconv.Atoi(v)
		}
	}
	if n == 0 {
		return "", "", fmt.Errorf("%w: %s is no partition", ErrNoSlot, name)
	}
	return label, filepath.Base(filepath.Dir(link)), nil
}

// rootDevice finds the device of "/" in mountinfo (proc(5)): the last mount of
// it counts.
func rootDevice(mounts string) (dev string) {
	for _, line := range strings.Split(mounts, "\n") {
		f := strings.Fields(line)
		if len(f) > 4 && f[4] == "/" {
			dev = f[2]
		}
	}
	if strings.Trim(dev, "0123456789:") != "" {
		return ""
	}
	return dev
}

func read(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("disk: %w", err)
	}
	defer f.Close()
	b := make([]byte, maxSysfs)
	n := 0
	for n < len(b) {
		m, err := f.Read(b[n:])
		n += m
		if m == 0 || err != nil {
			break
		}
	}
	return string(b[:n]), nil
}

func names(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	defer f.Close()
	out, err := f.Readdirnames(maxHolders)
	if err != nil {
		return nil, nil // empty, or gone meanwhile
	}
	return out, nil
}
