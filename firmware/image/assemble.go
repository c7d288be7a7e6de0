package image

import (
	"encoding/binary"
	"fmt"

	"github.com/muster-edge/muster/firmware"
)

// section is one section to be added to the stub.
type section struct {
	name string
	data []byte
}

const (
	// pageSize aligns the new sections in memory. The stub's own alignment
	// (512 in systemd 252) would do for the stub, but the kernel and the
	// memory protection of newer firmware like whole pages.
	pageSize = 4096
	// sectionData is IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ.
	sectionData = 0x40000040
	// maxImage bounds offsets well below 2^32: firmware of the field cannot
	// load images of this size anyway.
	maxImage = 1 << 30
)

// assemble appends sections to the stub and returns the finished PE file. It
// does what `objcopy --add-section --change-section-vma` does, with addresses
// computed from the sizes: fixed addresses of older recipes overlap as soon
// as a kernel or an initrd grows.
func assemble(stub []byte, sections []section) ([]byte, error) {
	pe, err := firmware.ParsePE(stub)
	if err != nil {
		return nil, fmt.Errorf("image: read stub: %w", err)
	}
	if pe.Signed() {
		return nil, fmt.Errorf("image: assemble UKI: the stub is signed already; use the unsigned one")
	}
	le := binary.LittleEndian
	peAt := int(le.Uint32(stub[60:]))
	coff, opt := peAt+4, peAt+24
	optSize := int(le.Uint16(stub[coff+16:]))
	table := opt + optSize
	sectionAlign, fileAlign := le.Uint32(stub[opt+32:]), le.Uint32(stub[opt+36:])
	headers := int(le.Uint32(stub[opt+60:]))
	for _, a := range []uint32{sectionAlign, fileAlign} {
		if a == 0 || a&(a-1) != 0 || a > 1<<16 {
			return nil, fmt.Errorf("image: assemble UKI: the stub's alignment %d is not a power of two up to 65536", a)
		}
	}
	count := len(pe.Sections)
	if need := table + (count+len(sections))*40; need > headers {
		return nil, fmt.Errorf("image: assemble UKI: the section table needs %d bytes, the stub's headers have %d", need, headers)
	}
	align := max(sectionAlign, pageSize)

	var vma uint32
	end := uint32(headers)
	taken := map[string]bool{}
	for _, s := range pe.Sections {
		vma = max(vma, s.VirtualAddress+s.VirtualSize)
		end = max(end, s.RawOffset+s.RawSize)
		taken[s.Name] = true
		if len(s.Name) > 0 && s.Name[0] == '/' {
			return nil, fmt.Errorf("image: assemble UKI: the stub's section %q has its name in the symbol table", s.Name)
		}
	}
	// GNU ld leaves a COFF symbol table behind the sections. Nothing at boot
	// reads it, and new sections must not hide it: it is cut off.
	if int(end) != len(stub) && le.Uint32(stub[coff+8:]) != end {
		return nil, fmt.Errorf("image: assemble UKI: the stub has %d unknown bytes after its last section", len(stub)-int(end))
	}

	out := append([]byte(nil), stub[:end]...)
	clear(out[coff+8 : coff+16]) // PointerToSymbolTable, NumberOfSymbols
	pad := func(to uint32) {
		for len(out)%int(to) != 0 {
			out = append(out, 0)
		}
	}
	pad(fileAlign)
	for i, s := range sections {
		if len(s.name) > 8 || taken[s.name] {
			return nil, fmt.Errorf("image: assemble UKI: section %q is there already or its name is longer than 8", s.name)
		}
		taken[s.name] = true
		if len(s.data) == 0 || len(s.data) > maxImage-len(out) {
			return nil, fmt.Errorf("image: assemble UKI: section %q of %d bytes is empty or too large", s.name, len(s.data))
		}
		vma = roundUp(vma, align)
		offset := uint32(len(out))
		out = append(out, s.data...)
		pad(fileAlign)

		h := out[table+(count+i)*40:][:40]
		clear(h)
		copy(h, s.name)
		le.PutUint32(h[8:], uint32(len(s.data))) // VirtualSize: what the stub measures and passes on
		le.PutUint32(h[12:], vma)
		le.PutUint32(h[16:], uint32(len(out))-offset)
		le.PutUint32(h[20:], offset)
		le.PutUint32(h[36:], sectionData)
		vma += uint32(len(s.data))
	}

	le.PutUint16(out[coff+2:], uint16(count+len(sections)))
	le.PutUint32(out[coff+4:], 0) // TimeDateStamp
	le.PutUint32(out[opt+56:], roundUp(vma, sectionAlign))
	// SizeOfInitializedData: informative, kept true.
	data := le.Uint32(out[opt+8:])
	for _, s := range sections {
		data += roundUp(uint32(len(s.data)), fileAlign)
	}
	le.PutUint32(out[opt+8:], data)
	le.PutUint32(out[opt+64:], 0)
	le.PutUint32(out[opt+64:], checksum(out))
	return out, nil
}

func roundUp(v, to uint32) uint32 { return (v + to - 1) &^ (to - 1) }

// checksum is the PE checksum: the 16-bit words added with end-around carry,
// plus the length. UEFI ignores it; signing tools recompute it.
func checksum(pe []byte) uint32 {
	var sum uint32
	for i := 0; i+1 < len(pe); i += 2 {
		sum += uint32(pe[i]) | uint32(pe[i+1])<<8
		sum = sum&0xffff + sum>>16
	}
	if len(pe)%2 == 1 {
		sum += uint32(pe[len(pe)-1])
		sum = sum&0xffff + sum>>16
	}
	return sum&0xffff + sum>>16 + uint32(len(pe))
}
