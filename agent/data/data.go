package data

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Tools run programs. in is their standard input; key, if there is one, is an
// open file whose name takes the place of KeyFile among the arguments. out is
// what they said, clipped.
type Tools interface {
	Run(ctx context.Context, in, key []byte, program string, args ...string) (out string, err error)
}

// KeyFile stands for the name of the file with the key.
const KeyFile = "\x00key"

// Shelf keeps small public files where they can be read while the data
// partition cannot: folder muster of the ESP. Put is durable when it returns.
type Shelf interface {
	Put(name string, b []byte) error
	Get(name string) ([]byte, error) // fs.ErrNotExist if it is not there
	Remove(name string) error
}

// Files on the shelf.
const (
	// BegunFile says that this node has begun to make this partition.
	BegunFile = "muster/data-begun"
	// KeyBlob is the recovery key, sealed to the escrow key. It is public.
	KeyBlob = "muster/recovery-key.sealed"
)

// Config says what a Partition works with. What is not marked optional is
// needed.
type Config struct {
	// Device is the partition, ID what tells it from others (its GUID).
	Device, ID string
	// Mapped is the name below /dev/mapper, At where it is mounted.
	Mapped, At string
	Node       fleet.NodeID
	Tools      Tools
	Shelf      Shelf
	// TPM for systemd-cryptenroll; default: auto.
	TPM string
	// Plain: the site's policy wants no encryption.
	Plain bool
	// EscrowKey is the tenant's public key; empty: there will be no recovery
	// key, and a changed TPM loses the data. Tenant and Site are for its label.
	EscrowKey    []byte
	Tenant, Site string
	Now          func() time.Time
	// Log gets each step. Optional.
	Log *slog.Logger
	// cut is a test's power cut, mappers and isMounted its kernel.
	cut       func(point string) error
	mappers   string
	isMounted func(dir string) bool
}

// Report is how the partition is, for people, the status and the centre.
type Report struct {
	// State is mounted, locked, refused or failed.
	State string `json:"state"`
	// Encrypted: what is stored is of no use without this TPM or the recovery
	// key.
	Encrypted bool `json:"encrypted"`
	// Escrow is none (there is no recovery key), sealed (it is on the ESP, and
	// the centre may not have it yet) or kept (the centre has it).
	Escrow string `json:"escrow"`
	// Made: it was made by this start.
	Made bool `json:"made,omitempty"`
	// Reason is one sentence; Help says what to do, "" if nothing.
	Reason string `json:"reason"`
	Help   string `json:"help,omitempty"`
}

// States and escrow words of a Report.
const (
	Mounted = "mounted"
	Locked  = "locked"
	Refused = "refused"
	Broken  = "failed"

	EscrowNone   = "none"
	EscrowSealed = "sealed"
	EscrowKept   = "kept"
)

// Partition is the data partition of this node.
type Partition struct {
	cfg Config
	log *slog.Logger
}

// New checks the configuration.
func New(cfg Config) (*Partition, error) {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("data: config: "+what))
		}
	}
	check(cfg.Device != "" && cfg.ID != "", "Device or ID is missing")
	check(cfg.Mapped != "" && cfg.At != "", "Mapped or At is missing")
	check(cfg.Node.Validate() == nil, "Node is no node ID")
	check(cfg.Tools != nil, "Tools are missing")
	check(cfg.Shelf != nil, "Shelf is missing")
	check(cfg.Now != nil, "Now is missing")
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.TPM == "" {
		cfg.TPM = "auto"
	}
	if cfg.mappers == "" {
		cfg.mappers = "/dev/mapper"
	}
	if cfg.isMounted == nil {
		cfg.isMounted = mounted
	}
	return &Partition{cfg, cfg.Log}, nil
}

// step is a point at which the power may fail.
func (p *Partition) step(name string) error {
	failpoint.Hit("data." + name)
	if p.cfg.cut != nil {
		return p.cfg.cut(name)
	}
	return nil
}

// Open does all that is missing until the partition is mounted. It may be cut
// off anywhere and called again.
func (p *Partition) Open(ctx context.Context) Report {
	r, err := p.open(ctx)
	if err != nil {
		r.State = Broken
		var t *toolError
		if errors.As(err, &t) {
			if reason, help, ok := explain(t.said); ok {
				r.State, r.Reason, r.Help = Locked, reason, help
				return r
			}
		}
		r.Reason = "The data partition cannot be used: " + err.Error()
		r.Help = "Look at docs/runbook/data-locked.md. The disk may be failing."
	}
	return r
}

func (p *Partition) open(ctx context.Context) (Report, error) {
	r := Report{Escrow: p.escrowed()}
	head, err := p.head()
	if err != nil {
		return r, err
	}
	found := Inspect(head)
	what, why := Decide(found, p.cfg.Node, p.begun())
	r.Reason = why
	p.log.Info("data partition", "found", found.Kind.String(), "do", what.String(), "reason", why)
	switch what {
	case Refuse:
		r.State, r.Help = Refused, "Look at docs/runbook/data-locked.md."
		return r, nil
	case Make:
		if err := p.make(ctx); err != nil {
			return r, err
		}
		r.Made, r.Escrow = true, p.escrowed()
	}
	// What is there now counts, not what was meant to be.
	if head, err = p.head(); err != nil {
		return r, err
	}
	dev := p.cfg.Device
	if found = Inspect(head); found.Kind == Sealed {
		r.Encrypted = true
		if err := p.unlock(ctx); err != nil {
			return r, err
		}
		dev = p.mapper()
	} else {
		r.Escrow = EscrowNone
	}
	if err := p.mount(ctx, dev); err != nil {
		return r, err
	}
	if p.begun() {
		// It outlives the commit only when the power fails in between.
		if err := p.cfg.Shelf.Remove(BegunFile); err != nil {
			return r, err
		}
	}
	r.State = Mounted
	switch {
	case r.Encrypted && r.Escrow == EscrowNone:
		r.Reason = "The data partition is encrypted, and there is no recovery key: without this TPM the data is lost."
	case !r.Encrypted:
		r.Reason = "The data partition is NOT encrypted: whoever takes the disk can read it."
	default:
		r.Reason = "The data partition is encrypted and mounted."
	}
	return r, nil
}

func (p *Partition) mapper() string { return filepath.Join(p.cfg.mappers, p.cfg.Mapped) }

// unlocked says whether it is.
func (p *Partition) unlocked() bool {
	_, err := os.Stat(p.mapper())
	return err == nil
}

func (p *Partition) head() ([]byte, error) {
	f, err := os.Open(p.cfg.Device)
	if err != nil {
		return nil, fmt.Errorf("data: look at the partition: %w", err)
	}
	defer f.Close()
	b := make([]byte, HeadSize)
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("data: look at the partition: %w", err)
	}
	return b, nil
}

// begun is the note on the ESP: which partition, by which node.
func (p *Partition) begun() bool {
	b, err := p.cfg.Shelf.Get(BegunFile)
	return err == nil && string(b) == p.beginning()
}

func (p *Partition) beginning() string { return string(p.cfg.Node) + " " + p.cfg.ID + "\n" }

// escrowed says what is known of the recovery key. That the centre has it is
// the agent's to know.
func (p *Partition) escrowed() string {
	b, err := p.cfg.Shelf.Get(KeyBlob)
	if err != nil {
		return EscrowNone
	}
	if h, err := escrow.Inspect(bytes.NewReader(b)); err != nil || h.Node != p.cfg.Node {
		return EscrowNone
	}
	return EscrowSealed
}

// make makes the partition from nothing, and ends with the commit.
func (p *Partition) make(ctx context.Context) error {
	if err := p.step("begin"); err != nil {
		return err
	}
	if err := p.cfg.Shelf.Put(BegunFile, []byte(p.beginning())); err != nil {
		return err
	}
	if err := p.step("begun"); err != nil {
		return err
	}
	if p.cfg.Plain {
		return p.makePlain(ctx)
	}
	if p.unlocked() {
		// An attempt before this one, in the same start, came so far.
		if err := p.run(ctx, nil, nil, "cryptsetup", "--batch-mode", "close", p.cfg.Mapped); err != nil {
			return err
		}
	}
	key := NewKey()
	defer clear(key)
	// A key that is full of entropy needs no slow derivation; on small machines
	// the default one would not even fit into memory.
	if err := p.run(ctx, key, nil, "cryptsetup", "--batch-mode", "luksFormat", "--type", "luks2", "--label", label, "--subsystem", makingText,
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", p.cfg.Device); err != nil {
		return err
	}
	if err := p.step("formatted"); err != nil {
		return err
	}
	if len(p.cfg.EscrowKey) > 0 {
		if err := p.seal(key); err != nil {
			return err
		}
		if err := p.step("sealed"); err != nil {
			return err
		}
	}
	if err := p.enroll(ctx, key); err != nil {
		return err
	}
	if err := p.step("enrolled"); err != nil {
		return err
	}
	if len(p.cfg.EscrowKey) == 0 {
		// Nobody could ever use it.
		if err := p.run(ctx, key, nil, "cryptsetup", "--batch-mode", "luksRemoveKey", p.cfg.Device, "--key-file", "-"); err != nil {
			return err
		}
		if err := p.step("key-removed"); err != nil {
			return err
		}
	}
	// It must open the way it will open later, before anything relies on it.
	if err := p.unlock(ctx); err != nil {
		return err
	}
	if err := p.mkfs(ctx, p.mapper(), label); err != nil {
		return err
	}
	if err := p.step("filesystem"); err != nil {
		return err
	}
	// The commit: from now on it may hold something.
	if err := p.run(ctx, nil, nil, "cryptsetup", "--batch-mode", "config", p.cfg.Device, "--label", label, "--subsystem", string(p.cfg.Node)); err != nil {
		return err
	}
	return p.step("made")
}

func (p *Partition) makePlain(ctx context.Context) error {
	if err := p.mkfs(ctx, p.cfg.Device, plainMaking); err != nil {
		return err
	}
	if err := p.step("filesystem"); err != nil {
		return err
	}
	if err := p.run(ctx, nil, nil, "e2label", p.cfg.Device, label); err != nil {
		return err
	}
	return p.step("made")
}

func (p *Partition) mkfs(ctx context.Context, dev, name string) error {
	return p.run(ctx, nil, nil, "mkfs.ext4", "-q", "-F", "-L", name, "-m", "1", dev)
}

// enroll seals a second key to the TPM.
func (p *Partition) enroll(ctx context.Context, key []byte) error {
	return p.run(ctx, nil, key, "systemd-cryptenroll", "--unlock-key-file="+KeyFile, "--wipe-slot=tpm2", "--tpm2-device="+p.cfg.TPM, "--tpm2-pcrs=7", p.cfg.Device)
}

// seal puts the recovery key, sealed, where it can be fetched from.
func (p *Partition) seal(key []byte) error {
	var b bytes.Buffer
	h := escrow.Header{Kind: escrow.KindDiskKey, Tenant: p.cfg.Tenant, Site: p.cfg.Site, Node: p.cfg.Node, Taken: p.cfg.Now().UTC()}
	if _, err := escrow.Seal(&b, strings.NewReader(ShowKey(key)+"\n"), p.cfg.EscrowKey, h); err != nil {
		return err
	}
	return p.cfg.Shelf.Put(KeyBlob, b.Bytes())
}

// unlock opens the encrypted partition with the TPM.
func (p *Partition) unlock(ctx context.Context) error {
	if p.unlocked() {
		return nil
	}
	return p.run(ctx, nil, nil, "/lib/systemd/systemd-cryptsetup", "attach", p.cfg.Mapped, p.cfg.Device, "-", "tpm2-device="+p.cfg.TPM+",headless=true,discard")
}

// UnlockWith opens it with the recovery key and seals it to this TPM, as it is
// now, so that the next start needs no person.
func (p *Partition) UnlockWith(ctx context.Context, key []byte) error {
	head, err := p.head()
	if err != nil {
		return err
	}
	f := Inspect(head)
	if f.Kind != Sealed {
		return fmt.Errorf("data: unlock: the partition is %s, not encrypted by a node", f.Kind)
	}
	if err := p.run(ctx, key, nil, "cryptsetup", "--batch-mode", "open", "--type", "luks2", "--key-file", "-", p.cfg.Device, p.cfg.Mapped); err != nil {
		return err
	}
	return p.enroll(ctx, key)
}

func (p *Partition) mount(ctx context.Context, dev string) error {
	if p.cfg.isMounted(p.cfg.At) {
		return nil
	}
	// 0: clean; 1: mended. More needs a person, and is not mounted.
	if err := p.run(ctx, nil, nil, "e2fsck", "-p", dev); err != nil {
		var t *toolError
		if !errors.As(err, &t) || t.code != 1 {
			return err
		}
	}
	if err := os.MkdirAll(p.cfg.At, 0o711); err != nil {
		return fmt.Errorf("data: mount: %w", err)
	}
	// Containers live on it: neither nosuid nor noexec.
	return p.run(ctx, nil, nil, "mount", "-t", "ext4", "-o", "noatime,errors=remount-ro", dev, p.cfg.At)
}

func (p *Partition) run(ctx context.Context, in, key []byte, program string, args ...string) error {
	out, err := p.cfg.Tools.Run(ctx, in, key, program, args...)
	if err == nil {
		return nil
	}
	t := &toolError{program: filepath.Base(program), said: out, err: err, code: -1}
	var x interface{ ExitCode() int }
	if errors.As(err, &x) {
		t.code = x.ExitCode()
	}
	return t
}

// toolError is a program that failed.
type toolError struct {
	program, said string
	code          int
	err           error
}

// Error implements error.
func (t *toolError) Error() string {
	said := strings.TrimSpace(t.said)
	if i := strings.LastIndexByte(said, '\n'); i >= 0 {
		said = said[i+1:]
	}
	return fmt.Sprintf("data: %s: %v: %s", t.program, t.err, said[:min(len(said), 300)])
}

// Unwrap returns what the program ended with.
func (t *toolError) Unwrap() error { return t.err }

// explain turns what systemd says of a TPM that does not release the key into
// something that a person can act upon.
func explain(said string) (reason, help string, ok bool) {
	s := strings.ToLower(said)
	has := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(s, w) {
				return true
			}
		}
		return false
	}
	const key = "With the recovery key: \"muster-node data unlock\" at the box (the key is in escrow; docs/runbook/data-locked.md). Without it the data is lost: order an install."
	switch {
	case has("lockout"):
		return "The TPM is in lockout, because something tried wrong authorisations too often; it releases no key for a while.",
			"Leave the machine powered on: most TPMs forgive after some minutes to hours, then restart it. " + key, true
	case has("no tpm2", "tpm2 support is not", "no such device", "failed to initialize tcti"):
		return "There is no usable TPM, so that the data partition cannot be unlocked.", "Switch the TPM on in the firmware's setup (fTPM, PTT). " + key, true
	case has("integrity check failed", "0x000001df", "0x1df", "unseal", "policy", "failed to load hmac", "0x0000018b", "0x18b", "0x0000099d", "0x99d", "operation not permitted", "state not recoverable"):
		return "The TPM does not release the key of the data partition: it was cleared or replaced, or Secure Boot was switched on or off, or its keys were changed.",
			"If the firmware's settings were changed, change them back and restart. " + key, true
	}
	return "", "", false
}

// Write keeps the report where the agent finds it.
func (r Report) Write(path string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("data: write report: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("data: write report: %w", err)
	}
	if err := os.WriteFile(path, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("data: write report: %w", err)
	}
	return nil
}

// ReadReport reads it; the zero Report if there is none.
func ReadReport(path string) (Report, error) {
	var r Report
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, fmt.Errorf("data: read report: %w", err)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("data: read report: %w", err)
	}
	return r, nil
}
