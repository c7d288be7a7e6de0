// Command fullrun notes the result of one long scenario in docs/full-run.md:
// the newest result of each, with the commit it was seen on.
//
//	fullrun docs/full-run.md SHARD "NAME ARGS" EXIT SECONDS COMMIT K3S
package main

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const head = `# Full run

` + "`make test-full SHARD=n`" + ` runs the long scenarios (` + "`internal/dev/scenarios`" + `, ` + "`docs/how-to/test-in-the-lab.md`" + `) and writes down here how each ended last. A row
that failed stays until the scenario has held again.

| shard | scenario | result | seconds | commit | day | k3s |
|---|---|---|---|---|---|---|
`

func main() {
	if len(os.Args) != 8 {
		fmt.Fprintln(os.Stderr, "usage: fullrun FILE SHARD SCENARIO EXIT SECONDS COMMIT K3S")
		os.Exit(2)
	}
	if err := note(os.Args[1], os.Args[2:], time.Now().UTC()); err != nil {
		fmt.Fprintln(os.Stderr, "fullrun:", err)
		os.Exit(1)
	}
}

// results says what the exit codes of `muster lab run` mean.
var results = map[string]string{"0": "held", "1": "**failed**", "2": "**wrong usage**", "3": "cannot run here"}

func note(path string, row []string, now time.Time) error {
	old, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	result, ok := results[row[2]]
	if !ok {
		result = "**exit " + row[2] + "**"
	}
	rows := map[string]string{}
	for line := range strings.Lines(string(old)) {
		if f := strings.Split(line, "|"); len(f) == 9 && strings.HasPrefix(strings.TrimSpace(f[2]), "`") {
			rows[strings.TrimSpace(f[2])] = strings.TrimSuffix(line, "\n")
		}
	}
	name := "`" + row[1] + "`"
	rows[name] = fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s |", row[0], name, result, row[3], row[4], now.Format(time.DateOnly), row[5])
	lines := make([]string, 0, len(rows))
	for _, r := range rows {
		lines = append(lines, r)
	}
	shard := func(line string) int {
		n, _ := strconv.Atoi(strings.TrimSpace(strings.Split(line, "|")[1])) // smoke comes first
		return n
	}
	slices.SortFunc(lines, func(a, b string) int {
		if d := shard(a) - shard(b); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	new := path + ".new"
	if err := os.WriteFile(new, []byte(head+strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	return os.Rename(new, path)
}
