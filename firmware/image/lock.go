package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
)

// LockFormat is the value of Lock.Format.
const LockFormat = "muster/image-lock/v1"

// maxLock bounds a lock file, in bytes.
const maxLock = 1 << 20

// Lock names the packages of an image exactly. A build with a lock takes
// these and no others.
type Lock struct {
	// Format is LockFormat.
	Format string `json:"format"`
	// Packages sorted by name.
	Packages []Package `json:"packages"`
}

// ParseLock reads a lock file, strictly.
func ParseLock(b []byte) (*Lock, error) {
	if len(b) > maxLock {
		return nil, fmt.Errorf("image: read lock: %d bytes, more than %d", len(b), maxLock)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var l Lock
	if err := d.Decode(&l); err != nil {
		return nil, fmt.Errorf("image: read lock: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("image: read lock: data after the end")
	}
	if l.Format != LockFormat {
		return nil, fmt.Errorf("image: read lock: format is %.40q, want %q", l.Format, LockFormat)
	}
	seen := map[string]bool{}
	for _, p := range l.Packages {
		if !packageForm.MatchString(p.Name) || !versionForm.MatchString(p.Version) || p.SHA256.IsZero() || seen[p.Name] {
			return nil, fmt.Errorf("image: read lock: package %.80q %.80q is malformed or there twice", p.Name, p.Version)
		}
		seen[p.Name] = true
	}
	return &l, nil
}

// JSON returns the lock as a file.
func (l Lock) JSON() ([]byte, error) {
	l.Format = LockFormat
	l.Packages = append([]Package(nil), l.Packages...)
	sort.Slice(l.Packages, func(i, j int) bool { return l.Packages[i].Name < l.Packages[j].Name })
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("image: write lock: %w", err)
	}
	return append(b, '\n'), nil
}
