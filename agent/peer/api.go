package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/muster-edge/muster/agent/papers"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

var errNotYet = errors.New("peer: not written yet")

// Peer is this node's end of the protocol, server and client.
type Peer struct{ cfg Config }

// New checks cfg.
func New(cfg Config) (*Peer, error) { return nil, errNotYet }

// Run serves peers on ln until ctx ends, and closes ln.
func (p *Peer) Run(ctx context.Context, ln net.Listener) error { return errNotYet }

// Dial opens a connection to a peer. It proves this node's key; whose the
// other end is, Hello finds out.
func (p *Peer) Dial(ctx context.Context, addr string) (*Conn, error) { return nil, errNotYet }

// Conn is one connection to a peer. Calls wait for each other; an Escrow call
// takes long, and should have a Conn of its own.
type Conn struct{}

// Close ends the connection.
func (c *Conn) Close() error { return errNotYet }

// Peer is the other end once Hello has succeeded, "" before.
func (c *Conn) Peer() fleet.NodeID { return "" }

// Hello must be the first call. It shows this node's papers, learns the
// peer's, and checks that the peer is an admitted node.
func (c *Conn) Hello(ctx context.Context) (Greeting, error) { return Greeting{}, errNotYet }

// Exchange passes documents on, both ways, until neither side lacks any, and
// returns how many were new here.
func (c *Conn) Exchange(ctx context.Context) (learned int, err error) { return 0, errNotYet }

// Status shows this node's status and hears the peer's, which goes to
// Node.Heard as well. Changed tells that the peer's documents differ from what
// they were at the last Exchange.
func (c *Conn) Status(ctx context.Context) (s clusterbootstrap.Status, changed bool, err error) {
	return clusterbootstrap.Status{}, false, errNotYet
}

// JoinMaterial proves what this node runs and asks for what it needs to join.
// The error is *Denied if the peer's planner says no.
func (c *Conn) JoinMaterial(ctx context.Context, as clusterbootstrap.Role, plan string) (Material, error) {
	return Material{}, errNotYet
}

// Lease asks for a lease under plan and returns its length, to be counted from
// the moment this was called.
func (c *Conn) Lease(ctx context.Context, plan string) (time.Duration, error) { return 0, errNotYet }

// KeepEscrow hands b over to be kept; data has b.Size bytes.
func (c *Conn) KeepEscrow(ctx context.Context, b Blob, data io.Reader) error { return errNotYet }

// GetEscrow writes a blob to w and checks its digest.
func (c *Conn) GetEscrow(ctx context.Context, ref papers.Ref, w io.Writer) (int64, error) {
	return 0, errNotYet
}

// ListEscrow lists what the peer keeps.
func (c *Conn) ListEscrow(ctx context.Context) ([]Blob, error) { return nil, errNotYet }
