package lab

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// Result is the outcome of a run: the last line on standard output with
// `-o json`, and result.json in the run's directory.
type Result struct {
	Scenario string `json:"scenario"`
	// OK: everything that the scenario checks held.
	OK bool `json:"ok"`
	// Lab is "machine": virtual machines from power-on, or "host": namespaces.
	Lab   string `json:"lab"`
	Nodes int    `json:"nodes"`
	// K3s says which k3s ran: "real", "stand-in" or "none".
	K3s        string `json:"k3s"`
	Boot       string `json:"boot"`
	DHCP       string `json:"dhcp"`
	Accel      string `json:"accel"`
	SecureBoot bool   `json:"secure_boot"`
	Forged     bool   `json:"forged"`
	// What else was asked for; see Spec.
	PowerCycle bool   `json:"power_cycle,omitempty"`
	SMBIOS     string `json:"smbios,omitempty"`
	Centre     string `json:"centre,omitempty"`
	// Timings are seconds, each name ends in "_s". With several machines it
	// is the slowest one's time.
	Timings map[string]float64 `json:"timings"`
	// Dir holds logs, packet captures and events of the run.
	Dir string `json:"dir"`
	// Machines has one entry per machine.
	Machines []MachineResult `json:"machines"`
	// Checks lists what was checked, in order.
	Checks []Check `json:"checks"`
	// *SiteResult is there when nodes formed a cluster.
	*SiteResult
	// Error is why the run failed; "" if OK.
	Error string `json:"error,omitempty"`
	// Unable: it could not run on this host; Error has the reason.
	Unable bool `json:"unable,omitempty"`
}

// MachineResult is what is known of one machine at the end.
type MachineResult struct {
	Name    string             `json:"name"`
	Node    string             `json:"node,omitempty"`
	Request string             `json:"request,omitempty"`
	Timings map[string]float64 `json:"timings"`
}

// SiteResult is what became of a site's cluster.
type SiteResult struct {
	K3sVersion string `json:"k3s_version"`
	Seed       uint64 `json:"seed"`
	// Servers and Voters are those at the end, Clusters how many clusters
	// that may grow there are.
	Servers  int `json:"servers"`
	Voters   int `json:"voters"`
	Clusters int `json:"clusters"`
	// APIGap is the longest time in milliseconds without an answer of the
	// Kubernetes API during the promotion, seen from "founder", "worker" and
	// "pod"; null where nobody looked. Remarks say why.
	APIGap map[string]*float64 `json:"api_gap_ms"`
	// PowerCut says what a power cut takes: "unsynced data lost", or why less.
	PowerCut string   `json:"power_cut"`
	Remarks  []string `json:"remarks,omitempty"`
}

// Check is one thing that a scenario asserts.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

const resultFile = "result.json"

// maxResult caps result.json when it is read back.
const maxResult = 4 << 20

func newResult(s Spec) Result {
	r := newMachineResult(s)
	if s.host {
		r.Lab, r.Boot, r.DHCP, r.Accel = "host", "none", "none", "none"
	}
	if s.host || s.disk {
		r.K3s = "none"
		if s.K3s != "" {
			r.K3s = "real"
		}
		if s.StandIn {
			r.K3s = "stand-in"
		}
		r.SiteResult = &SiteResult{K3sVersion: s.K3sVersion, Seed: s.Seed, APIGap: map[string]*float64{"founder": nil, "worker": nil, "pod": nil}}
	}
	return r
}

func newMachineResult(s Spec) Result {
	return Result{
		Scenario: s.Scenario, Lab: "machine", Nodes: s.Nodes, K3s: "none",
		Boot: s.Boot.String(), DHCP: s.DHCP, Accel: s.Accel, SecureBoot: s.SecureBoot, Forged: s.Forged,
		PowerCycle: s.PowerCycle, SMBIOS: s.SMBIOS, Centre: s.Centre,
		Timings: map[string]float64{}, Dir: s.Dir, Machines: []MachineResult{}, Checks: []Check{},
	}
}

// seconds rounds to milliseconds: more digits would only look precise.
func seconds(s float64) float64 { return math.Round(s*1000) / 1000 }

func (r Result) write(dir string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("lab: write result: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(dir, resultFile), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("lab: write result: %w", err)
	}
	return nil
}

func readResult(dir string) (Result, error) {
	b, err := readCapped(filepath.Join(dir, resultFile), maxResult)
	if err != nil {
		return Result{}, fmt.Errorf("lab: read result: %w", err)
	}
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		return Result{}, fmt.Errorf("lab: read result: %w", err)
	}
	return r, nil
}

func readCapped(path string, most int64) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > most {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, fi.Size(), most)
	}
	return os.ReadFile(path)
}
