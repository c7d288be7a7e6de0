package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	// maxOverlayFile and maxOverlayFiles bound what people add: settings, not
	// a second system.
	maxOverlayFile  = 64 << 20
	maxOverlayFiles = 1024
)

// readOverlay reads the files that people add to the root. Of their mode only
// the right to execute counts, so that the builder's umask makes no other
// image; a link is kept as it is.
func readOverlay(dir string) ([]treeFile, error) {
	var out []treeFile
	var problems []error
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if len(out) == maxOverlayFiles {
			return fmt.Errorf("there are more than %d files", maxOverlayFiles)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f := treeFile{path: filepath.ToSlash(rel), mode: 0o644}
		switch {
		case d.Type() == fs.ModeSymlink:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			f.mode, f.data = fs.ModeSymlink, []byte(to)
		case !d.Type().IsRegular():
			problems = append(problems, fmt.Errorf("%s is neither a file nor a link", rel))
			return nil
		case info.Size() > maxOverlayFile:
			problems = append(problems, fmt.Errorf("%s has %d MB, at most %d are taken", rel, info.Size()>>20, maxOverlayFile>>20))
			return nil
		default:
			if info.Mode()&0o100 != 0 {
				f.mode = 0o755
			}
			if f.data, err = os.ReadFile(p); err != nil {
				return err
			}
		}
		if why := reserved(f.path); why != "" {
			problems = append(problems, fmt.Errorf("%s: %s", rel, why))
			return nil
		}
		out = append(out, f)
		return nil
	})
	if err := errors.Join(append(problems, err)...); err != nil {
		return nil, fmt.Errorf("image: read overlay %s: %w", dir, err)
	}
	return out, nil
}

// reserved says why a file cannot be added; "" if it can.
func reserved(name string) string {
	switch first, _, _ := strings.Cut(name, "/"); first {
	case "dev", "proc", "sys", "run", "tmp", "var":
		return "nothing of /" + first + " is kept in a slot: it is made at each start"
	case "bin", "sbin", "lib", "lib32", "lib64", "libx32":
		return "/" + first + " is a link: put it below usr/" + first
	}
	switch name {
	case "etc/muster/site.json":
		return "whom a node trusts comes from --root-ca, --orders-key and --centre"
	case "usr/local/bin/muster-node", "usr/local/bin/k3s", "usr/lib/os-release", "etc/os-release", "etc/machine-id":
		return "the image has this file already, and its manifest speaks of it"
	}
	return ""
}
