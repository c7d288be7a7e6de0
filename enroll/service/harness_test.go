package service_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// authority is a root with one server certificate and node certificates: what
// pki/stepca does at the centre, as small as it can be.
type authority struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey

	mu       sync.Mutex
	profiles []pki.NodeProfile
}

func newAuthority(t testing.TB) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: servicetest.Start.Add(-time.Hour), NotAfter: servicetest.Start.Add(10 * 365 * 24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(t, err)
	root, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{root: root, key: key}
}

func (a *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.root.Raw}))
}

// server makes a server certificate; edit may change it.
func (a *authority) server(t testing.TB, edit func(*x509.Certificate)) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "centre"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: servicetest.Start, NotAfter: servicetest.Start.Add(90 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.root, key.Public(), a.key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// IssueNode implements service.Issuer.
func (a *authority) IssueNode(_ context.Context, p pki.NodeProfile) (enroll.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.profiles = append(a.profiles, p)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(int64(100 + len(a.profiles))), Subject: pkix.Name{CommonName: string(p.Node)},
		NotBefore: p.Now.Add(-time.Minute), NotAfter: p.Now.Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.root, p.Public, a.key)
	return enroll.Certificate{
		Chain: [][]byte{der, a.root.Raw}, Serial: tmpl.SerialNumber.Text(16), NotBefore: tmpl.NotBefore, NotAfter: tmpl.NotAfter,
	}, err
}

func (a *authority) asked() []pki.NodeProfile {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]pki.NodeProfile(nil), a.profiles...)
}

// centre is a node endpoint on loopback.
type centre struct {
	t      testing.TB
	ca     *authority
	store  *servicetest.Memory
	policy pki.Policy
	url    string
	addr   string
	calls  callCount
}

// callCount counts HTTP requests by path.
type callCount struct {
	mu sync.Mutex
	n  map[string]int
}

func (c *callCount) add(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]int{}
	}
	c.n[path]++
}

func (c *callCount) of(path string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[path]
}

// options of a centre.
type options struct {
	roots  *swtpmtest.CA
	config func(*service.Config)
	server func(*http.Server)
	cert   func(*x509.Certificate)
	ca     *authority
}

func newCentre(t testing.TB, o options) *centre {
	c := &centre{t: t, ca: o.ca, store: servicetest.NewMemory()}
	if c.ca == nil {
		c.ca = newAuthority(t)
	}
	if o.roots != nil {
		c.policy.LabRoots = o.roots.Roots()
	}
	cfg := service.Config{
		Store: c.store, Issuer: c.ca, Now: c.store.Now,
		Policy: func(_ context.Context, _ string, now time.Time) (pki.Policy, error) {
			p := c.policy
			p.Now, p.TimeFloor = now, servicetest.Start
			return p, nil
		},
		Documents: func(context.Context, fleet.Request, time.Time) ([][]byte, error) {
			return [][]byte{[]byte(`{"admission":1}`)}, nil
		},
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if o.config != nil {
		o.config(&cfg)
	}
	s, err := service.New(cfg)
	must(t, err)
	path, h := s.Handler()
	mux := http.NewServeMux()
	mux.Handle(path, h)
	// A page for nodes only, as the node API will be.
	mux.HandleFunc("/whoami", func(w http.ResponseWriter, r *http.Request) {
		nodes := x509.NewCertPool()
		nodes.AddCert(c.ca.root)
		if len(r.TLS.PeerCertificates) == 0 {
			http.Error(w, "no certificate", http.StatusUnauthorized)
			return
		}
		if _, err := r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{
			Roots: nodes, CurrentTime: c.store.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		fmt.Fprintf(w, "%s resumed=%v", r.TLS.PeerCertificates[0].Subject.CommonName, r.TLS.DidResume)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c.calls.add(r.URL.Path)
			mux.ServeHTTP(w, r)
		}),
		TLSConfig: &tls.Config{
			Certificates: []tls.Certificate{c.ca.server(t, o.cert)}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		},
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	if o.server != nil {
		o.server(srv)
	}
	go func() { _ = srv.ServeTLS(l, "", "") }()
	t.Cleanup(func() { _ = srv.Close() })
	c.addr = l.Addr().String()
	c.url = "https://" + c.addr
	return c
}

// testWriter sends log lines to the test while it runs.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	if os.Getenv("ENROLL_TEST_LOG") != "" {
		w.t.Logf("%s", b)
	}
	return len(b), nil
}

func (c *centre) site() fleet.SiteConfig {
	return fleet.SiteConfig{
		Format: fleet.SiteConfigFormat, Image: "recovery", Version: "1", Centre: []string{c.url}, RootsPEM: c.ca.pem(), TimeFloor: servicetest.Start,
	}
}

// only returns the one request that there is.
func (c *centre) only() fleet.Request {
	c.t.Helper()
	all, err := c.store.Requests()
	must(c.t, err)
	if len(all) != 1 {
		c.t.Fatalf("%d requests: %+v", len(all), all)
	}
	return all[0]
}

func (c *centre) none() {
	c.t.Helper()
	if all, _ := c.store.Requests(); len(all) != 0 {
		c.t.Errorf("a row was made: %+v", all)
	}
	if n := len(c.ca.asked()); n != 0 {
		c.t.Errorf("%d certificates were made", n)
	}
}

// machine is a software TPM and what is plugged around it.
type machine struct {
	*device.Device
	tpm *swtpmtest.TPM
	id  device.Identity
	hw  fleet.Hardware
}

func newMachine(t testing.TB, o swtpmtest.Options) *machine {
	m := &machine{tpm: swtpmtest.Start(t, o), hw: fleet.Hardware{Vendor: "ACME", Serial: "S1", UUID: "U1"}}
	m.open(t)
	return m
}

func (m *machine) open(t testing.TB) {
	d, err := device.Open(m.tpm.Path())
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	m.Device = d
	m.id, err = d.Identity(context.Background())
	must(t, err)
}

// powerCycle loses everything but what is in the TPM's NV.
func (m *machine) powerCycle(t testing.TB) {
	_ = m.Close()
	must(t, m.tpm.Restart())
	m.open(t)
}

// enroll starts a client of the real kind for the machine.
func (c *centre) enroll(ctx context.Context, t testing.TB, m *machine, edit func(*client.Config)) *running {
	r := &running{progress: make(chan client.Progress, 1000), done: make(chan struct{})}
	cfg := client.Config{
		Site: c.site(), TPM: m.Device, Hardware: func() fleet.Hardware { return m.hw }, Now: c.store.Now,
		RetryMin: 10 * time.Millisecond, RetryMax: 50 * time.Millisecond,
		Progress: func(p client.Progress) {
			select {
			case r.progress <- p:
			default:
			}
		},
	}
	if edit != nil {
		edit(&cfg)
	}
	var err error
	r.client, err = client.New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(ctx)
	t.Cleanup(func() { cancel(); <-r.done })
	r.stop = cancel
	go func() {
		defer close(r.done)
		r.identity, r.err = r.client.Enroll(ctx)
	}()
	return r
}

type running struct {
	client   *client.Client
	progress chan client.Progress
	stop     func()
	done     chan struct{}
	identity client.Identity
	err      error
}

// until waits for a progress that f likes.
func (r *running) until(t testing.TB, what string, f func(client.Progress) bool) client.Progress {
	t.Helper()
	deadline := time.After(30 * time.Second)
	var seen []string
	for {
		select {
		case p := <-r.progress:
			seen = append(seen, fmt.Sprintf("%s: %s (%v)", p.Phase, p.Text, p.Err))
			if f(p) {
				return p
			}
		case <-r.done:
			select {
			case p := <-r.progress:
				if f(p) {
					return p
				}
				continue
			default:
			}
			t.Fatalf("the client ended (%v) before: %s; %q", r.err, what, seen)
		case <-deadline:
			t.Fatalf("not within 30 s: %s; %q", what, seen)
		}
	}
}

func (r *running) wait(t testing.TB) client.Identity {
	t.Helper()
	select {
	case <-r.done:
	case <-time.After(60 * time.Second):
		t.Fatal("the client does not end")
	}
	must(t, r.err)
	return r.identity
}

// wire is a hand-made client on one connection, for those who do not keep to
// the protocol.
type wire struct {
	rpc      musterv1connect.EnrollmentServiceClient
	exporter []byte
	resumed  bool
	close    func()
}

func (c *centre) dial(t testing.TB) *wire { return c.dialWith(t, nil) }

// dialWith resumes a TLS session of the cache if there is one.
func (c *centre) dialWith(t testing.TB, sessions tls.ClientSessionCache) *wire {
	roots := x509.NewCertPool()
	roots.AddCert(c.ca.root)
	conn, err := tls.Dial("tcp", c.addr, &tls.Config{
		RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13, Time: c.store.Now, NextProtos: []string{"http/1.1"},
		ClientSessionCache: sessions,
	})
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	state := conn.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(enroll.ExporterLabel, nil, enroll.ExporterLength)
	must(t, err)
	used := false
	transport := &http.Transport{
		MaxConnsPerHost: 1, DisableCompression: true,
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			if used {
				return nil, fmt.Errorf("the wire has one connection")
			}
			used = true
			return conn, nil
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &wire{
		rpc:      musterv1connect.NewEnrollmentServiceClient(&http.Client{Transport: transport}, c.url, connect.WithAcceptCompression("gzip", nil, nil)),
		exporter: exporter,
		resumed:  state.DidResume,
	}
}

func beginRequest(id device.Identity) *musterv1.BeginRequest {
	m := &musterv1.BeginRequest{Protocol: 1, AkPublic: id.AKPublic, LdevidPublic: id.LDevIDPublic}
	for _, ek := range id.EKs {
		m.Eks = append(m.Eks, &musterv1.EndorsementKey{Public: ek.Public, Certificate: ek.Certificate, Chain: ek.Chain})
	}
	return m
}

// attempt is one try at Complete; each field can be falsified before send.
type attempt struct {
	m         *machine
	begin     *musterv1.BeginRequest
	challenge *musterv1.BeginResponse
	fields    enroll.TranscriptFields
	signer    crypto.Signer
	csr       *x509.CertificateRequest
	hardware  []byte
	quotePCRs []int
	spoilCSR  func([]byte) []byte
	// edit changes the finished message.
	edit func(*musterv1.CompleteRequest)
}

// begin does Begin honestly.
func (w *wire) begin(t testing.TB, m *machine) *attempt {
	t.Helper()
	a := &attempt{
		m: m, begin: beginRequest(m.id), signer: m.Signer(), hardware: []byte(`{"serial":"S1"}`),
		csr: &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, quotePCRs: pki.QuotePCRs,
	}
	var err error
	a.challenge, err = w.rpc.Begin(context.Background(), a.begin)
	must(t, err)
	a.fields = enroll.TranscriptFields{
		Nonce: a.challenge.Nonce, EK: ekDER(t, a.begin), AK: a.begin.AkPublic, LDevID: a.begin.LdevidPublic,
		Hardware: a.hardware, Exporter: w.exporter,
	}
	return a
}

// complete activates, certifies, quotes and sends.
func (w *wire) complete(t testing.TB, a *attempt) (*musterv1.CompleteResponse, error) {
	t.Helper()
	m := a.message(t)
	if a.edit != nil {
		a.edit(m)
	}
	return w.rpc.Complete(context.Background(), m)
}

func (a *attempt) message(t testing.TB) *musterv1.CompleteRequest {
	t.Helper()
	secret, err := a.m.ActivateCredential(a.challenge.CredentialBlob, a.challenge.EncryptedSecret)
	must(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, a.csr, a.signer)
	must(t, err)
	if a.spoilCSR != nil {
		csr = a.spoilCSR(csr)
	}
	a.fields.CSR = csr
	transcript := enroll.Transcript(a.fields)
	m := &musterv1.CompleteRequest{Cookie: a.challenge.Cookie, Proof: enroll.Proof(secret, transcript), Csr: csr, Hardware: a.hardware}
	m.CertifyAttest, m.CertifySignature, err = a.m.Certify(transcript)
	must(t, err)
	var values map[int][]byte
	m.QuoteAttest, m.QuoteSignature, values, err = a.m.Quote(transcript, a.quotePCRs)
	must(t, err)
	for _, i := range a.quotePCRs {
		m.Pcrs = append(m.Pcrs, &musterv1.PcrValue{Index: uint32(i), Sha256: values[i]})
	}
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
