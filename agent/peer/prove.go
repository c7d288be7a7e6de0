package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// maxEventLog is the largest event log, as in enrollment.
const maxEventLog = 1 << 20

// challenge is what the next Attest of a connection must answer. It is good
// once.
type challenge struct {
	nonce  [32]byte
	issued time.Time
	ek, ak pki.Key
	// secret is what the credential holds; nil if none was made.
	secret []byte
}

// proof is a good Attest.
type proof struct {
	// issued is when its challenge was made: the quote is younger.
	issued time.Time
	// charter is the one whose images it was judged by.
	charter *fleet.Charter
}

// proofAge is the age of the connection's proof: the greatest that the quote
// may have. Negative: there is none that counts now.
func (p *Peer) proofAge(l *link) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.proof == nil || l.proof.charter != p.cfg.Papers.Documents().Charter {
		return -1
	}
	return max(0, p.cfg.Now().Sub(l.proof.issued))
}

// challengeTo makes a challenge for who shows these keys. The node ID is the
// hash of the EK, so that the Admission names the one EK that counts; the
// credential is made for it and the AK's name, and opened by the TPM only that
// holds both.
func (p *Peer) challengeTo(node fleet.NodeID, ekPublic, akPublic []byte) (*challenge, *peerv1.ChallengeResponse, error) {
	ek, err := tpm.ParsePublic(ekPublic)
	if err != nil {
		return nil, nil, err
	}
	hash, err := fleet.HashEK(ek.Public)
	if err != nil {
		return nil, nil, err
	}
	if hash.NodeID() != node {
		return nil, nil, errors.New("the endorsement key is of another node")
	}
	ak, err := tpm.ParsePublic(akPublic)
	if err != nil {
		return nil, nil, err
	}
	c := &challenge{issued: p.cfg.Now(), ek: ek, ak: ak}
	if _, err := rand.Read(c.nonce[:]); err != nil {
		return nil, nil, err
	}
	out := &peerv1.ChallengeResponse{Nonce: c.nonce[:]}
	if !p.knows(node, ak) {
		c.secret = make([]byte, tpm.MaxSecret)
		if _, err := rand.Read(c.secret); err != nil {
			return nil, nil, err
		}
		if out.CredentialBlob, out.EncryptedSecret, err = tpm.MakeCredential(rand.Reader, ek, ak.Name, c.secret); err != nil {
			return nil, nil, err
		}
	}
	return c, out, nil
}

// knows tells whether this AK has proved to be beside the node's EK.
func (p *Peer) knows(node fleet.NodeID, ak pki.Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.beside[node] == string(ak.Name)
}

func (p *Peer) learnBeside(node fleet.NodeID, ak pki.Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.beside[node] = string(ak.Name)
}

// Challenge implements the RPC.
func (s service) Challenge(ctx context.Context, m *peerv1.ChallengeRequest) (*peerv1.ChallengeResponse, error) {
	l := linkOf(ctx)
	node, _ := l.greeted()
	c, out, err := s.p.challengeTo(node, m.GetEkPublic(), m.GetAkPublic())
	if err != nil {
		return nil, bad(err)
	}
	l.mu.Lock()
	l.challenge = c
	l.mu.Unlock()
	return out, nil
}

// Attest implements the RPC.
func (s service) Attest(ctx context.Context, m *peerv1.AttestRequest) (*peerv1.AttestResponse, error) {
	p, l := s.p, linkOf(ctx)
	node, _ := l.greeted()
	select {
	case p.attests <- struct{}{}:
		defer func() { <-p.attests }()
	case <-ctx.Done():
		return nil, connect.NewError(connect.CodeCanceled, ctx.Err())
	}
	l.mu.Lock()
	c := l.challenge
	l.challenge, l.proof = nil, nil
	l.mu.Unlock()
	charter := p.cfg.Papers.Documents().Charter
	verdict, err := p.judge(prover{node: node, exporter: l.exporter, key: l.key, public: l.public}, c, charter, m)
	if err != nil {
		p.cfg.Log.Warn("a node's proof was not taken", slog.String(keyNode, string(node)), slog.String(keySource, l.source.String()), slog.Any(keyError, err))
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	p.cfg.Log.Debug("node proved what it runs", slog.String(keyNode, string(node)), slog.String(keyBoot, verdict.Boot.String()), slog.String(keyImage, verdict.Image))
	p.learnBeside(node, c.ak)
	l.mu.Lock()
	l.proof = &proof{issued: c.issued, charter: charter}
	l.mu.Unlock()
	left := clusterbootstrap.MaxQuoteAge - p.cfg.Now().Sub(c.issued)
	return &peerv1.AttestResponse{Boot: verdict.Boot.String(), Image: verdict.Image, Milliseconds: uint32(max(0, left.Milliseconds()))}, nil
}

// prover is the other end of a connection that proves what it runs.
type prover struct {
	node     fleet.NodeID
	exporter [exporterLength]byte
	key      papers.Ref
	public   *ecdsa.PublicKey
}

// Keys implements the RPC.
func (s service) Keys(ctx context.Context, _ *peerv1.KeysRequest) (*peerv1.KeysResponse, error) {
	id, err := s.p.identity(ctx)
	if err != nil {
		return nil, s.fault(ctx, "keys", err)
	}
	return &peerv1.KeysResponse{EkPublic: id.EKs[0].Public, AkPublic: id.AKPublic}, nil
}

// Prove implements the RPC. It takes the TPM a second or two, so that a node
// may ask now and then only.
func (s service) Prove(ctx context.Context, m *peerv1.ProveRequest) (*peerv1.ProveResponse, error) {
	p, l := s.p, linkOf(ctx)
	if !p.gate.prover(p.cfg.Now(), l.key) {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("this node has proved itself often enough; later"))
	}
	id, err := p.identity(ctx)
	if err != nil {
		return nil, s.fault(ctx, "prove", err)
	}
	proof, err := p.attest(id, l.exporter, l.key, m.GetChallenge())
	if err != nil {
		return nil, s.fault(ctx, "prove", err)
	}
	return &peerv1.ProveResponse{Proof: proof}, nil
}

// judge verifies an answer to c with the rules of enrollment (pki.Verify) and
// the images of the charter. There is no EK certificate here: the Admission
// stands for what the centre thought of it.
func (p *Peer) judge(by prover, c *challenge, charter *fleet.Charter, m *peerv1.AttestRequest) (pki.Verdict, error) {
	var none pki.Verdict
	switch {
	case c == nil:
		return none, errors.New("there was no challenge on this connection, or it was used")
	case p.cfg.Now().Sub(c.issued) > clusterbootstrap.MaxQuoteAge:
		return none, errors.New("the challenge is too old")
	case charter == nil:
		return none, errors.New("this node has no charter to judge by")
	case len(m.GetEventLog()) > maxEventLog:
		return none, errors.New("the event log is too long")
	}
	ldevid, err := tpm.ParsePublic(m.GetLdevidPublic())
	if err != nil {
		return none, err
	}
	transcript := quoteFields{Nonce: c.nonce[:], Exporter: by.exporter, EK: c.ek.Raw, AK: c.ak.Raw, LDevID: ldevid.Raw,
		Prover: by.key, Verifier: p.key}.transcript()
	if c.secret != nil && !hmac.Equal(m.GetActivation(), activation(c.secret, transcript)) {
		return none, errors.New("the credential was not activated: the attestation key is not in the TPM of this node")
	}
	// CSRKey is the key of this connection: the certified LDevID must be it.
	ev := pki.Evidence{Transcript: transcript, EKs: []pki.EndorsementKey{{Key: c.ek}}, AK: c.ak, LDevID: ldevid, CSRKey: by.public, PCRs: map[int][]byte{}}
	if len(m.GetPcrs()) > len(pki.QuotePCRs) {
		return none, errors.New("too many PCR values")
	}
	for _, v := range m.GetPcrs() {
		ev.PCRs[int(v.GetIndex())] = v.GetSha256()
	}
	if ev.Certify, err = tpm.ParseCertify(m.GetCertifyAttest(), m.GetCertifySignature()); err != nil {
		return none, err
	}
	if ev.Quote, err = tpm.ParseQuote(m.GetQuoteAttest(), m.GetQuoteSignature()); err != nil {
		return none, err
	}
	if len(m.GetEventLog()) > 0 {
		ev.Log, ev.LogError = parseEventLog(m.GetEventLog())
	}
	verdict, err := pki.Verify(ev, pki.Policy{Now: p.cfg.Now(), Images: imagesOf(charter)})
	if err != nil {
		return none, err
	}
	if verdict.EK.NodeID() != by.node {
		return none, errors.New("the endorsement key is of another node")
	}
	if verdict.Boot < fleet.BootMeasured && !(charter.AnyBoot && charter.Lab) {
		return none, fmt.Errorf("what the node runs is none of the charter's images: %s", whyNotMeasured(verdict))
	}
	return verdict, nil
}

// whyNotMeasured is the verifier's sentence.
func whyNotMeasured(v pki.Verdict) string {
	for _, f := range v.Findings {
		if f.Check == "boot-measured" && !f.OK {
			return f.Detail
		}
	}
	return "unknown"
}

// imagesOf are the charter's images as the verifier wants them.
func imagesOf(c *fleet.Charter) []fleet.Image {
	out := make([]fleet.Image, len(c.Images))
	for i, e := range c.Images {
		out[i] = fleet.Image{Name: e.Name, Version: e.Version, Authenticode: e.Authenticode, Kernel: e.Kernel, Loader: e.Loader, PCR11: e.PCR11, SignerCert: e.SignerCert}
	}
	return out
}

// activation shows that who knows the transcript opened the credential.
func activation(secret []byte, transcript [32]byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write(transcript[:])
	return h.Sum(nil)
}

// identity is what this node's TPM shows.
func (p *Peer) identity(ctx context.Context) (device.Identity, error) {
	id, err := p.cfg.TPM.Identity(ctx)
	if err != nil {
		return id, fmt.Errorf("peer: identity of the TPM: %w", err)
	}
	if len(id.EKs) == 0 {
		return id, errors.New("peer: the TPM has no endorsement key")
	}
	return id, nil
}

// attest answers a challenge of verifier with this node's TPM.
func (p *Peer) attest(id device.Identity, exporter [exporterLength]byte, verifier papers.Ref, c *peerv1.ChallengeResponse) (*peerv1.AttestRequest, error) {
	if len(c.GetNonce()) != 32 {
		return nil, errors.New("peer: the challenge has no nonce")
	}
	transcript := quoteFields{Nonce: c.GetNonce(), Exporter: exporter, EK: id.EKs[0].Public, AK: id.AKPublic, LDevID: id.LDevIDPublic,
		Prover: p.key, Verifier: verifier}.transcript()
	var err error
	m := &peerv1.AttestRequest{LdevidPublic: id.LDevIDPublic}
	if len(c.GetCredentialBlob()) > 0 {
		secret, err := p.cfg.TPM.ActivateCredential(c.GetCredentialBlob(), c.GetEncryptedSecret())
		if err != nil {
			return nil, fmt.Errorf("peer: answer the challenge: %w", err)
		}
		m.Activation = activation(secret, transcript)
		clear(secret)
	}
	if m.CertifyAttest, m.CertifySignature, err = p.cfg.TPM.Certify(transcript); err != nil {
		return nil, fmt.Errorf("peer: certify: %w", err)
	}
	var values map[int][]byte
	if m.QuoteAttest, m.QuoteSignature, values, err = p.cfg.TPM.Quote(transcript, pki.QuotePCRs); err != nil {
		return nil, fmt.Errorf("peer: quote: %w", err)
	}
	for _, i := range pki.QuotePCRs {
		m.Pcrs = append(m.Pcrs, &peerv1.PcrValue{Index: uint32(i), Sha256: values[i]})
	}
	if p.cfg.EventLog != nil {
		b, err := p.cfg.EventLog()
		if err == nil && len(b) > maxEventLog {
			err = errors.New("peer: the event log is too long")
		}
		if err != nil {
			p.cfg.Log.Warn("no event log", slog.Any(keyError, err))
		} else {
			m.EventLog = b
		}
	}
	return m, nil
}
