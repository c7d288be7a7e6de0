package clusterbootstrap

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite docs/reference/cluster-states.md")

const (
	statesPage = "../docs/reference/cluster-states.md"
	waitsPage  = "../docs/runbook/cluster-waits.md"
	cliPage    = "../docs/reference/cli.md"
)

// constants returns the constants of one type in a source file with what the
// comment above or beside each says, in order; a literal in value.
type constant struct{ name, value, text string }

func constants(t *testing.T, file, kind string) []constant {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var out []constant
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		typed := false
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			if id, ok := v.Type.(*ast.Ident); ok {
				typed = id.Name == kind
			}
			if !typed || !v.Names[0].IsExported() {
				continue
			}
			c := constant{name: v.Names[0].Name}
			if len(v.Values) == 1 {
				if l, ok := v.Values[0].(*ast.BasicLit); ok {
					if c.value, err = strconv.Unquote(l.Value); err != nil {
						t.Fatal(err)
					}
				}
			}
			text := v.Doc.Text()
			if v.Comment != nil {
				text = v.Comment.Text()
			}
			c.text = strings.TrimSpace(strings.TrimPrefix(strings.TrimPrefix(strings.Join(strings.Fields(text), " "), c.name), ":"))
			out = append(out, c)
		}
	}
	if len(out) == 0 {
		t.Fatalf("%s has no constants of type %s", file, kind)
	}
	return out
}

// page is docs/reference/cluster-states.md.
func page(t *testing.T) string {
	var b strings.Builder
	b.WriteString("# States of a node in its cluster\n\n" +
		"Made from the table of moves and the comments in `cluster-bootstrap`; do not edit (`go test ./cluster-bootstrap -run TestStatesPage -update`).\n" +
		"`muster-node status` shows the state, the blocker and a sentence. A restart leads to `observing` from everywhere, and `removed` may follow any state;\n" +
		"neither is drawn.\n\n```mermaid\nstateDiagram-v2\n    [*] --> observing\n")
	table := Moves()
	for s := Observing; s < numStates; s++ {
		for _, to := range table[s] {
			fmt.Fprintf(&b, "    %s --> %s\n", s, to)
		}
	}
	b.WriteString("    removed --> [*]\n```\n\n## States\n\n| state | is | may go to |\n|---|---|---|\n")
	states := constants(t, "state.go", "State")
	for i, c := range states {
		var to []string
		for _, x := range table[State(i)] {
			to = append(to, "`"+x.String()+"`")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", State(i), c.text, strings.Join(to, " "))
	}
	blockers := constants(t, "state.go", "Blocker")
	b.WriteString("\n## Blockers that ask for a person\n\nEach has an entry in the [runbook](../runbook/cluster-waits.md).\n\n| blocker | is |\n|---|---|\n")
	list := func(person bool) {
		for _, c := range blockers {
			if x := Blocker(c.value); x != NoBlocker && x.NeedsPerson() == person {
				name := "`" + c.value + "`"
				if person {
					name = "[" + name + "](../runbook/cluster-waits.md#" + c.value + ")"
				}
				fmt.Fprintf(&b, "| %s | %s |\n", name, c.text)
			}
		}
	}
	list(true)
	b.WriteString("\n## Blockers that pass\n\n| blocker | is |\n|---|---|\n")
	list(false)
	b.WriteString("\n## Actions\n\nWhat the planner tells the node agent to do. Each may be repeated after a power cut.\n\n| action | does |\n|---|---|\n")
	for i, c := range constants(t, "action.go", "ActionKind") {
		fmt.Fprintf(&b, "| `%s` | %s |\n", ActionKind(i), c.text)
	}
	return b.String()
}

func TestStatesPage(t *testing.T) {
	want := page(t)
	if *update {
		if err := os.WriteFile(statesPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(statesPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what the code says; go test ./cluster-bootstrap -run TestStatesPage -update", statesPage)
	}
	for _, c := range constants(t, "state.go", "Blocker") {
		if c.text == "" && c.name != "NoBlocker" {
			for _, b := range []Blocker{NoCharter, NotAdmitted, RemovedNode} {
				if c.value == string(b) {
					c.text = "its name says it"
				}
			}
			if c.text == "" {
				t.Errorf("blocker %s has no comment", c.name)
			}
		}
	}
}

// parts of each entry of the runbook, in order.
var parts = []string{"**What it means.**", "**Check on the phone.**", "**Command.**", "**What happens then.**"}

// problemsOf compares the runbook with the blockers that ask for a person and
// the commands that exist.
func problemsOf(runbook, cli string, blockers []Blocker) []string {
	var out []string
	entries := map[string]string{}
	for _, s := range strings.Split(runbook, "\n## ")[1:] {
		name, text, _ := strings.Cut(s, "\n")
		entries[name] = text
	}
	for _, b := range blockers {
		text, ok := entries[string(b)]
		if !ok {
			out = append(out, "no entry for the blocker "+string(b))
			continue
		}
		for _, p := range parts {
			_, after, found := strings.Cut(text, p)
			if line, _, _ := strings.Cut(after, "\n"); !found || len(strings.TrimSpace(line)) == 0 {
				out = append(out, string(b)+" lacks "+p)
				continue
			}
			text = after
		}
		delete(entries, string(b))
	}
	delete(entries, "node-fault") // the node agent's own: without disk or TPM there is nothing to plan with
	for name := range entries {
		out = append(out, "an entry for "+name+", which no node says")
	}
	for _, m := range regexp.MustCompile("`muster ([a-z]+(?: [a-z]+)?)[^`]*`").FindAllStringSubmatch(runbook, -1) {
		one, _, _ := strings.Cut(m[1], " ")
		if !strings.Contains(cli, "\n## muster "+m[1]+"\n") && !strings.Contains(cli, "\n## muster "+one+"\n") {
			out = append(out, "no command: muster "+m[1])
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func TestRunbook(t *testing.T) {
	read := func(file string) string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var asking []Blocker
	for _, c := range constants(t, "state.go", "Blocker") {
		if Blocker(c.value).NeedsPerson() {
			asking = append(asking, Blocker(c.value))
		}
	}
	if len(asking) != len(personal) {
		t.Fatalf("%d blockers ask for a person, %d are listed", len(asking), len(personal))
	}
	runbook, cli := read(waitsPage), read(cliPage)
	for _, p := range problemsOf(runbook, cli, asking) {
		t.Errorf("%s: %s", waitsPage, p)
	}
	// The test sees what is missing.
	for _, c := range []struct{ what, old, new, want string }{
		{"an entry is gone", "## quorum-lost\n", "## quorum-gone\n", "no entry for the blocker quorum-lost"},
		{"a part is empty", "**What happens then.** The API is back", "**What happens then.**\nThe API is back", "quorum-lost lacks"},
		{"a command is misspelt", "`muster get orders", "`muster fetch orders", "no command: muster fetch orders"},
	} {
		if got := problemsOf(strings.Replace(runbook, c.old, c.new, 1), cli, asking); !strings.Contains(strings.Join(got, "\n"), c.want) {
			t.Errorf("when %s: %q", c.what, got)
		}
	}
}
