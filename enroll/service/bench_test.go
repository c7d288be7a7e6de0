package service_test

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/internal/dev/benchrow"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/stepca"
)

func processorTime() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// TestBenchEnroll: attested enrollments per processor second, beside the
// plain signing of the embedded step-ca, which is all a CA without
// attestation does.
func TestBenchEnroll(t *testing.T) {
	part := benchrow.Begin(t, "enroll")
	dir := filepath.Join(t.TempDir(), "ca")
	now := time.Now()
	_, err := stepca.Init(dir, stepca.Options{Now: now})
	must(t, err)
	ca, err := stepca.Open(dir)
	must(t, err)
	c := newCentre(t, options{config: func(cfg *service.Config) { cfg.Limits.PerMinute = -1 }})
	const n = 200
	row := benchrow.Row{What: "attested enrollments (TLS, begin, credential, proof, verdict, filing in memory) beside plain certificate signing", Unit: "per processor second",
		Peer: "step-ca v0.30.2 (embedded), signing a checked key", Note: "of ours, both ends of TLS are counted, and the software TPM's own work is subtracted; a verdict on a TPM cannot be as cheap as one signature"}
	for range 5 {
		tpms := make([]*softTPM, n)
		for i := range tpms {
			tpms[i] = newSoftTPM(t)
		}
		// What the machine alone does.
		w, err := c.from(net.IPv4(127, 0, 0, 1))
		must(t, err)
		challenge, err := w.rpc.Begin(t.Context(), tpms[0].begin())
		must(t, err)
		began := processorTime()
		for range n {
			_, err := tpms[0].complete(challenge, w.exporter)
			must(t, err)
		}
		machine := processorTime() - began
		w.close()
		began = processorTime()
		for _, s := range tpms {
			busy, err := c.soft(t.Context(), s, net.IPv4(127, 0, 0, 1))
			must(t, err)
			if busy != 0 {
				t.Fatal("busy")
			}
		}
		row.Ours = append(row.Ours, n/(processorTime()-began-machine))
		began = processorTime()
		for _, s := range tpms {
			_, _, _, _, err := ca.IssueNode(t.Context(), pki.NodeProfile{Tenant: "default", Site: "shop-1", Node: "n-aaaaaaaaaaaaaaaaaaaaaaaa", Public: s.ldevid.Public(), Now: now})
			must(t, err)
		}
		row.Theirs = append(row.Theirs, n/(processorTime()-began))
	}
	part.Add(t, row)
}

// TestBenchStorm: how long an honest machine's calls take at the centre while
// hostile machines begin and prove nothing: 1,000 a second are aimed at, the
// row says how many came.
func TestBenchStorm(t *testing.T) {
	part := benchrow.Begin(t, "storm")
	var mu sync.Mutex
	took := map[string][]time.Duration{}
	c := newCentre(t, options{server: func(s *http.Server) {
		inner := s.Handler
		s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			began := time.Now()
			inner.ServeHTTP(w, r)
			if strings.HasPrefix(r.RemoteAddr, "127.2.") {
				mu.Lock()
				took["handler"] = append(took["handler"], time.Since(began))
				mu.Unlock()
			}
		})
	}})
	measure := func(what string, hostile bool) {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		before := m.HeapAlloc
		note, stop := "", func() {}
		if hostile {
			begun, refused, end := c.storm(t.Context(), t, 600, 1000)
			began := time.Now()
			stop = func() {
				n, r := begun.Load(), refused.Load()
				s := time.Since(began).Seconds()
				end()
				note = fmt.Sprintf("; %.0f hostile begins/s reached the centre (%.0f/s refused), made on the same two cores", float64(n)/s, float64(r)/s)
			}
			for begun.Load() < 2000 {
				runtime.Gosched()
			}
		}
		mu.Lock()
		took["handler"] = nil
		mu.Unlock()
		var whole []time.Duration
		again := 0
		for i := range 100 {
			s := newSoftTPM(t)
			began := time.Now()
			for {
				busy, err := c.soft(t.Context(), s, net.IPv4(127, 2, 1, byte(i)))
				must(t, err)
				if busy == 0 {
					break
				}
				again++
			}
			whole = append(whole, time.Since(began))
		}
		stop()
		runtime.GC()
		runtime.ReadMemStats(&m)
		mu.Lock()
		handler := took["handler"]
		mu.Unlock()
		slices.Sort(handler)
		slices.Sort(whole)
		at := func(v []time.Duration, p int) float64 { return v[(len(v)-1)*p/100].Seconds() }
		part.Add(t, benchrow.Row{What: what + ": p99 of a call at the centre", Unit: "s", Less: true, Ours: []float64{at(handler, 99)},
			Note: fmt.Sprintf("p50 %.3f s; a whole enrollment p50 %.2f s, p99 %.2f s; %d answers were \"busy\"; heap %d to %d MiB%s", at(handler, 50), at(whole, 50), at(whole, 99), again, before>>20, m.HeapAlloc>>20, note)})
	}
	measure("100 honest machines one after the other, no attack", false)
	measure("the same during an attack that aims at 1,000 begins/s", true)
}
