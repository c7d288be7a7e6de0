package data

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/muster-edge/muster/fleet"
)

// HeadSize is how much of the partition Inspect looks at.
const HeadSize = 4 << 20

// Names in the superblocks. LUKS has room for a second text, in which the
// node's ID is: it takes the place of makingText when everything is made.
const (
	label      = "muster-data"
	makingText = "muster-making"
	// plainMaking is the label of a plain file system that is being made.
	plainMaking = "muster-making"
)

// Kind is what is on the partition.
type Kind uint8

const (
	// Blank: nothing but zeros.
	Blank Kind = iota
	// Half: ours, begun and never finished.
	Half
	// Sealed: ours, encrypted.
	Sealed
	// Plain: ours, not encrypted.
	Plain
	// Foreign: something else.
	Foreign
	numKinds
)

var kindNames = [numKinds]string{"blank", "half-made", "encrypted", "plain", "foreign"}

// String returns the kind in a word.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Found is what Inspect found.
type Found struct {
	Kind Kind
	// Owner is the node that made an encrypted one.
	Owner fleet.NodeID
	// What a foreign one looks like, for people.
	What string
}

// Inspect reads the first bytes of the partition. They are hostile.
func Inspect(head []byte) Found {
	if l, s, ok := luks(head); ok {
		switch {
		case l != label:
			return Found{Kind: Foreign, What: "an encrypted volume that muster did not make"}
		case s == makingText:
			return Found{Kind: Half}
		case fleet.NodeID(s).Validate() != nil:
			return Found{Kind: Foreign, What: "an encrypted volume that names no node"}
		}
		return Found{Kind: Sealed, Owner: fleet.NodeID(s)}
	}
	if l, ok := ext4(head); ok {
		switch l {
		case label:
			return Found{Kind: Plain}
		case plainMaking:
			return Found{Kind: Half}
		}
		return Found{Kind: Foreign, What: "a file system that muster did not make"}
	}
	if len(bytes.Trim(head, "\x00")) == 0 {
		return Found{Kind: Blank}
	}
	return Found{Kind: Foreign, What: "something that is neither empty nor known"}
}

// luks reads label and subsystem of a LUKS2 header ("LUKS2 On-Disk Format
// Specification", 2.1). A header whose first copy is torn has its second one at
// one of a few offsets.
func luks(b []byte) (name, subsystem string, ok bool) {
	for i, off := range []int{0, 0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000} {
		magic := "LUKS\xba\xbe"
		if i > 0 {
			magic = "SKUL\xba\xbe"
		}
		if len(b) < off+512 || string(b[off:off+6]) != magic || binary.BigEndian.Uint16(b[off+6:]) != 2 {
			continue
		}
		return cstring(b[off+24 : off+72]), cstring(b[off+208 : off+256]), true
	}
	return "", "", false
}

// ext4 reads the label of an ext2, ext3 or ext4 file system.
func ext4(b []byte) (name string, ok bool) {
	const super = 1024
	if len(b) < super+136 || binary.LittleEndian.Uint16(b[super+56:]) != 0xef53 {
		return "", false
	}
	return cstring(b[super+120 : super+136]), true
}

func cstring(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// What is to be done.
type What uint8

const (
	// Refuse touches nothing.
	Refuse What = iota
	// Make makes it, whatever is there.
	Make
	// Unlock opens the encrypted one.
	Unlock
	// Mount mounts the plain one.
	Mount
	numWhats
)

var whatNames = [numWhats]string{"refuse", "make", "unlock", "mount"}

// String returns it in a word.
func (w What) String() string {
	if int(w) < len(whatNames) {
		return whatNames[w]
	}
	return fmt.Sprintf("what(%d)", uint8(w))
}

// Decide says what to do with the partition of node self. begun: there is a
// mark on the ESP that this node has begun to make this very partition.
func Decide(f Found, self fleet.NodeID, begun bool) (What, string) {
	switch f.Kind {
	case Blank:
		return Make, "The data partition is empty; I make it."
	case Half:
		return Make, "The data partition was begun and never finished; nothing was ever stored in it. I make it anew."
	case Sealed:
		if f.Owner != self {
			return Refuse, fmt.Sprintf("The data partition belongs to node %s, and this is %s. To use this disk here, order an install without keeping its data.", f.Owner, self)
		}
		return Unlock, "The data partition is this node's."
	case Plain:
		return Mount, "The data partition is not encrypted."
	}
	if begun {
		// A cut in the middle of writing the first header leaves neither zeros
		// nor a header.
		return Make, "I had begun to make the data partition, and nothing was ever stored in it. I make it anew."
	}
	return Refuse, "The data partition holds " + f.What + ". I do not touch it. If nobody needs it, order an install without keeping its data."
}
