package scenario

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/image"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/lab"
)

// deadSlot makes a slot image out of another: its kernel finds no initrd and
// panics. It is measured and signed like any other, since what does not work is
// not what somebody forged.
func deadSlot(l *lab.Lab, of, version string) error {
	if l.Spec.SecureBoot {
		return &lab.UsageError{Err: errors.New("scenario: a dead system is made without Secure Boot only")}
	}
	if len(of) != len(version) {
		return fmt.Errorf("scenario: %s and %s differ in length", of, version)
	}
	m, err := slotManifest(l, of)
	if err != nil {
		return err
	}
	from, to := slotDir(l, of), slotDir(l, version)
	if err := os.MkdirAll(to, 0o755); err != nil {
		return fmt.Errorf("scenario: make a dead system: %w", err)
	}
	for _, f := range m.Files()[1:] {
		if err := os.Symlink(filepath.Join(from, f.File), filepath.Join(to, f.File)); err != nil {
			return fmt.Errorf("scenario: make a dead system: %w", err)
		}
	}
	uki, err := os.ReadFile(filepath.Join(from, m.File))
	if err != nil {
		return fmt.Errorf("scenario: make a dead system: %w", err)
	}
	if err := kill(uki, of, version); err != nil {
		return err
	}
	if m.Measurements, err = measured(uki, m.Measurements.Loader); err != nil {
		return err
	}
	m.Version, m.File = version, fmt.Sprintf("%s-%s-amd64.efi", slotImageName, version)
	m.SHA256, m.Size = sha256.Sum256(uki), int64(len(uki))
	envelope, err := released(l, m)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%s-%s-amd64.manifest", slotImageName, version)
	if err := errors.Join(os.WriteFile(filepath.Join(to, m.File), uki, 0o644), os.WriteFile(filepath.Join(to, name), envelope, 0o644)); err != nil {
		return fmt.Errorf("scenario: make a dead system: %w", err)
	}
	l.Say("lab", "slot-image", fmt.Sprintf("%s@%s is %s@%s with a kernel that finds no initrd", slotImageName, version, slotImageName, of))
	return nil
}

// kill spoils the beginning of the packed initrd, and gives the UKI another
// version of the same length.
func kill(uki []byte, of, version string) error {
	p, err := firmware.ParsePE(uki)
	if err != nil {
		return fmt.Errorf("scenario: make a dead system: %w", err)
	}
	killed, named := false, false
	for _, s := range p.Sections {
		data := uki[s.RawOffset:][:min(s.RawSize, s.VirtualSize)]
		switch s.Name {
		case firmware.SectionInitrd:
			clear(data[:min(4096, len(data))])
			killed = true
		case firmware.SectionOSRel:
			named = bytes.Contains(data, []byte(of))
			copy(data, bytes.ReplaceAll(data, []byte(of), []byte(version)))
		}
	}
	if !killed || !named {
		return errors.New("scenario: make a dead system: the image is not as it should be")
	}
	return nil
}

// measured is what a machine will show that runs the UKI behind this loader.
func measured(uki []byte, loader firmware.Digest) (firmware.Measurements, error) {
	m, err := image.Measure(uki)
	m.Loader = loader
	return m, err
}

// released signs a manifest with the run's release key.
func released(l *lab.Lab, m firmware.Manifest) ([]byte, error) {
	text, err := os.ReadFile(l.Path(releaseKey))
	if err != nil {
		return nil, fmt.Errorf("scenario: sign manifest: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("scenario: sign manifest: the release key is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("scenario: sign manifest: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("scenario: sign manifest: the release key cannot sign")
	}
	payload, err := m.JSON()
	if err != nil {
		return nil, err
	}
	e, err := statement.Sign(firmware.ManifestType, payload, signer)
	if err != nil {
		return nil, err
	}
	return e.JSON(), nil
}
