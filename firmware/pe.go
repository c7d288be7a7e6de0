package firmware

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sort"
)

// Limits of the PE reader. A UKI has about a dozen sections.
const (
	maxSections   = 96 // the loader of Windows has the same limit
	peMachineX64  = 0x8664
	peMachineA64  = 0xaa64
	peMagicPlus   = 0x20b
	peHeaderMin   = 112 // optional header of PE32+ before the data directories
	coffSize      = 20
	sectionHeader = 40
	dirSecurity   = 4
)

// PE is the part of a PE32+ file that boot needs: its sections, and where the
// bytes lie that Authenticode leaves out. The format is Microsoft's "PE
// Format"; only PE32+ is read, since all our machines are 64-bit.
type PE struct {
	// Arch is amd64 or arm64.
	Arch string
	// Sections in the order of the section table.
	Sections []PESection

	raw          []byte
	peOffset     int // of "PE\0\0"
	checksumAt   int
	securityAt   int // 0: the file has no such data directory entry
	sizeHeaders  int
	sectionTable int
	certStart    int // 0: no certificate table
	certSize     int
}

// PESection is one section of a PE file.
type PESection struct {
	// Name without the padding NULs.
	Name string
	// VirtualAddress and VirtualSize say where it lies in memory; RawOffset
	// and RawSize where it lies in the file.
	VirtualAddress, VirtualSize, RawOffset, RawSize uint32
	// Flags are the section's Characteristics.
	Flags uint32
}

// ParsePE reads the headers of a PE32+ file that is wholly in raw. The
// result keeps raw; the caller must not change it. Every offset is checked
// against the file's length, so the methods of the result cannot fail on
// bounds.
func ParsePE(raw []byte) (*PE, error) {
	fail := func(format string, args ...any) (*PE, error) {
		return nil, fmt.Errorf("firmware: read PE: "+format, args...)
	}
	if len(raw) < 64 || raw[0] != 'M' || raw[1] != 'Z' {
		return fail("no MZ header")
	}
	size := uint64(len(raw))
	at := uint64(binary.LittleEndian.Uint32(raw[60:]))
	if at+4+coffSize+peHeaderMin > size {
		return fail("header at %d lies outside the file", at)
	}
	if !bytes.Equal(raw[at:at+4], []byte("PE\x00\x00")) {
		return fail("no PE signature at %d", at)
	}
	p := &PE{raw: raw, peOffset: int(at)}
	coff := raw[at+4:]
	switch machine := binary.LittleEndian.Uint16(coff); machine {
	case peMachineX64:
		p.Arch = "amd64"
	case peMachineA64:
		p.Arch = "arm64"
	default:
		return fail("machine type %#x is neither amd64 nor arm64", machine)
	}
	count := int(binary.LittleEndian.Uint16(coff[2:]))
	optSize := uint64(binary.LittleEndian.Uint16(coff[16:]))
	if count == 0 || count > maxSections {
		return fail("%d sections, want 1 to %d", count, maxSections)
	}
	optAt := at + 4 + coffSize
	tableAt := optAt + optSize
	if optSize < peHeaderMin || tableAt+uint64(count)*sectionHeader > size {
		return fail("section table lies outside the file")
	}
	opt := raw[optAt:tableAt]
	if magic := binary.LittleEndian.Uint16(opt); magic != peMagicPlus {
		return fail("optional header magic %#x is not PE32+", magic)
	}
	p.sectionTable = int(tableAt)
	p.checksumAt = int(optAt) + 64
	headers := uint64(binary.LittleEndian.Uint32(opt[60:]))
	if headers < tableAt+uint64(count)*sectionHeader || headers > size {
		return fail("SizeOfHeaders %d does not cover the section table or exceeds the file", headers)
	}
	p.sizeHeaders = int(headers)
	dirs := uint64(binary.LittleEndian.Uint32(opt[108:]))
	if dirs > 16 || peHeaderMin+dirs*8 > optSize {
		return fail("%d data directories do not fit the optional header", dirs)
	}
	if dirs > dirSecurity {
		p.securityAt = int(optAt) + peHeaderMin + dirSecurity*8
		start := uint64(binary.LittleEndian.Uint32(raw[p.securityAt:]))
		length := uint64(binary.LittleEndian.Uint32(raw[p.securityAt+4:]))
		if (start == 0) != (length == 0) {
			return fail("certificate table at %d has %d bytes", start, length)
		}
		// Authenticode tables end the file; bytes after them would be
		// outside of both the digest and the signature.
		if length != 0 && (start < headers || start+length != size) {
			return fail("certificate table %d+%d is not at the end of the file (%d)", start, length, size)
		}
		p.certStart, p.certSize = int(start), int(length)
	}
	for i := range count {
		h := raw[tableAt+uint64(i)*sectionHeader:]
		s := PESection{
			Name:           string(bytes.TrimRight(h[:8], "\x00")),
			VirtualSize:    binary.LittleEndian.Uint32(h[8:]),
			VirtualAddress: binary.LittleEndian.Uint32(h[12:]),
			RawSize:        binary.LittleEndian.Uint32(h[16:]),
			RawOffset:      binary.LittleEndian.Uint32(h[20:]),
			Flags:          binary.LittleEndian.Uint32(h[36:]),
		}
		if uint64(s.RawOffset)+uint64(s.RawSize) > size {
			return fail("section %q: bytes %d+%d lie outside the file", s.Name, s.RawOffset, s.RawSize)
		}
		if uint64(s.VirtualAddress)+uint64(s.VirtualSize) > 1<<32-1 {
			return fail("section %q: address %#x+%#x overflows", s.Name, s.VirtualAddress, s.VirtualSize)
		}
		p.Sections = append(p.Sections, s)
	}
	return p, nil
}

// Section returns the bytes of the named section as the program in memory
// sees them, without the padding of the file. A name that is missing, or that
// is there twice, is an error: a second .cmdline would be a way to boot what
// was not measured.
func (p *PE) Section(name string) ([]byte, error) {
	var found *PESection
	for i := range p.Sections {
		if p.Sections[i].Name != name {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("firmware: read PE: section %q is there twice", name)
		}
		found = &p.Sections[i]
	}
	if found == nil {
		return nil, fmt.Errorf("firmware: read PE: no section %q", name)
	}
	if found.VirtualSize > found.RawSize {
		return nil, fmt.Errorf("firmware: read PE: section %q: %d bytes in memory, %d in the file", name, found.VirtualSize, found.RawSize)
	}
	return p.raw[found.RawOffset : found.RawOffset+found.VirtualSize], nil
}

// UKISections returns the sections of a unified kernel image that the stub
// measures, by name.
func (p *PE) UKISections() (map[string][]byte, error) {
	out := make(map[string][]byte)
	for _, name := range measuredSections {
		if !p.has(name) {
			continue
		}
		data, err := p.Section(name)
		if err != nil {
			return nil, err
		}
		out[name] = data
	}
	if len(out[SectionLinux]) == 0 {
		return nil, fmt.Errorf("firmware: read UKI: no %s section", SectionLinux)
	}
	return out, nil
}

func (p *PE) has(name string) bool {
	for _, s := range p.Sections {
		if s.Name == name {
			return true
		}
	}
	return false
}

// Signed reports whether the file carries a certificate table. It says
// nothing about whose signature that is.
func (p *PE) Signed() bool { return p.certSize > 0 }

// Authenticode returns the SHA-256 Authenticode digest ("Windows Authenticode
// Portable Executable Signature Format", "Calculating the PE Image Hash"):
// everything but the checksum, the certificate table and its directory entry.
// UEFI firmware computes the same digest for Secure Boot and measures it into
// PCR 4 (TCG PC Client Platform Firmware Profile, EV_EFI_BOOT_SERVICES_APPLICATION).
// A signature therefore does not change it. Files whose sections overlap or
// leave gaps are refused, since implementations differ on them.
func (p *PE) Authenticode() (Digest, error) {
	end := len(p.raw)
	if p.certSize > 0 {
		end = p.certStart
	}
	h := sha256.New()
	h.Write(p.raw[:p.checksumAt])
	rest := p.checksumAt + 4
	if p.securityAt > 0 {
		h.Write(p.raw[rest:p.securityAt])
		rest = p.securityAt + 8
	}
	if rest > p.sizeHeaders {
		return Digest{}, fmt.Errorf("firmware: hash PE: SizeOfHeaders %d ends inside the headers", p.sizeHeaders)
	}
	h.Write(p.raw[rest:p.sizeHeaders])

	sections := append([]PESection(nil), p.Sections...)
	sort.SliceStable(sections, func(i, j int) bool { return sections[i].RawOffset < sections[j].RawOffset })
	at := p.sizeHeaders
	for _, s := range sections {
		if s.RawSize == 0 {
			continue
		}
		if int(s.RawOffset) != at {
			return Digest{}, fmt.Errorf("firmware: hash PE: section %q starts at %d, want %d: gap or overlap", s.Name, s.RawOffset, at)
		}
		at += int(s.RawSize)
		if at > end {
			return Digest{}, fmt.Errorf("firmware: hash PE: section %q overlaps the certificate table", s.Name)
		}
		h.Write(p.raw[s.RawOffset:at])
	}
	h.Write(p.raw[at:end])
	return Digest(h.Sum(nil)), nil
}
