package host

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/netns"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// Dial connects from the node's network to an address, e.g. its own loopback.
// address has an IP address, no name.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	pid := n.PID()
	if pid == 0 {
		return nil, fmt.Errorf("host: dial from %s: it is off", n.cfg.Name)
	}
	c, err := netns.Dial(ctx, pid, network, address)
	if err != nil {
		return nil, fmt.Errorf("host: dial from %s: %w", n.cfg.Name, err)
	}
	return c, nil
}

// Files is the root of the node's files, seen from the host; "" if it is off.
// Links in it that are absolute lead astray.
func (n *Node) Files() string {
	if pid := n.PID(); pid != 0 {
		return fmt.Sprintf("/proc/%d/root", pid)
	}
	return ""
}

// identify reads from a TPM which node it makes.
func identify(ctx context.Context, t *swtpmtest.TPM) (fleet.NodeID, error) {
	if err := t.Start(); err != nil {
		return "", err
	}
	d, err := device.Open(t.Path())
	if err != nil {
		return "", errors.Join(err, t.Close())
	}
	id, err := d.Identity(ctx)
	if err = errors.Join(err, d.Close(), t.Close()); err != nil {
		return "", err
	}
	if len(id.EKs) == 0 {
		return "", errors.New("host: the TPM has no endorsement key")
	}
	key, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return "", err
	}
	ek, err := fleet.HashEK(key.Public)
	if err != nil {
		return "", err
	}
	return ek.NodeID(), nil
}
