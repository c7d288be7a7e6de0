// Command summary reads the output of `go test -json` and prints what a person
// needs: a line per package, the whole output of failed tests, and every
// skipped test with its reason, so that no skip goes unseen.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
)

type event struct {
	Action  string
	Package string
	Test    string
	Elapsed float64
	Output  string
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: summary FILE (the output of go test -json)")
		os.Exit(2)
	}
	f, err := os.Open(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		os.Exit(1)
	}
	defer f.Close()
	if !summarise(f) {
		os.Exit(1)
	}
}

// summarise prints the report and tells whether everything passed.
func summarise(f *os.File) bool {
	output := map[string][]string{} // package + test -> lines
	var skips, fails, pkgs []string
	passed, failed, skipped := 0, 0, 0
	sc := bufio.NewScanner(f)
	sc.Buffer(make([]byte, 1<<20), 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Println(sc.Text()) // build errors are not always JSON
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			if e.Action == "build-output" {
				fmt.Print(e.Output)
			}
			output[key] = append(output[key], e.Output)
		case "pass", "fail", "skip":
			if e.Test == "" {
				if e.Action == "fail" {
					pkgs = append(pkgs, fmt.Sprintf("FAIL %-60s %6.1fs", e.Package, e.Elapsed))
					fails = append(fails, strings.Join(output[key], ""))
				} else if e.Action == "pass" {
					pkgs = append(pkgs, fmt.Sprintf("ok   %-60s %6.1fs", e.Package, e.Elapsed))
				}
				continue
			}
			switch e.Action {
			case "pass":
				passed++
			case "fail":
				failed++
				fails = append(fails, strings.Join(output[key], ""))
			case "skip":
				skipped++
				skips = append(skips, fmt.Sprintf("skip %s %s: %s", strings.TrimPrefix(e.Package, "github.com/muster-edge/muster/"), e.Test, reason(output[key])))
			}
			delete(output, key)
		}
	}
	if err := sc.Err(); err != nil {
		fmt.Println("summary:", err)
		return false
	}
	sort.Strings(pkgs)
	sort.Strings(skips)
	for _, l := range pkgs {
		fmt.Println(l)
	}
	for _, l := range skips {
		fmt.Println(l)
	}
	bad := failed > 0
	for _, l := range pkgs {
		bad = bad || strings.HasPrefix(l, "FAIL")
	}
	for _, l := range fails {
		fmt.Print(l)
	}
	fmt.Printf("go test: %d passed, %d failed, %d skipped\n", passed, failed, skipped)
	return !bad && passed > 0
}

func reason(lines []string) string {
	var out []string
	for _, l := range lines {
		l = strings.TrimSpace(l)
		if l == "" || strings.HasPrefix(l, "=== ") || strings.HasPrefix(l, "--- ") {
			continue
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return "no reason printed"
	}
	return strings.Join(out, " ")
}
