package member

import (
	"context"
	"time"
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

// Tell makes the next report soon.
func (m *Member) Tell() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.show()
}
