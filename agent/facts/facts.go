// Package facts describes this machine as a fleet.Hardware by reading /sys
// and /proc. All it says is a claim: shown and searchable, never a key.
//
// It reads through an fs.FS, so it cannot write, and it opens nothing below
// /dev: what it says of disks comes from sysfs. Every list and every string
// is capped, since DMI tables and USB descriptors hold whatever their makers,
// or an attacker with a programmable device, put there.
package facts

import (
	"io"
	"io/fs"
	"path"
	"sort"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// Caps. They equal what the centre keeps, so nothing is sent in vain.
const (
	maxString  = 128
	maxNICs    = 32
	maxDisks   = 64
	maxDevices = 128
	maxEntries = 4096 // directory entries looked at
	maxFile    = 64 << 10
	// MaxEventLog is the most of the TCG event log that is read, in bytes.
	MaxEventLog = 1 << 20
)

// Read describes the machine whose root file system is root; os.DirFS("/")
// for the real one. What cannot be read is left empty: a machine with a
// broken DMI table is still a machine.
func Read(root fs.FS) fleet.Hardware {
	t := tree{root}
	h := fleet.Hardware{
		Vendor:      t.dmi("sys_vendor"),
		Product:     t.dmi("product_name"),
		Serial:      t.dmi("product_serial"),
		UUID:        strings.ToLower(t.dmi("product_uuid")),
		BoardVendor: t.dmi("board_vendor"),
		Board:       t.dmi("board_name"),
		BoardSerial: t.dmi("board_serial"),
		BIOSVendor:  t.dmi("bios_vendor"),
		BIOSVersion: t.dmi("bios_version"),
		BIOSDate:    t.dmi("bios_date"),
	}
	h.CPU, h.CPUs = cpuInfo(t.file("proc/cpuinfo", 4<<20))
	h.MemoryBytes = memTotal(t.file("proc/meminfo", maxFile))
	h.NICs = t.nics()
	h.Disks = t.disks()
	h.Devices = t.devices()
	h.BootPath = t.bootPath()
	h.SecureBoot = t.secureBoot()
	return h
}

// EventLog returns the firmware's TCG event log as the kernel shows it, or
// an error; the log is absent without securityfs, a TPM, or UEFI support.
// A log longer than MaxEventLog is cut, and will then fail to replay.
func EventLog(root fs.FS) ([]byte, error) {
	f, err := root.Open("sys/kernel/security/tpm0/binary_bios_measurements")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxEventLog))
}

// tree reads small files.
type tree struct{ fs fs.FS }

// file returns at most limit bytes of name, nil if it cannot be read.
func (t tree) file(name string, limit int64) []byte {
	f, err := t.fs.Open(name)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil
	}
	return b
}

// text returns one cleaned line.
func (t tree) text(elem ...string) string { return clean(t.file(path.Join(elem...), 4096)) }

func (t tree) dmi(name string) string {
	switch s := t.text("sys/class/dmi/id", name); strings.ToLower(s) {
	case "to be filled by o.e.m.", "default string", "not specified", "none", "o.e.m.", "system serial number", "0123456789":
		return "" // what boards say when nobody programmed them
	default:
		return s
	}
}

// exists tells whether name can be stat'ed.
func (t tree) exists(elem ...string) bool {
	_, err := fs.Stat(t.fs, path.Join(elem...))
	return err == nil
}

// names lists a directory, sorted and capped.
func (t tree) names(dir string) []string {
	d, err := fs.ReadDir(t.fs, dir)
	if err != nil && len(d) == 0 {
		return nil
	}
	var out []string
	for _, e := range d[:min(len(d), maxEntries)] {
		out = append(out, e.Name())
	}
	sort.Strings(out)
	return out
}

// driver reads DRIVER= from a device's uevent file: the driver link itself
// would need readlink, which not every fs.FS has.
func (t tree) driver(dev string) string {
	for line := range strings.Lines(string(t.file(path.Join(dev, "uevent"), 4096))) {
		if d, ok := strings.CutPrefix(line, "DRIVER="); ok {
			return clean([]byte(d))
		}
	}
	return ""
}

// clean keeps printable ASCII and blanks of the first line and caps it.
func clean(b []byte) string {
	var out strings.Builder
	for _, r := range strings.TrimSpace(string(b)) {
		if r == '\n' || r == 0 || out.Len() >= maxString {
			break
		}
		switch {
		case r >= ' ' && r <= '~':
			out.WriteByte(byte(r))
		case r == '\t':
			out.WriteByte(' ')
		default:
			out.WriteByte('?')
		}
	}
	return strings.TrimSpace(out.String())
}
