package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/data"
	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/hostnet"
	"github.com/muster-edge/muster/agent/journal"
	"github.com/muster-edge/muster/agent/member"
	"github.com/muster-edge/muster/agent/member/local"
	"github.com/muster-edge/muster/agent/member/uplink"
	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/agent/peer"
	"github.com/muster-edge/muster/agent/spool"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/discovery"
	"github.com/muster-edge/muster/discovery/mdns"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// again is the pause before something that failed at the start is tried again.
const again = 5 * time.Second

// nodeAgent is the agent from its start to its end.
type nodeAgent struct {
	o    agentOptions
	log  *slog.Logger
	boot string

	// clockOff is how far the system's clock is off, as the centre told.
	clockOff atomic.Int64

	mu sync.Mutex
	// starting is what the agent waits for before there is a member.
	starting string
	fault    bool // it is something that keeps it from starting
	since    time.Time
	node     fleet.NodeID
	member   *member.Member
	up       *uplink.Uplink
	hw       fleet.Hardware
	site     fleet.SiteConfig
	system   *system // nil where no slot runs
}

// run is the whole life of the agent. What is missing at the start is waited
// for, with the reason in the status: an agent that ends does not help anybody
// on the phone.
func (a *nodeAgent) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	a.wait("The node agent is starting.", nil)
	g.Go(func() error {
		return local.Server{Path: a.o.socket(), Answer: a.answer, Log: a.log}.Run(ctx)
	})
	g.Go(func() error { return watchdog(ctx, a.alive, a.log) })
	g.Go(func() error { return a.live(ctx) })
	return g.Wait()
}

// live starts everything in order.
func (a *nodeAgent) live(ctx context.Context) error {
	site, ok := until(ctx, a, "I cannot read the site.json of my image", a.o.readSite)
	if !ok {
		return nil
	}
	keys, ok := until(ctx, a, "There is no orders key in the site.json of my image, so that I can believe no document",
		func() ([]crypto.PublicKey, error) { return statement.ParseKeys([]byte(site.OrdersKeysPEM)) })
	if !ok {
		return nil
	}
	clock := a.setClock(site)
	dev, ok := until(ctx, a, "I cannot use my TPM", func() (*device.Device, error) { return device.Open(strings.TrimPrefix(a.o.tpm, "unix:")) })
	if !ok {
		return nil
	}
	defer dev.Close()
	id, ok := until(ctx, a, "I cannot ask my TPM who I am", func() (fleet.NodeID, error) { return nodeIDOf(ctx, dev) })
	if !ok {
		return nil
	}
	key, err := papers.KeyRef(dev.Signer().Public())
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.node, a.site, a.hw = id, site, withTPM(facts.Read(os.DirFS("/")), dev)
	a.mu.Unlock()
	a.log.Info("the node knows who it is", "node", string(id), "words", fleet.Words(id))

	j, ok := until(ctx, a, "My notes about the cluster cannot be read; somebody must look at "+filepath.Join(a.o.paths.State, "journal"), func() (*journal.Journal, error) {
		return journal.Open(filepath.Join(a.o.paths.State, "journal"))
	})
	if !ok {
		return nil
	}
	defer j.Close()
	for _, c := range j.Mended() {
		a.log.Warn("a copy of the journal was damaged and has been mended: the disk may be failing", "copy", c)
	}
	docs, ok := until(ctx, a, "I cannot open the documents of the site", func() (*papers.Papers, error) {
		return papers.Open(papers.Config{Dir: filepath.Join(a.o.paths.State, "papers"), OrdersKeys: keys, Node: id, Key: key, Log: a.log})
	})
	if !ok {
		return nil
	}
	sp, ok := until(ctx, a, "I cannot open the spool", func() (*spool.Spool, error) {
		return spool.Open(spool.Config{Dir: filepath.Join(a.o.paths.State, "spool"), Log: a.log})
	})
	if !ok {
		return nil
	}
	defer sp.Close()
	return a.join(ctx, parts{site: site, clock: clock, dev: dev, id: id, journal: j, papers: docs, spool: sp})
}

// parts are what the member is made of.
type parts struct {
	site    fleet.SiteConfig
	clock   floorClock
	dev     *device.Device
	id      fleet.NodeID
	journal *journal.Journal
	papers  *papers.Papers
	spool   *spool.Spool
}

// join composes member, peers and centre, and runs them.
func (a *nodeAgent) join(ctx context.Context, p parts) error {
	manager, err := a.manager(p)
	if err != nil {
		return err
	}
	public, ok := p.dev.Signer().Public().(*ecdsa.PublicKey)
	if !ok {
		return errors.New("the TPM's LDevID key is no ECDSA key")
	}
	withdrawn := &withdrawnOrders{}
	up, err := a.uplink(p, public, withdrawn)
	if err != nil {
		return err
	}
	m, err := member.New(member.Config{
		Self: p.id, Boot: a.boot, StateDir: a.o.paths.State, RunDir: a.o.paths.Run, Listen: a.o.listen, Link: a.o.link, Configured: a.o.peers,
		Snapshots: filepath.Join(a.o.paths.WithDefaults().Server(), "db", "snapshots"),
		Journal:   p.journal, Mark: p.dev, Papers: p.papers, K3s: manager, Host: &hostnet.Host{}, Spool: p.spool,
		Multicast: a.multicast, Centre: up, Firewall: !a.o.noFirewall, Labels: member.HardwareLabels(a.hw), Withdrawn: withdrawn.is,
		SignRecord: func(tenant, site string, r cb.Record) ([]byte, error) {
			return papers.SignRecord(p.dev.Signer(), tenant, site, r)
		},
		Clock: member.Clock{Now: p.clock.now}, Log: a.log, Lease: a.lease,
	})
	if err != nil {
		return err
	}
	sys, err := a.newSystem(p, m, up)
	if err != nil {
		// The site matters more than updates: it goes on, and says so.
		a.log.Error("this node cannot look after its own system", "err", err)
	}
	var blobs peer.Blobs // none where no slot runs
	if sys != nil {
		blobs = sys.lib
	}
	pr, err := peer.New(peer.Config{
		Self: p.id, Signer: p.dev.Signer(), Papers: p.papers, Node: m, TPM: p.dev, EventLog: a.o.readEventLog,
		EscrowDir: filepath.Join(a.o.paths.State, "escrow"), Turns: a.giveTurn, Blobs: blobs, Log: a.log,
	})
	if err != nil {
		return err
	}
	if sys != nil {
		sys.mates = &peer.Mates{Peer: pr, Addresses: m.Addresses}
		defer sys.mates.Close()
	}
	ln, ok := until(ctx, a, "I cannot listen for other machines at "+a.o.listen, func() (net.Listener, error) { return net.Listen("tcp", a.o.listen) })
	if !ok {
		return nil
	}
	a.mu.Lock()
	a.member, a.up, a.system = m, up, sys
	a.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	if sys != nil {
		g.Go(func() error { return sys.keeper.Run(ctx) })
		g.Go(func() error { return sys.key.run(ctx) })
	}
	g.Go(func() error { return m.Run(ctx, member.DialPeers(pr)) })
	g.Go(func() error { return pr.Run(ctx, ln) })
	g.Go(func() error { return up.Run(ctx) })
	g.Go(func() error { return p.spool.Run(ctx) })
	return g.Wait()
}

// lease reads the lease that an earlier run of the agent wrote in this boot.
func (a *nodeAgent) lease() (string, time.Duration, bool) {
	var l launch.Lease
	boot, err := launch.BootID()
	if err != nil || launch.ReadFile(a.o.paths.LeaseFile(), &l) != nil || l.Boot != boot {
		return "", 0, false
	}
	return l.Plan, l.Until, true
}

// manager is this node's k3s.
func (a *nodeAgent) manager(p parts) (*k3s.Manager, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var control launch.Control = &launch.Systemd{Paths: a.o.paths}
	if a.o.control == "direct" {
		control = &launch.Direct{Paths: a.o.paths, Command: []string{self, "k3s", "--state", a.o.paths.State, "--run", a.o.paths.Run,
			"--k3s-data", a.o.paths.Data, "--k3s-config", a.o.paths.Config, "--k3s", a.o.k3s}}
	}
	return k3s.New(k3s.Config{Self: p.id, Paths: a.o.paths, Binary: a.o.k3s, Control: control, Log: a.log,
		Birth: func() (fleet.BirthSettings, bool) {
			if c := p.papers.Documents().Charter; c != nil {
				return c.Birth, true
			}
			return fleet.BirthSettings{}, false
		}})
}

// uplink is the way to the centre.
func (a *nodeAgent) uplink(p parts, key *ecdsa.PublicKey, withdrawn *withdrawnOrders) (*uplink.Uplink, error) {
	var up *uplink.Uplink
	c, err := client.New(client.Config{
		Site: p.site, TPM: p.dev, Hardware: a.hardware, EventLog: a.o.readEventLog, Now: p.clock.now,
		SetTime:  func(t time.Time) error { return a.told(p.clock, t) },
		Log:      a.log,
		Progress: func(x client.Progress) { up.Say(x.Text) },
	})
	if err != nil {
		return nil, err
	}
	up, err = uplink.New(uplink.Config{
		Dir: filepath.Join(a.o.paths.State, "identity"), Node: p.id, Key: key, Signer: p.dev.Signer(), Centres: p.site.Centre,
		Image: p.site.Image + "@" + p.site.Version, Client: c, Learn: p.papers.Learn,
		Cluster: func() *musterv1.ClusterReport {
			r := a.current().ClusterReport()
			uid := ""
			if rec := p.journal.Disk().Record; rec != nil {
				uid = rec.UID
			}
			r.Record = p.papers.Hello(p.id, uid).Record
			if adm, ok := p.papers.Documents().Admitted(p.id); ok {
				r.EscrowOffer = up.Offer(adm.Tenant, adm.Site)
			}
			return r
		},
		System: func() *musterv1.SystemReport {
			a.mu.Lock()
			s := a.system
			a.mu.Unlock()
			if s == nil {
				return nil
			}
			return s.report()
		},
		Outcomes:     func() []*musterv1.OrderOutcome { return a.current().Outcomes() },
		Acknowledged: func(t []*musterv1.OrderOutcome, ids []string) error { return a.current().Acknowledged(t, ids) },
		Standing:     func(ids []string) { withdrawn.standing(p.papers.Orders(p.clock.now()), ids) },
		Health:       func() uint64 { return a.current().Health() },
		Hardware:     a.hardware, News: func() <-chan struct{} { return a.current().News() }, Now: p.clock.now, Log: a.log,
	})
	return up, err
}

func (a *nodeAgent) current() *member.Member {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.member
}

func (a *nodeAgent) hardware() fleet.Hardware {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.hw
	h.Image, h.Version = a.site.Image, a.site.Version
	return h
}

// multicast looks for peers of a site on the LAN interfaces.
func (a *nodeAgent) multicast(tag discovery.SiteTag) (member.Multicast, error) {
	_, p, err := net.SplitHostPort(a.o.listen)
	if err != nil {
		return nil, err
	}
	port, err := net.LookupPort("tcp", p)
	if err != nil {
		return nil, err
	}
	return mdns.New(mdns.Config{Tag: tag, Port: uint16(port), Log: a.log, Use: func(name string) bool {
		return member.UsableLink(name) && (a.o.link == "" || a.o.link == name)
	}})
}

// setClock makes the agent's clock; see agent/clock.go. A system clock before
// the floor is set, where the agent may.
func (a *nodeAgent) setClock(site fleet.SiteConfig) floorClock {
	floor := agent.Floor(site.TimeFloor, built())
	if t, adjust := agent.FirstClock(time.Now(), floor); adjust {
		if err := setSystemClock(t); err != nil {
			a.log.Warn("the clock is before the image was made, and cannot be set", "err", err)
		}
	}
	return floorClock{floor: floor, off: func() time.Duration { return time.Duration(a.clockOff.Load()) }}
}

// told takes the time of the authenticated centre. The system's clock is
// chrony's; only the agent's own reading of it is corrected.
func (a *nodeAgent) told(c floorClock, t time.Time) error {
	if _, adjust, err := agent.ToldClock(c.now(), t, c.floor); err != nil || !adjust {
		return err
	}
	a.clockOff.Store(int64(time.Until(t)))
	a.log.Info("the clock is off", "by", time.Until(t).Round(time.Second).String())
	return nil
}

// until tries do until it succeeds or ctx ends; the status says why it waits.
func until[T any](ctx context.Context, a *nodeAgent, what string, do func() (T, error)) (T, bool) {
	for {
		v, err := do()
		if err == nil {
			return v, ctx.Err() == nil
		}
		a.wait(what, err)
		t := time.NewTimer(again)
		select {
		case <-ctx.Done():
			t.Stop()
			return v, false
		case <-t.C:
		}
	}
}

// wait says what the agent waits for before it is a member.
func (a *nodeAgent) wait(what string, err error) {
	text := what
	if err != nil {
		text += ": " + err.Error()
	}
	a.mu.Lock()
	changed := a.starting != text
	a.starting, a.fault = text, err != nil
	if changed {
		a.since = time.Now()
	}
	node := a.node
	a.mu.Unlock()
	if changed && err != nil {
		a.log.Warn("state", "node", string(node), "from", "starting", "to", "starting", "reason", text, "action", "none")
	}
}

// alive reports whether the agent turns: a start that waits is alive.
func (a *nodeAgent) alive() bool {
	m := a.current()
	return m == nil || m.Alive()
}

// answer is what status prints.
func (a *nodeAgent) answer() ([]byte, error) {
	a.mu.Lock()
	m, up, node, starting, since, fault, sys := a.member, a.up, a.node, a.starting, a.since, a.fault, a.system
	image := a.site.Image + "@" + a.site.Version
	secure := a.hw.SecureBoot
	a.mu.Unlock()
	r := member.Report{Node: node, State: "starting", Reason: starting,
		Since: since.UTC().Format(time.RFC3339), Peers: []member.Seen{}, Boot: "unknown"}
	if fault {
		r.Blocker, r.NeedsPerson = string(member.NodeFault), true
	}
	if node != "" {
		r.Words = fleet.Words(node)
	}
	if m != nil {
		r = m.Report()
	}
	r.Version = version
	if image != "@" {
		r.Image = image
	}
	r.Slot, r.Digest = slotOf()
	if sys != nil {
		now := sys.keeper.Now()
		r.System, r.Slot = &now, sys.box.sys.Slot.String()
		r.NeedsPerson = r.NeedsPerson || now.NeedsPerson
	}
	if d, err := data.ReadReport(dataReport()); err == nil && d.State != "" {
		if sys != nil {
			sys.key.seen(&d)
		}
		r.Data = &d
	}
	r.Boot = bootOf(secure, a.o.readEventLog)
	if up != nil {
		s := up.State()
		r.Enrolled = s.Enrollment
		if !s.Heard.IsZero() {
			r.LastCentral = s.Heard.UTC().Format(time.RFC3339)
		}
	}
	return r.JSON()
}

// nodeIDOf asks the TPM who this machine is.
func nodeIDOf(ctx context.Context, d *device.Device) (fleet.NodeID, error) {
	id, err := d.Identity(ctx)
	if err != nil {
		return "", err
	}
	if len(id.EKs) == 0 {
		return "", errors.New("the TPM has no usable endorsement key")
	}
	key, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return "", err
	}
	ek, err := fleet.HashEK(key.Public)
	if err != nil {
		return "", err
	}
	return ek.NodeID(), nil
}

// bootText tells this run from all others.
func bootText() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // crypto/rand never fails: it ends the program instead
	return hex.EncodeToString(b)
}

// withdrawnOrders are orders that the centre took back. They are forgotten
// with the agent: a node that starts offline carries out what it holds.
type withdrawnOrders struct {
	mu  sync.Mutex
	ids map[string]bool
	// told: the centre said which orders stand.
	told bool
}

func (w *withdrawnOrders) standing(held []fleet.Order, ids []string) {
	stands := map[string]bool{}
	for _, id := range ids {
		stands[id] = true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids, w.told = map[string]bool{}, true
	for _, o := range held {
		if !stands[o.ID] {
			w.ids[o.ID] = true
		}
	}
}

func (w *withdrawnOrders) is(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ids[id]
}

// known says whether the centre told which orders stand.
func (w *withdrawnOrders) known() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.told
}
