package machine

import (
	"fmt"
	"path/filepath"
	"slices"
)

// files are the paths inside a machine's directory.
type files struct{ dir string }

func (f files) vars() string   { return filepath.Join(f.dir, "firmware-variables.fd") }
func (f files) qmp() string    { return filepath.Join(f.dir, "qmp.sock") }
func (f files) serial() string { return filepath.Join(f.dir, "serial.log") }
func (f files) qemu() string   { return filepath.Join(f.dir, "qemu.log") }
func (f files) tpm() string    { return filepath.Join(f.dir, "tpm") }

// pcap is the capture of the n-th power-on (from 1): QEMU begins each anew.
func (f files) pcap(n int) string {
	if n <= 1 {
		return filepath.Join(f.dir, "net0.pcap")
	}
	return filepath.Join(f.dir, fmt.Sprintf("net0-%d.pcap", n))
}

// CablePaths are the two ends of the cable of a machine with this directory
// whose Config names a VLAN: unix datagram sockets, one frame in a datagram.
// QEMU makes the first, whoever plays the switch the second.
func CablePaths(dir string) (card, port string) {
	return filepath.Join(dir, "card.sock"), filepath.Join(dir, "port.sock")
}

func (c Config) netdev() string {
	if c.VLAN == 0 {
		return "tap,id=net0,ifname=" + c.Tap + ",script=no,downscript=no,vnet_hdr=off"
	}
	card, port := CablePaths(c.Dir)
	return "dgram,id=net0,local.type=unix,local.path=" + card + ",remote.type=unix,remote.path=" + port
}

// stickID is QEMU's name of a disk that can be pulled out.
func stickID(disk int) string { return fmt.Sprintf("stick%d", disk) }

// args is QEMU's command line at the n-th power-on. c has its defaults. tpm is
// the control socket of the software TPM, "" for none.
func (c Config) args(fw firmware, tpm string, n int) []string {
	f := files{c.Dir}
	machine := "q35,accel=" + c.Accel
	if fw.smm {
		machine += ",smm=on"
	}
	cpu := "max"
	if c.Accel == AccelKVM {
		// Nested hosts offer this feature and then refuse its register.
		cpu = "host,-arch-capabilities"
	}
	a := []string{
		"-name", "muster-lab-" + c.Name,
		"-machine", machine,
		"-cpu", cpu,
		"-m", fmt.Sprint(c.MemoryMB),
		"-smp", fmt.Sprint(c.CPUs),
		"-nodefaults", "-no-user-config", "-display", "none",
		// The console comes as our child's output: no byte can be lost between
		// power-on and somebody's connecting to a socket.
		"-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
		"-chardev", "socket,id=qmp,path=" + f.qmp() + ",server=on,wait=off",
		"-mon", "chardev=qmp,mode=control",
	}
	if c.Clock.IsZero() {
		a = append(a, "-rtc", "base=utc")
	} else {
		a = append(a, "-rtc", "base="+c.Clock.UTC().Format("2006-01-02T15:04:05"))
	}
	if fw.smm {
		// Only code in system management mode may write the variables, as
		// Secure Boot needs (OvmfPkg/README, "SMM support").
		a = append(a, "-global", "driver=cfi.pflash01,property=secure,value=on")
	}
	a = append(a,
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+fw.code,
		"-drive", "if=pflash,unit=1,format=raw,file="+f.vars(),
	)
	a = append(a, c.smbiosArgs()...)
	if tpm != "" {
		a = append(a,
			"-chardev", "socket,id=tpm,path="+tpm,
			"-tpmdev", "emulator,id=tpm0,chardev=tpm",
			"-device", "tpm-crb,tpmdev=tpm0",
		)
	}
	if c.Tap != "" {
		// An empty romfile leaves QEMU's iPXE out, so that the firmware's own
		// network stack boots, as on a real PC.
		card := c.NIC + ",netdev=net0,mac=" + c.MAC + ",romfile="
		switch {
		case c.Boot == BootDisk, c.FirmwareOrder:
		case c.DiskFirst:
			card += ",bootindex=2"
		default:
			card += ",bootindex=1"
		}
		a = append(a,
			// vnet_hdr=off: QEMU 7.2 would write its own header before each frame
			// of the capture, and no other program could read it.
			"-netdev", c.netdev(),
			"-device", card,
			"-object", "filter-dump,id=dump0,netdev=net0,file="+f.pcap(n),
		)
	}
	if c.Tap != "" && c.Boot != BootDisk {
		// The firmware would try IPv6 for over a minute after IPv4 failed, and
		// nobody here answers it (OvmfPkg/RUNTIME_CONFIG.md).
		a = append(a, "-fw_cfg", "name=opt/org.tianocore/IPv6PXESupport,string=no")
	}
	if c.Boot == BootHTTPS {
		// OvmfPkg/README, "HTTPS Boot".
		a = append(a, "-fw_cfg", "name=etc/edk2/https/cacerts,file="+c.HTTPSRoots)
	}
	if c.Boot == BootHTTP || c.Boot == BootHTTPS {
		// bootindex picks the card, not the protocol; without PXE, HTTP is
		// the first that is left.
		a = append(a, "-fw_cfg", "name=opt/org.tianocore/IPv4PXESupport,string=no")
	}
	if slices.ContainsFunc(c.Disks, func(d Disk) bool { return d.Bus == BusUSB }) {
		a = append(a, "-device", "qemu-xhci,id=usb")
	}
	for i, d := range c.Disks {
		id := fmt.Sprintf("disk%d", i)
		// A snapshot of the folder: the machine may write, the host's files
		// stay as they are.
		drive := "if=none,id=" + id + ",format=raw,snapshot=on,file=fat:" + d.Folder
		if d.File != "" {
			// A machine's power cut is QEMU's death, and the host keeps what was
			// written: flushing to the host's disk would only make a busy host's
			// disk look like a bad one to etcd.
			drive = "if=none,id=" + id + ",format=raw,cache=unsafe,file=" + d.File
		}
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		device := "virtio-blk-pci"
		switch d.Bus {
		case BusNVMe:
			device = "nvme"
		case BusUSB:
			device = "usb-storage,bus=usb.0,removable=on,id=" + stickID(i)
		}
		device += ",drive=" + id
		serial := d.Serial
		if serial == "" && d.Bus == BusNVMe {
			serial = id // the nvme device refuses to start without one
		}
		if serial != "" {
			device += ",serial=" + serial
		}
		switch {
		case c.FirmwareOrder:
		case d.Boot && (c.Boot == BootDisk || c.DiskFirst):
			device += ",bootindex=1"
		case d.Boot:
			device += ",bootindex=2"
		}
		a = append(a, "-drive", drive, "-device", device)
	}
	return a
}
