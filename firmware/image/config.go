package image

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// RecoveryConfig says what recovery image to build. The zero value of a field
// means the default its comment names.
type RecoveryConfig struct {
	// OutDir receives the files; it is made if it is missing. Required.
	OutDir string
	// Name of the image, a DNS label. Default "recovery".
	Name string
	// Version, as fleet.ValidateVersion. Required.
	Version string
	// Flavour is FlavourGeneric (PCs, servers and virtual machines; the
	// default) or FlavourCloud (virtual machines only, smaller).
	Flavour string
	// NodeBinary is the path of muster-node, a static program for Linux on
	// amd64. Required.
	NodeBinary string

	// Formats are any of FormatUKI, FormatDisk and FormatISO. The UKI is
	// written in any case; default: nothing else.
	Formats []string

	// Site becomes /etc/muster/site.json. Format, Image, Version and
	// TimeFloor are filled in by Build.
	Site fleet.SiteConfig
	// TimeFloor is the earliest time the machine believes. Default: the
	// newest date among the inputs (changelogs of the packages, commit of
	// the node binary), so that the same inputs give the same image.
	TimeFloor time.Time
	// Created is the manifest's date. Default: TimeFloor.
	Created time.Time

	// CacheDir keeps downloaded packages. Default: muster/debs in the
	// user's cache folder.
	CacheDir string
	// Lock demands exactly these packages; nil takes what apt would install
	// now.
	Lock *Lock

	// SignKey and SignCert are the Secure Boot db key (PEM, unencrypted) and
	// its certificate (PEM), both or none.
	SignKey, SignCert string
	// Release signs the manifest: ECDSA P-256 or Ed25519. Without it no
	// envelope is written, and the centre cannot register the image.
	Release crypto.Signer

	// Note receives one line of text for each step that takes time. Default:
	// nothing is said.
	Note func(format string, args ...any)
}

// withDefaults returns a copy with defaults filled in.
func (c RecoveryConfig) withDefaults() (RecoveryConfig, error) {
	if c.Name == "" {
		c.Name = "recovery"
	}
	if c.Flavour == "" {
		c.Flavour = FlavourGeneric
	}
	if c.Note == nil {
		c.Note = func(string, ...any) {}
	}
	if c.CacheDir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return c, fmt.Errorf("image: find cache folder: %w (give --cache DIR)", err)
		}
		c.CacheDir = filepath.Join(base, "muster", "debs")
	}
	c.Site.Format = fleet.SiteConfigFormat
	c.Site.Image, c.Site.Version = c.Name, c.Version
	if c.Release != nil && c.Site.ReleaseKeysPEM == "" {
		der, err := x509.MarshalPKIXPublicKey(c.Release.Public())
		if err != nil {
			return c, fmt.Errorf("image: release key: %w", err)
		}
		c.Site.ReleaseKeysPEM = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	}
	return c, nil
}

// validate returns all problems joined, each with what to do about it.
func (c RecoveryConfig) validate() error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	check(c.OutDir != "", "no output folder: give --out DIR")
	problems = append(problems, fleet.ValidateName("image", c.Name), fleet.ValidateVersion(c.Version))
	check(c.Flavour == FlavourCloud || c.Flavour == FlavourGeneric, "kernel %q is neither cloud nor generic", c.Flavour)
	check(c.NodeBinary != "", "no node program: build bin/muster-node and give --node-binary FILE")
	_, err := checkFormats(c.Formats)
	problems = append(problems, err)
	check((c.SignKey == "") == (c.SignCert == ""), "--sign-key and --sign-cert go together")
	problems = append(problems, checkSite(c.Site))
	if c.Site.Scan != nil {
		media, _ := checkFormats(c.Formats)
		check(slices.Contains(media, FormatDisk), "--mode scan writes to the stick it is started from: give --format disk")
		check(c.Flavour == FlavourGeneric, "--mode scan with --kernel %s: that kernel knows no sticks; leave --kernel out", c.Flavour)
		check(len(c.Site.Centre) == 0 && c.Site.Claim == "", "--mode scan calls nobody: leave --centre and --claim out")
		n := c.Site.Network
		check(n.Address == "" && n.VLAN == 0 && n.Proxy == "", "--mode scan needs no network: leave --address, --vlan and --proxy out")
		if c.Site.Scan.Site != "" {
			problems = append(problems, fleet.ValidateName("site", c.Site.Scan.Site))
		}
	}
	problems = append(problems, checkNetwork(c.Site.Network), checkReach(c.Site))
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	return nil
}

// checkSite wants a site.json that holds public things only, and that a machine
// can use.
func checkSite(site fleet.SiteConfig) error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	for _, centre := range site.Centre {
		u, err := url.Parse(centre)
		check(err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil, "centre %q is not an https URL", centre)
	}
	check(len(site.Centre) == 0 || site.RootsPEM != "", "a centre needs --root-ca FILE: machines trust no other certificate")
	if site.RootsPEM != "" {
		problems = append(problems, checkRoots(site.RootsPEM))
	}
	for flag, text := range map[string]string{"--release-pub": site.ReleaseKeysPEM, "--orders-key": site.OrdersKeysPEM} {
		if text != "" {
			if _, err := statement.ParseKeys([]byte(text)); err != nil {
				problems = append(problems, fmt.Errorf("%s: %w (only the public half belongs into an image)", flag, err))
			}
		}
	}
	return errors.Join(problems...)
}

// checkRoots wants CA certificates and nothing else: a private key pasted
// into the file must never get into an image that everybody may download.
func checkRoots(text string) error {
	rest := []byte(text)
	n := 0
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("--root-ca: holds a %s; only certificates belong into an image", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("--root-ca: %w", err)
		}
		if !cert.IsCA {
			return fmt.Errorf("--root-ca: %q is not a CA certificate", cert.Subject)
		}
		n++
	}
	if n == 0 {
		return errors.New("--root-ca: no certificate in PEM form")
	}
	return nil
}
