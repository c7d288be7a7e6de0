package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"time"

	"github.com/muster-edge/muster/lab/machine"
)

// The DHCP arrangements of the lab network.
const (
	// DHCPFull: the boot host leases addresses itself.
	DHCPFull = "full"
	// DHCPProxy: somebody else's DHCP server leases, ours only adds boot data.
	DHCPProxy = "proxy"
)

// The values of Spec.SMBIOS and Spec.Centre.
const (
	SMBIOSHostile = "hostile"
	// CentreImpostor: somebody else answers at the centre's address first.
	CentreImpostor = "impostor"
	// CentreOutage: the centre is killed while machines wait.
	CentreOutage = "outage"
)

// The values of Spec.Who.
const (
	WhoFounder   = "founder"
	WhoCandidate = "candidate"
	WhoBoth      = "both"
)

// Spec is what `muster lab run` was asked for. It travels as JSON from the
// command to the process inside the namespaces.
type Spec struct {
	// Scenario is the name of one.
	Scenario string `json:"scenario"`
	// Nodes is how many machines; 1 if 0.
	Nodes int `json:"nodes"`
	// Boot is the way by which machines start.
	Boot machine.Boot `json:"boot"`
	// DHCP is DHCPFull (default) or DHCPProxy.
	DHCP string `json:"dhcp"`
	// SecureBoot turns it on, with Debian's snakeoil key as db key.
	SecureBoot bool `json:"secure_boot"`
	// Forged serves an image that was altered after it was registered.
	Forged bool `json:"forged"`
	// PowerCycle cuts the machines' power while they wait, approves them while
	// they are off, and resets them once more when they have certificates.
	PowerCycle bool `json:"power_cycle"`
	// SMBIOS is SMBIOSHostile for machines whose firmware says hostile things;
	// "" for honest ones.
	SMBIOS string `json:"smbios"`
	// VLAN is what the image is told, SwitchVLAN what the machines' switch
	// ports carry, tagged; 0 is VLAN, and frames without tags if that is 0.
	VLAN       int `json:"vlan,omitempty"`
	SwitchVLAN int `json:"switch_vlan,omitempty"`
	// Centre is what befalls the centre: "" nothing, CentreImpostor,
	// CentreOutage.
	Centre string `json:"centre"`
	// K3s is the k3s that nodes of the host lab run: a path; "" finds one.
	K3s string `json:"k3s,omitempty"`
	// StandIn: K3s is the stand-in. K3sVersion is what it calls itself.
	StandIn    bool   `json:"stand_in,omitempty"`
	K3sVersion string `json:"k3s_version,omitempty"`
	// Seed decides everything that is left to chance in the host lab.
	Seed uint64 `json:"seed,omitempty"`
	// Step, Who and Never say where the scenario powercut strikes: at which
	// step, whom (Who*; "" is founder), and whether they come back.
	Step  string `json:"step,omitempty"`
	Who   string `json:"who,omitempty"`
	Never bool   `json:"never,omitempty"`
	// Together: in the scenario ha all nodes get power at once, as those of
	// by-hand do; else one after the other.
	Together bool `json:"together,omitempty"`
	// Width is that of the terminal that people watch at: a table of the nodes
	// stands below the time line. 0: nobody does.
	Width int `json:"width,omitempty"`
	// Timeout is for the whole run; 15 minutes if 0.
	Timeout time.Duration `json:"timeout"`
	// Keep leaves the machines running after the scenario until interrupted.
	Keep bool `json:"keep"`
	// Dir is the run's directory, absolute and short.
	Dir string `json:"dir"`

	// Accel is "" (find out), machine.AccelKVM or machine.AccelTCG.
	Accel string `json:"accel"`
	// MemoryMB, NIC and DiskBus describe the machines; see machine.Config.
	MemoryMB int    `json:"memory_mb"`
	NIC      string `json:"nic"`
	DiskBus  string `json:"disk_bus"`
	// Clock is the machines' real-time clock at power-on; zero: the host's.
	Clock time.Time `json:"clock"`

	// host and disk are those of the scenario.
	host, disk bool

	// Image is a ready recovery image (a UKI); "" builds one.
	Image string `json:"image"`
	// Program is the muster binary whose commands the scenario runs.
	Program string `json:"program"`
	// NodeProgram is the muster-node binary for images.
	NodeProgram string `json:"node_program"`
	// CrashProgram is the same, built to stop at named lines; "" if there is
	// none.
	CrashProgram string `json:"crash_program,omitempty"`
}

// diskMemoryMB is the memory of a machine whose system runs k3s.
const diskMemoryMB = 2048

var scenarioForm = regexp.MustCompile(`^[a-z0-9-]{1,24}$`)

// MaxDir is the longest run directory: machines have theirs below it.
const MaxDir = machine.MaxDir - len("/node99")

// Defaults fills in what was left out.
func (s Spec) Defaults() Spec {
	if s.Nodes == 0 {
		s.Nodes = 1
	}
	if s.DHCP == "" {
		s.DHCP = DHCPFull
	}
	if s.Timeout == 0 {
		s.Timeout = 15 * time.Minute
	}
	if s.NIC == "" {
		s.NIC = machine.NICVirtio
	}
	if s.MemoryMB == 0 && s.disk {
		s.MemoryMB = diskMemoryMB
	}
	if s.SwitchVLAN == 0 {
		s.SwitchVLAN = s.VLAN
	}
	return s
}

// Validate returns everything that is wrong, joined.
func (s Spec) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("lab: configure: "+format, a...)) }
	if !scenarioForm.MatchString(s.Scenario) {
		bad("scenario %q: no such name", s.Scenario)
	}
	if s.Nodes < 1 || s.Nodes > 32 {
		bad("%d nodes: want 1 to 32", s.Nodes)
	}
	if s.DHCP != DHCPFull && s.DHCP != DHCPProxy {
		bad("DHCP %q: want %s or %s", s.DHCP, DHCPFull, DHCPProxy)
	}
	if s.SMBIOS != "" && s.SMBIOS != SMBIOSHostile {
		bad("SMBIOS %q: want %s", s.SMBIOS, SMBIOSHostile)
	}
	if s.Centre != "" && s.Centre != CentreImpostor && s.Centre != CentreOutage {
		bad("centre %q: want %s or %s", s.Centre, CentreImpostor, CentreOutage)
	}
	if (s.PowerCycle || s.Centre != "") && (s.Scenario != "enroll" || s.Forged) {
		bad("--power-cycle and --centre go with the scenario enroll and an honest image")
	}
	if s.Boot == machine.BootHTTPS && (s.Scenario != "enroll" || s.Forged || s.Centre == CentreImpostor) {
		bad("--boot https goes with the scenario enroll and an honest image")
	}
	if (s.VLAN != 0 || s.SwitchVLAN != 0) && (s.Scenario != "enroll" || s.Boot != machine.BootDisk || s.VLAN < 1 || s.VLAN > 4094 || s.SwitchVLAN < 0 || s.SwitchVLAN > 4094) {
		bad("--vlan is 1 to 4094 and goes with the scenario enroll and --boot disk: firmware boots from untagged networks; --switch-vlan goes with it")
	}
	if s.VLAN != s.SwitchVLAN && s.SwitchVLAN != 0 && (s.Forged || s.PowerCycle || s.Centre != "") {
		bad("with a --switch-vlan that is not --vlan nothing reaches the centre: --forged, --power-cycle and --centre do not go with it")
	}
	if s.Who != "" && s.Who != WhoFounder && s.Who != WhoCandidate && s.Who != WhoBoth {
		bad("--who %q: want %s, %s or %s", s.Who, WhoFounder, WhoCandidate, WhoBoth)
	}
	if (s.Who != "" || s.Step != "" || s.Never) && s.Scenario != "powercut" {
		bad("--step, --who and --never go with the scenario powercut")
	}
	if s.Together && s.Scenario != "ha" {
		bad("--together goes with the scenario ha")
	}
	if s.Timeout < 0 {
		bad("timeout of %v", s.Timeout)
	}
	if s.NIC == machine.NICE1000E && s.Boot != machine.BootDisk {
		bad("network card %s: the firmware has no driver for it and cannot boot from it; use --boot disk", s.NIC)
	}
	if !filepath.IsAbs(s.Dir) || len(s.Dir) > MaxDir {
		bad("directory %q: want an absolute path of at most %d characters (sockets lie below it)", s.Dir, MaxDir)
	}
	return errors.Join(errs...)
}

// Scenario is something the lab can run.
type Scenario struct {
	Name    string
	Summary string
	// Host: nodes are namespaces (lab/host) instead of virtual machines, and
	// form a cluster. Nodes is how many there are if nobody asks for another
	// number; 1 if 0. Timeout likewise; 15 minutes if 0.
	Host    bool
	Nodes   int
	Timeout time.Duration
	// Disk: machines get a system on their disk: a slot image is built, with a
	// k3s inside, and their memory is that of such a system.
	Disk bool
	// Prepare runs on the host, before the namespaces exist and with the
	// host's network: building an image may need the internet. It may write
	// to the run's directory only. Nil if there is nothing to do.
	Prepare func(context.Context, *Lab) error
	// Run runs inside. It returns nil when everything it checks held.
	Run func(context.Context, *Lab) error
}

// Unable says why a scenario cannot run on this host (exit code 3).
type Unable struct {
	Reason string
	// Packages to install, in Debian's names.
	Packages []string
}

func (u *Unable) Error() string {
	if len(u.Packages) == 0 {
		return "lab: cannot run here: " + u.Reason
	}
	s := "lab: cannot run here: " + u.Reason + "; install:"
	for _, p := range u.Packages {
		s += " " + p
	}
	return s
}
