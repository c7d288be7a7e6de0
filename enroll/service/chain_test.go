package service_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

func ekDER(t testing.TB, m *musterv1.BeginRequest) []byte {
	t.Helper()
	k, err := tpm.ParsePublic(m.Eks[0].Public)
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(k.Public)
	must(t, err)
	return der
}

func waits(p client.Progress) bool { return p.Phase == client.PhaseWait && p.State == "pending" }

// The whole chain: a machine asks, a person approves, the certificate is for
// the key in the TPM, and a TLS handshake signed by the TPM opens what is for
// nodes only.
func TestEnrollment(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	// The machine's clock is at 1970 until the centre tells the time.
	clock := time.Unix(0, 0)
	run := c.enroll(t.Context(), t, m, func(cfg *client.Config) {
		cfg.Now = func() time.Time { return clock }
		cfg.SetTime = func(n time.Time) error { clock = n; return nil }
	})
	p := run.until(t, "waiting", waits)
	r := c.only()
	if r.State != fleet.RequestPending || r.Identity != fleet.IdentityLab || r.Boot != fleet.BootUnknown {
		t.Fatalf("request: %s %s/%s", r.State, r.Identity, r.Boot)
	}
	if p.Node != r.Node || p.Request != r.ID || p.Words == "" || !strings.Contains(p.Text, p.Words) {
		t.Errorf("the screen shows %+v", p)
	}
	if !clock.Equal(servicetest.Start) {
		t.Errorf("the clock is at %v", clock)
	}
	must(t, c.store.Approve(r.ID, r.Revision))
	id := run.wait(t)
	leaf, err := x509.ParseCertificate(id.Certificates[0])
	must(t, err)
	if key := m.Signer().Public().(*ecdsa.PublicKey); !key.Equal(leaf.PublicKey) {
		t.Error("the certificate is not for the key in the TPM")
	}
	if id.Node != r.Node || id.Request != r.ID || len(id.Documents) != 1 || id.Centre != c.url {
		t.Errorf("identity: %+v", id)
	}
	if got := c.only(); got.State != fleet.RequestIssued || got.Site != "shop-7" {
		t.Errorf("request is %s", got.State)
	}
	node := run.client.NodeHTTPClient(id)
	get := func() string {
		res, err := node.Get(c.url + "/whoami")
		must(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		must(t, err)
		if res.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", res.Status, b)
		}
		return string(b)
	}
	if got := get(); got != string(r.Node)+" resumed=false" {
		t.Errorf("the centre sees %q", got)
	}
	node.CloseIdleConnections()
	if got := get(); got != string(r.Node)+" resumed=true" {
		t.Errorf("on the second connection the centre sees %q", got)
	}
	// Without the certificate the door stays shut.
	bare := run.client.NodeHTTPClient(client.Identity{})
	if res, err := bare.Get(c.url + "/whoami"); err == nil {
		if res.StatusCode != http.StatusUnauthorized {
			t.Errorf("without a certificate: %s", res.Status)
		}
		_ = res.Body.Close()
	}
}

// An approval survives a power cycle, and an enrolled machine that boots
// again gets its certificate without a person.
func TestWhenPowerIsLostThenTheApprovalHolds(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	first := c.enroll(t.Context(), t, m, nil)
	first.until(t, "waiting", waits)
	first.stop()
	<-first.done
	r := c.only()
	must(t, c.store.Approve(r.ID, r.Revision))
	m.powerCycle(t)
	id := c.enroll(t.Context(), t, m, nil).wait(t)
	m.powerCycle(t)
	again := c.enroll(t.Context(), t, m, nil).wait(t)
	if id.Node != again.Node || id.Request != again.Request || string(id.Certificates[0]) != string(again.Certificates[0]) {
		t.Error("after another boot the machine is another one")
	}
	if n := len(c.ca.asked()); n != 1 {
		t.Errorf("%d certificates were made", n)
	}
	c.only()
}

// Evidence that changes between looking and approving is a new request.
func TestWhenEvidenceChangesBeforeTheApprovalThenItDoesNotCount(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	first := c.enroll(t.Context(), t, m, nil)
	first.until(t, "waiting", waits)
	first.stop()
	<-first.done
	seen := c.only()
	m.hw.Serial = "another"
	second := c.enroll(t.Context(), t, m, nil)
	second.until(t, "waiting", waits)
	if err := c.store.Approve(seen.ID, seen.Revision); err == nil {
		t.Fatal("evidence was approved that is not there any more")
	}
	second.stop()
	<-second.done
	if n := len(c.ca.asked()); n != 0 {
		t.Errorf("%d certificates were made", n)
	}
	all, err := c.store.Requests()
	must(t, err)
	for _, r := range all {
		if r.ID != seen.ID && (r.Supersedes != seen.ID || len(r.Warnings) == 0) {
			t.Errorf("the new request does not say what changed: %+v", r)
		}
	}
}

// While the machine waits its request and its ticket run out; it asks again
// and is served.
func TestWhenTheTicketIsWorthlessThenTheClientBeginsAgain(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	run := c.enroll(t.Context(), t, m, nil)
	run.until(t, "waiting", waits)
	c.store.SetNow(servicetest.Start.Add(15 * 24 * time.Hour))
	r := c.only()
	w := c.dial(t)
	a := w.begin(t, m)
	var err error
	a.hardware, err = json.Marshal(m.hw)
	must(t, err)
	a.fields.Hardware = a.hardware
	_, err = w.complete(t, a) // ends the long poll
	must(t, err)
	run.until(t, "waiting again", waits)
	for _, x := range mustRequests(t, c) {
		if x.State == fleet.RequestPending {
			r = x
		}
	}
	must(t, c.store.Approve(r.ID, r.Revision))
	if id := run.wait(t); id.Request != r.ID {
		t.Errorf("got the outcome of %s, want %s", id.Request, r.ID)
	}
}

func mustRequests(t *testing.T, c *centre) []fleet.Request {
	t.Helper()
	all, err := c.store.Requests()
	must(t, err)
	return all
}

// Rejected and denied machines are told so, get nothing, and go on asking
// politely; a released one is served.
func TestWhenRejectedThenNothingIsIssued(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	run := c.enroll(t.Context(), t, m, nil)
	run.until(t, "waiting", waits)
	r := c.only()
	must(t, c.store.Reject(r.ID, r.Revision))
	p := run.until(t, "rejected", func(p client.Progress) bool { return p.State == "rejected" })
	if !strings.Contains(p.Text, "turned down") {
		t.Errorf("the screen says %q", p.Text)
	}
	run.stop()
	<-run.done
	must(t, c.store.Deny(r.Node))
	denied := c.enroll(t.Context(), t, m, nil)
	p = denied.until(t, "denied", func(p client.Progress) bool { return p.Problem })
	if !strings.Contains(p.Text, "not wanted") || p.Retry < 5*time.Minute {
		t.Errorf("the screen says %q, again in %v", p.Text, p.Retry)
	}
	if n := len(c.ca.asked()); n != 0 {
		t.Errorf("%d certificates were made", n)
	}
	if n := c.calls.of(musterv1connect.EnrollmentServiceCollectProcedure); n == 0 {
		t.Error("the client did not collect")
	}
}

// A centre that is down is passed over, and an outage is waited out.
func TestWhenTheFirstCentreIsDeadThenTheNextIsCalled(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	dead := "https://" + l.Addr().String()
	must(t, l.Close())
	lost := c.enroll(t.Context(), t, m, func(cfg *client.Config) { cfg.Site.Centre = []string{dead} })
	p := lost.until(t, "a problem", func(p client.Progress) bool { return p.Problem })
	if !strings.Contains(p.Text, "does not run") || p.Retry <= 0 {
		t.Errorf("the screen says %q, again in %v", p.Text, p.Retry)
	}
	lost.until(t, "another attempt", func(p client.Progress) bool { return p.Problem })
	lost.stop()
	<-lost.done
	run := c.enroll(t.Context(), t, m, func(cfg *client.Config) { cfg.Site.Centre = []string{dead, c.url} })
	run.until(t, "waiting", waits)
	r := c.only()
	must(t, c.store.Approve(r.ID, r.Revision))
	if id := run.wait(t); id.Centre != c.url {
		t.Errorf("answered by %s", id.Centre)
	}
}
