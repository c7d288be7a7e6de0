package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestNote(t *testing.T) {
	path := filepath.Join(t.TempDir(), "full-run.md")
	day := time.Date(2027, 3, 1, 0, 0, 0, 0, time.UTC)
	for _, row := range [][]string{
		{"2", "race", "0", "142", "abc", "stand-in"},
		{"1", "enroll --nodes 3", "1", "42", "abc", "none"},
		{"1", "enroll --nodes 3", "0", "43", "def", "none"},
	} {
		if err := note(path, row, day); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := "| 1 | `enroll --nodes 3` | held | 43 | def | 2027-03-01 | none |\n| 2 | `race` | held | 142 | abc | 2027-03-01 | stand-in |\n"
	if !strings.HasSuffix(string(b), want) || strings.Count(string(b), "`enroll --nodes 3`") != 1 {
		t.Errorf("%s", b)
	}
}
