package client

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/fleet"
)

var floor = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func certify(t *testing.T, parent *pair, edit func(*x509.Certificate)) *pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, BasicConstraintsValid: true,
		NotBefore: floor, NotAfter: floor.AddDate(1, 0, 0),
	}
	if edit != nil {
		edit(tmpl)
	}
	signer, issuer := key, tmpl
	if parent != nil {
		signer, issuer = parent.key, parent.cert
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &pair{c, key}
}

func asCA(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }

func asServer(c *x509.Certificate) {
	c.DNSNames, c.IPAddresses = []string{"centre.example"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
}

func both(fs ...func(*x509.Certificate)) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		for _, f := range fs {
			f(c)
		}
	}
}

func dates(from, to time.Time) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }
}

func TestVerifyServer(t *testing.T) {
	year := func(n int) time.Time { return floor.AddDate(n, 0, 0) }
	root := certify(t, nil, both(asCA, dates(year(-1), year(10))))
	foreign := certify(t, nil, asCA)
	leaf := certify(t, root, asServer)
	future := certify(t, root, both(asServer, dates(year(5), year(6))))
	middle := certify(t, root, both(asCA, dates(year(4), year(8))))
	deep := certify(t, middle, both(asServer, dates(year(5), year(6))))
	ended := certify(t, root, both(asServer, dates(year(-1), floor.Add(-time.Second))))
	endedMiddle := certify(t, root, both(asCA, dates(year(-1), floor.Add(-time.Second))))
	underEnded := certify(t, endedMiddle, both(asServer, dates(year(-1), year(1))))
	client := certify(t, root, both(asServer, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }))
	noCA := certify(t, root, asServer)
	underLeaf := certify(t, noCA, asServer)
	epoch := time.Unix(0, 0)
	for _, c := range []struct {
		name  string
		peers []*pair
		host  string
		now   time.Time
		ok    bool
	}{
		{"good", []*pair{leaf}, "centre.example", floor.AddDate(0, 1, 0), true},
		{"good, by address", []*pair{leaf}, "127.0.0.1", floor.AddDate(0, 1, 0), true},
		{"our clock is at 1970", []*pair{leaf}, "centre.example", epoch, true},
		{"our clock is 30 years ahead", []*pair{leaf}, "centre.example", year(30), true},
		{"it begins in our future", []*pair{future}, "centre.example", floor, true},
		{"it and its issuer begin in our future", []*pair{deep, middle}, "centre.example", epoch, true},
		{"it ended after the floor, before our clock", []*pair{leaf}, "centre.example", year(2), true},
		{"it ended before the floor", []*pair{ended}, "centre.example", floor, false},
		{"it ended before the floor and our clock is at 1970", []*pair{ended}, "centre.example", epoch, false},
		{"its issuer ended before the floor", []*pair{underEnded, endedMiddle}, "centre.example", epoch, false},
		{"other name", []*pair{leaf}, "other.example", floor, false},
		{"other address", []*pair{leaf}, "127.0.0.2", floor, false},
		{"foreign root", []*pair{certify(t, foreign, asServer)}, "centre.example", floor, false},
		{"foreign root sent along", []*pair{certify(t, foreign, asServer), foreign}, "centre.example", floor, false},
		{"self-signed", []*pair{certify(t, nil, asServer)}, "centre.example", floor, false},
		{"for clients only", []*pair{client}, "centre.example", floor, false},
		{"issued by a leaf", []*pair{underLeaf, noCA}, "centre.example", floor, false},
		{"issuer missing", []*pair{deep}, "centre.example", floor, false},
		{"none", nil, "centre.example", floor, false},
		{"too many", []*pair{leaf, leaf, leaf, leaf, leaf, leaf, leaf, leaf, leaf}, "centre.example", floor, false},
	} {
		var peers []*x509.Certificate
		for _, p := range c.peers {
			peers = append(peers, p.cert)
		}
		if err := verifyServer(peers, []*x509.Certificate{root.cert}, c.host, c.now, floor); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestBackoff(t *testing.T) {
	b := backoff{min: time.Second, max: time.Minute}
	long := map[time.Duration]bool{}
	for i := range 1000 {
		d := b.next(0)
		if d < b.min || d > b.max {
			t.Fatalf("pause %d is %v", i, d)
		}
		long[d] = true
	}
	if len(long) < 900 || long[b.max] && len(long) < 2 {
		t.Errorf("%d different pauses of 1000: a crowd would march in step", len(long))
	}
	for range 100 {
		if d := b.next(5 * time.Minute); d < 5*time.Minute || d > 7*time.Minute {
			t.Fatalf("the centre asked for 5m, the pause is %v", d)
		}
	}
	b.reset()
	if d := b.next(0); d > 3*time.Second {
		t.Errorf("after success the first pause is %v", d)
	}
}

func TestRetryAfter(t *testing.T) {
	with := func(code connect.Code, v string) error {
		e := connect.NewError(code, errors.New("busy: x"))
		e.Meta().Set("Retry-After", v)
		return e
	}
	for _, c := range []struct {
		err  error
		want time.Duration
	}{
		{with(connect.CodeUnavailable, "7"), 7 * time.Second},
		{with(connect.CodeUnavailable, "999999"), maxPause},
		{with(connect.CodeUnavailable, "-1"), maxPause},
		{with(connect.CodeUnavailable, "x"), 0},
		{with(connect.CodePermissionDenied, ""), 300 * time.Second},
		{errors.New("x"), 0},
	} {
		if got := retryAfter(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

func TestConfiguration(t *testing.T) {
	root := certify(t, nil, asCA)
	good := fleet.SiteConfig{
		Centre:   []string{"https://centre.example:7444"},
		RootsPEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw})),
	}
	if _, err := New(Config{Site: good, TPM: fakeTPM{}}); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]Config{
		"no TPM":     {Site: good},
		"plain HTTP": {Site: fleet.SiteConfig{Centre: []string{"http://centre.example"}, RootsPEM: good.RootsPEM}, TPM: fakeTPM{}},
		"no centre":  {Site: fleet.SiteConfig{RootsPEM: good.RootsPEM}, TPM: fakeTPM{}},
		"no roots":   {Site: fleet.SiteConfig{Centre: good.Centre}, TPM: fakeTPM{}},
		"bad proxy":  {Site: fleet.SiteConfig{Centre: good.Centre, RootsPEM: good.RootsPEM, Network: fleet.NetworkConfig{Proxy: "socks5://x"}}, TPM: fakeTPM{}},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

type fakeTPM struct{}

func (fakeTPM) Identity(context.Context) (TPMIdentity, error) {
	return TPMIdentity{}, errors.New("broken")
}
func (fakeTPM) ActivateCredential(_, _ []byte) ([]byte, error) {
	return nil, errors.New("broken")
}
func (fakeTPM) Certify([32]byte) (_, _ []byte, _ error) { return nil, nil, errors.New("broken") }
func (fakeTPM) Quote([32]byte, []int) (_, _ []byte, _ map[int][]byte, _ error) {
	return nil, nil, nil, errors.New("broken")
}
func (fakeTPM) Signer() crypto.Signer { return nil }

// A TPM that does not work is shown, and tried again until the end.
func TestWhenTheTPMFailsThenItIsSaid(t *testing.T) {
	c := newClient(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	c.cfg.Progress = func(p Progress) {
		if n++; n == 3 {
			cancel()
		}
		if !p.Problem || !strings.Contains(p.Text, "TPM") {
			t.Errorf("the screen says %q", p.Text)
		}
	}
	if _, err := c.Enroll(ctx); !errors.Is(err, context.Canceled) || n < 3 {
		t.Errorf("%v after %d attempts", err, n)
	}
}

// hello is a centre that knows the time.
type hello struct {
	musterv1connect.UnimplementedEnrollmentServiceHandler
	now time.Time
}

func (h hello) Hello(context.Context, *musterv1.HelloRequest) (*musterv1.HelloResponse, error) {
	return &musterv1.HelloResponse{Now: timestamppb.New(h.now), MinProtocol: 1, MaxProtocol: 1}, nil
}

func newClient(t *testing.T, h http.Handler) *Client {
	t.Helper()
	root := certify(t, nil, asCA)
	leaf := certify(t, root, asServer)
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.cert.Raw}, PrivateKey: leaf.key}}}
	s.StartTLS()
	t.Cleanup(s.Close)
	c, err := New(Config{
		Site: fleet.SiteConfig{
			Centre: []string{s.URL}, TimeFloor: floor,
			RootsPEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw})),
		},
		TPM: fakeTPM{}, RetryMin: time.Millisecond, RetryMax: 2 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The clock is set when it is off by more than a minute, and never to a time
// before the floor.
func TestHelloSetsTheClock(t *testing.T) {
	centre := floor.AddDate(0, 1, 0)
	for _, c := range []struct {
		name       string
		ours, says time.Time
		want       bool
	}{
		{"1970", time.Unix(0, 0), centre, true},
		{"ahead", centre.AddDate(1, 0, 0), centre, true},
		{"half a minute", centre.Add(30 * time.Second), centre, false},
		{"the centre is before the floor", centre, floor.Add(-time.Hour), false},
	} {
		path, h := musterv1connect.NewEnrollmentServiceHandler(hello{now: c.says})
		mux := http.NewServeMux()
		mux.Handle(path, h)
		client := newClient(t, mux)
		var set []time.Time
		client.cfg.Now = func() time.Time { return c.ours }
		client.cfg.SetTime = func(n time.Time) error { set = append(set, n); return nil }
		s := client.open(client.urls[0])
		if err := client.hello(t.Context(), s); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		s.close()
		if (len(set) == 1) != c.want || c.want && !set[0].Equal(c.says) {
			t.Errorf("%s: set to %v", c.name, set)
		}
	}
}

// While a challenge is open its connection is the only one.
func TestWhenTheConnectionIsLostThenTheSessionEnds(t *testing.T) {
	path, h := musterv1connect.NewEnrollmentServiceHandler(hello{now: floor})
	mux := http.NewServeMux()
	mux.Handle(path, h)
	c := newClient(t, mux)
	s := c.open(c.urls[0])
	defer s.close()
	if _, err := s.bind(); !errors.Is(err, errLost) {
		t.Errorf("bound without a connection: %v", err)
	}
	call := func() error { _, err := s.rpc.Hello(t.Context(), &musterv1.HelloRequest{}); return err }
	if err := call(); err != nil {
		t.Fatal(err)
	}
	first, err := s.bind()
	if err != nil {
		t.Fatal(err)
	}
	_ = s.conn.Close()
	if err := call(); !errors.Is(err, errLost) {
		t.Errorf("a call after the connection was lost: %v", err)
	}
	s.unbind()
	if err := call(); err != nil {
		t.Errorf("unbound: %v", err)
	}
	if second, err := s.bind(); err != nil || string(first) == string(second) {
		t.Errorf("another connection has the same exporter: %v", err)
	}
}

// proxy is an HTTP CONNECT proxy that answers with status.
func proxy(t *testing.T, status string) (string, <-chan string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	seen := make(chan string, 8)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r, err := http.ReadRequest(bufio.NewReader(conn))
			if err != nil {
				_ = conn.Close()
				continue
			}
			seen <- r.Method + " " + r.Host + " " + r.Header.Get("Proxy-Authorization")
			_, _ = io.WriteString(conn, status)
			if !strings.HasPrefix(status, "HTTP/1.1 200") {
				_ = conn.Close()
				continue
			}
			far, err := net.Dial("tcp", r.Host)
			if err != nil {
				_ = conn.Close()
				continue
			}
			go func() { _, _ = io.Copy(far, conn); _ = far.Close() }()
			go func() { _, _ = io.Copy(conn, far); _ = conn.Close() }()
		}
	}()
	return l.Addr().String(), seen
}

func TestProxy(t *testing.T) {
	path, h := musterv1connect.NewEnrollmentServiceHandler(hello{now: floor})
	mux := http.NewServeMux()
	mux.Handle(path, h)
	for _, c := range []struct {
		answer string
		ok     bool
	}{
		{"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n", true},
		{"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", false},
		{"HTTP/1.1 2000 x\r\n\r\n", false},
		{"garbage\r\n\r\n", false},
		{"HTTP/1.1 200 " + strings.Repeat("x", 9000) + "\r\n\r\n", false},
	} {
		client := newClient(t, mux)
		addr, seen := proxy(t, c.answer)
		client.proxy = &url.URL{Scheme: "http", Host: addr, User: url.UserPassword("a", "b")}
		s := client.open(client.urls[0])
		err := client.hello(t.Context(), s)
		s.close()
		if (err == nil) != c.ok {
			t.Errorf("%.40q: %v", c.answer, err)
		}
		if got, want := <-seen, "CONNECT "+strings.TrimPrefix(client.urls[0], "https://")+" Basic YTpi"; got != want {
			t.Errorf("the proxy saw %q, want %q", got, want)
		}
	}
}

// A network that answers in the centre's place is named as such, and learns
// nothing but that somebody began TLS. A connection that only breaks is not
// taken for one.
func TestCaptivePortal(t *testing.T) {
	old := httptest.NewUnstartedServer(http.NotFoundHandler())
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS12}
	old.StartTLS()
	defer old.Close()
	for _, c := range []struct {
		name, answer, url, want string
	}{
		{"redirect", "HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n", "", "sign-in page"},
		{"page", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "", "sign-in page"},
		{"RFC 6585", "HTTP/1.1 511 Network Authentication Required\r\n\r\n", "", "sign-in page"},
		{"TLS 1.2", "", old.URL, "sign-in page"},
		{"hangs up", "", "", "does not work"},
	} {
		t.Run(c.name, func(t *testing.T) {
			heard := make(chan []byte, 1)
			client := newClient(t, http.NotFoundHandler())
			if c.url == "" {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				go func() {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					defer conn.Close()
					b := make([]byte, 16<<10)
					n, _ := conn.Read(b)
					_, _ = io.WriteString(conn, c.answer)
					heard <- b[:n]
				}()
				c.url = "https://" + l.Addr().String()
			} else {
				heard <- nil
			}
			s := client.open(c.url)
			err := client.hello(t.Context(), s)
			s.close()
			if err == nil {
				t.Fatal("a portal is taken for the centre")
			}
			if got := sentence(err); !strings.Contains(got, c.want) {
				t.Errorf("%v: %q", err, got)
			}
			if b := <-heard; len(b) > 0 && b[0] != 0x16 {
				t.Errorf("the portal hears % x", b[:min(len(b), 16)])
			}
		})
	}
}

// What a shop worker reads never holds an engineer's words.
func TestSentences(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{&tpmError{errors.New("TPM_RC_FAILURE")}, "TPM"},
		{&UntrustedError{Host: "h\x1b[2J", Err: errors.New("x509: unknown")}, "Somebody else"},
		{connect.NewError(connect.CodePermissionDenied, errors.New("denied: x")), "not wanted"},
		{connect.NewError(connect.CodeUnavailable, errors.New("busy: x")), "much to do"},
		{connect.NewError(connect.CodeInternal, errors.New("sql: x")), "network cable"},
		{&net.DNSError{Name: "centre.example"}, "cannot be found"},
		{context.DeadlineExceeded, "does not answer"},
		{errors.New("x"), "network cable"},
	} {
		got := sentence(c.err)
		if !strings.Contains(got, c.want) || strings.ContainsAny(got, "\x1b_") || strings.Contains(got, "x509") || !strings.HasSuffix(got, ".") {
			t.Errorf("%v: %q", c.err, got)
		}
	}
}

// FuzzTunnel: whatever a proxy answers, there is an error or a tunnel.
func FuzzTunnel(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n"))
	f.Add([]byte("\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 "))
	f.Fuzz(func(t *testing.T, answer []byte) {
		near, far := net.Pipe()
		go func() {
			_, _ = http.ReadRequest(bufio.NewReader(far))
			_, _ = far.Write(answer)
			_ = far.Close()
		}()
		err := tunnel(context.Background(), near, "centre.example:7444", nil)
		if err == nil && !strings.HasPrefix(string(answer), "HTTP/1.") {
			t.Errorf("%q made a tunnel", answer)
		}
		_ = near.Close()
	})
}
