package k3sbin

import (
	"context"
	"crypto/sha256"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

func TestParseTellsTheKind(t *testing.T) {
	for _, c := range []struct {
		out, kind, version string
	}{
		{"k3s version v1.36.3+k3s1 (66a14f0e)\ngo version go1.26\n", Real, "v1.36.3+k3s1"},
		{"k3s version v1.36.3+k3s0-standin (lab)\n", StandIn, "v1.36.3+k3s0-standin"},
	} {
		b, err := parse("/x", c.out)
		if err != nil || b.Kind != c.kind || b.Version != c.version {
			t.Errorf("parse(%q) = %+v, %v", c.out, b, err)
		}
		if (b.Kind == StandIn) != (len(b.Env) == 1) {
			t.Errorf("%s: environment %v", b.Kind, b.Env)
		}
	}
	for _, bad := range []string{"", "k3s", "bash version v5\n", "k3s version 1.2\n"} {
		if b, err := parse("/x", bad); err == nil {
			t.Errorf("parse(%q) = %+v: taken for a k3s", bad, b)
		}
	}
}

func TestPins(t *testing.T) {
	if _, err := parsePins(pins); err != nil {
		t.Fatal(err)
	}
	good := "# x\n\nv1.36.3+k3s1 amd64 " + hex64 + "\n"
	ps, err := parsePins(good)
	if err != nil || len(ps) != 1 || ps[0].URL() != "https://github.com/k3s-io/k3s/releases/download/v1.36.3+k3s1/k3s" {
		t.Fatalf("%v %v", ps, err)
	}
	for _, bad := range []string{"v1 amd64\n", "v1 amd64 abcd\n", "1 amd64 " + hex64} {
		if _, err := parsePins(bad); err == nil {
			t.Errorf("parsePins(%q) accepted", bad)
		}
	}
}

const hex64 = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

func TestFetchKeepsOnlyWhatHasTheDigest(t *testing.T) {
	body := []byte("#!/bin/sh\necho k3s version v1.0.0+x\n")
	asked := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		_, _ = w.Write(body)
	}))
	defer srv.Close()
	c := Config{Cache: t.TempDir()}
	p := Pin{Version: "v1.0.0", Arch: "amd64", SHA256: sha256.Sum256(body)}
	path, err := fetch(context.Background(), c, p, srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := Inspect(context.Background(), path); err != nil || b.Kind != Real {
		t.Errorf("Inspect = %+v, %v", b, err)
	}
	if _, err := fetch(context.Background(), c, p, srv.URL, srv.Client()); err != nil || asked != 1 {
		t.Errorf("second fetch: %v after %d requests, want the cached file", err, asked)
	}
	if err := os.WriteFile(path, []byte("changed"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := fetch(context.Background(), c, p, srv.URL, srv.Client()); err != nil || asked != 2 {
		t.Errorf("changed cache: %v after %d requests, want it fetched again", err, asked)
	}
	body = []byte("something else")
	c.Cache = t.TempDir()
	if p, err := fetch(context.Background(), c, p, srv.URL, srv.Client()); err == nil {
		t.Errorf("wrong digest kept as %s", p)
	}
	if left, _ := filepath.Glob(filepath.Join(c.Cache, "*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFindTrustsTheEnvironmentOrFails(t *testing.T) {
	t.Setenv("K3S", filepath.Join(t.TempDir(), "none"))
	if b, err := Find(context.Background(), Config{}); err == nil {
		t.Errorf("Find = %+v although $K3S does not exist", b)
	}
}
