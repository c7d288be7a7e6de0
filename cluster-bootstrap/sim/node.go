package sim

import (
	"fmt"
	"strconv"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

type seen struct {
	st     *cb.Status
	at     time.Duration
	served time.Duration // when it last showed a working API; <0: never
}

// node is one machine: what survives a power cut, and what does not.
type node struct {
	w    *world
	i    int
	id   fleet.NodeID
	name string
	addr string
	rate float64       // of its monotonic clock
	wall time.Duration // error of its wall clock
	fast time.Duration // longest flush of its disk

	up, dead bool
	gone     bool // dead, or its data was lost
	boots    uint64

	// Durable. disk is what the running node sees, flushed what a power cut
	// leaves of it.
	disk, flushed cb.Disk
	// believed is disk after the last write that the node was told is safe.
	believed cb.Disk
	member   bool // ever in a cluster
	lastUID  string
	lastAck  cb.Claim
	heard    []time.Duration // when each peer was last heard, whatever the node remembers
	mask     uint64          // documents held
	records  []cb.Record     // records held
	data     *group          // whose etcd data is on disk
	token    map[string]bool
	tokenAt  time.Duration // when the worker's token in its file was made
	damaged  bool          // k3s cannot use data
	mute     bool          // k3s lost keys that it had not flushed, and never comes up with data
	version  string
	args     string
	fsync    time.Duration

	// Lost with power.
	gen      uint64
	bootAt   time.Duration
	seq      uint64
	peers    []seen
	state    cb.State
	blocker  cb.Blocker
	reason   string
	survey   *cb.Survey
	round    uint64
	boot     string // boots in words
	fresh    string
	claim    *cb.Claim
	ackAt    time.Duration
	lease    cb.Lease
	material *cb.Material
	matAt    time.Duration
	grantAt  time.Duration // mono
	centre   cb.Centre
	mandate  *cb.Mandate
	asked    [32]time.Duration
	planAt   time.Duration // pending plan event
	busy     bool
	proc     proc
	infoAt   time.Duration // when /db/info last answered
	vainAt   time.Duration // since when a worker's k3s reaches no API; 0: it does
	ledgerV  uint64
	ledgerG  *group
	ledgerAt time.Duration
	snapshot string
	helloAt  time.Duration
	docs     cb.Documents
	docsKey  [2]int
	docsMask uint64
	fenced   bool
	obsPeers []cb.Peer
	obsNodes []cb.NodeObject
	says     string // what k3s says of damaged data

	obsMembers []cb.Member
	kept       *cb.Record // the last record that keepRecord merged
}

func (n *node) mono() time.Duration {
	return time.Duration(float64(n.w.now-n.bootAt) * n.rate)
}

func (n *node) age(at time.Duration) time.Duration {
	return time.Duration(float64(n.w.now-at) * n.rate)
}

// later runs do unless the node lost power meanwhile.
func (n *node) later(d time.Duration, do func()) {
	w := n.w
	w.seq++
	w.q.push(event{at: w.now + d, seq: w.seq, n: n, gen: n.gen, do: do})
}

func (n *node) powerOn() {
	if n.up || n.dead {
		return
	}
	w := n.w
	n.up = true
	n.boots++
	n.renew()
	n.gen++
	n.bootAt, n.seq = w.now, 0
	n.peers = make([]seen, len(w.nodes))
	n.state, n.blocker, n.reason = cb.Observing, "", ""
	n.survey, n.claim, n.material, n.busy = nil, nil, nil, false
	n.lease, n.grantAt, n.ackAt = cb.Lease{}, 0, w.now
	n.centre = cb.Centre{}
	n.asked = [32]time.Duration{}
	n.planAt = -1
	n.proc = proc{}
	n.infoAt, n.vainAt, n.ledgerG, n.ledgerAt, n.ledgerV = w.now, 0, nil, w.now, 0
	n.helloAt = -time.Hour
	n.snapshot, n.says, n.kept = "", "", nil
	n.touched()
	w.tracef("%s: power on (boot %d), disk says %s", n.name, n.boots, n.disk.Role)
	n.wake(w.between(100*time.Millisecond, time.Second))
	n.later(w.between(0, 3*time.Second), n.helloLoop)
	if w.sc.CentreUsed {
		n.later(w.between(0, 3*time.Second), n.centreLoop)
	}
}

// renew draws what is new in each round and boot.
func (n *node) renew() {
	n.boot = strconv.FormatUint(n.boots, 10)
	n.fresh = n.name + "-" + n.boot + "-" + strconv.FormatUint(n.round, 10)
}

func (n *node) powerOff(why string) {
	if !n.up {
		return
	}
	n.w.tracef("%s: POWER OFF (%s) in state %s", n.name, why, n.state)
	n.up = false
	n.gen++
	if n.disk.Intent != nil && n.data != nil && n.data.ledger == nil && n.w.chance(.5) {
		n.mute = true
	}
	n.lostWrites()
	n.disk, n.believed = n.flushed, n.flushed
	n.proc = proc{}
	n.touched()
}

func (n *node) die(why string) {
	if n.dead {
		return
	}
	n.powerOff(why + ", for good")
	n.dead, n.gone = true, true
}

// reimage gives the node an empty disk; only the TPM remembers.
func (n *node) reimage() {
	n.powerOff("gets an empty disk")
	n.gone = n.gone || n.disk.Datastore
	n.disk = cb.Disk{Mark: n.disk.Mark}
	n.flushed, n.believed = n.disk, n.disk
	n.data, n.damaged, n.mute = nil, false, false
	n.mask &= n.w.docs.own(n.i)
	n.records, n.kept = nil, nil
	n.lastAck = cb.Claim{}
	n.docsKey = [2]int{-1, 0}
	n.token = map[string]bool{}
}

func (n *node) touched() {
	for j := range n.w.nodes {
		n.w.since[n.i][j], n.w.since[j][n.i] = n.w.now, n.w.now
	}
}

// write changes the disk and flushes it; then runs next.
func (n *node) write(change func(d *cb.Disk), next func()) {
	change(&n.disk)
	w := n.w
	if w.bug("lost-fsync") {
		n.later(w.between(5*time.Second, 60*time.Second), func() { n.flush() })
		n.later(time.Millisecond, func() { n.believed = n.disk; next() })
		return
	}
	if n.maybeCut("before a flush") {
		return
	}
	n.later(w.between(time.Millisecond, n.fast), func() {
		n.flush()
		n.believed = n.disk
		if !n.maybeCut("after a flush") {
			next()
		}
	})
}

func (n *node) flush() { n.flushed = n.disk }

// maybeCut cuts the power at a boundary between two steps.
func (n *node) maybeCut(why string) bool {
	w := n.w
	if w.quiet || w.cuts >= w.sc.MaxCuts || !w.chance(w.sc.CutAtBoundary) {
		return false
	}
	w.cuts++
	n.powerOff(why)
	w.after(w.between(2*time.Second, 90*time.Second), n.powerOn)
	return true
}

func (n *node) wake(d time.Duration) {
	at := n.w.now + d
	if !n.up || n.planAt >= n.w.now && n.planAt <= at {
		return
	}
	n.planAt = at
	n.later(d, func() {
		if n.planAt == n.w.now {
			n.planAt = -1
			n.plan()
		}
	})
}

func (n *node) plan() {
	if n.busy {
		return
	}
	w := n.w
	obs := n.observe()
	now := wall.Add(w.now + n.wall)
	if b := w.opt.Bug; b != nil && b.Observe != nil {
		b.Observe(n.view(), &obs)
	}
	st, acts := cb.Plan(now, obs, w.pol)
	if b := w.opt.Bug; b != nil && b.Decide != nil {
		st, acts = b.Decide(n.view(), obs, st, acts)
	}
	if len(acts) == 0 {
		w.violate("%s: no action and no reason in state %s", n.name, st)
		return
	}
	if st != n.state {
		w.res.Moves[[2]cb.State{n.state, st}]++
		if _, err := n.state.MoveTo(st); err != nil {
			w.violate("%s: move %s -> %s is not in the table (%s)", n.name, n.state, st, acts[len(acts)-1].Reason)
			return
		}
	}
	last := acts[len(acts)-1]
	changed := st != n.state || last.Blocker != n.blocker
	if w.tracing() && (changed || last.Kind != cb.Wait && last.Kind != cb.RenewFenceLease && last.Reason != n.reason) {
		w.tracef("%s: %s%s | %s", n.name, st, blockerText(last.Blocker), last.Reason)
	}
	n.state, n.blocker, n.reason = st, last.Blocker, last.Reason
	n.fenced = st == cb.Fenced
	if n.reason == "" {
		w.violate("%s: %s %s without a reason", n.name, st, last.Kind)
		return
	}
	for _, a := range acts {
		w.res.Actions[a.Kind]++
	}
	n.busy = true
	n.run(acts)
	if changed {
		n.hello()
	}
}

func blockerText(b cb.Blocker) string {
	if b == "" {
		return ""
	}
	return " [" + string(b) + "]"
}

// run does the actions in order, then plans again.
func (n *node) run(acts []cb.Action) {
	if len(acts) == 0 {
		n.busy = false
		n.wake(20 * time.Millisecond)
		return
	}
	a := acts[0]
	idle := len(acts) == 1 && (a.Kind == cb.Wait || a.Kind == cb.AskGrant || a.Kind == cb.RequestJoinMaterial || a.Kind == cb.RenewFenceLease)
	n.do(a, func(ok bool) {
		switch {
		case !ok:
			n.busy = false
			n.wake(n.w.between(500*time.Millisecond, 1500*time.Millisecond))
		case idle:
			n.busy = false
			pause := 5 * time.Second
			if a.For > 0 && a.For < pause {
				pause = max(a.For, 200*time.Millisecond)
			}
			if n.state == cb.Candidate || n.state == cb.Leading {
				pause = min(pause, 2*time.Second)
			}
			n.wake(n.w.between(pause*8/10, pause))
		default:
			n.run(acts[1:])
		}
	})
}

func (n *node) String() string { return fmt.Sprintf("%s(%s)", n.name, n.state) }

// View is what a planted bug may look at and keep.
type View struct {
	Node  int
	Boots uint64
	// Seed is the run's.
	Seed uint64
}

func (n *node) view() View { return View{n.i, n.boots, n.w.res.Seed} }
