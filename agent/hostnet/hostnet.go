// Package hostnet keeps two things of the host's network as the site needs
// them: the in-site addresses with the routes to them, and a table of its own
// in nftables that lets admitted nodes alone reach the ports of k3s. It touches
// nothing else, and brings both back when somebody changed them.
//
// In-site addresses are on a dummy link, and each peer's one is routed by the
// LAN address at which that peer was last proven to be. So a new LAN address
// of a node, or of all of them, changes routes and nothing else: k3s and etcd
// keep knowing each other. docs/adr/0007-in-site-addresses.md has the reasons.
package hostnet

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
)

// Link is the dummy link that carries the in-site address.
const Link = "muster0"

// routeProtocol marks the routes that are ours (/etc/iproute2/rt_protos leaves
// this number free); all others are left alone.
const routeProtocol = 187

// Desired is how things should be.
type Desired struct {
	// Self is this node's in-site address; invalid: the site has none, and
	// link and routes are taken away.
	Self netip.Addr
	// Peers are the in-site addresses of admitted nodes, with the LAN address
	// (IPv4 or IPv6, with zone for link-local ones) at which each was last
	// proven to be. A peer without a LAN address gets no route.
	Peers map[netip.Addr]netip.Addr
	// Link is the LAN interface. "": by the route to each LAN address.
	Link string
	// FallbackDefault adds a default route by the dummy link, with the worst
	// metric, while there is no other: k3s does not start without one.
	FallbackDefault bool
	// Firewall: nil leaves the host's rules alone.
	Firewall *Firewall
}

// Firewall limits who reaches the ports of k3s and of the peer API.
type Firewall struct {
	// Nodes are the addresses of admitted nodes besides the in-site ones: LAN
	// addresses of a site without in-site addresses, and where tunnels
	// between nodes end. What cannot be a host's address is left out.
	Nodes []netip.Addr
	// Networks are the pod and service networks.
	Networks []netip.Prefix
	// PeerPort is the port of the peer API (7445); PeerRate is how many new
	// connections a minute each source may make (120).
	PeerPort uint16
	PeerRate int
}

// maxPeers bounds routes and firewall entries: papers keep no more.
const maxPeers = 4096

// Validate reports all problems.
func (d Desired) Validate() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("hostnet: "+format, args...))
		}
	}
	check(!d.Self.IsValid() || d.Self.Is4() && usable(d.Self), "in-site address %s is no IPv4 address of a node", d.Self)
	check(d.Self.IsValid() || len(d.Peers) == 0, "peers have in-site addresses, this node has none")
	check(len(d.Peers) <= maxPeers, "%d peers, at most %d are possible", len(d.Peers), maxPeers)
	for in := range d.Peers {
		check(in.Is4() && usable(in) && in != d.Self, "in-site address %s of a peer cannot be that", in)
	}
	if f := d.Firewall; f != nil {
		check(len(f.Nodes) <= maxPeers && len(f.Networks) <= 64, "%d nodes and %d networks in the firewall", len(f.Nodes), len(f.Networks))
		for _, n := range f.Networks {
			check(n.IsValid() && n.Bits() > 0 && n == n.Masked(), "network %s in the firewall", n)
		}
		check(f.PeerRate >= 0 && f.PeerRate <= 1_000_000, "peer rate %d", f.PeerRate)
	}
	return errors.Join(errs...)
}

func usable(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.Is4In6()
}

// checkLAN says what is wrong with where a peer is said to be. That is one
// peer's matter: the others get their routes all the same.
func (d Desired) checkLAN(lan netip.Addr) error {
	_, inSite := d.Peers[lan]
	switch {
	case !usable(lan):
		return errors.New("hostnet: no address of a host")
	case inSite, lan == d.Self:
		return errors.New("hostnet: it is an in-site address itself")
	case lan.Is6() && lan.IsLinkLocalUnicast() && lan.Zone() == "" && d.Link == "":
		return errors.New("hostnet: it is of no known link")
	}
	return nil
}

// Host changes the network of this host. Methods may be called from one
// goroutine at a time. The zero value is ready.
type Host struct {
	// Log gets peers that have no usable LAN address; nil: nobody does.
	Log *slog.Logger
}

// Apply makes things as d says. What is right already is not touched, so that
// connections stay; calling it again costs little and mends what others broke.
// The firewall goes first, so that nothing is open that should not be. A peer
// whose LAN address cannot be reached from here keeps the route that it had, if
// any, and is logged: it must not keep this node from running.
func (h *Host) Apply(d Desired) error {
	if err := d.Validate(); err != nil {
		return err
	}
	var errs []error
	if d.Firewall != nil {
		errs = append(errs, applyFirewall(*d.Firewall, inSite(d)))
	}
	log := h.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	errs = append(errs, applyRoutes(d, log))
	return errors.Join(errs...)
}

// Remove takes link, routes and firewall table away.
func (h *Host) Remove() error {
	return errors.Join(removeFirewall(), removeLink())
}

func inSite(d Desired) []netip.Addr {
	var out []netip.Addr
	if d.Self.IsValid() {
		out = append(out, d.Self)
	}
	for in := range d.Peers {
		out = append(out, in)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}
