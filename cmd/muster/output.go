package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/muster-edge/muster/fleet/text"
)

// formats of -o.
var formats = []string{"table", "wide", "json", "yaml", "name"}

// format is the flag -o.
type format string

func formatFlag(cmd *cobra.Command, f *format) {
	*f = "table"
	cmd.Flags().VarP(f, "output", "o", strings.Join(formats, ", "))
}

// String implements pflag.Value.
func (f *format) String() string { return string(*f) }

// Set implements pflag.Value.
func (f *format) Set(s string) error {
	if !slices.Contains(formats, s) {
		return fmt.Errorf("want one of %s", strings.Join(formats, ", "))
	}
	*f = format(s)
	return nil
}

// Type implements pflag.Value.
func (f *format) Type() string { return "format" }

// table is what -o table, wide and name show of a list; json and yaml show
// the objects themselves.
type table struct {
	// lab adds the banner.
	lab bool
	// columns from wide on are in -o wide only.
	columns []string
	wide    int
	rows    [][]string
	// names are for -o name.
	names []string
	// empty is the sentence for no rows.
	empty string
}

const labBanner = "LAB TENANT: it trusts, or has trusted, a lab root; an identity \"lab\" is worth no more than that"

// write writes objects or the table in the wanted form.
func (f format) write(w io.Writer, objects any, t table) error {
	switch f {
	case "json":
		return writeJSON(w, objects)
	case "yaml":
		return writeYAML(w, objects)
	case "name":
		for _, n := range t.names {
			fmt.Fprintln(w, text.ForTerminal(n))
		}
		return nil
	}
	if t.lab {
		fmt.Fprintln(w, labBanner)
	}
	if len(t.rows) == 0 {
		fmt.Fprintln(w, t.empty)
		return nil
	}
	columns := len(t.columns)
	if f != "wide" && t.wide > 0 {
		columns = t.wide
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(t.columns[:columns], "\t"))
	for _, r := range t.rows {
		cells := make([]string, columns)
		for i := range cells {
			if cells[i] = cell(r[i]); cells[i] == "" {
				cells[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	return tw.Flush()
}

// cell cleans text from machines for one cell of a table.
func cell(s string) string { return strings.ReplaceAll(text.ForTerminal(s), "\t", " ") }

// writeJSON writes indented JSON in which no character can act on a
// terminal: what is not printable is escaped.
func writeJSON(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	_, err = fmt.Fprintln(w, printable(b))
	return err
}

// writeJSONLine writes one object on one line.
func writeJSONLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	_, err = fmt.Fprintln(w, printable(b))
	return err
}

// printable escapes what is not printable in JSON.
func printable(b []byte) string {
	var out strings.Builder
	for _, r := range string(b) {
		if r == '\n' || r == ' ' || unicode.IsPrint(r) {
			out.WriteRune(r)
		} else if r > 0xffff {
			r -= 0x10000
			fmt.Fprintf(&out, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		} else {
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	return out.String()
}

// writeYAML writes YAML of the same fields as JSON, with all text cleaned.
func writeYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write YAML: %w", err)
	}
	var tree any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&tree); err != nil {
		return fmt.Errorf("write YAML: %w", err)
	}
	if b, err = yaml.Marshal(cleaned(tree)); err != nil {
		return fmt.Errorf("write YAML: %w", err)
	}
	_, err = w.Write(b)
	return err
}

func cleaned(v any) any {
	switch v := v.(type) {
	case string:
		return text.Clean(v, 1<<20)
	case []any:
		for i := range v {
			v[i] = cleaned(v[i])
		}
	case map[string]any:
		for k, e := range v {
			v[k] = cleaned(e)
		}
	}
	return v
}

// ago is a short age: 5s, 3m, 2h, 9d.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	d := now.Sub(t)
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// stamp is a time for people and programs alike.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
