package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/recovery/stick"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// scanCommand is `muster scan`.
func scanCommand() *cobra.Command {
	var path, file, site, serial string
	cmd := &cobra.Command{
		Use:   "scan",
		Short: "Read this machine's TPM and add it to a list for pre-approval",
		Long: `Reads the endorsement key of the TPM in this machine and its serial number, and
adds a line to the CSV file that ` + "`muster preapprove import`" + ` takes. It needs no centre
and no network. Without --append the line is printed.

For machines without a system there is a stick that does it by itself:
` + "`muster image recovery --mode scan --format disk`" + `.

A machine that is in the file already is told and changes nothing. The file is
written anew and renamed, so that a stick which is pulled out keeps the old one.`,
		Example: `  muster scan --append /media/stick/machines.csv --site shop-0042
  muster preapprove import --name batch-7 machines.csv`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var e fleet.ListedEK
			var err error
			if e.EK, err = readEK(cmd.Context(), path); err != nil {
				return err
			}
			s := stick.EntryOf(e.EK, site, facts.Read(os.DirFS("/")))
			if serial != "" {
				s.Serial = serial
			}
			return scan(cmd.OutOrStdout(), cmd.ErrOrStderr(), file, s)
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "tpm", "/dev/tpmrm0", "`device` of the TPM, or the unix socket of a software TPM")
	f.StringVar(&file, "append", "", "CSV `file` to add the machine to; made if it is not there")
	f.StringVar(&site, "site", "", "site that the machine is for")
	f.StringVar(&serial, "serial", "", "serial number, instead of what the firmware says")
	return cmd
}

// readEK returns the hash that names the machine whose TPM this is.
func readEK(ctx context.Context, path string) (fleet.EKHash, error) {
	d, err := device.Open(path)
	if err != nil {
		return fleet.EKHash{}, fmt.Errorf("read TPM: %w", err)
	}
	defer d.Close()
	id, err := d.Identity(ctx)
	if err != nil {
		return fleet.EKHash{}, fmt.Errorf("read TPM: %w", err)
	}
	if len(id.EKs) == 0 {
		return fleet.EKHash{}, errors.New("read TPM: it has no usable endorsement key")
	}
	key, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return fleet.EKHash{}, fmt.Errorf("read TPM: %w", err)
	}
	return fleet.HashEK(key.Public)
}

// scan adds e to the file, or prints the line.
func scan(out, note io.Writer, file string, e stick.Entry) error {
	var old []byte
	if file != "" {
		st, err := os.Stat(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return fmt.Errorf("read list: %w", err)
		case st.Size() > enroll.MaxListBytes:
			return fmt.Errorf("read list: %s has %d bytes, at most %d are allowed", file, st.Size(), enroll.MaxListBytes)
		default:
			if old, err = os.ReadFile(file); err != nil {
				return fmt.Errorf("read list: %w", err)
			}
		}
	}
	list, dropped, err := enroll.AppendScan(old, e.ListedEK, e.Model)
	if errors.Is(err, enroll.ErrListed) {
		fmt.Fprintf(out, "%s is in %s already\n", fleet.Words(e.EK.NodeID()), file)
		return nil
	}
	if err != nil {
		return err
	}
	if dropped != "" {
		fmt.Fprintf(note, "the serial number is left out: %s\n", dropped)
	}
	if file == "" {
		_, err = out.Write(list)
		return err
	}
	if err := renameio.WriteFile(file, list, 0o644); err != nil {
		return fmt.Errorf("write list: %w", err)
	}
	fmt.Fprintf(out, "%s added to %s (%d machines)\n", fleet.Words(e.EK.NodeID()), file, bytes.Count(list, []byte{'\n'})-1)
	return nil
}
