package peer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// giver notes who asked for what.
type giver struct {
	mu    sync.Mutex
	asked []fleet.NodeID
	last  turns.Ask
	err   error
}

func (g *giver) give(_ context.Context, node fleet.NodeID, ask turns.Ask) (turns.Reply, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked, g.last = append(g.asked, node), ask
	return turns.Reply{State: turns.Down, Go: true, Reason: "it is this node's turn"}, g.err
}

func (g *giver) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.asked)
}

var leaving = turns.Ask{Phase: turns.Leaving, Image: strings.Repeat("aa", 32), Version: "2", K3s: "v2"}

// turnPair is a worker and a server that gives turns.
func turnPair(t *testing.T, edit func(*Config)) (s *site, a, b *node, g *giver) {
	s = newSite(t)
	g = &giver{}
	a, b = newNode(t, s), newNode(t, s)
	worker := func(x *fleet.Admission) { x.MayServe = false }
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, worker), s.admission(t, b, nil)
	a.learn(charter, forA, forB)
	b.learn(charter, forA, forB)
	a.start(nil)
	b.start(func(c *Config) {
		c.Turns = g.give
		if edit != nil {
			edit(c)
		}
	})
	return s, a, b, g
}

func TestTurnIsForWhoeverTheConnectionProved(t *testing.T) {
	_, a, b, g := turnPair(t, nil)
	r, err := a.meet(b).Turn(t.Context(), leaving)
	if err != nil || !r.Go || r.State != turns.Down || r.Reason == "" {
		t.Fatal(r, err)
	}
	if len(g.asked) != 1 || g.asked[0] != a.id || g.last != leaving {
		t.Fatal(g.asked, g.last)
	}
	g.err = fmt.Errorf("%w: the cluster does not answer here", turns.ErrDenied)
	var no *Denied
	if r, err := a.meet(b).Turn(t.Context(), leaving); !errors.As(err, &no) || r.Go || !strings.Contains(no.Why, "does not answer") {
		t.Fatal(r, err)
	}
	// The other way round: a worker is not asked, whatever it would say.
	if _, err := b.meet(a).Turn(t.Context(), leaving); !errors.Is(err, ErrNotServer) {
		t.Fatal(err)
	}
}

func TestTurnIsRefused(t *testing.T) {
	s, a, b, g := turnPair(t, nil)
	stranger := newNode(t, s).start(nil)
	c := stranger.dial(b)
	if _, err := c.rpc.Turn(t.Context(), turnMessage(leaving)); !errors.Is(failed("turn", err), ErrRefused) {
		t.Fatal("before hello:", err)
	}
	if _, err := stranger.dial(b).Hello(t.Context()); err == nil {
		t.Fatal("a stranger was greeted")
	}
	conn := a.meet(b)
	if _, err := conn.Turn(t.Context(), leaving); err != nil {
		t.Fatal("the negative twin:", err)
	}
	b.learn(s.removal(t, a))
	if r, err := conn.Turn(t.Context(), leaving); err == nil || r.Go {
		t.Fatal("a removed node", r)
	}
	if again, err := a.peer.Dial(t.Context(), b.addr); err == nil {
		if _, err := again.Hello(t.Context()); err == nil {
			t.Fatal("a removed node was greeted")
		}
		_ = again.Close()
	}
	if g.count() != 1 {
		t.Fatal(g.asked)
	}
}

func TestTurnWantsSense(t *testing.T) {
	_, a, b, g := turnPair(t, nil)
	c := a.meet(b)
	for _, ask := range []turns.Ask{
		{Phase: turns.Leaving, Image: "short"},
		{Phase: turns.Leaving, Image: leaving.Image, Failed: "not settled"},
		{Phase: turns.Settled},
		{Phase: 9, Image: leaving.Image},
	} {
		if _, err := c.Turn(t.Context(), ask); err == nil {
			t.Errorf("%+v", ask)
		}
	}
	if g.count() != 0 {
		t.Fatal(g.asked)
	}
	long := turns.Ask{Phase: turns.Settled, Image: leaving.Image, Failed: "k3s\x1b[2J" + strings.Repeat("ö", 2000)}
	if _, err := c.Turn(t.Context(), long); err != nil || len(g.last.Failed) > 500 || strings.ContainsRune(g.last.Failed, '\x1b') {
		t.Fatal(err, len(g.last.Failed))
	}
}

func TestTurnsOfANodeAreBounded(t *testing.T) {
	_, a, b, g := turnPair(t, func(c *Config) { c.Limits.TurnPerKey = 2 })
	c := a.meet(b)
	for range 2 {
		if _, err := c.Turn(t.Context(), leaving); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Turn(t.Context(), leaving); !errors.Is(err, ErrBusy) || g.count() != 2 {
		t.Fatal(err, g.count())
	}
}
