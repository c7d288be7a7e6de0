package launch

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// AgentKeys are the settings a k3s agent knows. It refuses to start with any
// other, while a server skips what it does not know.
var AgentKeys = []string{"server", "token", "token-file", "data-dir", "node-name", "with-node-id", "node-label", "node-taint", "node-ip",
	"node-external-ip", "node-internal-dns", "node-external-dns", "bind-address", "lb-server-port", "resolv-conf", "flannel-iface",
	"flannel-conf", "flannel-cni-conf", "kubelet-arg", "kube-proxy-arg", "snapshotter", "private-registry", "pause-image",
	"default-runtime", "container-runtime-endpoint", "image-service-endpoint", "protect-kernel-defaults", "selinux", "prefer-bundled-bin",
	"rootless", "debug", "v", "vmodule", "alsologtostderr", "disable-apiserver-lb", "disable-default-registry-endpoint",
	"airgap-extra-registry", "node-name-from-cloud-provider-metadata", "vpn-auth", "vpn-auth-file"}

// Ours are the settings that an operator's own files may not contain: they
// are decided by charter, admission and plan.
var Ours = []string{"cluster-init", "cluster-reset", "cluster-reset-restore-path", "server", "token", "token-file", "agent-token",
	"agent-token-file", "data-dir", "node-name", "with-node-id", "node-ip", "node-external-ip", "advertise-address", "datastore-endpoint",
	"cluster-cidr", "service-cidr", "cluster-dns", "cluster-domain", "disable-cloud-controller", "disable-helm-controller",
	"disable-network-policy", "disable", "secrets-encryption", "secrets-encryption-provider", "embedded-registry", "flannel-backend",
	"flannel-ipv6-masq", "flannel-external-ip", "egress-selector-mode", "supervisor-metrics", "etcd-arg", "https-listen-port", "log"}

// ParseConfig reads a config file of k3s: a flat map, keys without a trailing
// "+" (which appends).
func ParseConfig(b []byte) (map[string]any, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("launch: read config: larger than %d bytes", maxFile)
	}
	var m map[string]any
	if err := yaml.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("launch: read config: %w", err)
	}
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[strings.TrimSuffix(k, "+")] = v
	}
	return out, nil
}

// checkConfig looks at what k3s will read: whether it names a server to join,
// and whether something in it would make k3s fail or be another than it should.
func checkConfig(p Paths, role Role) (joins bool, err error) {
	if role == NoRole {
		return false, nil
	}
	b, err := os.ReadFile(p.ConfigFile())
	if err != nil {
		return false, fmt.Errorf("launch: read config: %w", err)
	}
	m, err := ParseConfig(b)
	if err != nil {
		return false, err
	}
	if _, ok := m["cluster-init"]; ok {
		return false, errors.New("launch: the config contains cluster-init: a replaced disk would make a second cluster of it")
	}
	if role == Worker {
		if k := foreign(m); k != "" {
			return false, fmt.Errorf("launch: the config contains %q, which an agent does not know", k)
		}
	}
	s, _ := m["server"].(string)
	names, err := filepath.Glob(filepath.Join(p.DropIns(), "*.y*ml"))
	if err != nil {
		return false, fmt.Errorf("launch: read config: %w", err)
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("launch: read config: %w", err)
		}
		d, err := ParseConfig(b)
		if err != nil {
			return false, fmt.Errorf("%w (%s)", err, n)
		}
		for k := range d {
			if slices.Contains(Ours, k) {
				return false, fmt.Errorf("launch: %s sets %q, which is decided by the site's documents", n, k)
			}
		}
		if k := foreign(d); role == Worker && k != "" {
			return false, fmt.Errorf("launch: %s sets %q, which an agent does not know", n, k)
		}
	}
	return strings.HasPrefix(s, "https://"), nil
}

// foreign returns a key that no agent knows, the first in order.
func foreign(m map[string]any) string {
	var bad []string
	for k := range m {
		if !slices.Contains(AgentKeys, k) {
			bad = append(bad, k)
		}
	}
	if len(bad) == 0 {
		return ""
	}
	return slices.Min(bad)
}
