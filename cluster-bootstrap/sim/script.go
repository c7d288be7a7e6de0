package sim

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Script is what happens in a run: drawn from the seed, or written by hand.
type Script struct {
	Nodes       int
	Mode        fleet.FoundingMode
	Founder     int // mode named
	Servers     int
	Soak        int64 // PromoteAfter, s
	Replace     int64 // ReplaceAfter, s
	MaxLearners int
	MayNot      []int // nodes that may not serve
	Events      []Event
	Quiet       time.Duration // when the faults end

	MaxCuts       int
	CutAtBoundary float64
	KillLearner   float64 // chance that a new learner dies in the window
	Kills         int     // nodes that may die for good
	Return        float64 // chance that such a one comes back all the same
	Loss, Dup     float64
	Delay         time.Duration
	LostReply     float64
	SlowDisk      time.Duration
	Drift         float64       // of monotonic clocks, each way
	Stuck         float64       // chance that a learner never catches up
	SlowStart     time.Duration // a server's API may take so long
	NoSnapshots   bool          // those that plans want fail
	PersonActs    bool
	CentreUsed    bool
}

// Event is one thing that happens to the site. What is a verb and its
// arguments; nodes are called a to e.
type Event struct {
	At   time.Duration
	What string
}

// docStore has all documents that exist; a node holds a set of them.
type docStore struct {
	charter    *fleet.Charter
	admissions []fleet.Admission
	removals   []fleet.Removal
	cache      map[uint64]cb.Documents
}

const (
	removalBit = 16
	maxNodes   = 8

	version = "v1.36.3+k3s1"
	args    = "as the charter says"
	fsync   = 5 * time.Millisecond
)

func (s *docStore) own(i int) uint64 { return 1 | 1<<(1+i) }

func (s *docStore) get(mask uint64) cb.Documents {
	if d, ok := s.cache[mask]; ok {
		return d
	}
	var d cb.Documents
	if mask&1 != 0 {
		d.Charter = s.charter
	}
	for i := range s.admissions {
		if mask&(1<<(1+i)) != 0 {
			d = d.Merge(cb.Documents{Admissions: s.admissions[i : i+1]})
		}
		if mask&(1<<(removalBit+i)) != 0 {
			d = d.Merge(cb.Documents{Removals: s.removals[i : i+1]})
		}
	}
	s.cache[mask] = d
	return d
}

func nodeID(i int) fleet.NodeID {
	return fleet.NodeID("n-" + strings.Repeat(string(rune('a'+i)), 24))
}

// build makes the world of a script.
func (w *world) build(seed uint64) {
	if w.opt.Script != nil {
		w.sc = *w.opt.Script
	} else {
		w.sc = w.draw(w.opt.Kind)
	}
	sc := &w.sc
	w.centre.up = true
	sc.CentreUsed = sc.Mode == fleet.FoundCentral
	birth, pol := fleet.DefaultBirth(), fleet.DefaultPolicy()
	birth.MaxLearners = sc.MaxLearners
	pol.Servers, pol.PromoteAt, pol.PromoteAfter, pol.ReplaceAfter = sc.Servers, sc.Servers, sc.Soak, sc.Replace
	f := fleet.Founding{Mode: sc.Mode}
	if sc.Mode == fleet.FoundNamed {
		f.Founder = nodeID(sc.Founder)
	}
	w.docs = docStore{charter: &fleet.Charter{Site: "shop", Founding: f, Policy: pol, Birth: birth}, cache: map[uint64]cb.Documents{}}
	for i := range sc.Nodes {
		id := nodeID(i)
		w.docs.admissions = append(w.docs.admissions, fleet.Admission{Node: id, Incarnation: 1, MayServe: !slices.Contains(sc.MayNot, i)})
		w.docs.removals = append(w.docs.removals, fleet.Removal{Node: id, Incarnation: 1})
		n := &node{w: w, i: i, id: id, name: string(rune('a' + i)), addr: "10.0.0." + strconv.Itoa(i+1),
			rate: 1 + sc.Drift*(2*w.rng.Float64()-1), wall: w.between(-time.Hour, time.Hour),
			fast: max(30*time.Millisecond, sc.SlowDisk), mask: w.docs.own(i), token: map[string]bool{}, version: version, args: args, fsync: fsync, heard: make([]time.Duration, sc.Nodes), docsKey: [2]int{-1, 0}}
		w.nodes = append(w.nodes, n)
		w.link = append(w.link, nil)
		w.since = append(w.since, make([]time.Duration, sc.Nodes))
	}
	w.heal()
	w.tracef("seed %d: %d nodes, founding %s, %d servers wanted, max-learners %d, loss %.0f %%, replace after %d s, faults until %s",
		seed, sc.Nodes, sc.Mode, sc.Servers, sc.MaxLearners, 100*sc.Loss, sc.Replace, sc.Quiet)
	for _, e := range sc.Events {
		w.after(e.At, func() { w.happen(e.What) })
	}
	w.after(sc.Quiet, w.calm)
	w.after(2*time.Second, w.watch)
}

func (w *world) heal() {
	for i := range w.link {
		w.link[i] = slices.Repeat([]bool{true}, len(w.nodes))
		for j := range w.nodes {
			w.since[i][j] = w.now
		}
	}
}

// calm ends the faults: all links up, all living nodes on, the centre up.
func (w *world) calm() {
	w.quiet = true
	w.tracef("--- the faults end ---")
	w.heal()
	w.centre.up = true
	for _, n := range w.nodes {
		w.after(w.between(0, 20*time.Second), n.powerOn)
	}
}

func (w *world) arg(s string) *node {
	if len(s) == 1 && int(s[0]-'a') < len(w.nodes) {
		return w.nodes[s[0]-'a']
	}
	return &node{w: w, dead: true, name: "?"}
}

// happen carries out one Event.
func (w *world) happen(what string) {
	f := strings.Fields(what)
	if w.tracing() && f[0] != "on" {
		w.tracef("=== %s", what)
	}
	switch f[0] {
	case "on":
		for _, x := range f[1:] {
			w.arg(x).powerOn()
		}
	case "off":
		for _, x := range f[1:] {
			w.arg(x).powerOff("power cut")
		}
	case "die":
		w.killOne(w.arg(f[1]), "dies")
	case "split": // split ab c: the groups do not hear each other
		w.heal()
		for i := range w.nodes {
			for j := range w.nodes {
				same := false
				for _, g := range f[1:] {
					same = same || strings.Contains(g, w.nodes[i].name) && strings.Contains(g, w.nodes[j].name)
				}
				w.link[i][j] = same || i == j
			}
		}
	case "oneway": // oneway a b: nothing from a reaches b
		i, j := w.arg(f[1]).i, w.arg(f[2]).i
		w.link[i][j] = false
		w.since[i][j], w.since[j][i] = w.now, w.now
	case "heal":
		w.heal()
	case "reimage":
		n := w.arg(f[1])
		if !n.dead && w.sc.Kills > 0 {
			w.sc.Kills--
			n.reimage()
		}
	case "subnet":
		for _, n := range w.nodes {
			n.addr = "10.1" + n.addr[strings.LastIndex(n.addr, "."):] + "." + strconv.Itoa(int(w.now/time.Second))
		}
	case "address":
		n := w.arg(f[1])
		n.addr = "10.2.0." + strconv.Itoa(int(w.now/time.Second))
	case "remove": // a Removal reaches the first node that is on
		n := w.arg(f[1])
		for _, m := range w.nodes {
			if m.up && m != n {
				m.mask |= 1 << (removalBit + n.i)
				m.wake(0)
				n.gone = true
				break
			}
		}
	case "centre":
		switch f[1] {
		case "up", "down":
			w.centre.up = f[1] == "up"
		case "restored":
			w.centre.granted, w.centre.unsure = "", true
		}
	case "version": // version x v1.2.3: another k3s is on x
		w.arg(f[1]).version = f[2]
	case "args":
		w.arg(f[1]).args = "others"
	case "slow":
		w.arg(f[1]).fsync = 400 * time.Millisecond
	case "damage": // k3s cannot use the data on x any more
		if n := w.arg(f[1]); n.data != nil && !n.disk.ResetFlag {
			n.damaged = true
			if n.proc.kind == cb.ProcessServer {
				n.proc, n.says = proc{}, damage
				n.wake(time.Second)
			}
		}
	case "order": // order found|stale|restore|dissolve x
		w.sign(f[1], w.arg(f[2]))
	case "work": // somebody puts data into every cluster there is
		for _, g := range w.groups {
			g.virgin = false
		}
	default:
		w.violate("script: no verb %q", f[0])
	}
}

// killOne ends a node for good, if the script has one to spare.
func (w *world) killOne(n *node, why string) {
	if w.sc.Kills <= 0 || n.dead || w.quiet {
		return
	}
	w.sc.Kills--
	if !w.chance(w.sc.Return) {
		n.die(why)
		return
	}
	// Everybody believes that it is lost, and then somebody finds it.
	n.die(why)
	w.returning++
	w.after(w.between(4*time.Minute, 40*time.Minute), func() {
		w.returning--
		if !w.confirmed && w.res.End == "" {
			w.tracef("=== %s is found again", n.name)
			n.dead, n.gone = false, n.data == nil && n.member
			w.good = -1
			n.powerOn()
		}
	})
}

func (w *world) draw(kind string) Script {
	pick := func(p ...float64) int {
		x := w.rng.Float64()
		for i, q := range p {
			if x -= q; x < 0 {
				return i
			}
		}
		return len(p) - 1
	}
	sec := func(a, b int) time.Duration {
		return w.between(time.Duration(a)*time.Second, time.Duration(b)*time.Second)
	}
	sc := Script{Servers: 3, MaxLearners: 2 - pick(.85, .15), Soak: int64(pick(.5, .5) * 20), Replace: int64(pick(.3, .7) * 240),
		PersonActs: w.chance(.5), MaxCuts: pick(.4, .2, .2, .1, .1), SlowDisk: []time.Duration{0, 300 * time.Millisecond, 3 * time.Second}[pick(.6, .3, .1)],
		Loss: []float64{0, .1, .3}[pick(.5, .3, .2)], Dup: []float64{0, .1}[pick(.5, .5)], Drift: []float64{0, .005}[pick(.5, .5)],
		Delay: []time.Duration{0, 500 * time.Millisecond, 4 * time.Second}[pick(.5, .3, .2)], LostReply: []float64{0, .05}[pick(.6, .4)],
		CutAtBoundary: []float64{0, .01, .05}[pick(.4, .4, .2)]}
	modes := []fleet.FoundingMode{fleet.FoundFirst, fleet.FoundCentral, fleet.FoundNamed}
	switch kind {
	case "founding":
		sc.Nodes, sc.Mode, sc.Servers = 1+pick(.1, .3, .6), modes[pick(.6, .25, .15)], 1
		sc.Quiet = sec(60, 420)
	case "promotion":
		sc.Nodes, sc.Mode = 3+pick(.6, .3, .1), modes[pick(.2, .3, .5)]
		sc.Quiet = sec(150, 600)
		sc.KillLearner = []float64{0, .3}[pick(.5, .5)]
	case "return":
		sc = Script{Nodes: 3 + pick(.3, .4, .3), Mode: fleet.FoundNamed, Servers: 3, MaxLearners: 2, Replace: 240, Return: .9, Kills: 2, PersonActs: true}
		sc.Quiet = sec(700, 1100)
		for i := range sc.Nodes {
			sc.Events = append(sc.Events, Event{0, "on " + string(rune('a'+i))})
		}
		x := w.rng.Perm(sc.Nodes)
		gone := sec(150, 400)
		verb := "off"
		if w.chance(.6) {
			verb = "die"
			if w.chance(.7) {
				sc.Events = append(sc.Events, Event{gone, fmt.Sprintf("die %c", 'a'+x[1])})
			}
		}
		sc.Events = append(sc.Events, Event{gone, fmt.Sprintf("%s %c", verb, 'a'+x[0])})
		if w.chance(.4) {
			sc.Events = append(sc.Events, Event{gone, "work"})
		}
		return sc
	case "orders":
		return w.drawOrders(pick, sec)
	default:
		sc.Nodes, sc.Mode = 1+pick(.05, .1, .5, .2, .15), modes[pick(.5, .25, .25)]
		sc.Quiet = sec(60, 900)
		sc.KillLearner = []float64{0, .3}[pick(.7, .3)]
		if w.chance(.1) {
			sc.Servers = 1
		}
	}
	sc.Stuck = []float64{0, .3}[pick(.8, .2)]
	sc.SlowStart = []time.Duration{0, 4 * time.Minute}[pick(.8, .2)]
	sc.NoSnapshots = w.chance(.08)
	sc.Kills = pick(.5, .4, .1)
	sc.Return = []float64{0, .7}[pick(.6, .4)]
	if sc.KillLearner > 0 {
		sc.Kills = max(sc.Kills, 1)
	}
	sc.Founder = w.rng.IntN(sc.Nodes)
	if sc.Nodes > 3 && w.chance(.2) {
		if x := w.rng.IntN(sc.Nodes); x != sc.Founder {
			sc.MayNot = []int{x}
		}
	}
	add := func(at time.Duration, what string, args ...any) {
		sc.Events = append(sc.Events, Event{at, fmt.Sprintf(what, args...)})
	}
	any := func() string { return string(rune('a' + w.rng.IntN(sc.Nodes))) }
	spread := []int{1, 6, 60, 300}[pick(.4, .2, .25, .15)]
	for i := range sc.Nodes {
		add(min(sec(0, spread), sc.Quiet), "on %c", 'a'+i)
	}
	q := int(sc.Quiet / time.Second)
	for range pick(.4, .25, .2, .15) {
		at, n := sec(5, q), any()
		add(at, "off %s", n)
		add(at+sec(1, 90), "on %s", n)
	}
	for range pick(.4, .3, .2, .1) {
		at := sec(0, q)
		if w.chance(.3) {
			at = sec(0, 20)
		}
		switch pick(.5, .3, .2) {
		case 0:
			var l, r string
			for i := range sc.Nodes {
				if w.chance(.5) {
					l += string(rune('a' + i))
				} else {
					r += string(rune('a' + i))
				}
			}
			add(at, "split %s %s", l, r)
		case 1:
			a, b := any(), any()
			if a != b {
				add(at, "oneway %s %s", a, b)
			}
		case 2:
			// One node hears both halves.
			bridge := any()
			l, r := bridge, bridge
			for i := range sc.Nodes {
				if w.chance(.5) {
					l += string(rune('a' + i))
				} else {
					r += string(rune('a' + i))
				}
			}
			add(at, "split %s %s", l, r)
		}
		add(at+sec(5, 240), "heal")
	}
	if w.chance(.15) {
		add(sec(20, q), "die %s", any())
	}
	if w.chance(.1) {
		n, at := any(), sec(20, q)
		add(at, "reimage %s", n)
		add(at+sec(10, 60), "on %s", n)
		sc.Kills = max(sc.Kills, 1)
	}
	if w.chance(.1) {
		add(sec(20, q), "subnet")
	} else if w.chance(.1) {
		add(sec(20, q), "address %s", any())
	}
	if w.chance(.08) && sc.Nodes > 1 {
		add(sec(30, q), "remove %s", any())
	}
	if w.chance(.3) {
		add(sec(60, q+1), "work")
	}
	if kind != "founding" {
		if w.chance(.12) {
			add(0, "version %s v1.%d.1+k3s1", any(), 34+w.rng.IntN(4))
		}
		if w.chance(.05) {
			add(0, "args %s", any())
		}
		if w.chance(.05) {
			add(0, "slow %s", any())
		}
		if w.chance(.08) {
			add(sec(60, q+1), "damage %s", any())
		}
		if w.chance(.06) {
			add(sec(20, q), "order %s %s", []string{"found", "stale", "dissolve"}[w.rng.IntN(3)], any())
		}
	}
	if sc.Mode == fleet.FoundCentral {
		for range pick(.4, .3, .3) {
			at := sec(0, q)
			add(at, "centre down")
			add(at+sec(10, 200), "centre up")
		}
		if w.chance(.2) {
			add(sec(10, q), "centre restored")
		}
	}
	slices.SortStableFunc(sc.Events, func(a, b Event) int { return int(a.At - b.At) })
	sc.Events = slices.DeleteFunc(sc.Events, func(e Event) bool { return e.At > sc.Quiet && !strings.HasPrefix(e.What, "on") })
	return sc
}

// drawOrders draws runs in which a person must decide, or decides too much.
func (w *world) drawOrders(pick func(...float64) int, sec func(int, int) time.Duration) Script {
	sc := Script{Nodes: 2 + pick(.2, .4, .3, .1), Mode: []fleet.FoundingMode{fleet.FoundFirst, fleet.FoundCentral, fleet.FoundNamed}[pick(.35, .15, .5)],
		Servers: 3, MaxLearners: 2, Replace: 240, Kills: 3, PersonActs: true, Loss: []float64{0, .1}[pick(.7, .3)], MaxCuts: pick(.6, .2, .2),
		CutAtBoundary: .02, LostReply: []float64{0, .05}[pick(.6, .4)], Quiet: sec(400, 900)}
	sc.Founder = w.rng.IntN(sc.Nodes)
	q := int(sc.Quiet / time.Second)
	node := func() string { return string(rune('a' + w.rng.IntN(sc.Nodes))) }
	add := func(at time.Duration, what string, args ...any) {
		sc.Events = append(sc.Events, Event{at, fmt.Sprintf(what, args...)})
	}
	for i := range sc.Nodes {
		add(sec(0, 30), "on %c", 'a'+i)
	}
	switch pick(.17, .17, .17, .12, .22, .15) {
	case 5: // an order that is not needed, and servers that merely restart
		add(sec(120, 200), "order restore %s", node())
		for i := range sc.Nodes {
			at := sec(200, q)
			add(at, "off %c", 'a'+i)
			add(at+sec(5, 200), "on %c", 'a'+i)
		}
	case 0: // whoever should found does not
		add(sec(0, 40), "die %c", 'a'+sc.Founder)
		if w.chance(.5) {
			add(sec(60, 200), "order found %s", node())
		}
	case 1: // two clusters, both with data
		l := ""
		r := ""
		for i := range sc.Nodes {
			if i%2 == 0 {
				l += string(rune('a' + i))
			} else {
				r += string(rune('a' + i))
			}
		}
		add(0, "split %s %s", l, r)
		add(sec(90, 150), "order found %s", node())
		add(sec(200, 260), "work")
		add(sec(260, 330), "heal")
		if w.chance(.3) {
			add(sec(300, q), "order dissolve %s", node())
		}
	case 2: // an order is used, and then its node is made new
		n := node()
		add(sec(5, 100), "order found %s", n)
		at := sec(100, 350)
		if w.chance(.5) {
			for i := range sc.Nodes {
				if x := string(rune('a' + i)); x != n {
					add(at, "off %s", x)
				}
			}
		}
		add(at+time.Second, "reimage %s", n)
		add(at+sec(5, 30), "on %s", n)
	case 3: // damage
		for range 1 + w.rng.IntN(3) {
			add(sec(100, q), "damage %s", node())
		}
	case 4: // people remove servers, and sign what has ended
		for range 1 + w.rng.IntN(2) {
			add(sec(100, q), "remove %s", node())
		}
		add(sec(20, q), "order stale %s", node())
	}
	slices.SortStableFunc(sc.Events, func(a, b Event) int { return int(a.At - b.At) })
	return sc
}
