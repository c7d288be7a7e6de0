package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/member"
	"github.com/muster-edge/muster/agent/member/local"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// agentOptions are the flags of `muster-node agent`.
type agentOptions struct {
	siteFile, tpm, eventLog, k3s string
	paths                        launch.Paths
	listen, link, control        string
	log                          string
	noFirewall, check            bool
	peers                        []netip.AddrPort
	// healthDeadline is when a system on trial is given up.
	healthDeadline time.Duration
}

func agentFlags(args []string, errors io.Writer) (agentOptions, error) {
	var o agentOptions
	f := flag.NewFlagSet("muster-node agent", flag.ContinueOnError)
	f.SetOutput(errors)
	f.StringVar(&o.siteFile, "site-file", "/etc/muster/site.json", "whom to trust and where to call (site.json of the image)")
	f.StringVar(&o.paths.State, "state", "/var/lib/muster", "persistent directory")
	f.StringVar(&o.paths.Run, "run", "/run/muster", "volatile directory, with the socket that status asks")
	f.StringVar(&o.tpm, "tpm", tpmPath, "TPM: a device, or unix:SOCKET of a software TPM")
	f.StringVar(&o.eventLog, "event-log", "", "the firmware's event log (default: the kernel's)")
	f.StringVar(&o.k3s, "k3s", "/usr/local/bin/k3s", "the k3s program")
	f.StringVar(&o.paths.Data, "k3s-data", "/var/lib/rancher/k3s", "data-dir of k3s")
	f.StringVar(&o.paths.Config, "k3s-config", "/etc/rancher/k3s", "directory of k3s' config.yaml")
	f.StringVar(&o.listen, "listen", ":7445", "where peers of the site call")
	f.StringVar(&o.link, "link", "", "the LAN interface (default: by routes)")
	f.StringVar(&o.control, "control", "systemd", "what runs k3s: systemd (unit muster-k3s.service) or direct")
	f.StringVar(&o.log, "log", "auto", "log form: text, json, or auto (json when stderr is neither a terminal nor the journal)")
	f.BoolVar(&o.noFirewall, "no-firewall", false, "leave the host's firewall alone: whoever is on the LAN reaches k3s' ports")
	f.DurationVar(&o.healthDeadline, "health-deadline", firmware.HealthDeadline, "when a new system that is not healthy is given up, counted from its start")
	f.BoolVar(&o.check, "check", false, "print what the agent finds and end; nothing is changed")
	f.Func("peer", "ADDRESS:PORT of a peer, where multicast is filtered; may be given again", func(s string) error {
		a, err := netip.ParseAddrPort(s)
		o.peers = append(o.peers, a)
		return err
	})
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("muster-node agent: unexpected argument %q", f.Arg(0))
	}
	if o.control != "systemd" && o.control != "direct" {
		return o, fmt.Errorf("muster-node agent: --control is %q, want systemd or direct", o.control)
	}
	if o.healthDeadline < time.Minute || o.healthDeadline > 24*time.Hour {
		return o, fmt.Errorf("muster-node agent: --health-deadline is %s, want 1m to 24h", o.healthDeadline)
	}
	if len(o.peers) > 64 {
		return o, fmt.Errorf("muster-node agent: %d peers, at most 64", len(o.peers))
	}
	return o, o.paths.Validate()
}

// runAgent is `muster-node agent`.
func runAgent(args []string) int {
	o, err := agentFlags(args, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	log, err := logger(o.log)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if o.check {
		return check(ctx, o)
	}
	a := &nodeAgent{o: o, log: log, boot: bootText()}
	if err := a.run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: agent: %v\n", err)
		return 1
	}
	return 0
}

// logger makes the log. In the journal lines have a time of their own.
func logger(form string) (*slog.Logger, error) {
	if form == "auto" {
		form = "json"
		if fi, err := os.Stderr.Stat(); os.Getenv("JOURNAL_STREAM") != "" || err == nil && fi.Mode()&os.ModeCharDevice != 0 {
			form = "text"
		}
	}
	switch form {
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, nil)), nil
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, nil)), nil
	}
	return nil, fmt.Errorf("muster-node: --log is %q, want text, json or auto", form)
}

// readSite reads site.json.
func (o agentOptions) readSite() (fleet.SiteConfig, error) {
	b, err := os.ReadFile(o.siteFile)
	if err != nil {
		return fleet.SiteConfig{}, fmt.Errorf("read site.json: %w", err)
	}
	site, err := agent.ParseSiteConfig(b)
	if err == nil && site.Scan != nil {
		return fleet.SiteConfig{}, errors.New("site.json is for an image that scans: an installed system needs a centre")
	}
	return site, err
}

// readEventLog reads the firmware's event log.
func (o agentOptions) readEventLog() ([]byte, error) {
	if o.eventLog == "" {
		return facts.EventLog(os.DirFS("/"))
	}
	f, err := os.Open(o.eventLog)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, facts.MaxEventLog))
}

// socket is where status asks.
func (o agentOptions) socket() string { return filepath.Join(o.paths.Run, local.SocketName) }

// status is `muster-node status`.
func status(args []string) int {
	f := flag.NewFlagSet("muster-node status", flag.ContinueOnError)
	run := f.String("run", "/run/muster", "the agent's volatile directory")
	form := f.String("o", "text", "form of the output: text or json")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if f.NArg() > 0 || *form != "text" && *form != "json" {
		f.Usage()
		return 2
	}
	b, err := local.Ask(context.Background(), filepath.Join(*run, local.SocketName))
	if err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: %v\nThe node agent does not run here, or you are not root.\n", err)
		return 1
	}
	if *form == "json" {
		_, err = os.Stdout.Write(b)
	} else {
		var r member.Report
		if r, err = member.ParseReport(b); err == nil {
			_, err = io.WriteString(os.Stdout, r.Text())
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: status: %v\n", err)
		return 1
	}
	return 0
}

// floorClock is the wall clock of the agent: never before the floor, and
// corrected by what the centre, authenticated, told.
type floorClock struct {
	floor time.Time
	off   func() time.Duration
}

func (c floorClock) now() time.Time {
	t := time.Now()
	if off := c.off(); off != 0 {
		t = t.Add(off)
	}
	if t.Before(c.floor) {
		return c.floor
	}
	return t
}
