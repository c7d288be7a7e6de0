package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/lab/machine"
)

// kvmVerdict is kept for as long as the host runs: it does not change, and a
// failing probe takes its whole time limit.
type kvmVerdict struct {
	BootID string `json:"boot_id"`
	Works  bool   `json:"works"`
	Reason string `json:"reason,omitempty"`
}

// ChooseAccel finds out whether KVM works here, by booting image with it once
// per start of the host, and sets what later machines use.
func (l *Lab) ChooseAccel(ctx context.Context, image string) error {
	accel := l.Spec.Accel
	if accel == "" {
		v, err := l.kvm(ctx, image)
		if err != nil {
			return err
		}
		accel = machine.AccelTCG
		if v.Works {
			accel = machine.AccelKVM
		} else {
			l.Say("lab", "accel", "machines are emulated (several times slower): "+v.Reason)
		}
	}
	l.mu.Lock()
	l.result.Accel = accel
	l.mu.Unlock()
	return nil
}

func (l *Lab) kvm(ctx context.Context, image string) (kvmVerdict, error) {
	v := kvmVerdict{BootID: bootID()}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		v.Reason = "no usable /dev/kvm: " + err.Error()
		return v, nil
	}
	_ = f.Close()
	cache, cacheErr := os.UserCacheDir()
	path := filepath.Join(cache, "muster", "lab", "kvm.json")
	if cacheErr == nil {
		var old kvmVerdict
		if b, err := readCapped(path, 4096); err == nil && json.Unmarshal(b, &old) == nil && old.BootID == v.BootID && v.BootID != "" {
			return old, nil
		}
	}
	l.Say("lab", "probe", fmt.Sprintf("trying whether hardware virtualization works here (once per start of this host, at most %v)", machine.ProbeTime))
	err = machine.ProbeKVM(ctx, image, l.Path("kvm-probe"), InitLine)
	if ctx.Err() != nil {
		return v, fmt.Errorf("lab: probe KVM: %w", ctx.Err())
	}
	v.Works = err == nil
	if err != nil {
		v.Reason = "/dev/kvm is there, but a probe boot with it failed"
		l.Note("lab", "probe", err.Error()) // long: for events.jsonl
	}
	if cacheErr == nil {
		if b, err := json.Marshal(v); err == nil && os.MkdirAll(filepath.Dir(path), 0o755) == nil {
			_ = renameio.WriteFile(path, b, 0o644) // without it the next run probes again
		}
	}
	return v, nil
}

// bootID names this start of the host, "" if it cannot be read.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
