package image

import (
	"encoding/binary"
	"time"
)

// The FAT32 file system of a medium, written in one go: three folders' worth
// of fixed entries and one file without a gap ("Microsoft FAT Specification",
// 2005). A library is not used, because those at hand take volume serial and
// dates from the clock or the environment, and because the file must lie at a
// multiple of an ISO's blocks.

const (
	fatCount = 2
	// fatMinimum is the number of clusters below which drivers take a file
	// system for FAT16, with the 16 more that the specification advises.
	fatMinimum = 65525 + 16
	// fatSpare clusters stay free (1 MiB), for a file that a person adds.
	fatSpare = 2048

	rootCluster = 2
	efiCluster  = 3
	bootCluster = 4
	// fileCluster is the first of the file: 4 KiB after the first cluster.
	fileCluster = rootCluster + 8

	fatEnd = 0x0fffffff
)

// fatLayout counts in sectors; a cluster is one sector.
type fatLayout struct {
	total    int
	reserved int // before the first FAT
	perFAT   int
	file     int // clusters of the file
}

func newFATLayout(size int) fatLayout {
	l := fatLayout{file: (size + sectorSize - 1) / sectorSize}
	need := max(fatMinimum, fileCluster-rootCluster+l.file+fatSpare)
	l.total = ceilTo(need+need/32, alignment)
	for ; ; l.total += alignment {
		// 128 entries of 4 bytes in a sector; at most total clusters.
		l.perFAT = (l.total + rootCluster + 127) / 128
		// The data begins at a multiple of 4 KiB, for the ISO and because
		// flash likes it.
		l.reserved = ceilTo(32+fatCount*l.perFAT, 8) - fatCount*l.perFAT
		if l.clusters() >= need {
			return l
		}
	}
}

func (l fatLayout) data() int       { return l.reserved + fatCount*l.perFAT }
func (l fatLayout) clusters() int   { return l.total - l.data() }
func (l fatLayout) fileSector() int { return l.data() + fileCluster - rootCluster }

// ceilTo is the least multiple of to that is not below n.
func ceilTo(n, to int) int { return (n + to - 1) / to * to }

// writeFAT fills out, which is zero and l.total sectors long.
func writeFAT(out []byte, l fatLayout, file []byte, serial uint32, date time.Time) {
	le := binary.LittleEndian
	boot := out[:sectorSize]
	copy(boot, "\xeb\x58\x90MSWIN4.1")
	le.PutUint16(boot[11:], sectorSize)
	boot[13] = 1 // sectors in a cluster
	le.PutUint16(boot[14:], uint16(l.reserved))
	boot[16] = fatCount
	boot[21] = 0xf8             // fixed disk
	le.PutUint16(boot[24:], 63) // sectors of a track, heads: of no use, but not 0
	le.PutUint16(boot[26:], 255)
	le.PutUint32(boot[28:], espStart)
	le.PutUint32(boot[32:], uint32(l.total))
	le.PutUint32(boot[36:], uint32(l.perFAT))
	le.PutUint32(boot[44:], rootCluster)
	le.PutUint16(boot[48:], 1) // FSInfo
	le.PutUint16(boot[50:], 6) // copy of this sector
	boot[64] = 0x80
	boot[66] = 0x29
	le.PutUint32(boot[67:], serial)
	copy(boot[71:], mediumLabel+"           "[:11-len(mediumLabel)]+"FAT32   ")
	boot[90], boot[91] = 0xeb, 0xfe // code: stay here
	boot[510], boot[511] = 0x55, 0xaa

	info := out[sectorSize:][:sectorSize]
	le.PutUint32(info, 0x41615252)
	le.PutUint32(info[484:], 0x61417272)
	le.PutUint32(info[488:], uint32(l.clusters()-3-l.file)) // free
	le.PutUint32(info[492:], uint32(fileCluster+l.file))    // look here first
	le.PutUint32(info[508:], 0xaa550000)
	copy(out[6*sectorSize:], out[:2*sectorSize])

	for n := range fatCount {
		fat := out[(l.reserved+n*l.perFAT)*sectorSize:][:l.perFAT*sectorSize]
		set := func(cluster int, next uint32) { le.PutUint32(fat[4*cluster:], next) }
		set(0, 0x0ffffff8)
		set(1, fatEnd)
		for _, c := range []int{rootCluster, efiCluster, bootCluster} {
			set(c, fatEnd)
		}
		for c := range l.file - 1 {
			set(fileCluster+c, uint32(fileCluster+c+1))
		}
		set(fileCluster+l.file-1, fatEnd)
	}

	cluster := func(n int) []byte { return out[(l.data()+n-rootCluster)*sectorSize:] }
	const folder, volume, archive = 0x10, 0x08, 0x20
	entry := func(in, slot int, name string, attr byte, first, size int) {
		e := cluster(in)[32*slot:][:32]
		copy(e, name+"           "[:11-len(name)])
		e[11] = attr
		day := uint16(date.Year()-1980)<<9 | uint16(date.Month())<<5 | uint16(date.Day())
		clock := uint16(date.Hour())<<11 | uint16(date.Minute())<<5 | uint16(date.Second()/2)
		le.PutUint16(e[14:], clock)
		le.PutUint16(e[16:], day)
		le.PutUint16(e[18:], day)
		le.PutUint16(e[20:], uint16(first>>16))
		le.PutUint16(e[22:], clock)
		le.PutUint16(e[24:], day)
		le.PutUint16(e[26:], uint16(first))
		le.PutUint32(e[28:], uint32(size))
	}
	entry(rootCluster, 0, mediumLabel, volume, 0, 0)
	entry(rootCluster, 1, "EFI", folder, efiCluster, 0)
	entry(efiCluster, 0, ".", folder, efiCluster, 0)
	entry(efiCluster, 1, "..", folder, 0, 0) // 0 means the root
	entry(efiCluster, 2, "BOOT", folder, bootCluster, 0)
	entry(bootCluster, 0, ".", folder, bootCluster, 0)
	entry(bootCluster, 1, "..", folder, efiCluster, 0)
	entry(bootCluster, 2, "BOOTX64 EFI", archive, fileCluster, len(file))
	copy(cluster(fileCluster), file)
}
