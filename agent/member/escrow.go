package member

import (
	"context"
	"errors"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
)

func (m *Member) escrowDue(docs cb.Documents) bool { return false }

func (m *Member) takeSnapshot(ctx context.Context, plan string) error {
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	_, err := m.cfg.K3s.Snapshot(ctx, plan)
	if err == nil {
		m.mu.Lock()
		m.snapshot = plan
		m.mu.Unlock()
	}
	return err
}

func (m *Member) restore(ctx context.Context, a cb.Action) error {
	return errors.New("not yet")
}
