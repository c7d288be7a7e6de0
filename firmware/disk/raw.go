package disk

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/muster-edge/muster/firmware"
)

// ErrBroken: the bytes on the medium are not those that were written.
var ErrBroken = errors.New("disk: what is on the medium differs from what was written")

// WriteChunk writes b at off, makes it durable, reads it from the medium and
// compares.
func WriteChunk(d Device, off int64, b []byte) error {
	// Direct reads and the last sector want whole sectors; the rest of a
	// partition is nobody's.
	if _, err := d.WriteAt(b, off); err != nil {
		return fmt.Errorf("disk: write %d bytes at %d: %w", len(b), off, err)
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("disk: write %d bytes at %d: %w", len(b), off, err)
	}
	back := make([]byte, len(b))
	if _, err := d.Reread(back, off); err != nil {
		return fmt.Errorf("disk: read back %d bytes at %d: %w", len(b), off, err)
	}
	if !bytes.Equal(b, back) {
		return fmt.Errorf("disk: write %d bytes at %d: %w", len(b), off, ErrBroken)
	}
	return nil
}

// Digest returns SHA-256 over the first size bytes on the medium.
func Digest(d Device, size int64) (firmware.Digest, error) {
	return DigestAt(d, 0, size)
}

// DigestAt returns SHA-256 over size bytes at off, as they are on the medium.
func DigestAt(d Device, off, size int64) (firmware.Digest, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for done := int64(0); done < size; {
		n, err := d.Reread(buf[:min(int64(len(buf)), size-done)], off+done)
		if n == 0 && err == nil {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return firmware.Digest{}, fmt.Errorf("disk: read %d bytes at %d: %w", size, off, err)
		}
		h.Write(buf[:n])
		done += int64(n)
	}
	return firmware.Digest(h.Sum(nil)), nil
}

// ReadMeta reads the record of the meta partition. The errors of
// firmware.DecodeMeta come through.
func ReadMeta(d Device) (firmware.Meta, error) {
	var area [2][]byte
	for i := range area {
		area[i] = make([]byte, firmware.MaxMeta)
		if _, err := d.Reread(area[i], int64(i)*firmware.MetaArea); err != nil {
			return firmware.Meta{}, fmt.Errorf("disk: read meta: %w", err)
		}
	}
	return firmware.DecodeMeta(area[0], area[1])
}

// WriteMeta writes m behind last, the record that is there now (Seq 0 for
// none), and returns what was written.
func WriteMeta(d Device, m firmware.Meta, last uint64) (firmware.Meta, error) {
	m.Seq = last + 1
	b, err := m.Encode()
	if err != nil {
		return m, err
	}
	return m, WriteChunk(d, m.Area(), b)
}

// eraseSize covers what makes a file system or an encrypted one what it is: both
// headers of LUKS2 and all its key slots (16 MiB), superblocks of the rest.
const eraseSize = 32 << 20

// Erase empties the beginning of a partition, its first bytes last: cut off, it
// still looks as if something were there. What was encrypted is lost with its key
// slots.
func Erase(d Device) error {
	const step = 1 << 20
	n := min(int64(eraseSize), d.Size())
	for at := (n - 1) / step * step; at >= 0; at -= step {
		if err := zero(d, at, min(step, n-at)); err != nil {
			return err
		}
		if err := d.Sync(); err != nil {
			return fmt.Errorf("disk: erase: %w", err)
		}
	}
	empty, err := Empty(d)
	if err == nil && !empty {
		err = fmt.Errorf("disk: erase: %w", ErrBroken)
	}
	return err
}

// Empty says whether nothing begins at the beginning of a partition.
func Empty(d Device) (bool, error) {
	b := make([]byte, min(64<<10, d.Size()))
	if _, err := d.Reread(b, 0); err != nil {
		return false, fmt.Errorf("disk: look at a partition: %w", err)
	}
	return len(bytes.Trim(b, "\x00")) == 0, nil
}
