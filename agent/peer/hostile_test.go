package peer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	"github.com/muster-edge/muster/api/peer/v1/peerv1connect"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// stranger opens a TLS connection with a key that nobody knows.
func stranger(t *testing.T, to *node, key crypto.Signer, edit func(*tls.Config)) (*tls.Conn, error) {
	t.Helper()
	certificate, err := bare(key)
	if err != nil {
		t.Fatal(err)
	}
	config := clientTLS(certificate)
	if edit != nil {
		edit(config)
	}
	c, err := tls.Dial("tcp", to.addr, config)
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// send writes a raw HTTP request and reads to the end of the connection.
func send(t *testing.T, c *tls.Conn, path, contentType string, body []byte) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", path, contentType, len(body))
	_, _ = c.Write(body) // the server may have answered already
	b, err := io.ReadAll(c)
	if len(b) == 0 {
		t.Fatalf("%s: no answer: %v", path, err)
	}
	return string(b)
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whoever is not admitted reads the same few bytes, whatever he asks for, and
// learns nothing from them.
func TestARefusedCallerLearnsNothingElse(t *testing.T) {
	s := newSite(t)
	b, removed := newNode(t, s), newNode(t, s)
	charter, forRemoved := s.signCharter(t, nil), s.admission(t, removed, nil)
	forB := s.admission(t, b, nil)
	b.learn(charter, forB, forRemoved, s.removal(t, removed))
	b.start(nil)
	idle := newNode(t, s).start(nil) // a server that is no node of any site
	deep := bytes.Repeat([]byte("["), 90<<10)
	var groups []byte
	for range 20_000 {
		groups = protowire.AppendTag(groups, 77, protowire.StartGroupType)
	}
	hello := peerv1connect.PeerServiceHelloProcedure
	const binary = "application/proto"
	type ask struct {
		name, path, kind string
		body             []byte
		key              crypto.Signer
	}
	asks := []ask{
		{name: "empty hello", path: hello, kind: binary},
		{name: "wrong version", path: hello, kind: binary, body: marshal(t, &peerv1.HelloRequest{Protocol: 2})},
		{name: "hello without papers", path: hello, kind: binary, body: marshal(t, &peerv1.HelloRequest{Protocol: 1})},
		{name: "hello with papers of others", path: hello, kind: binary, body: marshal(t, &peerv1.HelloRequest{Protocol: 1, Charter: document(charter), Admission: document(forB)})},
		{name: "hello of a removed node", path: hello, kind: binary, key: removed.signer, body: marshal(t, &peerv1.HelloRequest{Protocol: 1, Charter: document(charter), Admission: document(forRemoved)})},
		{name: "rubbish", path: hello, kind: binary, body: []byte("rubbish")},
		{name: "JSON", path: hello, kind: "application/json", body: []byte(`{}`)},
		{name: "gRPC", path: hello, kind: "application/grpc", body: []byte{0, 0, 0, 0, 0}},
		{name: "unknown type", path: hello, kind: "text/plain", body: []byte("x")},
		{name: "deep JSON for an envelope", path: hello, kind: binary, body: marshal(t, &peerv1.HelloRequest{Protocol: 1, Admission: document(deep)})},
		{name: "deep groups", path: hello, kind: binary, body: groups},
		{name: "oversize hello", path: hello, kind: binary, body: make([]byte, maxHelloBody+1)},
		{name: "status", path: peerv1connect.PeerServiceStatusProcedure, kind: binary},
		{name: "documents", path: peerv1connect.PeerServiceDocumentsProcedure, kind: binary},
		{name: "join material", path: peerv1connect.PeerServiceJoinMaterialProcedure, kind: binary, body: marshal(t, &peerv1.JoinMaterialRequest{As: peerv1.JoinAs_JOIN_AS_WORKER})},
		{name: "lease", path: peerv1connect.PeerServiceLeaseProcedure, kind: binary},
		{name: "escrow", path: peerv1connect.PeerServiceGetEscrowProcedure, kind: "application/connect+proto"},
		{name: "unknown path", path: "/", kind: binary},
		{name: "unknown method", path: "/peer.v1.PeerService/Nothing", kind: binary},
	}
	var first string
	for _, server := range []*node{b, idle} {
		for _, a := range asks {
			key := a.key
			if key == nil {
				key = newKey(t)
			}
			c, err := stranger(t, server, key, nil)
			if err != nil {
				t.Fatal(err)
			}
			got := send(t, c, a.path, a.kind, a.body)
			if first == "" {
				first = got
			}
			if got != first {
				t.Errorf("%s: the answer is\n%s\nand not\n%s", a.name, got, first)
			}
		}
	}
	if len(first) > 256 || !strings.Contains(first, "refused") {
		t.Errorf("the refusal has %d bytes: %s", len(first), first)
	}
	for _, secret := range []string{"acme", "hall", "muster", string(b.id), fleet.Words(b.id), "Date", "Server", "v1"} {
		if strings.Contains(strings.ToLower(first), strings.ToLower(secret)) {
			t.Errorf("the refusal tells %q: %s", secret, first)
		}
	}
	if len(b.papers.Refs()) != 4 {
		t.Errorf("strangers changed the papers: %d documents", len(b.papers.Refs()))
	}
}

// The handshake shows a key of the moment, and no name.
func TestTheHandshakeTellsNothing(t *testing.T) {
	_, _, b := pair(t)
	c, err := stranger(t, b, newKey(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	certificates := c.ConnectionState().PeerCertificates
	if len(certificates) != 1 {
		t.Fatalf("%d certificates", len(certificates))
	}
	x := certificates[0]
	if x.Subject.String()+x.Issuer.String() != "" || len(x.DNSNames)+len(x.IPAddresses)+len(x.URIs)+len(x.Extensions) != 0 || x.SerialNumber.Int64() != 1 {
		t.Errorf("the certificate says %s %s %v %v", x.Subject, x.Issuer, x.URIs, x.Extensions)
	}
	if ref, err := papers.KeyRef(x.PublicKey); err != nil || ref == b.key {
		t.Errorf("the server shows the key that its admission names (%v)", err)
	}
}

func TestHandshakesThatFail(t *testing.T) {
	_, a, b := pair(t)
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key  crypto.Signer
		edit func(*tls.Config)
	}{
		"TLS 1.2":        {newKey(t), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }},
		"no certificate": {newKey(t), func(c *tls.Config) { c.Certificates = nil }},
		"a chain without end": {newKey(t), func(c *tls.Config) {
			for range 60 {
				c.Certificates[0].Certificate = append(c.Certificates[0].Certificate, c.Certificates[0].Certificate[0])
			}
		}},
		"an Ed25519 key": {other, func(c *tls.Config) { c.Certificates[0].SupportedSignatureAlgorithms = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := stranger(t, b, c.key, c.edit)
			if err == nil {
				// TLS 1.3 tells the client with its first read.
				_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
				_, err = conn.Read(make([]byte, 1))
			}
			if err == nil || errors.Is(err, io.EOF) {
				t.Errorf("the handshake ended with %v", err)
			}
		})
	}
	a.meet(b)
}

// A certificate is a carrier of a key: what else it says counts for nothing.
func TestWhenTheCertificateHasEndedThenTheKeyStillCounts(t *testing.T) {
	_, a, b := pair(t)
	for name, template := range map[string]*x509.Certificate{
		"ended in 1971": {SerialNumber: big.NewInt(7), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(31536000, 0)},
		"begins in 2200, with names": {SerialNumber: big.NewInt(8), Subject: pkix.Name{CommonName: "n-other"}, DNSNames: []string{"centre.example"},
			NotBefore: time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2201, 1, 1, 0, 0, 0, 0, time.UTC)},
	} {
		t.Run(name, func(t *testing.T) {
			der, err := x509.CreateCertificate(rand.Reader, template, template, a.signer.Public(), a.signer)
			if err != nil {
				t.Fatal(err)
			}
			old := a.peer.certificate
			a.peer.certificate = func() (tls.Certificate, error) {
				return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.signer}, nil
			}
			t.Cleanup(func() { a.peer.certificate = old })
			a.meet(b)
		})
	}
}

// lying is a server that answers every hello with what it likes.
func lying(t *testing.T, answer func(exporter [exporterLength]byte, caller papers.Ref) *peerv1.HelloResponse) *node {
	t.Helper()
	config, err := serverTLS()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, h := peerv1connect.NewPeerServiceHandler(lyingService{answer: answer})
	server := &http.Server{Handler: h, ConnContext: func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, linkKey{}, c.(*tls.Conn))
	}}
	config.NextProtos = []string{"http/1.1"}
	go func() { _ = server.Serve(tls.NewListener(ln, config)) }()
	t.Cleanup(func() { _ = server.Close() })
	return &node{addr: ln.Addr().String()}
}

type lyingService struct {
	peerv1connect.UnimplementedPeerServiceHandler
	answer func(exporter [exporterLength]byte, caller papers.Ref) *peerv1.HelloResponse
}

func (l lyingService) Hello(ctx context.Context, _ *peerv1.HelloRequest) (*peerv1.HelloResponse, error) {
	conn := ctx.Value(linkKey{}).(*tls.Conn)
	exporter, err := exporterOf(conn)
	if err != nil {
		return nil, err
	}
	public, err := keyOf(conn.ConnectionState())
	if err != nil {
		return nil, err
	}
	caller, err := papers.KeyRef(public)
	if err != nil {
		return nil, err
	}
	return l.answer(exporter, caller), nil
}

// A rogue peer answers to an advert: it has every paper of the site, has
// spoken to the real node, and passes its words on. It has not got the key.
func TestRoguePeers(t *testing.T) {
	s, a, b := pair(t)
	// What the real server says to another admitted node, who is the rogue's
	// accomplice.
	accomplice := newNode(t, s)
	accomplice.learn(s.signCharter(t, nil), s.admission(t, accomplice, nil))
	accomplice.start(nil)
	conn := accomplice.dial(b)
	shown := accomplice.papers.Hello(accomplice.id, "")
	genuine, err := conn.rpc.Hello(t.Context(), &peerv1.HelloRequest{Protocol: 1, Charter: document(shown.Charter), Admission: document(shown.Admission)})
	if err != nil {
		t.Fatal(err)
	}
	signed := func(key *ecdsa.PrivateKey, node fleet.NodeID, exporter [exporterLength]byte, caller papers.Ref) *peerv1.HelloResponse {
		m := proto.CloneOf(genuine)
		ref, err := papers.KeyRef(key.Public())
		if err != nil {
			t.Error(err)
		}
		d := serverDigest(exporter, ref, caller)
		if m.Proof, err = ecdsa.SignASN1(rand.Reader, key, d[:]); err != nil {
			t.Error(err)
		}
		if m.Key, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
			t.Error(err)
		}
		m.Node = string(node)
		return m
	}
	rogue := newKey(t)
	real := b.signer.(*ecdsa.PrivateKey)
	for name, c := range map[string]struct {
		answer func([exporterLength]byte, papers.Ref) *peerv1.HelloResponse
		want   error
	}{
		"positive twin: it has the key":       {func(e [exporterLength]byte, c papers.Ref) *peerv1.HelloResponse { return signed(real, b.id, e, c) }, nil},
		"it passes the real node's answer on": {func([exporterLength]byte, papers.Ref) *peerv1.HelloResponse { return genuine }, ErrStranger},
		"it signs with a key of its own":      {func(e [exporterLength]byte, c papers.Ref) *peerv1.HelloResponse { return signed(rogue, b.id, e, c) }, ErrStranger},
		"the signature is about another caller": {func(e [exporterLength]byte, _ papers.Ref) *peerv1.HelloResponse {
			return signed(real, b.id, e, accomplice.key)
		}, ErrStranger},
		"the signature is about another connection": {func(_ [exporterLength]byte, c papers.Ref) *peerv1.HelloResponse {
			return signed(real, b.id, [exporterLength]byte{}, c)
		}, ErrStranger},
		"it calls itself another node": {func(e [exporterLength]byte, c papers.Ref) *peerv1.HelloResponse {
			return signed(real, accomplice.id, e, c)
		}, ErrStranger},
		"it shows the caller's own key": {func(e [exporterLength]byte, c papers.Ref) *peerv1.HelloResponse {
			return signed(a.signer.(*ecdsa.PrivateKey), a.id, e, c)
		}, ErrSelf},
		"it says too much": {func(e [exporterLength]byte, c papers.Ref) *peerv1.HelloResponse {
			m := signed(real, b.id, e, c)
			m.Charter = document(make([]byte, maxGreeting))
			return m
		}, errLong},
		"it says nothing": {func([exporterLength]byte, papers.Ref) *peerv1.HelloResponse { return &peerv1.HelloResponse{} }, ErrStranger},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := a.dial(lying(t, c.answer)).Hello(t.Context())
			if c.want == errLong {
				if connect.CodeOf(err) != connect.CodeResourceExhausted || errors.Is(err, ErrBusy) {
					t.Errorf("%v, want an error about the size", err)
				}
				return
			}
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if c.want == nil && g.Node != b.id {
				t.Errorf("it met %s", g.Node)
			}
		})
	}
}

var errLong = errors.New("too long")

// slow are callers that hold a connection and do not get on.
func TestSlowCallersDoNotKeepAPeerOut(t *testing.T) {
	s := newSite(t)
	a, b := newNode(t, s), newNode(t, s)
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil)
	a.learn(charter, forA)
	b.learn(charter, forB)
	a.start(nil)
	b.start(func(c *Config) {
		c.Limits = Limits{Unproven: 24, UnprovenPerSource: 4, PerSource: 100_000, Hello: time.Hour}
	})
	key := newKey(t)
	for i := range 120 {
		// 127.0.0.0/8 is all ours: many sources.
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%40))}}
		raw, err := d.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = raw.Close() })
		certificate, err := bare(key)
		if err != nil {
			t.Fatal(err)
		}
		switch i % 4 {
		case 0: // says nothing
		case 1: // half a ClientHello
			_, _ = raw.Write([]byte{22, 3, 1, 2, 0, 1})
		case 2, 3:
			c := tls.Client(raw, clientTLS(certificate))
			if err := c.Handshake(); err != nil {
				continue // its place was taken
			}
			if i%4 == 2 { // half a header
				fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: ", peerv1connect.PeerServiceHelloProcedure)
			} else { // a body that does not come
				fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\nContent-Length: 90000\r\n\r\n1", peerv1connect.PeerServiceHelloProcedure)
			}
		}
	}
	if n := b.peer.gate.unprovenNow(); n > 24 {
		t.Errorf("%d unproven connections, at most 24 are allowed", n)
	}
	if _, _, err := a.meet(b).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// Admitted nodes have bounds, too.
func TestWhenAnAdmittedNodeSendsTooMuchThenItIsTold(t *testing.T) {
	_, a, b := pair(t)
	c := a.meet(b)
	ctx := t.Context()
	many := make([]*peerv1.DocumentRef, maxHeld+1)
	for i := range many {
		many[i] = &peerv1.DocumentRef{Sha256: make([]byte, 32)}
	}
	for name, do := range map[string]func(c *Conn) error{
		"too many references": func(c *Conn) error {
			_, err := c.rpc.Documents(ctx, &peerv1.DocumentsRequest{Held: many})
			return err
		},
		"a short reference": func(c *Conn) error {
			_, err := c.rpc.Documents(ctx, &peerv1.DocumentsRequest{Held: []*peerv1.DocumentRef{{Sha256: []byte{1}}}})
			return err
		},
		"documents over the limit": func(c *Conn) error {
			_, err := c.rpc.Documents(ctx, &peerv1.DocumentsRequest{Documents: []*peerv1.Document{{Envelope: make([]byte, maxDocumentsBody)}}})
			return err
		},
		"the status of another node": func(c *Conn) error {
			st := a.Status()
			st.Node = b.id
			_, err := c.rpc.Status(ctx, &peerv1.StatusRequest{Status: statusToProto(st)})
			return err
		},
		"no status": func(c *Conn) error { _, err := c.rpc.Status(ctx, &peerv1.StatusRequest{}); return err },
		"a plan without end": func(c *Conn) error {
			_, err := c.rpc.Lease(ctx, &peerv1.LeaseRequest{Plan: strings.Repeat("x", maxID+1)})
			return err
		},
		"no role":     func(c *Conn) error { _, err := c.rpc.JoinMaterial(ctx, &peerv1.JoinMaterialRequest{}); return err },
		"hello twice": func(c *Conn) error { _, err := c.rpc.Hello(ctx, &peerv1.HelloRequest{Protocol: 1}); return err },
	} {
		t.Run(name, func(t *testing.T) {
			own := a.meet(b)
			defer own.Close()
			if err := do(own); err == nil || connect.CodeOf(err) == connect.CodeInternal {
				t.Errorf("the answer is %v", err)
			}
		})
	}
	if _, _, err := c.Status(ctx); err != nil {
		t.Errorf("another connection of it: %v", err)
	}
	if len(b.heard) != 1 {
		t.Errorf("%d statuses were heard, want the last one", len(b.heard))
	}
}

// What breaks is told from what a peer says.
func TestWhenTheServerGoesAwayThenErrClosed(t *testing.T) {
	_, a, b := pair(t)
	c := a.meet(b)
	b.peer.gate.closeNode(a.id)
	if _, _, err := c.Status(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("%v, want ErrClosed", err)
	}
	if _, _, err := c.Status(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("the second time: %v, want ErrClosed", err)
	}
	if _, _, err := a.meet(b).Status(t.Context()); err != nil {
		t.Errorf("a new connection: %v", err)
	}
}

// A node asks a peer only for what the peer's admission lets it give.
func TestWhenThePeerMayNotServeThenItIsNotAsked(t *testing.T) {
	s := newSite(t)
	a, b := newNode(t, s), newNode(t, s)
	charter, forA := s.signCharter(t, nil), s.admission(t, a, nil)
	forB := s.admission(t, b, func(x *fleet.Admission) { x.MayServe = false })
	a.learn(charter, forA, forB)
	b.learn(charter, forA, forB)
	a.start(nil)
	b.start(nil)
	c := a.meet(b)
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); !errors.Is(err, ErrNotServer) {
		t.Errorf("%v, want ErrNotServer", err)
	}
	if _, err := c.Lease(t.Context(), aPlan); !errors.Is(err, ErrNotServer) {
		t.Errorf("%v, want ErrNotServer", err)
	}
}
