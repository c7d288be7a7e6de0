package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestScrub(t *testing.T) {
	for _, secret := range []string{
		"muster_3fG9aKxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "K1012345678901234567890abcdef::server:cafe", "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----",
		"postgres://muster:hunter2@db/muster", `"password": "hunter2"`, "Authorization: Bearer-hunter2", "token=hunter2",
	} {
		out := string(scrub([]byte("before " + secret + " after")))
		for _, part := range []string{"hunter2", "3fG9aK", "cafe", "AAAA"} {
			if strings.Contains(out, part) {
				t.Errorf("%q became %q", secret, out)
			}
		}
		if !strings.HasPrefix(out, "before ") || !strings.HasSuffix(out, " after") {
			t.Errorf("%q lost its surroundings: %q", secret, out)
		}
	}
	plain := "node n-abc of site shop-7 was approved by user:ann; muster_requests 3; https://centre.example:7443/x"
	if out := string(scrub([]byte(plain))); out != plain {
		t.Errorf("%q became %q", plain, out)
	}
}

// bundleFiles reads a support bundle.
func bundleFiles(name string) (map[string][]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if out[h.Name], err = io.ReadAll(r); err != nil {
			return nil, err
		}
	}
}

// scriptCanaries: canaries BUNDLE DIR [TEXT...] fails if the bundle holds
// anything of a file of the centre that only its owner may read, in clear, hex
// or base64, or one of the texts. With `!` it must hold some.
func scriptCanaries(ts *testscript.TestScript, neg bool, args []string) {
	files, err := bundleFiles(ts.MkAbs(args[0]))
	ts.Check(err)
	var canaries [][]byte
	add := func(b []byte) {
		if len(b) >= 8 {
			canaries = append(canaries, b, []byte(hex.EncodeToString(b)), []byte(base64.StdEncoding.EncodeToString(b)), []byte(base64.RawURLEncoding.EncodeToString(b)))
		}
	}
	for _, a := range args[2:] {
		add([]byte(a))
	}
	secrets := 0
	ts.Check(filepath.WalkDir(ts.MkAbs(args[1]), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Mode().Perm()&0o077 != 0 || strings.HasPrefix(d.Name(), "muster.db") {
			return err // the database is not secret as a whole; its secrets are hashed or sealed
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		secrets++
		if bytes.Contains(b, []byte("-----BEGIN CERTIFICATE")) {
			// admin.yaml: the CA in it is public.
			for _, line := range strings.Split(string(b), "\n") {
				if token, found := strings.CutPrefix(line, "token: "); found {
					add([]byte(token))
				}
			}
			return nil
		}
		add(bytes.TrimSpace(b))
		for _, line := range bytes.Split(b, []byte("\n")) {
			if len(line) >= 32 {
				add(line)
			}
		}
		return nil
	}))
	if secrets < 5 {
		ts.Fatalf("only %d secret files in %s", secrets, args[1])
	}
	found := ""
	for name, b := range files {
		for _, c := range canaries {
			if bytes.Contains(b, c) {
				found = name
			}
		}
	}
	switch {
	case !neg && found != "":
		ts.Fatalf("%s holds a secret", found)
	case neg && found == "":
		ts.Fatalf("none of %d canaries was found", len(canaries))
	}
	ts.Logf("%d files, %d canaries of %d secret files", len(files), len(canaries), secrets)
}

// scriptBundled: bundled BUNDLE NAME... wants files in the bundle that hold
// something.
func scriptBundled(ts *testscript.TestScript, neg bool, args []string) {
	files, err := bundleFiles(ts.MkAbs(args[0]))
	ts.Check(err)
	for _, n := range args[1:] {
		if len(files["muster-support/"+n]) == 0 {
			ts.Fatalf("%s is not in the bundle", n)
		}
	}
}
