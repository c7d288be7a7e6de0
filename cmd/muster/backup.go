package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/central/store/backup"
)

// backupCommand is `muster backup FILE --data DIR`.
func backupCommand() *cobra.Command {
	var (
		data string
		keys bool
		f    format
	)
	cmd := &cobra.Command{
		Use:   "backup FILE --data DIR",
		Short: "Write the centre's database to a file, while the centre serves",
		Long: `Writes all rows of the database, SQLite or PostgreSQL, as they are at one moment,
to FILE (mode 0600), or to standard output for "-". The file is not encrypted. It
holds what the centre knows of machines and people, hashes of tokens and sealed
cookie keys; the keys of the certificate authority, the sealing key, EK roots and
admin.yaml only with --keys: then whoever has the file is the centre. Images and
sealed snapshots (blobs/, escrow/) are files that are copied like any others.`,
		Example: "  muster backup /backup/muster.bak --data /var/lib/muster\n  muster backup - --keys --data /var/lib/muster | age -r age1... > muster.bak.age",
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory of the centre, which may be running")
	cmd.Flags().BoolVar(&keys, "keys", false, "put the centre's private keys into the file, too")
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if data == "" {
			return exitError{2, errors.New("--data DIR is missing")}
		}
		if err := dirExists(data); err != nil {
			return err
		}
		var w io.Writer = cmd.OutOrStdout()
		report := cmd.ErrOrStderr()
		var file *renameio.PendingFile
		if args[0] != "-" {
			var err error
			if file, err = renameio.NewPendingFile(args[0], renameio.WithPermissions(0o600)); err != nil {
				return fmt.Errorf("backup: make %s: %w", args[0], err)
			}
			defer file.Cleanup() //nolint:errcheck // after the replacement there is nothing to clean up
			w, report = file, cmd.OutOrStdout()
		}
		s, err := central.Backup(cmd.Context(), data, w, keys, version, time.Now())
		if err != nil {
			return err
		}
		if file != nil {
			if err := file.CloseAtomicallyReplace(); err != nil {
				return fmt.Errorf("backup: write %s: %w", args[0], err)
			}
		}
		return f.write(report, s, summaryTable(s))
	}
	return cmd
}

func summaryTable(s backup.Summary) table {
	keys := "no keys"
	if s.Keys {
		keys = fmt.Sprintf("%d files with keys", s.Files)
	}
	return table{columns: []string{"TAKEN", "ENGINE", "EPOCH", "TABLES", "ROWS", "INSIDE"}, names: []string{s.Created.Format(time.RFC3339)}, rows: [][]string{
		{s.Created.Format(time.RFC3339), s.Engine, fmt.Sprint(s.Epoch), fmt.Sprint(s.Tables), fmt.Sprint(s.Rows), keys}}}
}

// restoreCommand is `muster restore FILE --data DIR --reason TEXT`.
func restoreCommand() *cobra.Command {
	var (
		data, reason string
		check        bool
		f            format
	)
	cmd := &cobra.Command{
		Use:   "restore FILE --data DIR --reason TEXT",
		Short: "Put a backup into an empty data directory or database, and begin a new epoch",
		Long: `Reads all of FILE and checks it before anything is written. The data directory
must have no database yet; if it holds a file named "database" with the URL of a
PostgreSQL database, that one must be empty. Keys in the backup are put into the
directory; else put ca/, seal.key and roots/ of the old centre there.

The database begins a new epoch, so that documents of the lost days are never
mistaken for new ones, and no founding is granted until a site has shown its
cluster or a person has looked: there is no need for ` + "`muster restored`" + ` after it.`,
		Example: "  muster restore /backup/muster.bak --data /var/lib/muster --reason 'disk lost, backup of Friday'\n  muster restore /backup/muster.bak --check",
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().BoolVar(&check, "check", false, "only read the file and say whether it is whole")
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if check {
			b, err := os.Open(args[0])
			if err != nil {
				return fmt.Errorf("restore: %w", err)
			}
			defer b.Close()
			s, err := backup.Verify(b)
			if err != nil {
				return err
			}
			return f.write(cmd.OutOrStdout(), s, summaryTable(s))
		}
		if data == "" || strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--data DIR and --reason TEXT are needed")}
		}
		s, epoch, err := central.Restore(cmd.Context(), data, args[0], reason, time.Now())
		if errors.Is(err, central.ErrRunning) {
			return exitError{3, fmt.Errorf("%w: stop it first", err)}
		}
		if err != nil {
			return err
		}
		s.Epoch = epoch
		return f.write(cmd.OutOrStdout(), s, summaryTable(s))
	}
	return cmd
}

// databaseCommand is `muster database copy`.
func databaseCommand() *cobra.Command {
	var (
		data, urlFile string
		f             format
	)
	cmd := &cobra.Command{
		Use:   "database copy",
		Short: "Move a centre from SQLite to PostgreSQL",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("database what? Want copy")}
		},
	}
	c := &cobra.Command{
		Use:   "copy --data DIR --to-file FILE",
		Short: "Copy the database of a stopped centre into an empty PostgreSQL database",
		Long: `Copies all rows in one transaction, then renames DIR/muster.db to
muster.db.copied and writes the URL to DIR/database: the next start of the centre
serves from PostgreSQL. Until the copy is whole, nothing changes. To go back, take
a backup and restore it into a directory without the file "database".`,
		Example: "  muster database copy --data /var/lib/muster --to-file /root/url",
		Args:    noArgs,
	}
	c.Flags().StringVar(&data, "data", "", "data directory of the centre, which must not be running")
	c.Flags().StringVar(&urlFile, "to-file", "", "file with the URL of the database (default: the environment MUSTER_DATABASE)")
	formatFlag(c, &f)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		url := os.Getenv(envName("database"))
		if urlFile != "" {
			b, err := os.ReadFile(urlFile)
			if err != nil {
				return fmt.Errorf("database copy: %w", err)
			}
			url = strings.TrimSpace(string(b))
		}
		if data == "" || url == "" {
			return exitError{2, errors.New("--data DIR and --to-file FILE are needed")}
		}
		if err := dirExists(data); err != nil {
			return err
		}
		s, err := central.CopyDatabase(cmd.Context(), data, url, version, time.Now())
		if errors.Is(err, central.ErrRunning) {
			return exitError{3, fmt.Errorf("%w: stop it first", err)}
		}
		if err != nil {
			return err
		}
		return f.write(cmd.OutOrStdout(), s, summaryTable(s))
	}
	cmd.AddCommand(c)
	return cmd
}
