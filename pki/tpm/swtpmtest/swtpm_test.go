package swtpmtest

import (
	"bytes"
	"crypto/sha256"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

func TestNew(t *testing.T) {
	begin := time.Now()
	tpm := Start(t, Options{})
	t.Logf("made and started in %v", time.Since(begin).Round(time.Millisecond))
	if fi, err := os.Stat(tpm.Path()); err != nil || fi.Mode()&os.ModeSocket == 0 {
		t.Fatalf("socket %s: %v", tpm.Path(), err)
	}
	pid := tpm.PID()
	if err := tpm.Restart(); err != nil {
		t.Fatal(err)
	}
	if tpm.PID() == pid {
		t.Fatal("restart kept the process")
	}
	pid = tpm.PID()
	if err := tpm.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err == nil {
		t.Fatalf("process %d lives after Close", pid)
	}
}

func TestNewWhenDirectoryIsTooLongThenError(t *testing.T) {
	long := t.TempDir()
	for len(long) < 120 {
		long += "/x"
	}
	if _, err := New(long, Options{Stopped: true}); err == nil {
		t.Fatal("no error")
	}
}

// pcr reads one PCR of the SHA-256 bank.
func pcr(t *testing.T, tpm *TPM, n int) (value []byte) {
	t.Helper()
	err := tpm.do("read PCR", func(c transport.TPM) error {
		selection := make([]byte, 3)
		selection[n/8] = 1 << (n % 8)
		r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: selection}}}}.Execute(c)
		if err == nil {
			value = r.PCRValues.Digests[0].Buffer
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func TestExtend(t *testing.T) {
	tpm := Start(t, Options{})
	digest := sha256.Sum256([]byte("something"))
	if err := tpm.Extend(4, digest); err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(append(make([]byte, 32), digest[:]...))
	if got := pcr(t, tpm, 4); !bytes.Equal(got, want[:]) {
		t.Errorf("PCR 4 is %x, want %x", got, want)
	}
	if got := pcr(t, tpm, 5); !bytes.Equal(got, make([]byte, 32)) {
		t.Errorf("PCR 5 is %x", got)
	}
	if err := tpm.Extend(99, digest); err == nil {
		t.Error("there is no PCR 99, and no error")
	}
}

// primary returns the name of a primary key of a hierarchy: the same template
// gives the same key for as long as the hierarchy's seed is.
func primary(t *testing.T, tpm *TPM, hierarchy tpm2.TPMHandle) (name []byte) {
	t.Helper()
	err := tpm.do("make key", func(c transport.TPM) error {
		r, err := tpm2.CreatePrimary{PrimaryHandle: hierarchy, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(c)
		if err != nil {
			return err
		}
		name = r.Name.Buffer
		_, err = tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(c)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestClear(t *testing.T) {
	tpm := Start(t, Options{})
	owner, ek := primary(t, tpm, tpm2.TPMRHOwner), primary(t, tpm, tpm2.TPMRHEndorsement)
	if !bytes.Equal(owner, primary(t, tpm, tpm2.TPMRHOwner)) {
		t.Fatal("the same template gave another key")
	}
	if err := tpm.Clear(); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(owner, primary(t, tpm, tpm2.TPMRHOwner)) {
		t.Error("the owner's keys survived")
	}
	if !bytes.Equal(ek, primary(t, tpm, tpm2.TPMRHEndorsement)) {
		t.Error("the endorsement keys did not survive")
	}
}
