package k3s

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// turnAPI is as much of a Kubernetes API as turns need: one ConfigMap with
// versions, nodes, pods, evictions.
type turnAPI struct {
	t  *testing.T
	mu sync.Mutex
	// cm is the stored ConfigMap, nil if there is none.
	cm      *configMap
	version int
	nodes   map[string]map[string]any
	pods    map[string]string // name -> extra JSON
	budget  map[string]bool   // pods that may not leave
}

func (a *turnAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		a.t.Error(err)
	}
	status := func(code int) { w.WriteHeader(code); fmt.Fprintf(w, `{"message":"status %d"}`, code) }
	answer := func(v any) {
		if err := json.NewEncoder(w).Encode(v); err != nil {
			a.t.Error(err)
		}
	}
	p := r.URL.Path
	switch {
	case p == ledgerPath+"/"+turnsName && r.Method == http.MethodGet:
		if a.cm == nil {
			status(404)
			return
		}
		answer(a.cm)
	case p == ledgerPath || p == ledgerPath+"/"+turnsName:
		var in configMap
		if err := json.Unmarshal(body, &in); err != nil {
			a.t.Error(err)
		}
		if r.Method == http.MethodPost && a.cm != nil || r.Method == http.MethodPut && (a.cm == nil || in.Metadata.ResourceVersion != a.cm.Metadata.ResourceVersion) {
			status(409)
			return
		}
		a.version++
		in.Metadata.ResourceVersion = fmt.Sprint(a.version)
		a.cm = &in
		answer(in)
	case p == "/api/v1/nodes":
		var items []any
		for _, n := range a.nodes {
			items = append(items, n)
		}
		answer(map[string]any{"items": items})
	case strings.HasPrefix(p, "/api/v1/nodes/"):
		n := a.nodes[strings.TrimPrefix(p, "/api/v1/nodes/")]
		if n == nil {
			status(404)
			return
		}
		if r.Method == http.MethodPatch {
			var patch map[string]any
			if err := json.Unmarshal(body, &patch); err != nil {
				a.t.Error(err)
			}
			merge(n, patch)
		}
		answer(n)
	case p == "/db/info":
		fmt.Fprint(w, `{"members":[{"ID":1,"name":"`+string(turnNodeID(0))+`-00000001"},{"ID":2,"name":"`+string(turnNodeID(1))+`-00000002"},{"ID":3,"name":"`+string(turnNodeID(2))+`-00000003","isLearner":true}]}`)
	case p == "/api/v1/pods":
		var items []string
		for name, extra := range a.pods {
			items = append(items, `{"metadata":{"name":"`+name+`","namespace":"shop"`+extra+`},"status":{"phase":"Running"}}`)
		}
		fmt.Fprint(w, `{"items":[`+strings.Join(items, ",")+`]}`)
	case strings.HasSuffix(p, "/eviction"):
		name := strings.Split(p, "/")[6]
		if a.budget[name] {
			status(429)
			return
		}
		delete(a.pods, name)
		answer(map[string]any{})
	default:
		a.t.Errorf("%s %s", r.Method, p)
		status(500)
	}
}

func merge(to, patch map[string]any) {
	for k, v := range patch {
		sub, ok := v.(map[string]any)
		switch {
		case v == nil:
			delete(to, k)
		case ok:
			if to[k] == nil {
				to[k] = map[string]any{}
			}
			merge(to[k].(map[string]any), sub)
		default:
			to[k] = v
		}
	}
}

func turnNodeID(i int) fleet.NodeID {
	return fleet.NodeID("n-" + strings.Repeat(string(rune('a'+i)), 24))
}

func newTurnAPI(t *testing.T) (*turnAPI, *Turns) {
	a := &turnAPI{t: t, nodes: map[string]map[string]any{}, pods: map[string]string{}, budget: map[string]bool{}}
	for i := range 3 {
		a.nodes[string(turnNodeID(i))] = map[string]any{
			"metadata": map[string]any{"name": string(turnNodeID(i)), "labels": map[string]any{"node-role.kubernetes.io/control-plane": "true"}},
			"spec":     map[string]any{},
			"status": map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": map[bool]string{true: "True", false: "False"}[i != 1]}},
				"nodeInfo": map[string]any{"kubeletVersion": "v1.36.3+k3s1"}}}
	}
	s := httptest.NewTLSServer(a)
	t.Cleanup(s.Close)
	dir := t.TempDir()
	paths := Paths{State: dir, Run: dir, Data: dir, Config: dir}
	cred := filepath.Join(paths.Server(), "cred")
	if err := os.MkdirAll(cred, 0o755); err != nil {
		t.Fatal(err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(cred, "ca.crt"), ca, 0o644); err != nil {
		t.Fatal(err)
	}
	config := "clusters:\n- cluster: {server: 'https://127.0.0.1:6443', certificate-authority: '" + filepath.Join(cred, "ca.crt") + "'}\nusers:\n- user: {}\n"
	if err := os.WriteFile(filepath.Join(cred, "admin.kubeconfig"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return a, &Turns{Paths: paths, API: netip.MustParseAddrPort(s.Listener.Addr().String()), Now: func() time.Time { return time.Unix(1_700_000_600, 0) }}
}

const turnImage = "aa00000000000000000000000000000000000000000000000000000000000000"

func TestTurnsAreWrittenByCompareAndSet(t *testing.T) {
	_, x := newTurnAPI(t)
	f := turns.Facts{Self: turnNodeID(0)}
	v, err := x.Facts(t.Context(), &f)
	if err != nil || v != "" || !f.API || !f.Server || len(f.Nodes) != 3 || len(f.Voters) != 2 || f.Learners != 1 || f.Cordoned {
		t.Fatalf("%v %q %+v", err, v, f)
	}
	l := turns.Ledger{Turn: &turns.Turn{Node: turnNodeID(0), Image: turnImage, Version: "2"}}
	if ok, err := x.WriteTurns(t.Context(), l, ""); !ok || err != nil {
		t.Fatal(ok, err)
	}
	// Somebody who has not read it writes nothing.
	for _, old := range []string{"", "0"} {
		if ok, err := x.WriteTurns(t.Context(), turns.Ledger{}, old); ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if v, err = x.Facts(t.Context(), &f); err != nil || f.Ledger.Turn == nil || f.Ledger.Turn.Node != turnNodeID(0) {
		t.Fatalf("%v %+v", err, f.Ledger)
	}
	if ok, err := x.WriteTurns(t.Context(), turns.Ledger{}, v); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if ready, answers := x.OwnReady(t.Context(), turnNodeID(0)); !ready || !answers {
		t.Error("node 0 is ready")
	}
	if ready, answers := x.OwnReady(t.Context(), turnNodeID(1)); ready || !answers {
		t.Error("node 1 is not ready")
	}
}

func TestDrainHearsBudgetsAndTakesBackOnlyItsOwn(t *testing.T) {
	a, x := newTurnAPI(t)
	self := turnNodeID(0)
	a.pods = map[string]string{"web": "", "till": "", "log": `,"ownerReferences":[{"kind":"DaemonSet","name":"log","controller":true}]`,
		"static": `,"annotations":{"kubernetes.io/config.mirror":"x"}`}
	a.budget["till"] = true
	if err := x.Drain(t.Context(), self); err != nil {
		t.Fatal(err)
	}
	f := turns.Facts{Self: self}
	if _, err := x.Facts(t.Context(), &f); err != nil || !f.Cordoned || f.Pods != 1 {
		t.Fatalf("%v %+v", err, f)
	}
	x.Now = func() time.Time { return time.Unix(1_700_000_600, 0).Add(6 * time.Minute) }
	a.budget["till"] = false
	if err := x.Drain(t.Context(), self); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Facts(t.Context(), &f); err != nil || f.Pods != 0 || f.Draining != 6*time.Minute || len(a.pods) != 2 {
		t.Fatalf("%v %+v %v", err, f, a.pods)
	}
	if err := x.Uncordon(t.Context(), self); err != nil {
		t.Fatal(err)
	}
	f = turns.Facts{Self: self}
	if _, err := x.Facts(t.Context(), &f); err != nil || f.Cordoned {
		t.Fatalf("%v %+v", err, f)
	}
	// A node that a person cordoned is left alone.
	merge(a.nodes[string(self)], map[string]any{"spec": map[string]any{"unschedulable": true}})
	if err := x.Drain(t.Context(), self); err == nil || !strings.Contains(err.Error(), "somebody else") {
		t.Fatal(err)
	}
}

func TestASilentClusterIsNoError(t *testing.T) {
	_, x := newTurnAPI(t)
	x.API = netip.MustParseAddrPort("127.0.0.1:1")
	f := turns.Facts{Self: turnNodeID(0)}
	if v, err := x.Facts(t.Context(), &f); err != nil || v != "" || f.API {
		t.Fatalf("%v %q %+v", err, v, f)
	}
	x.Paths.Data = t.TempDir() // a worker: there is no admin.kubeconfig
	if _, err := x.Facts(t.Context(), &f); err != nil || f.API {
		t.Fatalf("%v %+v", err, f)
	}
	if _, answers := x.OwnReady(t.Context(), turnNodeID(0)); answers {
		t.Error("nobody answers")
	}
}

func FuzzPods(f *testing.F) {
	f.Add([]byte(`{"items":[{"metadata":{"name":"a","namespace":"b"},"status":{"phase":"Running"}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		pods, err := parsePods(b)
		for _, p := range pods {
			if err != nil || strings.ContainsAny(p.Namespace+p.Name, "/?#%") {
				t.Fatalf("%+v", p)
			}
		}
	})
}
