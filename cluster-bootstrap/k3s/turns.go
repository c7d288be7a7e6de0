package k3s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/cluster-bootstrap/k3s/kube"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// Turns is what the cluster knows of turns (fleet/turns), asked with the rights
// of a server. Beside the Manager, which one loop calls, it has a client of its
// own. Methods may be called by anybody.
type Turns struct {
	Paths Paths
	// API is where this node's k3s answers; zero: 127.0.0.1:6443.
	API netip.AddrPort
	// Timeout bounds each question (10 s).
	Timeout time.Duration
	Now     func() time.Time

	mu  sync.Mutex
	c   *kube.Client
	key string
}

const (
	turnsName = "muster-turns"
	turnsKey  = "turns.json"
	// cordonedAt is when this program cordoned a node. Only what it cordoned it
	// uncordons.
	cordonedAt = "muster.dev/cordoned-for-update"
	maxPods    = 2000
)

// client reads the files anew: k3s renews its certificates when it starts.
func (t *Turns) client() (*kube.Client, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, err := kube.Load(filepath.Join(t.Paths.Server(), "cred", "admin.kubeconfig"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNotReady, err)
	}
	if err != nil {
		return nil, err
	}
	api := t.API
	if !api.IsValid() {
		api = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 6443)
	}
	c.Server = "https://" + api.String()
	key := fmt.Sprint(c.Server, "\x00", string(c.CA), "\x00", string(c.Cert))
	if t.c != nil && t.key == key {
		return t.c, nil
	}
	timeout := t.Timeout
	if timeout == 0 {
		timeout = 10 * time.Second
	}
	n, err := kube.New(c, timeout)
	if err != nil {
		return nil, err
	}
	if t.c != nil {
		t.c.Close()
	}
	t.c, t.key = n, key
	return n, nil
}

// turnNode is what is read of a Node object.
type turnNode struct {
	Metadata struct {
		Name        string            `json:"name"`
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		Unschedulable bool `json:"unschedulable"`
	} `json:"spec"`
	Status struct {
		Conditions []struct {
			Type   string `json:"type"`
			Status string `json:"status"`
		} `json:"conditions"`
		NodeInfo struct {
			KubeletVersion string `json:"kubeletVersion"`
		} `json:"nodeInfo"`
	} `json:"status"`
}

// Facts fills what the cluster knows of the node f.Self. A cluster that does
// not answer leaves f.API false.
func (t *Turns) Facts(ctx context.Context, f *turns.Facts) (version string, err error) {
	c, err := t.client()
	if errors.Is(err, ErrNotReady) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var cm configMap
	err = c.Get(ctx, ledgerPath+"/"+turnsName, &cm)
	switch {
	case kube.IsStatus(err, http.StatusNotFound):
	case err != nil:
		return "", nil // it does not answer
	default:
		if f.Ledger, err = turns.Decode([]byte(cm.Data[turnsKey])); err != nil {
			return "", err
		}
		version = cm.Metadata.ResourceVersion
	}
	var nodes struct {
		Items []turnNode `json:"items"`
	}
	if err := c.Get(ctx, "/api/v1/nodes?limit=1000", &nodes); err != nil {
		return "", nil
	}
	members, err := dbInfo(ctx, c)
	if err != nil {
		return "", nil
	}
	if len(nodes.Items) > maxNodes {
		return "", fmt.Errorf("k3s: look at turns: %d nodes", len(nodes.Items))
	}
	f.API = true
	f.Nodes, f.Voters, f.Learners = nil, nil, 0
	for _, x := range nodes.Items {
		n := turns.Node{ID: fleet.NodeID(x.Metadata.Name), K3s: x.Status.NodeInfo.KubeletVersion}
		_, n.Server = x.Metadata.Labels["node-role.kubernetes.io/control-plane"]
		for _, cond := range x.Status.Conditions {
			n.Ready = n.Ready || cond.Type == "Ready" && cond.Status == "True"
		}
		f.Nodes = append(f.Nodes, n)
		if n.ID == f.Self {
			f.Server = n.Server
			if at, err := time.Parse(time.RFC3339, x.Metadata.Annotations[cordonedAt]); err == nil && x.Spec.Unschedulable {
				// A clock that was set meanwhile must not end a drain at once, nor
				// keep it for ever.
				f.Cordoned, f.Draining = true, max(t.Now().Sub(at), 0)
			}
		}
	}
	for _, m := range nameMembers(members, nil, nil) {
		if m.Learner {
			f.Learners++
		} else {
			f.Voters = append(f.Voters, m.node)
		}
	}
	if f.Cordoned {
		pods, err := podsOf(ctx, c, f.Self)
		if err != nil {
			return "", err
		}
		f.Pods = len(pods)
	}
	return version, nil
}

// WriteTurns writes the ledger if its version is still the one that was read,
// "" for none; false: somebody was faster.
func (t *Turns) WriteTurns(ctx context.Context, l turns.Ledger, version string) (bool, error) {
	c, err := t.client()
	if err != nil {
		return false, err
	}
	b, err := l.Encode()
	if err != nil {
		return false, err
	}
	in := configMap{APIVersion: "v1", Kind: "ConfigMap", Data: map[string]string{turnsKey: string(b)},
		Metadata: configMeta{Name: turnsName, Namespace: "kube-system", ResourceVersion: version, Labels: map[string]string{managedBy: managedByUs}}}
	if version == "" {
		err = c.Post(ctx, ledgerPath, in, nil)
	} else {
		err = c.Put(ctx, ledgerPath+"/"+turnsName, in, nil)
	}
	switch {
	case kube.IsStatus(err, http.StatusConflict), version != "" && kube.IsStatus(err, http.StatusNotFound):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("k3s: write turns: %w", err)
	}
	return true, nil
}

// Drain cordons the node and asks each of its pods to leave, by the Eviction
// API: a disruption budget is heard. It does not wait.
func (t *Turns) Drain(ctx context.Context, node fleet.NodeID) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	var n turnNode
	if err := c.Get(ctx, nodePath(node), &n); err != nil {
		return fmt.Errorf("k3s: drain: %w", err)
	}
	if n.Metadata.Annotations[cordonedAt] == "" || !n.Spec.Unschedulable {
		if n.Spec.Unschedulable {
			return errors.New("k3s: drain: somebody else cordoned this node; uncordon it, or wait")
		}
		err := c.Patch(ctx, nodePath(node), kube.MergePatch, map[string]any{"spec": map[string]any{"unschedulable": true},
			"metadata": map[string]any{"annotations": map[string]any{cordonedAt: t.Now().UTC().Format(time.RFC3339)}}})
		if err != nil {
			return fmt.Errorf("k3s: cordon: %w", err)
		}
	}
	pods, err := podsOf(ctx, c, node)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods {
		err := c.Post(ctx, "/api/v1/namespaces/"+p.Namespace+"/pods/"+p.Name+"/eviction", map[string]any{
			"apiVersion": "policy/v1", "kind": "Eviction", "metadata": map[string]any{"name": p.Name, "namespace": p.Namespace}}, nil)
		// 429: a budget says not yet; 404: it is gone.
		if err != nil && !kube.IsStatus(err, http.StatusTooManyRequests) && !kube.IsStatus(err, http.StatusNotFound) {
			errs = append(errs, fmt.Errorf("k3s: evict pod %.80s/%.80s: %w", p.Namespace, p.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Uncordon takes back what Drain did to the node, and nothing that anybody
// else did.
func (t *Turns) Uncordon(ctx context.Context, node fleet.NodeID) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	err = c.Patch(ctx, nodePath(node), kube.MergePatch, map[string]any{"spec": map[string]any{"unschedulable": nil},
		"metadata": map[string]any{"annotations": map[string]any{cordonedAt: nil}}})
	if err != nil && !kube.IsStatus(err, http.StatusNotFound) {
		return fmt.Errorf("k3s: uncordon: %w", err)
	}
	return nil
}

// OwnReady reports whether the Node object of self is Ready, asked as a server
// or, on a worker, with the rights of its kubelet. answers: some server did.
func (t *Turns) OwnReady(ctx context.Context, self fleet.NodeID) (ready, answers bool) {
	c, err := t.client()
	if err != nil {
		k, err := kube.Load(filepath.Join(t.Paths.Data, "agent", "kubelet.kubeconfig"))
		if err != nil {
			return false, false
		}
		if c, err = kube.New(k, 5*time.Second); err != nil {
			return false, false
		}
		defer c.Close()
	}
	var n turnNode
	if err := c.Get(ctx, nodePath(self), &n); err != nil {
		return false, kube.IsStatus(err, http.StatusNotFound)
	}
	for _, x := range n.Status.Conditions {
		ready = ready || x.Type == "Ready" && x.Status == "True"
	}
	return ready, true
}

// podsOf are the pods that must leave a node before it restarts: not those of
// daemon sets, not static ones, not those that have ended or are leaving.
func podsOf(ctx context.Context, c *kube.Client, node fleet.NodeID) ([]kube.Meta, error) {
	var raw json.RawMessage
	if err := c.Get(ctx, "/api/v1/pods?limit=2000&fieldSelector=spec.nodeName%3D"+string(node), &raw); err != nil {
		return nil, fmt.Errorf("k3s: list pods: %w", err)
	}
	return parsePods(raw)
}

func parsePods(b []byte) ([]kube.Meta, error) {
	var l struct {
		Items []struct {
			Metadata kube.Meta `json:"metadata"`
			Status   struct {
				Phase string `json:"phase"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("k3s: list pods: %w", err)
	}
	var out []kube.Meta
	for _, p := range l.Items[:min(len(l.Items), maxPods)] {
		daemon := false
		for _, o := range p.Metadata.OwnerReferences {
			daemon = daemon || o.Kind == "DaemonSet" && o.Controller
		}
		_, static := p.Metadata.Annotations["kubernetes.io/config.mirror"]
		name := p.Metadata.Namespace + p.Metadata.Name
		if daemon || static || p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" || name == "" || strings.ContainsAny(name, "/?#%") {
			continue
		}
		out = append(out, p.Metadata)
	}
	return out, nil
}
