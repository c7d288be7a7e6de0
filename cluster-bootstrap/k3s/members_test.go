package k3s

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// cluster is an API whose k3s removes members as k3s' own controller does.
type fakeCluster struct {
	members []dbMember
	asked   []string
	marked  bool // Node b has the marks of a server
}

func (c *fakeCluster) drop(node string) {
	c.members = slices.DeleteFunc(c.members, func(m dbMember) bool { return strings.HasPrefix(m.Name, node) })
}

func serve(t *testing.T, m *Manager, members ...dbMember) *fakeCluster {
	t.Helper()
	c := &fakeCluster{members: members, marked: true}
	a := newAPI(t, m)
	a.mux.HandleFunc("GET /db/info", func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"members": c.members})
	})
	a.say("GET /api/v1/nodes", 200, threeNodes)
	a.mux.HandleFunc("GET /api/v1/nodes/"+string(idB), func(w http.ResponseWriter, r *http.Request) {
		if c.marked {
			fmt.Fprint(w, `{"metadata":{"labels":{"node-role.kubernetes.io/etcd":"true"},"annotations":{"etcd.k3s.cattle.io/node-name":"x","etcd.k3s.cattle.io/node-address":"y"}}}`)
			return
		}
		fmt.Fprint(w, `{"metadata":{}}`)
	})
	a.mux.HandleFunc("/api/v1/nodes/", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		c.asked = append(c.asked, fmt.Sprintf("%s %s %s", r.Method, strings.TrimPrefix(r.URL.Path, "/api/v1/nodes/"), b))
		if r.Method == http.MethodDelete || strings.Contains(string(b), `"etcd.k3s.cattle.io/remove":"true"`) {
			c.drop(string(idB))
		}
		fmt.Fprint(w, `{}`)
	})
	return c
}

func voter(id uint64, n fleet.NodeID) dbMember {
	return dbMember{ID: id, Name: string(n) + "-00000000"}
}

func TestRemoveServerKeepsTheNode(t *testing.T) {
	m, _ := newManager(t)
	c := serve(t, m, voter(1, idA), voter(2, idB), voter(3, idC))
	if err := m.RemoveServer(t.Context(), idB, true); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`PATCH n-bbbbbbbbbbbbbbbbbbbbbbbb {"metadata":{"annotations":{"etcd.k3s.cattle.io/remove":"true"}}}`,
		`PATCH n-bbbbbbbbbbbbbbbbbbbbbbbb {"metadata":{"annotations":{"etcd.k3s.cattle.io/node-address":null,"etcd.k3s.cattle.io/node-name":null,"etcd.k3s.cattle.io/remove":null,"etcd.k3s.cattle.io/removed-node-name":null},"labels":{"node-role.kubernetes.io/control-plane":null,"node-role.kubernetes.io/etcd":null,"node-role.kubernetes.io/master":null}}}`,
		`PATCH n-bbbbbbbbbbbbbbbbbbbbbbbb/status {"status":{"conditions":[{"$patch":"delete","type":"EtcdIsVoter"}]}}`,
	}
	if !slices.Equal(c.asked, want) || len(c.members) != 2 {
		t.Errorf("%v\n%s", c.members, strings.Join(c.asked, "\n"))
	}
	c.asked = nil
	if err := m.RemoveServer(t.Context(), idB, true); err != nil || len(c.asked) != 2 {
		t.Errorf("once more: %v %v", err, c.asked)
	}
}

func TestRemoveServerDeletesTheNode(t *testing.T) {
	m, _ := newManager(t)
	c := serve(t, m, voter(1, idA), voter(2, idB))
	if err := m.RemoveServer(t.Context(), idB, false); err != nil {
		t.Fatal(err)
	}
	if want := "DELETE n-bbbbbbbbbbbbbbbbbbbbbbbb "; len(c.asked) == 0 || c.asked[0] != want || len(c.members) != 1 {
		t.Errorf("%v %q", c.members, c.asked)
	}
}

func TestRemoveServerRefuses(t *testing.T) {
	m, _ := newManager(t)
	c := serve(t, m, voter(2, idB), dbMember{ID: 3, Name: string(idC) + "-00000000", Learner: true})
	for name, err := range map[string]error{
		"itself":         m.RemoveServer(t.Context(), idA, true),
		"the only voter": m.RemoveServer(t.Context(), idB, false),
		"a strange name": m.RemoveServer(t.Context(), "../configmaps/x", false),
		"no name":        m.RemoveServer(t.Context(), "", false),
	} {
		if err == nil {
			t.Errorf("%s was removed", name)
		}
	}
	if len(c.asked) != 0 || len(c.members) != 2 {
		t.Errorf("something was done: %v", c.asked)
	}
	// One that never came up as a server has no marks: etcd is told itself,
	// and the missing certificates of this node say so.
	c.members, c.marked = []dbMember{voter(1, idA), voter(2, idB)}, false
	if err := m.RemoveServer(t.Context(), idB, true); err == nil || !strings.Contains(err.Error(), "reach etcd") || len(c.asked) != 0 {
		t.Errorf("%v %v", err, c.asked)
	}
}

func TestWorkerMaterial(t *testing.T) {
	m, _ := newManager(t)
	m.version = "v1.36.3+k3s1"
	a := newAPI(t, m)
	var secret struct {
		Type       string
		Metadata   struct{ Name string }
		StringData map[string]string
	}
	a.mux.HandleFunc("POST /api/v1/namespaces/kube-system/secrets", func(w http.ResponseWriter, r *http.Request) {
		if err := json.NewDecoder(r.Body).Decode(&secret); err != nil {
			t.Error(err)
		}
		fmt.Fprint(w, `{}`)
	})
	addr, birth := netip.MustParseAddr("100.96.0.1"), fleet.DefaultBirth()
	if _, err := m.WorkerMaterial(t.Context(), 10*time.Minute, addr, birth); err == nil {
		t.Error("material of a server without token")
	}
	hash := strings.Repeat("cd", 32)
	for f, s := range map[string]string{filepath.Join(m.cfg.Paths.Server(), "token"): "K10" + hash + "::server:0123456789abcdef\n", m.tokenFile(tokenAgent): "fedcba9876543210"} {
		if err := launch.WriteBytes(f, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	x, err := m.WorkerMaterial(t.Context(), 10*time.Minute, addr, birth)
	if err != nil {
		t.Fatal(err)
	}
	d := secret.StringData
	if err := x.Validate(); err != nil || x.Token != "K10"+hash+"::"+d["token-id"]+"."+d["token-secret"] || x.AgentToken != "" || x.Server != "https://100.96.0.1:6443" {
		t.Errorf("%+v %v", x, err)
	}
	if end, err := time.Parse(time.RFC3339, d["expiration"]); err != nil || time.Until(end) > 10*time.Minute {
		t.Errorf("expiration %q", d["expiration"])
	}
	if secret.Type != "bootstrap.kubernetes.io/token" || secret.Metadata.Name != "bootstrap-token-"+d["token-id"] ||
		d["usage-bootstrap-authentication"] != "true" || d["auth-extra-groups"] != bootstrapGroup {
		t.Errorf("%+v", secret)
	}
	y, err := m.WorkerMaterial(t.Context(), 10*time.Minute, addr, birth)
	if err != nil || y.Token == x.Token {
		t.Errorf("the same token twice, or: %v", err)
	}
	if _, err := m.WorkerMaterial(t.Context(), 0, addr, birth); err == nil {
		t.Error("a token for ever")
	}
	s, err := m.ServerMaterial(t.Context(), addr, birth)
	if err != nil || s.Validate() != nil || s.As != clusterbootstrap.RoleServer || s.Token != "K10"+hash+"::server:0123456789abcdef" || s.AgentToken != "fedcba9876543210" {
		t.Errorf("%+v %v", s, err)
	}
}

func TestSettingsOf(t *testing.T) {
	docs := clusterbootstrap.Documents{
		Charter: &fleet.Charter{Birth: fleet.DefaultBirth()},
		Admissions: []fleet.Admission{
			{Node: idA, Incarnation: 1, Address: "100.96.0.1", MayServe: true, Labels: map[string]string{"gpu": "1"}},
			{Node: idB, Incarnation: 1, Address: "100.96.0.2", MayServe: true},
			{Node: idC, Incarnation: 1, Address: "100.96.0.3"},
		},
	}
	lan := netip.MustParseAddr("192.168.1.5")
	s, err := SettingsOf(docs, idA, []fleet.NodeID{idA, idB}, lan)
	if err != nil || s.Address.String() != "100.96.0.1" || s.Interface != InSiteLink || s.Join != "https://100.96.0.2:6443" || len(s.Servers) != 2 || s.Labels["gpu"] != "1" {
		t.Errorf("%+v %v", s, err)
	}
	// vxlan and host-gw cannot go by a link that leads nowhere.
	docs.Charter.Birth.FlannelBackend = "vxlan"
	if s, err = SettingsOf(docs, idC, nil, lan); err != nil || s.Interface != "" || s.Join != "" {
		t.Errorf("%+v %v", s, err)
	}
	docs.Removals = []fleet.Removal{{Node: idB, Incarnation: 1}}
	if s, err = SettingsOf(docs, idA, []fleet.NodeID{idB}, lan); err != nil || s.Join != "" || len(s.Servers) != 1 {
		t.Errorf("a removed server counts: %+v %v", s, err)
	}
	if _, err := SettingsOf(docs, idB, nil, lan); err == nil {
		t.Error("settings of a removed node")
	}
	docs.Admissions[0].Address = ""
	if s, err = SettingsOf(docs, idA, nil, lan); err != nil || s.Address != lan || s.Interface != "" {
		t.Errorf("without in-site address: %+v %v", s, err)
	}
}

// TestDeafWorker: a worker that was started with a server that is gone gets
// the one in its new config, once.
func TestDeafWorker(t *testing.T) {
	m, _ := newManager(t)
	now := time.Hour
	m.cfg.Boottime = func() time.Duration { return now }
	m.disk.busy = true
	m.pretend(t, launch.Worker, launch.Running, now)
	k3s := exec.Command("/bin/sleep", "1000")
	if err := k3s.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = k3s.Wait(); close(done) }()
	defer func() { _ = k3s.Process.Kill() }()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", k3s.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	p := launch.Process{PID: k3s.Process.Pid, Boot: m.boot}
	if _, err := fmt.Sscan(strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[19], &p.Start); err != nil {
		t.Fatal(err)
	}
	if err := launch.WriteFile(m.cfg.Paths.ProcessFile(), p); err != nil {
		t.Fatal(err)
	}
	turn := func(after time.Duration) {
		t.Helper()
		now += after
		if k, _ := m.Observe(t.Context()); k.API || k.Process != clusterbootstrap.ProcessAgent {
			t.Fatalf("%+v", k)
		}
		if err := m.Tend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s := settings()
	turn(time.Second)
	turn(2 * deafLimit) // deaf, but no other server is known
	if !p.Alive() {
		t.Fatal("started again for nothing")
	}
	s.Join = "https://100.96.0.9:6443"
	if err := m.Reconfigure(clusterbootstrap.RoleWorker, s); err != nil {
		t.Fatal(err)
	}
	turn(time.Second)
	<-done // told to end
}
