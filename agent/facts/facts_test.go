package facts

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/fleet"
)

// machine is a small PC as /sys and /proc show it.
func machine() fstest.MapFS {
	m := fstest.MapFS{}
	put := func(name, data string) { m[name] = &fstest.MapFile{Data: []byte(data)} }
	put("sys/class/dmi/id/sys_vendor", "Example Ltd\n")
	put("sys/class/dmi/id/product_name", "Box 7\n")
	put("sys/class/dmi/id/product_serial", "To Be Filled By O.E.M.\n")
	put("sys/class/dmi/id/product_uuid", "4C4C4544-0042-3510-8052-B4C04F573832\n")
	put("sys/class/dmi/id/board_name", "B\x1b[31m\n")
	put("proc/cpuinfo", "processor\t: 0\nmodel name\t: Some   CPU @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: Some   CPU @ 2 GHz\n")
	put("proc/meminfo", "MemTotal:        1024 kB\nMemFree: 1 kB\n")
	nic := "sys/class/net/eth0/"
	put(nic+"type", "1\n")
	put(nic+"address", "52:54:00:AA:BB:CC\n")
	put(nic+"carrier", "1\n")
	put(nic+"speed", "1000\n")
	put(nic+"device/uevent", "DRIVER=e1000e\nPCI_CLASS=20000\n")
	put("sys/class/net/lo/type", "772\n")
	put("sys/class/net/br0/type", "1\n") // no device behind it
	disk := "sys/block/nvme0n1/"
	put(disk+"size", "2048\n")
	put(disk+"removable", "0\n")
	put(disk+"queue/rotational", "0\n")
	put(disk+"wwid", "eui.0025388b01234567\n")
	put(disk+"device/model", "Fast Disk              \n")
	put(disk+"device/serial", "S1\n")
	put(disk+"nvme0n1p1/partition", "1\n")
	put("sys/block/sda/size", "100\n")
	put("sys/block/sda/device/vpd_pg80", "\x00\x80\x00\x04WD-1tail")
	put("sys/block/sda/device/vendor", "ATA     \n")
	put("sys/block/sda/queue/rotational", "1\n")
	put("sys/block/sr0/size", "100\n")
	put("sys/block/sr0/device/model", "DVD\n")
	put("sys/block/loop0/size", "100\n") // no device behind it
	gpu := "sys/bus/pci/devices/0000:01:00.0/"
	put(gpu+"class", "0x030000\n")
	put(gpu+"vendor", "0x10de\n")
	put(gpu+"device", "0x1cb3\n")
	put("sys/bus/pci/devices/0000:00:1f.0/class", "0x060100\n")
	put("sys/bus/usb/devices/1-2/idVendor", "046d\n")
	put("sys/bus/usb/devices/1-2/idProduct", "0825\n")
	put("sys/bus/usb/devices/1-2:1.0/bInterfaceClass", "0e\n")
	put("sys/bus/usb/devices/1-2:1.0/bInterfaceSubClass", "01\n")
	put("sys/bus/usb/devices/1-2:1.0/uevent", "DRIVER=uvcvideo\n")
	put("sys/bus/usb/devices/1-2:1.1/bInterfaceClass", "0e\n")
	put("sys/bus/usb/devices/1-2:1.1/bInterfaceSubClass", "02\n")
	put(efivars+"/SecureBoot-"+globalGUID, "\x06\x00\x00\x00\x01")
	put(efivars+"/SetupMode-"+globalGUID, "\x06\x00\x00\x00\x00")
	put(efivars+"/BootCurrent-"+globalGUID, "\x06\x00\x00\x00\x0a\x00")
	put(efivars+"/Boot000A-"+globalGUID, "\x07\x00\x00\x00"+string(loadOption(pxePath)))
	return m
}

func node(typ, sub byte, data ...byte) []byte {
	b := []byte{typ, sub, 0, 0}
	binary.LittleEndian.PutUint16(b[2:], uint16(4+len(data)))
	return append(b, data...)
}

var (
	end      = node(pathEnd, 0xff)
	pci      = node(1, 1, 0, 2)
	pxePath  = bytes.Join([][]byte{pci, node(pathMessaging, messagingMAC, make([]byte, 33)...), node(pathMessaging, messagingIPv4, make([]byte, 23)...), end}, nil)
	httpPath = bytes.Join([][]byte{pci, node(pathMessaging, messagingMAC, make([]byte, 33)...), node(pathMessaging, messagingIPv4, make([]byte, 23)...), node(pathMessaging, messagingURI), end}, nil)
	diskPath = bytes.Join([][]byte{pci, node(pathMedia, mediaHardDrive, make([]byte, 38)...), end}, nil)
)

func loadOption(path []byte) []byte {
	b := []byte{1, 0, 0, 0, 0, 0, 'U', 0, 'E', 0, 0, 0}
	binary.LittleEndian.PutUint16(b[4:], uint16(len(path)))
	return append(append(b, path...), "optional data"...)
}

func TestRead(t *testing.T) {
	want := fleet.Hardware{
		Vendor: "Example Ltd", Product: "Box 7", UUID: "4c4c4544-0042-3510-8052-b4c04f573832", Board: "B?[31m",
		CPU: "Some CPU @ 2 GHz", CPUs: 2, MemoryBytes: 1 << 20,
		NICs: []fleet.NIC{{Name: "eth0", MAC: "52:54:00:aa:bb:cc", Driver: "e1000e", Link: true, SpeedMbit: 1000}},
		Disks: []fleet.Disk{
			{Path: "/dev/nvme0n1", Model: "Fast Disk", Serial: "S1", WWN: "eui.0025388b01234567", SizeBytes: 1 << 20, Transport: "nvme", Partitioned: true},
			{Path: "/dev/sda", Serial: "WD-1", SizeBytes: 51200, Transport: "sata", Rotational: true},
		},
		Devices: []fleet.Device{
			{Bus: "pci", Vendor: "10de", Device: "1cb3", Class: "gpu"},
			{Bus: "usb", Vendor: "046d", Device: "0825", Class: "camera", Driver: "uvcvideo"},
		},
		BootPath: "pxe", SecureBoot: true,
	}
	if d := cmp.Diff(want, Read(machine())); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(fleet.Hardware{}, Read(fstest.MapFS{})); d != "" {
		t.Errorf("an empty machine: %s", d)
	}
}

func TestBootPartition(t *testing.T) {
	const id = "0A1b2c3d-4e5f-8a6b-9c7d-0e1f2a3b4c5d"
	wide := "\x06\x00\x00\x00"
	for _, c := range id {
		wide += string(c) + "\x00"
	}
	for _, c := range []struct{ data, want string }{
		{wide + "\x00\x00", strings.ToLower(id)},
		{wide, strings.ToLower(id)},
		{wide + "1\x00\x00\x00", ""},
		{wide[:20] + "\x00\x00", ""},
		{wide[:20] + "\n\x00" + wide[22:], ""},
		{wide[:20] + "1\x04" + wide[22:], ""},
		{"\x06\x00", ""},
	} {
		m := fstest.MapFS{efivars + "/LoaderDevicePartUUID-" + loaderGUID: &fstest.MapFile{Data: []byte(c.data)}}
		if got := BootPartition(m); got != c.want {
			t.Errorf("%q: got %q, want %q", c.data, got, c.want)
		}
	}
	if got := BootPartition(fstest.MapFS{}); got != "" {
		t.Errorf("by network: %q", got)
	}
}

func TestBootPath(t *testing.T) {
	for name, c := range map[string]struct {
		path []byte
		want string
	}{
		"when the entry is PXE then pxe":        {pxePath, "pxe"},
		"when the entry has a URI then http":    {httpPath, "http"},
		"when the entry is a partition: disk":   {diskPath, "disk"},
		"when the entry is only a bus then ''":  {append(pci, end...), ""},
		"when a node is longer than the path":   {[]byte{3, 11, 255, 0}, ""},
		"when a node is shorter than its head":  {[]byte{3, 11, 3, 0}, ""},
		"when something follows the end, it is": {append(append([]byte{}, end...), pxePath...), ""},
	} {
		if got := loadOptionPath(loadOption(c.path)); got != c.want {
			t.Errorf("%s: got %q", name, got)
		}
	}
	m := machine()
	m[efivars+"/LoaderDevicePartUUID-"+loaderGUID] = &fstest.MapFile{Data: []byte("\x06\x00\x00\x00A\x00B\x00\x00\x00")}
	if got := Read(m).BootPath; got != "disk" {
		t.Errorf("when the stub came from a partition then disk, got %q", got)
	}
}

func TestSecureBootIsOffInSetupMode(t *testing.T) {
	m := machine()
	m[efivars+"/SetupMode-"+globalGUID].Data[4] = 1
	if Read(m).SecureBoot {
		t.Error("setup mode enforces nothing")
	}
}

func TestCaps(t *testing.T) {
	m := machine()
	for i := range 500 {
		m[fmt.Sprintf("sys/class/net/x%03d/type", i)] = &fstest.MapFile{Data: []byte("1")}
		m[fmt.Sprintf("sys/class/net/x%03d/device/uevent", i)] = &fstest.MapFile{Data: []byte("DRIVER=" + strings.Repeat("d", 4000))}
		m[fmt.Sprintf("sys/block/y%03d/size", i)] = &fstest.MapFile{Data: []byte("8")}
		m[fmt.Sprintf("sys/block/y%03d/device/model", i)] = &fstest.MapFile{Data: []byte(strings.Repeat("m", 4000))}
		m[fmt.Sprintf("sys/bus/pci/devices/%04d/class", i)] = &fstest.MapFile{Data: []byte("0x030000")}
	}
	h := Read(m)
	if len(h.NICs) != maxNICs || len(h.Disks) != maxDisks || len(h.Devices) != maxDevices {
		t.Errorf("%d NICs, %d disks, %d devices", len(h.NICs), len(h.Disks), len(h.Devices))
	}
	for _, n := range h.NICs {
		if len(n.Driver) > maxString {
			t.Fatalf("a driver name of %d bytes", len(n.Driver))
		}
	}
}

func TestEventLogIsCapped(t *testing.T) {
	name := "sys/kernel/security/tpm0/binary_bios_measurements"
	if _, err := EventLog(fstest.MapFS{}); err == nil {
		t.Error("no log, no error")
	}
	b, err := EventLog(fstest.MapFS{name: {Data: make([]byte, MaxEventLog+10)}})
	if err != nil || len(b) != MaxEventLog {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// watched records what is opened.
type watched struct {
	fs.FS
	mu     sync.Mutex
	opened []string
}

func (w *watched) Open(name string) (fs.File, error) {
	w.mu.Lock()
	w.opened = append(w.opened, name)
	w.mu.Unlock()
	return w.FS.Open(name)
}

// TestReadOpensNoDevice runs on the machine at hand: facts come from /sys and
// /proc alone, so no disk can be touched, not even for reading.
func TestReadOpensNoDevice(t *testing.T) {
	w := &watched{FS: os.DirFS("/")}
	Read(w)
	if len(w.opened) == 0 {
		t.Fatal("nothing was opened: this test watches the wrong door")
	}
	for _, name := range w.opened {
		if !strings.HasPrefix(name, "sys/") && !strings.HasPrefix(name, "proc/") {
			t.Errorf("opened /%s", name)
		}
	}
}

func FuzzLoadOption(f *testing.F) {
	for _, p := range [][]byte{pxePath, httpPath, diskPath, nil} {
		f.Add(loadOption(p))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		switch loadOptionPath(b) {
		case "", "pxe", "http", "disk":
		default:
			t.Fatal("a word of its own")
		}
	})
}

func FuzzProc(f *testing.F) {
	f.Add([]byte("processor : 0\nmodel name : x\n"), []byte("MemTotal: 99999999999999999999 kB"))
	f.Fuzz(func(t *testing.T, cpu, mem []byte) {
		model, _ := cpuInfo(cpu)
		if len(model) > maxString || memTotal(mem) < 0 {
			t.Fatal("caps do not hold")
		}
	})
}

func FuzzVPD(f *testing.F) {
	f.Add([]byte("\x00\x80\x00\x04WD-1"))
	f.Add([]byte("\x00\x80\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(vpdSerial(b)) > maxString {
			t.Fatal("too long")
		}
	})
}
