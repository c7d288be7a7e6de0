package k3sbin

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/renameio/v2"
)

// pins holds the releases that may be fetched: version, architecture, SHA-256.
// A digest comes from a person who compared it with the release's own list;
// there is no way to fetch anything else.
//
//go:embed pins.txt
var pins string

// ErrNoPin means that no release is pinned for this architecture.
var ErrNoPin = errors.New("no k3s release is pinned for this architecture")

// maxRelease bounds a download.
const maxRelease = 512 << 20

// Pin is one release that may be fetched.
type Pin struct {
	Version, Arch string
	SHA256        [sha256.Size]byte
}

// URL is the address of the release's program.
func (p Pin) URL() string {
	name := "k3s"
	if p.Arch != "amd64" {
		name += "-" + p.Arch
	}
	return "https://github.com/k3s-io/k3s/releases/download/" + url.PathEscape(p.Version) + "/" + name
}

// parsePins reads the list of pins; blank lines and those with # are skipped.
func parsePins(text string) ([]Pin, error) {
	var out []Pin
	sc := bufio.NewScanner(strings.NewReader(text))
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 || !strings.HasPrefix(f[0], "v") {
			return nil, fmt.Errorf("k3sbin: read pins: line %d: want version, architecture and SHA-256", n)
		}
		p := Pin{Version: f[0], Arch: f[1]}
		d, err := hex.DecodeString(f[2])
		if err != nil || len(d) != len(p.SHA256) {
			return nil, fmt.Errorf("k3sbin: read pins: line %d: bad SHA-256", n)
		}
		copy(p.SHA256[:], d)
		out = append(out, p)
	}
	return out, sc.Err()
}

// Fetch downloads the pinned release for this machine, or finds it in the
// cache; either way its digest is checked before the path is returned.
func Fetch(ctx context.Context, c Config) (string, error) {
	all, err := parsePins(pins)
	if err != nil {
		return "", err
	}
	for _, p := range all {
		if p.Arch == runtime.GOARCH {
			return fetch(ctx, c, p, p.URL(), http.DefaultClient)
		}
	}
	return "", fmt.Errorf("k3sbin: fetch k3s: %w", ErrNoPin)
}

func fetch(ctx context.Context, c Config, p Pin, from string, client *http.Client) (string, error) {
	dir := c.Cache
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("k3sbin: fetch k3s: %w", err)
		}
		dir = filepath.Join(base, "muster", "k3s")
	}
	path := filepath.Join(dir, hex.EncodeToString(p.SHA256[:8])+"-k3s")
	if f, err := os.Open(path); err == nil {
		h := sha256.New()
		_, err = io.Copy(h, f)
		_ = f.Close()
		if err == nil && [sha256.Size]byte(h.Sum(nil)) == p.SHA256 {
			return path, nil
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("k3sbin: fetch k3s: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return "", fmt.Errorf("k3sbin: fetch k3s: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("k3sbin: fetch k3s: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("k3sbin: fetch k3s from %s: status %d", from, resp.StatusCode)
	}
	out, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o755))
	if err != nil {
		return "", fmt.Errorf("k3sbin: fetch k3s: %w", err)
	}
	defer out.Cleanup() //nolint:errcheck // no-op after the replace
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(resp.Body, maxRelease)); err != nil {
		return "", fmt.Errorf("k3sbin: fetch k3s from %s: %w", from, err)
	}
	if got := [sha256.Size]byte(h.Sum(nil)); got != p.SHA256 {
		return "", fmt.Errorf("k3sbin: fetch k3s from %s: SHA-256 is %x, pinned is %x: nothing was kept", from, got, p.SHA256)
	}
	if err := out.CloseAtomicallyReplace(); err != nil {
		return "", fmt.Errorf("k3sbin: fetch k3s: %w", err)
	}
	return path, nil
}
