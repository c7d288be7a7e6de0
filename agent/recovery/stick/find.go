package stick

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/firmware"
)

// maxDisks are looked at; a machine with more is no machine in a warehouse.
const maxDisks = 256

// Errors that a person can do something about.
var (
	// ErrNotFromStick: the firmware names no partition.
	ErrNotFromStick = errors.New("this image was not started from a stick, so there is none to write to: write it to a stick (`dd`), and start the machine from that")
	// ErrGone: no disk has the partition.
	ErrGone = errors.New("the stick this machine was started from is not there: put it back")
	// ErrProtected: the medium cannot be written.
	ErrProtected = errors.New("the stick is write-protected: take it out, move its switch (or use another stick), and put it back")
	// ErrForeign: the partition is no medium of ours.
	ErrForeign = errors.New("this machine was started from a disk that is no stick of muster's: nothing is written to it")
)

// medium is the partition that the machine was started from.
type medium struct {
	disk, device string // names below /sys/class/block and /dev: sdb, sdb1
	guid         firmware.GUID
	protected    bool
	// what people read on its label, and what the kernel says of it
	model string
}

// finder looks at the machine's disks; tests give it made-up ones.
type finder struct {
	sys fs.FS // the root, of which /sys/class/block is read
	// open opens a whole disk for reading.
	open func(name string) (io.ReaderAt, io.Closer, error)
}

// find returns the one partition that is called id.
func (f finder) find(id string) (medium, error) {
	if id == "" {
		return medium{}, ErrNotFromStick
	}
	names, err := fs.ReadDir(f.sys, "sys/class/block")
	if err != nil {
		return medium{}, fmt.Errorf("stick: list disks: %w", err)
	}
	var found []medium
	disks := 0
	for _, n := range names {
		name := n.Name()
		if !f.isDisk(name) {
			continue
		}
		if disks++; disks > maxDisks {
			return medium{}, fmt.Errorf("stick: more than %d disks", maxDisks)
		}
		parts, err := f.table(name)
		if err != nil {
			continue // unreadable, empty or another kind of table: it is not ours
		}
		for _, p := range parts {
			if !strings.EqualFold(p.guid.String(), id) {
				continue
			}
			device, err := f.device(name, p)
			if err != nil {
				return medium{}, err
			}
			found = append(found, medium{
				disk: name, device: device, guid: p.guid, model: f.model(name),
				protected: f.text(name, "ro") != "0" || f.text(device, "ro") != "0",
			})
		}
	}
	switch len(found) {
	case 0:
		return medium{}, ErrGone
	case 1:
		return found[0], nil
	}
	return medium{}, fmt.Errorf("%d disks are copies of the stick, %s (%s) and %s (%s) among them, and which one the machine was started from cannot be told: nothing is written; leave one in",
		len(found), found[0].disk, found[0].model, found[1].disk, found[1].model)
}

// isDisk tells whole disks from partitions, from empty drives and from what is
// no hardware.
func (f finder) isDisk(name string) bool {
	for _, virtual := range []string{"loop", "ram", "zram", "dm-", "md", "nbd", "sr", "fd"} {
		if strings.HasPrefix(name, virtual) {
			return false
		}
	}
	if _, err := fs.Stat(f.sys, path.Join("sys/class/block", name, "partition")); err == nil {
		return false
	}
	size, err := strconv.ParseUint(f.text(name, "size"), 10, 64)
	return err == nil && size > 0
}

func (f finder) table(disk string) ([]partition, error) {
	sector, err := strconv.Atoi(f.text(disk, "queue/logical_block_size"))
	if err != nil {
		return nil, fmt.Errorf("stick: sector size of %s: %w", disk, err)
	}
	r, c, err := f.open(disk)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return readGPT(r, sector)
}

// device is the kernel's name of a partition, which must agree with the table
// about where it is (the kernel counts in sectors of 512 bytes).
func (f finder) device(disk string, p partition) (string, error) {
	sector, err := strconv.ParseUint(f.text(disk, "queue/logical_block_size"), 10, 32)
	if err != nil {
		return "", fmt.Errorf("stick: sector size of %s: %w", disk, err)
	}
	name := fmt.Sprintf("%s%d", disk, p.number)
	if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
		name = fmt.Sprintf("%sp%d", disk, p.number)
	}
	want := [3]string{strconv.Itoa(p.number), strconv.FormatUint(p.start*(sector/512), 10), strconv.FormatUint(p.sectors*(sector/512), 10)}
	got := [3]string{f.text(name, "partition"), f.text(name, "start"), f.text(name, "size")}
	if got != want {
		return "", fmt.Errorf("stick: the kernel and the partition table of %s do not agree about %s: nothing is written", disk, name)
	}
	return name, nil
}

func (f finder) model(disk string) string {
	m := strings.TrimSpace(f.text(disk, "device/vendor") + " " + f.text(disk, "device/model"))
	if m == "" {
		return "a disk without a name"
	}
	return m
}

// present tells whether a disk is still there.
func (f finder) present(disk string) bool {
	_, err := fs.Stat(f.sys, path.Join("sys/class/block", disk))
	return err == nil
}

// text is one short attribute of a block device, "" if it cannot be read.
func (f finder) text(name, attribute string) string {
	file, err := f.sys.Open(path.Join("sys/class/block", name, attribute))
	if err != nil {
		return ""
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, 256))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
