package k3s

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/kube"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// Manager does what the planner wants of this node's k3s. Its methods may be
// called from one goroutine at a time.
type Manager struct {
	cfg   Config
	boot  string
	seen  seen
	birth *fleet.BirthSettings // of the last start
	disk  diskSpeed
	// configAt is when config.yaml last changed (CLOCK_BOOTTIME).
	configAt time.Duration
	// step is called before each step of MoveAside; nil but in tests.
	step func(name string) error
	// client of the API, as long as the files behind it stay the same.
	client    *kube.Client
	clientKey string
	version   string
}

// New checks cfg and returns a Manager.
func New(cfg Config) (*Manager, error) {
	cfg.Paths = cfg.Paths.WithDefaults()
	if cfg.Timeout == 0 {
		cfg.Timeout = 4 * time.Second
	}
	if !cfg.API.IsValid() {
		cfg.API = netip.MustParseAddrPort("127.0.0.1:6443")
	}
	if cfg.Boottime == nil {
		cfg.Boottime = launch.Boottime
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	errs := []error{cfg.Self.Validate(), cfg.Paths.Validate()}
	if !filepath.IsAbs(cfg.Binary) {
		errs = append(errs, fmt.Errorf("k3s: config: program %q must be an absolute path", cfg.Binary))
	}
	if cfg.Control == nil {
		errs = append(errs, errors.New("k3s: config: no control"))
	}
	if cfg.Timeout < 0 {
		errs = append(errs, fmt.Errorf("k3s: config: timeout %s is negative", cfg.Timeout))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	boot, err := launch.BootID()
	if err != nil {
		return nil, err
	}
	return &Manager{cfg: cfg, boot: boot}, nil
}

// Boottime is CLOCK_BOOTTIME, in which leases are counted.
func Boottime() time.Duration { return launch.Boottime() }

func roleOf(r launch.Role) clusterbootstrap.Role {
	switch r {
	case launch.Worker:
		return clusterbootstrap.RoleWorker
	case launch.Candidate, launch.Joiner:
		return clusterbootstrap.RoleCandidate
	case launch.Server:
		return clusterbootstrap.RoleServer
	}
	return clusterbootstrap.RoleNone
}

func noteOf(r clusterbootstrap.Role, plan string, unfenced bool) (launch.RoleNote, error) {
	switch r {
	case clusterbootstrap.RoleWorker:
		return launch.RoleNote{Role: launch.Worker}, nil
	case clusterbootstrap.RoleCandidate:
		if unfenced {
			return launch.RoleNote{Role: launch.Joiner}, nil
		}
		return launch.RoleNote{Role: launch.Candidate, Plan: plan}, nil
	case clusterbootstrap.RoleServer:
		return launch.RoleNote{Role: launch.Server}, nil
	}
	return launch.RoleNote{}, fmt.Errorf("k3s: role %s runs no k3s", r)
}

// Start writes config, tokens, role file and the permission for this boot,
// then starts the launcher. Repeating it is no error and restarts nothing.
func (m *Manager) Start(ctx context.Context, s Start) error {
	if s.Settings.Self != m.cfg.Self {
		return fmt.Errorf("k3s: start: the settings are those of %s", s.Settings.Self)
	}
	note, err := noteOf(s.Role, s.Plan, s.Unfenced)
	if err != nil {
		return err
	}
	if s.Init && (s.Role != clusterbootstrap.RoleServer || exists(m.cfg.Paths.WAL())) {
		return errors.New("k3s: start: a new cluster is made by a server without datastore only")
	}
	if exists(m.asideFile()) {
		return errors.New("k3s: start: old data is not aside yet")
	}
	// A launcher that runs something else must be gone before its files change.
	if old, err := m.cfg.Paths.ReadRole(); err != nil || old != note && old.Role != launch.NoRole {
		if err := m.Stop(ctx); err != nil {
			return err
		}
	}
	if s.Role == clusterbootstrap.RoleWorker {
		if err := dropTorn(filepath.Dir(m.cfg.Paths.AgentCert())); err != nil {
			return err
		}
	}
	if err := m.prepareTokens(s); err != nil {
		return err
	}
	if err := m.keepNodePassword(); err != nil {
		return err
	}
	if err := m.writeConfig(s.Role, s.Settings); err != nil {
		return err
	}
	m.birth = &s.Settings.Birth
	// Not written again each turn: it costs a flush.
	if old, err := m.cfg.Paths.ReadRole(); err != nil || old != note {
		if err := launch.WriteFile(m.cfg.Paths.RoleFile(), note); err != nil {
			return err
		}
	}
	if s.Init {
		if err := launch.WriteFile(m.cfg.Paths.InitFile(), launch.Init{Boot: m.boot}); err != nil {
			return err
		}
	}
	if !m.allowed() {
		if err := launch.WriteFile(m.cfg.Paths.GoFile(), launch.Go{Boot: m.boot}); err != nil {
			return err
		}
	}
	if err := m.cfg.Control.Start(ctx); err != nil {
		return err
	}
	return m.started(ctx)
}

// started waits until the launcher has made up its mind, so that what is
// observed next is what came of the start.
func (m *Manager) started(ctx context.Context) error {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		s, err := m.cfg.Paths.ReadStatus()
		if err != nil || s.State != launch.Starting || !s.Launcher.Alive() {
			return nil // Observe and Trouble say what is
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("k3s: start: %w", ctx.Err())
		case <-t.C:
		}
	}
}

// Reconfigure rewrites config.yaml for the next start: with three servers each
// names another one to join by, since one that etcd removed while it was away
// refuses to start without.
func (m *Manager) Reconfigure(role clusterbootstrap.Role, s Settings) error {
	return m.writeConfig(role, s)
}

func (m *Manager) writeConfig(role clusterbootstrap.Role, s Settings) error {
	if s.Join == "" && (role == clusterbootstrap.RoleWorker || role == clusterbootstrap.RoleCandidate) {
		if b, err := os.ReadFile(m.joinFile()); err == nil && len(b) < 300 {
			s.Join = strings.TrimSpace(string(b))
		}
	}
	b, err := s.config(role, m.cfg.Paths, cgroupV1())
	if err != nil {
		return err
	}
	_, refused := NodeLabels(s.Labels)
	for _, r := range refused {
		m.cfg.Log.Warn("leave out a label", "err", r)
	}
	path := m.cfg.Paths.ConfigFile()
	if old, err := os.ReadFile(path); err == nil && string(old) == string(b) {
		return nil
	}
	m.configAt = m.cfg.Boottime()
	return launch.WriteBytes(path, b)
}

// deafLimit is how long a worker may reach no apiserver before it is started
// again with a config that names another server. k3s itself never gives up on
// the one it was started with, if it had no time to learn of others.
const deafLimit = time.Minute

// Tend starts the launcher again if it should run and died, and a worker's k3s
// that knows only a server that is gone. Call it each turn.
func (m *Manager) Tend(ctx context.Context) error {
	if !m.allowed() || exists(m.asideFile()) {
		return nil
	}
	if err := m.cfg.Control.Start(ctx); err != nil {
		return err
	}
	s, err := m.cfg.Paths.ReadStatus()
	if now := m.cfg.Boottime(); err != nil || m.seen.deaf == 0 || now-m.seen.deaf < deafLimit || m.configAt <= s.Started {
		return nil // nothing is wrong, or nothing would be another
	}
	m.cfg.Log.Info("start the worker again with another server")
	m.seen.deaf = 0
	return m.cfg.Paths.K3s().Ask() // the launcher starts it again
}

func (m *Manager) allowed() bool {
	var g launch.Go
	return launch.ReadFile(m.cfg.Paths.GoFile(), &g) == nil && g.Boot == m.boot
}

// Stop withdraws the permission and ends k3s; it returns when k3s is gone.
func (m *Manager) Stop(ctx context.Context) error {
	if err := errors.Join(launch.Remove(m.cfg.Paths.GoFile()), launch.Remove(m.cfg.Paths.InitFile())); err != nil {
		return err
	}
	if err := m.cfg.Control.Stop(ctx); err != nil {
		return err
	}
	m.forgetClient()
	if p := m.cfg.Paths.K3s(); p != nil {
		return fmt.Errorf("%w: process %d", ErrRunning, p.PID)
	}
	return nil
}

// SetRole changes the role file alone: a candidate that runs becomes a server
// without a restart.
func (m *Manager) SetRole(role clusterbootstrap.Role) error {
	old, err := m.cfg.Paths.ReadRole()
	if err != nil {
		return err
	}
	note, err := noteOf(role, old.Plan, old.Role == launch.Joiner)
	if err != nil {
		return err
	}
	return launch.WriteFile(m.cfg.Paths.RoleFile(), note)
}

// WriteLease allows a candidate to run k3s until CLOCK_BOOTTIME is until: the
// time at which the lease was *asked for*, plus what the leader gave. It may be
// called beside other methods.
func (m *Manager) WriteLease(plan string, until time.Duration) error {
	if plan == "" {
		return errors.New("k3s: write lease: no plan")
	}
	return launch.WriteFile(m.cfg.Paths.LeaseFile(), launch.Lease{Plan: plan, Boot: m.boot, Until: until})
}

// Trouble is why k3s does not run although it may, for people; "" if nothing
// is wrong.
func (m *Manager) Trouble() string {
	s, err := m.cfg.Paths.ReadStatus()
	if err != nil || s.State == launch.Starting || s.State == launch.Running || s.State == launch.Gone || !s.Launcher.Alive() {
		return ""
	}
	return s.Reason
}

// Version is the k3s version of Binary, as in "k3s version v1.36.3+k3s1 (...)".
func (m *Manager) Version(ctx context.Context) (string, error) {
	if m.version != "" {
		return m.version, nil
	}
	cmd := exec.CommandContext(ctx, m.cfg.Binary, "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("k3s: read version: %w", err)
	}
	v, err := parseVersion(string(out))
	if err != nil {
		return "", err
	}
	m.version = v
	return v, nil
}

func parseVersion(s string) (string, error) {
	line, _, _ := strings.Cut(s, "\n")
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "k3s" || f[1] != "version" || !strings.HasPrefix(f[2], "v") || len(f[2]) > 80 {
		return "", fmt.Errorf("k3s: read version: %.80q", line)
	}
	return f[2], nil
}

// admin is a client with the rights of an administrator: on servers only.
func (m *Manager) admin() (*kube.Client, error) {
	return m.clientOf(filepath.Join(m.cfg.Paths.Server(), "cred", "admin.kubeconfig"), "https://"+m.cfg.API.String())
}

// kubelet is a client with the rights of this node's kubelet.
func (m *Manager) kubelet() (*kube.Client, error) {
	return m.clientOf(filepath.Join(m.cfg.Paths.Data, "agent", "kubelet.kubeconfig"), "")
}

// clientOf makes a client of a kubeconfig, again when the files change: k3s
// renews its certificates when it starts.
func (m *Manager) clientOf(path, server string) (*kube.Client, error) {
	c, err := kube.Load(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNotReady, err)
	}
	if err != nil {
		return nil, err
	}
	if server != "" {
		c.Server = server
	}
	key := fmt.Sprint(c.Server, "\x00", string(c.CA), "\x00", string(c.Cert))
	if m.client != nil && m.clientKey == key {
		return m.client, nil
	}
	m.forgetClient()
	k, err := kube.New(c, m.cfg.Timeout)
	if err != nil {
		return nil, err
	}
	m.client, m.clientKey = k, key
	return k, nil
}

func (m *Manager) forgetClient() {
	if m.client != nil {
		m.client.Close()
	}
	m.client, m.clientKey = nil, ""
}

// nodePath is the Node object of id.
func nodePath(id fleet.NodeID) string { return "/api/v1/nodes/" + string(id) }
