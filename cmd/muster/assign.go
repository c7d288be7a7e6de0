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
		stack              string
		q                  musterv1.AssignStackRequest
	)
	cmd := &cobra.Command{
		Use:   "assign NODE --site SITE | SITE... --stack NAME@VERSION",
		Short: "Give a node of the pool to a site, or a stack version to sites",
		Long: `With --site: the centre signs an admission: the other nodes of the site deal with it from
then on. A node that left the site comes back as a new incarnation.

With --stack: the sites shall run this stack version (none: nothing in
particular). It is in their charters from then on; nodes fetch it and go there
one after the other, in the site's windows. Sites are named, or chosen by
labels with --selector.`,
		Example: `  muster assign "amber canoe" --site shop-7 --label rack=2
  muster assign n-abc --site shop-7 --role-hint worker
  muster assign shop-7 shop-8 --stack shop@2027.1
  muster assign --selector canary=yes --stack shop@2027.1 --dry-run`,
		Args: usageArgs(cobra.ArbitraryArgs, "assign which node? `muster get nodes` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&site, "site", "", "the site")
	cmd.Flags().StringVar(&hint, "role-hint", "server", "server: it may become one; worker: it never does")
	cmd.Flags().StringToStringVar(&pairs, "label", nil, "labels of the node (KEY=VALUE), in place of those it has")
	cmd.Flags().BoolVar(&create, "create-site", false, "make the site if it is not there")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().StringVar(&stack, "stack", "", "the stack version (NAME@VERSION) that sites shall run; none: nothing in particular")
	cmd.Flags().StringToStringVarP(&q.Labels, "selector", "l", nil, "with --stack: all sites with these labels (KEY=VALUE)")
	cmd.Flags().BoolVar(&q.DryRun, "dry-run", false, "with --stack: say what would change, and change nothing")
	cmd.Flags().BoolVar(&q.AcceptNoReturn, "accept-no-return", false, "with --stack: also where the step raises etcd's minor version, which cannot be undone")
	cmd.Flags().Int64Var(&q.Generation, "generation", 0, "with --stack and one site: only if the site is at this generation")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if stack != "" {
			if site != "" {
				return exitError{2, errors.New("want --site (for a node) or --stack (for sites), not both")}
			}
			if (len(args) == 0) == (len(q.Labels) == 0) {
				return exitError{2, errors.New("which sites? Name them, or give --selector KEY=VALUE")}
			}
			for _, name := range args {
				q.Sites = append(q.Sites, strings.TrimPrefix(name, "site/"))
			}
			q.Reason = reason
			return assignStack(cmd, a, f, &q, stack)
		}
		if len(args) == 0 {
			return exitError{2, errors.New("assign which node? `muster get nodes` lists them")}
		}
		if site == "" {
			return exitError{2, errors.New("--site SITE is missing (or, for a site, --stack NAME@VERSION)")}
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
