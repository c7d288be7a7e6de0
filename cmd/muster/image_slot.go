package main

import (
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/image"
)

func imageSlotCommand() *cobra.Command {
	var (
		cfg                          image.SlotConfig
		lockFile, releaseKey, output string

		rootCA, releasePub, ordersKey string
	)
	cmd := &cobra.Command{
		Use:   "slot --out DIR",
		Short: "Build the system of a node: what is installed into slot A or B of its disk",
		Long: `Builds a read-only Debian with systemd, muster-node and k3s: a file system with
its hash tree, and one UEFI program that starts it from either slot.
Needs root. The same inputs give the same bytes; --lock demands the packages of
an earlier build.

The image holds no secret: everybody who gets it may read it.`,
		Example: `  muster image slot --out out --image-version 1.0 --centre https://centre.example:7444 \
      --root-ca root-ca.pem --orders-key orders.pub.pem --release-key release.key \
      --k3s ./k3s --airgap k3s-airgap-images-amd64.tar.zst
  muster image verify out --release-pub release.key.pub`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if cfg.NodeBinary == "" {
				cfg.NodeBinary = nodeProgram()
			}
			var err error
			if cfg.Lock, cfg.Release, err = imageInputs(&cfg.Site, rootCA, releasePub, ordersKey, lockFile, releaseKey); err != nil {
				return err
			}
			cfg.Note = func(format string, args ...any) {
				fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...)
			}
			result, err := image.BuildSlot(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if len(cfg.Site.Centre) == 0 {
				cfg.Note("note: no --centre: the image holds no site.json, and a node with it trusts nobody")
			}
			if cfg.K3s == "" {
				cfg.Note("note: no --k3s: a node with this system forms no cluster")
			}
			if result.Envelope == nil {
				cfg.Note("note: no --release-key: without a signed manifest no node takes this image")
			}
			return printSlot(cmd.OutOrStdout(), output, cfg.OutDir, result)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.OutDir, "out", "", "folder for the image's files")
	f.StringVar(&cfg.Name, "name", "edge", "name of the image")
	f.StringVar(&cfg.Version, "image-version", version, "version of the image")
	f.StringVar(&cfg.Flavour, "kernel", image.FlavourGeneric, "generic (PCs, servers, virtual machines) or cloud (virtual machines only)")
	f.StringVar(&cfg.NodeBinary, "node-binary", "", "the static muster-node (default: beside this program)")
	f.StringVar(&cfg.K3s, "k3s", "", "the k3s program; its digest goes into the manifest")
	f.StringArrayVar(&cfg.Airgap, "airgap", nil, "archive of container images that k3s loads at its start; may be repeated")
	f.StringVar(&cfg.Overlay, "overlay", "", "folder with files and links of your own that come over the root, such as etc/systemd/network/10-lan.network; no secrets")
	f.StringVar(&cfg.EtcdMinor, "etcd-minor", "", "minor version of the etcd in k3s, such as 3.6 (default: known from the version of k3s)")
	f.StringArrayVar(&cfg.Site.Centre, "centre", nil, "https URL of the node endpoint; may be repeated, tried in order")
	f.StringVar(&rootCA, "root-ca", "", "PEM file with the centre's root CA certificates")
	f.StringVar(&releasePub, "release-pub", "", "PEM file with the release public keys the node trusts (default: that of --release-key)")
	f.StringVar(&ordersKey, "orders-key", "", "PEM file with the tenant's public orders keys")
	f.StringVar(&releaseKey, "release-key", "", "PEM file with the release key: signs the manifest")
	f.StringVar(&cfg.SignKey, "sign-key", "", "unencrypted PEM file with the Secure Boot db key: signs UKI and loader")
	f.StringVar(&cfg.SignCert, "sign-cert", "", "PEM file with its certificate")
	f.StringVar(&lockFile, "lock", "", "lock file of an earlier build: take exactly these packages")
	f.StringVar(&cfg.CacheDir, "cache", "", "folder for packages and the unpacked base (default: muster/debs in your cache folder)")
	outputFlag(cmd, &output)
	return cmd
}

// slotReport is the JSON answer of `muster image slot`.
type slotReport struct {
	Dir      string            `json:"dir"`
	Signed   bool              `json:"manifest_signed"`
	Manifest firmware.Manifest `json:"manifest"`
}

func printSlot(w io.Writer, output, dir string, r image.SlotResult) error {
	m := r.Manifest
	if output == "json" {
		return printJSON(w, slotReport{dir, r.Envelope != nil, m})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PART\tSIZE\tIN THE IMAGE")
	for _, p := range m.Parts {
		packed := ""
		if p.Packed > 0 {
			packed = megabytes(p.Packed)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", p.Name, megabytes(p.Size), packed)
	}
	for _, f := range m.Files() {
		fmt.Fprintf(t, "%s\t\t%s\n", f.File, megabytes(f.Size))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	k3s := "none"
	if m.Slot.K3s != "" {
		k3s = m.Slot.K3s + ", etcd " + m.Slot.EtcdMinor
	}
	_, err := fmt.Fprintf(w, "\n%s@%s in %s, %d packages, k3s %s\nimage         %s\nroot hash     %s\nauthenticode  %s\npcr 11        %s\n",
		m.Name, m.Version, filepath.Clean(dir), len(r.Lock.Packages), k3s, m.SHA256, m.Slot.RootHash, m.Measurements.Authenticode, m.Measurements.PCR11)
	return err
}
