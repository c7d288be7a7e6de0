package kube

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

const good = `
apiVersion: v1
kind: Config
clusters: [{name: local, cluster: {server: "https://127.0.0.1:6443/", certificate-authority-data: Q0E=}}]
users: [{name: u, user: {client-certificate: /crt, client-key: /key}}]
`

func files(name string) ([]byte, error) {
	if name == "/crt" || name == "/key" {
		return []byte("content of " + name), nil
	}
	return nil, fs.ErrNotExist
}

func TestParse(t *testing.T) {
	c, err := Parse([]byte(good), files)
	if err != nil || c.Server != "https://127.0.0.1:6443" || string(c.CA) != "CA" || string(c.Cert) != "content of /crt" || string(c.Key) != "content of /key" {
		t.Errorf("%+v %v", c, err)
	}
	for name, text := range map[string]string{
		"plain http":     strings.Replace(good, "https:", "http:", 1),
		"two clusters":   strings.Replace(good, "clusters: [", "clusters: [{name: x, cluster: {server: https://x}},", 1),
		"no user":        strings.Split(good, "users:")[0],
		"missing file":   strings.Replace(good, "/crt", "/nowhere", 1),
		"not YAML":       "{",
		"too large":      good + strings.Repeat("#", 1<<20),
		"broken base 64": strings.Replace(good, "Q0E=", "!", 1),
	} {
		if _, err := Parse([]byte(text), files); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func client(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	c, err := New(Config{Server: srv.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})}, 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestCalls(t *testing.T) {
	var last string
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		last = fmt.Sprintf("%s %s %s %s", r.Method, r.URL, r.Header.Get("Content-Type"), b)
		switch r.URL.Path {
		case "/missing":
			w.WriteHeader(404)
			fmt.Fprint(w, `{"kind":"Status","message":"it is \u001b[31mnot here"}`)
		case "/broken":
			w.WriteHeader(502)
			fmt.Fprint(w, strings.Repeat("x", 10_000))
		case "/huge":
			_, _ = io.CopyN(w, zeros{}, maxBody+10)
		case "/list":
			fmt.Fprint(w, `{"items":[{"metadata":{"name":"a","labels":{"k":"v"}}},{"metadata":{"name":"b","ownerReferences":[{"kind":"X","controller":true}]}}]}`)
		default:
			fmt.Fprint(w, `{"x":1}`)
		}
	})
	ctx := t.Context()
	var out struct{ X int }
	if err := c.Get(ctx, "/one", &out); err != nil || out.X != 1 {
		t.Error(out, err)
	}
	if err := c.Put(ctx, "/one", map[string]int{"y": 2}, nil); err != nil || last != `PUT /one application/json {"y":2}` {
		t.Error(last, err)
	}
	if err := c.Patch(ctx, "/one", MergePatch, map[string]any{"y": nil}); err != nil || last != `PATCH /one application/merge-patch+json {"y":null}` {
		t.Error(last, err)
	}
	err := c.Get(ctx, "/missing", &out)
	if !IsStatus(err, 404) || IsStatus(err, 409) || !strings.Contains(err.Error(), "not here") {
		t.Error(err)
	}
	if err := c.Delete(ctx, "/missing"); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
	if err := c.Delete(ctx, "/broken"); !IsStatus(err, 502) || len(err.Error()) > 1000 {
		t.Error(err)
	}
	if err := c.Get(ctx, "/huge", &out); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Error(err)
	}
	l, err := c.List(ctx, "/list")
	if err != nil || len(l) != 2 || l[0].Labels["k"] != "v" || !l[1].OwnerReferences[0].Controller {
		t.Error(l, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.Get(ctx, "/one", &out); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestAnotherCAIsNotBelieved(t *testing.T) {
	one := client(t, func(http.ResponseWriter, *http.Request) {})
	other := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("spoke to a stranger") }))
	other.StartTLS()
	defer other.Close()
	// httptest has one certificate for all; a CA that is not in the pool is
	// what any certificate is to an empty one.
	if _, err := New(Config{Server: other.URL, CA: []byte("no certificate")}, time.Second); err == nil {
		t.Error("a client without CA")
	}
	one.server = strings.Replace(other.URL, "127.0.0.1", "localhost", 1) // not a name in the certificate
	if err := one.Get(t.Context(), "/", nil); err == nil {
		t.Error("a certificate of another name is believed")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse(b, files)
		if err == nil && !strings.HasPrefix(c.Server, "https://") {
			t.Errorf("server %q", c.Server)
		}
	})
}
