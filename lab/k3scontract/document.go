package k3scontract

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Result is the last time a row passed on one kind of k3s.
type Result struct {
	Version string `json:"version"`
	Date    string `json:"date"` // YYYY-MM-DD
}

// Results is by row, then by kind ("real", "stand-in"). Only passes are kept:
// a row that fails loses its entry.
type Results map[string]map[string]Result

// ReadResults reads what Marshal wrote.
func ReadResults(b []byte) (Results, error) {
	r := Results{}
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("k3scontract: read results: %w", err)
	}
	return r, nil
}

// Marshal writes results in a form that diffs well.
func (r Results) Marshal() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return nil, fmt.Errorf("k3scontract: write results: %w", err)
	}
	return append(b, '\n'), nil
}

// Missing names the rows that passed on no k3s at all.
func Missing(rows []Row, r Results) []string {
	var out []string
	for _, row := range rows {
		if len(r[row.ID]) == 0 {
			out = append(out, row.ID)
		}
	}
	return out
}

const head = `# What muster relies on k3s for

One row per behaviour, tested from outside by ` + "`go test ./lab/k3scontract`" + `: configuration in; files, HTTP, the API and
the end of the process out. The same tests run against a real k3s (` + "`$K3S`, or `k3s` on PATH" + `) and against the stand-in
(` + "`lab/standin`" + `: a real etcd and a real kube-apiserver, with a supervisor and an agent of our own, and no containers).

**A row that passed on the stand-in says that muster is tested against that behaviour. It does not say that k3s behaves so.**
The column "real k3s" is what counts; "by hand" is what was measured on a k3s of the v1.36.3 era, built from source, before
these tests existed.

This page is generated: ` + "`go test ./lab/k3scontract -update -timeout 60m`" + `.

| row | behaviour | what relies on it | real k3s | by hand on a real k3s | stand-in |
|---|---|---|---|---|---|
`

// Document renders docs/k3s-contract.md.
func Document(rows []Row, r Results) string {
	var b strings.Builder
	b.WriteString(head)
	for _, row := range rows {
		real := "not yet on a real k3s"
		if row.Only != "" {
			real = "does not apply"
		}
		if x, ok := r[row.ID]["real"]; ok {
			real = x.Version
		}
		hand := row.ByHand
		if hand == "" {
			hand = "–"
		}
		stand := "no"
		if x, ok := r[row.ID]["stand-in"]; ok {
			stand = "passed " + x.Date
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", row.ID, row.What, row.Relies, real, hand, stand)
	}
	return b.String()
}
