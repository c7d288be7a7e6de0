package console

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// maxBulk bounds how many requests one click decides: more than a screen of
// them nobody has looked at.
const maxBulk = 50

// bulkItem is one request of a bulk decision.
type bulkItem struct {
	queueRow
	// Why it is left out, "" if it is in.
	Why string
	// Outcome after it was done.
	OK   bool
	Text string
}

type bulkBody struct {
	Approve bool
	In, Out []bulkItem
	Form    decision
	Sites   []string
	Problem string
	// Done: these are outcomes.
	Done           bool
	Failed, Worked int
	Max            int
}

// pick is a request as somebody saw it.
type pick struct {
	id       fleet.RequestID
	revision int64
}

func picksOf(v *visit) ([]pick, error) {
	seen := make(map[fleet.RequestID]bool)
	var out []pick
	for _, s := range v.r.PostForm["pick"] {
		id, rev, ok := strings.Cut(s, "@")
		n, err := strconv.ParseInt(rev, 10, 64)
		if !ok || err != nil || n <= 0 || fleet.RequestID(id).Validate() != nil || seen[fleet.RequestID(id)] {
			return nil, &problem{http.StatusBadRequest, "The selection could not be read", "Nothing was done. Go back to the queue and select again."}
		}
		seen[fleet.RequestID(id)] = true
		out = append(out, pick{fleet.RequestID(id), n})
	}
	switch {
	case len(out) == 0:
		return nil, &problem{http.StatusBadRequest, "Nothing is selected", "Tick the requests that you want to decide together, then try again."}
	case len(out) > maxBulk:
		return nil, &problem{http.StatusBadRequest, fmt.Sprintf("%d requests are too many at once", len(out)), fmt.Sprintf("At most %d can be decided together. For a whole shipment, import its EK list beforehand: muster preapprove import FILE.", maxBulk)}
	}
	return out, nil
}

// bulk says what would happen, and asks.
func (c *Console) bulk(v *visit) error {
	picks, err := picksOf(v)
	if err != nil {
		return err
	}
	return v.confirmBulk(http.StatusOK, picks, v.r.PostForm.Get("what") != "reject", decision{}, "")
}

func (v *visit) confirmBulk(code int, picks []pick, approve bool, d decision, why string) error {
	b := bulkBody{Approve: approve, Form: d, Problem: why, Max: maxBulk}
	for _, p := range picks {
		out, err := v.c.api.GetRequest(v.ctx, &musterv1.GetRequestRequest{Id: string(p.id)})
		if connect.CodeOf(err) == connect.CodeNotFound && err != nil {
			b.Out = append(b.Out, bulkItem{queueRow: queueRow{Request: fleet.Request{ID: p.id}}, Why: "it is not here any more"})
			continue
		} else if err != nil {
			return err
		}
		r, err := api.RequestFromProto(out.Request)
		if err != nil {
			return err
		}
		i := bulkItem{queueRow: queueRow{Request: r, Verdict: verdictOf(r.Identity, r.Boot), Refusal: strings.TrimPrefix(out.Refusal, "enroll: refused: "), Twins: out.LookAlikes}}
		switch {
		case r.Revision != p.revision:
			i.Why = "it has changed since you ticked it: open it and decide there"
		case r.State != fleet.RequestPending:
			i.Why = "it is " + r.State.String() + " already"
		case approve && i.Refusal != "":
			i.Why = i.Refusal
		case approve && (len(r.Warnings) > 0 || r.Supersedes != "" || len(i.Twins) > 0):
			i.Why = "it has warnings: open it and decide there"
		}
		if i.Why == "" {
			b.In = append(b.In, i)
		} else {
			b.Out = append(b.Out, i)
		}
	}
	var err error
	if b.Sites, err = v.siteNames(); err != nil {
		return err
	}
	p := page{Title: "Approve together", Nav: "queue", Body: &b}
	for _, i := range b.In {
		if approve {
			p.CLI = append(p.CLI, command("approve", string(i.ID), "--site", "SITE"))
		} else {
			p.CLI = append(p.CLI, command("reject", string(i.ID), "--reason", "TEXT"))
		}
	}
	if !approve {
		p.Title = "Reject together"
	}
	return v.show(code, "bulk", p)
}

// bulkApply does it, one act each: every one has its own record and its own
// outcome, and one that fails does not take the others with it.
func (c *Console) bulkApply(v *visit) error {
	picks, err := picksOf(v)
	if err != nil {
		return err
	}
	f := v.r.PostForm
	approve := f.Get("what") != "reject"
	d := decision{Site: strings.TrimSpace(f.Get("site")), Labels: strings.TrimSpace(f.Get("labels")), Reason: strings.TrimSpace(f.Get("reason")), CreateSite: f.Get("create") != ""}
	labels, err := parseLabels(d.Labels)
	if err != nil {
		return v.confirmBulk(http.StatusBadRequest, picks, approve, d, upper(sentence(err)))
	}
	if !approve && d.Reason == "" {
		return v.confirmBulk(http.StatusBadRequest, picks, approve, d, "A reason is needed: the audit log keeps it.")
	}
	b := bulkBody{Approve: approve, Done: true, Form: d, Max: maxBulk}
	for n, p := range picks {
		var r *musterv1.Request
		if approve {
			var out *musterv1.ApproveResponse
			out, err = c.api.Approve(v.ctx, &musterv1.ApproveRequest{Id: string(p.id), Revision: p.revision, Site: d.Site, Labels: labels, Reason: d.Reason, CreateSite: d.CreateSite})
			r = out.GetRequest()
		} else {
			var out *musterv1.RejectResponse
			out, err = c.api.Reject(v.ctx, &musterv1.RejectRequest{Id: string(p.id), Revision: p.revision, Reason: d.Reason})
			r = out.GetRequest()
		}
		i := bulkItem{queueRow: queueRow{Request: fleet.Request{ID: p.id}}}
		if err != nil {
			// What is wrong with the form is wrong for all of them: ask again
			// before anything was done.
			if code := connect.CodeOf(err); n == 0 && (code == connect.CodeInvalidArgument || code == connect.CodeNotFound || code == connect.CodePermissionDenied) {
				if code == connect.CodePermissionDenied {
					return err
				}
				return v.confirmBulk(codes[code].code, picks, approve, d, upper(sentence(err)))
			}
			i.Text = upper(sentence(err))
			if i.Text == "" {
				i.Text = "It did not work; the centre's log says why"
			}
			b.Failed++
		} else {
			if i.Request, err = api.RequestFromProto(r); err != nil {
				return err
			}
			i.OK, i.Text = true, i.State.String()
			b.Worked++
		}
		b.In = append(b.In, i)
	}
	return v.show(http.StatusOK, "bulk", page{Title: "Decided together", Nav: "queue", Body: &b, CLI: []string{command("get", "requests")}})
}
