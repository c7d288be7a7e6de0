package pki

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func tree(t *testing.T) (string, Data) {
	t.Helper()
	dir := t.TempDir()
	if err := (Tree{filepath.Join(dir, "tls")}).EnsureCAs(time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "cred"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"passwd", "ipsec.psk"} {
		if err := os.WriteFile(filepath.Join(dir, "cred", f), []byte(f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := ReadData(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir, d
}

func TestBootstrapDataOpenOnlyWithTheToken(t *testing.T) {
	_, d := tree(t)
	sealed, err := Seal("right", d)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Open("right", sealed)
	if err != nil || string(got["ServerCAKey"].Content) != string(d["ServerCAKey"].Content) {
		t.Errorf("%v", err)
	}
	if _, err := Open("wrong", sealed); err == nil {
		t.Error("opened with another token")
	}
	if Key("right") == Key("wrong") {
		t.Error("one key for two tokens")
	}
}

func TestNewerFilesOnDiskAreAnError(t *testing.T) {
	dir, d := tree(t)
	if err := WriteData(dir, d, true); err != nil {
		t.Errorf("nothing differs: %v", err)
	}
	path := filepath.Join(dir, "tls", "server-ca.crt")
	for _, c := range []struct {
		age   time.Duration
		newer bool
	}{{-time.Hour, false}, {2 * time.Second, false}, {4 * time.Second, true}} {
		if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
			t.Fatal(err)
		}
		at := d["ServerCA"].Timestamp.Add(c.age)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
		err := WriteData(dir, d, true)
		if errors.Is(err, ErrNewer) != c.newer {
			t.Errorf("file %s newer than the datastore: %v", c.age, err)
		}
		b, _ := os.ReadFile(path)
		if (string(b) == "other") != c.newer {
			t.Errorf("file %s newer: overwritten=%v", c.age, string(b) != "other")
		}
	}
}

func TestOwnAuthoritiesAreKept(t *testing.T) {
	dir, d := tree(t)
	if err := (Tree{filepath.Join(dir, "tls")}).EnsureCAs(time.Now()); err != nil {
		t.Fatal(err)
	}
	again, err := ReadData(dir)
	if err != nil || string(again["ClientCAKey"].Content) != string(d["ClientCAKey"].Content) {
		t.Errorf("made again: %v", err)
	}
	if !OnDisk(dir) {
		t.Error("OnDisk says no")
	}
	if OnDisk(t.TempDir()) {
		t.Error("OnDisk says yes of nothing")
	}
}
