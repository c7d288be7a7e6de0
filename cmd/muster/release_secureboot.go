package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/firmware/secureboot"
)

func releaseSecureBootCommand() *cobra.Command {
	var (
		out, name string
		foreign   []string
	)
	cmd := &cobra.Command{
		Use:   "secureboot-kit --out DIR",
		Short: "Make Secure Boot keys, and the files that enroll them on machines",
		Long: `Makes PK, KEK and db: keys (RSA-2048) and certificates in DIR/keys, and in
DIR/enroll what a firmware in setup mode takes. DIR/README.md says what to do
per firmware. Private keys are written to DIR/keys and to nowhere else.

Graphics, RAID and network cards often carry firmware signed by Microsoft.
--microsoft-ca puts such a certificate into db, so that they keep working.`,
		Example: `  muster release secureboot-kit --out secureboot --microsoft-ca option-rom-ca-2023.crt
  muster image recovery --out out --sign-key secureboot/keys/db.key \
      --sign-cert secureboot/keys/db.crt`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return exitError{2, errors.New("where to? Give --out DIR")}
			}
			cfg := secureboot.Config{Name: name, Now: time.Now()}
			var problems []error
			for _, path := range foreign {
				data, err := os.ReadFile(path)
				if err != nil {
					problems = append(problems, fmt.Errorf("--microsoft-ca: %w", err))
					continue
				}
				cert, err := secureboot.ParseCertificate(data)
				if err != nil {
					problems = append(problems, fmt.Errorf("--microsoft-ca %s: %w", path, err))
					continue
				}
				cfg.Foreign = append(cfg.Foreign, cert)
			}
			if err := errors.Join(problems...); err != nil {
				return err
			}
			files, err := secureboot.Make(cfg)
			if err != nil {
				return err
			}
			if err := writeKit(out, files); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), `%s  private keys: keep them offline, never at the centre
%s  for machines: copy this folder to a stick
%s  what to do per firmware: read it before the first machine
`, filepath.Join(out, secureboot.KeysFolder), filepath.Join(out, secureboot.EnrollFolder), filepath.Join(out, "README.md"))
			return err
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "folder for the kit; it must not exist")
	cmd.Flags().StringVar(&name, "name", "muster", "name in the certificates, such as your company's")
	cmd.Flags().StringArrayVar(&foreign, "microsoft-ca", nil, "certificate (DER or PEM) that db holds too, for cards with firmware signed by Microsoft; may be repeated")
	return cmd
}

// writeKit writes files into a new folder. It never overwrites: lost keys
// mean a walk to every machine.
func writeKit(out string, files []secureboot.File) error {
	if err := os.Mkdir(out, 0o700); errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make kit: %s is there already: choose another --out, or move it away", out)
	} else if err != nil {
		return fmt.Errorf("make kit: %w", err)
	}
	for _, f := range files {
		path := filepath.Join(out, filepath.FromSlash(f.Name))
		mode := os.FileMode(0o755)
		if strings.HasPrefix(f.Name, secureboot.KeysFolder+"/") {
			mode = 0o700
		}
		err := os.MkdirAll(filepath.Dir(path), mode)
		if err == nil {
			err = writeNew(path, f)
		}
		if err != nil {
			return fmt.Errorf("make kit: %w (%s is incomplete: delete it)", err, out)
		}
	}
	return nil
}

func writeNew(path string, f secureboot.File) error {
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.Mode)
	if err != nil {
		return err
	}
	_, err = w.Write(f.Data)
	if err == nil {
		err = w.Sync()
	}
	return errors.Join(err, w.Close())
}
