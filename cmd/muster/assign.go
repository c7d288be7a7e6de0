package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// assignCommand is `muster assign NODE --site S`.
func assignCommand() *cobra.Command {
	var (
		site, hint, reason string
		pairs              map[string]string
		create             bool
		f                  format
	)
	cmd := &cobra.Command{
		Use:   "assign NODE --site SITE",
		Short: "Give a node of the pool to a site",
		Long: `The centre signs an admission: the other nodes of the site deal with it from
then on. A node that left the site comes back as a new incarnation.`,
		Example: `  muster assign "amber canoe" --site shop-7 --label rack=2
  muster assign n-abc --site shop-7 --role-hint worker`,
		Args: usageArgs(cobra.MinimumNArgs(1), "assign which node? `muster get nodes` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&site, "site", "", "the site")
	cmd.Flags().StringVar(&hint, "role-hint", "server", "server: it may become one; worker: it never does")
	cmd.Flags().StringToStringVar(&pairs, "label", nil, "labels of the node (KEY=VALUE), in place of those it has")
	cmd.Flags().BoolVar(&create, "create-site", false, "make the site if it is not there")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if site == "" {
			return exitError{2, errors.New("--site SITE is missing")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		_, id := kindOf(args)
		out, err := c.AssignNode(cmd.Context(), &musterv1.AssignNodeRequest{Id: id, Site: site, RoleHint: hint, Labels: pairs, CreateSite: create, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		n, err := api.NodeFromProto(out.Node)
		if err != nil {
			return err
		}
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), n, table{names: []string{"node/" + string(n.ID)}})
		}
		if out.SiteCreated {
			fmt.Fprintf(cmd.ErrOrStderr(), "site %s was created\n", n.Site)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s (%s) belongs to site %s, incarnation %d, address %s\n", n.ID, cell(n.Words), n.Site, n.Incarnation, orNone(out.Admission.GetAddress()))
		return nil
	}
	return cmd
}

// removeCommand is `muster remove NODE --reason TEXT`.
func removeCommand() *cobra.Command {
	var (
		reason string
		yes    bool
		f      format
	)
	cmd := &cobra.Command{
		Use:   "remove NODE --reason TEXT --yes",
		Short: "Take a node out of its site, back into the pool",
		Long: `The centre signs a removal: the other nodes stop dealing with it, and its
cluster takes it out. The node keeps its certificate; to shut it out altogether,
deny it.`,
		Args: usageArgs(cobra.MinimumNArgs(1), "remove which node? `muster get nodes` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		_, id := kindOf(args)
		was, err := c.GetNode(cmd.Context(), &musterv1.GetNodeRequest{Id: id})
		if err != nil {
			return c.explain(err)
		}
		if was.Node.Site == "" {
			return fmt.Errorf("node %s belongs to no site", was.Node.Id)
		}
		if err := agreed(cmd, yes, fmt.Sprintf("%s leaves site %s: its peers stop dealing with it, and what it stored for the cluster is given up.", was.Node.Words, was.Node.Site), nil); err != nil {
			return err
		}
		out, err := c.RemoveNode(cmd.Context(), &musterv1.RemoveNodeRequest{Id: was.Node.Id, Reason: reason, Revision: was.Node.Revision})
		if err != nil {
			return c.explain(err)
		}
		n, err := api.NodeFromProto(out.Node)
		if err != nil {
			return err
		}
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), n, table{names: []string{"node/" + string(n.ID)}})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s (%s) left site %s and is in the pool\n", n.ID, cell(n.Words), was.Node.Site)
		return nil
	}
	return cmd
}
