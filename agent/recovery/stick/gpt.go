package stick

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/muster-edge/muster/firmware"
)

// Caps of a partition table; UEFI 2.10, section 5.3. The disk is hostile.
const (
	maxEntries   = 256
	maxEntrySize = 1024
	headerSize   = 92
)

// errNoGPT is for disks without a table: most of them are no reason to worry.
var errNoGPT = errors.New("stick: no partition table of the kind GPT")

// partition is one entry of a table.
type partition struct {
	number int // from 1
	guid   firmware.GUID
	// start and sectors count in the disk's logical sectors.
	start, sectors uint64
}

// readGPT reads the first table of a disk with these sectors. The second one,
// at the end, is for repair programs: a stick whose first is damaged was not
// started from.
func readGPT(disk io.ReaderAt, sector int) ([]partition, error) {
	if sector < 512 || sector > 64<<10 {
		return nil, fmt.Errorf("stick: read partition table: sectors of %d bytes", sector)
	}
	le := binary.LittleEndian
	h := make([]byte, headerSize)
	if _, err := disk.ReadAt(h, int64(sector)); err != nil {
		return nil, fmt.Errorf("stick: read partition table: %w", err)
	}
	if string(h[:8]) != "EFI PART" || le.Uint32(h[12:]) != headerSize {
		return nil, errNoGPT
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	if crc32.ChecksumIEEE(h) != sum {
		return nil, fmt.Errorf("stick: read partition table: its checksum is wrong")
	}
	at, count, size := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if count > maxEntries || size < 128 || size > maxEntrySize || at < 2 || at > 1<<20 {
		return nil, fmt.Errorf("stick: read partition table: %d entries of %d bytes at sector %d", count, size, at)
	}
	table := make([]byte, count*size)
	if _, err := disk.ReadAt(table, int64(at)*int64(sector)); err != nil {
		return nil, fmt.Errorf("stick: read partition table: %w", err)
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, fmt.Errorf("stick: read partition table: the checksum of its entries is wrong")
	}
	var out []partition
	for i := range int(count) {
		e := table[i*int(size):][:size]
		if [16]byte(e[:16]) == [16]byte{} {
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first == 0 || last < first || last > 1<<48 {
			continue
		}
		out = append(out, partition{i + 1, firmware.GUID(e[16:32]), first, last - first + 1})
	}
	return out, nil
}
