package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSecureBootKit(t *testing.T) {
	dir := t.TempDir()
	kit := filepath.Join(dir, "kit")
	if _, err := runRelease("secureboot-kit", "--out", kit, "--name", "Example AG"); err != nil {
		t.Fatal(err)
	}
	var private []string
	err := filepath.WalkDir(kit, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "PRIVATE KEY") {
			private = append(private, filepath.Base(path))
			if info.Mode().Perm() != 0o600 || filepath.Base(filepath.Dir(path)) != "keys" {
				t.Errorf("private key %s with mode %v", path, info.Mode())
			}
		}
		return nil
	})
	if err != nil || strings.Join(private, " ") != "KEK.key PK.key db.key" {
		t.Errorf("private keys %v, %v", private, err)
	}
	if info, err := os.Stat(filepath.Join(kit, "keys")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder of the keys: %v, %v", info, err)
	}
	// Nothing lies beside the folder.
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	// The kit's own certificate serves as a foreign one, in both forms.
	again := filepath.Join(dir, "again")
	if _, err := runRelease("secureboot-kit", "--out", again, "--microsoft-ca", filepath.Join(kit, "keys", "db.crt"), "--microsoft-ca", filepath.Join(kit, "enroll", "KEK.cer")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(again, "enroll", "db-foreign-2.cer")); err != nil {
		t.Error(err)
	}
}

func TestSecureBootKitRefuses(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	fresh := filepath.Join(dir, "kit")
	for when, c := range map[string]struct {
		args  []string
		hints []string
	}{
		"there is no folder":      {nil, []string{"--out"}},
		"the folder is there":     {[]string{"--out", dir}, []string{"already"}},
		"its parent is missing":   {[]string{"--out", filepath.Join(dir, "a", "b")}, []string{"no such"}},
		"the certificate is none": {[]string{"--out", fresh, "--microsoft-ca", text, "--microsoft-ca", filepath.Join(dir, "none")}, []string{text, "none"}},
		"the name is empty":       {[]string{"--out", fresh, "--name", ""}, []string{"name"}},
	} {
		_, err := runRelease(append([]string{"secureboot-kit"}, c.args...)...)
		for _, hint := range c.hints {
			if err == nil || !strings.Contains(err.Error(), hint) {
				t.Errorf("when %s, then want a hint of %q, got %v", when, hint, err)
			}
		}
		if _, err := os.Stat(fresh); err == nil {
			t.Errorf("when %s, then a folder is made all the same", when)
		}
	}
}
