package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/firmware"
)

// fakeApt puts apt-cache and apt-get in front of PATH. apt-cache knows the
// package once `apt-get update` was run; apt-get download writes content.
func fakeApt(t *testing.T, content string, digest firmware.Digest) (calls string) {
	t.Helper()
	dir := t.TempDir()
	calls = filepath.Join(dir, "calls")
	script := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho "+name+" \"$@\" >>"+calls+"\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script("apt-cache", fmt.Sprintf(`[ -e %[1]s/updated ] || { echo "N: Unable to locate package" >&2; exit 100; }
printf 'Package: pkg\nVersion: 1:2-3\nDepends: linux-image-6.1.0-1-amd64 (= 2)\nDescription: x\n SHA256: wrong\nSHA256: %[2]s\n\nPackage: pkg\nVersion: 1\n'`, dir, digest))
	script("apt-get", fmt.Sprintf(`case "$*" in
*update*) : >%[1]s/updated;;
*download*) printf '%[2]s' >pkg_1%%3a2-3_amd64.deb;;
esac`, dir, content))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return calls
}

func TestPackagesComeByDigest(t *testing.T) {
	good := firmware.Digest(sha256.Sum256([]byte("deb")))
	calls := fakeApt(t, "deb", good)
	var notes []string
	a := archiveCache{dir: filepath.Join(t.TempDir(), "cache"), note: func(f string, v ...any) { notes = append(notes, fmt.Sprintf(f, v...)) }}

	p, depends, err := a.candidate(t.Context(), "pkg")
	if err != nil {
		t.Fatal(err)
	}
	if p.Version != "1:2-3" || p.SHA256 != good || !strings.HasPrefix(depends, "linux-image-") {
		t.Errorf("got %+v, depends %q", p, depends)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "updating") {
		t.Errorf("nobody was told of the update: %q", notes)
	}
	at, err := a.fetch(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(at); err != nil || string(data) != "deb" {
		t.Fatalf("%q, %v", data, err)
	}
	// A second time it comes from the cache, a damaged one anew.
	before := count(t, calls, "download")
	if _, err := a.fetch(t.Context(), p); err != nil || count(t, calls, "download") != before {
		t.Errorf("it was fetched again (%v)", err)
	}
	if err := os.WriteFile(at, []byte("dam"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := a.fetch(t.Context(), p); err != nil || count(t, calls, "download") != before+1 {
		t.Errorf("a damaged file was not replaced (%v)", err)
	}
	left, err := filepath.Glob(filepath.Join(a.dir, ".fetch-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestPackagesThatAreRefused(t *testing.T) {
	good := firmware.Digest(sha256.Sum256([]byte("deb")))
	fakeApt(t, "evil", good)
	a := archiveCache{dir: t.TempDir(), note: func(string, ...any) {}}
	_, err := a.fetch(t.Context(), Package{"pkg", "1:2-3", good})
	if err == nil || !strings.Contains(err.Error(), "SHA-256") {
		t.Errorf("another digest was taken: %v", err)
	}
	if left, err := os.ReadDir(a.dir); err != nil || len(left) > 0 {
		t.Errorf("refused bytes stayed in the cache: %v %v", left, err)
	}
	for _, p := range []Package{{"--help", "1", good}, {"pkg", "1/../..", good}, {"../x", "1", good}, {"pkg", "", good}} {
		if _, err := a.fetch(t.Context(), p); err == nil {
			t.Errorf("%+v was fetched", p)
		}
	}
	if _, _, err := a.candidate(t.Context(), "other"); err == nil {
		t.Error("apt's answer for another package was taken")
	}
}

func count(t *testing.T, path, word string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), word)
}

func TestWalkTar(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Name: "./a", Typeflag: tar.TypeReg, Size: 3, Mode: 0o600},
		{Name: "./link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		{Name: "./b", Typeflag: tar.TypeReg, Size: 3},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	got := map[string]string{}
	visit := func(p string, data []byte) error { got[p] = string(data); return nil }
	if err := walkTar(bytes.NewReader(whole), func(p string) bool { return p != "b" }, visit); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got["a"] != "abc" {
		t.Errorf("visited %v, want only the regular file that was wanted", got)
	}
	if err := walkTar(bytes.NewReader(whole[:513]), func(string) bool { return true }, visit); err == nil {
		t.Error("a cut archive was read")
	}
	stop := errors.New("stop")
	if err := walkTar(bytes.NewReader(whole), func(string) bool { return true }, func(string, []byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the visitor's error became %v", err)
	}
	var big bytes.Buffer
	w = tar.NewWriter(&big)
	if err := w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: maxMember + 1}); err != nil {
		t.Fatal(err)
	}
	if err := walkTar(&big, func(string) bool { return true }, visit); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a file without end was taken into memory: %v", err)
	}
}

func TestChangelogDate(t *testing.T) {
	pack := func(s string) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		if _, err := w.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	got, err := changelogDate(pack("linux (6.1) bookworm; urgency=low\n\n  * x\n\n -- A B <a@b>  Mon, 02 Mar 2026 10:00:00 +0200\n\nold\n -- A <a>  Mon, 01 Jan 2024 00:00:00 +0000\n"))
	if err != nil || got.Format("2006-01-02T15:04:05Z07:00") != "2026-03-02T08:00:00Z" {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range [][]byte{[]byte("no gzip"), pack(""), pack(" -- A <a>  yesterday\n")} {
		if d, err := changelogDate(bad); err == nil {
			t.Errorf("%q has the date %v", bad, d)
		}
	}
}
