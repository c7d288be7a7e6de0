package central

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"connectrpc.com/connect"

	musterv1connect "github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/blobs"
	"github.com/muster-edge/muster/central/oidc"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/stepca"
)

// Config says what a Server serves, and where.
type Config struct {
	// Data is the directory of everything the centre keeps. It is created.
	Data string
	// Database is the URL of a PostgreSQL database, which several centres may
	// use at once; empty: what the file "database" in Data says, else SQLite
	// in Data.
	Database string
	// Operators, Nodes and Metrics are listening addresses. Metrics should be
	// on the loopback address; empty or "-" switches it off.
	Operators, Nodes, Metrics string
	// Advertise are further host names and addresses of the centre, for its
	// TLS certificate. Local ones are always in it.
	Advertise []string
	// ReleaseKeys are public keys (PEM) that the default tenant trusts to
	// sign image manifests; they are added and never removed.
	ReleaseKeys [][]byte
	// LabUnknownBoot and LabUnverified let people of a lab tenant approve
	// what nobody else may. They mean nothing to other tenants.
	LabUnknownBoot, LabUnverified bool
	// ReportEvery is how often nodes shall call; default 60 s.
	ReportEvery time.Duration
	// EscrowPerSite bounds the sealed snapshots that are kept of one site, in
	// bytes; default 4 GiB.
	EscrowPerSite int64
	// BlobQuota bounds the files of images and charts that are kept, in
	// bytes; default 64 GiB.
	BlobQuota int64
	// MaxConns and MaxConnsPerSource bound the open connections of an
	// endpoint, in all (default 8192) and per address (default 1024; behind a
	// load balancer that hides addresses, give the same as MaxConns).
	MaxConns, MaxConnsPerSource int
	// OIDC are the settings of an identity provider; nil: there is none.
	OIDC *oidc.Config
	// Boot switches the boot role on.
	Boot *BootConfig
	// Version is shown to operators.
	Version string
	// Limits of enrollment; the zero value is good.
	Limits service.Limits
	Log    *slog.Logger
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Ready, if set, is called once when everything listens.
	Ready func(Addresses)
}

// Addresses is where a Server listens.
type Addresses struct{ Operators, Nodes, Metrics string }

func (c *Config) setDefaults() {
	if c.Operators == "" {
		c.Operators = ":7443"
	}
	if c.Nodes == "" {
		c.Nodes = ":7444"
	}
	if c.MaxConns <= 0 {
		c.MaxConns = defaultConns
	}
	if c.MaxConnsPerSource <= 0 {
		c.MaxConnsPerSource = defaultConnsPerSource
	}
	if c.EscrowPerSite <= 0 {
		c.EscrowPerSite = 4 << 30
	}
	if c.BlobQuota <= 0 {
		c.BlobQuota = blobQuota
	}
	if c.ReportEvery <= 0 {
		c.ReportEvery = time.Minute
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

func (c *Config) validate() error {
	var errs []error
	if c.Data == "" {
		errs = append(errs, errors.New("central: config: Data is missing: the centre needs a directory to keep things in"))
	}
	if c.ReportEvery > 24*time.Hour {
		errs = append(errs, fmt.Errorf("central: config: ReportEvery %s is longer than a day", c.ReportEvery))
	}
	if c.Boot != nil {
		errs = append(errs, c.Boot.validate())
	}
	return errors.Join(errs...)
}

// authority is what the centre needs of its CA. pki/stepca is it.
type authority interface {
	IssueNode(ctx context.Context, p pki.NodeProfile) (chain [][]byte, serial string, notBefore, notAfter time.Time, err error)
	ServerCertificate(names []string, now time.Time) (tls.Certificate, error)
	RootsPEM() []byte
	ClientPool() *x509.CertPool
	OrdersKey(tenant string) (crypto.Signer, error)
}

// Server is the centre.
type Server struct {
	cfg     Config
	log     *slog.Logger
	data    *dataDir
	store   store.Store
	ca      authority
	nodeCA  *x509.CertPool
	hub     *hub
	journal *journal
	metrics *metrics
	// refusals are log lines about strangers.
	refusals *refusals
	trust    *trust
	index    *nodeIndex
	sites    *siteIndex
	scribe   scribe
	// reports remembers what nodes said of their cluster.
	reports *reportMemory
	vault   *vault
	// systems remembers what nodes said of their operating system.
	systems   *reportMemory
	blobs     *blobs.Dir
	transfers transfers
	// tidying keeps a file from being removed while its row is written.
	tidying sync.RWMutex
	// stale asks for the sites' documents to be looked at.
	stale  chan struct{}
	seen   *lastSeen
	usage  *usage
	enroll *service.Service
	// provider is nil if people do not log in at an identity provider.
	provider *provider
	boot     *bootRole
	asking   asking
	epoch    uint64
	// operatorsURL is how this host reaches the operators' endpoint.
	operatorsURL string
	// gather joins the commits of reports.
	gather *gather
	// follower is nil unless others use the database, too; leads tells whether
	// this replica does what one does for all.
	follower *follower
	leads    atomic.Bool
	ready    atomic.Bool
	// stopping is closed when the server begins to stop: streams end then.
	stopping chan struct{}
}

// New opens the data directory and makes what is missing in it. Whoever gets
// a Server must call Run or Close.
func New(ctx context.Context, cfg Config) (_ *Server, err error) {
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Log, hub: newHub(), metrics: newMetrics(), index: newNodeIndex(), sites: newSiteIndex(), reports: newReportMemory(), systems: newReportMemory(), stale: make(chan struct{}, 1), boot: &bootRole{}, stopping: make(chan struct{}), refusals: newRefusals(cfg.Log, cfg.Now)}
	if s.data, err = openDataDir(cfg.Data); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	st, err := openStore(ctx, cfg.Database, s.data)
	if err != nil {
		return nil, err
	}
	s.store = &watched{Store: st, nodes: s.index, sites: s.sites}
	s.gather = &gather{store: s.store}
	if s.follower, err = newFollower(ctx, s, st); err != nil {
		return nil, err
	}
	if err := keysBefore(ctx, st, s.data); err != nil {
		return nil, err
	}
	if err := s.openAuthority(); err != nil {
		return nil, err
	}
	seal, err := s.data.sealKey()
	if err != nil {
		return nil, err
	}
	if err := sharedKeys(ctx, st, s.data, s.ca.RootsPEM(), seal); err != nil {
		return nil, err
	}
	if s.provider, err = newProvider(s, seal); err != nil {
		return nil, err
	}
	if err := s.prepare(ctx); err != nil {
		return nil, err
	}
	return s, s.openEnrollment()
}

func (s *Server) openAuthority() error {
	created, err := stepca.Init(s.data.path, stepca.Options{Now: s.cfg.Now()})
	if err != nil {
		return err
	}
	ca, err := stepca.Open(s.data.path)
	if err != nil {
		return err
	}
	if created {
		s.log.Info("certificate authority made", logFile, s.data.path)
	}
	s.ca, s.nodeCA = ca, ca.ClientPool()
	s.scribe = scribe{s.ca.OrdersKey}
	return nil
}

// prepare brings the database to what serving needs.
func (s *Server) prepare(ctx context.Context) error {
	by := act{actor: "system", now: s.cfg.Now()}
	if err := ensureTenant(ctx, s.store, by); err != nil {
		return err
	}
	err := s.store.Update(ctx, func(t store.Tx) error {
		for _, k := range s.cfg.ReleaseKeys {
			if _, _, err := trustReleaseKeys(t, by, DefaultTenant, k, "given at the start of the centre"); err != nil {
				return err
			}
		}
		var err error
		s.epoch, err = t.Epoch()
		return err
	})
	if err != nil {
		return err
	}
	s.metrics.registry.MustRegister(newQueue(s.store))
	if err := s.provider.warnOfMissing(ctx); err != nil {
		return err
	}
	s.journal = newJournal(s.store, s.hub, s.log, s.metrics.events.Inc)
	s.usage = newUsage(s.store, s.log)
	s.seen = &lastSeen{store: s.store, log: s.log, seen: make(map[fleet.NodeID]seenAt)}
	s.trust = &trust{store: s.store, dir: s.data.file(rootsDir), now: s.cfg.Now}
	if _, err := s.trust.roots(ctx); err != nil {
		return err
	}
	if s.vault, err = openVault(s.data.file(escrowDir), s.cfg.EscrowPerSite); err != nil {
		return err
	}
	if s.follower != nil {
		s.vault.young = time.Hour
	}
	if n, err := s.vault.tidy(ctx, s.store, DefaultTenant); err != nil {
		return err
	} else if n > 0 {
		s.log.Info("files of unfinished uploads removed", logCount, n)
	}
	if s.blobs, err = blobs.Open(s.data.file(blobsDir)); err != nil {
		return err
	}
	return s.loadIndexes(ctx)
}

func (s *Server) openEnrollment() error {
	sealKey, err := s.data.sealKey()
	if err != nil {
		return err
	}
	keys, err := newCookieKeys(s.store, sealKey)
	if err != nil {
		return err
	}
	e := &enrollment{store: s.store, hub: s.hub, index: s.index, metrics: s.metrics, now: s.cfg.Now, filed: s.calledHome, refitted: s.refitted}
	e.scribe, e.approvals = &s.scribe, s.approvalPolicy
	s.enroll, err = service.New(service.Config{
		Tenant: DefaultTenant, Store: e, Issuer: issuer{s.ca}, Policy: s.trust.policy, Keys: keys.current,
		Now: s.cfg.Now, Log: s.log, Limits: s.cfg.Limits, Observe: s.metrics.observe,
	})
	return err
}

// issuer is the authority as the enrollment service sees it.
type issuer struct{ ca authority }

// IssueNode implements service.Issuer.
func (i issuer) IssueNode(ctx context.Context, p pki.NodeProfile) (enroll.Certificate, error) {
	chain, serial, from, to, err := i.ca.IssueNode(ctx, p)
	return enroll.Certificate{Chain: chain, Serial: serial, NotBefore: from, NotAfter: to}, err
}

// Close lets go of the data directory. Run calls it.
func (s *Server) Close() error {
	var errs []error
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	if s.data != nil {
		errs = append(errs, s.data.close())
	}
	return errors.Join(errs...)
}

// Run serves until ctx ends or a part of the server fails. It stops in this
// order, each step for the sake of the next: readiness goes first, so that
// load balancers send nobody; then the boot role, so that no new machine
// starts; then the endpoints, giving running calls time; then what batches
// writes, so that nothing gathered is lost; then the database; metrics last,
// so that the stop itself can be watched.
func (s *Server) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, s.Close()) }()
	operators, err := s.listen("operators", s.cfg.Operators)
	if err != nil {
		return err
	}
	defer operators.Close()
	nodes, err := s.listen("nodes", s.cfg.Nodes)
	if err != nil {
		return err
	}
	defer nodes.Close()
	addresses := Addresses{Operators: operators.Addr().String(), Nodes: nodes.Addr().String()}
	if err := s.firstStart(ctx, operators.Addr()); err != nil {
		return err
	}
	cert, err := newServerCertificate(s.ca, s.names(), s.cfg.Now)
	if err != nil {
		return err
	}
	base, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	forOperators, err := s.operatorHandler()
	if err != nil {
		return err
	}
	servers := []*http.Server{
		httpServer(s.measured("operators", forOperators), cert.tls(tls.NoClientCert), base, s.log, time.Minute, 0),
		// Collect holds a call for up to 30 s.
		httpServer(s.measured("nodes", s.nodeHandler()), cert.tls(tls.RequestClientCert), base, s.log, time.Minute, 2*time.Minute),
	}
	opened := service.ConnContext(s.cfg.Now)
	servers[1].ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return withConn(opened(ctx, c), c)
	}
	var metricsServer *http.Server
	var metricsListener net.Listener
	if s.cfg.Metrics != "" && s.cfg.Metrics != "-" {
		if metricsListener, err = net.Listen("tcp", s.cfg.Metrics); err != nil {
			return fmt.Errorf("central: listen for metrics: %w", err)
		}
		defer metricsListener.Close()
		addresses.Metrics = metricsListener.Addr().String()
		metricsServer = httpServer(s.metricsHandler(), nil, base, s.log, 10*time.Second, time.Minute)
	}

	// Batches outlive the endpoints: they have a context of their own.
	batches, endBatches := context.WithCancel(context.WithoutCancel(ctx))
	defer endBatches()
	var writers errgroup.Group
	writers.Go(func() error { s.journal.run(batches); return nil })
	writers.Go(func() error { s.seen.run(batches); return nil })
	writers.Go(func() error { s.usage.run(batches); return nil })

	g, ctx := errgroup.WithContext(ctx)
	bootCtx, endBoot := context.WithCancel(ctx)
	defer endBoot()
	boot := make(chan struct{})
	g.Go(func() error {
		defer close(boot)
		return s.runBoot(bootCtx)
	})
	for i, l := range []net.Listener{operators, nodes} {
		g.Go(func() error { return ignoreClosed(servers[i].ServeTLS(l, "", "")) })
	}
	if metricsServer != nil {
		g.Go(func() error { return ignoreClosed(metricsServer.Serve(metricsListener)) })
	}
	g.Go(func() error { return cert.renew(ctx) })
	g.Go(func() error { return s.follower.run(ctx) })
	g.Go(func() error { return s.lead(ctx) })
	g.Go(func() error { return s.refresh(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		s.ready.Store(false)
		endBoot()
		<-boot
		close(s.stopping)
		s.shutdown(servers, cut)
		endBatches()
		_ = writers.Wait() // they return no error
		if metricsServer != nil {
			_ = metricsServer.Close() // nothing of it needs an end
		}
		return nil
	})
	s.ready.Store(true)
	s.log.Info("muster serves", "operators", addresses.Operators, "nodes", addresses.Nodes, "metrics", addresses.Metrics)
	if s.cfg.Ready != nil {
		s.cfg.Ready(addresses)
	}
	return g.Wait()
}

const (
	// drain is how long running calls may take at the end; waiting ones
	// (long polls) are cut after a second, since they can call again.
	drain    = 10 * time.Second
	cutPolls = time.Second
)

func (s *Server) shutdown(servers []*http.Server, cut context.CancelFunc) {
	end, cancel := context.WithTimeout(context.Background(), drain)
	defer cancel()
	timer := time.AfterFunc(cutPolls, cut)
	defer timer.Stop()
	var g errgroup.Group
	for _, srv := range servers {
		g.Go(func() error {
			if err := srv.Shutdown(end); err != nil {
				return srv.Close()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		s.log.Warn("calls were cut off", logError, err)
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *Server) listen(endpoint, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("central: listen for %s: %w", endpoint, err)
	}
	return newLimitListener(l, s.cfg.MaxConns, s.cfg.MaxConnsPerSource, s.metrics.conns.WithLabelValues(endpoint).Inc), nil
}

// names are all names the centre can be reached by, as far as it knows.
func (s *Server) names() []string {
	names := append([]string{"localhost", "127.0.0.1", "::1"}, s.cfg.Advertise...)
	// A host may have a name that no certificate may carry.
	if h, err := os.Hostname(); err == nil && fleet.ValidateName("host", strings.ToLower(h)) == nil {
		names = append(names, strings.ToLower(h))
	}
	if s.cfg.Boot != nil && s.cfg.Boot.Address.IsValid() {
		names = append(names, s.cfg.Boot.Address.Addr().String())
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return names
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && len(names) < 48 {
			names = append(names, n.IP.String())
		}
	}
	return names
}

// bodyLimit of management calls, the longest of which imports an EK list;
// enrollment has its own. Only holders of a token get as far.
const bodyLimit = enroll.MaxListBytes + 64<<10

// managementHandler is the API with its gate.
func (s *Server) managementHandler() http.Handler {
	mux := http.NewServeMux()
	s.addServices(mux)
	return mux
}

func (s *Server) addServices(mux *http.ServeMux) {
	path, h := musterv1connect.NewManagementServiceHandler(management{Server: s}, connect.WithReadMaxBytes(bodyLimit))
	mux.Handle(path, s.authenticate(atLeisure(h)))
	path, h = musterv1connect.NewAccessServiceHandler(accessService{Server: s}, connect.WithReadMaxBytes(accessLimit))
	mux.Handle(path, s.authenticate(atLeisure(h)))
}

// accessLimit bounds calls of the access service, one of which strangers may
// make.
const accessLimit = 64 << 10

func (s *Server) operatorHandler() (http.Handler, error) {
	mux := http.NewServeMux()
	s.addServices(mux)
	mux.Handle(blobsPath+"{sha256}", s.authenticate(atLeisure(http.HandlerFunc(s.uploads))))
	s.addHealth(mux)
	pages, err := s.consoleHandler()
	if err != nil {
		return nil, err
	}
	mux.Handle("/", pages)
	return mux, nil
}

func (s *Server) nodeHandler() http.Handler {
	mux := http.NewServeMux()
	if path, h := s.enroll.Handler(); h != nil {
		mux.Handle(path, h)
	}
	path, h := musterv1connect.NewNodeServiceHandler(nodeService{Server: s}, connect.WithReadMaxBytes(bodyLimit), connect.WithCompression("gzip", nil, nil))
	mux.Handle(path, s.authenticateNode(s.nodeBodies(s.enroll.Node(h), atLeisure(h))))
	mux.Handle("GET "+blobsPath+"{sha256}", s.authenticateNode(atLeisure(s.admitted(s.serveBlob))))
	mux.Handle("GET "+manifestsPath+"{sha256}", s.authenticateNode(atLeisure(s.admitted(s.serveManifest))))
	return mux
}
