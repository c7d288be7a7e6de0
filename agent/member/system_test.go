package member

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/turns"
)

func TestATurnIsAskedOfOneServerAfterTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		defer w.allOff()
		w.nodes[0].powerOn()
		w.until(time.Minute, "a member", func() bool { return w.nodes[0].member() != nil })
		ask := turns.Ask{Phase: turns.Judging}
		if r, err := w.nodes[0].member().AskTurn(t.Context(), ask); err == nil || r.Go {
			t.Error("a turn without a cluster", r)
		}
		w.nodes[1].powerOn()
		w.nodes[2].powerOn()
		w.until(10*time.Minute, "three servers", func() bool { return w.servers(3) })
		w.until(time.Minute, "word of the two others' role", func() bool {
			obs, _ := w.nodes[0].member().Observation()
			heard := 0
			for _, p := range obs.Peers {
				if p.Status != nil && p.Status.Role == cb.RoleServer && p.Status.Record != nil {
					heard++
				}
			}
			return heard == 2
		})
		asks := func(gives fleet.NodeID) (turns.Reply, int, error) {
			w.mu.Lock()
			w.gives, w.asked = gives, nil
			w.mu.Unlock()
			r, err := w.nodes[0].member().AskTurn(t.Context(), ask)
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, x := range w.asked {
				if x == w.nodes[0].id {
					t.Error("it asked itself")
				}
			}
			return r, len(w.asked), err
		}
		for _, x := range w.nodes[1:] {
			if r, n, err := asks(x.id); err != nil || !r.Go || n > 2 {
				t.Errorf("%s: %+v after %d, %v", x.id, r, n, err)
			}
		}
		if r, n, err := asks(""); err == nil || r.Go || n != 2 || !strings.Contains(err.Error(), "does not answer here") {
			t.Errorf("%+v after %d, %v", r, n, err)
		}
	})
}

func TestTheDiskKeyGoesToTheCentreAndToOnePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		defer w.allOff()
		for _, x := range w.nodes {
			x.powerOn()
		}
		w.until(10*time.Minute, "three servers", func() bool { return w.servers(3) })
		_, public, err := escrow.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		m := w.nodes[0].member()
		sealed := func(kind string, of fleet.NodeID) []byte {
			h := escrow.Header{Kind: kind, Tenant: "acme", Site: "hall-1", Node: of, Taken: w.nodes[0].member().cfg.Clock.Now().UTC()}
			if kind == escrow.KindSnapshot {
				h.Cluster = w.grant.UID
			}
			var b bytes.Buffer
			if _, err := escrow.Seal(&b, strings.NewReader("key"), public, h); err != nil {
				t.Fatal(err)
			}
			return b.Bytes()
		}
		at := func() (peers, centre int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, x := range w.nodes {
				peers += len(x.kept)
			}
			return peers, len(w.uploaded)
		}
		for _, blob := range [][]byte{[]byte("soup"), sealed(escrow.KindDiskKey, w.nodes[1].id), sealed(escrow.KindSnapshot, w.nodes[0].id)} {
			if c, p, err := m.EscrowDiskKey(t.Context(), blob); err == nil || c || p {
				t.Error("it gave away what is no key of this node")
			}
		}
		p0, c0 := at()
		key := sealed(escrow.KindDiskKey, w.nodes[0].id)
		if c, p, err := m.EscrowDiskKey(t.Context(), key); err != nil || !c || !p {
			t.Errorf("%v %v %v", c, p, err)
		}
		if p, c := at(); p != p0+1 || c != c0+1 {
			t.Errorf("%d and %d copies more", p-p0, c-c0)
		}
		w.mu.Lock()
		w.centre = false
		w.mu.Unlock()
		if c, p, err := m.EscrowDiskKey(t.Context(), key); err == nil || c || !p {
			t.Errorf("the centre is away: %v %v %v", c, p, err)
		}
	})
}
