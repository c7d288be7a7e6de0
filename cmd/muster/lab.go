package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/host"
	"github.com/muster-edge/muster/lab/machine"
	"github.com/muster-edge/muster/lab/scenario"
)

// labCommand is `muster lab`: virtual machines from power-on, on a network of
// their own.
func labCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Try network boot, enrollment and whole sites, without touching this host's network",
		Long: `Runs virtual PCs (QEMU, UEFI firmware, software TPM), or whole sites of nodes
that are namespaces with a disk, a TPM and a cable each, on a network of their
own. The host's network is never touched, and when the lab ends, however it
ends, nothing of it is left but its logs.`,
	}
	cmd.AddCommand(labRunCommand(), labUpCommand(), labListCommand(), labLogsCommand(), labExecCommand(), labConsoleCommand(), labPowerCommand(), labDownCommand(), labPruneCommand(), labInsideCommand(), labNodeCommand(), labFleetCommand())
	return cmd
}

// labFlags are the flags that `run` and `up` share.
func labFlags(cmd *cobra.Command, s *lab.Spec) {
	f := cmd.Flags()
	f.IntVar(&s.Nodes, "nodes", 0, "number of machines or nodes (default: what the scenario needs)")
	f.TextVar(&s.Boot, "boot", machine.BootTFTP, "`how` the firmware gets the image: tftp, http, https or disk")
	f.StringVar(&s.DHCP, "dhcp", lab.DHCPFull, "full (we lease addresses) or proxy (beside another DHCP server)")
	f.BoolVar(&s.SecureBoot, "secure-boot", false, "Secure Boot on, with the image signed by Debian's test key")
	f.StringVar(&s.Dir, "dir", "", "directory for logs and captures; new (default: below ~/.local/state/muster/lab)")
	f.StringVar(&s.Accel, "accel", "", "kvm or tcg (emulation); default: kvm if a probe boot works")
	f.IntVar(&s.MemoryMB, "memory", 0, "memory of a machine in MB (default: 1024, or 2048 where it runs k3s)")
	f.StringVar(&s.NIC, "nic", machine.NICVirtio, "network card: virtio-net-pci or e1000e (with --boot disk)")
	f.StringVar(&s.DiskBus, "disk", machine.BusVirtio, "bus of the disk that --boot disk starts from: virtio or nvme")
	f.Var((*labClock)(&s.Clock), "rtc", "the machines' clock at power-on, e.g. 1970-01-01, 2036-02-03T04:05:06Z or +10y (default: now)")
	f.StringVar(&s.SMBIOS, "smbios", "", "hostile: the machines' firmware tells names with escapes, markup and the like")
	f.StringVar(&s.Image, "image", "", "a ready recovery image (a UKI) instead of building one; scenario boot only")
	f.StringVar(&s.NodeProgram, "node-binary", "", "muster-node for the image (default: beside this program)")
}

// labClock reads --rtc.
type labClock time.Time

func (c *labClock) String() string {
	if time.Time(*c).IsZero() {
		return ""
	}
	return time.Time(*c).Format(time.RFC3339)
}
func (c *labClock) Type() string { return "time" }
func (c *labClock) Set(s string) error {
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			*c = labClock(t)
			return nil
		}
	}
	var years int
	if n, err := fmt.Sscanf(s, "%dy", &years); err == nil && n == 1 && s == fmt.Sprintf("%+dy", years) && years > -100 && years < 100 {
		*c = labClock(time.Now().UTC().AddDate(years, 0, 0))
		return nil
	}
	return fmt.Errorf("want a date such as 1970-01-01 or 2036-02-03T04:05:06Z, or years such as +10y, not %q", s)
}

func labRunCommand() *cobra.Command {
	var spec lab.Spec
	var output string
	cmd := &cobra.Command{
		Use:   "run SCENARIO",
		Short: "Run a scenario to its end and say whether everything held",
		Long: "Runs a scenario and tells on standard error what happens. Exit code: 0 everything\n" +
			"held, 1 something did not, 2 wrong usage, 3 cannot run on this host.\n\nScenarios:\n" + scenarioList(),
		Example: `  muster lab run enroll
  muster lab run enroll --nodes 3 --dhcp proxy
  muster lab run enroll --secure-boot -o json | tail -n 1
  muster lab run ha --nodes 5 --k3s /usr/local/bin/k3s
  muster lab run powercut --who candidate --step switch --never`,
		Args: labOneScenario,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkLabOutput(output); err != nil {
				return err
			}
			spec.Scenario = args[0]
			sc, err := labPrepare(&spec)
			if err != nil {
				return err
			}
			result, err := lab.Launch(cmd.Context(), spec, sc, cmd.ErrOrStderr())
			return labReport(cmd.OutOrStdout(), output, result, err)
		},
	}
	labFlags(cmd, &spec)
	f := cmd.Flags()
	f.IntVar(&spec.VLAN, "vlan", 0, "the site's network is this tagged VLAN, and the image is told so (with --boot disk)")
	f.IntVar(&spec.SwitchVLAN, "switch-vlan", 0, "the switch carries this VLAN instead (default: that of --vlan): the machines must say what they wait for")
	f.BoolVar(&spec.Forged, "forged", false, "serve an image that was altered after it was registered: it must get nothing")
	f.BoolVar(&spec.PowerCycle, "power-cycle", false, "cut the power of machines that wait, approve them while they are off, and reset them when they are enrolled")
	f.StringVar(&spec.Centre, "centre", "", "what befalls the centre: impostor (somebody else answers at its address first) or outage (it is killed while machines wait)")
	f.StringVar(&spec.K3s, "k3s", "", "the k3s that nodes run (default: $K3S, k3s on PATH, the stand-in beside this program)")
	f.Uint64Var(&spec.Seed, "seed", 1, "decides what is left to chance: which packets get lost, who starts first")
	f.StringVar(&spec.Step, "step", "", "scenario powercut: strike at this step only (default: at each)")
	f.StringVar(&spec.Who, "who", "", "scenario powercut: founder, candidate or both (default: each)")
	f.BoolVar(&spec.Never, "never", false, "scenario powercut: who was struck never comes back")
	f.BoolVar(&spec.Together, "together", false, "scenario ha: all boxes get power at once, as in by-hand")
	f.DurationVar(&spec.Timeout, "timeout", 0, "time limit of the whole run (default: the scenario's, 15m for machines)")
	f.BoolVar(&spec.Keep, "keep", false, "leave the machines on after the scenario, until Ctrl-C")
	f.StringVarP(&output, "output", "o", "text", "text, or json: one JSON object on the last line of standard output")
	return cmd
}

func scenarioList() string {
	var b strings.Builder
	for _, s := range scenario.All() {
		fmt.Fprintf(&b, "  %-10s %s\n", s.Name, s.Summary)
	}
	return strings.TrimRight(b.String(), "\n")
}

func labOneScenario(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return exitError{2, errors.New("which scenario? There are:\n" + scenarioList())}
	}
	return nil
}

func checkLabOutput(o string) error {
	if o != "text" && o != "json" {
		return exitError{2, fmt.Errorf("-o %q: want text or json", o)}
	}
	return nil
}

// nodeProgram finds muster-node: beside this program, else on PATH, else "".
func nodeProgram() string {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "muster-node")
		if _, err := os.Stat(beside); err == nil {
			return beside
		}
	}
	found, err := exec.LookPath("muster-node")
	if err != nil {
		return ""
	}
	return found
}

// labPrepare fills in what the lab cannot know: our own programs.
func labPrepare(s *lab.Spec) (lab.Scenario, error) {
	sc, ok := scenario.Find(s.Scenario)
	if !ok {
		return sc, exitError{2, fmt.Errorf("no scenario %q; there are:\n%s", s.Scenario, scenarioList())}
	}
	var err error
	if s.Program, err = os.Executable(); err != nil {
		return sc, fmt.Errorf("find own program: %w", err)
	}
	if sc.Host || sc.Disk {
		if err := labK3s(s); err != nil {
			return sc, err
		}
		s.Width = terminalWidth(os.Stdout)
	}
	if s.NodeProgram == "" {
		if s.NodeProgram = nodeProgram(); s.NodeProgram == "" && s.Image == "" {
			return sc, exitError{3, errors.New("muster-node is not beside this program and not on PATH: run `make build`, or give --node-binary")}
		}
	}
	for _, p := range []*string{&s.NodeProgram, &s.Image, &s.K3s} {
		if *p != "" {
			if *p, err = filepath.Abs(*p); err != nil {
				return sc, err
			}
		}
	}
	if crash := filepath.Join(filepath.Dir(s.NodeProgram), "muster-node-crash"); s.NodeProgram != "" {
		if _, err := os.Stat(crash); err == nil {
			s.CrashProgram = crash
		}
	}
	if s.Dir == "" {
		s.Dir, err = lab.DefaultDir(s.Scenario, time.Now())
	} else {
		s.Dir, err = filepath.Abs(s.Dir)
	}
	return sc, err
}

// labReport prints a result and turns it into an exit code.
func labReport(w io.Writer, output string, r lab.Result, err error) error {
	if output == "json" {
		b, jerr := json.Marshal(r)
		if jerr != nil {
			return jerr
		}
		fmt.Fprintln(w, string(b))
	} else if err == nil {
		labPrint(w, r)
	}
	var usage *lab.UsageError
	var unable *lab.Unable
	switch {
	case errors.As(err, &usage):
		return exitError{2, err}
	case errors.As(err, &unable):
		return exitError{3, err}
	case err != nil:
		return exitError{1, err}
	case r.Unable:
		return exitError{3, errors.New(r.Error)}
	case !r.OK && r.Error != "" && len(r.Checks) == 0:
		return exitError{1, fmt.Errorf("scenario %s did not hold: %s", r.Scenario, r.Error)}
	case !r.OK: // the checks that failed were told as they did
		return exitError{1, fmt.Errorf("scenario %s did not hold", r.Scenario)}
	}
	return nil
}

func labPrint(w io.Writer, r lab.Result) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, c := range r.Checks {
		mark := "held"
		if !c.OK {
			mark = "FAILED"
		}
		fmt.Fprintf(t, "%s\t%s\n", mark, c.Name)
	}
	for _, name := range []string{"power_on_to_init_s", "power_on_to_request_s", "approve_to_certificate_s",
		"approve_to_installed_s", "approve_to_first_server_s", "power_on_to_three_voters_s", "power_on_to_slot_s",
		"start_to_first_server_s", "start_to_all_ready_s", "ready_to_three_voters_s", "policy_wait_s", "total_s"} {
		if v, ok := r.Timings[name]; ok {
			fmt.Fprintf(t, "%.1f s\t%s\n", v, strings.ReplaceAll(strings.TrimSuffix(name, "_s"), "_", " "))
		}
	}
	_ = t.Flush()
	if s := r.SiteResult; s != nil {
		fmt.Fprintf(w, "%s, %s, %s; k3s: %s %s\n", count(s.Servers, "server", "servers"), count(s.Voters, "voter", "voters"),
			count(s.Clusters, "cluster", "clusters"), r.K3s, s.K3sVersion)
		for _, remark := range s.Remarks {
			fmt.Fprintf(w, "%s\n", remark)
		}
	}
	fmt.Fprintf(w, "logs and packet captures: %s\n", r.Dir)
	if words := labOutcome(r); words != "" {
		fmt.Fprintf(w, "\n%s\n", words)
	}
}

// labOutcome tells a newcomer what has just happened.
func labOutcome(r lab.Result) string {
	if !r.OK || r.Forged || len(r.Machines) == 0 {
		return ""
	}
	switch r.Scenario {
	case "enroll":
	case "install", "pxe-first", "site":
		return labInstalled(r)
	default:
		return ""
	}
	for _, m := range r.Machines {
		if m.Node == "" {
			return "" // it was meant to get nowhere
		}
	}
	who := "A machine without an operating system was"
	it := "It"
	if n := len(r.Machines); n > 1 {
		who, it = fmt.Sprintf("%d machines without an operating system were", n), "Each"
	}
	from := "the network"
	if r.Boot == "disk" {
		from = "a disk"
	}
	return who + ` switched on. The firmware loaded muster's recovery image from
` + from + `, the TPM proved which machine this is and what it runs, and it waited in the approval
queue with no secret in its hands. After approval it got a certificate for a key that never
leaves its TPM. ` + it + ` is now an enrolled node.
To look around in a lab that stays: bin/muster lab up`
}

// labInstalled tells what became of machines that got a system.
func labInstalled(r lab.Result) string {
	k3s := "a real k3s"
	if r.K3s == "stand-in" {
		k3s = "a stand-in for k3s: a real etcd and a real kube-apiserver without containers"
	}
	if len(r.Machines) == 1 {
		return `An empty machine was switched on. The firmware loaded muster's recovery image from the network, the
TPM proved which machine this is and what it runs, and it waited in the approval queue. One approval
later it had a certificate, and an order named one disk exactly; the other disk was not touched. The
system came from the centre, was verified and written; the machine started from its disk, made an
encrypted data partition that its TPM opens, and founded the site's cluster. Then its power was cut,
and it came back by itself. It ran ` + k3s + `.
Three machines become a site: make lab SITE=1`
	}
	return fmt.Sprintf(`%d empty machines were switched on at once. Each proved itself, was approved, and got its system onto its
disk. They found each other, formed one cluster, and went on when the first server lost its power.
They ran %s.`, len(r.Machines), k3s)
}

func labUpCommand() *cobra.Command {
	spec := lab.Spec{Scenario: "up"}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a lab that stays: a centre, a boot host and machines that wait for approval",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sc, err := labPrepare(&spec)
			if err != nil {
				return err
			}
			r, err := lab.LaunchDetached(cmd.Context(), spec, sc, cmd.ErrOrStderr())
			if err != nil || !r.OK {
				return labReport(io.Discard, "text", r, err)
			}
			run, err := lab.Find(r.Dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), `The lab is up: %s
  the approval queue:   muster lab exec %[1]s get requests
  approve a machine:    muster lab exec %[1]s approve REQUEST --site lab
  or in a browser:      muster lab console %[1]s
  what happens:         muster lab logs -f %[1]s
  a machine's console:  muster lab logs -f %[1]s node1
  end it:               muster lab down %[1]s
`, run.Name)
			return nil
		},
	}
	labFlags(cmd, &spec)
	return cmd
}

// labInsideCommand is how the lab starts itself in its namespaces.
func labInsideCommand() *cobra.Command {
	return &cobra.Command{
		Use: "inside", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return labInside(cmd.Context(), os.Stdin, os.Stderr)
		},
	}
}

func labInside(ctx context.Context, in io.Reader, people io.Writer) error {
	return lab.Inside(ctx, in, people, scenario.Find)
}

// labNodeCommand is how the host lab starts the first process of a node.
func labNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "node", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return host.Inside(os.Stdin) },
	}
}

func labListCommand() *cobra.Command {
	var output string
	var all bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List running labs (--all: past runs, too)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkLabOutput(output); err != nil {
				return err
			}
			runs, err := lab.List()
			if err != nil {
				return err
			}
			shown := []labRun{}
			for _, r := range runs {
				if all || r.Alive() {
					shown = append(shown, labRun{r, r.Size()})
				}
			}
			if output == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(shown)
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "NAME\tSTATE\tNODES\tSTARTED\tRESULT\tSIZE")
			for _, r := range shown {
				result := ""
				if r.OK != nil {
					result = map[bool]string{true: "held", false: "failed"}[*r.OK]
				}
				fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\n", r.Name, r.State, r.Nodes, r.Started.Local().Format("2006-01-02 15:04"), result, labSize(r.Bytes))
			}
			return t.Flush()
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "past runs, too")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// labRun is a run in a list.
type labRun struct {
	lab.Running
	// Bytes is what its directory takes on disk.
	Bytes int64 `json:"bytes"`
}

func labSize(bytes int64) string { return fmt.Sprintf("%.1f MB", float64(bytes)/1e6) }

func labPruneCommand() *cobra.Command {
	var keep int
	cmd := &cobra.Command{
		Use:   "prune [--keep N]",
		Short: "Remove the logs and captures of past runs; running ones stay",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if keep < 0 {
				return exitError{2, fmt.Errorf("--keep %d: want 0 or more", keep)}
			}
			sizes := map[string]int64{}
			runs, err := lab.List()
			if err != nil {
				return err
			}
			for _, r := range runs {
				if _, err := os.Readlink(r.Dir); err == nil {
					sizes[r.Name] = -1
					continue
				}
				sizes[r.Name] = r.Size()
			}
			removed, err := lab.Prune(keep)
			var total int64
			for _, r := range removed {
				if sizes[r.Name] < 0 {
					fmt.Fprintf(cmd.OutOrStdout(), "%s is not listed any more; its files stay where --dir put them\n", r.Name)
					continue
				}
				total += sizes[r.Name]
				fmt.Fprintf(cmd.OutOrStdout(), "removed %s (%s)\n", r.Name, labSize(sizes[r.Name]))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s, %s freed\n", count(len(removed), "run", "runs"), labSize(total))
			return err
		},
	}
	cmd.Flags().IntVar(&keep, "keep", 0, "leave so many of the newest past runs")
	return cmd
}

// labChoose returns the run that is meant: the named one, or the only one
// that runs.
func labChoose(name string) (lab.Running, error) {
	if name != "" {
		r, err := lab.Find(name)
		if errors.Is(err, fs.ErrNotExist) {
			return r, fmt.Errorf("there is no lab %q: `muster lab list --all` shows all", name)
		}
		return r, err
	}
	runs, err := lab.List()
	if err != nil {
		return lab.Running{}, err
	}
	var alive []lab.Running
	for _, r := range runs {
		if r.Alive() {
			alive = append(alive, r)
		}
	}
	switch len(alive) {
	case 0:
		return lab.Running{}, errors.New("no lab is running (muster lab up starts one)")
	case 1:
		return alive[0], nil
	}
	return lab.Running{}, exitError{2, errors.New("several labs are running: name one (muster lab list)")}
}

// labArgs splits [NAME] [REST]: a first argument that is no run's name
// belongs to the rest.
func labArgs(args []string) (lab.Running, []string, error) {
	if len(args) > 0 {
		if r, err := lab.Find(args[0]); err == nil {
			return r, args[1:], nil
		}
	}
	r, err := labChoose("")
	return r, args, err
}

func labLogsCommand() *cobra.Command {
	var followLog bool
	cmd := &cobra.Command{
		Use:   "logs [NAME] [events|centre|nodeN]",
		Short: "Show a lab's time line, the centre's log or a machine's console",
		Args:  cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, rest, err := labArgs(args)
			if err != nil {
				return err
			}
			what := "events"
			if len(rest) > 0 {
				what = rest[0]
			}
			if filepath.Base(what) != what || strings.HasPrefix(what, ".") {
				return exitError{2, fmt.Errorf("no log %q", what)}
			}
			path := filepath.Join(r.Dir, what+".log")
			switch {
			case what == "events":
				path = filepath.Join(r.Dir, "events.jsonl")
			case strings.HasPrefix(what, "node"):
				path = filepath.Join(r.Dir, what, "serial.log")
			}
			end := make(chan struct{})
			if followLog {
				stop := context.AfterFunc(cmd.Context(), func() { close(end) })
				defer stop()
			} else {
				close(end)
			}
			err = lab.Follow(end, path, labWriter(cmd.OutOrStdout(), what))
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s is neither a lab nor a log of %s: want events, centre or nodeN; `muster lab list --all` shows all labs", what, r.Name)
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&followLog, "follow", "f", false, "go on showing what is added")
	return cmd
}

// labWriter makes what machines print harmless for this terminal.
func labWriter(w io.Writer, what string) io.Writer {
	if what == "events" {
		return w // JSON escapes control characters
	}
	return machine.NewTextWriter(w)
}

func labPowerCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "power [NAME] MACHINE on|off|reset",
		Short: "Press a machine's power or reset button",
		Args:  cobra.RangeArgs(2, 3),
		RunE: func(_ *cobra.Command, args []string) error {
			r, rest, err := labArgs(args)
			if err != nil {
				return err
			}
			if len(rest) != 2 {
				return exitError{2, errors.New("want MACHINE and on, off or reset")}
			}
			op := map[string]string{"on": "power-on", "off": "power-off", "reset": "reset"}[rest[1]]
			if op == "" {
				return exitError{2, fmt.Errorf("%q: want on, off or reset", rest[1])}
			}
			_, err = lab.Ask(r.Dir, lab.Request{Op: op, Machine: rest[0]})
			return err
		},
	}
}

func labDownCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "down [NAME]",
		Short: "End a lab; its logs stay",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var runs []lab.Running
			if all {
				list, err := lab.List()
				if err != nil {
					return err
				}
				for _, r := range list {
					if r.Alive() {
						runs = append(runs, r)
					}
				}
			} else {
				r, err := labChoose(strings.Join(args, ""))
				if err != nil {
					return err
				}
				runs = append(runs, r)
			}
			var errs []error
			for _, r := range runs {
				if err := lab.Down(r, 30*time.Second); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s has ended; its logs are in %s\n", r.Name, r.Dir)
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every running lab")
	return cmd
}

// labExecCommand runs one of our own commands where the lab's centre is.
func labExecCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "exec NAME COMMAND...",
		Short:              "Run a muster command against the centre inside a lab",
		Example:            "  muster lab exec up-20260102-030405.000 get requests",
		DisableFlagParsing: true, // the flags are the other command's
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || args[0] == "-h" || args[0] == "--help" {
				return cmd.Help()
			}
			r, rest, err := labArgs(args)
			if err != nil {
				return err
			}
			if !r.Alive() {
				return fmt.Errorf("%s is not running", r.Name)
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			argv := []string{"--target", fmt.Sprint(r.PID), "--net", "--mount", "--pid", "--", self}
			argv = append(append(argv, rest...), "--data", filepath.Join(r.Dir, scenario.CentreDir))
			c := exec.CommandContext(cmd.Context(), "nsenter", argv...)
			c.Stdin, c.Stdout, c.Stderr = os.Stdin, cmd.OutOrStdout(), cmd.ErrOrStderr()
			err = c.Run()
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				return exitError{exit.ExitCode(), errors.New("the command failed inside the lab")}
			}
			return err
		},
	}
}
