package peer

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/netip"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Protocol is the version spoken here.
const Protocol = 1

// service answers calls. Those other than Hello run only for admitted nodes.
type service struct{ p *Peer }

// errRefused is turned into the one refusal by serveHello.
var errRefused = connect.NewError(connect.CodePermissionDenied, errors.New("refused"))

// fault hides an error of ours from a peer and logs it.
func (s service) fault(ctx context.Context, call string, err error) error {
	node, _ := linkOf(ctx).greeted()
	s.p.cfg.Log.Warn("call failed", slog.String(keyCall, call), slog.String(keyNode, string(node)), slog.Any(keyError, err))
	return connect.NewError(connect.CodeUnavailable, errors.New("this node has a problem of its own"))
}

// bad says what is wrong with a message, to an admitted node.
func bad(err error) error { return connect.NewError(connect.CodeInvalidArgument, err) }

// Hello implements the RPC. Nothing is signed, and so no TPM is used, before
// the caller is known to be admitted.
func (s service) Hello(ctx context.Context, m *peerv1.HelloRequest) (*peerv1.HelloResponse, error) {
	p, l := s.p, linkOf(ctx)
	refused := func(why string) (*peerv1.HelloResponse, error) {
		p.cfg.Log.Debug("hello refused", slog.String(keySource, l.source.String()), slog.String(keyWhy, why))
		return nil, errRefused
	}
	now := p.cfg.Now()
	if m.GetProtocol() != Protocol || m.GetPort() > math.MaxUint16 {
		return refused("protocol")
	}
	_, standing := p.cfg.Papers.Standing(l.key)
	if !p.gate.hello(now, l.key, standing == papers.Admitted) {
		return refused("too many hellos")
	}
	charter, admission, record := m.GetCharter().GetEnvelope(), m.GetAdmission().GetEnvelope(), m.GetClusterRecord().GetEnvelope()
	if standing != papers.Admitted {
		// A signature is looked at only if it would help this very key.
		if !names(admission, l.key) {
			return refused("the admission shown is not for this key")
		}
		if _, err := p.cfg.Papers.Learn(present(charter, admission)); err != nil {
			p.cfg.Log.Debug("documents of a stranger refused", slog.String(keySource, l.source.String()), slog.Any(keyError, err))
		}
	} else if learn := present(charter, admission, record); len(p.cfg.Papers.Missing(refsOf(learn))) > 0 {
		_, _ = p.cfg.Papers.Learn(learn) // it logs what it refuses
	}
	theirs, standing := p.cfg.Papers.Standing(l.key)
	if standing != papers.Admitted {
		return refused("not admitted")
	}
	if mine, s := p.cfg.Papers.Standing(p.key); s != papers.Admitted || mine.Node != p.cfg.Self {
		return refused("this node is not admitted itself")
	}
	der, err := x509.MarshalPKIXPublicKey(p.cfg.Signer.Public())
	if err != nil {
		return refused(err.Error())
	}
	d := serverDigest(l.exporter, p.key, l.key)
	sig, err := p.cfg.Signer.Sign(rand.Reader, d[:], crypto.SHA256)
	if err != nil {
		p.cfg.Log.Warn("the TPM does not sign", slog.Any(keyError, err))
		return refused("the TPM does not sign")
	}
	if !p.gate.prove(l.place, theirs.Node) {
		return refused("the place was needed")
	}
	l.mu.Lock()
	l.node, l.helloAt = theirs.Node, now
	l.serves = netip.AddrPortFrom(l.source.Addr(), uint16(m.GetPort()))
	l.mu.Unlock()
	if len(record) > 0 {
		_, _ = p.cfg.Papers.Learn([][]byte{record})
	}
	p.cfg.Log.Debug("peer came", slog.String(keyNode, string(theirs.Node)), slog.String(keySource, l.source.String()))
	shown := p.cfg.Papers.Hello(p.cfg.Self, p.cluster())
	return &peerv1.HelloResponse{
		Protocol: Protocol, Charter: document(shown.Charter), Admission: document(shown.Admission), ClusterRecord: document(shown.Record),
		Now: timestamppb.New(now), Peers: addressesToProto(p.cfg.Node.Addresses()), Key: der, Proof: sig, Node: string(p.cfg.Self),
		YourAdmission: document(p.cfg.Papers.Hello(theirs.Node, "").Admission),
	}, nil
}

// cluster is the UID of the cluster that this node is in, "" for none.
func (p *Peer) cluster() string {
	if r := p.cfg.Node.Status().Record; r != nil {
		return r.UID
	}
	return ""
}

// names tells whether an envelope looks like an admission for key. Nothing of
// it is verified.
func names(envelope []byte, key papers.Ref) bool {
	e, err := statement.Parse(envelope)
	if err != nil || e.PayloadType != fleet.AdmissionPayload {
		return false
	}
	var a fleet.Admission
	return json.Unmarshal(e.Payload, &a) == nil && len(a.LDevIDKey) == len(key) && papers.Ref(a.LDevIDKey) == key
}

func present(envelopes ...[]byte) (out [][]byte) {
	for _, e := range envelopes {
		if len(e) > 0 {
			out = append(out, e)
		}
	}
	return out
}

func refsOf(envelopes [][]byte) (out []papers.Ref) {
	for _, e := range envelopes {
		if x, err := statement.Parse(e); err == nil {
			out = append(out, sha256.Sum256(x.Payload))
		}
	}
	return out
}

func document(envelope []byte) *peerv1.Document {
	if len(envelope) == 0 {
		return nil
	}
	return &peerv1.Document{Envelope: envelope}
}

// Bounds of one exchange of documents.
const (
	maxHeld      = 8192
	maxGiven     = 256
	maxGivenSize = 1 << 20
)

// Documents implements the RPC.
func (s service) Documents(ctx context.Context, m *peerv1.DocumentsRequest) (*peerv1.DocumentsResponse, error) {
	if len(m.GetHeld()) > maxHeld || len(m.GetDocuments()) > maxGiven {
		return nil, bad(errors.New("too many documents"))
	}
	held, err := refsFromProto(m.GetHeld())
	if err != nil {
		return nil, bad(err)
	}
	var given [][]byte
	for _, d := range m.GetDocuments() {
		given = append(given, d.GetEnvelope())
	}
	if len(given) > 0 {
		if _, err := s.p.cfg.Papers.Learn(given); err != nil && !onlyRefused(err) {
			return nil, s.fault(ctx, "documents", err)
		}
	}
	out := &peerv1.DocumentsResponse{Revision: s.p.cfg.Papers.Revision()}
	theirs := make(map[papers.Ref]bool, len(held))
	for _, r := range held {
		theirs[r] = true
	}
	var give []papers.Ref
	for _, r := range s.p.cfg.Papers.Refs() {
		if !theirs[r] {
			give = append(give, r)
		}
	}
	envelopes, more := some(s.p.cfg.Papers.Envelopes(give))
	out.More = more
	for _, e := range envelopes {
		out.Documents = append(out.Documents, document(e))
	}
	wanted := s.p.cfg.Papers.Missing(held)
	out.Wanted = refsToProto(wanted[:min(len(wanted), maxGiven)])
	return out, nil
}

// some takes as many envelopes as one message may carry.
func some(envelopes [][]byte) (out [][]byte, more bool) {
	size := 0
	for _, e := range envelopes {
		if len(out) == maxGiven || size+len(e) > maxGivenSize {
			return out, true
		}
		size += len(e)
		out = append(out, e)
	}
	return out, false
}

// onlyRefused tells whether an error of Learn is about documents and not about
// the disk.
func onlyRefused(err error) bool {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		var r *papers.Refused
		return errors.As(err, &r)
	}
	for _, e := range joined.Unwrap() {
		if !onlyRefused(e) {
			return false
		}
	}
	return true
}

// Status implements the RPC.
func (s service) Status(ctx context.Context, m *peerv1.StatusRequest) (*peerv1.StatusResponse, error) {
	l := linkOf(ctx)
	node, serves := l.greeted()
	st, err := statusFromProto(m.GetStatus())
	if err != nil {
		return nil, bad(err)
	}
	if st.Node != node {
		return nil, bad(errors.New("the status is of another node"))
	}
	s.p.hear(node, serves, l.helloAt, st)
	if at, err := addressesFromProto(m.GetPeers()); err != nil {
		return nil, bad(err)
	} else if len(at) > 0 {
		s.p.cfg.Node.Hinted(node, at)
	}
	return &peerv1.StatusResponse{
		Status: statusToProto(s.p.cfg.Node.Status()), Peers: addressesToProto(s.p.cfg.Node.Addresses()),
		Now: timestamppb.New(s.p.cfg.Now()), Revision: s.p.cfg.Papers.Revision(),
	}, nil
}

// hear passes a status on, unless there is a newer one.
func (p *Peer) hear(from fleet.NodeID, at netip.AddrPort, hello time.Time, st clusterbootstrap.Status) {
	if p.heard.take(p.cfg.Now(), hello, st) {
		p.cfg.Node.Heard(from, at, st)
	}
}

// JoinMaterial implements the RPC.
func (s service) JoinMaterial(ctx context.Context, m *peerv1.JoinMaterialRequest) (*peerv1.JoinMaterialResponse, error) {
	l := linkOf(ctx)
	node, _ := l.greeted()
	as, err := roleFromProto(m.GetAs())
	if err != nil {
		return nil, bad(err)
	}
	if len(m.GetPlan()) > maxID {
		return nil, bad(errors.New("plan is too long"))
	}
	age := s.p.proofAge(l)
	obs, pol := s.p.cfg.Node.Observation()
	if ok, why := clusterbootstrap.AnswerMaterial(obs, pol, node, as, m.GetPlan(), age); !ok {
		s.p.cfg.Log.Info("join material denied", slog.String(keyNode, string(node)), slog.String(keyWhy, why))
		return &peerv1.JoinMaterialResponse{Denied: sentence(why)}, nil
	}
	material, err := s.p.cfg.Node.Material(ctx, node, as, m.GetPlan())
	if err != nil {
		return nil, s.fault(ctx, "join material", err)
	}
	defer material.Wipe()
	out, err := materialToProto(material)
	if err != nil {
		return nil, s.fault(ctx, "join material", err)
	}
	l.mu.Lock()
	l.secrets = append(l.secrets, out.Token, out.AgentToken)
	l.mu.Unlock()
	s.p.cfg.Log.Info("join material given", slog.String(keyNode, string(node)), slog.String(keyCall, as.String()))
	return out, nil
}

// Lease implements the RPC. The grant is noted, then looked at once more: so a
// reset that begins at the same moment either is seen here or sees the note.
func (s service) Lease(ctx context.Context, m *peerv1.LeaseRequest) (*peerv1.LeaseResponse, error) {
	l := linkOf(ctx)
	node, _ := l.greeted()
	if len(m.GetPlan()) > maxID {
		return nil, bad(errors.New("plan is too long"))
	}
	if age := s.p.proofAge(l); age < 0 || age > clusterbootstrap.MaxQuoteAge {
		return &peerv1.LeaseResponse{Denied: "no fresh proof of what the node runs"}, nil
	}
	answer := func() (time.Duration, string) {
		obs, pol := s.p.cfg.Node.Observation()
		return clusterbootstrap.AnswerLease(obs, pol, node, m.GetPlan())
	}
	d, why := answer()
	if d > 0 {
		s.p.cfg.Node.NoteGrant(node)
		d, why = answer()
	}
	if d <= 0 {
		s.p.cfg.Log.Info("lease denied", slog.String(keyNode, string(node)), slog.String(keyWhy, why))
		return &peerv1.LeaseResponse{Denied: sentence(why)}, nil
	}
	return &peerv1.LeaseResponse{Milliseconds: uint32(min(d.Milliseconds(), math.MaxInt32))}, nil
}

func sentence(why string) string {
	if why == "" {
		return "no"
	}
	return why
}
