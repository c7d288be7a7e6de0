package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/fleet"
)

// imageRegisterCommand is `muster image register DIR`.
func imageRegisterCommand() *cobra.Command {
	var (
		releasePub, reason string
		f                  format
	)
	cmd := &cobra.Command{
		Use:   "register DIR|manifest.dsse.json",
		Short: "Tell the centre about an image, so that machines that run it count as measured",
		Long: `Sends the image's signed manifest to the centre. The centre takes it only if a
release key that the tenant trusts has signed it. --release-pub first makes
the tenant trust a key; that is an act of its own in the audit log, so compare
the key before.`,
		Example: `  muster image register out --release-pub release.key.pub --data /var/lib/muster`,
		Args:    oneArg("register which image? Give the directory that `muster image recovery` wrote"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&releasePub, "release-pub", "", "PEM file with a release public key to trust from now on")
	cmd.Flags().StringVar(&reason, "reason", "", "why the key is trusted, for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		if info, err := os.Stat(name); err == nil && info.IsDir() {
			name = filepath.Join(name, "manifest.dsse.json")
		}
		envelope, err := readLimited(name, fleet.MaxManifest)
		if errors.Is(err, fs.ErrNotExist) {
			return exitError{2, fmt.Errorf("there is no signed manifest at %s: build the image with --release-key", name)}
		}
		if err != nil {
			return err
		}
		var key []byte
		if releasePub != "" {
			if key, err = readLimited(releasePub, 64<<10); err != nil {
				return err
			}
		}
		var (
			image   fleet.Image
			created bool
		)
		err = a.either(cmd.Context(),
			func(l *central.Local) error {
				if key != nil {
					if _, err := l.TrustReleaseKeys(cmd.Context(), key, reason, time.Now()); err != nil {
						return err
					}
				}
				image, created, err = l.RegisterImage(cmd.Context(), envelope, time.Now())
				return err
			},
			func(c *centre) error {
				if key != nil {
					if _, err := c.TrustReleaseKey(cmd.Context(), &musterv1.TrustReleaseKeyRequest{PublicKey: string(key), Reason: reason}); err != nil {
						return err
					}
				}
				out, err := c.RegisterImage(cmd.Context(), &musterv1.RegisterImageRequest{Manifest: envelope})
				if err != nil {
					return err
				}
				created = out.Created
				image, err = api.ImageFromProto(out.Image)
				return err
			})
		if err != nil {
			return err
		}
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), image, table{names: []string{"image/" + image.ID()}})
		}
		verb := "registered"
		if !created {
			verb = "was registered before; nothing changed:"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s %s (%s, %s, sha256 %s)\n", verb, image.ID(), image.Kind, image.Arch, image.SHA256)
		return nil
	}
	return cmd
}
