package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/lab/machine"
)

// trunk is a switch port that carries one VLAN, tagged, and nothing else
// (IEEE 802.1Q): between a machine's card and the bridge, on which frames have
// no tag. It is in user space, since the host's kernel may know no VLANs.
type trunk struct {
	vlan    uint16
	machine *net.UnixConn // one datagram is one frame
	peer    *net.UnixAddr // QEMU's end
	bridge  *os.File      // a tap
	wg      sync.WaitGroup

	in, out, dropped atomic.Uint64
}

const (
	etherHeader = 12 // both addresses
	tagged      = 0x8100
	tagSize     = 4
	maxFrame    = 9 << 10
)

// untag takes the tag of a VLAN off a frame; false for frames without one or
// of another. b is changed.
func untag(b []byte, vlan uint16) ([]byte, bool) {
	if len(b) < etherHeader+tagSize+2 || binary.BigEndian.Uint16(b[etherHeader:]) != tagged ||
		binary.BigEndian.Uint16(b[etherHeader+2:])&0xfff != vlan {
		return nil, false
	}
	copy(b[tagSize:], b[:etherHeader])
	return b[tagSize:], true
}

// tag puts the tag of a VLAN on a frame, into out.
func tag(out, b []byte, vlan uint16) []byte {
	if len(b) < etherHeader+2 {
		return nil
	}
	out = append(out[:0], b[:etherHeader]...)
	out = binary.BigEndian.AppendUint16(out, tagged)
	out = binary.BigEndian.AppendUint16(out, vlan)
	return append(out, b[etherHeader:]...)
}

// startTrunk plugs a machine with this directory into a port that carries a
// VLAN; tap becomes the port on the bridge.
func startTrunk(dir, tap string, vlan int) (*trunk, error) {
	card, port := machine.CablePaths(dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("lab: make VLAN port: %w", err)
	}
	if err := os.Remove(port); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("lab: make VLAN port: %w", err)
	}
	bridge, err := openTap(tap)
	if err != nil {
		return nil, err
	}
	if err := enslave(tap); err != nil {
		_ = bridge.Close()
		return nil, err
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: port, Net: "unixgram"})
	if err != nil {
		_ = bridge.Close()
		return nil, fmt.Errorf("lab: make VLAN port: %w", err)
	}
	t := &trunk{vlan: uint16(vlan), machine: conn, peer: &net.UnixAddr{Name: card, Net: "unixgram"}, bridge: bridge}
	t.wg.Go(t.up)
	t.wg.Go(t.down)
	return t, nil
}

// up carries frames from the machine to the bridge. It ends with close.
func (t *trunk) up() {
	buf := make([]byte, maxFrame)
	for {
		n, err := t.machine.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		frame, ok := untag(buf[:n], t.vlan)
		if !ok {
			t.dropped.Add(1)
			continue
		}
		t.in.Add(1)
		_, _ = t.bridge.Write(frame) // a full queue drops, as a switch does
	}
}

// down carries frames from the bridge to the machine.
func (t *trunk) down() {
	buf, out := make([]byte, maxFrame), make([]byte, 0, maxFrame+tagSize)
	for {
		n, err := t.bridge.Read(buf)
		if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADFD) {
			return
		}
		if err != nil {
			continue
		}
		if out = tag(out, buf[:n], t.vlan); out == nil {
			continue
		}
		t.out.Add(1)
		_, _ = t.machine.WriteToUnix(out, t.peer) // a machine that is off hears nothing
	}
}

func (t *trunk) close() error {
	err := errors.Join(t.machine.Close(), t.bridge.Close())
	t.wg.Wait()
	return err
}

// TrunkCounts are what a machine's VLAN port has carried: frames to the
// network, frames to the machine, and frames of the machine that had no tag or
// another.
func (l *Lab) TrunkCounts(m *machine.Machine) (in, out, dropped uint64) {
	l.mu.Lock()
	t := l.trunks[m.Name()]
	l.mu.Unlock()
	if t == nil {
		return 0, 0, 0
	}
	return t.in.Load(), t.out.Load(), t.dropped.Load()
}
