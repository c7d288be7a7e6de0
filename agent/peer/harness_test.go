package peer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/muster-edge/muster/agent/papers"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/pki/tpm/device"
)

var issued = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// site is a tenant's orders key and what it signed.
type site struct {
	orders  *ecdsa.PrivateKey
	name    string
	charter fleet.Charter
	version uint64
	address int
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newSite(t testing.TB) *site {
	s := &site{orders: newKey(t), name: "hall-1"}
	s.charter = fleet.Charter{Format: fleet.CharterFormat, Tenant: "acme", Site: s.name, Lab: true, AnyBoot: true,
		Founding: fleet.Founding{Mode: fleet.FoundCentral}, Policy: fleet.DefaultPolicy(), Birth: fleet.DefaultBirth(), Issued: issued}
	return s
}

func (s *site) next() fleet.DocVersion { s.version++; return fleet.DocVersion{Epoch: 1, N: s.version} }

func (s *site) sign(t testing.TB, kind string, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	e, err := statement.Sign(kind, b, s.orders)
	if err != nil {
		t.Fatal(err)
	}
	return e.JSON()
}

func (s *site) signCharter(t testing.TB, edit func(*fleet.Charter)) []byte {
	if edit != nil {
		edit(&s.charter)
	}
	s.charter.Version = s.next()
	if err := s.charter.Validate(); err != nil {
		t.Fatal(err)
	}
	return s.sign(t, fleet.CharterPayload, s.charter)
}

func (s *site) admission(t testing.TB, n *node, edit func(*fleet.Admission)) []byte {
	s.address++
	a := fleet.Admission{Format: fleet.AdmissionFormat, Tenant: "acme", Site: s.name, Node: n.id, Incarnation: 1,
		LDevIDKey: n.key[:], MayServe: true, Address: fmt.Sprintf("100.96.%d.%d", s.address/256, s.address%256), Version: s.next(), Issued: issued}
	if edit != nil {
		edit(&a)
	}
	return s.sign(t, fleet.AdmissionPayload, a)
}

func (s *site) removal(t testing.TB, n *node) []byte {
	return s.sign(t, fleet.RemovalPayload, fleet.Removal{Format: fleet.RemovalFormat, Tenant: "acme", Site: s.name, Node: n.id,
		Incarnation: 1, LDevIDKey: n.key[:], Version: s.next(), Issued: issued})
}

// node is one machine of a site: what a node agent would be.
type node struct {
	t      testing.TB
	id     fleet.NodeID
	key    papers.Ref
	signer crypto.Signer
	tpm    TPM
	log    func() ([]byte, error)
	papers *papers.Papers
	peer   *Peer
	addr   string

	mu       sync.Mutex
	seq      uint64
	status   clusterbootstrap.Status
	heard    []clusterbootstrap.Status
	heardAt  []netip.AddrPort
	hints    []Address
	obs      clusterbootstrap.Observation
	notes    int
	onNote   func(*clusterbootstrap.Observation)
	material func() (Material, error)
	at       []Address
}

var _ Node = (*node)(nil)

func (n *node) Status() clusterbootstrap.Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seq++
	s := n.status
	s.Node, s.Seq = n.id, n.seq
	if s.Boots == 0 {
		s.Boots = 1
	}
	return s
}

func (n *node) Heard(_ fleet.NodeID, at netip.AddrPort, s clusterbootstrap.Status) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heard, n.heardAt = append(n.heard, s), append(n.heardAt, at)
}

func (n *node) Hinted(_ fleet.NodeID, at []Address) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hints = append(n.hints, at...)
}

func (n *node) Addresses() []Address { n.mu.Lock(); defer n.mu.Unlock(); return n.at }

func (n *node) Observation() (clusterbootstrap.Observation, clusterbootstrap.Policy) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o := n.obs
	o.Self, o.Docs = n.id, n.papers.Documents()
	return o, clusterbootstrap.Policy{}
}

func (n *node) NoteGrant(fleet.NodeID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.notes++
	if n.onNote != nil {
		n.onNote(&n.obs)
	}
}

func (n *node) Material(_ context.Context, _ fleet.NodeID, as clusterbootstrap.Role, plan string) (Material, error) {
	m, err := n.material()
	m.As, m.Plan = as, plan
	return m, err
}

// noTPM is the TPM of machines that never prove what they run.
type noTPM struct{}

var errNoTPM = errors.New("there is no TPM")

func (noTPM) Identity(context.Context) (device.Identity, error) { return device.Identity{}, errNoTPM }
func (noTPM) ActivateCredential(_, _ []byte) ([]byte, error)    { return nil, errNoTPM }
func (noTPM) Certify([32]byte) (_, _ []byte, _ error)           { return nil, nil, errNoTPM }
func (noTPM) Quote([32]byte, []int) (_, _ []byte, _ map[int][]byte, _ error) {
	return nil, nil, nil, errNoTPM
}

// newNode makes a machine with a key in memory, that nobody has admitted.
func newNode(t testing.TB, s *site) *node {
	t.Helper()
	signer := newKey(t)
	ek, err := fleet.HashEK(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, id: ek.NodeID(), signer: signer, tpm: noTPM{}}
	return n.init(s)
}

func (n *node) init(s *site) *node {
	t := n.t
	t.Helper()
	var err error
	if n.key, err = papers.KeyRef(n.signer.Public()); err != nil {
		t.Fatal(err)
	}
	if n.papers, err = papers.Open(papers.Config{Dir: filepath.Join(t.TempDir(), "papers"), OrdersKeys: []crypto.PublicKey{s.orders.Public()},
		Node: n.id, Key: n.key}); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) learn(envelopes ...[]byte) {
	n.t.Helper()
	if _, err := n.papers.Learn(envelopes); err != nil {
		n.t.Fatal(err)
	}
}

// start runs the node's server on loopback.
func (n *node) start(edit func(*Config)) *node {
	t := n.t
	t.Helper()
	cfg := Config{Self: n.id, Signer: n.signer, Papers: n.papers, Node: n, TPM: n.tpm, EventLog: n.log,
		EscrowDir: filepath.Join(t.TempDir(), "escrow"), Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	if edit != nil {
		edit(&cfg)
	}
	var err error
	if n.peer, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	peer := n.peer // a test may start the node again
	go func() { done <- peer.Run(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return n
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}

// dial opens a connection that ends with the test.
func (n *node) dial(to *node) *Conn {
	n.t.Helper()
	c, err := n.peer.Dial(n.t.Context(), to.addr)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Close() })
	return c
}

// meet dials and says hello.
func (n *node) meet(to *node) *Conn {
	n.t.Helper()
	c := n.dial(to)
	if _, err := c.Hello(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	return c
}

// pair makes a site with two admitted nodes that serve.
func pair(t *testing.T) (s *site, a, b *node) {
	s = newSite(t)
	a, b = newNode(t, s), newNode(t, s)
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil)
	a.learn(charter, forA, forB)
	b.learn(charter, forA, forB)
	a.start(nil)
	b.start(nil)
	return s, a, b
}
