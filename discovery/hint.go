package discovery

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Source says who gave a hint, and so which pool it may fill and how fast it
// may cause dials.
type Source uint8

const (
	// SourceMulticast is an advert heard by mDNS: anybody on the LAN can forge it.
	SourceMulticast Source = iota
	// SourcePeer is an address that an authenticated peer passed on.
	SourcePeer
	// SourceConfigured comes from the site's own configuration.
	SourceConfigured
	// SourceRemembered was proven in an earlier run.
	SourceRemembered

	numSources = int(SourceRemembered) + 1
)

func (s Source) String() string {
	switch s {
	case SourceMulticast:
		return "mdns"
	case SourcePeer:
		return "peer"
	case SourceConfigured:
		return "configured"
	case SourceRemembered:
		return "remembered"
	}
	return fmt.Sprintf("source(%d)", uint8(s))
}

// Hint says that a peer may be at an address.
type Hint struct {
	Source Source
	// Addr is where to dial. A link-local IPv6 address carries the zone of
	// the interface it was heard on.
	Addr netip.AddrPort
	// Tag is the site the advert names; adverts of other sites are refused.
	Tag SiteTag
	// Instance is the advert's label. A new one at a known address means that
	// the program there has started again.
	Instance string
	// TTL is how long the hint holds, capped per source.
	TTL time.Duration
	// Goodbye withdraws the advert (RFC 6762 §10.1).
	Goodbye bool
	// Via is the authenticated peer that passed the address on.
	Via fleet.NodeID
	// Node is the node expected there, if the source says so.
	Node fleet.NodeID
}

// Outcome is what became of a hint.
type Outcome uint8

const (
	// Added is a new address.
	Added Outcome = iota
	// Refreshed is an address known before.
	Refreshed
	// Withdrawn is a goodbye that was taken.
	Withdrawn
	// WrongSite is an advert with a tag that is not ours.
	WrongSite
	// BadAddress cannot be dialled: no port, no unicast, no zone.
	BadAddress
	// BadSource is a hint that lacks what its source must give.
	BadSource
	// PoolFull is a new address for which its source has no room.
	PoolFull
	// ManyPorts is a further port of a host that has advertised enough.
	ManyPorts

	numOutcomes = int(ManyPorts) + 1
)

func (o Outcome) String() string {
	switch o {
	case Added:
		return "added"
	case Refreshed:
		return "refreshed"
	case Withdrawn:
		return "withdrawn"
	case WrongSite:
		return "wrong site"
	case BadAddress:
		return "bad address"
	case BadSource:
		return "bad source"
	case PoolFull:
		return "pool full"
	case ManyPorts:
		return "many ports"
	}
	return fmt.Sprintf("outcome(%d)", uint8(o))
}

// maxZone is the longest interface name on Linux (IFNAMSIZ - 1).
const maxZone = 15

// dialable returns the address in its one form, and whether it can be dialled.
func dialable(a netip.AddrPort, s Source) (netip.AddrPort, bool) {
	ip := a.Addr().Unmap()
	switch {
	case !ip.IsValid() || a.Port() == 0 || ip.IsUnspecified() || ip.IsMulticast():
		return a, false
	case ip.Is4() && ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return a, false
	case ip.IsLoopback() && s != SourceConfigured:
		return a, false
	case ip.Is6() && ip.IsLinkLocalUnicast():
		if z := ip.Zone(); z == "" || len(z) > maxZone {
			return a, false
		}
	case ip.Zone() != "":
		ip = ip.WithZone("")
	}
	return netip.AddrPortFrom(ip, a.Port()), true
}
