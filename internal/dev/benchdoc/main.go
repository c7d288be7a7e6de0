// Command benchdoc writes docs/benchmarks.md from the results of make bench.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-edge/muster/internal/dev/benchrow"
)

const head = `# Benchmarks

` + "`make bench`" + ` runs each measure beside a named peer on the same machine, in turn, and writes this page; ` + "`make bench PART=tftp`" + ` runs one part. Numbers are medians
of the runs; the range is in brackets. A ratio above 1 means that muster is better, whatever the unit. What matters is the ratio: the machine is small (2 cores, network namespaces and
no network card), and other work runs beside, as the load says.

`

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: benchdoc RESULTS PAGE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "benchdoc:", err)
		os.Exit(1)
	}
}

func run(dir, page string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return err
	}
	slices.Sort(files)
	var b strings.Builder
	b.WriteString(head)
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		var p benchrow.Part
		if err := json.Unmarshal(raw, &p); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		fmt.Fprintf(&b, "## %s\n%s, load average %s.\n\n| what | muster | peer | ratio | runs | remarks |\n|---|---|---|---|---|---|\n", p.Part, p.Time.Format("2006-01-02 15:04 MST"), strings.Join(p.Load, " to "))
		for _, r := range p.Rows {
			peer, ratio := "none", ""
			if r.Peer != "" {
				peer = fmt.Sprintf("%s: %s", r.Peer, cell(r.Theirs, r.Unit))
				ratio = benchrow.Format(r.Ratio())
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %d | %s |\n", r.What, cell(r.Ours, r.Unit), peer, ratio, len(r.Ours), r.Note)
		}
		b.WriteString("\n")
	}
	return os.WriteFile(page, []byte(b.String()), 0o644)
}

func cell(v []float64, unit string) string {
	if len(v) == 0 {
		return "failed"
	}
	s := benchrow.Format(benchrow.Median(v)) + " " + unit
	if len(v) > 1 {
		s += fmt.Sprintf(" (%s-%s)", benchrow.Format(slices.Min(v)), benchrow.Format(slices.Max(v)))
	}
	return s
}
