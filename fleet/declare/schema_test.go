package declare

import (
	"bytes"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the schemas")

// comments reads the comments of the types from their source.
func comments(t *testing.T) Comments {
	t.Helper()
	found := make(map[string]string)
	for prefix, pattern := range map[string]string{"": "*.go", "fleet.": "../*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range f.Decls {
				g, is := d.(*ast.GenDecl)
				if !is {
					continue
				}
				for _, s := range g.Specs {
					ts, is := s.(*ast.TypeSpec)
					if !is {
						continue
					}
					found[prefix+ts.Name.Name+"."] = flat(g.Doc)
					st, is := ts.Type.(*ast.StructType)
					if !is {
						continue
					}
					last := ""
					for _, field := range st.Fields.List {
						// A comment speaks of the fields below it, too, up to the
						// next one or an empty line; few enough not to matter.
						if text := flat(field.Doc); text != "" {
							last = text
						}
						for _, n := range field.Names {
							found[prefix+ts.Name.Name+"."+n.Name] = last
						}
					}
				}
			}
		}
	}
	return func(typeName, field string) string { return found[typeName+"."+field] }
}

func flat(g *ast.CommentGroup) string { return strings.Join(strings.Fields(g.Text()), " ") }

// TestSchemas: the published schemas are those of the types. -update writes
// them.
func TestSchemas(t *testing.T) {
	of := comments(t)
	for _, k := range Kinds() {
		want, err := MakeSchema(k, of)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{"schemas", "../../docs/reference/schemas"} {
			name := filepath.Join(dir, SchemaFile(k))
			if *update {
				if err := os.WriteFile(name, want, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			is, err := os.ReadFile(name)
			if err != nil || !bytes.Equal(is, want) {
				t.Errorf("%s is not what the types say (%v): go test ./fleet/declare -run TestSchemas -update", name, err)
			}
		}
		if got, err := Schema(k); !*update && (err != nil || !bytes.Equal(got, want)) {
			t.Errorf("Schema(%s) is old: %v", k, err)
		}
		if bytes.Count(want, []byte(`"description"`)) < 3 {
			t.Errorf("the schema of %s explains nothing", k)
		}
	}
	if _, err := Schema("Moon"); err == nil {
		t.Error("a schema of a kind that does not exist")
	}
}
