package service_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

func refused(t *testing.T, err error, code connect.Code, word string) {
	t.Helper()
	var e *connect.Error
	if !errors.As(err, &e) || e.Code() != code || !strings.HasPrefix(e.Message(), word+":") {
		t.Errorf("got %v, want %s and %q", err, code, word)
		return
	}
	for _, inside := range []string{"pki", "service:", "tpm:", "enroll:", "servicetest", ".go"} {
		if strings.Contains(e.Message(), inside) {
			t.Errorf("the answer %q shows our insides", e.Message())
		}
	}
}

// Every row is the honest exchange with one thing false. The first row, with
// nothing false, keeps the others honest.
func TestHostileComplete(t *testing.T) {
	software, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	m := newMachine(t, swtpmtest.Options{})
	flip := func(b []byte, i int) []byte {
		b = bytes.Clone(b)
		b[(i+len(b))%len(b)] ^= 1
		return b
	}
	const again, bad, proof = "begin-again", "bad-request", "not-proven"
	for _, c := range []struct {
		name  string
		spoil func(*attempt)
		want  string // "" means accepted
	}{
		{"nothing", func(*attempt) {}, ""},
		{"wrong nonce", func(a *attempt) { a.fields.Nonce = flip(a.fields.Nonce, 0) }, proof},
		{"wrong exporter", func(a *attempt) { a.fields.Exporter = flip(a.fields.Exporter, 0) }, proof},
		{"wrong EK", func(a *attempt) { a.fields.EK = flip(a.fields.EK, -1) }, proof},
		{"wrong AK", func(a *attempt) { a.fields.AK = flip(a.fields.AK, -1) }, proof},
		{"wrong LDevID", func(a *attempt) { a.fields.LDevID = flip(a.fields.LDevID, -1) }, proof},
		{"other hardware than in the transcript", func(a *attempt) { a.hardware = []byte(`{"serial":"S2"}`) }, proof},
		{"no proof", func(a *attempt) { a.edit = func(m *musterv1.CompleteRequest) { m.Proof = nil } }, proof},
		{"proof by another secret", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) {
				m.Proof = enroll.Proof(make([]byte, 32), enroll.Transcript(a.fields))
			}
		}, proof},
		{"tampered cookie: version", func(a *attempt) { a.challenge.Cookie = flip(a.challenge.Cookie, 0) }, again},
		{"tampered cookie: key ID", func(a *attempt) { a.challenge.Cookie = flip(a.challenge.Cookie, 4) }, again},
		{"tampered cookie: nonce", func(a *attempt) { a.challenge.Cookie = flip(a.challenge.Cookie, 8) }, again},
		{"tampered cookie: body", func(a *attempt) { a.challenge.Cookie = flip(a.challenge.Cookie, 40) }, again},
		{"tampered cookie: tag", func(a *attempt) { a.challenge.Cookie = flip(a.challenge.Cookie, -1) }, again},
		{"truncated cookie", func(a *attempt) { a.challenge.Cookie = a.challenge.Cookie[:20] }, again},
		{"no cookie", func(a *attempt) { a.challenge.Cookie = nil }, again},
		{"certificate request by a key in software", func(a *attempt) { a.signer = software }, proof},
		{"certificate request with a bad signature", func(a *attempt) {
			a.spoilCSR = func(b []byte) []byte { return flip(b, -1) }
		}, proof},
		{"no quoted PCRs", func(a *attempt) { a.quotePCRs = []int{23} }, proof},
		{"fewer PCRs", func(a *attempt) { a.quotePCRs = []int{0, 2, 4, 7, 9, 11} }, proof},
		{"altered PCR value", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.Pcrs[0].Sha256 = flip(m.Pcrs[0].Sha256, 0) }
		}, proof},
		{"PCR twice", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.Pcrs = append(m.Pcrs, m.Pcrs[0]) }
		}, proof},
		{"quote where certify should be", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) {
				m.CertifyAttest, m.CertifySignature = m.QuoteAttest, m.QuoteSignature
			}
		}, proof},
		{"altered statement", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.QuoteAttest = flip(m.QuoteAttest, -1) }
		}, proof},
		{"altered signature", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.CertifySignature = flip(m.CertifySignature, -1) }
		}, proof},
		{"no statements", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) {
				m.CertifyAttest, m.CertifySignature, m.QuoteAttest, m.QuoteSignature = nil, nil, nil, nil
			}
		}, proof},
		{"hardware is no JSON", func(a *attempt) {
			a.hardware = []byte(`{"serial":`)
			a.fields.Hardware = a.hardware
		}, proof},
		{"long statement", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.QuoteAttest = make([]byte, 1<<10+1) }
		}, bad},
		{"event log over 1 MiB", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.EventLog = make([]byte, 1<<20+1) }
		}, bad},
		{"event log of garbage lowers trust only", func(a *attempt) {
			a.edit = func(m *musterv1.CompleteRequest) { m.EventLog = bytes.Repeat([]byte{7}, 1<<20) }
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			centre := newCentre(t, options{roots: m.tpm.CA})
			w := centre.dial(t)
			a := w.begin(t, m)
			c.spoil(a)
			_, err := w.complete(t, a)
			switch c.want {
			case "":
				must(t, err)
				centre.only()
				return
			case again:
				refused(t, err, connect.CodeFailedPrecondition, c.want)
			case bad:
				refused(t, err, connect.CodeInvalidArgument, c.want)
			case proof:
				refused(t, err, connect.CodePermissionDenied, c.want)
			}
			centre.none()
		})
	}
}

// A machine without a good TPM begins with the EK of another one and lets
// that one activate the credential (cuckoo, EK relay).
func TestWhenAnEKIsRelayedThenItProvesNothing(t *testing.T) {
	victim, thief := newMachine(t, swtpmtest.Options{}), newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: victim.tpm.CA})
	stolen := beginRequest(thief.id)
	stolen.Eks = beginRequest(victim.id).Eks
	w := c.dial(t)
	challenge, err := w.rpc.Begin(context.Background(), stolen)
	must(t, err)
	if secret, err := victim.ActivateCredential(challenge.CredentialBlob, challenge.EncryptedSecret); err == nil {
		t.Fatalf("the victim's TPM gave the secret %x for another TPM's AK", secret)
	}
	if _, err := thief.ActivateCredential(challenge.CredentialBlob, challenge.EncryptedSecret); err == nil {
		t.Fatal("the thief's TPM activated a credential for another EK")
	}
	// With the victim's EK and AK, but the thief's LDevID: the secret comes
	// out, and no statement ties the two.
	a := w.begin(t, victim)
	mixed := beginRequest(victim.id)
	mixed.LdevidPublic = thief.id.LDevIDPublic
	a.challenge, err = w.rpc.Begin(context.Background(), mixed)
	must(t, err)
	a.fields.Nonce, a.fields.LDevID, a.signer = a.challenge.Nonce, mixed.LdevidPublic, thief.Signer()
	_, err = w.complete(t, a)
	refused(t, err, connect.CodePermissionDenied, "not-proven")
	// The thief's own Certify over the victim's transcript does not help.
	a.edit = func(m *musterv1.CompleteRequest) {
		m.CertifyAttest, m.CertifySignature, err = thief.Certify(enroll.Transcript(a.fields))
		must(t, err)
	}
	_, err = w.complete(t, a)
	refused(t, err, connect.CodePermissionDenied, "not-proven")
	c.none()
}

// An LDevID whose private key lies in software, in a public area that claims
// to be in a TPM.
func TestWhenTheLDevIDIsSoftwareThenRefuse(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	point, err := key.PublicKey.Bytes()
	must(t, err)
	forged := beginRequest(m.id)
	// The last two fields of a TPMT_PUBLIC of an ECC key are x and y, each
	// with a length of 2 bytes.
	p := bytes.Clone(forged.LdevidPublic)
	copy(p[len(p)-66:], point[1:33])
	copy(p[len(p)-32:], point[33:])
	forged.LdevidPublic = p
	w := c.dial(t)
	a := w.begin(t, m)
	a.challenge, err = w.rpc.Begin(context.Background(), forged)
	must(t, err)
	a.fields.Nonce, a.fields.LDevID, a.signer = a.challenge.Nonce, p, key
	_, err = w.complete(t, a)
	refused(t, err, connect.CodePermissionDenied, "not-proven")
	c.none()
}

// Somebody who terminates TLS on both sides and passes all messages on.
func TestWhenTLSIsProxiedThenTheProofFails(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	victimSide, centreSide := c.dial(t), c.dial(t)
	a := centreSide.begin(t, m)
	// The machine computes with the exporter of its own connection.
	a.fields.Exporter = victimSide.exporter
	_, err := centreSide.complete(t, a)
	refused(t, err, connect.CodePermissionDenied, "not-proven")
	c.none()

	// And the machine does not even talk to such a one: nothing but a
	// handshake reaches him.
	foreign := newCentre(t, options{roots: m.tpm.CA})
	run := c.enroll(t.Context(), t, m, func(cfg *client.Config) { cfg.Site.Centre = []string{foreign.url} })
	p := run.until(t, "a problem", func(p client.Progress) bool { return p.Problem })
	var untrusted *client.UntrustedError
	if !errors.As(p.Err, &untrusted) || !strings.Contains(p.Text, "Somebody else answers") {
		t.Errorf("the screen says %q: %v", p.Text, p.Err)
	}
	foreign.calls.mu.Lock()
	defer foreign.calls.mu.Unlock()
	if len(foreign.calls.n) != 0 {
		t.Errorf("the false centre was told %v", foreign.calls.n)
	}
}

// A cookie is good on its own connection, for a minute.
func TestWhenACookieIsReplayedThenBeginAgain(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	one, two := c.dial(t), c.dial(t)
	a := one.begin(t, m)
	message := a.message(t)
	_, err := two.rpc.Complete(context.Background(), message)
	refused(t, err, connect.CodeFailedPrecondition, "begin-again")
	c.store.SetNow(servicetest.Start.Add(60 * time.Second))
	_, err = one.rpc.Complete(context.Background(), message)
	refused(t, err, connect.CodeFailedPrecondition, "begin-again")
	c.none()
	c.store.SetNow(servicetest.Start.Add(59 * time.Second))
	first, err := one.rpc.Complete(context.Background(), message)
	must(t, err)
	// The same message again changes nothing.
	before := c.only()
	second, err := one.rpc.Complete(context.Background(), message)
	must(t, err)
	after := c.only()
	if first.RequestId != second.RequestId || before.Revision != after.Revision {
		t.Errorf("a replay changed something: %+v, %+v", before, after)
	}
	if audit, _ := c.store.Audit(); len(audit) != 1 {
		t.Errorf("audit: %v", audit)
	}
}

// Whatever a certificate request asks for, the issuer hears of the key only.
func TestWhenTheCSRIsHostileThenOnlyItsKeyCounts(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	ca, err := asn1.Marshal(struct {
		CA bool
	}{true})
	must(t, err)
	w := c.dial(t)
	a := w.begin(t, m)
	a.csr = &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		Subject:            pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}},
		DNSNames:           []string{"centre.example", "*"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, EmailAddresses: []string{"root@example"},
		ExtraExtensions: []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: ca},
			{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}},
			{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte("x")},
		},
	}
	res, err := w.complete(t, a)
	must(t, err)
	r := c.only()
	must(t, c.store.Approve(r.ID, r.Revision))
	out, err := w.rpc.Collect(context.Background(), &musterv1.CollectRequest{Ticket: res.Ticket})
	must(t, err)
	leaf, err := x509.ParseCertificate(out.Certificates[0])
	must(t, err)
	asked := c.ca.asked()
	if len(asked) != 1 || asked[0].Node != r.Node || asked[0].Site != "shop-7" || asked[0].Tenant != "default" {
		t.Errorf("the issuer was asked for %+v", asked)
	}
	if leaf.IsCA || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.Subject.CommonName != string(r.Node) {
		t.Errorf("leaf: %+v", leaf.Subject)
	}
}

// A ticket that is made up, altered, or run out opens nothing; nor does a
// cookie.
func TestWhenATicketIsNotOursThenNotFound(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	w := c.dial(t)
	a := w.begin(t, m)
	res, err := w.complete(t, a)
	must(t, err)
	r := c.only()
	must(t, c.store.Approve(r.ID, r.Revision))
	altered := bytes.Clone(res.Ticket)
	altered[len(altered)-1] ^= 1
	for name, ticket := range map[string][]byte{
		"none": nil, "random": bytes.Repeat([]byte{1}, 120), "altered": altered, "request ID": []byte(r.ID),
		"cookie": a.challenge.Cookie, "long": make([]byte, 600),
	} {
		_, err := w.rpc.Collect(context.Background(), &musterv1.CollectRequest{Ticket: ticket})
		if err == nil {
			t.Errorf("%s: opened", name)
			continue
		}
		refused(t, err, connect.CodeNotFound, "not-found")
	}
	c.store.SetNow(servicetest.Start.Add(24 * time.Hour))
	_, err = w.rpc.Collect(context.Background(), &musterv1.CollectRequest{Ticket: res.Ticket})
	refused(t, err, connect.CodeNotFound, "not-found")
	if n := len(c.ca.asked()); n != 0 {
		t.Errorf("%d certificates were made", n)
	}
	c.store.SetNow(servicetest.Start.Add(23 * time.Hour))
	out, err := w.rpc.Collect(context.Background(), &musterv1.CollectRequest{Ticket: res.Ticket})
	must(t, err)
	if out.State != "issued" {
		t.Errorf("the good ticket: %s", out.State)
	}
}

// Bodies that are larger than the protocol allows are not read.
func TestWhenABodyIsOversizedThenRefuse(t *testing.T) {
	c := newCentre(t, options{})
	w := c.dial(t)
	_, err := w.rpc.Begin(context.Background(), &musterv1.BeginRequest{Protocol: 1, AkPublic: make([]byte, 70<<10)})
	refused(t, err, connect.CodeResourceExhausted, "too-large")
	w = c.dial(t)
	_, err = w.rpc.Complete(context.Background(), &musterv1.CompleteRequest{EventLog: make([]byte, 3<<20)})
	refused(t, err, connect.CodeResourceExhausted, "too-large")
	w = c.dial(t)
	_, err = w.rpc.Collect(context.Background(), &musterv1.CollectRequest{Ticket: make([]byte, 5<<10)})
	refused(t, err, connect.CodeResourceExhausted, "too-large")
	for name, m := range map[string]*musterv1.BeginRequest{
		"nothing":    {Protocol: 1},
		"many EKs":   {Protocol: 1, Eks: make([]*musterv1.EndorsementKey, 9)},
		"long EK":    {Protocol: 1, Eks: []*musterv1.EndorsementKey{{Public: make([]byte, 1025)}}},
		"garbage EK": {Protocol: 1, Eks: []*musterv1.EndorsementKey{{Public: []byte{1, 2, 3}}}},
	} {
		_, err := c.dial(t).rpc.Begin(context.Background(), m)
		t.Log(name)
		refused(t, err, connect.CodeInvalidArgument, "bad-request")
	}
	_, err = c.dial(t).rpc.Begin(context.Background(), &musterv1.BeginRequest{Protocol: 2})
	refused(t, err, connect.CodeFailedPrecondition, "protocol")
	if n := c.store.Calls(); n != 0 {
		t.Errorf("%d calls to the store", n)
	}
}

// Connections that hang in their handshake are ended and hold up nobody.
func TestWhenHandshakesHangThenOthersAreServed(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA, server: func(s *http.Server) { s.ReadHeaderTimeout = 300 * time.Millisecond }})
	var hung []net.Conn
	for range 100 {
		conn, err := net.Dial("tcp", c.addr)
		must(t, err)
		defer conn.Close()
		hung = append(hung, conn)
	}
	w := c.dial(t)
	_, err := w.complete(t, w.begin(t, m))
	must(t, err)
	for _, conn := range hung {
		must(t, conn.SetReadDeadline(time.Now().Add(20*time.Second)))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a hung connection is still open: %v", err)
		}
	}
}

// A centre behind something that speaks TLS 1.2 to machines is no centre.
func TestWhenTLSIsOldThenNoHandshake(t *testing.T) {
	c := newCentre(t, options{})
	conn, err := tls.Dial("tcp", c.addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err == nil {
		_ = conn.Close()
		t.Fatal("TLS 1.2 was spoken")
	}
}
