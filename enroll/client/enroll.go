package client

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/pki/tpm"
)

// Protocol is the version of the enrollment protocol spoken here.
const Protocol = 1

const (
	maxEventLog = 1 << 20
	maxHardware = 64 << 10
	maxTicket   = 4 << 10
	// maxDrift is how far the clock may be off before it is set.
	maxDrift = time.Minute
	longPoll = 30 * time.Second
)

// Constant keys of log lines.
const (
	keyCentre  = "centre"
	keyError   = "error"
	keyRetry   = "retry"
	keyState   = "state"
	keyProblem = "problem"
)

// claim is a filed request and the right to ask for its outcome.
type claim struct {
	request fleet.RequestID
	ticket  []byte
}

// errAgain says that the claim is worth nothing any more: begin again.
var errAgain = errors.New("client: the request has to be made again")

// Enroll runs until the machine has a certificate or ctx ends; the error is
// ctx's. It outlives every outage.
func (c *Client) Enroll(ctx context.Context) (Identity, error) {
	pause := backoff{min: c.cfg.RetryMin, max: c.cfg.RetryMax}
	var id TPMIdentity
	for {
		var err error
		if id, err = c.identify(ctx); err == nil {
			break
		}
		if err := c.rest(ctx, &pause, err); err != nil {
			return Identity{}, err
		}
	}
	var held *claim
	for {
		var err error
		for _, centre := range c.urls {
			var out Identity
			out, err = c.at(ctx, centre, id, &held, &pause)
			if err == nil {
				return out, nil
			}
			if ctx.Err() != nil {
				return Identity{}, ctx.Err()
			}
			c.cfg.Log.Info("attempt failed", slog.String(keyCentre, centre), slog.Any(keyError, err))
		}
		if err := c.rest(ctx, &pause, err); err != nil {
			return Identity{}, err
		}
	}
}

// rest shows what is wrong and sleeps.
func (c *Client) rest(ctx context.Context, pause *backoff, err error) error {
	d := pause.next(retryAfter(err))
	if errors.Is(err, errAgain) {
		d = min(d, c.cfg.RetryMin)
	}
	c.cfg.Log.Info("trying again", slog.Duration(keyRetry, d), slog.Any(keyError, err))
	c.show(func(p *Progress) {
		p.Problem, p.Retry, p.Err = true, d, err
		p.Text = sentence(err) + " It tries again in " + spoken(d) + "."
	})
	return sleep.For(ctx, d)
}

// identify asks the TPM who it is.
func (c *Client) identify(ctx context.Context) (TPMIdentity, error) {
	id, err := c.cfg.TPM.Identity(ctx)
	if err != nil {
		return id, &tpmError{err}
	}
	if len(id.EKs) == 0 {
		return id, &tpmError{errors.New("client: the TPM has no endorsement key")}
	}
	key, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return id, &tpmError{err}
	}
	ek, err := fleet.HashEK(key.Public)
	if err != nil {
		return id, &tpmError{err}
	}
	for _, p := range id.Problems {
		c.cfg.Log.Warn("TPM identity", slog.String(keyProblem, p))
	}
	node := ek.NodeID()
	c.show(func(p *Progress) {
		p.Phase, p.Text = PhaseContact, "The machine knows who it is and looks for its centre."
		p.EK, p.Node, p.Words = ek, node, fleet.Words(node)
	})
	return id, nil
}

// at does as much as it can with one URL: all of it, if nothing fails. held
// keeps the claim from one call to the next.
func (c *Client) at(ctx context.Context, centre string, id TPMIdentity, held **claim, pause *backoff) (Identity, error) {
	s := c.open(centre)
	defer s.close()
	if *held == nil {
		c.show(func(p *Progress) {
			p.Phase, p.Centre, p.State, p.Request = PhaseContact, centre, "", ""
			p.Text = "Calling the centre at " + centre + "."
		})
		if err := c.hello(ctx, s); err != nil {
			return Identity{}, err
		}
		f, err := c.prove(ctx, s, id)
		if err != nil {
			return Identity{}, err
		}
		*held = f
	}
	for {
		out, wait, err := c.collect(ctx, s, *held)
		if errors.Is(err, errAgain) {
			*held = nil
			return Identity{}, err
		}
		if err != nil {
			return Identity{}, err
		}
		// The centre answers: what failed before is over.
		pause.reset()
		if out != nil {
			out.Centre = centre
			return *out, nil
		}
		if err := sleep.For(ctx, pause.jitter(wait)); err != nil {
			return Identity{}, err
		}
	}
}

// hello asks for the time and sets the clock. The handshake, with a fresh key
// share of ours, is what makes the answer fresh and the centre's.
func (c *Client) hello(ctx context.Context, s *session) error {
	cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	asked := c.cfg.Now()
	m, err := s.rpc.Hello(cctx, &musterv1.HelloRequest{Image: c.cfg.Site.Image, Version: c.cfg.Site.Version})
	if err != nil {
		return fmt.Errorf("client: hello: %w", err)
	}
	if m.GetMinProtocol() > Protocol || m.GetMaxProtocol() < Protocol {
		return &versionError{m.GetMinProtocol(), m.GetMaxProtocol()}
	}
	now := m.GetNow()
	if c.cfg.SetTime == nil || !now.IsValid() {
		return nil
	}
	there := now.AsTime()
	if there.Before(c.cfg.Site.TimeFloor) {
		c.cfg.Log.Warn("the centre's clock is before the image's time floor; ours is left alone", slog.Time("now", there))
		return nil
	}
	if d := there.Sub(asked).Abs(); d > maxDrift {
		if err := c.cfg.SetTime(there); err != nil {
			c.cfg.Log.Warn("clock cannot be set", slog.Any(keyError, err))
		}
	}
	return nil
}

// prove answers the centre's challenge and files the request.
func (c *Client) prove(ctx context.Context, s *session, id TPMIdentity) (*claim, error) {
	c.show(func(p *Progress) {
		p.Phase, p.Text = PhaseProve, "Proving to the centre which machine this is."
	})
	begin := keysOf(id)
	ek, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return nil, &tpmError{err}
	}
	ekDER, err := x509.MarshalPKIXPublicKey(ek.Public)
	if err != nil {
		return nil, &tpmError{err}
	}
	csr, err := c.csr()
	if err != nil {
		return nil, err
	}
	hardware, err := c.hardware()
	if err != nil {
		return nil, err
	}
	bctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	challenge, err := s.rpc.Begin(bctx, begin)
	if err != nil {
		return nil, fmt.Errorf("client: begin: %w", err)
	}
	// From here to the end of Complete one connection must last.
	exporter, err := s.bind()
	if err != nil {
		return nil, err
	}
	defer s.unbind()
	secret, err := c.cfg.TPM.ActivateCredential(challenge.GetCredentialBlob(), challenge.GetEncryptedSecret())
	if err != nil {
		return nil, &tpmError{err}
	}
	claimCode := c.cfg.Site.Claim
	if len(claimCode) > enroll.MaxClaim || !utf8.ValidString(claimCode) {
		c.cfg.Log.Warn("the image's claim code is none; the machine enrolls without it")
		claimCode = ""
	}
	transcript := enroll.Transcript(enroll.TranscriptFields{
		Nonce: challenge.GetNonce(), EK: ekDER, AK: id.AKPublic, LDevID: id.LDevIDPublic,
		CSR: csr, Hardware: hardware, Exporter: exporter,
		Claim: []byte(claimCode),
	})
	complete := &musterv1.CompleteRequest{
		Cookie: challenge.GetCookie(), Proof: enroll.Proof(secret, transcript),
		Csr: csr, Hardware: hardware, EventLog: c.eventLog(), Claim: claimCode,
	}
	if err := c.state(complete, transcript); err != nil {
		return nil, err
	}
	cctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	m, err := s.rpc.Complete(cctx, complete)
	if err != nil {
		return nil, fmt.Errorf("client: complete: %w", err)
	}
	f := &claim{request: fleet.RequestID(m.GetRequestId()), ticket: m.GetTicket()}
	if err := f.request.Validate(); err != nil || len(f.ticket) > maxTicket {
		return nil, errors.New("client: complete: the centre's answer makes no sense")
	}
	c.waiting(f, m.GetState(), m.GetMessage())
	return f, nil
}

// keysOf is what the machine shows of its TPM.
func keysOf(id TPMIdentity) *musterv1.BeginRequest {
	m := &musterv1.BeginRequest{Protocol: Protocol, AkPublic: id.AKPublic, LdevidPublic: id.LDevIDPublic}
	for _, ek := range id.EKs {
		m.Eks = append(m.Eks, &musterv1.EndorsementKey{Public: ek.Public, Certificate: ek.Certificate, Chain: ek.Chain})
	}
	return m
}

// csr is a certificate request of which only the key counts.
func (c *Client) csr() ([]byte, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, c.cfg.TPM.Signer())
	if err != nil {
		return nil, &tpmError{err}
	}
	return csr, nil
}

// waiting shows that the machine waits for people.
func (c *Client) waiting(f *claim, state, message string) {
	c.show(func(p *Progress) {
		p.Phase, p.State, p.Request = PhaseWait, text.Clean(state, 32), f.request
		p.Text = text.Clean(message, 256)
		if p.State == fleet.RequestPending.String() {
			p.Text += " Its words are: " + p.Words + "."
		}
	})
}

// collect asks for the outcome. With a nil Identity and no error there is
// none yet, and wait is the pause that the centre wants.
func (c *Client) collect(ctx context.Context, s *session, f *claim) (out *Identity, wait time.Duration, err error) {
	cctx, cancel := context.WithTimeout(ctx, longPoll+30*time.Second)
	defer cancel()
	m, err := s.rpc.Collect(cctx, &musterv1.CollectRequest{Ticket: f.ticket, WaitSeconds: uint32(longPoll / time.Second)})
	if connect.CodeOf(err) == connect.CodeNotFound {
		return nil, 0, errAgain
	}
	if err != nil {
		return nil, 0, fmt.Errorf("client: collect: %w", err)
	}
	c.cfg.Log.Debug("collect", slog.String(keyState, m.GetState()))
	switch m.GetState() {
	case fleet.RequestExpired.String(), fleet.RequestSuperseded.String():
		return nil, 0, errAgain
	case fleet.RequestIssued.String():
	default:
		if c.screen.State != m.GetState() || c.screen.Problem || c.screen.Phase != PhaseWait {
			c.waiting(f, m.GetState(), m.GetMessage())
		}
		return nil, min(time.Duration(m.GetRetryAfterSeconds())*time.Second, maxPause), nil
	}
	if err := c.ours(m.GetCertificates()); err != nil {
		return nil, 0, err
	}
	c.show(func(p *Progress) {
		p.Phase, p.State, p.Text, p.Request = PhaseDone, m.GetState(), "This machine is enrolled.", f.request
		p.Centre = s.url
	})
	return &Identity{
		Node: c.screen.Node, Words: c.screen.Words, Request: f.request,
		Certificates: m.GetCertificates(), Documents: m.GetDocuments(),
	}, 0, nil
}

// ours checks that the certificate is for the key in our TPM.
func (c *Client) ours(chain [][]byte) error {
	if len(chain) == 0 {
		return errors.New("client: the centre sent no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("client: the centre's certificate: %w", err)
	}
	key, ok := c.cfg.TPM.Signer().Public().(*ecdsa.PublicKey)
	if !ok || !key.Equal(leaf.PublicKey) {
		return errors.New("client: the centre's certificate is for another key")
	}
	return nil
}

// hardware is the description as it is sent: lists that nobody can read go
// before the whole is too long.
func (c *Client) hardware() ([]byte, error) {
	var h fleet.Hardware
	if c.cfg.Hardware != nil {
		h = text.CleanHardware(c.cfg.Hardware())
	}
	for _, shorten := range []func(){func() {}, func() { h.Devices = nil }, func() { h.Disks = nil }, func() { h.NICs = nil }} {
		shorten()
		b, err := json.Marshal(h)
		if err != nil {
			return nil, fmt.Errorf("client: hardware: %w", err)
		}
		if len(b) <= maxHardware {
			return b, nil
		}
	}
	return nil, nil
}

// eventLog is the log as it is sent. Without one the machine enrolls with a
// lower trust, and the centre says so to people.
func (c *Client) eventLog() []byte {
	if c.cfg.EventLog == nil {
		return nil
	}
	b, err := c.cfg.EventLog()
	if err == nil && len(b) > maxEventLog {
		err = fmt.Errorf("client: event log of %d bytes, at most %d", len(b), maxEventLog)
	}
	if err != nil {
		c.cfg.Log.Warn("no event log", slog.Any(keyError, err))
		return nil
	}
	return bytes.Clone(b)
}

// spoken is a duration as people say it.
func spoken(d time.Duration) string {
	if d < 2*time.Second {
		return "a moment"
	}
	if d < 2*time.Minute {
		return fmt.Sprintf("%d seconds", int(d.Round(time.Second)/time.Second))
	}
	return fmt.Sprintf("%d minutes", int(d.Round(time.Minute)/time.Minute))
}

// word returns the first word of one of the centre's errors.
func word(err error) string {
	var e *connect.Error
	if !errors.As(err, &e) {
		return ""
	}
	w, _, found := strings.Cut(e.Message(), ":")
	if !found || !slices.Contains(words, w) {
		return ""
	}
	return w
}

// words are those of enroll/service.
var words = []string{"tls", "protocol", "bad-request", "too-large", "begin-again", "not-proven", "denied", "queue-full", "busy", "fault", "not-found", "not-allowed"}
