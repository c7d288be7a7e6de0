// Package store runs the embedded etcd by the rules of k3s: the WAL directory
// decides whether a node is initialised, a new server joins as a learner, the
// leader promotes learners every 15 s on etcd's own judgement alone, a removed
// member leaves a tombstone. The etcd is the real one, so that quorum is lost
// where k3s loses it.
package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/muster-edge/muster/lab/standin/internal/access"
	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/pki"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

const (
	endpoint    = "https://127.0.0.1:2379"
	testTimeout = 10 * time.Second
	promoteTick = 15 * time.Second
	stallLimit  = 5 * time.Minute
	infoTimeout = 2 * time.Second
)

// Store is the etcd of one server.
type Store struct {
	cfg  *conf.Config
	tree pki.Tree
	sd   *proc.Shutdown
	name string

	mu     sync.Mutex
	client *clientv3.Client
	ready  chan struct{} // closed once Test has succeeded
	once   sync.Once
	closed chan struct{} // of the running etcd; nil before start
}

// New makes a store; nothing is touched yet.
func New(cfg *conf.Config, tree pki.Tree, sd *proc.Shutdown) *Store {
	return &Store{cfg: cfg, tree: tree, sd: sd, ready: make(chan struct{})}
}

// Dir is the directory of the database.
func (s *Store) Dir() string { return s.cfg.ServerDir("db", "etcd") }

// ResetFlag is the file that forbids a second reset in a row.
func (s *Store) ResetFlag() string { return s.cfg.ServerDir("db", "reset-flag") }

func (s *Store) walDir() string    { return filepath.Join(s.Dir(), "member", "wal") }
func (s *Store) nameFile() string  { return filepath.Join(s.Dir(), "name") }
func (s *Store) tombstone() string { return filepath.Join(s.Dir(), "tombstone") }
func (s *Store) peerURL() string   { return "https://" + net.JoinHostPort(s.cfg.NodeIP, "2380") }
func (s *Store) clientURL() string { return "https://" + net.JoinHostPort(s.cfg.NodeIP, "2379") }

// Name is the member's name, <node>-<8 hex>.
func (s *Store) Name() string { return s.name }

// Initialized tells whether this node has been a member: the WAL directory is
// the only sign.
func (s *Store) Initialized() (bool, error) {
	st, err := os.Stat(s.walDir())
	switch {
	case err == nil && st.IsDir():
		return true, nil
	case err == nil:
		return false, fmt.Errorf("%s is not a directory", s.walDir())
	case os.IsNotExist(err):
		return false, nil
	}
	return false, err
}

// Tombstone backs the database of a removed member up, so that the node joins
// again. Without a server to join that is an error.
func (s *Store) Tombstone() error {
	if _, err := os.Stat(s.tombstone()); err != nil {
		return nil
	}
	if s.cfg.Server == "" {
		return errors.New("tombstone file has been detected but --server is empty")
	}
	proc.Info("tombstone file has been detected, removing data dir to rejoin the cluster")
	return os.Rename(s.Dir(), fmt.Sprintf("%s-backup-%d", s.Dir(), time.Now().Unix()))
}

// SetName reads the member's name, or makes a new one.
func (s *Store) SetName(force bool) error {
	b, err := os.ReadFile(s.nameFile())
	if err == nil && !force {
		s.name = string(b)
		return nil
	}
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	s.name = s.cfg.NodeName + "-" + pki.RandomHex(4)
	if err := os.MkdirAll(s.Dir(), 0o700); err != nil {
		return err
	}
	return os.WriteFile(s.nameFile(), []byte(s.name), 0o600)
}

func (s *Store) tlsConfig() (*tls.Config, error) {
	crt, err := tls.LoadX509KeyPair(s.tree.Path("etcd/client.crt"), s.tree.Path("etcd/client.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(s.tree.Path("etcd/server-ca.crt"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &tls.Config{Certificates: []tls.Certificate{crt}, RootCAs: pool}, nil
}

func (s *Store) dial(eps ...string) (*clientv3.Client, error) {
	tc, err := s.tlsConfig()
	if err != nil {
		return nil, err
	}
	return clientv3.New(clientv3.Config{
		Endpoints: eps, TLS: tc, DialTimeout: 2 * time.Second, DialKeepAliveTime: 30 * time.Second,
		DialKeepAliveTimeout: 10 * time.Second, Logger: zap.NewNop(), PermitWithoutStream: true,
	})
}

// Client is the client of the local member, nil before Register.
func (s *Store) Client() *clientv3.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client
}

// Register opens the client of the local member.
func (s *Store) Register() error {
	c, err := s.dial(endpoint)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.client = c
	s.mu.Unlock()
	return nil
}

// Test is nil once the local member is a voter of a cluster with a leader and
// stands in its member list.
func (s *Store) Test(ctx context.Context) error {
	c := s.Client()
	if c == nil {
		return errors.New("etcd datastore is not started")
	}
	ctx, cancel := context.WithTimeout(ctx, testTimeout)
	defer cancel()
	st, err := c.Status(ctx, endpoint)
	if err != nil {
		return err
	}
	if st.IsLearner {
		return errors.New("this server has not yet been promoted from learner to voting member")
	}
	if st.Leader == 0 {
		return errors.New("etcd cluster has no leader")
	}
	ml, err := c.MemberList(ctx)
	if err != nil {
		return err
	}
	var found []string
	for _, m := range ml.Members {
		for _, p := range m.PeerURLs {
			if p == s.peerURL() && m.Name == s.name {
				return nil
			}
		}
		found = append(found, m.Name+"="+strings.Join(m.PeerURLs, ","))
	}
	return fmt.Errorf("this server is a not a member of the etcd cluster. Found %v, expect: %s=%s", found, s.name, s.peerURL())
}

// Wait blocks until Test succeeds, asking every 5 s.
func (s *Store) Wait(ctx context.Context) bool {
	for {
		err := s.Test(ctx)
		if err == nil {
			s.once.Do(func() { close(s.ready) })
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		proc.Info("Failed to test etcd connection: %v", err)
		if !proc.Sleep(ctx, 5*time.Second) {
			return false
		}
	}
}

// Ready is closed once the member has been a voter of a working cluster.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// Members is the linearizable member list.
func (s *Store) Members(ctx context.Context) ([]*etcdserverpb.Member, error) {
	c := s.Client()
	if c == nil {
		return nil, errors.New("etcd datastore is not started")
	}
	r, err := c.MemberList(ctx)
	if err != nil {
		return nil, err
	}
	return r.Members, nil
}

// Info is the body of /db/info.
type Info struct {
	Members []*etcdserverpb.Member `json:"members"`
}

// ReadInfo is what /db/info answers.
func (s *Store) ReadInfo(ctx context.Context) (*Info, error) {
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	m, err := s.Members(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to get etcd MemberList: %w", err)
	}
	return &Info{m}, nil
}

// errRetry marks what a joining server waits out.
var errRetry = errors.New("retry")

// Join adds this node as a learner and starts etcd. Too many learners, an
// unhealthy cluster and time-outs are waited out; anything else is returned.
func (s *Store) Join(ctx context.Context, info *access.Info) error {
	for {
		initial, err := s.tryJoin(ctx, info)
		if err == nil {
			proc.Info("Starting etcd to join cluster with members %v", initial)
			return s.start(ctx, strings.Join(initial, ","), "existing", false)
		}
		if !errors.Is(err, errRetry) {
			return err
		}
		if !proc.Sleep(ctx, time.Second) {
			return ctx.Err()
		}
	}
}

func (s *Store) tryJoin(ctx context.Context, info *access.Info) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	b, err := info.Get(ctx, "/db/info")
	if err != nil {
		var se *access.StatusError
		if errors.As(err, &se) && (se.Code == http.StatusUnauthorized || se.Code == http.StatusForbidden) {
			return nil, err
		}
		proc.Info("Waiting to retrieve etcd member list: %v", err)
		return nil, errRetry
	}
	var in Info
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, err
	}
	var eps []string
	for _, m := range in.Members {
		if !m.IsLearner {
			eps = append(eps, m.ClientURLs...)
		}
	}
	c, err := s.dial(eps...)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ml, err := c.MemberList(ctx)
	if err != nil {
		proc.Info("Failed to get member list from etcd cluster: %v", err)
		return nil, errRetry
	}
	add := true
	var initial []string
	for _, m := range ml.Members {
		for _, p := range m.PeerURLs {
			if m.Name == "" && p == s.peerURL() {
				m.Name = s.name // added before, never started
			}
			if m.Name == s.name && p == s.peerURL() {
				add = false
			}
		}
		if len(m.PeerURLs) > 0 {
			initial = append(initial, m.Name+"="+m.PeerURLs[0])
		}
		node := m.Name
		if i := strings.LastIndex(node, "-"); i > 1 {
			node = node[:i]
		}
		if m.Name != s.name && node == s.cfg.NodeName {
			_ = os.Remove(s.nameFile())
			return nil, errors.New("duplicate node name found, please use a unique name for this node")
		}
	}
	if !add {
		return initial, nil
	}
	proc.Info("Adding member %s=%s to etcd cluster %v", s.name, s.peerURL(), initial)
	if _, err := c.MemberAddAsLearner(ctx, []string{s.peerURL()}); err != nil {
		if waitOut(err) {
			proc.Info("Waiting for other members to finish joining etcd cluster: %v", err)
			return nil, errRetry
		}
		return nil, err
	}
	return append(initial, s.name+"="+s.peerURL()), nil
}

func waitOut(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	t := err.Error()
	for _, s := range []string{"too many learner members", "unhealthy cluster", "request timed out", "leader changed", "no leader", "context deadline exceeded", "unavailable", "member count is unequal", "not enough started members"} {
		if strings.Contains(strings.ToLower(t), s) {
			return true
		}
	}
	return false
}
