package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/central/oidc"
	"github.com/muster-edge/muster/central/oidc/oidctest"
)

// asked starts a command line that waits for a browser, and returns the
// address it printed and what comes of it.
func asked(t *testing.T, args ...string) (address, check string, done <-chan error) {
	t.Helper()
	read, write := io.Pipe()
	end := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() {
		cmd := rootCommand()
		cmd.SetArgs(args)
		cmd.SetErr(write)
		cmd.SetOut(io.Discard)
		end <- cmd.ExecuteContext(ctx)
		write.Close()
	}()
	lines := bufio.NewScanner(read)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "https://") {
			address = line
		}
		if _, after, found := strings.Cut(line, "check: "); found {
			check = after
			break
		}
	}
	go io.Copy(io.Discard, read) //nolint:errcheck // until the command ends
	if address == "" || check == "" {
		t.Fatalf("no address: %v", <-end)
	}
	return address, check, end
}

// The port takes the answer of this log-in and nothing else.
func TestLoginTakesOnlyItsOwnAnswer(t *testing.T) {
	var out bytes.Buffer
	read, write := io.Pipe()
	type answer struct {
		code, verifier string
		err            error
	}
	got := make(chan answer, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		var a answer
		a.code, a.verifier, a.err = browserLogin(ctx, io.MultiWriter(write, &out), "https://centre.example:7443/", 0)
		got <- a
	}()
	line := ""
	for s := bufio.NewScanner(read); !strings.Contains(line, "auth/oidc?") && s.Scan(); {
		line = strings.TrimSpace(s.Text())
	}
	go io.Copy(io.Discard, read) //nolint:errcheck // until the test ends
	u, err := url.Parse(line)
	if err != nil || u.Host != "centre.example:7443" || u.Path != "/auth/oidc" {
		t.Fatalf("%s, %v", line, err)
	}
	q := u.Query()
	host := "127.0.0.1:" + q.Get("port")
	ask := func(method, host, rest, name string) int {
		t.Helper()
		r, err := http.NewRequest(method, "http://"+host+rest, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = name
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	good := "/?" + url.Values{"state": {q.Get("state")}, "code": {"c"}}.Encode()
	for name, code := range map[string]int{
		"no state":        ask("GET", host, "/?code=c", host),
		"a wrong state":   ask("GET", host, "/?code=c&state=x", host),
		"no code":         ask("GET", host, "/?state="+q.Get("state"), host),
		"another name":    ask("GET", host, good, "evil.example"),
		"another path":    ask("GET", host, "/x"+good[1:], host),
		"a form":          ask("POST", host, good, host),
		"nothing at all":  ask("GET", host, "/", host),
		"the favicon too": ask("GET", host, "/favicon.ico", host),
	} {
		if code != http.StatusBadRequest {
			t.Errorf("%s: %d", name, code)
		}
	}
	select {
	case a := <-got:
		t.Fatalf("it went on: %+v", a)
	default:
	}
	if code := ask("GET", host, good, host); code != http.StatusOK {
		t.Errorf("the right answer: %d", code)
	}
	if a := <-got; a.err != nil || a.code != "c" || a.verifier == "" || strings.Contains(out.String(), a.verifier) {
		t.Errorf("%+v; printed %s", a, out.String())
	}
	cancel()
	if _, _, err := browserLogin(ctx, io.Discard, "https://centre.example", 0); err == nil {
		t.Error("a log-in that was cancelled goes on")
	}
}

// The whole way: command line, browser, provider, centre.
func TestLoginAtTheIdentityProvider(t *testing.T) {
	const host = "centre.example:7443"
	redirect := "https://" + host + oidc.CallbackPath
	at := oidctest.Start(t, redirect, oidctest.User{ID: "ann", Email: "ann@example.org", Groups: []string{"shops"}})
	at.As("ann")
	settings, err := oidc.Load(at.Files(t, redirect, "rules: [{group: shops, role: approver}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ready, stopped := make(chan central.Addresses, 1), make(chan error, 1)
	s, err := central.New(context.Background(), central.Config{
		Data: dir, Operators: "127.0.0.1:0", Nodes: "127.0.0.1:0", Metrics: "-", OIDC: settings, Advertise: []string{"centre.example"},
		Ready: func(a central.Addresses) { ready <- a },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { stopped <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	}()
	var where central.Addresses
	select {
	case where = <-ready:
	case err := <-stopped:
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, central.AdminFile))
	if err != nil {
		t.Fatal(err)
	}
	var conf central.AdminConfig
	if err := yaml.Unmarshal(b, &conf); err != nil {
		t.Fatal(err)
	}
	// What people get: the address and the CA, no token.
	file, out := filepath.Join(t.TempDir(), "centre.yaml"), filepath.Join(t.TempDir(), "config.yaml")
	conf.Token = ""
	if b, err = yaml.Marshal(conf); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--oidc", "--token-file", "x"}, {"--port", "7999"}, {"--oidc", "--port", "80"}} {
		cmd := rootCommand()
		cmd.SetArgs(append([]string{"login", "--config", file}, args...))
		cmd.SetErr(io.Discard)
		if err := cmd.Execute(); err == nil {
			t.Errorf("%v is taken", args)
		}
	}
	address, check, done := asked(t, "login", "--oidc", "--config", file, "--out", out)
	// The browser.
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(conf.CA))
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{
		TLSClientConfig: at.TLS(&tls.Config{RootCAs: pool}),
		DialContext: func(ctx context.Context, network, a string) (net.Conn, error) {
			if a == host {
				a = where.Operators
			}
			return (&net.Dialer{}).DialContext(ctx, network, a)
		},
	}
	defer transport.CloseIdleConnections()
	browser := &http.Client{Transport: transport, Jar: jar, Timeout: time.Minute}
	get := func(address string) string {
		t.Helper()
		resp, err := browser.Get(address)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s %s %v", address, resp.Status, b, err)
		}
		return string(b)
	}
	page := get(address)
	link := regexp.MustCompile(`href="(http://127[^"]+)"`).FindStringSubmatch(page)
	if link == nil || !strings.Contains(page, check) || !strings.Contains(page, "oidc/ann@example.org") {
		t.Fatalf("the page: %s", page)
	}
	if said := get(strings.ReplaceAll(link[1], "&amp;", "&")); !strings.Contains(said, "Go on at the command line") {
		t.Errorf("the browser reads %q", said)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(out); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	var said bytes.Buffer
	cmd := rootCommand()
	cmd.SetArgs([]string{"whoami", "--config", out})
	cmd.SetOut(&said)
	if err := cmd.Execute(); err != nil || !strings.HasPrefix(said.String(), "oidc/ann@example.org, approver of tenant default") {
		t.Errorf("%q, %v", fmt.Sprint(said.String()), err)
	}
}
