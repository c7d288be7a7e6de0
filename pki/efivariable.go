package pki

import (
	"encoding/binary"
	"errors"
	"unicode/utf16"
)

// GUIDs as they are on the wire: the first three fields little-endian.
var (
	// EFI_GLOBAL_VARIABLE 8be4df61-93ca-11d2-aa0d-00e098032b8c, UEFI §3.3.
	guidGlobal = [16]byte{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	// EFI_IMAGE_SECURITY_DATABASE_GUID d719b2cb-3d3a-4596-a3bc-dad00e67656f.
	guidImageSecurity = [16]byte{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
)

// efiVariable is UEFI_VARIABLE_DATA, TCG PC Client Platform Firmware Profile
// §10.4.2.6.
type efiVariable struct {
	GUID [16]byte
	Name string
	Data []byte
}

// parseVariable reads UEFI_VARIABLE_DATA that fills b exactly.
func parseVariable(b []byte) (efiVariable, error) {
	const header = 16 + 8 + 8
	var v efiVariable
	if len(b) < header {
		return v, errors.New("pki: read EFI variable: too short")
	}
	copy(v.GUID[:], b)
	chars := binary.LittleEndian.Uint64(b[16:])
	size := binary.LittleEndian.Uint64(b[24:])
	rest := b[header:]
	if chars > 256 || chars*2 > uint64(len(rest)) || size != uint64(len(rest))-chars*2 {
		return v, errors.New("pki: read EFI variable: lengths do not add up")
	}
	name := make([]uint16, chars)
	for i := range name {
		name[i] = binary.LittleEndian.Uint16(rest[2*i:])
	}
	v.Name, v.Data = string(utf16.Decode(name)), rest[2*chars:]
	return v, nil
}
