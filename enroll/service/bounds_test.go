package service

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
)

// poison is a store that must not be touched.
type poison struct{ t testing.TB }

func (p poison) File(context.Context, enroll.Filing) (fleet.Request, error) {
	p.t.Error("File was called")
	return fleet.Request{}, ErrNotFound
}

func (p poison) Request(context.Context, string, fleet.RequestID) (fleet.Request, error) {
	p.t.Error("Request was called")
	return fleet.Request{}, ErrNotFound
}

func (p poison) Live(context.Context, string, fleet.NodeID) (fleet.Request, error) {
	p.t.Error("Live was called")
	return fleet.Request{}, ErrNotFound
}

func (p poison) Issue(context.Context, string, fleet.RequestID, func(fleet.Request) (enroll.Issued, error)) (enroll.Issued, error) {
	p.t.Error("Issue was called")
	return enroll.Issued{}, ErrNotFound
}

func (p poison) Denied(context.Context, string, []fleet.EKHash) (bool, error) {
	p.t.Error("Denied was called")
	return false, ErrNotFound
}

func (p poison) Changed(fleet.RequestID) (<-chan struct{}, func()) {
	p.t.Error("Changed was called")
	return nil, func() {}
}

type noIssuer struct{}

func (noIssuer) IssueNode(context.Context, pki.NodeProfile) (enroll.Certificate, error) {
	return enroll.Certificate{}, errors.New("no issuer")
}

func poisoned(t testing.TB, edit func(*Config)) *Service {
	cfg := Config{
		Store: poison{t}, Issuer: noIssuer{},
		Policy: func(context.Context, string, time.Time) (pki.Policy, error) { return pki.Policy{}, nil },
	}
	if edit != nil {
		edit(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// bound is the context of a call on a TLS 1.3 connection.
func bound() context.Context {
	return context.WithValue(context.Background(), connectionKey{},
		connection{source: netip.MustParseAddr("192.0.2.1"), exporter: [32]byte{1}, bound: true})
}

// fakeKey writes the public area of a key in software. For an RSA EK any odd
// number will do: nobody proves anything here.
func fakeKey(template tpm2.TPMTPublic) []byte {
	if template.Type == tpm2.TPMAlgRSA {
		n := make([]byte, 256)
		_, _ = rand.Read(n)
		n[0] |= 0x80
		n[255] |= 1
		template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: n})
		return tpm2.Marshal(template)
	}
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p, _ := key.PublicKey.Bytes()
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: p[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: p[33:]},
	})
	return tpm2.Marshal(template)
}

func fakeBegin(rsa bool) *musterv1.BeginRequest {
	ek := tpm2.ECCEKTemplate
	if rsa {
		ek = tpm2.RSAEKTemplate
	}
	return &musterv1.BeginRequest{
		Protocol: Protocol, Eks: []*musterv1.EndorsementKey{{Public: fakeKey(ek), Certificate: make([]byte, 1200)}},
		AkPublic: fakeKey(tpm.AKTemplate(0)), LdevidPublic: fakeKey(tpm.LDevIDTemplate(0)),
	}
}

// A flood of machines that prove nothing reaches no store and leaves nothing
// in memory.
func TestWhenUnprovenMachinesFloodThenNothingIsKept(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n = 2000
	}
	s := poisoned(t, nil)
	begins := make([]*musterv1.BeginRequest, 200)
	for i := range begins {
		begins[i] = fakeBegin(i%2 == 0)
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	flood := func(from, to int) {
		var group sync.WaitGroup
		for w := range runtime.GOMAXPROCS(0) {
			group.Go(func() {
				for i := from + w; i < to; i += runtime.GOMAXPROCS(0) {
					// Each from an address of its own, as a botnet would.
					s.limiter.take(time.Now(), netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
					res, err := s.Begin(bound(), begins[i%len(begins)])
					if err != nil {
						t.Error(err)
						return
					}
					if i%100 != 0 {
						continue
					}
					// And some try to complete with what they got.
					if _, err := s.Complete(bound(), &musterv1.CompleteRequest{Cookie: res.Cookie, Proof: make([]byte, 32)}); connect.CodeOf(err) != connect.CodePermissionDenied {
						t.Errorf("complete without proof: %v", err)
					}
				}
			})
		}
		group.Wait()
	}
	// The table of sources is the one thing that grows, up to its bound: fill
	// it first.
	for i := range s.cfg.Limits.Sources {
		s.limiter.take(time.Now(), netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	started := time.Now()
	flood(0, n/10)
	before := heap()
	flood(n/10, n)
	after := heap()
	t.Logf("%d begins in %v, heap %d KiB -> %d KiB", n, time.Since(started).Round(time.Millisecond), before>>10, after>>10)
	if after > before+4<<20 {
		t.Errorf("the heap grew from %d to %d bytes", before, after)
	}
	if got := len(s.limiter.buckets); got > s.cfg.Limits.Sources {
		t.Errorf("%d sources are remembered", got)
	}
}

// More work than the queue holds is refused, with a time to come back.
func TestWhenOverloadedThenUnavailable(t *testing.T) {
	entered, release := make(chan struct{}, 8), make(chan struct{})
	inner := newMemoryKeys()
	s := poisoned(t, func(c *Config) {
		c.Limits = Limits{Workers: 1, Queue: 1}
		c.Keys = func(ctx context.Context, now time.Time) ([]Key, error) {
			entered <- struct{}{}
			<-release
			return inner.current(ctx, now)
		}
	})
	m := fakeBegin(false)
	done := make(chan error, 2)
	for range 2 {
		go func() { _, err := s.Begin(bound(), m); done <- err }()
	}
	<-entered
	for len(s.begins.waiting) < 2 {
		runtime.Gosched()
	}
	_, err := s.Begin(bound(), m)
	var e *connect.Error
	if !errors.As(err, &e) || e.Code() != connect.CodeUnavailable || e.Meta().Get("Retry-After") == "" {
		t.Errorf("the third: %v", err)
	}
	// Complete has places of its own: it fails for its cookie, not for us.
	go func() { <-entered; close(release) }()
	if _, err := s.Complete(bound(), &musterv1.CompleteRequest{Cookie: []byte("x")}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("complete: %v", err)
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Errorf("who was in the queue: %v", err)
		}
	}
}

// One source has its share, its neighbours theirs; the answer says when.
func TestWhenASourceCallsTooOftenThenUnavailable(t *testing.T) {
	now := time.Unix(1000, 0)
	s := poisoned(t, func(c *Config) {
		c.Limits.PerMinute = 3
		c.Now = func() time.Time { return now }
	})
	_, h := s.Handler()
	call := func(from string) *httptest.ResponseRecorder {
		body, _ := proto.Marshal(fakeBegin(false))
		r := httptest.NewRequest(http.MethodPost, musterv1connect.EnrollmentServiceBeginProcedure, strings.NewReader(string(body)))
		r.Header.Set("Content-Type", "application/proto")
		r.TLS = nil
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	limited := func(w *httptest.ResponseRecorder) bool { return w.Code == http.StatusServiceUnavailable }
	for i := range 4 {
		if w := call("192.0.2.1:1000"); limited(w) != (i == 3) {
			t.Errorf("call %d: %d %s", i, w.Code, w.Body)
		} else if limited(w) {
			if n, err := strconv.Atoi(w.Header().Get("Retry-After")); err != nil || n < 1 || n > 20 {
				t.Errorf("Retry-After %q", w.Header().Get("Retry-After"))
			}
		}
	}
	if limited(call("192.0.2.2:1000")) || limited(call("[2001:db8::1]:1000")) {
		t.Error("a neighbour was limited")
	}
	now = now.Add(20 * time.Second)
	if limited(call("192.0.2.1:1000")) {
		t.Error("still limited after a third of a minute")
	}
	// All addresses of one /64 are one source; of a /24, eight.
	for i := range 4 {
		if got := limited(call("[2001:db8:1::" + strconv.Itoa(i+1) + "]:1")); got != (i == 3) {
			t.Errorf("IPv6 neighbour %d limited: %v", i, got)
		}
	}
	refused := 0
	for i := range 40 {
		if limited(call("198.51.100." + strconv.Itoa(i) + ":1")) {
			refused++
		}
	}
	if refused != 40-3*networkFactor {
		t.Errorf("%d of 40 addresses of one network were refused", refused)
	}
}

// Without TLS 1.3 on the very connection there is nothing to bind to.
func TestWhenThereIsNoTLSThenRefuse(t *testing.T) {
	s := poisoned(t, nil)
	if _, err := s.Begin(context.Background(), fakeBegin(false)); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("begin: %v", err)
	}
	if _, err := s.Complete(context.Background(), &musterv1.CompleteRequest{}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("complete: %v", err)
	}
}

func TestKeysRotate(t *testing.T) {
	now := time.Unix(0, 0)
	m := newMemoryKeys()
	at := func(d time.Duration) []Key {
		k, err := m.current(context.Background(), now.Add(d))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	sealed, err := seal(at(0), ticketDomain, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(at(keyLife), ticketDomain, sealed); err != nil {
		t.Errorf("after one rotation: %v", err)
	}
	if _, err := open(at(keyLife), cookieDomain, sealed); err == nil {
		t.Error("a ticket was opened as a cookie")
	}
	if _, err := open(at(2*keyLife), ticketDomain, sealed); err == nil {
		t.Error("opened after two rotations")
	}
	// Even if the store keeps more keys, two are valid.
	three := append([]Key{{ID: 90}, {ID: 91}}, at(2*keyLife)...)
	old, _ := seal(at(2*keyLife), ticketDomain, []byte("x"))
	if _, err := open(three, ticketDomain, old); err == nil {
		t.Error("opened by the third key")
	}
}

func TestConfigSaysAllThatIsWrong(t *testing.T) {
	_, err := New(Config{Tenant: "No Such", Limits: Limits{Workers: -1}})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"Store", "Issuer", "Policy", "tenant", "limit"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not name %s", err, want)
		}
	}
}
