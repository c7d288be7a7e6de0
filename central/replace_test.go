package central

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

func (r *running) node(t *testing.T, id fleet.NodeID) (n fleet.Node) {
	t.Helper()
	err := r.store.View(t.Context(), func(tx store.Reader) (err error) {
		n, err = tx.Node(DefaultTenant, id)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (r *running) file(t *testing.T, m *machine) fleet.Request {
	t.Helper()
	q, err := r.File(t.Context(), m.filing)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestReplace(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	api := r.manage()
	ctx := t.Context()
	a, b := newMachine(t, "a"), newMachine(t, "b")
	qa := r.file(t, a)
	if _, err := api.Approve(ctx, &musterv1.ApproveRequest{Id: string(qa.ID), Site: "lab", CreateSite: true, Labels: map[string]string{"rack": "2"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.collect(a, qa.ID); err != nil {
		t.Fatal(err)
	}
	qb := r.file(t, b)
	rejected := r.file(t, newMachine(t, "c"))
	if err := r.Reject(rejected.ID, rejected.Revision); err != nil {
		t.Fatal(err)
	}
	records := func() int {
		all, err := r.records()
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	q := func() *musterv1.ReplaceRequest {
		return &musterv1.ReplaceRequest{Old: string(qa.Node), New: string(qb.ID), Revision: qb.Revision, Reason: "board changed"}
	}
	before := records()
	for name, c := range map[string]struct {
		edit func(*musterv1.ReplaceRequest)
		code connect.Code
		says string
	}{
		"an unknown old one":     {func(q *musterv1.ReplaceRequest) { q.Old = "n-aaaaaaaaaaaaaaaaaaaaaaaa" }, connect.CodeNotFound, "no node"},
		"an unknown new one":     {func(q *musterv1.ReplaceRequest) { q.New = "r-aaaaaaaaaaaaaaaaaaaaaaaa" }, connect.CodeNotFound, "no request"},
		"a rejected new one":     {func(q *musterv1.ReplaceRequest) { q.New, q.Revision = string(rejected.ID), 0 }, connect.CodeFailedPrecondition, "rejected"},
		"an issued new one":      {func(q *musterv1.ReplaceRequest) { q.New, q.Revision = string(qa.ID), 0 }, connect.CodeFailedPrecondition, "same machine"},
		"another revision":       {func(q *musterv1.ReplaceRequest) { q.Revision += 3 }, connect.CodeAborted, "changed"},
		"no reason":              {func(q *musterv1.ReplaceRequest) { q.Reason = " " }, connect.CodeInvalidArgument, "reason"},
		"a request for old":      {func(q *musterv1.ReplaceRequest) { q.Old = string(qb.ID) }, connect.CodeNotFound, "no node"},
		"a machine not yet node": {func(q *musterv1.ReplaceRequest) { q.Old = string(qb.Node) }, connect.CodeNotFound, "no node"},
	} {
		m := q()
		c.edit(m)
		if _, err := api.Replace(ctx, m); connect.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dry := q()
	dry.DryRun = true
	out, err := api.Replace(ctx, dry)
	if err != nil || len(out.Changes) != 3 {
		t.Errorf("dry run: %v, %v", out, err)
	}
	if n := records(); n != before {
		t.Errorf("refusals and a dry run left %d records", n-before)
	}
	if n := r.node(t, qa.Node); n.State != fleet.NodeApproved || n.ReplacedBy != "" {
		t.Errorf("the dry run was wet: %+v", n)
	}

	if out, err = api.Replace(ctx, q()); err != nil || len(out.Changes) != 3 {
		t.Fatalf("replace: %v, %v", out, err)
	}
	if out.New.Site != "lab" || out.New.Labels["rack"] != "2" || out.New.State != musterv1.RequestState_REQUEST_STATE_APPROVED || out.New.Replaces != string(qa.Node) {
		t.Errorf("new: %v", out.New)
	}
	old := r.node(t, qa.Node)
	if old.State != fleet.NodeDenied || old.ReplacedBy != qb.Node {
		t.Errorf("old: %+v", old)
	}
	if no, err := r.Denied(ctx, DefaultTenant, []fleet.EKHash{old.EK}); !no || err != nil {
		t.Errorf("the old EK is not denied: %v", err)
	}
	if _, err := r.File(ctx, a.filing); err == nil {
		t.Error("the old machine files again")
	}
	if _, err := r.collect(a, qa.ID); err == nil {
		t.Error("the old machine collects")
	}
	// Once more, before and after the new one has its certificate.
	done := records()
	for _, step := range []string{"approved", "issued"} {
		if out, err = api.Replace(ctx, q()); err != nil || len(out.Changes) != 0 || records() != done {
			t.Errorf("again when %s: %v, %v, %d new records", step, out, err, records()-done)
		}
		if _, err := r.collect(b, qb.ID); err != nil {
			t.Fatal(err)
		}
		done = records()
	}
	n := r.node(t, qb.Node)
	if n.Site != "lab" || n.Labels["rack"] != "2" || n.Replaces != qa.Node || n.State != fleet.NodeApproved {
		t.Errorf("the new node: %+v", n)
	}
	kinds, err := r.Audit()
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, k := range kinds {
		text += string(k) + " "
	}
	for _, k := range []fleet.AuditKind{audit.NodeReplaced, audit.NodeDenied} {
		if strings.Count(text, string(k)) != 1 {
			t.Errorf("the audit log has not one %s: %s", k, text)
		}
	}
	// A third machine does not take a place that is taken.
	qd := r.file(t, newMachine(t, "d"))
	if _, err := api.Replace(ctx, &musterv1.ReplaceRequest{Old: string(qa.Node), New: string(qd.ID), Reason: "x"}); connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "already") {
		t.Errorf("a third machine: %v", err)
	}
	// But it takes the second one's; this one was approved for elsewhere.
	if _, err := api.Approve(ctx, &musterv1.ApproveRequest{Id: string(qd.ID), Site: "elsewhere", CreateSite: true}); err != nil {
		t.Fatal(err)
	}
	if out, err = api.Replace(ctx, &musterv1.ReplaceRequest{Old: string(qb.Node), New: string(qd.ID), Reason: "x"}); err != nil || out.New.Site != "lab" {
		t.Errorf("replacing the second: %v, %v", out, err)
	}
	r.sound(t)
}

// TestReplaceADeniedNode: a stolen node was denied at once, its successor
// comes later.
func TestReplaceADeniedNode(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	a := newMachine(t, "a")
	qa, _, _ := r.enroll(t, a)
	if err := r.Deny(qa.Node); err != nil {
		t.Fatal(err)
	}
	qb := r.file(t, newMachine(t, "b"))
	out, err := r.manage().Replace(t.Context(), &musterv1.ReplaceRequest{Old: string(qa.Node), New: string(qb.ID), Reason: "stolen"})
	if err != nil || len(out.Changes) != 2 || out.New.Site != "lab" {
		t.Fatalf("%v, %v", out, err)
	}
	if n := r.node(t, qa.Node); n.ReplacedBy != qb.Node || n.State != fleet.NodeDenied {
		t.Errorf("old: %+v", n)
	}
	r.sound(t)
}
