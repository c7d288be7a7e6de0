package sim

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Long runs: ranges of seeds, one line of JSON each in a log that only grows.
// A run goes on where the log ends. Ranges played with other code do not count
// and are not mixed with new ones.

// span is one line of the log: seeds From to To-1.
type span struct {
	Kind      string         `json:"kind"`
	From      int            `json:"from"`
	To        int            `json:"to"`
	Code      string         `json:"code"`   // digest of planner and simulator
	Commit    string         `json:"commit"` // for people: the commit they were in
	Date      string         `json:"date"`
	Seconds   float64        `json:"seconds"`
	Ends      map[string]int `json:"ends"`
	Resets    int            `json:"resets"`
	Failed    *int           `json:"failed,omitempty"` // the seed
	Violation string         `json:"violation,omitempty"`
}

const chunk = 5000

// codeDigest is the SHA-256 of all sources of the planner and the simulator
// but their tests.
func codeDigest(dirs ...string) (string, error) {
	h := sha256.New()
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			return "", fmt.Errorf("no sources in %s (%w)", dir, err)
		}
		slices.Sort(files)
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			b, err := os.ReadFile(f)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(h, "%s %d\n", filepath.Base(f), len(b))
			h.Write(b)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// commitOf names the commit, and says so if the sources differ from it.
func commitOf() string {
	out, err := exec.Command("git", "log", "-1", "--format=%h", "--", "..").Output()
	if err != nil {
		return "unknown"
	}
	c := strings.TrimSpace(string(out))
	if exec.Command("git", "-C", "..", "diff", "--quiet", "HEAD", "--", ".", ":!*_test.go", ":!*.md", ":!k3s").Run() != nil {
		c += "+changes"
	}
	return c
}

// readSpans parses a log.
func readSpans(b []byte) ([]span, error) {
	var out []span
	for i, line := range bytes.Split(b, []byte("\n")) {
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var s span
		if err := json.Unmarshal(line, &s); err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
		out = append(out, s)
	}
	return out, nil
}

// resume returns the first seed that was not played yet.
func resume(log []span, kind, code string, mix bool) (int, error) {
	next := 0
	for _, s := range log {
		if s.Kind != kind {
			continue
		}
		switch {
		case s.Code != code && !mix:
			return 0, fmt.Errorf("the log holds ranges of other code (%s, commit %s; this is %s): begin another log, or mix them with -mix (MIX=1)", s.Code, s.Commit, code)
		case s.Failed != nil && s.Code == code:
			return 0, fmt.Errorf("seed %d failed with this very code: %s", *s.Failed, s.Violation)
		case s.Failed != nil:
			continue
		case s.From != next:
			return 0, fmt.Errorf("the log has a gap: a range begins at %d, want %d", s.From, next)
		}
		next = s.To
	}
	return next, nil
}

func playRanges(t *testing.T, path string, kinds []string, upto int, mix bool) {
	code, err := codeDigest("..", ".")
	if err != nil {
		t.Fatal(err)
	}
	commit := commitOf()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, kind := range kinds {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		log, err := readSpans(raw)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		next, err := resume(log, kindName(kind), code, mix)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		for next < upto {
			s := span{Kind: kindName(kind), From: next, To: min(next+chunk, upto), Code: code, Commit: commit,
				Date: time.Now().UTC().Format(time.RFC3339), Ends: map[string]int{}}
			begin := time.Now()
			for seed := s.From; seed < s.To && s.Failed == nil; seed++ {
				r := Run(uint64(seed), Options{Kind: kind})
				s.Ends[r.End]++
				s.Resets += r.Resets
				if r.Violation != "" {
					s.Failed, s.Violation = &seed, r.Violation
				}
			}
			s.Seconds = time.Since(begin).Seconds()
			line, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write(append(line, '\n')); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if s.Failed != nil {
				t.Fatalf("kind %s seed %d: %s", s.Kind, *s.Failed, s.Violation)
			}
			next = s.To
		}
		t.Logf("kind %s: seeds 0 to %d are clean", kindName(kind), next-1)
	}
}

func TestResume(t *testing.T) {
	five := 5
	a := span{Kind: "founding", From: 0, To: 10, Code: "x"}
	b := span{Kind: "founding", From: 10, To: 20, Code: "x"}
	other := span{Kind: "founding", From: 20, To: 30, Code: "y", Commit: "c0ffee"}
	failed := span{Kind: "founding", From: 20, To: 30, Code: "x", Failed: &five, Violation: "two founders"}
	promotion := span{Kind: "promotion", From: 0, To: 7, Code: "y"}
	for _, c := range []struct {
		what string
		log  []span
		mix  bool
		next int
		err  string
	}{
		{"an empty log", nil, false, 0, ""},
		{"two ranges and another kind", []span{a, promotion, b}, false, 20, ""},
		{"other code", []span{a, b, other}, false, 0, "other code"},
		{"other code, and told to mix", []span{a, b, other}, true, 30, ""},
		{"a gap", []span{b}, false, 0, "gap"},
		{"a failed seed", []span{a, b, failed}, false, 0, "two founders"},
		{"a failed seed of other code, mixed", []span{{Kind: "founding", To: 5, Code: "y", Failed: &five}, a}, true, 10, ""},
	} {
		next, err := resume(c.log, "founding", "x", c.mix)
		if next != c.next || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got %d, %v", c.what, next, err)
		}
	}
	if _, err := readSpans([]byte("{}\nnot json\n")); err == nil {
		t.Error("a torn log is believed")
	}
	// The digest notices a changed source and nothing else.
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	digest := func() string {
		d, err := codeDigest(dir)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	write("a.go", "package a")
	one := digest()
	write("a_test.go", "package a")
	if digest() != one {
		t.Error("a test changes the digest")
	}
	write("a.go", "package b")
	if digest() == one {
		t.Error("a changed source leaves the digest as it is")
	}
}
