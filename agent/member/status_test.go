package member

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/agent/data"
	"github.com/muster-edge/muster/agent/peer"
	"github.com/muster-edge/muster/agent/slots"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/fleettest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestStatusFields: these names are relied on by scripts; they only grow.
func TestStatusFields(t *testing.T) {
	b, err := Report{Peers: []Seen{}}.JSON()
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"node", "site", "cluster_uid", "epoch", "state", "role", "reason", "blocker", "since", "peers",
		"slot", "digest", "boot", "charter", "last_central"} {
		if _, ok := m[f]; !ok {
			t.Errorf("field %q is missing", f)
		}
	}
	if _, ok := m["peers"].([]any); !ok {
		t.Error("peers is no list when there are none")
	}
}

// TestStatusReference: the reference page names every field, and no other.
func TestStatusReference(t *testing.T) {
	b, err := os.ReadFile("../../docs/reference/muster-node.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_.\\[\\]]+)` \\|").FindAllStringSubmatch(string(b), -1) {
		named[m[1]] = true
	}
	have := map[string]bool{}
	for _, f := range jsonFields("", Report{}) {
		have[f] = true
		if !named[f] {
			t.Errorf("docs/reference/muster-node.md does not name the field %q", f)
		}
	}
	for f := range named {
		if !have[f] {
			t.Errorf("docs/reference/muster-node.md names %q, which status does not have", f)
		}
	}
}

func jsonFields(prefix string, v any) []string {
	r := full(v)
	r.System = &slots.Now{Image: firmware.Digest{1}, Version: "2", Wanted: "3", Percent: 7, NoReturn: true, Failed: []firmware.FailedImage{{Version: "1"}}}
	r.Data = &data.Report{Made: true, Help: "x"}
	b, _ := json.Marshal(r)
	var m map[string]any
	_ = json.Unmarshal(b, &m)
	var out []string
	for k, x := range m {
		switch x := x.(type) {
		case map[string]any:
			if k == "k3s" || k == "system" || k == "data" {
				for kk := range x {
					out = append(out, prefix+k+"."+kk)
				}
				continue
			}
		case []any:
			if k == "peers" {
				for kk := range x[0].(map[string]any) {
					out = append(out, prefix+"peers[]."+kk)
				}
				continue
			}
		}
		out = append(out, prefix+k)
	}
	slices.Sort(out)
	return out
}

// full returns a report with every field set.
func full(any) Report {
	return Report{
		Node: "n-aaaaaaaaaaaaaaaaaaaaaaaa", Words: "acorn acorn acorn acorn acorn acorn", Tenant: "acme", Site: "shop-7", ClusterUID: "u1", Epoch: 2,
		State: "waiting", Role: "server", Reason: "The cluster has no majority. Servers that I do not hear: apple apple apple apple apple apple.",
		Blocker: "quorum-lost", NeedsPerson: true, Since: "2026-11-21T14:00:00Z", Action: "wait",
		Peers: []Seen{
			{Node: "n-bbbbbbbbbbbbbbbbbbbbbbbb", Words: "apple apple apple apple apple apple", Addr: "192.0.2.11", AgeS: 700, Role: "server",
				State: "server", Blocker: "no-quorum", ClusterUID: "u1", Epoch: 2, API: true, Voters: 3},
			{Node: "n-cccccccccccccccccccccccc", Words: "bagel bagel bagel bagel bagel bagel", Addr: "192.0.2.12", AgeS: 1.5, Fresh: true, Role: "worker", State: "worker"},
		},
		Slot: "a", Digest: strings.Repeat("ab", 32), Boot: "enforced", Charter: "1.4", LastCentral: "2026-11-21T13:00:00Z", Address: "100.96.0.1",
		LAN: "192.0.2.10", Version: "v1", Image: "slot@1", Boots: 3, Run: "r", UptimeS: 7, Mark: "u1",
		K3s:  K3sNow{Process: "server", API: true, Version: "v1.36.3+k3s1", Voters: 1, Learners: 1, Nodes: 3, Ready: 2, Servers: []fleet.NodeID{"n-a"}, Virgin: true, FsyncMS: 2},
		Plan: "u1-2-1 switch", Voters: 1, Learners: 1, LeaseS: 20, Order: "o-1", Enrolled: "Calling the centre.",
		Problems: map[string]string{"lease": "no answer"}, Spooled: 4, Lost: 1,
	}
}

func TestStatusText(t *testing.T) {
	calm := full(nil)
	calm.NeedsPerson, calm.Blocker, calm.Reason, calm.Problems, calm.Enrolled = false, "", "I am a server of the cluster.", nil, ""
	fresh := Report{Node: calm.Node, Words: calm.Words, State: "waiting", Role: "none", Blocker: "centre-unreachable",
		Reason: "The centre decides who starts the cluster, and it does not answer. I keep asking.", Since: calm.Since, Boot: "unknown", Site: "shop-7"}
	hostile := full(nil)
	hostile.Reason, hostile.Site, hostile.Peers[0].Words = "a\x1b[2Jb\u202ec", "x\x07y", "\x1b]0;own\x07"
	for name, r := range map[string]Report{"person": full(nil), "calm": calm, "fresh": fresh, "hostile": hostile} {
		got := r.Text()
		if strings.ContainsAny(got, "\x1b\x07\u202e") {
			t.Errorf("%s: control characters reach the terminal: %q", name, got)
		}
		file := filepath.Join("testdata", "status-"+name+".txt")
		if *update {
			if err := os.MkdirAll("testdata", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s differs (go test ./agent/member -run TestStatusText -update writes it anew):\n%s", file, got)
		}
	}
}

func TestOutcomesOfOrders(t *testing.T) {
	rec := func(uid string, epoch uint64, servers ...fleet.NodeID) *cb.Record {
		return &cb.Record{UID: uid, Epoch: epoch, Servers: servers, Founder: "n-a"}
	}
	reset := fleet.Order{ID: "o", Kind: fleet.OrderReset, Cluster: "u", Epoch: 3}
	dissolve := fleet.Order{ID: "o", Kind: fleet.OrderDissolve, Cluster: "u", Into: "v"}
	found := fleet.Order{ID: "o", Kind: fleet.OrderFound}
	into := cb.Documents{Records: []cb.Record{{UID: "u", Into: "v"}}}
	for _, c := range []struct {
		name string
		o    fleet.Order
		d    cb.Disk
		docs cb.Documents
		want string
	}{
		{"when nothing was done then nothing is told", reset, cb.Disk{Record: rec("u", 2, "n-a")}, cb.Documents{}, ""},
		{"when the reset is on the disk then it runs", reset, cb.Disk{Record: rec("u", 2, "n-a"), Reset: &cb.Reset{To: 3}}, cb.Documents{}, "running"},
		{"when another reset is on the disk then it is not this order", reset, cb.Disk{Record: rec("u", 2, "n-a"), Reset: &cb.Reset{To: 9}}, cb.Documents{}, ""},
		{"when the epoch is raised then it is done", reset, cb.Disk{Record: rec("u", 3, "n-a")}, cb.Documents{}, "done"},
		{"when another cluster has that epoch then it is not done", reset, cb.Disk{Record: rec("w", 3, "n-a")}, cb.Documents{}, ""},
		{"when another node did it then it is not this node's", reset, cb.Disk{Record: rec("u", 3, "n-b")}, cb.Documents{}, ""},
		{"when the cluster says where it goes then dissolving runs", dissolve, cb.Disk{Record: rec("u", 1, "n-a")}, into, "running"},
		{"when the node left then dissolving is done", dissolve, cb.Disk{}, into, "done"},
		{"when nobody said so then dissolving has not begun", dissolve, cb.Disk{Record: rec("u", 1)}, cb.Documents{}, ""},
		{"when there is an intent then founding runs", found, cb.Disk{Intent: &cb.Intent{UID: "x", Mode: fleet.FoundNamed}}, cb.Documents{}, "running"},
		{"when the node founded then it is done", found, cb.Disk{Role: cb.RoleServer, Record: rec("x", 1, "n-a")}, cb.Documents{}, "done"},
		{"when it is an order of another program then it is not ours to tell", fleet.Order{Kind: fleet.OrderInstall}, cb.Disk{}, cb.Documents{}, ""},
	} {
		if got := orderState(c.o, c.d, c.docs, "n-a"); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestHardwareLabels(t *testing.T) {
	got := HardwareLabels(fleet.Hardware{
		Vendor: "Dell Inc.", Product: "OptiPlex 7080 \x1b[2J(rev/2)", CPUs: 8, MemoryBytes: 16<<30 - 100<<20,
		Disks:   []fleet.Disk{{Transport: "sata", Rotational: true}, {Transport: "nvme"}, {Transport: "usb", Removable: true}},
		Devices: []fleet.Device{{Class: "gpu", Vendor: "10de"}, {Class: "gpu", Vendor: "10de"}, {Class: "camera", Vendor: "046d"}},
	})
	for k, want := range map[string]string{"vendor": "Dell-Inc", "product": "OptiPlex-7080-2Jrev2", "cpus": "8", "memory-gib": "16", "disk": "nvme",
		"gpu": "2", "gpu-vendor": "nvidia", "camera": "1", "camera-vendor": "046d"} {
		if got[LabelPrefix+k] != want {
			t.Errorf("%s is %q, want %q", k, got[LabelPrefix+k], want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		h := fleettest.Draw[fleet.Hardware](t)
		if err := fleet.ValidateLabels(HardwareLabels(h)); err != nil {
			t.Fatal(err)
		}
	})
}

// TestTheStatusOfAWholeSite: what people read while a site comes up.
func TestTheStatusOfAWholeSite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := promoted(t, 3)
		defer w.allOff()
		time.Sleep(30 * time.Second)
		for _, x := range w.nodes {
			r := x.m.Report()
			if r.Site != "s" || r.ClusterUID != w.grant.UID || r.Epoch != 1 || r.Role != "server" || r.K3s.Voters != 3 || r.NeedsPerson ||
				len(r.Peers) != 2 || !r.Peers[0].Fresh || len(r.Problems) != 0 {
				t.Errorf("%+v", r)
			}
			b, err := r.JSON()
			if err != nil {
				t.Fatal(err)
			}
			if back, err := ParseReport(b); err != nil || back.Text() != r.Text() {
				t.Errorf("the JSON does not come back: %v", err)
			}
			if c := x.m.ClusterReport(); c.GetRole() != "server" || c.GetVoters() != 3 || c.GetNodesReady() != 3 || c.GetState() != "server" {
				t.Errorf("%+v", c)
			}
			if h := x.m.Health(); h != 0 {
				t.Errorf("health %b", h)
			}
		}
		w.nodes[1].off(true)
		w.nodes[2].off(true)
		w.until(20*time.Minute, "a person is asked", func() bool { return w.nodes[0].m.Report().NeedsPerson })
		if h := w.nodes[0].m.Health(); h&HealthPerson == 0 || h&HealthK3s == 0 {
			t.Errorf("health %b", h)
		}
		if r := w.nodes[0].m.Report(); r.Peers[0].Fresh {
			t.Errorf("a dead peer is called fresh: %+v", r.Peers[0])
		}
	})
}

func TestGiven(t *testing.T) {
	x := peer.Material{Servers: []string{"https://a:6443", "https://b:6443"}, Token: []byte("K10::x"), AgentToken: []byte("second"), Version: "v1", Args: "c", As: cb.RoleServer}
	got, err := given(x)
	if err != nil || got.Token != "K10::x" || got.AgentToken != "second" || got.Version != "v1" || got.Critical != "c" || got.Server != "https://a:6443" || got.As != cb.RoleServer {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, bad := range []peer.Material{{}, {Servers: x.Servers}, {Token: x.Token}} {
		if _, err := given(bad); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}
