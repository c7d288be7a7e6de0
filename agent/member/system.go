package member

import (
	"context"
	"errors"
	"fmt"
	"time"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// Boottime reads the kernel's CLOCK_BOOTTIME: the time since this machine
// started, asleep or not.
func Boottime() time.Duration { return boottime() }

// OutcomeKind is the kind of a spooled outcome of an order.
const OutcomeKind = outcomeKind

// TakeUpdateSnapshot takes a snapshot before the node goes to another image,
// and keeps a sealed copy elsewhere where the charter has an escrow key.
func (m *Member) TakeUpdateSnapshot(ctx context.Context, image string) error {
	if err := m.takeSnapshot(ctx, "update-"+image[:min(len(image), 16)]); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.updateSnapshot = image
	return nil
}

// HasUpdateSnapshot reports whether this run of the agent took it. After a
// restart of the agent a fresh one does no harm.
func (m *Member) HasUpdateSnapshot(image string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.updateSnapshot == image
}

// AskTurn asks the servers of this node's cluster, one after the other, for its
// turn: a worker may not write in the cluster.
func (m *Member) AskTurn(ctx context.Context, ask turns.Ask) (turns.Reply, error) {
	obs, _ := m.Observation()
	if obs.Disk.Record == nil {
		return turns.Reply{}, errors.New("member: ask for a turn: this node is in no cluster")
	}
	var errs []error
	for _, p := range obs.Peers {
		s := p.Status
		if s == nil || s.Role != cb.RoleServer || s.Record == nil || s.Record.UID != obs.Disk.Record.UID {
			continue
		}
		got, err := m.ask(ctx, s.Node, func(c Conn) (any, error) { return c.Turn(ctx, ask) })
		if r, ok := got.(turns.Reply); ok && err == nil {
			return r, nil
		}
		errs = append(errs, fmt.Errorf("member: ask %s for a turn: %w", fleet.Words(s.Node), err))
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("member: ask for a turn: no server of the cluster is heard"))
	}
	return turns.Reply{}, errors.Join(errs...)
}

// Tell makes the next report soon.
func (m *Member) Tell() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.show()
}
