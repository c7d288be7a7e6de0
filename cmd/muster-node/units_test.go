package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

const unitDir = "../../examples/systemd"

func unit(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(unitDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestUnitsSayWhatTheAgentNeeds keeps the units in step with the program.
func TestUnitsSayWhatTheAgentNeeds(t *testing.T) {
	for name, want := range map[string][]string{
		"muster-agent.service": {"Type=notify", "WatchdogSec=60", "NoNewPrivileges=yes", "ProtectSystem=strict", "Restart=always",
			"RuntimeDirectoryPreserve=yes", "ExecStart=/usr/local/bin/muster-node agent --log text"},
		"muster-k3s.service": {"Type=notify", "KillMode=process", "Delegate=yes", "TimeoutStopSec=120", "Restart=always",
			"RestartPreventExitStatus=2 3", "ExecStart=/usr/local/bin/muster-node k3s --stop-timeout 90s"},
		"muster-trial.service": {"Type=oneshot", "ExecStart=/usr/local/bin/muster-node slot trial"},
		"muster-trial.timer":   {"OnBootSec=16min", "OnUnitInactiveSec=5min", "WantedBy=timers.target"},
	} {
		text := unit(t, name)
		for _, w := range want {
			if !strings.Contains(text, "\n"+w+"\n") {
				t.Errorf("%s: %q is missing", name, w)
			}
		}
	}
	text := unit(t, "muster-agent.service")
	set := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindStringSubmatch(text)
	if set == nil {
		t.Fatal("the capabilities of the agent are not bounded")
	}
	for _, c := range strings.Fields(set[1]) {
		if !regexp.MustCompile(`(?m)^# .*\b` + strings.TrimPrefix(c, "CAP_") + `\b.*  `).MatchString(text) {
			t.Errorf("%s has no reason in the unit", c)
		}
	}
	// The flags in the units are flags of the program.
	if _, err := agentFlags([]string{"--log", "text"}, os.Stderr); err != nil {
		t.Error(err)
	}
	for _, d := range []string{"10s", "48h", "x"} {
		if _, err := agentFlags([]string{"--health-deadline", d}, new(strings.Builder)); err == nil {
			t.Errorf("--health-deadline %s is taken", d)
		}
	}
	if o, err := agentFlags([]string{"--health-deadline", "5m"}, os.Stderr); err != nil || o.healthDeadline != 5*time.Minute {
		t.Errorf("%v %s", err, o.healthDeadline)
	}
	if _, err := agentFlags([]string{"--log", "text", "--wings", "2"}, new(strings.Builder)); err == nil {
		t.Error("a flag that does not exist was taken")
	}
}

// TestSystemdTakesTheUnits asks systemd itself.
func TestSystemdTakesTheUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: the units are checked by text only")
	}
	dir := t.TempDir()
	var files []string
	for _, name := range []string{"muster-agent.service", "muster-k3s.service", "muster-trial.service", "muster-trial.timer"} {
		// The programs need not be installed where the test runs.
		text := strings.ReplaceAll(strings.ReplaceAll(unit(t, name), "/usr/local/bin/muster-node", "/bin/true"), "/sbin/modprobe", "/bin/true")
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	verify := func(files ...string) (string, error) {
		out, err := exec.Command(analyze, append([]string{"verify", "--man=no"}, files...)...).CombinedOutput()
		return string(out), err
	}
	if out, err := verify(files...); err != nil || strings.Contains(out, dir) {
		t.Errorf("verify: %v\n%s", err, out)
	}
	out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=45", files[0]).CombinedOutput()
	if err != nil {
		t.Errorf("security: %v\n%s", err, out)
	}
	bad := filepath.Join(dir, "bad.service")
	if err := os.WriteFile(bad, []byte("[Service]\nExecStart=relative/path\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(bad); err == nil {
		t.Errorf("systemd took a unit that is wrong:\n%s", out)
	}
}
