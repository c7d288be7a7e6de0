package central

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/statement"
)

// vaultShop is a shop whose services are called over HTTP, with an escrow key.
type vaultShop struct {
	*shop
	private, public []byte
	url             string
	client          *http.Client
	close           func()
	people          musterv1connect.ManagementServiceClient
}

func newVaultShop(t *testing.T) *vaultShop {
	s := newVaultShopOf(t, newHarness(t, t.TempDir()))
	s.image("slot", "1")
	t.Cleanup(s.close)
	return s
}

func newVaultShopOf(t testing.TB, h *harness) *vaultShop {
	h.scribe = &h.s.scribe
	s := &vaultShop{shop: &shop{h, t, nodeService{Server: h.s}}}
	var err error
	s.private, s.public, err = escrow.GenerateKey()
	s.must(err)
	_, err = s.s.trustEscrowKey(context.Background(), testCaller, s.public, "test")
	s.must(err)
	mux := http.NewServeMux()
	as := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx := r.Context()
			if id := r.Header.Get("Test-Node"); id != "" {
				ctx = context.WithValue(ctx, nodeCallerKey{}, nodeCaller{fleet.NodeID(id), "192.0.2.1"})
			} else {
				ctx = access.NewContext(ctx, testCaller.Principal)
			}
			atLeisure(h).ServeHTTP(w, r.WithContext(ctx))
		})
	}
	path, svc := musterv1connect.NewNodeServiceHandler(nodeService{Server: s.s})
	mux.Handle(path, as(svc))
	path, svc = musterv1connect.NewManagementServiceHandler(management{Server: s.s})
	mux.Handle(path, as(svc))
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	s.close = srv.Close
	s.url = srv.URL
	s.people = musterv1connect.NewManagementServiceClient(srv.Client(), srv.URL)
	s.client = srv.Client()
	return s
}

func (s *vaultShop) as(m *member) musterv1connect.NodeServiceClient {
	return musterv1connect.NewNodeServiceClient(s.client, s.url, connect.WithInterceptors(testNode(m.ID)))
}

// testNode says who calls.
type testNode fleet.NodeID

func (n testNode) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		r.Header().Set("Test-Node", string(n))
		return next(ctx, r)
	}
}

func (n testNode) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		c := next(ctx, spec)
		c.RequestHeader().Set("Test-Node", string(n))
		return c
	}
}

func (n testNode) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

const secretToken = "K10canary::server:canary"

// sealed is a snapshot of a site, as its nodes make it.
func (s *vaultShop) sealed(m *member, site, data string, public []byte) []byte {
	s.t.Helper()
	sum := sha256.Sum256([]byte(data))
	var b bytes.Buffer
	_, err := escrow.SealSnapshot(&b, public, escrow.Header{
		Tenant: DefaultTenant, Site: site, Node: m.ID, Cluster: "c-1", Epoch: 1, Taken: s.clock.now().UTC().Truncate(time.Second),
	}, escrow.Contents{Name: "etcd-1", Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]), Token: secretToken, K3s: "v1"}, strings.NewReader(data))
	s.must(err)
	return b.Bytes()
}

func (s *vaultShop) put(m *member, blob []byte, change func(*musterv1.EscrowHeader)) (*musterv1.PutEscrowResponse, error) {
	sum := sha256.Sum256(blob)
	h := &musterv1.EscrowHeader{Sha256: sum[:], Size: int64(len(blob))}
	if change != nil {
		change(h)
	}
	stream, err := s.as(m).PutEscrow(context.Background())
	if err != nil {
		return nil, err
	}
	err = stream.Send(&musterv1.PutEscrowRequest{Part: &musterv1.PutEscrowRequest_Header{Header: h}})
	for rest := blob; err == nil && len(rest) > 0; {
		n := min(len(rest), 100_000)
		err = stream.Send(&musterv1.PutEscrowRequest{Part: &musterv1.PutEscrowRequest_Data{Data: rest[:n]}})
		rest = rest[n:]
	}
	return stream.CloseAndReceive()
}

func (s *vaultShop) files() (out []string) {
	s.t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.s.vault.dir, DefaultTenant))
	if err != nil && !os.IsNotExist(err) {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (s *vaultShop) later() { s.clock.set(s.clock.now().Add(2 * escrowEvery)) }

func TestSnapshotsGoIntoEscrowAndToANode(t *testing.T) {
	s := newVaultShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	data := strings.Repeat("etcd", 100_000)
	blob := s.sealed(a, "shop-7", data, s.public)
	out, err := s.put(a, blob, nil)
	s.must(err)
	if again, err := s.put(a, blob, nil); err != nil || !again.Existed || again.Id != out.Id {
		t.Errorf("once more: %+v %v", again, err)
	}
	list, err := s.people.ListEscrow(context.Background(), &musterv1.ListEscrowRequest{Site: "shop-7"})
	s.must(err)
	if len(list.Blobs) != 1 || list.Blobs[0].Cluster != "c-1" || list.Blobs[0].KeyId != escrow.KeyID(s.public) || list.Blobs[0].Node != string(a.ID) {
		t.Fatalf("%+v", list.Blobs)
	}
	// Nothing of it is readable in anything the centre keeps.
	s.must(filepath.WalkDir(s.s.data.path, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		got, err := os.ReadFile(name)
		if bytes.Contains(got, []byte("canary")) || bytes.Contains(got, []byte(strings.Repeat("etcd", 8))) {
			t.Errorf("%s holds it in the clear", name)
		}
		return err
	}))
	fetched, err := s.people.FetchEscrow(context.Background(), &musterv1.FetchEscrowRequest{Id: out.Id})
	s.must(err)
	var got bytes.Buffer
	for fetched.Receive() {
		got.Write(fetched.Msg().GetData())
	}
	if fetched.Err() != nil || !bytes.Equal(got.Bytes(), blob) || s.audited(audit.EscrowFetched) != 1 {
		t.Fatalf("%d bytes came back, %v", got.Len(), fetched.Err())
	}

	// The operator opens it for b, which has offered a key.
	nodePrivate, nodePublic, err := escrow.GenerateKey()
	s.must(err)
	offer, err := json.Marshal(fleet.EscrowOffer{Format: fleet.EscrowOfferFormat, Tenant: DefaultTenant, Site: "shop-7", Node: b.ID, Key: nodePublic, Issued: s.clock.now()})
	s.must(err)
	forged, err := statement.Sign(fleet.EscrowOfferPayload, offer, a.key)
	s.must(err)
	signed, err := statement.Sign(fleet.EscrowOfferPayload, offer, b.key)
	s.must(err)
	var resealed bytes.Buffer
	_, err = escrow.Reseal(&resealed, bytes.NewReader(blob), s.private, nodePublic)
	s.must(err)
	for i, envelope := range [][]byte{forged.JSON(), signed.JSON()} {
		_, err := s.node.Report(b.ctx, &musterv1.ReportRequest{Cluster: &musterv1.ClusterReport{Role: "none", EscrowOffer: envelope}})
		s.must(err)
		_, err = s.handOver(b, resealed.Bytes(), nodePublic)
		if (err == nil) != (i == 1) {
			t.Fatalf("offer %d: %v", i, err)
		}
	}
	id := fleet.EscrowID(sha256.Sum256(resealed.Bytes()))
	if _, err := s.get2(a, id); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("another node got the handover: %v", err)
	}
	if _, err := s.get2(b, out.Id); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a node got what was sealed to the operator: %v", err)
	}
	mine, err := s.get2(b, id)
	s.must(err)
	var plain bytes.Buffer
	if _, c, err := escrow.OpenSnapshot(&plain, bytes.NewReader(mine), nodePrivate); err != nil || plain.String() != data || c.Token != secretToken {
		t.Fatal(err)
	}
	s.report(a, "server", s.record(a, nil))
	if _, err := s.order(wish{kind: fleet.OrderRestore, node: string(a.ID), snapshot: id}); err == nil {
		t.Error("an order for a node to which it was not handed")
	}
	p, err := s.order(wish{kind: fleet.OrderRestore, node: string(b.ID), snapshot: id})
	if err != nil || p.order.Snapshot != id || p.order.Cluster != "c-1" || !strings.Contains(p.sentence, id) {
		t.Errorf("%+v %v", p, err)
	}
}

func (s *vaultShop) handOver(m *member, blob, key []byte) (*musterv1.PutHandoverResponse, error) {
	sum := sha256.Sum256(blob)
	stream, err := s.people.PutHandover(context.Background())
	if err != nil {
		return nil, err
	}
	err = stream.Send(&musterv1.PutHandoverRequest{Part: &musterv1.PutHandoverRequest_Header{Header: &musterv1.HandoverHeader{
		Node: string(m.ID), Sha256: sum[:], Size: int64(len(blob)), Reason: "test", Key: key,
	}}})
	for rest := blob; err == nil && len(rest) > 0; {
		n := min(len(rest), 100_000)
		err = stream.Send(&musterv1.PutHandoverRequest{Part: &musterv1.PutHandoverRequest_Data{Data: rest[:n]}})
		rest = rest[n:]
	}
	return stream.CloseAndReceive()
}

func (s *vaultShop) get2(m *member, id string) ([]byte, error) {
	stream, err := s.as(m).GetHandover(context.Background(), &musterv1.GetHandoverRequest{Id: id})
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for stream.Receive() {
		b.Write(stream.Msg().GetData())
	}
	return b.Bytes(), stream.Err()
}

func TestEscrowRefusesAndLeavesNothing(t *testing.T) {
	s := newVaultShop(t)
	a := s.join("a", "shop-7")
	w := s.join("w", "shop-7")
	_, _, _, err := s.s.assign(context.Background(), testCaller, assignment{id: string(w.ID), site: "shop-7", worker: true})
	s.must(err)
	_, otherKey, err := escrow.GenerateKey()
	s.must(err)
	blob := s.sealed(a, "shop-7", "data", s.public)
	cases := map[string]struct {
		m      *member
		blob   []byte
		change func(*musterv1.EscrowHeader)
		code   connect.Code
	}{
		"a worker":             {w, blob, nil, connect.CodePermissionDenied},
		"of another site":      {a, s.sealed(a, "shop-8", "data", s.public), nil, connect.CodeInvalidArgument},
		"to another key":       {a, s.sealed(a, "shop-7", "data", otherKey), nil, connect.CodeFailedPrecondition},
		"not sealed at all":    {a, []byte("K10secret"), nil, connect.CodeInvalidArgument},
		"longer than said":     {a, blob, func(h *musterv1.EscrowHeader) { h.Size-- }, connect.CodeInvalidArgument},
		"shorter than said":    {a, blob, func(h *musterv1.EscrowHeader) { h.Size++ }, connect.CodeInvalidArgument},
		"other bytes":          {a, blob, func(h *musterv1.EscrowHeader) { h.Sha256 = make([]byte, 32) }, connect.CodeInvalidArgument},
		"a size of a galaxy":   {a, blob, func(h *musterv1.EscrowHeader) { h.Size = 1 << 60 }, connect.CodeInvalidArgument},
		"no size":              {a, blob, func(h *musterv1.EscrowHeader) { h.Size = 0 }, connect.CodeInvalidArgument},
		"a hash of one byte":   {a, blob, func(h *musterv1.EscrowHeader) { h.Sha256 = []byte{1} }, connect.CodeInvalidArgument},
		"nothing after a head": {a, nil, func(h *musterv1.EscrowHeader) { h.Sha256, h.Size = make([]byte, 32), 7 }, connect.CodeInvalidArgument},
	}
	for name, c := range cases {
		s.later()
		if _, err := s.put(c.m, c.blob, c.change); connect.CodeOf(err) != c.code {
			t.Errorf("%s: %v", name, err)
		}
		if f := s.files(); len(f) != 0 {
			t.Errorf("%s leaves %v", name, f)
		}
	}
	if _, err := s.put(a, blob, nil); err != nil || len(s.files()) != 1 {
		t.Errorf("the good one: %v", err)
	}
	// Too often.
	if _, err := s.put(a, s.sealed(a, "shop-7", "more", s.public), nil); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("twice in a minute: %v", err)
	}
}

func TestEscrowKeepsTheNewestOfEachNode(t *testing.T) {
	s := newVaultShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	first, err := s.put(b, s.sealed(b, "shop-7", "b", s.public), nil)
	s.must(err)
	var ids []string
	for i := range escrowPerNode + 3 {
		s.later()
		out, err := s.put(a, s.sealed(a, "shop-7", strings.Repeat("x", i+1), s.public), nil)
		s.must(err)
		ids = append(ids, out.Id)
	}
	files := s.files()
	if len(files) != escrowPerNode+1 {
		t.Errorf("%d files", len(files))
	}
	keep := append([]string{first.Id}, ids[len(ids)-escrowPerNode:]...)
	for _, id := range keep {
		if !contains(files, id) {
			t.Errorf("%s is gone: a node pushed out another's, or the wrong ones went", id)
		}
	}
	// The site's share is used up: nothing goes for it, and the newcomer waits.
	s.s.vault.perSite = 10
	s.later()
	if _, err := s.put(b, s.sealed(b, "shop-7", "bb", s.public), nil); connect.CodeOf(err) != connect.CodeResourceExhausted || len(s.files()) != escrowPerNode+1 {
		t.Errorf("%v, %d files", err, len(s.files()))
	}
}

func TestRubbishOfACrashGoesAtTheStart(t *testing.T) {
	s := newVaultShop(t)
	a := s.join("a", "shop-7")
	blob := s.sealed(a, "shop-7", "data", s.public)
	out, err := s.put(a, blob, nil)
	s.must(err)
	for _, name := range []string{tmpPrefix + "1", fleet.EscrowID([32]byte{9})} {
		s.must(os.WriteFile(s.s.vault.path(DefaultTenant, name), []byte("x"), 0o600))
	}
	n, err := s.s.vault.tidy(context.Background(), s.s.store, DefaultTenant)
	if err != nil || n != 2 || len(s.files()) != 1 || s.files()[0] != out.Id {
		t.Errorf("%d removed, %v left, %v", n, s.files(), err)
	}
	// A file that was lost is taken again.
	s.must(os.Remove(s.s.vault.path(DefaultTenant, out.Id)))
	s.later()
	if again, err := s.put(a, blob, nil); err != nil || again.Id != out.Id || len(s.files()) != 1 {
		t.Error(again, err, s.files())
	}
	var rows []fleet.EscrowBlob
	s.must(s.s.store.View(context.Background(), func(r store.Reader) (err error) {
		rows, err = r.EscrowAfter(DefaultTenant, "", 10)
		return err
	}))
	if len(rows) != 1 {
		t.Errorf("%d rows", len(rows))
	}
}
