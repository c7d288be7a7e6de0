package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet/declare"
)

// exportCommand is `muster export [KIND [NAME]]`.
func exportCommand() *cobra.Command {
	var (
		generation bool
		f          format
	)
	cmd := &cobra.Command{
		Use:   "export [KIND [NAME]]",
		Short: "Write objects as the documents that muster apply takes",
		Long: `Without a kind: stacks, sites and rules. StackVersion (with its signed envelope)
and Assignment are written when they are asked for. Reported sides are not in
it; muster get and muster describe show them.

With --generation, the documents are good for one change: if somebody else
changes an object meanwhile, muster apply refuses to overwrite that.`,
		Example: `  muster export > fleet.yaml
  muster export site shop-7 --generation > shop-7.yaml
  muster export assignment -o json`,
		Args: usageArgs(cobra.MaximumNArgs(2), "export what? A kind, and perhaps a name"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().BoolVar(&generation, "generation", false, "with the generation, so that a change by somebody else is noticed")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		q := &musterv1.ExportRequest{}
		if len(args) > 0 {
			kind, name, _ := strings.Cut(args[0], "/")
			k, err := declare.KindOf(kind)
			if err != nil {
				return exitError{2, errors.New(strings.TrimPrefix(err.Error(), "declare: "))}
			}
			q.Kind, q.Name = string(k), name
		}
		if len(args) > 1 {
			q.Name = args[1]
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		docs := []map[string]any{}
		for {
			out, err := c.Export(cmd.Context(), q)
			if err != nil {
				return c.explain(err)
			}
			for _, b := range out.Documents {
				var doc map[string]any
				if err := json.Unmarshal(b, &doc); err != nil {
					return fmt.Errorf("read what the centre sent: %w", err)
				}
				m, _ := doc["metadata"].(map[string]any)
				if name, isText := m["name"].(string); isText {
					q.After = name
				}
				if !generation {
					delete(m, "generation")
				}
				docs = append(docs, doc)
			}
			if !out.More || len(out.Documents) == 0 {
				break
			}
		}
		w := cmd.OutOrStdout()
		switch f {
		case "json":
			return writeJSON(w, docs)
		case "name":
			for _, d := range docs {
				m, _ := d["metadata"].(map[string]any)
				fmt.Fprintf(w, "%s/%s\n", strings.ToLower(fmt.Sprint(d["kind"])), cell(fmt.Sprint(m["name"])))
			}
			return nil
		}
		for i, d := range docs {
			if i > 0 {
				fmt.Fprintln(w, "---")
			}
			if err := writeYAML(w, d); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

// schemaCommand is `muster schema [KIND]`.
func schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema [KIND]",
		Short: "Print the JSON Schema of a kind of document, or list the kinds",
		Long: `For editors and for checks before a file gets near the centre. The same files are
in docs/reference/schemas.`,
		Example: `  muster schema Site > site.schema.json`,
		Args:    usageArgs(cobra.MaximumNArgs(1), "which kind?"),
		RunE: func(cmd *cobra.Command, args []string) error {
			w := cmd.OutOrStdout()
			if len(args) == 0 {
				for _, k := range declare.Kinds() {
					fmt.Fprintln(w, k)
				}
				return nil
			}
			k, err := declare.KindOf(args[0])
			if err != nil {
				return exitError{2, errors.New(strings.TrimPrefix(err.Error(), "declare: "))}
			}
			b, err := declare.Schema(k)
			if err != nil {
				return err
			}
			_, err = w.Write(b)
			return err
		},
	}
}

// deleteCommand is `muster delete KIND NAME`.
func deleteCommand() *cobra.Command {
	var (
		q   musterv1.DeleteObjectRequest
		yes bool
		f   format
	)
	cmd := &cobra.Command{
		Use:   "delete site|stack|stack-version|pre-approval NAME --yes",
		Short: "Delete what nothing needs any more",
		Long: `A site that has nodes, a stack that sites shall run and the like are refused with
what needs them. What nodes hold is not taken from them.

A node is not deleted: muster remove takes it out of its site, muster deny shuts
it out.`,
		Example: `  muster delete site shop-7 --reason closed --dry-run
  muster delete stack-version shop@2026.9 --yes`,
		Args: usageArgs(cobra.RangeArgs(1, 2), "delete what? A kind and a name"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&q.Reason, "reason", "", "for the audit log")
	cmd.Flags().Int64Var(&q.Generation, "generation", 0, "only if the object is at this generation")
	cmd.Flags().BoolVar(&q.DryRun, "dry-run", false, "say what would be refused, or go with it, and delete nothing")
	cmd.Flags().BoolVar(&q.WithEscrow, "with-snapshots", false, "of a site: its sealed snapshots, too")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, name, found := strings.Cut(args[0], "/")
		switch {
		case !found && len(args) == 2:
			kind, name = args[0], args[1]
		case !found || len(args) == 2:
			return exitError{2, errors.New("delete what? A kind and a name")}
		}
		q.Kind, q.Name = strings.TrimSuffix(kind, "s"), name
		if !q.DryRun {
			if err := agreed(cmd, yes, fmt.Sprintf("%s %s is deleted for good.", q.Kind, name), nil); err != nil {
				return err
			}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.DeleteObject(cmd.Context(), &q)
		if err != nil {
			return c.explain(err)
		}
		if f != "table" && f != "wide" {
			notes := out.Notes
			if notes == nil {
				notes = []string{}
			}
			return f.write(cmd.OutOrStdout(), struct {
				Kind    string   `json:"kind"`
				Name    string   `json:"name"`
				Deleted bool     `json:"deleted"`
				Notes   []string `json:"notes"`
			}{q.Kind, name, !q.DryRun, notes}, table{names: []string{q.Kind + "/" + name}})
		}
		verb := "was deleted"
		if q.DryRun {
			verb = "would be deleted"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s %s %s\n", q.Kind, cell(name), verb)
		for _, n := range out.Notes {
			fmt.Fprintf(cmd.ErrOrStderr(), "  note: %s\n", cell(n))
		}
		return nil
	}
	return cmd
}
