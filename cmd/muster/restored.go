package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/central"
)

// restoredCommand is `muster restored --data DIR --reason TEXT`.
func restoredCommand() *cobra.Command {
	var data, reason string
	cmd := &cobra.Command{
		Use:   "restored --data DIR --reason TEXT",
		Short: "Tell a centre that its data directory comes from a backup",
		Long: `Run it once after a restore, before the centre starts. From then on documents
carry a higher epoch than any that the lost days gave out, and the centre grants
no founding right until the site has shown its cluster, or a person has looked
(` + "`muster site confirm`" + `): it may have forgotten that somebody founds already.`,
		Example: "  muster restored --data /var/lib/muster --reason 'disk lost, backup of Friday'",
		Args:    noArgs,
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory of the centre, which must not be running")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if data == "" || strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--data DIR and --reason TEXT are needed")}
		}
		if err := dirExists(data); err != nil {
			return err
		}
		l, err := central.OpenLocal(cmd.Context(), data, time.Now())
		if errors.Is(err, central.ErrRunning) {
			return exitError{3, fmt.Errorf("%w: stop it first", err)}
		}
		if err != nil {
			return err
		}
		epoch, err := l.Restored(cmd.Context(), reason, time.Now())
		if err := errors.Join(err, l.Close()); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "the centre's database is in epoch %d now; sites that have not shown a cluster wait for it or for: muster site confirm SITE\n", epoch)
		return nil
	}
	return cmd
}
