package console

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

const (
	// maxSites bounds what is read to find the outliers among them.
	maxSites  = 20000
	sitesPage = 100
)

// siteRow is one site with what is odd about it.
type siteRow struct {
	fleet.Site
	// Tone and Word say how it is in a word, Why in a sentence.
	Tone, Word, Why string
	Stale           bool
	rank            int
}

// judge compares a site with what it should be. The first thing that is
// wrong is the word; the order is that of how soon a person should look.
func judge(now time.Time, s fleet.Site, epoch uint64, stale time.Duration) siteRow {
	r := siteRow{Site: s, Stale: !s.Status.Seen.IsZero() && stale > 0 && now.Sub(s.Status.Seen) > stale}
	set := func(rank int, tone, word, why string) siteRow {
		r.rank, r.Tone, r.Word, r.Why = rank, tone, word, why
		return r
	}
	st := s.Status
	switch {
	case st.Second != "":
		return set(0, "bad", "two clusters", fmt.Sprintf("A second cluster, %s, was shown by %s. A person has to look.", say(st.Second), fleet.Words(st.SecondBy)))
	case s.Ledger.Unsure(epoch):
		why := s.Ledger.Doubt
		if why == "" {
			why = "the centre was restored from a backup"
		}
		return set(1, "caution", "unsure", "No founding is granted: "+say(why)+".")
	case st.Blocker != "" && !r.Stale:
		return set(2, "caution", "waits", upper(say(st.Blocker))+".")
	case r.Stale:
		return set(3, "caution", "silent", fmt.Sprintf("Nothing was heard of it since %s. What is shown is the last that is known.", stamp(st.Seen)))
	case s.Spec.Version != "" && st.Version != "" && (s.Spec.Version != st.Version || s.Spec.Stack != st.Stack):
		return set(4, "lab", "other version", fmt.Sprintf("It runs %s %s and shall run %s %s.", say(st.Stack), say(st.Version), say(s.Spec.Stack), say(s.Spec.Version)))
	case st.ClusterUID != "" && st.Servers < s.Spec.Chosen().Policy.Servers:
		return set(5, "lab", "growing", fmt.Sprintf("It has %s of the %d it shall have.", plural(st.Servers, "server", "servers"), s.Spec.Chosen().Policy.Servers))
	case st.ClusterUID == "":
		return set(6, "quiet", "no cluster yet", "No node has shown a cluster.")
	}
	return set(7, "good", "as wanted", "")
}

type sitesBody struct {
	Rows          []siteRow
	Total, Good   int
	Outliers      int
	Cut           bool
	Search        string
	Next, First   string
	Filtered      int
	ReadAll, Read int
}

// sites shows the outliers first: of five hundred sites, the three that
// differ are what a person came for.
func (c *Console) sites(v *visit) error {
	q := v.r.URL.Query()
	centre, err := c.api.GetCentre(v.ctx, &musterv1.GetCentreRequest{})
	if err != nil {
		return err
	}
	now, stale := centre.Now.AsTime(), time.Duration(centre.StaleAfterSeconds)*time.Second
	body := sitesBody{Search: text.Clean(q.Get("q"), 128), First: q.Get("after")}
	var rows []siteRow
	for after := ""; ; {
		out, err := c.api.ListSites(v.ctx, &musterv1.ListSitesRequest{After: after})
		if err != nil {
			return err
		}
		for _, m := range out.Sites {
			s, err := api.SiteFromProto(m)
			if err != nil {
				return err
			}
			after = s.Name
			r := judge(now, s, centre.Epoch, stale)
			body.Total++
			if r.rank == 7 {
				body.Good++
			} else if r.rank < 6 {
				body.Outliers++
			}
			if body.Search == "" || matches(s, body.Search) {
				rows = append(rows, r)
			}
		}
		if !out.More || body.Total >= maxSites {
			body.Cut = out.More
			break
		}
	}
	slices.SortStableFunc(rows, func(a, b siteRow) int { return cmp.Compare(a.rank, b.rank) })
	body.Filtered = len(rows)
	from, _ := strconv.Atoi(body.First) // anything else is the first page
	from = min(max(from, 0), len(rows))
	rows = rows[from:]
	if len(rows) > sitesPage {
		rows = rows[:sitesPage]
		body.Next = "/sites?" + url.Values{"after": {strconv.Itoa(from + sitesPage)}, "q": {body.Search}}.Encode()
	}
	body.Rows = rows
	if from == 0 {
		body.First = ""
	}
	return v.show(http.StatusOK, "sites", page{Title: "Sites", Nav: "sites", Live: "site node", CLI: []string{command("get", "sites")}, Body: body})
}

func matches(s fleet.Site, search string) bool {
	search = strings.ToLower(search)
	for _, x := range append(labelsOf(s.Labels), s.Name, s.Title, s.Location, s.Status.ClusterUID) {
		if strings.Contains(strings.ToLower(x), search) {
			return true
		}
	}
	return false
}

// siteNode is a node on its site's page.
type siteNode struct {
	nodeRow
	Address string
	Report  *fleet.NodeReport
	Role    string
	// Server: the cluster record names it as a confirmed server.
	Server, Founder bool
}

// orderRow is an order that stands.
type orderRow struct {
	ID, Kind     string
	Node         fleet.NodeID
	State        fleet.OrderState
	Text, Reason string
}

type siteBody struct {
	siteRow
	Nodes        []siteNode
	Orders       []orderRow
	Charter      string
	WhyNoCharter string
	Images       []string
	Unsure       bool
	Servers      []string
	Founding     string
	Settings     fleet.SiteSettings
	Voters       int
}

func (c *Console) site(v *visit) error {
	out, err := c.api.GetSite(v.ctx, &musterv1.GetSiteRequest{Name: v.r.PathValue("name")})
	if err != nil {
		return err
	}
	site, err := api.SiteFromProto(out.Site)
	if err != nil {
		return err
	}
	now, stale := out.Now.AsTime(), time.Duration(out.StaleAfterSeconds)*time.Second
	epoch := uint64(0)
	if out.Unsure {
		epoch = site.Ledger.Sure + 2 // judge shall say so, too
	}
	b := siteBody{siteRow: judge(now, site, epoch, stale), WhyNoCharter: out.WhyNoCharter, Unsure: out.Unsure, Settings: site.Spec.Chosen()}
	if ver := out.Charter.GetVersion(); ver != nil {
		b.Charter = api.DocVersion(ver).String()
	}
	for _, i := range out.Charter.GetImages() {
		b.Images = append(b.Images, i.Name+"@"+i.Version)
	}
	if out.Charter.GetAnyBoot() {
		b.Images = append(b.Images, "anything (lab)")
	}
	for _, m := range site.Status.Members {
		b.Servers = append(b.Servers, fleet.Words(m))
	}
	b.Founding = founding(site)
	for i, m := range out.Nodes {
		n, err := api.NodeFromProto(m)
		if err != nil {
			return err
		}
		x := siteNode{nodeRow: nodeRow{n, now.Sub(n.LastSeen) > stale}, Role: "none yet", Server: slices.Contains(site.Status.Members, n.ID), Founder: site.Status.Founder == n.ID}
		if i < len(out.Addresses) {
			x.Address = out.Addresses[i]
		}
		if i < len(out.Reports) && out.Reports[i].GetNode() != "" {
			r, err := api.NodeReportFromProto(out.Reports[i])
			if err != nil {
				return err
			}
			x.Report, x.Role = &r, r.Role
			b.Voters = max(b.Voters, r.Voters)
		}
		if !n.Admitted() {
			x.Role = "removed"
		}
		b.Nodes = append(b.Nodes, x)
	}
	for _, m := range out.Orders {
		o := m.GetOrder()
		b.Orders = append(b.Orders, orderRow{o.GetId(), o.GetKind(), fleet.NodeID(o.GetNode()), fleet.OrderState(m.GetState()), m.GetText(), o.GetReason()})
	}
	p := page{Title: "Site " + say(site.Name), Nav: "sites", Live: "site node order cluster", Body: b, CLI: []string{command("describe", "site", site.Name)}}
	if out.Unsure && mayOperate(v.s.Role) {
		p.CLI = append(p.CLI, command("site", "confirm", site.Name, "--reason", "TEXT"))
	}
	return v.show(http.StatusOK, "site", p)
}

func founding(s fleet.Site) string {
	f := s.Spec.Chosen().Founding
	out := map[fleet.FoundingMode]string{
		fleet.FoundCentral: "the centre gives the right to found, once",
		fleet.FoundNamed:   "the charter names who founds",
		fleet.FoundFirst:   "the first nodes agree on who founds",
	}[f.Mode]
	if out == "" {
		out = say(f.Mode)
	}
	if f.Founder != "" {
		out += ": " + fleet.Words(f.Founder)
	}
	if g := s.Ledger.Grant; g != nil {
		out += "; given to " + fleet.Words(g.Node) + " on " + stamp(g.At)
	}
	return out
}
