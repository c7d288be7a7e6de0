package service

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
	"github.com/muster-edge/muster/pki/tpm"
)

// Caps of CompleteRequest.
const (
	maxCookie    = maxBeginBody + 1<<10
	maxStatement = 1 << 10
	maxPCRs      = 24
	maxEventLog  = 1 << 20
	maxCSR       = 8 << 10
	maxHardware  = 64 << 10
)

// Complete implements the RPC. The same evidence again files nothing new, so
// no cache of used challenges is needed, in one process or in many.
func (s *Service) Complete(ctx context.Context, m *musterv1.CompleteRequest) (_ *musterv1.CompleteResponse, err error) {
	defer func(start time.Time) { s.observe(CallComplete, start, err) }(time.Now())
	c := connectionOf(ctx)
	if !c.bound {
		return nil, fail(connect.CodeFailedPrecondition, "tls", "use TLS 1.3, straight to the centre")
	}
	if err := capComplete(m); err != nil {
		return nil, fail(connect.CodeInvalidArgument, "bad-request", err.Error())
	}
	now := s.cfg.Now()
	sealing, err := s.cfg.Keys(ctx, now)
	if err != nil {
		return nil, s.fault("complete", fmt.Errorf("sealing keys: %w", err))
	}
	k, err := openCookie(sealing, m.GetCookie(), now, c, s.cfg.Tenant)
	if err != nil {
		s.cfg.Log.Info("complete refused", slog.String(keySource, c.source.String()), slog.Any(keyError, err))
		return nil, beginAgain()
	}
	var out *musterv1.CompleteResponse
	err = s.completes.do(ctx, func() (err error) {
		out, err = s.complete(ctx, c, k, m, now)
		return err
	})
	return out, s.pooled("complete", err)
}

// capComplete checks counts and sizes before anything is opened or parsed.
func capComplete(m *musterv1.CompleteRequest) error {
	for _, f := range []struct {
		what string
		b    []byte
		most int
	}{
		{"cookie", m.GetCookie(), maxCookie}, {"proof", m.GetProof(), 32},
		{"certify_attest", m.GetCertifyAttest(), maxStatement}, {"certify_signature", m.GetCertifySignature(), maxStatement},
		{"quote_attest", m.GetQuoteAttest(), maxStatement}, {"quote_signature", m.GetQuoteSignature(), maxStatement},
		{"event_log", m.GetEventLog(), maxEventLog}, {"csr", m.GetCsr(), maxCSR}, {"hardware", m.GetHardware(), maxHardware},
	} {
		if len(f.b) > f.most {
			return fmt.Errorf("%s has %d bytes, at most %d", f.what, len(f.b), f.most)
		}
	}
	if n := len(m.GetPcrs()); n > maxPCRs {
		return fmt.Errorf("%d PCR values, at most %d", n, maxPCRs)
	}
	if n := len(m.GetClaim()); n > enroll.MaxClaim {
		return fmt.Errorf("claim has %d bytes, at most %d", n, enroll.MaxClaim)
	}
	return nil
}

// openCookie says in its error, which is for the log only, what is wrong.
func openCookie(keys []Key, sealed []byte, now time.Time, c connection, tenant string) (cookie, error) {
	plain, err := open(keys, cookieDomain, sealed)
	if err != nil {
		return cookie{}, err
	}
	k, err := decodeCookie(plain)
	switch {
	case err != nil:
		return cookie{}, err
	case !now.Before(k.expires):
		return cookie{}, errors.New("service: cookie: expired")
	case k.tenant != tenant:
		return cookie{}, errors.New("service: cookie: of another tenant")
	case subtle.ConstantTimeCompare(k.exporter[:], c.exporter[:]) != 1:
		return cookie{}, errors.New("service: cookie: of another connection")
	}
	return k, nil
}

// complete verifies and files. Whoever cannot show the activated secret is
// turned away before anything that he sent is parsed.
func (s *Service) complete(ctx context.Context, c connection, k cookie, m *musterv1.CompleteRequest, now time.Time) (*musterv1.CompleteResponse, error) {
	var begin musterv1.BeginRequest
	if err := proto.Unmarshal(k.begin, &begin); err != nil {
		return nil, fmt.Errorf("service: read begin: %w", err)
	}
	keys, err := parseKeys(&begin)
	if err != nil {
		return nil, err
	}
	transcript := enroll.Transcript(enroll.TranscriptFields{
		Nonce: k.nonce[:], EK: keys.ekDER, AK: keys.ak.Raw, LDevID: keys.ldevid.Raw,
		CSR: m.GetCsr(), Hardware: m.GetHardware(), Exporter: c.exporter[:],
		Claim: []byte(m.GetClaim()),
	})
	if !enroll.CheckProof(m.GetProof(), k.secret[:], transcript) {
		return nil, s.refuse(c, "proof", errors.New("the credential was not activated, or the transcript differs"))
	}
	p, err := s.judge(ctx, c, &begin, keys, m, transcript, now)
	if err != nil {
		return nil, err
	}
	p.filing.Begun, p.filing.Claim = k.begun, m.GetClaim()
	request, err := s.file(ctx, c, p)
	if err != nil {
		return nil, err
	}
	sealed, err := s.newTicket(ctx, request, p.key, now)
	if err != nil {
		return nil, err
	}
	s.cfg.Log.Info("machine proven", slog.String(keySource, c.source.String()), slog.String(keyRequest, string(request.ID)),
		slog.String(keyNode, string(request.Node)), slog.String(keyState, request.State.String()))
	return &musterv1.CompleteResponse{
		RequestId: string(request.ID), NodeId: string(request.Node), State: request.State.String(),
		Message: enroll.Message(request), Ticket: sealed, RetryAfterSeconds: 1,
	}, nil
}

// refuse turns a machine away whose proof does not hold: it is told no more
// than where our log says why.
func (s *Service) refuse(c connection, why string, err error) error {
	ref := reference()
	s.cfg.Log.Warn("machine not proven", slog.String(keySource, c.source.String()),
		slog.String(keyReference, ref), slog.String(keyWhy, why), slog.Any(keyError, err))
	return notProven(ref, checkOf(why, err))
}

// proved is a machine whose proof holds.
type proved struct {
	filing enroll.Filing
	// key is the PKIX DER of its LDevID key.
	key []byte
}

// judge verifies what a machine sent about a transcript, by the policy of
// this moment.
func (s *Service) judge(ctx context.Context, c connection, begin *musterv1.BeginRequest, keys tpmKeys, m *musterv1.CompleteRequest, transcript [32]byte, now time.Time) (*proved, error) {
	ev, err := evidenceOf(begin, keys, m)
	if err != nil {
		return nil, s.refuse(c, "parse", err)
	}
	ev.Transcript = transcript
	hw, err := parseHardware(m.GetHardware())
	if err != nil {
		return nil, s.refuse(c, "hardware", err)
	}
	policy, err := s.cfg.Policy(ctx, s.cfg.Tenant, now)
	if err != nil {
		return nil, fmt.Errorf("service: policy: %w", err)
	}
	verdict, err := pki.Verify(ev, policy)
	if err != nil {
		return nil, s.refuse(c, "verify", err)
	}
	evidence, err := enroll.NewEvidence(ev, verdict, hw)
	if err != nil {
		return nil, s.refuse(c, "evidence", err)
	}
	// The other EKs are claims, but who claims a denied one means no good.
	denied, err := s.cfg.Store.Denied(ctx, s.cfg.Tenant, append([]fleet.EKHash{evidence.EK}, evidence.Aliases...))
	if err != nil {
		return nil, fmt.Errorf("service: look for denial: %w", err)
	}
	if denied {
		return nil, s.denied(c, evidence.EK)
	}
	der, err := x509.MarshalPKIXPublicKey(ev.LDevID.Public)
	if err != nil {
		return nil, fmt.Errorf("service: LDevID: %w", err)
	}
	return &proved{key: der, filing: enroll.Filing{
		Tenant: s.cfg.Tenant, Evidence: evidence, Findings: cleanFindings(verdict.Findings), Warnings: cleanAll(verdict.Warnings),
		Source: c.source.String(), MaxUnverified: s.cfg.Limits.MaxUnverified,
		Clock: fleet.TPMClock{Millis: ev.Quote.Clock.Clock, Resets: ev.Quote.Clock.ResetCount, Restarts: ev.Quote.Clock.RestartCount},
	}}, nil
}

// file hands what is proved to the store.
func (s *Service) file(ctx context.Context, c connection, p *proved) (fleet.Request, error) {
	failpoint.Hit("enroll/complete/before-file")
	request, err := s.cfg.Store.File(ctx, p.filing)
	switch {
	case errors.Is(err, enroll.ErrDenied):
		return request, s.denied(c, p.filing.Evidence.EK)
	case errors.Is(err, enroll.ErrFull):
		e := fail(connect.CodeResourceExhausted, "queue-full", "too many machines like this one wait; ask your operator")
		e.Meta().Set("Retry-After", "300")
		return request, e
	case err != nil:
		return request, fmt.Errorf("service: file: %w", err)
	}
	failpoint.Hit("enroll/complete/after-file")
	return request, nil
}

// checkOf names the check of the verifier that refused, else why.
func checkOf(why string, err error) string {
	var r *pki.Refusal
	if errors.As(err, &r) {
		return r.Check
	}
	return why
}

func (s *Service) denied(c connection, ek fleet.EKHash) error {
	s.cfg.Log.Warn("denied machine", slog.String(keySource, c.source.String()), slog.String(keyNode, string(ek.NodeID())))
	e := fail(connect.CodePermissionDenied, "denied", "this machine is not wanted here; ask your operator")
	e.Meta().Set("Retry-After", "900")
	return e
}

func (s *Service) newTicket(ctx context.Context, r fleet.Request, key []byte, now time.Time) ([]byte, error) {
	keys, err := s.cfg.Keys(ctx, now)
	if err != nil {
		return nil, fmt.Errorf("service: sealing keys: %w", err)
	}
	plain, err := ticket{expires: now.Add(ticketLife), request: r.ID, tenant: r.Tenant, key: key}.encode()
	if err != nil {
		return nil, err
	}
	return seal(keys, ticketDomain, plain)
}

// evidenceOf parses what the machine sent. Only what binds is an error here:
// an unreadable certificate or event log lowers trust, the verifier says so.
func evidenceOf(begin *musterv1.BeginRequest, keys tpmKeys, m *musterv1.CompleteRequest) (pki.Evidence, error) {
	ev := pki.Evidence{AK: keys.ak, LDevID: keys.ldevid, PCRs: map[int][]byte{}}
	for i, ek := range begin.GetEks() {
		e := pki.EndorsementKey{Key: keys.eks[i]}
		if len(ek.GetCertificate()) > 0 {
			e.Certificate, e.CertificateError = ekcert.ParseCertificate(ek.GetCertificate())
		}
		for _, der := range ek.GetChain() {
			if c, err := ekcert.ParseIntermediate(der); err == nil {
				e.Intermediates = append(e.Intermediates, c)
			}
		}
		ev.EKs = append(ev.EKs, e)
	}
	for _, p := range m.GetPcrs() {
		if _, twice := ev.PCRs[int(p.GetIndex())]; twice || p.GetIndex() >= maxPCRs {
			return ev, fmt.Errorf("service: PCR %d twice or out of range", p.GetIndex())
		}
		ev.PCRs[int(p.GetIndex())] = p.GetSha256()
	}
	var err error
	if ev.Certify, err = tpm.ParseCertify(m.GetCertifyAttest(), m.GetCertifySignature()); err != nil {
		return ev, err
	}
	if ev.Quote, err = tpm.ParseQuote(m.GetQuoteAttest(), m.GetQuoteSignature()); err != nil {
		return ev, err
	}
	if len(m.GetEventLog()) > 0 {
		ev.Log, ev.LogError = ekcert.ParseEventLog(m.GetEventLog())
	}
	csr, err := x509.ParseCertificateRequest(m.GetCsr())
	if err != nil {
		return ev, fmt.Errorf("service: certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return ev, fmt.Errorf("service: certificate request: %w", err)
	}
	// Nothing of the request but its key is ever looked at.
	ev.CSRKey = csr.PublicKey
	return ev, nil
}

// parseHardware reads and cleans a machine's description of itself.
func parseHardware(b []byte) (fleet.Hardware, error) {
	var h fleet.Hardware
	if len(b) == 0 {
		return h, nil
	}
	if len(b) > maxHardware {
		return h, fmt.Errorf("service: hardware: %d bytes, at most %d", len(b), maxHardware)
	}
	// Unknown fields are ignored: an image may be newer than the centre.
	if err := json.Unmarshal(b, &h); err != nil {
		return fleet.Hardware{}, fmt.Errorf("service: hardware: %w", err)
	}
	return text.CleanHardware(h), nil
}

func cleanFindings(in []fleet.Finding) []fleet.Finding {
	out := make([]fleet.Finding, len(in))
	for i, f := range in {
		out[i] = fleet.Finding{Check: f.Check, OK: f.OK, Detail: text.Clean(f.Detail, maxSentence)}
	}
	return out
}

// maxSentence bounds findings and warnings, which may quote certificates.
const maxSentence = 512

func cleanAll(in []string) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = text.Clean(s, maxSentence)
	}
	return out
}
