package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// ProbeTime is how long a probe boot may take, probeSilence how long it may
// take to print anything: each some ten times what working KVM needs.
const (
	ProbeTime    = 45 * time.Second
	probeSilence = 15 * time.Second
)

var anything = regexp.MustCompile(`.`)

// ProbeKVM boots image (a UKI) with KVM and returns nil when the console
// shows a line that matches started. That /dev/kvm can be opened says too
// little: nested hosts exist where it opens, makes machines, and the guest
// spins in its first instructions.
//
// scratch is a short directory for the probe's files; it is removed.
func ProbeKVM(ctx context.Context, image, scratch string, started *regexp.Regexp) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("machine: probe KVM: %w", err)
	}
	_ = f.Close()
	defer os.RemoveAll(scratch)
	folder := filepath.Join(scratch, "disk")
	if err := BootFolder(folder, image); err != nil {
		return err
	}
	m, err := New(Config{
		Name: "probe", Dir: filepath.Join(scratch, "m"), Accel: AccelKVM, NoTPM: true,
		Boot: BootDisk, Disks: []Disk{{Folder: folder, Boot: true}},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, ProbeTime)
	defer cancel()
	if err := m.PowerOn(ctx); err != nil {
		return fmt.Errorf("machine: probe KVM: %w", err)
	}
	first, cancelFirst := context.WithTimeout(ctx, probeSilence)
	defer cancelFirst()
	_, waitErr := m.Serial().Wait(first, 0, anything)
	if waitErr == nil {
		_, waitErr = m.Serial().Wait(ctx, 0, started)
	}
	if waitErr != nil {
		waitErr = fmt.Errorf("machine: probe KVM: the guest did not start: %w", waitErr)
	}
	return errors.Join(waitErr, m.Close())
}

// BootFolder makes a folder that, shown as a FAT disk, starts image: the
// fallback path of removable media (UEFI 2.10, 3.5.1.1).
func BootFolder(folder, image string) error {
	dir := filepath.Join(folder, "EFI", "BOOT")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("machine: make boot folder: %w", err)
	}
	if err := copyFile(filepath.Join(dir, "BOOTX64.EFI"), image); err != nil {
		return fmt.Errorf("machine: make boot folder: %w", err)
	}
	return nil
}
