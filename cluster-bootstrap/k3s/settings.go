package k3s

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// InSiteLink is the dummy link that carries the in-site address.
const InSiteLink = "muster0"

// SettingsOf works the settings of node self out of the documents. servers are
// the servers to join by, best first (self among them is skipped); lan is this
// node's address for sites without in-site addresses.
func SettingsOf(docs clusterbootstrap.Documents, self fleet.NodeID, servers []fleet.NodeID, lan netip.Addr) (Settings, error) {
	adm, ok := docs.Admitted(self)
	if !ok || docs.Charter == nil {
		return Settings{}, fmt.Errorf("k3s: settings: node %s has no charter or admission", self)
	}
	s := Settings{Self: self, Birth: docs.Charter.Birth, Labels: adm.Labels}
	if adm.Address != "" {
		a, err := netip.ParseAddr(adm.Address)
		if err != nil {
			return Settings{}, fmt.Errorf("k3s: settings: in-site address: %w", err)
		}
		s.Address = a
		// A VXLAN or host-gw route on a dummy link leads nowhere; these two
		// go by the LAN's own addresses.
		if b := s.Birth.FlannelBackend; b == "wireguard-native" {
			s.Interface = InSiteLink
		}
	} else {
		s.Address = lan
	}
	seen := map[fleet.NodeID]bool{}
	for _, a := range docs.Admissions {
		x, ok := docs.Admitted(a.Node)
		if !ok || !x.MayServe || seen[a.Node] || x.Address == "" {
			continue
		}
		seen[a.Node] = true
		if addr, err := netip.ParseAddr(x.Address); err == nil {
			s.Servers = append(s.Servers, addr)
		}
	}
	slices.SortFunc(s.Servers, netip.Addr.Compare)
	for _, n := range servers {
		if n == self {
			continue
		}
		if x, ok := docs.Admitted(n); ok && x.Address != "" {
			if addr, err := netip.ParseAddr(x.Address); err == nil {
				s.Join = JoinURL(addr)
				break
			}
		}
	}
	return s, nil
}

// JoinURL is the URL by which a server is joined.
func JoinURL(a netip.Addr) string { return "https://" + net.JoinHostPort(a.String(), "6443") }

// Validate reports all problems for a start as role.
func (s Settings) Validate(role clusterbootstrap.Role) error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("k3s: settings: "+format, args...))
		}
	}
	errs = append(errs, s.Self.Validate())
	check(s.Address.IsValid() && !s.Address.IsUnspecified() && !s.Address.IsLoopback(), "address %s cannot be node-ip", s.Address)
	switch role {
	case clusterbootstrap.RoleWorker, clusterbootstrap.RoleCandidate:
		check(strings.HasPrefix(s.Join, "https://"), "a %s needs a server to join by, not %.80q", role, s.Join)
	case clusterbootstrap.RoleServer:
		check(s.Join == "" || strings.HasPrefix(s.Join, "https://"), "server to join by %.80q", s.Join)
	default:
		check(false, "role %s runs no k3s", role)
	}
	check(s.Join == "" || s.Join != JoinURL(s.Address), "node %s cannot join by itself", s.Self)
	for k := range s.Extra {
		check(!slices.Contains(launch.Ours, k), "extra setting %q is decided elsewhere", k)
	}
	return errors.Join(errs...)
}

// critical returns what must be the same on all servers of a cluster: what k3s
// compares when a server joins, and what it does not compare although it ends
// badly. All of it follows from the charter; the rest has the values that k3s
// itself has, which are the same as long as the versions are.
func critical(b fleet.BirthSettings) map[string]any {
	m := map[string]any{
		"cluster-cidr":       b.ClusterCIDR,
		"service-cidr":       b.ServiceCIDR,
		"cluster-dns":        b.ClusterDNS,
		"flannel-backend":    b.FlannelBackend,
		"secrets-encryption": b.SecretsEncryption,
		// Applied by every member when one is added: unequal values make
		// members that disagree.
		"etcd-arg": []string{fmt.Sprintf("max-learners=%d", max(b.MaxLearners, 1))},
	}
	if len(b.Disable) > 0 {
		d := slices.Clone(b.Disable)
		slices.Sort(d)
		m["disable"] = d
	}
	return m
}

// CriticalDigest stands for everything that k3s wants to be the same on all
// servers of a cluster, and max-learners: 64 hex digits.
func CriticalDigest(b fleet.BirthSettings) string {
	j, err := json.Marshal(critical(b)) // sorts the keys
	if err != nil {
		panic("k3s: digest of critical settings: " + err.Error()) // strings and numbers only
	}
	h := sha256.Sum256(j)
	return hex.EncodeToString(h[:])
}

// config returns the content of config.yaml. v1 is a host with cgroup v1.
func (s Settings) config(role clusterbootstrap.Role, p Paths, v1 bool) ([]byte, error) {
	if err := s.Validate(role); err != nil {
		return nil, err
	}
	m := map[string]any{
		"node-name": string(s.Self),
		"node-ip":   []string{s.Address.String()},
		"data-dir":  p.Data,
	}
	if s.Interface != "" {
		m["flannel-iface"] = s.Interface
	}
	if labels, _ := NodeLabels(s.Labels); len(labels) > 0 {
		m["node-label"] = labels
	}
	if v1 {
		// The kubelet refuses to run on cgroup v1 unless told otherwise. Never
		// set on v2, where the default may mean something one day.
		m["kubelet-arg"] = []string{"fail-cgroupv1=false"}
	}
	if s.Join != "" {
		m["server"] = s.Join
	}
	if role == clusterbootstrap.RoleWorker {
		// A worker that has its certificate needs no token.
		if f := filepath.Join(p.Tokens(), tokenJoin); exists(f) {
			m["token-file"] = f
		}
	} else {
		for k, v := range critical(s.Birth) {
			m[k] = v
		}
		m["token-file"] = filepath.Join(p.Tokens(), tokenServer)
		m["agent-token-file"] = filepath.Join(p.Tokens(), tokenAgent)
		san := []string{s.Address.String()}
		for _, a := range s.Servers {
			if x := a.String(); !slices.Contains(san, x) {
				san = append(san, x)
			}
		}
		slices.Sort(san)
		m["tls-san"] = san
		// A reset can only go back to a snapshot that exists: hourly.
		m["etcd-snapshot-schedule-cron"] = "7 * * * *"
		m["etcd-snapshot-retention"] = 24
	}
	for k, v := range s.Extra {
		if role == clusterbootstrap.RoleWorker && !slices.Contains(launch.AgentKeys, k) {
			continue // an agent fails on it
		}
		if old, ok := m[k].([]string); ok {
			add, err := stringList(v)
			if err != nil {
				return nil, fmt.Errorf("k3s: settings: extra %q: %w", k, err)
			}
			v = append(slices.Clone(old), add...)
		}
		m[k] = v
	}
	b, err := yaml.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("k3s: write config: %w", err)
	}
	return append([]byte("# Written by muster for the role "+role.String()+"; changes are lost.\n# Own settings belong into "+p.DropIns()+"/*.yaml.\n"), b...), nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// hasCertificate: a power cut can leave a file with nothing in it.
func hasCertificate(path string) bool {
	b, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	p, _ := pem.Decode(b)
	return p != nil && p.Type == "CERTIFICATE"
}

// dropTorn removes what a power cut emptied among an agent's keys and
// certificates: k3s makes what is missing and fails on what is empty.
func dropTorn(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("k3s: look for torn files: %w", err)
	}
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".crt", ".key", ".kubeconfig":
			if i, err := e.Info(); err == nil && i.Mode().IsRegular() && i.Size() == 0 {
				if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
					return fmt.Errorf("k3s: remove torn file: %w", err)
				}
			}
		}
	}
	return nil
}

func stringList(v any) ([]string, error) {
	switch v := v.(type) {
	case string:
		return []string{v}, nil
	case []string:
		return v, nil
	case []any:
		var out []string
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return nil, errors.New("want a list of strings")
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, errors.New("want a list of strings")
}

// cgroupV1 reports whether the host has no unified hierarchy at the root, the
// same test as the kubelet's.
func cgroupV1() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err != nil
}

var (
	labelName  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`)
	labelValue = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$`)
	dnsName    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// kubeletMaySet are the labels below kubernetes.io and k8s.io that a kubelet
// may set on its own Node; it refuses to start with any other (KEP-279).
var kubeletMaySet = []string{"kubernetes.io/hostname", "kubernetes.io/arch", "kubernetes.io/os", "beta.kubernetes.io/arch",
	"beta.kubernetes.io/os", "beta.kubernetes.io/instance-type", "node.kubernetes.io/instance-type",
	"failure-domain.beta.kubernetes.io/region", "failure-domain.beta.kubernetes.io/zone", "failure-domain.kubernetes.io/region",
	"failure-domain.kubernetes.io/zone", "topology.kubernetes.io/region", "topology.kubernetes.io/zone"}

const maxLabels = 64

// NodeLabels splits labels into those that a kubelet may set on its own Node,
// as "key=value", sorted, and the reasons why the others are left out: a bad
// label must not keep a node from running.
func NodeLabels(labels map[string]string) (ok []string, refused []error) {
	keys := make([]string, 0, len(labels))
	for k := range labels {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		if why := labelProblem(k, labels[k]); why != "" {
			refused = append(refused, fmt.Errorf("k3s: label %.80q: %s", k, why))
			continue
		}
		if len(ok) == maxLabels {
			refused = append(refused, fmt.Errorf("k3s: label %.80q: more than %d", k, maxLabels))
			continue
		}
		ok = append(ok, k+"="+labels[k])
	}
	return ok, refused
}

func labelProblem(k, v string) string {
	prefix, name, has := strings.Cut(k, "/")
	if !has {
		prefix, name = "", k
	}
	switch {
	case !labelName.MatchString(name) || has && !dnsName.MatchString(prefix):
		return "not the form of a Kubernetes label"
	case !labelValue.MatchString(v):
		return "the value has not the form of a Kubernetes label value"
	case slices.Contains(kubeletMaySet, k), under(prefix, "kubelet.kubernetes.io"), under(prefix, "node.kubernetes.io"):
		return ""
	case under(prefix, "kubernetes.io"), under(prefix, "k8s.io"):
		return "a kubelet may not set this label on its own node"
	}
	return ""
}

func under(prefix, domain string) bool {
	return prefix == domain || strings.HasSuffix(prefix, "."+domain)
}
