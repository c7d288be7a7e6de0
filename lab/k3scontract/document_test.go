package k3scontract

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestEveryRowHasAnEntryAndTheDocumentIsCurrent(t *testing.T) {
	res, err := storedResults()
	if err != nil {
		t.Fatal(err)
	}
	if m := Missing(Rows, res); len(m) > 0 && !*update {
		t.Errorf("rows that passed on no k3s: %v (go test ./lab/k3scontract -update -timeout 60m)", m)
	}
	known := map[string]bool{}
	for _, r := range Rows {
		if known[r.ID] || r.What == "" || r.Relies == "" {
			t.Errorf("row %s: twice, or not filled in", r.ID)
		}
		known[r.ID] = true
	}
	for id := range res {
		if !known[id] {
			t.Errorf("results.json has %s, which is no row", id)
		}
	}
	if *update {
		return // written after the run
	}
	have, err := os.ReadFile(docPath())
	if err != nil {
		t.Fatal(err)
	}
	if want := Document(Rows, res); string(have) != want {
		t.Errorf("docs/k3s-contract.md is not what the rows and results.json say (-update writes it)")
	}
}

func TestEveryRowHasATest(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	tested := map[string]bool{}
	re := regexp.MustCompile(`\brow\(t, "([A-Z][0-9]+)"`)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range re.FindAllStringSubmatch(string(b), -1) {
			if tested[m[1]] {
				t.Errorf("row %s is tested twice", m[1])
			}
			tested[m[1]] = true
		}
	}
	for _, r := range Rows {
		if !tested[r.ID] {
			t.Errorf("row %s has no test", r.ID)
		}
	}
}

func TestMissingFindsARowWithoutAnEntry(t *testing.T) {
	rows := []Row{{ID: "A1"}, {ID: "A2"}}
	res := Results{"A1": {"stand-in": {Version: "v1", Date: "2026-01-01"}}, "A2": {}}
	if m := Missing(rows, res); len(m) != 1 || m[0] != "A2" {
		t.Errorf("Missing = %v, want A2", m)
	}
	doc := Document(rows, res)
	if strings.Count(doc, "not yet on a real k3s") != 2 {
		t.Errorf("a pass on the stand-in counts for a real k3s:\n%s", doc)
	}
	res["A1"]["real"] = Result{Version: "v1.36.3+k3s1"}
	if doc := Document(rows, res); strings.Count(doc, "not yet on a real k3s") != 1 || !strings.Contains(doc, "v1.36.3+k3s1") {
		t.Errorf("a pass on a real k3s is not shown:\n%s", doc)
	}
}
