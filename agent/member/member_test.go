package member

import (
	"bytes"
	"cmp"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
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
	seeds, err := strconv.Atoi(cmp.Or(os.Getenv("CUTS"), "12"))
	if err != nil {
		t.Fatal(err)
	}
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
	var dice sync.Mutex // the agents write side by side
	for _, x := range w.nodes {
		x.cutAt = func(string) bool {
			dice.Lock()
			defer dice.Unlock()
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
			if !x.dead.Load() {
				continue
			}
			x.off(true)
			dice.Lock()
			pause := time.Duration(rng.IntN(40)) * time.Second
			dice.Unlock()
			time.Sleep(pause)
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

// TestWithoutTheCentre: a node asks for ever, says why it waits, and founds as
// soon as the centre answers.
func TestWithoutTheCentre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		defer w.allOff()
		w.centre = false
		x := w.nodes[0]
		x.powerOn()
		time.Sleep(3 * time.Hour)
		if s := x.shown(); s.Blocker != cb.CentreUnreachable || s.Reason == "" {
			t.Fatalf("%+v", s)
		}
		if x.m.Report().Problems["answer to ask-grant"] == "" {
			t.Error("the status does not say that the centre fails")
		}
		w.mu.Lock()
		w.centre = true
		w.mu.Unlock()
		w.until(time.Minute, "a server", func() bool { return x.j.Disk().Role == cb.RoleServer })
		w.until(2*time.Minute, "the old failure is forgotten", func() bool { return len(x.m.Report().Problems) == 0 })
	})
}

// TestAForgottenCluster: the centre says that this node founded a cluster of
// which it knows nothing. It must not found another one.
func TestAForgottenCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		defer w.allOff()
		x := w.nodes[0]
		w.grant = Grant{Node: x.id, UID: "old"}
		w.etcd.ledger = &cb.Ledger{Record: cb.Record{UID: "old"}}
		x.powerOn()
		time.Sleep(time.Hour)
		if d := x.j.Disk(); d.Intent != nil || x.marks > 0 {
			t.Fatalf("it founded: %+v", d)
		}
		if s := x.shown(); !s.Blocker.NeedsPerson() {
			t.Errorf("nobody is asked: %+v", s)
		}
	})
}

// promoted starts a world and waits for three servers.
func promoted(t *testing.T, n int) *world {
	w := newWorld(t, n)
	for _, x := range w.nodes {
		x.powerOn()
	}
	w.until(10*time.Minute, "three servers", func() bool { return w.servers(3) })
	return w
}

// TestACandidateDiesInTheWindow: the founder loses quorum, waits until the
// lease has certainly ended, resets to its own data, and takes the other back
// as a worker that holds no server token.
func TestACandidateDiesInTheWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		defer w.allOff()
		for _, x := range w.nodes {
			x.powerOn()
		}
		two := func() bool { // one has a vote, none is confirmed
			w.mu.Lock()
			defer w.mu.Unlock()
			return len(w.etcd.voters) == 2
		}
		w.until(10*time.Minute, "two votes", two)
		byID := func(id fleet.NodeID) *node {
			return w.nodes[slices.IndexFunc(w.nodes, func(x *node) bool { return x.id == id })]
		}
		founder, dies := byID(w.etcd.voters[0]), byID(w.etcd.voters[1])
		stays := w.nodes[3-founder.i-dies.i]
		dies.off(true)
		stays.off(true) // both at once: quorum is gone
		lost := time.Now()
		w.until(10*time.Minute, "a reset", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return slices.Contains(founder.k3s.calls, "reset")
		})
		if d := time.Since(lost); d < 30*time.Second {
			t.Errorf("reset after %s: a lease may still have run", d)
		}
		w.until(time.Minute, "epoch 2", func() bool {
			d := founder.j.Disk()
			return d.Record != nil && d.Record.Epoch == 2 && d.Reset == nil && d.Lead == nil
		})
		stays.powerOn()
		w.until(10*time.Minute, "a worker again", func() bool { return stays.j.Disk().Role == cb.RoleWorker && stays.j.Disk().Record.Epoch == 2 })
		w.until(time.Minute, "no server token on a worker", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return !stays.k3s.server
		})
	})
}

// TestAMovedMachine: a new LAN address is written down and becomes a route.
func TestAMovedMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := promoted(t, 3)
		defer w.allOff()
		x, y := w.nodes[0], w.nodes[1]
		in := netip.MustParseAddr("100.96.0.2")
		y.off(true)
		w.mu.Lock()
		y.ip = netip.MustParseAddr("198.51.100.7")
		w.mu.Unlock()
		y.powerOn()
		w.until(5*time.Minute, "the route", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return x.applied.Peers[in] == y.ip
		})
		if got := x.j.Disk().Addrs[y.id]; got != y.ip.String() {
			t.Errorf("journal says %s", got)
		}
		w.until(5*time.Minute, "a server again", func() bool { return y.shown().State == cb.Server && y.shown().Blocker == "" })
	})
}

// TestARemovedNode stops its k3s, and nobody talks to it any more.
func TestARemovedNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := promoted(t, 4)
		defer w.allOff()
		var x, server *node
		w.until(time.Minute, "a worker", func() bool {
			for _, y := range w.nodes {
				switch y.j.Disk().Role {
				case cb.RoleWorker:
					x = y
				case cb.RoleServer:
					server = y
				}
			}
			return x != nil
		})
		server.papers.merge(cb.Documents{Removals: []fleet.Removal{{Node: x.id, Incarnation: 1}}})
		w.until(time.Minute, "it stopped", func() bool {
			w.mu.Lock()
			proc := x.k3s.proc
			w.mu.Unlock()
			return x.shown().State == cb.Removed && proc == cb.ProcessNone
		})
		w.until(time.Minute, "it is forgotten", func() bool {
			for _, p := range server.m.Report().Peers {
				if p.Node == x.id {
					return false
				}
			}
			return true
		})
	})
}

// TestABrokenDiskAndTPM: what cannot be known is said, and nothing is done.
func TestABrokenDiskAndTPM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		defer w.allOff()
		x := w.nodes[0]
		x.markErr = errors.New("the TPM is deaf")
		x.powerOn()
		time.Sleep(time.Minute)
		if s := x.shown(); s.Blocker != NodeFault || !strings.Contains(s.Reason, "deaf") || !x.m.Report().NeedsPerson {
			t.Fatalf("%+v", s)
		}
		if x.j.Disk().Intent != nil || len(x.k3s.calls) > 0 {
			t.Fatal("it acted without knowing whether it is a member")
		}
		w.mu.Lock()
		x.markErr = nil
		w.mu.Unlock()
		w.until(time.Minute, "a server", func() bool { return x.j.Disk().Role == cb.RoleServer })
	})
}

// TestTheFirstFailureEndsTheList: while k3s cannot be started nothing after it
// happens, and the status says what does not work.
func TestTheFirstFailureEndsTheList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		defer w.allOff()
		for _, x := range w.nodes {
			x.k3s.broken = map[string]error{"write-ledger": errors.New("etcd is slow")}
			x.powerOn()
		}
		time.Sleep(5 * time.Minute)
		for _, x := range w.nodes {
			if d := x.j.Disk(); d.Role != cb.RoleNone || d.Record != nil {
				t.Errorf("%s: %+v", x.id, d)
			}
		}
		founder := w.nodes[slices.IndexFunc(w.nodes, func(x *node) bool { return x.j.Disk().Intent != nil })]
		if p := founder.m.Report().Problems["write-ledger"]; !strings.Contains(p, "etcd is slow") {
			t.Errorf("problems: %v", founder.m.Report().Problems)
		}
		tries := 0
		for _, c := range founder.k3s.calls {
			if c == "write-ledger" {
				tries++
			}
		}
		if tries < 10 || tries > 1000 {
			t.Errorf("%d tries in five minutes", tries)
		}
		w.mu.Lock()
		founder.k3s.broken = nil
		w.mu.Unlock()
		w.until(time.Minute, "a server", func() bool { return founder.j.Disk().Role == cb.RoleServer })
	})
}

// TestADissolvedClusterWasVirgin: something was put into the cluster between
// the look and the write.
func TestADissolvedClusterWasVirgin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := promoted(t, 3)
		defer w.allOff()
		x := w.nodes[0]
		l := *w.etcd.ledger
		l.Record.Into = "other"
		for _, c := range []struct {
			virgin bool
			order  string
			want   bool
		}{{false, "", false}, {false, "o-1", true}, {true, "", true}} {
			w.mu.Lock()
			w.etcd.virgin = c.virgin
			l.Version = w.etcd.version
			w.mu.Unlock()
			err := x.m.writeLedger(t.Context(), cb.Action{Ledger: &l, Order: c.order})
			if (err == nil) != c.want {
				t.Errorf("virgin %v, order %q: %v", c.virgin, c.order, err)
			}
			w.mu.Lock() // undo
			back := *w.etcd.ledger
			back.Record.Into = ""
			w.etcd.ledger = &back
			w.mu.Unlock()
		}
	})
}

// TestLeaseCountsFromTheSending: what the launcher gets is what the planner
// believes, and no longer than what the leader gave.
func TestLeaseCountsFromTheSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		defer w.allOff()
		for _, x := range w.nodes {
			x.powerOn()
		}
		var c *node
		w.until(10*time.Minute, "a candidate", func() bool {
			for _, x := range w.nodes {
				if x.j.Disk().Role == cb.RoleCandidate && x.m.holds(x.j.Disk().Step.Plan) {
					c = x
				}
			}
			return c != nil
		})
		c.m.mu.Lock()
		l := c.m.lease
		now := c.m.mono()
		c.m.mu.Unlock()
		if left := l.Until - now; left > 30*time.Second {
			t.Errorf("a lease of %s", left)
		}
		w.mu.Lock()
		file := c.k3s.lease
		w.mu.Unlock()
		if want := c.m.born + l.Until; file != want {
			t.Errorf("the launcher has %s, the planner %s", file, want)
		}
	})
}

// TestSealedCopies: with an escrow key in the charter the promotion ends only
// when a sealed copy is elsewhere, further copies follow, and only the
// operator's key opens them.
func TestSealedCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		private, public, err := escrow.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		w := newWorld(t, 3)
		defer w.allOff()
		w.charter.EscrowKey = public
		for _, x := range w.nodes {
			x.powerOn()
		}
		w.until(10*time.Minute, "three servers", func() bool { return w.servers(3) })
		copies := func() (peers, centre int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, x := range w.nodes {
				peers += len(x.kept)
			}
			return peers, len(w.uploaded)
		}
		w.until(time.Minute, "copies", func() bool { p, c := copies(); return p >= 1 && c >= 1 })
		w.mu.Lock()
		blob := w.uploaded[0]
		w.centre = false
		w.mu.Unlock()
		if bytes.Contains(blob, []byte("server-token")) {
			t.Error("the token is readable in the blob")
		}
		var plain bytes.Buffer
		h, c, err := escrow.OpenSnapshot(&plain, bytes.NewReader(blob), private)
		if err != nil || plain.String() != "etcd" || c.Token != "server-token\nagent-token" || h.Cluster != w.grant.UID || h.Epoch != 1 {
			t.Fatalf("%+v %v %q, %v", h, c, plain.String(), err)
		}
		before, _ := copies()
		time.Sleep(3*time.Hour + 10*time.Minute)
		after, _ := copies()
		if n := (after - before) / escrowCopies; n < 3 || n > 5 {
			t.Errorf("%d copies in three hours", n)
		}
	})
}

// TestACopyThatNobodyTakes: it is tried again now and then, and the reason is
// told.
func TestACopyThatNobodyTakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, public, err := escrow.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		w := newWorld(t, 1)
		defer w.allOff()
		w.charter.EscrowKey = public
		x := w.nodes[0]
		x.powerOn()
		w.until(time.Minute, "a server", func() bool { return x.j.Disk().Role == cb.RoleServer })
		w.mu.Lock()
		w.centre = false
		w.mu.Unlock()
		w.until(10*time.Minute, "the failure is told", func() bool {
			return strings.Contains(x.m.Report().Problems["take-snapshot"], "does not answer")
		})
		time.Sleep(time.Hour)
		w.mu.Lock()
		n := w.etcd.snapshots
		w.centre = true
		w.mu.Unlock()
		if n < 5 || n > 8 {
			t.Errorf("%d snapshots in an hour in which none could be kept elsewhere", n)
		}
		w.until(11*time.Minute, "the centre has one", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return len(w.uploaded) > 0
		})
	})
}
