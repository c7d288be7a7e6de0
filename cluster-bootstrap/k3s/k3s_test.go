package k3s

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

const (
	idA = fleet.NodeID("n-aaaaaaaaaaaaaaaaaaaaaaaa")
	idB = fleet.NodeID("n-bbbbbbbbbbbbbbbbbbbbbbbb")
	idC = fleet.NodeID("n-cccccccccccccccccccccccc")
)

// idle is a control of nothing: what must not run, does not.
type idle struct{ starts, stops int }

func (i *idle) Start(context.Context) error           { i.starts++; return nil }
func (i *idle) Stop(context.Context) error            { i.stops++; return nil }
func (i *idle) Running(context.Context) (bool, error) { return false, nil }

func newManager(t *testing.T) (*Manager, *idle) {
	t.Helper()
	d := t.TempDir()
	c := &idle{}
	m, err := New(Config{Self: idA, Binary: "/bin/false", Control: c, Timeout: 5 * time.Second,
		Paths: Paths{State: d + "/state", Run: d + "/run", Data: d + "/data", Config: d + "/etc", Node: d + "/node"}})
	if err != nil {
		t.Fatal(err)
	}
	return m, c
}

func settings() Settings {
	return Settings{Self: idA, Address: netip.MustParseAddr("100.96.0.1"), Interface: "muster0", Birth: fleet.DefaultBirth(),
		Servers: []netip.Addr{netip.MustParseAddr("100.96.0.1"), netip.MustParseAddr("100.96.0.2")},
		Labels:  map[string]string{"gpu": "yes", "kubernetes.io/evil": "x"}}
}

func parse(t *testing.T, b []byte, err error) map[string]any {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := yaml.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestConfigByRole(t *testing.T) {
	p := Paths{State: t.TempDir()}.WithDefaults()
	founder := settings()
	joiner := founder
	joiner.Self, joiner.Address, joiner.Join = idB, netip.MustParseAddr("100.96.0.2"), "https://100.96.0.1:6443"
	b, err := founder.config(clusterbootstrap.RoleServer, p, false)
	f := parse(t, b, err)
	b, err = joiner.config(clusterbootstrap.RoleCandidate, p, true)
	j := parse(t, b, err)
	b, err = joiner.config(clusterbootstrap.RoleWorker, p, true)
	w := parse(t, b, err)

	for _, m := range []map[string]any{f, j, w} {
		for _, k := range []string{"cluster-init", "token", "agent-token"} {
			if _, ok := m[k]; ok {
				t.Errorf("config contains %q", k)
			}
		}
	}
	for k := range w {
		if !slices.Contains(launch.AgentKeys, k) {
			t.Errorf("the worker's config contains %q, which an agent does not know", k)
		}
	}
	if _, ok := f["server"]; ok {
		t.Error("the founder's config names a server")
	}
	// Two servers differ in what is their own, and in nothing else.
	own := []string{"node-name", "node-ip", "server", "kubelet-arg"}
	for _, k := range slices.Sorted(maps.Keys(j)) {
		if !slices.Contains(own, k) && fmt.Sprint(f[k]) != fmt.Sprint(j[k]) {
			t.Errorf("%s differs between servers: %v, %v", k, f[k], j[k])
		}
	}
	if fmt.Sprint(j["kubelet-arg"]) != "[fail-cgroupv1=false]" || f["kubelet-arg"] != nil {
		t.Errorf("cgroup v1: %v, v2: %v", j["kubelet-arg"], f["kubelet-arg"])
	}
	if fmt.Sprint(f["node-label"]) != "[gpu=yes]" || fmt.Sprint(f["etcd-arg"]) != "[max-learners=2]" {
		t.Errorf("%v", f)
	}
}

func TestSettingsValidate(t *testing.T) {
	good := settings()
	if err := good.Validate(clusterbootstrap.RoleServer); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		role clusterbootstrap.Role
		bad  func(*Settings)
	}{
		"a worker without server": {clusterbootstrap.RoleWorker, func(*Settings) {}},
		"joins itself":            {clusterbootstrap.RoleServer, func(s *Settings) { s.Join = JoinURL(s.Address) }},
		"plain http":              {clusterbootstrap.RoleServer, func(s *Settings) { s.Join = "http://x:6443" }},
		"no address":              {clusterbootstrap.RoleServer, func(s *Settings) { s.Address = netip.Addr{} }},
		"no role":                 {clusterbootstrap.RoleNone, func(*Settings) {}},
		"init by the back door":   {clusterbootstrap.RoleServer, func(s *Settings) { s.Extra = map[string]any{"cluster-init": true} }},
	} {
		s := settings()
		c.bad(&s)
		if s.Validate(c.role) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestCriticalDigest(t *testing.T) {
	b := fleet.DefaultBirth()
	d := CriticalDigest(b)
	for name, change := range map[string]func(*fleet.BirthSettings){
		"cluster CIDR": func(b *fleet.BirthSettings) { b.ClusterCIDR = "10.44.0.0/16" },
		"service CIDR": func(b *fleet.BirthSettings) { b.ServiceCIDR = "10.45.0.0/16" },
		"DNS":          func(b *fleet.BirthSettings) { b.ClusterDNS = "10.43.0.11" },
		"backend":      func(b *fleet.BirthSettings) { b.FlannelBackend = "vxlan" },
		"encryption":   func(b *fleet.BirthSettings) { b.SecretsEncryption = false },
		"learners":     func(b *fleet.BirthSettings) { b.MaxLearners = 1 },
		"disable":      func(b *fleet.BirthSettings) { b.Disable = []string{"traefik"} },
	} {
		x := fleet.DefaultBirth()
		change(&x)
		if CriticalDigest(x) == d {
			t.Errorf("%s: the same digest", name)
		}
	}
	one, two := b, b
	one.Disable, two.Disable = []string{"traefik", "servicelb"}, []string{"servicelb", "traefik"}
	if CriticalDigest(one) != CriticalDigest(two) {
		t.Error("the order of the disable list counts")
	}
	if x := b; CriticalDigest(x) != d || len(d) != 64 {
		t.Error("not stable")
	}
}

func TestNodeLabels(t *testing.T) {
	ok, refused := NodeLabels(map[string]string{
		"gpu": "nvidia", "muster.dev/camera": "yes", "node.kubernetes.io/instance-type": "nuc", "kubernetes.io/arch": "amd64",
		"topology.kubernetes.io/zone": "shop", "example.com/empty": "", "node.kubernetes.io/x": "1",
		"node-role.kubernetes.io/control-plane": "true", "node-restriction.kubernetes.io/x": "1", "kubernetes.io/x": "1", "foo.k8s.io/x": "1",
		"bad value": "x", "x": "not a value!", "/": "", "a/b/c": "", "UPPER.com/x": "1", "x,y": "z", "k": "v,w=1", "long": strings.Repeat("v", 64),
	})
	want := []string{"example.com/empty=", "gpu=nvidia", "kubernetes.io/arch=amd64", "muster.dev/camera=yes",
		"node.kubernetes.io/instance-type=nuc", "node.kubernetes.io/x=1", "topology.kubernetes.io/zone=shop"}
	if !slices.Equal(ok, want) || len(refused) != 12 {
		t.Errorf("%v\n%v", ok, errors.Join(refused...))
	}
}

func TestTokens(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	for s, want := range map[string]string{
		"K10" + hash + "::server:0123456789abcdef":            "0123456789abcdef false",
		"K10" + hash + "::abcdef.0123456789abcdef":            "abcdef.0123456789abcdef true",
		"K10" + hash + "::server:short":                       "",
		"0123456789abcdef":                                    "", // would not pin the CA
		"abcdef.0123456789abcdef":                             "",
		"K10" + hash[1:] + "::server:0123456789abcdef":        "",
		"K10" + hash + "::server:with space 0123456789":       "",
		"K10" + hash + "::server:0123456789abcdef\nroot: yes": "",
		"": "",
	} {
		h, secret, boot, err := ParseToken(s)
		got := ""
		if err == nil {
			got = fmt.Sprint(secret, " ", boot)
			if h != hash {
				t.Errorf("%q: hash %s", s, h)
			}
		}
		if got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

func TestMaterialIsKeptApart(t *testing.T) {
	m, _ := newManager(t)
	hash := strings.Repeat("ab", 32)
	srv := Material{As: clusterbootstrap.RoleServer, Server: "https://100.96.0.2:6443", Token: "K10" + hash + "::server:0123456789abcdef", AgentToken: "fedcba9876543210"}
	wrk := Material{As: clusterbootstrap.RoleWorker, Server: "https://100.96.0.2:6443", Token: "K10" + hash + "::abcdef.0123456789abcdef"}
	for _, bad := range []Material{{}, {As: clusterbootstrap.RoleWorker, Server: srv.Server, Token: srv.Token}, // a worker never gets it
		{As: clusterbootstrap.RoleServer, Server: wrk.Server, Token: wrk.Token}, {As: srv.As, Server: srv.Server, Token: srv.Token},
		{As: wrk.As, Server: "http://100.96.0.2:6443", Token: wrk.Token}} {
		if m.KeepMaterial(bad) == nil {
			t.Errorf("kept: %+v", bad)
		}
	}
	for _, x := range []Material{srv, wrk} {
		if err := m.KeepMaterial(x); err != nil {
			t.Fatal(err)
		}
	}
	has := func(name string) bool {
		fi, err := os.Stat(m.tokenFile(name))
		if err == nil && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", name, fi.Mode())
		}
		return err == nil
	}
	s := settings()
	s.Join = srv.Server
	start := func(r clusterbootstrap.Role) error {
		return m.Start(t.Context(), Start{Role: r, Plan: "p", Settings: s})
	}
	if err := start(clusterbootstrap.RoleWorker); err != nil {
		t.Fatal(err)
	}
	s.Join = "" // a site without in-site addresses
	if err := start(clusterbootstrap.RoleWorker); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(m.cfg.Paths.ConfigFile())
	if err != nil || !strings.Contains(string(b), "server: https://100.96.0.2:6443\n") {
		t.Errorf("config: %s %v", b, err)
	}
	// A prepared worker whose power was cut starts as a worker once more.
	if !has(nextServer) || !has(nextAgent) || has(tokenServer) || !has(tokenJoin) {
		t.Error("a prepared worker lost what the plan gave it, or holds what servers use, or has no token to join")
	}
	if err := m.ForgetServerMaterial(); err != nil { // the plan has ended
		t.Fatal(err)
	}
	if has(nextServer) || has(tokenServer) || has(nextAgent) || !has(tokenJoin) {
		t.Error("a worker holds server tokens, or no token to join")
	}
	if err := start(clusterbootstrap.RoleCandidate); err == nil {
		t.Error("a candidate without server token was started")
	}
	if err := m.KeepMaterial(srv); err != nil {
		t.Fatal(err)
	}
	if err := start(clusterbootstrap.RoleCandidate); err != nil {
		t.Fatal(err)
	}
	if !has(tokenServer) || !has(tokenAgent) || has(nextServer) {
		t.Error("a candidate has no server tokens")
	}
	b, err = os.ReadFile(m.cfg.Paths.ConfigFile())
	if err != nil || strings.Contains(string(b), "0123456789abcdef") {
		t.Errorf("the config holds a secret, or: %v", err)
	}
}

func TestFoundingDrawsSecretsOnce(t *testing.T) {
	m, c := newManager(t)
	st := Start{Role: clusterbootstrap.RoleServer, Init: true, Settings: settings()}
	if err := m.Start(t.Context(), st); err != nil {
		t.Fatal(err)
	}
	one, err := m.readToken(m.tokenFile(tokenServer))
	if err != nil || len(one) != 64 {
		t.Fatalf("%q %v", one, err)
	}
	pw, err := os.ReadFile(filepath.Join(m.cfg.Paths.Node, "password"))
	if err != nil {
		t.Fatal(err)
	}
	// A new disk below /etc, or a re-imaged root: the password comes back.
	if err := os.RemoveAll(m.cfg.Paths.Node); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context(), st); err != nil {
		t.Fatal(err)
	}
	two, err := m.readToken(m.tokenFile(tokenServer))
	if err != nil || one != two {
		t.Errorf("a repeated founding has another token: %v", err)
	}
	again, err := os.ReadFile(filepath.Join(m.cfg.Paths.Node, "password"))
	if err != nil || string(again) != string(pw) {
		t.Errorf("the node password changed: %q %q %v", pw, again, err)
	}
	if c.starts != 2 || c.stops != 0 {
		t.Errorf("%+v", c)
	}
	if err := os.MkdirAll(m.cfg.Paths.WAL(), 0o700); err != nil {
		t.Fatal(err)
	}
	if m.Start(t.Context(), st) == nil {
		t.Error("cluster-init beside a datastore")
	}
}

func TestAPasswordThatIsThereIsKept(t *testing.T) {
	m, _ := newManager(t)
	const old = "0123456789abcdef0123456789abcdef"
	if err := launch.WriteBytes(filepath.Join(m.cfg.Paths.Node, "password"), []byte(old)); err != nil {
		t.Fatal(err)
	}
	if err := m.keepNodePassword(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(m.cfg.Paths.State, "k3s", "node-password")); err != nil || strings.TrimSpace(string(b)) != old {
		t.Errorf("%q %v", b, err)
	}
}

// fill makes a node that looks like a server that was.
func fill(t *testing.T, m *Manager) {
	t.Helper()
	for _, f := range []string{"server/db/etcd/member/wal/0.wal", "server/db/snapshots/s1", "server/token", "server/agent-token", "server/cred/passwd",
		"server/tls/server-ca.key", "server/tls/etcd/peer-ca.key", "server/manifests/x.yaml", "agent/client-kubelet.crt", "agent/client-kubelet.key",
		"agent/kubelet.kubeconfig", "agent/etc/k3s-agent-load-balancer.json", "agent/containerd/image", "agent/images/x.tar"} {
		if err := launch.WriteBytes(filepath.Join(m.cfg.Paths.Data, f), []byte("secret of "+f)); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{tokenServer, tokenAgent, tokenJoin, nextServer} {
		if err := m.writeToken(n, "secret-secret-secret"); err != nil {
			t.Fatal(err)
		}
	}
	if err := launch.WriteFile(m.cfg.Paths.RoleFile(), launch.RoleNote{Role: launch.Server}); err != nil {
		t.Fatal(err)
	}
	if err := m.keepNodePassword(); err != nil {
		t.Fatal(err)
	}
}

// files lists everything below dir.
func files(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			r, e := filepath.Rel(dir, p)
			out = append(out, r)
			return e
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

func TestMoveAside(t *testing.T) {
	for _, role := range []clusterbootstrap.Role{clusterbootstrap.RoleWorker, clusterbootstrap.RoleNone} {
		m, c := newManager(t)
		for range 4 {
			fill(t, m)
			if err := m.MoveAside(t.Context(), role); err != nil {
				t.Fatal(err)
			}
		}
		if c.stops != 4 {
			t.Errorf("%d stops", c.stops)
		}
		want := []string{"agent/containerd/image", "agent/images/x.tar",
			"muster-aside/0003/server/db/etcd/member/wal/0.wal", "muster-aside/0003/server/db/snapshots/s1", "muster-aside/0003/server/manifests/x.yaml",
			"muster-aside/0004/server/db/etcd/member/wal/0.wal", "muster-aside/0004/server/db/snapshots/s1", "muster-aside/0004/server/manifests/x.yaml"}
		state := []string{"k3s/node-password"}
		if role == clusterbootstrap.RoleWorker {
			want = append([]string{"agent/client-kubelet.crt", "agent/client-kubelet.key", "agent/containerd/image",
				"agent/etc/k3s-agent-load-balancer.json", "agent/images/x.tar", "agent/kubelet.kubeconfig"}, want[2:]...)
			state = append(state, "k3s/tokens/join")
		}
		if got := files(t, m.cfg.Paths.Data); !slices.Equal(got, want) {
			t.Errorf("%s: data:\n%s", role, strings.Join(got, "\n"))
		}
		if got := files(t, m.cfg.Paths.State); !slices.Equal(got, state) {
			t.Errorf("%s: state: %v", role, got)
		}
	}
	m, _ := newManager(t)
	if m.MoveAside(t.Context(), clusterbootstrap.RoleServer) == nil {
		t.Error("moved aside to be a server")
	}
}

// TestMoveAsideInterrupted stops it at each write to the disk, as a power cut
// would, and repeats it.
func TestMoveAsideInterrupted(t *testing.T) {
	for cut := 0; ; cut++ {
		m, _ := newManager(t)
		fill(t, m)
		left := cut
		m.step = func(string) error {
			if left--; left < 0 {
				return errors.New("power cut")
			}
			return nil
		}
		err := m.MoveAside(t.Context(), clusterbootstrap.RoleWorker)
		if err == nil {
			if cut < 5 {
				t.Fatalf("only %d places to stop at", cut)
			}
			return
		}
		m.step = nil
		_, signs := m.Observe(t.Context())
		done := !exists(m.cfg.Paths.Server()) && !exists(m.tokenFile(tokenServer))
		if !signs.Aside && !done && cut > 0 {
			t.Errorf("cut %d: half done, and nothing says so", cut)
		}
		if signs.Aside {
			s := settings()
			s.Join = "https://100.96.0.2:6443"
			if m.Start(t.Context(), Start{Role: clusterbootstrap.RoleWorker, Settings: s}) == nil {
				t.Errorf("cut %d: k3s starts on data that is half moved", cut)
			}
		}
		if err := m.MoveAside(t.Context(), clusterbootstrap.RoleWorker); err != nil {
			t.Fatalf("cut %d: %v", cut, err)
		}
		for _, f := range files(t, m.cfg.Paths.Data) {
			if strings.Contains(f, "tls/") && strings.Contains(f, "server") || strings.HasSuffix(f, "server/token") {
				t.Errorf("cut %d: %s is left", cut, f)
			}
		}
		if got := len(m.asides()); got != 1 || exists(m.asideFile()) {
			t.Errorf("cut %d: %d copies", cut, got)
		}
	}
}

// api is an apiserver with a supervisor, as far as a test wants it.
type api struct {
	*httptest.Server
	mux *http.ServeMux
}

// newAPI serves at the address in the manager's admin.kubeconfig.
func newAPI(t *testing.T, m *Manager) *api {
	t.Helper()
	a := &api{mux: http.NewServeMux()}
	a.Server = httptest.NewTLSServer(a.mux)
	t.Cleanup(a.Close)
	m.cfg.API = netip.MustParseAddrPort(a.Listener.Addr().String())
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
	for f, b := range map[string][]byte{"server/tls/server-ca.crt": ca, "server/cred/admin.kubeconfig": []byte(`
apiVersion: v1
clusters:
- cluster: {server: "https://127.0.0.1:6444", certificate-authority: ` + m.cfg.Paths.Server() + `/tls/server-ca.crt}
  name: local
contexts: [{context: {cluster: local, user: user}, name: Default}]
current-context: Default
kind: Config
users: [{name: user, user: {}}]
`)} {
		if err := launch.WriteBytes(filepath.Join(m.cfg.Paths.Data, f), b); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func (a *api) say(pattern string, code int, body string) {
	a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	})
}

const threeMembers = `{"members":[
 {"ID":17602299280331214219,"name":"n-aaaaaaaaaaaaaaaaaaaaaaaa-1f2e3d4c","peerURLs":["https://100.96.0.1:2380"],"clientURLs":["https://100.96.0.1:2379"]},
 {"ID":2,"name":"n-bbbbbbbbbbbbbbbbbbbbbbbb-00000000","peerURLs":["https://100.96.0.2:2380"],"clientURLs":[],"isLearner":true},
 {"ID":3,"name":"","peerURLs":["https://100.96.0.3:2380"],"isLearner":true}]}`

const threeNodes = `{"kind":"NodeList","items":[
 {"metadata":{"name":"n-cccccccccccccccccccccccc"},"status":{"conditions":[{"type":"Ready","status":"Unknown"}],"addresses":[{"type":"InternalIP","address":"100.96.0.3"}]}},
 {"metadata":{"name":"n-aaaaaaaaaaaaaaaaaaaaaaaa"},"status":{"conditions":[{"type":"MemoryPressure","status":"True"},{"type":"Ready","status":"True"}]}},
 {"metadata":{"name":"n-bbbbbbbbbbbbbbbbbbbbbbbb"},"status":{"conditions":[{"type":"Ready","status":"False"}]}}]}`

// running pretends that a launcher and a k3s run: this process is both.
func (m *Manager) pretend(t *testing.T, role launch.Role, state launch.State, started time.Duration) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var p launch.Process
	p.PID, p.Boot = os.Getpid(), m.boot
	if _, err := fmt.Sscan(f[19], &p.Start); err != nil {
		t.Fatal(err)
	}
	for path, v := range map[string]any{
		m.cfg.Paths.StatusFile():  launch.Status{Launcher: p, State: state, Role: string(role), K3s: &p, Started: started},
		m.cfg.Paths.ProcessFile(): p,
		m.cfg.Paths.GoFile():      launch.Go{Boot: m.boot},
		m.cfg.Paths.RoleFile():    launch.RoleNote{Role: role},
	} {
		if err := launch.WriteFile(path, v); err != nil {
			t.Fatal(err)
		}
	}
	if state == launch.Pausing {
		if err := os.Remove(m.cfg.Paths.ProcessFile()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestObserveServer(t *testing.T) {
	m, _ := newManager(t)
	now := time.Hour
	m.cfg.Boottime = func() time.Duration { return now }
	m.disk.busy = true // no measurement beside it
	infoCode, apiCode := 200, 404
	a := newAPI(t, m)
	a.mux.HandleFunc("GET /db/info", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(infoCode)
		if infoCode != 200 {
			_, _ = io.WriteString(w, `{"kind":"Status","status":"Failure","message":"failed to get etcd MemberList: context deadline exceeded","code":500}`)
			return
		}
		_, _ = io.WriteString(w, threeMembers)
	})
	a.mux.HandleFunc("GET /api/v1/namespaces/kube-system/configmaps/muster-site", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(apiCode)
		if apiCode == 200 {
			text, err := encodeLedger(clusterbootstrap.Ledger{Record: clusterbootstrap.Record{UID: "u", Epoch: 1, Version: 1, Founder: idA, Servers: []fleet.NodeID{idA}}})
			if err != nil {
				t.Error(err)
			}
			_ = json.NewEncoder(w).Encode(configMap{Metadata: configMeta{Name: ledgerName, ResourceVersion: "77"}, Data: map[string]string{ledgerKey: text}})
		}
	})
	a.say("GET /api/v1/nodes", 200, threeNodes)

	if k, _ := m.Observe(t.Context()); k.Process != clusterbootstrap.ProcessNone || k.API || k.Members != nil {
		t.Errorf("nothing runs: %+v", k)
	}
	m.pretend(t, launch.Server, launch.Running, now-10*time.Second)
	k, _ := m.Observe(t.Context())
	if k.Process != clusterbootstrap.ProcessServer || k.Running != 10*time.Second || !k.API || k.NoInfo != 0 || k.Ledger != nil || k.Virgin || k.Stopping {
		t.Errorf("%+v", k)
	}
	wantMembers := []clusterbootstrap.Member{{Node: idA}, {Node: idB, Learner: true}, {Node: idC, Learner: true}} // the last by its address
	if !slices.Equal(k.Members, wantMembers) {
		t.Errorf("members %v", k.Members)
	}
	if !slices.Equal(k.Nodes, []clusterbootstrap.NodeObject{{Node: idA, Ready: true}, {Node: idB}, {Node: idC}}) {
		t.Errorf("nodes %v", k.Nodes)
	}
	now, apiCode = now+30*time.Second, 200
	if k, _ = m.Observe(t.Context()); k.Ledger == nil || k.Ledger.Version != 77 || k.LedgerFor != 0 || k.Nodes[0].For != 30*time.Second || k.Members[1].For != 30*time.Second {
		t.Errorf("%+v", k)
	}
	now += 5 * time.Second
	if k, _ = m.Observe(t.Context()); k.LedgerFor != 5*time.Second {
		t.Errorf("%+v", k)
	}
	// Quorum lost: the time counts from the last answer, and goes on while
	// k3s is started again and again.
	infoCode, apiCode = 500, 500
	now += 20 * time.Second
	if k, _ = m.Observe(t.Context()); k.API || k.NoInfo != 20*time.Second || k.Members != nil || k.Ledger != nil {
		t.Errorf("%+v", k)
	}
	m.pretend(t, launch.Server, launch.Pausing, now)
	now += 5 * time.Second
	if k, _ = m.Observe(t.Context()); k.Process != clusterbootstrap.ProcessServer || k.NoInfo != 25*time.Second || k.Running != 70*time.Second {
		t.Errorf("%+v", k)
	}
	if err := os.Remove(m.cfg.Paths.GoFile()); err != nil {
		t.Fatal(err)
	}
	if k, _ = m.Observe(t.Context()); !k.Stopping {
		t.Errorf("%+v", k)
	}
}

func TestLedgerCompareAndSet(t *testing.T) {
	m, _ := newManager(t)
	a := newAPI(t, m)
	stored, version := configMap{}, 0
	a.mux.HandleFunc("POST "+ledgerPath, func(w http.ResponseWriter, r *http.Request) {
		if version != 0 {
			w.WriteHeader(409)
			return
		}
		_ = json.NewDecoder(r.Body).Decode(&stored)
		version = 5
		stored.Metadata.ResourceVersion = "5"
		_ = json.NewEncoder(w).Encode(stored)
	})
	a.mux.HandleFunc("PUT "+ledgerPath+"/"+ledgerName, func(w http.ResponseWriter, r *http.Request) {
		var in configMap
		_ = json.NewDecoder(r.Body).Decode(&in)
		if in.Metadata.ResourceVersion != stored.Metadata.ResourceVersion {
			w.WriteHeader(409)
			return
		}
		version++
		in.Metadata.ResourceVersion = fmt.Sprint(version)
		stored = in
		_ = json.NewEncoder(w).Encode(in)
	})
	a.mux.HandleFunc("GET "+ledgerPath+"/"+ledgerName, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "" {
			t.Errorf("not linearizable: %s", r.URL)
		}
		_ = json.NewEncoder(w).Encode(stored)
	})
	l := clusterbootstrap.Ledger{Record: clusterbootstrap.Record{UID: "u-1", Epoch: 1, Version: 1, Founder: idA, Servers: []fleet.NodeID{idA}},
		Plan: &clusterbootstrap.PlanDoc{ID: "u-1-1", N: 1, Epoch: 1, Leader: idA, Candidates: []fleet.NodeID{idB, idC}, Phase: clusterbootstrap.PlanSwitch,
			Replace: true, Serial: true, Go: 1, Reopened: true, Failures: 2, Why: "so"}}
	v, err := m.WriteLedger(t.Context(), l)
	if err != nil || v != 5 {
		t.Fatal(v, err)
	}
	if _, err := m.WriteLedger(t.Context(), l); !errors.Is(err, ErrConflict) {
		t.Errorf("created twice: %v", err)
	}
	l.Version = 5
	if v, err = m.WriteLedger(t.Context(), l); err != nil || v != 6 {
		t.Fatal(v, err)
	}
	if _, err := m.WriteLedger(t.Context(), l); !errors.Is(err, ErrConflict) {
		t.Errorf("written over: %v", err)
	}
	got, err := m.ReadLedger(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.Version = 6
	if fmt.Sprintf("%+v %+v", got.Record, *got.Plan) != fmt.Sprintf("%+v %+v", l.Record, *l.Plan) || got.Version != 6 {
		t.Errorf("%+v %+v", got, got.Plan)
	}
	bad := l
	bad.Record.UID = "not a uid!"
	if _, err := m.WriteLedger(t.Context(), bad); err == nil {
		t.Error("a ledger that cannot be read back was written")
	}
}

func TestVirgin(t *testing.T) {
	objects := map[string]string{}
	m, _ := newManager(t)
	a := newAPI(t, m)
	a.mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		o, ok := objects[r.URL.Path]
		if o == "500" {
			w.WriteHeader(500)
			return
		}
		if !ok {
			o = ""
		}
		fmt.Fprintf(w, `{"kind":"PartialObjectMetadataList","items":[%s]}`, o)
	})
	meta := func(ns, name, more string) string {
		return fmt.Sprintf(`{"metadata":{"namespace":%q,"name":%q%s}}`, ns, name, more)
	}
	fresh := map[string]string{
		"/api/v1/namespaces":                                      meta("", "default", "") + "," + meta("", "kube-system", "") + "," + meta("", "kube-public", ""),
		"/api/v1/services":                                        meta("default", "kubernetes", "") + "," + meta("kube-system", "kube-dns", ""),
		"/api/v1/namespaces/default/configmaps":                   meta("default", "kube-root-ca.crt", ""),
		"/apis/helm.cattle.io/v1/helmcharts":                      meta("kube-system", "traefik", ""),
		"/apis/apiextensions.k8s.io/v1/customresourcedefinitions": meta("", "addons.k3s.cattle.io", ""),
		"/apis/apps/v1/deployments": meta("kube-system", "coredns", `,"annotations":{"objectset.rio.cattle.io/owner-gvk":"k3s.cattle.io/v1, Kind=Addon","objectset.rio.cattle.io/owner-name":"coredns"}`) + "," +
			meta("kube-system", "traefik", `,"annotations":{"meta.helm.sh/release-name":"traefik","meta.helm.sh/release-namespace":"kube-system"}`),
		"/api/v1/pods": meta("kube-system", "coredns-1", `,"ownerReferences":[{"kind":"ReplicaSet","name":"coredns","controller":true}]`),
	}
	maps.Copy(objects, fresh)
	if ok, err := m.Virgin(t.Context()); !ok || err != nil {
		t.Fatalf("a new cluster: %v %v", ok, err)
	}
	for path, o := range map[string]string{
		"/api/v1/persistentvolumeclaims":                          meta("default", "data", ""),
		"/api/v1/persistentvolumes":                               meta("", "pv1", ""),
		"/api/v1/namespaces":                                      meta("", "shop", ""),
		"/apis/apps/v1/deployments":                               meta("default", "till", ""),
		"/apis/apps/v1/daemonsets":                                meta("kube-system", "agent", `,"annotations":{"objectset.rio.cattle.io/owner-gvk":"k3s.cattle.io/v1, Kind=Addon","objectset.rio.cattle.io/owner-name":"mine"}`),
		"/api/v1/pods":                                            meta("default", "bare", `,"ownerReferences":[{"kind":"Node","name":"x"}]`),
		"/api/v1/namespaces/default/configmaps":                   meta("default", "settings", ""),
		"/api/v1/namespaces/default/secrets":                      meta("default", "password", ""),
		"/apis/helm.cattle.io/v1/helmcharts":                      meta("kube-system", "mychart", ""),
		"/apis/k3s.cattle.io/v1/addons":                           meta("kube-system", "mine", ""),
		"/apis/batch/v1/cronjobs":                                 meta("default", "nightly", ""),
		"/apis/networking.k8s.io/v1/ingresses":                    meta("default", "web", ""),
		"/apis/apiextensions.k8s.io/v1/customresourcedefinitions": meta("", "tills.example.com", ""),
	} {
		clear(objects)
		maps.Copy(objects, fresh)
		objects[path] = o
		if ok, err := m.Virgin(t.Context()); ok || err != nil {
			t.Errorf("%s %s: virgin=%v %v", path, o, ok, err)
		}
	}
	clear(objects)
	maps.Copy(objects, fresh)
	objects["/apis/batch/v1/jobs"] = "500"
	if ok, err := m.Virgin(t.Context()); ok || err == nil {
		t.Errorf("what cannot be looked at counts as nothing: %v %v", ok, err)
	}
}

func TestFit(t *testing.T) {
	m, _ := newManager(t)
	m.version = "v1.36.3+k3s1"
	b := fleet.DefaultBirth()
	good := Material{As: clusterbootstrap.RoleServer, Version: m.version, Critical: CriticalDigest(b)}
	if err := m.Fit(t.Context(), good, b); err != nil && !strings.Contains(err.Error(), "disk") {
		t.Error(err) // the disk of a test machine may be slow; the rest must hold
	}
	for name, bad := range map[string]func(*Material){
		"version":  func(x *Material) { x.Version = "v1.36.4+k3s1" },
		"critical": func(x *Material) { x.Critical = strings.Repeat("0", 64) },
		"role":     func(x *Material) { x.As = clusterbootstrap.RoleWorker },
	} {
		x := good
		bad(&x)
		if err := m.Fit(t.Context(), x, b); !errors.Is(err, ErrUnfit) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPercentile(t *testing.T) {
	var d []time.Duration
	for i := range 200 {
		d = append(d, time.Duration(200-i))
	}
	if got := percentile99(d); got != 198 {
		t.Errorf("p99 of 1..200 is %d", got)
	}
	if got := percentile99([]time.Duration{7}); got != 7 {
		t.Errorf("p99 of one is %d", got)
	}
}

func TestDamage(t *testing.T) {
	const mark = launch.StartMark + " k3s server\n"
	bad := `{"level":"panic","msg":"walpb: crc mismatch","x":1}` + "\n"
	for name, c := range map[string]struct {
		log  string
		want bool
	}{
		"none":                    {mark + "level=info msg=\"wal: crc mismatch is what we look for\"\n", false},
		"in this run":             {mark + "ok\n" + mark + bad, true},
		"in the run before":       {mark + bad + mark + "starting\n", true},
		"two runs ago":            {mark + bad + mark + "ok\n" + mark + "ok\n", false},
		"slow and without quorum": {mark + "level=fatal msg=\"context deadline exceeded\"\n", false},
		"never started by us":     {bad, true},
	} {
		if got := findDamage([]byte(c.log)); (got != "") != c.want || len(got) > maxDamage {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestParseVersion(t *testing.T) {
	if v, err := parseVersion("k3s version v1.36.3+k3s1 (66a14f0e)\ngo version go1.26.0\n"); err != nil || v != "v1.36.3+k3s1" {
		t.Error(v, err)
	}
	for _, s := range []string{"", "k3s", "k3s version", "rke2 version v1.36.3", "k3s version 1.36"} {
		if v, err := parseVersion(s); err == nil {
			t.Errorf("%q: %s", s, v)
		}
	}
}

// What a power cut in k3s's first half minute leaves: files with nothing in
// them.
func TestTornFiles(t *testing.T) {
	m, _ := newManager(t)
	m.disk.busy = true // no measurement beside it
	cert := m.cfg.Paths.AgentCert()
	if err := os.MkdirAll(filepath.Dir(cert), 0o700); err != nil {
		t.Fatal(err)
	}
	key, kept := filepath.Join(filepath.Dir(cert), "client-kubelet.key"), filepath.Join(filepath.Dir(cert), "kubelet.kubeconfig")
	for path, content := range map[string]string{cert: "", key: "", kept: "apiVersion: v1"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, signs := m.Observe(t.Context()); signs.AgentCert {
		t.Error("a certificate with nothing in it counts")
	}
	if err := dropTorn(filepath.Dir(cert)); err != nil {
		t.Fatal(err)
	}
	if exists(cert) || exists(key) || !exists(kept) {
		t.Error("the empty files are to go, and no others")
	}
	if err := dropTorn(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("nothing there: %v", err)
	}
}

func TestFlush(t *testing.T) {
	m, _ := newManager(t)
	data := m.cfg.Paths.Data
	m.seen.started = time.Minute
	if m.flush() {
		t.Error("what cannot be flushed counts as flushed")
	}
	if err := os.MkdirAll(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if !m.flush() || m.seen.flushed != time.Minute {
		t.Error("not flushed")
	}
	if err := os.Remove(data); err != nil {
		t.Fatal(err)
	}
	if !m.flush() {
		t.Error("one k3s is flushed once")
	}
	if m.seen.started = 2 * time.Minute; m.flush() {
		t.Error("the next k3s is not flushed by the one before")
	}
}
