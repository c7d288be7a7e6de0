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

// sign adds a Secure Boot signature with sbsign and checks that nothing else
// about the image changed.
func sign(ctx context.Context, cfg RecoveryConfig, m made) (made, error) {
	certPEM, err := os.ReadFile(cfg.SignCert)
	if err != nil {
		return m, fmt.Errorf("image: read signing certificate: %w", err)
	}
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return m, fmt.Errorf("image: read signing certificate: %s holds no certificate in PEM form", cfg.SignCert)
	}
	if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		return m, fmt.Errorf("image: read signing certificate: %w", err)
	}
	for _, tool := range []string{"sbsign", "sbverify"} {
		if _, err := exec.LookPath(tool); err != nil {
			return m, fmt.Errorf("image: sign: %s is not here: install the package sbsigntool, or leave out --sign-key", tool)
		}
	}
	dir, err := os.MkdirTemp("", "muster-sign-")
	if err != nil {
		return m, fmt.Errorf("image: sign: %w", err)
	}
	defer os.RemoveAll(dir)
	in, out := filepath.Join(dir, "in.efi"), filepath.Join(dir, "out.efi")
	if err := os.WriteFile(in, m.efi, 0o600); err != nil {
		return m, fmt.Errorf("image: sign: %w", err)
	}
	cfg.Note("signing for Secure Boot")
	if text, err := exec.CommandContext(ctx, "sbsign", "--key", cfg.SignKey, "--cert", cfg.SignCert, "--output", out, in).CombinedOutput(); err != nil {
		return m, fmt.Errorf("image: sign: sbsign: %w: %s (the key must be an unencrypted PEM file and belong to the certificate)", err, lastLine(string(text)))
	}
	// Another look before machines in the field take one.
	if text, err := exec.CommandContext(ctx, "sbverify", "--cert", cfg.SignCert, out).CombinedOutput(); err != nil {
		return m, fmt.Errorf("image: sign: the signature does not verify: %s (do key and certificate belong together?)", lastLine(string(text)))
	}
	signed, err := os.ReadFile(out)
	if err != nil {
		return m, fmt.Errorf("image: sign: %w", err)
	}
	after, err := Measure(signed)
	if err != nil {
		return m, err
	}
	if after.Authenticode != m.measured.Authenticode || after.PCR11 != m.measured.PCR11 {
		return m, fmt.Errorf("image: sign: sbsign changed the image itself; its version may not fit")
	}
	added := int64(len(signed) - len(m.efi))
	m.parts = append(m.parts, firmware.Part{Name: "signature", Size: added, Packed: added})
	m.secure = firmware.SecureBoot{SignerCertSHA256: sha256.Sum256(block.Bytes)}
	m.efi = signed
	return m, nil
}
