package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/lab/machine"
)

func TestExplain(t *testing.T) {
	for _, c := range []struct{ line, event, words string }{
		{">>Start PXE over IPv4.", "firmware-pxe", "DHCP"},
		{"  NBP filename is recovery.efi", "firmware-loads", "loads"},
		{"  NBP file downloaded successfully.", "firmware-loaded", "has the boot file"},
		{`BdsDxe: failed to load Boot0001 "UEFI PXEv4 (MAC:525400000001)" from PciRoot(0x0): Access Denied`, "firmware-refused", "REFUSES"},
		{"PXE-E16: No valid offer received.", "firmware-error", "PXE-E16"},
		{"Kernel panic - not syncing: VFS: no root", "kernel-panic", "VFS: no root"},
		{"muster-node: init started (1.0)", "init", "/init"},
		{"[    3.1] muster-node: waiting-for-approval: words are: amber canoe", "node-waiting-for-approval", "waiting-for-approval: words are: amber canoe"},
		{"some other text about muster-node", "", ""},
		{"", "", ""},
	} {
		event, words := explain(c.line)
		if event != c.event || !strings.Contains(words, c.words) {
			t.Errorf("%q is explained as %q, %q; want %q, %q", c.line, event, words, c.event, c.words)
		}
	}
}

// The JSON result is an interface: programs read it.
func TestResultJSON(t *testing.T) {
	s := Spec{Scenario: "enroll", Nodes: 2, Boot: machine.BootHTTP, DHCP: DHCPProxy, SecureBoot: true, Dir: "/runs/x", Accel: machine.AccelTCG}
	r := newResult(s)
	l := &Lab{Spec: s, result: r, line: &timeline{began: time.Now(), file: nopCloser{new(bytes.Buffer)}}}
	l.result.Machines = []MachineResult{{Name: "node1", Timings: map[string]float64{}}, {Name: "node2", Timings: map[string]float64{}}}
	l.Timing("node1", "power_on_to_init_s", 20123456*time.Microsecond)
	l.Timing("node2", "power_on_to_init_s", 18*time.Second)
	l.Enrolled("node2", "n-x", "r-y")
	if err := l.Check("first", nil); err != nil {
		t.Error(err)
	}
	failed := l.Check("second", errors.New("it did not"))
	if failed == nil {
		t.Fatal("a check that did not hold: no error")
	}
	b, err := json.Marshal(l.verdict(failed))
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"scenario": "enroll", "ok": false, "lab": "machine", "nodes": 2.0, "k3s": "none", "dir": "/runs/x",
		"boot": "http", "dhcp": "proxy", "accel": "tcg", "secure_boot": true, "forged": false, "error": "second: it did not",
	} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
	timings := got["timings"].(map[string]any)
	if timings["power_on_to_init_s"] != 20.123 {
		t.Errorf("the run's time is %v, want the slowest machine's, 20.123", timings["power_on_to_init_s"])
	}
	for name := range timings {
		if !strings.HasSuffix(name, "_s") {
			t.Errorf("timing %q does not say its unit", name)
		}
	}
	if n := len(got["checks"].([]any)); n != 2 {
		t.Errorf("%d checks", n)
	}
	m := got["machines"].([]any)[1].(map[string]any)
	if m["node"] != "n-x" || m["request"] != "r-y" {
		t.Errorf("machine %v", m)
	}
	// Nothing ran: still whole lists and objects, not null.
	b, err = json.Marshal(newResult(s))
	if err != nil || bytes.Contains(b, []byte("null")) {
		t.Errorf("%s %v", b, err)
	}
	l.result.Checks = []Check{{Name: "first", OK: true}}
	if r := l.verdict(nil); !r.OK {
		t.Error("all held, and the verdict is no")
	}
	l.result.Checks = append(l.result.Checks, Check{Name: "forgotten error"})
	if r := l.verdict(nil); r.OK {
		t.Error("a check did not hold, the scenario forgot its error, and the verdict is yes")
	}
}

type nopCloser struct{ *bytes.Buffer }

func (nopCloser) Close() error { return nil }

func TestSpecWhenWrongThenEveryProblemIsNamed(t *testing.T) {
	good := Spec{Scenario: "enroll", Dir: "/runs/x"}
	if err := good.Defaults().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		edit func(*Spec)
		want []string
	}{
		"no scenario":       {func(s *Spec) { s.Scenario = "" }, []string{"scenario"}},
		"too many":          {func(s *Spec) { s.Nodes = 33 }, []string{"33 nodes"}},
		"DHCP":              {func(s *Spec) { s.DHCP = "both" }, []string{"DHCP"}},
		"relative":          {func(s *Spec) { s.Dir = "x" }, []string{"absolute"}},
		"long":              {func(s *Spec) { s.Dir = "/" + strings.Repeat("x", MaxDir) }, []string{"characters"}},
		"e1000e by network": {func(s *Spec) { s.NIC = machine.NICE1000E }, []string{"--boot disk"}},
		"two at once":       {func(s *Spec) { s.Nodes, s.DHCP = -1, "x" }, []string{"nodes", "DHCP"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := good
			c.edit(&s)
			err := s.Defaults().Validate()
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
		})
	}
	// What is wrong is a usage error and leaves no directory behind.
	dir := filepath.Join(t.TempDir(), "x")
	_, err := Launch(t.Context(), Spec{Scenario: "dummy", Nodes: -1, Dir: dir}, dummy, &bytes.Buffer{})
	var usage *UsageError
	if !errors.As(err, &usage) {
		t.Errorf("error %v is no usage error", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a directory was made for a run that cannot be")
	}
}

func TestSpecTravelsAsJSON(t *testing.T) {
	s := Spec{Scenario: "enroll", Nodes: 3, Boot: machine.BootDisk, DHCP: DHCPFull, Timeout: time.Minute, Clock: time.Unix(0, 0).UTC(), Dir: "/x"}
	b, err := json.Marshal(briefing{Spec: s, Result: newResult(s)})
	if err != nil {
		t.Fatal(err)
	}
	var back briefing
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if back.Spec != s {
		t.Errorf("%+v became %+v", s, back.Spec)
	}
}

func TestFindWhenRecordIsHostileThenNoHarm(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	home, err := Home()
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, text string) string {
		dir := filepath.Join(home, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, recordFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	put("garbage", "{")
	put("huge", strings.Repeat(" ", 1<<20))
	put("nobody", `{"scenario":"boot","pid":-1,"boot_id":"`+bootID()+`","started":"2026-01-01T00:00:00Z"}`)
	// A PID that is somebody else's now must not be taken for the run's, or
	// `down` would kill a stranger.
	put("stranger", `{"scenario":"boot","pid":1,"start_ticks":99999999999,"boot_id":"`+bootID()+`","started":"2026-01-02T00:00:00Z"}`)
	put("before-reboot", `{"scenario":"boot","pid":1,"start_ticks":1,"boot_id":"another","started":"2026-01-03T00:00:00Z"}`)
	runs, err := List()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range runs {
		names = append(names, r.Name)
		if r.Alive() || r.State != "killed" {
			t.Errorf("%s is taken for %s", r.Name, r.State)
		}
		if err := Down(r, time.Second); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"before-reboot", "stranger", "nobody"}; !slices.Equal(names, want) {
		t.Errorf("runs %v, want %v", names, want)
	}
}

func TestProcessStart(t *testing.T) {
	a, err := processStart(os.Getpid())
	if err != nil || a == 0 {
		t.Fatal(a, err)
	}
	if b, err := processStart(os.Getpid()); err != nil || a != b {
		t.Errorf("%d became %d (%v)", a, b, err)
	}
	if _, err := processStart(1 << 30); err == nil {
		t.Error("a process that is not there: no error")
	}
}
