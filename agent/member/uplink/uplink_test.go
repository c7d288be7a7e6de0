package uplink

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/agent/peer"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/statement"
)

const self = fleet.NodeID("n-aaaaaaaaaaaaaaaaaaaaaaaa")

// centre is a fake of the node endpoint.
type centre struct {
	musterv1connect.UnimplementedNodeServiceHandler
	mu      sync.Mutex
	reports []*musterv1.ReportRequest
	asks    []*musterv1.DocumentsRequest
	answer  *musterv1.ReportResponse
	pages   []*musterv1.DocumentsResponse
	fail    error
	blob    []byte
	header  *musterv1.EscrowHeader
	heard   chan struct{}
}

func (c *centre) Report(_ context.Context, m *musterv1.ReportRequest) (*musterv1.ReportResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports = append(c.reports, m)
	if c.heard != nil {
		select {
		case c.heard <- struct{}{}:
		default:
		}
	}
	if c.fail != nil {
		return nil, c.fail
	}
	return c.answer, nil
}

func (c *centre) Documents(_ context.Context, m *musterv1.DocumentsRequest) (*musterv1.DocumentsResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asks = append(c.asks, m)
	p := c.pages[0]
	if len(c.pages) > 1 {
		c.pages = c.pages[1:]
	}
	return p, nil
}

func (c *centre) AskFounding(_ context.Context, m *musterv1.AskFoundingRequest) (*musterv1.AskFoundingResponse, error) {
	return &musterv1.AskFoundingResponse{Node: string(self), Uid: m.GetUid()}, c.fail
}

func (c *centre) PutEscrow(_ context.Context, s *connect.ClientStream[musterv1.PutEscrowRequest]) (*musterv1.PutEscrowResponse, error) {
	for s.Receive() {
		if h := s.Msg().GetHeader(); h != nil {
			c.header = h
		}
		c.blob = append(c.blob, s.Msg().GetData()...)
	}
	return &musterv1.PutEscrowResponse{}, s.Err()
}

func (c *centre) GetHandover(_ context.Context, _ *musterv1.GetHandoverRequest, s *connect.ServerStream[musterv1.GetHandoverResponse]) error {
	if err := s.Send(&musterv1.GetHandoverResponse{Part: &musterv1.GetHandoverResponse_Header{Header: c.header}}); err != nil {
		return err
	}
	for chunk := range slices.Chunk(c.blob, 1000) {
		if err := s.Send(&musterv1.GetHandoverResponse{Part: &musterv1.GetHandoverResponse_Data{Data: chunk}}); err != nil {
			return err
		}
	}
	return nil
}

// enroller is a fake of enroll/client.
type enroller struct {
	id      client.Identity
	renewed client.Identity
	renew   error
	enrolls int
}

func (e *enroller) Enroll(context.Context) (client.Identity, error) { e.enrolls++; return e.id, nil }

func (e *enroller) Renew(context.Context, client.Identity) (client.Identity, error) {
	return e.renewed, e.renew
}

func (e *enroller) NodeHTTPClient(client.Identity) *http.Client { return &http.Client{} }

func serve(t *testing.T, c *centre) string {
	mux := http.NewServeMux()
	mux.Handle(musterv1connect.NewNodeServiceHandler(c))
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL
}

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func leaf(t *testing.T, k *ecdsa.PrivateKey, from, to time.Time) []byte {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// world is an uplink that is enrolled at c.
type world struct {
	*Uplink
	c        *centre
	e        *enroller
	k        *ecdsa.PrivateKey
	learned  [][]byte
	standing []string
	acked    []string
	report   *musterv1.ClusterReport
	cfg      Config
}

func setup(t *testing.T, edit func(*world)) *world {
	t.Helper()
	w := &world{k: key(t), c: &centre{answer: &musterv1.ReportResponse{Documents: &musterv1.DocVersion{Epoch: 1, N: 1}, Site: "s"}}}
	w.c.pages = []*musterv1.DocumentsResponse{{Site: "s", Revision: &musterv1.DocVersion{Epoch: 1, N: 1}, Envelopes: [][]byte{[]byte("d1")}, Orders: []string{"o1"}}}
	now := time.Now()
	w.e = &enroller{id: client.Identity{Certificates: [][]byte{leaf(t, w.k, now.Add(-time.Hour), now.Add(720*time.Hour))}, Documents: [][]byte{[]byte("d0")}}}
	w.report = &musterv1.ClusterReport{Role: "worker"}
	w.cfg = Config{Dir: t.TempDir(), Node: self, Key: &w.k.PublicKey, Signer: w.k, Centres: []string{serve(t, w.c)}, Client: w.e,
		Learn:    func(e [][]byte) (int, error) { w.learned = append(w.learned, e...); return len(e), nil },
		Cluster:  func() *musterv1.ClusterReport { return w.report },
		Standing: func(ids []string) { w.standing = ids },
		Outcomes: func() []*musterv1.OrderOutcome { return []*musterv1.OrderOutcome{{Id: "o1"}} },
		Acknowledged: func(told []*musterv1.OrderOutcome, ids []string) error {
			if len(told) != 1 {
				return errors.New("told nothing")
			}
			w.acked = ids
			return nil
		},
	}
	if edit != nil {
		edit(w)
	}
	u, err := New(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.Uplink = u
	return w
}

// TestEnrollOnce: the first run enrolls, and reports; the next one finds its
// certificate on the disk, although it has expired by then.
func TestEnrollOnce(t *testing.T) {
	w := setup(t, func(w *world) { w.c.heard = make(chan struct{}, 1) })
	run := func() {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.Run(ctx) }()
		<-w.c.heard
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
	run()
	if w.e.enrolls != 1 || len(w.learned) == 0 || string(w.learned[0]) != "d0" {
		t.Fatalf("enrolled %d times, learned %q", w.e.enrolls, w.learned)
	}
	w.cfg.Now = func() time.Time { return time.Now().AddDate(1, 0, 0) }
	w.e.renew = errors.New("outage")
	u, err := New(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.Uplink = u
	run()
	if w.e.enrolls != 1 {
		t.Errorf("enrolled %d times although there is a certificate", w.e.enrolls)
	}
	// A certificate for another key is none.
	w.cfg.Key = &key(t).PublicKey
	if u, err := New(w.cfg); err != nil || u.leaf != nil {
		t.Errorf("a foreign certificate was taken: %v", err)
	}
}

func enrolled(t *testing.T, edit func(*world)) *world {
	w := setup(t, edit)
	if err := w.take(w.e.id); err != nil {
		t.Fatal(err)
	}
	return w
}

func TestReport(t *testing.T) {
	w := enrolled(t, nil)
	ctx := t.Context()
	must := func() time.Duration {
		t.Helper()
		d, err := w.Uplink.report(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	w.c.answer.NextReportSeconds, w.c.answer.Acknowledged = 100, []string{"o1"}
	if d := must(); d < 80*time.Second || d > 100*time.Second {
		t.Errorf("next report in %s, the centre said 100 s", d)
	}
	if w.c.reports[0].GetCluster().GetRole() != "worker" || len(w.c.asks) != 1 || string(w.learned[0]) != "d1" ||
		!slices.Equal(w.standing, []string{"o1"}) || !slices.Equal(w.acked, []string{"o1"}) {
		t.Fatalf("report %v, learned %q, standing %v, acknowledged %v", w.c.reports[0], w.learned, w.standing, w.acked)
	}
	must()
	if w.c.reports[1].GetCluster() != nil || len(w.c.asks) != 1 {
		t.Error("what the centre has was told or pulled again")
	}
	w.report = &musterv1.ClusterReport{Role: "server"}
	must()
	if w.c.reports[2].GetCluster().GetRole() != "server" {
		t.Error("a change was not told")
	}
	w.c.answer.WantCluster = true
	if d := must(); d > minReport {
		t.Errorf("the centre wants the cluster, and waits %s", d)
	}
	w.c.answer.WantCluster = false
	must()
	if w.c.reports[4].GetCluster() == nil {
		t.Error("what the centre asked for was not told")
	}
	w.c.answer.Documents = &musterv1.DocVersion{Epoch: 1, N: 2}
	w.c.pages = []*musterv1.DocumentsResponse{
		{Site: "s", More: true, Next: &musterv1.DocVersion{Epoch: 1, N: 1}, Envelopes: [][]byte{[]byte("p1")}},
		{Site: "s", Revision: &musterv1.DocVersion{Epoch: 1, N: 2}, Envelopes: [][]byte{[]byte("p2")}},
	}
	w.standing = []string{"x"}
	must()
	if got := string(bytes.Join(w.learned[1:], []byte(" "))); got != "p1 p2" || w.standing != nil {
		t.Errorf("learned %q, standing %v", got, w.standing)
	}
	if last := w.c.asks[len(w.c.asks)-1]; last.GetSite() != "s" || last.GetHave().GetN() != 1 || last.GetAfter().GetN() != 1 {
		t.Errorf("asked %v", last)
	}
	for _, absurd := range []uint32{1, 1 << 31} {
		w.c.answer.NextReportSeconds = absurd
		if d := must(); d < minReport*8/10 || d > maxReport {
			t.Errorf("told %d s, waits %s", absurd, d)
		}
	}
	if w.State().Heard.IsZero() {
		t.Error("the centre was not noted as heard")
	}
}

func TestACentreThatSendsPagesForEver(t *testing.T) {
	w := enrolled(t, func(w *world) {
		w.c.pages = []*musterv1.DocumentsResponse{{More: true, Next: &musterv1.DocVersion{N: 7}}}
	})
	if err := w.pull(t.Context()); err == nil || len(w.c.asks) > 3 {
		t.Errorf("%v after %d pages", err, len(w.c.asks))
	}
}

func TestFailures(t *testing.T) {
	other := &centre{answer: &musterv1.ReportResponse{}, pages: []*musterv1.DocumentsResponse{{}}}
	w := enrolled(t, func(w *world) { w.cfg.Centres = append(w.cfg.Centres, serve(t, other)) })
	w.c.fail = connect.NewError(connect.CodeUnavailable, errors.New("down"))
	if _, err := w.Uplink.report(t.Context()); err == nil || errors.Is(err, errEnroll) {
		t.Fatalf("%v", err)
	}
	if _, err := w.Uplink.report(t.Context()); err != nil || len(other.reports) != 1 {
		t.Fatalf("the second URL was not tried: %v", err)
	}
	other.fail = connect.NewError(connect.CodeUnauthenticated, errors.New("who?"))
	if _, err := w.Uplink.report(t.Context()); !errors.Is(err, errEnroll) {
		t.Fatalf("%v, want enrolling again", err)
	}
	w.e.renew = fmt.Errorf("%w: no", client.ErrEnroll)
	if err := w.renew(t.Context()); !errors.Is(err, errEnroll) {
		t.Errorf("renew: %v", err)
	}
	w.e.renew = errors.New("outage")
	if err := w.renew(t.Context()); err != nil {
		t.Errorf("an outage ends the habit: %v", err)
	}
	w.e.renew, w.e.renewed = nil, client.Identity{Certificates: [][]byte{leaf(t, key(t), time.Now(), time.Now())}}
	if err := w.renew(t.Context()); err != nil || !w.k.PublicKey.Equal(w.leaf.PublicKey) {
		t.Errorf("a certificate for another key was taken: %v", err)
	}
}

func TestAskFounding(t *testing.T) {
	w := enrolled(t, nil)
	if g, err := w.AskFounding(t.Context(), "s", "uid"); err != nil || g.Node != self || g.UID != "uid" {
		t.Fatalf("%+v, %v", g, err)
	}
	w.c.fail = connect.NewError(connect.CodeUnavailable, errors.New("down"))
	if _, err := w.AskFounding(t.Context(), "s", "uid"); err == nil {
		t.Fatal("no error")
	}
}

func TestPutEscrow(t *testing.T) {
	w := enrolled(t, nil)
	data := bytes.Repeat([]byte("0123456789"), 60_000) // more than two messages
	b := peer.Blob{Kind: "disk-key", Size: int64(len(data)), UID: "u", Epoch: 3, SHA256: sha256.Sum256(data)}
	if err := w.PutEscrow(t.Context(), b, time.Unix(5, 0), "kid", bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.c.blob, data) || w.c.header.GetCluster() != "u" || w.c.header.GetEpoch() != 3 || w.c.header.GetKeyId() != "kid" || w.c.header.GetKind() != "disk-key" {
		t.Errorf("the centre got %d bytes and %v", len(w.c.blob), w.c.header)
	}
	if err := w.PutEscrow(t.Context(), b, time.Unix(5, 0), "kid", io.MultiReader(strings.NewReader("x"), failing{})); err == nil {
		t.Error("a file that cannot be read was sent")
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("bad block") }

// TestHandover: what an operator sealed to the offered key opens here, and
// nothing else does.
func TestHandover(t *testing.T) {
	w := enrolled(t, nil)
	dir := t.TempDir()
	if _, err := w.Handover(t.Context(), "e-1", dir); err == nil {
		t.Fatal("opened without an offer")
	}
	envelope := w.Offer("acme", "s")
	if again := w.Offer("acme", "s"); !bytes.Equal(envelope, again) {
		t.Error("each report makes another offer")
	}
	payload, err := statement.Verify(envelope, fleet.EscrowOfferPayload, []crypto.PublicKey{&w.k.PublicKey})
	if err != nil || !bytes.Contains(payload, []byte(`"node":"`+string(self)+`"`)) {
		t.Fatalf("the offer: %v", err)
	}
	snapshot := []byte("an etcd snapshot")
	sum := sha256.Sum256(snapshot)
	seal := func(public []byte) {
		var out bytes.Buffer
		_, err := escrow.SealSnapshot(&out, public, escrow.Header{Tenant: "acme", Site: "s", Node: self, Cluster: "u", Epoch: 2, Taken: time.Unix(9, 0)},
			escrow.Contents{Name: "snap", Size: int64(len(snapshot)), SHA256: hex.EncodeToString(sum[:]), Token: "server\nagent", K3s: "v1"}, bytes.NewReader(snapshot))
		if err != nil {
			t.Fatal(err)
		}
		w.c.blob = out.Bytes()
		h := sha256.Sum256(w.c.blob)
		w.c.header = &musterv1.EscrowHeader{Sha256: h[:], Size: int64(len(w.c.blob)), Taken: timestamppb.Now()}
	}
	seal(w.public)
	got, err := w.Handover(t.Context(), "e-1", dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(got.File)
	if err != nil || !bytes.Equal(b, snapshot) || got.ServerToken != "server" || got.AgentToken != "agent" || filepath.Dir(got.File) != dir {
		t.Fatalf("%+v, %v", got, err)
	}
	if fi, err := os.Stat(got.File); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	w.c.header.Size++
	if _, err := w.Handover(t.Context(), "e-1", dir); err == nil {
		t.Error("not what was announced, and taken")
	}
	_, foreign, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	seal(foreign)
	if _, err := w.Handover(t.Context(), "e-1", dir); !errors.Is(err, escrow.ErrWrongKey) {
		t.Errorf("sealed to another key: %v", err)
	}
	seal(w.public)
	w.c.blob[len(w.c.blob)-1] ^= 1
	if _, err := w.Handover(t.Context(), "e-1", dir); err == nil {
		t.Error("a changed blob opened")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".handover*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
