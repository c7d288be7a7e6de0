package scenario

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/host"
	"github.com/muster-edge/muster/lab/host/ether"
)

// testShop is a shop whose nodes exist on paper only.
func testShop(t *testing.T, mode fleet.FoundingMode, nodes int) *shop {
	t.Helper()
	s := &shop{l: lab.ForTest(t.TempDir()), sw: ether.New(ether.Config{}), approved: map[string]bool{}}
	s.opts.founding = mode
	for n := range nodes {
		s.nodes = append(s.nodes, &box{Node: host.Paper([]string{"node1", "node2", "node3", "node4", "node5"}[n]), s: s, n: n + 1})
	}
	s.watch = &watch{s: s, news: make(chan struct{}), wrong: map[string]error{}, roles: map[string][]string{}, demote: map[string]bool{}, sawState: map[string]bool{}}
	return s
}

// see is a view at a second after the beginning, in short form: "node1 server
// leading uid-a" or "node1 server server uid-a blocker".
func see(s *shop, second int, voters int, lines ...string) view {
	v := view{at: time.Unix(1000+int64(second), 0), status: map[string]nodeStatus{}}
	for _, l := range lines {
		f := strings.Fields(l)
		st := nodeStatus{Role: f[1], State: f[2]}
		if len(f) > 3 {
			st.ClusterUID = f[3]
		}
		if len(f) > 4 {
			st.Blocker = f[4]
		}
		v.status[f[0]] = st
	}
	if voters > 0 {
		v.any, v.best = true, truth{From: s.nodes[0], API: true}
		for range voters {
			v.best.Members = append(v.best.Members, member{})
		}
	}
	return v
}

func TestWatch(t *testing.T) {
	for _, c := range []struct {
		name   string
		mode   fleet.FoundingMode
		views  func(*shop) []view
		before func(*watch)
		wrong  string // part of the verdict; "" if all is well
	}{
		{"a site that grows as it should", fleet.FoundCentral, func(s *shop) []view {
			return []view{
				see(s, 0, 0, "node1 none surveying", "node2 none observing"),
				see(s, 1, 1, "node1 server server a", "node2 worker worker a"),
				see(s, 2, 1, "node1 server leading a", "node2 candidate candidate a"),
				see(s, 3, 3, "node1 server server a", "node2 server server a"),
			}
		}, nil, ""},
		{"two clusters under a centre are wrong at once", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a", "node2 server server b")}
		}, nil, "two clusters grow"},
		{"a fenced cluster does not grow", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a", "node2 server fenced b")}
		}, nil, ""},
		{"two clusters that have just met", fleet.FoundFirst, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a", "node2 server server b"), see(s, 74, 1, "node1 server server a", "node2 server server b")}
		}, nil, ""},
		{"two clusters that go on growing", fleet.FoundFirst, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a", "node2 server server b"), see(s, 76, 1, "node1 server server a", "node2 server server b")}
		}, nil, "two clusters grow"},
		{"two clusters that cannot know of each other", fleet.FoundFirst, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a", "node2 server server b"), see(s, 600, 1, "node1 server server a", "node2 server server b")}
		}, func(w *watch) { w.split() }, ""},
		{"two voters for a moment", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 2, "node1 server server a"), see(s, 50, 2, "node1 server server a"), see(s, 59, 3, "node1 server server a")}
		}, nil, ""},
		{"two voters at rest", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 2, "node1 server server a"), see(s, 61, 2, "node1 server server a")}
		}, nil, "2 voters"},
		{"two voters and a blocker", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 2, "node1 server server a server-down"), see(s, 600, 2, "node1 server server a server-down")}
		}, nil, ""},
		{"a server that becomes a worker by itself", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a"), see(s, 1, 1, "node1 worker worker a")}
		}, nil, "roles of node1"},
		{"a server that was struck may", fleet.FoundCentral, func(s *shop) []view {
			return []view{see(s, 0, 1, "node1 server server a"), see(s, 1, 1, "node1 worker worker a")}
		}, func(w *watch) { w.mayDemote(w.s.nodes...) }, ""},
		{"a role that flips and flips", fleet.FoundCentral, func(s *shop) (out []view) {
			for i := range 10 {
				out = append(out, see(s, i, 1, "node1 "+[]string{"worker worker a", "candidate candidate a"}[i%2]))
			}
			return out
		}, nil, "changed all the time"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testShop(t, c.mode, 2)
			if c.before != nil {
				c.before(s.watch)
			}
			for _, v := range c.views(s) {
				s.watch.judge(v)
			}
			err := s.watch.verdict()
			if c.wrong == "" && err != nil || c.wrong != "" && (err == nil || !strings.Contains(err.Error(), c.wrong)) {
				t.Errorf("verdict %v, want %q", err, c.wrong)
			}
		})
	}
	if err := testShop(t, fleet.FoundCentral, 1).watch.verdict(); err == nil {
		t.Error("a watch that never looked is content")
	}
}

func TestHealthy(t *testing.T) {
	s := testShop(t, fleet.FoundCentral, 3)
	good := func() view {
		v := see(s, 0, 3, "node1 server server a", "node2 server server a", "node3 server server a")
		for range 3 {
			v.best.Nodes = append(v.best.Nodes, kubeNode{Ready: true})
		}
		return v
	}
	fits := healthy(s, 3, 3)
	if !fits(good()) {
		t.Fatal("a healthy site is not")
	}
	for name, spoil := range map[string]func(*view){
		"no API":            func(v *view) { v.best.API = false },
		"a learner":         func(v *view) { v.best.Members[2].Learner = true },
		"a member too many": func(v *view) { v.best.Members = append(v.best.Members, member{Learner: true}) },
		"a node not ready":  func(v *view) { v.best.Nodes[1].Ready = false },
		"a candidate":       func(v *view) { v.status["node3"] = nodeStatus{Role: roleCandidate, ClusterUID: "a"} },
		"two clusters":      func(v *view) { v.status["node3"] = nodeStatus{Role: roleServer, ClusterUID: "b"} },
		"a silent node":     func(v *view) { delete(v.status, "node2") },
		"nobody to ask":     func(v *view) { v.any = false },
	} {
		v := good()
		spoil(&v)
		if fits(v) {
			t.Errorf("%s: healthy", name)
		}
	}
}

func TestUID(t *testing.T) {
	s := testShop(t, fleet.FoundCentral, 2)
	if uid, err := s.uid(see(s, 0, 1, "node1 server server a", "node2 none joining")); uid != "a" || err != nil {
		t.Errorf("%q, %v", uid, err)
	}
	if _, err := s.uid(see(s, 0, 1, "node1 server server a", "node2 worker worker b")); err == nil {
		t.Error("two UIDs agree")
	}
	if _, err := s.uid(see(s, 0, 1, "node1 none joining")); err == nil {
		t.Error("no UID is one")
	}
}

func TestUntil(t *testing.T) {
	s := testShop(t, fleet.FoundCentral, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.watch.until(ctx, "x", time.Hour, func(view) bool { return true }); err == nil {
		t.Error("fits before there was a view")
	}
	s.watch.judge(see(s, 0, 1, "node1 server server a"))
	if _, err := s.watch.until(t.Context(), "x", time.Hour, func(v view) bool { return v.best.API }); err != nil {
		t.Error(err)
	}
	s.watch.judge(see(s, 1, 1, "node1 worker worker a"))
	if _, err := s.watch.until(t.Context(), "x", time.Hour, func(view) bool { return true }); err == nil {
		t.Error("it goes on although something was that must never be")
	}
}

// A secret that is where it must not be is found; one that is not, is not.
func TestClusterSecretsAreFound(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"var/lib/rancher/k3s/server/token":               "K10abc::server:0123456789abcdef0123456789abcdef\n",
		"var/lib/rancher/k3s/server/tls/server-ca.key":   "-----BEGIN KEY-----\nserverserverserverserver\n-----END KEY-----\n",
		"var/lib/rancher/k3s/server/tls/client-ca.key":   "-----BEGIN KEY-----\nclientclientclientclient\n-----END KEY-----\n",
		"var/lib/rancher/k3s/server/tls/service.key":     "-----BEGIN KEY-----\nserviceserviceservice\n-----END KEY-----\n",
		"var/lib/rancher/k3s/server/tls/kubelet.key":     "-----BEGIN KEY-----\nnotacakeynotacakey\n-----END KEY-----\n",
		"var/lib/muster/journal/a":                       "nothing",
		"etc/rancher/k3s/config.yaml":                    "token-file: /somewhere\n",
		"run/muster/k3s/launcher.json":                   "{}",
		"var/lib/rancher/k3s/server/db/etcd/member/wal1": "x",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	secrets, err := secretsBelow(dir, "node1")
	if err != nil || len(secrets) != 4 {
		t.Fatalf("%d secrets, %v", len(secrets), err)
	}
	if err := secretsIn(dir, "node1", secrets); err == nil {
		t.Error("a server's own secrets are not found")
	}
	clean := t.TempDir()
	for _, d := range privatePlaces {
		if err := os.MkdirAll(clean+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := secretsIn(clean, "node2", secrets); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(clean+"/run/leak", []byte("the token is K10abc::server:0123456789abcdef0123456789abcdef, psst"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := secretsIn(clean, "node2", secrets); err == nil || !strings.Contains(err.Error(), "/run/leak") {
		t.Errorf("the leak is not found: %v", err)
	}
	if err := os.WriteFile(dir+"/var/lib/rancher/k3s/server/token", []byte("K10abc::server:short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := secretsBelow(dir, "node1"); err == nil {
		t.Error("a secret of five letters is one")
	}
}

func TestChosenStep(t *testing.T) {
	for _, c := range []struct {
		step, who, wantName, wantWho string
		bad                          bool
	}{
		{"", "", "switch", lab.WhoCandidate, false},
		{"opened", "", "opened", lab.WhoFounder, false},
		{"opened", lab.WhoBoth, "opened", lab.WhoBoth, false},
		{"opened", lab.WhoCandidate, "", "", true},
		{"joined", lab.WhoFounder, "", "", true},
		{"member.after.lead-plan,2", "", "member.after.lead-plan,2", lab.WhoFounder, false},
		{"nonsense", "", "", "", true},
	} {
		st, who, err := chosenStep(lab.Spec{Step: c.step, Who: c.who})
		if (err != nil) != c.bad || !c.bad && (st.name != c.wantName || who != c.wantWho) {
			t.Errorf("%q of %q: %q of %q, %v", c.step, c.who, st.name, who, err)
		}
	}
}

// Names of steps and scenarios are an interface.
func TestSiteScenarios(t *testing.T) {
	var got []string
	for _, s := range siteScenarios() {
		got = append(got, s.Name)
		if !s.Host || s.Nodes < 1 || s.Timeout <= 0 || s.Prepare == nil || s.Run == nil || s.Summary == "" {
			t.Errorf("%s is not whole: %+v", s.Name, s)
		}
	}
	for _, want := range []string{"ha", "race", "late", "partition", "powercut", "replace", "coldstart", "readdress", "rogue", "nocentre", "meet-virgin", "meet-used", "lastserver"} {
		if !slices.Contains(got, want) {
			t.Errorf("there is no scenario %s", want)
		}
	}
}

func TestHeardLines(t *testing.T) {
	s := testShop(t, fleet.FoundCentral, 1)
	var heard []string
	s.onLine(func(node, line string) { heard = append(heard, node+": "+line) })
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	b, err := json.Marshal(map[string]any{"time": at, "level": "INFO", "msg": "state", "reason": "because"})
	if err != nil {
		t.Fatal(err)
	}
	s.heard("node1", "agent", string(b))
	s.heard("node1", "agent", "panic: no JSON")
	s.heard("node1", "agent", `{"broken`)
	if len(heard) != 3 {
		t.Errorf("heard %q", heard)
	}
	f, err := os.Open(s.l.Path("events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"event":"agent-info","text":"state {\"reason\":\"because\"}"`, `panic: no JSON`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the time line lacks %s:\n%s", want, text)
		}
	}
}
