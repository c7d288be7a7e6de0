package oidc

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet/access"
)

const good = `issuer: https://login.example.org
client-id: muster
redirect-url: https://centre.example.org:7443/auth/oidc/callback
rules:
- {group: admins, role: admin, tenant: "*"}
- {group: Shops North, role: operator, sites: region=north}
- {group: Shops North, role: viewer, tenant: acme}
`

func TestSettings(t *testing.T) {
	c, err := Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if c.SessionLife() != 12*time.Hour || c.TokenLife() != 30*24*time.Hour || c.UserClaim != "email" || c.GroupsClaim != "groups" || len(c.Scopes) != 2 {
		t.Errorf("defaults: %+v", c)
	}
	if got := c.Roles([]string{"Shops North", "other"}); len(got) != 2 || got[0].Role != access.Operator || got[0].Sites.String() != "region=north" || got[0].Tenant != "default" || got[1].Tenant != "acme" {
		t.Errorf("roles: %v", got)
	}
	if len(c.Roles([]string{"shops north", "ADMINS", ""})) != 0 || len(c.Roles(nil)) != 0 {
		t.Error("groups that no rule names have roles")
	}
	if got := strings.Join(c.Tenants(), " "); got != "acme default" {
		t.Errorf("tenants: %s", got)
	}
}

// Every problem is reported, in one go.
func TestWrongSettings(t *testing.T) {
	_, err := Parse([]byte(`issuer: http://login.example.org
redirect-url: https://centre.example.org/somewhere
scopes: [offline_access]
session: 30h
tokens: long
rules:
- {group: "", role: viewer}
- {group: a, role: king}
- {group: b, role: admin, sites: region=north}
- {group: c, role: viewer, tenant: "*", sites: a=b}
- {group: d, role: viewer, tenant: "No Tenant"}
- {group: e, role: viewer, sites: "a=b=c"}
`))
	if err == nil {
		t.Fatal("taken")
	}
	for _, want := range []string{"issuer", "client-id", "redirect-url", "offline_access", "session", "tokens", "rule 1", "rule 2", "rule 3", "rule 4", "rule 5", "rule 6"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %s in: %v", want, err)
		}
	}
	for name, text := range map[string]string{
		"an unknown key": good + "client-secret: x\n", "no map": "- a", "a user in the issuer": strings.Replace(good, "https://login", "https://u:p@login", 1),
		"a query": strings.Replace(good, "login.example.org", "login.example.org/?a=b", 1),
	} {
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestSecretsAreInFilesOfTheirOwn(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	main := write("oidc.yaml", good+"client-secret-file: secret\n", 0o644)
	load := func(want string) {
		t.Helper()
		_, err := Load(main)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	load("no such file")
	write("secret", "s3cret", 0o644)
	load("chmod 600")
	if err := os.Chmod(filepath.Join(dir, "secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	load("")
	c, err := Load(main)
	if err != nil || c.secret != "s3cret" {
		t.Fatal(err)
	}
	if b, err := json.Marshal(c); err != nil || strings.Contains(string(b), "s3cret") {
		t.Errorf("the settings show the secret: %s, %v", b, err)
	}
	write("secret", " \n", 0o600)
	load("empty")
	write("secret", strings.Repeat("x", 5000), 0o600)
	load("larger")
	write("secret", "x", 0o600)
	write("oidc.yaml", good+"ca-file: ca.pem\n", 0o644)
	load("no such file")
	write("ca.pem", "x", 0o644)
	load("no certificate")
	write("oidc.yaml", strings.Repeat("#", maxConfig+1), 0o644)
	load("larger")
}

func TestClaimPaths(t *testing.T) {
	c, err := parseClaims([]byte(`{"realm_access":{"roles":["a"]},"https://x.example/groups":["b"],"one":"c"}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"realm_access.roles": "a", "https://x.example/groups": "b", "one": "c", "none": "", "realm_access.none.more": ""} {
		got, err := c.groups(name)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := c.groups("realm_access"); err == nil {
		t.Error("an object is taken for groups")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("rules: [{group: a}]"))
	f.Add([]byte("issuer: {}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse(b)
		if err != nil {
			return
		}
		// What is taken gives only what a binding may be.
		for g := range c.bindings {
			for _, b := range c.Roles([]string{g}) {
				if err := b.Validate(); err != nil {
					t.Fatalf("group %q: %v", g, err)
				}
			}
		}
	})
}

func FuzzClaims(f *testing.F) {
	f.Add([]byte(`{"sub":"u1","email":"a@b.c","email_verified":true,"groups":["x"]}`), "groups")
	f.Add([]byte(`{"sub":1,"groups":{"a":["b"]}}`), "groups.a")
	f.Add([]byte(`null`), "")
	cfg, err := Parse([]byte(good))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		c, err := parseClaims(b)
		if err != nil {
			return
		}
		again := *cfg
		again.GroupsClaim = name
		p, err := c.person(&again)
		if err != nil {
			return
		}
		if !goodName(p.Name) || p.Subject == "" || len(p.Groups) > maxGroups {
			t.Fatalf("%+v", p)
		}
		for _, g := range p.Groups {
			if !goodGroup(g) {
				t.Fatalf("group %q", g)
			}
		}
	})
}
