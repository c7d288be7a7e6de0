package firmware

import (
	"fmt"
	"strings"
)

// Types of partitions (UEFI 2.10, 5.3.3; UAPI "Discoverable Partitions").
const (
	TypeESP         = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	TypeRootAMD64   = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
	TypeVerityAMD64 = "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"
	TypeRootARM64   = "b921b045-1df0-41c3-af44-4c6f280d3fae"
	TypeVerityARM64 = "df3300ce-d69f-4c92-978c-9bfb0f38d820"
	TypeLinuxData   = "0fc63daf-8483-4772-8e79-3d69d8477de4"
	typeUnknown     = "no such partition"
)

// Labels of partitions. They say which is which among the partitions of one
// disk; which disk is ours, they do not say.
const (
	LabelESP     = "ESP"
	LabelRootA   = "root-a"
	LabelVerityA = "root-a-verity"
	LabelRootB   = "root-b"
	LabelVerityB = "root-b-verity"
	LabelMeta    = "meta"
	LabelData    = "data"
)

// Sizes in bytes. They are the same on all disks, so that an image that was
// built fits everywhere; data takes what is left.
const (
	SizeESP    = 1 << 30
	SizeRoot   = 2 << 30
	SizeVerity = 64 << 20
	SizeMeta   = 64 << 20
	// MinData is the least that data must get: k3s, its images and the logs of
	// a small site.
	MinData = 2 << 30
	// PartitionAlign is what starts and sizes are a multiple of.
	PartitionAlign = 1 << 20
)

// Attributes of a partition: bits of the GPT.
const (
	// AttrReadOnly and AttrNoAuto are those of Discoverable Partitions. A slot
	// is named by the UUIDs of its content, in the signed command line; nothing
	// may pick one by itself.
	AttrReadOnly = uint64(1) << 60
	AttrNoAuto   = uint64(1) << 63
)

// Partition is one entry of the GPT that we write. Its own GUID is chosen by
// who writes it.
type Partition struct {
	// Number counts from 1.
	Number int
	Label  string
	// Type is a GUID in lower-case text.
	Type string
	// Start and Size are in bytes.
	Start, Size int64
	Attributes  uint64
}

// RootLabels returns the labels of a slot's two partitions.
func RootLabels(s SlotID) (root, verity string) {
	if s == SlotA {
		return LabelRootA, LabelVerityA
	}
	return LabelRootB, LabelVerityB
}

// MinDisk is the size of the smallest disk that Layout takes, in bytes.
const MinDisk = PartitionAlign + SizeESP + 2*(SizeRoot+SizeVerity) + SizeMeta + MinData + PartitionAlign

// Layout returns the partitions of a disk for amd64 in the order of their
// place. sectorSize is the disk's logical sector, 512 or 4096 bytes.
func Layout(diskSize, sectorSize int64) ([]Partition, error) {
	return LayoutFor("amd64", diskSize, sectorSize)
}

// LayoutFor is Layout for an architecture (Go's name).
func LayoutFor(arch string, diskSize, sectorSize int64) ([]Partition, error) {
	root, verity := rootTypes(arch)
	switch {
	case root == typeUnknown:
		return nil, fmt.Errorf("firmware: lay out disk: architecture %.40q is neither amd64 nor arm64", arch)
	case sectorSize != 512 && sectorSize != 4096:
		return nil, fmt.Errorf("firmware: lay out disk: sectors of %d bytes, want 512 or 4096", sectorSize)
	case diskSize < MinDisk:
		return nil, fmt.Errorf("firmware: lay out disk: the disk has %d MB, and a node needs %d MB: choose a larger one", max(diskSize, 0)/1e6, int64(MinDisk)/1e6)
	}
	slot := AttrReadOnly | AttrNoAuto
	parts := []Partition{
		{Label: LabelESP, Type: TypeESP, Size: SizeESP},
		{Label: LabelRootA, Type: root, Size: SizeRoot, Attributes: slot},
		{Label: LabelVerityA, Type: verity, Size: SizeVerity, Attributes: slot},
		{Label: LabelRootB, Type: root, Size: SizeRoot, Attributes: slot},
		{Label: LabelVerityB, Type: verity, Size: SizeVerity, Attributes: slot},
		{Label: LabelMeta, Type: TypeLinuxData, Size: SizeMeta, Attributes: AttrNoAuto},
		{Label: LabelData, Type: TypeLinuxData, Attributes: AttrNoAuto},
	}
	// The last MiB holds the second GPT: 16 KiB of entries and a sector.
	end := (diskSize/PartitionAlign - 1) * PartitionAlign
	at := int64(PartitionAlign)
	for i := range parts {
		parts[i].Number, parts[i].Start = i+1, at
		if parts[i].Label == LabelData {
			parts[i].Size = end - at
		}
		at += parts[i].Size
	}
	return parts, nil
}

func rootTypes(arch string) (root, verity string) {
	switch strings.ToLower(arch) {
	case "amd64":
		return TypeRootAMD64, TypeVerityAMD64
	case "arm64":
		return TypeRootARM64, TypeVerityARM64
	}
	return typeUnknown, typeUnknown
}

// CheckLayout says whether found, the partitions of a disk in the order of
// their numbers, are those that Layout gives for a disk of this size. A disk
// of our making that was grown since is recognised too: data may be smaller
// than there would be room for.
func CheckLayout(found []Partition, diskSize, sectorSize int64) error {
	want, err := Layout(diskSize, sectorSize)
	if err != nil {
		return err
	}
	if len(found) != len(want) {
		return fmt.Errorf("firmware: check disk: it has %d partitions, want %d", len(found), len(want))
	}
	for i, w := range want {
		f := found[i]
		same := f.Number == w.Number && f.Label == w.Label && strings.EqualFold(f.Type, w.Type) && f.Start == w.Start
		if w.Label == LabelData {
			same = same && f.Size >= MinData && f.Size <= w.Size
		} else {
			same = same && f.Size == w.Size
		}
		if !same {
			return fmt.Errorf("firmware: check disk: partition %d is %.40q of %d MB at %d, want %q of %d MB at %d", i+1, f.Label, f.Size/1e6, f.Start, w.Label, w.Size/1e6, w.Start)
		}
	}
	return nil
}
