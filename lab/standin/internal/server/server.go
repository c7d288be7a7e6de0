// Package server is `k3s server` of the stand-in: authorities and bootstrap
// data, etcd, the supervisor on 6443, the apiserver behind it, and those
// controllers that muster relies on. It is only as wide as that.
package server

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/muster-edge/muster/lab/standin/internal/access"
	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/pki"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
	"github.com/muster-edge/muster/lab/standin/internal/store"
)

// apiWait is how long the apiserver may take before k3s gives up.
const apiWait = 15 * time.Minute

type server struct {
	cfg      *conf.Config
	sd       *proc.Shutdown
	tree     pki.Tree
	store    *store.Store
	sup      *supervisor
	password string // of the server token
	join     *access.Info
	addrs    string // API addresses, as last written
}

// Run founds, joins, resets or restarts a server. It returns an error only for
// what k3s ends with status 1; proc.ErrShutdown and nil mean status 0.
// startAgent runs the node's agent once the supervisor answers.
func Run(ctx context.Context, sd *proc.Shutdown, cfg *conf.Config, startAgent func(context.Context) error) error {
	if time.Now().Year() < 1980 {
		return errors.New("server time isn't set properly")
	}
	s := &server{cfg: cfg, sd: sd, tree: pki.Tree{Dir: cfg.ServerDir("tls")}}
	s.store = store.New(cfg, s.tree, sd)
	reset := cfg.Bool("cluster-reset")
	if reset && cfg.Server != "" {
		return errors.New("cannot perform cluster-reset while server URL is set - remove server from configuration before resetting")
	}
	if cfg.Str("cluster-reset-restore-path") != "" && !reset {
		return errors.New("invalid flag use; --cluster-reset required with --cluster-reset-restore-path")
	}
	if err := os.MkdirAll(cfg.ServerDir("cred"), 0o700); err != nil {
		return err
	}
	proc.Info("Starting k3s %s (stand-in, not k3s)", proc.Version)
	if reset {
		return s.reset(ctx)
	}
	return s.serve(ctx, startAgent)
}

// secret settles the password of the server token: as given, as kept, or new.
func (s *server) secret() (err error) {
	if t := s.cfg.Token; t != "" {
		s.password, err = access.ServerPassword(t)
		return err
	}
	if b, err := os.ReadFile(s.cfg.ServerDir("token")); err == nil {
		s.password, err = access.ServerPassword(strings.TrimSpace(string(b)))
		return err
	}
	if s.cfg.Server != "" {
		return errors.New("token is required to join a cluster")
	}
	s.password = pki.RandomHex(16)
	return nil
}

func (s *server) serve(ctx context.Context, startAgent func(context.Context) error) error {
	if err := s.secret(); err != nil {
		return err
	}
	if err := s.store.Tombstone(); err != nil {
		return err
	}
	member, err := s.store.Initialized()
	if err != nil {
		return err
	}
	switch {
	case member:
		proc.Info("Managed etcd cluster bootstrap already complete and initialized")
		if err := s.reconcile(ctx); err != nil {
			return err
		}
	case s.cfg.Server != "":
		if err := s.fetch(ctx); err != nil {
			return err
		}
	case s.cfg.Bool("cluster-init"):
		if err := s.tree.EnsureCAs(time.Now()); err != nil {
			return err
		}
	default:
		return errors.New("stand-in: a single server without cluster-init would use sqlite, which is not here")
	}
	if err := s.files(); err != nil {
		return err
	}
	s.sup = newSupervisor(s.cfg, s.tree, s.store)
	if err := s.sup.serve(ctx); err != nil {
		return fmt.Errorf("failed to listen: %w", err)
	}
	_ = os.Remove(s.store.ResetFlag())
	if err := s.store.SetName(false); err != nil {
		return err
	}
	if err := s.store.Register(); err != nil {
		return err
	}
	defer s.store.Close()
	go s.store.ManageLearners(ctx, func(ctx context.Context, m []*etcdserverpb.Member) { s.voters(ctx, m) })
	s.sup.routed.Store(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.run(ctx, member, startAgent)
	}()
	<-ctx.Done()
	<-done
	_ = s.store.WaitClosed()
	return context.Cause(ctx)
}

// run brings etcd, the apiserver and the rest up; failures here end the
// process with status 0, as they do in k3s.
func (s *server) run(ctx context.Context, member bool, startAgent func(context.Context) error) {
	if s.join != nil && !member {
		if err := s.store.Join(ctx, s.join); err != nil {
			s.sd.Request(fmt.Errorf("etcd cluster join failed: %w", err))
			return
		}
	} else if err := s.store.StartNew(ctx, member); err != nil {
		s.sd.Request(fmt.Errorf("etcd start failed: %w", err))
		return
	}
	if !s.store.Wait(ctx) {
		return
	}
	proc.Info("Connection to etcd is ready")
	if err := s.store.SaveBootstrap(ctx, s.password); err != nil {
		if errors.Is(err, store.ErrOtherToken) {
			proc.Fatal("Failed to save bootstrap data: %v", err)
		}
		s.sd.Request(fmt.Errorf("failed to save bootstrap data: %w", err))
		return
	}
	api, err := newAPIServer(ctx, s.cfg, s.tree)
	if err != nil {
		s.sd.Request(fmt.Errorf("apiserver exited: %w", err))
		return
	}
	go func() {
		err := api.run(ctx)
		if ctx.Err() == nil {
			s.sd.Request(fmt.Errorf("apiserver exited: %w", err))
		}
	}()
	k, err := newKube(api.loopback)
	if err != nil {
		s.sd.Request(err)
		return
	}
	deadline := time.Now().Add(apiWait)
	for !k.ready(ctx) {
		if time.Now().After(deadline) {
			s.sd.Request(errors.New("failed to wait for apiserver ready"))
			return
		}
		if !proc.Sleep(ctx, 200*time.Millisecond) {
			return
		}
	}
	s.sup.api.Store(api)
	s.sup.kube.Store(k)
	if err := s.hooks(ctx, k); err != nil {
		s.sd.Request(fmt.Errorf("startup hooks failed: %w", err))
		return
	}
	s.sup.core.Store(true)
	proc.Info("k3s is up and running")
	proc.Notify("READY=1\n")
	go s.sup.schedule(ctx)
	if startAgent != nil && !s.cfg.Bool("disable-agent") {
		go func() {
			if err := startAgent(ctx); err != nil && ctx.Err() == nil {
				s.sd.Request(fmt.Errorf("agent exited: %w", err))
			}
		}()
	}
	s.controllers(ctx, k)
}

// fetch is the first half of a join: the pin, the critical settings, the
// bootstrap data.
func (s *server) fetch(ctx context.Context) error {
	info, err := access.Validate(ctx, s.cfg.Server, s.cfg.Token, "server", nil)
	if err != nil {
		return fmt.Errorf("failed to validate connection to cluster at %s: %w", s.cfg.Server, err)
	}
	if info.Tok.Password == "" {
		return errors.New("failed to normalize server token; must be in format K10<CA-HASH>::<USERNAME>:<PASSWORD> or <PASSWORD>")
	}
	s.join = info
	nodeToken := s.cfg.AgentTok
	if nodeToken == "" {
		nodeToken = s.cfg.Token
	}
	if node, err := access.Validate(ctx, s.cfg.Server, nodeToken, "node", nil); err == nil {
		b, err := node.Get(ctx, "/v1-k3s/config")
		if err != nil {
			proc.Warn("Unable to retrieve server configuration, skipping the check of critical values: %v", err)
		} else if err := compareCritical(Critical(s.cfg), b); err != nil {
			return err
		}
	}
	b, err := info.Get(ctx, "/v1-k3s/server-bootstrap")
	if err != nil {
		return fmt.Errorf("failed to get bootstrap data: %w", err)
	}
	return s.takeData(b)
}

// reconcile takes what the cluster or the own database has over what is on
// disk. A join URL that does not answer is no reason to stop.
func (s *server) reconcile(ctx context.Context) error {
	if s.cfg.Server != "" && s.cfg.Token != "" {
		info, err := access.Validate(ctx, s.cfg.Server, s.cfg.Token, "server", nil)
		if err == nil {
			if b, gerr := info.Get(ctx, "/v1-k3s/server-bootstrap"); gerr == nil {
				s.join = info
				return s.takeData(b)
			} else {
				err = gerr
			}
		}
		proc.Warn("Failed to reconcile with cluster at %s, using local data: %v", s.cfg.Server, err)
	}
	d, err := s.store.LocalBootstrap(s.password)
	if err != nil {
		return err
	}
	if d == nil {
		return nil
	}
	return pki.WriteData(s.cfg.ServerDir(), d, pki.OnDisk(s.cfg.ServerDir()))
}

func (s *server) takeData(b []byte) error {
	var d pki.Data
	if err := json.Unmarshal(b, &d); err != nil {
		return fmt.Errorf("bootstrap data: %w", err)
	}
	return pki.WriteData(s.cfg.ServerDir(), d, pki.OnDisk(s.cfg.ServerDir()))
}

// files writes leaf certificates, passwd, tokens and keys.
func (s *server) files() error {
	svc, err := serviceIP(s.cfg)
	if err != nil {
		return err
	}
	if err := s.tree.EnsureLeaves(s.cfg.NodeName, s.cfg.NodeIP, s.cfg.List("tls-san"), svc, time.Now()); err != nil {
		return err
	}
	psk := s.cfg.ServerDir("cred", "ipsec.psk")
	if _, err := os.Stat(psk); err != nil {
		if err := os.WriteFile(psk, []byte(pki.RandomHex(48)), 0o600); err != nil {
			return err
		}
	}
	agentPw := s.password
	if s.cfg.AgentTok != "" {
		t, err := access.ParseToken(s.cfg.AgentTok)
		if err != nil || t.Password == "" {
			return errors.New("failed to normalize agent token; must be in format K10<CA-HASH>::<USERNAME>:<PASSWORD> or <PASSWORD>")
		}
		agentPw = t.Password
	}
	passwd := fmt.Sprintf("%s,server,server,k3s:server\n%s,node,node,k3s:agent\n", s.password, agentPw)
	pf := s.cfg.ServerDir("cred", "passwd")
	if have, err := os.ReadFile(pf); err != nil || string(have) != passwd {
		if err := os.WriteFile(pf, []byte(passwd), 0o600); err != nil {
			return err
		}
	}
	ca, err := os.ReadFile(s.tree.Path("server-ca.crt"))
	if err != nil {
		return err
	}
	if err := s.tokenFile(ca, "token", "server:"+s.password); err != nil {
		return err
	}
	if err := link(s.cfg.ServerDir("node-token"), "token"); err != nil {
		return err
	}
	if s.cfg.AgentTok == "" {
		return link(s.cfg.ServerDir("agent-token"), "token")
	}
	_ = os.Remove(s.cfg.ServerDir("agent-token"))
	return s.tokenFile(ca, "agent-token", "node:"+agentPw)
}

func (s *server) tokenFile(ca []byte, name, cred string) error {
	t, err := access.Format(ca, cred)
	if err != nil {
		return err
	}
	return os.WriteFile(s.cfg.ServerDir(name), []byte(t+"\n"), 0o600)
}

func link(path, target string) error {
	if have, err := os.Readlink(path); err == nil && have == target {
		return nil
	}
	_ = os.Remove(path)
	return os.Symlink(target, path)
}

// kubeconfig writes the administrator's files: the one for people, and
// cred/admin.kubeconfig with paths in it.
func (s *server) kubeconfig() error {
	mode := os.FileMode(0o600)
	if m := s.cfg.Str("write-kubeconfig-mode"); m != "" {
		n, err := strconv.ParseUint(m, 8, 32)
		if err != nil {
			return err
		}
		mode = os.FileMode(n)
	}
	url := "https://127.0.0.1:" + s.cfg.Str("https-listen-port")
	ca, crt, key := s.tree.Path("server-ca.crt"), s.tree.Path("client-admin.crt"), s.tree.Path("client-admin.key")
	if err := os.WriteFile(s.cfg.ServerDir("cred", "admin.kubeconfig"), kubeconfig(url, "", ca, crt, key), 0o600); err != nil {
		return err
	}
	path := s.cfg.Str("write-kubeconfig")
	if path == "" {
		return nil
	}
	var data [3]string
	for i, p := range []string{ca, crt, key} {
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		data[i] = base64.StdEncoding.EncodeToString(b)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, kubeconfig(url, "-data", data[0], data[1], data[2]), mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func kubeconfig(url, suffix, ca, crt, key string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
clusters:
- cluster:
    certificate-authority%[2]s: %[3]s
    server: %[1]s
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
users:
- name: default
  user:
    client-certificate%[2]s: %[4]s
    client-key%[2]s: %[5]s
`, url, suffix, ca, crt, key)
}

// reset is `--cluster-reset`, with a snapshot or without, and ends the process.
func (s *server) reset(ctx context.Context) error {
	if err := s.secret(); err != nil {
		return err
	}
	if err := s.store.CheckReset(); err != nil {
		return err
	}
	if path := s.cfg.Str("cluster-reset-restore-path"); path != "" {
		if err := s.store.RestoreFile(path); err != nil {
			return err
		}
	} else if member, err := s.store.Initialized(); err != nil || !member {
		return errors.Join(errors.New("cannot perform cluster-reset: no etcd database on this node"), err)
	}
	d, err := s.store.LocalBootstrap(s.password)
	if err != nil {
		return err
	}
	if d != nil {
		// What the database says holds: the files may be of another time.
		if err := pki.WriteData(s.cfg.ServerDir(), d, false); err != nil {
			return err
		}
	}
	if err := s.files(); err != nil {
		return err
	}
	if l, err := net.Listen("tcp", net.JoinHostPort("", s.cfg.Str("https-listen-port"))); err != nil {
		return fmt.Errorf("failed to listen: %w", err)
	} else {
		_ = l.Close()
	}
	if err := s.store.Register(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.store.Reset(ctx); err != nil {
		return err
	}
	proc.Info("Managed etcd cluster membership has been reset, restart without --cluster-reset flag now. Backup and delete ${datadir}/server/db on each peer etcd server and rejoin the nodes")
	s.store.Close()
	cancel()
	return s.store.WaitClosed()
}
