package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// replaced is the result of `muster replace` as JSON.
type replaced struct {
	Old     fleet.Node    `json:"old"`
	New     fleet.Request `json:"new"`
	Changes []string      `json:"changes"`
	DryRun  bool          `json:"dry_run"`
}

// replaceCommand is `muster replace OLD NEW --reason TEXT`.
func replaceCommand() *cobra.Command {
	var (
		reason   string
		revision int64
		dry      bool
		f        format
	)
	cmd := &cobra.Command{
		Use:   "replace OLD NEW --reason TEXT",
		Short: "Let a new machine take a node's place, as after a change of board",
		Long: `Approves NEW for the site and with the labels of OLD, denies OLD with all its
EKs, and links both, in one step. NEW must be pending or approved. The same
command once more changes nothing.

OLD is the ID of a node, NEW that of a request, each also as an unambiguous
beginning or, in quotes, as the words that the machine shows.`,
		Example: `  muster replace n-abc r-def --reason 'board changed, ticket 4711' --dry-run
  muster replace "amber canoe" "quiet lamp" --reason 'board changed'`,
		Args: usageArgs(cobra.ExactArgs(2), "want the node that goes and the request that takes its place"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().Int64Var(&revision, "revision", 0, "refuse if the request has another revision than this")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would be done")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		_, old := kindOf(args[:1])
		r, err := look(cmd, c, args[1:])
		if err != nil {
			return c.explain(err)
		}
		if revision == 0 {
			revision = r.Revision
		}
		out, err := c.Replace(cmd.Context(), &musterv1.ReplaceRequest{Old: old, New: string(r.ID), Revision: revision, Reason: reason, DryRun: dry})
		if err != nil {
			return c.explain(err)
		}
		return writeReplaced(cmd, f, out, dry)
	}
	return cmd
}

func writeReplaced(cmd *cobra.Command, f format, out *musterv1.ReplaceResponse, dry bool) error {
	w := cmd.OutOrStdout()
	if f == "table" || f == "wide" {
		switch {
		case len(out.Changes) == 0:
			fmt.Fprintln(w, "nothing to do: it was done before")
		case dry:
			fmt.Fprintln(w, "dry run; this would be done:")
		}
		for _, c := range out.Changes {
			fmt.Fprintf(w, "- %s\n", cell(c))
		}
		return nil
	}
	n, err := api.NodeFromProto(out.Old)
	if err != nil {
		return err
	}
	rs, err := requestsFrom([]*musterv1.Request{out.New})
	if err != nil {
		return err
	}
	changes := out.Changes
	if changes == nil {
		changes = []string{}
	}
	return f.write(w, replaced{Old: n, New: rs[0], Changes: changes, DryRun: dry}, table{names: []string{"request/" + string(rs[0].ID)}})
}
