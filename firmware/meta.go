package firmware

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// The meta partition holds what must be known before and beside the encrypted
// data: the slots, the update under way, what failed. Nothing in it is secret,
// and everybody with a screwdriver can write it, so that it may steer only
// among things that are signed.
//
// The record lies twice, in two areas, written in turn. A copy is
//
//	0   8  "MUSTERM1"
//	8   8  sequence, big-endian
//	16  4  length of the object, big-endian
//	20  32 SHA-256 over bytes 0 to 20 and the object
//	52     the object, JSON; zeros to a multiple of MetaSector
//
// A power cut tears at most the copy being written; the other one is the truth
// of a moment before.
const (
	// MetaArea is the size of one area, and where the second one begins.
	MetaArea = 1 << 20
	// MetaSector is what a copy's length is a multiple of: the largest sector
	// that disks have.
	MetaSector = 4096
	// MaxMeta bounds a copy.
	MaxMeta = 128 << 10

	metaMagic  = "MUSTERM1"
	metaStem   = "MUSTERM"
	metaHeader = 52

	// MaxFailed is how many failed images are remembered.
	MaxFailed = 16
	maxReason = 500
)

var (
	// ErrMetaBlank: nobody has written a record yet.
	ErrMetaBlank = errors.New("firmware: no record on the meta partition")
	// ErrMetaDamaged: something is there, and it cannot be read.
	ErrMetaDamaged = errors.New("firmware: the record on the meta partition is damaged")
)

// Meta is the record.
type Meta struct {
	// Seq counts writes.
	Seq uint64 `json:"-"`
	// Node is who installed this disk; another TPM is another node.
	Node  fleet.NodeID `json:"node"`
	Slots [2]Slot      `json:"slots"`
	// Update is the journal of what is being written; nil: nothing.
	Update *SlotUpdate `json:"update,omitempty"`
	// Failed are images that were judged and found bad, newest last. None is
	// tried again before an order clears it.
	Failed []FailedImage `json:"failed,omitempty"`
	// Starts counts starts of a system since one was last found healthy: the
	// second guard beside the loader's counter, which a read-only ESP stops.
	Starts int `json:"starts"`
	// Floor is the latest time that was known to be true.
	Floor time.Time `json:"floor,omitzero"`
	// Installed is the ID of the install order that was carried out last.
	Installed string `json:"installed,omitempty"`
	// Recovery says why the next start is to be recovery; "" if it is not.
	Recovery string `json:"recovery,omitempty"`
}

// Slot is what is known of one slot.
type Slot struct {
	State SlotState `json:"state"`
	// Image is the SHA-256 of the UKI (fleet.ImageRef), Name and Version what people
	// call it. Empty when nothing was written.
	Image   Digest `json:"image,omitzero"`
	Name    string `json:"name,omitempty"`
	Version string `json:"version,omitempty"`
	// Entry is the boot file's name below EFI/Linux without counter.
	Entry string `json:"entry,omitempty"`
	// K3s and Etcd are the manifest's minors, for points of no return.
	K3s  string `json:"k3s,omitempty"`
	Etcd string `json:"etcd,omitempty"`
	// Rounds counts how often all tries were spent without a verdict.
	Rounds int `json:"rounds,omitempty"`
	// Reason says why the slot is bad.
	Reason string `json:"reason,omitempty"`
}

// SlotUpdate is how far a write of a slot is.
type SlotUpdate struct {
	Slot  SlotID `json:"slot"`
	Image Digest `json:"image"`
	// Order is the ID of what asked for it, "" for the stack's version.
	Order string `json:"order,omitempty"`
	// Verified is how many bytes of the image, from its start, were written,
	// read back and found right.
	Verified int64 `json:"verified"`
	// Downgrade: the image is older than the one that runs.
	Downgrade bool `json:"downgrade,omitempty"`
}

// FailedImage is one that did not work on this box.
type FailedImage struct {
	Image   Digest    `json:"image"`
	Version string    `json:"version"`
	Reason  string    `json:"reason"`
	At      time.Time `json:"at,omitzero"`
}

// HasFailed reports whether image was judged bad, and why.
func (m Meta) HasFailed(image Digest) (FailedImage, bool) {
	for _, f := range m.Failed {
		if f.Image == image {
			return f, true
		}
	}
	return FailedImage{}, false
}

// WithFailed returns m with one more failed image; the oldest goes when there
// are too many.
func (m Meta) WithFailed(f FailedImage) Meta {
	out := []FailedImage{}
	for _, x := range m.Failed {
		if x.Image != f.Image {
			out = append(out, x)
		}
	}
	out = append(out, f)
	m.Failed = out[max(0, len(out)-MaxFailed):]
	return m
}

// WithoutFailed returns m with image forgotten; a zero image forgets all.
func (m Meta) WithoutFailed(image Digest) Meta {
	var out []FailedImage
	for _, x := range m.Failed {
		if !image.IsZero() && x.Image != image {
			out = append(out, x)
		}
	}
	m.Failed = out
	return m
}

// Area is where the copy with this sequence goes, in bytes.
func (m Meta) Area() int64 { return int64(m.Seq%2) * MetaArea }

// Validate reports all problems.
func (m Meta) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("firmware: meta: "+format, a...)) }
	if m.Node != "" {
		if err := m.Node.Validate(); err != nil {
			bad("%w", err)
		}
	}
	for i, s := range m.Slots {
		if s.State >= numSlotStates {
			bad("slot %s: no such state %d", SlotID(i), s.State)
		}
		for what, text := range map[string]string{"name": s.Name, "version": s.Version, "entry": s.Entry, "k3s": s.K3s, "etcd": s.Etcd} {
			if len(text) > maxNameBytes {
				bad("slot %s: %s has %d bytes, at most %d", SlotID(i), what, len(text), maxNameBytes)
			}
		}
		if s.Rounds < 0 {
			bad("slot %s: %d rounds", SlotID(i), s.Rounds)
		}
		if len(s.Reason) > maxReason {
			bad("slot %s: reason has %d bytes, at most %d", SlotID(i), len(s.Reason), maxReason)
		}
		if started := s.State >= SlotStaged; started && (s.Image.IsZero() || s.Entry == "") {
			bad("slot %s is %s and names no image or boot file", SlotID(i), s.State)
		}
	}
	if u := m.Update; u != nil {
		if u.Slot > SlotB {
			bad("update of a slot %d", u.Slot)
		} else if m.Slots[u.Slot].State != SlotWriting {
			bad("update of slot %s, which is %s", u.Slot, m.Slots[u.Slot].State)
		}
		if u.Verified < 0 || u.Verified > maxImageBytes {
			bad("update: %d bytes verified", u.Verified)
		}
		if len(u.Order) > maxNameBytes {
			bad("update: the order's name has %d bytes", len(u.Order))
		}
	}
	if len(m.Failed) > MaxFailed {
		bad("%d failed images, at most %d", len(m.Failed), MaxFailed)
	}
	for _, f := range m.Failed {
		if len(f.Reason) > maxReason || len(f.Version) > maxNameBytes {
			bad("a failed image has too long a text")
		}
	}
	if m.Starts < 0 {
		bad("%d starts", m.Starts)
	}
	if len(m.Installed) > maxNameBytes {
		bad("the install order's name has %d bytes", len(m.Installed))
	}
	if len(m.Recovery) > maxReason {
		bad("recovery: %d bytes, at most %d", len(m.Recovery), maxReason)
	}
	return errors.Join(errs...)
}

// Encode returns the copy to be written at Area.
func (m Meta) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	body, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("firmware: write meta: %w", err)
	}
	n := (metaHeader + len(body) + MetaSector - 1) / MetaSector * MetaSector
	if n > MaxMeta {
		return nil, fmt.Errorf("firmware: write meta: %d bytes, at most %d", n, MaxMeta)
	}
	out := make([]byte, n)
	copy(out, metaMagic)
	binary.BigEndian.PutUint64(out[8:], m.Seq)
	binary.BigEndian.PutUint32(out[16:], uint32(len(body)))
	copy(out[metaHeader:], body)
	sum := metaSum(out[:20], body)
	copy(out[20:], sum[:])
	return out, nil
}

func metaSum(head, body []byte) Digest {
	return sha256.Sum256(append(bytes.Clone(head), body...))
}

// DecodeMeta reads the record from the beginnings of the two areas (MaxMeta
// bytes each). The newer whole copy counts.
func DecodeMeta(first, second []byte) (Meta, error) {
	a, errA := decodeCopy(first)
	b, errB := decodeCopy(second)
	switch {
	case errA == nil && (errB != nil || a.Seq > b.Seq):
		return a, nil
	case errB == nil:
		return b, nil
	case errors.Is(errA, ErrMetaBlank) && errors.Is(errB, ErrMetaBlank):
		return Meta{}, ErrMetaBlank
	}
	return Meta{}, fmt.Errorf("%w (first copy: %v; second copy: %v)", ErrMetaDamaged, errA, errB)
}

func decodeCopy(b []byte) (Meta, error) {
	if len(b) >= 8 && len(bytes.Trim(b[:min(len(b), MetaSector)], "\x00")) == 0 {
		return Meta{}, ErrMetaBlank
	}
	if len(b) < metaHeader || string(b[:len(metaStem)]) != metaStem {
		return Meta{}, errors.New("it does not begin as one")
	}
	n := int(binary.BigEndian.Uint32(b[16:]))
	if n > MaxMeta-metaHeader || metaHeader+n > len(b) {
		return Meta{}, fmt.Errorf("it says that it has %d bytes", n)
	}
	body := b[metaHeader : metaHeader+n]
	if metaSum(b[:20], body) != Digest(b[20:metaHeader]) {
		return Meta{}, errors.New("its checksum is wrong")
	}
	if string(b[:8]) != metaMagic {
		return Meta{}, fmt.Errorf("its form is %q, this program knows %q", b[:8], metaMagic)
	}
	d := json.NewDecoder(bytes.NewReader(body))
	// A program that does not know a field would drop it with its next write.
	d.DisallowUnknownFields()
	m := Meta{}
	if err := d.Decode(&m); err != nil {
		return Meta{}, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Meta{}, errors.New("something follows the object")
	}
	m.Seq = binary.BigEndian.Uint64(b[8:])
	if err := m.Validate(); err != nil {
		return Meta{}, err
	}
	return m, nil
}
