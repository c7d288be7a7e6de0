package k3s

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/cluster-bootstrap/k3s/kube"
)

// A cluster is virgin if nothing in it was put there by anybody but k3s and
// muster. Precisely, all of this holds:
//
//   - no PersistentVolumeClaim and no PersistentVolume;
//   - no namespace but default, kube-system, kube-public, kube-node-lease and
//     those labelled app.kubernetes.io/managed-by=muster;
//   - in these, no Deployment, StatefulSet, DaemonSet, ReplicaSet, Job, CronJob,
//     Pod, Service or Ingress but those of the stack (below);
//   - in default, no ConfigMap but kube-root-ca.crt, and no Secret;
//   - no HelmChart and no Addon but those that k3s brings;
//   - no CustomResourceDefinition outside k3s' own groups.
//
// Of the stack is what has a controlling owner (which is judged itself), what
// is labelled managed-by=muster, what an Addon of k3s owns, what the two Helm
// charts of k3s installed, the load balancer's DaemonSets of these, and
// Services kubernetes and kube-dns. Not looked at: Secrets and ConfigMaps of
// kube-system, RBAC, Nodes, events, and labels.
const (
	managedBy   = "app.kubernetes.io/managed-by"
	managedByUs = "muster"
	ownerName   = "objectset.rio.cattle.io/owner-name"
	ownerGVK    = "objectset.rio.cattle.io/owner-gvk"
)

var (
	systemNamespaces = []string{"default", "kube-system", "kube-public", "kube-node-lease"}
	k3sCharts        = []string{"traefik", "traefik-crd"}
	k3sAddons        = []string{"aggregated-metrics-reader", "auth-delegator", "auth-reader", "ccm", "coredns", "local-storage",
		"metrics-apiservice", "metrics-server-deployment", "metrics-server-service", "resource-reader", "rolebindings", "runtimes", "traefik"}
	// Groups of CRDs that k3s or its charts install.
	stackGroups = []string{"k3s.cattle.io", "helm.cattle.io", "traefik.io", "hub.traefik.io", "traefik.containo.us", "gateway.networking.k8s.io"}
	workloads   = []string{"/apis/apps/v1/deployments", "/apis/apps/v1/statefulsets", "/apis/apps/v1/daemonsets", "/apis/apps/v1/replicasets",
		"/apis/batch/v1/jobs", "/apis/batch/v1/cronjobs", "/api/v1/pods", "/api/v1/services", "/apis/networking.k8s.io/v1/ingresses"}
)

// Virgin reports whether the cluster holds nothing of anybody. Not cached; an
// error counts as no.
func (m *Manager) Virgin(ctx context.Context) (bool, error) {
	c, err := m.admin()
	if err != nil {
		return false, err
	}
	why, err := used(ctx, c)
	if err != nil {
		return false, err
	}
	if why != "" {
		m.cfg.Log.Info("the cluster is in use", "by", why)
	}
	return why == "", nil
}

// used names something in the cluster that belongs to somebody; "" if there
// is nothing.
func used(ctx context.Context, c *kube.Client) (string, error) {
	list := func(path string) ([]kube.Meta, error) {
		l, err := c.List(ctx, path)
		if err != nil {
			return nil, fmt.Errorf("k3s: look for data: %w", err)
		}
		return l, nil
	}
	// What is likeliest first. Custom kinds of k3s may not exist (yet).
	for _, q := range []struct {
		path     string
		ours     func(kube.Meta) bool
		optional bool
	}{
		{"/api/v1/persistentvolumeclaims", nobody, false},
		{"/api/v1/persistentvolumes", nobody, false},
		{"/api/v1/namespaces", func(m kube.Meta) bool {
			return slices.Contains(systemNamespaces, m.Name) || m.Labels[managedBy] == managedByUs
		}, false},
		{"/apis/apiextensions.k8s.io/v1/customresourcedefinitions", func(m kube.Meta) bool {
			_, group, _ := strings.Cut(m.Name, ".")
			return slices.Contains(stackGroups, group)
		}, false},
		{"/apis/helm.cattle.io/v1/helmcharts", named(k3sCharts), true},
		{"/apis/k3s.cattle.io/v1/addons", named(k3sAddons), true},
		{"/api/v1/namespaces/default/configmaps", named([]string{"kube-root-ca.crt"}), false},
		{"/api/v1/namespaces/default/secrets", named(nil), false},
	} {
		l, err := list(q.path)
		if q.optional && kube.IsStatus(err, 404) {
			continue
		}
		if err != nil {
			return "", err
		}
		for _, m := range l {
			if !q.ours(m) {
				return q.path + " " + m.Namespace + "/" + m.Name, nil
			}
		}
	}
	for _, path := range workloads {
		l, err := list(path)
		if err != nil {
			return "", err
		}
		for _, m := range l {
			if !ofTheStack(m) {
				return path + " " + m.Namespace + "/" + m.Name, nil
			}
		}
	}
	return "", nil
}

func nobody(kube.Meta) bool { return false }

func named(names []string) func(kube.Meta) bool {
	return func(m kube.Meta) bool { return slices.Contains(names, m.Name) || m.Labels[managedBy] == managedByUs }
}

func ofTheStack(m kube.Meta) bool {
	for _, o := range m.OwnerReferences {
		if o.Controller {
			return true
		}
	}
	a := m.Annotations
	switch {
	case m.Labels[managedBy] == managedByUs:
		return true
	case m.Namespace == "default" && m.Name == "kubernetes", m.Namespace == "kube-system" && m.Name == "kube-dns":
		return true
	case m.Namespace != "kube-system":
		return false
	case strings.HasPrefix(a[ownerGVK], "k3s.cattle.io/") && slices.Contains(k3sAddons, a[ownerName]):
		return true
	case strings.HasPrefix(a[ownerGVK], "helm.cattle.io/") && slices.Contains(k3sCharts, a[ownerName]):
		return true
	case slices.Contains(k3sCharts, a["meta.helm.sh/release-name"]) && a["meta.helm.sh/release-namespace"] == "kube-system":
		return true
	case slices.Contains(k3sCharts, m.Labels["svccontroller.k3s.cattle.io/svcname"]):
		return true
	}
	return false
}
