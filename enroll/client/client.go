// Package client is the node's side of enrollment: it proves the machine's
// TPM to the centre, files a request, and waits, for ever if need be, until
// the machine has a certificate for the key in its TPM.
//
// It keeps nothing: identity and keys are in the TPM, so after a restart
// Enroll simply runs again and finds its request where it was.
package client

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// TPM is what the client needs of the machine's TPM; *device.Device has it.
type TPM interface {
	Identity(ctx context.Context) (TPMIdentity, error)
	ActivateCredential(blob, encSecret []byte) ([]byte, error)
	Certify(qualifying [32]byte) (attest, sig []byte, err error)
	Quote(qualifying [32]byte, pcrs []int) (attest, sig []byte, values map[int][]byte, err error)
	Signer() crypto.Signer
}

// TPMIdentity is what a TPM shows of itself.
type TPMIdentity = device.Identity

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
	// RetryMin and RetryMax bound the pause after a failure, unless the
	// centre asks for a longer one; default 1 s and 60 s.
	RetryMin, RetryMax time.Duration
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
type Client struct {
	cfg    Config
	urls   []string
	roots  []*x509.Certificate
	proxy  *url.URL
	screen Progress
}

// New checks cfg and makes a Client. A configuration that can never work is
// an error here, all of its problems at once.
func New(cfg Config) (*Client, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	}
	if cfg.RetryMin <= 0 {
		cfg.RetryMin = time.Second
	}
	if cfg.RetryMax < cfg.RetryMin {
		cfg.RetryMax = max(time.Minute, cfg.RetryMin)
	}
	c := &Client{cfg: cfg}
	if err := c.readSite(); err != nil {
		return nil, err
	}
	return c, nil
}

// readSite parses the site configuration.
func (c *Client) readSite() error {
	var problems []error
	if c.cfg.TPM == nil {
		problems = append(problems, errors.New("TPM is missing"))
	}
	for _, s := range c.cfg.Site.Centre {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			problems = append(problems, fmt.Errorf("centre URL %q: want https://host[:port]", s))
			continue
		}
		c.urls = append(c.urls, u.String())
	}
	if len(c.cfg.Site.Centre) == 0 {
		problems = append(problems, errors.New("there is no centre URL"))
	}
	for rest := []byte(c.cfg.Site.RootsPEM); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			problems = append(problems, fmt.Errorf("root certificate: %w", err))
			continue
		}
		c.roots = append(c.roots, cert)
	}
	if len(c.roots) == 0 {
		problems = append(problems, errors.New("there is no root certificate: no centre can be trusted"))
	}
	if p := c.cfg.Site.Network.Proxy; p != "" {
		u, err := url.Parse(p)
		if err != nil || u.Scheme != "http" || u.Host == "" {
			problems = append(problems, errors.New("proxy: want http://host:port"))
		}
		c.proxy = u
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("client: configuration: %w", err)
	}
	return nil
}

// show tells the screen.
func (c *Client) show(change func(*Progress)) {
	c.screen.Text, c.screen.Problem, c.screen.Retry, c.screen.Err = "", false, 0, nil
	change(&c.screen)
	if c.cfg.Progress != nil {
		c.cfg.Progress(c.screen)
	}
}
