package main

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet/statement"
)

// sidecar is what the name of a file's signature ends in.
const sidecar = ".dsse.json"

func releaseSignCommand() *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use:   "sign FILE... --key FILE",
		Short: "Sign files of a release: writes FILE" + sidecar + " beside each",
		Long: `Signs name, size and SHA-256 of each file with the release key, as a DSSE
envelope beside it. Nothing is written if one of the files cannot be signed.
Images carry a signed manifest of their own and need this only as files for
people to download.`,
		Example: `  muster release sign dist/muster dist/recovery.iso --key release.key
  muster release verify dist/muster dist/recovery.iso --pub release.key.pub`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" {
				return exitError{2, errors.New("signed by whom? Give --key FILE (`muster release keygen` makes one)")}
			}
			signer, err := readSigner("--key", key)
			if err != nil {
				return err
			}
			var problems []error
			envelopes := make([][]byte, len(args))
			for i, path := range args {
				if envelopes[i], err = signArtifact(path, signer); err != nil {
					problems = append(problems, err)
				}
			}
			if err := errors.Join(problems...); err != nil {
				return fmt.Errorf("nothing was signed: %w", err)
			}
			for i, path := range args {
				if err := renameio.WriteFile(path+sidecar, envelopes[i], 0o644); err != nil {
					return fmt.Errorf("write signature: %w", err)
				}
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), path+sidecar); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "PEM file with the release key")
	return cmd
}

func signArtifact(path string, signer crypto.Signer) ([]byte, error) {
	size, sum, err := hashFile(path)
	if err != nil {
		return nil, err
	}
	payload, err := firmware.Artifact{Format: firmware.ArtifactFormat, Name: filepath.Base(path), Size: size, SHA256: sum}.JSON()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	envelope, err := statement.Sign(firmware.ArtifactType, payload, signer)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return append(envelope.JSON(), '\n'), nil
}

// hashFile reads a regular file of any size.
func hashFile(path string) (int64, firmware.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, firmware.Digest{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, firmware.Digest{}, err
	}
	if !info.Mode().IsRegular() {
		return 0, firmware.Digest{}, fmt.Errorf("%s is not a file", path)
	}
	h := sha256.New()
	size, err := io.Copy(h, f)
	if err != nil {
		return 0, firmware.Digest{}, fmt.Errorf("read %s: %w", path, err)
	}
	return size, firmware.Digest(h.Sum(nil)), nil
}

// artifactCheck is one line of `muster release verify`.
type artifactCheck struct {
	File string `json:"file"`
	OK   bool   `json:"ok"`
	// Detail is the digest of a good file, or what is wrong.
	Detail string `json:"detail"`
}

func releaseVerifyCommand() *cobra.Command {
	var pub, output string
	cmd := &cobra.Command{
		Use:   "verify FILE... --pub FILE",
		Short: "Check files of a release against FILE" + sidecar + " beside each",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if pub == "" {
				return exitError{2, errors.New("whose signature should count? Give --pub FILE")}
			}
			text, err := os.ReadFile(pub)
			if err != nil {
				return fmt.Errorf("--pub: %w", err)
			}
			keys, err := statement.ParseKeys(text)
			if err != nil {
				return fmt.Errorf("--pub: %w", err)
			}
			var checks []artifactCheck
			failed := 0
			for _, path := range args {
				sum, err := verifyArtifact(path, keys)
				c := artifactCheck{File: path, OK: err == nil, Detail: "sha256 " + sum.String()}
				if err != nil {
					failed++
					c.Detail = err.Error()
				}
				checks = append(checks, c)
			}
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), checks)
			} else {
				t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				for _, c := range checks {
					word := "ok"
					if !c.OK {
						word = "FAILED"
					}
					fmt.Fprintf(t, "%s\t%s\t%s\n", word, c.File, c.Detail)
				}
				err = t.Flush()
			}
			if err == nil && failed > 0 {
				err = fmt.Errorf("%d of %d files failed: do not use them; fetch them again from their source", failed, len(checks))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&pub, "pub", "", "PEM file with the release public keys that count")
	outputFlag(cmd, &output)
	return cmd
}

func verifyArtifact(path string, keys []crypto.PublicKey) (firmware.Digest, error) {
	f, err := os.Open(path + sidecar)
	if errors.Is(err, os.ErrNotExist) {
		return firmware.Digest{}, fmt.Errorf("no %s beside it: it was not signed, or the signature was left behind", filepath.Base(path)+sidecar)
	}
	if err != nil {
		return firmware.Digest{}, err
	}
	defer f.Close()
	envelope, err := io.ReadAll(io.LimitReader(f, firmware.MaxArtifact+1))
	if err != nil {
		return firmware.Digest{}, err
	}
	a, err := firmware.OpenArtifact(envelope, keys)
	if err != nil {
		return firmware.Digest{}, err
	}
	size, sum, err := hashFile(path)
	if err != nil {
		return sum, err
	}
	return sum, a.Differs(filepath.Base(path), size, sum)
}
