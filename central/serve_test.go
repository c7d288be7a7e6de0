package central

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/stepca"
)

// running is a centre that serves on loopback.
type running struct {
	*harness
	addr  Addresses
	admin AdminConfig
	roots *x509.CertPool
	stop  func() error
}

// serve starts a centre; change may alter its configuration.
func serve(t *testing.T, dir string, change func(*Config)) *running {
	t.Helper()
	ready := make(chan Addresses, 1)
	cfg := Config{
		Data: dir, Operators: "127.0.0.1:0", Nodes: "127.0.0.1:0", Metrics: "127.0.0.1:0",
		LabUnknownBoot: true, LabUnverified: true, ReportEvery: 90 * time.Second,
		Ready: func(a Addresses) { ready <- a },
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	r := &running{stop: func() error { cancel(); return <-done }}
	select {
	case r.addr = <-ready:
	case err := <-done:
		t.Fatal(err)
	case <-time.After(30 * time.Second):
		t.Fatal("the centre does not become ready")
	}
	stopped := false
	stop := r.stop
	r.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		return stop()
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	who := accessOf(t, dir)
	r.admin, r.roots = who.admin, who.roots
	e := &enrollment{store: s.store, hub: s.hub, index: s.index, metrics: s.metrics, now: s.cfg.Now, scribe: &s.scribe}
	r.harness = &harness{e, s, newClock()}
	r.clock.set(time.Now())
	return r
}

func (r *running) client(certs ...tls.Certificate) *http.Client {
	return &http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.roots, Certificates: certs}, ForceAttemptHTTP2: true},
		Timeout:   20 * time.Second,
	}
}

type withToken string

func (w withToken) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		r.Header().Set("Authorization", "Bearer "+string(w))
		return next(ctx, r)
	}
}

func (w withToken) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, s connect.Spec) connect.StreamingClientConn {
		c := next(ctx, s)
		c.RequestHeader().Set("Authorization", "Bearer "+string(w))
		return c
	}
}

func (w withToken) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func (r *running) manage() musterv1connect.ManagementServiceClient {
	return musterv1connect.NewManagementServiceClient(r.client(), r.admin.Server, connect.WithInterceptors(withToken(r.admin.Token)))
}

// machine is a machine with a key in software: the protocol around TPMs is
// tested where it lives, in enroll/service.
type machine struct {
	key    *ecdsa.PrivateKey
	filing enroll.Filing
}

func newMachine(t *testing.T, name string) *machine {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	f := servicetest.Filing(name)
	f.Evidence.LDevIDKey = sum[:]
	f.Evidence.Hardware = fleet.Hardware{Vendor: "QEMU", NICs: []fleet.NIC{{Name: "eth0", MAC: "52:54:00:12:34:56", Link: true}}}
	return &machine{key, f}
}

// enroll takes the machine from filing to its certificate.
func (r *running) enroll(t *testing.T, m *machine) (fleet.Request, tls.Certificate, enroll.Issued) {
	t.Helper()
	ctx := context.Background()
	req, err := r.File(ctx, m.filing)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.manage().Approve(ctx, &musterv1.ApproveRequest{Id: string(req.ID), Revision: req.Revision, Site: "lab", CreateSite: true}); err != nil {
		t.Fatal(err)
	}
	out, err := r.collect(m, req.ID)
	if err != nil {
		t.Fatal(err)
	}
	return req, tls.Certificate{Certificate: out.Certificates, PrivateKey: m.key}, out
}

func (r *running) collect(m *machine, id fleet.RequestID) (enroll.Issued, error) {
	return r.Issue(context.Background(), DefaultTenant, id, func(q fleet.Request) (enroll.Issued, error) {
		c, err := issuer{r.s.ca}.IssueNode(context.Background(), pki.NodeProfile{Tenant: q.Tenant, Site: q.Site, Node: q.Node, Public: m.key.Public(), Now: time.Now()})
		return enroll.Issued{Certificates: c.Chain, Serial: c.Serial, NotBefore: c.NotBefore, NotAfter: c.NotAfter, LDevIDKey: q.Evidence.LDevIDKey}, err
	})
}

func labbed(t *testing.T, r *running) {
	t.Helper()
	if err := markLab(context.Background(), r.s.store, act{actor: "system", now: time.Now()}, "test"); err != nil {
		t.Fatal(err)
	}
}

func (r *running) report(cert ...tls.Certificate) (*musterv1.ReportResponse, error) {
	c := musterv1connect.NewNodeServiceClient(r.client(cert...), "https://"+r.addr.Nodes)
	return c.Report(context.Background(), &musterv1.ReportRequest{})
}

func TestFromFilingToReport(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	m := newMachine(t, "a")
	req, cert, issued := r.enroll(t, m)

	// The admission that comes with the certificate is signed by the orders
	// key and names this node, this key and this site.
	if len(issued.Documents) != 1 {
		t.Fatalf("%d documents", len(issued.Documents))
	}
	orders, err := r.s.ca.OrdersKey(DefaultTenant)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := statement.ParseKeys(mustOrdersPEM(t, r.s))
	if err != nil || len(keys) != 1 || !orders.Public().(*ecdsa.PublicKey).Equal(keys[0]) {
		t.Fatalf("orders key: %v", err)
	}
	payload, err := statement.Verify(issued.Documents[0], fleet.AdmissionPayload, keys)
	if err != nil || !bytes.Contains(payload, []byte(`"site":"lab"`)) || !bytes.Contains(payload, []byte(req.Node)) || !bytes.Contains(payload, []byte(m.filing.Evidence.LDevIDKey.String())) {
		t.Errorf("admission %s: %v", payload, err)
	}

	out, err := r.report(cert)
	if err != nil || out.NextReportSeconds != 90 || out.Epoch != 1 {
		t.Fatalf("report: %v, %v", out, err)
	}
	node, err := r.manage().GetNode(context.Background(), &musterv1.GetNodeRequest{Id: string(req.Node)})
	if err != nil || node.Node.State != musterv1.NodeState_NODE_STATE_ACTIVE || node.Node.Site != "lab" || len(node.Requests) != 1 {
		t.Errorf("node: %v, %v", node, err)
	}
	// Last-seen is gathered in memory; a stop in good order writes it.
	seen := node.Node.LastSeen.AsTime()
	if _, err := r.report(cert); err != nil {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	l, err := OpenLocal(context.Background(), r.s.cfg.Data, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = l.store.View(context.Background(), func(tx store.Reader) error {
		n, err := tx.Node(DefaultTenant, req.Node)
		if !n.LastSeen.After(seen) {
			t.Errorf("last seen %s is not after %s", n.LastSeen, seen)
		}
		return err
	})
	if _, bad, verr := l.VerifyAudit(context.Background()); err != nil || verr != nil || bad != nil {
		t.Errorf("%v, %v, %v", err, verr, bad)
	}
}

func mustOrdersPEM(t *testing.T, s *Server) []byte {
	t.Helper()
	b, err := s.ca.(*stepca.Authority).OrdersPublicPEM(DefaultTenant)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReportIsRefused(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	m := newMachine(t, "a")
	req, cert, _ := r.enroll(t, m)
	if _, err := r.report(cert); err != nil {
		t.Fatalf("the honest node is refused: %v", err)
	}
	foreign, err := stepcaIn(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	chain, _, _, _, err := foreign.IssueNode(context.Background(), pki.NodeProfile{Tenant: DefaultTenant, Site: "lab", Node: req.Node, Public: m.key.Public(), Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	mine := func(node fleet.NodeID, key *ecdsa.PrivateKey) tls.Certificate {
		c, err := issuer{r.s.ca}.IssueNode(context.Background(), pki.NodeProfile{Tenant: DefaultTenant, Node: node, Public: key.Public(), Now: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: c.Chain, PrivateKey: key}
	}
	other := newMachine(t, "b")
	server, err := r.s.ca.ServerCertificate([]string{"localhost"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][]tls.Certificate{
		"no certificate":                      nil,
		"a foreign CA":                        {{Certificate: chain, PrivateKey: m.key}},
		"another key for the node":            {mine(req.Node, other.key)},
		"a node nobody approved":              {mine(other.filing.Evidence.EK.NodeID(), other.key)},
		"a server certificate of our own":     {server},
		"a certificate without its own chain": {{Certificate: chain[:1], PrivateKey: m.key}},
	} {
		if _, err := r.report(c...); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if err := r.Deny(req.Node); err != nil {
		t.Fatal(err)
	}
	if _, err := r.report(cert); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("a denied node: %v", err)
	}
	// Allowing it does not bring the old certificate back.
	if err := r.Allow(req.Node); err != nil {
		t.Fatal(err)
	}
	if _, err := r.report(cert); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("an allowed node with its old certificate: %v", err)
	}
	_, cert, _ = r.enroll(t, m)
	if _, err := r.report(cert); err != nil {
		t.Errorf("an allowed node that enrolled again: %v", err)
	}
	r.sound(t)
}

func stepcaIn(dir string) (*stepca.Authority, error) {
	if _, err := stepca.Init(dir, stepca.Options{Now: time.Now()}); err != nil {
		return nil, err
	}
	return stepca.Open(dir)
}

// TestEveryCallWantsAToken tries each method of the management service as
// somebody without the right to it.
// The certificate authority inside has an API of its own in other products. Of
// that nothing may be reachable here (GHSA-h8cp-697h-8c8p and its like).
func TestTheAuthoritysOwnAPIIsNotServed(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	_, cert, _ := r.enroll(t, newMachine(t, "a"))
	for _, base := range []string{r.admin.Server, "https://" + r.addr.Nodes} {
		for _, path := range []string{"/1.0/sign", "/1.0/renew", "/1.0/rekey", "/1.0/revoke", "/1.0/provisioners", "/1.0/ssh/sign", "/sign", "/renew", "/revoke",
			"/provisioners", "/ssh/sign", "/acme/acme/new-account", "/acme/acme/directory", "/scep/scep", "/admin/provisioners", "/.well-known/acme-challenge/x"} {
			for _, method := range []string{http.MethodGet, http.MethodPost} {
				q, err := http.NewRequest(method, base+path, strings.NewReader("{}"))
				if err != nil {
					t.Fatal(err)
				}
				q.Header.Set("Content-Type", "application/json")
				q.Header.Set("Authorization", "Bearer "+r.admin.Token)
				resp, err := r.client(cert).Do(q)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode != http.StatusNotFound {
					t.Errorf("%s %s%s: %s", method, base, path, resp.Status)
				}
			}
		}
	}
}

func TestEveryCallWantsAToken(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	_, cert, _ := r.enroll(t, newMachine(t, "a"))
	viewer := r.person(t, "v", access.Binding{Tenant: DefaultTenant, Role: access.Viewer})
	other, _ := newToken()
	service := musterv1.File_muster_v1_management_proto.Services().Get(0).Methods()
	if service.Len() < 15 {
		t.Fatalf("%d methods", service.Len())
	}
	call := func(path, token string, cert ...tls.Certificate) int {
		q, err := http.NewRequest(http.MethodPost, r.admin.Server+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		q.Header.Set("Content-Type", "application/json")
		if token != "" {
			q.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := r.client(cert...).Do(q)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	for i := range service.Len() {
		name := string(service.Get(i).Name())
		path := "/" + musterv1connect.ManagementServiceName + "/" + name
		for who, status := range map[string]int{
			"no token":       call(path, ""),
			"a wrong token":  call(path, other),
			"half a token":   call(path, r.admin.Token[:20]),
			"a longer token": call(path, r.admin.Token+"x"),
			"a node":         call(path, "", cert),
		} {
			if status != http.StatusUnauthorized {
				t.Errorf("%s with %s: status %d", name, who, status)
			}
		}
		if status := call(path, viewer); (status == http.StatusForbidden) != (methods[path].verb != access.Read) {
			t.Errorf("%s as viewer: status %d, does %s", name, status, methods[path].verb)
		}
		if status := call(path, r.admin.Token); status == http.StatusUnauthorized || status == http.StatusForbidden {
			t.Errorf("%s as admin: status %d", name, status)
		}
	}
	if status := call("/"+musterv1connect.ManagementServiceName+"/NoSuch", r.admin.Token); status == http.StatusOK {
		t.Error("a method that does not exist answers")
	}
	// The node endpoint does not serve management at all.
	q, err := r.client(cert).Post("https://"+r.addr.Nodes+musterv1connect.ManagementServiceListNodesProcedure, "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	q.Body.Close()
	if q.StatusCode != http.StatusNotFound {
		t.Errorf("management on the node endpoint: %d", q.StatusCode)
	}
}

func TestDecisions(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx := context.Background()
	a, err := r.File(ctx, newMachine(t, "a").filing)
	if err != nil {
		t.Fatal(err)
	}
	unknown := newMachine(t, "b").filing
	unknown.Evidence.Boot = fleet.BootUnknown
	b, err := r.File(ctx, unknown)
	if err != nil {
		t.Fatal(err)
	}
	api := r.manage()
	approve := func(q *musterv1.ApproveRequest) error { _, err := api.Approve(ctx, q); return err }
	for _, c := range []struct {
		name string
		err  error
		want connect.Code
		says string
	}{
		{"an unknown ID", approve(&musterv1.ApproveRequest{Id: "r-aaaaaaaaaaaaaaaaaaaaaaaa"}), connect.CodeNotFound, "get requests"},
		{"an ambiguous prefix", approve(&musterv1.ApproveRequest{Id: "r-"}), connect.CodeInvalidArgument, string(b.ID)},
		{"no ID", approve(&musterv1.ApproveRequest{}), connect.CodeNotFound, "no request"},
		{"an unknown boot", approve(&musterv1.ApproveRequest{Id: string(b.ID)}), connect.CodeFailedPrecondition, "boot unknown"},
		{"another revision", approve(&musterv1.ApproveRequest{Id: string(a.ID), Revision: a.Revision + 1}), connect.CodeAborted, "changed"},
		{"a bad site", approve(&musterv1.ApproveRequest{Id: string(a.ID), Site: "../x", CreateSite: true}), connect.CodeInvalidArgument, "site"},
		{"the pool as site", approve(&musterv1.ApproveRequest{Id: string(a.ID), Site: "pool", CreateSite: true}), connect.CodeFailedPrecondition, "pool"},
		{"a site that is not there", approve(&musterv1.ApproveRequest{Id: string(a.ID), Site: "lab"}), connect.CodeNotFound, "get sites"},
		{"a bad label", approve(&musterv1.ApproveRequest{Id: string(a.ID), Labels: map[string]string{"a b": "c"}}), connect.CodeInvalidArgument, "label"},
		{"a good one, by words", approve(&musterv1.ApproveRequest{Id: strings.ToUpper(a.Words), Site: "lab", CreateSite: true}), 0, ""},
		{"the same again", approve(&musterv1.ApproveRequest{Id: string(a.ID)}), connect.CodeFailedPrecondition, "approved already"},
	} {
		if got := connect.CodeOf(c.err); c.want == 0 && c.err != nil || c.want != 0 && got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, c.err, c.want)
		} else if c.err != nil && !strings.Contains(c.err.Error(), c.says) {
			t.Errorf("%s: %q does not say %q", c.name, c.err, c.says)
		}
	}
	if _, err := api.Reject(ctx, &musterv1.RejectRequest{Id: string(b.ID)}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("rejecting without a reason: %v", err)
	}
	if _, err := api.Reject(ctx, &musterv1.RejectRequest{Id: string(b.ID), Reason: "not ours"}); err != nil {
		t.Error(err)
	}
	// In a lab, and only there, the same unknown boot may be approved.
	c := newMachine(t, "c").filing
	c.Evidence.Boot = fleet.BootUnknown
	q, err := r.File(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if err := approve(&musterv1.ApproveRequest{Id: string(q.ID)}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("before the tenant is a lab: %v", err)
	}
	labbed(t, r)
	if err := approve(&musterv1.ApproveRequest{Id: string(q.ID)}); err != nil {
		t.Errorf("in a lab: %v", err)
	}
	v, err := api.VerifyAudit(ctx, &musterv1.VerifyAuditRequest{})
	if err != nil || !v.Ok || v.Records < 8 {
		t.Errorf("audit: %v, %v", v, err)
	}
	r.sound(t)
}

// TestAliasesAreClaims: denying a machine does not deny another one whose EK
// it named as its own alias.
func TestAliasesAreClaims(t *testing.T) {
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	victim, err := h.File(ctx, servicetest.Filing("victim"))
	if err != nil {
		t.Fatal(err)
	}
	f := servicetest.Filing("thief")
	own := fleet.EKHash(sha256.Sum256([]byte("second EK of the thief")))
	f.Evidence.Aliases = []fleet.EKHash{victim.Evidence.EK, own}
	thief, err := h.File(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Deny(thief.Node); err != nil {
		t.Fatal(err)
	}
	for ek, want := range map[fleet.EKHash]bool{victim.Evidence.EK: false, own: true, thief.Evidence.EK: true} {
		if got, err := h.Denied(ctx, DefaultTenant, []fleet.EKHash{ek}); err != nil || got != want {
			t.Errorf("EK %s: denied %v, %v; want %v", ek, got, err, want)
		}
	}
}

func TestEvents(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := r.manage().WatchEvents(ctx, &musterv1.WatchEventsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	r.s.journal.add(fleet.Event{Tenant: DefaultTenant, Time: time.Now(), Kind: "pxe.served", MAC: "52:54:00:12:34:56", Text: "sent \x1b[2Jrecovery"})
	if !stream.Receive() || stream.Msg().Event != nil || !stream.Receive() {
		t.Fatalf("want an empty message and an event: %v, %v", stream.Msg(), stream.Err())
	}
	if e := stream.Msg().Event; e.Kind != "pxe.served" || strings.ContainsRune(e.Text, '\x1b') {
		t.Errorf("first event: %v", e)
	}
	r.enroll(t, newMachine(t, "a"))
	var kinds []string
	for len(kinds) < 3 && stream.Receive() {
		e := stream.Msg().Event
		if e == nil || strings.HasPrefix(e.Kind, "site.") {
			continue
		}
		if e.Mac != "52:54:00:12:34:56" {
			t.Errorf("%s does not name the machine", e.Kind)
		}
		kinds = append(kinds, e.Kind)
	}
	if got := strings.Join(kinds, " "); got != "request.filed request.approved certificate.issued" {
		t.Errorf("events: %s (%v)", got, stream.Err())
	}
	// A stop ends the stream and says so, within the time of a stop.
	done := make(chan error, 1)
	go func() { done <- r.stop() }()
	for stream.Receive() {
	}
	if connect.CodeOf(stream.Err()) != connect.CodeUnavailable {
		t.Errorf("the stream ended with %v", stream.Err())
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestEndpointsSpeakTLS13Only(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	for _, addr := range []string{r.addr.Operators, r.addr.Nodes} {
		for version, want := range map[uint16]bool{tls.VersionTLS12: false, tls.VersionTLS13: true} {
			c, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: r.roots, MinVersion: tls.VersionTLS12, MaxVersion: version})
			if (err == nil) != want {
				t.Errorf("%s with TLS %x: %v", addr, version, err)
			}
			if err == nil {
				c.Close()
			}
		}
	}
}

func TestHealthAndMetrics(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	if _, err := r.File(context.Background(), newMachine(t, "a").filing); err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + r.addr.Metrics + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	for _, p := range []string{"/healthz", "/readyz"} {
		if code, _ := get(p); code != 200 {
			t.Errorf("%s: %d", p, code)
		}
	}
	if _, body := get("/metrics"); !strings.Contains(body, `muster_requests{state="pending",tenant="default"} 1`) || !strings.Contains(body, `muster_enrollments_total{outcome="filed"} 1`) {
		t.Error("the metrics do not show the request")
	}
	nodes := musterv1connect.NewEnrollmentServiceClient(r.client(), "https://"+r.addr.Nodes)
	if _, err := nodes.Begin(context.Background(), &musterv1.BeginRequest{Protocol: 99}); err == nil {
		t.Error("a protocol of the future is spoken")
	}
	_, body := get("/metrics")
	for _, line := range []string{
		`muster_enrollment_calls_total{call="begin",outcome="protocol"} 1`, `muster_enrollment_not_proven_total{check="quote-signature"} 0`,
	} {
		if !strings.Contains(body, line) {
			t.Errorf("the metrics lack %s", line)
		}
	}
	if strings.Contains(body, `call="begin",outcome="ok"`) {
		t.Error("the metrics show a begin that was not")
	}
	r.s.ready.Store(false)
	if code, _ := get("/readyz"); code != 503 {
		t.Errorf("/readyz while stopping: %d", code)
	}
}

func TestConnectionLimits(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan struct{}, 10)
	l := newLimitListener(inner, 10, 2, func() { refused <- struct{}{} })
	defer l.Close()
	accepted := make(chan net.Conn, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	<-accepted
	third := dial()
	<-refused
	if _, err := third.Read(make([]byte, 1)); err == nil {
		t.Error("the third connection is open")
	}
	// One that ends makes room for one, even if it is closed twice.
	first.Close()
	first.Close()
	dial()
	<-accepted
	dial()
	<-refused
}

func TestOneCentrePerDirectory(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, nil)
	if _, err := New(context.Background(), Config{Data: dir}); !errors.Is(err, ErrRunning) {
		t.Errorf("a second centre: %v", err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	// The second start keeps token and CA.
	again := serve(t, dir, nil)
	if again.admin.Token != r.admin.Token || again.admin.CA != r.admin.CA {
		t.Error("the second start made another token or CA")
	}
	if _, err := again.manage().GetCentre(context.Background(), &musterv1.GetCentreRequest{}); err != nil {
		t.Error(err)
	}
	if err := again.stop(); err != nil {
		t.Fatal(err)
	}
	// A lost admin.yaml is replaced, and the old token ends.
	if err := os.Remove(filepath.Join(dir, AdminFile)); err != nil {
		t.Fatal(err)
	}
	third := serve(t, dir, nil)
	if _, err := third.manage().GetCentre(context.Background(), &musterv1.GetCentreRequest{}); err != nil {
		t.Error(err)
	}
	third.admin.Token = r.admin.Token
	if _, err := third.manage().GetCentre(context.Background(), &musterv1.GetCentreRequest{}); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("the old token: %v", err)
	}
}
