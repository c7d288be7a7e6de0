package member

import (
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
