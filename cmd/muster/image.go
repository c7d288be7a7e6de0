package main

import (
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/image"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// imageCommand is `muster image`: build and check what machines boot.
func imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build and check the images that machines boot",
	}
	cmd.AddCommand(imageRecoveryCommand(), imageSlotCommand(), imageVerifyCommand(), imageRegisterCommand(), imagePushCommand())
	return cmd
}

// The values of --mode.
const (
	modeEnroll = "enroll"
	modeScan   = "scan"
)

func imageRecoveryCommand() *cobra.Command {
	var (
		cfg                                                 image.RecoveryConfig
		rootCA, lockFile, releaseKey, releasePub, ordersKey string
		timeFloor, created, output, mode, scanSite          string
	)
	cmd := &cobra.Command{
		Use:   "recovery --out DIR",
		Short: "Build the recovery image: one UEFI program that a machine boots from the network, a stick or its disk",
		Long: `Builds recovery.efi from Debian's kernel, systemd's UEFI stub and muster-node.
Packages are downloaded into a cache and unpacked, never installed. The same
inputs give the same bytes; --lock demands the packages of an earlier build.

For sites without network boot, --format disk,iso also writes the image for
sticks, disks, drives and remote consoles.

With --mode scan it is an image for a warehouse. A machine that starts from the
stick calls nobody: it adds the hash of its TPM's key, its serial number, model
and words to machines.csv on that stick, says DONE in large letters, and switches
itself off when the stick is pulled out. ` + "`muster preapprove import`" + ` takes the list.
No other disk is written.

The image holds no secret: everybody on the network may read it.`,
		Example: `  muster release keygen --out release.key
  muster image recovery --out out --centre https://centre.example:7444 \
      --root-ca root-ca.pem --release-key release.key --format iso
  muster image verify out --release-pub release.key.pub
  dd if=out/recovery.iso of=/dev/YOUR-STICK bs=4M conv=fsync

  muster image recovery --out scan --mode scan --format disk --scan-site shop-0042
  dd if=scan/recovery.img of=/dev/YOUR-STICK bs=4M conv=fsync`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if cfg.NodeBinary == "" {
				cfg.NodeBinary = nodeProgram()
			}
			switch {
			case mode == modeScan:
				cfg.Site.Scan = &fleet.ScanConfig{Site: scanSite}
				if !cmd.Flags().Changed("name") {
					cfg.Name = modeScan
				}
			case mode != modeEnroll:
				return exitError{2, fmt.Errorf("--mode %q: want %s or %s", mode, modeEnroll, modeScan)}
			case scanSite != "":
				return exitError{2, errors.New("--scan-site goes with --mode scan")}
			}
			var err error
			if cfg.Lock, cfg.Release, err = imageInputs(&cfg.Site, rootCA, releasePub, ordersKey, lockFile, releaseKey); err != nil {
				return err
			}
			for _, t := range []struct {
				flag, text string
				into       *time.Time
			}{{"--time-floor", timeFloor, &cfg.TimeFloor}, {"--created", created, &cfg.Created}} {
				if t.text == "" {
					continue
				}
				v, err := time.Parse(time.RFC3339, t.text)
				if err != nil {
					return fmt.Errorf("%s: want a date such as 2026-01-31T12:00:00Z: %w", t.flag, err)
				}
				*t.into = v
			}
			cfg.Note = func(format string, args ...any) {
				fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...)
			}
			result, err := image.Build(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if len(cfg.Site.Centre) == 0 && cfg.Site.Scan == nil {
				cfg.Note("note: no --centre: a machine that boots this image will call nobody")
			}
			if result.Envelope == nil && cfg.Site.Scan == nil {
				cfg.Note("note: no --release-key: without a signed manifest the centre cannot register this image")
			}
			return printRecovery(cmd.OutOrStdout(), output, cfg.OutDir, result)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.OutDir, "out", "", "folder for recovery.efi, media, manifest.dsse.json and recovery.lock.json")
	f.StringSliceVar(&cfg.Formats, "format", []string{image.FormatUKI}, "what to write, a list: uki (always), disk (raw image for a stick or a disk, recovery.img), iso (for drives and remote consoles, also for sticks, recovery.iso)")
	f.StringVar(&cfg.Flavour, "kernel", image.FlavourGeneric, "generic (PCs, servers, virtual machines) or cloud (virtual machines only)")
	f.StringVar(&cfg.NodeBinary, "node-binary", "", "the static muster-node that becomes /init (default: beside this program)")
	f.StringVar(&mode, "mode", modeEnroll, "enroll, or scan: an image that lists machines for pre-approval on the stick it was started from")
	f.StringVar(&scanSite, "scan-site", "", "with --mode scan: the site that the machines are for")
	f.StringVar(&cfg.Name, "name", "recovery", "name of the image (with --mode scan: scan)")
	f.StringVar(&cfg.Version, "image-version", version, "version of the image")
	f.StringArrayVar(&cfg.Site.Centre, "centre", nil, "https URL of the node endpoint; may be repeated, tried in order")
	f.StringVar(&rootCA, "root-ca", "", "PEM file with the centre's root CA certificates")
	f.StringVar(&releaseKey, "release-key", "", "PEM file with the release key: signs the manifest, its public half goes into the image")
	f.StringVar(&releasePub, "release-pub", "", "PEM file with the release public keys the machine trusts (default: that of --release-key)")
	f.StringVar(&ordersKey, "orders-key", "", "PEM file with the tenant's public orders keys")
	f.StringVar(&cfg.SignKey, "sign-key", "", "unencrypted PEM file with the Secure Boot db key")
	f.StringVar(&cfg.SignCert, "sign-cert", "", "PEM file with its certificate")
	f.StringVar(&lockFile, "lock", "", "lock file of an earlier build: take exactly these packages")
	f.StringVar(&cfg.CacheDir, "cache", "", "folder for downloaded packages (default: muster/debs in your cache folder)")
	f.StringVar(&timeFloor, "time-floor", "", "earliest time the machine believes, RFC 3339 (default: newest date among the inputs)")
	f.StringVar(&created, "created", "", "date of the manifest, RFC 3339 (default: the time floor)")
	f.StringVar(&cfg.Site.Network.Address, "address", "", "static address with prefix length, such as 192.0.2.10/24 (default: DHCP)")
	f.StringVar(&cfg.Site.Network.Gateway, "gateway", "", "gateway for --address")
	f.StringSliceVar(&cfg.Site.Network.DNS, "dns", nil, "name servers for --address")
	f.IntVar(&cfg.Site.Network.VLAN, "vlan", 0, "tagged VLAN")
	f.StringVar(&cfg.Site.Network.Proxy, "proxy", "", "HTTP CONNECT proxy, http://host:port")
	f.Func("claim", "claim `CODE` from muster preapprove claim: one machine that boots this image is approved for its site", claimFlag(&cfg.Site.Claim))
	f.StringVar(&cfg.Site.Network.MAC, "mac", "", "interface that gets --address (default: every one)")
	outputFlag(cmd, &output)
	return cmd
}

// recoveryReport is the JSON answer of `muster image recovery`.
type recoveryReport struct {
	Dir       string            `json:"dir"`
	TimeFloor time.Time         `json:"time_floor"`
	Signed    bool              `json:"manifest_signed"`
	Modules   []string          `json:"modules"`
	Manifest  firmware.Manifest `json:"manifest"`
}

func printRecovery(w io.Writer, output, dir string, r image.Result) error {
	if output == "json" {
		return printJSON(w, recoveryReport{dir, r.TimeFloor, r.Envelope != nil, r.Modules, r.Manifest})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PART\tSIZE\tIN THE IMAGE")
	for _, p := range r.Manifest.Parts {
		packed := ""
		if p.Packed > 0 {
			packed = megabytes(p.Packed)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", p.Name, megabytes(p.Size), packed)
	}
	goal := "within the goal of 40 MB"
	if r.Manifest.Size > image.RecoveryGoal {
		goal = "OVER the goal of 40 MB"
	}
	fmt.Fprintf(t, "%s\t\t%s (%s)\n", image.RecoveryFile, megabytes(r.Manifest.Size), goal)
	for _, d := range r.Manifest.Media {
		fmt.Fprintf(t, "%s\t\t%s (medium: %s)\n", d.File, megabytes(d.Size), d.Format)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	m := r.Manifest
	if _, err := fmt.Fprintf(w, "\n%s@%s in %s, %d kernel modules\nsha256        %s\nauthenticode  %s\npcr 11        %s\ntime floor    %s\n",
		m.Name, m.Version, filepath.Join(dir, m.File), len(r.Modules), m.SHA256, m.Measurements.Authenticode, m.Measurements.PCR11, r.TimeFloor.Format(time.RFC3339)); err != nil {
		return err
	}
	for _, d := range m.Media {
		if _, err := fmt.Fprintf(w, "sha256        %s  %s\n", d.SHA256, d.File); err != nil {
			return err
		}
	}
	return nil
}

// megabytes counts in 10^6, as the goal does.
func megabytes(n int64) string {
	if n < 100_000 {
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func imageVerifyCommand() *cobra.Command {
	var releasePub, output string
	cmd := &cobra.Command{
		Use:   "verify DIR --release-pub FILE",
		Short: "Check an image against its signed manifest, recomputing every measurement",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if releasePub == "" {
				return exitError{2, fmt.Errorf("whose signature should count? Give --release-pub FILE (`muster release keygen` writes one)")}
			}
			text, err := os.ReadFile(releasePub)
			if err != nil {
				return fmt.Errorf("--release-pub: %w", err)
			}
			keys, err := statement.ParseKeys(text)
			if err != nil {
				return fmt.Errorf("--release-pub: %w", err)
			}
			checks, err := image.Verify(args[0], keys)
			if err != nil {
				return err
			}
			failed := 0
			for _, c := range checks {
				if !c.OK {
					failed++
				}
			}
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), struct {
					OK     bool          `json:"ok"`
					Checks []image.Check `json:"checks"`
				}{failed == 0, checks})
			} else {
				t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				for _, c := range checks {
					word := "ok"
					if !c.OK {
						word = "FAILED"
					}
					fmt.Fprintf(t, "%s\t%s\t%s\n", word, c.Name, c.Detail)
				}
				err = t.Flush()
			}
			if err == nil && failed > 0 {
				err = fmt.Errorf("%d of %d checks failed: do not register or boot this image; build it again or fetch it from its source", failed, len(checks))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&releasePub, "release-pub", "", "PEM file with the release public keys that count")
	outputFlag(cmd, &output)
	return cmd
}

// outputFlag adds -o, which every verb that prints something has.
func outputFlag(cmd *cobra.Command, into *string) {
	cmd.Flags().StringVarP(into, "output", "o", "table", "table or json")
}

func checkOutput(output string) error {
	if output != "table" && output != "json" {
		return exitError{2, fmt.Errorf("-o %s: want table or json", output)}
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// imageInputs reads the files that both kinds of image are made of: whom the
// image trusts goes into site. What was not asked for is nil.
func imageInputs(site *fleet.SiteConfig, rootCA, releasePub, ordersKey, lockFile, releaseKey string) (lock *image.Lock, release crypto.Signer, err error) {
	for _, t := range []struct {
		flag, path string
		into       *string
	}{
		{"--root-ca", rootCA, &site.RootsPEM},
		{"--release-pub", releasePub, &site.ReleaseKeysPEM},
		{"--orders-key", ordersKey, &site.OrdersKeysPEM},
	} {
		if t.path == "" {
			continue
		}
		b, err := os.ReadFile(t.path)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", t.flag, err)
		}
		*t.into = string(b)
	}
	if lockFile != "" {
		b, err := os.ReadFile(lockFile)
		if err != nil {
			return nil, nil, fmt.Errorf("--lock: %w", err)
		}
		if lock, err = image.ParseLock(b); err != nil {
			return nil, nil, fmt.Errorf("--lock: %w", err)
		}
	}
	if releaseKey != "" {
		if release, err = readReleaseKey(releaseKey); err != nil {
			return nil, nil, err
		}
	}
	return lock, release, nil
}
