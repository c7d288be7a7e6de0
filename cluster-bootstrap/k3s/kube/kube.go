// Package kube speaks to a Kubernetes API by plain REST: a kubeconfig, JSON,
// and the few verbs a node needs. No watching, no caching, no types.
package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// maxBody bounds each answer: a list of a few thousand objects' metadata.
const maxBody = 16 << 20

// Config is what a kubeconfig says, with the files it names read in.
type Config struct {
	Server string // https://127.0.0.1:6443
	CA     []byte // PEM
	Cert   []byte // PEM; empty: no client certificate
	Key    []byte // PEM
}

type kubeconfig struct {
	Clusters []struct {
		Cluster struct {
			Server string `json:"server"`
			CAFile string `json:"certificate-authority"`
			CA     []byte `json:"certificate-authority-data"`
		} `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		User struct {
			CertFile string `json:"client-certificate"`
			Cert     []byte `json:"client-certificate-data"`
			KeyFile  string `json:"client-key"`
			Key      []byte `json:"client-key-data"`
		} `json:"user"`
	} `json:"users"`
}

// Parse reads a kubeconfig with one cluster and one user, as k3s writes it.
// read opens the files it names.
func Parse(b []byte, read func(string) ([]byte, error)) (Config, error) {
	const most = 1 << 20
	if len(b) > most {
		return Config{}, fmt.Errorf("kube: read kubeconfig: larger than %d bytes", most)
	}
	var k kubeconfig
	if err := yaml.Unmarshal(b, &k); err != nil {
		return Config{}, fmt.Errorf("kube: read kubeconfig: %w", err)
	}
	if len(k.Clusters) != 1 || len(k.Users) != 1 {
		return Config{}, fmt.Errorf("kube: read kubeconfig: %d clusters and %d users; want one of each", len(k.Clusters), len(k.Users))
	}
	cl, us := k.Clusters[0].Cluster, k.Users[0].User
	c := Config{Server: strings.TrimSuffix(cl.Server, "/"), CA: cl.CA, Cert: us.Cert, Key: us.Key}
	if !strings.HasPrefix(c.Server, "https://") {
		return Config{}, fmt.Errorf("kube: read kubeconfig: server %.80q is no https URL", c.Server)
	}
	for _, f := range []struct {
		name string
		to   *[]byte
	}{{cl.CAFile, &c.CA}, {us.CertFile, &c.Cert}, {us.KeyFile, &c.Key}} {
		if f.name == "" || len(*f.to) > 0 {
			continue
		}
		x, err := read(f.name)
		if err != nil {
			return Config{}, fmt.Errorf("kube: read kubeconfig: %w", err)
		}
		*f.to = x
	}
	return c, nil
}

// Load is Parse of a file.
func Load(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("kube: read kubeconfig: %w", err)
	}
	return Parse(b, os.ReadFile)
}

// Client speaks to one API.
type Client struct {
	server string
	http   *http.Client
}

// New makes a client; timeout bounds each call.
func New(c Config, timeout time.Duration) (*Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(c.CA) {
		return nil, errors.New("kube: make client: the CA bundle holds no certificate")
	}
	t := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	if len(c.Cert) > 0 {
		pair, err := tls.X509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("kube: make client: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return &Client{server: c.Server, http: &http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			// Never by a proxy: this is our own host.
			TLSClientConfig: t, ForceAttemptHTTP2: true, MaxIdleConns: 4, IdleConnTimeout: 90 * time.Second,
			TLSHandshakeTimeout: timeout, ResponseHeaderTimeout: timeout,
		},
	}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// StatusError is an answer that is no success.
type StatusError struct {
	Code    int
	Message string
}

// Error says what the server said.
func (e *StatusError) Error() string { return fmt.Sprintf("kube: status %d: %s", e.Code, e.Message) }

// IsStatus reports whether err is an answer with that code.
func IsStatus(err error, code int) bool {
	var s *StatusError
	return errors.As(err, &s) && s.Code == code
}

// Patch types.
const (
	MergePatch     = "application/merge-patch+json"
	StrategicPatch = "application/strategic-merge-patch+json"
)

// metadataList asks for the metadata of objects alone.
const metadataList = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"

// Get reads path into out.
func (c *Client) Get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, "", "application/json", nil, out)
}

// Meta is the metadata of an object.
type Meta struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	Labels          map[string]string `json:"labels"`
	Annotations     map[string]string `json:"annotations"`
	OwnerReferences []struct {
		Kind       string `json:"kind"`
		Name       string `json:"name"`
		Controller bool   `json:"controller"`
	} `json:"ownerReferences"`
}

// List reads the metadata of all objects at path.
func (c *Client) List(ctx context.Context, path string) ([]Meta, error) {
	var l struct {
		Metadata struct {
			Continue string `json:"continue"`
		} `json:"metadata"`
		Items []struct {
			Metadata Meta `json:"metadata"`
		} `json:"items"`
	}
	if err := c.do(ctx, http.MethodGet, path, "", metadataList, nil, &l); err != nil {
		return nil, err
	}
	out := make([]Meta, len(l.Items))
	for i := range l.Items {
		out[i] = l.Items[i].Metadata
	}
	return out, nil
}

// Post creates in at path.
func (c *Client) Post(ctx context.Context, path string, in, out any) error {
	return c.do(ctx, http.MethodPost, path, "application/json", "application/json", in, out)
}

// Put replaces the object at path.
func (c *Client) Put(ctx context.Context, path string, in, out any) error {
	return c.do(ctx, http.MethodPut, path, "application/json", "application/json", in, out)
}

// Patch changes the object at path.
func (c *Client) Patch(ctx context.Context, path, kind string, in any) error {
	return c.do(ctx, http.MethodPatch, path, kind, "application/json", in, nil)
}

// Delete deletes the object at path; a missing one is no error.
func (c *Client) Delete(ctx context.Context, path string) error {
	err := c.do(ctx, http.MethodDelete, path, "", "application/json", nil, nil)
	if IsStatus(err, http.StatusNotFound) {
		return nil
	}
	return err
}

func (c *Client) do(ctx context.Context, method, path, contentType, accept string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("kube: %s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.server+path, body)
	if err != nil {
		return fmt.Errorf("kube: %s %s: %w", method, path, err)
	}
	req.Header.Set("Accept", accept)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("kube: %s %s: %w", method, path, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxBody+1))
	if err != nil {
		return fmt.Errorf("kube: %s %s: %w", method, path, err)
	}
	if len(b) > maxBody {
		return fmt.Errorf("kube: %s %s: the answer is larger than %d bytes", method, path, maxBody)
	}
	if res.StatusCode/100 != 2 {
		var s struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(b, &s) != nil || s.Message == "" {
			s.Message = string(b[:min(len(b), 200)])
		}
		return fmt.Errorf("kube: %s %s: %w", method, path, &StatusError{Code: res.StatusCode, Message: s.Message[:min(len(s.Message), 500)]})
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("kube: %s %s: read answer: %w", method, path, err)
	}
	return nil
}
