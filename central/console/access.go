package console

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet/text"
)

// timeOf is a time of the API; the zero time for none.
func timeOf(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// roleRow is a role that somebody has.
type roleRow struct {
	ID, Subject, Tenant, Role, Sites, By, Reason string
	Since                                        time.Time
}

func roleRowOf(m *musterv1.RoleBinding) roleRow {
	return roleRow{m.GetId(), m.GetSubject(), m.GetTenant(), m.GetRole(), m.GetSites(), m.GetCreatedBy(), m.GetReason(), timeOf(m.GetCreated())}
}

// Where is the part of the centre in which the role counts.
func (r roleRow) Where() string {
	where := "tenant " + say(r.Tenant)
	if r.Tenant == "*" {
		where = "the whole centre"
	}
	if r.Sites != "" {
		where += ", sites " + say(r.Sites)
	}
	return where
}

// roleForm is a form that names a role, as it was filled in.
type roleForm struct {
	Name, Role, Sites, Reason string
	Days                      int
}

func roleFormOf(v *visit) roleForm {
	f := v.r.PostForm
	days, _ := strconv.Atoi(f.Get("days")) // 0: the default of the API
	return roleForm{
		Name: text.Clean(strings.TrimSpace(f.Get("name")), 140), Role: text.Clean(f.Get("role"), 20),
		Sites: text.Clean(strings.TrimSpace(f.Get("sites")), 256), Reason: text.Clean(strings.TrimSpace(f.Get("reason")), 1000), Days: min(max(days, 0), 366),
	}
}

// roles are those that a form offers.
var roles = []string{"viewer", "approver", "operator", "admin"}

type accessBody struct {
	Session Session
	Who     *musterv1.WhoAmIResponse
	Own     []roleRow
	Ends    time.Time
	// All are the roles of the tenant, if the person may see them.
	All   []roleRow
	Admin bool
	Roles []roleText
	Form  roleForm
	// Problem is why nothing was done; Done what was.
	Problem, Done string
	Secret        *secretShown
}

// secretShown is a secret, on the one page that ever shows it.
type secretShown struct {
	What, For, Secret string
	Ends              time.Time
	// Use says what to do with it.
	Use string
}

// RoleNames are those that the form offers.
func (accessBody) RoleNames() []string { return roles }

// Blank is a form that nobody filled in.
func (accessBody) Blank() roleForm { return roleForm{Role: "viewer"} }

type roleText struct{ Name, May string }

func mayAdmin(role string) bool { return role == "admin" }

func (c *Console) access(v *visit) error {
	done := ""
	switch v.r.URL.Query().Get("done") {
	case "granted":
		done = "The role is given. It holds from the next call on."
	case "revoked":
		done = "The role is taken away. It holds from the next call on."
	}
	return c.showAccess(v, http.StatusOK, accessBody{Done: done, Form: roleForm{Role: "viewer"}})
}

func (c *Console) showAccess(v *visit, code int, b accessBody) error {
	who, err := c.people.WhoAmI(v.ctx, &musterv1.WhoAmIRequest{})
	if err != nil {
		return err
	}
	b.Session, b.Who, b.Admin, b.Ends = v.s, who, mayAdmin(v.s.Role), timeOf(who.Expires)
	for _, m := range who.Roles {
		b.Own = append(b.Own, roleRowOf(m))
	}
	b.Roles = []roleText{
		{"viewer", "look at everything of the tenant"},
		{"approver", "also approve, reject and release requests"},
		{"operator", "also assign, remove, replace and deny nodes, change sites, give orders, register images"},
		{"admin", "also trust roots and keys, and manage who may do what"},
	}
	p := page{Title: "Access", Nav: "access", CLI: []string{command("whoami")}}
	if b.Admin {
		out, err := c.people.ListBindings(v.ctx, &musterv1.ListBindingsRequest{})
		if err != nil {
			return err
		}
		for _, m := range out.Bindings {
			b.All = append(b.All, roleRowOf(m))
		}
		p.CLI = append(p.CLI, command("access", "list"), command("access", "grant", "SUBJECT", "--role", "ROLE"), command("access", "revoke", "SUBJECT"), command("access", "invite", "NAME", "--role", "ROLE"))
	}
	p.Body = b
	return v.show(code, "access", p)
}

// again shows a page once more with what was wrong in its form; errors that
// are no fault of the form have pages of their own.
func again(err error, show func(code int, why string) error) error {
	code := connect.CodeOf(err)
	if p, ok := codes[code]; ok && code != connect.CodeUnauthenticated && code != connect.CodeUnavailable && code != connect.CodeCanceled {
		why := upper(sentence(err))
		if !strings.HasSuffix(why, ".") {
			why += "."
		}
		return show(p.code, why)
	}
	return err
}

func (c *Console) grant(v *visit) error {
	f := roleFormOf(v)
	_, err := c.people.Grant(v.ctx, &musterv1.GrantRequest{Subject: f.Name, Role: f.Role, Sites: f.Sites, Reason: f.Reason})
	if err != nil {
		return again(err, func(code int, why string) error { return c.showAccess(v, code, accessBody{Problem: why, Form: f}) })
	}
	return v.to("/access?done=granted")
}

func (c *Console) revoke(v *visit) error {
	f := roleFormOf(v)
	_, err := c.people.Revoke(v.ctx, &musterv1.RevokeRequest{Id: text.Clean(v.r.PostForm.Get("id"), 64), Reason: f.Reason})
	if err != nil {
		return again(err, func(code int, why string) error {
			return c.showAccess(v, code, accessBody{Problem: why, Form: roleForm{Role: "viewer"}})
		})
	}
	return v.to("/access?done=revoked")
}

func (c *Console) invite(v *visit) error {
	f := roleFormOf(v)
	out, err := c.people.Invite(v.ctx, &musterv1.InviteRequest{User: f.Name, Role: f.Role, Sites: f.Sites, Reason: f.Reason})
	if err != nil {
		return again(err, func(code int, why string) error { return c.showAccess(v, code, accessBody{Problem: why, Form: f}) })
	}
	return c.showAccess(v, http.StatusOK, accessBody{Form: roleForm{Role: "viewer"}, Secret: &secretShown{
		What: "Invitation", For: out.Token.GetHolder(), Secret: out.Secret, Ends: timeOf(out.Token.GetExpires()),
		Use: "Give it to them by a safe way. It lets them log in once, on the log-in page or by muster login --token-file FILE.",
	}})
}

// tokenRow is one credential.
type tokenRow struct {
	ID, Kind, Name, Holder, Begins, May, Ended, Source string
	Created, Expires, LastUsed                         time.Time
	Own, This                                          bool
}

type tokensBody struct {
	Rows       []tokenRow
	All, Ended bool
	Admin      bool
	// MayMake: the person has a role to give to a token.
	Roles         []string
	Form          roleForm
	Problem, Done string
	Secret        *secretShown
}

// lives are the lengths of time that the form offers, in days.
var lives = []int{1, 7, 30, 90, 366}

// Lives are for the form.
func (tokensBody) Lives() []int { return lives }

func (c *Console) tokens(v *visit) error {
	done := ""
	if v.r.URL.Query().Get("done") == "revoked" {
		done = "It lets nobody in any more."
	}
	return c.showTokens(v, http.StatusOK, tokensBody{Done: done, Form: roleForm{Role: "viewer", Days: 30}})
}

func (c *Console) showTokens(v *visit, code int, b tokensBody) error {
	q := v.r.URL.Query()
	b.Admin = mayAdmin(v.s.Role)
	b.All, b.Ended = b.Admin && q.Get("all") != "", q.Get("ended") != ""
	who, err := c.people.WhoAmI(v.ctx, &musterv1.WhoAmIRequest{})
	if err != nil {
		return err
	}
	out, err := c.people.ListTokens(v.ctx, &musterv1.ListTokensRequest{All: b.All, Ended: b.Ended})
	if err != nil {
		return err
	}
	for _, m := range out.Tokens {
		b.Rows = append(b.Rows, tokenRow{
			ID: m.GetId(), Kind: m.GetKind(), Name: m.GetName(), Holder: m.GetHolder(), Begins: m.GetPrefix(), May: scopeOf(m), Ended: m.GetEnded(), Source: m.GetSource(),
			Created: timeOf(m.GetCreated()), Expires: timeOf(m.GetExpires()), LastUsed: timeOf(m.GetLastUsed()), Own: m.GetHolder() == who.GetUser(), This: m.GetId() == who.GetCredential(),
		})
	}
	for _, r := range roles {
		b.Roles = append(b.Roles, r)
		if r == v.s.Role {
			break
		}
	}
	p := page{Title: "Tokens", Nav: "tokens", CLI: []string{command("token", "list")}}
	if b.All {
		p.CLI = []string{command("token", "list", "--all")}
	}
	p.CLI = append(p.CLI, command("token", "create", "NAME", "--role", "viewer", "--expires", "720h"), command("token", "revoke", "ID"))
	p.Body = b
	return v.show(code, "tokens", p)
}

func scopeOf(m *musterv1.AccessToken) string {
	var out []string
	for _, s := range m.GetScopes() {
		word := s.GetRole()
		if s.GetSites() != "" {
			word += " at " + s.GetSites()
		}
		out = append(out, word)
	}
	if len(out) == 0 {
		return "what its holder may"
	}
	return strings.Join(out, "; ")
}

func (c *Console) createToken(v *visit) error {
	f := roleFormOf(v)
	out, err := c.people.CreateToken(v.ctx, &musterv1.CreateTokenRequest{
		Name: f.Name, Role: f.Role, Sites: f.Sites, Reason: f.Reason, ExpiresSeconds: uint64(f.Days) * 24 * 3600,
	})
	if err != nil {
		return again(err, func(code int, why string) error { return c.showTokens(v, code, tokensBody{Problem: why, Form: f}) })
	}
	return c.showTokens(v, http.StatusOK, tokensBody{Form: roleForm{Role: "viewer", Days: 30}, Secret: &secretShown{
		What: "Token", For: fmt.Sprintf("%s (%s)", out.Token.GetName(), out.Token.GetId()), Secret: out.Secret, Ends: timeOf(out.Token.GetExpires()),
		Use: "Put it where the program reads it, in a file that only the program may read.",
	}})
}

func (c *Console) revokeToken(v *visit) error {
	id, f := text.Clean(v.r.PostForm.Get("id"), 64), roleFormOf(v)
	who, err := c.people.WhoAmI(v.ctx, &musterv1.WhoAmIRequest{})
	if err != nil {
		return err
	}
	if _, err := c.people.RevokeToken(v.ctx, &musterv1.RevokeTokenRequest{Id: id, Reason: f.Reason}); err != nil {
		return again(err, func(code int, why string) error {
			return c.showTokens(v, code, tokensBody{Problem: why, Form: roleForm{Role: "viewer", Days: 30}})
		})
	}
	if id == who.GetCredential() {
		return v.to("/login")
	}
	if v.r.PostForm.Get("all") != "" {
		return v.to("/tokens?done=revoked&all=1")
	}
	return v.to("/tokens?done=revoked")
}
