package peer

import (
	"sync"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// heard remembers the newest status of each node. Its size is bounded by the
// admissions of the site.
type heard struct {
	mu sync.Mutex
	of map[fleet.NodeID]newest
}

type newest struct {
	boots, seq uint64
	at         time.Time
}

func newHeard() *heard { return &heard{of: map[fleet.NodeID]newest{}} }

// take tells whether a status that arrives now is newer than all before. Two
// connections of one node may overtake each other, so (Boots, Seq) decide. But
// what comes over a connection whose hello began after the last status had
// arrived was said after it, whatever the numbers: the node has lost its count
// with its disk, and must not be deaf for ever.
func (h *heard) take(now, hello time.Time, s clusterbootstrap.Status) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, known := h.of[s.Node]
	if known && !old.at.Before(hello) && (s.Boots < old.boots || s.Boots == old.boots && s.Seq <= old.seq) {
		return false
	}
	h.of[s.Node] = newest{boots: s.Boots, seq: s.Seq, at: now}
	return true
}
