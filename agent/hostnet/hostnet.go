// Package hostnet keeps two things of the host's network as the site needs
// them: the in-site addresses with the routes to them, and a table of its own
// in nftables that lets admitted nodes alone reach the ports of k3s. It touches
// nothing else, and brings both back when somebody changed them.
package hostnet

import (
	"errors"
	"net/netip"
)

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
	// between nodes end.
	Nodes []netip.Addr
	// Networks are the pod and service networks.
	Networks []netip.Prefix
	// PeerPort is the port of the peer API (7445); PeerRate is how many new
	// connections a minute each source may make (120).
	PeerPort uint16
	PeerRate int
}

// Host changes the network of this host. Methods may be called from one
// goroutine at a time.
type Host struct{}

// Apply makes things as d says. What is right already is not touched, so that
// connections stay; calling it again costs little and mends what others broke.
func (h *Host) Apply(d Desired) error { return errors.New("hostnet: not built yet") }

// Remove takes link, routes and firewall table away.
func (h *Host) Remove() error { return errors.New("hostnet: not built yet") }
