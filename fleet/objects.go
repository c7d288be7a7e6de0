package fleet

import (
	"time"
)

// Tenant is the boundary of ownership: a company or a department with its own
// sites, nodes, orders key and audit chain.
type Tenant struct {
	// Meta.Tenant equals Meta.Name.
	Meta
	Title string `json:"title,omitempty"`
	// Lab is set when a lab EK root was ever trusted for the tenant. It is
	// never unset: the console shows a banner, and relaxed boot policies are
	// allowed only here.
	Lab bool `json:"lab,omitempty"`
	// EscrowKey is the X25519 public key that sites seal their snapshots to,
	// 32 bytes; the private half is with the operator. Empty: none yet.
	EscrowKey HexBytes `json:"escrow_key,omitempty"`
}

// Validate reports all problems of the tenant.
func (t Tenant) Validate() error {
	var p problems
	t.Meta.validate(&p, "tenant")
	p.check(t.Tenant == t.Name, "tenant %q has the name %q; the two must be equal", clip(t.Tenant, 80), clip(t.Name, 80))
	p.text("title", t.Title)
	p.check(len(t.EscrowKey) == 0 || len(t.EscrowKey) == escrowKeySize, "escrow_key has %d bytes; an X25519 public key has %d", len(t.EscrowKey), escrowKeySize)
	return p.err("tenant")
}

// Image is one bootable image that the tenant allows: the recovery image or
// the system image of a slot. Its digests are what evidence is judged by.
type Image struct {
	Tenant string `json:"tenant"`
	// Name and Version together are the key.
	Name    string    `json:"name"`
	Version string    `json:"version"`
	Kind    ImageKind `json:"kind"`
	// Arch is the Go name of the architecture: amd64, arm64.
	Arch string `json:"arch"`
	// SHA256 and Size are of the file.
	SHA256 HexBytes `json:"sha256"`
	Size   int64    `json:"size"`
	// Authenticode is the SHA-256 Authenticode digest of the UKI: firmware
	// extends PCR 4 with it.
	Authenticode HexBytes `json:"authenticode"`
	// Kernel is the Authenticode digest of the kernel inside the UKI. The
	// stub loads it through the firmware, which extends PCR 4 with it right
	// after the image's own digest, but only while Secure Boot is off.
	Kernel HexBytes `json:"kernel,omitempty"`
	// Loader is the Authenticode digest of the boot loader that may start the
	// image from a disk; empty if firmware starts it by itself.
	Loader HexBytes `json:"loader,omitempty"`
	// PCR11 is the final SHA-256 value of PCR 11 that the stub leaves.
	PCR11 HexBytes `json:"pcr11"`
	// SignerCert is SHA-256 over the DER of the db certificate that signed
	// the image; empty if it is unsigned.
	SignerCert HexBytes `json:"signer_cert,omitempty"`
	// Manifest is the DSSE envelope the fields come from.
	Manifest   []byte    `json:"manifest,omitempty"`
	Registered time.Time `json:"registered,omitzero"`
}

// ImageKind tells what an image is for.
type ImageKind string

const (
	ImageRecovery ImageKind = "recovery"
	ImageSlot     ImageKind = "slot"
)

// ID is how people and evidence name the image: "name@version".
func (i Image) ID() string { return i.Name + "@" + i.Version }

// MaxManifest bounds the manifest an Image carries, in bytes.
const MaxManifest = 256 << 10

// Validate reports all problems of the image.
func (i Image) Validate() error {
	var p problems
	p.add(ValidateName("tenant", i.Tenant))
	p.add(ValidateName("image", i.Name))
	p.add(ValidateVersion(i.Version))
	p.check(i.Kind == ImageRecovery || i.Kind == ImageSlot, "kind %q is neither %q nor %q", clip(string(i.Kind), 80), ImageRecovery, ImageSlot)
	p.check(i.Arch == "amd64" || i.Arch == "arm64", "architecture %q is neither amd64 nor arm64", clip(i.Arch, 80))
	p.check(i.Size > 0, "size %d is not positive", i.Size)
	p.sha256("sha256", i.SHA256, true)
	p.sha256("authenticode", i.Authenticode, true)
	p.sha256("kernel", i.Kernel, false)
	p.sha256("pcr11", i.PCR11, true)
	p.sha256("signer_cert", i.SignerCert, false)
	p.sha256("loader", i.Loader, false)
	p.check(len(i.Manifest) <= MaxManifest, "manifest of %d bytes, at most %d are allowed", len(i.Manifest), MaxManifest)
	return p.err("image")
}
