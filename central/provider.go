package central

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/console"
	"github.com/muster-edge/muster/central/oidc"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/text"
)

// Logging in at an identity provider. A stranger who begins costs no row: what
// must be kept while the browser is away is sealed in a cookie of that
// browser. What is finished is noted, so that nothing of it counts twice.
const (
	// providerPrefix begins the names of people of the provider, so that
	// nobody there can be called like somebody here.
	providerPrefix = "oidc/"
	flowCookie     = "__Host-muster-flow"
	flowLife       = 10 * time.Minute
	// lineCodeLife is for the step from the browser to the command line.
	lineCodeLife = 2 * time.Minute
	maxFlow      = 4000
)

// fromProvider reports whether a name is one of the identity provider's.
func fromProvider(name string) bool { return strings.HasPrefix(name, providerPrefix) }

// provider implements console.Provider.
type provider struct {
	s    *Server
	cfg  *oidc.Config
	oidc *oidc.Provider
	seal cipher.AEAD
	code []byte // key that marks codes for command lines as ours
}

// newProvider returns nil if no identity provider is configured.
func newProvider(s *Server, sealKey []byte) (*provider, error) {
	if s.cfg.OIDC == nil {
		return nil, nil
	}
	p := &provider{s: s, cfg: s.cfg.OIDC, oidc: oidc.New(s.cfg.OIDC, s.cfg.Now)}
	flow, err := hkdf.Key(sha256.New, sealKey, nil, "muster/login-flow/v1", 32)
	if err == nil {
		p.code, err = hkdf.Key(sha256.New, sealKey, nil, "muster/login-code/v1", 32)
	}
	if err != nil {
		return nil, fmt.Errorf("central: make key of log-ins: %w", err)
	}
	block, err := aes.NewCipher(flow)
	if err == nil {
		p.seal, err = cipher.NewGCMWithRandomNonce(block)
	}
	if err != nil {
		return nil, fmt.Errorf("central: make key of log-ins: %w", err)
	}
	return p, nil
}

// Roles are what the rules give to groups.
func (p *provider) Roles(groups []string) []access.Binding {
	if p == nil {
		return nil
	}
	return p.cfg.Roles(groups)
}

// mayHandOver refuses to give a tenant a new owner while the file of the old
// one gives people roles in it, which no statement of the new owner ends.
func (p *provider) mayHandOver(tenant string) error {
	if p == nil || !slices.Contains(p.cfg.Tenants(), tenant) {
		return nil
	}
	return &enroll.Refused{
		Why: "rules for the identity provider give roles in tenant " + tenant + ", and would go on to",
		Do:  "take them out of the file of --oidc and start the centre again",
	}
}

// Title implements console.Provider.
func (p *provider) Title() string { return p.cfg.Title }

// flow is a log-in under way, sealed in the browser's cookie.
type flow struct {
	oidc.Flow
	Next    string    `json:"next"`
	Expires time.Time `json:"expires"`
	// Line is set when a command line asked for it.
	Line *line `json:"line,omitempty"`
}

// line is a command line that listens on a loopback port.
type line struct {
	Port      uint16 `json:"port"`
	Challenge string `json:"challenge"`
	State     string `json:"state"`
}

// lineOf reads what a command line put into the address; nil: a browser alone.
func lineOf(q url.Values) (*line, error) {
	if !q.Has("port") && !q.Has("challenge") {
		return nil, nil
	}
	port, err := strconv.ParseUint(q.Get("port"), 10, 16)
	l := &line{uint16(port), q.Get("challenge"), q.Get("state")}
	if err != nil || l.Port < 1024 || !isSecret(l.Challenge) || !isSecret(l.State) {
		return nil, &console.LoginProblem{Code: http.StatusBadRequest, Title: "This address is not whole", Text: "Open it exactly as `muster login --oidc` printed it."}
	}
	return l, nil
}

// isSecret: 32 bytes in base64, as we and our command lines write them.
func isSecret(s string) bool {
	b, err := base64.RawURLEncoding.DecodeString(s)
	return err == nil && len(b) == 32
}

// LoginCheck is what both ends of a command line's log-in show to the person.
func LoginCheck(challenge string) string {
	h := sha256.Sum256([]byte("muster/login-check/v1" + challenge))
	s := base32.StdEncoding.EncodeToString(h[:5])
	return s[:4] + "-" + s[4:]
}

// Begin implements console.Provider.
func (p *provider) Begin(w http.ResponseWriter, r *http.Request, next string) (string, error) {
	q := r.URL.Query()
	l, err := lineOf(q)
	if err != nil {
		return "", err
	}
	// The provider sends back to one address; the cookie must be of that
	// host. Whoever came by another name goes there first, and no more than
	// once: a proxy may hide the name.
	home, err := url.Parse(p.cfg.RedirectURL)
	if err != nil {
		return "", err // it was checked at the start
	}
	if !sameHost(r.Host, home.Host) && q.Get("home") == "" {
		on := url.Values{"next": {next}, "home": {"1"}}
		if l != nil {
			on.Set("port", strconv.Itoa(int(l.Port)))
			on.Set("challenge", l.Challenge)
			on.Set("state", l.State)
		}
		return "https://" + home.Host + "/auth/oidc?" + on.Encode(), nil
	}
	f, to, err := p.oidc.Begin(r.Context())
	if err != nil {
		return "", p.problem(r, err)
	}
	sealed, err := p.sealFlow(flow{Flow: f, Next: next, Expires: p.s.cfg.Now().Add(flowLife), Line: l})
	if err != nil {
		return "", err
	}
	// Lax: the provider's redirect back comes from another site.
	http.SetCookie(w, &http.Cookie{Name: flowCookie, Value: sealed, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, MaxAge: int(flowLife / time.Second)})
	return to, nil
}

func sameHost(a, b string) bool {
	return strings.EqualFold(strings.TrimSuffix(a, ":443"), strings.TrimSuffix(b, ":443"))
}

func (p *provider) sealFlow(f flow) (string, error) {
	b, err := json.Marshal(f)
	if err != nil {
		return "", fmt.Errorf("central: write log-in: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(p.seal.Seal(nil, nil, b, []byte(flowCookie))), nil
}

func (p *provider) openFlow(r *http.Request) (flow, bool) {
	var f flow
	c, err := r.Cookie(flowCookie)
	if err != nil || len(c.Value) > maxFlow {
		return f, false
	}
	sealed, err := base64.RawURLEncoding.DecodeString(c.Value)
	if err != nil {
		return f, false
	}
	b, err := p.seal.Open(nil, nil, sealed, []byte(flowCookie))
	if err != nil || json.Unmarshal(b, &f) != nil {
		return f, false
	}
	return f, p.s.cfg.Now().Before(f.Expires)
}

// Finish implements console.Provider.
func (p *provider) Finish(w http.ResponseWriter, r *http.Request) (console.Arrival, error) {
	f, ok := p.openFlow(r)
	http.SetCookie(w, &http.Cookie{Name: flowCookie, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, MaxAge: -1})
	if !ok {
		return console.Arrival{}, &console.LoginProblem{
			Code: http.StatusForbidden, Title: "This log-in was not begun in this browser", Tried: true,
			Text: "Or it was begun more than ten minutes ago, or ended already. Begin again on the log-in page.",
		}
	}
	person, err := p.oidc.Finish(r.Context(), f.Flow, r.URL.Query())
	if err != nil {
		return console.Arrival{}, p.problem(r, err)
	}
	who, err := p.admit(r.Context(), f, person, sourceOf(r.RemoteAddr))
	if err != nil {
		return console.Arrival{}, p.problem(r, err)
	}
	if f.Line == nil {
		return console.Arrival{Next: f.Next}, p.s.openSession(r.Context(), w, r, who)
	}
	code, err := p.lineCode(r.Context(), f.Line, who)
	if err != nil {
		return console.Arrival{}, err
	}
	to := url.URL{Scheme: "http", Host: fmt.Sprintf("127.0.0.1:%d", f.Line.Port), Path: "/", RawQuery: url.Values{"code": {code}, "state": {f.Line.State}}.Encode()}
	return console.Arrival{Line: &console.CommandLine{Name: who.name, Check: LoginCheck(f.Line.Challenge), URL: to.String()}}, nil
}

// noRole: the provider knows them, and nothing here gives them a role.
type noRole struct {
	name   string
	groups []string
}

// Error implements error.
func (n *noRole) Error() string { return "central: " + n.name + " has no role here" }

// admit notes that the flow is used up and looks at what the person may do.
func (p *provider) admit(ctx context.Context, f flow, person oidc.Person, source string) (identity, error) {
	who := identity{name: providerPrefix + person.Name, groups: person.Groups, life: p.cfg.SessionLife(), how: "identity provider " + p.cfg.Issuer + ", subject " + text.Clean(person.Subject, 255)}
	now := p.s.cfg.Now()
	err := p.s.store.Update(ctx, func(t store.Tx) error {
		err := t.AddLoginState(store.LoginState{Hash: sha256.Sum256([]byte("state " + f.State)), Expires: f.Expires})
		if errors.Is(err, store.ErrExists) {
			return &oidc.Refused{Why: "this log-in was used already"}
		}
		if err != nil {
			return err
		}
		by := act{actor: userSubject(who.name), source: source, now: now}
		return p.endOutdated(t, by, who)
	})
	if err != nil {
		return who, err
	}
	var own []access.Binding
	err = p.s.store.View(ctx, func(t store.Reader) (err error) {
		own, err = p.s.bindingsOf(t, who.name, who.groups)
		return err
	})
	if err != nil {
		return who, err
	}
	if len(own) == 0 {
		return who, &noRole{who.name, who.groups}
	}
	who.tenant = homeOf(own)
	return who, nil
}

// homeOf is where somebody acts who names no tenant.
func homeOf(own []access.Binding) string {
	var all []string
	for _, b := range own {
		if b.Tenant == access.AllTenants || b.Tenant == DefaultTenant {
			return DefaultTenant
		}
		all = append(all, b.Tenant)
	}
	return slices.Min(all)
}

// endOutdated ends what the person holds by a group that they are not in any
// more. Between two log-ins nothing is known of it; the lives of what people
// of the provider hold are short for that reason.
func (p *provider) endOutdated(t store.Tx, by act, who identity) error {
	for _, kind := range []store.CredentialKind{store.CredentialSession, store.CredentialPersonal, store.CredentialToken} {
		all, err := t.CredentialsOf(who.name, kind, maxCredentials)
		if err != nil {
			return err
		}
		for _, c := range all {
			gone := slices.IndexFunc(c.Groups, func(g string) bool { return !slices.Contains(who.groups, g) })
			if gone < 0 || c.Ended(by.now) != "" {
				continue
			}
			if err := (accessService{Server: p.s}).endCredential(t, by, c, "its holder is no longer in group "+c.Groups[gone]); err != nil {
				return err
			}
		}
	}
	return nil
}

// problem turns an error into a page.
func (p *provider) problem(r *http.Request, err error) error {
	var (
		no   *oidc.Refused
		none *noRole
	)
	why := "failed"
	out := &console.LoginProblem{}
	switch {
	case errors.As(err, &none):
		why = "no-role"
		out.Code, out.Title = http.StatusForbidden, "You have no role here yet"
		out.Text = "The identity provider knows you as " + strings.TrimPrefix(none.name, providerPrefix) + ", and nothing gives you a role in this centre. Ask its administrator for one: by the command below, or by a rule for one of your groups."
		out.Details = []string{groupsSentence(none.groups)}
		out.Commands = []string{"muster access grant " + none.name + " --role viewer"}
	case errors.As(err, &no):
		why = "refused"
		*out = console.LoginProblem{Code: http.StatusForbidden, Title: "You could not be logged in", Text: upperFirst(no.Why) + ".", Tried: true}
	case errors.Is(err, oidc.ErrUnavailable):
		why = "unavailable"
		*out = console.LoginProblem{
			Code: http.StatusServiceUnavailable, Title: "The identity provider does not answer",
			Text:    "Try again in a minute. Who has a token can still log in with it.",
			Details: []string{"On the centre's own host, " + AdminFile + " in the data directory holds one. The centre's log says what the provider answered."},
		}
	default:
		return err
	}
	p.s.metrics.refused.WithLabelValues("login", why).Inc()
	p.s.refusals.say("log-in refused", logAddress, sourceOf(r.RemoteAddr), logError, text.Clean(err.Error(), 400))
	return out
}

func upperFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

func groupsSentence(groups []string) string {
	switch n := len(groups); {
	case n == 0:
		return "It names no groups of yours. If you are in some, the provider does not send them to muster."
	case n > 12:
		return fmt.Sprintf("Your groups: %s, and %d more.", strings.Join(groups[:12], ", "), n-12)
	}
	return "Your groups: " + strings.Join(groups, ", ") + "."
}

// redemption is what waits for a command line that has a code.
type redemption struct {
	Challenge string        `json:"challenge"`
	Name      string        `json:"name"`
	Groups    []string      `json:"groups"`
	Tenant    string        `json:"tenant"`
	How       string        `json:"how"`
	Life      time.Duration `json:"life"`
}

// lineCode makes the code by which a command line gets its token. It works
// once, for whoever knows the verifier of the challenge.
func (p *provider) lineCode(ctx context.Context, l *line, who identity) (string, error) {
	b := make([]byte, 32)
	rand.Read(b)
	code := base64.RawURLEncoding.EncodeToString(append(b, p.mark(b)...))
	body, err := json.Marshal(redemption{l.Challenge, who.name, who.groups, who.tenant, who.how, who.life})
	if err != nil {
		return "", fmt.Errorf("central: write log-in: %w", err)
	}
	return code, p.s.store.Update(ctx, func(t store.Tx) error {
		return t.AddLoginState(store.LoginState{Hash: sha256.Sum256([]byte("code " + code)), Expires: p.s.cfg.Now().Add(lineCodeLife), Body: body})
	})
}

// mark tells our codes from guesses without a look at the database.
func (p *provider) mark(b []byte) []byte {
	h := hmac.New(sha256.New, p.code)
	h.Write(b)
	return h.Sum(nil)[:16]
}

var errBadCode = connect.NewError(connect.CodeUnauthenticated, errors.New("this code is not known here, was used already, or is older than two minutes: begin again"))

// redeem turns a code into who it is of.
func (p *provider) redeem(ctx context.Context, code, verifier string) (identity, error) {
	if p == nil {
		return identity{}, connect.NewError(connect.CodeFailedPrecondition, errors.New("this centre has no identity provider: log in with a token (muster login --token-file FILE)"))
	}
	raw, err := base64.RawURLEncoding.DecodeString(code)
	if err != nil || len(raw) != 48 || !hmac.Equal(raw[32:], p.mark(raw[:32])) {
		return identity{}, errBadCode
	}
	var l store.LoginState
	err = p.s.store.Update(ctx, func(t store.Tx) (err error) {
		l, err = t.TakeLoginState(sha256.Sum256([]byte("code " + code)))
		return err
	})
	if errors.Is(err, store.ErrNotFound) || err == nil && !p.s.cfg.Now().Before(l.Expires) {
		return identity{}, errBadCode
	}
	if err != nil {
		return identity{}, err
	}
	var x redemption
	if err := json.Unmarshal(l.Body, &x); err != nil {
		return identity{}, fmt.Errorf("central: read log-in: %w", err)
	}
	// Whoever tries with a wrong verifier has spent the code.
	sum := sha256.Sum256([]byte(verifier))
	if subtle.ConstantTimeCompare([]byte(base64.RawURLEncoding.EncodeToString(sum[:])), []byte(x.Challenge)) != 1 {
		return identity{}, errBadCode
	}
	return identity{name: x.Name, groups: x.Groups, tenant: x.Tenant, how: x.How, life: x.Life}, nil
}

// warnOfMissing says which tenants rules name that do not exist (yet).
func (p *provider) warnOfMissing(ctx context.Context) error {
	if p == nil {
		return nil
	}
	return p.s.store.View(ctx, func(t store.Reader) error {
		for _, name := range p.cfg.Tenants() {
			if _, err := t.Tenant(name); errors.Is(err, store.ErrNotFound) {
				p.s.log.Warn("a rule for the identity provider names a tenant that does not exist: muster tenant create", logTenant, name)
			} else if err != nil {
				return err
			}
		}
		return nil
	})
}
