package image

import (
	"encoding/binary"
	"time"
)

// The ISO 9660 structures of a medium (ECMA-119) with an El Torito boot
// catalog ("El Torito" Bootable CD-ROM Format Specification 1.0; UEFI 2.10,
// section 13.3.2). They lie in the gap before the ESP, so that an ISO is the
// disk image plus these blocks: a stick shows the GPT, a drive or a server's
// remote console the catalog, and both lead to the same ESP. The one file of
// the ISO's own tree is the image inside the ESP, not a second copy.
//
// Not by a library: the one at hand takes dates from the clock, and knows no
// file that lies inside a partition.

const isoBlock = 2048

// Blocks of the structures; the first 16 belong to the system (here the GPT).
const (
	blockPrimary = 16 + iota
	blockBoot
	blockEnd
	blockCatalog
	blockPathLE
	blockPathBE
	blockRoot
	blockEFI
	blockBOOT
)

// writeISO adds the structures to a finished disk image.
func writeISO(out []byte, l layout, size int, date time.Time) {
	le, be := binary.LittleEndian, binary.BigEndian
	block := func(n int) []byte { return out[n*isoBlock:][:isoBlock] }
	both16 := func(b []byte, v int) { le.PutUint16(b, uint16(v)); be.PutUint16(b[2:], uint16(v)) }
	both32 := func(b []byte, v int) { le.PutUint32(b, uint32(v)); be.PutUint32(b[4:], uint32(v)) }
	text := func(b []byte, s string) {
		for i := range b {
			b[i] = ' '
		}
		copy(b, s)
	}
	// record is a directory record, ECMA-119 section 9.1. name is an
	// identifier, or one byte: 0 for the directory itself, 1 for its parent.
	record := func(name string, at, length int, folder bool) []byte {
		r := make([]byte, ceilTo(33+len(name), 2))
		r[0] = byte(len(r))
		both32(r[2:], at)
		both32(r[10:], length)
		copy(r[18:], []byte{byte(date.Year() - 1900), byte(date.Month()), byte(date.Day()), byte(date.Hour()), byte(date.Minute()), byte(date.Second()), 0})
		if folder {
			r[25] = 2
		}
		both16(r[28:], 1)
		r[32] = byte(len(name))
		copy(r[33:], name)
		return r
	}
	folder := func(at, parent int, children ...[]byte) {
		b := block(at)
		for _, r := range append([][]byte{record("\x00", at, isoBlock, true), record("\x01", parent, isoBlock, true)}, children...) {
			copy(b, r)
			b = b[len(r):]
		}
	}
	folder(blockRoot, blockRoot, record("EFI", blockEFI, isoBlock, true))
	folder(blockEFI, blockRoot, record("BOOT", blockBOOT, isoBlock, true))
	folder(blockBOOT, blockEFI, record("BOOTX64.EFI;1", l.fileSector()*sectorSize/isoBlock, size, false))

	// The path table names each folder by its parent's number.
	pathSize := 0
	for _, order := range []struct {
		at int
		binary.ByteOrder
	}{{blockPathLE, le}, {blockPathBE, be}} {
		b := block(order.at)
		n := 0
		for _, p := range []struct {
			name       string
			at, parent int
		}{{"\x00", blockRoot, 1}, {"EFI", blockEFI, 1}, {"BOOT", blockBOOT, 2}} {
			b[n] = byte(len(p.name))
			order.PutUint32(b[n+2:], uint32(p.at))
			order.PutUint16(b[n+6:], uint16(p.parent))
			copy(b[n+8:], p.name)
			n += ceilTo(8+len(p.name), 2)
		}
		pathSize = n
	}

	primary := block(blockPrimary)
	copy(primary, "\x01CD001\x01")
	text(primary[8:40], "")
	text(primary[40:72], mediumLabel)
	both32(primary[80:], len(out)/isoBlock)
	both16(primary[120:], 1) // volumes in the set
	both16(primary[124:], 1) // number of this one
	both16(primary[128:], isoBlock)
	both32(primary[132:], pathSize)
	le.PutUint32(primary[140:], blockPathLE)
	be.PutUint32(primary[148:], blockPathBE)
	copy(primary[156:190], record("\x00", blockRoot, isoBlock, true))
	text(primary[190:813], "") // set, publisher, preparer, application, three files
	for i, when := range []string{date.Format("20060102150405") + "00", date.Format("20060102150405") + "00", "0000000000000000", "0000000000000000"} {
		copy(primary[813+17*i:], when+"\x00") // created, changed, expires, effective
	}
	primary[881] = 1

	boot := block(blockBoot)
	copy(boot, "\x00CD001\x01EL TORITO SPECIFICATION")
	le.PutUint32(boot[71:], blockCatalog)
	copy(block(blockEnd), "\xffCD001\x01")

	catalog := block(blockCatalog)
	catalog[0], catalog[1] = 1, 0xef // for UEFI
	copy(catalog[4:28], mediumLabel)
	catalog[30], catalog[31] = 0x55, 0xaa
	var sum uint16
	for i := 0; i < 32; i += 2 {
		sum += le.Uint16(catalog[i:])
	}
	le.PutUint16(catalog[28:], -sum)
	entry := catalog[32:]
	entry[0] = 0x88 // bootable, no emulation
	// A count of 0 or 1 means "to the end of the medium": a FAT32 file system
	// has more sectors than the field can say.
	le.PutUint16(entry[6:], 0)
	le.PutUint32(entry[8:], espStart*sectorSize/isoBlock)
}
