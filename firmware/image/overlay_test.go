package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Files of people's own come into the root as they lie there, whatever the
// builder's umask, and nothing that the image or a start makes is replaced.
func TestOverlay(t *testing.T) {
	dir := t.TempDir()
	put := func(name string, mode os.FileMode) {
		t.Helper()
		at := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(name), 0o600), os.Chmod(at, mode)); err != nil {
			t.Fatal(err)
		}
	}
	put("etc/systemd/network/10-lan.network", 0o600)
	put("usr/local/bin/tool", 0o700)
	if err := os.Symlink("/etc/x.service", filepath.Join(dir, "etc/link")); err != nil {
		t.Fatal(err)
	}
	got, err := readOverlay(dir)
	if err != nil || len(got) != 3 {
		t.Fatalf("%v %v", got, err)
	}
	if got[0].path != "etc/link" || got[0].mode != os.ModeSymlink || string(got[0].data) != "/etc/x.service" || got[1].mode != 0o644 || got[2].mode != 0o755 {
		t.Errorf("%+v", got)
	}
	b := &slotBuild{rootDir: t.TempDir()}
	for _, f := range got {
		if err := b.put(f); err != nil {
			t.Fatal(err)
		}
	}
	if to, err := os.Readlink(filepath.Join(b.rootDir, "etc/link")); err != nil || to != "/etc/x.service" {
		t.Errorf("link %q %v", to, err)
	}
	for _, bad := range []string{"var/lib/x", "etc/muster/site.json", "usr/local/bin/k3s", "lib/x"} {
		put(bad, 0o644)
	}
	_, err = readOverlay(dir)
	for _, want := range []string{"var/lib/x", "--root-ca", "k3s", "usr/lib"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not said: %v", want, err)
		}
	}
	if _, err := readOverlay(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("a folder that is not there is taken")
	}
}
