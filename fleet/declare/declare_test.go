package declare

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
)

func doc(kind, rest string) string {
	return fmt.Sprintf(`{"apiVersion":"muster/v1","kind":%q,%s}`, kind, rest)
}

func site(spec string) string { return doc("Site", `"metadata":{"name":"shop-7"},"spec":`+spec) }

// TestProblems: each is found with its path, and all of a document at once.
func TestProblems(t *testing.T) {
	for name, row := range map[string]struct {
		in   string
		want []string
	}{
		"good":            {site(`{"title":"x"}`), nil},
		"no spec":         {doc("Site", `"metadata":{"name":"a"}`), nil},
		"empty spec":      {site(`null`), nil},
		"not JSON":        {`{`, []string{"ends too early"}},
		"a list":          {`[]`, []string{"want an object"}},
		"data after":      {`{} {}`, []string{"after the end"}},
		"twice":           {site(`{"title":"a","title":"b"}`), []string{`"title" is there twice`}},
		"empty":           {`{}`, []string{"apiVersion is missing", "kind is missing", "metadata is missing"}},
		"another version": {`{"apiVersion":"muster/v2","kind":"Site","metadata":{"name":"a"}}`, []string{`apiVersion: is "muster/v2"`}},
		"another kind":    {doc("Sites", `"metadata":{"name":"a"}`), []string{"did you mean Site?"}},
		"unknown fields": {
			doc("Site", `"metadata":{"name":"a","lables":{}},"spec":{"titel":"x","policy":{"promoteAt":3},"xyzzy":1},"status":{}`),
			[]string{"status: unknown field", "metadata.lables: unknown field; did you mean labels?", "spec.titel: unknown field; did you mean title?", "spec.policy.promoteAt: unknown field; did you mean promote_at?", "spec.xyzzy: unknown field; there are title"},
		},
		"shapes": {
			site(`{"title":7,"policy":[],"any_boot":"yes","birth":{"max_learners":1.5},"images":"x","update":{"windows":[{"days":["sat"],"from":2}]}}`),
			[]string{"spec.title: want text, not 7: put it in quotes", "spec.policy: want an object", "spec.any_boot: want true or false", "spec.birth.max_learners: 1.5 is no whole number", "spec.images: want a list", "spec.update.windows[0].from: want text, not 2: put it in quotes"},
		},
		"name":            {doc("Site", `"metadata":{"name":"Shop 7"}`), []string{"metadata.name: site name"}},
		"pool":            {doc("Site", `"metadata":{"name":"pool"}`), []string{"stands for nodes without a site"}},
		"no name":         {doc("Site", `"metadata":{}`), []string{"name is missing"}},
		"labels":          {doc("Site", `"metadata":{"name":"a","labels":{"a b":"c","d":true}}`), []string{`metadata.labels.d: want text, not true: put it in quotes`, `label key "a b"`}},
		"stack of a site": {site(`{"stack":"shop"}`), []string{"spec.stack: \"shop\": want STACK@VERSION"}},
		"version":         {doc("StackVersion", `"metadata":{"name":"shop"},"spec":{}`), []string{"want STACK@VERSION", "want one of file"}},
		"both":            {doc("StackVersion", `"metadata":{"name":"shop@1"},"spec":{"file":"x","envelope":"eA=="}`), []string{"want one of file"}},
		"base64":          {doc("StackVersion", `"metadata":{"name":"shop@1"},"spec":{"envelope":"!"}`), []string{"base64"}},
		"node":            {doc("Assignment", `"metadata":{"name":"amber"},"spec":{"role_hint":"boss"}`), []string{"metadata.name: node ID", "site is missing", "neither server nor worker"}},
		"trust":           {doc("PreApprovalRule", `"metadata":{"name":"r"},"spec":{"min_identity":"good","not_after":"soon"}`), []string{"spec.min_identity: ", "spec.not_after: "}},
		"deep":            {strings.Repeat("[", 100) + strings.Repeat("]", 100), []string{"deeper than"}},
		"many":            {"[" + strings.Repeat("1,", maxNodes) + "1]", []string{"more than 100000 values"}},
		"large":           {`"` + strings.Repeat("x", MaxDocument) + `"`, []string{"bytes, at most"}},
	} {
		t.Run(name, func(t *testing.T) {
			d, problems := Parse([]byte(row.in))
			var got []string
			for _, p := range problems {
				got = append(got, p.String())
			}
			for _, w := range row.want {
				if !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, w) }) {
					t.Errorf("no problem %q in %q", w, got)
				}
			}
			if len(got) != len(row.want) {
				t.Errorf("%d problems, want %d: %q", len(got), len(row.want), got)
			}
			if len(row.want) == 0 && d == nil {
				t.Error("no document")
			}
		})
	}
}

// TestOver: what is not named stays, null is the default, lists and labels are
// replaced as a whole.
func TestOver(t *testing.T) {
	there := fleet.Site{Meta: fleet.Meta{Name: "shop-7"}, Title: "old"}
	set := fleet.DefaultSettings()
	set.Policy.PromoteAfter, set.Images = 5, []string{"a@1", "b@1"}
	u := fleet.DefaultUpdate()
	u.RateKbit = 9
	set.Update = &u
	there.Spec.Settings = &set
	defaults := OfSite(fleet.Site{})
	over := func(spec string) SiteSpec {
		t.Helper()
		d, problems := Parse([]byte(site(spec)))
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		s := OfSite(there)
		if p := d.Over(&s, &defaults); len(p) > 0 {
			t.Fatal(p)
		}
		return s
	}
	for _, nothing := range []string{`{}`, `null`} {
		if got := over(nothing); !reflect.DeepEqual(got, OfSite(there)) {
			t.Errorf("%s changed %+v", nothing, got)
		}
	}
	s := over(`{"policy":{"servers":1},"images":["c@1"],"update":{"paused":true},"install":{"prefer":"only"}}`)
	if s.Policy.Servers != 1 || s.Policy.PromoteAfter != 5 || s.Policy.PromoteAt != 3 || !slices.Equal(s.Images, []string{"c@1"}) || !s.Update.Paused || s.Update.RateKbit != 9 || s.Install.Prefer != "only" || s.Title != "old" {
		t.Errorf("%+v", s)
	}
	if u.Paused {
		t.Error("what is there was changed behind its owner's back")
	}
	s = over(`{"policy":{"promote_after_s":null},"images":null,"update":null,"title":null}`)
	if s.Policy.PromoteAfter != 60 || s.Images != nil || s.Update != nil || s.Title != "" {
		t.Errorf("null: %+v", s)
	}
	// A policy that was not there begins with the default one.
	there.Spec.Settings.Update = nil
	if s = over(`{"update":{"paused":true}}`); s.Update.DrainTimeout != 300 {
		t.Errorf("%+v", s.Update)
	}
}

// TestRoundTrip: what is written says the same when it is read.
func TestRoundTrip(t *testing.T) {
	set := fleet.DefaultSettings()
	set.Images, set.Delegates, set.Install = []string{"a@1"}, [][]byte{{1, 2}}, &fleet.DiskRule{Prefer: "only"}
	v := fleet.Site{Meta: fleet.Meta{Name: "shop-7"}, Title: "x", Spec: fleet.SiteSpec{Stack: "shop", Version: "1", Settings: &set}}
	b, err := Write(Site, Metadata{Name: v.Name, Labels: map[string]string{"a": "b"}}, OfSite(v))
	if err != nil {
		t.Fatal(err)
	}
	d, problems := Parse(b)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	var again SiteSpec
	if p := d.Over(&again, new(SiteSpec)); len(p) > 0 || !reflect.DeepEqual(again, OfSite(v)) || !d.HasLabels() || d.Metadata.Labels["a"] != "b" {
		t.Errorf("%v\n%+v\n%+v", p, again, OfSite(v))
	}
	if !reflect.DeepEqual(again.Settings(), set) {
		t.Errorf("%+v", again.Settings())
	}
	rule := fleet.PreApproval{Kind: fleet.PreApproveRule, Site: "s", Limit: 3, MinIdentity: fleet.IdentityHardware, MinBoot: fleet.BootEnforced}
	if got := OfRule(rule).Rule(fleet.PreApproval{}); !reflect.DeepEqual(got, rule) {
		t.Errorf("%+v", got)
	}
}

// TestFind: problems of whole objects find their fields.
func TestFind(t *testing.T) {
	d, problems := Parse([]byte(site(`{"policy":{"servers":2,"promote_at":0},"birth":{"cluster_cidr":"x"}}`)))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	spec := OfSite(fleet.Site{})
	d.Over(&spec, &spec)
	set := spec.Settings()
	var got []string
	for _, p := range d.Find(set.Validate()) {
		got = append(got, p.Path)
	}
	if !slices.Equal(got, []string{"spec.policy.servers", "spec.policy.promote_at", "spec.birth.cluster_cidr"}) {
		t.Error(got)
	}
}

func TestPaths(t *testing.T) {
	for path, want := range map[string]string{
		"": "", "spec": "", "spec.a": "spec", "spec.a[3]": "spec.a", "spec.a[3].b": "spec.a[3]", `metadata.labels["a.b/c"]`: "metadata.labels",
	} {
		if got := Parent(path); got != want {
			t.Errorf("Parent(%q) = %q", path, got)
		}
	}
	if got := Field("metadata.labels", "a.b/c"); got != `metadata.labels["a.b/c"]` {
		t.Error(got)
	}
}

func TestKindOf(t *testing.T) {
	for word, want := range map[string]Kind{"site": Site, "sites": Site, "Site": Site, "stack-version": StackVersion, "StackVersion": StackVersion, "preapprovalrule": PreApprovalRule} {
		if got, err := KindOf(word); err != nil || got != want {
			t.Errorf("%s: %s, %v", word, got, err)
		}
	}
	if _, err := KindOf("moon"); err == nil {
		t.Error("moon")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(site(`{"policy":{"servers":1},"update":{"windows":[{"from":"02:00","minutes":5}]}}`)))
	f.Add([]byte(doc("Assignment", `"metadata":{"name":"n-aaaaaaaaaaaaaaaaaaaaaaaa"},"spec":{"site":"s"}`)))
	f.Add([]byte(doc("PreApprovalRule", `"metadata":{"name":"r"},"spec":{"min_identity":"hardware","not_after":"2027-01-01T00:00:00Z"}`)))
	f.Add([]byte(doc("StackVersion", `"metadata":{"name":"a@1"},"spec":{"envelope":"e30="}`)))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, problems := Parse(b)
		if d == nil && len(problems) == 0 {
			t.Fatal("nothing, and nothing is wrong")
		}
		if len(problems) > 0 {
			return
		}
		// What was taken is written and taken again with the same meaning.
		spec := specs[d.Kind]()
		if p := d.Over(spec, specs[d.Kind]()); len(p) > 0 {
			t.Fatal(p)
		}
		again, err := Write(d.Kind, d.Metadata, spec)
		if err != nil {
			return // a year that JSON cannot say
		}
		e, problems := Parse(again)
		if len(problems) > 0 {
			if d.Kind == PreApprovalRule || d.Kind == StackVersion {
				return // zero trust is written, and is no trust that a rule takes
			}
			t.Fatalf("%s\n%s\n%v", b, again, problems)
		}
		x, y := d.Metadata, e.Metadata
		if p, q := mustJSON(x), mustJSON(y); p != q {
			t.Fatalf("%s became %s", p, q)
		}
	})
}

func mustJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}
