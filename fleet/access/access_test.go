package access

import (
	"encoding/json"
	"testing"

	"github.com/muster-edge/muster/fleet"
)

func selector(t testing.TB, s string) fleet.Selector {
	t.Helper()
	v, err := fleet.ParseSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func north() Object {
	return Object{Kind: Node, Tenant: "one", Site: "shop-7", Labels: map[string]string{"region": "north", fleet.SiteLabel: "shop-7"}}
}

func TestAllow(t *testing.T) {
	atNorth := func(r Role) Principal {
		return Principal{Name: "n", Tenant: "one", Bindings: []Binding{{Tenant: "one", Role: r, Sites: selector(t, "region=north")}}}
	}
	atSouth := func(r Role) Principal {
		return Principal{Name: "s", Tenant: "one", Bindings: []Binding{{Tenant: "one", Role: r, Sites: selector(t, "region=south")}}}
	}
	whole := func(tenant string, r Role) Principal {
		return Principal{Name: "w", Tenant: tenant, Bindings: []Binding{{Tenant: tenant, Role: r}}}
	}
	centre := func(r Role) Principal {
		return Principal{Name: "c", Tenant: "one", Bindings: []Binding{{Tenant: AllTenants, Role: r}}}
	}
	both := atSouth(Operator)
	both.Bindings = append(both.Bindings, Binding{Tenant: "one", Role: Viewer})
	token := whole("one", Admin)
	token.Bounded, token.Owner = true, []Binding{{Tenant: "one", Role: Approver, Sites: selector(t, "region=north")}}
	orphan := whole("one", Admin)
	orphan.Bounded = true
	of := func(k Kind) Object { return Object{Kind: k, Tenant: "one"} }
	node, foreign := north(), north()
	foreign.Tenant = "two"
	request := of(Request)
	into := request
	into.Site, into.Labels = node.Site, node.Labels
	for _, c := range []struct {
		name string
		p    Principal
		v    Verb
		o    Object
		want Answer
	}{
		{"nobody", Principal{Tenant: "one"}, Read, node, Hidden},
		{"viewer reads", whole("one", Viewer), Read, node, Allowed},
		{"viewer changes", whole("one", Viewer), Change, node, Forbidden},
		{"operator changes", whole("one", Operator), Change, node, Allowed},
		{"foreign object", whole("one", Admin), Read, foreign, Hidden},
		{"foreign object, changed", whole("one", Admin), Change, foreign, Hidden},
		{"centre, other tenant than the call's", centre(Admin), Read, foreign, Hidden},
		{"binding of another tenant", Principal{Tenant: "one", Bindings: []Binding{{Tenant: "two", Role: Admin}}}, Read, node, Hidden},
		{"centre", centre(Admin), Change, node, Allowed},
		{"limited, own site", atNorth(Operator), Change, node, Allowed},
		{"limited, other site", atSouth(Operator), Change, node, Hidden},
		{"limited, other site, read", atSouth(Operator), Read, node, Hidden},
		{"viewer there, operator elsewhere", both, Change, node, Forbidden},
		{"viewer there, operator elsewhere, read", both, Read, node, Allowed},
		{"limited viewer and the queue", atNorth(Viewer), Read, request, Hidden},
		{"limited approver and the queue", atNorth(Approver), Read, request, Allowed},
		{"limited approver, approve into own site", atNorth(Approver), Decide, into, Allowed},
		{"limited approver, approve into other site", atSouth(Approver), Decide, into, Hidden},
		{"limited approver, reject", atNorth(Approver), Decide, request, Forbidden},
		{"approver, reject", whole("one", Approver), Decide, request, Allowed},
		{"limited approver and the pool", atNorth(Approver), Read, of(Node), Hidden},
		{"limited operator and the pool", atNorth(Operator), Read, of(Node), Allowed},
		{"limited operator changes the pool", atNorth(Operator), Change, of(Node), Forbidden},
		{"limited, images", atNorth(Viewer), Read, of(Image), Allowed},
		{"limited operator registers an image", atNorth(Operator), Change, of(Image), Forbidden},
		{"limited, audit", atNorth(Operator), Read, of(Audit), Forbidden},
		{"viewer, audit", whole("one", Viewer), Read, of(Audit), Allowed},
		{"tenant admin, roots", whole("one", Admin), Change, of(Roots), Forbidden},
		{"centre admin, roots", centre(Admin), Change, of(Roots), Allowed},
		{"operator, users", whole("one", Operator), Read, of(User), Forbidden},
		{"token bounded by its owner", token, Change, node, Forbidden},
		{"token bounded by its owner, read", token, Read, node, Allowed},
		{"token bounded by its owner, elsewhere", token, Read, Object{Kind: Node, Tenant: "one", Site: "x", Labels: map[string]string{"region": "south"}}, Hidden},
		{"token of somebody who left", orphan, Read, node, Hidden},
		{"unknown verb", centre(Admin), "burn", node, Forbidden},
		{"unknown kind", centre(Admin), Read, Object{Kind: "moon", Tenant: "one"}, Forbidden},
	} {
		if got := Allow(c.p, c.v, c.o); got.Answer != c.want || (got.Why == "") != (got.Answer == Allowed) {
			t.Errorf("%s: %s (%s), want %s", c.name, got.Answer, got.Why, c.want)
		}
	}
}

// Whatever Allow allows, Possible has let through: else a call would be
// refused before its object is known.
func TestPossibleIsWider(t *testing.T) {
	sites := []fleet.Selector{{}, selector(t, "region=north"), selector(t, "region=south")}
	for a := range rules {
		for _, tenant := range []string{"one", "two", AllTenants} {
			for _, role := range []Role{Viewer, Approver, Operator, Admin} {
				for _, s := range sites {
					p := Principal{Tenant: "one", Bindings: []Binding{{Tenant: tenant, Role: role, Sites: s}}}
					o := north()
					o.Kind = a.kind
					for _, o := range []Object{o, {Kind: a.kind, Tenant: "one"}} {
						if Allow(p, a.verb, o).Answer == Allowed && Possible(p, a.kind, a.verb).Answer != Allowed {
							t.Errorf("%v: %s %s is allowed but not possible", p.Bindings, a.verb, a.kind)
						}
					}
				}
			}
		}
	}
}

// A higher role, or one without a limit, never allows less.
func TestRolesGrow(t *testing.T) {
	for a := range rules {
		for _, site := range []string{"", "shop-7"} {
			o := north()
			o.Kind = a.kind
			if o.Site = site; site == "" {
				o.Labels = nil
			}
			last := Hidden
			for _, role := range []Role{Viewer, Approver, Operator, Admin} {
				limited := Allow(Principal{Tenant: "one", Bindings: []Binding{{Tenant: "one", Role: role, Sites: selector(t, "region=north")}}}, a.verb, o).Answer
				whole := Allow(Principal{Tenant: "one", Bindings: []Binding{{Tenant: "one", Role: role}}}, a.verb, o).Answer
				centre := Allow(Principal{Tenant: "one", Bindings: []Binding{{Tenant: AllTenants, Role: role}}}, a.verb, o).Answer
				if whole < last || whole < limited || centre < whole {
					t.Errorf("%s %s: %s limited %s, whole %s (before %s), centre %s", a.verb, a.kind, role, limited, whole, last, centre)
				}
				last = whole
			}
		}
	}
}

func TestCovers(t *testing.T) {
	n := selector(t, "region=north")
	have := []Binding{{Tenant: "one", Role: Operator}, {Tenant: "two", Role: Approver, Sites: n}}
	for _, c := range []struct {
		b    Binding
		want bool
	}{
		{Binding{Tenant: "one", Role: Viewer}, true},
		{Binding{Tenant: "one", Role: Operator, Sites: n}, true},
		{Binding{Tenant: "one", Role: Admin}, false},
		{Binding{Tenant: "two", Role: Approver, Sites: n}, true},
		{Binding{Tenant: "two", Role: Viewer}, false},
		{Binding{Tenant: AllTenants, Role: Viewer}, false},
	} {
		if got := Covers(have, c.b); got != c.want {
			t.Errorf("%s: %v, want %v", c.b, got, c.want)
		}
	}
	if !Covers([]Binding{{Tenant: AllTenants, Role: Admin}}, Binding{Tenant: "x", Role: Admin}) {
		t.Error("an admin of the centre cannot hand on a tenant")
	}
}

func TestBinding(t *testing.T) {
	n := selector(t, "region=north")
	for _, b := range []Binding{
		{Tenant: "one"}, {Role: Viewer}, {Tenant: "One", Role: Viewer}, {Tenant: "one", Role: 9},
		{Tenant: AllTenants, Role: Viewer, Sites: n}, {Tenant: "one", Role: Admin, Sites: n},
	} {
		if b.Validate() == nil {
			t.Errorf("%s is taken", b)
		}
	}
	b := Binding{Tenant: "one", Role: Operator, Sites: n}
	if err := b.Validate(); err != nil {
		t.Fatal(err)
	}
	j, err := json.Marshal(b)
	var again Binding
	if err != nil || json.Unmarshal(j, &again) != nil || again.String() != b.String() {
		t.Errorf("%s became %s (%v)", b, again, err)
	}
}
