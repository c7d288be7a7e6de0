package k3s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/muster-edge/muster/cluster-bootstrap/k3s/kube"
	"github.com/muster-edge/muster/fleet"
)

// dbMember is one member as /db/info lists it.
type dbMember struct {
	ID       uint64   `json:"ID"`
	Name     string   `json:"name"`
	PeerURLs []string `json:"peerURLs"`
	Learner  bool     `json:"isLearner"`
}

// member is a member whose node is known.
type member struct {
	dbMember
	node fleet.NodeID
}

const maxMembers = 64

// dbInfo asks this server for the members of its etcd. It takes quorum.
func dbInfo(ctx context.Context, c *kube.Client) ([]dbMember, error) {
	var raw json.RawMessage
	if err := c.Get(ctx, "/db/info", &raw); err != nil {
		return nil, err
	}
	return parseInfo(raw)
}

func parseInfo(b []byte) ([]dbMember, error) {
	var l struct {
		Members []dbMember `json:"members"`
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("k3s: read /db/info: %w", err)
	}
	if len(l.Members) == 0 || len(l.Members) > maxMembers {
		return nil, fmt.Errorf("k3s: read /db/info: %d members", len(l.Members))
	}
	return l.Members, nil
}

var memberName = regexp.MustCompile(`^(.+)-[0-9a-f]{8}$`)

// nameMembers says which node each member is: by its name, or, for one that
// never started and so has none, by its address and the Node objects; what was
// known before helps when there are none.
func nameMembers(raw []dbMember, nodes []nodeStatus, before []member) []member {
	out := make([]member, 0, len(raw))
	for _, r := range raw {
		x := member{dbMember: r}
		if m := memberName.FindStringSubmatch(r.Name); m != nil {
			x.node = fleet.NodeID(m[1])
		} else if r.Name != "" {
			x.node = fleet.NodeID(r.Name[:min(len(r.Name), 253)])
		} else {
			x.node = byAddress(r, nodes)
			for _, b := range before {
				if x.node == "" && b.ID == r.ID {
					x.node = b.node
				}
			}
		}
		out = append(out, x)
	}
	return out
}

func byAddress(r dbMember, nodes []nodeStatus) fleet.NodeID {
	for _, u := range r.PeerURLs {
		p, err := url.Parse(u)
		if err != nil {
			continue
		}
		a, err := netip.ParseAddr(p.Hostname())
		if err != nil {
			continue
		}
		for _, n := range nodes {
			if slices.Contains(n.addrs, a) {
				return n.id
			}
		}
	}
	return ""
}

const (
	etcdPrefix = "etcd.k3s.cattle.io/"
	rolePrefix = "node-role.kubernetes.io/"
	// controllerTime is how long k3s' own controller may take to remove a
	// member before etcd is told directly.
	controllerTime = 30 * time.Second
	memberPoll     = 500 * time.Millisecond
)

// RemoveServer takes node out of the etcd members and waits until it is gone
// or ctx ends. With keepNode its Node object stays (it comes back as a worker
// under its old name, certificate and password), without the marks of a
// server; else it is deleted, as the certificate of a deleted Node is void.
// A stuck learner is removed the same way. Repeating it is no error.
func (m *Manager) RemoveServer(ctx context.Context, node fleet.NodeID, keepNode bool) error {
	if node == m.cfg.Self {
		return errors.New("k3s: remove server: a server does not remove itself")
	}
	if node != "" {
		if err := node.Validate(); err != nil {
			return fmt.Errorf("k3s: remove server: %w", err)
		}
	} else if !keepNode {
		return errors.New("k3s: remove server: no name")
	}
	c, err := m.admin()
	if err != nil {
		return err
	}
	list, err := m.members(ctx, c)
	if err != nil {
		return fmt.Errorf("k3s: remove server %s: %w", node, err)
	}
	if of := membersOf(list, node); len(of) > 0 {
		if err := lastVoter(list, of); err != nil {
			return err
		}
		if node != "" {
			if err := m.askController(ctx, c, node, keepNode); err != nil {
				return err
			}
		}
	}
	if err := m.dropMembers(ctx, c, node); err != nil {
		return err
	}
	if node == "" {
		return nil
	}
	if keepNode {
		return m.unmark(ctx, c, node)
	}
	if err := c.Delete(ctx, nodePath(node)); err != nil {
		return fmt.Errorf("k3s: remove server %s: %w", node, err)
	}
	return nil
}

func (m *Manager) members(ctx context.Context, c *kube.Client) ([]member, error) {
	raw, err := dbInfo(ctx, c)
	if err != nil {
		return nil, err
	}
	nodes, err := listNodes(ctx, c)
	if err != nil {
		return nil, err
	}
	return nameMembers(raw, nodes, m.seen.members), nil
}

func membersOf(list []member, node fleet.NodeID) []member {
	return slices.DeleteFunc(slices.Clone(list), func(x member) bool { return x.node != node })
}

// lastVoter refuses to leave the cluster without a voter.
func lastVoter(list, going []member) error {
	left := 0
	for _, x := range list {
		if !x.Learner && !slices.ContainsFunc(going, func(g member) bool { return g.ID == x.ID }) {
			left++
		}
	}
	if left == 0 {
		return errors.New("k3s: remove server: it is the only voter")
	}
	return nil
}

// askController has k3s remove the member: it moves the leadership away first
// and cleans up behind itself. It can do so only if the node ever came up as a
// server; else nothing happens here, and etcd is told directly.
func (m *Manager) askController(ctx context.Context, c *kube.Client, node fleet.NodeID, keepNode bool) error {
	var n struct {
		Metadata kube.Meta `json:"metadata"`
	}
	err := c.Get(ctx, nodePath(node), &n)
	if kube.IsStatus(err, 404) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("k3s: remove server %s: %w", node, err)
	}
	a := n.Metadata.Annotations
	if n.Metadata.Labels[rolePrefix+"etcd"] == "" || a[etcdPrefix+"node-name"] == "" || a[etcdPrefix+"node-address"] == "" {
		return nil
	}
	if keepNode {
		err = c.Patch(ctx, nodePath(node), kube.MergePatch, map[string]any{
			"metadata": map[string]any{"annotations": map[string]any{etcdPrefix + "remove": "true"}}})
	} else {
		err = c.Delete(ctx, nodePath(node))
	}
	if err != nil {
		return fmt.Errorf("k3s: remove server %s: %w", node, err)
	}
	ctx, cancel := context.WithTimeout(ctx, controllerTime)
	defer cancel()
	_ = m.untilGone(ctx, c, node) // dropMembers looks again
	return nil
}

func (m *Manager) untilGone(ctx context.Context, c *kube.Client, node fleet.NodeID) error {
	t := time.NewTicker(memberPoll)
	defer t.Stop()
	for {
		list, err := m.members(ctx, c)
		if err == nil && len(membersOf(list, node)) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("k3s: remove server %s: %w", node, ctx.Err()), err)
		case <-t.C:
		}
	}
}

// dropMembers tells etcd itself to remove what is left of node.
func (m *Manager) dropMembers(ctx context.Context, c *kube.Client, node fleet.NodeID) error {
	list, err := m.members(ctx, c)
	if err != nil {
		return fmt.Errorf("k3s: remove server %s: %w", node, err)
	}
	going := membersOf(list, node)
	if len(going) == 0 {
		return nil
	}
	if err := lastVoter(list, going); err != nil {
		return err
	}
	e, err := newEtcd(filepath.Join(m.cfg.Paths.Server(), "tls", "etcd"), m.etcdAddr())
	if err != nil {
		return err
	}
	defer e.close()
	for _, g := range going {
		if err := e.removeMember(ctx, g.ID); err != nil {
			return fmt.Errorf("k3s: remove server %s: %w", node, err)
		}
	}
	return m.untilGone(ctx, c, node)
}

// unmark takes the marks of a server off a Node; k3s does that only for
// servers that run without etcd.
func (m *Manager) unmark(ctx context.Context, c *kube.Client, node fleet.NodeID) error {
	null := map[string]any{}
	for _, r := range []string{"control-plane", "etcd", "master"} {
		null[rolePrefix+r] = nil
	}
	notes := map[string]any{}
	for _, a := range []string{"node-name", "node-address", "remove", "removed-node-name"} {
		notes[etcdPrefix+a] = nil
	}
	err := c.Patch(ctx, nodePath(node), kube.MergePatch, map[string]any{"metadata": map[string]any{"labels": null, "annotations": notes}})
	if err == nil {
		err = c.Patch(ctx, nodePath(node)+"/status", kube.StrategicPatch, map[string]any{
			"status": map[string]any{"conditions": []any{map[string]any{"type": "EtcdIsVoter", "$patch": "delete"}}}})
	}
	if err != nil && !kube.IsStatus(err, 404) {
		return fmt.Errorf("k3s: remove server %s: %w", node, err)
	}
	return nil
}
