package central

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/console"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// pageRow says who gets somewhere with one route of the console.
type pageRow struct {
	// path and form open it about the objects of the test.
	path string
	form url.Values
	// least is the least role that is not refused.
	least access.Role
	// site: the page is about shop-7, and is not there for others.
	site bool
}

func pageRows(request, node string) map[string]pageRow {
	v, a, o, adm := access.Viewer, access.Approver, access.Operator, access.Admin
	// Decisions carry a revision that nothing has: who is let through finds a
	// conflict, and the objects stay as they are.
	old := url.Values{"revision": {"999"}, "reason": {"r"}, "site": {"shop-7"}}
	return map[string]pageRow{
		"GET /{$}": {path: "/", least: v}, "GET /requests": {path: "/requests", least: v}, "GET /requests/{id}": {path: "/requests/" + request, least: v, site: true},
		"POST /requests/{id}/approve": {path: "/requests/" + request + "/approve", form: old, least: a, site: true},
		"POST /requests/{id}/reject":  {path: "/requests/" + request + "/reject", form: old, least: a, site: true},
		"POST /requests/{id}/release": {path: "/requests/" + request + "/release", form: old, least: a, site: true},
		"POST /bulk":                  {path: "/bulk", form: url.Values{"act": {"approve"}, "pick": {request + "@999"}}, least: v},
		"POST /bulk/apply":            {path: "/bulk/apply", form: url.Values{"act": {"approve"}, "pick": {request + "@999"}, "reason": {"r"}}, least: a},
		"GET /nodes":                  {path: "/nodes", least: v}, "GET /nodes/{id}": {path: "/nodes/" + node, least: v, site: true},
		"POST /nodes/{id}/deny":   {path: "/nodes/" + node + "/deny", form: old, least: o, site: true},
		"POST /nodes/{id}/allow":  {path: "/nodes/" + node + "/allow", form: old, least: o, site: true},
		"POST /nodes/{id}/assign": {path: "/nodes/" + node + "/assign", form: old, least: o, site: true},
		"POST /nodes/{id}/remove": {path: "/nodes/" + node + "/remove", form: old, least: o, site: true},
		"GET /sites":              {path: "/sites", least: v}, "GET /sites/{name}": {path: "/sites/shop-7", least: v, site: true},
		"GET /stacks": {path: "/stacks", least: v}, "GET /stacks/{name}": {path: "/stacks/none", least: v},
		"GET /images": {path: "/images", least: v}, "GET /events": {path: "/events", least: v}, "GET /audit": {path: "/audit", least: v},
		"GET /access":         {path: "/access", least: v},
		"POST /access/grant":  {path: "/access/grant", form: url.Values{"name": {"zoe"}, "role": {"viewer"}}, least: adm},
		"POST /access/revoke": {path: "/access/revoke", form: url.Values{"id": {"b-none"}}, least: adm},
		"POST /access/invite": {path: "/access/invite", form: url.Values{"name": {"zoe"}, "role": {"viewer"}}, least: adm},
		"GET /tokens":         {path: "/tokens?all=1&ended=1", least: v},
		"POST /tokens":        {path: "/tokens", form: url.Values{"name": {"BAD NAME"}, "role": {"viewer"}}, least: v},
		"POST /tokens/revoke": {path: "/tokens/revoke", form: url.Values{"id": {"c-none"}}, least: v},
		"GET /help":           {path: "/help", least: v},
		// A stream, and what ends the session: TestSessions and the console's
		// own tests have them.
		"GET /live": {}, "POST /logout": {},
	}
}

// TestEveryPage walks every route of the console times every role, whole,
// limited to another site, and of a foreign tenant, and strangers: with a
// session of that role and the token of its own forms.
func TestEveryPage(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	if _, err := r.access(r.admin.Token).CreateTenant(ctx, &musterv1.CreateTenantRequest{Name: "two"}); err != nil {
		t.Fatal(err)
	}
	q, err := r.File(ctx, servicetest.Filing("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Approve(q.ID, q.Revision); err != nil { // makes shop-7
		t.Fatal(err)
	}
	if _, err := r.issueNow(q.ID, "01"); err != nil {
		t.Fatal(err)
	}
	rows := pageRows(string(q.ID), string(q.Node))
	for _, pattern := range console.Patterns() {
		if _, known := rows[pattern]; !known {
			t.Errorf("%s has no row in the table: who may open it?", pattern)
		}
	}
	if n := len(console.Patterns()); n != len(rows) {
		t.Errorf("%d routes and %d rows", n, len(rows))
	}
	elsewhere, err := fleet.ParseSelector("muster/site=shop-8")
	if err != nil {
		t.Fatal(err)
	}
	type who struct {
		name             string
		role             access.Role
		outside, foreign bool
		w                *window
		csrf             string
	}
	people := []who{{name: "a stranger"}}
	for _, role := range []access.Role{access.Viewer, access.Approver, access.Operator, access.Admin} {
		people = append(people,
			who{name: role.String(), role: role}, who{name: "foreign " + role.String(), role: role, foreign: true})
		if role != access.Admin {
			people = append(people, who{name: role.String() + " of another site", role: role, outside: true})
		}
	}
	for i := range people {
		p := &people[i]
		p.w = r.window(t)
		p.w.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		if p.role == access.None {
			continue
		}
		b := access.Binding{Tenant: DefaultTenant, Role: p.role}
		if p.foreign {
			b.Tenant = "two"
		}
		if p.outside {
			b.Sites = elsewhere
		}
		token := r.person(t, strings.ReplaceAll(p.name, " ", "-"), b)
		p.w.submit(p.w.get("/login", 200), "/login", url.Values{"token": {token}, "next": {"/"}}, 303)
		p.csrf = formToken.FindStringSubmatch(p.w.get("/help", 200))[1]
	}
	open := 0
	for _, pattern := range console.Patterns() {
		row := rows[pattern]
		if row.path == "" {
			continue
		}
		for _, p := range people {
			what := fmt.Sprintf("%s by %s", pattern, p.name)
			var res *http.Response
			if strings.HasPrefix(pattern, "GET ") {
				res, err = p.w.http.Get(r.admin.Server + row.path)
			} else {
				form := url.Values{"csrf": {p.csrf}}
				for k, v := range row.form {
					form[k] = v
				}
				res, err = p.w.http.PostForm(r.admin.Server+row.path, form)
			}
			if err != nil {
				t.Fatal(err)
			}
			page := p.w.read(res, res.StatusCode)
			code := res.StatusCode
			switch {
			case p.role == access.None:
				if code != http.StatusSeeOther || !strings.HasPrefix(res.Header.Get("Location"), "/login") {
					t.Errorf("%s: %d to %s", what, code, res.Header.Get("Location"))
				}
				continue
			case p.foreign:
				// Their own tenant is empty; nothing of ours shows, and no act of
				// theirs is about ours.
				if strings.Contains(page, q.Words) || strings.Contains(page, "/sites/shop-7") || row.site && code != http.StatusNotFound && code != http.StatusForbidden {
					t.Errorf("%s: %d %.2000s", what, code, page)
				}
			case p.outside && row.site:
				if code != http.StatusNotFound && code != http.StatusForbidden {
					t.Errorf("%s: %d", what, code)
				}
			case p.role < row.least:
				if code != http.StatusForbidden {
					t.Errorf("%s is let through: %d", what, code)
				}
			case !p.outside:
				if code == http.StatusForbidden || code >= 500 {
					t.Errorf("%s is refused: %d %.1500s", what, code, page)
				}
				open++
			}
			if code >= 500 {
				t.Errorf("%s: %d", what, code)
			}
			if p.outside && strings.Contains(page, q.Words) {
				t.Errorf("%s shows the machine", what)
			}
		}
	}
	// Nothing of it did anything but what admins did on purpose.
	now, err := r.Request(ctx, DefaultTenant, q.ID)
	if err != nil || now.State != fleet.RequestIssued {
		t.Errorf("the request is %s, %v", now.State, err)
	}
	t.Logf("%d routes, %d callers, %d openings", len(rows), len(people), open)
	r.sound(t)
}
