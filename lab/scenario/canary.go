package scenario

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// canary is a secret's bytes, as they would look where they must not be.
type canary struct {
	name  string
	bytes []byte
}

// maxScan caps a file that is searched; larger ones are an error, not a pass.
const maxScan = 1 << 30

var tokenLine = regexp.MustCompile(`(?m)^\s*token:\s*"?([^\s"]+)"?\s*$`)

// canaries collects the secrets of a centre's data directory: the
// administrator's token, every private key (its DER, its scalar, a line of
// its PEM text) and the key that seals the cookie keys.
func canaries(dir string) ([]canary, error) {
	var out []canary
	add := func(name string, b []byte) {
		// A few bytes could be anywhere by chance; a long secret may be split
		// between packets, so its middle is enough.
		if len(b) >= 16 {
			if len(b) > 48 {
				b = b[len(b)/2-16 : len(b)/2+16]
			}
			out = append(out, canary{name, bytes.Clone(b)})
		}
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name := filepath.Base(path)
		info, err := d.Info()
		if err != nil || info.Size() > 1<<20 {
			return err // the database; what is secret in it is sealed
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		switch {
		case name == "admin.yaml":
			m := tokenLine.FindSubmatch(b)
			if m == nil {
				return fmt.Errorf("%s has no token", path)
			}
			add("administrator's token", m[1])
		case strings.HasSuffix(name, ".key"):
			block, _ := pem.Decode(b)
			if block == nil {
				add(name, b)
				return nil
			}
			add(name+" (DER)", block.Bytes)
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			add(name+" (PEM)", []byte(lines[len(lines)/2]))
			if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if k, ok := key.(*ecdsa.PrivateKey); ok {
					if raw, err := k.Bytes(); err == nil {
						add(name+" (scalar)", raw)
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("scenario: collect secrets: %w", err)
	}
	return out, nil
}

// search looks for every canary in files and folders; each hit is an error.
func search(secrets []canary, places ...string) error {
	var hits []error
	for _, place := range places {
		err := filepath.WalkDir(place, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if info.Size() > maxScan {
				return fmt.Errorf("%s has %d bytes, too many to search", path, info.Size())
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, s := range secrets {
				if bytes.Contains(b, s.bytes) {
					hits = append(hits, fmt.Errorf("%s holds %s", path, s.name))
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("scenario: search for secrets: %w", err)
		}
	}
	return errors.Join(hits...)
}

// searchCommandLines looks for canaries in the command lines of all processes
// of the lab; /proc shows these only.
func searchCommandLines(secrets []canary) error {
	list, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(list) == 0 {
		return fmt.Errorf("scenario: search command lines: %d processes, %w", len(list), err)
	}
	var hits []error
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for _, s := range secrets {
			if bytes.Contains(b, s.bytes) {
				hits = append(hits, fmt.Errorf("the command line %q holds %s", bytes.ReplaceAll(b, []byte{0}, []byte{' '}), s.name))
			}
		}
	}
	return errors.Join(hits...)
}
