package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
)

const (
	handshakeTime = 20 * time.Second
	// maxAnswer bounds what the centre may send.
	maxAnswer = 4 << 20
	maxPeers  = 8
)

// errLost says that the one connection of a session is gone. A challenge is
// bound to it, so there is nothing to do but to begin again.
var errLost = errors.New("client: the connection to the centre was lost")

// session is one TLS connection to one of the centre's URLs.
type session struct {
	url string
	rpc musterv1connect.EnrollmentServiceClient

	transport *http.Transport
	mu        sync.Mutex
	conn      *tls.Conn
	// bound is true while a challenge is open: it belongs to conn.
	bound bool
}

// open makes a session. It dials when it is used. While it is bound it does
// not dial again: the transport is told that the connection is lost.
func (c *Client) open(centre string) *session {
	s := &session{url: centre}
	s.transport = &http.Transport{
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.bound {
				return nil, errLost
			}
			conn, err := c.dialTLS(ctx, network, addr, nil)
			if err != nil {
				return nil, err
			}
			s.conn = conn
			return conn, nil
		},
		MaxConnsPerHost:        1,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        5 * time.Minute,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
	}
	s.rpc = musterv1connect.NewEnrollmentServiceClient(
		&http.Client{Transport: s.transport, CheckRedirect: noRedirect}, centre,
		connect.WithReadMaxBytes(maxAnswer), connect.WithAcceptCompression("gzip", nil, nil))
	return s
}

func noRedirect(*http.Request, []*http.Request) error {
	return errors.New("client: the centre does not redirect")
}

// bind ties the session to its connection until unbind, and returns the TLS
// exporter (RFC 8446 §7.5) of it.
func (s *session) bind() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil, errLost
	}
	state := s.conn.ConnectionState()
	b, err := state.ExportKeyingMaterial(enroll.ExporterLabel, nil, enroll.ExporterLength)
	if err != nil {
		return nil, fmt.Errorf("client: TLS exporter: %w", err)
	}
	s.bound = true
	return b, nil
}

func (s *session) unbind() {
	s.mu.Lock()
	s.bound = false
	s.mu.Unlock()
}

func (s *session) close() {
	s.mu.Lock()
	if s.conn != nil {
		_ = s.conn.Close()
	}
	s.mu.Unlock()
	s.transport.CloseIdleConnections()
}

// UntrustedError says that somebody answered who is not the centre this
// image trusts.
type UntrustedError struct {
	Host string
	Err  error
}

// Error implements error.
func (e *UntrustedError) Error() string {
	return fmt.Sprintf("client: %s is not the centre we trust: %v", e.Host, e.Err)
}

// Unwrap returns the reason.
func (e *UntrustedError) Unwrap() error { return e.Err }

// InterceptedError says that something answered that does not speak as a
// centre does: a sign-in page of the network (captive portal), or a device that
// opens connections.
type InterceptedError struct {
	Host string
	Err  error
}

// Error implements error.
func (e *InterceptedError) Error() string {
	return fmt.Sprintf("client: %s does not speak as a centre does: %v", e.Host, e.Err)
}

// Unwrap returns the reason.
func (e *InterceptedError) Unwrap() error { return e.Err }

// intercepted tells an answer that no centre gives, plain HTTP or an old TLS,
// from a connection that broke.
func intercepted(err error) bool {
	var record tls.RecordHeaderError
	if errors.As(err, &record) {
		return true
	}
	var alert tls.AlertError
	return errors.As(err, &alert) && uint8(alert) == 70 || // protocol_version
		strings.Contains(err.Error(), "unsupported protocol version") || strings.Contains(err.Error(), "protocol version not supported")
}

// dialTLS dials, through the proxy if there is one, and authenticates the
// centre. Edit may add to the TLS configuration.
func (c *Client) dialTLS(ctx context.Context, network, addr string, edit func(*tls.Config)) (*tls.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("client: dial: %w", err)
	}
	raw, err := c.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: host,
		NextProtos: []string{"http/1.1"},
		// crypto/tls would believe our clock, which may be at 1970, and the
		// rules of x509 for dates. VerifyConnection below does everything:
		// chain, name, usage and our rule for dates. It runs for resumed
		// sessions, too.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if err := verifyServer(s.PeerCertificates, c.roots, host, c.cfg.Now(), c.cfg.Site.TimeFloor); err != nil {
				return &UntrustedError{Host: host, Err: err}
			}
			return nil
		},
	}
	if edit != nil {
		edit(config)
	}
	conn := tls.Client(raw, config)
	hctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	if err := conn.HandshakeContext(hctx); err != nil {
		_ = raw.Close()
		if intercepted(err) {
			err = &InterceptedError{Host: host, Err: err}
		}
		return nil, fmt.Errorf("client: TLS with %s: %w", addr, err)
	}
	return conn, nil
}

// verifyServer checks a server's certificates against the roots and nothing
// else. A clock that is wrong must not keep a machine from its centre, so
// dates reject only what had ended before the floor: x509.Verify judges a
// whole chain at one instant, and is asked at each instant at which one of
// the certificates began.
func verifyServer(peers, roots []*x509.Certificate, host string, now, floor time.Time) error {
	if len(peers) == 0 || len(peers) > maxPeers {
		return fmt.Errorf("%d certificates, want 1 to %d", len(peers), maxPeers)
	}
	leaf := peers[0]
	if err := leaf.VerifyHostname(host); err != nil {
		return err
	}
	if now.Before(floor) {
		now = floor
	}
	o := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	instants := []time.Time{now, floor}
	for _, r := range roots {
		o.Roots.AddCert(r)
		instants = append(instants, r.NotBefore)
	}
	for i, p := range peers {
		if i > 0 {
			o.Intermediates.AddCert(p)
		}
		instants = append(instants, p.NotBefore)
	}
	var last error
	for _, t := range instants {
		o.CurrentTime = t
		chains, err := leaf.Verify(o)
		if err != nil {
			if last == nil {
				last = err
			}
			continue
		}
		for _, chain := range chains {
			if last = endedBefore(chain, floor); last == nil {
				return nil
			}
		}
	}
	return last
}

func endedBefore(chain []*x509.Certificate, floor time.Time) error {
	for _, c := range chain {
		if c.NotAfter.Before(floor) {
			return fmt.Errorf("certificate %q ended on %s, before this image was made", c.Subject, c.NotAfter.UTC().Format(time.DateOnly))
		}
	}
	return nil
}

// dial opens TCP to addr, directly or by HTTP CONNECT (RFC 9110 §9.3.6).
func (c *Client) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if c.proxy == nil {
		return c.cfg.Dial(ctx, network, addr)
	}
	via := c.proxy.Host
	if c.proxy.Port() == "" {
		via = net.JoinHostPort(c.proxy.Hostname(), "80")
	}
	conn, err := c.cfg.Dial(ctx, network, via)
	if err != nil {
		return nil, fmt.Errorf("client: proxy %s: %w", via, err)
	}
	if err := tunnel(ctx, conn, addr, c.proxy.User); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("client: proxy %s: %w", via, err)
	}
	return conn, nil
}

func tunnel(ctx context.Context, conn net.Conn, addr string, user *url.Userinfo) error {
	deadline := time.Now().Add(handshakeTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var b bytes.Buffer
	fmt.Fprintf(&b, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", addr, addr)
	if user != nil {
		password, _ := user.Password()
		fmt.Fprintf(&b, "Proxy-Authorization: Basic %s\r\n", base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	b.WriteString("\r\n")
	if _, err := conn.Write(b.Bytes()); err != nil {
		return err
	}
	// Byte by byte, so that nothing behind the answer is swallowed.
	answer := make([]byte, 0, 512)
	for one := make([]byte, 1); !bytes.HasSuffix(answer, []byte("\r\n\r\n")); answer = append(answer, one[0]) {
		if len(answer) > 8<<10 {
			return errors.New("its answer is too long")
		}
		if _, err := io.ReadFull(conn, one); err != nil {
			return err
		}
	}
	line, _, _ := bytes.Cut(answer, []byte("\r\n"))
	fields := bytes.Fields(line)
	if len(fields) < 2 || !bytes.HasPrefix(fields[0], []byte("HTTP/1.")) || len(fields[1]) != 3 || fields[1][0] != '2' {
		return fmt.Errorf("it says %.80q", line)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return conn.SetDeadline(time.Time{})
}

// certificate is id's with the key in the TPM.
func (c *Client) certificate(id Identity) tls.Certificate {
	return tls.Certificate{
		Certificate: id.Certificates,
		PrivateKey:  c.cfg.TPM.Signer(),
		// The key has a fixed scheme in the TPM.
		SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
	}
}

// NodeHTTPClient returns an HTTP client that authenticates by the LDevID key
// in the TPM and id's certificate. It may be used for any of the centre's
// URLs; connections are kept and TLS sessions resumed.
func (c *Client) NodeHTTPClient(id Identity) *http.Client {
	certificate := c.certificate(id)
	sessions := tls.NewLRUClientSessionCache(8)
	return &http.Client{
		CheckRedirect: noRedirect,
		Transport: &http.Transport{
			DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				return c.dialTLS(ctx, network, addr, func(t *tls.Config) {
					t.Certificates = []tls.Certificate{certificate}
					t.ClientSessionCache = sessions
				})
			},
			MaxIdleConnsPerHost:    2,
			IdleConnTimeout:        90 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
		},
	}
}
