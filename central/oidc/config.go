// Package oidc lets people log in at an identity provider by OpenID Connect
// (authorization code with PKCE, state and nonce) and says which roles their
// groups have. It keeps nothing: the caller holds a Flow while the browser is
// away, and sees to it that none is used twice.
//
// Everything that comes from the provider is bounded and checked, and
// everything that comes from the browser is hostile.
package oidc

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// CallbackPath is where the provider sends browsers back to.
const CallbackPath = "/auth/oidc/callback"

// Limits of what lasts.
const (
	defaultSession = 12 * time.Hour
	minSession     = 5 * time.Minute
	maxSession     = 24 * time.Hour
	defaultTokens  = 30 * 24 * time.Hour
	maxTokens      = 366 * 24 * time.Hour
	// maxConfig bounds a file of settings, maxRules its rules.
	maxConfig = 1 << 20
	maxRules  = 2000
)

// Config is the file of `muster serve --oidc`.
type Config struct {
	// Title is what the button on the log-in page says; default "Log in with
	// your identity provider".
	Title string `json:"title,omitempty"`
	// Issuer is the provider's address, exactly as it names itself.
	Issuer string `json:"issuer"`
	// ClientID is the name under which the provider knows this centre.
	ClientID string `json:"client-id"`
	// ClientSecretFile holds the secret of a confidential client; none for a
	// public one. Relative to the directory of this file.
	ClientSecretFile string `json:"client-secret-file,omitempty"`
	// RedirectURL is registered at the provider: https://, a name of the
	// centre that browsers use, and CallbackPath.
	RedirectURL string `json:"redirect-url"`
	// CAFile holds the roots to trust for the provider; default: the host's.
	CAFile string `json:"ca-file,omitempty"`
	// Scopes are asked for beside "openid"; default profile and email.
	Scopes []string `json:"scopes,omitempty"`
	// UserClaim names the person: "email" (the default; it must be verified),
	// "preferred_username", "sub" or another one.
	UserClaim string `json:"user-claim,omitempty"`
	// UnverifiedEmail takes email addresses that the provider does not call
	// verified. Only for providers in which people cannot set their own.
	UnverifiedEmail bool `json:"unverified-email,omitempty"`
	// GroupsClaim holds the groups; default "groups". A dot leads into
	// objects: realm_access.roles.
	GroupsClaim string `json:"groups-claim,omitempty"`
	// UserInfo also asks the provider's userinfo endpoint, for those that do
	// not put groups into ID tokens.
	UserInfo bool `json:"userinfo,omitempty"`
	// Session is how long a log-in holds, in a browser and on a command line:
	// 5m to 24h, default 12h. Groups are looked at again after that.
	Session string `json:"session,omitempty"`
	// Tokens is how long API tokens of people of the provider hold at most;
	// default 720h.
	Tokens string `json:"tokens,omitempty"`
	// Rules give roles to groups. Who is in none of them, and has no role by
	// `muster access grant` either, is not let in.
	Rules []Rule `json:"rules,omitempty"`

	secret   string
	roots    *x509.CertPool
	session  time.Duration
	tokens   time.Duration
	bindings map[string][]access.Binding
}

// Rule gives a group of the provider a role.
type Rule struct {
	Group string `json:"group"`
	Role  string `json:"role"`
	// Tenant is a name, or "*" for the whole centre; default "default".
	Tenant string `json:"tenant,omitempty"`
	// Sites limits the role to sites with these labels.
	Sites string `json:"sites,omitempty"`
}

// Load reads and checks a file of settings and the files it names.
func Load(name string) (*Config, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("oidc: read settings: %w", err)
	}
	if info.Size() > maxConfig {
		return nil, fmt.Errorf("oidc: read settings: %s is larger than %d bytes", name, maxConfig)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("oidc: read settings: %w", err)
	}
	c, err := Parse(b)
	if c == nil {
		return nil, fmt.Errorf("oidc: %s: %w", name, err)
	}
	errs := []error{err}
	beside := func(file string) string {
		if filepath.IsAbs(file) {
			return file
		}
		return filepath.Join(filepath.Dir(name), file)
	}
	if c.ClientSecretFile != "" {
		if c.secret, err = readSecret(beside(c.ClientSecretFile)); err != nil {
			errs = append(errs, err)
		}
	}
	if c.CAFile != "" {
		pem, err := os.ReadFile(beside(c.CAFile))
		c.roots = x509.NewCertPool()
		if err != nil {
			errs = append(errs, fmt.Errorf("ca-file: %w", err))
		} else if !c.roots.AppendCertsFromPEM(pem) {
			errs = append(errs, fmt.Errorf("ca-file: %s holds no certificate", c.CAFile))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("oidc: %s: %w", name, err)
	}
	return c, nil
}

func readSecret(name string) (string, error) {
	info, err := os.Stat(name)
	if err != nil {
		return "", fmt.Errorf("client-secret-file: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 && info.Mode()&fs.ModeType == 0 {
		return "", fmt.Errorf("client-secret-file: others may read %s (mode %04o): chmod 600 it", name, info.Mode().Perm())
	}
	if info.Size() > 4096 {
		return "", fmt.Errorf("client-secret-file: %s is larger than a secret", name)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return "", fmt.Errorf("client-secret-file: %w", err)
	}
	s := string(bytes.TrimSpace(b))
	if s == "" {
		return "", fmt.Errorf("client-secret-file: %s is empty", name)
	}
	return s, nil
}

// Parse reads settings without the files they name, and reports all problems.
func Parse(b []byte) (*Config, error) {
	c := &Config{}
	if err := yaml.UnmarshalStrict(b, c); err != nil {
		return nil, err
	}
	return c, c.check()
}

// check fills in defaults and reports all problems.
func (c *Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Title == "" {
		c.Title = "Log in with your identity provider"
	}
	if len(c.Title) > 64 {
		bad("title: at most 64 characters")
	}
	if u, err := url.Parse(c.Issuer); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		bad("issuer: %.200q is no https address without query", c.Issuer)
	}
	if c.ClientID == "" || len(c.ClientID) > 256 {
		bad("client-id: want the name under which the provider knows this centre")
	}
	if u, err := url.Parse(c.RedirectURL); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != CallbackPath || u.RawQuery != "" || u.Fragment != "" {
		bad("redirect-url: want https://NAME-OF-THE-CENTRE:7443%s, not %.200q", CallbackPath, c.RedirectURL)
	}
	if c.Scopes == nil {
		c.Scopes = []string{"profile", "email"}
	}
	for _, s := range c.Scopes {
		if s == "" || strings.ContainsAny(s, " \t\r\n\"\\") || s == "offline_access" {
			bad("scopes: %.80q cannot be asked for", s)
		}
	}
	if c.UserClaim == "" {
		c.UserClaim = "email"
	}
	if c.GroupsClaim == "" {
		c.GroupsClaim = "groups"
	}
	var err error
	if c.session, err = span(c.Session, defaultSession, minSession, maxSession); err != nil {
		bad("session: %w", err)
	}
	if c.tokens, err = span(c.Tokens, defaultTokens, time.Hour, maxTokens); err != nil {
		bad("tokens: %w", err)
	}
	if len(c.Rules) > maxRules {
		bad("rules: there are %d, at most %d", len(c.Rules), maxRules)
	}
	c.bindings = make(map[string][]access.Binding)
	for i, r := range c.Rules[:min(len(c.Rules), maxRules)] {
		b, err := r.binding()
		if err != nil {
			bad("rule %d (group %.80q): %w", i+1, r.Group, err)
			continue
		}
		c.bindings[r.Group] = append(c.bindings[r.Group], b)
	}
	return errors.Join(errs...)
}

func span(s string, normal, least, most time.Duration) (time.Duration, error) {
	if s == "" {
		return normal, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%.40q is no length of time, such as 8h", s)
	}
	if d < least || d > most {
		return 0, fmt.Errorf("%s is not within %s and %s", d, least, most)
	}
	return d, nil
}

func (r Rule) binding() (access.Binding, error) {
	b := access.Binding{Tenant: r.Tenant}
	if b.Tenant == "" {
		b.Tenant = "default"
	}
	if !goodGroup(r.Group) {
		return b, errors.New("group: want 1 to 256 visible characters")
	}
	var err error
	if b.Role, err = access.ParseRole(r.Role); err != nil {
		return b, err
	}
	if b.Sites, err = fleet.ParseSelector(r.Sites); err != nil {
		return b, err
	}
	return b, b.Validate()
}

// Roles are what the rules give to these groups.
func (c *Config) Roles(groups []string) []access.Binding {
	var out []access.Binding
	for _, g := range groups {
		out = append(out, c.bindings[g]...)
	}
	return out
}

// Tenants are those that the rules name, without access.AllTenants.
func (c *Config) Tenants() []string {
	var out []string
	for _, all := range c.bindings {
		for _, b := range all {
			if b.Tenant != access.AllTenants && !slices.Contains(out, b.Tenant) {
				out = append(out, b.Tenant)
			}
		}
	}
	slices.Sort(out)
	return out
}

// SessionLife is how long a log-in holds.
func (c *Config) SessionLife() time.Duration { return c.session }

// TokenLife bounds API tokens of people of the provider.
func (c *Config) TokenLife() time.Duration { return c.tokens }
