package central

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pxe"
	pxeserver "github.com/muster-edge/muster/pxe/server"
)

// A machine whose firmware tries the network first asks at each start. When it
// has a system on its disk, the answer is silence, or it would never get there.
// When it asks and asks and nobody hears of its system, the disk does not
// start, and silence would be its end.

const (
	// deafAfter is how long a machine with a system may ask without being heard
	// of before it gets the recovery image: longer than the slowest start of a
	// system with all its tries.
	deafAfter = 20 * time.Minute
	// askedKept bounds how long an unanswered question counts.
	askedKept = 24 * time.Hour
	maxAsked  = 4096
)

// bootFacts are what is known of the node behind a MAC.
type bootFacts struct {
	now time.Time
	// System is what it said of its system; Slot "" if nothing.
	system fleet.SystemReport
	// ordered: an order that is carried out in recovery stands.
	ordered fleet.OrderKind
	// seen is when it was last heard of; asked when it first asked since then.
	seen, asked time.Time
}

// decide says what the machine gets, and why.
func (f bootFacts) decide() (pxe.Standing, string) {
	switch {
	case f.ordered != "":
		return pxe.Recover, "an order (" + string(f.ordered) + ") wants it in recovery"
	case f.system.Slot != fleet.SlotA && f.system.Slot != fleet.SlotB:
		return pxe.Unknown, "it has no system on its disk yet"
	case !f.asked.IsZero() && f.asked.After(f.seen) && f.now.Sub(f.asked) >= deafAfter:
		return pxe.Recover, "it has been asking since " + f.asked.UTC().Format(time.RFC3339) + " and was not heard of: its disk does not start"
	}
	return pxe.Healthy, "it has a system on its disk (" + f.system.Image + ", slot " + f.system.Slot + ")"
}

// asking remembers since when machines ask in vain. It is lost in a restart;
// then they wait once more.
type asking struct {
	mu    sync.Mutex
	since map[fleet.NodeID]time.Time
}

// first returns when the node first asked since it was seen.
func (a *asking) first(id fleet.NodeID, seen, now time.Time) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.since == nil {
		a.since = map[fleet.NodeID]time.Time{}
	}
	if at, ok := a.since[id]; ok && at.After(seen) && now.Sub(at) < askedKept {
		return at
	}
	if len(a.since) >= maxAsked {
		clear(a.since)
	}
	a.since[id] = now
	return now
}

// inRecovery are the orders for which a machine has to be in recovery.
var inRecovery = []fleet.OrderKind{fleet.OrderRecover, fleet.OrderInstall, fleet.OrderWipe}

// standingOf says what the node behind a MAC that is not denied may boot. A MAC
// that two nodes claim proves nothing, and recovery harms nobody.
func (s *Server) standingOf(ctx context.Context, mac string) pxeserver.Decision {
	out := pxeserver.Decision{Standing: pxe.Unknown, Known: s.index.knownMAC(mac), Reason: "may load the recovery image"}
	ids := s.index.byMAC(mac)
	if len(ids) != 1 {
		return out
	}
	e, ok := s.index.get(ids[0])
	if !ok {
		return out
	}
	f := bootFacts{now: s.cfg.Now()}
	err := s.store.View(ctx, func(t store.Reader) error {
		n, err := t.Node(e.tenant, ids[0])
		if err != nil {
			return err
		}
		f.seen = n.LastSeen
		if f.system, err = t.System(e.tenant, ids[0]); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		const most = 64
		orders, err := t.OpenOrders(e.tenant, e.site, ids[0], most)
		for _, o := range orders {
			if slices.Contains(inRecovery, o.Kind) && f.now.Before(o.NotAfter) {
				f.ordered = o.Kind
			}
		}
		return err
	})
	if err != nil {
		// Without the database nobody can enroll either.
		s.log.Warn("what a machine may boot is not known", logError, err)
		return out
	}
	if at, ok := s.seen.when(ids[0]); ok && at.After(f.seen) {
		f.seen = at
	}
	f.asked = s.asking.first(ids[0], f.seen, f.now)
	out.Standing, out.Reason = f.decide()
	return out
}

// when returns a sighting that is not in the database yet.
func (l *lastSeen) when(id fleet.NodeID) (time.Time, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.seen[id]
	return s.at, ok
}

// byMAC returns the nodes that are not denied and claim the MAC, at most two.
func (x *nodeIndex) byMAC(mac string) (out []fleet.NodeID) {
	mac = strings.ToLower(mac)
	x.mu.RLock()
	defer x.mu.RUnlock()
	if x.fine[mac] == 0 {
		return nil
	}
	for id, e := range x.nodes {
		if e.state != fleet.NodeDenied && slices.Contains(e.macs, mac) {
			if out = append(out, id); len(out) == 2 {
				break
			}
		}
	}
	return out
}
