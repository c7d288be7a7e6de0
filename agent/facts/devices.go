package facts

import (
	"path"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// nics lists interfaces that have hardware behind them. Addresses are added
// by who knows them: sysfs does not.
func (t tree) nics() []fleet.NIC {
	var out []fleet.NIC
	for _, name := range t.names("sys/class/net") {
		dir := path.Join("sys/class/net", name)
		// ARPHRD_ETHER is 1 (linux/if_arp.h).
		if !t.exists(dir, "device") || t.text(dir, "type") != "1" {
			continue
		}
		n := fleet.NIC{
			Name:   clean([]byte(name)),
			MAC:    strings.ToLower(t.text(dir, "address")),
			Driver: t.driver(path.Join(dir, "device")),
			Link:   t.text(dir, "carrier") == "1",
		}
		if s, err := strconv.Atoi(t.text(dir, "speed")); err == nil && s > 0 && s < 10_000_000 {
			n.SpeedMbit = s
		}
		if out = append(out, n); len(out) == maxNICs {
			break
		}
	}
	return out
}

// disks lists block devices that could hold an installation. Optical drives,
// RAM disks, loops and device-mapper nodes are left out.
func (t tree) disks() []fleet.Disk {
	var out []fleet.Disk
	for _, name := range t.names("sys/block") {
		dir := path.Join("sys/block", name)
		if !t.exists(dir, "device") || strings.HasPrefix(name, "sr") || strings.HasPrefix(name, "fd") ||
			strings.HasPrefix(name, "mtd") || strings.Contains(name, "boot") { // mmcblk0boot0: tiny boot areas of eMMC
			continue
		}
		sectors, err := strconv.ParseInt(t.text(dir, "size"), 10, 64)
		if err != nil || sectors <= 0 || sectors > 1<<50 {
			continue
		}
		d := fleet.Disk{
			Path:  "/dev/" + clean([]byte(strings.ReplaceAll(name, "!", "/"))),
			Model: t.firstOf(path.Join(dir, "device/model"), path.Join(dir, "device/name")),
			// virtio puts the serial beside the queue, NVMe and MMC on the
			// device, SCSI only in a VPD page.
			Serial: t.firstOf(path.Join(dir, "device/serial"), path.Join(dir, "serial")),
			WWN:    t.firstOf(path.Join(dir, "wwid"), path.Join(dir, "device/wwid")),
			// The unit is 512 bytes whatever the logical sector (linux/types.h).
			SizeBytes:  sectors * 512,
			Transport:  t.transport(name, dir),
			Removable:  t.text(dir, "removable") == "1",
			Rotational: t.text(dir, "queue/rotational") == "1",
		}
		if d.Serial == "" {
			d.Serial = vpdSerial(t.file(path.Join(dir, "device/vpd_pg80"), 512))
		}
		for _, sub := range t.names(dir) {
			if strings.HasPrefix(sub, name) && t.exists(dir, sub, "partition") {
				d.Partitioned = true
			}
		}
		if out = append(out, d); len(out) == maxDisks {
			break
		}
	}
	return out
}

func (t tree) firstOf(files ...string) string {
	for _, f := range files {
		if s := t.text(f); s != "" {
			return s
		}
	}
	return ""
}

// transport guesses from the name and from the driver of the device.
func (t tree) transport(name, dir string) string {
	switch {
	case strings.HasPrefix(name, "nvme"):
		return "nvme"
	case strings.HasPrefix(name, "mmcblk"):
		return "mmc"
	case strings.HasPrefix(name, "vd"):
		return "virtio"
	case t.exists(dir, "device/ata_device"), strings.HasPrefix(t.text(dir, "device/vendor"), "ATA"):
		return "sata"
	case t.text(dir, "removable") == "1":
		return "usb"
	case strings.HasPrefix(name, "sd"):
		return "scsi"
	}
	return ""
}

// vpdSerial reads the unit serial number page (SPC-4 section 7.8.18): four
// bytes of header, the last two the length, then ASCII.
func vpdSerial(b []byte) string {
	if len(b) < 4 || b[1] != 0x80 {
		return ""
	}
	n := int(b[2])<<8 | int(b[3])
	return clean(b[4:min(len(b), 4+n)])
}

// devices lists PCI and USB devices that a site's scheduler may want to know
// of: display controllers and accelerators, cameras and other video devices.
func (t tree) devices() []fleet.Device {
	var out []fleet.Device
	for _, addr := range t.names("sys/bus/pci/devices") {
		dir := path.Join("sys/bus/pci/devices", addr)
		class := pciClass(t.text(dir, "class"))
		if class == "" {
			continue
		}
		out = append(out, fleet.Device{
			Bus: "pci", Class: class, Driver: t.driver(dir),
			Vendor: strings.TrimPrefix(t.text(dir, "vendor"), "0x"),
			Device: strings.TrimPrefix(t.text(dir, "device"), "0x"),
		})
		if len(out) == maxDevices {
			return out
		}
	}
	for _, addr := range t.names("sys/bus/usb/devices") {
		// "1-2" is a device, "1-2:1.0" one of its interfaces. The class is the
		// interface's (USB Video Class is 0x0e), the IDs are the device's.
		parent, _, isInterface := strings.Cut(addr, ":")
		dir := path.Join("sys/bus/usb/devices", addr)
		if !isInterface || t.text(dir, "bInterfaceClass") != "0e" || t.text(dir, "bInterfaceSubClass") != "01" {
			continue
		}
		dev := path.Join("sys/bus/usb/devices", parent)
		out = append(out, fleet.Device{
			Bus: "usb", Class: "camera", Driver: t.driver(dir),
			Vendor: t.text(dev, "idVendor"), Device: t.text(dev, "idProduct"),
		})
		if len(out) == maxDevices {
			return out
		}
	}
	return out
}

// pciClass names the PCI classes that are listed ("" for all others): base
// class 03 is display, 0480 multimedia other, 0400 video, 12 accelerators
// (PCI Code and ID Assignment Specification, section 1).
func pciClass(s string) string {
	s = strings.TrimPrefix(strings.ToLower(s), "0x")
	if len(s) != 6 {
		return ""
	}
	switch {
	case s[:2] == "03":
		return "gpu"
	case s[:2] == "12":
		return "accelerator"
	case s[:4] == "0400", s[:4] == "0480":
		return "video"
	}
	return ""
}
