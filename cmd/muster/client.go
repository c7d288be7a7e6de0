package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	musterv1connect "github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/fleet/text"
)

// access says how to reach a centre.
type access struct{ config, data, tenant string }

// accessFlags adds --config and --data.
func accessFlags(cmd *cobra.Command) *access {
	a := &access{}
	cmd.Flags().StringVar(&a.config, "config", "", "file with the centre's address, CA and token (default: $MUSTER_CONFIG, then ~/.config/muster/config.yaml)")
	cmd.Flags().StringVar(&a.tenant, "tenant", "", "tenant to act in (default: $MUSTER_TENANT, then the home of your token)")
	cmd.Flags().StringVar(&a.data, "data", "", "data directory of a centre on this host: uses its admin.yaml")
	return a
}

// file finds the configuration to use.
func (a *access) file() (string, error) {
	switch {
	case a.config != "":
		return a.config, nil
	case a.data != "":
		return filepath.Join(a.data, central.AdminFile), nil
	case os.Getenv("MUSTER_CONFIG") != "":
		return os.Getenv("MUSTER_CONFIG"), nil
	}
	if f := userConfig(); f != "" {
		return f, nil
	}
	return "", exitError{3, errors.New("which centre? Give --config FILE, set MUSTER_CONFIG, or on the centre's host give --data DIR; the first `muster serve` writes DIR/admin.yaml")}
}

func (a *access) load() (central.AdminConfig, string, error) {
	var c central.AdminConfig
	name, err := a.file()
	if err != nil {
		return c, "", err
	}
	info, err := os.Stat(name)
	if err != nil {
		return c, name, exitError{3, fmt.Errorf("read configuration: %w", err)}
	}
	if info.Mode().Perm()&0o077 != 0 {
		return c, name, exitError{3, fmt.Errorf("%s holds a token and others may read it (mode %04o): chmod 600 it", name, info.Mode().Perm())}
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return c, name, exitError{3, fmt.Errorf("read configuration: %w", err)}
	}
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		return c, name, exitError{3, fmt.Errorf("read configuration %s: %w", name, err)}
	}
	u, err := url.Parse(c.Server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return c, name, exitError{3, fmt.Errorf("%s: server %q is no https URL", name, c.Server)}
	}
	return c, name, nil
}

// centre is a connection to the management API.
type centre struct {
	musterv1connect.ManagementServiceClient
	access       musterv1connect.AccessServiceClient
	server, file string
	// http and who are for files, which have no methods.
	http *http.Client
	who  bearer
}

// connect makes a client. It trusts the CA in the configuration alone.
func (a *access) connect() (*centre, error) {
	c, name, err := a.load()
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(c.CA)) {
		return nil, exitError{3, fmt.Errorf("%s: ca holds no certificate", name)}
	}
	client := &http.Client{Transport: &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool},
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 60 * time.Second,
		ForceAttemptHTTP2:     true,
	}}
	who := bearer{c.Token, cmp.Or(a.tenant, os.Getenv("MUSTER_TENANT"))}
	base, with := strings.TrimSuffix(c.Server, "/"), connect.WithInterceptors(who)
	return &centre{
		musterv1connect.NewManagementServiceClient(client, base, with), musterv1connect.NewAccessServiceClient(client, base, with),
		c.Server, name, client, who,
	}, nil
}

// bearer puts the token, and the tenant if one is chosen, into each call.
type bearer struct{ token, tenant string }

func (b bearer) put(h http.Header) {
	h.Set("Authorization", "Bearer "+b.token)
	if b.tenant != "" {
		h.Set(central.TenantHeader, b.tenant)
	}
}

// WrapUnary implements connect.Interceptor.
func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		b.put(r.Header())
		return next(ctx, r)
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, s connect.Spec) connect.StreamingClientConn {
		c := next(ctx, s)
		b.put(c.RequestHeader())
		return c
	}
}

// WrapStreamingHandler implements connect.Interceptor.
func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// explain turns an error of a call into a sentence with the next step.
func (c *centre) explain(err error) error {
	if err == nil {
		return nil
	}
	var (
		call *connect.Error
		ca   x509.UnknownAuthorityError
		host x509.HostnameError
		op   *net.OpError
	)
	switch {
	case errors.As(err, &ca):
		return fmt.Errorf("the server at %s is not signed by the CA in %s: is it another centre, or somebody in between? Copy admin.yaml from the centre again", c.server, c.file)
	case errors.As(err, &host):
		return fmt.Errorf("the server at %s does not have that name in its certificate: start it with --advertise %s", c.server, text.ForTerminal(host.Host))
	case errors.As(err, &op):
		return fmt.Errorf("cannot reach the centre at %s (%v): is `muster serve` running there?", c.server, op.Err)
	case !errors.As(err, &call):
		return err
	}
	message := text.ForTerminal(call.Message())
	switch call.Code() {
	case connect.CodeUnauthenticated:
		return fmt.Errorf("%s (configuration: %s)", message, c.file)
	case connect.CodeUnavailable:
		return fmt.Errorf("the centre at %s cannot answer now: %s", c.server, message)
	case connect.CodeInvalidArgument:
		return exitError{2, errors.New(message)}
	default:
		return errors.New(strings.TrimPrefix(message, "enroll: "))
	}
}
