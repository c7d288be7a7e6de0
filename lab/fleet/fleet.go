// Package fleet plays a whole fleet against one real centre: each node is a
// client of the real API with its own key and certificate over TLS 1.3, each
// site has an address of its own on the loopback network, and a part of them
// sit behind one address, as chains behind NAT do. The centre is a process of
// its own, so that its memory and CPU are not the simulator's.
//
// Two things stand in for what ten thousand sites have: software keys for
// TPMs, and rows that are written into the database before the centre starts,
// with certificates of its real CA, for 30,000 approvals. No product command
// does that.
package fleet

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/stepca"
)

// Config says how large a fleet is, and for how long.
type Config struct {
	Sites, NodesPerSite int
	// Pending machines wait for approval beside the nodes.
	Pending int
	// For is how long the steady state is measured.
	For time.Duration
	// ReportEvery is how often each node calls.
	ReportEvery time.Duration
	// Database is the URL of an empty PostgreSQL database; "" for SQLite.
	Database string
	// Dir is an empty directory for the centre.
	Dir string
	// Program is the muster that serves.
	Program string
	// Say tells people how it goes on.
	Say func(format string, args ...any)
}

// Result is the last line of `muster lab fleet -o json`.
type Result struct {
	OK    bool `json:"ok"`
	Sites int  `json:"sites"`
	Nodes int  `json:"nodes"`
	// RSSMB is the most memory the centre had, CPUCores what it used of a core
	// in the steady state.
	RSSMB    float64 `json:"rss_mb"`
	CPUCores float64 `json:"cpu_cores"`
	// P50MS and P99MS are of whole calls in the steady state: connecting, TLS,
	// the answer.
	P50MS float64 `json:"p50_ms"`
	P99MS float64 `json:"p99_ms"`
	// Errors are calls of the steady state that failed, and nodes that were
	// not served in the herd.
	Errors int `json:"errors"`
	// ReconnectS is the time until every node was served after all came back
	// within one second.
	ReconnectS float64 `json:"reconnect_s"`
	// ListMS is the slowest of a page of requests, a page of nodes, a filter
	// and an open request; the median of several calls each.
	ListMS float64 `json:"list_ms"`
	DB     string  `json:"db"`

	// FirstErrors are calls that failed in the first round, in which every
	// node reports whole because the centre has just started. Nodes call again.
	FirstErrors int `json:"first_round_errors"`

	Calls   int                `json:"calls"`
	Pending int                `json:"pending"`
	Retries int                `json:"herd_retries"`
	HerdP99 float64            `json:"herd_p99_ms"`
	SettleS float64            `json:"settle_s"`
	Lists   map[string]float64 `json:"lists_ms"`
	// SimulatorCores is what the simulator itself used in the steady state:
	// both share the machine.
	SimulatorCores float64 `json:"simulator_cores"`
	BytesPerNode   float64 `json:"db_bytes_per_node"`
	Cores          int     `json:"machine_cores"`
	// Missed says which goals were not reached.
	Missed []string `json:"missed"`
}

// Goals at 10,000 sites of three nodes on two cores; a smaller fleet has to
// reach them, too.
const (
	maxRSSMB     = 1024
	maxP99MS     = 100
	maxReconnect = 120
	maxListMS    = 200
)

const tenant = central.DefaultTenant

// node is one client.
type node struct {
	id     fleet.NodeID
	index  int
	source net.IP
	cert   tls.Certificate
	client musterv1connect.NodeServiceClient
	tr     *http.Transport
	// want: the centre asked for the whole report.
	want bool
}

// Run plays the fleet.
func Run(ctx context.Context, cfg Config) (r Result, err error) {
	r = Result{Sites: cfg.Sites, Nodes: cfg.Sites * cfg.NodesPerSite, Pending: cfg.Pending, DB: "sqlite", Cores: runtime.NumCPU(), Missed: []string{}}
	if cfg.Database != "" {
		r.DB = "postgres"
	}
	cfg.Say("preparing %d sites with %d nodes and %d requests", r.Sites, r.Nodes, r.Pending)
	nodes, err := prepare(ctx, cfg)
	if err != nil {
		return r, err
	}
	c, err := start(ctx, cfg)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	c.connect(nodes)
	cfg.Say("the centre looks through its sites")
	r.SettleS = c.settle(ctx).Seconds()

	cfg.Say("steady state for %s", cfg.For)
	cpu, own, began := c.cpu(), ownCPU(), time.Now()
	calls, first, failed := steady(ctx, nodes, cfg)
	took := time.Since(began).Seconds()
	r.CPUCores, r.SimulatorCores = (c.cpu()-cpu)/took, (ownCPU()-own)/took
	r.Calls, r.Errors, r.FirstErrors = len(calls), failed, first
	r.P50MS, r.P99MS = percentile(calls, .50), percentile(calls, .99)

	cfg.Say("all nodes come back within one second")
	reconnect, retries, lost, herd := rush(ctx, nodes)
	r.ReconnectS, r.Retries, r.HerdP99 = reconnect.Seconds(), retries, percentile(herd, .99)
	r.Errors += lost

	cfg.Say("people look")
	if r.Lists, err = c.look(ctx, cfg); err != nil {
		return r, err
	}
	for _, ms := range r.Lists {
		r.ListMS = max(r.ListMS, ms)
	}
	r.RSSMB = c.peakMB()
	if r.DB == "sqlite" {
		r.BytesPerNode = float64(sizeOf(filepath.Join(cfg.Dir, "muster.db"))) / float64(r.Nodes)
	}
	for _, g := range []struct {
		name      string
		got, most float64
	}{{"rss_mb", r.RSSMB, maxRSSMB}, {"p99_ms", r.P99MS, maxP99MS}, {"reconnect_s", r.ReconnectS, maxReconnect}, {"list_ms", r.ListMS, maxListMS}, {"errors", float64(r.Errors), 0}} {
		if g.got > g.most || math.IsNaN(g.got) {
			r.Missed = append(r.Missed, fmt.Sprintf("%s is %.1f, at most %.0f was wanted", g.name, g.got, g.most))
		}
	}
	r.OK = len(r.Missed) == 0
	for _, f := range []*float64{&r.RSSMB, &r.CPUCores, &r.P50MS, &r.P99MS, &r.ReconnectS, &r.ListMS, &r.HerdP99, &r.SettleS, &r.SimulatorCores, &r.BytesPerNode} {
		*f = math.Round(*f*100) / 100
	}
	return r, ctx.Err()
}

func sizeOf(name string) int64 {
	info, err := os.Stat(name)
	if err != nil {
		return 0
	}
	return info.Size()
}

// prepare writes sites, nodes with certificates, and requests.
func prepare(ctx context.Context, cfg Config) (nodes []*node, err error) {
	now := time.Now().UTC().Truncate(time.Second)
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if cfg.Database != "" {
		if err := os.WriteFile(filepath.Join(cfg.Dir, central.DatabaseFile), []byte(cfg.Database+"\n"), 0o600); err != nil {
			return nil, err
		}
	}
	l, err := central.OpenLocal(ctx, cfg.Dir, now)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	if _, err := l.InitAuthority(ctx, "", now); err != nil {
		return nil, err
	}
	ca, err := stepca.Open(cfg.Dir)
	if err != nil {
		return nil, err
	}
	nodes = make([]*node, cfg.Sites*cfg.NodesPerSite)
	rows := make([]fleet.Node, len(nodes))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	for i := range nodes {
		g.Go(func() error {
			site := i / cfg.NodesPerSite
			var err error
			nodes[i], rows[i], err = made(gctx, ca, i, siteName(site), now)
			nodes[i].source = addressOf(site)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("fleet: make nodes: %w", err)
	}
	const batch = 500
	for from := 0; from < cfg.Sites; from += batch {
		if err := l.Store().Update(ctx, func(t store.Tx) error {
			for s := from; s < min(from+batch, cfg.Sites); s++ {
				if _, err := t.PutSite(fleet.Site{Meta: fleet.Meta{Tenant: tenant, Name: siteName(s), Created: now, Labels: map[string]string{"region": fmt.Sprint("r", s%20)}}}); err != nil {
					return err
				}
				for i := s * cfg.NodesPerSite; i < (s+1)*cfg.NodesPerSite; i++ {
					if _, err := t.PutNode(rows[i]); err != nil {
						return err
					}
				}
			}
			return nil
		}); err != nil {
			return nil, fmt.Errorf("fleet: write nodes: %w", err)
		}
	}
	for from := 0; from < cfg.Pending; from += batch {
		if err := l.Store().Update(ctx, func(t store.Tx) error {
			for i := from; i < min(from+batch, cfg.Pending); i++ {
				if err := t.AddRequest(request(i, now)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return nil, fmt.Errorf("fleet: write requests: %w", err)
		}
	}
	return nodes, nil
}

func siteName(i int) string { return fmt.Sprintf("s%06d", i) }

// addressOf gives every tenth site the one address of a chain behind NAT, and
// every other its own.
func addressOf(site int) net.IP {
	if site%10 == 0 {
		return net.IPv4(127, 9, 9, 9)
	}
	return net.IPv4(127, 10+byte(site>>16), byte(site>>8), byte(site))
}

func made(ctx context.Context, ca *stepca.Authority, i int, site string, now time.Time) (*node, fleet.Node, error) {
	ek := fleet.EKHash(sha256.Sum256(fmt.Appendf(nil, "ek %d", i)))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return &node{}, fleet.Node{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return &node{}, fleet.Node{}, err
	}
	sum := sha256.Sum256(der)
	chain, serial, from, to, err := ca.IssueNode(ctx, pki.NodeProfile{Tenant: tenant, Site: site, Node: ek.NodeID(), Public: key.Public(), Now: now})
	if err != nil {
		return &node{}, fleet.Node{}, err
	}
	n := &node{id: ek.NodeID(), index: i, cert: tls.Certificate{Certificate: chain, PrivateKey: key}, want: true}
	return n, fleet.Node{
		ID: n.id, Tenant: tenant, Words: fleet.Words(n.id), State: fleet.NodeActive, Site: site, Incarnation: 1, MayServe: true, EK: ek,
		AKName: sum[:], LDevIDName: sum[:], LDevIDKey: sum[:], Identity: fleet.IdentityHardware, Boot: fleet.BootEnforced,
		Certificate: fleet.Certificate{Serial: serial, NotBefore: from, NotAfter: to}, Hardware: hardware(i), Created: now, Generation: 1,
	}, nil
}

func hardware(i int) fleet.Hardware {
	return fleet.Hardware{Vendor: "Example", Product: "Box 3", CPUs: 8, MemoryBytes: 32 << 30, NICs: []fleet.NIC{
		{Name: "eth0", MAC: fmt.Sprintf("02:00:%02x:%02x:%02x:%02x", byte(i>>24), byte(i>>16), byte(i>>8), byte(i)), Link: true}}}
}

func request(i int, now time.Time) fleet.Request {
	ek := fleet.EKHash(sha256.Sum256(fmt.Appendf(nil, "pending %d", i)))
	digest := sha256.Sum256(fmt.Appendf(nil, "evidence %d", i))
	key := sha256.Sum256(fmt.Appendf(nil, "key %d", i))
	first := now.Add(-time.Duration(i) * time.Second)
	return fleet.Request{
		ID: fleet.RequestIDOf(digest), Tenant: tenant, Node: ek.NodeID(), Words: fleet.Words(ek.NodeID()), State: fleet.RequestPending,
		Identity: fleet.IdentityHardware, Boot: fleet.BootEnforced, EvidenceDigest: digest, FirstSeen: first, LastSeen: now, Revision: 1,
		Evidence: fleet.Evidence{EK: ek, LDevIDKey: key[:], AKName: key[:], Serial: fmt.Sprint("S", i), UUID: fmt.Sprint("U", i), Hardware: hardware(i),
			PCRs: map[int]fleet.HexBytes{0: key[:], 2: key[:], 7: key[:]}},
	}
}

// centre is the process under test.
type centre struct {
	cmd              *exec.Cmd
	operators, nodes string
	admin            central.AdminConfig
	roots            *x509.CertPool
	log              *os.File
	ended            chan error
}

func start(ctx context.Context, cfg Config) (_ *centre, err error) {
	c := &centre{ended: make(chan error, 1)}
	if c.log, err = os.Create(filepath.Join(cfg.Dir, "serve.log")); err != nil {
		return nil, err
	}
	c.cmd = exec.Command(cfg.Program, "serve", "--data", cfg.Dir, "--listen-operators", "127.0.0.1:0", "--listen-nodes", "127.0.0.1:0",
		"--metrics", "-", "--report-every", cfg.ReportEvery.String(), "--log-level", "warn")
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.cmd.Stderr = c.log
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("fleet: start the centre: %w", err)
	}
	lines := bufio.NewReader(out)
	line, err := lines.ReadString('\n')
	go func() { _, _ = io.Copy(io.Discard, lines); c.ended <- c.cmd.Wait() }()
	if _, e := fmt.Sscanf(line, "muster serves: operators %s nodes %s", &c.operators, &c.nodes); err != nil || e != nil {
		return nil, errors.Join(fmt.Errorf("fleet: the centre did not start: %q (see %s)", line, c.log.Name()), c.stop())
	}
	c.operators, c.nodes = strings.TrimSuffix(c.operators, ","), strings.TrimSuffix(c.nodes, ";")
	b, err := os.ReadFile(filepath.Join(cfg.Dir, central.AdminFile))
	if err == nil {
		err = yaml.Unmarshal(b, &c.admin)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fleet: read access: %w", err), c.stop())
	}
	c.roots = x509.NewCertPool()
	c.roots.AppendCertsFromPEM([]byte(c.admin.CA))
	return c, nil
}

func (c *centre) stop() error {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-c.ended:
		return errors.Join(err, c.log.Close())
	case <-time.After(30 * time.Second):
		_ = c.cmd.Process.Kill()
		<-c.ended
		return errors.Join(errors.New("fleet: the centre did not stop by itself"), c.log.Close())
	}
}

// connect gives every node its client: TLS 1.3 with its certificate, one
// connection per call, sessions resumed.
func (c *centre) connect(nodes []*node) {
	for _, n := range nodes {
		dialer := net.Dialer{Timeout: 20 * time.Second, LocalAddr: &net.TCPAddr{IP: n.source}}
		n.tr = &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true, TLSHandshakeTimeout: 30 * time.Second,
			TLSClientConfig: &tls.Config{RootCAs: c.roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13,
				Certificates: []tls.Certificate{n.cert}, ClientSessionCache: tls.NewLRUClientSessionCache(1)}}
		n.client = musterv1connect.NewNodeServiceClient(&http.Client{Transport: n.tr, Timeout: 60 * time.Second}, "https://"+c.nodes)
	}
}

// call makes one report. Every tenth carries the whole, as a node's does.
func (n *node) call(ctx context.Context, count int) error {
	q := &musterv1.ReportRequest{Generation: 1, Image: "slot@1.0", StatusDigest: []byte(n.id[:16]), BootId: []byte("0123456789abcdef")}
	if n.want || count%10 == 0 {
		q.Cluster = &musterv1.ClusterReport{Role: "server", State: "server", Voters: 3, Nodes: 3, NodesReady: 3, K3SVersion: "v1.36.3+k3s1"}
	}
	a, err := n.client.Report(ctx, q)
	if err == nil {
		n.want = a.WantCluster
	}
	return err
}

// steady lets all nodes call at their pace and returns how long calls took, in
// milliseconds, and how many failed. The first round, in which the centre asks
// each node for the whole, is not measured.
func steady(ctx context.Context, nodes []*node, cfg Config) (ms []float64, first, failed int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	end, cancel := context.WithTimeout(ctx, cfg.For+cfg.ReportEvery)
	defer cancel()
	measured := time.Now().Add(cfg.ReportEvery)
	for _, n := range nodes {
		wg.Go(func() {
			wait := time.Duration(mrand.Float64() * float64(cfg.ReportEvery))
			for count := 1; ; count++ {
				select {
				case <-time.After(wait):
				case <-end.Done():
					return
				}
				wait = time.Duration((.9 + .2*mrand.Float64()) * float64(cfg.ReportEvery))
				began := time.Now()
				err := n.call(ctx, count)
				took := float64(time.Since(began)) / float64(time.Millisecond)
				if began.Before(measured) && err == nil {
					continue
				}
				mu.Lock()
				switch {
				case err != nil && began.Before(measured):
					first++
				case err != nil:
					if failed++; failed <= 3 {
						cfg.Say("a call failed: %v", err)
					}
				default:
					ms = append(ms, took)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return ms, first, failed
}

// rush lets all nodes call within one second after an outage so long that no
// TLS session is left, and waits until each was served. Who is refused waits
// longer each time, with jitter.
func rush(ctx context.Context, nodes []*node) (took time.Duration, retries, lost int, ms []float64) {
	for _, n := range nodes {
		n.tr.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	}
	var again, without atomic.Int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	began := time.Now()
	end, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for _, n := range nodes {
		wg.Go(func() {
			wait := time.Duration(mrand.Int64N(int64(time.Second)))
			for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
				select {
				case <-time.After(wait):
				case <-end.Done():
					without.Add(1)
					return
				}
				at := time.Now()
				if err := n.call(end, 1); err == nil {
					mu.Lock()
					ms = append(ms, float64(time.Since(at))/float64(time.Millisecond))
					mu.Unlock()
					return
				}
				again.Add(1)
				wait = pause/2 + time.Duration(mrand.Int64N(int64(pause)))
			}
		})
	}
	wg.Wait()
	return time.Since(began), int(again.Load()), int(without.Load()), ms
}

// look does what people do, several times each, and returns the medians.
func (c *centre) look(ctx context.Context, cfg Config) (map[string]float64, error) {
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.roots, MinVersion: tls.VersionTLS13}}}
	defer hc.CloseIdleConnections()
	m := musterv1connect.NewManagementServiceClient(hc, "https://"+c.operators, connect.WithInterceptors(bearer(c.admin.Token)))
	out := make(map[string]float64)
	for name, f := range map[string]func() error{
		"first page of requests": func() error {
			_, err := m.ListRequests(ctx, &musterv1.ListRequestsRequest{State: "pending", Limit: 100})
			return err
		},
		"page of nodes": func() error {
			_, err := m.ListNodes(ctx, &musterv1.ListNodesRequest{Limit: 100})
			return err
		},
		"open a request": func() error {
			_, err := m.GetRequest(ctx, &musterv1.GetRequestRequest{Id: string(request(max(0, cfg.Pending/2), time.Time{}).ID)})
			return err
		},
		"counts": func() error {
			_, err := m.GetCentre(ctx, &musterv1.GetCentreRequest{})
			return err
		},
	} {
		if name == "open a request" && cfg.Pending == 0 {
			continue
		}
		var ms []float64
		for range 15 {
			began := time.Now()
			if err := f(); err != nil {
				return nil, fmt.Errorf("fleet: %s: %w", name, err)
			}
			ms = append(ms, float64(time.Since(began))/float64(time.Millisecond))
		}
		out[name] = math.Round(percentile(ms, .5)*100) / 100
	}
	return out, nil
}

func bearer(token string) connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
			r.Header().Set("Authorization", "Bearer "+token)
			return next(ctx, r)
		}
	}
}

// settle waits until the centre has signed what its sites lack, at most ten
// minutes.
func (c *centre) settle(ctx context.Context) time.Duration {
	began := time.Now()
	for calm, last := 0, c.cpu(); calm < 3 && time.Since(began) < 10*time.Minute; {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return time.Since(began)
		}
		now := c.cpu()
		if now-last < .1 {
			calm++
		} else {
			calm = 0
		}
		last = now
	}
	return time.Since(began)
}

// cpu is the processor time of the centre in seconds.
func (c *centre) cpu() float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ of Linux
}

func ownCPU() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// peakMB is the most memory the centre ever had.
func (c *centre) peakMB() float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	for _, l := range strings.Split(string(b), "\n") {
		if v, found := strings.CutPrefix(l, "VmHWM:"); found {
			kb, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 64)
			return kb / 1024
		}
	}
	return math.NaN()
}

func percentile(ms []float64, p float64) float64 {
	if len(ms) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(ms))
	return s[min(len(s)-1, int(p*float64(len(s))))]
}
