package slots

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// cluster is the site's cluster in memory: three servers, two workers.
type cluster struct {
	t        *testing.T
	silent   bool
	ledger   turns.Ledger
	version  int
	cordoned map[fleet.NodeID]bool
	pods     map[fleet.NodeID]int
	now      time.Duration
}

func turnNode(i int) fleet.NodeID {
	return fleet.NodeID("n-" + strings.Repeat(string(rune('a'+i)), 24))
}

func (c *cluster) Facts(_ context.Context, f *turns.Facts) (string, error) {
	if c.silent {
		return "", nil
	}
	f.API, f.Ledger = true, c.ledger
	for i := range 5 {
		f.Nodes = append(f.Nodes, turns.Node{ID: turnNode(i), Ready: true, Server: i < 3, K3s: "v2"})
		if i < 3 {
			f.Voters = append(f.Voters, turnNode(i))
		}
	}
	f.Cordoned, f.Pods = c.cordoned[f.Self], c.pods[f.Self]
	return strconv.Itoa(c.version), nil
}

func (c *cluster) WriteTurns(_ context.Context, l turns.Ledger, version string) (bool, error) {
	if version != strconv.Itoa(c.version) {
		return false, nil
	}
	c.ledger, c.version = l, c.version+1
	return true, nil
}

func (c *cluster) Drain(_ context.Context, n fleet.NodeID) error { c.cordoned[n] = true; return nil }
func (c *cluster) Uncordon(_ context.Context, n fleet.NodeID) error {
	delete(c.cordoned, n)
	return nil
}

// server is the Turns of server i of the cluster.
func (c *cluster) server(i int) *Turns {
	return NewTurns(TurnsConfig{Self: turnNode(i), Cluster: c, Clustered: func() bool { return true }, Policy: fleet.DefaultUpdate, Busy: func() string { return "" },
		Now: func() time.Time { return time.Unix(1_700_000_000, 0).Add(c.now) }, Mono: func() time.Duration { return c.now }})
}

// worker is that of worker i, which reaches what via returns.
func (c *cluster) worker(i int, via func() *Turns) *Turns {
	return NewTurns(TurnsConfig{Self: turnNode(i), Clustered: func() bool { return true }, Worker: func() bool { return true }, Policy: fleet.DefaultUpdate,
		Busy: func() string { return "" }, Now: time.Now, Mono: func() time.Duration { return c.now },
		Ask: func(ctx context.Context, a turns.Ask) (turns.Reply, error) { return via().For(ctx, turnNode(i), a) }})
}

func newCluster(t *testing.T) *cluster {
	return &cluster{t: t, cordoned: map[fleet.NodeID]bool{}, pods: map[fleet.NodeID]int{}}
}

var turnTarget = firmware.Target{Image: digest(2), Name: "edge", Version: "2", K3s: "v2"}

func TestAWorkerGetsItsTurnThroughAnyServer(t *testing.T) {
	c := newCluster(t)
	servers := []*Turns{c.server(0), c.server(1)}
	asked := 0
	w := c.worker(3, func() *Turns { asked++; return servers[asked%2] })
	other := c.worker(4, func() *Turns { return servers[0] })
	c.pods[turnNode(3)] = 2
	if ok, why := w.Turn(t.Context(), turnTarget); ok || !c.cordoned[turnNode(3)] || !strings.Contains(why, "pods") {
		t.Fatal(ok, why, c.cordoned)
	}
	if ok, why := other.Turn(t.Context(), turnTarget); ok || !strings.Contains(why, "has the turn") {
		t.Fatal(ok, why)
	}
	if ok, why := servers[0].Turn(t.Context(), turnTarget); ok || !strings.Contains(why, "has the turn") {
		t.Fatal("a server goes beside a worker:", ok, why)
	}
	c.pods[turnNode(3)] = 0
	if ok, why := w.Turn(t.Context(), turnTarget); !ok || !c.ledger.Turn.Down || c.ledger.Turn.Node != turnNode(3) {
		t.Fatal(ok, why)
	}
	w.Judging(t.Context())
	if ok, _ := other.Turn(t.Context(), turnTarget); ok || len(c.cordoned) != 1 {
		t.Fatal("two are away", c.cordoned)
	}
	if err := w.Settled(t.Context(), turnTarget.Image, "2", nil); err != nil || c.ledger.Turn != nil || len(c.cordoned) != 0 {
		t.Fatal(err, c.ledger, c.cordoned)
	}
	if ok, why := other.Turn(t.Context(), turnTarget); !ok {
		t.Fatal("the turn was not given back:", why)
	}
}

func TestAWorkersFailureStopsTheSite(t *testing.T) {
	c := newCluster(t)
	s := c.server(0)
	w := c.worker(3, func() *Turns { return s })
	if err := w.Settled(t.Context(), digest(1), "1", &firmware.FailedImage{Image: turnTarget.Image, Version: "2"}); err != nil {
		t.Fatal(err)
	}
	if ok, why := s.Turn(t.Context(), turnTarget); ok || !strings.Contains(why, "failed on node") {
		t.Fatal(ok, why)
	}
}

func TestAServerRestsAWorkerWhosePodsStay(t *testing.T) {
	c := newCluster(t)
	s := c.server(0)
	w := c.worker(3, func() *Turns { return s })
	s.gaveUp[turnNode(3)] = 0
	c.now = time.Minute
	if ok, why := w.Turn(t.Context(), turnTarget); ok || !strings.Contains(why, "tries again") {
		t.Fatal(ok, why)
	}
	if ok, why := c.worker(4, func() *Turns { return s }).Turn(t.Context(), turnTarget); !ok {
		t.Fatal("another one rests, too:", why)
	}
}

func TestForWhomAServerDoesNotAsk(t *testing.T) {
	c := newCluster(t)
	s := c.server(0)
	ask := turns.Ask{Phase: turns.Leaving, Image: turnTarget.Image.String(), Version: "2"}
	for _, x := range []struct {
		name string
		by   *Turns
		node fleet.NodeID
		say  string
	}{
		{"when it is a server then it asks itself", s, turnNode(1), "a server asks"},
		{"when it is this node", s, turnNode(0), "the node itself"},
		{"when the cluster does not know it", s, turnNode(9), "does not know"},
		{"when a worker is asked", c.worker(3, nil), turnNode(4), "no server"},
	} {
		if r, err := x.by.For(t.Context(), x.node, ask); !errors.Is(err, turns.ErrDenied) || r.Go || !strings.Contains(err.Error(), x.say) {
			t.Errorf("%s: %+v %v", x.name, r, err)
		}
	}
	c.silent = true
	if _, err := s.For(t.Context(), turnNode(3), ask); !errors.Is(err, turns.ErrDenied) {
		t.Error("a server without cluster:", err)
	}
	if c.version != 0 || len(c.cordoned) != 0 {
		t.Error("something was done all the same", c.ledger, c.cordoned)
	}
}

func TestAWorkerWithoutServersWaits(t *testing.T) {
	w := NewTurns(TurnsConfig{Self: turnNode(3), Clustered: func() bool { return true }, Worker: func() bool { return true },
		Ask: func(context.Context, turns.Ask) (turns.Reply, error) {
			return turns.Reply{Go: true}, errors.New("nobody answers")
		}})
	if ok, why := w.Turn(t.Context(), turnTarget); ok || !strings.Contains(why, "nobody answers") {
		t.Fatal(ok, why)
	}
}
