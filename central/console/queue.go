package console

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

const (
	// queuePage is how many requests that somebody vouches for are on a page;
	// strangers how many of the others are shown before anybody asks.
	queuePage = 50
	strangers = 5
)

// queueRow is one request in a list.
type queueRow struct {
	fleet.Request
	Verdict verdict
	// Refusal is why nobody may approve it, "" if somebody may.
	Refusal string
	// Twins are other requests on the page that look alike.
	Twins []string
}

// Pick names the request as it was shown, for bulk decisions.
func (r queueRow) Pick() string { return fmt.Sprintf("%s@%d", r.ID, r.Revision) }

// Name is what the machine calls itself.
func (r queueRow) Name() string {
	h := r.Evidence.Hardware
	return strings.TrimSpace(say(h.Vendor + " " + h.Product))
}

// Tone is the colour of the request's state.
func (r queueRow) Tone() string { return toneOfRequest(r.State) }

// queueGroup is one heading of the queue.
type queueGroup struct {
	ID, Title, About string
	Rows             []queueRow
}

type queueBody struct {
	Groups []queueGroup
	// Strangers are requests that nobody vouches for, of StrangersTotal.
	Strangers       []queueRow
	StrangersTotal  uint32
	Total           uint32
	Next, First     string
	Search          string
	Found           []queueRow
	Done            *fleet.Request
	Empty, MayWrite bool
}

// queue is home: who waits, those first for whom somebody vouches. Requests
// of machines that nobody vouches for cost an attacker nothing, so they have a
// place of their own that does not grow.
func (c *Console) queue(v *visit) error {
	q := v.r.URL.Query()
	body := queueBody{MayWrite: mayDecide(v.s.Role), Search: text.Clean(q.Get("q"), 128)}
	p := page{Title: "Approval queue", Nav: "queue", Live: "request node preapproval", CLI: []string{command("get", "requests", "--state", "pending")}}
	if id := q.Get("done"); fleet.RequestID(id).Validate() == nil {
		if out, err := c.api.GetRequest(v.ctx, &musterv1.GetRequestRequest{Id: id}); err == nil {
			if r, err := api.RequestFromProto(out.Request); err == nil {
				body.Done = &r
			}
		}
	}
	if body.Search != "" {
		out, err := c.api.ListRequests(v.ctx, &musterv1.ListRequestsRequest{Search: body.Search, Limit: queuePage})
		if err != nil {
			return err
		}
		if body.Found, err = rowsOf(out); err != nil {
			return err
		}
		p.Title = "Search: " + body.Search
		return v.showQueue(p, &body)
	}
	vouched := &musterv1.ListRequestsRequest{
		State: fleet.RequestPending.String(), ByTrust: true, Limit: queuePage, After: q.Get("after"),
		Identities: []musterv1.IdentityTrust{musterv1.IdentityTrust_IDENTITY_TRUST_HARDWARE, musterv1.IdentityTrust_IDENTITY_TRUST_LISTED, musterv1.IdentityTrust_IDENTITY_TRUST_LAB},
	}
	out, err := c.api.ListRequests(v.ctx, vouched)
	if err != nil {
		return err
	}
	rows, err := rowsOf(out)
	if err != nil {
		return err
	}
	body.Total, body.Groups, body.First = out.Total, grouped(rows), q.Get("after")
	if out.Next != "" {
		body.Next = "/?after=" + url.QueryEscape(out.Next)
	}
	if out, err = c.api.ListRequests(v.ctx, &musterv1.ListRequestsRequest{
		State: fleet.RequestPending.String(), ByTrust: true, Limit: strangers,
		Identities: []musterv1.IdentityTrust{musterv1.IdentityTrust_IDENTITY_TRUST_UNVERIFIED},
	}); err != nil {
		return err
	}
	if body.Strangers, err = rowsOf(out); err != nil {
		return err
	}
	body.StrangersTotal = out.Total
	body.Empty = len(rows) == 0 && len(body.Strangers) == 0 && body.First == ""
	return v.showQueue(p, &body)
}

func (v *visit) showQueue(p page, body *queueBody) error {
	p.Body = body
	return v.show(http.StatusOK, "queue", p)
}

// mayDecide is for display only: the API decides.
func mayDecide(role string) bool { return role != "viewer" }

// mayOperate likewise.
func mayOperate(role string) bool { return role == "operator" || role == "admin" }

func rowsOf(out *musterv1.ListRequestsResponse) ([]queueRow, error) {
	rows := make([]queueRow, 0, len(out.Requests))
	for i, m := range out.Requests {
		r, err := api.RequestFromProto(m)
		if err != nil {
			return nil, err
		}
		row := queueRow{Request: r, Verdict: verdictOf(r.Identity, r.Boot)}
		if i < len(out.Refusals) {
			row.Refusal = strings.TrimPrefix(out.Refusals[i], "enroll: refused: ")
		}
		rows = append(rows, row)
	}
	markTwins(rows)
	return rows, nil
}

// markTwins tells of requests on the same page that people could take for
// each other. The request's own page searches further.
func markTwins(rows []queueRow) {
	serials := make(map[string][]int)
	for i, r := range rows {
		if s := text.Skeleton(r.Evidence.Serial); s != "" {
			serials[s] = append(serials[s], i)
		}
	}
	for _, same := range serials {
		for _, i := range same {
			for _, j := range same {
				if i != j && rows[i].Node != rows[j].Node && len(rows[i].Twins) < 3 {
					rows[i].Twins = append(rows[i].Twins, fmt.Sprintf("%s has a serial number that looks the same, and is another machine", rows[j].Words))
				}
			}
		}
	}
	for i := range rows {
		slices.Sort(rows[i].Twins)
	}
}

// grouped sorts a page by what a person has to do, and keeps the order within.
func grouped(rows []queueRow) []queueGroup {
	groups := []queueGroup{
		{ID: "ready", Title: "Ready to decide", About: "Compare the six words with the screen of the machine, then approve."},
		{ID: "look", Title: "Look closer", About: "Something about these is new or doubtful. Open them before you decide."},
		{ID: "stuck", Title: "Cannot be approved yet", About: "Policy refuses these as they are. Each says what is missing."},
	}
	for _, r := range rows {
		n := 0
		switch {
		case r.Refusal != "":
			n = 2
		case len(r.Warnings) > 0 || len(r.Twins) > 0 || r.Supersedes != "":
			n = 1
		}
		groups[n].Rows = append(groups[n].Rows, r)
	}
	return slices.DeleteFunc(groups, func(g queueGroup) bool { return len(g.Rows) == 0 })
}

type requestsBody struct {
	State string
	All   []string
	Rows  []queueRow
	Total uint32
	Next  string
	// Unverified: only those that nobody vouches for.
	Unverified bool
	MayWrite   bool
}

// requests lists by state: what was decided, and the long tail.
func (c *Console) requests(v *visit) error {
	q := v.r.URL.Query()
	body := requestsBody{State: q.Get("state"), Unverified: q.Get("identity") == "unverified", MayWrite: mayDecide(v.s.Role)}
	for s := fleet.RequestPending; s <= fleet.RequestQuarantined; s++ {
		body.All = append(body.All, s.String())
	}
	if !slices.Contains(body.All, body.State) {
		body.State = fleet.RequestPending.String()
	}
	ask := &musterv1.ListRequestsRequest{State: body.State, ByTrust: true, Limit: queuePage, After: q.Get("after")}
	more := url.Values{"state": {body.State}}
	if body.Unverified {
		ask.Identities = []musterv1.IdentityTrust{musterv1.IdentityTrust_IDENTITY_TRUST_UNVERIFIED}
		more.Set("identity", "unverified")
	}
	out, err := c.api.ListRequests(v.ctx, ask)
	if err != nil {
		return err
	}
	if body.Rows, err = rowsOf(out); err != nil {
		return err
	}
	body.Total = out.Total
	if out.Next != "" {
		more.Set("after", out.Next)
		body.Next = "/requests?" + more.Encode()
	}
	return v.show(http.StatusOK, "requests", page{
		Title: "Requests: " + body.State, Nav: "queue", Live: "request", CLI: []string{command("get", "requests", "--state", body.State)}, Body: body,
	})
}
