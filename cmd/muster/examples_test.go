package main

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestExampleSettings: the settings files are ones that `muster serve` takes.
func TestExampleSettings(t *testing.T) {
	files, err := filepath.Glob("../../examples/*/serve.yaml")
	if err != nil || len(files) < 2 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		t.Run(filepath.Base(filepath.Dir(name)), func(t *testing.T) {
			if err := checkSettings(name); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestExampleSettingsNoticeMistakes(t *testing.T) {
	for name, text := range map[string]string{
		"unknown setting": "data: /x\nlisten-node: \":1\"\n",
		"no data":         "metrics: \"-\"\n",
		"bad range":       "data: /x\nboot-interface: eth1\nboot-range: 10.77.0.9\n",
		"bad mode":        "data: /x\nboot-interface: eth1\nboot-mode: half\n",
	} {
		file := filepath.Join(t.TempDir(), "serve.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if checkSettings(file) == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// checkSettings reads a file as `muster serve --config` does, up to the point
// where it would touch the host.
func checkSettings(name string) error {
	var s serveSettings
	cmd := &cobra.Command{}
	s.flags(cmd)
	if _, err := resolve(cmd, name); err != nil {
		return err
	}
	_, err := s.config(cmd)
	return err
}

// TestCommandsInDocuments reads code blocks of the documentation, example
// scripts and units, and finds each command and flag in the program.
func TestCommandsInDocuments(t *testing.T) {
	var files []string
	for _, pattern := range []string{"docs/how-to/*.md", "docs/runbook/*.md", "docs/concepts/*.md", "examples/*/*.sh", "examples/*/*.service"} {
		m, err := filepath.Glob("../../" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, m...)
	}
	found := 0
	for _, name := range files {
		for _, line := range commandLines(t, name) {
			found++
			if problem := checkCommand(line); problem != "" {
				t.Errorf("%s: %s: %s", strings.TrimPrefix(name, "../../"), line, problem)
			}
		}
	}
	if found < 50 {
		t.Errorf("only %d commands found: the search is broken", found)
	}
}

func TestCheckCommandNoticesMistakes(t *testing.T) {
	for line, good := range map[string]bool{
		`approve "amber canoe" --site x`:              true,
		`lab exec $LAB get requests -o json | tail`:   true,
		`serve --data x --boot-mode full`:             true,
		`aprove x`:                                    false,
		`approve x --sight y`:                         false,
		`get pods`:                                    false,
		`lab exec $LAB get requests --stat pending`:   false,
		`audit verify --data x    # prints the head`:  true,
		`image recovery --out o --kernel-flavour any`: false,
	} {
		if problem := checkCommand(line); (problem == "") != good {
			t.Errorf("%s: %q", line, problem)
		}
	}
}

var (
	mention = regexp.MustCompile("(?:^|[\\s`(/])(?:muster|\\$MUSTER) ([a-z].*)$")
	quoted  = regexp.MustCompile("`muster ([a-z][^`]*)`")
	flagRE  = regexp.MustCompile(`^--?([a-z][a-z0-9-]*)`)
)

// commandLines returns what follows "muster" in code: fenced blocks and
// `muster ...` in text of pages, any line of other files that is no comment.
func commandLines(t *testing.T, name string) []string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := strings.HasSuffix(name, ".md")
	var out []string
	fenced, before := "", ""
	for s := bufio.NewScanner(f); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		if lang, fence := strings.CutPrefix(line, "```"); fence && page {
			if fenced == "" {
				fenced = "x" + lang
			} else {
				fenced = ""
			}
			continue
		}
		if page && fenced != "xsh" {
			for _, m := range quoted.FindAllStringSubmatch(line, -1) {
				out = append(out, m[1])
			}
			continue
		}
		if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "Description=") {
			continue
		}
		if whole, more := strings.CutSuffix(line, "\\"); more {
			before += whole
			continue
		}
		line, before = before+line, ""
		line = strings.TrimPrefix(line, "sudo -u muster ")
		if m := mention.FindStringSubmatch(line); m != nil {
			out = append(out, m[1])
		}
	}
	return out
}

// checkCommand says what is wrong with the words after "muster", "" if nothing.
func checkCommand(line string) string {
	if i := strings.IndexAny(line, "#|;)>&"); i >= 0 {
		line = line[:i]
	}
	words := strings.Fields(line)
	if rest, found := strings.CutPrefix(strings.Join(words, " "), "lab exec "); found && !strings.HasPrefix(rest, "COMMAND") {
		if _, inner, found := strings.Cut(rest, " "); found {
			return checkCommand(inner)
		}
	}
	root := rootCommand()
	cmd, rest, err := root.Find(words)
	switch {
	case err != nil:
		return err.Error()
	case cmd == root:
		return "no such command"
	case cmd.HasSubCommands() && len(rest) > 0 && regexp.MustCompile(`^[a-z]+$`).MatchString(rest[0]):
		return "no such command below " + cmd.CommandPath()
	}
	for _, w := range rest {
		m := flagRE.FindStringSubmatch(w)
		if m == nil {
			continue
		}
		if f := cmd.Flags().Lookup(m[1]); f == nil && (len(m[1]) > 1 || cmd.Flags().ShorthandLookup(m[1]) == nil) && m[1] != "help" {
			return cmd.CommandPath() + " has no flag " + m[0]
		}
	}
	return ""
}
