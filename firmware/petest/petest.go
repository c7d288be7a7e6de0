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
	return assemble(layout{characteristics: 0x206, align: Align, first: Headers, text: 0x40000040}, sections)
}

// layout is where two kinds of made files differ.
type layout struct {
	characteristics uint16
	// align is the alignment of sections in memory, first the address of the
	// first one.
	align, first int
	// text are the flags of the first section; all others hold data.
	text uint32
	// code is the size of the code, which begins at first; 0: none.
	code int
}

func ceilTo(n, to int) int { return (n + to - 1) / to * to }

func assemble(l layout, sections []Section) []byte {
	le := binary.LittleEndian
	out := make([]byte, Headers)
	copy(out, "MZ")
	le.PutUint32(out[60:], 64)
	copy(out[64:], "PE\x00\x00")
	coff := out[68:]
	le.PutUint16(coff, 0x8664)
	le.PutUint16(coff[2:], uint16(len(sections)))
	le.PutUint16(coff[16:], 240)
	le.PutUint16(coff[18:], l.characteristics)
	opt := out[88:]
	le.PutUint16(opt, 0x20b)
	if l.code > 0 {
		le.PutUint32(opt[4:], uint32(ceilTo(l.code, Align)))
		le.PutUint32(opt[16:], uint32(l.first)) // entry
		le.PutUint32(opt[20:], uint32(l.first)) // base of code
	}
	le.PutUint32(opt[32:], uint32(l.align))
	le.PutUint32(opt[36:], Align)
	le.PutUint32(opt[60:], Headers)
	le.PutUint16(opt[68:], 10)  // EFI application
	le.PutUint32(opt[108:], 16) // data directories, all empty
	at := l.first
	for i, s := range sections {
		raw := ceilTo(len(s.Data), Align)
		h := out[328+40*i:]
		copy(h[:8], s.Name)
		le.PutUint32(h[8:], uint32(len(s.Data)))
		le.PutUint32(h[12:], uint32(at))
		le.PutUint32(h[16:], uint32(raw))
		le.PutUint32(h[20:], uint32(len(out)))
		flags := uint32(0x40000040) // data, readable
		if i == 0 {
			flags = l.text
		}
		le.PutUint32(h[36:], flags)
		at += ceilTo(len(s.Data), l.align)
		out = append(out, s.Data...)
		out = append(out, make([]byte, raw-len(s.Data))...)
	}
	le.PutUint32(out[88+56:], uint32(at)) // size of the image
	return out
}
