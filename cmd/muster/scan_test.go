package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// Two machines and one of them twice: what is on the stick is a list that
// can be imported, with the EK that the TPM itself enrolls by.
func TestScan(t *testing.T) {
	file := filepath.Join(t.TempDir(), "machines.csv")
	run := func(args ...string) (string, error) {
		t.Helper()
		var out bytes.Buffer
		cmd := scanCommand()
		cmd.SetArgs(args)
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		err := cmd.Execute()
		return out.String(), err
	}
	ca := t.TempDir()
	a, b := swtpmtest.Start(t, swtpmtest.Options{CADir: ca}), swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true})
	for _, c := range []struct{ tpm, serial, want string }{
		{a.Path(), "S1", "(1 machines)"}, {b.Path(), "-evil", "left out"}, {a.Path(), "S1", "already"},
	} {
		out, err := run("--tpm", c.tpm, "--append", file, "--serial", c.serial, "--site", "shop-1")
		if err != nil || !strings.Contains(out, c.want) {
			t.Fatalf("%q, %v", out, err)
		}
	}
	list, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	l := enroll.ParseList(list)
	if len(l.Problems) > 0 || len(l.EKs) != 2 || l.EKs[0].Serial != "S1" || l.EKs[1].Serial != "" || l.EKs[1].Site != "shop-1" {
		t.Errorf("%s\n%+v", list, l)
	}
	ek, err := readEK(t.Context(), a.Path())
	if err != nil || l.EKs[0].EK != ek {
		t.Errorf("listed as %s, enrolls as %s, %v", l.EKs[0].EK, ek, err)
	}
	if out, err := run("--tpm", a.Path()); err != nil || !strings.Contains(out, ek.String()) {
		t.Errorf("without a file: %q, %v", out, err)
	}
	// What it cannot read it does not write.
	if err := os.WriteFile(file, []byte("not a list\n1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := run("--tpm", a.Path(), "--append", file); err == nil {
		t.Error("a file that is no list is added to")
	}
	if b, _ := os.ReadFile(file); string(b) != "not a list\n1\n" {
		t.Errorf("it was changed: %q", b)
	}
	if _, err := run("--tpm", filepath.Join(t.TempDir(), "none"), "--append", file); err == nil {
		t.Error("a machine without a TPM is scanned")
	}
}
