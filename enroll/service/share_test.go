package service

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// blocked is a body that does not arrive until it is let go.
type blocked struct {
	reading chan<- struct{}
	let     <-chan struct{}
}

func (b blocked) Read([]byte) (int, error) {
	b.reading <- struct{}{}
	<-b.let
	return 0, io.ErrUnexpectedEOF
}

// A network that announces large bodies and does not send them uses its own
// share of memory, not that of all others.
func TestWhenBodiesTrickleThenOthersAreServed(t *testing.T) {
	s := poisoned(t, func(c *Config) { c.Limits.PerMinute = -1 })
	_, h := s.Handler()
	reading, let := make(chan struct{}, 1000), make(chan struct{})
	var group sync.WaitGroup
	answered := make(chan int, 1000)
	const slow = 256 // twice the whole budget
	for range slow {
		group.Go(func() {
			r := httptest.NewRequest(http.MethodPost, musterv1connect.EnrollmentServiceCompleteProcedure, blocked{reading, let})
			r.Header.Set("Content-Type", "application/proto")
			r.ContentLength = maxCompleteBody
			r.RemoteAddr = "192.0.2.1:1000"
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			answered <- w.Code
		})
	}
	held := 0
	for refused := 0; held+refused < slow; {
		select {
		case <-reading:
			held++
		case code := <-answered:
			if code != http.StatusServiceUnavailable {
				t.Fatalf("status %d before a byte arrived", code)
			}
			refused++
		case <-time.After(30 * time.Second):
			t.Fatalf("%d held, %d refused", held, refused)
		}
	}
	if want := int(s.bodies.share / maxCompleteBody); held != want {
		t.Errorf("the network holds %d bodies, want %d", held, want)
	}
	call := func(from string) int {
		body, err := proto.Marshal(fakeBegin(false))
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(http.MethodPost, musterv1connect.EnrollmentServiceBeginProcedure, strings.NewReader(string(body)))
		r.Header.Set("Content-Type", "application/proto")
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	if code := call("198.51.100.1:1000"); code == http.StatusServiceUnavailable {
		t.Error("another network is turned away")
	}
	if code := call("192.0.2.9:1000"); code != http.StatusServiceUnavailable {
		t.Errorf("a neighbour of the slow one: %d, want it to have used the network's share up", code)
	}
	close(let)
	group.Wait()
	if code := call("192.0.2.9:1000"); code == http.StatusServiceUnavailable {
		t.Error("the share did not come back")
	}
	if s.bodies.left != s.cfg.Limits.BodyBytes || len(s.bodies.held) != 0 {
		t.Errorf("%d bytes left, %d networks hold some", s.bodies.left, len(s.bodies.held))
	}
}

// waiting is a store with one request that nobody decides.
type waiting struct {
	poison
	looks chan struct{}
}

func (w waiting) Request(context.Context, string, fleet.RequestID) (fleet.Request, error) {
	w.looks <- struct{}{}
	return fleet.Request{State: fleet.RequestPending, FirstSeen: time.Now()}, nil
}

func (w waiting) Changed(fleet.RequestID) (<-chan struct{}, func()) { return nil, func() {} }

// One proven machine cannot take all places of those who wait.
func TestWhenOneMachineWaitsManyTimesThenOthersCanWait(t *testing.T) {
	w := waiting{poison{t}, make(chan struct{}, 100)}
	s := poisoned(t, func(c *Config) { c.Store = w; c.Limits.LongPolls = pollsPerRequest + 1 })
	one := ticket{tenant: "default", request: fleet.RequestIDOf(enroll.EvidenceDigest(fleet.Evidence{}))}
	two := ticket{tenant: "default", request: fleet.RequestIDOf([32]byte{2})}
	three := ticket{tenant: "default", request: fleet.RequestIDOf([32]byte{3})}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 100)
	wait := func(k ticket) {
		go func() {
			_, err := s.await(ctx, k, time.Hour)
			ended <- err
		}()
		<-w.looks
	}
	for range pollsPerRequest {
		wait(one)
	}
	for _, d := range []time.Duration{0, time.Hour} {
		if _, err := s.await(ctx, one, d); !errors.Is(err, errBusy) {
			t.Errorf("one look too many, waiting %v: %v", d, err)
		}
	}
	wait(two)
	// All places are taken: a third is answered at once.
	if _, err := s.await(ctx, three, time.Hour); err != nil {
		t.Errorf("a third machine: %v", err)
	}
	select {
	case err := <-ended:
		t.Errorf("another machine could not wait: %v", err)
	default:
	}
	cancel()
	for range pollsPerRequest + 1 {
		if err := <-ended; err != context.Canceled {
			t.Errorf("a wait ended with %v", err)
		}
	}
	if s.polls.left != pollsPerRequest+1 || len(s.polls.of) != 0 {
		t.Errorf("places: %d, %v", s.polls.left, s.polls.of)
	}
}
