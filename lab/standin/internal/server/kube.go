package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

const (
	labelEtcd     = "node-role.kubernetes.io/etcd"
	labelControl  = "node-role.kubernetes.io/control-plane"
	annName       = "etcd.k3s.cattle.io/node-name"
	annAddress    = "etcd.k3s.cattle.io/node-address"
	annRemove     = "etcd.k3s.cattle.io/remove"
	annRemoved    = "etcd.k3s.cattle.io/removed-node-name"
	condVoter     = "EtcdIsVoter"
	finalizer     = "wrangler.cattle.io/managed-etcd-controller"
	graceOfNodes  = 50 * time.Second
	controlPeriod = 2 * time.Second
)

// kube is the way to this server's own apiserver.
type kube struct {
	c   kubernetes.Interface
	ext apiextensions.Interface
	dyn dynamic.Interface
}

func newKube(cfg *rest.Config) (*kube, error) {
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	ext, err := apiextensions.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	dyn, err := dynamic.NewForConfig(cfg)
	return &kube{c, ext, dyn}, err
}

func (k *kube) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := k.c.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
	return err == nil
}

func (k *kube) nodeGone(ctx context.Context, name string) (bool, error) {
	_, err := k.c.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return false, err
}

// crds are those of k3s that muster may read or write. HelmCharts are stored;
// nothing installs them.
var crds = []struct {
	group, kind, plural string
	namespaced          bool
}{
	{"k3s.cattle.io", "Addon", "addons", true},
	{"k3s.cattle.io", "ETCDSnapshotFile", "etcdsnapshotfiles", false},
	{"helm.cattle.io", "HelmChart", "helmcharts", true},
	{"helm.cattle.io", "HelmChartConfig", "helmchartconfigs", true},
}

// hooks is what a server does once its apiserver answers and before it says
// that it is ready.
func (s *server) hooks(ctx context.Context, k *kube) error {
	if err := s.kubeconfig(); err != nil {
		return err
	}
	for _, d := range crds {
		keep := true
		scope := apiextensionsv1.ClusterScoped
		if d.namespaced {
			scope = apiextensionsv1.NamespaceScoped
		}
		_, err := k.ext.ApiextensionsV1().CustomResourceDefinitions().Create(ctx, &apiextensionsv1.CustomResourceDefinition{
			ObjectMeta: metav1.ObjectMeta{Name: d.plural + "." + d.group},
			Spec: apiextensionsv1.CustomResourceDefinitionSpec{
				Group: d.group, Scope: scope,
				Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: d.plural, Singular: strings.ToLower(d.kind), Kind: d.kind, ListKind: d.kind + "List"},
				Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{
					Name: "v1", Served: true, Storage: true,
					Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{
						Type: "object", XPreserveUnknownFields: &keep,
					}},
					Subresources: &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{}},
				}},
			},
		}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	return nil
}

// controllers runs what belongs to every server and, behind one Lease, what
// only one of them may do. Like k3s, a server that loses the Lease ends with
// status 1: without a quorum no server can keep it.
func (s *server) controllers(ctx context.Context, k *kube) {
	go s.every(ctx, "node metadata", func(ctx context.Context) error { return s.markNode(ctx, k) })
	lock, err := resourcelock.New(resourcelock.LeasesResourceLock, metav1.NamespaceSystem, "k3s", k.c.CoreV1(), k.c.CoordinationV1(),
		resourcelock.ResourceLockConfig{Identity: s.cfg.NodeName + "-" + s.store.Name()})
	if err != nil {
		s.sd.Request(err)
		return
	}
	leaderelection.RunOrDie(ctx, leaderelection.LeaderElectionConfig{
		Lock: lock, LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) {
				life := newLifecycle()
				go s.every(ctx, "nodes", func(ctx context.Context) error { return life.round(ctx, k) })
				go s.every(ctx, "members", func(ctx context.Context) error { return s.members(ctx, k) })
				go s.every(ctx, "secrets", func(ctx context.Context) error { return secretsRound(ctx, k) })
				go s.every(ctx, "addresses", func(ctx context.Context) error { return s.addresses(ctx, k) })
				newManifests(s.cfg.ServerDir("manifests")).run(ctx, k)
			},
			OnStoppedLeading: func() {
				if ctx.Err() == nil {
					proc.Fatal("leaderelection lost for k3s")
				}
			},
		},
	})
}

func (s *server) every(ctx context.Context, what string, f func(context.Context) error) {
	last := ""
	for {
		rc, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := f(rc)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil && err.Error() != last {
			proc.Error("controller %s: %v", what, err)
			last = err.Error()
		} else if err == nil {
			last = ""
		}
		if !proc.Sleep(ctx, controlPeriod) {
			return
		}
	}
}

// markNode puts the roles and the member's name on this server's own Node.
// After a removal by annotation they stay away.
func (s *server) markNode(ctx context.Context, k *kube) error {
	n, err := k.c.CoreV1().Nodes().Get(ctx, s.cfg.NodeName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if n.Annotations[annRemove] == "true" || n.Annotations[annRemoved] == s.store.Name() {
		return nil
	}
	if n.Labels[labelEtcd] == "true" && n.Labels[labelControl] == "true" && n.Annotations[annName] == s.store.Name() && n.Annotations[annAddress] == s.cfg.NodeIP {
		return nil
	}
	return patchNode(ctx, k, n.Name, map[string]any{
		"labels":      map[string]any{labelEtcd: "true", labelControl: "true"},
		"annotations": map[string]any{annName: s.store.Name(), annAddress: s.cfg.NodeIP, annRemoved: nil},
	})
}

func patchNode(ctx context.Context, k *kube, name string, meta map[string]any) error {
	b, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return err
	}
	_, err = k.c.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, b, metav1.PatchOptions{})
	return err
}

// voters sets EtcdIsVoter on every node that claims the etcd role.
func (s *server) voters(ctx context.Context, members []*etcdserverpb.Member) {
	k := s.sup.kube.Load()
	if k == nil {
		return
	}
	nodes, err := k.c.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: labelEtcd + "=true"})
	if err != nil {
		proc.Error("Failed to list nodes with etcd role: %v", err)
		return
	}
	for _, n := range nodes.Items {
		st, reason, msg := corev1.ConditionFalse, "NotAMember", "Node is not a member of the etcd cluster"
		for _, m := range members {
			if m.Name != n.Annotations[annName] || m.Name == "" {
				continue
			}
			if m.IsLearner {
				reason, msg = "MemberIsLearner", "Node has not been promoted to voting member of the etcd cluster"
			} else {
				st, reason, msg = corev1.ConditionTrue, "MemberNotLearner", "Node is a voting member of the etcd cluster"
			}
		}
		if err := setCondition(ctx, k, &n, corev1.NodeCondition{Type: condVoter, Status: st, Reason: reason, Message: msg}); err != nil {
			proc.Error("Unable to set etcd status condition %s=%s for %s: %v", condVoter, st, n.Name, err)
		}
	}
}

func setCondition(ctx context.Context, k *kube, n *corev1.Node, c corev1.NodeCondition) error {
	now := metav1.Now()
	c.LastHeartbeatTime, c.LastTransitionTime = now, now
	for _, o := range n.Status.Conditions {
		if o.Type == c.Type {
			if o.Status == c.Status && o.Reason == c.Reason {
				return nil
			}
			if o.Status == c.Status {
				c.LastTransitionTime = o.LastTransitionTime
			}
		}
	}
	b, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{c}}})
	if err != nil {
		return err
	}
	_, err = k.c.CoreV1().Nodes().PatchStatus(ctx, n.Name, b)
	return err
}

// members removes the member of a Node that is being deleted or that asks for
// it by annotation. A finalizer keeps a deleted Node until its member is gone,
// so no deletion is missed.
func (s *server) members(ctx context.Context, k *kube) error {
	nodes, err := k.c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, n := range nodes.Items {
		name, addr := n.Annotations[annName], n.Annotations[annAddress]
		held := slices.Contains(n.Finalizers, finalizer)
		if n.DeletionTimestamp != nil {
			if !held {
				continue
			}
			if name != "" && addr != "" && n.Labels[labelEtcd] == "true" {
				if err := s.store.RemoveMember(ctx, name, addr); err != nil {
					return fmt.Errorf("remove member %s of a deleted node: %w", name, err)
				}
			}
			keep := slices.DeleteFunc(slices.Clone(n.Finalizers), func(f string) bool { return f == finalizer })
			if err := patchNode(ctx, k, n.Name, map[string]any{"finalizers": keep, "resourceVersion": n.ResourceVersion}); err != nil {
				return err
			}
			continue
		}
		if name == "" || addr == "" || n.Labels[labelEtcd] != "true" {
			continue
		}
		if !held {
			if err := patchNode(ctx, k, n.Name, map[string]any{"finalizers": append(slices.Clone(n.Finalizers), finalizer), "resourceVersion": n.ResourceVersion}); err != nil {
				return err
			}
		}
		if n.Annotations[annRemove] != "true" {
			continue
		}
		only, err := s.store.OnlyVoter(ctx, name)
		if err != nil {
			return err
		}
		if only {
			proc.Error("Refusing to remove the only voting member of the etcd cluster")
			if err := patchNode(ctx, k, n.Name, map[string]any{"annotations": map[string]any{annRemove: nil}}); err != nil {
				return err
			}
			continue
		}
		if err := s.store.RemoveMember(ctx, name, addr); err != nil {
			return fmt.Errorf("remove member %s: %w", name, err)
		}
		if err := patchNode(ctx, k, n.Name, map[string]any{"annotations": map[string]any{annRemoved: name, annName: nil, annAddress: nil, annRemove: nil}}); err != nil {
			return err
		}
	}
	return nil
}

// addresses keeps the list of API addresses in the datastore.
func (s *server) addresses(ctx context.Context, k *kube) error {
	ep, err := k.c.CoreV1().Endpoints(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	if err != nil {
		return err
	}
	var out []string
	for _, ss := range ep.Subsets {
		for _, a := range ss.Addresses {
			for _, p := range ss.Ports {
				out = append(out, net.JoinHostPort(a.IP, fmt.Sprint(p.Port)))
			}
		}
	}
	b, err := json.Marshal(out)
	if err != nil {
		return err
	}
	if string(b) == s.addrs {
		return nil
	}
	if _, err := s.store.Client().Put(ctx, addressKey, string(b)); err != nil {
		return err
	}
	s.addrs = string(b)
	return nil
}

// lifecycle turns nodes whose Lease is no longer renewed to Unknown. It counts
// from when it saw a renewal, so clocks do not matter. The one of
// kube-controller-manager also evicts pods and limits its rate; there are no
// pods here.
type lifecycle struct {
	renew map[string]time.Time
	saw   map[string]time.Time
}

func newLifecycle() *lifecycle {
	return &lifecycle{map[string]time.Time{}, map[string]time.Time{}}
}

func (l *lifecycle) round(ctx context.Context, k *kube) error {
	nodes, err := k.c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	leases, err := k.c.CoordinationV1().Leases(corev1.NamespaceNodeLease).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	renew := map[string]time.Time{}
	for _, le := range leases.Items {
		if le.Spec.RenewTime != nil {
			renew[le.Name] = le.Spec.RenewTime.Time
		}
	}
	now := time.Now()
	for i := range nodes.Items {
		n := &nodes.Items[i]
		if r, ok := l.saw[n.Name]; !ok || !l.renew[n.Name].Equal(renew[n.Name]) {
			l.renew[n.Name], l.saw[n.Name] = renew[n.Name], now
			_ = r
			continue
		}
		if now.Sub(l.saw[n.Name]) < graceOfNodes {
			continue
		}
		if err := setCondition(ctx, k, n, corev1.NodeCondition{
			Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: "NodeStatusUnknown", Message: "Kubelet stopped posting node status.",
		}); err != nil {
			return err
		}
	}
	return nil
}

// secretsRound deletes expired bootstrap tokens and the password Secrets of
// Nodes that are gone, and gives new ones their owner.
func secretsRound(ctx context.Context, k *kube) error {
	sec := k.c.CoreV1().Secrets(metav1.NamespaceSystem)
	toks, err := sec.List(ctx, metav1.ListOptions{FieldSelector: "type=bootstrap.kubernetes.io/token"})
	if err != nil {
		return err
	}
	for _, t := range toks.Items {
		exp, err := time.Parse(time.RFC3339, string(t.Data["expiration"]))
		if err == nil && time.Now().After(exp) {
			if err := sec.Delete(ctx, t.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				return err
			}
		}
	}
	pws, err := sec.List(ctx, metav1.ListOptions{FieldSelector: "type=" + passwordType})
	if err != nil {
		return err
	}
	for _, p := range pws.Items {
		name := strings.TrimSuffix(p.Name, passwordSuffix)
		n, err := k.c.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			if len(p.OwnerReferences) > 0 || time.Since(p.CreationTimestamp.Time) > 10*time.Minute {
				if err := sec.Delete(ctx, p.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
					return err
				}
			}
		case err != nil:
			return err
		case len(p.OwnerReferences) == 0:
			b, _ := json.Marshal(map[string]any{"metadata": map[string]any{"ownerReferences": []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID}}}})
			if _, err := sec.Patch(ctx, p.Name, types.MergePatchType, b, metav1.PatchOptions{}); err != nil {
				return err
			}
		case p.OwnerReferences[0].UID != n.UID:
			if err := sec.Delete(ctx, p.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}
