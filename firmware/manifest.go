package firmware

import (
	"bytes"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

const (
	// ManifestType is the DSSE payload type of a Manifest.
	ManifestType = "application/vnd.muster.image.v1+json"
	// ManifestFormat is the value of Manifest.Format.
	ManifestFormat = "muster/image/v1"
)

// Limits of a manifest. A recovery image has about ten parts and five inputs, a
// slot image some 200 inputs and up to 512 chunks (a test packs the largest).
const (
	// maxPayload leaves room for base64 and signatures in fleet.MaxManifest.
	maxPayload   = 128 << 10
	maxParts     = 256
	maxInputs    = 1024
	maxMedia     = 8
	maxNameBytes = 256
	// maxImageBytes: a slot image may be some hundreds of MB.
	maxImageBytes = 64 << 30
)

// Manifest says what an image is, what went into it, and what a machine that
// boots it will show in its PCRs. The release key signs it; the centre
// believes an image's measurements only through it.
type Manifest struct {
	// Format is ManifestFormat.
	Format string `json:"format"`
	// Name is a DNS label, Version as fleet.ValidateVersion; together they
	// name the image.
	Name    string          `json:"name"`
	Version string          `json:"version"`
	Kind    fleet.ImageKind `json:"kind"`
	// Arch is amd64 or arm64.
	Arch string `json:"arch"`
	// File is the image's name beside the manifest, without folders.
	File   string `json:"file"`
	SHA256 Digest `json:"sha256"`
	// Size is in bytes, of the file.
	Size int64 `json:"size"`
	// Parts say where the size comes from.
	Parts []Part `json:"parts"`
	// Inputs are the packages and files the image was made of.
	Inputs       []Input      `json:"inputs"`
	Measurements Measurements `json:"measurements"`
	SecureBoot   SecureBoot   `json:"secure_boot"`
	// Media are files that hold the image in another form, for sticks,
	// drives and disks: none for an image that comes by network only.
	Media []Medium `json:"media,omitempty"`
	// Slot has the files of a system; nil for kind recovery.
	Slot *SlotImage `json:"slot,omitempty"`
	// Created is a date out of the inputs, not of the build: whole seconds,
	// UTC.
	Created time.Time `json:"created"`
}

// Part is one piece of the image: its size before and after packing, in
// bytes. Packed is 0 for what is packed only together with others.
type Part struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Packed int64  `json:"packed"`
}

// Input is a package or a file that went into the image.
type Input struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	SHA256  Digest `json:"sha256"`
}

// Measurements are what a machine running the image measures.
type Measurements struct {
	// Authenticode is the digest firmware extends PCR 4 with.
	Authenticode Digest `json:"authenticode"`
	// Kernel is the Authenticode digest of the .linux section. The stub
	// starts the kernel through LoadImage, and firmware extends PCR 4 with
	// this digest right after Authenticode; with Secure Boot on, the stub
	// takes the place of that check and the extension does not happen.
	Kernel Digest `json:"kernel"`
	// PCR11 is the value of PCR 11 (SHA-256 bank) while the image runs.
	PCR11 Digest `json:"pcr11"`
	// Loader is the Authenticode digest of the boot loader that starts the
	// image from a disk: firmware extends PCR 4 with it before Authenticode.
	// Zero for an image that firmware starts by itself.
	Loader Digest `json:"loader,omitzero"`
	// Sections explain PCR11: what the stub measures, in its order.
	Sections []SectionDigest `json:"sections"`
}

// SecureBoot says which db certificate admits the image.
type SecureBoot struct {
	// SignerCertSHA256 is SHA-256 over the certificate's DER; zero if the
	// image is unsigned.
	SignerCertSHA256 Digest `json:"signer_cert_sha256,omitzero"`
}

// Medium is a file beside the image that boots the same bytes and therefore
// measures alike.
type Medium struct {
	// Format is disk (raw GPT image with an ESP) or iso.
	Format string `json:"format"`
	// File is a name without folders.
	File   string `json:"file"`
	SHA256 Digest `json:"sha256"`
	// Size is in bytes.
	Size int64 `json:"size"`
}

// Image is the manifest as the centre's object. Tenant, Manifest (the
// envelope) and Registered are the caller's to fill in.
func (m Manifest) Image() fleet.Image {
	image := fleet.Image{
		Name: m.Name, Version: m.Version, Kind: m.Kind, Arch: m.Arch,
		SHA256: m.SHA256[:], Size: m.Size,
		Authenticode: m.Measurements.Authenticode[:],
		Kernel:       m.Measurements.Kernel[:],
		PCR11:        m.Measurements.PCR11[:],
	}
	if s := m.SecureBoot.SignerCertSHA256; !s.IsZero() {
		image.SignerCert = s[:]
	}
	if l := m.Measurements.Loader; !l.IsZero() {
		image.Loader = l[:]
	}
	return image
}

// Validate reports all problems of the manifest joined, among them a PCR 11
// that does not follow from the sections.
func (m Manifest) Validate() error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	check(m.Format == ManifestFormat, "format is %.40q, want %q", m.Format, ManifestFormat)
	problems = append(problems, fleet.ValidateName("image", m.Name), fleet.ValidateVersion(m.Version))
	check(m.Kind == fleet.ImageRecovery || m.Kind == fleet.ImageSlot, "kind %.40q is neither recovery nor slot", string(m.Kind))
	check(m.Arch == "amd64" || m.Arch == "arm64", "arch %.40q is neither amd64 nor arm64", m.Arch)
	check(plainName(m.File), "file %.40q is not a plain file name", m.File)
	check(!m.SHA256.IsZero(), "sha256 is zero")
	check(m.Size > 0 && m.Size <= maxImageBytes, "size %d is not between 1 and %d", m.Size, int64(maxImageBytes))
	check(len(m.Parts) <= maxParts, "%d parts, more than %d", len(m.Parts), maxParts)
	for _, p := range m.Parts {
		check(p.Name != "" && len(p.Name) <= maxNameBytes, "part name %.40q is empty or longer than %d", p.Name, maxNameBytes)
		check(p.Size >= 0 && p.Packed >= 0 && p.Size <= maxImageBytes && p.Packed <= maxImageBytes, "part %.40q: sizes %d and %d", p.Name, p.Size, p.Packed)
	}
	check(len(m.Inputs) <= maxInputs, "%d inputs, more than %d", len(m.Inputs), maxInputs)
	for _, in := range m.Inputs {
		check(in.Name != "" && len(in.Name) <= maxNameBytes && len(in.Version) <= maxNameBytes, "input %.40q: name or version is empty or longer than %d", in.Name, maxNameBytes)
		check(!in.SHA256.IsZero(), "input %.40q: sha256 is zero", in.Name)
	}
	check(len(m.Media) <= maxMedia, "%d media, more than %d", len(m.Media), maxMedia)
	files := map[string]bool{m.File: true}
	for _, d := range m.Media {
		check(d.Format == "disk" || d.Format == "iso", "medium format %.40q is neither disk nor iso", d.Format)
		check(plainName(d.File) && !files[d.File], "medium file %.40q is not a plain file name of its own", d.File)
		check(!d.SHA256.IsZero(), "medium %.40q: sha256 is zero", d.File)
		check(d.Size > 0 && d.Size <= maxImageBytes, "medium %.40q: size %d is not between 1 and %d", d.File, d.Size, int64(maxImageBytes))
		files[d.File] = true
	}
	switch {
	case m.Kind == fleet.ImageSlot && m.Slot == nil:
		problems = append(problems, errNoSlot)
	case m.Kind != fleet.ImageSlot && m.Slot != nil:
		problems = append(problems, errNotASlot)
	case m.Slot != nil:
		problems = append(problems, m.Slot.validate(files)...)
		check(!m.Measurements.Loader.IsZero(), "loader's Authenticode digest is zero")
	}
	check(!m.Measurements.Authenticode.IsZero(), "authenticode is zero")
	check(!m.Measurements.Kernel.IsZero(), "kernel is zero")
	check(len(m.Measurements.Sections) > 0, "no measured sections")
	pcr, err := PCR11(m.Measurements.Sections)
	problems = append(problems, err)
	check(err != nil || pcr == m.Measurements.PCR11, "pcr11 is %s, but the sections give %s", m.Measurements.PCR11, pcr)
	check(!m.Created.IsZero() && m.Created.Nanosecond() == 0, "created %v is not a date in whole seconds", m.Created)
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("firmware: check manifest: %w", err)
	}
	return nil
}

// plainName says whether s names a file in the manifest's own folder.
func plainName(s string) bool {
	return s != "" && len(s) <= maxNameBytes && path.Base(s) == s && !strings.ContainsAny(s, "\\\x00") && s != "." && s != ".." && s != "/"
}

// JSON returns the payload bytes that are signed. The same manifest gives the
// same bytes.
func (m Manifest) JSON() ([]byte, error) {
	m.Created = m.Created.UTC()
	if err := m.Validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("firmware: write manifest: %w", err)
	}
	return append(b, '\n'), nil
}

// ParseManifest reads the payload of an envelope whose signature was checked.
// It is strict: unknown fields, data after the end, more than the limits, or
// anything Validate refuses is an error.
func ParseManifest(payload []byte) (Manifest, error) {
	if len(payload) > maxPayload {
		return Manifest{}, fmt.Errorf("firmware: read manifest: %d bytes, more than %d", len(payload), maxPayload)
	}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	var m Manifest
	if err := d.Decode(&m); err != nil {
		return Manifest{}, fmt.Errorf("firmware: read manifest: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Manifest{}, fmt.Errorf("firmware: read manifest: data after the end")
	}
	if err := m.Validate(); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// OpenManifest checks the envelope against the release keys and reads the
// manifest in it. An error of an untrusted signature wraps
// statement.ErrUntrusted.
func OpenManifest(envelope []byte, releaseKeys []crypto.PublicKey) (Manifest, error) {
	if len(envelope) > fleet.MaxManifest {
		return Manifest{}, fmt.Errorf("firmware: open manifest: %d bytes, more than %d", len(envelope), fleet.MaxManifest)
	}
	payload, err := statement.Verify(envelope, ManifestType, releaseKeys)
	if err != nil {
		return Manifest{}, fmt.Errorf("firmware: open manifest: %w", err)
	}
	return ParseManifest(payload)
}
