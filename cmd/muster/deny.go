package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// denyCommand is `muster deny ID --reason TEXT`.
func denyCommand() *cobra.Command {
	return standingCommand("deny ID --reason TEXT", "Put a machine on the deny list: no boot, no certificate, no reports",
		`Denies the node and all EKs it showed, and rejects its live request. It holds
until `+"`muster allow`"+`.`, true,
		func(cmd *cobra.Command, c *centre, id, reason string) (*musterv1.Node, error) {
			out, err := c.DenyNode(cmd.Context(), &musterv1.DenyNodeRequest{Id: id, Reason: reason})
			return out.GetNode(), err
		})
}

// allowCommand is `muster allow ID`.
func allowCommand() *cobra.Command {
	return standingCommand("allow ID", "Take a machine off the deny list",
		`The machine's request goes back into the queue: it must be approved again, and
it gets a new certificate.`, false,
		func(cmd *cobra.Command, c *centre, id, reason string) (*musterv1.Node, error) {
			out, err := c.AllowNode(cmd.Context(), &musterv1.AllowNodeRequest{Id: id, Reason: reason})
			return out.GetNode(), err
		})
}

func standingCommand(use, short, long string, needReason bool, do func(cmd *cobra.Command, c *centre, id, reason string) (*musterv1.Node, error)) *cobra.Command {
	var (
		reason string
		f      format
	)
	verb, _, _ := strings.Cut(use, " ")
	cmd := &cobra.Command{
		Use: use, Short: short,
		Long: long + "\n\nID is that of the node or of a request, an unambiguous beginning of it, or the\nwords that the machine shows.",
		Args: usageArgs(cobra.MinimumNArgs(1), verb+" which machine? `muster get nodes` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if needReason && strings.TrimSpace(reason) == "" {
			return exitError{2, fmt.Errorf("--reason TEXT is missing: the audit log keeps why")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		_, id := kindOf(args)
		m, err := do(cmd, c, id, reason)
		if err != nil {
			return c.explain(err)
		}
		if f == "table" || f == "wide" {
			state := "denied"
			if !needReason {
				state = "allowed; it must be approved again"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s (%s) is %s\n", m.Id, cell(m.Words), state)
			return nil
		}
		n, err := api.NodeFromProto(m)
		if err != nil {
			return err
		}
		return f.write(cmd.OutOrStdout(), n, table{names: []string{"node/" + string(n.ID)}})
	}
	return cmd
}
