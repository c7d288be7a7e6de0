package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central"
)

// day is a time as tables show it, "-" for none.
func day(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format("2006-01-02 15:04")
}

// roleRow is a role binding as JSON has it.
type roleRow struct {
	ID        string     `json:"id,omitempty"`
	Subject   string     `json:"subject,omitempty"`
	Tenant    string     `json:"tenant"`
	Role      string     `json:"role"`
	Sites     string     `json:"sites,omitempty"`
	Created   *time.Time `json:"created,omitempty"`
	CreatedBy string     `json:"created_by,omitempty"`
	Reason    string     `json:"reason,omitempty"`
}

func roleRowOf(b *musterv1.RoleBinding) roleRow {
	return roleRow{ID: b.Id, Subject: b.Subject, Tenant: b.Tenant, Role: b.Role, Sites: b.Sites, Created: timeOf(b.Created), CreatedBy: b.CreatedBy, Reason: b.Reason}
}

func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	v := t.AsTime().UTC()
	return &v
}

// tokenRow is a credential as JSON has it: never with its secret, but for the
// answer that makes it.
type tokenRow struct {
	ID       string     `json:"id"`
	Kind     string     `json:"kind"`
	Name     string     `json:"name,omitempty"`
	Holder   string     `json:"holder"`
	Tenant   string     `json:"tenant"`
	Prefix   string     `json:"prefix,omitempty"`
	Scopes   []roleRow  `json:"scopes,omitempty"`
	Created  *time.Time `json:"created,omitempty"`
	Expires  *time.Time `json:"expires,omitempty"`
	LastUsed *time.Time `json:"last_used,omitempty"`
	Ended    string     `json:"ended,omitempty"`
	Source   string     `json:"source,omitempty"`
	Secret   string     `json:"secret,omitempty"`
}

func tokenRowOf(t *musterv1.AccessToken, secret string) tokenRow {
	r := tokenRow{
		ID: t.GetId(), Kind: t.GetKind(), Name: t.GetName(), Holder: t.GetHolder(), Tenant: t.GetTenant(), Prefix: t.GetPrefix(), Created: timeOf(t.GetCreated()),
		Expires: timeOf(t.GetExpires()), LastUsed: timeOf(t.GetLastUsed()), Ended: t.GetEnded(), Source: t.GetSource(), Secret: secret,
	}
	for _, s := range t.GetScopes() {
		r.Scopes = append(r.Scopes, roleRowOf(s))
	}
	return r
}

func scopeText(all []roleRow) string {
	var out []string
	for _, r := range all {
		s := r.Role
		if r.Sites != "" {
			s += " at " + r.Sites
		}
		out = append(out, s)
	}
	if len(out) == 0 {
		return "its holder's"
	}
	return strings.Join(out, "; ")
}

// tokenCommand is `muster token`.
func tokenCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Make, list and revoke tokens for programs, and whatever else lets somebody in"}
	cmd.AddCommand(tokenCreateCommand(), tokenListCommand(), tokenRevokeCommand())
	return cmd
}

func tokenCreateCommand() *cobra.Command {
	var (
		role, sites, reason string
		expires             time.Duration
		f                   format
	)
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Make a token for a program; its secret is shown once",
		Long: `The token has a role of its own, at all sites or at those that --sites picks. It
never allows more than its holder, who is you, may at that moment: when your
roles end, so does what it can do.`,
		Example: "  muster token create ci --role viewer --expires 720h\n  muster token create north-installer --role approver --sites region=north",
		Args:    usageArgs(cobra.ExactArgs(1), "what shall the token be called?"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&role, "role", "viewer", "viewer, approver, operator or admin")
	cmd.Flags().StringVar(&sites, "sites", "", "only sites with these labels, e.g. region=north; muster/site=NAME is one site")
	cmd.Flags().DurationVar(&expires, "expires", 90*24*time.Hour, "how long it holds, at most 8784h (366 days)")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if expires < time.Minute {
			return exitError{2, errors.New("--expires: at least a minute")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.CreateToken(cmd.Context(), &musterv1.CreateTokenRequest{Name: args[0], Role: role, Sites: sites, ExpiresSeconds: uint64(expires / time.Second), Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		return showSecret(cmd, f, out.Token, out.Secret, fmt.Sprintf("Token %s (%s) until %s. It is shown this once:", out.Token.Id, cell(out.Token.Name), day(out.Token.Expires)))
	}
	return cmd
}

func showSecret(cmd *cobra.Command, f format, t *musterv1.AccessToken, secret, sentence string) error {
	if f == "table" || f == "wide" {
		fmt.Fprintln(cmd.ErrOrStderr(), sentence)
		fmt.Fprintln(cmd.OutOrStdout(), secret)
		return nil
	}
	return f.write(cmd.OutOrStdout(), tokenRowOf(t, secret), table{names: []string{"token/" + t.Id}})
}

func tokenListCommand() *cobra.Command {
	var (
		all, ended bool
		f          format
	)
	cmd := &cobra.Command{
		Use: "list", Short: "List tokens, sessions and invitations: yours, or with --all those of the tenant",
		Args: usageArgs(cobra.NoArgs, "list takes no arguments"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().BoolVar(&all, "all", false, "of everybody in the tenant (admin)")
	cmd.Flags().BoolVar(&ended, "ended", false, "also those that were revoked or have expired")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.ListTokens(cmd.Context(), &musterv1.ListTokensRequest{All: all, Ended: ended})
		if err != nil {
			return c.explain(err)
		}
		rows := []tokenRow{}
		t := table{columns: []string{"ID", "KIND", "NAME", "HOLDER", "BEGINS", "MAY", "EXPIRES", "LAST USED", "ENDED"}, empty: "none"}
		for _, m := range out.Tokens {
			r := tokenRowOf(m, "")
			rows = append(rows, r)
			t.names = append(t.names, "token/"+r.ID)
			t.rows = append(t.rows, []string{r.ID, r.Kind, cell(r.Name), cell(r.Holder), r.Prefix, cell(scopeText(r.Scopes)), day(m.Expires), day(m.LastUsed), r.Ended})
		}
		return f.write(cmd.OutOrStdout(), rows, t)
	}
	return cmd
}

func tokenRevokeCommand() *cobra.Command {
	var (
		reason string
		f      format
	)
	cmd := &cobra.Command{
		Use: "revoke ID", Short: "End a token, a session or an invitation at once",
		Long: "ID is the token's ID, the name of a token of yours, or what `muster token list`\nshows as its beginning. Admins end those of others, too.",
		Args: usageArgs(cobra.ExactArgs(1), "revoke which token? `muster token list` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.RevokeToken(cmd.Context(), &musterv1.RevokeTokenRequest{Id: args[0], Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		return tell(cmd, f, tokenRowOf(out.Token, ""), "token/"+out.Token.Id, fmt.Sprintf("%s %s of %s is revoked", out.Token.Kind, out.Token.Id, cell(out.Token.Holder)))
	}
	return cmd
}

// tell prints a sentence, or the object in another format.
func tell(cmd *cobra.Command, f format, v any, name, sentence string) error {
	if f == "table" || f == "wide" {
		fmt.Fprintln(cmd.OutOrStdout(), sentence)
		return nil
	}
	return f.write(cmd.OutOrStdout(), v, table{names: []string{name}})
}

// rolesCommand is `muster access`.
func rolesCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "access", Short: "Who may do what: roles of people and groups in a tenant"}
	cmd.AddCommand(grantCommand(), revokeCommand(), rolesListCommand(), inviteCommand())
	return cmd
}

func grantCommand() *cobra.Command {
	var (
		role, sites, reason string
		centre              bool
		f                   format
	)
	cmd := &cobra.Command{
		Use: "grant SUBJECT --role ROLE", Short: "Give a person or a group a role",
		Long: `SUBJECT is user:NAME (or NAME) or group:NAME. Roles, each with the rights of
those before it: viewer, approver, operator, admin. --sites limits the role to
sites with these labels. Nobody gives more than they have.`,
		Example: "  muster access grant ann@example.org --role operator --sites region=north\n  muster access grant group:shop-support --role viewer",
		Args:    usageArgs(cobra.ExactArgs(1), "grant a role to whom? user:NAME or group:NAME"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&role, "role", "", "viewer, approver, operator or admin")
	cmd.Flags().StringVar(&sites, "sites", "", "only at sites with these labels; muster/site=NAME is one site")
	cmd.Flags().BoolVar(&centre, "centre", false, "over the whole centre: all tenants, EK roots, the boot role")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if role == "" {
			return exitError{2, errors.New("--role is missing: viewer, approver, operator or admin")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.Grant(cmd.Context(), &musterv1.GrantRequest{Subject: args[0], Role: role, Sites: sites, Centre: centre, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		b := roleRowOf(out.Binding)
		return tell(cmd, f, b, "role/"+b.ID, fmt.Sprintf("%s is %s now (%s)", cell(b.Subject), cell(scopeText([]roleRow{b})), b.ID))
	}
	return cmd
}

func revokeCommand() *cobra.Command {
	var (
		reason string
		f      format
	)
	cmd := &cobra.Command{
		Use: "revoke SUBJECT|ID", Short: "Take a role away: one by its ID, or all of a person or group in the tenant",
		Long: "It holds from the next call on: tokens and sessions of that person are let in, and\nmay do nothing any more that only the role allowed.",
		Args: usageArgs(cobra.ExactArgs(1), "revoke whose role? `muster access list` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		q := &musterv1.RevokeRequest{Subject: args[0], Reason: reason}
		if strings.HasPrefix(args[0], "b-") {
			q = &musterv1.RevokeRequest{Id: args[0], Reason: reason}
		}
		out, err := c.access.Revoke(cmd.Context(), q)
		if err != nil {
			return c.explain(err)
		}
		rows := []roleRow{}
		var words []string
		for _, b := range out.Revoked {
			r := roleRowOf(b)
			rows = append(rows, r)
			words = append(words, cell(r.Subject)+" is no longer "+cell(scopeText([]roleRow{r})))
		}
		return tell(cmd, f, rows, "role/"+args[0], strings.Join(words, "\n"))
	}
	return cmd
}

func rolesListCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "list", Short: "List the roles of people and groups in the tenant (admin)",
		Args: usageArgs(cobra.NoArgs, "list takes no arguments"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.ListBindings(cmd.Context(), &musterv1.ListBindingsRequest{})
		if err != nil {
			return c.explain(err)
		}
		rows := []roleRow{}
		t := table{columns: []string{"ID", "SUBJECT", "TENANT", "ROLE", "SITES", "SINCE", "BY"}, empty: "none"}
		for _, b := range out.Bindings {
			r := roleRowOf(b)
			rows = append(rows, r)
			t.names = append(t.names, "role/"+r.ID)
			t.rows = append(t.rows, []string{r.ID, cell(r.Subject), r.Tenant, r.Role, cell(r.Sites), day(b.Created), cell(r.CreatedBy)})
		}
		return f.write(cmd.OutOrStdout(), rows, t)
	}
	return cmd
}

func inviteCommand() *cobra.Command {
	var (
		role, sites, reason string
		expires             time.Duration
		f                   format
	)
	cmd := &cobra.Command{
		Use: "invite NAME --role ROLE", Short: "Make a token that lets a new person log in, once",
		Long: "For people without an identity provider. They log in with it (`muster login\n--token-file FILE`, or on the console's log-in page) and have the role from then on.",
		Args: usageArgs(cobra.ExactArgs(1), "invite whom?"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&role, "role", "viewer", "viewer, approver, operator or admin")
	cmd.Flags().StringVar(&sites, "sites", "", "only at sites with these labels; muster/site=NAME is one site")
	cmd.Flags().DurationVar(&expires, "expires", 7*24*time.Hour, "until when it must be used, at most 720h")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.Invite(cmd.Context(), &musterv1.InviteRequest{User: args[0], Role: role, Sites: sites, ExpiresSeconds: uint64(expires / time.Second), Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		return showSecret(cmd, f, out.Token, out.Secret, fmt.Sprintf("Invitation %s for %s until %s. It works once and is shown this once:", out.Token.Id, cell(out.Token.Holder), day(out.Token.Expires)))
	}
	return cmd
}

// tenantCommand is `muster tenant`.
func tenantCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "tenant", Short: "Tenants: owners with their own sites, roles, keys and audit log"}
	cmd.AddCommand(tenantListCommand(), tenantCreateCommand(), handOverCommand())
	return cmd
}

// tenantRow is a tenant as JSON has it.
type tenantRow struct {
	Name  string `json:"name"`
	Title string `json:"title,omitempty"`
	Lab   bool   `json:"lab,omitempty"`
}

func tenantListCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{Use: "list", Short: "List the tenants you have a role in", Args: usageArgs(cobra.NoArgs, "list takes no arguments")}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.ListTenants(cmd.Context(), &musterv1.ListTenantsRequest{})
		if err != nil {
			return c.explain(err)
		}
		rows := []tenantRow{}
		t := table{columns: []string{"NAME", "TITLE", "LAB"}, empty: "none"}
		for _, m := range out.Tenants {
			r := tenantRow{m.GetMeta().GetName(), m.Title, m.Lab}
			rows = append(rows, r)
			t.names = append(t.names, "tenant/"+r.Name)
			t.rows = append(t.rows, []string{r.Name, cell(r.Title), fmt.Sprint(r.Lab)})
		}
		return f.write(cmd.OutOrStdout(), rows, t)
	}
	return cmd
}

func tenantCreateCommand() *cobra.Command {
	var (
		title, reason string
		f             format
	)
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Make a tenant (admin of the centre)",
		Args: usageArgs(cobra.ExactArgs(1), "what shall the tenant be called?"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&title, "title", "", "its name for people")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.CreateTenant(cmd.Context(), &musterv1.CreateTenantRequest{Name: args[0], Title: title, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		name := out.Tenant.GetMeta().GetName()
		return tell(cmd, f, tenantRow{name, out.Tenant.Title, out.Tenant.Lab}, "tenant/"+name, fmt.Sprintf("tenant %s is there; its first person: muster access invite NAME --role admin --tenant %s", name, name))
	}
	return cmd
}

func handOverCommand() *cobra.Command {
	var (
		to, reason string
		expires    time.Duration
		f          format
	)
	cmd := &cobra.Command{
		Use: "hand-over NAME --to PERSON --reason TEXT", Short: "Give a tenant a new owner",
		Long: `Makes an invitation. When PERSON logs in with it, they are the tenant's admin, and
all other roles, tokens, sessions and invitations in the tenant end, in the same
moment. Until then nothing changes. Sites and nodes go on all the time.`,
		Args: usageArgs(cobra.ExactArgs(1), "hand over which tenant? `muster tenant list` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&to, "to", "", "who becomes its admin")
	cmd.Flags().DurationVar(&expires, "expires", 7*24*time.Hour, "until when it must be used, at most 720h")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if to == "" || strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--to PERSON and --reason TEXT are needed")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.access.HandOverTenant(cmd.Context(), &musterv1.HandOverTenantRequest{Name: args[0], User: to, ExpiresSeconds: uint64(expires / time.Second), Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		return showSecret(cmd, f, out.Token, out.Secret, fmt.Sprintf("Give this to %s by a safe way, until %s. It works once and is shown this once:", cell(to), day(out.Token.Expires)))
	}
	return cmd
}

// loginCommand is `muster login`.
func loginCommand() *cobra.Command {
	var (
		tokenFile, out string
		byProvider     bool
		port           uint16
		f              format
	)
	cmd := &cobra.Command{
		Use: "login", Short: "Get a token of your own: by a start token, an invitation, or at the identity provider",
		Long: `Uses up what lets in once, and writes a personal token with the centre's address
and CA to ~/.config/muster/config.yaml (or --out). Without --token-file it uses
the token in the configuration it was given (--config, --data). On the centre's
host, admin.yaml gets a new token in the same moment.

With --oidc you log in at the identity provider, in a browser on this computer.
The configuration needs the centre's address and CA then, and no token. On
another computer, lead a port there: ssh -L 7999:127.0.0.1:7999 HOST, and give
--port 7999.`,
		Example: "  muster login --config admin.yaml\n  muster login --config admin.yaml --token-file invitation.txt\n  muster login --config centre.yaml --oidc",
		Args:    usageArgs(cobra.NoArgs, "login takes no arguments"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file with the token, - for standard input; never on the command line, where others could see it")
	cmd.Flags().BoolVar(&byProvider, "oidc", false, "log in at the centre's identity provider, in a browser on this computer")
	cmd.Flags().Uint16Var(&port, "port", 0, "with --oidc: the port of this computer that the browser comes to (default: a free one)")
	cmd.Flags().StringVar(&out, "out", "", "file to write (default ~/.config/muster/config.yaml)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, _, err := a.load()
		if err != nil {
			return err
		}
		if byProvider && tokenFile != "" {
			return exitError{2, errors.New("--oidc and --token-file exclude each other")}
		}
		if port != 0 && (!byProvider || port < 1024) {
			return exitError{2, errors.New("--port goes with --oidc and is 1024 or higher")}
		}
		token := conf.Token
		if tokenFile != "" {
			if token, err = readToken(cmd.InOrStdin(), tokenFile); err != nil {
				return err
			}
		}
		if out == "" {
			dir, err := os.UserConfigDir()
			if err != nil {
				return fmt.Errorf("find your configuration: %w; give --out FILE", err)
			}
			out = filepath.Join(dir, "muster", "config.yaml")
		}
		// What lets in once is used up by asking: look for a place first.
		if err := os.MkdirAll(filepath.Dir(out), 0o700); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
		file, err := renameio.NewPendingFile(out, renameio.WithPermissions(0o600))
		if err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
		defer file.Cleanup() //nolint:errcheck // after the replacement there is nothing to clean up
		c, err := a.connect()
		if err != nil {
			return err
		}
		q := &musterv1.LoginRequest{Token: token}
		if byProvider {
			if q.Code, q.Verifier, err = browserLogin(cmd.Context(), cmd.ErrOrStderr(), conf.Server, port); err != nil {
				return err
			}
			q.Token = ""
		}
		m, err := c.access.Login(cmd.Context(), q)
		if err != nil {
			return c.explain(err)
		}
		b, err := yaml.Marshal(central.AdminConfig{Server: conf.Server, CA: conf.CA, Token: m.Token})
		if err != nil {
			return err
		}
		if _, err := file.Write(append([]byte("# "+text1(m.User)+" at this muster centre. Keep it secret.\n"), b...)); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
		if err := file.CloseAtomicallyReplace(); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
		return tell(cmd, f, map[string]any{"user": m.User, "tenant": m.Tenant, "expires": timeOf(m.Expires), "file": out}, "user/"+m.User,
			fmt.Sprintf("You are %s until %s; %s holds your token", cell(m.User), day(m.Expires), out))
	}
	return cmd
}

// text1 is a name on one line of a comment.
func text1(s string) string { return strings.Join(strings.Fields(cell(s)), " ") }

func readToken(stdin io.Reader, name string) (string, error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", exitError{3, fmt.Errorf("read token: %w", err)}
		}
		defer f.Close()
		in = f
	}
	line, err := bufio.NewReader(io.LimitReader(in, 1024)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", exitError{3, fmt.Errorf("read token: %w", err)}
	}
	return strings.TrimSpace(line), nil
}

// logoutCommand is `muster logout`.
func logoutCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "logout", Short: "End the token in the configuration", Args: usageArgs(cobra.NoArgs, "logout takes no arguments")}
	a := accessFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		if _, err := c.access.Logout(cmd.Context(), &musterv1.LogoutRequest{}); err != nil {
			return c.explain(err)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "The token in %s has ended\n", c.file)
		return nil
	}
	return cmd
}

// whoamiCommand is `muster whoami`.
func whoamiCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{Use: "whoami", Short: "Say who the centre takes you for, and what you may do", Args: usageArgs(cobra.NoArgs, "whoami takes no arguments")}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		m, err := c.access.WhoAmI(cmd.Context(), &musterv1.WhoAmIRequest{})
		if err != nil {
			return c.explain(err)
		}
		rows := []roleRow{}
		for _, b := range m.Roles {
			rows = append(rows, roleRowOf(b))
		}
		words := fmt.Sprintf("%s, %s of tenant %s, by %s %s", cell(m.User), m.Role, m.Tenant, m.Kind, m.Credential)
		if m.Expires != nil {
			words += " until " + day(m.Expires)
		}
		return tell(cmd, f, map[string]any{
			"user": m.User, "tenant": m.Tenant, "role": m.Role, "roles": rows, "credential": m.Credential, "kind": m.Kind, "expires": timeOf(m.Expires), "groups": m.Groups, "source": m.Source,
		}, "user/"+m.User, words)
	}
	return cmd
}
