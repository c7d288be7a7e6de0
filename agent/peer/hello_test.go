package peer

import (
	"errors"
	"testing"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

func TestTwoAdmittedNodesMeet(t *testing.T) {
	_, a, b := pair(t)
	c := a.dial(b)
	g, err := c.Hello(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if g.Node != b.id || c.Peer() != b.id || g.At.String() != b.addr || g.Admission.Node != b.id {
		t.Errorf("the greeting is %+v, want that of %s at %s", g, b.id, b.addr)
	}
	b.status = clusterbootstrap.Status{Role: clusterbootstrap.RoleServer, API: true, Blocker: clusterbootstrap.FewNodes}
	st, _, err := c.Status(t.Context())
	if err != nil || st.Node != b.id || st.Role != clusterbootstrap.RoleServer || !st.API || st.Blocker != clusterbootstrap.FewNodes {
		t.Errorf("%+v, %v", st, err)
	}
	if len(b.heard) != 1 || b.heard[0].Node != a.id || b.heardAt[0].Addr().String() != "127.0.0.1" || b.heardAt[0].Port() != Port {
		t.Errorf("the server heard %+v at %v", b.heard, b.heardAt)
	}
	if len(a.heard) != 1 || a.heardAt[0].String() != b.addr {
		t.Errorf("the caller heard %+v at %v", a.heard, a.heardAt)
	}
}

// A server that has never heard of the caller learns it from what it shows.
func TestWhenTheCallerIsNewThenItsAdmissionIntroducesIt(t *testing.T) {
	s := newSite(t)
	a, b := newNode(t, s), newNode(t, s)
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil)
	a.learn(charter, forA)
	b.learn(charter, forB)
	a.start(nil)
	b.start(nil)
	if _, ok := b.papers.Documents().Admitted(a.id); ok {
		t.Fatal("the server knows the caller already: the test shows nothing")
	}
	c := a.meet(b)
	if _, ok := b.papers.Documents().Admitted(a.id); !ok {
		t.Error("the server has not learned the caller")
	}
	if _, ok := a.papers.Documents().Admitted(b.id); !ok {
		t.Error("the caller has not learned the server")
	}
	if a.papers.Revision() != b.papers.Revision() {
		t.Error("they hold different papers")
	}
	if n, err := c.Exchange(t.Context()); err != nil || n != 0 {
		t.Errorf("there was more to exchange: %d, %v", n, err)
	}
}

// A node that holds no papers at all is given them by a peer that knows it.
func TestWhenTheCallerHasNoPapersThenAPeerGivesThem(t *testing.T) {
	s := newSite(t)
	a, b := newNode(t, s), newNode(t, s)
	b.learn(s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil))
	a.start(nil)
	b.start(nil)
	c := a.dial(b)
	g, err := c.Hello(t.Context())
	if err != nil || g.Learned != 3 {
		t.Fatalf("%+v, %v; want 3 documents", g, err)
	}
	if _, ok := a.papers.Documents().Admitted(a.id); !ok || a.papers.Documents().Charter == nil {
		t.Error("it does not know its own site")
	}
}

func TestHelloRefusals(t *testing.T) {
	for name, arrange := range map[string]func(t *testing.T, s, foreign *site, a, b *node){
		"nobody admitted the caller": func(t *testing.T, s, _ *site, a, b *node) {
			b.learn(s.signCharter(t, nil), s.admission(t, b, nil))
		},
		"the caller was removed": func(t *testing.T, s, _ *site, a, b *node) {
			forA := s.admission(t, a, nil)
			a.learn(s.signCharter(t, nil), forA)
			b.learn(s.signCharter(t, nil), s.admission(t, b, nil), forA, s.removal(t, a))
		},
		"the caller's admission is signed by a foreign key": func(t *testing.T, s, foreign *site, a, b *node) {
			b.learn(s.signCharter(t, nil), s.admission(t, b, nil))
			a.init(foreign)
			a.learn(foreign.signCharter(t, nil), foreign.admission(t, a, nil))
		},
		"the caller shows another node's admission": func(t *testing.T, s, _ *site, a, b *node) {
			other := newNode(t, s)
			charter := s.signCharter(t, nil)
			b.learn(charter, s.admission(t, b, nil))
			a.id = other.id
			a.init(s)
			a.learn(charter, s.admission(t, a, nil))
			a.signer = newKey(t) // TLS by a key that no admission names
		},
		"the caller is of another site of the tenant": func(t *testing.T, s, _ *site, a, b *node) {
			b.learn(s.signCharter(t, nil), s.admission(t, b, nil))
			s.name, s.charter.Site = "hall-2", "hall-2"
			a.learn(s.signCharter(t, nil), s.admission(t, a, nil))
		},
		"the server is not admitted itself": func(t *testing.T, s, _ *site, a, b *node) {
			a.learn(s.signCharter(t, nil), s.admission(t, a, nil))
		},
		"the server was removed": func(t *testing.T, s, _ *site, a, b *node) {
			forA := s.admission(t, a, nil)
			a.learn(s.signCharter(t, nil), forA)
			b.learn(s.signCharter(t, nil), s.admission(t, b, nil), forA, s.removal(t, b))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, foreign := newSite(t), newSite(t)
			a, b := newNode(t, s), newNode(t, s)
			arrange(t, s, foreign, a, b)
			a.start(nil)
			b.start(nil)
			before := b.papers.Revision()
			c := a.dial(b)
			if _, err := c.Hello(t.Context()); !errors.Is(err, ErrRefused) {
				t.Fatalf("%v, want ErrRefused", err)
			}
			if _, _, err := c.Status(t.Context()); err == nil {
				t.Error("a refused caller got a status")
			}
			if b.papers.Revision() != before {
				t.Error("the server took the caller's papers")
			}
			if len(b.heard) != 0 {
				t.Error("the server heard a refused caller")
			}
		})
	}
}

// A server that shows good papers of somebody else is found out.
func TestWhenTheServerIsNoAdmittedNodeThenTheCallerLeaves(t *testing.T) {
	s := newSite(t)
	a, b := newNode(t, s), newNode(t, s)
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil)
	a.learn(charter, forA)
	// The rogue holds every paper of the site, and believes itself admitted,
	// but not the key.
	rogue := newNode(t, s)
	rogue.learn(charter, forA, forB, s.admission(t, rogue, nil))
	a.start(nil)
	rogue.start(nil)
	t.Run("positive twin", func(t *testing.T) {
		if _, err := a.dial(rogue).Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("its own key is not admitted", func(t *testing.T) {
		a.learn(s.removal(t, rogue))
		_, err := a.dial(rogue).Hello(t.Context())
		if !errors.Is(err, ErrRemoved) && !errors.Is(err, ErrRefused) {
			t.Fatalf("%v, want ErrRemoved", err)
		}
	})
}

// Removal ends connections that are open.
func TestWhenANodeIsRemovedThenItsConnectionEnds(t *testing.T) {
	s, a, b := pair(t)
	c := a.meet(b)
	if _, _, err := c.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.learn(s.removal(t, a))
	if _, _, err := c.Status(t.Context()); err == nil {
		t.Fatal("a removed node is still heard")
	}
	if _, err := a.dial(b).Hello(t.Context()); !errors.Is(err, ErrRefused) {
		t.Errorf("%v, want ErrRefused", err)
	}
}

func TestExchangeIsAUnion(t *testing.T) {
	s, a, b := pair(t)
	x, y := newNode(t, s), newNode(t, s)
	a.learn(s.admission(t, x, nil))
	b.learn(s.admission(t, y, nil), s.removal(t, x))
	c := a.meet(b)
	if _, changed, err := c.Status(t.Context()); err != nil || !changed {
		t.Fatalf("changed is %v, %v", changed, err)
	}
	if n, err := c.Exchange(t.Context()); err != nil || n != 2 {
		t.Fatalf("learned %d, %v; want 2", n, err)
	}
	if a.papers.Revision() != b.papers.Revision() {
		t.Error("the papers differ after an exchange")
	}
	for _, n := range []*node{a, b} {
		if _, ok := n.papers.Documents().Admitted(x.id); ok {
			t.Error("a removal did not win")
		}
		if _, ok := n.papers.Documents().Admitted(y.id); !ok {
			t.Error("an admission is missing")
		}
	}
	if _, err := c.Exchange(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, changed, err := c.Status(t.Context()); err != nil || changed {
		t.Errorf("changed is %v, %v, but both hold the same", changed, err)
	}
}

// 600 documents do not fit into one message.
func TestExchangeOfManyDocuments(t *testing.T) {
	s, a, b := pair(t)
	var many [][]byte
	for range 300 {
		many = append(many, s.admission(t, newSoftIdentity(t), nil))
	}
	a.learn(many[:150]...)
	b.learn(many[150:]...)
	c := a.meet(b)
	if n, err := c.Exchange(t.Context()); err != nil || n != 150 {
		t.Fatalf("learned %d, %v", n, err)
	}
	if a.papers.Revision() != b.papers.Revision() || len(a.papers.Refs()) != 303 {
		t.Errorf("%d and %d documents", len(a.papers.Refs()), len(b.papers.Refs()))
	}
}

// newSoftIdentity is a node that exists on paper only.
func newSoftIdentity(t testing.TB) *node {
	ek, err := fleet.HashEK(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	n := &node{id: ek.NodeID(), signer: newKey(t)}
	copy(n.key[:], ek[:])
	return n
}
