package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/fleet/statement"
)

// releaseCommand is `muster release`: the release key, which signs image
// manifests and stack versions and is never at the centre.
func releaseCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "release",
		Short: "Put a quarantined request back into the queue; and the release key",
		Long: `With a request: puts it back into the queue after a quarantine or a rejection.
Somebody must still approve it. Look first where the doubt came from:
` + "`muster describe request ID`" + ` names the addresses that the TPM called from.

The verbs below are about another thing, the release key, which signs what
machines may run and is never at the centre.`,
	}
	releaseRequestFlags(cmd)
	cmd.AddCommand(releaseKeygenCommand(), releaseSignCommand(), releaseVerifyCommand(), releaseStackCommand(), releaseSecureBootCommand())
	return cmd
}

func releaseKeygenCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "keygen --out FILE",
		Short: "Make a release key (ECDSA P-256): FILE is the private key, FILE.pub the public one",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return exitError{2, errors.New("where to? Give --out FILE")}
			}
			if err := writeReleaseKey(out); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s      private: keep it offline, never at the centre\n%s.pub  public: for `muster image recovery` and the centre\n", out, out)
			return err
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file for the private key; it must not exist")
	return cmd
}

// writeReleaseKey makes a key pair. It never overwrites: a lost release key
// means new images on every machine.
func writeReleaseKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make release key: %w", err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("make release key: %w", err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("make release key: %w", err)
	}
	files := []struct {
		path  string
		mode  os.FileMode
		block pem.Block
	}{
		{path, 0o600, pem.Block{Type: "PRIVATE KEY", Bytes: private}},
		{path + ".pub", 0o644, pem.Block{Type: "PUBLIC KEY", Bytes: public}},
	}
	for _, f := range files {
		if _, err := os.Lstat(f.path); err == nil {
			return fmt.Errorf("make release key: %s is there already: choose another --out, or move it away", f.path)
		}
	}
	for _, f := range files {
		// O_EXCL closes the gap after the look above.
		w, err := os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.mode)
		if err != nil {
			return fmt.Errorf("make release key: %w", err)
		}
		err = pem.Encode(w, &f.block)
		if err == nil {
			err = w.Sync()
		}
		if err := errors.Join(err, w.Close()); err != nil {
			return fmt.Errorf("make release key: %w", err)
		}
	}
	return nil
}

// readReleaseKey reads the key of --release-key.
func readReleaseKey(path string) (crypto.Signer, error) {
	return readSigner("--release-key", path)
}

// readSigner reads what writeReleaseKey wrote, or an Ed25519 key in the same
// form. flag is named in errors.
func readSigner(flag, path string) (crypto.Signer, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w (`muster release keygen --out %s` makes one)", flag, err, path)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("%s: %s is not one PRIVATE KEY block in PEM form (PKCS#8, unencrypted)", flag, path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", flag, path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: %s holds a key that cannot sign", flag, path)
	}
	if _, err := statement.KeyID(signer.Public()); err != nil {
		return nil, fmt.Errorf("%s: %s: %w", flag, path, err)
	}
	return signer, nil
}
