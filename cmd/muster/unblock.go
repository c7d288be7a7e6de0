package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// releaseRequestFlags makes `muster release REQUEST --reason TEXT` of the
// command that also holds the release key's verbs.
func releaseRequestFlags(cmd *cobra.Command) {
	var (
		reason   string
		revision int64
		f        format
	)
	cmd.Use = "release REQUEST --reason TEXT"
	cmd.Annotations = map[string]string{ownArguments: "a request"}
	cmd.Args = usageArgs(cobra.MinimumNArgs(1), "release what? Want keygen, secureboot-kit, sign, verify, or a request: `muster get requests --state quarantined` lists them")
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log: why the doubt is gone")
	cmd.Flags().Int64Var(&revision, "revision", 0, "refuse if the request has another revision than this")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		r, err := look(cmd, c, args)
		if err != nil {
			return c.explain(err)
		}
		if revision == 0 {
			revision = r.Revision
		}
		out, err := c.Release(cmd.Context(), &musterv1.ReleaseRequest{Id: string(r.ID), Revision: revision, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		if f == "table" || f == "wide" {
			fmt.Fprintf(cmd.ErrOrStderr(), "it waits for approval again: muster approve %s\n", r.ID)
		}
		return writeDecided(cmd, f, out.Request, "released")
	}
}
