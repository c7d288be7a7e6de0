package k3scontract

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// member is one entry of /db/info.
type member struct {
	ID        uint64   `json:"ID"`
	Name      string   `json:"name"`
	PeerURLs  []string `json:"peerURLs"`
	IsLearner bool     `json:"isLearner"`
}

// members asks the node itself, as muster does.
func (n *node) members() ([]member, error) {
	code, body, err := n.loop("/db/info")
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("/db/info: %d %s", code, body)
	}
	var in struct {
		Members []member `json:"members"`
	}
	return in.Members, json.Unmarshal([]byte(body), &in)
}

// voters counts voters and learners.
func (n *node) voters() (voters, learners int, err error) {
	ms, err := n.members()
	for _, m := range ms {
		if m.IsLearner {
			learners++
		} else {
			voters++
		}
	}
	return voters, learners, err
}

func (n *node) waitVoters(want int, limit time.Duration) {
	n.b.t.Helper()
	n.b.eventually(fmt.Sprintf("%d voters and no learner at %s", want, n.name), limit, func() error {
		v, l, err := n.voters()
		if err != nil {
			return err
		}
		if v != want || l != 0 {
			return fmt.Errorf("%d voters, %d learners", v, l)
		}
		return nil
	})
}

// object is as much of a Node as the rows look at.
type object struct {
	Metadata struct {
		Name              string
		UID               string
		Labels            map[string]string
		Annotations       map[string]string
		DeletionTimestamp *string
	}
	Status struct {
		Conditions []struct{ Type, Status, Reason string }
		Addresses  []struct{ Type, Address string }
		NodeInfo   struct{ ContainerRuntimeVersion, KubeletVersion string }
	}
}

func (o *object) condition(t string) string {
	for _, c := range o.Status.Conditions {
		if c.Type == t {
			return c.Status
		}
	}
	return ""
}

var errNoNode = errors.New("no such Node")

// nodeObject reads a Node through the API of n.
func (n *node) nodeObject(name string) (*object, error) {
	code, body, err := n.admin(http.MethodGet, "/api/v1/nodes/"+name, nil)
	if err != nil {
		return nil, err
	}
	if code == http.StatusNotFound {
		return nil, errNoNode
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("read Node %s: %d %s", name, code, body)
	}
	var o object
	return &o, json.Unmarshal([]byte(body), &o)
}

func (n *node) waitReady(name string, limit time.Duration) {
	n.b.t.Helper()
	n.b.eventually("Node "+name+" Ready", limit, func() error {
		o, err := n.nodeObject(name)
		if err != nil {
			return err
		}
		if s := o.condition("Ready"); s != "True" {
			return fmt.Errorf("Ready is %q", s)
		}
		return nil
	})
}

func (n *node) must(t *testing.T, method, path string, body any, want int) string {
	t.Helper()
	code, text, err := n.admin(method, path, body)
	if err != nil || code != want {
		t.Fatalf("%s %s: %d %s %v, want %d", method, path, code, text, err, want)
	}
	return text
}

// put writes a value into a ConfigMap of the default namespace.
func (n *node) put(t *testing.T, name, value string) {
	t.Helper()
	n.must(t, http.MethodPost, "/api/v1/namespaces/default/configmaps", map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": name}, "data": map[string]any{"v": value},
	}, http.StatusCreated)
}

// value reads it; "" means there is none.
func (n *node) value(name string) (string, error) {
	code, body, err := n.admin(http.MethodGet, "/api/v1/namespaces/default/configmaps/"+name, nil)
	if err != nil {
		return "", err
	}
	switch code {
	case http.StatusNotFound:
		return "", nil
	case http.StatusOK:
	default:
		return "", fmt.Errorf("%d %s", code, body)
	}
	var c struct{ Data map[string]string }
	return c.Data["v"], json.Unmarshal([]byte(body), &c)
}

func (n *node) clusterUID(t *testing.T) string {
	t.Helper()
	var o object
	if err := json.Unmarshal([]byte(n.must(t, http.MethodGet, "/api/v1/namespaces/kube-system", nil, http.StatusOK)), &o); err != nil {
		t.Fatal(err)
	}
	return o.Metadata.UID
}

// bootstrapToken makes a token of minutes.
func (n *node) bootstrapToken(t *testing.T) string {
	t.Helper()
	out, err := n.run("token", "create", "--ttl", "5m")
	if err != nil {
		t.Fatalf("token create: %v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	tok := lines[len(lines)-1]
	if !strings.HasPrefix(tok, "K10") {
		t.Fatalf("token create printed %q", out)
	}
	return tok
}

// member name of a node.
func (n *node) memberName() string {
	b, _ := os.ReadFile(n.data("server/db/etcd/name"))
	return string(b)
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Mode()
}

// moveAside puts server/ away, as muster does before a node becomes a worker.
func (n *node) moveAside(t *testing.T) {
	t.Helper()
	if err := os.Rename(n.data("server"), n.data(fmt.Sprintf("server-old-%d", time.Now().UnixNano()))); err != nil {
		t.Fatal(err)
	}
}

// passed collects the rows that held in this run; failed those that did not.
var (
	recMu  sync.Mutex
	passed = map[string]bool{}
	failed = map[string]bool{}
)

var all = os.Getenv("K3SCONTRACT_ALL") == "1"

// long skips what takes minutes unless all rows are asked for.
func long(t *testing.T) {
	t.Helper()
	if !all && !*update {
		t.Skip("not run: minutes long; set K3SCONTRACT_ALL=1 for all rows")
	}
}

// row runs the test of one row and notes how it ended.
func row(t *testing.T, id string, f func(t *testing.T)) {
	t.Helper()
	i := slices.IndexFunc(Rows, func(r Row) bool { return r.ID == id })
	if i < 0 {
		t.Fatalf("row %s is not in the contract", id)
	}
	t.Run(id, func(t *testing.T) {
		if o := Rows[i].Only; o != "" && o != k3s.Kind {
			t.Skipf("row %s is about the %s only", id, o)
		}
		t.Cleanup(func() {
			recMu.Lock()
			defer recMu.Unlock()
			switch {
			case t.Failed():
				failed[id] = true
			case !t.Skipped():
				passed[id] = true
			}
		})
		f(t)
	})
}

func root() string { return filepath.Join("..", "..") }

func docPath() string { return filepath.Join(root(), "docs", "k3s-contract.md") }

// writeResults merges this run into results.json and renders the document.
func writeResults() error {
	if !*update {
		return nil
	}
	res, err := storedResults()
	if err != nil {
		return err
	}
	for id := range passed {
		if failed[id] {
			continue
		}
		if res[id] == nil {
			res[id] = map[string]Result{}
		}
		res[id][k3s.Kind] = Result{Version: k3s.Version, Date: time.Now().UTC().Format(time.DateOnly)}
	}
	for id := range failed {
		delete(res[id], k3s.Kind)
	}
	b, err := res.Marshal()
	if err != nil {
		return err
	}
	if err := os.WriteFile("results.json", b, 0o644); err != nil {
		return err
	}
	return os.WriteFile(docPath(), []byte(Document(Rows, res)), 0o644)
}

func storedResults() (Results, error) {
	b, err := os.ReadFile("results.json")
	if os.IsNotExist(err) {
		return Results{}, nil
	}
	if err != nil {
		return nil, err
	}
	return ReadResults(b)
}
