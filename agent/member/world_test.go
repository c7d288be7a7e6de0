package member

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/muster-edge/muster/agent/hostnet"
	"github.com/muster-edge/muster/agent/journal"
	"github.com/muster-edge/muster/agent/peer"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/discovery"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
	"github.com/muster-edge/muster/internal/sleep"
)

// A world is a site in memory: real members with real journals, and fakes of
// everything else. It runs in a synctest bubble, so that its time is nobody's.
type world struct {
	t     *testing.T
	dir   string
	start time.Time
	out   io.Writer

	mu      sync.Mutex
	nodes   []*node
	etcd    *etcd
	grant   Grant
	centre  bool // the centre answers
	cut     map[[2]int]bool
	charter *fleet.Charter
	// uploaded are the sealed snapshots at the centre.
	uploaded [][]byte
	// gives is the server that gives turns, asked whom nodes asked.
	gives fleet.NodeID
	asked []fleet.NodeID
}

// etcd is the cluster's datastore: who votes, and the ledger.
type etcd struct {
	voters, learners []fleet.NodeID
	ledger           *cb.Ledger
	version          uint64
	nodes            map[fleet.NodeID]time.Time // Node objects: ready since
	virgin           bool
	snapshots        int
}

// node is one machine: what survives a power cut, and the run of its agent.
type node struct {
	w  *world
	i  int
	id fleet.NodeID
	// ip changes under w.mu; at reads it.
	ip   netip.Addr
	mark string
	// markErr is what the TPM answers instead.
	markErr error
	// marks counts writes of the TPM mark.
	marks  int
	papers *fakePapers
	k3s    *fakeK3s

	m       *Member
	j       *journal.Journal
	stop    context.CancelFunc
	ended   chan error
	boots   int
	applied hostnet.Desired
	// cutAt says whether the power is cut at a write; dead: it has been.
	// writes counts writes, acked is the last one that was acknowledged.
	cutAt  func(point string) bool
	dead   atomic.Bool
	writes int
	acked  cb.Disk
	// kept are the sealed snapshots that the node keeps for others.
	kept [][]byte
}

func newWorld(t *testing.T, n int) *world {
	w := &world{t: t, dir: t.TempDir(), start: time.Now(), cut: map[[2]int]bool{}, centre: true, out: io.Discard,
		etcd: &etcd{nodes: map[fleet.NodeID]time.Time{}, virgin: true}}
	if testing.Verbose() && os.Getenv("TRACE") != "" {
		w.out = os.Stderr
	}
	birth := fleet.DefaultBirth()
	w.charter = &fleet.Charter{Tenant: "t", Site: "s", Founding: fleet.Founding{Mode: fleet.FoundCentral},
		Policy: fleet.SitePolicy{Servers: 3, PromoteAt: 3, PromoteAfter: 10, ReplaceAfter: 600}, Birth: birth}
	for i := range n {
		id := fleet.NodeID(fmt.Sprintf("n-%s", strings.Repeat(string(rune('a'+i)), 24)))
		x := &node{w: w, i: i, id: id, ip: netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)})}
		x.papers = &fakePapers{changed: make(chan struct{})}
		x.k3s = &fakeK3s{n: x}
		w.nodes = append(w.nodes, x)
	}
	for _, x := range w.nodes {
		x.papers.docs = w.documents()
	}
	return w
}

func (w *world) documents() cb.Documents {
	d := cb.Documents{Charter: w.charter}
	for _, x := range w.nodes {
		d.Admissions = append(d.Admissions, fleet.Admission{Tenant: "t", Site: "s", Node: x.id, Incarnation: 1, MayServe: true,
			Address: fmt.Sprintf("100.96.0.%d", x.i+1)})
	}
	return d
}

// powerOn starts the agent of a node.
func (x *node) powerOn() {
	x.w.t.Helper()
	dir := filepath.Join(x.w.dir, string(x.id))
	j, err := journal.Open(filepath.Join(dir, "journal"))
	if err != nil {
		x.w.t.Fatal(err)
	}
	if diff := cmp.Diff(x.acked, j.Disk(), cmpopts.EquateEmpty()); x.boots > 0 && diff != "" {
		x.w.t.Fatalf("%s lost an acknowledged write:\n%s", x.id, diff)
	}
	x.w.mu.Lock()
	x.boots++
	x.w.mu.Unlock()
	x.dead.Store(false)
	cfg := Config{
		Self: x.id, Boot: fmt.Sprint("boot", x.boots), StateDir: dir, RunDir: dir, Listen: ":7445",
		Journal: x.journal(j), Mark: x, Papers: x.papers, K3s: x.k3s, Host: x, Centre: x,
		SignRecord: func(_, _ string, r cb.Record) ([]byte, error) { return json.Marshal(r) },
		Multicast:  func(discovery.SiteTag) (Multicast, error) { return x, nil },
		Own:        func() netip.Addr { return x.at() },
		Clock:      Clock{Boottime: func() time.Duration { return time.Since(x.w.start) + time.Hour }},
		Rand:       rand.New(rand.NewPCG(uint64(x.i), uint64(x.boots))),
		Log:        slog.New(slog.NewTextHandler(x.w.out, nil)),
		SettingsOf: func(cb.Documents, fleet.NodeID, []fleet.NodeID, netip.Addr) (k3s.Settings, error) {
			return k3s.Settings{Self: x.id}, nil
		},
		Firewall: true,
	}
	m, err := New(cfg)
	if err != nil {
		x.w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	x.w.mu.Lock()
	x.m, x.j, x.stop, x.ended = m, j, stop, ended
	x.w.mu.Unlock()
	go func() { ended <- m.Run(ctx, x) }()
}

func (x *node) journal(j *journal.Journal) Journal { return &cutJournal{Journal: j, x: x} }

// cutJournal cuts the power at writes.
type cutJournal struct {
	*journal.Journal
	x *node
}

var errPower = errors.New("the power is gone")

func (j *cutJournal) Update(change func(*cb.Disk)) error {
	x := j.x
	if x.dead.Load() {
		return errPower
	}
	x.writes++
	if x.cutAt != nil && x.cutAt("before") {
		x.dead.Store(true)
		return errPower
	}
	if err := j.Journal.Update(change); err != nil {
		return err
	}
	x.acked = j.Disk()
	if x.cutAt != nil && x.cutAt("after") {
		x.dead.Store(true)
		return errPower
	}
	return nil
}

// off ends the agent. With power, k3s goes too, and what was volatile.
func (x *node) off(power bool) {
	if x.stop == nil {
		return
	}
	x.stop()
	if err := <-x.ended; err != nil {
		x.w.t.Errorf("%s: run: %v", x.id, err)
	}
	if err := x.j.Close(); err != nil {
		x.w.t.Error(err)
	}
	x.w.mu.Lock()
	x.m, x.stop = nil, nil
	if power {
		x.k3s.proc = cb.ProcessNone
		x.k3s.lease = 0
	}
	x.w.mu.Unlock()
}

func (w *world) allOff() {
	for _, x := range w.nodes {
		x.off(true)
	}
}

// until lets time pass until cond holds.
func (w *world) until(limit time.Duration, what string, cond func() bool) {
	w.t.Helper()
	for end := time.Now().Add(limit); ; {
		if cond() {
			return
		}
		if time.Now().After(end) {
			for _, x := range w.nodes {
				if x.m != nil {
					x.m.mu.Lock()
					w.t.Logf("%s: %+v failures %v disk %+v", x.id, x.m.shown, x.m.failures, x.m.disk())
					x.m.mu.Unlock()
				}
			}
			w.t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(time.Second)
	}
}

func (x *node) shown() shown {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	return x.m.shown
}

// Apply implements Host.
func (x *node) Apply(d hostnet.Desired) error {
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	x.applied = d
	return nil
}

// Mark and SetMark implement Mark.
func (x *node) Mark() (string, error) {
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	return x.mark, x.markErr
}

func (x *node) SetMark(uid string) error {
	x.mark = uid
	x.marks++
	return nil
}

// Run and Wait implement Multicast: every node hears every other.
func (x *node) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func (x *node) Wait(ctx context.Context) ([]discovery.Hint, error) {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.C:
	}
	var out []discovery.Hint
	for _, y := range x.w.nodes {
		if y != x && x.w.reach(x, y) {
			out = append(out, discovery.Hint{Source: discovery.SourceMulticast, Addr: netip.AddrPortFrom(y.at(), 7445),
				Tag: discovery.Tag("t", "s"), Instance: fmt.Sprintf("%016d", y.started()), TTL: time.Hour})
		}
	}
	return out, nil
}

func (x *node) started() int {
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	return x.boots
}

func (x *node) at() netip.Addr {
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	return x.ip
}

func (w *world) reach(x, y *node) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return y.m != nil && !y.dead.Load() && !x.dead.Load() && !w.cut[[2]int{x.i, y.i}]
}

// AskFounding, PutEscrow and Handover implement Centre.
func (x *node) AskFounding(_ context.Context, _, uid string) (Grant, error) {
	w := x.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.centre {
		return Grant{}, errors.New("the centre does not answer")
	}
	if w.grant.Node == "" || w.grant.Node == x.id && w.etcd.ledger == nil {
		w.grant = Grant{Node: x.id, UID: uid}
	}
	return w.grant, nil
}

func (x *node) PutEscrow(_ context.Context, _ peer.Blob, _ time.Time, _ string, r io.Reader) error {
	data, err := io.ReadAll(r)
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	if !x.w.centre {
		return errors.New("the centre does not answer")
	}
	x.w.uploaded = append(x.w.uploaded, data)
	return err
}

func (x *node) Handover(context.Context, string, string) (Restored, error) {
	return Restored{}, errors.New("no handover")
}

// Dial implements Dialer.
func (x *node) Dial(ctx context.Context, addr string) (Conn, error) {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	for _, y := range x.w.nodes {
		if y.at() == a.Addr() && x.w.reach(x, y) {
			return &conn{x: x, y: y, m: y.member()}, nil
		}
	}
	return nil, errors.New("unreachable")
}

// conn is a connection between two members in memory.
type conn struct {
	x, y *node
	m    *Member // the run of y's agent that was dialled
}

func (c *conn) ok() error {
	c.x.w.mu.Lock()
	defer c.x.w.mu.Unlock()
	if c.y.m != c.m || c.x.m == nil || c.x.dead.Load() || c.y.dead.Load() || c.x.w.cut[[2]int{c.x.i, c.y.i}] {
		return peer.ErrClosed
	}
	return nil
}

// travel is the time a call takes.
func (c *conn) travel(ctx context.Context) error {
	if sleep.For(ctx, 5*time.Millisecond) != nil {
		return ctx.Err()
	}
	return c.ok()
}

func (c *conn) Close() error { return nil }

func (c *conn) Hello(ctx context.Context) (peer.Greeting, error) {
	if err := c.travel(ctx); err != nil {
		return peer.Greeting{}, err
	}
	return peer.Greeting{Node: c.y.id, At: netip.AddrPortFrom(c.y.at(), 7445)}, nil
}

func (c *conn) Exchange(ctx context.Context) (int, error) {
	if err := c.travel(ctx); err != nil {
		return 0, err
	}
	a, b := c.x.papers, c.y.papers
	return b.merge(a.Documents()) + a.merge(b.Documents()), nil
}

func (c *conn) Status(ctx context.Context) (cb.Status, bool, error) {
	if err := c.travel(ctx); err != nil {
		return cb.Status{}, false, err
	}
	mine, s := c.x.shownStatus(), c.y.shownStatus()
	c.m.Heard(c.x.id, netip.AddrPortFrom(c.x.at(), 7445), mine)
	if err := c.travel(ctx); err != nil {
		return cb.Status{}, false, err
	}
	c.x.member().Heard(c.y.id, netip.AddrPortFrom(c.y.at(), 7445), s)
	return s, c.x.papers.Revision() != c.y.papers.Revision(), nil
}

// shownStatus is what the node shows; it must be what is flushed.
func (x *node) shownStatus() cb.Status {
	s := x.member().Status()
	d := x.j.Disk()
	if s.Role != d.Role || s.Ack != d.Ack || s.Step != d.Step || s.Lead != d.Lead || s.Record != d.Record || s.Intent != (d.Intent != nil) || s.Reset != (d.Reset != nil) {
		x.w.t.Errorf("%s shows what is not flushed: %+v, on the disk %+v", x.id, s, d)
	}
	return s
}

func (x *node) member() *Member {
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	return x.m
}

func (c *conn) JoinMaterial(ctx context.Context, as cb.Role, plan string) (peer.Material, error) {
	if err := c.travel(ctx); err != nil {
		return peer.Material{}, err
	}
	obs, pol := c.m.Observation()
	if ok, why := cb.AnswerMaterial(obs, pol, c.x.id, as, plan, 0); !ok {
		return peer.Material{}, &peer.Denied{Why: why}
	}
	return c.m.Material(ctx, c.x.id, as, plan)
}

func (c *conn) Lease(ctx context.Context, plan string) (time.Duration, error) {
	if err := c.travel(ctx); err != nil {
		return 0, err
	}
	c.m.NoteGrant(c.x.id)
	obs, pol := c.m.Observation()
	d, why := cb.AnswerLease(obs, pol, c.x.id, plan)
	if d == 0 {
		return 0, &peer.Denied{Why: why}
	}
	return d, c.travel(ctx)
}

func (c *conn) Turn(ctx context.Context, _ turns.Ask) (turns.Reply, error) {
	if err := c.travel(ctx); err != nil {
		return turns.Reply{}, err
	}
	c.x.w.mu.Lock()
	defer c.x.w.mu.Unlock()
	c.x.w.asked = append(c.x.w.asked, c.y.id)
	if c.y.id != c.x.w.gives {
		return turns.Reply{}, &peer.Denied{Why: "the cluster does not answer here"}
	}
	return turns.Reply{State: turns.Down, Go: true, Reason: "it is this node's turn"}, nil
}

func (c *conn) KeepEscrow(ctx context.Context, b peer.Blob, r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if int64(len(data)) != b.Size || sha256.Sum256(data) != b.SHA256 {
		return errors.New("not what was announced")
	}
	if err := c.travel(ctx); err != nil {
		return err
	}
	c.x.w.mu.Lock()
	defer c.x.w.mu.Unlock()
	c.y.kept = append(c.y.kept, data)
	return nil
}

// fakePapers are documents without signatures: an envelope is a record.
type fakePapers struct {
	mu       sync.Mutex
	docs     cb.Documents
	revision uint64
	changed  chan struct{}
	orders   []fleet.Order
}

func (p *fakePapers) merge(o cb.Documents) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.docs.Merge(o)
	a, _ := json.Marshal(p.docs)
	b, _ := json.Marshal(m)
	if string(a) == string(b) {
		return 0
	}
	p.docs = m
	close(p.changed)
	p.changed = make(chan struct{})
	p.revision = 0
	for i, c := range b {
		p.revision = p.revision*31 + uint64(c) + uint64(i)
	}
	return 1
}

func (p *fakePapers) Learn(envelopes [][]byte) (int, error) {
	n := 0
	for _, e := range envelopes {
		var r cb.Record
		if err := json.Unmarshal(e, &r); err != nil {
			return n, err
		}
		n += p.merge(cb.Documents{Records: []cb.Record{r}})
	}
	return n, nil
}

func (p *fakePapers) Documents() cb.Documents {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.docs
}

func (p *fakePapers) Revision() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.revision
}

func (p *fakePapers) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

func (p *fakePapers) Orders(time.Time) []fleet.Order {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.orders)
}

// fakeK3s is k3s on one node, its files, and the launcher.
type fakeK3s struct {
	n     *node
	calls []string

	// on the disk
	role      cb.Role
	aside     bool
	data      bool
	cert      bool
	tombstone bool
	resetFlag bool
	server    bool // server token
	worker    bool // worker token

	// in this boot
	proc    cb.Process
	started time.Time
	init    bool
	lease   time.Duration
	broken  map[string]error
	infoAt  time.Time
	seenV   uint64
	seenAt  time.Time
}

const startTime = 5 * time.Second

func (k *fakeK3s) call(name string) error {
	if k.n.dead.Load() {
		return errPower
	}
	k.calls = append(k.calls, name)
	return k.broken[name]
}

func (k *fakeK3s) up() bool { return k.proc != cb.ProcessNone && time.Since(k.started) >= startTime }

// tick brings the model up to now. The world is locked.
func (k *fakeK3s) tick() {
	e := k.n.w.etcd
	if k.role == cb.RoleCandidate && k.proc == cb.ProcessServer && k.boottime() >= k.lease {
		k.proc = cb.ProcessNone // the launcher
	}
	if !k.up() {
		return
	}
	id := k.n.id
	if _, ok := e.nodes[id]; !ok && (k.proc == cb.ProcessServer || e.quorum(k.n.w)) {
		e.nodes[id] = time.Now()
	}
	k.cert = true
	if k.proc != cb.ProcessServer {
		return
	}
	switch {
	case k.init && len(e.voters) == 0:
		e.voters, k.data = []fleet.NodeID{id}, true
	case slices.Contains(e.voters, id):
	case slices.Contains(e.learners, id):
		if time.Since(k.started) > time.Duration(2+k.n.i)*startTime {
			e.learners = slices.DeleteFunc(e.learners, func(x fleet.NodeID) bool { return x == id })
			e.voters = append(e.voters, id)
		}
	case k.server && e.quorum(k.n.w):
		e.learners, k.data = append(e.learners, id), true
	}
}

func (k *fakeK3s) boottime() time.Duration { return time.Since(k.n.w.start) + time.Hour }

func (e *etcd) quorum(w *world) bool {
	up := 0
	for _, v := range e.voters {
		for _, x := range w.nodes {
			if x.id == v && x.k3s.proc == cb.ProcessServer && x.k3s.up() {
				up++
			}
		}
	}
	return len(e.voters) > 0 && up > len(e.voters)/2
}

func (k *fakeK3s) Observe(context.Context) (cb.K3s, k3s.DiskSigns) {
	w := k.n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	k.tick()
	e := w.etcd
	out := cb.K3s{Process: k.proc}
	signs := k3s.DiskSigns{Role: k.role, Aside: k.aside, Datastore: k.data, Tombstone: k.tombstone, ResetFlag: k.resetFlag, AgentCert: k.cert}
	if k.proc == cb.ProcessNone {
		return out, signs
	}
	out.Running = time.Since(k.started)
	answers := k.up() && e.quorum(w)
	if k.proc == cb.ProcessServer {
		if !answers {
			out.NoInfo = time.Since(k.infoAt)
		} else {
			k.infoAt = time.Now()
			for _, v := range e.voters {
				out.Members = append(out.Members, cb.Member{Node: v})
			}
			for _, v := range e.learners {
				out.Members = append(out.Members, cb.Member{Node: v, Learner: true})
			}
			for id, since := range e.nodes {
				out.Nodes = append(out.Nodes, cb.NodeObject{Node: id, Ready: true, For: time.Since(since)})
			}
		}
		answers = answers && slices.Contains(e.voters, k.n.id)
	}
	if answers {
		out.API, out.Ledger, out.Virgin = true, e.ledger, e.virgin
		if k.seenV != e.version {
			k.seenV, k.seenAt = e.version, time.Now()
		}
		out.LedgerFor = time.Since(k.seenAt)
	}
	return out, signs
}

func (k *fakeK3s) lock() func() {
	k.n.w.mu.Lock()
	k.tick()
	return k.n.w.mu.Unlock
}

func (k *fakeK3s) Tend(context.Context) error { return nil }

func (k *fakeK3s) Start(_ context.Context, s k3s.Start) error {
	defer k.lock()()
	if err := k.call("start " + s.Role.String()); err != nil {
		return err
	}
	want := cb.ProcessServer
	if s.Role == cb.RoleWorker {
		want = cb.ProcessAgent
	}
	if k.proc != cb.ProcessNone && k.proc != want {
		return k3s.ErrRunning
	}
	if s.Role == cb.RoleCandidate && k.boottime() >= k.lease {
		return errors.New("no lease")
	}
	if k.proc == cb.ProcessNone {
		k.started, k.infoAt = time.Now(), time.Now()
	}
	k.role, k.proc, k.init = s.Role, want, s.Init
	return nil
}

func (k *fakeK3s) Stop(context.Context) error {
	defer k.lock()()
	if err := k.call("stop"); err != nil {
		return err
	}
	k.proc = cb.ProcessNone
	return nil
}

func (k *fakeK3s) SetRole(r cb.Role) error {
	defer k.lock()()
	if err := k.call("set-role " + r.String()); err != nil {
		return err
	}
	k.role = r
	return nil
}

func (k *fakeK3s) Reconfigure(cb.Role, k3s.Settings) error { return nil }

func (k *fakeK3s) KeepMaterial(x k3s.Material) error {
	defer k.lock()()
	k.server = k.server || x.As == cb.RoleServer
	k.worker = k.worker || x.As == cb.RoleWorker
	return k.call("keep-material " + x.As.String())
}

func (k *fakeK3s) ForgetServerMaterial() error {
	defer k.lock()()
	if k.role != cb.RoleServer && k.role != cb.RoleCandidate {
		k.server = false
	}
	return k.call("forget-server-material")
}

func (k *fakeK3s) WriteLease(_ string, until time.Duration) error {
	defer k.lock()()
	k.lease = max(k.lease, until)
	return nil
}

func (k *fakeK3s) WriteLedger(_ context.Context, l cb.Ledger) (uint64, error) {
	defer k.lock()()
	e := k.n.w.etcd
	if err := k.call("write-ledger"); err != nil {
		return 0, err
	}
	if !e.quorum(k.n.w) {
		return 0, k3s.ErrNotReady
	}
	if l.Version != e.version {
		return 0, k3s.ErrConflict
	}
	e.version++
	l.Version = e.version
	e.ledger = &l
	return l.Version, nil
}

func (k *fakeK3s) WorkerMaterial(_ context.Context, _ time.Duration, at netip.Addr, _ fleet.BirthSettings) (k3s.Material, error) {
	return k3s.Material{As: cb.RoleWorker, Server: "https://" + at.String() + ":6443", Token: "K10worker"}, nil
}

func (k *fakeK3s) ServerMaterial(_ context.Context, at netip.Addr, _ fleet.BirthSettings) (k3s.Material, error) {
	return k3s.Material{As: cb.RoleServer, Server: "https://" + at.String() + ":6443", Token: "K10server", AgentToken: "agent", Version: "v1"}, nil
}

func (k *fakeK3s) Fit(context.Context, k3s.Material, fleet.BirthSettings) error {
	return k.broken["fit"]
}

func (k *fakeK3s) RemoveServer(_ context.Context, id fleet.NodeID, _ bool) error {
	defer k.lock()()
	e := k.n.w.etcd
	is := func(x fleet.NodeID) bool { return x == id }
	e.voters, e.learners = slices.DeleteFunc(e.voters, is), slices.DeleteFunc(e.learners, is)
	return k.call("remove-server")
}

func (k *fakeK3s) Snapshot(_ context.Context, plan string) (k3s.Snapshot, error) {
	defer k.lock()()
	k.n.w.etcd.snapshots++
	name := filepath.Join(k.n.w.dir, "snapshot")
	if err := os.WriteFile(name, []byte("etcd"), 0o600); err != nil {
		return k3s.Snapshot{}, err
	}
	return k3s.Snapshot{Plan: plan, Name: "snapshot", Path: name, Size: 4}, k.call("snapshot")
}

func (k *fakeK3s) EscrowToken() (string, string, error) { return "server-token", "agent-token", nil }

func (k *fakeK3s) Reset(context.Context, k3s.Settings) error {
	defer k.lock()()
	if err := k.call("reset"); err != nil {
		return err
	}
	e := k.n.w.etcd
	e.voters, e.learners, e.nodes = []fleet.NodeID{k.n.id}, nil, map[fleet.NodeID]time.Time{}
	k.resetFlag = true
	return nil
}

func (k *fakeK3s) Restore(context.Context, k3s.Settings, string, string, string) error {
	return errors.New("no restore in this model")
}

func (k *fakeK3s) MoveAside(_ context.Context, r cb.Role) error {
	defer k.lock()()
	if err := k.call("move-aside"); err != nil {
		return err
	}
	k.data, k.tombstone, k.resetFlag, k.server = false, false, false, false
	if r == cb.RoleNone {
		k.cert = false
	}
	k.role = r
	return nil
}

func (k *fakeK3s) Virgin(context.Context) (bool, error) {
	defer k.lock()()
	return k.n.w.etcd.virgin, nil
}
