// Package sim runs whole sites of planners on virtual time: nodes that lose
// power between any two actions, a LAN that loses, doubles, delays and splits,
// disks that forget what was not flushed, clocks that drift, a centre that
// comes and goes, and k3s with its etcd as it was measured to behave. After
// every event the invariants are checked; when the faults end the site must
// reach its goal or wait for a person with a blocker that is true.
//
// One seed is one run, byte for byte. It is a model: it proves nothing about
// k3s itself, about signatures, or about programs around the planner.
package sim

import (
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
)

// Options choose a run beside its seed.
type Options struct {
	// Kind limits what the seed draws: "" everything, "founding" short runs
	// with one to three nodes, "promotion" three to five nodes and faults in
	// the window, "return" servers that were given up and come back.
	Kind string
	// Bug plants one of Bugs.
	Bug *Bug
	// Trace gets one line for each event worth reading; nil: none.
	Trace io.Writer
	// Script replaces what the seed draws.
	Script *Script
}

// Result is what a run showed.
type Result struct {
	Seed uint64
	// Violation is "" or the invariant that broke, and how.
	Violation string
	// End says how the run ended: "goal" or "person: BLOCKER...".
	End     string
	Virtual time.Duration
	Events  int
	Moves   map[[2]cb.State]int
	Actions map[cb.ActionKind]int
	Resets  int
	// Servers is the number of confirmed servers at the end.
	Servers int
}

// event is one thing to come. If it belongs to a node, it is void once that
// node lost power.
type event struct {
	at  time.Duration
	seq uint64
	n   *node
	gen uint64
	do  func()
}

// queue is a binary heap by time, then by order of entry.
type queue []event

func (e *event) before(o *event) bool { return e.at < o.at || e.at == o.at && e.seq < o.seq }

func (q *queue) push(e event) {
	h := append(*q, e)
	i := len(h) - 1
	for i > 0 {
		up := (i - 1) / 2
		if !e.before(&h[up]) {
			break
		}
		h[i] = h[up]
		i = up
	}
	h[i] = e
	*q = h
}

func (q *queue) pop() event {
	h := *q
	top, e := h[0], h[len(h)-1]
	h[len(h)-1] = event{}
	h = h[:len(h)-1]
	i := 0
	for {
		c := 2*i + 1
		if c >= len(h) {
			break
		}
		if c+1 < len(h) && h[c+1].before(&h[c]) {
			c++
		}
		if !h[c].before(&e) {
			break
		}
		h[i] = h[c]
		i = c
	}
	if len(h) > 0 {
		h[i] = e
	}
	*q = h
	return top
}

// world is one run.
type world struct {
	opt       Options
	rng       *rand.Rand
	now       time.Duration
	seq       uint64
	q         queue
	nodes     []*node
	groups    []*group
	link      [][]bool // link[i][j]: packets from i reach j
	since     [][]time.Duration
	docs      docStore
	centre    centre
	sc        Script
	pol       cb.Policy
	quiet     bool // faults have ended
	cuts      int
	res       *Result
	meets     map[[2]string]time.Duration
	good      time.Duration // since when the goal holds; <0: not
	fail      string
	growth    []growth
	epochs    map[string]uint64
	raisedBy  map[string]int
	acted     time.Duration
	returning int // lost machines that will be found
	orders    int
	confirmed bool // a person confirmed at the centre
	escrow    map[string]*snap
	usedBy    map[string]*group        // which cluster an order founded
	served    map[string]time.Duration // when a confirmed server of each cluster last served
	given     map[cb.MandateKind]int
}

// wall is the true wall-clock time at the start of each run.
var wall = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Run plays one seed.
func Run(seed uint64, opt Options) Result {
	res := Result{Seed: seed, Moves: map[[2]cb.State]int{}, Actions: map[cb.ActionKind]int{}}
	w := &world{opt: opt, rng: rand.New(rand.NewPCG(seed, 0x6d7573746572)), res: &res, meets: map[[2]string]time.Duration{}, good: -1,
		epochs: map[string]uint64{}, raisedBy: map[string]int{}, escrow: map[string]*snap{}, usedBy: map[string]*group{}, given: map[cb.MandateKind]int{}, served: map[string]time.Duration{}}
	w.pol = cb.Policy{}.WithDefaults()
	w.build(seed)
	for len(w.q) > 0 && w.fail == "" && res.End == "" {
		e := w.q.pop()
		w.now = e.at
		if e.n != nil && (e.n.gen != e.gen || !e.n.up) {
			continue
		}
		res.Events++
		e.do()
		w.check()
		if res.Events > 3_000_000 {
			w.violate("the run does not end: %d events", res.Events)
		}
	}
	res.Violation, res.Virtual = w.fail, w.now
	if w.opt.Bug != nil && w.fail != "" {
		w.tracef("planted bug %q was found", w.opt.Bug.Name)
	}
	return res
}

func (w *world) after(d time.Duration, do func()) {
	w.seq++
	w.q.push(event{at: w.now + d, seq: w.seq, do: do})
}

func (w *world) between(a, b time.Duration) time.Duration {
	if b <= a {
		return a
	}
	return a + time.Duration(w.rng.Int64N(int64(b-a)))
}

func (w *world) chance(p float64) bool { return p > 0 && w.rng.Float64() < p }

func (w *world) violate(format string, args ...any) {
	if w.fail == "" {
		w.fail = fmt.Sprintf(format, args...)
		w.tracef("VIOLATION %s", w.fail)
	}
}

func (w *world) tracef(format string, args ...any) {
	if w.opt.Trace != nil {
		fmt.Fprintf(w.opt.Trace, "%9.3fs  %s\n", w.now.Seconds(), fmt.Sprintf(format, args...))
	}
}

func (w *world) tracing() bool { return w.opt.Trace != nil }

// bug reports whether the planted bug switches the edge behaviour name on.
func (w *world) bug(name string) bool { return w.opt.Bug != nil && w.opt.Bug.Edge == name }

func names(ns []*node) string {
	var s []string
	for _, n := range ns {
		s = append(s, n.name)
	}
	return strings.Join(s, " ")
}
