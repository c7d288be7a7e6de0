package access

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

// Info is a validated way to one supervisor.
type Info struct {
	URL    string
	CA     []byte // PEM; nil when the system's trust store accepted the server
	Tok    Token
	user   string
	cert   *tls.Certificate
	client *http.Client
}

// Cert sets a client certificate to be shown instead of the token.
func (i *Info) Cert(c *tls.Certificate) *Info {
	n := *i
	n.cert = c
	n.client = n.newClient()
	return &n
}

// WithURL is the same access through another address.
func (i *Info) WithURL(u string) *Info {
	n := *i
	n.URL = strings.TrimRight(u, "/")
	return &n
}

// Validate fetches the CA of the server, compares it with the token's pin and
// asks again, now verified. Credentials are only sent afterwards. The user of
// the token is replaced by user.
func Validate(ctx context.Context, url, token, user string, cert *tls.Certificate) (*Info, error) {
	i := &Info{URL: strings.TrimRight(url, "/"), user: user, cert: cert}
	if token != "" {
		t, err := ParseToken(token)
		if err != nil {
			return nil, err
		}
		i.Tok = t
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	// If the system's trust store accepts the server, k3s looks at no pin.
	if _, err := fetch(ctx, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, i.URL+"/cacerts"); err == nil {
		proc.Warn("Cluster CA certificate is trusted by the host CA bundle. Token CA hash will not be validated.")
		i.client = i.newClient()
		return i, nil
	}
	insecure := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	ca, err := fetch(ctx, insecure, i.URL+"/cacerts")
	if err != nil {
		return nil, fmt.Errorf("failed to get CA certs: %w", err)
	}
	h, err := CAHash(ca)
	if err != nil {
		return nil, err
	}
	if i.Tok.CAHash != "" && i.Tok.CAHash != h {
		return nil, fmt.Errorf("token CA hash does not match the Cluster CA certificate hash: %s != %s", i.Tok.CAHash, h)
	}
	i.CA = ca
	i.client = i.newClient()
	if _, err := fetch(ctx, i.client, i.URL+"/cacerts"); err != nil {
		return nil, fmt.Errorf("CA cert validation failed: %w", err)
	}
	return i, nil
}

func (i *Info) newClient() *http.Client {
	tc := &tls.Config{}
	if i.CA != nil {
		tc.RootCAs = x509.NewCertPool()
		tc.RootCAs.AppendCertsFromPEM(i.CA)
	}
	if i.cert != nil {
		tc.Certificates = []tls.Certificate{*i.cert}
	}
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tc}}
}

func fetch(ctx context.Context, c *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return do(c, req)
}

// StatusError is an answer other than 200.
type StatusError struct {
	URL  string
	Code int
	Text string
}

func (e *StatusError) Error() string { return fmt.Sprintf("%s: %d %s", e.URL, e.Code, e.Text) }

func do(c *http.Client, req *http.Request) ([]byte, error) {
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, &StatusError{req.URL.String(), resp.StatusCode, strings.TrimSpace(string(b[:min(len(b), 300)]))}
	}
	return b, nil
}

// Do sends one request with the credentials.
func (i *Info) Do(ctx context.Context, method, path string, body []byte, header map[string]string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	var rd io.Reader
	if body != nil {
		rd = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, i.URL+path, rd)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	switch {
	case i.cert != nil:
	case i.Tok.Bootstrap != "":
		req.Header.Set("Authorization", "Bearer "+i.Tok.Bootstrap)
	case i.Tok.Password != "":
		req.SetBasicAuth(i.user, i.Tok.Password)
	}
	return do(i.client, req)
}

// Get is Do with GET.
func (i *Info) Get(ctx context.Context, path string) ([]byte, error) {
	return i.Do(ctx, http.MethodGet, path, nil, nil)
}
