package scenario

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// An estate is a centre with a boot host, a site, and machines with disks that
// get a system: the whole way from an empty disk on.

// Sizes of disks. They are holes but for what is written.
const (
	diskSize  = firmware.MinDisk + 2<<30
	otherSize = 1 << 30
)

// firstVersion is what machines are installed with.
const firstVersion = "1.0.0"

// Limits of broken runs. A good one is much faster, also on a host that has other
// things to do.
const (
	installLimit = 20 * time.Minute
	slotLimit    = 15 * time.Minute
	serverLimit  = 20 * time.Minute
)

var (
	slotUpLine = regexp.MustCompile(`muster: slot is up: (\{.*\})`)
	// slotDeadLine is what a slot prints that does not come up.
	slotDeadLine = regexp.MustCompile(`this slot does not start|muster: this system cannot start|dm-verity device corrupted|` + lab.DeadLine.String())
	recoveryLine = lab.InitLine
)

// pc is a machine with a disk that gets a system.
type pc struct {
	*machine.Machine
	// disk is the image of the disk that is installed; other of one that nobody
	// named and that must stay as it was, "" if there is none.
	disk, other string
	otherSum    string
	node        fleet.NodeID
	// from is where on the console this start of the machine begins.
	from int
}

// estate is one run of it.
type estate struct {
	l   *lab.Lab
	c   *centre
	pcs []*pc
	// requests are those that the centre had at the end.
	requests []fleet.Request
}

// estateOptions is what a scenario wants to be otherwise.
type estateOptions struct {
	// site are more arguments of the command that makes the site.
	site []string
	// disks changes the disks of the n-th machine, from 0, before it is made.
	disks func(n int, c *machine.Config)
	// cpus of each machine; 2 if 0.
	cpus int
	// unassigned leaves the site without a stack.
	unassigned bool
}

// prepareEstate makes keys, recovery image and the first slot image, or takes
// those of an earlier run.
func prepareEstate(ctx context.Context, l *lab.Lab) error {
	if l.Spec.Image != "" {
		return &lab.UsageError{Err: errors.New("scenario: --image is for the scenario boot: this one needs an image that trusts its own centre")}
	}
	if err := operatorKeys(ctx, l); err != nil {
		return err
	}
	if err := keptRecovery(ctx, l); err != nil {
		return err
	}
	return slotImage(ctx, l, slotSpec{version: firstVersion})
}

// openEstate starts the centre with everything that an operator prepares, and
// makes machines, which are off.
func openEstate(ctx context.Context, l *lab.Lab, o estateOptions) (*estate, error) {
	l.Site(func(r *lab.SiteResult) { r.K3sVersion, r.Seed = l.Spec.K3sVersion, l.Spec.Seed })
	if l.Spec.StandIn {
		l.Say("lab", "k3s", "machines run the STAND-IN for k3s ("+l.Spec.K3sVersion+"): what holds here is not proved of a real k3s")
	}
	if err := l.ChooseAccel(ctx, imageFile(l)); err != nil {
		return nil, err
	}
	e := &estate{l: l}
	for n := range l.Spec.Nodes {
		p, err := e.makePC(n, o)
		if err != nil {
			return nil, err
		}
		e.pcs = append(e.pcs, p)
	}
	if err := startForeign(l); err != nil {
		return nil, err
	}
	var err error
	if e.c, err = startCentre(ctx, l, true); err != nil {
		return nil, err
	}
	if err := e.c.introduce(ctx); err != nil {
		return nil, err
	}
	if _, err := e.c.muster(ctx, "image", "push", imageDir(l)); err != nil {
		return nil, fmt.Errorf("scenario: send the recovery image, which goes onto the disks too: %w", err)
	}
	if _, err := e.c.muster(ctx, "escrow", "trust", l.Path(escrowKeyFile+".pub"), "--reason", "the lab's key", "--yes"); err != nil {
		return nil, fmt.Errorf("scenario: trust escrow key: %w", err)
	}
	args := append([]string{"site", "set", site, "--founding", string(fleet.FoundCentral), "--promote-after", "0s", "--install", "only", "--reason", "a new site"}, o.site...)
	if _, err := e.c.muster(ctx, args...); err != nil {
		return nil, fmt.Errorf("scenario: make site: %w", err)
	}
	if err := e.c.publish(ctx, firstVersion); err != nil {
		return nil, err
	}
	if !o.unassigned {
		if err := e.c.assign(ctx, firstVersion); err != nil {
			return nil, err
		}
	}
	if l.Spec.DHCP == lab.DHCPProxy {
		if err := e.c.openWindow(ctx, len(e.pcs)); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// makePC makes a machine with an empty disk and one that holds somebody's data.
func (e *estate) makePC(n int, o estateOptions) (*pc, error) {
	name := fmt.Sprintf("node%d", n+1)
	p := &pc{disk: e.l.Path(name + "-disk.img"), other: e.l.Path(name + "-other.img")}
	if err := makeDisk(p.disk, diskSize, nil); err != nil {
		return nil, err
	}
	if err := makeDisk(p.other, otherSize, somebodysDisk()); err != nil {
		return nil, err
	}
	m, err := e.l.AddMachine(func(c *machine.Config) {
		c.CPUs = 2
		if o.cpus > 0 {
			c.CPUs = o.cpus
		}
		// As on a real PC: the firmware keeps its own order, which the
		// installation changes.
		c.FirmwareOrder = true
		c.Disks = []machine.Disk{
			{File: p.other, Bus: e.l.Spec.DiskBus, Serial: fmt.Sprintf("OTHER%d", n+1)},
			{File: p.disk, Bus: e.l.Spec.DiskBus, Serial: fmt.Sprintf("DISK%d", n+1)},
		}
		if o.disks != nil {
			o.disks(n, c)
		}
	})
	if err != nil {
		return nil, err
	}
	p.Machine = m
	p.otherSum, err = diskSum(p.other)
	return p, err
}

// makeDisk makes an image of holes that begins with head.
func makeDisk(name string, size int64, head []byte) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("scenario: make disk: %w", err)
	}
	_, err = f.WriteAt(head, 0)
	if err := errors.Join(err, f.Truncate(size), f.Close()); err != nil {
		return fmt.Errorf("scenario: make disk: %w", err)
	}
	return nil
}

// somebodysDisk is the beginning of a disk with one partition and data.
func somebodysDisk() []byte {
	b := []byte(strings.Repeat("somebody's books and pictures. ", 100_000))
	clear(b[:512])
	// One entry of an MBR: type 83h from sector 2048 on, a million sectors.
	copy(b[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0x40, 0x42, 0x0f, 0})
	b[510], b[511] = 0x55, 0xaa
	return b
}

// diskSum is a digest over what was ever written to an image: its parts that
// are no holes, with their places.
func diskSum(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("scenario: read disk: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	for at := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return fmt.Sprintf("%x", h.Sum(nil)), nil // no more data
		}
		if err != nil {
			return "", fmt.Errorf("scenario: read disk: %w", err)
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return "", fmt.Errorf("scenario: read disk: %w", err)
		}
		fmt.Fprintf(h, "%d %d\n", from, to)
		if _, err := io.Copy(h, io.NewSectionReader(f, from, to-from)); err != nil {
			return "", fmt.Errorf("scenario: read disk: %w", err)
		}
		at = to
	}
}

// title is the machine's name; "the machine" in tests that have none.
func (p *pc) title() string {
	if p.Machine == nil {
		return "the machine"
	}
	return p.Name()
}

// untouched returns an error if somebody wrote to a disk that nobody named.
func (p *pc) untouched() error {
	if p.other == "" {
		return nil
	}
	sum, err := diskSum(p.other)
	if err == nil && sum != p.otherSum {
		err = fmt.Errorf("the other disk of %s (%s) was written to", p.title(), p.other)
	}
	return err
}

// machines are those of the estate.
func (e *estate) machines() (out []*machine.Machine) {
	for _, p := range e.pcs {
		out = append(out, p.Machine)
	}
	return out
}

// each runs f for all machines at once.
func (e *estate) each(ctx context.Context, f func(context.Context, *pc) error) error {
	return forEach(ctx, e.machines(), func(ctx context.Context, m *machine.Machine) error {
		return f(ctx, e.pcs[slices.IndexFunc(e.pcs, func(p *pc) bool { return p.Machine == m })])
	})
}

// on switches a machine on.
func (e *estate) on(ctx context.Context, p *pc) error {
	p.from = p.Serial().Mark()
	return e.l.PowerOn(ctx, p.Machine)
}

// cut takes the power away.
func (e *estate) cut(p *pc) error {
	e.l.Say(p.Name(), "power-cut", "the power is cut")
	return p.Cut()
}

// requested switches all machines on and waits until they ask to be let in.
func (e *estate) requested(ctx context.Context) (map[string]fleet.Request, error) {
	for _, p := range e.pcs {
		if err := e.on(ctx, p); err != nil {
			return nil, err
		}
	}
	requests, err := arrive(ctx, e.l, e.c, e.machines())
	for _, p := range e.pcs {
		p.node = requests[p.Name()].Node
	}
	return requests, err
}

// install brings all machines from an empty disk to a system that runs: what a
// person does is to approve their requests.
func (e *estate) install(ctx context.Context) error {
	requests, err := e.requested(ctx)
	if err != nil {
		return err
	}
	if err := judged(e.l, requests); err != nil {
		return err
	}
	if err := nothingGranted(ctx, e.l, e.c, e.machines(), "before approval"); err != nil {
		return err
	}
	if err := checkSecrets(e.l, e.machines(), "before approval"); err != nil {
		return err
	}
	if err := e.l.Check("before approval: nothing was written to any disk", e.blank()); err != nil {
		return err
	}
	var mu sync.Mutex
	at := map[string]time.Time{}
	err = e.each(ctx, func(ctx context.Context, p *pc) error {
		mu.Lock()
		at[p.Name()] = time.Now()
		mu.Unlock()
		if err := approveOne(ctx, e.l, e.c, p.Machine, requests[p.Name()]); err != nil {
			return err
		}
		return e.installed(ctx, p, at[p.Name()])
	})
	if err := e.l.Check("the centre orders one exact disk, and the machine writes and verifies the system", err); err != nil {
		return err
	}
	if err := e.l.Check("the audit log: each request filed once, approved once and by a person", checkAudit(ctx, e.c, requests)); err != nil {
		return err
	}
	err = e.each(ctx, func(ctx context.Context, p *pc) error { return e.up(ctx, p, firmware.SlotA) })
	if err := e.l.Check("every machine starts slot a from its disk, with its data partition", err); err != nil {
		return err
	}
	err = e.serving(ctx, "first-server", siteView.firstServer)
	if err := e.l.Check("the centre sees a first server of the site's cluster, and its node is ready", err); err != nil {
		return err
	}
	for _, t := range at {
		e.l.Timing("", "approve_to_first_server_s", time.Since(t))
	}
	return nil
}

// blank returns an error if a disk that is empty has anything on it.
func (e *estate) blank() error {
	var errs []error
	for _, p := range e.pcs {
		f, err := os.Open(p.disk)
		if err != nil {
			return err
		}
		at, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
		if !errors.Is(err, unix.ENXIO) {
			errs = append(errs, fmt.Errorf("the empty disk of %s has something at %d", p.Name(), at))
		}
		errs = append(errs, f.Close(), p.untouched())
	}
	return errors.Join(errs...)
}

// installed waits until the centre has heard that the machine carried out its
// order.
func (e *estate) installed(ctx context.Context, p *pc, since time.Time) error {
	ctx, cancel := context.WithTimeoutCause(ctx, installLimit, fmt.Errorf("it was not installed after %s", installLimit))
	defer cancel()
	said := ""
	var o orderView
	err := poll(ctx, time.Second, func() (bool, error) {
		found, err := e.order(ctx, p, fleet.OrderInstall)
		if err != nil || found == nil {
			return false, nil // a busy moment, or not yet; the context ends it
		}
		if o = *found; o.Text != said {
			said = o.Text
			e.l.Say(p.Name(), "install", fmt.Sprintf("order %s: %s %s", o.ID, o.State, o.Text))
		}
		return o.State == fleet.OrderDone, nil
	})
	if err != nil {
		return fmt.Errorf("%w; the order is %q: %s; on its screen: %s", err, o.State, o.Text, p.screen())
	}
	e.l.Timing(p.Name(), "approve_to_installed_s", time.Since(since))
	if want := "DISK"; o.Disk == nil || !strings.HasPrefix(o.Disk.Serial, want) || o.Disk.SizeBytes != diskSize {
		return fmt.Errorf("the order names the disk %+v", o.Disk)
	}
	return p.untouched()
}

// screen is what the machine's recovery image said last.
func (p *pc) screen() string {
	for _, l := range slices.Backward(p.Serial().Tail(400)) {
		if lab.NodeLine.MatchString(l.Text) {
			return l.Text
		}
	}
	return "nothing"
}

// slotState is what a slot says of itself when it is up.
type slotState struct {
	Slot     string `json:"slot"`
	RootHash string `json:"root_hash"`
	Counted  bool   `json:"counted"`
}

// slotUp waits until a slot is up in this start of the machine or a later one,
// and returns what it says of itself.
func (e *estate) slotUp(ctx context.Context, p *pc) (slotState, error) {
	var s slotState
	ctx, cancel := context.WithTimeoutCause(ctx, slotLimit, fmt.Errorf("no slot was up after %s", slotLimit))
	defer cancel()
	line, err := p.Serial().Wait(ctx, p.from, regexp.MustCompile(slotUpLine.String()+"|"+slotDeadLine.String()))
	if err != nil {
		return s, err
	}
	m := slotUpLine.FindStringSubmatch(line.Text)
	if m == nil {
		return s, fmt.Errorf("the system does not come up: %s", line.Text)
	}
	p.from = line.N + 1
	if err := json.Unmarshal([]byte(m[1]), &s); err != nil {
		return s, fmt.Errorf("scenario: read %q: %w", line.Text, err)
	}
	e.l.Say(p.Name(), "slot", fmt.Sprintf("slot %s is up (root hash %.16s..., counted: %v)", s.Slot, s.RootHash, s.Counted))
	return s, nil
}

// up waits until this slot is.
func (e *estate) up(ctx context.Context, p *pc, want firmware.SlotID) error {
	s, err := e.slotUp(ctx, p)
	if err == nil && s.Slot != want.String() {
		err = fmt.Errorf("slot %s is up, want %s", s.Slot, want)
	}
	return err
}

// What the centre says.

// orderView is one order as `muster get orders` shows it.
type orderView struct {
	ID    string            `json:"id"`
	Kind  fleet.OrderKind   `json:"kind"`
	Node  fleet.NodeID      `json:"node"`
	State fleet.OrderState  `json:"state"`
	Text  string            `json:"text"`
	Disk  *fleet.DiskTarget `json:"disk"`
	At    time.Time         `json:"issued"`
}

// order is the newest order of a kind for a machine; nil if there is none.
func (e *estate) order(ctx context.Context, p *pc, kind fleet.OrderKind) (*orderView, error) {
	var list []orderView
	if err := e.c.ask(ctx, &list, "get", "orders"); err != nil {
		return nil, err
	}
	var found *orderView
	for i, o := range list {
		if o.Node == p.node && o.Kind == kind && (found == nil || o.At.After(found.At)) {
			found = &list[i]
		}
	}
	return found, nil
}

// ask runs a command and reads its JSON.
func (c *centre) ask(ctx context.Context, into any, args ...string) error {
	b, err := c.muster(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("scenario: read answer of muster %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// nodeView is a node as `muster describe node` shows it.
type nodeView struct {
	fleet.Node
	Desired string              `json:"desired"`
	System  *fleet.SystemReport `json:"system"`
	Orders  []orderView         `json:"orders"`
}

func (e *estate) describe(ctx context.Context, p *pc) (v nodeView, err error) {
	return v, e.c.ask(ctx, &v, "describe", "node", string(p.node))
}

// siteNodeView is a node of a site as it is shown there.
type siteNodeView struct {
	fleet.Node
	Stale  bool              `json:"stale"`
	Report *fleet.NodeReport `json:"report"`
}

// siteView is a site as `muster describe site` shows it.
type siteView struct {
	fleet.Site
	Nodes []siteNodeView `json:"nodes"`
	Drift struct {
		State   string `json:"state"`
		Current int    `json:"nodes_current"`
		Why     string `json:"why"`
	} `json:"drift"`
}

// fewNodes is the blocker of a site that has fewer nodes than three servers
// need.
const fewNodes = "few-nodes"

// firstServer: a site of one is finished with its first server; one of several
// has a server whose own node is ready, and goes on to what it shall be.
func (s siteView) firstServer() error {
	if len(s.Nodes) < 3 {
		return s.servers(1)
	}
	for _, n := range s.Nodes {
		if r := n.Report; r != nil && r.Role == "server" && r.UID != "" && r.NodesReady > 0 {
			return nil
		}
	}
	return s.servers(1)
}

// servers returns nil if so many nodes are servers and voters of one cluster,
// all nodes are ready, and nobody waits for anything.
func (s siteView) servers(want int) error {
	uids := map[string]bool{}
	servers, voters, ready := 0, 0, 0
	var waits []string
	for _, n := range s.Nodes {
		r := n.Report
		if r == nil {
			waits = append(waits, n.Words+" said nothing yet")
			continue
		}
		uids[r.UID] = true
		if r.Role == "server" {
			servers++
			voters, ready = max(voters, r.Voters), max(ready, r.NodesReady)
		}
		// A small site waits for more nodes for ever, and works.
		if r.Role != "server" && r.Role != "worker" || r.Blocker != "" && (r.Blocker != fewNodes || len(s.Nodes) >= 3) {
			waits = append(waits, fmt.Sprintf("%s is %s, %s: %s %s", n.Words, r.Role, r.State, r.Blocker, r.Reason))
		}
	}
	if servers != want || voters != want || ready != len(s.Nodes) || len(uids) != 1 || uids[""] || len(waits) > 0 {
		return fmt.Errorf("%d servers, %d voters, %d of %d nodes ready, %d clusters: %s", servers, voters, ready, len(s.Nodes), len(uids), strings.Join(waits, "; "))
	}
	return nil
}

// oneCluster returns an error if nodes of the site showed two clusters.
func (s siteView) oneCluster() error {
	if s.Status.Second != "" {
		return fmt.Errorf("a second cluster, %s, was shown by %s", s.Status.Second, s.Status.SecondBy)
	}
	uid := ""
	for _, n := range s.Nodes {
		if n.Report == nil || n.Report.UID == "" {
			continue
		}
		if uid != "" && uid != n.Report.UID {
			return fmt.Errorf("nodes of the site are in two clusters, %s and %s", uid, n.Report.UID)
		}
		uid = n.Report.UID
	}
	return nil
}

// site is what the centre knows of the site.
func (e *estate) site(ctx context.Context) (v siteView, err error) {
	return v, e.c.ask(ctx, &v, "describe", "site", site)
}

// serving waits until the centre's view of the site fits.
func (e *estate) serving(ctx context.Context, what string, fits func(siteView) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, serverLimit, fmt.Errorf("after %s", serverLimit))
	defer cancel()
	last, said := errors.New("the centre did not answer"), ""
	err := poll(ctx, 2*time.Second, func() (bool, error) {
		v, err := e.site(ctx)
		if err != nil {
			return false, nil // a busy moment; the context ends it
		}
		if err := v.oneCluster(); err != nil {
			return false, err // never, whatever is waited for
		}
		if last = fits(v); last == nil {
			return true, nil
		}
		if text := last.Error(); text != said {
			said = text
			e.l.Say("centre", what, text)
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", err, last)
	}
	return nil
}

// runs waits until the centre knows that a machine runs this version, in this
// state, and heard so after a moment.
func (e *estate) runs(ctx context.Context, p *pc, version string, state fleet.SystemState) error {
	ctx, cancel := context.WithTimeoutCause(ctx, serverLimit, fmt.Errorf("after %s", serverLimit))
	defer cancel()
	var r fleet.SystemReport
	err := poll(ctx, time.Second, func() (bool, error) {
		v, err := e.describe(ctx, p)
		if err != nil || v.System == nil {
			return false, nil // a busy moment; the context ends it
		}
		r = *v.System
		return r.State == state && r.Image == slotImageName+"@"+version, nil
	})
	if err != nil {
		return fmt.Errorf("%w: it runs %s and is %s: %s %v", err, r.Image, r.State, r.Reason, r.Warnings)
	}
	return nil
}
