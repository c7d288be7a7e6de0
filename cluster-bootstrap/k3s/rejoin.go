package k3s

import (
	"context"
	"fmt"

	"github.com/muster-edge/muster/fleet"
)

// ForgetPassword makes the cluster forget the password that a node's name
// was first used with. k3s refuses a node that comes back with another one,
// as after a new disk, for ever; here a node has proved by its TPM who it is
// before it gets join material, and that counts more. A node that still has
// the old password has it written down again when it joins.
func (m *Manager) ForgetPassword(ctx context.Context, node fleet.NodeID) error {
	if err := node.Validate(); err != nil {
		return fmt.Errorf("k3s: forget password: %w", err)
	}
	c, err := m.admin()
	if err != nil {
		return err
	}
	if err := c.Delete(ctx, "/api/v1/namespaces/kube-system/secrets/"+string(node)+".node-password.k3s"); err != nil {
		return fmt.Errorf("k3s: forget password of %s: %w", node, err)
	}
	return nil
}
