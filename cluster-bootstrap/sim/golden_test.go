package sim

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Each file in testdata is a story: what happens to the site, a line "---",
// and what every node said and did.
func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			sc, end, raw := readStory(t, f)
			head, want, _ := strings.Cut(raw, "---\n")
			var out bytes.Buffer
			r := Run(1, Options{Script: &sc, Trace: &out})
			if r.Violation != "" {
				t.Errorf("violation: %s", r.Violation)
			}
			if r.End != end {
				t.Errorf("ends with %q, want %q", r.End, end)
			}
			if *update {
				if err := os.WriteFile(f, []byte(head+"---\n"+out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			got, exp := strings.Split(out.String(), "\n"), strings.Split(want, "\n")
			for i := range max(len(got), len(exp)) {
				var g, e string
				if i < len(got) {
					g = got[i]
				}
				if i < len(exp) {
					e = exp[i]
				}
				if g != e {
					t.Fatalf("line %d after ---:\n got %s\nwant %s\n(rewrite with: go test ./cluster-bootstrap/sim -run TestStories -update)", i+1, g, e)
				}
			}
		})
	}
}

func readStory(t *testing.T, file string) (Script, string, string) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(string(raw), "---\n")
	sc, end := parseStory(t, head)
	return sc, end, string(raw)
}

func parseStory(t *testing.T, text string) (Script, string) {
	t.Helper()
	sc := Script{Nodes: 3, Mode: fleet.FoundFirst, Servers: 3, MaxLearners: 2, Kills: 9}
	end := "goal"
	num := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	span := func(s string) time.Duration {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] == "#" {
			continue
		}
		switch f[0] {
		case "nodes":
			sc.Nodes = num(f[1])
		case "mode":
			sc.Mode = fleet.FoundingMode(f[1])
		case "servers":
			sc.Servers = num(f[1])
		case "replace":
			sc.Replace = int64(span(f[1]) / time.Second)
		case "soak":
			sc.Soak = int64(span(f[1]) / time.Second)
		case "max-learners":
			sc.MaxLearners = num(f[1])
		case "person":
			sc.PersonActs = f[1] == "acts"
		case "stuck":
			sc.Stuck = 1
		case "kill-learner":
			sc.KillLearner, sc.Kills = 1, 1
		case "at":
			sc.Events = append(sc.Events, Event{span(f[1]), strings.Join(f[2:], " ")})
		case "quiet":
			sc.Quiet = span(f[1])
		case "end":
			end = strings.Join(f[1:], " ")
		default:
			t.Fatalf("no such line: %s", line)
		}
	}
	return sc, end
}
