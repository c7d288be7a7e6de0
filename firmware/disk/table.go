package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/google/uuid"

	"github.com/muster-edge/muster/firmware"
)

// Entry is a partition that is on a disk, with its own GUID.
type Entry struct {
	firmware.Partition
	ID firmware.GUID
}

// Ref is what a boot entry of the firmware says of it.
func (e Entry) Ref(sector int64) firmware.PartRef {
	return firmware.PartRef{Number: uint32(e.Number), Start: uint64(e.Start / sector), Sectors: uint64(e.Size / sector), ID: e.ID}
}

// wipeSize is zeroed at the beginning and the end of the disk and of each
// partition: signatures of file systems, volume managers and arrays are there.
const wipeSize = 1 << 20

// maxEntries bounds a table that is read.
const maxEntries = 128

// ReadTable returns the partitions of d in the order of their numbers. A table
// of which only the second copy is whole counts.
func ReadTable(d Device) (out []Entry, err error) {
	defer func() {
		// The library was written for tables that it wrote itself.
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("disk: read partition table: it makes no sense (%v)", r)
		}
	}()
	t, err := gpt.Read(&storage{d: d}, int(d.Sector()), int(d.Sector()))
	if err != nil {
		return nil, fmt.Errorf("disk: read partition table: %w", err)
	}
	for i, p := range t.Partitions {
		if p == nil || p.Type == gpt.Unused || len(out) == maxEntries {
			continue
		}
		id, err := firmware.ParseGUID(p.GUID)
		if err != nil {
			return nil, err
		}
		sector := uint64(d.Sector())
		if p.End < p.Start || p.End >= uint64(d.Size())/sector {
			return nil, fmt.Errorf("disk: read partition table: partition %d lies outside of the disk", i+1)
		}
		n := p.Index
		if n == 0 {
			n = i + 1
		}
		out = append(out, Entry{ID: id, Partition: firmware.Partition{Number: n, Label: strings.TrimRight(p.Name, "\x00"),
			Type: strings.ToLower(string(p.Type)), Start: int64(p.Start * sector), Size: int64((p.End - p.Start + 1) * sector), Attributes: p.Attributes}})
	}
	return out, nil
}

// Find returns the partition with the label.
func Find(table []Entry, label string) (Entry, error) {
	for _, e := range table {
		if e.Label == label {
			return e, nil
		}
	}
	return Entry{}, fmt.Errorf("disk: there is no partition %q", label)
}

// Part returns the partition with the label as a device.
func Part(d Device, table []Entry, label string) (Section, error) {
	e, err := Find(table, label)
	if err != nil {
		return Section{}, err
	}
	return Sub(d, e.Start, e.Size)
}

// WriteTable empties the disk's signatures and writes a new table with parts
// and with new GUIDs: the copy at the end first, so that no moment has half a
// table that counts. What was on the disk is gone.
func WriteTable(d Device, parts []firmware.Partition) ([]Entry, error) {
	// The old table goes first: a disk with an old table over new partitions
	// would be read wrongly.
	if err := zero(d, 0, wipeSize); err != nil {
		return nil, err
	}
	if err := zero(d, d.Size()-wipeSize, wipeSize); err != nil {
		return nil, err
	}
	for _, p := range parts {
		if err := zero(d, p.Start, wipeSize); err != nil {
			return nil, err
		}
		if err := zero(d, p.Start+p.Size-wipeSize, wipeSize); err != nil {
			return nil, err
		}
	}
	if err := d.Sync(); err != nil {
		return nil, fmt.Errorf("disk: wipe: %w", err)
	}
	sector := d.Sector()
	t := gpt.Table{LogicalSectorSize: int(sector), PhysicalSectorSize: int(sector), ProtectiveMBR: true, GUID: uuid.NewString()}
	for _, p := range parts {
		t.Partitions = append(t.Partitions, &gpt.Partition{
			Index: p.Number, Start: uint64(p.Start / sector), End: uint64((p.Start+p.Size)/sector - 1), Size: uint64(p.Size),
			Type: gpt.Type(strings.ToUpper(p.Type)), Name: p.Label, GUID: strings.ToUpper(uuid.NewString()), Attributes: p.Attributes,
		})
	}
	if err := t.Write(&storage{d: d}, d.Size()); err != nil {
		return nil, fmt.Errorf("disk: write partition table: %w", err)
	}
	if err := d.Sync(); err != nil {
		return nil, fmt.Errorf("disk: write partition table: %w", err)
	}
	got, err := ReadTable(fresh{d})
	if err != nil {
		return nil, err
	}
	if len(got) != len(parts) {
		return nil, fmt.Errorf("disk: write partition table: %d partitions were written, %d are there", len(parts), len(got))
	}
	for i, p := range parts {
		if got[i].Partition != p {
			return nil, fmt.Errorf("disk: write partition table: partition %d reads back as %+v, want %+v", p.Number, got[i].Partition, p)
		}
	}
	return got, nil
}

// Wipe makes a disk of ours one that nothing starts from and nothing mounts:
// the beginnings and ends of its partitions go, and the table last.
func Wipe(d Device) error {
	if table, err := ReadTable(d); err == nil {
		for _, p := range table {
			n := min(p.Size, wipeSize)
			if err := errors.Join(zero(d, p.Start, n), zero(d, p.Start+p.Size-n, n)); err != nil {
				return err
			}
		}
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("disk: wipe: %w", err)
	}
	if err := errors.Join(zero(d, d.Size()-wipeSize, wipeSize), zero(d, 0, wipeSize)); err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("disk: wipe: %w", err)
	}
	return nil
}

func zero(d Device, off, n int64) error {
	if _, err := d.WriteAt(make([]byte, n), off); err != nil {
		return fmt.Errorf("disk: wipe %d bytes at %d: %w", n, off, err)
	}
	return nil
}

// fatHead is what a new FAT of 1 GiB has before its first free cluster, and
// more: zeroed, so that nothing old shows through.
const fatHead = 8 << 20

// FormatESP makes an empty FAT32.
func FormatESP(d Device) error {
	if err := zero(d, 0, min(fatHead, d.Size())); err != nil {
		return err
	}
	f, err := fat32.Create(&storage{d: d}, d.Size(), 0, d.Sector(), "MUSTER", false)
	if err != nil {
		return fmt.Errorf("disk: make FAT: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("disk: make FAT: %w", err)
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("disk: make FAT: %w", err)
	}
	if _, err := fat32.Read(&storage{d: fresh{d}}, d.Size(), 0, d.Sector()); err != nil {
		return fmt.Errorf("disk: read back the new FAT: %w", err)
	}
	return nil
}

// fresh reads from the medium always.
type fresh struct{ Device }

func (f fresh) ReadAt(b []byte, off int64) (int, error) { return f.Reread(b, off) }

// storage is a Device as go-diskfs wants to see one.
type storage struct {
	d  Device
	at int64
}

var _ backend.Storage = (*storage)(nil)

// Storage is d for go-diskfs.
func Storage(d Device) backend.Storage { return &storage{d: d} }

func (s *storage) ReadAt(b []byte, off int64) (int, error) {
	if off >= s.d.Size() {
		return 0, io.EOF
	}
	n := min(int64(len(b)), s.d.Size()-off)
	got, err := s.d.ReadAt(b[:n], off)
	if err == nil && got < len(b) {
		err = io.EOF
	}
	return got, err
}

func (s *storage) Read(b []byte) (int, error) {
	n, err := s.ReadAt(b, s.at)
	s.at += int64(n)
	return n, err
}

func (s *storage) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += s.at
	case io.SeekEnd:
		off += s.d.Size()
	}
	if off < 0 {
		return 0, errors.New("disk: seek before the beginning")
	}
	s.at = off
	return off, nil
}

func (s *storage) WriteAt(b []byte, off int64) (int, error) { return s.d.WriteAt(b, off) }
func (s *storage) Sync() error                              { return s.d.Sync() }
func (s *storage) Close() error                             { return nil }
func (s *storage) Path() string                             { return "" }
func (s *storage) Sys() (*os.File, error)                   { return nil, backend.ErrNotSuitable }
func (s *storage) Writable() (backend.WritableFile, error)  { return s, nil }
func (s *storage) Stat() (fs.FileInfo, error)               { return info{s.d.Size()}, nil }

type info struct{ size int64 }

func (info) Name() string       { return "disk" }
func (i info) Size() int64      { return i.size }
func (info) Mode() fs.FileMode  { return 0o600 }
func (info) ModTime() time.Time { return time.Time{} }
func (info) IsDir() bool        { return false }
func (info) Sys() any           { return nil }
