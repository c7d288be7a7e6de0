package scenario

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/host"
	"github.com/muster-edge/muster/lab/host/ether"
)

// The shop's LAN: nodes have 10.88.1.1 and up, later perhaps 10.88.2.1 and up.
// The router is where the way to the centre begins.
const (
	wanPort  = "wan"
	wanLink  = "wan0"
	oldLAN   = "10.88.1."
	newLAN   = "10.88.2."
	routerAt = "254"
	prefix   = "/24"
)

// agentName is the node agent's service on a node.
const agentName = "agent"

// shop is a site of nodes on a LAN of its own, with a centre far away.
type shop struct {
	l     *lab.Lab
	c     *centre
	sw    *ether.Switch
	image host.Image
	opts  shopOptions
	nodes []*box
	watch *watch

	mu       sync.Mutex
	approved map[string]bool // requests, as a person saw them
	hear     func(node, line string)
}

// shopOptions is what a scenario wants to be otherwise.
type shopOptions struct {
	// founding is the founding mode, "central" if "".
	founding fleet.FoundingMode
	// policy are more arguments of the command that makes the site.
	policy []string
	// strangers are nodes, by name, whom nobody approves.
	strangers map[string]bool
	// edit may change a node before it is made.
	edit func(*host.Config)
}

// box is a node of the shop.
type box struct {
	*host.Node
	s *shop
	// n counts from 1: the last part of its address.
	n int
}

// prepareShop makes what a centre's operator makes once, and the image that
// nodes boot.
func prepareShop(ctx context.Context, l *lab.Lab) error {
	if _, err := l.Muster(ctx, "release", "keygen", "--out", l.Path(releaseKey)); err != nil {
		return fmt.Errorf("scenario: make release key: %w", err)
	}
	if _, err := l.Muster(ctx, "ca", "init", "--data", centreDir(l)); err != nil {
		return fmt.Errorf("scenario: make CA: %w", err)
	}
	if _, err := l.Muster(ctx, "ca", "export", "--data", centreDir(l), "--out", l.Path("public")); err != nil {
		return fmt.Errorf("scenario: export public keys: %w", err)
	}
	text, err := os.ReadFile(l.Path(releaseKey))
	if err != nil {
		return fmt.Errorf("scenario: read release key: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return errors.New("scenario: read release key: no PEM block")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return fmt.Errorf("scenario: read release key: %w", err)
	}
	return shopImage().Write(imageDir(l), key.(crypto.Signer))
}

// shopImage is what the shop's nodes boot.
func shopImage() host.Image { return host.NewImage("lab-slot", "1.0.0") }

// openLAN makes the LAN with nothing in it but the way to the centre.
func openLAN(l *lab.Lab) (*shop, error) {
	s := &shop{l: l, sw: ether.New(ether.Config{Seed: l.Spec.Seed}), image: shopImage(), approved: map[string]bool{}}
	_, lossy := host.CheckHost()
	l.Site(func(r *lab.SiteResult) {
		r.PowerCut = "unsynced data lost"
		if lossy != nil {
			r.PowerCut = "processes killed, no data lost: " + lossy.Error()
		}
	})
	l.Defer(s.close)
	if err := s.wan(); err != nil {
		return nil, err
	}
	return s, nil
}

// openShop makes the LAN, the centre and the nodes; all nodes are off.
func openShop(ctx context.Context, l *lab.Lab, o shopOptions) (*shop, error) {
	s, err := openLAN(l)
	if err != nil {
		return nil, err
	}
	if s.opts = o; s.opts.founding == "" {
		s.opts.founding = fleet.FoundCentral
	}
	c, err := startCentre(ctx, l, false)
	if err != nil {
		return nil, err
	}
	s.c = c
	// The TPMs' vendor exists from the first node on.
	if err := s.addNodes(l.Spec.Nodes); err != nil {
		return nil, err
	}
	if err := c.introduce(ctx); err != nil {
		return nil, err
	}
	if err := s.charter(ctx); err != nil {
		return nil, err
	}
	s.watch = newWatch(s)
	return s, nil
}

// wan plugs the way to the centre into the LAN.
func (s *shop) wan() error {
	tap, err := host.OpenTap(wanLink, net.HardwareAddr{0x52, 0x54, 0, 0x77, 0x61, 0x6e})
	if err != nil {
		return err
	}
	if err := s.sw.Attach(wanPort, tap); err != nil {
		return errors.Join(err, tap.Close())
	}
	return host.ConfigureLink(wanLink, host.Address{CIDR: oldLAN + routerAt + prefix}, host.Address{CIDR: newLAN + routerAt + prefix})
}

// charter makes the site at the centre, as an operator does.
func (s *shop) charter(ctx context.Context) error {
	return s.makeSite(ctx)
}

// addNodes makes nodes that are off, a few at a time.
func (s *shop) addNodes(count int) error {
	from := len(s.nodes)
	boxes := make([]*box, count)
	var g errgroup.Group
	g.SetLimit(2)
	for i := range boxes {
		g.Go(func() error {
			b, err := s.makeNode(from + i + 1)
			boxes[i] = b
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	s.nodes = append(s.nodes, boxes...)
	for _, b := range boxes {
		s.l.AddNode(b.Name(), string(b.ID()))
		s.l.Note(b.Name(), "made", fmt.Sprintf("%s (%s)", b.ID(), fleet.Words(b.ID())))
	}
	return nil
}

func (s *shop) makeNode(n int) (*box, error) {
	name := fmt.Sprintf("node%d", n)
	config, err := s.siteConfig()
	if err != nil {
		return nil, err
	}
	shared := []string{filepath.Dir(s.l.Spec.NodeProgram)}
	if d := filepath.Dir(s.l.Spec.K3s); d != shared[0] {
		shared = append(shared, d)
	}
	cfg := host.Config{
		Name: name, Dir: s.l.Path(name), Switch: s.sw, Address: oldLAN + fmt.Sprint(n) + prefix, Gateway: oldLAN + routerAt,
		Authority: s.l.Authority(), Image: s.image, Shared: shared, Program: s.l.Spec.Program,
		Files:    map[string][]byte{siteFile: config},
		Services: []host.Service{s.agent()},
		OnLine:   func(service, line string) { s.heard(name, service, line) },
	}
	if s.opts.edit != nil {
		s.opts.edit(&cfg)
	}
	node, err := host.New(cfg)
	if err != nil {
		return nil, err
	}
	b := &box{Node: node, s: s, n: n}
	f, err := os.Create(s.l.Path(name, "net0.pcap"))
	if err != nil {
		return nil, fmt.Errorf("scenario: begin capture: %w", err)
	}
	return b, s.sw.Capture(name, f)
}

const siteFile = "/etc/muster/site.json"

// siteConfig is what is built into the image: whom to trust, where to call.
func (s *shop) siteConfig() ([]byte, error) {
	cfg := fleet.SiteConfig{
		Format: fleet.SiteConfigFormat, Image: s.image.Name, Version: s.image.Version,
		Centre: []string{"https://" + lab.BootHost + ":7444"}, TimeFloor: s.image.Created,
	}
	for _, f := range []struct {
		to   *string
		from string
	}{{&cfg.RootsPEM, rootCA}, {&cfg.OrdersKeysPEM, ordersKey}, {&cfg.ReleaseKeysPEM, releaseKey + ".pub"}} {
		b, err := os.ReadFile(s.l.Path(f.from))
		if err != nil {
			return nil, fmt.Errorf("scenario: write site.json: %w", err)
		}
		*f.to = string(b)
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, fmt.Errorf("scenario: write site.json: %w", err)
	}
	return b, nil
}

// agent is the node agent as it runs on every node.
func (s *shop) agent() host.Service {
	service := host.Service{Name: agentName, Argv: []string{s.l.Spec.NodeProgram, "agent",
		"--site-file", siteFile, "--tpm", "unix:" + host.TPMSocket, "--event-log", host.EventLogFile,
		"--k3s", s.l.Spec.K3s, "--link", host.Link, "--control", "direct"}}
	if s.l.Spec.StandIn {
		service.Env = append(service.Env, "LAB_STANDIN=1")
	}
	return service
}

// close ends all nodes at once, then the LAN.
func (s *shop) close() error {
	if s.watch != nil {
		s.watch.end()
	}
	errs := make([]error, len(s.nodes))
	var wg sync.WaitGroup
	for i, b := range s.nodes {
		wg.Go(func() { errs[i] = b.Close() })
	}
	wg.Wait()
	return errors.Join(append(errs, s.sw.Close())...)
}

// heard takes a line that a service of a node printed: what the agent logs as
// JSON goes onto the time line.
func (s *shop) heard(node, service, line string) {
	s.mu.Lock()
	hear := s.hear
	s.mu.Unlock()
	if hear != nil {
		hear(node, line)
	}
	var m struct {
		Time  time.Time `json:"time"`
		Level string    `json:"level"`
		Msg   string    `json:"msg"`
	}
	if json.Unmarshal([]byte(line), &m) != nil || m.Msg == "" {
		if !strings.HasPrefix(line, "{") {
			s.l.Note(node, service+"-said", clipText(line, 300))
		}
		return
	}
	rest := map[string]any{}
	_ = json.Unmarshal([]byte(line), &rest) // it has been read once
	for _, k := range []string{"time", "level", "msg"} {
		delete(rest, k)
	}
	text := m.Msg
	if len(rest) > 0 {
		if b, err := json.Marshal(rest); err == nil {
			text += " " + string(b)
		}
	}
	at := m.Time
	if at.IsZero() {
		at = time.Now()
	}
	s.l.At(at, node, service+"-"+strings.ToLower(m.Level), clipText(text, 600), false)
}

// onLine makes f hear every line of every node; it must not block.
func (s *shop) onLine(f func(node, line string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear = f
}

func clipText(s string, most int) string {
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// box finds a node by its number, from 1.
func (s *shop) box(n int) *box { return s.nodes[n-1] }

// byID finds a node by its ID, nil if there is none.
func (s *shop) byID(id string) *box {
	for _, b := range s.nodes {
		if string(b.ID()) == id {
			return b
		}
	}
	return nil
}

// on switches nodes on.
func (s *shop) on(ctx context.Context, boxes ...*box) error {
	var g errgroup.Group
	for _, b := range boxes {
		g.Go(func() error {
			if err := b.PowerOn(ctx); err != nil {
				return err
			}
			s.l.Say(b.Name(), "power-on", "power on")
			return nil
		})
	}
	return g.Wait()
}

// cut takes the power away from nodes, all at once.
func (s *shop) cut(boxes ...*box) error {
	var g errgroup.Group
	for _, b := range boxes {
		g.Go(func() error {
			s.l.Say(b.Name(), "power-cut", "the power is cut")
			return b.Cut()
		})
	}
	return g.Wait()
}

// centreAway and centreBack cut and mend the way to the centre.
func (s *shop) centreAway() error {
	s.l.Say("lab", "wan-cut", "the way to the centre is cut")
	return s.sw.Dark(wanPort, 0)
}

func (s *shop) centreBack() {
	s.sw.Light(wanPort)
	s.l.Say("lab", "wan-mended", "the way to the centre works again")
}
