package service_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
)

// from is a client on one connection from an address of its own.
func (c *centre) from(source net.IP) (*wire, error) {
	roots := x509.NewCertPool()
	roots.AddCert(c.ca.root)
	raw, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: source}}).Dial("tcp", c.addr)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13, Time: c.store.Now, NextProtos: []string{"http/1.1"}})
	if err := conn.Handshake(); err != nil {
		raw.Close()
		return nil, err
	}
	state := conn.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(enroll.ExporterLabel, nil, enroll.ExporterLength)
	if err != nil {
		return nil, err
	}
	var used atomic.Bool
	transport := &http.Transport{MaxConnsPerHost: 1, DisableCompression: true, DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
		if used.Swap(true) {
			return nil, fmt.Errorf("the connection is lost")
		}
		return conn, nil
	}}
	return &wire{exporter: exporter, close: func() { transport.CloseIdleConnections(); conn.Close() },
		rpc: musterv1connect.NewEnrollmentServiceClient(&http.Client{Transport: transport}, c.url, connect.WithAcceptCompression("gzip", nil, nil))}, nil
}

// soft enrolls a software TPM once; busy is how long it is told to wait, 0 if
// it was filed.
func (c *centre) soft(ctx context.Context, tpm *softTPM, source net.IP) (busy time.Duration, err error) {
	w, err := c.from(source)
	if err != nil {
		return 10 * time.Millisecond, nil // the connection was not taken: again
	}
	defer w.close()
	wait := func(err error) (time.Duration, error) {
		if connect.CodeOf(err) != connect.CodeUnavailable {
			return 0, err
		}
		var e *connect.Error
		n := 1
		if ok := errors.As(err, &e); ok {
			if v, perr := strconv.Atoi(e.Meta().Get("Retry-After")); perr == nil && v > 0 {
				n = v
			}
		}
		return time.Duration(n) * time.Second, nil
	}
	challenge, err := w.rpc.Begin(ctx, tpm.begin())
	if err != nil {
		return wait(err)
	}
	m, err := tpm.complete(challenge, w.exporter)
	if err != nil {
		return 0, err
	}
	if _, err := w.rpc.Complete(ctx, m); err != nil {
		return wait(err)
	}
	return 0, nil
}

// storm starts hostile machines: senders connections from addresses of their
// own, that begin rate times a second together and prove nothing.
func (c *centre) storm(ctx context.Context, t testing.TB, senders, rate int) (begun, refused *atomic.Int64, stop func()) {
	begun, refused = new(atomic.Int64), new(atomic.Int64)
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	shots := make(chan struct{}, rate)
	all.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			for range rate / 100 {
				select {
				case shots <- struct{}{}:
				default: // nobody is free to send it
				}
			}
		}
	})
	lies := make([]*musterv1.BeginRequest, 32)
	for i := range lies {
		lies[i] = newSoftTPM(t).begin()
	}
	for i := range senders {
		all.Go(func() {
			var w *wire
			defer func() {
				if w != nil {
					w.close()
				}
			}()
			for {
				select {
				case <-ctx.Done():
					return
				case <-shots:
				}
				if w == nil {
					var err error
					if w, err = c.from(net.IPv4(127, 66, byte(i>>8), byte(i))); err != nil {
						refused.Add(1)
						w = nil
						continue
					}
				}
				begun.Add(1)
				if _, err := w.rpc.Begin(ctx, lies[i%len(lies)]); err != nil && ctx.Err() == nil {
					refused.Add(1)
					if connect.CodeOf(err) != connect.CodeUnavailable || !isRetry(err) {
						w.close()
						w = nil
					}
				}
			}
		})
	}
	return begun, refused, func() { cancel(); all.Wait() }
}

func isRetry(err error) bool {
	var e *connect.Error
	return errors.As(err, &e) && e.Meta().Get("Retry-After") != ""
}

// 200 boxes are switched on in one second while hostile machines begin and
// prove nothing, a thousand a second as far as the test's own host can make
// them (the log says how many came): each honest one is filed, none of the others
// is, and memory stays where it was. The TPMs are software in Go (softTPM),
// because 200 swtpm processes take longer than the storm.
func TestTwoHundredBoxesInAStorm(t *testing.T) {
	if testing.Short() {
		t.Skip("a storm of some seconds")
	}
	const boxes, rate = 200, 1000
	c := newCentre(t, options{})
	tpms := make([]*softTPM, boxes)
	for i := range tpms {
		tpms[i] = newSoftTPM(t)
	}
	begun, refused, stop := c.storm(t.Context(), t, 600, rate)
	deadline := time.Now().Add(time.Minute)
	for begun.Load() < rate {
		if time.Now().After(deadline) {
			t.Fatal("the storm does not begin")
		}
		runtime.Gosched()
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	took := make([]time.Duration, boxes)
	again := atomic.Int64{}
	var all sync.WaitGroup
	begin := make(chan struct{})
	for i, tpm := range tpms {
		all.Go(func() {
			<-begin
			started := time.Now()
			for {
				busy, err := c.soft(t.Context(), tpm, net.IPv4(127, 2, byte(i>>6), byte(i)))
				if err != nil {
					t.Errorf("box %d: %v", i, err)
					return
				}
				if busy == 0 {
					break
				}
				again.Add(1)
				timer := time.NewTimer(busy)
				select {
				case <-timer.C:
				case <-t.Context().Done():
					return
				}
			}
			took[i] = time.Since(started)
		})
	}
	close(begin)
	all.Wait()
	during := heap()
	stop()
	after := heap()
	requests, err := c.store.Requests()
	must(t, err)
	if len(requests) != boxes {
		t.Errorf("%d requests for %d boxes", len(requests), boxes)
	}
	if after > before+32<<20 {
		t.Errorf("the heap grew from %d to %d MiB", before>>20, after>>20)
	}
	if refused.Load() == begun.Load() {
		t.Error("no hostile begin was answered: the storm was none")
	}
	slices.Sort(took)
	t.Logf("%d boxes filed, p50 %v, p99 %v, %d came back after busy; %d hostile begins, %d refused; heap %d, %d, %d MiB", len(requests),
		took[boxes/2].Round(time.Millisecond), took[boxes*99/100].Round(time.Millisecond), again.Load(), begun.Load(), refused.Load(), before>>20, during>>20, after>>20)
}

// The twin: a box whose TPM signs something else is not filed, storm or not.
func TestSoftTPMThatLiesIsNotFiled(t *testing.T) {
	c := newCentre(t, options{})
	for what, spoil := range map[string]func(*softTPM){
		"another AK signs":       func(s *softTPM) { s.ak = newSoftTPM(t).ak },
		"another LDevID":         func(s *softTPM) { s.ldevid = newSoftTPM(t).ldevid },
		"another PCR than given": func(s *softTPM) { s.pcrs[4] = make([]byte, 31) },
	} {
		s := newSoftTPM(t)
		spoil(s)
		if _, err := c.soft(t.Context(), s, net.IPv4(127, 0, 0, 1)); err == nil {
			t.Errorf("%s, and it is filed", what)
		}
	}
	c.none()
	if busy, err := c.soft(t.Context(), newSoftTPM(t), net.IPv4(127, 0, 0, 1)); err != nil || busy != 0 {
		t.Errorf("an honest one: %v", err)
	}
	c.only()
}
