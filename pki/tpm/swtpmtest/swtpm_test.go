package swtpmtest

import (
	"os"
	"syscall"
	"testing"
	"time"
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
