package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/pki/stepca"
)

// rotated is the result of `muster ca rotate` as JSON.
type rotated struct {
	Subject   string    `json:"subject"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

// caRotateCommand is `muster ca rotate`.
func caRotateCommand() *cobra.Command {
	var (
		data, root, reason string
		f                  format
	)
	cmd := &cobra.Command{
		Use:   "rotate --data DIR --reason TEXT [--root-key FILE]",
		Short: "Make a new node CA; what the old one issued stays good until its end",
		Long: `Makes a node CA under the same root and lets it issue from the next start of the
centre on. Nodes get certificates of the new one when they renew; nothing has
to be done on them. The old CA's key is removed.

The centre must not be running. The root key is needed: it is taken from
DIR/ca, or with --root-key from where it is kept; it is not copied.`,
		Args: noArgs,
	}
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&data, "data", "", "the centre's data directory")
	cmd.Flags().StringVar(&root, "root-key", "", "the root's private key, if it was taken away from DIR/ca")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if data == "" {
			return exitError{2, errors.New("--data DIR is missing")}
		}
		if reason == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		if err := needAuthority(data); err != nil {
			return err
		}
		l, err := central.OpenLocal(cmd.Context(), data, time.Now())
		if errors.Is(err, central.ErrRunning) {
			return exitError{3, fmt.Errorf("%w: stop it first, and start it again afterwards", err)}
		}
		if err != nil {
			return err
		}
		c, err := l.RotateAuthority(cmd.Context(), root, reason, time.Now())
		if err := errors.Join(err, l.Close()); errors.Is(err, stepca.ErrNoRootKey) {
			return exitError{3, fmt.Errorf("%w: muster ca rotate --data %s --root-key FILE", err, data)}
		} else if err != nil {
			return err
		}
		if f == "table" || f == "wide" {
			fmt.Fprintf(cmd.OutOrStdout(), "%s issues from the next start on, until %s\n", c.Subject.CommonName, c.NotAfter.UTC().Format(time.DateOnly))
			return nil
		}
		out := rotated{Subject: c.Subject.CommonName, Serial: hex.EncodeToString(c.SerialNumber.Bytes()), NotBefore: c.NotBefore, NotAfter: c.NotAfter}
		return f.write(cmd.OutOrStdout(), out, table{names: []string{"ca/" + out.Serial}})
	}
	return cmd
}

// needAuthority refuses a directory that holds none, instead of making one.
func needAuthority(data string) error {
	if _, err := stepca.Open(data); err != nil {
		return exitError{3, fmt.Errorf("%s holds no authority that can be used: %w", data, err)}
	}
	return nil
}
