// Package petest makes tiny PE32+ files for tests, so that tests of boot
// images need neither a kernel nor a boot stub.
package petest

import "encoding/binary"

// Section is one section of a made file.
type Section struct {
	Name string
	Data []byte
}

// Layout of the made files.
const (
	// Headers is SizeOfHeaders; there is room for 16 sections.
	Headers = 1024
	// Align is the alignment of sections in the file and in memory.
	Align = 512
)

// Make returns a PE32+ file for amd64 with the sections, as a linker would
// write it: all fields consistent, no gaps, unsigned.
func Make(sections ...Section) []byte {
	le := binary.LittleEndian
	out := make([]byte, Headers)
	copy(out, "MZ")
	le.PutUint32(out[60:], 64)
	copy(out[64:], "PE\x00\x00")
	coff := out[68:]
	le.PutUint16(coff, 0x8664)
	le.PutUint16(coff[2:], uint16(len(sections)))
	le.PutUint16(coff[16:], 240)
	le.PutUint16(coff[18:], 0x206)
	opt := out[88:]
	le.PutUint16(opt, 0x20b)
	le.PutUint32(opt[32:], Align)
	le.PutUint32(opt[36:], Align)
	le.PutUint32(opt[60:], Headers)
	le.PutUint16(opt[68:], 10)
	le.PutUint32(opt[108:], 16)
	vma := uint32(Headers)
	for i, s := range sections {
		raw := (len(s.Data) + Align - 1) / Align * Align
		h := out[328+40*i:]
		copy(h[:8], s.Name)
		le.PutUint32(h[8:], uint32(len(s.Data)))
		le.PutUint32(h[12:], vma)
		le.PutUint32(h[16:], uint32(raw))
		le.PutUint32(h[20:], uint32(len(out)))
		le.PutUint32(h[36:], 0x40000040)
		vma += uint32(raw)
		out = append(out, s.Data...)
		out = append(out, make([]byte, raw-len(s.Data))...)
	}
	le.PutUint32(out[88+56:], vma)
	return out
}
