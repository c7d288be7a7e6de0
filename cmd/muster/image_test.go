package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet/statement"
)

func TestReleaseKeygen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "release.key")
	cmd := releaseCommand()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"keygen", "--out", path})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the private key has mode %v", info.Mode())
	}
	key, err := readReleaseKey(path)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	public, err := statement.ParseKeys(text)
	if err != nil || len(public) != 1 {
		t.Fatalf("%d public keys, %v", len(public), err)
	}
	a, err := statement.KeyID(public[0])
	if err != nil {
		t.Fatal(err)
	}
	if b, err := statement.KeyID(key.Public()); err != nil || a != b {
		t.Errorf("the public file holds another key (%v)", err)
	}

	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeReleaseKey(path); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a release key was overwritten: %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the release key changed (%v)", err)
	}
	// Nor is a private key made beside a foreign public one.
	lone := filepath.Join(t.TempDir(), "k")
	if err := os.WriteFile(lone+".pub", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeReleaseKey(lone); err == nil {
		t.Error("a foreign public key was overwritten")
	}
	if _, err := os.Stat(lone); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a private key was left behind: %v", err)
	}
}

// Every refusal says what to do next.
func TestImageRefusals(t *testing.T) {
	dir := t.TempDir()
	if err := writeReleaseKey(filepath.Join(dir, "k")); err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	script := file("script", "#!/bin/sh\n")
	for when, c := range map[string]struct {
		args []string
		hint string
		code int
	}{
		"verify has no key":         {[]string{"verify", dir}, "--release-pub", 2},
		"verify finds no manifest":  {[]string{"verify", dir, "--release-pub", filepath.Join(dir, "k.pub")}, "--release-key", 1},
		"the key file is private":   {[]string{"verify", dir, "--release-pub", filepath.Join(dir, "k")}, "PUBLIC KEY", 1},
		"the output is unknown":     {[]string{"recovery", "-o", "yaml"}, "table or json", 2},
		"there is no output folder": {[]string{"recovery", "--node-binary", "x"}, "--out", 1},
		"the release key is absent": {[]string{"recovery", "--out", dir, "--release-key", filepath.Join(dir, "none")}, "keygen", 1},
		"the release key is public": {[]string{"recovery", "--out", dir, "--release-key", filepath.Join(dir, "k.pub")}, "PRIVATE KEY", 1},
		"the lock is none":          {[]string{"recovery", "--out", dir, "--lock", script}, "--lock", 1},
		"the date is none":          {[]string{"recovery", "--out", dir, "--created", "today"}, "2026-01-31T12:00:00Z", 1},
		"the node program is a script": {[]string{"recovery", "--out", dir, "--node-binary", script,
			"--lock", file("lock", `{"format":"muster/image-lock/v1","packages":[]}`)}, "not an ELF file", 1},
		"the node program is absent": {[]string{"recovery", "--out", dir, "--node-binary", filepath.Join(dir, "none"),
			"--lock", filepath.Join(dir, "lock")}, "make build", 1},
	} {
		cmd := imageCommand()
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetOut(new(bytes.Buffer))
		cmd.SetErr(new(bytes.Buffer))
		cmd.SetArgs(c.args)
		err := cmd.Execute()
		if err == nil || !strings.Contains(err.Error(), c.hint) {
			t.Errorf("when %s, then want a hint of %q, got %v", when, c.hint, err)
			continue
		}
		code := 1
		var exit exitError
		if errors.As(err, &exit) {
			code = exit.code
		}
		if code != c.code {
			t.Errorf("when %s, then exit code %d, want %d", when, code, c.code)
		}
	}
}

// Whoever gets one setting wrong often gets two wrong, and wants to hear of
// both before the next try.
func TestImageNamesAllProblemsAtOnce(t *testing.T) {
	cmd := imageCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(new(bytes.Buffer))
	cmd.SetErr(new(bytes.Buffer))
	cmd.SetArgs([]string{
		"recovery", "--out", t.TempDir(), "--format", "uki,vhd", "--kernel", "rt",
		"--address", "192.0.2.10/24", "--gateway", "198.51.100.1", "--vlan", "4095", "--proxy", "https://p", "--mac", "01:00:5e:00:00:01",
	})
	err := cmd.Execute()
	for _, flag := range []string{"--format", "rt", "--gateway", "--vlan", "--proxy", "--mac"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("nothing is said of %s: %v", flag, err)
		}
	}
}
