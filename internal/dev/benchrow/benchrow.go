// Package benchrow is how a benchmark tells its result: a JSON file per part,
// so that parts can be run alone and a long run can go on where it stopped.
// internal/dev/benchdoc makes docs/benchmarks.md of them.
package benchrow

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Row is one comparison.
type Row struct {
	What string `json:"what"`
	// Unit of Ours and Theirs, such as "MB/s". Less is true where less is better.
	Unit string    `json:"unit"`
	Less bool      `json:"less,omitempty"`
	Ours []float64 `json:"ours"`
	// Peer is who Theirs is about, "" without one.
	Peer   string    `json:"peer,omitempty"`
	Theirs []float64 `json:"theirs,omitempty"`
	Note   string    `json:"note,omitempty"`
}

// Part is the result of one part.
type Part struct {
	Part string    `json:"part"`
	Time time.Time `json:"time"`
	// Load is /proc/loadavg at the start and at the end.
	Load []string `json:"load"`
	Rows []Row    `json:"rows"`
	path string
}

// Begin starts a part, or skips the test if it is not asked for: MUSTER_BENCH
// names the parts, or all, and MUSTER_BENCH_DIR is where results go.
func Begin(t testing.TB, part string) *Part {
	t.Helper()
	want, dir := os.Getenv("MUSTER_BENCH"), os.Getenv("MUSTER_BENCH_DIR")
	if want == "" || dir == "" || want != "all" && !slices.Contains(strings.Split(want, ","), part) {
		t.Skipf("a benchmark: make bench PART=%s runs it", part)
	}
	p := &Part{Part: part, Time: time.Now().UTC().Truncate(time.Second), path: filepath.Join(dir, part+".json")}
	p.Load = append(p.Load, load())
	return p
}

func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	f := strings.Fields(string(b))
	return f[0]
}

// Add adds a row and writes what there is so far.
func (p *Part) Add(t testing.TB, r Row) {
	t.Helper()
	p.Rows = append(p.Rows, r)
	p.Load = append(p.Load[:1], load())
	b, err := json.MarshalIndent(p, "", " ")
	if err == nil {
		err = os.WriteFile(p.path+".new", b, 0o644)
	}
	if err == nil {
		err = os.Rename(p.path+".new", p.path)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s %s", r.What, Format(Median(r.Ours)), r.Unit)
	if r.Peer != "" {
		t.Logf("  %s: %s, ratio %s", r.Peer, Format(Median(r.Theirs)), Format(r.Ratio()))
	}
}

// Ratio is how much better we are: above 1 is better, whatever the unit.
func (r Row) Ratio() float64 {
	a, b := Median(r.Ours), Median(r.Theirs)
	if a == 0 || b == 0 {
		return 0
	}
	if r.Less {
		return b / a
	}
	return a / b
}

// Median of v, 0 of nothing.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Format writes three digits.
func Format(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2g", v)
}
