package ekcert

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

const (
	// LabDir is the sub-directory whose roots vouch for test machines only.
	LabDir = "lab"

	maxRootFile = 1 << 20
	maxRoots    = 2048
)

// Root is one certificate of a roots directory.
type Root struct {
	// File is the name of the file, relative to the directory.
	File string
	// Subject is the certificate's, for display.
	Subject string
	// SHA256 is over the DER.
	SHA256 [32]byte
	// Lab is true for what lies in LabDir.
	Lab bool
	// Anchor is true for a self-signed certificate. The others, whatever file
	// they came in, only help to build chains.
	Anchor      bool
	Certificate *x509.Certificate
}

// Roots is what a roots directory holds.
type Roots struct {
	// All are the certificates, each once, by file name.
	All []Root
	// Vendor and Lab hold anchors only; they are never nil.
	Vendor, Lab *x509.CertPool
	// Intermediates are the rest.
	Intermediates []*x509.Certificate
	// Names maps the SHA-256 of an anchor to its file name and subject; it is
	// what pki.Policy.RootNames wants.
	Names map[[32]byte]string
	// Problems are the files that could not be used, one error each. They do
	// not keep the others from being used.
	Problems []error
}

// LoadRoots reads the certificates (PEM, any number per file, or DER; *.pem,
// *.crt, *.cer, *.der) in dir and in dir/lab. A file that is bad is reported
// in Problems; a directory that is not there has no certificates. The error
// is only about a directory that cannot be read.
func LoadRoots(dir string) (Roots, error) {
	r := Roots{Vendor: x509.NewCertPool(), Lab: x509.NewCertPool(), Names: map[[32]byte]string{}}
	seen := map[[33]byte]bool{}
	for _, lab := range []bool{false, true} {
		sub := ""
		if lab {
			sub = LabDir
		}
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return r, fmt.Errorf("ekcert: read roots: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() || !isCertificateFile(e.Name()) {
				continue
			}
			name := filepath.Join(sub, e.Name())
			certs, err := readFile(filepath.Join(dir, name))
			if err != nil {
				r.Problems = append(r.Problems, fmt.Errorf("ekcert: read roots: %s: %w", name, err))
			}
			for _, c := range certs {
				if len(r.All) >= maxRoots {
					r.Problems = append(r.Problems, fmt.Errorf("ekcert: read roots: %s: more than %d certificates", name, maxRoots))
					break
				}
				r.add(seen, name, lab, c)
			}
		}
	}
	sort.SliceStable(r.All, func(i, j int) bool { return r.All[i].File < r.All[j].File })
	return r, nil
}

func (r *Roots) add(seen map[[33]byte]bool, file string, lab bool, c *x509.Certificate) {
	root := Root{File: file, Subject: c.Subject.String(), SHA256: sha256.Sum256(c.Raw), Lab: lab, Anchor: selfSigned(c), Certificate: c}
	var key [33]byte
	copy(key[:], root.SHA256[:])
	if lab {
		key[32] = 1
	}
	if seen[key] {
		return
	}
	seen[key] = true
	r.All = append(r.All, root)
	switch {
	case !root.Anchor:
		r.Intermediates = append(r.Intermediates, c)
		return
	case lab:
		r.Lab.AddCert(c)
	default:
		r.Vendor.AddCert(c)
	}
	if _, ok := r.Names[root.SHA256]; !ok {
		r.Names[root.SHA256] = file + " (" + root.Subject + ")"
	}
}

// selfSigned tells an anchor: issuer and subject are one, and its own key
// signed it. Some old vendor roots are signed with SHA-1, which Go does not
// check; what a root says of itself proves nothing anyway, the operator who
// put it here vouches for it.
func selfSigned(c *x509.Certificate) bool {
	if !bytes.Equal(c.RawIssuer, c.RawSubject) {
		return false
	}
	err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature)
	var insecure x509.InsecureAlgorithmError
	return err == nil || errors.As(err, &insecure)
}

func isCertificateFile(name string) bool {
	switch strings.ToLower(filepath.Ext(name)) {
	case ".pem", ".crt", ".cer", ".der":
		return !strings.HasPrefix(name, ".")
	}
	return false
}

// readFile returns the certificates of a file; with an error, those that
// could be read.
func readFile(path string) ([]*x509.Certificate, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxRootFile {
		return nil, fmt.Errorf("not a regular file of at most %d bytes", maxRootFile)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ParseRoots(b)
}

// ParseRoots reads root and intermediate certificates, PEM or DER; with an
// error, it returns those that could be read.
func ParseRoots(b []byte) ([]*x509.Certificate, error) {
	if !bytes.Contains(b, []byte("-----BEGIN")) {
		c, err := ParseIntermediate(b)
		if err != nil {
			return nil, err
		}
		return []*x509.Certificate{c}, nil
	}
	var out []*x509.Certificate
	var problems []error
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			problems = append(problems, fmt.Errorf("PEM block is %q, not a certificate", block.Type))
			continue
		}
		c, err := ParseIntermediate(block.Bytes)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		out = append(out, c)
	}
	if len(out) == 0 && len(problems) == 0 {
		problems = append(problems, errors.New("holds no certificate"))
	}
	return out, errors.Join(problems...)
}
