package central

import (
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/declare"
)

func testDoc(kind, name, rest string) []byte {
	return fmt.Appendf(nil, `{"apiVersion":"muster/v1","kind":%q,"metadata":{"name":%q%s`, kind, name, rest)
}

func siteDoc(name, spec string) []byte { return testDoc("Site", name, `},"spec":`+spec+`}`) }

// applied applies documents as the API does.
func (y *yard) apply(q *musterv1.ApplyRequest, as access.Principal) *musterv1.ApplyResponse {
	y.t.Helper()
	out, err := management{Server: y.s}.Apply(access.NewContext(context.Background(), as), q)
	y.must(err)
	return out
}

func (y *yard) applies(docs ...[]byte) *musterv1.ApplyResponse {
	y.t.Helper()
	return y.apply(&musterv1.ApplyRequest{Documents: docs, Reason: "test"}, testCaller.Principal)
}

func (y *yard) tries(docs ...[]byte) *musterv1.ApplyResponse {
	y.t.Helper()
	return y.apply(&musterv1.ApplyRequest{Documents: docs, DryRun: true}, testCaller.Principal)
}

func outcomes(r *musterv1.ApplyResponse) (out []string) {
	for _, o := range r.Objects {
		out = append(out, o.Kind+" "+o.Name+" "+o.Outcome)
	}
	for _, p := range r.Problems {
		out = append(out, fmt.Sprintf("%d %s: %s", p.Document, p.Path, p.Problem))
	}
	return out
}

func (y *yard) wants(r *musterv1.ApplyResponse, want ...string) {
	y.t.Helper()
	got := outcomes(r)
	if len(got) != len(want) {
		y.t.Fatalf("%q, want %q", got, want)
	}
	for i, w := range want {
		if !strings.Contains(got[i], w) {
			y.t.Errorf("%q, want %q", got[i], w)
		}
	}
}

// TestApply: each kind is made, changed, and left alone when it is as wanted.
func TestApply(t *testing.T) {
	y := newYard(t, "1", "2")
	a := y.join("a", "shop-7")
	if _, _, err := y.s.removeNode(context.Background(), testCaller, string(a.ID), 0, "test"); err != nil {
		t.Fatal(err)
	}
	envelope := base64.StdEncoding.EncodeToString(y.version(y.key, "1", nil))
	docs := [][]byte{
		testDoc("Stack", "shop", `,"labels":{"team":"retail"}},"spec":{"title":"Tills"}}`),
		testDoc("StackVersion", "shop@1", `},"spec":{"envelope":"`+envelope+`"}}`),
		testDoc("Site", "shop-8", `,"labels":{"region":"north"}},"spec":{"title":"Eight","stack":"shop@1","policy":{"servers":1,"promote_at":1},"update":{"windows":[{"from":"02:00","minutes":60}]},"install":{"prefer":"only"}}}`),
		testDoc("PreApprovalRule", "new", `},"spec":{"site":"shop-8","min_identity":"hardware","min_boot":"enforced","limit":3}}`),
		testDoc("Assignment", string(a.ID), `,"labels":{"rack":"2"}},"spec":{"site":"shop-8","role_hint":"worker"}}`),
	}
	before := y.audited(audit.SiteCreated)
	y.wants(y.tries(docs...), "Stack shop created", "StackVersion shop@1 created", "Site shop-8 created", "PreApprovalRule new created", "Assignment "+string(a.ID)+" created")
	if y.audited(audit.SiteCreated) != before {
		t.Fatal("a dry run made a site")
	}
	y.wants(y.applies(docs...), "Stack shop created", "StackVersion shop@1 created", "Site shop-8 created", "PreApprovalRule new created", "Assignment "+string(a.ID)+" created")
	site := y.site("shop-8")
	if site.Title != "Eight" || site.Labels["region"] != "north" || site.Spec.StackRef().ID() != "shop@1" || site.Spec.Chosen().Policy.Servers != 1 || site.Spec.Chosen().Update.DrainTimeout != 300 {
		t.Errorf("%+v", site)
	}
	if c := y.charter("shop-8"); c == nil || c.Stack.ID() != "shop@1" || c.Policy.Servers != 1 {
		t.Errorf("the charter is %+v", c)
	}
	n := y.get(a.ID)
	if n.Site != "shop-8" || n.MayServe || n.Labels["rack"] != "2" || !n.Admitted() {
		t.Errorf("%+v", n)
	}
	if p := y.preApproval(t, "new"); p.Limit != 3 || p.Site != "shop-8" || !p.NotAfter.Equal(y.clock.now().Add(preApprovalLife)) {
		t.Errorf("%+v", p)
	}

	records := len(y.all())
	r := y.applies(docs...)
	for _, o := range r.Objects {
		if o.Outcome != docUnchanged || len(o.After) > 0 {
			t.Errorf("the second time: %v", o)
		}
	}
	if len(r.Objects) != len(docs) || len(y.all()) != records {
		t.Errorf("%d objects, %d records after %d", len(r.Objects), len(y.all()), records)
	}

	// A change says what was and what is.
	y.wants(y.applies(siteDoc("shop-8", `{"title":"Eighth","update":{"paused":true}}`)), "Site shop-8 changed")
	if u := y.site("shop-8").Spec.Chosen().Update; !u.Paused || len(u.Windows) != 1 {
		t.Errorf("%+v", u)
	}
	r = y.tries(siteDoc("shop-8", `{"policy":null,"install":null,"stack":""}`))
	if len(r.Objects) != 1 || !strings.Contains(string(r.Objects[0].Before), `"servers":1`) || !strings.Contains(string(r.Objects[0].After), `"servers":3`) || !strings.Contains(string(r.Objects[0].After), `"install":null`) {
		t.Errorf("%v", r)
	}
	y.wants(y.applies(
		testDoc("Stack", "shop", `,"labels":{}},"spec":{"title":"T"}}`),
		testDoc("PreApprovalRule", "new", `},"spec":{"limit":5,"vendor":"Contoso"}}`),
		testDoc("Assignment", string(a.ID), `},"spec":{"site":"shop-8","role_hint":"server"}}`),
	), "Stack shop changed", "PreApprovalRule new changed", "Assignment "+string(a.ID)+" changed")
	if p := y.preApproval(t, "new"); p.Limit != 5 || p.Vendor != "Contoso" || p.MinBoot != fleet.BootEnforced {
		t.Errorf("%+v", p)
	}
	if n := y.get(a.ID); !n.MayServe || n.Labels["rack"] != "2" {
		t.Errorf("%+v", n)
	}
	y.sound(t)
}

func (y *yard) all() []fleet.AuditRecord {
	y.t.Helper()
	all, err := y.records()
	y.must(err)
	return all
}

// TestApplyFindsAll: all problems of all documents in one answer, each where it
// is, and nothing is changed.
func TestApplyFindsAll(t *testing.T) {
	y := newYard(t, "1")
	a := y.join("a", "shop-7")
	foreign := newRelease(t)
	records := len(y.all())
	docs := [][]byte{
		siteDoc("shop-1", `{"titel":"x","policy":{"servers":2}}`),
		siteDoc("shop-2", `{"policy":{"servers":2},"birth":{"cluster_cidr":"x"}}`),
		siteDoc("shop-3", `{"images":["none@1"]}`),
		siteDoc("shop-4", `{"stack":"shop@9"}`),
		testDoc("StackVersion", "shop@1", `},"spec":{"envelope":"`+base64.StdEncoding.EncodeToString(y.version(foreign, "1", nil))+`"}}`),
		testDoc("StackVersion", "shop@2", `},"spec":{"envelope":"`+base64.StdEncoding.EncodeToString(y.version(y.key, "1", nil))+`"}}`),
		testDoc("StackVersion", "shop@3", `},"spec":{"file":"x"}}`),
		testDoc("Assignment", string(a.ID), `},"spec":{"site":"shop-9"}}`),
		testDoc("Assignment", "n-aaaaaaaaaaaaaaaaaaaaaaaa", `},"spec":{"site":"shop-7"}}`),
		testDoc("PreApprovalRule", "r1", `},"spec":{"site":"shop-9","min_identity":"hardware","min_boot":"enforced","limit":1}}`),
		testDoc("PreApprovalRule", "r2", `},"spec":{"site":"shop-7","min_identity":"unverified","min_boot":"enforced","limit":1}}`),
		testDoc("PreApprovalRule", "r3", `},"spec":{"min_identity":"hardware","min_boot":"enforced","limit":1}}`),
		testDoc("PreApprovalRule", "r4", `},"spec":{"site":"shop-7","min_identity":"hardware","min_boot":"enforced","limit":1,"not_after":"2099-01-01T00:00:00Z"}}`),
		testDoc("Site", "shop-7", `,"generation":99},"spec":{"title":"x"}}`),
		testDoc("Site", "shop-5", `,"generation":3},"spec":{"title":"x"}}`),
		siteDoc("shop-6", `{"title":"good"}`),
	}
	for _, r := range []*musterv1.ApplyResponse{y.tries(docs...), y.apply(&musterv1.ApplyRequest{Documents: docs[1:2]}, testCaller.Principal)} {
		if len(r.Problems) < 2 {
			t.Errorf("%q", outcomes(r))
		}
	}
	r := y.tries(docs...)
	got := outcomes(r)
	for _, w := range []string{
		"Site shop-6 created", "0 spec.titel: unknown field; did you mean title?", "1 spec.policy.servers: servers is 2", "1 spec.birth.cluster_cidr: ", "2 : image \"none@1\"",
		"3 spec.stack: there is no stack version shop@9", "4 : no release key", "5 metadata.name: what was signed is shop@1", "6 spec.file: ", "7 : node " + string(a.ID) + " belongs to site shop-7",
		"8 : there is no node", "9 : there is no site", "10 ", "11 spec: site is missing", "12 spec.not_after: ", "13 metadata.generation: Site shop-7 is at generation 1, and the document was made from 99", "14 metadata.generation: there is no Site shop-5",
	} {
		if !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, w) }) {
			t.Errorf("no %q in\n%s", w, strings.Join(got, "\n"))
		}
	}
	for _, p := range r.Problems {
		if p.Conflict != (p.Document == 13) {
			t.Errorf("%v: conflict", p)
		}
	}
	if len(y.all()) != records {
		t.Errorf("%d records after %d", len(y.all()), records)
	}
	// The same with all of it wrong by itself, not as a dry run.
	if r := y.applies(docs[0], docs[15]); len(r.Problems) != 1 || len(r.Objects) != 0 {
		t.Errorf("%q", outcomes(r))
	}
	// Up to the first that cannot be.
	y.wants(y.applies(docs[15], docs[3], siteDoc("shop-10", `{}`)), "Site shop-6 created", "spec.stack: there is no")
	if len(y.all()) <= records {
		t.Error("nothing was applied")
	}
}

// TestApplyConflict: a document that was made from an older state changes
// nothing, and one that says what is there already is right.
func TestApplyConflict(t *testing.T) {
	y := newYard(t)
	y.wants(y.applies(siteDoc("shop-8", `{"title":"a"}`)), "created")
	from := y.site("shop-8").Generation
	mine := testDoc("Site", "shop-8", fmt.Sprintf(`,"generation":%d},"spec":{"title":"mine"}}`, from))
	m := management{Server: y.s}
	if _, err := m.LabelObject(asTest(context.Background()), &musterv1.LabelObjectRequest{Kind: "site", Name: "shop-8", Set: map[string]string{"a": "b"}}); err != nil {
		t.Fatal(err)
	}
	y.wants(y.applies(mine), "somebody has changed it since")
	y.wants(y.applies(testDoc("Site", "shop-8", fmt.Sprintf(`,"generation":%d},"spec":{"title":"a"}}`, from))), "unchanged")
	y.wants(y.applies(testDoc("Site", "shop-8", fmt.Sprintf(`,"generation":%d},"spec":{"title":"mine"}}`, from+1))), "changed")
	if s := y.site("shop-8"); s.Title != "mine" || s.Labels["a"] != "b" || s.Generation != from+2 {
		t.Errorf("%+v", s)
	}
}

// TestApplyRefuses: what the other ways refuse, this one does, too.
func TestApplyRefuses(t *testing.T) {
	y := newYard(t, "1", "2")
	y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	y.must(y.publish(y.version(y.key, "2", func(v *fleet.StackVersion) { v.EtcdMinor = "3.10" })))
	y.wants(y.applies(siteDoc("shop-7", `{"stack":"shop@1"}`)), "changed")
	y.wants(y.applies(siteDoc("shop-7", `{"stack":"shop@2"}`)), "spec.stack: the step from shop@1 to shop@2")
	y.wants(y.apply(&musterv1.ApplyRequest{Documents: [][]byte{siteDoc("shop-7", `{"stack":"shop@2"}`)}, AcceptNoReturn: true}, testCaller.Principal), "changed")
	site := y.site("shop-7")
	site.Status.ClusterUID, site.Status.Founder = "u", "n-aaaaaaaaaaaaaaaaaaaaaaaa"
	y.update(func(tx store.Tx) error { _, err := tx.PutSite(site); return err })
	y.wants(y.applies(siteDoc("shop-7", `{"birth":{"flannel_backend":"vxlan"}}`)), "cannot change any more")
	y.wants(y.applies(siteDoc("shop-7", `{"policy":{"promote_after_s":5}}`)), "changed")
	// A version that was published never changes; a rule that was removed stays so.
	changed := base64.StdEncoding.EncodeToString(y.version(y.key, "1", func(v *fleet.StackVersion) { v.CNI = "flannel" }))
	y.wants(y.applies(testDoc("StackVersion", "shop@1", `},"spec":{"envelope":"`+changed+`"}}`)), "never changes")
	rule := testDoc("PreApprovalRule", "r", `},"spec":{"site":"shop-7","min_identity":"hardware","min_boot":"enforced","limit":1}}`)
	y.wants(y.applies(rule), "created")
	if _, err := y.s.removePreApproval(context.Background(), testCaller, "r", "test"); err != nil {
		t.Fatal(err)
	}
	y.wants(y.applies(rule), "was removed, and stays so")
}

// TestApplyInPart: who may change a part of the tenant applies to that part,
// and learns nothing of the rest.
func TestApplyInPart(t *testing.T) {
	y := newYard(t, "1")
	north, err := fleet.ParseSelector("region=north")
	y.must(err)
	limited := access.Principal{Name: "n", Tenant: DefaultTenant, Bindings: []access.Binding{{Tenant: DefaultTenant, Role: access.Operator, Sites: north}}}
	viewer := access.Principal{Name: "v", Tenant: DefaultTenant, Bindings: []access.Binding{{Tenant: DefaultTenant, Role: access.Viewer}}}
	foreign := access.Principal{Name: "f", Tenant: "other", Bindings: []access.Binding{{Tenant: "other", Role: access.Operator}}}
	y.update(func(tx store.Tx) error {
		_, err := tx.PutTenant(fleet.Tenant{Meta: fleet.Meta{Tenant: "other", Name: "other", Generation: 1}})
		return err
	})
	at := func(region string) string { return `,"labels":{"region":"` + region + `"}},"spec":{"title":"x"}}` }
	one := func(as access.Principal, doc []byte) *musterv1.ApplyResponse {
		return y.apply(&musterv1.ApplyRequest{Documents: [][]byte{doc}}, as)
	}
	y.wants(one(limited, testDoc("Site", "n-1", at("north"))), "created")
	y.wants(one(limited, testDoc("Site", "s-1", at("south"))), "outside of your part")
	y.wants(one(limited, testDoc("Site", "n-1", at("south"))), "outside of your part")
	y.wants(y.applies(testDoc("Site", "s-2", `,"labels":{"region":"south"}},"spec":{"title":"secret"}}`)), "created")
	r := one(limited, testDoc("Site", "s-2", at("north")))
	if y.wants(r, "there is no site"); strings.Contains(fmt.Sprint(r), "secret") {
		t.Errorf("%v", r)
	}
	y.wants(one(limited, testDoc("Stack", "shop", `},"spec":{}}`)), "operator")
	y.wants(one(limited, testDoc("StackVersion", "shop@1", `},"spec":{"envelope":"`+base64.StdEncoding.EncodeToString(y.version(y.key, "1", nil))+`"}}`)), "operator")
	y.wants(one(limited, testDoc("PreApprovalRule", "r", `},"spec":{"site":"s-2","min_identity":"hardware","min_boot":"enforced","limit":1}}`)), "there is no site")
	y.wants(one(limited, testDoc("PreApprovalRule", "r", `},"spec":{"site":"n-1","min_identity":"hardware","min_boot":"enforced","limit":1}}`)), "created")
	y.wants(one(viewer, testDoc("Site", "v-1", at("north"))), "it takes operator")
	// The same name in another tenant is another site.
	y.wants(one(foreign, siteDoc("n-1", `{"title":"theirs"}`)), "created")
	if y.site("n-1").Title != "x" {
		t.Error("another tenant changed it")
	}
	m := management{Server: y.s}
	export := func(as access.Principal, kind string) string {
		out, err := m.Export(access.NewContext(context.Background(), as), &musterv1.ExportRequest{Kind: kind})
		if err != nil {
			return err.Error()
		}
		var b strings.Builder
		for _, d := range out.Documents {
			b.Write(d)
		}
		return b.String()
	}
	if got := export(limited, "Site"); !strings.Contains(got, "n-1") || strings.Contains(got, "s-2") {
		t.Errorf("%s", got)
	}
	if got := export(foreign, "Site"); !strings.Contains(got, "theirs") || strings.Contains(got, "s-2") {
		t.Errorf("%s", got)
	}
}

// TestExport: what is written changes nothing when it is applied.
func TestExport(t *testing.T) {
	y := newYard(t, "1")
	a := y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	y.wants(y.applies(
		testDoc("Site", "shop-8", `,"labels":{"a":"b"}},"spec":{"stack":"shop@1","policy":{"servers":1,"promote_at":1},"install":{"prefer":"only"},"delegates":[]}}`),
		testDoc("PreApprovalRule", "r", `},"spec":{"site":"shop-8","min_identity":"hardware","min_boot":"enforced","limit":1}}`)), "created", "created")
	m := management{Server: y.s}
	var docs [][]byte
	for _, kind := range append([]string{""}, "StackVersion", "Assignment") {
		out, err := m.Export(asTest(context.Background()), &musterv1.ExportRequest{Kind: kind})
		if err != nil || len(out.Documents) == 0 || out.More {
			t.Fatalf("%s: %v, %v", kind, out, err)
		}
		docs = append(docs, out.Documents...)
	}
	y.clock.set(y.clock.now().Add(time.Hour))
	r := y.applies(docs...)
	if len(r.Objects) != 6 || len(r.Problems) > 0 {
		t.Fatalf("%q", outcomes(r))
	}
	for _, o := range r.Objects {
		if o.Outcome != docUnchanged {
			t.Errorf("%s %s %s: %s", o.Kind, o.Name, o.Outcome, o.After)
		}
	}
	for kind, name := range map[string]string{"site": "shop-8", "stack": "shop", "stack-version": "shop@1", "assignment": string(a.ID), "preapprovalrule": "r"} {
		out, err := m.Export(asTest(context.Background()), &musterv1.ExportRequest{Kind: kind, Name: name})
		if err != nil || len(out.Documents) != 1 {
			t.Errorf("%s: %v, %v", kind, out, err)
		}
		if out, err := m.Export(asTest(context.Background()), &musterv1.ExportRequest{Kind: kind, Name: "none"}); err == nil {
			t.Errorf("%s none: %v", kind, out)
		}
	}
	if _, err := m.Export(asTest(context.Background()), &musterv1.ExportRequest{Kind: "moon"}); err == nil {
		t.Error("moon")
	}
	// By pages.
	for i := range exportPage + 5 {
		y.update(func(tx store.Tx) error {
			_, err := tx.PutSite(fleet.Site{Meta: fleet.Meta{Tenant: DefaultTenant, Name: fmt.Sprintf("x-%03d", i), Generation: 1}})
			return err
		})
	}
	q := &musterv1.ExportRequest{Kind: "site"}
	seen := 0
	for {
		out, err := m.Export(asTest(context.Background()), q)
		y.must(err)
		seen += len(out.Documents)
		if !out.More {
			break
		}
		d, bad := declare.Parse(out.Documents[len(out.Documents)-1])
		if len(bad) > 0 {
			t.Fatal(bad)
		}
		q.After = d.Metadata.Name
	}
	if seen != exportPage+5+2 {
		t.Errorf("%d sites", seen)
	}
}

// TestApplyWithABadOneInTheMiddle: a document that fails after its first change
// is undone as a whole, and those behind it are tried without it.
func TestApplyWithABadOneInTheMiddle(t *testing.T) {
	y := newYard(t)
	// The name is wrong, which is found when the version is published.
	docs := [][]byte{siteDoc("shop-1", `{}`)}
	for i := range 5 {
		v := y.version(y.key, fmt.Sprint(i), nil)
		docs = append(docs, testDoc("StackVersion", fmt.Sprintf("shop@%d", i+50), `},"spec":{"envelope":"`+base64.StdEncoding.EncodeToString(v)+`"}}`))
	}
	docs = append(docs, testDoc("Stack", "shop", `},"spec":{"title":"made by its own document"}}`))
	r := y.tries(docs...)
	y.wants(r, "Site shop-1 created", "Stack shop created", "what was signed is shop@0", "what was signed is shop@1", "shop@2", "shop@3", "shop@4")
	if len(y.all()) > 0 && y.audited(audit.StackCreated) > 0 {
		t.Error("something stayed")
	}
	// Too many of them: the rest is looked for later, and that is said.
	for i := range maxRestarts + 2 {
		v := y.version(y.key, fmt.Sprint(i), nil)
		docs = append(docs, testDoc("StackVersion", fmt.Sprintf("shop@%d", i+100), `},"spec":{"envelope":"`+base64.StdEncoding.EncodeToString(v)+`"}}`))
	}
	if r := y.tries(docs...); !r.MoreProblems {
		t.Errorf("%q", outcomes(r))
	}
}

func (y *yard) deletes(kind, name string, change func(*musterv1.DeleteObjectRequest)) ([]string, error) {
	q := &musterv1.DeleteObjectRequest{Kind: kind, Name: name, Reason: "test"}
	if change != nil {
		change(q)
	}
	out, err := management{Server: y.s}.DeleteObject(asTest(context.Background()), q)
	return out.GetNotes(), err
}

// TestDelete: what is needed stays, and the refusal says by whom.
func TestDelete(t *testing.T) {
	y := newYard(t, "1", "2")
	a := y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	y.must(y.publish(y.version(y.key, "2", nil)))
	if _, err := y.assign("shop-7", "1", nil); err != nil {
		t.Fatal(err)
	}
	y.wants(y.applies(testDoc("PreApprovalRule", "r", `},"spec":{"site":"shop-7","min_identity":"hardware","min_boot":"enforced","limit":1}}`)), "created")
	list := preApprovalOf(testCaller, "list", "", nil)
	list.NotAfter = y.clock.now().Add(time.Hour)
	if out, err := y.s.importList(context.Background(), testCaller, listImport{PreApproval: list, csv: []byte("ek_sha256,site\n" + strings.Repeat("ab", 32) + ",shop-7\n")}); err != nil || len(out.list.Problems) > 0 {
		t.Fatal(out.list.Problems, err)
	}
	refused := func(kind, name string, whys ...string) {
		t.Helper()
		_, err := y.deletes(kind, name, nil)
		for _, w := range whys {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s %s: %v, want %q", kind, name, err, w)
			}
		}
	}
	refused("site", "shop-7", "1 nodes belong to it", string(a.ID), "pre-approvals bring machines there: list, r", "muster remove NODE")
	refused("site", "nowhere", "no site")
	refused("stack", "shop", "1 sites shall run it: shop-7")
	refused("stack-version", "shop@1", "1 sites shall run it")
	refused("stack-version", "shop@9", "no stack version")
	refused("stack-version", "shop", "STACK@VERSION")
	refused("stack", "none", "no stack")
	refused("node", string(a.ID), "muster remove")
	refused("planet", "x", "none of site")
	if _, err := y.deletes("stack-version", "shop@2", nil); err != nil {
		t.Error(err)
	}
	refused("stack-version", "shop@2", "no stack version")
	for _, name := range []string{"r", "list"} {
		if _, err := y.deletes("pre-approval", name, nil); err != nil {
			t.Error(err)
		}
	}
	refused("pre-approval", "r", "removed already")
	if _, _, err := y.s.removeNode(context.Background(), testCaller, string(a.ID), 0, "test"); err != nil {
		t.Fatal(err)
	}
	y.update(func(tx store.Tx) error {
		site, err := tx.Site(DefaultTenant, "shop-7")
		if err != nil {
			return err
		}
		return tx.AddEscrow(fleet.EscrowBlob{Tenant: DefaultTenant, ID: "s-1", Site: site.Name, Node: a.ID, Size: 1, Stored: y.clock.now()})
	})
	refused("site", "shop-7", "1 sealed snapshots", "--with-snapshots")
	if _, err := y.deletes("site", "shop-7", func(q *musterv1.DeleteObjectRequest) { q.WithEscrow, q.Generation = true, 99 }); err == nil {
		t.Error("another generation")
	}
	notes, err := y.deletes("site", "shop-7", func(q *musterv1.DeleteObjectRequest) { q.WithEscrow, q.DryRun = true, true })
	if err != nil || len(notes) != 1 || y.site("shop-7").Name == "" {
		t.Errorf("a dry run: %q, %v", notes, err)
	}
	if _, err := y.deletes("site", "shop-7", func(q *musterv1.DeleteObjectRequest) { q.WithEscrow = true }); err != nil {
		t.Fatal(err)
	}
	refused("site", "shop-7", "no site")
	if _, err := y.deletes("stack", "shop", nil); err != nil {
		t.Error(err)
	}
	for _, kind := range []audit.Kind{audit.SiteDeleted, audit.StackDeleted, audit.StackVersionGone} {
		if n := y.audited(kind); n != 1 {
			t.Errorf("%d records of %s", n, kind)
		}
	}
	// A site of the same name begins anew, and its nodes hear of it.
	b := y.join("b", "shop-7")
	if p := y.pull(b); p.charter == nil || p.admissions[b.ID].Site != "shop-7" {
		t.Errorf("%+v", p)
	}
	if e := y.s.sites.get(DefaultTenant, "shop-7"); e.documents != y.site("shop-7").Ledger.Documents {
		t.Errorf("the index says %v", e)
	}
	y.sound(t)
}

func TestDeleteInPart(t *testing.T) {
	y := newYard(t)
	y.wants(y.applies(siteDoc("shop-8", `{}`), testDoc("Stack", "shop", `},"spec":{}}`)), "created", "created")
	for name, as := range map[string]access.Principal{
		"another site":   {Name: "n", Tenant: DefaultTenant, Bindings: []access.Binding{{Tenant: DefaultTenant, Role: access.Operator, Sites: mustSelector(t, "muster/site=shop-9")}}},
		"a viewer":       {Name: "v", Tenant: DefaultTenant, Bindings: []access.Binding{{Tenant: DefaultTenant, Role: access.Viewer}}},
		"another tenant": {Name: "f", Tenant: "other", Bindings: []access.Binding{{Tenant: "other", Role: access.Admin}}},
	} {
		for kind, object := range map[string]string{"site": "shop-8", "stack": "shop"} {
			if out, err := (management{Server: y.s}).DeleteObject(access.NewContext(context.Background(), as), &musterv1.DeleteObjectRequest{Kind: kind, Name: object}); err == nil {
				t.Errorf("%s deleted the %s: %v", name, kind, out)
			}
		}
	}
	if y.site("shop-8").Name == "" || y.audited(audit.SiteDeleted)+y.audited(audit.StackDeleted) > 0 {
		t.Error("it is gone")
	}
}

func mustSelector(t *testing.T, s string) fleet.Selector {
	t.Helper()
	v, err := fleet.ParseSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
