// Package secureboot makes the keys with which machines start nothing but our
// images, and the files that bring them into a firmware: PK, KEK and db with
// certificates, signature lists and authenticated variables.
//
// It returns files and writes none; where the private keys go is the caller's
// business. It signs no programs (the image build does, by sbsign) and makes
// no dbx.
package secureboot

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"strings"
	"text/template"
	"time"
	"unicode"
)

// Years is how long the certificates are valid. Firmware does not look at the
// date when it boots; programs that sign do.
const Years = 10

const (
	bits           = 2048 // what every firmware takes
	maxCertificate = 64 << 10
	maxForeign     = 16
	maxName        = 40
)

// Config says what kit to make.
type Config struct {
	// Name stands in the certificates, so that a person sees in a firmware's
	// menu whose keys these are: 1 to 40 printable characters.
	Name string
	// Now is the time of the signatures and begins the certificates.
	Now time.Time
	// Foreign certificates also get into db, with Microsoft as their owner:
	// what they signed starts too.
	Foreign []*x509.Certificate
}

func (c Config) validate() error {
	var problems []error
	if c.Name == "" || len(c.Name) > maxName || strings.ContainsFunc(c.Name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		problems = append(problems, fmt.Errorf("name %.60q is not 1 to %d printable characters", c.Name, maxName))
	}
	if y := c.Now.Year(); y < 2000 || y > 9000 {
		problems = append(problems, fmt.Errorf("time %v is none", c.Now))
	}
	if len(c.Foreign) > maxForeign {
		problems = append(problems, fmt.Errorf("%d foreign certificates, more than %d", len(c.Foreign), maxForeign))
	}
	for i, f := range c.Foreign {
		for _, g := range c.Foreign[:i] {
			if bytes.Equal(f.Raw, g.Raw) {
				problems = append(problems, fmt.Errorf("the certificate of %q is given twice", f.Subject))
			}
		}
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("secureboot: make kit: %w", err)
	}
	return nil
}

// File is one file of a kit.
type File struct {
	// Name is relative, with slashes: keys/... holds what must stay secret,
	// enroll/... what goes to machines.
	Name string
	// Mode is 0600 for private keys.
	Mode fs.FileMode
	Data []byte
}

// Folders of a kit.
const (
	KeysFolder   = "keys"
	EnrollFolder = "enroll"
)

// Make makes new keys and everything that belongs to them.
func Make(cfg Config) ([]File, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	now := cfg.Now.UTC().Truncate(time.Second)
	var owner guid
	if _, err := rand.Read(owner[:]); err != nil {
		return nil, fmt.Errorf("secureboot: make kit: %w", err)
	}
	owner[6], owner[8] = owner[6]&0x0f|0x40, owner[8]&0x3f|0x80 // RFC 9562, version 4

	var files []File
	add := func(folder, name string, mode fs.FileMode, data []byte) {
		files = append(files, File{folder + "/" + name, mode, data})
	}
	type pair struct {
		key  *rsa.PrivateKey
		cert *x509.Certificate
	}
	pairs := map[string]pair{}
	for _, v := range []variable{varPK, varKEK, varDB} {
		key, cert, err := newPair(cfg.Name+" "+v.name, now)
		if err != nil {
			return nil, fmt.Errorf("secureboot: make %s: %w", v.name, err)
		}
		pairs[v.name] = pair{key, cert}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("secureboot: make %s: %w", v.name, err)
		}
		add(KeysFolder, v.name+".key", 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		add(KeysFolder, v.name+".crt", 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	}
	// PK signs itself and KEK, KEK signs db (UEFI 2.10, section 32.3).
	for _, v := range []struct {
		variable
		signer string
	}{{varDB, "KEK"}, {varKEK, "PK"}, {varPK, "PK"}} {
		list := signatureList(owner, pairs[v.name].cert)
		if v.variable == varDB {
			for _, f := range cfg.Foreign {
				list = append(list, signatureList(ownerMicrosoft, f)...)
			}
		}
		by := pairs[v.signer]
		auth, err := authenticated(v.variable, now, list, by.cert, by.key)
		if err != nil {
			return nil, err
		}
		add(EnrollFolder, v.name+".auth", 0o644, auth)
		add(EnrollFolder, v.name+".esl", 0o644, list)
		add(EnrollFolder, v.name+".cer", 0o644, pairs[v.name].cert.Raw)
	}
	for i, f := range cfg.Foreign {
		add(EnrollFolder, fmt.Sprintf("db-foreign-%d.cer", i+1), 0o644, f.Raw)
	}
	text, err := readme(cfg, now, owner, sha256.Sum256(pairs["db"].cert.Raw))
	if err != nil {
		return nil, err
	}
	return append(files, File{"README.md", 0o644, text}), nil
}

// newPair makes a key and a self-signed certificate of the form that
// `openssl req -x509` makes, which firmware has seen most.
func newPair(name string, now time.Time) (*rsa.PrivateKey, *x509.Certificate, error) {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: now, NotAfter: now.AddDate(Years, 0, 0),
		IsCA: true, BasicConstraintsValid: true, SignatureAlgorithm: x509.SHA256WithRSA,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return key, cert, err
}

// ParseCertificate reads a certificate in DER or PEM form, as vendors give
// them out. It takes exactly one.
func ParseCertificate(data []byte) (*x509.Certificate, error) {
	if len(data) > maxCertificate {
		return nil, fmt.Errorf("secureboot: read certificate: %d bytes, more than %d", len(data), maxCertificate)
	}
	if block, rest := pem.Decode(data); block != nil {
		if block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, fmt.Errorf("secureboot: read certificate: want one CERTIFICATE in PEM form, found a %.40q or more", block.Type)
		}
		data = block.Bytes
	}
	cert, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, fmt.Errorf("secureboot: read certificate: %w", err)
	}
	return cert, nil
}

//go:embed readme.md.tmpl
var readmeText string

var readmeTemplate = template.Must(template.New("readme").Parse(readmeText))

func readme(cfg Config, now time.Time, owner guid, db [32]byte) ([]byte, error) {
	var subjects []string
	for _, f := range cfg.Foreign {
		// Names come from a file of somebody else's.
		subjects = append(subjects, strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) || r == '`' {
				return '?'
			}
			return r
		}, f.Subject.String()))
	}
	var b bytes.Buffer
	err := readmeTemplate.Execute(&b, map[string]any{
		"Name": cfg.Name, "Made": now.Format(time.DateOnly), "Ends": now.AddDate(Years, 0, 0).Format(time.DateOnly),
		"Owner": owner.String(), "DB": fmt.Sprintf("%x", db), "Foreign": subjects,
	})
	if err != nil {
		return nil, fmt.Errorf("secureboot: write README: %w", err)
	}
	return b.Bytes(), nil
}
