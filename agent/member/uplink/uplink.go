// Package uplink is the node agent's side of the centre: it enrolls when there
// is no certificate, renews it, reports, pulls documents, and carries what the
// planner and the escrow need. Nothing waits for it: a site lives without its
// centre for ever, and every call here may fail for ever.
package uplink

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/renameio/v2"
	"google.golang.org/protobuf/proto"

	"github.com/muster-edge/muster/agent"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
)

// Bounds of the pause between reports: the centre steers within them.
const (
	defaultReport = time.Minute
	minReport     = 5 * time.Second
	maxReport     = time.Hour
	// earlyReport is how soon news are reported although no report is due.
	earlyReport   = 10 * time.Second
	reportTimeout = 30 * time.Second
	renewPause    = 30 * time.Minute
	// everyNth report carries the cluster although nothing changed.
	everyNth = 10
	maxPages = 64
	maxRead  = 4 << 20

	identityFile = "identity.json"
)

// Client is what this package needs of enroll/client.
type Client interface {
	Enroll(ctx context.Context) (client.Identity, error)
	Renew(ctx context.Context, id client.Identity) (client.Identity, error)
	NodeHTTPClient(id client.Identity) *http.Client
}

// Config says what an Uplink works with. What is not marked optional is needed.
type Config struct {
	// Dir keeps the certificate chain. It is public.
	Dir  string
	Node fleet.NodeID
	// Identity is a certificate that somebody else just got. Optional.
	Identity *client.Identity
	// Key is the LDevID key: a certificate for another one is worthless.
	Key *ecdsa.PublicKey
	// Signer has that key, to sign offers. Optional: no snapshot is handed over.
	Signer crypto.Signer
	// Centres are the centre's URLs, in order.
	Centres []string
	Image   string
	Client  Client
	// Learn takes documents.
	Learn func(envelopes [][]byte) (int, error)
	// Cluster is what to report; Outcomes what became of orders, and
	// Acknowledged is told which of them the centre has.
	Cluster      func() *musterv1.ClusterReport
	Outcomes     func() []*musterv1.OrderOutcome
	Acknowledged func(told []*musterv1.OrderOutcome, ids []string) error
	// System is what the node does about its own system. Optional.
	System func() *musterv1.SystemReport
	// Standing is told the orders that the centre still wants carried out.
	Standing func(ids []string)
	// Health are the bits of health; Hardware is part of the status digest.
	Health   func() uint64
	Hardware func() fleet.Hardware
	// News is closed or sent to when Cluster would say something new. Optional.
	News func() <-chan struct{}
	Now  func() time.Time
	Log  *slog.Logger
}

// Uplink is the way to the centre. Its methods may be called by anybody.
type Uplink struct {
	cfg  Config
	log  *slog.Logger
	boot []byte

	mu      sync.Mutex
	id      client.Identity
	leaf    *x509.Certificate
	http    *http.Client
	at      int // index of the centre that answered last
	heard   time.Time
	saying  string // what enrollment says
	site    string
	have    *musterv1.DocVersion
	told    [32]byte // digest of the cluster report that the centre has
	reports int
	wanted  bool
	// The same for the system report.
	toldSystem   [32]byte
	wantedSystem bool
	// private is the key that snapshots are handed over to; see Offer.
	private, public, offer []byte
	offerFor               string
}

// New checks the configuration and reads the certificate from the disk.
func New(cfg Config) (*Uplink, error) {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("uplink: config: "+what+" is missing"))
		}
	}
	check(cfg.Dir != "", "Dir")
	check(cfg.Key != nil, "Key")
	check(len(cfg.Centres) > 0, "Centres")
	check(cfg.Client != nil, "Client")
	check(cfg.Learn != nil, "Learn")
	check(cfg.Cluster != nil, "Cluster")
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.News == nil {
		cfg.News = func() <-chan struct{} { return nil }
	}
	u := &Uplink{cfg: cfg, log: cfg.Log, boot: random16()}
	if err := u.load(); err != nil {
		// Enrolling again gives a new one; with unchanged evidence nobody has
		// to approve anything.
		u.log.Info("no certificate on the disk", "why", err)
	}
	if cfg.Identity != nil {
		if err := u.take(*cfg.Identity); err != nil {
			return nil, err
		}
		u.save(*cfg.Identity)
	}
	return u, nil
}

// stored is the certificate on the disk.
type stored struct {
	Centre       string          `json:"centre"`
	Request      fleet.RequestID `json:"request"`
	Certificates [][]byte        `json:"certificates"`
}

func (u *Uplink) load() error {
	b, err := os.ReadFile(filepath.Join(u.cfg.Dir, identityFile))
	if err != nil {
		return fmt.Errorf("uplink: read certificate: %w", err)
	}
	var s stored
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("uplink: read certificate: %w", err)
	}
	return u.take(client.Identity{Node: u.cfg.Node, Words: fleet.Words(u.cfg.Node), Request: s.Request, Centre: s.Centre, Certificates: s.Certificates})
}

// take makes id the one to call with. Its dates are not looked at: an expired
// certificate still renews at the centre.
func (u *Uplink) take(id client.Identity) error {
	if len(id.Certificates) == 0 {
		return errors.New("uplink: there is no certificate")
	}
	leaf, err := x509.ParseCertificate(id.Certificates[0])
	if err != nil {
		return fmt.Errorf("uplink: read certificate: %w", err)
	}
	if !u.cfg.Key.Equal(leaf.PublicKey) {
		return errors.New("uplink: the certificate is for another key")
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.http != nil {
		u.http.CloseIdleConnections()
	}
	u.id, u.leaf, u.http = id, leaf, u.cfg.Client.NodeHTTPClient(id)
	u.at = max(0, slices.Index(u.cfg.Centres, id.Centre))
	return nil
}

func (u *Uplink) save(id client.Identity) {
	b, err := json.Marshal(stored{Centre: id.Centre, Request: id.Request, Certificates: id.Certificates})
	if err == nil {
		err = os.MkdirAll(u.cfg.Dir, 0o755)
	}
	if err == nil {
		err = renameio.WriteFile(filepath.Join(u.cfg.Dir, identityFile), b, 0o644)
	}
	if err != nil { // the next start enrolls again
		u.log.Warn("certificate not kept", "err", err)
	}
}

// Run keeps in touch with the centre until ctx ends.
func (u *Uplink) Run(ctx context.Context) error {
	wait := agent.Backoff{First: 5 * time.Second, Most: 5 * time.Minute}
	for ctx.Err() == nil {
		u.mu.Lock()
		enrolled := u.leaf != nil
		u.mu.Unlock()
		if !enrolled {
			id, err := u.cfg.Client.Enroll(ctx)
			if err != nil {
				u.log.Info("not enrolled", "err", err)
				pause(ctx, wait.Next(mrand.Float64()), nil)
				continue
			}
			if err := u.take(id); err != nil {
				u.log.Warn("not enrolled", "err", err)
				pause(ctx, wait.Next(mrand.Float64()), nil)
				continue
			}
			u.save(id)
			u.learn(id.Documents)
			u.Say("")
			u.log.Info("enrolled", "request", string(id.Request), "until", u.leafEnd())
		}
		err := u.habit(ctx, &wait)
		if ctx.Err() != nil {
			break
		}
		// Only a certificate that is no longer good leads here.
		u.log.Info("enrolling again", "err", err)
		u.mu.Lock()
		u.leaf = nil
		u.mu.Unlock()
		pause(ctx, wait.Next(mrand.Float64()), nil)
	}
	return nil
}

func (u *Uplink) leafEnd() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.leaf == nil {
		return time.Time{}
	}
	return u.leaf.NotAfter
}

// errEnroll says that the certificate is of no use any more.
var errEnroll = errors.New("uplink: the certificate is no longer good")

// habit reports, renews and pulls until ctx ends or the certificate is no
// longer good.
func (u *Uplink) habit(ctx context.Context, wait *agent.Backoff) error {
	jitter := mrand.Float64()
	var asked, last time.Time // by the monotonic clock
	for {
		news := u.cfg.News()
		u.mu.Lock()
		leaf := u.leaf
		u.mu.Unlock()
		plan := agent.RenewalOf(leaf.NotBefore, leaf.NotAfter, jitter)
		if now := u.cfg.Now(); !now.Before(plan.Due) && (asked.IsZero() || time.Since(asked) >= renewPause) {
			asked = time.Now()
			if err := u.renew(ctx); err != nil {
				return err
			}
			jitter = mrand.Float64()
		}
		last = time.Now()
		next, err := u.report(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errEnroll):
			return err
		case err != nil:
			u.log.Debug("report not heard", "err", err)
			next = wait.Next(mrand.Float64())
			news = nil // the centre is away: news do not help
		default:
			wait.Reset()
		}
		pause(ctx, next, news)
		if left := earlyReport - time.Since(last); left > 0 && left < next {
			pause(ctx, min(left, next), nil)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// pause waits for d, for ctx, or for news.
func pause(ctx context.Context, d time.Duration, news <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-news:
	}
}

// renew asks for a new certificate once. Only "ask no more" is an error.
func (u *Uplink) renew(ctx context.Context) error {
	u.mu.Lock()
	id, old := u.id, u.leaf
	u.mu.Unlock()
	out, err := u.cfg.Client.Renew(ctx, id)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, client.ErrEnroll):
		return fmt.Errorf("%w: %w", errEnroll, err)
	case err != nil:
		u.log.Info("certificate not renewed", "err", err)
		return nil
	}
	if err := u.take(out); err != nil {
		u.log.Warn("certificate not renewed", "err", err)
		return nil
	}
	u.save(out)
	u.learn(out.Documents)
	if end := u.leafEnd(); end.After(old.NotAfter) {
		u.log.Info("certificate renewed", "until", end)
	}
	return nil
}

func (u *Uplink) learn(documents [][]byte) {
	if len(documents) == 0 {
		return
	}
	if n, err := u.cfg.Learn(documents); err != nil {
		u.log.Warn("documents of the centre were refused", "learned", n, "err", err)
	}
}

// rpc is the centre to call now.
func (u *Uplink) rpc() (musterv1connect.NodeServiceClient, int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.leaf == nil {
		return nil, 0, errors.New("uplink: not enrolled yet")
	}
	return musterv1connect.NewNodeServiceClient(u.http, u.cfg.Centres[u.at], connect.WithReadMaxBytes(maxRead)), u.at, nil
}

// answered notes how a call ended. After an outage the next URL is tried.
func (u *Uplink) answered(at int, err error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated:
		return fmt.Errorf("%w: %w", errEnroll, err)
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeUnknown, connect.CodeUnimplemented:
		if err != nil && u.at == at {
			u.at = (u.at + 1) % len(u.cfg.Centres)
		}
	}
	if err == nil {
		u.heard = u.cfg.Now()
	}
	return err
}

// HTTP returns what calls the centre by the certificate of the moment, and the
// URL of the one that answered last; nil before there is a certificate.
func (u *Uplink) HTTP() (c *http.Client, centre string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.http, u.cfg.Centres[u.at]
}

// hangUp closes idle connections: thousands of them help nobody.
func (u *Uplink) hangUp() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.http != nil {
		u.http.CloseIdleConnections()
	}
}

// report makes one report, pulls documents if there are new ones, and returns
// when the next report is due.
func (u *Uplink) report(ctx context.Context) (time.Duration, error) {
	rpc, at, err := u.rpc()
	if err != nil {
		return 0, err
	}
	defer u.hangUp()
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	m := &musterv1.ReportRequest{Image: u.cfg.Image, BootId: u.boot}
	cluster := u.cfg.Cluster()
	digest := digestOf(cluster)
	u.mu.Lock()
	if cluster != nil && (u.wanted || digest != u.told || u.reports%everyNth == 0) {
		m.Cluster = cluster
	}
	var system *musterv1.SystemReport
	if u.cfg.System != nil {
		system = u.cfg.System()
	}
	systemDigest := digestOfMessage(system)
	if system != nil && (u.wantedSystem || systemDigest != u.toldSystem || u.reports%everyNth == 0) {
		m.System = system
	}
	m.Epoch, m.Version = u.have.GetEpoch(), u.have.GetN()
	u.reports++
	u.mu.Unlock()
	if u.cfg.Outcomes != nil {
		m.Outcomes = u.cfg.Outcomes()
	}
	if u.cfg.Health != nil {
		m.Health = u.cfg.Health()
	}
	m.StatusDigest = u.statusDigest(digest)
	answer, err := rpc.Report(ctx, m)
	if err = u.answered(at, err); err != nil {
		return 0, err
	}
	u.mu.Lock()
	if m.Cluster != nil {
		u.told = digest
	}
	if m.System != nil {
		u.toldSystem = systemDigest
	}
	u.wanted, u.wantedSystem = answer.GetWantCluster(), answer.GetWantSystem()
	pull := u.have == nil || u.site != answer.GetSite() || !proto.Equal(u.have, answer.GetDocuments())
	u.mu.Unlock()
	if u.cfg.Acknowledged != nil && len(answer.GetAcknowledged()) > 0 {
		if err := u.cfg.Acknowledged(m.GetOutcomes(), answer.GetAcknowledged()); err != nil {
			u.log.Warn("acknowledged outcomes not forgotten", "err", err)
		}
	}
	if pull {
		if err := u.pull(ctx); err != nil {
			u.log.Info("documents not pulled", "err", err)
		}
	}
	next := defaultReport
	if s := answer.GetNextReportSeconds(); s > 0 {
		next = min(max(time.Duration(s)*time.Second, minReport), maxReport)
	}
	if answer.GetWantCluster() || answer.GetWantSystem() {
		next = min(next, minReport)
	}
	return next - time.Duration(float64(next)*0.2*mrand.Float64()), nil
}

// Files is how blobs and manifests are asked for at the centre; ok is false
// while there is no certificate.
func (u *Uplink) Files() (c *http.Client, base string, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.http, u.cfg.Centres[u.at], u.http != nil
}

// digestOfMessage is zero for a message that is not there.
func digestOfMessage(m *musterv1.SystemReport) [32]byte {
	if m == nil {
		return [32]byte{}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return [32]byte{}
	}
	return sha256.Sum256(b)
}

func digestOf(c *musterv1.ClusterReport) [32]byte {
	if c == nil {
		return [32]byte{}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return [32]byte{}
	}
	return sha256.Sum256(b)
}

// statusDigest stands for everything that the node says of itself.
func (u *Uplink) statusDigest(cluster [32]byte) []byte {
	var hw []byte
	if u.cfg.Hardware != nil {
		hw, _ = json.Marshal(u.cfg.Hardware())
	}
	d := sha256.Sum256(append(hw, cluster[:]...))
	return d[:]
}

// pull fetches documents until there are no more.
func (u *Uplink) pull(ctx context.Context) error {
	u.mu.Lock()
	q := &musterv1.DocumentsRequest{Site: u.site, Have: u.have}
	u.mu.Unlock()
	for range maxPages {
		rpc, at, err := u.rpc()
		if err != nil {
			return err
		}
		page, err := rpc.Documents(ctx, q)
		if err = u.answered(at, err); err != nil {
			return fmt.Errorf("uplink: pull documents: %w", err)
		}
		u.learn(page.GetEnvelopes())
		if page.GetMore() {
			if q.After != nil && proto.Equal(q.After, page.GetNext()) {
				return errors.New("uplink: pull documents: the centre does not get on")
			}
			q.After = page.GetNext()
			continue
		}
		u.mu.Lock()
		u.site, u.have = page.GetSite(), page.GetRevision()
		u.mu.Unlock()
		if u.cfg.Standing != nil && !page.GetUnchanged() {
			u.cfg.Standing(page.GetOrders())
		}
		return nil
	}
	return errors.New("uplink: pull documents: there is no end to them")
}

// Say is what enrollment shows; "" when there is nothing to say.
func (u *Uplink) Say(text string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.saying = text
}

// State is what people see of the way to the centre.
type State struct {
	// Heard is when the centre last answered; zero if it did not.
	Heard time.Time
	// Enrollment is a sentence while the node has no certificate.
	Enrollment string
	// Until is the end of the certificate; zero without one.
	Until time.Time
}

// State returns it.
func (u *Uplink) State() State {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := State{Heard: u.heard, Enrollment: u.saying}
	if u.leaf != nil {
		s.Until = u.leaf.NotAfter
	}
	return s
}
