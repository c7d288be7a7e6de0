package fleet

import (
	"fmt"
	"time"
)

// SystemState is what a node does about its own operating system, as it
// reports it. Which step follows which is decided on the node, by the slots
// of package firmware; the centre shows what it is told.
//
//	recovery --> installing --> restarting --> current
//	current --> fetching --> writing --> staged --> waiting --> restarting --> trying --> current
//	trying, restarting --> rolled-back (the old slot runs; the new one is remembered as failed)
//	any --> failed (it goes on with what runs, and a person should look)
type SystemState uint8

const (
	// SystemUnknown: the node has said nothing.
	SystemUnknown SystemState = iota
	// SystemRecovery: the recovery image runs, and nothing is installed just now.
	SystemRecovery
	// SystemInstalling: an order of kind install is carried out.
	SystemInstalling
	// SystemCurrent: it runs what it shall, or nothing is asked of it.
	SystemCurrent
	// SystemFetching and SystemWriting: another version comes to the other slot.
	SystemFetching
	SystemWriting
	// SystemStaged: the other slot holds it whole; SystemWaiting: the restart
	// waits for its turn, its window or its pods; the reason says which.
	SystemStaged
	SystemWaiting
	SystemRestarting
	// SystemTrying: the new version runs and its health is being judged.
	SystemTrying
	// SystemRolledBack: the new version was judged bad; the old one runs.
	SystemRolledBack
	SystemFailed
)

var systemNames = [...]string{
	"unknown", "recovery", "installing", "current", "fetching", "writing", "staged", "waiting", "restarting", "trying", "rolled-back", "failed",
}

// String returns the word used in the CLI, the API and the console.
func (s SystemState) String() string { return name(systemNames[:], int(s), "system state") }

// MarshalText implements encoding.TextMarshaler.
func (s SystemState) MarshalText() ([]byte, error) {
	return marshal(systemNames[:], int(s), "system state")
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *SystemState) UnmarshalText(b []byte) error {
	i, err := unmarshal(systemNames[:], b, "system state")
	if err == nil {
		*s = SystemState(i)
	}
	return err
}

// Words of SystemReport.Slot.
const (
	SlotA        = "a"
	SlotB        = "b"
	SlotRecovery = "recovery"
)

// SystemReport is which operating system a node runs and what it does about
// another one, as it last said. All texts are claims of the node, cleaned.
type SystemReport struct {
	Tenant string `json:"tenant"`
	Site   string `json:"site"`
	Node   NodeID `json:"node"`
	// At is when the centre got it.
	At time.Time `json:"at"`
	// Slot is SlotA, SlotB, SlotRecovery or "".
	Slot string `json:"slot,omitempty"`
	// Image ("name@version") runs; ImageSHA256 is over its UKI.
	Image       string   `json:"image,omitempty"`
	ImageSHA256 HexBytes `json:"image_sha256,omitempty"`
	// Stack is the stack version that the running image was taken from, as
	// the charter named it; absent when the node does not know.
	Stack *StackRef   `json:"stack,omitempty"`
	State SystemState `json:"state"`
	// Percent is how far State is, 0 to 100; Reason one sentence.
	Percent int    `json:"percent,omitempty"`
	Reason  string `json:"reason,omitempty"`
	// Target is the image that it goes to.
	Target       string    `json:"target,omitempty"`
	TargetSHA256 HexBytes  `json:"target_sha256,omitempty"`
	Since        time.Time `json:"since,omitzero"`
	// Failed are images that this node tried and will not try again until an
	// order of kind clear-failed.
	Failed []FailedImage `json:"failed,omitempty"`
	// Warnings are sentences that a person should read, such as that the data
	// partition is not encrypted.
	Warnings []string `json:"warnings,omitempty"`
}

// FailedImage is an image whose health a node judged bad.
type FailedImage struct {
	SHA256 HexBytes  `json:"sha256"`
	Image  string    `json:"image,omitempty"`
	Reason string    `json:"reason,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// Bounds of a SystemReport.
const (
	MaxFailedImages   = 16
	MaxSystemWarnings = 8
)

// Validate reports all problems of the report.
func (r SystemReport) Validate() error {
	var p problems
	p.check(r.Slot == "" || r.Slot == SlotA || r.Slot == SlotB || r.Slot == SlotRecovery, "slot %q is none of %s, %s, %s", clip(r.Slot, 40), SlotA, SlotB, SlotRecovery)
	p.check(int(r.State) < len(systemNames), "system state %d is not known", r.State)
	p.check(r.Percent >= 0 && r.Percent <= 100, "percent is %d; want 0 to 100", r.Percent)
	p.sha256("image_sha256", r.ImageSHA256, false)
	p.sha256("target_sha256", r.TargetSHA256, false)
	if r.Stack != nil {
		r.Stack.validate(&p)
	}
	for field, s := range map[string]string{"image": r.Image, "target": r.Target, "reason": r.Reason} {
		p.text(field, s)
	}
	p.check(len(r.Failed) <= MaxFailedImages, "%d failed images, at most %d are allowed", len(r.Failed), MaxFailedImages)
	for i, f := range head(r.Failed, MaxFailedImages) {
		p.sha256(fmt.Sprintf("sha256 of failed image %d", i), f.SHA256, true)
		p.text("name of a failed image", f.Image)
		p.text("reason of a failed image", f.Reason)
	}
	p.check(len(r.Warnings) <= MaxSystemWarnings, "%d warnings, at most %d are allowed", len(r.Warnings), MaxSystemWarnings)
	for _, w := range head(r.Warnings, MaxSystemWarnings) {
		p.text("warning", w)
	}
	return p.err("system report")
}

// DiskRule says which disk of a machine an installation takes. The centre
// resolves it, against the hardware that the machine reported, into the exact
// target of an order; no node ever chooses a disk.
type DiskRule struct {
	// Prefer is "only" (there must be just one), "smallest", "largest" or
	// "nvme-first" (the smallest NVMe disk, or else the smallest).
	Prefer string `json:"prefer"`
	// Model and Transport leave out disks with others; Model may end in "*".
	Model     string `json:"model,omitempty"`
	Transport string `json:"transport,omitempty"`
	// MinBytes and MaxBytes leave out smaller and larger disks; 0: no bound.
	MinBytes int64 `json:"min_bytes,omitempty"`
	MaxBytes int64 `json:"max_bytes,omitempty"`
	// Overwrite takes disks too that hold a partition table.
	Overwrite bool `json:"overwrite,omitempty"`
}

// Words of DiskRule.Prefer.
const (
	DiskOnly      = "only"
	DiskSmallest  = "smallest"
	DiskLargest   = "largest"
	DiskNVMeFirst = "nvme-first"
)

func (r DiskRule) validate(p *problems) {
	switch r.Prefer {
	case DiskOnly, DiskSmallest, DiskLargest, DiskNVMeFirst:
	default:
		p.check(false, "prefer %q is none of %s, %s, %s, %s", clip(r.Prefer, 40), DiskOnly, DiskSmallest, DiskLargest, DiskNVMeFirst)
	}
	p.text("model of the disk rule", r.Model)
	p.text("transport of the disk rule", r.Transport)
	p.check(r.MinBytes >= 0 && r.MaxBytes >= 0, "the sizes of the disk rule are negative")
	p.check(r.MaxBytes == 0 || r.MaxBytes >= r.MinBytes, "max_bytes %d is smaller than min_bytes %d", r.MaxBytes, r.MinBytes)
}

// Validate reports all problems of the rule.
func (r DiskRule) Validate() error {
	var p problems
	r.validate(&p)
	return p.err("disk rule")
}
