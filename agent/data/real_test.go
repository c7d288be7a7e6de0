package data

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// spy runs the real programs, but those that need a kernel with dm-crypt.
type spy struct {
	t    *testing.T
	real Exec
	dir  string
	runs []string
}

func (s *spy) Run(ctx context.Context, in, key []byte, program string, args ...string) (string, error) {
	s.runs = append(s.runs, program+" "+strings.Join(args, " "))
	mapper := filepath.Join(s.dir, "data")
	switch {
	case strings.HasSuffix(program, "systemd-cryptsetup"):
		return "", os.Truncate(create(s.t, mapper), 8<<20)
	case program == "mount", program == "e2fsck" && args[len(args)-1] == mapper:
		return "", nil
	}
	return s.real.Run(ctx, in, key, program, args...)
}

func create(t *testing.T, name string) string {
	t.Helper()
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func needTools(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: %v", p, err)
		}
	}
}

// Given the real cryptsetup, systemd-cryptenroll, mkfs.ext4 and a software
// TPM, when the partition is made, then its header says so at each step, it
// has one TPM token for PCR 7, and the key in escrow opens it. Opening the
// mapping itself needs dm-crypt: that is seen in the machine lab.
func TestWithRealTools(t *testing.T) {
	needTools(t, "cryptsetup", "systemd-cryptenroll", "mkfs.ext4")
	tpm := swtpmtest.Start(t, swtpmtest.Options{})
	dir := t.TempDir()
	dev := create(t, filepath.Join(dir, "part"))
	if err := os.Truncate(dev, 64<<20); err != nil {
		t.Fatal(err)
	}
	private, public, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	tools := &spy{t: t, dir: dir}
	p, err := New(Config{Device: dev, ID: "guid-1", Mapped: "data", At: filepath.Join(dir, "at"), Node: self, Tools: tools, Shelf: b, EscrowKey: public,
		Tenant: "acme", Site: "shop-1", Now: time.Now, TPM: "swtpm:path=" + tpm.Path(), mappers: dir, isMounted: func(string) bool { return false }})
	if err != nil {
		t.Fatal(err)
	}
	r := p.Open(t.Context())
	if r.State != Mounted || !r.Encrypted || r.Escrow != EscrowSealed {
		t.Fatalf("%+v\n%s", r, strings.Join(tools.runs, "\n"))
	}
	head, err := p.head()
	if err != nil {
		t.Fatal(err)
	}
	if f := Inspect(head); f.Kind != Sealed || f.Owner != self {
		t.Fatalf("%+v", f)
	}
	dump, err := exec.Command("cryptsetup", "luksDump", dev).CombinedOutput()
	if err != nil || !bytes.Contains(dump, []byte("systemd-tpm2")) || !bytes.Contains(dump, []byte("tpm2-pcrs:  7")) && !bytes.Contains(dump, []byte("tpm2-hash-pcrs:   7")) {
		t.Errorf("%v\n%s", err, dump)
	}
	var plain bytes.Buffer
	if _, err := escrow.Open(&plain, bytes.NewReader(b.shelf[KeyBlob]), private); err != nil {
		t.Fatal(err)
	}
	key, err := ParseKey(plain.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	test := func(k []byte) error {
		_, err := Exec{}.Run(t.Context(), k, nil, "cryptsetup", "--batch-mode", "open", "--test-passphrase", "--key-file", "-", dev)
		return err
	}
	if err := test(key); err != nil {
		t.Errorf("the key in escrow does not open it: %v", err)
	}
	if err := test(NewKey()); err == nil {
		t.Error("any key opens it")
	}
	for _, run := range tools.runs {
		if strings.Contains(run, string(key)) {
			t.Errorf("the key is among the arguments: %s", run)
		}
	}
	// A second header, when the first one is torn.
	copy(head, make([]byte, 512))
	if f := Inspect(head); f.Kind != Sealed {
		t.Errorf("with a torn first header: %+v", f)
	}
}
