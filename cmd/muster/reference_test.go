package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
)

var update = flag.Bool("update", false, "write docs/reference/cli.md instead of comparing with it")

const referenceDir = "../../docs/reference"

func reference(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(referenceDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestCLIReference keeps docs/reference/cli.md what the commands say.
func TestCLIReference(t *testing.T) {
	name := filepath.Join(referenceDir, "cli.md")
	want := renderCLI(rootCommand())
	if *update {
		if err := os.WriteFile(name, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got := reference(t, "cli.md"); got != want {
		a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
		for i := range min(len(a), len(b)) {
			if a[i] != b[i] {
				t.Fatalf("%s is stale: go test ./cmd/muster -run TestCLIReference -update\nline %d has  %s\nit should be %s", name, i+1, a[i], b[i])
			}
		}
		t.Fatalf("%s is stale (%d lines, want %d): go test ./cmd/muster -run TestCLIReference -update", name, len(a), len(b))
	}
}

// renderCLI writes the tree of commands as one page: contents first, then
// each command with what --help says of it.
func renderCLI(root *cobra.Command) string {
	var all []*cobra.Command
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		all = append(all, c)
		for _, sub := range c.Commands() { // sorted by name
			walk(sub)
		}
	}
	walk(root)
	var w strings.Builder
	w.WriteString("# Commands\n\nMade from the program itself by `go test ./cmd/muster -run TestCLIReference -update`; do not edit it by hand.\n" +
		"`muster COMMAND --help` prints the same. Exit codes are in [exit-codes.md](exit-codes.md), outputs in [json.md](json.md).\n\n")
	for _, c := range all[1:] {
		if c.HasAvailableSubCommands() {
			continue
		}
		fmt.Fprintf(&w, "- [%s](#%s): %s\n", c.CommandPath(), strings.ReplaceAll(c.CommandPath(), " ", "-"), c.Short)
	}
	for _, c := range all[1:] {
		if c.HasAvailableSubCommands() {
			continue
		}
		fmt.Fprintf(&w, "\n## %s\n\n%s.\n\n", c.CommandPath(), c.Short)
		line := c.UseLine()
		if c.DisableFlagParsing { // its flags belong to another command
			line = strings.TrimSuffix(line, " [flags]")
		}
		fmt.Fprintf(&w, "    %s\n", line)
		if c.Long != "" {
			fmt.Fprintf(&w, "\n%s\n", regexp.MustCompile(`(?m)^  (\S+) +`).ReplaceAllString(c.Long, "- `$1`: ")) // lists in help
		}
		if len(c.Aliases) > 0 {
			fmt.Fprintf(&w, "\nAlso: `%s`\n", strings.Join(c.Aliases, "`, `"))
		}
		if c.Example != "" {
			fmt.Fprintf(&w, "\n```sh\n%s\n```\n", strings.ReplaceAll(strings.TrimPrefix(c.Example, "  "), "\n  ", "\n"))
		}
		var flags []string
		c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && !f.Hidden {
				flags = append(flags, renderFlag(f))
			}
		})
		if len(flags) > 0 {
			fmt.Fprintf(&w, "\n| flag | default | meaning |\n|---|---|---|\n%s", strings.Join(flags, ""))
		}
	}
	return w.String()
}

func renderFlag(f *pflag.Flag) string {
	kind, usage := pflag.UnquoteUsage(f)
	name := "--" + f.Name
	if f.Shorthand != "" {
		name = "-" + f.Shorthand + ", " + name
	}
	if kind != "" {
		name += " " + strings.ToUpper(kind)
	}
	value := ""
	if d := f.DefValue; d != "" && d != "[]" && d != "false" {
		if f.Name == "image-version" { // the program's own, different in every build
			d = "the program's"
		} else {
			d = "`" + d + "`"
		}
		value = d
	}
	usage = strings.ReplaceAll(usage, "|", "\\|")
	return fmt.Sprintf("| `%s` | %s | %s |\n", name, value, usage)
}

func TestRenderFlagShowsWhatHelpShows(t *testing.T) {
	set := pflag.NewFlagSet("x", pflag.ContinueOnError)
	set.StringP("out", "o", "a", "a `file` | or two")
	set.Bool("all", false, "everything")
	for name, want := range map[string]string{
		"out": "| `-o, --out FILE` | `a` | a file \\| or two |\n",
		"all": "| `--all` |  | everything |\n",
	} {
		if got := renderFlag(set.Lookup(name)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestConfigurationReference: every setting of `muster config show` has a row
// with its name in the environment and its default, and there is no other.
func TestConfigurationReference(t *testing.T) {
	page := reference(t, "configuration.md")
	settings, err := resolve(serveCommand(), "")
	if err != nil {
		t.Fatal(err)
	}
	var known []string
	for _, s := range settings {
		known = append(known, s.Name)
		row := regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(s.Name) + "` \\| `" + envName(s.Name) + "` \\| ([^|]*) \\|").FindStringSubmatch(page)
		if row == nil {
			t.Errorf("configuration.md has no row for %s (%s)", s.Name, envName(s.Name))
			continue
		}
		want := "none"
		if v := fmt.Sprint(s.Value); v != "" && v != "[]" {
			want = "`" + v + "`"
		}
		if row[1] != want {
			t.Errorf("configuration.md: default of %s is %s, want %s", s.Name, row[1], want)
		}
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\| `MUSTER_").FindAllStringSubmatch(page, -1) {
		if !slices.Contains(known, row[1]) {
			t.Errorf("configuration.md has a row for %s, which is no setting", row[1])
		}
	}
}

// TestMetricsReference compares metrics.md with the names in the source (some
// appear in /metrics only once they have a value) and with what a new centre
// shows.
func TestMetricsReference(t *testing.T) {
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(muster_[a-z_]+)` \\|").FindAllStringSubmatch(reference(t, "metrics.md"), -1) {
		documented = append(documented, m[1])
	}
	if len(documented) == 0 {
		t.Fatal("metrics.md names no metric")
	}
	inSource := metricNames(t, "../../central")
	for _, n := range inSource {
		if !slices.Contains(documented, n) {
			t.Errorf("metrics.md does not name %s", n)
		}
	}
	for _, n := range documented {
		if !slices.Contains(inSource, n) {
			t.Errorf("metrics.md names %s, which does not exist", n)
		}
	}
	shown := scrape(t)
	if len(shown) == 0 {
		t.Fatal("/metrics shows nothing of ours")
	}
	for _, n := range shown {
		if !slices.Contains(documented, n) {
			t.Errorf("/metrics shows %s, metrics.md does not name it", n)
		}
	}
}

// metricNames reads the names given to Prometheus: the field Name of options
// and the first argument of NewDesc.
func metricNames(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	add := func(e ast.Expr) {
		if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil && strings.HasPrefix(s, "muster_") && !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if k, ok := n.Key.(*ast.Ident); ok && k.Name == "Name" {
					add(n.Value)
				}
			case *ast.CallExpr:
				if s, ok := n.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "NewDesc" && len(n.Args) > 0 {
					add(n.Args[0])
				}
			}
			return true
		})
	}
	return out
}

// scrape runs a centre and returns the names of our metrics that it shows.
func scrape(t *testing.T) []string {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	ready, ended := make(chan string, 1), make(chan error, 1)
	srv, err := central.New(ctx, central.Config{
		Data: filepath.Join(t.TempDir(), "centre"), Operators: "127.0.0.1:0", Nodes: "127.0.0.1:0", Metrics: "127.0.0.1:0",
		Ready: func(a central.Addresses) { ready <- a.Metrics },
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- srv.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	var address string
	select {
	case address = <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	r, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, 4<<20))
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatal(r.Status, err)
	}
	var out []string
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (muster_\w+) `).FindAllSubmatch(b, -1) {
		out = append(out, string(m[1]))
	}
	return out
}

// TestJSONReference: json.md names every field of what scripts read.
func TestJSONReference(t *testing.T) {
	page := []byte(reference(t, "json.md"))
	for _, v := range []any{fleet.Request{}, lab.Result{}} {
		for _, f := range jsonFields(reflect.TypeOf(v), "") {
			if !bytes.Contains(page, []byte("`"+f+"`")) {
				t.Errorf("json.md does not name `%s` of %T", f, v)
			}
		}
	}
}

func TestJSONFieldsGoIntoLists(t *testing.T) {
	type inner struct {
		B int `json:"b,omitempty"`
		C int `json:"-"`
	}
	type outer struct {
		A []inner          `json:"a"`
		D map[string]inner `json:"d"`
	}
	if got, want := jsonFields(reflect.TypeFor[outer](), ""), []string{"a", "a[].b", "d"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// jsonFields lists the paths of the fields of struct type t.
func jsonFields(t reflect.Type, prefix string) []string {
	var out []string
	for f := range structFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || name == "" {
			continue
		}
		path := prefix + name
		out = append(out, path)
		switch {
		case f.Type.Kind() == reflect.Struct && f.Type.PkgPath() != "time":
			out = append(out, jsonFields(f.Type, path+".")...)
		case f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
			out = append(out, jsonFields(f.Type.Elem(), path+"[].")...)
		}
	}
	return out
}

func structFields(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			if !yield(t.Field(i)) {
				return
			}
		}
	}
}
