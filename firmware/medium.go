package firmware

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
)

// MediumIDs are the numbers that make a stick or disk with an image one of its
// own.
type MediumIDs struct {
	Disk, Partition GUID
	// Serial is that of the file system.
	Serial uint32
}

// MediumOf derives them from the image's digest, so that the same image gives
// the same medium, two sticks with different images are never taken for one
// another, and whoever holds image and partition can tell that they belong
// together.
func MediumOf(sum Digest) MediumIDs {
	derive := func(role string) [32]byte {
		return sha256.Sum256(append([]byte("muster/medium/v1/"+role+"\x00"), sum[:]...))
	}
	// Version 8 is for UUIDs made by a rule of one's own (RFC 9562, 5.8).
	guid := func(role string) (id GUID) {
		h := derive(role)
		copy(id[:], h[:])
		id[6] = id[6]&0x0f | 0x80
		id[8] = id[8]&0x3f | 0x80
		// From the order in which people write the bytes to that of a table.
		slices.Reverse(id[:4])
		slices.Reverse(id[4:6])
		slices.Reverse(id[6:8])
		return id
	}
	serial := derive("serial")
	return MediumIDs{guid("disk"), guid("partition"), binary.BigEndian.Uint32(serial[:])}
}
