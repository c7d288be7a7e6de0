package scenario

import (
	"encoding/binary"
)

// idleProgram is the smallest UEFI application there is (PE/COFF
// specification; UEFI 2.10, 2.1.1): it returns EFI_UNSUPPORTED at once, so
// that the firmware goes on to its next choice. It is somebody else's program:
// it is measured, and whoever runs before our image could have done anything.
func idleProgram() []byte {
	const (
		align   = 0x200
		headers = 0x200
		entry   = 0x1000
		machine = 0x8664 // x86-64
	)
	b := make([]byte, headers+align)
	le := binary.LittleEndian
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00")
	coff := b[0x44:]
	le.PutUint16(coff[0:], machine)
	le.PutUint16(coff[2:], 1)     // sections
	le.PutUint16(coff[16:], 0xf0) // size of the optional header
	le.PutUint16(coff[18:], 0x22) // executable, large addresses
	opt := b[0x58:]
	le.PutUint16(opt[0:], 0x20b) // PE32+
	le.PutUint32(opt[4:], align) // size of code
	le.PutUint32(opt[16:], entry)
	le.PutUint32(opt[20:], entry)  // base of code
	le.PutUint32(opt[32:], 0x1000) // section alignment
	le.PutUint32(opt[36:], align)  // file alignment
	le.PutUint32(opt[56:], 0x2000) // size of image
	le.PutUint32(opt[60:], headers)
	le.PutUint16(opt[68:], 10)  // EFI application
	le.PutUint32(opt[108:], 16) // data directories, all empty
	section := b[0x58+0xf0:]
	copy(section, ".text")
	le.PutUint32(section[8:], 16)     // virtual size
	le.PutUint32(section[12:], entry) // virtual address
	le.PutUint32(section[16:], align) // raw size
	le.PutUint32(section[20:], headers)
	le.PutUint32(section[36:], 0x60000020) // code, executable, readable
	// mov rax, 0x8000000000000003 (EFI_UNSUPPORTED); ret
	copy(b[headers:], []byte{0x48, 0xb8, 3, 0, 0, 0, 0, 0, 0, 0x80, 0xc3})
	return b
}
