package machine

import (
	"bytes"
	"os"
	"testing"
)

func TestLoseNVRAM(t *testing.T) {
	m, err := New(Config{Name: "a", Dir: t.TempDir(), NoTPM: true, Boot: BootTFTP, Tap: "tap0", MAC: "52:54:00:00:00:01", UUID: "00000000-0000-4000-8000-000000000001"})
	if err != nil {
		t.Skipf("no machine to be had here: %v", err)
	}
	vars := (files{m.cfg.Dir}).vars()
	fresh, err := os.ReadFile(vars)
	if err != nil {
		t.Fatal(err)
	}
	worn := append(bytes.Clone(fresh[:len(fresh)-1]), fresh[len(fresh)-1]^1)
	if err := os.WriteFile(vars, worn, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.LoseNVRAM(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(vars); err != nil || !bytes.Equal(got, fresh) {
		t.Errorf("the variables are not those of a new board: %v", err)
	}
	if err := os.Remove(vars); err != nil {
		t.Fatal(err)
	}
	if err := m.LoseNVRAM(); err == nil {
		t.Error("a machine without variables loses them")
	}
}
