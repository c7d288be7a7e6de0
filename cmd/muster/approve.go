package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// approveCommand is `muster approve ID`.
func approveCommand() *cobra.Command {
	var (
		site, reason string
		labels       map[string]string
		revision     int64
		createSite   bool
		f            format
	)
	cmd := &cobra.Command{
		Use:   "approve ID [--site SITE]",
		Short: "Approve a request: the machine gets its certificate",
		Long: `Approves the evidence that the request's ID stands for. If the machine shows
other evidence later, that is another request.

ID is the whole ID, an unambiguous beginning of it, or the words that the
machine shows on its screen. A machine that changed its evidence is approved by
the whole ID only. Without --site the node waits in the pool.

A site that does not exist yet is created at its first use; the audit log
says so. --create-site=false refuses instead.`,
		Example: `  muster approve r-abc --site berlin-7
  muster approve "amber canoe" --site berlin-7 --label rack=2`,
		Args: usageArgs(cobra.MinimumNArgs(1), "approve which request? `muster get requests` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&site, "site", "", "site that the node belongs to")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().StringToStringVar(&labels, "label", nil, "label of the node, KEY=VALUE; may be repeated")
	cmd.Flags().Int64Var(&revision, "revision", 0, "refuse if the request has another revision than this, the one you looked at")
	cmd.Flags().BoolVar(&createSite, "create-site", true, "create the site at its first use")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		r, err := look(cmd, c, args)
		if err != nil {
			return c.explain(err)
		}
		if revision == 0 {
			// What is shown below is what is approved, or nothing is.
			revision = r.Revision
		}
		id := string(r.ID)
		if r.Supersedes != "" {
			// It showed other evidence before: what was typed must name this
			// evidence, and the centre says so if it does not.
			_, id = kindOf(args)
		}
		out, err := c.Approve(cmd.Context(), &musterv1.ApproveRequest{
			Id: id, Revision: revision, Site: site, Labels: labels, Reason: reason, CreateSite: createSite,
		})
		if err != nil {
			return c.explain(err)
		}
		if out.SiteCreated {
			fmt.Fprintf(cmd.ErrOrStderr(), "site %s was created\n", site)
		}
		return writeDecided(cmd, f, out.Request, "approved")
	}
	return cmd
}

// look reads the request that args mean.
func look(cmd *cobra.Command, c *centre, args []string) (fleet.Request, error) {
	_, id := kindOf(args)
	out, err := c.GetRequest(cmd.Context(), &musterv1.GetRequestRequest{Id: id})
	if err != nil {
		return fleet.Request{}, err
	}
	rs, err := requestsFrom([]*musterv1.Request{out.Request})
	if err != nil {
		return fleet.Request{}, err
	}
	return rs[0], nil
}

// writeDecided prints what was decided, with what a person should have seen.
func writeDecided(cmd *cobra.Command, f format, m *musterv1.Request, verb string) error {
	rs, err := requestsFrom([]*musterv1.Request{m})
	if err != nil {
		return err
	}
	r := rs[0]
	if f != "table" && f != "wide" {
		return f.write(cmd.OutOrStdout(), r, table{names: []string{"request/" + string(r.ID)}})
	}
	w := cmd.OutOrStdout()
	where := ""
	if r.Site != "" {
		where = " for site " + r.Site
	}
	fmt.Fprintf(w, "%s %s%s: %s, identity %s, boot %s\n", r.ID, verb, where, r.Words, r.Identity, r.Boot)
	for _, warning := range r.Warnings {
		fmt.Fprintf(w, "  warning: %s\n", cell(warning))
	}
	return nil
}

// rejectCommand is `muster reject ID --reason TEXT`.
func rejectCommand() *cobra.Command {
	var (
		reason   string
		revision int64
		f        format
	)
	cmd := &cobra.Command{
		Use:   "reject ID --reason TEXT",
		Short: "Turn a request down, and every later one of the same machine",
		Args:  usageArgs(cobra.MinimumNArgs(1), "reject which request? `muster get requests` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log and for those who ask later")
	cmd.Flags().Int64Var(&revision, "revision", 0, "refuse if the request has another revision than this")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, fmt.Errorf("--reason TEXT is missing: the audit log keeps why")}
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
		out, err := c.Reject(cmd.Context(), &musterv1.RejectRequest{Id: string(r.ID), Revision: revision, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		return writeDecided(cmd, f, out.Request, "rejected")
	}
	return cmd
}
