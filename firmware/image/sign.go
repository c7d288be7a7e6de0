package image

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/muster-edge/muster/firmware"
)

// sign adds a Secure Boot signature to a made image.
func sign(ctx context.Context, cfg RecoveryConfig, m made) (made, error) {
	cfg.Note("signing for Secure Boot")
	signed, cert, err := signPE(ctx, cfg.SignKey, cfg.SignCert, m.efi)
	if err != nil {
		return m, err
	}
	added := int64(len(signed) - len(m.efi))
	m.parts = append(m.parts, firmware.Part{Name: "signature", Size: added, Packed: added})
	m.secure = firmware.SecureBoot{SignerCertSHA256: cert}
	m.efi = signed
	return m, nil
}

// signPE signs a program with sbsign and checks that nothing else about it
// changed. It returns the digest of the certificate, too.
func signPE(ctx context.Context, signKey, signCert string, efi []byte) ([]byte, firmware.Digest, error) {
	var none firmware.Digest
	certPEM, err := os.ReadFile(signCert)
	if err != nil {
		return nil, none, fmt.Errorf("image: read signing certificate: %w", err)
	}
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, none, fmt.Errorf("image: read signing certificate: %s holds no certificate in PEM form", signCert)
	}
	if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		return nil, none, fmt.Errorf("image: read signing certificate: %w", err)
	}
	for _, tool := range []string{"sbsign", "sbverify"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, none, fmt.Errorf("image: sign: %s is not here: install the package sbsigntool, or leave out --sign-key", tool)
		}
	}
	dir, err := os.MkdirTemp("", "muster-sign-")
	if err != nil {
		return nil, none, fmt.Errorf("image: sign: %w", err)
	}
	defer os.RemoveAll(dir)
	in, out := filepath.Join(dir, "in.efi"), filepath.Join(dir, "out.efi")
	if err := os.WriteFile(in, efi, 0o600); err != nil {
		return nil, none, fmt.Errorf("image: sign: %w", err)
	}
	if text, err := exec.CommandContext(ctx, "sbsign", "--key", signKey, "--cert", signCert, "--output", out, in).CombinedOutput(); err != nil {
		return nil, none, fmt.Errorf("image: sign: sbsign: %w: %s (the key must be an unencrypted PEM file and belong to the certificate)", err, lastLine(string(text)))
	}
	// Another look before machines in the field take one.
	if text, err := exec.CommandContext(ctx, "sbverify", "--cert", signCert, out).CombinedOutput(); err != nil {
		return nil, none, fmt.Errorf("image: sign: the signature does not verify: %s (do key and certificate belong together?)", lastLine(string(text)))
	}
	signed, err := os.ReadFile(out)
	if err != nil {
		return nil, none, fmt.Errorf("image: sign: %w", err)
	}
	before, err := authenticode(efi)
	if err != nil {
		return nil, none, err
	}
	after, err := authenticode(signed)
	if err != nil {
		return nil, none, err
	}
	if before != after {
		return nil, none, fmt.Errorf("image: sign: sbsign changed the image itself; its version may not fit")
	}
	return signed, sha256.Sum256(block.Bytes), nil
}

// authenticode is the digest that firmware extends PCR 4 with.
func authenticode(efi []byte) (firmware.Digest, error) {
	pe, err := firmware.ParsePE(efi)
	if err != nil {
		return firmware.Digest{}, err
	}
	return pe.Authenticode()
}
