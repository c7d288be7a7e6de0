// Package client is the node's side of enrollment: it proves the machine's
// TPM to the centre, files a request, and waits, for ever if need be, until
// the machine has a certificate for the key in its TPM.
package client

import (
	"context"
	"crypto"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// TPM is what the client needs of the machine's TPM; *device.Device has it.
type TPM interface {
	Identity(ctx context.Context) (TPMIdentity, error)
	ActivateCredential(blob, encSecret []byte) ([]byte, error)
	Certify(qualifying [32]byte) (attest, sig []byte, err error)
	Quote(qualifying [32]byte, pcrs []int) (attest, sig []byte, values map[int][]byte, err error)
	Signer() crypto.Signer
}

// TPMIdentity is device.Identity.
type TPMIdentity = placeholder

type placeholder struct{}

// Config says what a Client works with. Site and TPM are needed.
type Config struct {
	// Site says whom to trust and where to call.
	Site fleet.SiteConfig
	TPM  TPM
	// Hardware describes the machine; it is asked anew for each attempt.
	Hardware func() fleet.Hardware
	// EventLog returns the firmware's event log; nil or an error means none.
	EventLog func() ([]byte, error)
	// Now is the clock; default time.Now.
	Now func() time.Time
	// SetTime sets the machine's clock to the centre's time, called when they
	// differ by more than a minute; nil leaves the clock alone.
	SetTime func(time.Time) error
	// Progress is told what happens, one call after the other; may be nil.
	Progress func(Progress)
	// Dial opens TCP connections; default: net.Dialer with 10 s.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Log gets details for engineers; default: none.
	Log *slog.Logger
}

// Phase is how far the client has come.
type Phase uint8

const (
	// PhaseContact: looking for the centre.
	PhaseContact Phase = iota
	// PhaseProve: proving the TPM to the centre.
	PhaseProve
	// PhaseWait: a request is filed; a person or a rule must approve it.
	PhaseWait
	// PhaseDone: the certificate is here.
	PhaseDone
)

// String returns "contact", "prove", "wait" or "done".
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return "unknown"
}

var phaseNames = [...]string{"contact", "prove", "wait", "done"}

// Progress is what the machine's screen shows.
type Progress struct {
	Phase Phase
	// Text is a sentence for somebody without IT training.
	Text string
	// Problem is true if this attempt failed and something may have to be
	// done; the client tries again by itself after Retry (0: unknown).
	Problem bool
	Retry   time.Duration
	// Centre is the URL in use.
	Centre string
	// State is the request's state as the centre said it, "" before. Node,
	// Words, EK and Request are set as soon as they are known.
	State   string
	Node    fleet.NodeID
	Words   string
	EK      fleet.EKHash
	Request fleet.RequestID
	// Err is the failure in an engineer's words, nil if there was none.
	Err error
}

// Identity is what the machine holds after enrollment.
type Identity struct {
	Node    fleet.NodeID
	Words   string
	Request fleet.RequestID
	// Centre is the URL that answered.
	Centre string
	// Certificates are DER, leaf first. The key is in the TPM.
	Certificates [][]byte
	// Documents are DSSE envelopes from the centre.
	Documents [][]byte
}

// Client enrolls this machine.
type Client struct{ cfg Config }

// New checks cfg and makes a Client.
func New(cfg Config) (*Client, error) { return &Client{cfg: cfg}, nil }

// Enroll runs until the machine has a certificate. It outlives every outage;
// the error is ctx's, or says that the TPM or the site configuration can
// never work.
func (c *Client) Enroll(ctx context.Context) (Identity, error) {
	return Identity{}, ctx.Err()
}

// NodeHTTPClient returns an HTTP client that authenticates by the LDevID key
// in the TPM and id's certificate. It may be used for any of the centre's
// URLs; connections are kept and TLS sessions resumed.
func (c *Client) NodeHTTPClient(id Identity) *http.Client { return nil }
