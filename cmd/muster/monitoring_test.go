package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestMonitoringExamples: alert rules and dashboard ask for metrics that there
// are.
func TestMonitoringExamples(t *testing.T) {
	known := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `(muster_[a-z_]+)` \\|").FindAllStringSubmatch(reference(t, "metrics.md"), -1) {
		known[m[1]] = true
	}
	for _, name := range []string{"prometheus/alerts.yaml", "prometheus/alerts_test.yaml", "grafana/centre.json"} {
		b, err := os.ReadFile(filepath.Join("../../examples", filepath.FromSlash(name)))
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`muster_[a-z_]+`).FindAllString(string(b), -1)
		if len(found) < 10 {
			t.Errorf("%s names %d metrics", name, len(found))
		}
		for _, m := range found {
			if !known[m] && !known[strings.TrimSuffix(m, "_bucket")] {
				t.Errorf("%s asks for %s, which docs/reference/metrics.md does not have", name, m)
			}
		}
		if strings.HasSuffix(name, ".json") && !json.Valid(b) {
			t.Errorf("%s is no JSON", name)
		}
	}
}

// promtool finds Prometheus' tool, installed or unpacked by prerequisites.
func promtool(t *testing.T) string {
	t.Helper()
	if p, err := exec.LookPath("promtool"); err == nil {
		return p
	}
	p, err := filepath.Abs("../../.cache/peers/usr/bin/promtool")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Skip("no promtool here: internal/dev/prerequisites test unpacks Debian's")
	}
	return p
}

// TestAlertRules runs the rules' own tests, and sees them fail when a rule is
// changed.
func TestAlertRules(t *testing.T) {
	tool := promtool(t)
	run := func(dir string) ([]byte, error) {
		cmd := exec.Command(tool, "test", "rules", "alerts_test.yaml")
		cmd.Dir = dir
		return cmd.CombinedOutput()
	}
	if out, err := run("../../examples/prometheus"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	rules, err := os.ReadFile("../../examples/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("../../examples/prometheus/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for old, changed := range map[string]string{
		`muster_requests{state="quarantined"}) > 0`:      `muster_requests{state="quarantined"}) > 5`,
		`expr: up{job="muster"} == 0`:                    `expr: up{job="muster"} == 1`,
		`for: 8h`:                                        `for: 1h`,
		`increase(muster_events_dropped_total[10m]) > 0`: `increase(muster_events_dropped_total[10m]) < 0`,
	} {
		dir := t.TempDir()
		bad := bytes.Replace(rules, []byte(old), []byte(changed), 1)
		if bytes.Equal(bad, rules) {
			t.Fatalf("the rules lack %q", old)
		}
		for name, b := range map[string][]byte{"alerts.yaml": bad, "alerts_test.yaml": tests} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := run(dir); err == nil {
			t.Errorf("the tests hold with %q", changed)
		}
	}
}
