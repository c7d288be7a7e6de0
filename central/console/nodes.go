package console

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

const nodesPage = 100

// nodeRow is one node in a list.
type nodeRow struct {
	fleet.Node
	Stale bool
}

// Tone is the colour of the node's state.
func (n nodeRow) Tone() string { return toneOfNode(n.State) }

type nodesBody struct {
	Rows    []nodeRow
	Search  string
	Problem string
	Counts  []countOf
	Next    string
	First   string
}

type countOf struct {
	Name string
	N    uint32
	Tone string
}

func (c *Console) nodes(v *visit) error {
	q := v.r.URL.Query()
	body := nodesBody{Search: text.Clean(q.Get("q"), 128), First: q.Get("after")}
	p := page{Title: "Nodes", Nav: "nodes", Live: "node", CLI: []string{command("get", "nodes")}}
	centre, err := c.api.GetCentre(v.ctx, &musterv1.GetCentreRequest{})
	if err != nil {
		return err
	}
	for s := fleet.NodeApproved; s <= fleet.NodeDenied; s++ {
		body.Counts = append(body.Counts, countOf{s.String(), centre.Nodes[s.String()], toneOfNode(s)})
	}
	if body.Search != "" {
		out, err := c.api.GetNode(v.ctx, &musterv1.GetNodeRequest{Id: body.Search})
		if err == nil {
			return v.to("/nodes/%s", url.PathEscape(out.Node.GetId()))
		}
		if code := connect.CodeOf(err); code != connect.CodeNotFound && code != connect.CodeInvalidArgument {
			return err
		}
		body.Problem = upper(sentence(err))
		p.Body = body
		return v.show(http.StatusOK, "nodes", p)
	}
	out, err := c.api.ListNodes(v.ctx, &musterv1.ListNodesRequest{Limit: nodesPage, After: body.First})
	if err != nil {
		return err
	}
	now, stale := centre.Now.AsTime(), time.Duration(centre.StaleAfterSeconds)*time.Second
	for _, m := range out.Nodes {
		n, err := api.NodeFromProto(m)
		if err != nil {
			return err
		}
		body.Rows = append(body.Rows, nodeRow{n, isStale(now, n, stale)})
	}
	if n := len(body.Rows); out.More && n > 0 {
		body.Next = "/nodes?after=" + url.QueryEscape(string(body.Rows[n-1].ID))
	}
	p.Body = body
	return v.show(http.StatusOK, "nodes", p)
}

// isStale reports whether what is known of a node is old.
func isStale(now time.Time, n fleet.Node, after time.Duration) bool {
	return n.State == fleet.NodeActive && after > 0 && now.Sub(n.LastSeen) > after
}

type nodeBody struct {
	nodeRow
	Denied     bool
	Requests   []queueRow
	Report     *fleet.NodeReport
	MayOperate bool
	Sites      []string
	Problem    string
	Form       decision
	Verdict    verdict
}

func (c *Console) node(v *visit) error {
	return v.showNode(http.StatusOK, v.r.PathValue("id"), "", decision{})
}

func (v *visit) showNode(code int, id, why string, d decision) error {
	out, err := v.c.api.GetNode(v.ctx, &musterv1.GetNodeRequest{Id: id})
	if err != nil {
		return err
	}
	n, err := api.NodeFromProto(out.Node)
	if err != nil {
		return err
	}
	centre, err := v.c.api.GetCentre(v.ctx, &musterv1.GetCentreRequest{})
	if err != nil {
		return err
	}
	b := nodeBody{
		nodeRow: nodeRow{n, isStale(centre.Now.AsTime(), n, time.Duration(centre.StaleAfterSeconds)*time.Second)},
		Denied:  out.Denied, MayOperate: mayOperate(v.s.Role), Problem: why, Form: d, Verdict: verdictOf(n.Identity, n.Boot),
	}
	if b.Requests, err = rowsOf(&musterv1.ListRequestsResponse{Requests: out.Requests}); err != nil {
		return err
	}
	if out.Report.GetNode() != "" {
		r, err := api.NodeReportFromProto(out.Report)
		if err != nil {
			return err
		}
		b.Report = &r
	}
	p := page{Title: "Node " + say(n.Words), Nav: "nodes", Live: "node", CLI: []string{command("describe", "node", string(n.ID))}}
	if b.MayOperate {
		if b.Sites, err = v.siteNames(); err != nil {
			return err
		}
		switch {
		case n.State == fleet.NodeDenied:
			p.CLI = append(p.CLI, command("allow", string(n.ID)))
		case n.Admitted():
			p.CLI = append(p.CLI, command("remove", string(n.ID), "--reason", "TEXT"), command("deny", string(n.ID), "--reason", "TEXT"))
		default:
			p.CLI = append(p.CLI, command("assign", string(n.ID), "--site", "SITE"), command("deny", string(n.ID), "--reason", "TEXT"))
		}
	}
	p.Body = b
	return v.show(code, "node", p)
}

// act runs one act on a node and shows the node again.
func (v *visit) actOnNode(do func(id string, d decision, labels map[string]string) error) error {
	id := v.r.PathValue("id")
	d, labels, err := formOf(v)
	if err == nil {
		err = do(id, d, labels)
	}
	if err == nil {
		return v.to("/nodes/%s", url.PathEscape(id))
	}
	code := connect.CodeOf(err)
	if p, ok := codes[code]; ok && code != connect.CodePermissionDenied && code != connect.CodeUnauthenticated {
		why := upper(sentence(err))
		if code == connect.CodeAborted {
			why = "The node has changed since you looked, and nothing was done. Look again and decide then."
		}
		if v.showNode(p.code, id, why, d) == nil {
			return nil
		}
	}
	return err
}

func (c *Console) deny(v *visit) error {
	return v.actOnNode(func(id string, d decision, _ map[string]string) error {
		_, err := c.api.DenyNode(v.ctx, &musterv1.DenyNodeRequest{Id: id, Revision: d.Revision, Reason: d.Reason})
		return err
	})
}

func (c *Console) allow(v *visit) error {
	return v.actOnNode(func(id string, d decision, _ map[string]string) error {
		_, err := c.api.AllowNode(v.ctx, &musterv1.AllowNodeRequest{Id: id, Revision: d.Revision, Reason: d.Reason})
		return err
	})
}

func (c *Console) assign(v *visit) error {
	return v.actOnNode(func(id string, d decision, labels map[string]string) error {
		hint := ""
		if v.r.PostForm.Get("worker") != "" {
			hint = "worker"
		}
		_, err := c.api.AssignNode(v.ctx, &musterv1.AssignNodeRequest{
			Id: id, Revision: d.Revision, Site: d.Site, Labels: labels, RoleHint: hint, CreateSite: d.CreateSite, Reason: d.Reason,
		})
		return err
	})
}

func (c *Console) remove(v *visit) error {
	return v.actOnNode(func(id string, d decision, _ map[string]string) error {
		_, err := c.api.RemoveNode(v.ctx, &musterv1.RemoveNodeRequest{Id: id, Revision: d.Revision, Reason: d.Reason})
		return err
	})
}

// certificateWord says how the node's certificate is.
func (n nodeRow) CertificateWord(now time.Time) string {
	c := n.Certificate
	switch {
	case c.Serial == "":
		return "none yet"
	case now.After(c.NotAfter):
		return "ended " + ago(now, c.NotAfter)
	}
	return fmt.Sprintf("good for %d more days", c.NotAfter.Sub(now)/(24*time.Hour))
}

// Place is where the node belongs.
func (n nodeRow) Place() string {
	switch {
	case n.Site == "":
		return "the pool"
	case !n.Admitted():
		return n.Site + " (removed)"
	}
	return n.Site
}

// Rev is the revision for forms.
func (n nodeRow) Rev() string { return strconv.FormatInt(n.Revision, 10) }

// LabelText is the labels as one types them.
func (n nodeRow) LabelText() string { return strings.Join(labelsOf(n.Labels), ", ") }
