package member

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
)

// TestThreeNodesBecomeThreeServers is the ordinary life of a site: one founds,
// two join, both become servers, and at rest there are three votes.
func TestThreeNodesBecomeThreeServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		defer w.allOff()
		for _, x := range w.nodes {
			x.powerOn()
		}
		w.until(10*time.Minute, "three confirmed servers", func() bool {
			w.mu.Lock()
			l := w.etcd.ledger
			w.mu.Unlock()
			for _, x := range w.nodes {
				if x.j.Disk().Role != cb.RoleServer || l == nil || len(l.Record.Servers) != 3 {
					return false
				}
			}
			return true
		})
		time.Sleep(time.Minute)
		for _, x := range w.nodes {
			if s := x.shown(); s.Blocker != cb.NoBlocker || s.State != cb.Server {
				t.Errorf("%s: %+v", x.id, s)
			}
			if x.mark != w.grant.UID || x.marks != 1 {
				t.Errorf("%s: mark %q written %d times, want %q once", x.id, x.mark, x.marks, w.grant.UID)
			}
			if len(x.applied.Peers) != 2 || !x.applied.Self.IsValid() {
				t.Errorf("%s: network %+v", x.id, x.applied)
			}
			for in, lan := range x.applied.Peers {
				if !lan.IsValid() {
					t.Errorf("%s: no way to %s", x.id, in)
				}
			}
		}
	})
}

// servers reports whether all nodes are confirmed servers of one ledger.
func (w *world) servers(n int) bool {
	w.mu.Lock()
	l := w.etcd.ledger
	w.mu.Unlock()
	if l == nil || len(l.Record.Servers) != n {
		return false
	}
	have := 0
	for _, x := range w.nodes {
		if x.m != nil && x.j.Disk().Role == cb.RoleServer {
			have++
		}
	}
	return have == n
}

// TestPowerCuts cuts the power of any node at any write, again and again: what
// was acknowledged is there after the restart, nothing is shown before it is
// flushed, there is one cluster, and the site ends with three servers.
func TestPowerCuts(t *testing.T) {
	seeds := 12
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) { powerCuts(t, uint64(seed)) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func powerCuts(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 7))
	w := newWorld(t, 3)
	defer w.allOff()
	cuts := 12
	for _, x := range w.nodes {
		x.cutAt = func(string) bool {
			if cuts == 0 || rng.IntN(8) != 0 {
				return false
			}
			cuts--
			return true
		}
		x.powerOn()
	}
	uids := map[string]bool{}
	for end := time.Now().Add(2 * time.Hour); ; time.Sleep(500 * time.Millisecond) {
		for _, x := range w.nodes {
			if !x.dead {
				continue
			}
			x.off(true)
			time.Sleep(time.Duration(rng.IntN(40)) * time.Second)
			x.powerOn()
		}
		w.mu.Lock()
		if l := w.etcd.ledger; l != nil {
			uids[l.Record.UID] = true
		}
		w.mu.Unlock()
		if len(uids) > 1 {
			t.Fatalf("clusters %v", uids)
		}
		if w.servers(3) { // at rest nothing is written
			return
		}
		if time.Now().After(end) {
			for _, x := range w.nodes {
				t.Logf("%s: %+v %v", x.id, x.shown(), x.m.Report().Problems)
			}
			t.Fatalf("seed %d: the site did not get there", seed)
		}
	}
}
