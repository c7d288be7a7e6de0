package firmware

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Digest is a SHA-256 digest or a value of a PCR in the SHA-256 bank. In text
// and JSON it is 64 lower-case hex digits.
type Digest [sha256.Size]byte

// String returns 64 lower-case hex digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether d is all zero: no digest has this value, and a PCR
// has it only when nothing was measured.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. Upper-case digits are
// refused, so that a digest has one spelling only.
func (d *Digest) UnmarshalText(b []byte) error {
	var v Digest
	if len(b) != hex.EncodedLen(len(v)) {
		return fmt.Errorf("firmware: read digest: want 64 hex digits, got %d characters", len(b))
	}
	if _, err := hex.Decode(v[:], b); err != nil {
		return fmt.Errorf("firmware: read digest: %w", err)
	}
	if v.String() != string(b) {
		return fmt.Errorf("firmware: read digest: want lower-case hex digits")
	}
	*d = v
	return nil
}

// Extend returns the value of a PCR after digest was extended into it (TCG
// TPM 2.0 Library, part 1, "PCR extend"): SHA-256(old || digest).
func Extend(pcr, digest Digest) Digest {
	var b [2 * sha256.Size]byte
	copy(b[:], pcr[:])
	copy(b[sha256.Size:], digest[:])
	return sha256.Sum256(b[:])
}

// Section names of a unified kernel image (UAPI "Unified Kernel Image").
const (
	SectionLinux   = ".linux"
	SectionOSRel   = ".osrel"
	SectionCmdline = ".cmdline"
	SectionInitrd  = ".initrd"
	SectionSplash  = ".splash"
	SectionDTB     = ".dtb"
	SectionPCRSig  = ".pcrsig"
	SectionPCRPKey = ".pcrpkey"
)

// measuredSections is the order in which the stub of systemd 252 measures the
// sections of its own image into PCR 11, whatever their order in the file.
// .pcrsig is left out there, because it holds signatures over the result.
// Later stubs know more sections (.uname, .ucode, ...): a stub of another
// version needs its own list and a new run of the measured boot test.
var measuredSections = [...]string{
	SectionLinux, SectionOSRel, SectionCmdline, SectionInitrd, SectionSplash, SectionDTB, SectionPCRPKey,
}

// SectionDigest is the SHA-256 of one section's bytes (its virtual size, not
// the padding on disk).
type SectionDigest struct {
	Name   string `json:"name"`
	SHA256 Digest `json:"sha256"`
}

// MeasureSections picks the sections that the stub measures, hashes them, and
// returns them in the order of measurement.
func MeasureSections(sections map[string][]byte) []SectionDigest {
	var out []SectionDigest
	for _, name := range measuredSections {
		// The stub skips a section of size zero as if it were absent.
		if data := sections[name]; len(data) > 0 {
			out = append(out, SectionDigest{Name: name, SHA256: sha256.Sum256(data)})
		}
	}
	return out
}

// PCR11 returns the value of PCR 11 in the SHA-256 bank after the stub of
// systemd 252 measured the sections: for each, first the name with its
// trailing NUL, then the bytes. It holds until something in the running
// system extends PCR 11 again; recovery never does. The sections must be
// distinct and in the order of measurement, as MeasureSections returns them.
func PCR11(sections []SectionDigest) (Digest, error) {
	var pcr Digest
	next := 0
	for _, s := range sections {
		for next < len(measuredSections) && measuredSections[next] != s.Name {
			next++
		}
		if next == len(measuredSections) {
			return Digest{}, fmt.Errorf("firmware: compute PCR 11: section %.20q is unknown, repeated or out of order", s.Name)
		}
		next++
		pcr = Extend(pcr, sha256.Sum256(append([]byte(s.Name), 0)))
		pcr = Extend(pcr, s.SHA256)
	}
	return pcr, nil
}
