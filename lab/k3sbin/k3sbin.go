// Package k3sbin finds the k3s that tests run against and says which one it
// is: $K3S, k3s on PATH, a pinned official release checked by its digest, else
// the stand-in (lab/standin), which is built when it is not there. What a test
// reports must carry Kind: green on the stand-in is not "k3s works".
package k3sbin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The kinds of k3s.
const (
	Real    = "real"
	StandIn = "stand-in"
)

// Binary is a k3s program.
type Binary struct {
	Path    string   // absolute
	Kind    string   // Real or StandIn
	Version string   // "v1.36.3+k3s1"
	Env     []string // what its environment needs beside the caller's
}

// Config says where to look. The zero value looks at $K3S and PATH, then
// builds the stand-in of the checkout that the working directory is in.
type Config struct {
	// Root is the checkout; found upwards from the working directory if "".
	Root string
	// Fetch allows the download of the pinned release into Cache.
	Fetch bool
	// Cache is the directory for a fetched release; the user's cache if "".
	Cache string
	// Log gets what takes long; nil discards it.
	Log io.Writer
}

// ErrNone means that no k3s is at hand and none can be built.
var ErrNone = errors.New("no k3s at hand")

// Find returns the first k3s there is. $K3S that does not run is an error, not
// a reason to look on.
func Find(ctx context.Context, c Config) (Binary, error) {
	if p := os.Getenv("K3S"); p != "" {
		b, err := Inspect(ctx, p)
		if err != nil {
			return Binary{}, fmt.Errorf("k3sbin: use $K3S: %w", err)
		}
		return b, nil
	}
	if p, err := exec.LookPath("k3s"); err == nil {
		if b, err := Inspect(ctx, p); err == nil {
			return b, nil
		}
	}
	if c.Fetch {
		p, err := Fetch(ctx, c)
		if err == nil {
			return Inspect(ctx, p)
		}
		if c.Log != nil {
			fmt.Fprintf(c.Log, "k3sbin: no official release: %v\n", err)
		}
	}
	p, err := Build(ctx, c)
	if err != nil {
		return Binary{}, fmt.Errorf("k3sbin: %w: %w", ErrNone, err)
	}
	return Inspect(ctx, p)
}

// Inspect asks a program for its version and tells its kind.
func Inspect(ctx context.Context, path string) (Binary, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Binary{}, fmt.Errorf("k3sbin: inspect: %w", err)
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return Binary{}, fmt.Errorf("k3sbin: ask %s for its version: %w", path, err)
	}
	return parse(path, string(out))
}

func parse(path, out string) (Binary, error) {
	line, _, _ := strings.Cut(out, "\n")
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "k3s" || f[1] != "version" || !strings.HasPrefix(f[2], "v") {
		return Binary{}, fmt.Errorf("k3sbin: %s is no k3s: its version line is %q", path, line)
	}
	b := Binary{Path: path, Kind: Real, Version: f[2]}
	if strings.Contains(f[2], "standin") {
		b.Kind, b.Env = StandIn, []string{"LAB_STANDIN=1"}
	}
	return b, nil
}

// Build makes bin/k3s-standin of the checkout and returns its path. With a warm
// build cache that takes seconds, from a cold one minutes.
func Build(ctx context.Context, c Config) (string, error) {
	root := c.Root
	if root == "" {
		var err error
		if root, err = findRoot(); err != nil {
			return "", err
		}
	}
	if c.Log != nil {
		fmt.Fprintln(c.Log, "k3sbin: building the stand-in (minutes from a cold build cache)")
	}
	cmd := exec.CommandContext(ctx, "make", "--no-print-directory", "bin/k3s-standin")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("k3sbin: build the stand-in: %w: %s", err, tail(out))
	}
	return filepath.Join(root, "bin", "k3s-standin"), nil
}

func tail(b []byte) string {
	if len(b) > 500 {
		b = b[len(b)-500:]
	}
	return strings.TrimSpace(string(b))
}

func findRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("k3sbin: find checkout: %w", err)
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "lab", "standin", "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("k3sbin: find checkout: no lab/standin above %s", dir)
		}
	}
}
