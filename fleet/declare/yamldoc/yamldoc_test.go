package yamldoc

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/muster-edge/muster/fleet/declare"
)

const two = `# sites
apiVersion: muster/v1
kind: Site
metadata: {name: shop-7}
spec:
  title: Main street 7
  policy:
    servers: 2
    promoteAt: 3
---
---
apiVersion: muster/v1
kind: Stack
metadata:
  name: shop
  labels:
    tier: yes
    example.com/x: 1
`

func TestRead(t *testing.T) {
	docs, err := Read("f.yaml", []byte(two))
	if err != nil || len(docs) != 2 {
		t.Fatalf("%d documents, %v", len(docs), err)
	}
	if docs[0].Line != 2 || docs[1].Line != 12 {
		t.Errorf("lines %d, %d", docs[0].Line, docs[1].Line)
	}
	if want := `{"apiVersion":"muster/v1","kind":"Site","metadata":{"name":"shop-7"},"spec":{"title":"Main street 7","policy":{"servers":2,"promoteAt":3}}}`; string(docs[0].JSON) != want {
		t.Errorf("%s", docs[0].JSON)
	}
	_, problems := declare.Parse(docs[0].JSON)
	if len(problems) != 1 || docs[0].At(problems[0]).String() != "f.yaml:9: spec.policy.promoteAt: unknown field; did you mean promote_at?" {
		t.Errorf("%v", problems)
	}
	if p := docs[0].At(declare.Problem{Path: "spec.policy.promote_at[3].x", Text: "x"}); p.Line != 7 {
		t.Errorf("the closest line is %d", p.Line)
	}
	_, problems = declare.Parse(docs[1].JSON)
	var all []string
	for _, p := range problems {
		all = append(all, docs[1].At(p).String())
	}
	// YAML 1.2 has true and false; "yes" is text.
	if got := strings.Join(all, "\n"); got != `f.yaml:18: metadata.labels["example.com/x"]: want text, not 1: put it in quotes` {
		t.Error(got)
	}
}

func TestScalars(t *testing.T) {
	docs, err := Read("f", []byte(`{a: 1, b: 0x10, c: 1.50, d: true, e: null, f: ~, g: 2027-01-02, h: "1", i: 1e3, j: "é", k: -5, l: }`))
	if err != nil || len(docs) != 1 || len(docs[0].Problems) > 0 {
		t.Fatal(err, docs[0].Problems)
	}
	if want := `{"a":1,"b":16,"c":1.50,"d":true,"e":null,"f":null,"g":"2027-01-02","h":"1","i":1e3,"j":"é","k":-5,"l":null}`; string(docs[0].JSON) != want {
		t.Errorf("%s", docs[0].JSON)
	}
}

// TestRefused: what is no plain YAML, or would take much memory, ends with a
// line and a reason.
func TestRefused(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		bomb += string(c) + ": &" + string(c) + " [" + strings.TrimSuffix(strings.Repeat("*"+string(c-1)+",", 9), ",") + "]\n"
	}
	for name, row := range map[string]struct{ in, want string }{
		"bomb":       {bomb, "f:1: anchors (&a) are not taken"},
		"alias":      {"a: *b\n", "unknown anchor"},
		"merge":      {"<<: {a: b}\n", "merge keys"},
		"tag":        {"a: !!python/object x\n", "tag"},
		"binary":     {"a: !!binary eA==\n", "tag"},
		"twice":      {"a: 1\nb: 2\na: 3\n", "f:3: field \"a\" is there twice, first in line 1"},
		"list key":   {"? [a]\n: b\n", "name of a field is text"},
		"no YAML":    {"a: b\n c: [\n", "f:2: this is no YAML"},
		"large":      {strings.Repeat("#", 10<<20), "at most"},
		"many":       {"[" + strings.Repeat("a,", maxMarks) + "]", "too many lines and values"},
		"deep flow":  {strings.Repeat("[", 5000) + strings.Repeat("]", 5000), "nested deeper"},
		"deep block": {strings.Repeat("- ", 5000) + "x", "nested deeper"},
		"very deep":  {strings.Repeat("[", 300000), "f:"},
		"infinite":   {"a: .inf", "is no number"},
		"long int":   {"a: 99999999999999999999999", ""},
		"binary all": {"\x7fELF\x00", "zero byte"},
		"documents":  {strings.Repeat("a: 1\n---\n", MaxDocuments+2), "more than 5000 documents"},
	} {
		t.Run(name, func(t *testing.T) {
			docs, err := Read("f", []byte(row.in))
			var got []string
			if err != nil {
				var e *Error
				if !errors.As(err, &e) || e.Line == 0 {
					t.Fatalf("no line: %v", err)
				}
				got = append(got, err.Error())
			}
			for _, d := range docs {
				for _, p := range d.Problems {
					got = append(got, p.String())
				}
				if len(d.Problems) > 0 && d.JSON != nil {
					t.Error("a document with problems has JSON")
				}
			}
			if len(got) == 0 && row.want != "" || !strings.Contains(strings.Join(got, "\n"), row.want) {
				t.Errorf("%.300q, want %q", got, row.want)
			}
		})
	}
}

// TestMemory: the worst file that is parsed at all takes a bounded amount.
func TestMemory(t *testing.T) {
	in := []byte("[" + strings.Repeat("a,", maxMarks-10) + "a]")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	docs, err := Read("f", in)
	runtime.ReadMemStats(&after)
	if err != nil || len(docs) != 1 {
		t.Fatal(err)
	}
	if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > 700 {
		t.Errorf("%d MiB were allocated in all", grown)
	}
}

// TestExamples: the examples have no problems, and an editor with the schemas
// says so, too.
func TestExamples(t *testing.T) {
	compiler := jsonschema.NewCompiler()
	schemas := make(map[declare.Kind]*jsonschema.Schema)
	for _, k := range declare.Kinds() {
		b, err := declare.Schema(k)
		if err != nil {
			t.Fatal(err)
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if err := compiler.AddResource(string(k), v); err != nil {
			t.Fatal(err)
		}
		if schemas[k], err = compiler.Compile(string(k)); err != nil {
			t.Fatal(err)
		}
	}
	valid := func(d *Document, k declare.Kind) error {
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(d.JSON))
		if err != nil {
			return err
		}
		return schemas[k].Validate(v)
	}
	seen := make(map[declare.Kind]bool)
	var files []string
	for _, pattern := range []string{"../../../examples/apply/*.yaml", "../../../examples/apply/*/*.yaml"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatal(pattern, err)
		}
		files = append(files, found...)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		docs, err := Read(name, b)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range docs {
			parsed, problems := declare.Parse(d.JSON)
			if len(d.Problems)+len(problems) > 0 {
				t.Fatal(d.Problems, problems)
			}
			seen[parsed.Kind] = true
			if err := valid(d, parsed.Kind); err != nil {
				t.Errorf("%s:%d: %v", name, d.Line, err)
			}
		}
	}
	for _, k := range declare.Kinds() {
		if !seen[k] {
			t.Errorf("no example of a %s", k)
		}
	}
	// The schemas refuse what the program refuses.
	for text, k := range map[string]declare.Kind{
		"{apiVersion: muster/v1, kind: Site, metadata: {name: a}, spec: {titel: x}}":                                             declare.Site,
		"{apiVersion: muster/v1, kind: Site, metadata: {name: A B}}":                                                             declare.Site,
		"{apiVersion: muster/v2, kind: Site, metadata: {name: a}}":                                                               declare.Site,
		"{apiVersion: muster/v1, kind: Site, metadata: {name: a}, spec: {stack: shop}}":                                          declare.Site,
		"{apiVersion: muster/v1, kind: StackVersion, metadata: {name: a@1}, spec: {}}":                                           declare.StackVersion,
		"{apiVersion: muster/v1, kind: StackVersion, metadata: {name: a}, spec: {file: x}}":                                      declare.StackVersion,
		"{apiVersion: muster/v1, kind: Assignment, metadata: {name: n-aaaaaaaaaaaaaaaaaaaaaaaa}, spec: {}}":                      declare.Assignment,
		"{apiVersion: muster/v1, kind: Assignment, metadata: {name: n-aaaaaaaaaaaaaaaaaaaaaaaa}, spec: {site: a, role_hint: x}}": declare.Assignment,
		"{apiVersion: muster/v1, kind: PreApprovalRule, metadata: {name: a, labels: {a: b}}}":                                    declare.PreApprovalRule,
	} {
		docs, err := Read("f", []byte(text))
		if err != nil || len(docs) != 1 {
			t.Fatal(text, err)
		}
		if _, problems := declare.Parse(docs[0].JSON); len(problems) == 0 {
			t.Errorf("the program takes %s", text)
		}
		if valid(docs[0], k) == nil {
			t.Errorf("the schema takes %s", text)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(two))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("- - - ? {}\n: |\n  x\n"))
	f.Add([]byte("a: 1\n...\n---\n!!str b"))
	f.Fuzz(func(t *testing.T, b []byte) {
		docs, err := Read("f", b)
		if err != nil {
			return
		}
		for _, d := range docs {
			if d.JSON == nil {
				if len(d.Problems) == 0 {
					t.Fatal("nothing, and nothing is wrong")
				}
				continue
			}
			_, problems := declare.Parse(d.JSON)
			for _, p := range problems {
				if at := d.At(p); at.Line < 1 {
					t.Fatal(at)
				}
			}
		}
	})
}
