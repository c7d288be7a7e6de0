package image

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"github.com/diskfs/go-diskfs/partition/gpt"

	"github.com/muster-edge/muster/firmware"
)

// Formats of a recovery image. FormatUKI is always written, since it is what
// the manifest speaks of; the others hold the same bytes as
// \EFI\BOOT\BOOTX64.EFI, the path firmware looks for on a medium it does not
// know (UEFI 2.10, section 3.5.1.1).
const (
	FormatUKI  = "uki"
	FormatDisk = "disk"
	FormatISO  = "iso"
)

// Names of the media beside RecoveryFile.
const (
	DiskFile = "recovery.img"
	ISOFile  = "recovery.iso"
)

// mediaFiles names the file of each format that is a medium.
var mediaFiles = map[string]string{FormatDisk: DiskFile, FormatISO: ISOFile}

const (
	sectorSize = 512
	// espStart is where the ESP begins, in sectors: at 1 MiB, as partitioning
	// programs do. The gap holds the GPT (17 KiB) and, in an ISO, the volume
	// descriptors and directories that must start at 32 KiB.
	espStart = 2048
	// alignment of sizes in sectors, also 1 MiB.
	alignment = 2048
	// maxMedium bounds the image inside a medium: past it, clusters of one
	// sector make the FAT larger than old firmware likes. A recovery image
	// has a tenth of this.
	maxMedium = 200 << 20

	mediumLabel = "MUSTER"
)

// layout is where things are on a medium, disk and ISO alike.
type layout struct {
	fat fatLayout
	// sectors of the whole medium.
	sectors int
}

// fileSector is where the image begins, in sectors of the medium.
func (l layout) fileSector() int { return espStart + l.fat.fileSector() }

// makeMedium returns the bytes of a medium that boots efi. They depend on efi,
// format and date alone; date is what directories show.
func makeMedium(format string, efi []byte, date time.Time) ([]byte, error) {
	if len(efi) == 0 || len(efi) > maxMedium {
		return nil, fmt.Errorf("image: make %s: the image has %d bytes, a medium takes 1 to %d", format, len(efi), maxMedium)
	}
	date = mediumDate(date)
	id := firmware.MediumOf(sha256.Sum256(efi))
	l := layout{fat: newFATLayout(len(efi))}
	// Behind the ESP: the second copy of the GPT.
	l.sectors = espStart + l.fat.total + alignment
	out := make([]byte, l.sectors*sectorSize)
	writeFAT(out[espStart*sectorSize:][:l.fat.total*sectorSize], l.fat, efi, id.Serial, date)
	if err := writeGPT(out, l, id); err != nil {
		return nil, fmt.Errorf("image: make %s: %w", format, err)
	}
	copy(out, biosNotice())
	switch format {
	case FormatDisk:
	case FormatISO:
		writeISO(out, l, len(efi), date)
	default:
		return nil, fmt.Errorf("image: make medium: format %q is not known", format)
	}
	return out, nil
}

// mediumDate fits a date into what FAT can say: even seconds from 1980 to
// 2107.
func mediumDate(t time.Time) time.Time {
	t = t.UTC().Truncate(2 * time.Second)
	if first := time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC); t.Before(first) {
		return first
	}
	if last := time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC); t.After(last) {
		return last
	}
	return t
}

func writeGPT(out []byte, l layout, id firmware.MediumIDs) error {
	table := gpt.Table{
		LogicalSectorSize: sectorSize, PhysicalSectorSize: sectorSize, ProtectiveMBR: true, GUID: id.Disk.String(),
		Partitions: []*gpt.Partition{{
			Index: 1, Start: espStart, End: uint64(espStart + l.fat.total - 1), Size: uint64(l.fat.total) * sectorSize,
			Type: gpt.EFISystemPartition, GUID: id.Partition.String(), Name: "muster recovery",
		}},
	}
	return table.Write(&memory{data: out}, int64(len(out)))
}

// biosNotice is the code in the first sector, for a PC that boots the medium
// in the manner of before UEFI: it says so, instead of a black screen. It
// ends before the partition table.
func biosNotice() []byte {
	code := []byte{
		0x31, 0xc0, // xor ax,ax
		0x8e, 0xd8, // mov ds,ax
		0xfc,             // cld
		0xbe, 0x19, 0x7c, // mov si,text
		0xac,       // next: lodsb
		0x84, 0xc0, // test al,al
		0x74, 0x09, // jz stop
		0xb4, 0x0e, // mov ah,0x0e: teletype output
		0xbb, 0x07, 0x00, // mov bx,7
		0xcd, 0x10, // int 0x10
		0xeb, 0xf2, // jmp next
		0xf4,       // stop: hlt
		0xeb, 0xfd, // jmp stop
	}
	return append(code, "\r\nmuster recovery needs UEFI. Enter the firmware setup, choose UEFI boot\r\n(not Legacy, BIOS or CSM) and start again.\r\n\x00"...)
}

// memory is a byte slice in the form in which the GPT library takes a disk.
type memory struct {
	data []byte
	at   int64
}

var errOutside = errors.New("outside of the medium")

func (m *memory) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 || off > int64(len(m.data)) {
		return 0, errOutside
	}
	n := copy(b, m.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off > int64(len(m.data)) || len(b) > len(m.data)-int(off) {
		return 0, errOutside
	}
	return copy(m.data[off:], b), nil
}

func (m *memory) Read(b []byte) (int, error) {
	n, err := m.ReadAt(b, m.at)
	m.at += int64(n)
	return n, err
}

func (m *memory) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += m.at
	case io.SeekEnd:
		off += int64(len(m.data))
	}
	if off < 0 {
		return 0, errOutside
	}
	m.at = off
	return off, nil
}

func (m *memory) Stat() (fs.FileInfo, error) { return nil, errors.ErrUnsupported }
func (m *memory) Close() error               { return nil }

// checkFormats returns the media among formats in a fixed order.
func checkFormats(formats []string) (media []string, err error) {
	var problems []error
	for _, f := range formats {
		if f != FormatUKI && mediaFiles[f] == "" {
			problems = append(problems, fmt.Errorf("--format %q is none of uki, disk, iso", f))
		}
	}
	for _, f := range []string{FormatDisk, FormatISO} {
		if slices.Contains(formats, f) {
			media = append(media, f)
		}
	}
	return media, errors.Join(problems...)
}
