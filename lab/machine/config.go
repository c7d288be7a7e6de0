package machine

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Boot is the way by which the firmware gets its program.
type Boot uint8

const (
	// BootTFTP: PXE, the file comes by TFTP.
	BootTFTP Boot = iota
	// BootHTTP: UEFI HTTP boot. OVMF's TCP is slow under emulation.
	BootHTTP
	// BootDisk: the first disk marked Boot.
	BootDisk
	// BootHTTPS: the same by TLS, with the CA of Config.HTTPSRoots enrolled.
	BootHTTPS
)

var bootNames = [...]string{"tftp", "http", "disk", "https"}

// String returns the word of the --boot flag.
func (b Boot) String() string {
	if int(b) < len(bootNames) {
		return bootNames[b]
	}
	return fmt.Sprintf("boot(%d)", b)
}

// MarshalText implements encoding.TextMarshaler.
func (b Boot) MarshalText() ([]byte, error) {
	if int(b) >= len(bootNames) {
		return nil, fmt.Errorf("machine: marshal boot: no such value %d", b)
	}
	return []byte(bootNames[b]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Boot) UnmarshalText(text []byte) error {
	for i, n := range bootNames {
		if n == string(text) {
			*b = Boot(i)
			return nil
		}
	}
	return fmt.Errorf("machine: read boot: %q is none of %v", text, bootNames)
}

// The network cards and disk buses that can be asked for.
const (
	NICVirtio = "virtio-net-pci"
	NICE1000E = "e1000e"

	BusVirtio = "virtio"
	BusNVMe   = "nvme"
	// BusUSB is a stick: it can be pulled out (Machine.PullOut).
	BusUSB = "usb"
)

// The accelerators: hardware virtualization and emulation.
const (
	AccelTCG = "tcg"
	AccelKVM = "kvm"
)

// Config describes one machine. The zero value of every optional field is a
// small PC of today: 1 GiB, one processor, virtio card, TPM 2.0, Secure Boot
// off, network boot by TFTP.
type Config struct {
	// Name is the machine's name in logs and events, e.g. "node1".
	Name string
	// Dir holds everything of the machine: firmware variables, TPM state,
	// logs, packet capture, sockets. Made if missing. State found there is
	// used again: that is the same machine after a power cut.
	Dir string

	// SecureBoot uses firmware with Secure Boot on and the snakeoil keys of
	// Debian's ovmf package enrolled as PK, KEK and db.
	SecureBoot bool
	// MemoryMB is 1024 if 0.
	MemoryMB int
	// CPUs is 1 if 0.
	CPUs int
	// Accel is AccelTCG (default) or AccelKVM.
	Accel string

	// NIC is NICVirtio (default) or NICE1000E. OVMF has no driver for the
	// latter, so it goes with BootDisk only.
	NIC string
	// MAC is the card's address, e.g. 52:54:00:00:00:01.
	MAC string
	// Tap is an existing tap interface; "" is a machine without network card.
	Tap string

	// VLAN: the card's cable leads to a port that carries this VLAN, tagged,
	// and Tap is that port's other side. The port is found by CablePaths.
	VLAN int

	// Boot is the way by which the firmware gets its program.
	Boot Boot
	// DiskFirst makes the firmware of a machine that boots from the network
	// try the disks marked Boot before.
	DiskFirst bool
	// FirmwareOrder leaves the order to the firmware's own variables, as on a
	// real PC; otherwise QEMU tells the firmware the order at each power-on.
	FirmwareOrder bool
	// HTTPSRoots is a file with the CA certificates that BootHTTPS trusts, as
	// the firmware keeps them: EFI_SIGNATURE_LIST. It must be there at power-on.
	HTTPSRoots string
	// Disks in the order in which the machine sees them.
	Disks []Disk

	// NoTPM leaves the TPM out.
	NoTPM bool
	// TPMAuthority is the directory of the EK authority that signs the EK
	// certificate; machines that share it have TPMs of one "vendor".
	TPMAuthority string
	// TPMWithoutCertificate leaves the EK without certificate.
	TPMWithoutCertificate bool

	// UUID and Serial are what the firmware tells (SMBIOS type 1).
	UUID, Serial string
	// SMBIOS is what else it tells; its Serial goes before the one above.
	SMBIOS SMBIOS
	// Clock is the real-time clock at power-on; zero is the host's time.
	Clock time.Time

	// OnLine is called for each line of the serial console, from one
	// goroutine. It must not block for long.
	OnLine func(Line)
	// OnEvent is called for each QMP event ("RESET", "SHUTDOWN", ...).
	OnEvent func(Event)
}

// Disk is one disk of a machine.
type Disk struct {
	// File is a raw image. Or:
	File string
	// Folder is shown to the machine as a small FAT disk. What the machine
	// writes there is thrown away.
	Folder string
	// Bus is BusVirtio (default), BusNVMe or BusUSB.
	Bus string
	// ReadOnly is a disk whose switch says so: the machine sees that, and
	// cannot write.
	ReadOnly bool
	// Serial is the disk's serial number.
	Serial string
	// Boot marks the disk that BootDisk starts from.
	Boot bool
}

var (
	nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)
	uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	wordForm = regexp.MustCompile(`^[A-Za-z0-9._-]{0,64}$`)
	tapForm  = regexp.MustCompile(`^[a-z0-9-]{1,15}$`)
)

// MaxDir is the longest directory for a machine: the TPM's control socket
// lies below it, and a unix socket's path has at most 107 bytes (unix(7)).
const MaxDir = 107 - len("/tpm/tpm.ctrl")

func (c Config) defaults() Config {
	if c.MemoryMB == 0 {
		c.MemoryMB = 1024
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Accel == "" {
		c.Accel = AccelTCG
	}
	if c.NIC == "" {
		c.NIC = NICVirtio
	}
	return c
}

// validate returns all problems, joined. It runs after defaults.
func (c Config) validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("machine: configure: "+format, a...)) }
	if !nameForm.MatchString(c.Name) {
		bad("name %q: want small letters, digits and dashes", c.Name)
	}
	switch {
	case !filepath.IsAbs(c.Dir):
		bad("directory %q: want an absolute path", c.Dir)
	case len(c.Dir) > MaxDir:
		bad("directory %s has %d characters: sockets lie below it, so at most %d", c.Dir, len(c.Dir), MaxDir)
	case strings.ContainsAny(c.Dir, ",:\n"):
		bad("directory %q: QEMU reads commas and colons in it as options", c.Dir)
	}
	if c.MemoryMB < 256 || c.MemoryMB > 1<<20 {
		bad("memory of %d MB: want 256 to 1048576", c.MemoryMB)
	}
	if c.CPUs < 1 || c.CPUs > 64 {
		bad("%d processors: want 1 to 64", c.CPUs)
	}
	if c.Accel != AccelTCG && c.Accel != AccelKVM {
		bad("accelerator %q: want %s or %s", c.Accel, AccelTCG, AccelKVM)
	}
	if c.NIC != NICVirtio && c.NIC != NICE1000E {
		bad("network card %q: want %s or %s", c.NIC, NICVirtio, NICE1000E)
	}
	if c.Tap != "" {
		if !tapForm.MatchString(c.Tap) {
			bad("tap %q: no interface name", c.Tap)
		}
		if hw, err := net.ParseMAC(c.MAC); err != nil || len(hw) != 6 || hw[0]&1 != 0 {
			bad("MAC %q: want a unicast address of six bytes", c.MAC)
		}
	}
	if (c.Boot == BootHTTPS) != (c.HTTPSRoots != "") || strings.ContainsAny(c.HTTPSRoots, ",\n") {
		bad("boot by https and a file of CA certificates (%q) go together; QEMU reads commas in its name as options", c.HTTPSRoots)
	}
	if c.Boot != BootDisk {
		if c.Tap == "" {
			bad("boot by %s without network card", c.Boot)
		}
		if c.NIC == NICE1000E {
			bad("boot by %s with an %s: the firmware has no driver for it; use boot by disk", c.Boot, NICE1000E)
		}
	}
	bootable := 0
	for i, d := range c.Disks {
		if (d.File == "") == (d.Folder == "") {
			bad("disk %d: want a file or a folder", i)
		}
		if strings.ContainsAny(d.File+d.Folder, ",\n") || strings.Contains(d.Folder, ":") {
			bad("disk %d: QEMU reads commas and colons in %q as options", i, d.File+d.Folder)
		}
		if d.Bus != "" && d.Bus != BusVirtio && d.Bus != BusNVMe && d.Bus != BusUSB {
			bad("disk %d: bus %q: want %s, %s or %s", i, d.Bus, BusVirtio, BusNVMe, BusUSB)
		}
		if d.ReadOnly && d.File == "" {
			bad("disk %d: a folder is a copy: it has no switch", i)
		}
		if !wordForm.MatchString(d.Serial) {
			bad("disk %d: serial %q: want letters, digits, dots, dashes", i, d.Serial)
		}
		if d.Boot {
			bootable++
		}
	}
	if (c.Boot == BootDisk || c.DiskFirst) && bootable == 0 && !c.FirmwareOrder {
		bad("boot by disk without a disk marked as bootable")
	}
	if c.UUID != "" && !uuidForm.MatchString(c.UUID) {
		bad("UUID %q: want 8-4-4-4-12 hex digits", c.UUID)
	}
	if !wordForm.MatchString(c.Serial) {
		bad("serial %q: want letters, digits, dots, dashes", c.Serial)
	}
	for _, p := range c.SMBIOS.problems() {
		bad("%s", p)
	}
	return errors.Join(errs...)
}
