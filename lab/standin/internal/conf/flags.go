// Package conf reads the command line, the environment and the configuration
// files of the stand-in by the rules of k3s: files become arguments that stand
// before those of the command line; a later file replaces a key, `key+`
// appends; keys that `server` does not know are skipped with a warning, keys
// that `agent` does not know end the process.
package conf

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

type kind int

const (
	text kind = iota
	boolean
	list  // repeated, commas separate
	slist // repeated, commas are part of the value
)

type flagDef struct {
	name   string
	alias  string
	kind   kind
	def    string
	env    string
	server bool
	agent  bool
}

// flags is every flag the stand-in accepts. Those without a reader are
// accepted and kept only because a configuration for k3s may hold them.
var flags = []flagDef{
	{name: "config", alias: "c", env: "K3S_CONFIG_FILE", def: "/etc/rancher/k3s/config.yaml", server: true, agent: true},
	{name: "debug", kind: boolean, server: true, agent: true},
	{name: "v", server: true, agent: true, def: "0"},
	{name: "vmodule", server: true, agent: true},
	{name: "log", alias: "l", server: true, agent: true},
	{name: "alsologtostderr", kind: boolean, server: true, agent: true},
	{name: "data-dir", alias: "d", env: "K3S_DATA_DIR", def: "/var/lib/rancher/k3s", server: true, agent: true},
	{name: "server", alias: "s", env: "K3S_URL", server: true, agent: true},
	{name: "token", alias: "t", env: "K3S_TOKEN", server: true, agent: true},
	{name: "token-file", env: "K3S_TOKEN_FILE", server: true, agent: true},
	{name: "agent-token", env: "K3S_AGENT_TOKEN", server: true},
	{name: "agent-token-file", env: "K3S_AGENT_TOKEN_FILE", server: true},
	{name: "cluster-init", kind: boolean, env: "K3S_CLUSTER_INIT", server: true},
	{name: "cluster-reset", kind: boolean, env: "K3S_CLUSTER_RESET", server: true},
	{name: "cluster-reset-restore-path", server: true},
	{name: "bind-address", server: true, agent: true},
	{name: "https-listen-port", def: "6443", server: true},
	{name: "advertise-address", server: true},
	{name: "advertise-port", server: true},
	{name: "tls-san", kind: list, server: true},
	{name: "tls-san-security", kind: boolean, def: "true", server: true},
	{name: "cluster-cidr", kind: list, def: "10.42.0.0/16", server: true},
	{name: "service-cidr", kind: list, def: "10.43.0.0/16", server: true},
	{name: "cluster-dns", kind: list, def: "10.43.0.10", server: true},
	{name: "cluster-domain", def: "cluster.local", server: true},
	{name: "service-node-port-range", def: "30000-32767", server: true},
	{name: "flannel-backend", def: "vxlan", server: true},
	{name: "flannel-ipv6-masq", kind: boolean, server: true},
	{name: "flannel-external-ip", kind: boolean, server: true},
	{name: "egress-selector-mode", def: "agent", server: true},
	{name: "servicelb-namespace", def: "kube-system", server: true},
	{name: "supervisor-metrics", kind: boolean, server: true},
	{name: "disable", kind: list, server: true},
	{name: "disable-scheduler", kind: boolean, server: true},
	{name: "disable-cloud-controller", kind: boolean, server: true},
	{name: "disable-kube-proxy", kind: boolean, server: true},
	{name: "disable-network-policy", kind: boolean, server: true},
	{name: "disable-helm-controller", kind: boolean, server: true},
	{name: "disable-controller-manager", kind: boolean, server: true},
	{name: "disable-agent", kind: boolean, server: true},
	{name: "embedded-registry", kind: boolean, server: true},
	{name: "secrets-encryption", kind: boolean, server: true},
	{name: "secrets-encryption-provider", def: "aescbc", server: true},
	{name: "etcd-snapshot-schedule-cron", def: "0 */12 * * *", server: true},
	{name: "etcd-snapshot-retention", def: "5", server: true},
	{name: "etcd-snapshot-dir", alias: "dir", server: true},
	{name: "etcd-snapshot-name", def: "etcd-snapshot", server: true},
	{name: "etcd-snapshot-compress", kind: boolean, server: true},
	{name: "etcd-snapshot-reconcile-interval", def: "10m", server: true},
	{name: "etcd-disable-snapshots", kind: boolean, server: true},
	{name: "etcd-expose-metrics", kind: boolean, server: true},
	{name: "etcd-arg", kind: slist, server: true},
	{name: "kube-apiserver-arg", kind: slist, server: true},
	{name: "kube-controller-manager-arg", kind: slist, server: true},
	{name: "kube-cloud-controller-manager-arg", kind: slist, server: true},
	{name: "kube-scheduler-arg", kind: slist, server: true},
	{name: "helm-controller-arg", kind: slist, server: true},
	{name: "kubelet-arg", kind: slist, server: true, agent: true},
	{name: "kube-proxy-arg", kind: slist, server: true, agent: true},
	{name: "write-kubeconfig", alias: "o", env: "K3S_KUBECONFIG_OUTPUT", def: "/etc/rancher/k3s/k3s.yaml", server: true},
	{name: "write-kubeconfig-mode", env: "K3S_KUBECONFIG_MODE", server: true},
	{name: "write-kubeconfig-group", env: "K3S_KUBECONFIG_GROUP", server: true},
	{name: "write-kubeconfig-name", env: "K3S_KUBECONFIG_NAME", server: true},
	{name: "system-default-registry", env: "K3S_SYSTEM_DEFAULT_REGISTRY", server: true},
	{name: "private-registry", def: "/etc/rancher/k3s/registries.yaml", server: true, agent: true},
	{name: "disable-default-registry-endpoint", kind: boolean, server: true, agent: true},
	{name: "node-ip", alias: "i", kind: list, server: true, agent: true},
	{name: "node-external-ip", kind: list, server: true, agent: true},
	{name: "node-internal-dns", kind: list, server: true, agent: true},
	{name: "node-external-dns", kind: list, server: true, agent: true},
	{name: "node-name", env: "K3S_NODE_NAME", server: true, agent: true},
	{name: "with-node-id", kind: boolean, server: true, agent: true},
	{name: "node-label", kind: slist, server: true, agent: true},
	{name: "node-taint", kind: slist, server: true, agent: true},
	{name: "flannel-iface", server: true, agent: true},
	{name: "flannel-conf", server: true, agent: true},
	{name: "flannel-cni-conf", server: true, agent: true},
	{name: "lb-server-port", env: "K3S_LB_SERVER_PORT", def: "6444", server: true, agent: true},
	{name: "resolv-conf", env: "K3S_RESOLV_CONF", server: true, agent: true},
	{name: "selinux", kind: boolean, env: "K3S_SELINUX", server: true, agent: true},
	{name: "prefer-bundled-bin", kind: boolean, server: true, agent: true},
	{name: "protect-kernel-defaults", kind: boolean, server: true, agent: true},
	{name: "rootless", kind: boolean, server: true, agent: true},
	{name: "snapshotter", def: "overlayfs", server: true, agent: true},
	{name: "pause-image", server: true, agent: true},
	{name: "docker", kind: boolean, server: true, agent: true},
	{name: "default-runtime", server: true, agent: true},
	{name: "container-runtime-endpoint", server: true, agent: true},
	{name: "image-service-endpoint", server: true, agent: true},
	{name: "disable-apiserver-lb", kind: boolean, agent: true},
	{name: "vpn-auth", env: "K3S_VPN_AUTH", server: true, agent: true},
	{name: "vpn-auth-file", env: "K3S_VPN_AUTH_FILE", server: true, agent: true},
}

// ErrUsage means the command line or a configuration file could not be used.
var ErrUsage = errors.New("incorrect usage")

// Values holds what was set, by flag name.
type Values struct {
	role string
	m    map[string][]string
	set  map[string]bool
}

// Str is the last value of a flag.
func (v *Values) Str(name string) string {
	if s := v.m[name]; len(s) > 0 {
		return s[len(s)-1]
	}
	return ""
}

// Bool tells whether a flag is true.
func (v *Values) Bool(name string) bool { return v.Str(name) == "true" }

// List is every value of a flag.
func (v *Values) List(name string) []string { return v.m[name] }

// IsSet tells whether a flag was given anywhere.
func (v *Values) IsSet(name string) bool { return v.set[name] }

type value struct {
	v    *Values
	d    flagDef
	seen bool
}

func (f *value) String() string   { return "" }
func (f *value) IsBoolFlag() bool { return f.d.kind == boolean }

func (f *value) Set(s string) error {
	if f.d.kind == boolean {
		switch strings.ToLower(s) {
		case "true", "1", "t":
			s = "true"
		case "false", "0", "f":
			s = "false"
		default:
			return fmt.Errorf("parse error")
		}
	}
	var add []string
	if f.d.kind == list {
		for _, p := range strings.Split(s, ",") {
			if p = strings.TrimSpace(p); p != "" {
				add = append(add, p)
			}
		}
	} else {
		add = []string{s}
	}
	if !f.seen || (f.d.kind != list && f.d.kind != slist) {
		f.v.m[f.d.name] = nil
	}
	f.seen = true
	f.v.set[f.d.name] = true
	f.v.m[f.d.name] = append(f.v.m[f.d.name], add...)
	return nil
}

func known(role, name string) bool {
	for _, d := range flags {
		if (d.name == name || (d.alias != "" && d.alias == name)) && ((role == "server" && d.server) || (role == "agent" && d.agent)) {
			return true
		}
	}
	return false
}

// Parse reads args (without the command's name) for a role, with the
// configuration files. Warnings go to warn.
func Parse(role string, args []string, warn func(string)) (*Values, error) {
	fileArgs, err := configArgs(role, args, warn)
	if err != nil {
		return nil, err
	}
	v := &Values{role: role, m: map[string][]string{}, set: map[string]bool{}}
	fs := flag.NewFlagSet(role, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, d := range flags {
		if (role == "server" && !d.server) || (role == "agent" && !d.agent) {
			continue
		}
		f := &value{v: v, d: d}
		if d.def != "" {
			if err := f.Set(d.def); err != nil {
				return nil, err
			}
			f.seen, v.set[d.name] = false, false
		}
		if e := os.Getenv(d.env); d.env != "" && e != "" {
			if err := f.Set(e); err != nil {
				return nil, fmt.Errorf("%w: %s: %v", ErrUsage, d.env, err)
			}
			f.seen = false
		}
		fs.Var(f, d.name, "")
		if d.alias != "" {
			fs.Var(f, d.alias, "")
		}
	}
	if err := fs.Parse(append(fileArgs, args...)); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrUsage, err)
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("%w: unexpected argument %q", ErrUsage, fs.Arg(0))
	}
	return v, nil
}
