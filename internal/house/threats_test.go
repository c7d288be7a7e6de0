package house

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// threat is one row of docs/threats.yaml.
type threat struct {
	ID      string `json:"id"`
	Threat  string `json:"threat"`
	Defence string `json:"defence"`
	// Tests are "folder TestName" or "lab: ARGUMENTS" (a line of
	// internal/dev/scenarios).
	Tests []string `json:"tests"`
}

// TestEveryThreatHasItsProof fails when a threat names no test, or names one
// that does not exist: a defence nobody tests is a hope.
func TestEveryThreatHasItsProof(t *testing.T) {
	raw, err := os.ReadFile("../../docs/threats.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Threats []threat `json:"threats"`
	}
	if err := yaml.UnmarshalStrict(raw, &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Threats) < 30 {
		t.Errorf("docs/threats.yaml lists %d threats: the list was longer, what got lost?", len(doc.Threats))
	}
	scenarios, err := os.ReadFile("../dev/scenarios")
	if err != nil {
		t.Fatal(err)
	}
	model, err := os.ReadFile("../../docs/threat-model.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, th := range doc.Threats {
		if th.ID == "" || th.Threat == "" || th.Defence == "" {
			t.Errorf("threat %+v: id, threat and defence are all needed", th)
		}
		if seen[th.ID] {
			t.Errorf("threat %s is listed twice", th.ID)
		}
		seen[th.ID] = true
		if len(th.Tests) == 0 {
			t.Errorf("threat %s (%s): no test proves the defence", th.ID, th.Threat)
		}
		if !strings.Contains(string(model), th.ID) {
			t.Errorf("threat %s is not in docs/threat-model.md", th.ID)
		}
		for _, ref := range th.Tests {
			if err := exists(ref, string(scenarios)); err != nil {
				t.Errorf("threat %s: %v", th.ID, err)
			}
		}
	}
}

// TestEveryLessonHasItsProof does the same for docs/field-lessons.yaml.
func TestEveryLessonHasItsProof(t *testing.T) {
	raw, err := os.ReadFile("../../docs/field-lessons.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Lessons []struct {
			ID        string   `json:"id"`
			Elsewhere string   `json:"elsewhere"`
			Here      string   `json:"here"`
			Tests     []string `json:"tests"`
		} `json:"lessons"`
	}
	if err := yaml.UnmarshalStrict(raw, &doc); err != nil {
		t.Fatal(err)
	}
	scenarios, err := os.ReadFile("../dev/scenarios")
	if err != nil {
		t.Fatal(err)
	}
	if len(doc.Lessons) < 30 {
		t.Errorf("%d lessons: the list was longer, what got lost?", len(doc.Lessons))
	}
	for i, l := range doc.Lessons {
		if want := fmt.Sprintf("L%02d", i+1); l.ID != want {
			t.Errorf("lesson %q is not %s", l.ID, want)
		}
		if l.Elsewhere == "" || l.Here == "" || len(l.Tests) == 0 {
			t.Errorf("%s: elsewhere, here and tests are all needed", l.ID)
		}
		for _, ref := range l.Tests {
			if err := exists(ref, string(scenarios)); err != nil {
				t.Errorf("%s: %v", l.ID, err)
			}
		}
	}
}

func exists(ref, scenarios string) error {
	if args, ok := strings.CutPrefix(ref, "lab: "); ok {
		for _, line := range strings.Split(scenarios, "\n") {
			f := strings.Fields(line)
			if len(f) > 1 && !strings.HasPrefix(f[0], "#") && strings.Join(f[1:], " ") == args {
				return nil
			}
		}
		return fmt.Errorf("%q is no line of internal/dev/scenarios", ref)
	}
	dir, name, ok := strings.Cut(ref, " ")
	if !ok {
		return fmt.Errorf("%q: want \"folder TestName\" or \"lab: ARGUMENTS\"", ref)
	}
	if folder, script, ok := strings.Cut(dir, ":"); ok && script == "script" {
		if _, err := os.Stat(filepath.Join("../..", folder, "testdata", "script", name+".txtar")); err != nil {
			return fmt.Errorf("%q: %w", ref, err)
		}
		return nil
	}
	files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
	if err != nil {
		return err
	}
	// Suites that are run by tests of other packages live in plain files.
	more, _ := filepath.Glob(filepath.Join("../..", dir, "*.go"))
	base, sub, _ := strings.Cut(name, "/")
	decl := regexp.MustCompile(`func (\([^)]*\) )?` + regexp.QuoteMeta(base) + `\(`)
	for _, f := range append(files, more...) {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if decl.Match(b) {
			if sub == "" {
				return nil
			}
			for _, g := range append(files, more...) {
				s, err := os.ReadFile(g)
				if err != nil {
					return err
				}
				if strings.Contains(string(s), `"`+sub+`"`) {
					return nil
				}
			}
			return fmt.Errorf("%q: %s exists, but no case %q in %s", ref, base, sub, dir)
		}
	}
	return fmt.Errorf("%q: no such test in %s", ref, dir)
}
