package k3s

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// Whole sites: each node is this test binary in a network and a mount
// namespace of its own, with a Manager that is told what to do, a launcher in
// a further process, and a k3s: $K3S, k3s on PATH, or the stand-in.

func TestMain(m *testing.M) {
	switch {
	case len(os.Args) > 1 && os.Args[1] == "k3s-child":
		if err := launch.BecomeK3s(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	case len(os.Args) > 2 && os.Args[1] == "launcher":
		var c launch.Config
		if err := json.Unmarshal([]byte(os.Args[2]), &c); err != nil {
			panic(err)
		}
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		l, err := launch.New(c)
		if err != nil {
			panic(err)
		}
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := l.Run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	case len(os.Args) > 2 && os.Args[1] == "node":
		if err := playNode(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// brief tells the process of a node what it is.
type brief struct {
	Self   fleet.NodeID
	Addr   netip.Addr
	Dir    string
	Binary string
}

// call is one thing to do; answer what came of it.
type call struct {
	Do       string
	Start    Start
	Role     clusterbootstrap.Role
	Node     fleet.NodeID
	Keep     bool
	Plan     string
	For      time.Duration
	File     string
	Server   string
	Agent    string
	Material Material
	Ledger   clusterbootstrap.Ledger
}

type answer struct {
	Err      string
	Conflict bool
	Virgin   bool
	Why      string
	Version  uint64
	Server   string
	Agent    string
	K3s      clusterbootstrap.K3s
	Signs    DiskSigns
	Ledger   *clusterbootstrap.Ledger
	Material Material
	Snapshot Snapshot
}

func playNode(text string) error {
	var b brief
	if err := json.Unmarshal([]byte(text), &b); err != nil {
		return err
	}
	// Paths that k3s does not let anybody choose, and the volatile ones.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, d := range []string{"/etc/rancher", "/var/lib/kubelet", "/run"} {
		from := filepath.Join(b.Dir, "root", d)
		if err := errors.Join(os.MkdirAll(from, 0o755), os.MkdirAll(d, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount(from, d, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	if !in.Scan() { // the parent has plugged in the cable
		return io.ErrUnexpectedEOF
	}
	for name, addr := range map[string]string{"lo": "", "eth0": b.Addr.String() + "/16"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if addr != "" {
			p := netip.MustParsePrefix(addr)
			a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}}
			if err := netlink.AddrAdd(l, a); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		if addr != "" {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(100, 96, 255, 254), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
				return err
			}
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	p := Paths{State: b.Dir + "/state", Run: "/run/muster", Data: b.Dir + "/data"}.WithDefaults()
	lc, err := json.Marshal(launch.Config{Paths: p, Binary: b.Binary, Child: []string{self, "k3s-child"}, Pause: time.Second, Ports: []int{6444, 10250, 2380}})
	if err != nil {
		return err
	}
	m, err := New(Config{Self: b.Self, Paths: p, Binary: b.Binary, Child: []string{self, "k3s-child"},
		Control: &launch.Direct{Command: []string{self, "launcher", string(lc)}, Paths: p},
		Log:     slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	for in.Scan() {
		var c call
		if err := json.Unmarshal(in.Bytes(), &c); err != nil {
			return err
		}
		if err := out.Encode(do(m, b.Addr, c)); err != nil {
			return err
		}
	}
	return m.Stop(context.Background())
}

func do(m *Manager, addr netip.Addr, c call) (a answer) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var err error
	birth := c.Start.Settings.Birth
	switch c.Do {
	case "observe":
		a.K3s, a.Signs = m.Observe(ctx)
		err = m.Tend(ctx)
		a.Why = m.Trouble()
	case "start":
		err = m.Start(ctx, c.Start)
	case "stop":
		err = m.Stop(ctx)
	case "role":
		err = m.SetRole(c.Role)
	case "reconfigure":
		err = m.Reconfigure(c.Role, c.Start.Settings)
	case "lease":
		err = m.WriteLease(c.Plan, Boottime()+c.For)
	case "worker-material":
		a.Material, err = m.WorkerMaterial(ctx, 10*time.Minute, addr, birth)
	case "server-material":
		a.Material, err = m.ServerMaterial(ctx, addr, birth)
	case "keep":
		err = m.KeepMaterial(c.Material)
	case "fit":
		err = m.Fit(ctx, c.Material, birth)
	case "read-ledger":
		a.Ledger, err = m.ReadLedger(ctx)
	case "write-ledger":
		a.Version, err = m.WriteLedger(ctx, c.Ledger)
	case "remove":
		err = m.RemoveServer(ctx, c.Node, c.Keep)
	case "drop":
		k, e := m.admin()
		if err = e; err == nil {
			err = m.dropMembers(ctx, k, c.Node)
		}
	case "snapshot":
		a.Snapshot, err = m.Snapshot(ctx, c.Plan)
	case "escrow":
		a.Server, a.Agent, err = m.EscrowToken()
	case "reset":
		err = m.Reset(ctx, c.Start.Settings)
	case "restore":
		err = m.Restore(ctx, c.Start.Settings, c.File, c.Server, c.Agent)
	case "aside":
		err = m.MoveAside(ctx, c.Role)
	case "virgin":
		if k, e := m.admin(); e == nil {
			a.Why, err = used(ctx, k)
		}
		if err == nil {
			a.Virgin, err = m.Virgin(ctx)
		}
	case "make-pvc":
		err = makePVC(ctx, m)
	case "kill": // k3s and its launcher, as a power cut would
		s, e := m.cfg.Paths.ReadStatus()
		err = errors.Join(e, os.Remove(m.cfg.Paths.GoFile()), syscall.Kill(s.Launcher.PID, syscall.SIGKILL))
		if k := m.cfg.Paths.K3s(); k != nil {
			err = errors.Join(err, syscall.Kill(k.PID, syscall.SIGKILL))
		}
	default:
		err = fmt.Errorf("what is %q", c.Do)
	}
	if err != nil {
		a.Err, a.Conflict = err.Error(), errors.Is(err, ErrConflict)
	}
	return a
}

func makePVC(ctx context.Context, m *Manager) error {
	k, err := m.admin()
	if err != nil {
		return err
	}
	return k.Post(ctx, "/api/v1/namespaces/default/persistentvolumeclaims", map[string]any{
		"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": map[string]any{"name": "data"},
		"spec": map[string]any{"accessModes": []string{"ReadWriteOnce"}, "resources": map[string]any{"requests": map[string]string{"storage": "1Gi"}}}}, nil)
}

// findK3s returns the k3s of this run and what it is.
func findK3s(t *testing.T) (string, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("whole sites need root, for namespaces")
	}
	if k := os.Getenv("K3S"); k != "" {
		return k, "real k3s"
	}
	if k, err := exec.LookPath("k3s"); err == nil {
		return k, "real k3s"
	}
	k, err := filepath.Abs("../../bin/k3s-standin")
	if err == nil {
		_, err = os.Stat(k)
	}
	if err != nil {
		t.Skipf("no $K3S, no k3s on PATH, no stand-in: %v", err)
	}
	t.Setenv("LAB_STANDIN", "1")
	return k, "stand-in, no k3s"
}

// node is the test's side of a node.
type node struct {
	t    *testing.T
	id   fleet.NodeID
	addr netip.Addr
	dir  string
	in   io.WriteCloser
	out  *json.Decoder
}

// cable is the switch between the nodes.
type cable struct {
	t      *testing.T
	binary string
	dir    string
	hold   *exec.Cmd // keeps the switch's namespace
	n      int
}

func newCable(t *testing.T) *cable {
	t.Helper()
	if testing.Short() {
		t.Skip("whole sites take a minute")
	}
	binary, what := findK3s(t)
	t.Logf("k3s: %s (%s)", binary, what)
	dir, err := os.MkdirTemp("", "k3s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kept: %s", dir)
			return
		}
		os.RemoveAll(dir)
	})
	name := fmt.Sprintf("mk%d", os.Getpid()%100000)
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	hold := exec.Command("/bin/sleep", "100000")
	hold.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := hold.Start(); err != nil {
		t.Skipf("new network namespaces are refused here: %v", err)
	}
	t.Cleanup(func() { _ = hold.Process.Kill(); _ = hold.Wait() })
	c := &cable{t: t, binary: binary, dir: dir, hold: hold}
	h := c.handle()
	defer h.Close()
	if err := h.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(br); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *cable) handle() *netlink.Handle {
	c.t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", c.hold.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	h, err := netlink.NewHandleAt(nsHandle(f))
	if err != nil {
		c.t.Fatal(err)
	}
	return h
}

// add plugs a new node in.
func (c *cable) add() *node {
	c.t.Helper()
	c.n++
	id := fleet.NodeID(fmt.Sprintf("n-%s", strings.Repeat(string(rune('a'+c.n-1)), 24)))
	n := &node{t: c.t, id: id, addr: netip.AddrFrom4([4]byte{100, 96, 0, byte(c.n)}), dir: filepath.Join(c.dir, fmt.Sprint(c.n))}
	if err := id.Validate(); err != nil {
		c.t.Fatal(err)
	}
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	b, err := json.Marshal(brief{Self: id, Addr: n.addr, Dir: n.dir, Binary: c.binary})
	if err != nil {
		c.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.Command(self, "node", string(b))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS}
	log, err := os.Create(filepath.Join(n.dir, "node.log"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if n.in, err = cmd.StdinPipe(); err != nil {
		c.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	n.out = json.NewDecoder(out)
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		_ = n.in.Close() // it stops k3s and ends
		_ = cmd.Wait()
	})
	h := c.handle()
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		c.t.Fatal(err)
	}
	a := netlink.NewLinkAttrs()
	a.Name = fmt.Sprintf("port%d", c.n)
	for _, l := range links {
		if l.Type() == "bridge" {
			a.MasterIndex = l.Attrs().Index
		}
	}
	v := &netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsPid(cmd.Process.Pid)}
	if err := h.LinkAdd(v); err != nil {
		c.t.Fatal(err)
	}
	if err := h.LinkSetUp(v); err != nil {
		c.t.Fatal(err)
	}
	fmt.Fprintln(n.in, "plugged")
	return n
}

// ask has the node do something.
func (n *node) ask(c call) answer {
	n.t.Helper()
	if c.Start.Settings.Self == "" {
		c.Start.Settings = n.settings("")
	}
	b, err := json.Marshal(c)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(n.in, "%s\n", b); err != nil {
		n.t.Fatalf("%s: %v; see %s/node.log", n.id, err, n.dir)
	}
	var a answer
	if err := n.out.Decode(&a); err != nil {
		n.t.Fatalf("%s: %v; see %s/node.log", n.id, err, n.dir)
	}
	return a
}

// do is ask for what must work.
func (n *node) do(c call) answer {
	n.t.Helper()
	a := n.ask(c)
	if a.Err != "" {
		n.t.Fatalf("%s: %s: %s", n.id, c.Do, a.Err)
	}
	return a
}

func (n *node) settings(join string) Settings {
	b := fleet.DefaultBirth()
	b.FlannelBackend = "host-gw"
	return Settings{Self: n.id, Address: n.addr, Birth: b, Join: join,
		Labels: map[string]string{"muster.dev/gpu": "none", "node-role.kubernetes.io/evil": "x"}}
}

func (n *node) observe() answer { n.t.Helper(); return n.do(call{Do: "observe"}) }

// until observes until it is as it must become; nothing here takes as long as
// the limit, which only ends a hopeless test.
func (n *node) until(what string, ok func(answer) bool) answer {
	n.t.Helper()
	end := time.Now().Add(4 * time.Minute)
	t := time.NewTicker(300 * time.Millisecond)
	defer t.Stop()
	for {
		a := n.observe()
		if ok(a) {
			return a
		}
		if time.Now().After(end) {
			n.t.Fatalf("%s: never: %s; last seen %+v", n.id, what, a)
		}
		<-t.C
	}
}

func voters(k clusterbootstrap.K3s) (v, l int) {
	for _, m := range k.Members {
		if m.Learner {
			l++
		} else {
			v++
		}
	}
	return v, l
}

func ready(k clusterbootstrap.K3s) (n int) {
	for _, x := range k.Nodes {
		if x.Ready {
			n++
		}
	}
	return n
}

func (n *node) found() {
	n.t.Helper()
	n.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleServer, Init: true, Settings: n.settings("")}})
	a := n.until("the API answers", func(a answer) bool { return a.K3s.API })
	if a.K3s.Process != clusterbootstrap.ProcessServer || !a.Signs.Datastore || a.K3s.NoInfo != 0 || a.K3s.Ledger != nil {
		n.t.Errorf("founder: %+v", a)
	}
}

func (n *node) join(server *node) {
	n.t.Helper()
	m := server.do(call{Do: "worker-material", Start: Start{Settings: server.settings("")}}).Material
	n.do(call{Do: "keep", Material: m})
	n.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleWorker, Settings: n.settings(m.Server)}})
}

// promote switches a worker to candidate under a long lease.
func (n *node) promote(server *node, plan string) {
	n.t.Helper()
	m := server.do(call{Do: "server-material", Start: Start{Settings: server.settings("")}}).Material
	n.do(call{Do: "fit", Material: m, Start: Start{Settings: n.settings(m.Server)}})
	n.do(call{Do: "keep", Material: m})
	n.do(call{Do: "stop"})
	n.do(call{Do: "lease", Plan: plan, For: launch.MaxLease - time.Second})
	n.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleCandidate, Plan: plan, Settings: n.settings(m.Server)}})
}

// holds reports whether a file below the node's directory contains secret.
func (n *node) holds(secret string) (found string) {
	err := filepath.WalkDir(n.dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // a file that went away holds nothing
		}
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), secret) {
			found = p
		}
		return nil
	})
	if err != nil {
		n.t.Error(err)
	}
	return found
}

func TestSite(t *testing.T) {
	c := newCable(t)
	a, b, d := c.add(), c.add(), c.add()
	began := time.Now()
	mark := func(what string) { t.Logf("%6.1f s  %s", time.Since(began).Seconds(), what) }

	a.found()
	mark("founded")
	rec := clusterbootstrap.Record{UID: "site-test", Epoch: 1, Version: 1, Founder: a.id, Servers: []fleet.NodeID{a.id}}
	v := a.do(call{Do: "write-ledger", Ledger: clusterbootstrap.Ledger{Record: rec}}).Version
	if x := a.ask(call{Do: "write-ledger", Ledger: clusterbootstrap.Ledger{Record: rec}}); !x.Conflict {
		t.Errorf("creating the ledger twice: %+v", x)
	}
	plan := &clusterbootstrap.PlanDoc{ID: "p1", N: 1, Epoch: 1, Leader: a.id, Candidates: []fleet.NodeID{b.id, d.id}, Phase: clusterbootstrap.PlanSwitch, Go: 2}
	v2 := a.do(call{Do: "write-ledger", Ledger: clusterbootstrap.Ledger{Version: v, Record: rec, Plan: plan}}).Version
	if x := a.ask(call{Do: "write-ledger", Ledger: clusterbootstrap.Ledger{Version: v, Record: rec}}); !x.Conflict {
		t.Errorf("writing over a newer ledger: %+v", x)
	}
	if l := a.do(call{Do: "read-ledger"}).Ledger; l == nil || l.Version != v2 || l.Plan.ID != "p1" || l.Record.UID != rec.UID {
		t.Errorf("ledger: %+v", l)
	}
	x := a.ask(call{Do: "virgin"})
	for x.Err != "" { // kinds that were added a moment ago cannot be listed yet
		t.Log(x.Err)
		x = a.ask(call{Do: "virgin"})
	}
	if !x.Virgin {
		t.Errorf("a new cluster is not virgin: %s", x.Why)
	}

	b.join(a)
	d.join(a)
	a.until("three nodes are ready", func(x answer) bool { return ready(x.K3s) == 3 })
	mark("three nodes ready")
	w := b.until("the worker reaches the API", func(x answer) bool { return x.K3s.API })
	if w.K3s.Process != clusterbootstrap.ProcessAgent || !w.Signs.AgentCert || w.Signs.Datastore {
		t.Errorf("worker: %+v", w)
	}
	full := a.do(call{Do: "escrow"})
	_, secret, _, err := ParseToken(full.Server)
	if err != nil {
		t.Fatal(err)
	}
	if f := b.holds(secret); f != "" {
		t.Errorf("a worker holds the server token: %s", f)
	}

	b.promote(a, "p1")
	d.promote(a, "p1")
	x = a.until("three voters", func(x answer) bool { v, l := voters(x.K3s); return v == 3 && l == 0 })
	mark("three voters")
	var names []fleet.NodeID
	for _, m := range x.K3s.Members {
		names = append(names, m.Node)
	}
	if !slices.Equal(names, []fleet.NodeID{a.id, b.id, d.id}) {
		t.Errorf("members: %v", names)
	}
	for _, n := range []*node{b, d} {
		n.until("the new server answers", func(x answer) bool { return x.K3s.API && x.K3s.Ledger != nil })
		n.do(call{Do: "role", Role: clusterbootstrap.RoleServer})
		n.do(call{Do: "lease", Plan: "p1", For: time.Second}) // counts no more
	}
	mark("three servers")
	a.do(call{Do: "reconfigure", Role: clusterbootstrap.RoleServer, Start: Start{Settings: a.settings(JoinURL(b.addr))}})
	s := a.do(call{Do: "snapshot", Plan: "p1"}).Snapshot
	if again := a.do(call{Do: "snapshot", Plan: "p1"}).Snapshot; again != s || s.Size == 0 {
		t.Errorf("snapshots: %+v %+v", s, again)
	}
	mark("snapshot")

	// One server dies for good, is removed, and comes back as a worker under
	// its old name, certificate and password.
	d.do(call{Do: "kill"})
	a.do(call{Do: "remove", Node: d.id, Keep: true})
	a.do(call{Do: "remove", Node: d.id, Keep: true}) // once more is no error
	if x := a.observe(); len(x.K3s.Members) != 2 {
		t.Errorf("members: %v", x.K3s.Members)
	}
	mark("dead server removed")
	if x := d.ask(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleWorker, Settings: d.settings(JoinURL(b.addr))}}); x.Err != "" {
		t.Fatal(x.Err)
	}
	d.do(call{Do: "stop"})
	d.do(call{Do: "aside", Role: clusterbootstrap.RoleWorker})
	d.do(call{Do: "aside", Role: clusterbootstrap.RoleWorker}) // and again
	if f := d.holds(secret); f != "" {
		t.Errorf("a node that is a worker again holds the server token: %s", f)
	}
	d.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleWorker, Settings: d.settings(JoinURL(b.addr))}})
	d.until("the old server is a worker", func(x answer) bool { return x.K3s.API && x.K3s.Process == clusterbootstrap.ProcessAgent })
	mark("old server is a worker")

	// It takes a server's place again, beside two that have the quorum: no
	// lease. Then it dies once more, and etcd is told directly.
	m := b.do(call{Do: "server-material", Start: Start{Settings: b.settings("")}}).Material
	d.do(call{Do: "keep", Material: m})
	d.do(call{Do: "stop"})
	d.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleCandidate, Unfenced: true, Settings: d.settings(m.Server)}})
	a.until("three voters again", func(x answer) bool { v, l := voters(x.K3s); return v == 3 && l == 0 })
	d.until("the new server answers", func(x answer) bool { return x.K3s.API })
	mark("replaced")
	d.do(call{Do: "kill"})
	a.do(call{Do: "drop", Node: d.id})
	if x := a.observe(); len(x.K3s.Members) != 2 {
		t.Errorf("members: %v", x.K3s.Members)
	}
	d.do(call{Do: "aside", Role: clusterbootstrap.RoleWorker})
	a.do(call{Do: "remove", Node: d.id, Keep: true})
	d.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleWorker, Settings: d.settings(JoinURL(b.addr))}})
	// Before its server goes away, too: else it knows of no other one.
	d.until("the worker reaches the API", func(x answer) bool { return x.K3s.API && x.K3s.Process == clusterbootstrap.ProcessAgent })
	mark("removed in etcd itself")

	// The other one dies too: no quorum, until a goes on alone.
	b.do(call{Do: "kill"})
	a.until("quorum is lost", func(x answer) bool { return !x.K3s.API && x.K3s.NoInfo > 0 })
	mark("no quorum")
	a.do(call{Do: "reset"})
	if x := a.observe(); !x.Signs.ResetFlag || x.K3s.Process != clusterbootstrap.ProcessNone {
		t.Errorf("after the reset: %+v", x)
	}
	a.do(call{Do: "reset"}) // is done
	a.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleServer, Settings: a.settings("")}})
	x = a.until("one server answers", func(x answer) bool { return x.K3s.API })
	if len(x.K3s.Members) != 1 || x.Signs.ResetFlag || x.K3s.Ledger == nil {
		t.Errorf("after the reset: %+v", x)
	}
	mark("reset to own data")
	b.do(call{Do: "aside", Role: clusterbootstrap.RoleWorker})
	b.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleWorker, Settings: b.settings(JoinURL(a.addr))}})
	a.until("all nodes are ready again", func(x answer) bool { return ready(x.K3s) == 3 })
	mark("three nodes ready")

	a.do(call{Do: "make-pvc"})
	if x := a.do(call{Do: "virgin"}); x.Virgin || !strings.Contains(x.Why, "persistentvolumeclaims") {
		t.Errorf("a cluster with data is virgin: %+v", x)
	}

	// Everything burns down; a new machine goes on from snapshot and token.
	a.do(call{Do: "stop"})
	e := c.add()
	if x := e.ask(call{Do: "restore", File: s.Path, Server: "wrong-wrong-wrong-wrong", Agent: full.Agent}); x.Err == "" {
		t.Log("a restore with a wrong token ended without an error; the start must fail")
		e.do(call{Do: "aside", Role: clusterbootstrap.RoleNone})
	}
	e.do(call{Do: "restore", File: s.Path, Server: full.Server, Agent: full.Agent})
	e.do(call{Do: "start", Start: Start{Role: clusterbootstrap.RoleServer, Settings: e.settings("")}})
	x = e.until("the restored server answers", func(x answer) bool { return x.K3s.API })
	if x.K3s.Ledger == nil || x.K3s.Ledger.Record.UID != rec.UID || len(x.K3s.Members) != 1 {
		t.Errorf("restored: %+v", x)
	}
	mark("restored on a new machine")
}
