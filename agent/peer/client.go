package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	"github.com/muster-edge/muster/api/peer/v1/peerv1connect"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

const (
	dialTime = 10 * time.Second
	// proveTime is for calls in which a TPM works, which may be slow.
	proveTime = 90 * time.Second
	// proveAhead: so much of a proof's life must be left for a call to lean on
	// it.
	proveAhead = 20 * time.Second
	maxAnswer  = 4 << 20
	// maxGreeting bounds what somebody unknown may answer to hello: four
	// envelopes and some.
	maxGreeting = 5 * papers.MaxEnvelope
	// maxRounds bounds one Exchange: more than the papers of two sites.
	maxRounds = 64
)

// Conn is one connection to a peer. Calls wait for each other; an Escrow call
// takes long, and should have a Conn of its own.
type Conn struct {
	p         *Peer
	conn      *tls.Conn
	exporter  [exporterLength]byte
	at        netip.AddrPort
	transport *http.Transport
	rpc       peerv1connect.PeerServiceClient
	greet     peerv1connect.PeerServiceClient // for Hello only

	mu      sync.Mutex
	node    fleet.NodeID
	serve   bool // the peer may be a server
	server  papers.Ref
	public  *ecdsa.PublicKey // of the server
	checked time.Time        // until when the server's proof counts
	by      *fleet.Charter   // whose images it was judged by
	helloAt time.Time
	seen    uint64    // the peer's revision at the last Exchange
	proven  time.Time // until when the peer takes our proof
}

// Dial opens a connection to a peer, addr is host:port. It proves this node's
// key; whose the other end is, Hello finds out.
func (p *Peer) Dial(ctx context.Context, addr string) (*Conn, error) {
	certificate, err := p.certificate()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime+p.cfg.Limits.Hello)
	defer cancel()
	raw, err := (&net.Dialer{Timeout: dialTime}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("peer: dial %s: %w", addr, err)
	}
	bounded := &capped{Conn: raw}
	bounded.left.Store(maxHandshake)
	conn := tls.Client(bounded, clientTLS(certificate))
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("peer: TLS with %s: %w", addr, err)
	}
	bounded.free.Store(true)
	c := &Conn{p: p, conn: conn, at: addrOf(raw.RemoteAddr())}
	if c.exporter, err = exporterOf(conn); err != nil {
		_ = conn.Close()
		return nil, err
	}
	// All that is said is about this one connection.
	var once sync.Once
	c.transport = &http.Transport{
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			err := ErrClosed
			once.Do(func() { err = nil })
			if err != nil {
				return nil, err
			}
			return conn, nil
		},
		MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, MaxResponseHeaderBytes: 8 << 10, DisableCompression: true,
	}
	client := &http.Client{Transport: c.transport, CheckRedirect: func(*http.Request, []*http.Request) error { return ErrStranger }}
	with := func(most int) peerv1connect.PeerServiceClient {
		return peerv1connect.NewPeerServiceClient(client, "https://peer",
			connect.WithReadMaxBytes(most), connect.WithAcceptCompression("gzip", nil, nil))
	}
	c.rpc, c.greet = with(maxAnswer), with(maxGreeting)
	return c, nil
}

// Close ends the connection.
func (c *Conn) Close() error {
	c.transport.CloseIdleConnections()
	return c.conn.Close()
}

// Peer is the other end once Hello has succeeded, "" before.
func (c *Conn) Peer() fleet.NodeID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.node
}

// failed turns an error of a call into one of the package's.
func failed(call string, err error) error {
	var kind error
	switch code := connect.CodeOf(err); {
	case !connect.IsWireError(err):
		// The peer did not say it: the connection broke, or our own limit.
		if errors.Is(err, ErrClosed) || isNetwork(err) {
			kind = ErrClosed
		}
	case code == connect.CodePermissionDenied:
		kind = ErrRefused
	case code == connect.CodeResourceExhausted:
		kind = ErrBusy
	case code == connect.CodeNotFound:
		kind = ErrNotKept
	case code == connect.CodeFailedPrecondition:
		kind = ErrUnproven
	}
	if kind != nil && !errors.Is(err, kind) {
		return fmt.Errorf("peer: %s: %w: %w", call, kind, err)
	}
	return fmt.Errorf("peer: %s: %w", call, err)
}

func isNetwork(err error) bool {
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed)
}

// Hello must be the first call. It shows this node's papers, learns the
// peer's, and checks that the peer is an admitted node.
func (c *Conn) Hello(ctx context.Context) (Greeting, error) {
	g, err := c.hello(ctx)
	if err != nil {
		_ = c.Close()
	}
	return g, err
}

func (c *Conn) hello(ctx context.Context) (Greeting, error) {
	p := c.p
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Limits.Hello)
	defer cancel()
	begun := p.cfg.Now()
	shown := p.cfg.Papers.Hello(p.cfg.Self, p.cluster())
	request := &peerv1.HelloRequest{Protocol: Protocol, Charter: document(shown.Charter), Admission: document(shown.Admission),
		ClusterRecord: document(shown.Record), Now: timestamppb.New(begun), Port: uint32(p.cfg.Limits.Port)}
	if len(shown.Charter)+len(shown.Admission)+len(shown.Record) > maxHelloBody-4<<10 {
		request.Charter = nil // Documents has room for it
	}
	m, err := c.greet.Hello(ctx, request)
	if err != nil {
		return Greeting{}, failed("hello", err)
	}
	// The key first: it costs nothing to believe it, and without it nothing
	// else is worth a look.
	public, err := x509.ParsePKIXPublicKey(m.GetKey())
	key, ok := public.(*ecdsa.PublicKey)
	if err != nil || !ok {
		return Greeting{}, fmt.Errorf("%w: it shows no key", ErrStranger)
	}
	server, err := papers.KeyRef(key)
	if err != nil {
		return Greeting{}, fmt.Errorf("%w: %w", ErrStranger, err)
	}
	if server == p.key {
		return Greeting{}, ErrSelf
	}
	d := serverDigest(c.exporter, server, p.key)
	if !ecdsa.VerifyASN1(key, d[:], m.GetProof()) {
		return Greeting{}, fmt.Errorf("%w: its key did not sign this connection", ErrStranger)
	}
	learned, err := p.cfg.Papers.Learn(present(m.GetCharter().GetEnvelope(), m.GetAdmission().GetEnvelope(),
		m.GetYourAdmission().GetEnvelope(), m.GetClusterRecord().GetEnvelope()))
	if err != nil && !onlyRefused(err) {
		return Greeting{}, err
	}
	admission, standing := p.cfg.Papers.Standing(server)
	switch {
	case standing == papers.Removed:
		return Greeting{}, ErrRemoved
	case standing != papers.Admitted || string(admission.Node) != m.GetNode():
		return Greeting{}, ErrStranger
	}
	g := Greeting{Node: admission.Node, Admission: admission, At: c.at, Learned: learned}
	if m.GetNow().IsValid() {
		g.Time = m.GetNow().AsTime()
	}
	c.mu.Lock()
	c.node, c.serve, c.server, c.public, c.helloAt = admission.Node, admission.MayServe, server, key, p.cfg.Now()
	c.mu.Unlock()
	if at, err := addressesFromProto(m.GetPeers()); err == nil && len(at) > 0 {
		p.cfg.Node.Hinted(admission.Node, at)
	}
	return g, nil
}

// ready checks that hello was said and that the peer is still admitted.
func (c *Conn) ready() error {
	c.mu.Lock()
	node, server := c.node, c.server
	c.mu.Unlock()
	if node == "" {
		return errors.New("peer: Hello comes first")
	}
	if a, s := c.p.cfg.Papers.Standing(server); s != papers.Admitted || a.Node != node {
		_ = c.Close()
		return ErrRemoved
	}
	return nil
}

// Exchange passes documents on, both ways, until neither side lacks any that
// it would take, and returns how many were new here.
func (c *Conn) Exchange(ctx context.Context) (learned int, err error) {
	if err := c.ready(); err != nil {
		return 0, err
	}
	given, refused := map[papers.Ref]bool{}, map[papers.Ref]bool{}
	var give [][]byte
	for range maxRounds {
		held := c.p.cfg.Papers.Refs()
		for r := range refused {
			held = append(held, r)
		}
		if len(held) > maxHeld {
			held = held[:maxHeld]
		}
		request := &peerv1.DocumentsRequest{Held: refsToProto(held)}
		for _, e := range give {
			request.Documents = append(request.Documents, document(e))
		}
		m, err := c.documents(ctx, request)
		if err != nil {
			return learned, err
		}
		var got [][]byte
		for _, d := range m.GetDocuments() {
			got = append(got, d.GetEnvelope())
		}
		if len(got) > 0 {
			n, err := c.p.cfg.Papers.Learn(got)
			if err != nil && !onlyRefused(err) {
				return learned, err
			}
			learned += n
			for _, r := range c.p.cfg.Papers.Missing(refsOf(got)) {
				refused[r] = true // or made old by another one of them
			}
		}
		c.mu.Lock()
		c.seen = m.GetRevision()
		c.mu.Unlock()
		wanted, err := refsFromProto(m.GetWanted())
		if err != nil {
			return learned, err
		}
		var news []papers.Ref
		for _, r := range wanted {
			if !given[r] {
				news = append(news, r)
			}
		}
		give, _ = some(c.p.cfg.Papers.Envelopes(news))
		for _, r := range refsOf(give) {
			given[r] = true
		}
		if len(give) == 0 && !(m.GetMore() && len(got) > 0) {
			return learned, nil
		}
	}
	return learned, nil
}

func (c *Conn) documents(ctx context.Context, m *peerv1.DocumentsRequest) (*peerv1.DocumentsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	out, err := c.rpc.Documents(ctx, m)
	if err != nil {
		return nil, failed("exchange documents", err)
	}
	if len(out.GetDocuments()) > maxGiven || len(out.GetWanted()) > maxGiven {
		return nil, errors.New("peer: exchange documents: the answer is too large")
	}
	return out, nil
}

// Status shows this node's status and hears the peer's, which goes to
// Node.Heard as well. Changed tells that the peer's documents differ from what
// they were at the last Exchange.
func (c *Conn) Status(ctx context.Context) (s clusterbootstrap.Status, changed bool, err error) {
	if err := c.ready(); err != nil {
		return s, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	m, err := c.rpc.Status(ctx, &peerv1.StatusRequest{Status: statusToProto(c.p.cfg.Node.Status()), Peers: addressesToProto(c.p.cfg.Node.Addresses())})
	if err != nil {
		return s, false, failed("status", err)
	}
	if s, err = statusFromProto(m.GetStatus()); err != nil {
		return s, false, err
	}
	c.mu.Lock()
	node, hello, seen := c.node, c.helloAt, c.seen
	c.mu.Unlock()
	if s.Node != node {
		return s, false, errors.New("peer: status: it is of another node")
	}
	c.p.hear(node, c.at, hello, s)
	if at, err := addressesFromProto(m.GetPeers()); err == nil && len(at) > 0 {
		c.p.cfg.Node.Hinted(node, at)
	}
	return s, m.GetRevision() != seen, nil
}

// Prove makes sure that the peer has a fresh proof of what this node runs.
// JoinMaterial and Lease do it by themselves; it costs the TPM a second or two.
func (c *Conn) Prove(ctx context.Context) error {
	if err := c.ready(); err != nil {
		return err
	}
	c.mu.Lock()
	fresh, server := c.p.cfg.Now().Add(proveAhead).Before(c.proven), c.server
	c.mu.Unlock()
	if fresh {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, proveTime)
	defer cancel()
	id, err := c.p.identity(ctx)
	if err != nil {
		return err
	}
	challenge, err := c.rpc.Challenge(ctx, &peerv1.ChallengeRequest{EkPublic: id.EKs[0].Public, AkPublic: id.AKPublic})
	if err != nil {
		return failed("challenge", err)
	}
	m, err := c.p.attest(id, c.exporter, server, challenge)
	if err != nil {
		return err
	}
	sent := c.p.cfg.Now()
	out, err := c.rpc.Attest(ctx, m)
	if err != nil {
		return failed("attest", err)
	}
	c.mu.Lock()
	c.proven = sent.Add(time.Duration(out.GetMilliseconds()) * time.Millisecond)
	c.mu.Unlock()
	return nil
}

// again proves once more if the peer does not know our proof any more: it may
// have a new charter.
func (c *Conn) again(ctx context.Context, denied string) (bool, error) {
	if denied != noProof {
		return false, nil
	}
	c.mu.Lock()
	c.proven = time.Time{}
	c.mu.Unlock()
	return true, c.Prove(ctx)
}

// noProof is how package clusterbootstrap says that a proof is missing.
const noProof = "no fresh proof of what the node runs"

// check makes the server prove what it runs: whoever runs another system on an
// admitted machine must not lead nodes into a cluster of his own.
func (c *Conn) check(ctx context.Context) error {
	p := c.p
	charter := p.cfg.Papers.Documents().Charter
	c.mu.Lock()
	by := prover{node: c.node, exporter: c.exporter, key: c.server, public: c.public}
	fresh := p.cfg.Now().Before(c.checked) && c.by == charter
	c.mu.Unlock()
	if fresh {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, proveTime)
	defer cancel()
	keys, err := c.rpc.Keys(ctx, &peerv1.KeysRequest{})
	if err != nil {
		return failed("keys", err)
	}
	challenge, message, err := p.challengeTo(by.node, keys.GetEkPublic(), keys.GetAkPublic())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrServerUnproven, err)
	}
	m, err := c.rpc.Prove(ctx, &peerv1.ProveRequest{Challenge: message})
	if err != nil {
		return failed("prove", err)
	}
	verdict, err := p.judge(by, challenge, charter, m.GetProof())
	if err != nil {
		p.cfg.Log.Warn("a server's proof was not taken", slog.String(keyNode, string(by.node)), slog.String(keySource, c.at.String()), slog.Any(keyError, err))
		return fmt.Errorf("%w: %w", ErrServerUnproven, err)
	}
	p.cfg.Log.Debug("server proved what it runs", slog.String(keyNode, string(by.node)), slog.String(keyBoot, verdict.Boot.String()), slog.String(keyImage, verdict.Image))
	p.learnBeside(by.node, challenge.ak)
	c.mu.Lock()
	c.checked, c.by = challenge.issued.Add(clusterbootstrap.MaxQuoteAge), charter
	c.mu.Unlock()
	return nil
}

// JoinMaterial lets both ends prove what they run and asks for what this node
// needs to join. The error is *Denied if the peer's planner says no.
func (c *Conn) JoinMaterial(ctx context.Context, as clusterbootstrap.Role, plan string) (Material, error) {
	joinAs, err := roleToProto(as)
	if err != nil {
		return Material{}, err
	}
	if err := c.fromServer(ctx); err != nil {
		return Material{}, err
	}
	if err := c.check(ctx); err != nil {
		return Material{}, err
	}
	var m *peerv1.JoinMaterialResponse
	for try := 0; ; try++ {
		cctx, cancel := context.WithTimeout(ctx, callTime)
		m, err = c.rpc.JoinMaterial(cctx, &peerv1.JoinMaterialRequest{As: joinAs, Plan: plan})
		cancel()
		if err != nil {
			return Material{}, failed("join material", err)
		}
		if again, err := c.again(ctx, m.GetDenied()); err != nil {
			return Material{}, err
		} else if !again || try > 0 {
			break
		}
	}
	if m.GetDenied() != "" {
		return Material{}, &Denied{Why: cleanWhy(m.GetDenied())}
	}
	return materialFromProto(m, as, plan)
}

// Lease asks for a lease under plan and returns its length, to be counted from
// the moment this was called.
func (c *Conn) Lease(ctx context.Context, plan string) (time.Duration, error) {
	begun := c.p.cfg.Now()
	if err := c.fromServer(ctx); err != nil {
		return 0, err
	}
	for try := 0; ; try++ {
		sent := c.p.cfg.Now()
		cctx, cancel := context.WithTimeout(ctx, callTime)
		m, err := c.rpc.Lease(cctx, &peerv1.LeaseRequest{Plan: plan})
		cancel()
		if err != nil {
			return 0, failed("lease", err)
		}
		if again, err := c.again(ctx, m.GetDenied()); err != nil {
			return 0, err
		} else if again && try == 0 {
			continue
		}
		if m.GetDenied() != "" {
			return 0, &Denied{Why: cleanWhy(m.GetDenied())}
		}
		// Counted from the sending; what was spent on proving before is added,
		// since the caller counts from the call.
		return time.Duration(m.GetMilliseconds())*time.Millisecond + sent.Sub(begun), nil
	}
}

// fromServer checks that the peer may be a server, and proves this node.
func (c *Conn) fromServer(ctx context.Context) error {
	if err := c.ready(); err != nil {
		return err
	}
	c.mu.Lock()
	serve := c.serve
	c.mu.Unlock()
	if !serve {
		return ErrNotServer
	}
	return c.Prove(ctx)
}

// KeepEscrow hands b over to be kept; data has b.Size bytes. When it returns
// nil, the blob is on the peer's disk.
func (c *Conn) KeepEscrow(ctx context.Context, b Blob, data io.Reader) error {
	if err := c.ready(); err != nil {
		return err
	}
	defer c.rest()
	stream, err := c.rpc.KeepEscrow(ctx)
	if err != nil {
		return failed("keep escrow", err)
	}
	next := &peerv1.KeepEscrowRequest{Header: blobToProto(b)}
	for chunk := make([]byte, maxChunk); ; {
		c.extend()
		if err := stream.Send(next); errors.Is(err, io.EOF) {
			break // the answer says why
		} else if err != nil {
			return failed("keep escrow", err)
		}
		n, err := io.ReadFull(data, chunk)
		if n > 0 {
			next = &peerv1.KeepEscrowRequest{Data: chunk[:n]}
			continue
		}
		if errors.Is(err, io.EOF) {
			break
		}
		_, _ = stream.CloseAndReceive() // without all of it the peer keeps nothing
		return fmt.Errorf("peer: keep escrow: read blob: %w", err)
	}
	c.extend()
	if _, err := stream.CloseAndReceive(); err != nil {
		return failed("keep escrow", err)
	}
	return nil
}

// extend gives a call that takes long its next step's time.
func (c *Conn) extend() { _ = c.conn.SetDeadline(time.Now().Add(2 * callTime)) }

// rest takes the deadline away.
func (c *Conn) rest() { _ = c.conn.SetDeadline(time.Time{}) }

// GetEscrow writes a blob to w and checks its digest. If it returns an error,
// what was written is worth nothing.
func (c *Conn) GetEscrow(ctx context.Context, ref papers.Ref, w io.Writer) (int64, error) {
	if err := c.ready(); err != nil {
		return 0, err
	}
	defer c.rest()
	c.extend()
	stream, err := c.rpc.GetEscrow(ctx, &peerv1.GetEscrowRequest{Sha256: ref[:]})
	if err != nil {
		return 0, failed("get escrow", err)
	}
	h := sha256.New()
	var size int64
	for stream.Receive() {
		c.extend()
		data := stream.Msg().GetData()
		if size += int64(len(data)); size > c.p.cfg.Limits.EscrowSize {
			_ = stream.Close()
			return size, fmt.Errorf("peer: get escrow: %w: %w", ErrNotKept, errTooBig)
		}
		h.Write(data)
		if _, err := w.Write(data); err != nil {
			_ = stream.Close()
			return size, fmt.Errorf("peer: get escrow: write blob: %w", err)
		}
	}
	if err := errors.Join(stream.Err(), stream.Close()); err != nil {
		return size, failed("get escrow", err)
	}
	if papers.Ref(h.Sum(nil)) != ref {
		return size, fmt.Errorf("peer: get escrow: %w: %w", ErrNotKept, errCorrupt)
	}
	return size, nil
}

// ListEscrow lists what the peer keeps.
func (c *Conn) ListEscrow(ctx context.Context) ([]Blob, error) {
	if err := c.ready(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	m, err := c.rpc.ListEscrow(ctx, &peerv1.ListEscrowRequest{})
	if err != nil {
		return nil, failed("list escrow", err)
	}
	var out []Blob
	for _, x := range m.GetBlobs()[:min(len(m.GetBlobs()), maxBlobs)] {
		b, err := blobFromProto(x)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}
