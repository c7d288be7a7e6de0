package fleet

import (
	"encoding/hex"
	"fmt"
)

// HexBytes are bytes that people see as lower-case hex.
type HexBytes []byte

// String returns lower-case hex.
func (b HexBytes) String() string { return hex.EncodeToString(b) }

// MarshalText implements encoding.TextMarshaler.
func (b HexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(b)), nil }

// UnmarshalText implements encoding.TextUnmarshaler. Empty text gives nil, so
// that "none" stays the same on every way.
func (b *HexBytes) UnmarshalText(t []byte) error {
	d, err := hex.DecodeString(string(t))
	if err != nil {
		return fmt.Errorf("fleet: read hex: %w", err)
	}
	if len(d) == 0 {
		d = nil
	}
	*b = d
	return nil
}

// Hardware is a machine's description of itself. Every string in it is a
// claim by an unproven machine: shown and searchable, never a key, and
// cleaned by fleet/text before it is stored.
type Hardware struct {
	Vendor      string `json:"vendor,omitempty"`
	Product     string `json:"product,omitempty"`
	Serial      string `json:"serial,omitempty"`
	UUID        string `json:"uuid,omitempty"`
	BoardVendor string `json:"board_vendor,omitempty"`
	Board       string `json:"board,omitempty"`
	BoardSerial string `json:"board_serial,omitempty"`
	BIOSVendor  string `json:"bios_vendor,omitempty"`
	BIOSVersion string `json:"bios_version,omitempty"`
	BIOSDate    string `json:"bios_date,omitempty"`
	CPU         string `json:"cpu,omitempty"`
	// CPUs is the number of logical processors, MemoryBytes the usable RAM.
	CPUs        int    `json:"cpus,omitempty"`
	MemoryBytes int64  `json:"memory_bytes,omitempty"`
	TPMVendor   string `json:"tpm_vendor,omitempty"`
	TPMModel    string `json:"tpm_model,omitempty"`
	TPMFirmware string `json:"tpm_firmware,omitempty"`
	NICs        []NIC  `json:"nics,omitempty"`
	Disks       []Disk `json:"disks,omitempty"`
	// Devices lists notable PCI and USB devices (GPU, camera, ...).
	Devices []Device `json:"devices,omitempty"`
	// BootPath says how the image got here: "pxe", "http", "disk" or "".
	BootPath   string `json:"boot_path,omitempty"`
	SecureBoot bool   `json:"secure_boot,omitempty"`
	// Image and Version are what the running image calls itself.
	Image   string `json:"image,omitempty"`
	Version string `json:"version,omitempty"`
}

// NIC is one network interface.
type NIC struct {
	Name   string `json:"name"`
	MAC    string `json:"mac"`
	Driver string `json:"driver,omitempty"`
	// Link is true with carrier; SpeedMbit is 0 when unknown.
	Link      bool     `json:"link,omitempty"`
	SpeedMbit int      `json:"speed_mbit,omitempty"`
	Addresses []string `json:"addresses,omitempty"`
}

// Disk is one block device that could hold an installation.
type Disk struct {
	Path      string `json:"path"`
	Model     string `json:"model,omitempty"`
	Serial    string `json:"serial,omitempty"`
	WWN       string `json:"wwn,omitempty"`
	SizeBytes int64  `json:"size_bytes,omitempty"`
	Transport string `json:"transport,omitempty"`
	Removable bool   `json:"removable,omitempty"`
	// Rotational tells spinning disks from flash.
	Rotational bool `json:"rotational,omitempty"`
	// Partitioned is true when a partition table was found.
	Partitioned bool `json:"partitioned,omitempty"`
}

// Device is one PCI or USB device.
type Device struct {
	Bus    string `json:"bus"`
	Vendor string `json:"vendor"`
	Device string `json:"device"`
	Class  string `json:"class,omitempty"`
	Driver string `json:"driver,omitempty"`
}
