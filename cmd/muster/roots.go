package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central"
)

// rootsCommand is `muster roots import|list`.
func rootsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "roots import|list",
		Short: "The roots of TPM makers: who vouches for a machine's endorsement key",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("roots what? Want import or list")}
		},
	}
	cmd.AddCommand(rootsImportCommand(), rootsListCommand())
	return cmd
}

const maxRootFile = 1 << 20

func rootsImportCommand() *cobra.Command {
	var (
		lab    bool
		reason string
		f      format
	)
	cmd := &cobra.Command{
		Use:   "import FILE... [--lab]",
		Short: "Trust the certificates in FILE (PEM or DER) as roots of EK certificates",
		Long: `Machines whose EK certificate chains to an imported root have the identity
"hardware". Get the certificates from the TPM's maker, and compare their hash.

With --lab the root is for test machines (software TPMs): their identity is
"lab", and the tenant is marked as a lab for ever.`,
		Args: usageArgs(cobra.MinimumNArgs(1), "import which files?"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().BoolVar(&lab, "lab", false, "a root of test machines; marks the tenant as a lab for ever")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var files [][]byte
		for _, name := range args {
			b, err := readLimited(name, maxRootFile)
			if err != nil {
				return err
			}
			files = append(files, b)
		}
		var roots []central.Root
		err := a.either(cmd.Context(),
			func(l *central.Local) (err error) {
				roots, err = l.ImportRoots(cmd.Context(), files, lab, reason, time.Now())
				return err
			},
			func(c *centre) error {
				out, err := c.ImportRoots(cmd.Context(), &musterv1.ImportRootsRequest{Certificates: files, Lab: lab, Reason: reason})
				roots = rootsFrom(out.GetRoots())
				return err
			})
		if err != nil {
			return err
		}
		if lab {
			fmt.Fprintln(cmd.ErrOrStderr(), "the tenant is now marked as a lab, for ever")
		}
		return f.write(cmd.OutOrStdout(), roots, rootTable(roots, false))
	}
	return cmd
}

func rootsListCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{Use: "list", Short: "List the trusted roots", Args: noArgs}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var (
			roots    []central.Root
			problems []string
			lab      bool
		)
		err := a.either(cmd.Context(),
			func(l *central.Local) error {
				t, err := l.Tenant(cmd.Context())
				if err != nil {
					return err
				}
				lab = t.Lab
				var bad []error
				roots, bad, err = l.Roots()
				for _, b := range bad {
					problems = append(problems, b.Error())
				}
				return err
			},
			func(c *centre) error {
				out, err := c.ListRoots(cmd.Context(), &musterv1.ListRootsRequest{})
				roots, problems, lab = rootsFrom(out.GetRoots()), out.GetProblems(), out.GetLab()
				return err
			})
		if err != nil {
			return err
		}
		for _, p := range problems {
			fmt.Fprintf(cmd.ErrOrStderr(), "not used: %s\n", cell(p))
		}
		return f.write(cmd.OutOrStdout(), roots, rootTable(roots, lab))
	}
	return cmd
}

func rootsFrom(in []*musterv1.Root) []central.Root {
	out := []central.Root{}
	for _, m := range in {
		out = append(out, central.Root{File: m.File, Subject: m.Subject, SHA256: m.Sha256, NotAfter: m.NotAfter.AsTime(), Lab: m.Lab})
	}
	return out
}

func rootTable(roots []central.Root, lab bool) table {
	t := table{lab: lab, columns: []string{"SUBJECT", "FOR", "UNTIL", "SHA256", "FILE"}, empty: "no roots: every machine's identity is unverified"}
	for _, r := range roots {
		use := "hardware"
		if r.Lab {
			use = "lab"
		}
		t.rows = append(t.rows, []string{r.Subject, use, r.NotAfter.UTC().Format("2006-01-02"), r.SHA256, r.File})
		t.names = append(t.names, "root/"+r.SHA256)
	}
	return t
}

// readLimited reads a file that must not be larger than most bytes.
func readLimited(name string, most int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, exitError{2, err}
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > most {
		return nil, exitError{2, fmt.Errorf("%s is larger than %d bytes", name, most)}
	}
	return b, nil
}
