package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

// describeCommand is `muster describe [request|node|site|stack] ID`.
func describeCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use:   "describe [request|node|site|stack] ID",
		Short: "Show all there is to know of a request, a node, a site or a stack: verdict, evidence, cluster, what changed",
		Long: `ID is the whole ID, an unambiguous beginning of it, or the words that the
machine shows on its screen.`,
		Example: `  muster describe request r-abc
  muster describe "amber canoe"
  muster describe site shop-7`,
		Args: usageArgs(cobra.MinimumNArgs(1), "describe what? Give the ID or the words that the machine shows"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, id := kindOf(args)
		c, err := a.connect()
		if err != nil {
			return err
		}
		if kind == "stack" {
			return c.explain(describeStack(cmd, c, f, id))
		}
		if kind == "site" {
			return c.explain(describeSite(cmd, c, f, id))
		}
		if kind != "node" {
			err := describeRequest(cmd, c, f, id)
			if err == nil || kind == "request" || connect.CodeOf(err) != connect.CodeNotFound {
				return c.explain(err)
			}
		}
		err = describeNode(cmd, c, f, id)
		if kind == "" && connect.CodeOf(err) == connect.CodeNotFound {
			return fmt.Errorf("there is no request and no node %q; `muster get requests` and `muster get nodes` list them", text.ForTerminal(id))
		}
		return c.explain(err)
	}
	return cmd
}

// kindOf takes "request ID", "request/ID", "ID" and words apart.
func kindOf(args []string) (kind, id string) {
	if len(args) > 1 {
		switch args[0] {
		case "request", "requests":
			return "request", strings.Join(args[1:], " ")
		case "node", "nodes":
			return "node", strings.Join(args[1:], " ")
		case "site", "sites":
			return "site", strings.Join(args[1:], " ")
		case "stack", "stacks":
			return "stack", strings.Join(args[1:], " ")
		}
	}
	id = strings.Join(args, " ")
	for _, k := range []string{"request", "node", "site", "stack"} {
		if rest, found := strings.CutPrefix(id, k+"/"); found {
			return k, rest
		}
	}
	switch {
	case strings.HasPrefix(id, "n-"):
		return "node", id
	case strings.HasPrefix(id, "r-"):
		return "request", id
	}
	return "", id
}

// label cleans a name, which may hold what a machine calls its parts; the
// indentation of our own stays.
func label(name string) string {
	indent := name[:len(name)-len(strings.TrimLeft(name, " "))]
	return indent + cell(strings.TrimLeft(name, " "))
}

// sheet prints "Name:  value" lines; both are cleaned.
type sheet struct{ w io.Writer }

func (s sheet) line(name, value string) {
	if value != "" {
		fmt.Fprintf(s.w, "%-15s %s\n", label(name)+":", cell(value))
	}
}

func (s sheet) list(name string, values []string) {
	if len(values) == 0 {
		return
	}
	fmt.Fprintf(s.w, "%s:\n", name)
	for _, v := range values {
		fmt.Fprintf(s.w, "  - %s\n", cell(v))
	}
}

func labels(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ", ")
}

func describeRequest(cmd *cobra.Command, c *centre, f format, id string) error {
	out, err := c.GetRequest(cmd.Context(), &musterv1.GetRequestRequest{Id: id})
	if err != nil {
		return err
	}
	rs, err := requestsFrom([]*musterv1.Request{out.Request})
	if err != nil {
		return err
	}
	r := rs[0]
	switch f {
	case "table", "wide":
	default:
		return f.write(cmd.OutOrStdout(), struct {
			fleet.Request
			Diff       []string `json:"diff,omitempty"`
			LookAlikes []string `json:"look_alikes,omitempty"`
			Refusal    string   `json:"refusal,omitempty"`
			Lab        bool     `json:"lab,omitempty"`
		}{r, out.Diff, out.LookAlikes, out.Refusal, out.Lab}, table{names: []string{"request/" + string(r.ID)}})
	}
	writeRequest(cmd.OutOrStdout(), time.Now(), r, out)
	return nil
}

func decision(r fleet.Request) string {
	if r.DecidedBy == "" {
		return r.Reason
	}
	d := "by " + r.DecidedBy + " at " + stamp(r.DecidedAt)
	if r.Reason != "" {
		d += ": " + r.Reason
	}
	return d
}

func hardware(w io.Writer, h fleet.Hardware) {
	s := sheet{w}
	s.line("  Machine", strings.TrimSpace(h.Vendor+" "+h.Product))
	s.line("  Serial", h.Serial)
	s.line("  UUID", h.UUID)
	s.line("  Board", strings.TrimSpace(h.BoardVendor+" "+h.Board+" "+h.BoardSerial))
	s.line("  Firmware", strings.TrimSpace(h.BIOSVendor+" "+h.BIOSVersion+" "+h.BIOSDate))
	s.line("  CPU", fmt.Sprintf("%s, %d threads", h.CPU, h.CPUs))
	s.line("  Memory", fmt.Sprintf("%.1f GB", float64(h.MemoryBytes)/1e9))
	s.line("  TPM", strings.TrimSpace(h.TPMVendor+" "+h.TPMModel+" "+h.TPMFirmware))
	s.line("  Boot path", h.BootPath)
	for _, n := range h.NICs {
		link := "no link"
		if n.Link {
			if link = "link"; n.SpeedMbit > 0 { // virtual cards tell no speed
				link = fmt.Sprintf("%d Mbit/s", n.SpeedMbit)
			}
		}
		s.line("  NIC "+n.Name, fmt.Sprintf("%s %s %s %s", n.MAC, n.Driver, link, strings.Join(n.Addresses, " ")))
	}
	for _, d := range h.Disks {
		s.line("  Disk "+d.Path, fmt.Sprintf("%s %s %.1f GB", d.Model, d.Serial, float64(d.SizeBytes)/1e9))
	}
	for _, d := range h.Devices {
		s.line("  Device", fmt.Sprintf("%s %s:%s %s", d.Bus, d.Vendor, d.Device, d.Class))
	}
}

// describedNode is a node as -o json describes it.
type describedNode struct {
	fleet.Node
	Requests []fleet.Request `json:"requests"`
	// Desired is the image that the node shall run, System what it last said
	// of its system, Orders those that stand.
	Desired string              `json:"desired,omitempty"`
	System  *fleet.SystemReport `json:"system,omitempty"`
	Orders  []issuedOrder       `json:"orders"`
	Lab     bool                `json:"lab,omitempty"`
	Denied  bool                `json:"denied,omitempty"`
}

func describeNode(cmd *cobra.Command, c *centre, f format, id string) error {
	out, err := c.GetNode(cmd.Context(), &musterv1.GetNodeRequest{Id: id})
	if err != nil {
		return err
	}
	n, err := api.NodeFromProto(out.Node)
	if err != nil {
		return errors.Join(errors.New("the centre's answer is not understood"), err)
	}
	requests, err := requestsFrom(out.Requests)
	if err != nil {
		return err
	}
	switch f {
	case "table", "wide":
	default:
		d := describedNode{Node: n, Requests: requests, Lab: out.Lab, Denied: out.Denied, Orders: []issuedOrder{}}
		if w := out.GetDesired(); w != nil {
			d.Desired = w.GetName() + "@" + w.GetVersion()
		}
		if out.GetSystem() != nil {
			r, err := api.SystemReportFromProto(out.GetSystem())
			if err != nil {
				return errors.Join(errors.New("the centre's answer is not understood"), err)
			}
			d.System = &r
		}
		for _, o := range out.GetOrders() {
			d.Orders = append(d.Orders, issuedOrderOf(o))
		}
		return f.write(cmd.OutOrStdout(), d, table{names: []string{"node/" + string(n.ID)}})
	}
	w := cmd.OutOrStdout()
	if out.Lab {
		fmt.Fprintln(w, labBanner)
	}
	now := time.Now()
	s := sheet{w}
	s.line("Node", string(n.ID))
	s.line("Words", n.Words)
	s.line("State", n.State.String())
	s.line("Reason", n.Reason)
	s.line("EK", n.EK.String())
	s.line("Identity", n.Identity.String())
	s.line("Boot", n.Boot.String())
	s.line("Image", n.Image)
	s.line("Site", placeLine(n))
	clusterLines(s, now, out)
	systemLines(s, now, out)
	s.line("Took the place of", string(n.Replaces))
	s.line("Replaced by", string(n.ReplacedBy))
	s.line("Labels", labels(n.Labels))
	s.line("Certificate", fmt.Sprintf("%s, %s", n.Certificate.Serial, certificateText(n.Certificate, now)))
	s.line("LDevID key", n.LDevIDKey.String())
	s.line("Last seen", stamp(n.LastSeen))
	s.line("Source", n.Source)
	s.line("Revision", fmt.Sprint(n.Revision))
	fmt.Fprintln(w, "The machine says of itself (nothing of this is proved):")
	hardware(w, n.Hardware)
	fmt.Fprintln(w, "Requests:")
	for _, r := range requests {
		fmt.Fprintf(w, "  %s %s %s\n", r.ID, r.State, cell(decision(r)))
	}
	return nil
}
