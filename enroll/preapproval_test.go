package enroll

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

func applicant(name string) Applicant {
	e := evidence(name)
	e.Hardware = fleet.Hardware{Vendor: "ACME", Serial: e.Serial}
	return Applicant{Request: newRequest(start, Known{}, filing(e, 1, start))}
}

func preApproval(kind fleet.PreApprovalKind, name string) Candidate {
	c := Candidate{PreApproval: fleet.PreApproval{
		Meta: fleet.Meta{Tenant: "default", Name: name, Created: start}, Kind: kind, Site: "shop-7",
		NodeLabels: map[string]string{"from": name}, Limit: 1, NotAfter: start.Add(time.Hour),
	}}
	switch kind {
	case fleet.PreApproveEKs:
		c.Line = &fleet.ListedEK{EK: evidence("a").EK}
	case fleet.PreApproveClaim:
		c.ClaimHash = hashOf("code")
	case fleet.PreApproveRule:
		c.Limit, c.MinIdentity, c.MinBoot = 10, fleet.IdentityListed, fleet.BootMeasured
	}
	return c
}

// Each row spoils one thing of something that is approved as it stands.
func TestEvaluate(t *testing.T) {
	type world struct {
		a   Applicant
		c   Candidate
		now time.Time
	}
	list, claim, rule := fleet.PreApproveEKs, fleet.PreApproveClaim, fleet.PreApproveRule
	all := []fleet.PreApprovalKind{list, claim, rule}
	for name, row := range map[string]struct {
		kinds []fleet.PreApprovalKind
		edit  func(*world)
		want  string // in Tried; "" is approved
	}{
		"as it is":            {all, func(*world) {}, ""},
		"ended":               {all, func(w *world) { w.now = w.c.NotAfter }, "it ended"},
		"just before the end": {all, func(w *world) { w.now = w.c.NotAfter.Add(-1) }, ""},
		"removed":             {all, func(w *world) { w.c.Withdrawn = true }, "removed"},
		"used up":             {all, func(w *world) { w.c.Used = w.c.Limit }, "used up"},
		"another tenant":      {all, func(w *world) { w.c.Tenant = "other" }, "another tenant"},
		"unknown kind":        {all, func(w *world) { w.c.Kind = "any" }, "not known"},
		"decided before":      {all, func(w *world) { w.a.Decided = true }, "decided about this machine before"},
		"in quarantine":       {all, func(w *world) { w.a.Request.State = fleet.RequestQuarantined }, "quarantined"},
		"approved already":    {all, func(w *world) { w.a.Request.State = fleet.RequestApproved }, "only a pending one"},
		"boot unknown":        {[]fleet.PreApprovalKind{list, claim}, func(w *world) { w.a.Request.Boot = fleet.BootUnknown }, "boot unknown"},
		"unverified": {[]fleet.PreApprovalKind{list, claim}, func(w *world) {
			w.a.Request.Identity, w.a.Policy = fleet.IdentityUnverified, Policy{Lab: true, Unverified: true}
		}, "identity unverified"},
		"demands more":     {all, func(w *world) { w.c.MinBoot = fleet.BootEnforced }, "boot is measured, it wants enforced"},
		"no line":          {[]fleet.PreApprovalKind{list}, func(w *world) { w.c.Line = nil }, "does not list"},
		"another's line":   {[]fleet.PreApprovalKind{list}, func(w *world) { w.c.Line.EK = evidence("b").EK }, "does not list"},
		"used line":        {[]fleet.PreApprovalKind{list}, func(w *world) { w.c.Line.Request = "r-x" }, "was used for r-x"},
		"no code":          {[]fleet.PreApprovalKind{claim}, func(w *world) { w.a.Claim = nil }, "did not bring"},
		"no code, no hash": {[]fleet.PreApprovalKind{claim}, func(w *world) { w.a.Claim, w.c.ClaimHash = nil, nil }, "did not bring"},
		"another code":     {[]fleet.PreApprovalKind{claim}, func(w *world) { w.a.Claim = hashOf("other") }, "did not bring"},
		"identity too low": {[]fleet.PreApprovalKind{rule}, func(w *world) { w.a.Request.Identity = fleet.IdentityLab }, "identity is lab, it wants listed"},
		"identity higher":  {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.MinIdentity = fleet.IdentityLab }, ""},
		"boot too low":     {[]fleet.PreApprovalKind{rule}, func(w *world) { w.a.Request.Boot = fleet.BootUnknown }, "boot is unknown"},
		"boot higher": {[]fleet.PreApprovalKind{rule}, func(w *world) {
			e := w.a.Request.Evidence
			e.Boot = fleet.BootEnforced
			w.a.Request = newRequest(start, Known{}, filing(e, 1, start))
		}, ""},
		"demands nothing":   {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.MinIdentity = 0; w.c.Serials = []string{"S-a"} }, "demands too little"},
		"daily cap":         {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.PerDay, w.c.Recent = 3, 3 }, "within 24 hours"},
		"below daily cap":   {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.PerDay, w.c.Recent = 3, 2 }, ""},
		"vendor":            {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.Vendor = "ACME" }, ""},
		"another vendor":    {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.Vendor = "АCME" }, "vendor is"},
		"serial":            {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.Serials = []string{"S-b", "S-a"} }, ""},
		"another serial":    {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.Serials = []string{"S-b"} }, "not among its 1"},
		"look-alike serial": {[]fleet.PreApprovalKind{rule}, func(w *world) { w.c.Serials = []string{"S-а"} }, "not among its 1"},
		"empty serial": {[]fleet.PreApprovalKind{rule}, func(w *world) {
			w.c.Serials, w.a.Request.Evidence.Serial = []string{""}, ""
		}, "not among"},
		"twin": {[]fleet.PreApprovalKind{rule}, func(w *world) {
			b := applicant("b").Request
			b.Evidence.Serial = w.a.Request.Evidence.Serial
			w.a.Twins = []fleet.Request{b}
		}, "another machine claims the same"},
	} {
		for _, kind := range row.kinds {
			w := world{a: applicant("a"), c: preApproval(kind, "p"), now: start}
			w.a.Claim = hashOf("code")
			row.edit(&w)
			o := Evaluate(w.now, w.a, []Candidate{w.c})
			switch {
			case row.want == "" && (!o.Approve || o.Which != "p" || o.Site != "shop-7" || o.Labels["from"] != "p" || len(o.Tried) != 0):
				t.Errorf("%s, %s: %+v", name, kind, o)
			case row.want != "" && (o.Approve || len(o.Tried) != 1 || !strings.Contains(o.Tried[0].Why, row.want)):
				t.Errorf("%s, %s: %+v; want %q", name, kind, o, row.want)
			}
			r, f, err := PreApprove(w.now, w.a.Request, o, w.a.Policy)
			if (err == nil) != o.Approve {
				t.Errorf("%s, %s: pre-approve: %v", name, kind, err)
			}
			if err == nil && (r.State != fleet.RequestApproved || r.DecidedBy != "preapproval:p" || r.Reason != o.Reason || r.Site != "shop-7" || f.Kind != FactPreApproved) {
				t.Errorf("%s, %s: %+v, %+v", name, kind, r, f)
			}
		}
	}
}

func TestPreApprovalsAreTriedInAFixedOrder(t *testing.T) {
	a := applicant("a")
	a.Claim = hashOf("code")
	young := preApproval(fleet.PreApproveRule, "a-rule")
	young.Created = start.Add(time.Minute)
	candidates := []Candidate{
		young, preApproval(fleet.PreApproveRule, "z-rule"), preApproval(fleet.PreApproveRule, "b-rule"),
		preApproval(fleet.PreApproveClaim, "claim"), preApproval(fleet.PreApproveEKs, "list"),
	}
	for _, want := range []string{"list", "claim", "b-rule", "z-rule", "a-rule"} {
		o := Evaluate(start, a, candidates)
		slices.Reverse(candidates)
		if again := Evaluate(start, a, candidates); o.Which != want || again.Which != want || len(o.Tried) != countWithdrawn(candidates) {
			t.Fatalf("%+v, backwards %+v; want %s", o, again, want)
		}
		for i := range candidates {
			if candidates[i].Name == want {
				candidates[i].Withdrawn = true
			}
		}
	}
	o := Evaluate(start, a, candidates)
	var tried []string
	for _, x := range o.Tried {
		tried = append(tried, x.ID)
	}
	if got := strings.Join(tried, " "); o.Approve || got != "list claim b-rule z-rule a-rule" {
		t.Errorf("tried %s", got)
	}
	if o := Evaluate(start, a, nil); o.Approve || !strings.Contains(o.Reason, "no pre-approval") {
		t.Errorf("%+v", o)
	}
}

func countWithdrawn(cs []Candidate) (n int) {
	for _, c := range cs {
		if c.Withdrawn {
			n++
		}
	}
	return n
}

func TestALineSaysMoreThanItsList(t *testing.T) {
	c := preApproval(fleet.PreApproveEKs, "list")
	c.Line.Site, c.Line.Labels = "shop-8", map[string]string{"from": "line", "rack": "2"}
	o := Evaluate(start, applicant("a"), []Candidate{c})
	if o.Site != "shop-8" || o.Labels["from"] != "line" || o.Labels["rack"] != "2" {
		t.Errorf("%+v", o)
	}
	if c.NodeLabels["from"] != "list" {
		t.Error("the list itself was changed")
	}
}

// Random machines, pre-approvals and time; what was used is counted apart
// from the code under test.
func TestUsesNeverExceedWhatWasGiven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var all []Candidate
		for i := range rapid.IntRange(1, 5).Draw(t, "pre-approvals") {
			c := preApproval(rapid.SampledFrom([]fleet.PreApprovalKind{fleet.PreApproveEKs, fleet.PreApproveClaim, fleet.PreApproveRule}).Draw(t, "kind"), fmt.Sprint("p", i))
			c.NotAfter = start.Add(time.Duration(rapid.IntRange(0, 96).Draw(t, "hours")) * time.Hour)
			c.ClaimHash = hashOf(fmt.Sprint("code", i))
			if c.Kind == fleet.PreApproveRule {
				c.Limit = rapid.IntRange(1, 4).Draw(t, "limit")
				c.PerDay = rapid.IntRange(0, c.Limit).Draw(t, "per day")
				c.MinIdentity = rapid.SampledFrom([]fleet.IdentityTrust{fleet.IdentityUnverified, fleet.IdentityLab, fleet.IdentityHardware}).Draw(t, "min identity")
				c.MinBoot = rapid.SampledFrom([]fleet.BootTrust{fleet.BootUnknown, fleet.BootMeasured}).Draw(t, "min boot")
			}
			all = append(all, c)
		}
		uses := map[string][]time.Time{}
		lines := map[string]fleet.RequestID{}
		now := start
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 12).Draw(t, "later")) * time.Hour)
			a := applicant(rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "machine"))
			e := &a.Request.Evidence
			e.Identity = rapid.SampledFrom([]fleet.IdentityTrust{fleet.IdentityUnverified, fleet.IdentityLab, fleet.IdentityListed, fleet.IdentityHardware}).Draw(t, "identity")
			e.Boot = rapid.SampledFrom([]fleet.BootTrust{fleet.BootUnknown, fleet.BootMeasured, fleet.BootEnforced}).Draw(t, "boot")
			a.Request = newRequest(now, Known{}, filing(*e, 1, now))
			a.Policy = Policy{Lab: rapid.Bool().Draw(t, "lab"), UnknownBoot: rapid.Bool().Draw(t, "unknown boot"), Unverified: true}
			a.Claim = hashOf(fmt.Sprint("code", rapid.IntRange(0, 5).Draw(t, "code")))
			now := now
			candidates := slices.Clone(all)
			for i := range candidates {
				c := &candidates[i]
				for _, at := range uses[c.Name] {
					if at.After(now.Add(-UseWindow)) {
						c.Recent++
					}
				}
				c.Used = len(uses[c.Name])
				if c.Kind == fleet.PreApproveEKs {
					c.Line = &fleet.ListedEK{EK: evidence("a").EK, Request: lines[c.Name]}
				}
			}
			o := Evaluate(now, a, candidates)
			if !o.Approve {
				if len(o.Tried) != len(candidates) {
					t.Fatalf("%d tried of %d: %+v", len(o.Tried), len(candidates), o)
				}
				continue
			}
			r, _, err := PreApprove(now, a.Request, o, a.Policy)
			if err != nil {
				t.Fatalf("what was found cannot be approved: %v", err)
			}
			i := slices.IndexFunc(all, func(c Candidate) bool { return c.Name == o.Which })
			c := all[i]
			uses[c.Name] = append(uses[c.Name], now)
			recent := 0
			for _, at := range uses[c.Name] {
				if now.Sub(at) < UseWindow {
					recent++
				}
			}
			switch {
			case a.Policy.Check(r.Identity, r.Boot) != nil, r.Identity == fleet.IdentityUnverified:
				t.Fatalf("%s approved %s/%s", c.Kind, r.Identity, r.Boot)
			case r.Identity < c.MinIdentity || r.Boot < c.MinBoot:
				t.Fatalf("%s/%s, less than the rule wants", r.Identity, r.Boot)
			case !now.Before(c.NotAfter):
				t.Fatal("an expired one matched")
			case len(uses[c.Name]) > c.Limit:
				t.Fatalf("used %d times of %d", len(uses[c.Name]), c.Limit)
			case c.PerDay > 0 && recent > c.PerDay:
				t.Fatalf("used %d times within a day, cap %d", recent, c.PerDay)
			case c.Kind == fleet.PreApproveEKs && r.Node != evidence("a").EK.NodeID():
				t.Fatal("a list approved a machine that it does not list")
			case c.Kind == fleet.PreApproveClaim && !slices.Equal(a.Claim, c.ClaimHash):
				t.Fatal("a claim approved another code")
			}
			lines[c.Name] = r.ID
		}
	})
}

func TestAWarningAboutAClaimComesOnce(t *testing.T) {
	r := applicant("a").Request
	once := WarnClaim(r, "it is not known")
	if len(once.Warnings) != 1 || once.Revision != r.Revision+1 {
		t.Fatalf("%+v", once)
	}
	if twice := WarnClaim(once, "it is not known"); len(twice.Warnings) != 1 || twice.Revision != once.Revision {
		t.Errorf("%+v", twice)
	}
}
