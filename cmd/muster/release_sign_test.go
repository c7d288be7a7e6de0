package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet/statement"
)

func runRelease(args ...string) (string, error) {
	cmd := releaseCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(new(bytes.Buffer))
	cmd.SetArgs(args)
	err := cmd.Execute()
	return out.String(), err
}

func TestReleaseSignAndVerify(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	put := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(at(name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	get := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(at(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, k := range []string{"k", "other"} {
		if err := writeReleaseKey(at(k)); err != nil {
			t.Fatal(err)
		}
	}
	text := bytes.Repeat([]byte("muster "), 20_000)
	put("muster", text)
	put("empty", nil)
	if _, err := runRelease("sign", at("muster"), at("empty"), "--key", at("k")); err != nil {
		t.Fatal(err)
	}
	signature := get("muster" + sidecar)
	out, err := runRelease("verify", at("muster"), at("empty"), "--pub", at("k.pub"))
	if err != nil || strings.Count(out, "ok ") != 2 {
		t.Errorf("good files: %v\n%s", err, out)
	}

	// Each changes one thing, and is undone.
	for when, c := range map[string]struct {
		change func()
		args   []string
		says   string
	}{
		"a byte changed":           {func() { b := bytes.Clone(text); b[100_000] ^= 1; put("muster", b) }, nil, "sha256"},
		"the end is cut":           {func() { put("muster", text[:len(text)-1]) }, nil, "bytes"},
		"something is new":         {func() { put("muster", append(bytes.Clone(text), 0)) }, nil, "bytes"},
		"the name changed":         {func() { put("musterd", text); put("musterd"+sidecar, signature) }, []string{at("musterd")}, `"musterd"`},
		"files change places":      {func() { put("muster", nil); put("empty", text) }, nil, "bytes"},
		"signatures change places": {func() { put("muster"+sidecar, get("empty"+sidecar)) }, nil, `"empty"`},
		"the signature is cut":     {func() { put("muster"+sidecar, signature[:len(signature)-9]) }, nil, "envelope"},
		"the signature is gone":    {func() { _ = os.Remove(at("muster" + sidecar)) }, nil, "not signed"},
		"the signature is huge":    {func() { put("muster"+sidecar, append(bytes.Repeat([]byte(" "), firmware.MaxArtifact), signature...)) }, nil, "more than"},
		"the signature is another key's": {func() {
			if _, err := runRelease("sign", at("muster"), "--key", at("other")); err != nil {
				t.Fatal(err)
			}
		}, nil, "no signature by a trusted key"},
		"the statement is changed": {func() {
			var e statement.Envelope
			if err := json.Unmarshal(signature, &e); err != nil {
				t.Fatal(err)
			}
			b := bytes.Clone(text)
			b[0] ^= 1
			put("muster", b)
			_, sum, err := hashFile(at("muster"))
			if err != nil {
				t.Fatal(err)
			}
			if e.Payload, err = (firmware.Artifact{Format: firmware.ArtifactFormat, Name: "muster", Size: int64(len(b)), SHA256: sum}).JSON(); err != nil {
				t.Fatal(err)
			}
			put("muster"+sidecar, e.JSON())
		}, nil, "no signature by a trusted key"},
		"it is a manifest's": {func() {
			key, err := readSigner("--key", at("k"))
			if err != nil {
				t.Fatal(err)
			}
			var e statement.Envelope
			if err := json.Unmarshal(signature, &e); err != nil {
				t.Fatal(err)
			}
			if e, err = statement.Sign(firmware.ManifestType, e.Payload, key); err != nil {
				t.Fatal(err)
			}
			put("muster"+sidecar, e.JSON())
		}, nil, "payload type"},
		"the file is gone": {func() { _ = os.Remove(at("muster")) }, nil, "no such file"},
	} {
		c.change()
		args := c.args
		if args == nil {
			args = []string{at("muster")}
		}
		out, err := runRelease(append(append([]string{"verify"}, args...), "--pub", at("k.pub"))...)
		if err == nil || !strings.Contains(out, "FAILED") || !strings.Contains(out, c.says) {
			t.Errorf("when %s, then want %q, got %v\n%s", when, c.says, err, out)
		}
		put("muster", text)
		put("empty", nil)
		put("muster"+sidecar, signature)
	}
	if out, err := runRelease("verify", at("muster"), "--pub", at("other.pub")); err == nil || !strings.Contains(out, "trusted key") {
		t.Errorf("with another key: %v\n%s", err, out)
	}
	// One bad file among good ones fails the whole, and is named.
	put("empty", []byte("x"))
	if out, err := runRelease("verify", at("muster"), at("empty"), "--pub", at("k.pub"), "-o", "json"); err == nil || !strings.Contains(err.Error(), "1 of 2") {
		t.Errorf("one bad file: %v\n%s", err, out)
	} else {
		var checks []artifactCheck
		if err := json.Unmarshal([]byte(out), &checks); err != nil || len(checks) != 2 || !checks[0].OK || checks[1].OK {
			t.Errorf("%+v, %v", checks, err)
		}
	}
}

func TestReleaseSignRefuses(t *testing.T) {
	dir := t.TempDir()
	key, good := filepath.Join(dir, "k"), filepath.Join(dir, "good")
	if err := writeReleaseKey(key); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(good, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for when, c := range map[string]struct {
		args []string
		hint string
	}{
		"there is no key":       {[]string{"sign", good}, "keygen"},
		"the key is public":     {[]string{"sign", good, "--key", key + ".pub"}, "--key"},
		"one file is a folder":  {[]string{"sign", good, dir, "--key", key}, "not a file"},
		"one file is not there": {[]string{"sign", good, filepath.Join(dir, "none"), "--key", key}, "no such file"},
		"nothing is named":      {[]string{"sign", "--key", key}, "at least 1"},
		"no key counts":         {[]string{"verify", good}, "--pub"},
		"the pub is private":    {[]string{"verify", good, "--pub", key}, "PUBLIC KEY"},
	} {
		if _, err := runRelease(c.args...); err == nil || !strings.Contains(err.Error(), c.hint) {
			t.Errorf("when %s, then want a hint of %q, got %v", when, c.hint, err)
		}
		if _, err := os.Stat(good + sidecar); err == nil {
			t.Errorf("when %s, then a signature is written all the same", when)
		}
	}
}
