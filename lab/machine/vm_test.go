package machine

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

// needVM skips, with the reason, unless virtual machines are asked for.
func needVM(t *testing.T, secureBoot bool) {
	t.Helper()
	if os.Getenv("MUSTER_VM_TESTS") == "" {
		t.Skip("starts a virtual machine: set MUSTER_VM_TESTS=1 to run it")
	}
	if missing := CheckHost(secureBoot); len(missing) > 0 {
		t.Skipf("this host cannot run machines: missing %v", missing)
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// Given a machine with an empty disk, when it is powered on, then its firmware
// talks on the console, a reset starts it again, power-off ends QEMU and its
// TPM, and the machine starts again with the same TPM.
func TestMachine(t *testing.T) {
	needVM(t, false)
	dir := shortDir(t)
	empty := filepath.Join(dir, "empty.img")
	if err := os.WriteFile(empty, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	resets := make(chan struct{}, 10)
	m, err := New(Config{
		Name: "vm", Dir: filepath.Join(dir, "m"), Boot: BootDisk, MemoryMB: 256,
		Disks: []Disk{{File: empty, Serial: "EMPTY", Boot: true}},
		OnEvent: func(e Event) {
			if e.Name == "RESET" {
				resets <- struct{}{}
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	firmwareTalks := regexp.MustCompile(`BdsDxe: (failed to load|No bootable|loading) ?`)
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.PowerOn(ctx); err == nil {
		t.Error("power-on of a machine that is on: no error")
	}
	begin := time.Now()
	l, err := m.Serial().Wait(ctx, 0, firmwareTalks)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("firmware after %v: %s", time.Since(begin).Round(100*time.Millisecond), l.Text)

	if err := m.Reset(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-resets:
	case <-ctx.Done():
		t.Fatal("no RESET event")
	}
	if err := m.PowerOff(ctx); err != nil {
		t.Fatal(err)
	}
	if _, on := m.On(); on || m.tpm.PID() != 0 {
		t.Fatal("power-off left something running")
	}
	if _, err := m.Serial().Wait(ctx, m.Serial().Mark(), firmwareTalks); err == nil {
		t.Fatal("a machine that is off printed something new")
	}
	mark := m.Serial().Mark()
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Serial().Wait(ctx, mark, firmwareTalks); err != nil {
		t.Fatal(err)
	}
}
