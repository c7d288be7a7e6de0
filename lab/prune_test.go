package lab

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPruneKeepsTheNewestAndWhatIsAliveOrElsewhere(t *testing.T) {
	state := t.TempDir()
	t.Setenv("XDG_STATE_HOME", state)
	home, err := Home()
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "own")
	put := func(dir, started string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, "node1"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{
			recordFile:    `{"scenario":"boot","pid":-1,"boot_id":"x","started":"` + started + `"}`,
			"node1/a.log": string(make([]byte, 10000)),
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(filepath.Join(home, "oldest"), "2026-01-01T00:00:00Z")
	put(filepath.Join(home, "older"), "2026-01-02T00:00:00Z")
	put(filepath.Join(home, "newest"), "2026-01-04T00:00:00Z")
	put(elsewhere, "2026-01-01T12:00:00Z")
	if err := os.Symlink(elsewhere, filepath.Join(home, "own")); err != nil {
		t.Fatal(err)
	}
	alive := filepath.Join(home, "alive")
	if err := os.MkdirAll(alive, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeRecord(Spec{Scenario: "boot", Dir: alive}, os.Getpid(), false); err != nil {
		t.Fatal(err)
	}

	runs, err := List()
	if err != nil || len(runs) != 5 {
		t.Fatalf("%d runs (%v)", len(runs), err)
	}
	for _, r := range runs {
		if size := r.Size(); r.Name != "alive" && (size < 10000 || size > 100000) {
			t.Errorf("%s has %d bytes", r.Name, size)
		}
	}
	if _, err := Prune(-1); err == nil {
		t.Error("keep -1: no error")
	}
	removed, err := Prune(1)
	if err != nil || len(removed) != 3 {
		t.Fatalf("removed %v (%v)", removed, err)
	}
	for path, want := range map[string]bool{
		filepath.Join(home, "oldest"): false, filepath.Join(home, "older"): false, filepath.Join(home, "own"): false,
		filepath.Join(home, "newest"): true, alive: true, filepath.Join(elsewhere, "node1/a.log"): true,
	} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
}
