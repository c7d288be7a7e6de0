package console

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// requestBody is the page on which one request is decided.
type requestBody struct {
	queueRow
	Axes []enroll.Axis
	Rest []fleet.Finding
	// Diff is what changed since the request before, Notes the warnings that
	// do not repeat it.
	Diff, Notes, LookAlikes []string
	Booted                  []fleet.Event
	Decidable, Releasable   bool
	MayWrite                bool
	Sites                   []string
	// Shown is what the person saw, to say later what changed.
	Shown string
	// Stale: the decision was about an older state; Changes says what differs.
	Stale   bool
	Changes []string
	// Problem is why the last attempt was refused, Form what was typed.
	Problem string
	Form    decision
	// Successor is the request to decide on instead.
	Successor fleet.RequestID
}

// decision is what a person filled in.
type decision struct {
	Site, Labels, Reason string
	CreateSite           bool
	Revision             int64
}

// seen is the part of a request that its revision stands for, in the page
// itself: the centre need not remember what it showed to whom.
type seen struct {
	State    string   `json:"s"`
	Warnings []string `json:"w,omitempty"`
	Failed   []string `json:"f,omitempty"`
	Identity string   `json:"i"`
	Boot     string   `json:"b"`
}

func seenOf(r fleet.Request) seen {
	s := seen{State: r.State.String(), Identity: r.Identity.String(), Boot: r.Boot.String()}
	for _, w := range r.Warnings {
		s.Warnings = append(s.Warnings, say(w))
	}
	for _, f := range r.Findings {
		if !f.OK {
			s.Failed = append(s.Failed, say(f.Check))
		}
	}
	return s
}

// maxSeen bounds the field of the form.
const maxSeen = 32 << 10

func (s seen) encode() string {
	b, err := json.Marshal(s)
	if err != nil || len(b) > maxSeen {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// changes says what differs between what was shown and what is now. It comes
// from the person's own browser and is shown to that person alone.
func changes(encoded string, now fleet.Request) (out []string) {
	var old seen
	b, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil || len(b) > maxSeen || json.Unmarshal(b, &old) != nil {
		return []string{"The page does not know any more what it showed. Read it again as a whole."}
	}
	is := seenOf(now)
	if old.State != is.State {
		line := fmt.Sprintf("It was %s and is %s now", say(old.State), is.State)
		if now.DecidedBy != "" && !slices.Contains([]string{"pending"}, is.State) {
			line += fmt.Sprintf(" (%s: %s)", say(now.DecidedBy), orNone(say(now.Reason)))
		}
		out = append(out, line)
	}
	if old.Identity != is.Identity || old.Boot != is.Boot {
		out = append(out, fmt.Sprintf("The verdict was %s and %s, and is %s and %s now", say(old.Identity), say(old.Boot), is.Identity, is.Boot))
	}
	out = append(out, added("New warning: ", old.Warnings, is.Warnings)...)
	out = append(out, added("Warning gone: ", is.Warnings, old.Warnings)...)
	out = append(out, added("A check says no now: ", old.Failed, is.Failed)...)
	out = append(out, added("A check says yes now: ", is.Failed, old.Failed)...)
	if len(out) == 0 {
		out = append(out, "Somebody decided on it and took that back; the rest is as you saw it.")
	}
	return out
}

func added(prefix string, before, after []string) (out []string) {
	for _, s := range after {
		if !slices.Contains(before, s) && len(out) < 20 {
			out = append(out, prefix+say(s))
		}
	}
	return out
}

func orNone(s string) string {
	if s == "" {
		return "no reason given"
	}
	return s
}

// request shows one request.
func (c *Console) request(v *visit) error {
	return v.showRequest(http.StatusOK, v.r.PathValue("id"), func(*requestBody) {})
}

func (v *visit) showRequest(code int, id string, change func(*requestBody)) error {
	out, err := v.c.api.GetRequest(v.ctx, &musterv1.GetRequestRequest{Id: id})
	if err != nil {
		return err
	}
	r, err := api.RequestFromProto(out.Request)
	if err != nil {
		return err
	}
	b := requestBody{
		queueRow: queueRow{Request: r, Verdict: verdictOf(r.Identity, r.Boot), Refusal: strings.TrimPrefix(out.Refusal, "enroll: refused: ")},
		Diff:     out.Diff, LookAlikes: out.LookAlikes, Shown: seenOf(r).encode(), MayWrite: mayDecide(v.s.Role),
		Form: decision{Site: r.Site, Labels: strings.Join(labelsOf(r.Labels), ", "), Revision: r.Revision},
	}
	b.Axes, b.Rest = enroll.Explain(r)
	for _, w := range r.Warnings {
		line, repeats := strings.CutPrefix(w, "Changed since request "+string(r.Supersedes)+": ")
		if !repeats || !slices.Contains(out.Diff, line) {
			b.Notes = append(b.Notes, w)
		}
	}
	for _, m := range out.BootEvents {
		e, err := api.EventFromProto(m)
		if err != nil {
			return err
		}
		b.Booted = append(b.Booted, e)
	}
	b.Decidable = r.State == fleet.RequestPending
	b.Releasable = r.State == fleet.RequestRejected || r.State == fleet.RequestQuarantined
	if r.State == fleet.RequestSuperseded || r.State == fleet.RequestExpired {
		b.Successor = v.liveRequest(r)
	}
	if b.Decidable && b.MayWrite {
		if b.Sites, err = v.siteNames(); err != nil {
			return err
		}
	}
	change(&b)
	p := page{Title: "Request " + say(r.Words), Nav: "queue", Live: "request", Body: &b, CLI: []string{command("describe", "request", string(r.ID))}}
	if b.Decidable && b.MayWrite {
		p.CLI = append(p.CLI, command("approve", string(r.ID), "--site", "SITE"), command("reject", string(r.ID), "--reason", "TEXT"))
	}
	if b.Releasable && b.MayWrite {
		p.CLI = append(p.CLI, command("release", string(r.ID)))
	}
	return v.show(code, "request", p)
}

// liveRequest is the request that counts for the machine now, if there is one.
func (v *visit) liveRequest(r fleet.Request) fleet.RequestID {
	out, err := v.c.api.GetRequest(v.ctx, &musterv1.GetRequestRequest{Id: r.Words})
	if err != nil || out.Request.GetId() == string(r.ID) {
		return ""
	}
	return fleet.RequestID(out.Request.GetId())
}

// siteNames are for the list that an input offers.
func (v *visit) siteNames() ([]string, error) {
	out, err := v.c.api.ListSites(v.ctx, &musterv1.ListSitesRequest{Limit: 200})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, s := range out.Sites {
		names = append(names, s.GetMeta().GetName())
	}
	return names, nil
}

// formOf reads a decision.
func formOf(v *visit) (decision, map[string]string, error) {
	f := v.r.PostForm
	d := decision{
		Site: strings.TrimSpace(f.Get("site")), Labels: strings.TrimSpace(f.Get("labels")), Reason: strings.TrimSpace(f.Get("reason")), CreateSite: f.Get("create") != "",
	}
	var err error
	if d.Revision, err = strconv.ParseInt(f.Get("revision"), 10, 64); err != nil || d.Revision <= 0 {
		// 0 would mean "whatever is there" to the API.
		return d, nil, &problem{http.StatusBadRequest, "The form does not say what you saw", "Nothing was done. Open the request again and decide there."}
	}
	labels, err := parseLabels(d.Labels)
	return d, labels, err
}

// parseLabels reads "key=value, key=value"; the API checks keys and values.
func parseLabels(s string) (map[string]string, error) {
	out := make(map[string]string)
	for _, part := range strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == '\n' }) {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		k, value, ok := strings.Cut(part, "=")
		if k = strings.TrimSpace(k); !ok || k == "" {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("label %.60q: want key=value, several with commas between", part))
		}
		if _, twice := out[k]; twice {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("label %.60q is given twice", k))
		}
		out[k] = strings.TrimSpace(value)
	}
	return out, nil
}

func (c *Console) approve(v *visit) error {
	id := v.r.PathValue("id")
	d, labels, err := formOf(v)
	if err == nil {
		_, err = c.api.Approve(v.ctx, &musterv1.ApproveRequest{
			Id: id, Revision: d.Revision, Site: d.Site, Labels: labels, Reason: d.Reason, CreateSite: d.CreateSite,
		})
	}
	return v.decided(id, d, err)
}

func (c *Console) reject(v *visit) error {
	id := v.r.PathValue("id")
	d, _, err := formOf(v)
	if err == nil {
		_, err = c.api.Reject(v.ctx, &musterv1.RejectRequest{Id: id, Revision: d.Revision, Reason: d.Reason})
	}
	return v.decided(id, d, err)
}

func (c *Console) release(v *visit) error {
	id := v.r.PathValue("id")
	d, _, err := formOf(v)
	if err == nil {
		_, err = c.api.Release(v.ctx, &musterv1.ReleaseRequest{Id: id, Revision: d.Revision, Reason: d.Reason})
	}
	return v.decided(id, d, err)
}

// decided goes back to the queue, or shows the request again with what stood
// in the way and what was typed.
func (v *visit) decided(id string, d decision, err error) error {
	if err == nil {
		return v.to("/?done=%s", queryEscape(id))
	}
	code := connect.CodeOf(err)
	switch code {
	case connect.CodeAborted:
		return v.showRequest(http.StatusConflict, id, func(b *requestBody) {
			b.Stale, b.Changes = true, changes(v.r.PostForm.Get("shown"), b.Request)
			rev := b.Form.Revision
			b.Form = d
			b.Form.Revision = rev
		})
	case connect.CodeInvalidArgument, connect.CodeFailedPrecondition, connect.CodeNotFound:
		status := codes[code].code
		shown := v.showRequest(status, id, func(b *requestBody) {
			rev := b.Form.Revision
			b.Form, b.Problem = d, upper(sentence(err))
			// What the person saw is what this form is about, still.
			if d.Revision > 0 && d.Revision != rev {
				b.Stale, b.Changes = true, changes(v.r.PostForm.Get("shown"), b.Request)
			}
			b.Form.Revision = rev
		})
		if shown != nil {
			return err
		}
		return nil
	}
	return err
}
