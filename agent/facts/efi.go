package facts

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// GUIDs of efivarfs file names: the UEFI global variables (UEFI 2.10 section
// 3.3) and the Boot Loader Interface, which the image's stub fills in.
const (
	efivars    = "sys/firmware/efi/efivars"
	globalGUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	loaderGUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
)

// variable returns a variable's data without the four bytes of attributes
// that efivarfs puts first.
func (t tree) variable(name, guid string) []byte {
	b := t.file(path.Join(efivars, name+"-"+guid), maxFile)
	if len(b) < 4 {
		return nil
	}
	return b[4:]
}

func (t tree) secureBoot() bool {
	b := t.variable("SecureBoot", globalGUID)
	setup := t.variable("SetupMode", globalGUID)
	return len(b) == 1 && b[0] == 1 && !(len(setup) == 1 && setup[0] == 1)
}

// BootPartition is the name (PARTUUID, in small letters) of the partition that
// the image was loaded from, as the stub noted it; "" if it was none.
func BootPartition(root fs.FS) string {
	b := tree{root}.variable("LoaderDevicePartUUID", loaderGUID)
	var out strings.Builder
	for i := 0; i+1 < len(b); i += 2 { // UCS-2 that ends in a NUL
		if b[i] == 0 && b[i+1] == 0 {
			break
		}
		if b[i+1] != 0 || !strings.ContainsRune("0123456789abcdefABCDEF-", rune(b[i])) || out.Len() == 36 {
			return ""
		}
		out.WriteByte(b[i])
	}
	if out.Len() != 36 {
		return ""
	}
	return strings.ToLower(out.String())
}

// bootPath says how the image got here. The stub sets LoaderDevicePartUUID
// only when it was loaded from a partition; otherwise the boot entry that the
// firmware used tells.
func (t tree) bootPath() string {
	if len(t.variable("LoaderDevicePartUUID", loaderGUID)) > 2 {
		return "disk"
	}
	cur := t.variable("BootCurrent", globalGUID)
	if len(cur) != 2 {
		return ""
	}
	entry := t.variable(fmt.Sprintf("Boot%04X", binary.LittleEndian.Uint16(cur)), globalGUID)
	return loadOptionPath(entry)
}

// loadOptionPath classifies the device path of an EFI_LOAD_OPTION (UEFI 2.10
// section 3.1.3: attributes u32, path length u16, description as NUL-ended
// UCS-2, then the path).
func loadOptionPath(b []byte) string {
	if len(b) < 6 {
		return ""
	}
	pathLen := int(binary.LittleEndian.Uint16(b[4:]))
	b = b[6:]
	for {
		if len(b) < 2 {
			return ""
		}
		end := b[0] == 0 && b[1] == 0
		b = b[2:]
		if end {
			break
		}
	}
	return devicePathKind(b[:min(len(b), pathLen)])
}

// Device path types and sub-types (UEFI 2.10 section 10.3).
const (
	pathMessaging = 3
	pathMedia     = 4
	pathEnd       = 0x7f

	messagingMAC  = 11
	messagingIPv4 = 12
	messagingIPv6 = 13
	messagingURI  = 24

	mediaHardDrive = 1
	mediaCDROM     = 2
)

// devicePathKind walks device path nodes (type u8, sub-type u8, length u16
// including this header) and says "http", "pxe", "disk" or "".
func devicePathKind(b []byte) string {
	network, uri, disk := false, false, false
	for len(b) >= 4 {
		typ, sub, n := b[0], b[1], int(binary.LittleEndian.Uint16(b[2:]))
		if typ == pathEnd || n < 4 || n > len(b) {
			break
		}
		switch {
		case typ == pathMessaging && sub == messagingURI:
			uri = true
		case typ == pathMessaging && (sub == messagingMAC || sub == messagingIPv4 || sub == messagingIPv6):
			network = true
		case typ == pathMedia && (sub == mediaHardDrive || sub == mediaCDROM):
			disk = true
		}
		b = b[n:]
	}
	switch {
	case uri:
		return "http"
	case network:
		return "pxe"
	case disk:
		return "disk"
	}
	return ""
}
