package turns

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// world is a site on virtual time: nodes that are up, down or cut off, a
// cluster that answers those who reach a majority of its servers, and one
// object in it.
type world struct {
	t     *testing.T
	rng   *rand.Rand
	now   time.Duration
	nodes []*box
	// ledger and version are the object; ledgers are written by compare-and-set.
	ledger  Ledger
	version int
	bad     bool // the image does not work
	decide  func(Facts) Answer
	planted bool // a bug is; failures are what is looked for
	log     []string
	tried   map[fleet.NodeID]bool
	faults  bool
}

// box is one node.
type box struct {
	id     fleet.NodeID
	server bool
	// downUntil: it is off until then; byTurn: because of its turn.
	downUntil time.Duration
	downSince time.Duration
	byTurn    bool
	cutUntil  time.Duration
	// target: it runs the new image; judged: and that was decided on. failed:
	// it will not try again.
	target, judged, failed bool
	upSince                time.Duration
	staged                 time.Duration
	cordoned               bool
	cordonedAt             time.Duration
	pods                   int
	gaveUp                 time.Duration
	nextTick               time.Duration
	// What it saw of the ledger.
	seen   int
	seenAt time.Duration
}

const (
	step      = 5 * time.Second
	notReady  = 40 * time.Second
	imageText = "aa00000000000000000000000000000000000000000000000000000000000000"
)

func nodeID(i int) fleet.NodeID {
	return fleet.NodeID("n-" + strings.Repeat(string(rune('a'+i)), 24))
}

func newWorld(t *testing.T, seed uint64, n int) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 3)), tried: map[fleet.NodeID]bool{}, version: 1, decide: Decide}
	servers := 1
	if n >= 3 {
		servers = 3
	}
	for i := range n {
		w.nodes = append(w.nodes, &box{id: nodeID(i), server: i < servers, staged: time.Duration(w.rng.IntN(3600)) * time.Second, gaveUp: -1})
	}
	return w
}

func (w *world) note(format string, a ...any) {
	w.log = append(w.log, w.now.String()+" "+fmt.Sprintf(format, a...))
}

func (w *world) fail(format string, a ...any) {
	w.t.Helper()
	if w.planted {
		panic("found")
	}
	w.t.Fatalf("%s\n%s", fmt.Sprintf(format, a...), strings.Join(w.log[max(0, len(w.log)-60):], "\n"))
}

func (w *world) up(b *box) bool    { return w.now >= b.downUntil }
func (w *world) there(b *box) bool { return w.up(b) && w.now >= b.cutUntil }

// answers reports whether the cluster answers b.
func (w *world) answers(b *box) bool {
	if !w.up(b) {
		return false
	}
	all, reach := 0, 0
	for _, x := range w.nodes {
		if x.server {
			all++
			if w.up(x) && (w.there(x) && w.there(b) || x == b) {
				reach++
			}
		}
	}
	return reach > all/2
}

func (w *world) facts(b *box) Facts {
	f := Facts{Now: time.Unix(1_700_000_000, 0).Add(w.now), Self: b.id, Server: b.server, Image: imageText, Version: "2", K3s: "v2", Open: true,
		Clustered: true, API: w.answers(b), Ledger: w.ledger, Cordoned: b.cordoned, DrainLimit: 5 * time.Minute, Force: b.id == nodeID(1), Pods: b.pods}
	switch {
	case b.target && !b.judged:
		f.Phase = Judging
	case b.target || b.failed:
		f.Phase = Settled
	}
	if b.failed {
		f.Failed = "k3s does not stay up"
	}
	if b.seen != w.version {
		b.seen, b.seenAt = w.version, w.now
	}
	f.LedgerFor = w.now - b.seenAt
	if b.cordoned {
		f.Draining = w.now - b.cordonedAt
	}
	if b.gaveUp >= 0 {
		f.GaveUp = w.now - b.gaveUp + 1
	}
	for _, x := range w.nodes {
		n := Node{ID: x.id, Server: x.server, K3s: "v1", Ready: w.there(x) && w.now-x.upSince > 20*time.Second}
		if !w.up(x) && w.now-x.downSince < notReady {
			n.Ready = true // nobody has noticed yet
		}
		if x.target {
			n.K3s = "v2"
		}
		f.Nodes = append(f.Nodes, n)
		if x.server {
			f.Voters = append(f.Voters, x.id)
		}
	}
	return f
}

// tick is what the agent of one node does.
func (w *world) tick(b *box) {
	switch {
	case b.target && !b.judged && !w.bad && w.now-b.upSince > 2*time.Minute && w.answers(b):
		b.judged = true
		w.note("%s is well", b.id[:4])
	case b.target && !b.judged && w.bad && w.now-b.upSince > 15*time.Minute:
		b.target, b.failed = false, true
		w.down(b, w.rng.IntN(240)+60, true)
		w.note("%s goes back", b.id[:4])
		return
	}
	if !b.target && !b.failed && w.now < b.staged {
		return
	}
	f := w.facts(b)
	version := w.version
	a := w.decide(f)
	if !f.API && a.Step != Wait && a.Step != Go {
		w.fail("%s: step %s without a cluster", b.id, a.Step)
	}
	if a.GiveUp {
		b.gaveUp = w.now
	}
	switch a.Step {
	case Write:
		// Somebody else may have been faster, and an answer may be lost.
		if w.faults && w.rng.IntN(20) == 0 {
			w.version++ // another writer
		}
		if version != w.version {
			return
		}
		if err := check(a.Ledger); err != nil {
			w.fail("%v", err)
		}
		w.ledger, w.version = a.Ledger, w.version+1
		w.note("%s writes: %s", b.id[:4], a.Reason)
	case Drain:
		if !b.cordoned {
			b.cordoned, b.cordonedAt = true, w.now
			b.pods = w.rng.IntN(20)
			if b.id == nodeID(2) && w.rng.IntN(3) == 0 {
				b.pods = 1000 // a budget that lets nobody go
			}
		} else if b.pods > 0 && b.pods < 1000 {
			b.pods -= min(b.pods, 1+w.rng.IntN(3))
		}
	case Uncordon:
		b.cordoned, b.pods = false, 0
	case Go:
		w.checkGo(b)
		b.target, b.judged = true, false
		w.tried[b.id] = true
		w.down(b, w.rng.IntN(240)+60, true)
	}
}

func check(l Ledger) error {
	b, err := l.Encode()
	if err == nil {
		_, err = Decode(b)
	}
	return err
}

func (w *world) down(b *box, seconds int, byTurn bool) {
	until := w.now + time.Duration(seconds)*time.Second
	if w.up(b) {
		b.downSince = w.now
	}
	b.downUntil = max(b.downUntil, until)
	b.upSince = b.downUntil
	b.byTurn = byTurn || b.byTurn
	b.seen = 0
	w.note("%s is down for %d s (turn %v)", b.id[:4], seconds, byTurn)
}

// checkGo is the invariant at the one moment that matters.
func (w *world) checkGo(b *box) {
	w.note("%s goes", b.id[:4])
	servers, up := 0, 0
	for _, x := range w.nodes {
		if x.server {
			servers++
			if x != b && w.up(x) {
				up++
			}
		}
		if x == b {
			continue
		}
		if !w.up(x) && (x.byTurn || w.now-x.downSince > 2*notReady) {
			w.fail("%s goes down while %s is down", b.id, x.id)
		}
		if x.target && !x.judged {
			w.fail("%s goes down while %s is being judged", b.id, x.id)
		}
	}
	known := up
	for _, x := range w.nodes {
		if x != b && x.server && !w.up(x) && w.now-x.downSince <= 2*notReady {
			known++ // it fell just now: nobody could know
		}
	}
	if b.server && servers > 1 && known <= servers/2 {
		w.fail("%s takes the majority with it", b.id)
	}
}

func (w *world) run(hours int) {
	for range int(time.Duration(hours) * time.Hour / step) {
		w.now += step
		if w.faults && w.rng.IntN(400) == 0 {
			b := w.nodes[w.rng.IntN(len(w.nodes))]
			if w.rng.IntN(2) == 0 {
				w.down(b, w.rng.IntN(1200)+30, false)
			} else {
				b.cutUntil = max(b.cutUntil, w.now+time.Duration(w.rng.IntN(3600))*time.Second)
				w.note("%s is cut off", b.id[:4])
			}
		}
		for _, b := range w.nodes {
			if w.up(b) {
				b.byTurn = false
				if w.now >= b.nextTick {
					b.nextTick = w.now + time.Duration(5+w.rng.IntN(20))*time.Second
					w.tick(b)
				}
			}
		}
		if w.done() {
			return
		}
	}
}

// done: nothing is left to do.
func (w *world) done() bool {
	if w.ledger.Turn != nil || w.faults {
		return false
	}
	for _, b := range w.nodes {
		if b.cordoned || !w.up(b) || w.now < b.staged || !w.bad && !(b.target && b.judged) {
			return false
		}
	}
	return !w.bad || len(w.ledger.Failed) == 1
}

// Whatever fails: no two nodes are away because of an update, no majority is
// broken, a good image ends up everywhere and a bad one on one node.
func TestSitesUpdateOneByOne(t *testing.T) {
	seeds := uint64(300)
	if testing.Short() {
		seeds = 40
	}
	for seed := range seeds {
		n := []int{3, 1, 2, 5, 3}[seed%5]
		w := newWorld(t, seed, n)
		w.bad = seed%4 == 1
		w.note("seed %d: %d nodes, bad %v", seed, n, w.bad)
		if seed%2 == 0 {
			w.faults = true
			w.run(6)
			w.faults = false
		}
		w.run(60)
		if !w.done() {
			for _, b := range w.nodes {
				a := Decide(w.facts(b))
				w.note("%s: %s %s %s", b.id[:4], a.State, a.Step, a.Reason)
			}
			w.fail("seed %d: it never ends", seed)
		}
		if w.bad && len(w.tried) != 1 {
			w.fail("seed %d: a bad image was tried on %d nodes", seed, len(w.tried))
		}
	}
}

// The simulator finds what it must: rules that are left out break it.
func TestPlantedBugsAreFound(t *testing.T) {
	for name, bug := range map[string]func(Facts) Answer{
		"nobody looks whether the others are up": func(f Facts) Answer {
			for i := range f.Nodes {
				f.Nodes[i].Ready = true
			}
			return Decide(f)
		},
		"a turn is taken from who is down": func(f Facts) Answer {
			if x := f.Ledger.Turn; x != nil && x.Node != f.Self && f.Phase == Leaving {
				f.Ledger.Turn = nil
				for i := range f.Nodes {
					f.Nodes[i].Ready = true
				}
			}
			return Decide(f)
		},
		"a failure is told to nobody": func(f Facts) Answer {
			f.Failed = ""
			return Decide(f)
		},
		"a turn is never given back": func(f Facts) Answer {
			if f.Phase == Settled && f.Failed == "" {
				return Answer{}
			}
			return Decide(f)
		},
	} {
		found := false
		for seed := uint64(0); seed < 30 && !found; seed++ {
			found = noticed(t, seed, bug)
		}
		if !found {
			t.Errorf("%s: not found", name)
		}
	}
}

func noticed(t *testing.T, seed uint64, bug func(Facts) Answer) (found bool) {
	defer func() {
		if recover() != nil {
			found = true
		}
	}()
	w := newWorld(t, seed, 3)
	w.decide, w.planted, w.bad = bug, true, seed%2 == 1
	w.faults = true
	w.run(3)
	w.faults = false
	w.run(20)
	return !w.done() || w.bad && len(w.tried) > 1
}
