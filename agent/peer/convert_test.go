package peer

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
)

// nodeIDs are drawn from: node IDs are digests.
var nodeIDs = func() (out []fleet.NodeID) {
	for i := range 6 {
		out = append(out, fleet.EKHash{byte(i)}.NodeID())
	}
	slices.Sort(out)
	return out
}()

// drawStatus draws a status with every field, so that a new one that is not
// carried is noticed.
func drawStatus(t *rapid.T) clusterbootstrap.Status {
	node := rapid.SampledFrom(nodeIDs)
	nodes := func(name string) []fleet.NodeID {
		return slices.Clone(nodeIDs[rapid.IntRange(0, 5).Draw(t, name):][:1])
	}
	id := rapid.StringMatching(`[a-z0-9]{1,16}`)
	epoch := rapid.Uint64Range(0, fleet.MaxClusterEpoch)
	some := func(name string) bool { return rapid.Bool().Draw(t, name) }
	s := clusterbootstrap.Status{
		Node: node.Draw(t, "node"), Boots: rapid.Uint64().Draw(t, "boots"), Seq: rapid.Uint64().Draw(t, "seq"),
		Role: clusterbootstrap.Role(rapid.IntRange(0, 3).Draw(t, "role")), State: clusterbootstrap.State(rapid.IntRange(0, int(clusterbootstrap.Removed)).Draw(t, "state")),
		Intent: some("intent"), API: some("api"), Virgin: some("virgin"), Fenced: some("fenced"), Reset: some("reset"),
		Voters: rapid.IntRange(0, 5).Draw(t, "voters"), Learners: rapid.IntRange(0, 5).Draw(t, "learners"),
		Version: rapid.SampledFrom([]string{"", "v1.36.3+k3s1"}).Draw(t, "version"), Args: rapid.SampledFrom([]string{"", "ab"}).Draw(t, "args"),
		Fsync: time.Duration(rapid.IntRange(0, 1000).Draw(t, "fsync")) * time.Microsecond,
		Sees:  nodes("sees"), Blocker: rapid.SampledFrom([]clusterbootstrap.Blocker{"", clusterbootstrap.QuorumLost, clusterbootstrap.Settling}).Draw(t, "blocker"),
	}
	if some("record") {
		s.Record = &clusterbootstrap.Record{UID: id.Draw(t, "uid"), Epoch: epoch.Draw(t, "epoch"), Version: rapid.Uint64().Draw(t, "version"),
			Founder: node.Draw(t, "founder"), Servers: slices.Clone(nodeIDs[:rapid.IntRange(1, 3).Draw(t, "servers")])}
		if some("into") {
			s.Record.Into = id.Draw(t, "into")
		}
	}
	if some("claim") {
		s.Claim = &clusterbootstrap.Claim{Node: node.Draw(t, "claimant"), Round: rapid.Uint64().Draw(t, "round"), Token: id.Draw(t, "token")}
	}
	if some("ack") {
		s.Ack = &clusterbootstrap.Claim{Node: node.Draw(t, "acked"), Round: rapid.Uint64().Draw(t, "round"), Token: id.Draw(t, "token")}
	}
	if some("step") {
		s.Step = &clusterbootstrap.Step{Plan: id.Draw(t, "plan"), N: rapid.Uint64().Draw(t, "n"), Epoch: epoch.Draw(t, "epoch"), Leader: node.Draw(t, "leader"),
			Phase: clusterbootstrap.StepPhase(rapid.IntRange(1, 2).Draw(t, "phase")), Replace: some("replace")}
	}
	if some("lead") {
		s.Lead = &clusterbootstrap.Lead{Plan: id.Draw(t, "plan"), Epoch: epoch.Draw(t, "epoch"), Candidates: nodes("candidates"),
			Phase: clusterbootstrap.LeadPhase(rapid.IntRange(1, 2).Draw(t, "phase"))}
	}
	if some("plan") {
		s.Plan = &clusterbootstrap.PlanDoc{ID: id.Draw(t, "plan"), N: rapid.Uint64().Draw(t, "n"), Epoch: epoch.Draw(t, "epoch"), Leader: node.Draw(t, "leader"),
			Candidates: nodes("candidates"), Phase: clusterbootstrap.PlanPhase(rapid.IntRange(0, 4).Draw(t, "phase")), Replace: some("replace"),
			Serial: some("serial"), Go: rapid.IntRange(0, 2).Draw(t, "go"), Reopened: some("reopened"), Off: some("off"), Failures: rapid.IntRange(0, 9).Draw(t, "failures"),
			Why: rapid.StringMatching(`[a-z ]{0,3}[a-z]`).Draw(t, "why")}
	}
	return s
}

func TestStatusRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawStatus(t)
		b, err := proto.Marshal(statusToProto(s))
		if err != nil {
			t.Fatal(err)
		}
		var m peerv1.NodeStatus
		if err := proto.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		back, err := statusFromProto(&m)
		if err != nil {
			t.Fatalf("%v\n%+v", err, s)
		}
		s.Plan = trimmed(s.Plan)
		if !reflect.DeepEqual(s, back) {
			t.Fatalf("sent %+v\ncame %+v", s, back)
		}
	})
}

// trimmed is a plan with the sentence as receivers clean it.
func trimmed(p *clusterbootstrap.PlanDoc) *clusterbootstrap.PlanDoc {
	if p == nil {
		return nil
	}
	n := *p
	n.Why = strings.Join(strings.Fields(p.Why), " ")
	return &n
}

// Every field of Status must travel: the planner decides by all of them.
func TestEveryFieldOfAStatusTravels(t *testing.T) {
	full := clusterbootstrap.Status{Node: nodeIDs[0], Boots: 1, Seq: 2, Role: 3, State: 4,
		Record: &clusterbootstrap.Record{UID: "u", Epoch: 1, Version: 2, Founder: nodeIDs[1], Servers: nodeIDs[:2], Into: "v"},
		Intent: true, Claim: &clusterbootstrap.Claim{Node: nodeIDs[1], Round: 1, Token: "t"}, Ack: &clusterbootstrap.Claim{Node: nodeIDs[2], Round: 2, Token: "w"},
		API: true, Virgin: true, Fenced: true, Voters: 3, Learners: 1,
		Step: &clusterbootstrap.Step{Plan: "p", N: 1, Epoch: 2, Leader: nodeIDs[1], Phase: 1, Replace: true},
		Lead: &clusterbootstrap.Lead{Plan: "p", Epoch: 1, Phase: 2, Candidates: nodeIDs[:1]},
		Plan: &clusterbootstrap.PlanDoc{ID: "p", N: 1, Epoch: 2, Leader: nodeIDs[0], Candidates: nodeIDs[:1], Phase: 2, Replace: true, Serial: true, Go: 1,
			Reopened: true, Off: true, Failures: 2, Why: "because"},
		Reset: true, Sees: nodeIDs[1:3], Blocker: clusterbootstrap.QuorumLost, Version: "v1.36.3+k3s1", Args: "ab12", Fsync: 3 * time.Millisecond}
	var empty func(v reflect.Value, path string)
	empty = func(v reflect.Value, path string) {
		switch v.Kind() {
		case reflect.Pointer:
			if v.IsNil() {
				t.Errorf("%s is not set: the test knows less than the type", path)
				return
			}
			empty(v.Elem(), path)
		case reflect.Struct:
			for i := range v.NumField() {
				empty(v.Field(i), path+"."+v.Type().Field(i).Name)
			}
		default:
			if v.IsZero() {
				t.Errorf("%s is not set: the test knows less than the type", path)
			}
		}
	}
	empty(reflect.ValueOf(full), "Status")
	back, err := statusFromProto(statusToProto(full))
	if err != nil || !reflect.DeepEqual(full, back) {
		t.Errorf("sent %+v\ncame %+v (%v)", full, back, err)
	}
}

func TestBadStatus(t *testing.T) {
	good := func() *peerv1.NodeStatus {
		return &peerv1.NodeStatus{Node: string(nodeIDs[0]), Record: &peerv1.Record{Uid: "u", Founder: string(nodeIDs[0])}, Claim: &peerv1.Claim{Node: string(nodeIDs[0]), Token: "t"},
			Plan: &peerv1.Plan{Id: "p", Leader: string(nodeIDs[0])}, Step: &peerv1.Step{Plan: "p", Leader: string(nodeIDs[0]), Phase: 1}, Lead: &peerv1.Lead{Plan: "p", Phase: 1}}
	}
	if _, err := statusFromProto(good()); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(m *peerv1.NodeStatus){
		"no node":            func(m *peerv1.NodeStatus) { m.Node = "" },
		"bad node":           func(m *peerv1.NodeStatus) { m.Node = "n-../../etc" },
		"role":               func(m *peerv1.NodeStatus) { m.Role = 4 },
		"state":              func(m *peerv1.NodeStatus) { m.State = 14 },
		"voters":             func(m *peerv1.NodeStatus) { m.Voters = 1 << 31 },
		"blocker":            func(m *peerv1.NodeStatus) { m.Blocker = "<b>" },
		"sees":               func(m *peerv1.NodeStatus) { m.Sees = slices.Repeat([]string{string(nodeIDs[0])}, 257) },
		"epoch used up":      func(m *peerv1.NodeStatus) { m.Record.Epoch = 1 << 63 },
		"UID":                func(m *peerv1.NodeStatus) { m.Record.Uid = "a b" },
		"into":               func(m *peerv1.NodeStatus) { m.Record.Into = "a b" },
		"servers not sorted": func(m *peerv1.NodeStatus) { m.Record.Servers = []string{string(nodeIDs[1]), string(nodeIDs[0])} },
		"claim token":        func(m *peerv1.NodeStatus) { m.Claim.Token = "a\nb" },
		"plan ID":            func(m *peerv1.NodeStatus) { m.Plan.Id = strings.Repeat("x", 129) },
		"plan phase":         func(m *peerv1.NodeStatus) { m.Plan.Phase = 5 },
		"plan go":            func(m *peerv1.NodeStatus) { m.Plan.Go = 1 << 31 },
		"step phase":         func(m *peerv1.NodeStatus) { m.Step.Phase = 0 },
		"k3s version":        func(m *peerv1.NodeStatus) { m.K3SVersion = "v1\n" },
		"k3s arguments":      func(m *peerv1.NodeStatus) { m.K3SArgs = "a b" },
		"flushing for ever":  func(m *peerv1.NodeStatus) { m.FsyncMicroseconds = 1 << 63 },
		"lead phase":         func(m *peerv1.NodeStatus) { m.Lead.Phase = 3 },
		"lead candidates":    func(m *peerv1.NodeStatus) { m.Lead.Candidates = slices.Repeat([]string{string(nodeIDs[0])}, 17) },
	} {
		m := good()
		edit(m)
		if _, err := statusFromProto(m); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	m := good()
	m.Plan.Why = "a\x1b[31m" + strings.Repeat("y", 5000)
	s, err := statusFromProto(m)
	if err != nil || strings.Contains(s.Plan.Why, "\x1b") || len(s.Plan.Why) > 4*maxWhy {
		t.Errorf("%v; the sentence is %q", err, s.Plan.Why)
	}
}

func FuzzStatus(f *testing.F) {
	for i := range 4 {
		s := rapid.Custom(drawStatus).Example(i)
		b, err := proto.Marshal(statusToProto(s))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m peerv1.NodeStatus
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		s, err := statusFromProto(&m)
		if err != nil {
			if len(err.Error()) > 16<<10 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		again, err := statusFromProto(statusToProto(s))
		if err != nil || !reflect.DeepEqual(s, again) {
			t.Errorf("%+v\nis not %+v (%v)", s, again, err)
		}
	})
}

func TestMaterialFromProto(t *testing.T) {
	good := func() *peerv1.JoinMaterialResponse {
		return &peerv1.JoinMaterialResponse{Servers: []string{"https://100.96.0.1:6443", "https://[fd00::1]:6443"}, Token: []byte("K10ab::x:y"), TokenSeconds: 300, Uid: "u", Epoch: 3}
	}
	if m, err := materialFromProto(good(), clusterbootstrap.RoleWorker, ""); err != nil || m.Good != 5*time.Minute || m.Epoch != 3 {
		t.Fatalf("%+v, %v", m, err)
	}
	for name, edit := range map[string]func(*peerv1.JoinMaterialResponse){
		"no server":          func(m *peerv1.JoinMaterialResponse) { m.Servers = nil },
		"many servers":       func(m *peerv1.JoinMaterialResponse) { m.Servers = slices.Repeat(m.Servers, 9) },
		"plain HTTP":         func(m *peerv1.JoinMaterialResponse) { m.Servers[0] = "http://x:6443" },
		"a path":             func(m *peerv1.JoinMaterialResponse) { m.Servers[0] = "https://x:6443/x" },
		"a user":             func(m *peerv1.JoinMaterialResponse) { m.Servers[0] = "https://u:p@x:6443" },
		"a line break":       func(m *peerv1.JoinMaterialResponse) { m.Servers[0] = "https://x:6443\nserver: y" },
		"no token":           func(m *peerv1.JoinMaterialResponse) { m.Token = nil },
		"token without pin":  func(m *peerv1.JoinMaterialResponse) { m.Token = []byte("secret") },
		"token of two lines": func(m *peerv1.JoinMaterialResponse) { m.Token = []byte("K10ab::x\ny") },
		"token without end": func(m *peerv1.JoinMaterialResponse) {
			m.Token = append([]byte("K10"), bytes.Repeat([]byte("x"), 5000)...)
		},
		"UID":   func(m *peerv1.JoinMaterialResponse) { m.Uid = "" },
		"epoch": func(m *peerv1.JoinMaterialResponse) { m.Epoch = 1 << 63 },
	} {
		m := good()
		edit(m)
		if _, err := materialFromProto(m, clusterbootstrap.RoleWorker, ""); err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error tells the token: %v", name, err)
		}
	}
}

func TestAddressesFromProto(t *testing.T) {
	in := []*peerv1.PeerAddress{{Node: string(nodeIDs[0]), Address: "192.0.2.1:7445"}, {Node: string(nodeIDs[1]), Address: "[fd00::1]:7445"},
		{Node: string(nodeIDs[1]), Address: "127.0.0.1:7445"}, {Node: string(nodeIDs[1]), Address: "[fe80::1%eth0]:7445"},
		{Node: string(nodeIDs[1]), Address: "224.0.0.1:7445"}, {Node: string(nodeIDs[1]), Address: "0.0.0.0:7445"}}
	got, err := addressesFromProto(in)
	want := []Address{{nodeIDs[0], netip.MustParseAddrPort("192.0.2.1:7445")}, {nodeIDs[1], netip.MustParseAddrPort("[fd00::1]:7445")}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, bad := range []*peerv1.PeerAddress{{Node: string(nodeIDs[0]), Address: "host:1"}, {Node: "x", Address: "192.0.2.1:1"}, {Node: string(nodeIDs[0]), Address: "192.0.2.1:0"}} {
		if _, err := addressesFromProto([]*peerv1.PeerAddress{bad}); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
	if _, err := addressesFromProto(slices.Repeat(in[:1], maxHints+1)); err == nil {
		t.Error("too many were taken")
	}
}

// The node's reader and the centre's must come to the same.
func TestEventLogIsReadAsTheCentreReadsIt(t *testing.T) {
	var logs [][]byte
	for _, name := range []string{"../../pki/ekcert/testdata"} {
		entries, err := os.ReadDir(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			b, err := os.ReadFile(name + "/" + e.Name())
			if err == nil {
				logs = append(logs, b)
			}
		}
	}
	logs = append(logs, encodeLog(ours.boot()), encodeLog(theirs.boot()))
	read := 0
	for i, b := range logs {
		mine, errMine := parseEventLog(b)
		centre, errCentre := ekcert.ParseEventLog(b)
		if (errMine == nil) != (errCentre == nil) {
			t.Errorf("log %d: here %v, at the centre %v", i, errMine, errCentre)
			continue
		}
		if errMine == nil {
			read++
			if !sameEvents(mine, centre) {
				t.Errorf("log %d: %d events here, %d at the centre, or they differ", i, len(mine), len(centre))
			}
		}
	}
	if read < 2 {
		t.Errorf("%d logs were read: the test compares nothing", read)
	}
	t.Logf("%d of %d files are logs that both read", read, len(logs))
}

func sameEvents(a, b []pki.LogEvent) bool {
	return slices.EqualFunc(a, b, func(x, y pki.LogEvent) bool {
		return x.PCR == y.PCR && x.Type == y.Type && x.Digest == y.Digest && bytes.Equal(x.Data, y.Data)
	})
}

func TestBadEventLogs(t *testing.T) {
	good := encodeLog(ours.boot())
	if e, err := parseEventLog(good); err != nil || len(e) != len(ours.boot()) {
		t.Fatalf("%d events, %v", len(e), err)
	}
	for n := range len(good) {
		// Cut between two events it is a shorter log; nowhere else.
		e, err := parseEventLog(good[:n])
		if err == nil && len(encodeLog(ours.boot()[:len(e)])) != n {
			t.Fatalf("cut at %d it was read", n)
		}
	}
	endless := slices.Clone(good)
	copy(endless[len(endless)-4-len("ours sections"):], []byte{0xff, 0xff, 0xff, 0xff})
	for name, b := range map[string][]byte{
		"empty": nil, "too long": make([]byte, maxEventLog+1), "an event without end": endless,
		"zeros": make([]byte, 4096), "not crypto-agile": bytes.Replace(good, []byte("Event03"), []byte("Event00"), 1),
	} {
		if _, err := parseEventLog(b); err == nil {
			t.Errorf("%s: read", name)
		}
	}
}

func FuzzEventLog(f *testing.F) {
	f.Add(encodeLog(ours.boot()))
	f.Add(encodeLog(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		mine, err := parseEventLog(b)
		if err != nil {
			return
		}
		if len(mine) > maxEvents {
			t.Fatal("too many events")
		}
		centre, err := ekcert.ParseEventLog(b)
		if err != nil {
			return // it is stricter about what nobody replays
		}
		if !sameEvents(mine, centre) {
			t.Errorf("here %s\nat the centre %s", show(mine), show(centre))
		}
	})
}

func show(list []pki.LogEvent) string {
	var b strings.Builder
	for _, e := range list {
		fmt.Fprintf(&b, "%d %x %x %x; ", e.PCR, e.Type, e.Digest[:4], e.Data)
	}
	return b.String()
}

func TestOlderStatusesAreDropped(t *testing.T) {
	h := newHeard()
	at := func(s int) time.Time { return time.Unix(int64(1000+s), 0) }
	for i, c := range []struct {
		now, hello int
		boots, seq uint64
		want       bool
	}{
		{10, 0, 5, 1, true},
		{11, 0, 5, 2, true},
		{12, 0, 5, 2, false}, // the same again
		{13, 0, 5, 1, false}, // overtaken on another connection
		{14, 0, 4, 9, false}, // of the run before
		{15, 0, 6, 1, true},  // after a restart
		{16, 0, 5, 3, false},
		{17, 14, 1, 1, false}, // hello at 14, but the last came at 15
		{18, 16, 1, 1, true},  // said after the last one for sure: its disk was lost
		{19, 16, 1, 2, true},
	} {
		if got := h.take(at(c.now), at(c.hello), clusterbootstrap.Status{Node: nodeIDs[0], Boots: c.boots, Seq: c.seq}); got != c.want {
			t.Errorf("step %d: %v, want %v", i, got, c.want)
		}
	}
	if !h.take(at(0), at(0), clusterbootstrap.Status{Node: nodeIDs[1]}) {
		t.Error("nodes share a count")
	}
}
