// Package peer is how the nodes of a site talk to each other on a LAN that
// nobody trusts: they prove who they are, pass signed documents on, show each
// other their status, and give a node that proved what it runs the means to
// join the cluster. DESIGN.md says what each proof proves.
//
// It decides nothing about the cluster: that is cluster-bootstrap. It finds
// nobody: that is discovery. It remembers nothing but escrowed blobs.
package peer

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/agent/papers"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// Port is where peers listen, unless they are told otherwise.
const Port = 7445

// Node is the node that peers talk to. All methods may be called at once.
type Node interface {
	// Status is what this node shows now; all of it is flushed.
	Status() clusterbootstrap.Status
	// Heard takes the status of an admitted peer; older ones than the last
	// were dropped before. At is where the peer serves, as this connection
	// proves; the port is the peer's word.
	Heard(from fleet.NodeID, at netip.AddrPort, s clusterbootstrap.Status)
	// Hinted takes addresses that a peer passed on: hints, like adverts.
	Hinted(from fleet.NodeID, at []Address)
	// Addresses are those of peers this node has spoken to lately.
	Addresses() []Address
	// Observation is what the planner would see now, as flushed.
	Observation() (clusterbootstrap.Observation, clusterbootstrap.Policy)
	// NoteGrant sets Observation.LastGrant to now before it returns. It is
	// called before the lease is looked at a second time and answered.
	NoteGrant(to fleet.NodeID)
	// Material gets what a node needs to join. It is called after
	// clusterbootstrap.AnswerMaterial said yes.
	Material(ctx context.Context, to fleet.NodeID, as clusterbootstrap.Role, plan string) (Material, error)
}

// TPM is what proofs need of the node's TPM; *device.Device has it.
type TPM interface {
	Identity(ctx context.Context) (device.Identity, error)
	ActivateCredential(blob, encSecret []byte) ([]byte, error)
	Certify(qualifying [32]byte) (attest, sig []byte, err error)
	Quote(qualifying [32]byte, pcrs []int) (attest, sig []byte, values map[int][]byte, err error)
}

// Address is where a peer may be.
type Address struct {
	Node fleet.NodeID
	At   netip.AddrPort
}

// Material is what a node needs to join the cluster. Its tokens are secrets:
// call Wipe after use.
type Material struct {
	// Servers are https URLs, best first.
	Servers []string
	// Token is in K10 form: a bootstrap token of minutes for a worker, the
	// server token for a candidate.
	Token Secret
	// AgentToken is the server's own token for agents, if it has one that is
	// not Token: for candidates only.
	AgentToken Secret
	// Version and Args are those of the server's k3s, as in a Status.
	Version, Args string
	// Good is how long the token is good from now; 0: for ever.
	Good  time.Duration
	UID   string
	Epoch uint64
	// As and Plan are what was asked for.
	As   clusterbootstrap.Role
	Plan string
}

// Wipe overwrites the tokens.
func (m *Material) Wipe() {
	clear(m.Token)
	clear(m.AgentToken)
	m.Token, m.AgentToken = nil, nil
}

// Secret never shows itself.
type Secret []byte

// String hides the secret, whatever the verb.
func (Secret) String() string { return "[secret]" }

// GoString hides the secret from %#v.
func (Secret) GoString() string { return "[secret]" }

// Format hides the secret from every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[secret]") }

// LogValue hides the secret from slog.
func (Secret) LogValue() slog.Value { return slog.StringValue("[secret]") }

// MarshalText hides the secret from encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }

// Config says what a Peer works with. All but the last ones are needed.
type Config struct {
	Self fleet.NodeID
	// Signer has the LDevID key.
	Signer crypto.Signer
	Papers *papers.Papers
	Node   Node
	TPM    TPM
	// EventLog returns the firmware's event log; nil or an error means none.
	EventLog func() ([]byte, error)
	// EscrowDir holds the blobs of peers; "" keeps none.
	EscrowDir string
	// Turns asks the cluster for workers; nil gives no turns.
	Turns TurnGiver
	// Blobs are the files for peers; nil serves none.
	Blobs  Blobs
	Limits Limits
	// Now is the clock: its monotonic part measures ages, its wall part is
	// shown as a hint. Default time.Now.
	Now func() time.Time
	// Log; default: none.
	Log *slog.Logger
}

// Errors that a caller branches on. They may be wrapped.
var (
	// ErrRefused: the server does not know this node as admitted, or does not
	// talk to it now. It says no more.
	ErrRefused = errors.New("peer: refused")
	// ErrStranger: the server did not prove to be an admitted node.
	ErrStranger = errors.New("peer: the server is no admitted node of this site")
	// ErrRemoved: the server is a node that was removed from the site.
	ErrRemoved = errors.New("peer: the server was removed from this site")
	// ErrSelf: the server is this node itself.
	ErrSelf = errors.New("peer: this is the node itself")
	// ErrNotServer: the server's admission does not let it be a server.
	ErrNotServer = errors.New("peer: the peer may not be a server")
	// ErrUnproven: the server did not take the proof of what this node runs.
	ErrUnproven = errors.New("peer: the proof of what this node runs was not taken")
	// ErrServerUnproven: the server did not prove that it runs what the charter
	// allows. What it offers must not be joined.
	ErrServerUnproven = errors.New("peer: the server did not prove what it runs")
	// ErrNotKept: the blob is not here, or is not wanted.
	ErrNotKept = errors.New("peer: the blob is not kept")
	// ErrBusy: the server has too much to do; try later.
	ErrBusy = errors.New("peer: busy")
	// ErrClosed: the connection is gone; dial again.
	ErrClosed = errors.New("peer: the connection is gone")
)

// Denied is the planner's no to JoinMaterial or Lease.
type Denied struct{ Why string }

// Error implements error.
func (d *Denied) Error() string { return "peer: denied: " + d.Why }

// Greeting is what Hello learned.
type Greeting struct {
	Node      fleet.NodeID
	Admission fleet.Admission
	// At is where the peer serves: the address that was dialled.
	At netip.AddrPort
	// Time is the peer's clock: a hint.
	Time time.Time
	// Learned counts new documents.
	Learned int
}

// Blob describes an escrowed blob. Size is at most Limits.EscrowSize.
type Blob struct {
	SHA256 papers.Ref
	Size   int64
	Name   string
	// Owner is the node that handed it over; set by who keeps it.
	Owner fleet.NodeID
	UID   string
	Epoch uint64
	// Kind is that of fleet/escrow: "" for a snapshot, or disk-key.
	Kind string
}
