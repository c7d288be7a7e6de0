package console

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// versionRow is a published version with the sites that shall run it.
type versionRow struct {
	Version, K3s, Etcd string
	Images             []string
	AddOns, Apps       []string
	Published          time.Time
	By, Key            string
	SHA256             string
	Sites              uint32
}

type stackRow struct {
	fleet.Stack
	Versions []versionRow
	// Sites is how many sites shall run any of its versions; Other counts
	// those that are assigned a version nobody published.
	Sites, Other uint32
}

// Newest is the version that was published last.
func (s stackRow) Newest() *versionRow {
	if len(s.Versions) == 0 {
		return nil
	}
	return &s.Versions[0]
}

func stackRowOf(m *musterv1.StackSummary) (stackRow, error) {
	s, err := api.StackFromProto(m.GetStack())
	if err != nil {
		return stackRow{}, err
	}
	r := stackRow{Stack: s}
	left := maps.Clone(m.GetSites())
	for _, p := range m.GetVersions() {
		v := p.GetVersion()
		row := versionRow{
			Version: v.GetVersion(), K3s: v.GetK3S(), Etcd: v.GetEtcdMinor(), Published: timeOf(p.GetPublished()), By: p.GetBy(), Key: p.GetKeyId(),
			SHA256: fmt.Sprintf("%x", p.GetSha256()), Sites: m.GetSites()[v.GetVersion()],
		}
		for _, i := range v.GetImages() {
			row.Images = append(row.Images, i.GetName()+" "+i.GetVersion()+" "+i.GetArch())
		}
		for _, a := range v.GetAddOns() {
			row.AddOns = append(row.AddOns, a.GetName()+" "+a.GetVersion())
		}
		for _, a := range v.GetApps() {
			row.Apps = append(row.Apps, a.GetChart().GetName()+" "+a.GetChart().GetVersion())
		}
		r.Versions = append(r.Versions, row)
		r.Sites += row.Sites
		delete(left, v.GetVersion())
	}
	for n := range maps.Values(left) {
		r.Other += n
		r.Sites += n
	}
	return r, nil
}

// driftRow is a site beside what it shall run.
type driftRow struct {
	Site, Desired, State, Tone, Why string
	Nodes, Current                  uint32
	Stale                           bool
	Heard                           time.Time
	Outliers                        []nodeDrift
}

type nodeDrift struct {
	Node, Words, Running, Why string
	Stale                     bool
}

// driftTones go with the words of GetDrift.
var driftTones = map[string]string{"current": "good", "updating": "lab", "waiting": "lab", "blocked": "bad", "unknown": "caution", "unassigned": "quiet"}

const (
	// driftShown bounds the sites on a page; those that differ come first.
	driftShown  = 200
	driftsNodes = 8
)

// order of the words: how soon a person should look.
var driftOrder = []string{"blocked", "unknown", "waiting", "updating", "unassigned", "current"}

func driftRows(m *musterv1.GetDriftResponse) (rows []driftRow, cut int) {
	for _, s := range m.GetOutliers() {
		r := driftRow{
			Site: s.GetSite(), Desired: s.GetDesired(), State: s.GetState(), Tone: driftTones[s.GetState()], Why: s.GetWhy(),
			Nodes: s.GetNodes(), Current: s.GetNodesCurrent(), Stale: s.GetStale(), Heard: timeOf(s.GetLastHeard()),
		}
		for _, n := range s.GetOutliers()[:min(len(s.GetOutliers()), driftsNodes)] {
			r.Outliers = append(r.Outliers, nodeDrift{n.GetNode(), n.GetWords(), n.GetRunning(), n.GetWhy(), n.GetStale()})
		}
		rows = append(rows, r)
	}
	slices.SortStableFunc(rows, func(a, b driftRow) int {
		return slices.Index(driftOrder, a.State) - slices.Index(driftOrder, b.State)
	})
	if len(rows) > driftShown {
		rows, cut = rows[:driftShown], len(rows)-driftShown
	}
	return rows, cut
}

type stacksBody struct {
	Rows    []stackRow
	Summary string
	Drift   []driftRow
	Cut     int
}

// stacks shows what is published and which sites differ from what they shall
// run.
func (c *Console) stacks(v *visit) error {
	out, err := c.api.ListStacks(v.ctx, &musterv1.ListStacksRequest{})
	if err != nil {
		return err
	}
	b := stacksBody{}
	for _, m := range out.Stacks {
		r, err := stackRowOf(m)
		if err != nil {
			return err
		}
		b.Rows = append(b.Rows, r)
	}
	if len(b.Rows) > 0 {
		drift, err := c.api.GetDrift(v.ctx, &musterv1.GetDriftRequest{})
		if err != nil {
			return err
		}
		b.Summary = upper(strings.TrimSpace(drift.GetSummary()))
		b.Drift, b.Cut = driftRows(drift)
	}
	return v.show(http.StatusOK, "stacks", page{Title: "Stacks", Nav: "stacks", Live: "site node stack", CLI: []string{command("get", "stacks"), command("get", "drift")}, Body: b})
}

type stackBody struct {
	stackRow
	Summary string
	Drift   []driftRow
	Cut     int
}

func (c *Console) stack(v *visit) error {
	name := v.r.PathValue("name")
	out, err := c.api.GetStack(v.ctx, &musterv1.GetStackRequest{Name: name})
	if err != nil {
		return err
	}
	r, err := stackRowOf(out.Stack)
	if err != nil {
		return err
	}
	drift, err := c.api.GetDrift(v.ctx, &musterv1.GetDriftRequest{Stack: r.Name, All: true})
	if err != nil {
		return err
	}
	b := stackBody{stackRow: r, Summary: upper(strings.TrimSpace(drift.GetSummary()))}
	b.Drift, b.Cut = driftRows(drift)
	p := page{Title: "Stack " + say(r.Name), Nav: "stacks", Live: "site node stack", Body: b, CLI: []string{command("get", "drift", "--stack", r.Name, "--all")}}
	if newest := r.Newest(); newest != nil && mayOperate(v.s.Role) {
		p.CLI = append(p.CLI, command("assign", "SITE", "--stack", r.Name+"@"+newest.Version))
	}
	return v.show(http.StatusOK, "stack", p)
}
