package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/lab"
)

// runLab runs `muster lab ARGS` and returns its exit code and output.
func runLab(t *testing.T, args ...string) (code int, stdout string, err error) {
	t.Helper()
	cmd := labCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&bytes.Buffer{})
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(t.Context())
	var exit exitError
	switch {
	case errors.As(err, &exit):
		code = exit.code
	case err != nil:
		code = 1
	}
	return code, out.String(), err
}

func TestLabExitCodes(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	node := filepath.Join(t.TempDir(), "muster-node")
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no scenario":       {[]string{"run"}, 2, "enroll"},
		"unknown scenario":  {[]string{"run", "dance", "--node-binary", node}, 2, "dance"},
		"unknown output":    {[]string{"run", "boot", "-o", "xml"}, 2, "xml"},
		"too many nodes":    {[]string{"run", "boot", "--nodes", "99", "--node-binary", node}, 2, "99"},
		"wrong DHCP":        {[]string{"run", "boot", "--dhcp", "none", "--node-binary", node}, 2, "none"},
		"e1000e by network": {[]string{"run", "boot", "--nic", "e1000e", "--node-binary", node}, 2, "--boot disk"},
		"wrong clock":       {[]string{"run", "boot", "--rtc", "noon"}, 1, "noon"}, // main makes flag errors 2
		"no lab":            {[]string{"down"}, 1, "no lab is running"},
		"no such lab":       {[]string{"down", "nonsense"}, 1, "nonsense"},
		"no such button":    {[]string{"power", "node1", "burn"}, 1, "no lab is running"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, err := runLab(t, c.args...)
			if code != c.code || err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("exit code %d (%v), want %d and %q", code, err, c.code, c.want)
			}
		})
	}
	code, out, err := runLab(t, "list", "-o", "json")
	if code != 0 || strings.TrimSpace(out) != "[]" {
		t.Errorf("list: %d %q %v", code, out, err)
	}
}

func TestLabReport(t *testing.T) {
	for name, c := range map[string]struct {
		result lab.Result
		err    error
		code   int
	}{
		"held":             {lab.Result{OK: true}, nil, 0},
		"failed":           {lab.Result{Error: "x", Checks: []lab.Check{{Name: "a"}}}, nil, 1},
		"unable":           {lab.Result{}, &lab.Unable{Reason: "no root"}, 3},
		"unable inside":    {lab.Result{Unable: true, Error: "no dnsmasq"}, nil, 3},
		"usage":            {lab.Result{}, &lab.UsageError{Err: errors.New("x")}, 2},
		"something broken": {lab.Result{}, os.ErrInvalid, 1},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := labReport(&out, "json", c.result, c.err)
			code := 0
			var exit exitError
			if errors.As(err, &exit) {
				code = exit.code
			}
			if code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			var r lab.Result
			if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil {
				t.Errorf("the last line is no JSON object: %v", err)
			}
		})
	}
}
