package central

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// endpoint is one row of the table of everything that the operators' endpoint
// answers. body is a call that would do something, about the objects below.
type endpoint struct {
	path string
	body string
	// least is the least role that is let through, and site whether a role
	// that is limited to the object's site may be enough.
	least access.Role
	site  bool
	// open: everybody who is let in at all.
	open bool
}

const (
	mgmt = "/muster.v1.ManagementService/"
	acc  = "/muster.v1.AccessService/"
)

var applyBody = fmt.Sprintf(`{"dryRun":true,"documents":[%q]}`, base64.StdEncoding.EncodeToString([]byte(`{"apiVersion":"muster/v1","kind":"Site","metadata":{"name":"shop-9"}}`)))

// endpoints: a method or a route that is not here fails the test.
func endpoints(request, node string) []endpoint {
	// A revision that nothing has: who is let through finds a conflict, and
	// the objects stay as they are for the next caller.
	id := func(v string) string { return fmt.Sprintf(`{"id":%q,"reason":"r","revision":999}`, v) }
	show := func(v string) string { return fmt.Sprintf(`{"id":%q}`, v) }
	return []endpoint{
		{path: mgmt + "GetCentre", least: access.Viewer, site: true},
		{path: mgmt + "ListRequests", least: access.Viewer, site: true},
		{path: mgmt + "GetRequest", body: show(request), least: access.Viewer, site: true},
		{path: mgmt + "Approve", body: id(request), least: access.Approver, site: true},
		{path: mgmt + "Reject", body: id(request), least: access.Approver, site: true},
		{path: mgmt + "Release", body: id(request), least: access.Approver, site: true},
		{path: mgmt + "Replace", body: fmt.Sprintf(`{"old":%q,"new":%q,"reason":"r","revision":999}`, node, request), least: access.Operator, site: true},
		{path: mgmt + "ImportPreApproval", body: `{"site":"shop-7","csv":"eA=="}`, least: access.Operator, site: true},
		{path: mgmt + "CreateClaim", body: `{"site":"shop-7"}`, least: access.Operator, site: true},
		{path: mgmt + "CreateRule", body: `{"site":"shop-7","min_identity":"hardware","min_boot":"enforced","max":1}`, least: access.Operator, site: true},
		{path: mgmt + "ListPreApprovals", least: access.Viewer, site: true},
		{path: mgmt + "RemovePreApproval", body: `{"name":"none"}`, least: access.Operator, site: true},
		{path: mgmt + "TestPreApprovals", body: show(request), least: access.Viewer, site: true},
		{path: mgmt + "ListNodes", least: access.Viewer, site: true},
		{path: mgmt + "GetNode", body: show(node), least: access.Viewer, site: true},
		{path: mgmt + "DenyNode", body: id(node), least: access.Operator, site: true},
		{path: mgmt + "AllowNode", body: id(node), least: access.Operator, site: true},
		{path: mgmt + "AssignNode", body: fmt.Sprintf(`{"id":%q,"site":"shop-7","revision":999}`, node), least: access.Operator, site: true},
		{path: mgmt + "RemoveNode", body: id(node), least: access.Operator, site: true},
		{path: mgmt + "ListSites", least: access.Viewer, site: true},
		{path: mgmt + "GetSite", body: `{"name":"shop-7"}`, least: access.Viewer, site: true},
		{path: mgmt + "SetSite", body: `{"name":"shop-7","title":"t","generation":999}`, least: access.Operator, site: true},
		{path: mgmt + "ConfirmSite", body: `{"name":"shop-7","reason":"r"}`, least: access.Operator, site: true},
		{path: mgmt + "ListImages", least: access.Viewer, site: true},
		{path: mgmt + "RegisterImage", body: `{"manifest":"eA=="}`, least: access.Operator},
		{path: mgmt + "TrustReleaseKey", body: `{"public_key":"x"}`, least: access.Admin},
		{path: mgmt + "ListRoots", least: access.Viewer, site: true},
		{path: mgmt + "ImportRoots", least: central, body: `{}`},
		{path: mgmt + "OpenBootWindow", least: centralOperator, body: `{}`},
		{path: mgmt + "WatchEvents", body: "stream", least: access.Viewer, site: true},
		{path: mgmt + "ListAudit", least: access.Viewer},
		{path: mgmt + "VerifyAudit", least: access.Viewer},
		{path: mgmt + "CreateOrder", body: fmt.Sprintf(`{"kind":"found","node":%q,"site":"shop-7","reason":"r","dry_run":true}`, node), least: access.Operator, site: true},
		{path: mgmt + "ListOrders", least: access.Viewer, site: true},
		{path: mgmt + "WithdrawOrder", body: `{"id":"o-none","reason":"r"}`, least: access.Operator, site: true},
		{path: mgmt + "ListEscrow", least: access.Viewer, site: true},
		{path: mgmt + "FetchEscrow", body: "stream", least: access.Operator, site: true},
		{path: mgmt + "PutHandover", body: "stream", least: access.Operator, site: true},
		{path: mgmt + "TrustEscrowKey", body: `{"key":"eA==","reason":"r"}`, least: access.Admin},
		{path: mgmt + "AssignStack", body: `{}`, least: access.Operator, site: true},
		{path: mgmt + "GetDrift", body: `{}`, least: access.Viewer, site: true},
		{path: mgmt + "ListStacks", body: `{}`, least: access.Viewer, site: true},
		{path: mgmt + "GetStack", body: `{}`, least: access.Viewer, site: true},
		{path: mgmt + "PublishStackVersion", body: `{}`, least: access.Operator},
		{path: mgmt + "StartRollout", body: `{"name":"r","stack":"none","version":"1","waves":[{"percent":100}]}`, least: access.Operator},
		{path: mgmt + "ListRollouts", least: access.Viewer, site: true},
		{path: mgmt + "GetRollout", body: `{}`, least: access.Viewer, site: true},
		{path: mgmt + "ChangeRollout", body: `{"act":"none"}`, least: access.Operator},
		// A site that nobody has yet, in base64: that the caller may is seen in
		// what comes of it (TestApplyInPart), and here nothing is.
		{path: mgmt + "Apply", body: applyBody, least: access.Operator, site: true},
		{path: mgmt + "Export", body: `{"kind":"site"}`, least: access.Viewer, site: true},
		{path: mgmt + "DeleteObject", body: `{"kind":"site","name":"shop-7","generation":999}`, least: access.Operator, site: true},
		{path: mgmt + "LabelObject", body: `{}`, least: access.Operator, site: true},

		{path: acc + "Login", open: true, body: `{}`},
		{path: acc + "WhoAmI", open: true},
		{path: acc + "Logout", open: true, body: "destroys"},
		{path: acc + "CreateToken", open: true, body: `{"name":"t","role":"viewer"}`},
		{path: acc + "ListTokens", open: true},
		{path: acc + "RevokeToken", open: true, body: `{"id":"c-none"}`},
		{path: acc + "ListTenants", open: true},
		{path: acc + "ListBindings", least: access.Admin},
		{path: acc + "Grant", body: `{"subject":"user:zoe","role":"viewer"}`, least: access.Admin},
		{path: acc + "Revoke", body: `{"subject":"user:nobody"}`, least: access.Admin},
		{path: acc + "Invite", body: `{"user":"zoe","role":"viewer"}`, least: access.Admin},
		{path: acc + "CreateTenant", body: `{"name":"default"}`, least: central},
		{path: acc + "HandOverTenant", body: `{"name":"default","user":"zoe","reason":"r"}`, least: access.Admin},
	}
}

// Roles over the centre, above those of a tenant.
const (
	centralOperator access.Role = 10
	central         access.Role = 11
)

// TestEveryEndpoint walks every method of every service that operators reach
// times every role, whole, limited to the object's site, limited to another
// site, and of a foreign tenant.
func TestEveryEndpoint(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	for _, tenant := range []string{"two"} {
		if err := r.s.store.Update(ctx, func(tx store.Tx) error {
			_, err := tx.PutTenant(fleet.Tenant{Meta: fleet.Meta{Tenant: tenant, Name: tenant, Generation: 1}})
			return err
		}); err != nil {
			t.Fatal(err)
		}
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
	rows := endpoints(string(q.ID), string(q.Node))

	// Every method has a row, and every row is a method.
	known := make(map[string]endpoint)
	for _, e := range rows {
		known[e.path] = e
	}
	streams := make(map[string]bool)
	methodCount := 0
	for _, file := range []protoreflect.FileDescriptor{musterv1.File_muster_v1_management_proto, musterv1.File_muster_v1_access_proto} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				m := service.Methods().Get(j)
				path := "/" + string(service.FullName()) + "/" + string(m.Name())
				methodCount++
				streams[path] = m.IsStreamingClient() || m.IsStreamingServer()
				if _, ok := known[path]; !ok {
					t.Errorf("%s has no row in the table: who may call it?", path)
				}
				_, gated := methods[path]
				if !gated && !selfService[path] && path != musterv1connect.AccessServiceLoginProcedure {
					t.Errorf("%s is in no table of the gate", path)
				}
			}
		}
	}
	if methodCount != len(rows) {
		t.Errorf("%d methods and %d rows", methodCount, len(rows))
	}

	selector := func(s string) fleet.Selector {
		v, err := fleet.ParseSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	type who struct {
		name, token string
		role        access.Role
		limited     bool // to shop-7
		outside     bool // limited to another site
		foreign     bool // no role in this tenant
	}
	people := []who{{name: "nobody"}}
	for _, role := range []access.Role{access.Viewer, access.Approver, access.Operator, access.Admin} {
		n := role.String()
		people = append(people,
			who{name: n, role: role, token: r.person(t, "whole-"+n, access.Binding{Tenant: DefaultTenant, Role: role})},
			who{name: "foreign " + n, role: role, foreign: true, token: r.person(t, "foreign-"+n, access.Binding{Tenant: "two", Role: role})})
		if role != access.Admin {
			people = append(people,
				who{name: n + " of the site", role: role, limited: true, token: r.person(t, "limited-"+n, access.Binding{Tenant: DefaultTenant, Role: role, Sites: selector("muster/site=shop-7")})},
				who{name: n + " of another site", role: role, outside: true, token: r.person(t, "outside-"+n, access.Binding{Tenant: DefaultTenant, Role: role, Sites: selector("muster/site=shop-8")})})
		}
	}
	people = append(people,
		who{name: "operator of the centre", role: centralOperator, token: r.person(t, "central-operator", access.Binding{Tenant: access.AllTenants, Role: access.Operator})},
		who{name: "admin of the centre", role: central, token: r.person(t, "central-admin", access.Binding{Tenant: access.AllTenants, Role: access.Admin})})

	client := r.client()
	call := func(e endpoint, p who) (int, string) {
		body := e.body
		if body == "" || body == "stream" || body == "destroys" {
			body = "{}"
		}
		req, err := http.NewRequest(http.MethodPost, r.admin.Server+e.path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set(TenantHeader, DefaultTenant)
		if p.token != "" {
			req.Header.Set("Authorization", "Bearer "+p.token)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b := make([]byte, 64<<10)
		n, _ := resp.Body.Read(b)
		return resp.StatusCode, string(b[:n])
	}
	refusals, answers := 0, 0
	for _, e := range rows {
		if e.body == "destroys" {
			continue // it would end the credential of the next calls; TestTokens has it
		}
		for _, p := range people {
			status, text := call(e, p)
			gate := status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusNotFound
			switch {
			case e.path == musterv1connect.AccessServiceLoginProcedure:
				if status != http.StatusBadRequest {
					t.Errorf("%s by %s: %d %s", e.path, p.name, status, text)
				}
			case p.token == "":
				if status != http.StatusUnauthorized {
					t.Errorf("%s by nobody: %d %s", e.path, status, text)
				}
			case p.foreign:
				if status != http.StatusNotFound {
					t.Errorf("%s by %s: %d %s; want not found", e.path, p.name, status, text)
				}
			case e.open:
				// What comes after the gate may be refused for its own reasons.
				if status == http.StatusUnauthorized {
					t.Errorf("%s by %s: %d %s", e.path, p.name, status, text)
				}
			default:
				role := p.role
				switch {
				case role == centralOperator && e.least == access.Admin:
					role = access.Operator
				case role == central:
					role = 99
				}
				enough := role >= e.least && (!p.limited && !p.outside || e.site)
				if !enough && !gate && !streams[e.path] {
					t.Errorf("%s by %s is let through: %d %s", e.path, p.name, status, text)
				}
				if enough && !p.outside && !p.limited && (status == http.StatusUnauthorized || status == http.StatusForbidden) {
					t.Errorf("%s by %s is refused: %d %s", e.path, p.name, status, text)
				}
				// Somebody of another site never gets the site's things, nor
				// their names.
				if p.outside && (strings.Contains(text, "shop-7") && !strings.Contains(e.body, "shop-7") || strings.Contains(text, string(q.Node)) && !strings.Contains(e.body, string(q.Node))) {
					t.Errorf("%s by %s tells of shop-7: %s", e.path, p.name, text)
				}
				if p.outside && (strings.Contains(e.body, "shop-7") || strings.Contains(e.body, string(q.Node)) || strings.Contains(e.body, string(q.ID))) && !gate {
					t.Errorf("%s by %s reaches what is of shop-7: %d %s", e.path, p.name, status, text)
				}
			}
			if gate {
				refusals++
			} else {
				answers++
			}
		}
	}
	t.Logf("%d endpoints, %d callers: %d refusals, %d answers", len(rows), len(people), refusals, answers)
}
