package oidc

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/fleet/text"
)

const (
	// maxGroups of one person. Who is in more has a provider that sends too
	// much; cutting some off would take roles away at random.
	maxGroups = 500
	maxGroup  = 256
	maxName   = 100
	// maxClaims bounds what is parsed of a token or of userinfo.
	maxClaims = 512 << 10
)

// Person is who the provider says somebody is.
type Person struct {
	// Subject never changes; Name is the claim that Config.UserClaim names.
	Subject, Name string
	// Groups are sorted, each once.
	Groups []string
}

// claims are what the provider says of a person.
type claims map[string]any

func parseClaims(b []byte) (claims, error) {
	if len(b) > maxClaims {
		return nil, fmt.Errorf("the provider says more than %d bytes about a person", maxClaims)
	}
	var c claims
	if err := json.Unmarshal(b, &c); err != nil || c == nil {
		return nil, fmt.Errorf("what the provider says about the person is no JSON object")
	}
	return c, nil
}

// at finds a claim by its name, or by a path of names with dots between.
func (c claims) at(name string) any {
	if v, there := c[name]; there {
		return v
	}
	var here any = map[string]any(c)
	for part := range strings.SplitSeq(name, ".") {
		m, ok := here.(map[string]any)
		if !ok {
			return nil
		}
		here = m[part]
	}
	return here
}

func (c claims) text(name string) string {
	s, _ := c.at(name).(string) // anything else is no text
	return s
}

// person reads a person out of claims.
func (c claims) person(cfg *Config) (Person, error) {
	p := Person{Subject: c.text("sub"), Name: c.text(cfg.UserClaim)}
	if p.Subject == "" || len(p.Subject) > 255 {
		return p, fmt.Errorf("the provider names no subject")
	}
	if p.Name == "" {
		return p, fmt.Errorf("the provider does not say the claim %q, which names people here (user-claim); does it need another scope?", cfg.UserClaim)
	}
	if cfg.UserClaim == "email" && !cfg.UnverifiedEmail {
		// Some providers write the boolean as a string.
		if v := c.at("email_verified"); v != true && v != "true" {
			return p, fmt.Errorf("the provider has not verified the address %s; verify it there, or name people by another claim (user-claim)", text.Clean(p.Name, maxName))
		}
	}
	if !goodName(p.Name) {
		return p, fmt.Errorf("the provider's name %.120q cannot be used here: want at most %d characters without spaces, colons, quotes and brackets", text.Clean(p.Name, maxName), maxName)
	}
	var err error
	p.Groups, err = c.groups(cfg.GroupsClaim)
	return p, err
}

func (c claims) groups(name string) ([]string, error) {
	var out []string
	switch v := c.at(name).(type) {
	case nil:
	case string:
		out = append(out, v)
	case []any:
		if len(v) > maxGroups {
			return nil, fmt.Errorf("the provider names more than %d groups of this person: let it send only those that have a role in muster", maxGroups)
		}
		for _, g := range v {
			s, ok := g.(string)
			if !ok {
				return nil, fmt.Errorf("the claim %q holds something else than names of groups", name)
			}
			out = append(out, s)
		}
	default:
		return nil, fmt.Errorf("the claim %q holds something else than names of groups", name)
	}
	// A group with a name that no rule can have gives nothing.
	out = slices.DeleteFunc(out, func(g string) bool { return !goodGroup(g) })
	slices.Sort(out)
	return slices.Compact(out), nil
}

func goodGroup(s string) bool { return s != "" && len(s) <= maxGroup && text.Clean(s, maxGroup) == s }

// goodName holds what is no name in subjects of roles, logs and shells away.
func goodName(s string) bool {
	return s != "" && len(s) <= maxName && text.Clean(s, maxName) == s && !strings.ContainsAny(s, " :\"'<>&")
}
