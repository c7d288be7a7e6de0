package host

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unicode/utf16"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Event types of TCG PC Client Platform Firmware Profile, table 27.
const (
	evNoAction    = 0x3
	evSeparator   = 0x4
	evVersion     = 0x8
	evIPL         = 0xd
	evVariable    = 0x80000001
	evApplication = 0x80000003
	evAction      = 0x80000007
)

// Event is one measurement of the boot.
type Event struct {
	PCR    int
	Type   uint32
	Digest [32]byte
	Data   []byte
}

// Image is an operating system that nodes boot: a manifest whose files do not
// exist, since nothing here runs firmware.
type Image struct{ firmware.Manifest }

// NewImage makes up an image of a name and version.
func NewImage(name, version string) Image {
	digest := func(what string) firmware.Digest {
		return sha256.Sum256([]byte("muster lab image " + name + " " + version + " " + what))
	}
	sections := []firmware.SectionDigest{
		{Name: firmware.SectionLinux, SHA256: digest("linux")},
		{Name: firmware.SectionOSRel, SHA256: digest("osrel")},
		{Name: firmware.SectionCmdline, SHA256: digest("cmdline")},
		{Name: firmware.SectionInitrd, SHA256: digest("initrd")},
	}
	pcr11, err := firmware.PCR11(sections)
	if err != nil {
		panic(err) // the sections are constant and in order
	}
	return Image{firmware.Manifest{
		Format: firmware.ManifestFormat, Name: name, Version: version, Kind: fleet.ImageSlot, Arch: "amd64",
		File: name + ".efi", SHA256: digest("file"), Size: 1,
		Slot: &firmware.SlotImage{
			Root:       firmware.File{File: name + ".root", Size: 4096, SHA256: digest("root")},
			Verity:     firmware.File{File: name + ".verity", Size: 4096, SHA256: digest("verity")},
			Loader:     firmware.File{File: name + ".loader.efi", Size: 1, SHA256: digest("loader")},
			RootHash:   digest("root hash"),
			RootUUID:   "00000000-0000-4000-8000-00000000000a",
			VerityUUID: "00000000-0000-4000-8000-00000000000b",
			ChunkSize:  firmware.ChunkSize,
			Chunks:     []firmware.Digest{digest("root")},
		},
		Measurements: firmware.Measurements{Loader: digest("loader code"), Authenticode: digest("authenticode"), Kernel: digest("kernel"), PCR11: pcr11, Sections: sections},
		Created:      time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}}
}

// Write writes the signed manifest into dir, as the build does.
func (i Image) Write(dir string, release crypto.Signer) error {
	payload, err := i.JSON()
	if err != nil {
		return fmt.Errorf("host: write image: %w", err)
	}
	envelope, err := statement.Sign(firmware.ManifestType, payload, release)
	if err != nil {
		return fmt.Errorf("host: write image: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("host: write image: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "manifest.dsse.json"), envelope.JSON(), 0o644); err != nil {
		return fmt.Errorf("host: write image: %w", err)
	}
	return nil
}

// Boot returns what firmware with Secure Boot off and the stub of systemd 252
// measure while they start the image.
func (i Image) Boot() []Event {
	events := []Event{
		data(0, evVersion, []byte("muster lab firmware 1\x00")),
		data(7, evVariable, variable("SecureBoot", []byte{0})),
		data(4, evAction, []byte("Calling EFI Application from Boot Option")),
	}
	for pcr := range 8 {
		events = append(events, data(pcr, evSeparator, []byte{0, 0, 0, 0}))
	}
	events = append(events,
		Event{4, evApplication, i.Measurements.Loader, []byte("systemd-boot")},
		Event{4, evApplication, i.Measurements.Authenticode, []byte(i.File)},
		Event{4, evApplication, i.Measurements.Kernel, []byte("kernel")},
	)
	for _, s := range i.Measurements.Sections {
		events = append(events, data(11, evIPL, append([]byte(s.Name), 0)), Event{11, evIPL, s.SHA256, []byte(s.Name)})
	}
	return events
}

func data(pcr int, kind uint32, b []byte) Event { return Event{pcr, kind, sha256.Sum256(b), b} }

// variable is UEFI_VARIABLE_DATA of a global EFI variable.
func variable(name string, value []byte) []byte {
	b := []byte{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	text := utf16.Encode([]rune(name))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(text)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	for _, u := range text {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return append(b, value...)
}

// EventLog writes events as firmware does: a header in the old form, then the
// events in the crypto-agile form with a SHA-256 bank (TCG PC Client Platform
// Firmware Profile §10.2).
func EventLog(events []Event) []byte {
	spec := bytes.NewBuffer(append([]byte("Spec ID Event03"), 0))
	le := binary.LittleEndian
	spec.Write(le.AppendUint32(nil, 0))      // platform class: client
	spec.Write([]byte{0, 2, 0, 2})           // version 2.0, errata 0, UINTN of 8 bytes
	spec.Write(le.AppendUint32(nil, 1))      // one bank
	spec.Write(le.AppendUint16(nil, 0x000b)) // SHA-256
	spec.Write(le.AppendUint16(nil, sha256.Size))
	spec.WriteByte(0) // no vendor's words

	var out []byte
	out = le.AppendUint32(out, 0)
	out = le.AppendUint32(out, evNoAction)
	out = append(out, make([]byte, 20)...) // the SHA-1 of a header is zero
	out = le.AppendUint32(out, uint32(spec.Len()))
	out = append(out, spec.Bytes()...)
	for _, e := range events {
		out = le.AppendUint32(out, uint32(e.PCR))
		out = le.AppendUint32(out, e.Type)
		out = le.AppendUint32(out, 1)
		out = le.AppendUint16(out, 0x000b)
		out = append(out, e.Digest[:]...)
		out = le.AppendUint32(out, uint32(len(e.Data)))
		out = append(out, e.Data...)
	}
	return out
}

// Measured is the measurement of a program that is none of ours.
func Measured(pcr int, program []byte) Event { return data(pcr, evApplication, program) }
