package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// siteNode is a node of a site as `muster describe site -o json` shows it.
type siteNode struct {
	fleet.Node
	Address string `json:"address,omitempty"`
	// Stale: the node was not heard of for a while; Report is what it said
	// last.
	Stale  bool              `json:"stale"`
	Report *fleet.NodeReport `json:"report,omitempty"`
}

// describedSite is `muster describe site -o json`.
type describedSite struct {
	fleet.Site
	Charter      *musterv1.Charter `json:"-"`
	CharterText  string            `json:"charter_version,omitempty"`
	WhyNoCharter string            `json:"why_no_charter,omitempty"`
	Unsure       bool              `json:"unsure"`
	Nodes        []siteNode        `json:"nodes"`
	Orders       []issuedOrder     `json:"orders"`
	Drift        siteDrift         `json:"drift"`
	Lab          bool              `json:"lab,omitempty"`
}

func describeSite(cmd *cobra.Command, c *centre, f format, name string) error {
	out, err := c.GetSite(cmd.Context(), &musterv1.GetSiteRequest{Name: name})
	if err != nil {
		return err
	}
	site, err := api.SiteFromProto(out.Site)
	if err != nil {
		return err
	}
	d := describedSite{Site: site, Charter: out.Charter, WhyNoCharter: out.WhyNoCharter, Unsure: out.Unsure, Nodes: []siteNode{}, Orders: []issuedOrder{}, Lab: out.Lab}
	if v := out.Charter.GetVersion(); v != nil {
		d.CharterText = api.DocVersion(v).String()
	}
	now, stale := out.Now.AsTime(), time.Duration(out.StaleAfterSeconds)*time.Second
	for i, m := range out.Nodes {
		n, err := api.NodeFromProto(m)
		if err != nil {
			return err
		}
		x := siteNode{Node: n, Stale: now.Sub(n.LastSeen) > stale}
		if i < len(out.Addresses) {
			x.Address = out.Addresses[i]
		}
		if i < len(out.Reports) && out.Reports[i].GetNode() != "" {
			r, err := api.NodeReportFromProto(out.Reports[i])
			if err != nil {
				return err
			}
			x.Report = &r
		}
		d.Nodes = append(d.Nodes, x)
	}
	d.Drift = siteDriftOf(out.Drift)
	for _, m := range out.Orders {
		d.Orders = append(d.Orders, issuedOrderOf(m))
	}
	switch f {
	case "table", "wide":
	default:
		return f.write(cmd.OutOrStdout(), d, table{names: []string{"site/" + site.Name}})
	}
	writeSite(cmd.OutOrStdout(), now, d)
	return nil
}

func writeSite(w io.Writer, now time.Time, d describedSite) {
	if d.Lab {
		fmt.Fprintln(w, labBanner)
	}
	s, set := sheet{w}, d.Spec.Chosen()
	s.line("Site", d.Name)
	s.line("Title", d.Title)
	s.line("Location", d.Location)
	s.line("Cluster", clusterLine(d.Site))
	if d.Status.Second != "" {
		s.line("ALARM", fmt.Sprintf("a second cluster, %s, was shown by %s", d.Status.Second, fleet.Words(d.Status.SecondBy)))
	}
	if d.Unsure {
		why := d.Ledger.Doubt
		if why == "" {
			why = "the centre was restored from a backup"
		}
		s.line("Unsure", why+"; no founding is granted until a node shows its cluster, or: muster site confirm "+d.Name)
	}
	s.line("Labels", labels(d.Labels))
	if d.Drift.Desired != "" {
		s.line("Shall run", d.Drift.Desired)
		s.line("Systems", fmt.Sprintf("%s, %d of %d nodes current", d.Drift.State, d.Drift.Current, d.Drift.Nodes))
		for _, n := range d.Drift.Outliers {
			s.line("  "+n.Words, n.Why)
		}
	}
	s.line("Waits for", d.Status.Blocker)
	s.line("Reported", ago(now, d.Status.Seen)+" ago")
	if d.Status.Seen.IsZero() {
		s.line("Reported", "never")
	}
	s.line("Founding", foundingLine(d.Site))
	s.line("Servers", fmt.Sprintf("%d, at %d ready nodes, after %s; replaced after %s", set.Policy.Servers, set.Policy.PromoteAt,
		time.Duration(set.Policy.PromoteAfter)*time.Second, time.Duration(set.Policy.ReplaceAfter)*time.Second))
	charter := d.CharterText
	if d.WhyNoCharter != "" {
		charter = strings.TrimSpace(charter + " (no newer one can be signed: " + d.WhyNoCharter + ")")
	}
	s.line("Charter", charter)
	b := set.Birth
	s.line("Birth", fmt.Sprintf("pods %s, services %s, nodes %s, flannel %s, max-learners %d, disabled: %s", b.ClusterCIDR, b.ServiceCIDR, orNone(b.NodeCIDR), b.FlannelBackend, b.MaxLearners, orNone(strings.Join(b.Disable, " "))))
	s.line("Escrow key", keyName(d.Charter.GetEscrowKey()))
	var images []string
	for _, i := range d.Charter.GetImages() {
		images = append(images, i.Name+"@"+i.Version)
	}
	if d.Charter.GetAnyBoot() {
		images = append(images, "ANY (lab)")
	}
	s.list("Allowed images", images)
	s.list("Delegates", delegateNames(d.Charter.GetDelegates()))
	if len(d.Orders) > 0 {
		fmt.Fprintln(w, "Orders that stand:")
		for _, o := range d.Orders {
			fmt.Fprintf(w, "  - %s %s for %s, %s\n", cell(o.ID), cell(string(o.Kind)), cell(fleet.Words(o.Node)), o.State)
		}
	}
	if len(d.Nodes) == 0 {
		fmt.Fprintln(w, "No nodes.")
		return
	}
	fmt.Fprintln(w, "Nodes:")
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  ID\tWORDS\tROLE\tSTATE\tADDRESS\tSEEN\tWAITS FOR")
	for _, n := range d.Nodes {
		role, state, waits := "-", n.State.String(), "-"
		if n.Removed >= n.Incarnation {
			role = "removed"
		}
		if r := n.Report; r != nil {
			role, state = r.Role, r.State
			if r.Blocker != "" {
				waits = r.Blocker + ": " + r.Reason
			}
		}
		seen := ago(now, n.LastSeen)
		if n.Stale && n.Report != nil {
			state = "last known: " + state
		}
		fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.ID, cell(n.Words), cell(role), cell(state), cell(orNone(n.Address)), seen, cell(waits))
	}
	_ = tw.Flush() // the writer behind it has shown its errors
}

func clusterLine(s fleet.Site) string {
	st := s.Status
	if st.ClusterUID == "" {
		return "none known"
	}
	var servers []string
	for _, m := range st.Members {
		servers = append(servers, fleet.Words(m))
	}
	return fmt.Sprintf("%s, epoch %d, founded by %s; servers: %s", st.ClusterUID, st.ClusterEpoch, fleet.Words(st.Founder), orNone(strings.Join(servers, ", ")))
}

func foundingLine(s fleet.Site) string {
	f := s.Spec.Chosen().Founding
	out := string(f.Mode)
	if f.Founder != "" {
		out += " (" + fleet.Words(f.Founder) + ")"
	}
	for i, x := range f.Successors {
		out += fmt.Sprintf(", successor %d: %s", i+1, fleet.Words(x))
	}
	if g := s.Ledger.Grant; g != nil {
		out += "; granted to " + fleet.Words(g.Node) + " at " + stamp(g.At)
	}
	return out
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// placeLine says where a node belongs.
func placeLine(n fleet.Node) string {
	switch {
	case n.Site == "":
		return "none: it waits in the pool"
	case !n.Admitted():
		return n.Site + ", and was removed from it"
	case !n.MayServe:
		return n.Site + ", as a worker only"
	}
	return n.Site
}

// clusterLines are what a node said last of its cluster.
func clusterLines(s sheet, now time.Time, out *musterv1.GetNodeResponse) {
	r := out.GetReport()
	if r.GetNode() == "" {
		return
	}
	s.line("Cluster", strings.TrimSpace(fmt.Sprintf("%s as %s (%s)", orNone(r.GetUid()), r.GetRole(), r.GetState())))
	if r.GetBlocker() != "" {
		s.line("Waits for", r.GetBlocker()+": "+r.GetReason())
	}
	s.line("Said so", ago(now, r.GetAt().AsTime())+" ago")
	s.line("Snapshots", strings.Join(r.GetSnapshots(), ", "))
}
