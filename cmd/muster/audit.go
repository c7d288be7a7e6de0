package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// auditCommand is `muster audit list|export|verify`.
func auditCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit list|export|verify",
		Short: "The record of who did what: append-only and chained by hashes",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("audit what? Want list, export or verify")}
		},
	}
	cmd.AddCommand(auditListCommand(), auditExportCommand(), auditVerifyCommand())
	return cmd
}

// auditRecords calls f with each record, from the API or the directory.
func auditRecords(cmd *cobra.Command, a *access, f func(fleet.AuditRecord) error) error {
	return a.either(cmd.Context(),
		func(l *central.Local) error { return l.Audit(cmd.Context(), f) },
		func(c *centre) error {
			for after := uint64(0); ; {
				out, err := c.ListAudit(cmd.Context(), &musterv1.ListAuditRequest{After: after})
				if err != nil {
					return err
				}
				for _, m := range out.Records {
					r, err := api.AuditRecordFromProto(m)
					if err != nil {
						return err
					}
					if err := f(r); err != nil {
						return err
					}
					after = r.Seq
				}
				if !out.More {
					return nil
				}
			}
		})
}

func auditListCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{Use: "list", Short: "List the acts, oldest first", Args: noArgs}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		records := []fleet.AuditRecord{}
		t := table{columns: []string{"SEQ", "TIME", "ACTOR", "ACT", "OBJECT", "REASON", "SOURCE", "HASH"}, wide: 6, empty: "no records"}
		err := auditRecords(cmd, a, func(r fleet.AuditRecord) error {
			records = append(records, r)
			t.rows = append(t.rows, []string{fmt.Sprint(r.Seq), stamp(r.Time), r.Actor, string(r.Kind), r.Object, r.Reason, r.Source, r.Hash.String()})
			t.names = append(t.names, fmt.Sprintf("audit/%d", r.Seq))
			return nil
		})
		if err != nil {
			return err
		}
		return f.write(cmd.OutOrStdout(), records, t)
	}
	return cmd
}

func auditExportCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "export [--out FILE]",
		Short: "Write the audit log as JSON Lines, checking the chain on the way",
		Args:  noArgs,
	}
	a := accessFlags(cmd)
	cmd.Flags().StringVar(&out, "out", "", "file to write (default: standard output)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		w := cmd.OutOrStdout()
		var file *renameio.PendingFile
		if out != "" {
			var err error
			if file, err = renameio.NewPendingFile(out, renameio.WithPermissions(0o600)); err != nil {
				return fmt.Errorf("write export: %w", err)
			}
			defer file.Cleanup() //nolint:errcheck // nothing is left after the replacement
			w = file
		}
		buffered := bufio.NewWriter(w)
		var v *audit.Verifier
		err := auditRecords(cmd, a, func(r fleet.AuditRecord) error {
			if v == nil {
				v = audit.NewVerifier(r.Tenant, audit.Head{})
			}
			if err := v.Add(r); err != nil {
				return err
			}
			return audit.Write(buffered, []audit.Record{r})
		})
		if err != nil {
			return err
		}
		if err := buffered.Flush(); err != nil {
			return fmt.Errorf("write export: %w", err)
		}
		if file != nil {
			if err := file.CloseAtomicallyReplace(); err != nil {
				return fmt.Errorf("write export: %w", err)
			}
		}
		if v != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s; head %s\n", count(int(v.Head().Count), "record", "records"), v.Head())
		}
		return nil
	}
	return cmd
}

func auditVerifyCommand() *cobra.Command {
	var file, head string
	cmd := &cobra.Command{
		Use:   "verify [--file EXPORT] [--head COUNT:HASH]",
		Short: "Check that no record was changed, removed or put in",
		Long: `Checks the chain of hashes in the centre's database, or in an export. With
--head, as an earlier export or verification printed it, it also notices
records cut off at the end and a chain that was written anew.`,
		Args: noArgs,
	}
	a := accessFlags(cmd)
	cmd.Flags().StringVar(&file, "file", "", "check this export instead")
	cmd.Flags().StringVar(&head, "head", "", "the chain must have passed through this head")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var pins []audit.Head
		if head != "" {
			h, err := audit.ParseHead(head)
			if err != nil {
				return exitError{2, err}
			}
			pins = append(pins, h)
		}
		var v *audit.Verifier
		add := func(r fleet.AuditRecord) error {
			if v == nil {
				v = audit.NewVerifier(r.Tenant, audit.Head{}, pins...)
			}
			return v.Add(r)
		}
		var err error
		if file != "" {
			err = eachLine(file, add)
		} else {
			err = auditRecords(cmd, a, add)
		}
		if v == nil && err == nil {
			v = audit.NewVerifier("", audit.Head{}, pins...)
		}
		if err == nil {
			err = v.Finish()
		}
		var bad *audit.BreakError
		if errors.As(err, &bad) {
			return fmt.Errorf("the audit log is NOT what was written: record %d: %s; the %s before it are good", bad.Seq, bad.Why, count(int(v.Head().Count), "record", "records"))
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "good: %s; head %s (keep it elsewhere to notice a cut end)\n", count(int(v.Head().Count), "record", "records"), v.Head())
		return nil
	}
	return cmd
}

func eachLine(file string, f func(fleet.AuditRecord) error) error {
	in, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("read export: %w", err)
	}
	defer in.Close()
	for r := audit.NewReader(in); ; {
		rec, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := f(rec); err != nil {
			return err
		}
	}
}
