package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// labelCommand is `muster label KIND/NAME KEY=VALUE... KEY-...`.
func labelCommand() *cobra.Command {
	var (
		q musterv1.LabelObjectRequest
		f format
	)
	cmd := &cobra.Command{
		Use:   "label site|stack|node NAME KEY=VALUE... KEY-...",
		Short: "Set or remove labels of a site, a stack or a node",
		Long: `KEY=VALUE sets a label, KEY- removes it. The labels of a node become labels of
its Kubernetes node; those of a site choose what is rolled out to it.`,
		Example: `  muster label site shop-7 canary=yes region=north
  muster label node n-abc rack-`,
		Args: usageArgs(cobra.MinimumNArgs(2), "label what? Want site, stack or node, its name, and KEY=VALUE or KEY-"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&q.Reason, "reason", "", "for the audit log")
	cmd.Flags().Int64Var(&q.Revision, "revision", 0, "only if the object is at this revision")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		rest := args[1:]
		kind, name, found := strings.Cut(args[0], "/")
		if !found {
			kind, name, rest = args[0], args[1], args[2:]
		}
		q.Kind, q.Name, q.Set = strings.TrimSuffix(kind, "s"), name, make(map[string]string)
		for _, w := range rest {
			key, value, set := strings.Cut(w, "=")
			switch {
			case set && key != "":
				q.Set[key] = value
			case strings.HasSuffix(w, "-") && len(w) > 1:
				q.Remove = append(q.Remove, strings.TrimSuffix(w, "-"))
			default:
				return exitError{2, fmt.Errorf("%q is neither KEY=VALUE nor KEY-", w)}
			}
		}
		if len(rest) == 0 {
			return exitError{2, errors.New("which labels? KEY=VALUE sets one, KEY- removes it")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.LabelObject(cmd.Context(), &q)
		if err != nil {
			return c.explain(err)
		}
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), struct {
				Kind     string            `json:"kind"`
				Name     string            `json:"name"`
				Labels   map[string]string `json:"labels"`
				Changed  bool              `json:"changed"`
				Revision int64             `json:"revision"`
			}{q.Kind, q.Name, out.Labels, out.Changed, out.Revision}, table{names: []string{q.Kind + "/" + q.Name}})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %s\n", q.Kind, cell(q.Name), orNone(cell(labels(out.Labels))))
		return nil
	}
	return cmd
}
