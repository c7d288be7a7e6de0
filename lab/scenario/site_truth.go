package scenario

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// What a k3s server leaves on its node's disk (k3s' own layout), and where it
// listens on loopback.
const (
	k3sData    = "/var/lib/rancher/k3s"
	kubeconfig = "/etc/rancher/k3s/k3s.yaml"
	etcdPeers  = "127.0.0.1:2380"
)

// maxAnswer caps what is read of an answer of k3s.
const maxAnswer = 16 << 20

// The truth about a cluster is asked of k3s and etcd themselves, with the
// credentials on a server's disk, and never of our own programs.

// kube is the Kubernetes API as seen from one node.
type kube struct {
	b      *box
	client *http.Client
	base   string
}

// kube opens the API from a node's own network. Where a worker has no
// administrator's credentials, of's are used.
func (b *box) kube(of *box) (*kube, error) {
	text, err := os.ReadFile(of.Files() + kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("scenario: read kubeconfig of %s: %w", of.Name(), err)
	}
	var cfg struct {
		Clusters []struct {
			Cluster struct {
				Server string `json:"server"`
				CA     []byte `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
		Users []struct {
			User struct {
				Certificate []byte `json:"client-certificate-data"`
				Key         []byte `json:"client-key-data"`
			} `json:"user"`
		} `json:"users"`
	}
	if err := yaml.Unmarshal(text, &cfg); err != nil || len(cfg.Clusters) != 1 || len(cfg.Users) != 1 {
		return nil, fmt.Errorf("scenario: read kubeconfig of %s: it is not whole (%w)", of.Name(), err)
	}
	pair, err := tls.X509KeyPair(cfg.Users[0].User.Certificate, cfg.Users[0].User.Key)
	if err != nil {
		return nil, fmt.Errorf("scenario: read kubeconfig of %s: %w", of.Name(), err)
	}
	client, err := b.client(cfg.Clusters[0].Cluster.CA, pair)
	if err != nil {
		return nil, err
	}
	return &kube{b, client, cfg.Clusters[0].Cluster.Server}, nil
}

// client speaks HTTPS from the node's own network.
func (b *box) client(roots []byte, pair tls.Certificate) (*http.Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		return nil, errors.New("scenario: ask k3s: there is no CA certificate")
	}
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return b.Dial(ctx, network, address)
		},
		TLSClientConfig:   &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}},
		DisableKeepAlives: true,
	}}, nil
}

func get(ctx context.Context, c *http.Client, url string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	rsp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer rsp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(rsp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if rsp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %.200s", url, rsp.Status, body)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(body, into)
}

// ready asks the API whether it is.
func (k *kube) ready(ctx context.Context) error { return get(ctx, k.client, k.base+"/readyz", nil) }

// kubeNode is one Node object.
type kubeNode struct {
	Name   string
	Ready  bool
	Server bool
	Labels map[string]string
}

func (k *kube) nodes(ctx context.Context) ([]kubeNode, error) {
	var list struct {
		Items []struct {
			Metadata struct {
				Name   string            `json:"name"`
				Labels map[string]string `json:"labels"`
			} `json:"metadata"`
			Status struct {
				Conditions []struct {
					Type, Status string
				} `json:"conditions"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := get(ctx, k.client, k.base+"/api/v1/nodes", &list); err != nil {
		return nil, fmt.Errorf("scenario: list nodes of the cluster: %w", err)
	}
	var out []kubeNode
	for _, i := range list.Items {
		n := kubeNode{Name: i.Metadata.Name, Labels: i.Metadata.Labels}
		for _, c := range i.Status.Conditions {
			n.Ready = n.Ready || c.Type == "Ready" && c.Status == "True"
		}
		_, n.Server = n.Labels["node-role.kubernetes.io/control-plane"]
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b kubeNode) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// member is a member of etcd. Its name begins with the node's.
type member struct {
	Name    string `json:"name"`
	Learner bool   `json:"isLearner"`
}

// members asks the node's etcd for its members, by the address where its
// peers ask (etcd server/etcdserver/api/etcdhttp): that needs no quorum.
func (b *box) members(ctx context.Context) ([]member, error) {
	dir := filepath.Join(b.Files(), k3sData, "server/tls/etcd")
	roots, err := os.ReadFile(filepath.Join(dir, "peer-ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("scenario: ask etcd of %s: %w", b.Name(), err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "peer-server-client.crt"), filepath.Join(dir, "peer-server-client.key"))
	if err != nil {
		return nil, fmt.Errorf("scenario: ask etcd of %s: %w", b.Name(), err)
	}
	c, err := b.client(roots, pair)
	if err != nil {
		return nil, err
	}
	var out []member
	if err := get(ctx, c, "https://"+etcdPeers+"/members", &out); err != nil {
		return nil, fmt.Errorf("scenario: ask etcd of %s: %w", b.Name(), err)
	}
	return out, nil
}

// truth is what a cluster is, seen from one of its servers.
type truth struct {
	From    *box
	API     bool
	Nodes   []kubeNode
	Members []member
}

func (t truth) voters() (n int) {
	for _, m := range t.Members {
		if !m.Learner {
			n++
		}
	}
	return n
}

// has reports whether a node is a member of etcd, learners included.
func (t truth) has(b *box) bool {
	return slices.ContainsFunc(t.Members, func(m member) bool { return strings.HasPrefix(m.Name, string(b.ID())) })
}

func (t truth) ready() (n int) {
	for _, m := range t.Nodes {
		if m.Ready {
			n++
		}
	}
	return n
}

func (t truth) String() string {
	var nodes, members []string
	for _, n := range t.Nodes {
		text := n.Name
		if n.Server {
			text += " server"
		}
		if !n.Ready {
			text += " NOT READY"
		}
		nodes = append(nodes, text)
	}
	for _, m := range t.Members {
		text := m.Name
		if m.Learner {
			text += " learner"
		}
		members = append(members, text)
	}
	return fmt.Sprintf("seen from %s: API %v; nodes [%s]; etcd [%s]", t.From.Name(), t.API, strings.Join(nodes, ", "), strings.Join(members, ", "))
}

// hasServerData reports whether a k3s server runs or ran on the node.
func (b *box) hasServerData() bool {
	root := b.Files()
	if root == "" {
		return false
	}
	_, err := os.Stat(root + k3sData + "/server/db/etcd/member")
	return err == nil
}

// truths asks every node that has a datastore.
func (s *shop) truths(ctx context.Context) []truth {
	var out []truth
	for _, b := range s.nodes {
		if !b.hasServerData() {
			continue
		}
		t := truth{From: b}
		ctx, cancel := context.WithTimeout(ctx, 6*time.Second)
		if k, err := b.kube(b); err == nil {
			t.API = k.ready(ctx) == nil
			if t.API {
				t.Nodes, _ = k.nodes(ctx) // asked again in a moment
			}
		}
		t.Members, _ = b.members(ctx) // likewise
		cancel()
		out = append(out, t)
	}
	return out
}

// best is the truth that sees most: with an API before without.
func best(list []truth) (truth, bool) {
	var out truth
	found := false
	for _, t := range list {
		if !found || t.API && !out.API || t.API == out.API && len(t.Members) > len(out.Members) {
			out, found = t, true
		}
	}
	return out, found
}
