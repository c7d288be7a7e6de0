package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/firmware"
)

// loaderPackage is the boot loader of slots (docs/adr/0011-loader.md): that of
// Debian 13, whatever release the builder runs on. Another version needs a run
// of bootmodel.TestRealLoader first, and its own measured boot.
var loaderPackage = Package{
	Name: "systemd-boot-efi", Version: "257.13-1~deb13u1",
	SHA256: mustDigest("390ecdcef9bbb753f51bb6d8f696bdae2f1dbedde7239c49ccb2512f137a8933"),
}

const (
	loaderPath = "usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	// maxLoaderDeb bounds the download; the package has 136 kB.
	maxLoaderDeb = 8 << 20
)

// loaderSources are tried in order. The digest decides, so that the way there
// needs no trust.
var loaderSources = []string{
	"http://deb.debian.org/debian/pool/main/s/systemd/",
	"https://snapshot.debian.org/archive/debian/20260601T000000Z/pool/main/s/systemd/",
}

func mustDigest(text string) firmware.Digest {
	var d firmware.Digest
	if err := d.UnmarshalText([]byte(text)); err != nil {
		panic(err)
	}
	return d
}

// Loader returns Debian's systemd-boot, unsigned, as slots are started with.
// note may be nil.
func Loader(ctx context.Context, cacheDir string, note func(string, ...any)) ([]byte, error) {
	if note == nil {
		note = func(string, ...any) {}
	}
	debs := archiveCache{dir: cacheDir, note: note}
	at := debs.path(loaderPackage)
	if got, err := fileDigest(at); err != nil || got != loaderPackage.SHA256 {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("image: read cache: %w", err)
		}
		if err := fetchLoader(ctx, debs, at); err != nil {
			return nil, err
		}
	}
	var loader []byte
	err := walkDeb(ctx, at, func(p string) bool { return p == loaderPath }, func(_ string, data []byte) error {
		loader = data
		return nil
	})
	if err != nil {
		return nil, err
	}
	if loader == nil {
		return nil, fmt.Errorf("image: %s holds no %s", filepath.Base(at), loaderPath)
	}
	return loader, nil
}

func fetchLoader(ctx context.Context, debs archiveCache, at string) error {
	file := loaderPackage.Name + "_" + loaderPackage.Version + "_amd64.deb"
	var problems []error
	for _, source := range loaderSources {
		debs.note("fetching %s from %s", file, source)
		b, err := download(ctx, source+url.PathEscape(file), maxLoaderDeb)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if got := digestOf(b); got != loaderPackage.SHA256 {
			problems = append(problems, fmt.Errorf("%s: SHA-256 is %s", source, got))
			continue
		}
		if err := os.MkdirAll(debs.dir, 0o755); err != nil {
			return fmt.Errorf("image: make cache: %w", err)
		}
		return renameio.WriteFile(at, b, 0o644)
	}
	return fmt.Errorf("image: fetch boot loader: %w (put a file with SHA-256 %s at %s)", errors.Join(problems...), loaderPackage.SHA256, at)
}

func download(ctx context.Context, from string, limit int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", from, res.Status)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: more than %d bytes", from, limit)
	}
	return b, err
}
