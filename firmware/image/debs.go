package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/muster-edge/muster/firmware"
)

// Package is one Debian package, exactly.
type Package struct {
	Name    string          `json:"name"`
	Version string          `json:"version"`
	SHA256  firmware.Digest `json:"sha256"`
}

// archiveCache gets packages from Debian's archive through apt, which checks
// the archive's signatures, and keeps them in a folder by name and version.
type archiveCache struct {
	dir string
	// note tells the person at the terminal what takes time.
	note func(format string, args ...any)
}

var (
	packageForm = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,127}$`)
	versionForm = regexp.MustCompile(`^[A-Za-z0-9.+~:-]{1,127}$`)
)

// candidate asks apt for the version it would install now, its digest, and
// what it depends on.
func (a archiveCache) candidate(ctx context.Context, name string) (Package, string, error) {
	args := []string{"show", "--no-all-versions", name}
	out, err := a.run(ctx, "", "apt-cache", args...)
	if err != nil || len(bytes.TrimSpace(out)) == 0 {
		// A fresh machine has no package lists.
		a.note("apt does not know %s; updating the package lists once (apt-get update)", name)
		if _, err := a.run(ctx, "", "apt-get", "update", "-q"); err != nil {
			return Package{}, "", fmt.Errorf("image: find package %s: %w (run `apt-get update` as root, or give --lock with a filled --cache)", name, err)
		}
		if out, err = a.run(ctx, "", "apt-cache", args...); err != nil {
			return Package{}, "", fmt.Errorf("image: find package %s: %w", name, err)
		}
	}
	// One stanza is enough: archives of the same version carry the same file.
	stanza, _, _ := strings.Cut(string(out), "\n\n")
	field := map[string]string{}
	for _, line := range strings.Split(stanza, "\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			field[key] = strings.TrimSpace(value)
		}
	}
	p := Package{Name: field["Package"], Version: field["Version"]}
	if err := p.SHA256.UnmarshalText([]byte(field["SHA256"])); err != nil {
		return Package{}, "", fmt.Errorf("image: find package %s: apt names no SHA-256 for it: %w", name, err)
	}
	if p.Name != name {
		return Package{}, "", fmt.Errorf("image: find package %s: apt answered with %s %s", name, p.Name, p.Version)
	}
	return p, field["Depends"], nil
}

// path is where the package lies in the cache.
func (a archiveCache) path(p Package) string {
	// apt writes the epoch's colon as %3a.
	return filepath.Join(a.dir, p.Name+"_"+url.QueryEscape(p.Version)+"_amd64.deb")
}

// fetch returns the path of a .deb whose bytes have the package's digest.
func (a archiveCache) fetch(ctx context.Context, p Package) (string, error) {
	if !packageForm.MatchString(p.Name) || !versionForm.MatchString(p.Version) {
		return "", fmt.Errorf("image: fetch package: %.80q %.80q is not a package and a version", p.Name, p.Version)
	}
	at := a.path(p)
	switch got, err := fileDigest(at); {
	case err == nil && got == p.SHA256:
		return at, nil
	case err == nil:
		a.note("%s in the cache is damaged; fetching it again", filepath.Base(at))
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("image: read cache: %w", err)
	}
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return "", fmt.Errorf("image: make cache: %w", err)
	}
	tmp, err := os.MkdirTemp(a.dir, ".fetch-")
	if err != nil {
		return "", fmt.Errorf("image: make cache: %w", err)
	}
	defer os.RemoveAll(tmp)
	a.note("fetching %s %s", p.Name, p.Version)
	// As root, apt drops to a user who may not write here, and warns: the
	// digest is checked below, so the sandbox adds nothing.
	if _, err := a.run(ctx, tmp, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", p.Name+"="+p.Version); err != nil {
		return "", fmt.Errorf("image: fetch %s %s: %w (run `apt-get update`; if the archive has moved on, drop --lock to take today's version, or put the file from https://snapshot.debian.org into %s)", p.Name, p.Version, err, a.dir)
	}
	found, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("image: fetch %s %s: apt-get left %d files", p.Name, p.Version, len(found))
	}
	got, err := fileDigest(found[0])
	if err != nil {
		return "", fmt.Errorf("image: fetch %s: %w", p.Name, err)
	}
	if got != p.SHA256 {
		return "", fmt.Errorf("image: fetch %s %s: SHA-256 is %s, want %s: do not use this mirror", p.Name, p.Version, got, p.SHA256)
	}
	if err := os.Rename(found[0], at); err != nil {
		return "", fmt.Errorf("image: fill cache: %w", err)
	}
	return at, nil
}

// fetchAll fills the cache with packages, those that are missing in one go.
func (a archiveCache) fetchAll(ctx context.Context, all []Package) error {
	var missing []Package
	for _, p := range all {
		if got, err := fileDigest(a.path(p)); err != nil || got != p.SHA256 {
			missing = append(missing, p)
		}
	}
	if len(missing) > 1 {
		if err := os.MkdirAll(a.dir, 0o755); err != nil {
			return fmt.Errorf("image: make cache: %w", err)
		}
		tmp, err := os.MkdirTemp(a.dir, ".fetch-")
		if err != nil {
			return fmt.Errorf("image: make cache: %w", err)
		}
		defer os.RemoveAll(tmp)
		a.note("fetching %d packages", len(missing))
		args := []string{"-q", "-o", "APT::Sandbox::User=root", "download"}
		for _, p := range missing {
			args = append(args, p.Name+"="+p.Version)
		}
		// What fails here is tried one by one below, and says why.
		_, _ = a.run(ctx, tmp, "apt-get", args...)
		for _, p := range missing {
			base := strings.ReplaceAll(p.Version, ":", "%3a")
			for _, arch := range []string{"amd64", "all"} {
				name := filepath.Join(tmp, p.Name+"_"+base+"_"+arch+".deb")
				if got, err := fileDigest(name); err == nil && got == p.SHA256 {
					if err := os.Rename(name, a.path(p)); err != nil {
						return fmt.Errorf("image: fill cache: %w", err)
					}
				}
			}
		}
	}
	for _, p := range all {
		if _, err := a.fetch(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// run runs one of Debian's tools and returns its standard output.
func (a archiveCache) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	if _, err := exec.LookPath(name); err != nil {
		return nil, fmt.Errorf("%s is not here: images are built on Debian or Ubuntu", name)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, lastLine(problem.String()))
	}
	return out.Bytes(), nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func fileDigest(path string) (firmware.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return firmware.Digest{}, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return firmware.Digest{}, err
	}
	return firmware.Digest(h.Sum(nil)), nil
}

// maxMember bounds one file of a package in memory.
const maxMember = 128 << 20

// walkDeb calls visit for each regular file of the package whose path (without
// the leading ./) want accepts. dpkg-deb does the unpacking into a stream;
// nothing is written to disk, so modes, owners and links of the package do not
// touch the build host.
func walkDeb(ctx context.Context, deb string, want func(path string) bool, visit func(path string, data []byte) error) error {
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		return fmt.Errorf("image: unpack %s: dpkg-deb is not here: images are built on Debian or Ubuntu", filepath.Base(deb))
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("image: unpack: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("image: unpack: %w", err)
	}
	walkErr := walkTar(bufio.NewReaderSize(out, 1<<20), want, visit)
	if walkErr != nil {
		stop()
		_ = cmd.Wait()
		return fmt.Errorf("image: unpack %s: %w", filepath.Base(deb), walkErr)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("image: unpack %s: %w: %s", filepath.Base(deb), err, lastLine(problem.String()))
	}
	return nil
}

func walkTar(r io.Reader, want func(string) bool, visit func(string, []byte) error) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			// The padding after the end marker, so that the writer ends well.
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(h.Name, "./")
		if h.Typeflag != tar.TypeReg || !want(name) {
			continue
		}
		if h.Size > maxMember {
			return fmt.Errorf("%s has %d bytes, more than %d", name, h.Size, maxMember)
		}
		data := make([]byte, h.Size)
		if _, err := io.ReadFull(t, data); err != nil {
			return err
		}
		if err := visit(name, data); err != nil {
			return err
		}
	}
}

// isChangelog reports whether path is the changelog of a package.
func isChangelog(path string) bool {
	return strings.HasPrefix(path, "usr/share/doc/") &&
		(strings.HasSuffix(path, "/changelog.gz") || strings.HasSuffix(path, "/changelog.Debian.gz"))
}

// changelogDate reads the date of the newest entry of a Debian changelog
// (deb-changelog(5)): the first line " -- name <mail>  date".
func changelogDate(gz []byte) (time.Time, error) {
	r, err := gzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		return time.Time{}, fmt.Errorf("image: read changelog: %w", err)
	}
	lines := bufio.NewScanner(io.LimitReader(r, 4<<20))
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), " -- "); ok {
			_, date, _ := strings.Cut(rest, ">  ")
			t, err := time.Parse("Mon, 2 Jan 2006 15:04:05 -0700", strings.TrimSpace(date))
			if err != nil {
				return time.Time{}, fmt.Errorf("image: read changelog: %w", err)
			}
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("image: read changelog: no signed-off entry")
}
