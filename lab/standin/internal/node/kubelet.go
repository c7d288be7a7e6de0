package node

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

const (
	leaseSeconds = 40
	beat         = 10 * time.Second
	// Marker is the name, as seen in the process list, of the process that
	// stands for a pod.
	Marker = "k3s-standin-pod"
	// markerLoop ends when its file no longer names it, so that a node whose
	// data are removed leaves nothing behind. A shell, since this program would
	// take 70 MB for it.
	markerLoop = `while sleep 5; do [ "$(cat "$1" 2>/dev/null)" = "$$" ] || exit 0; done`
	// Label and Runtime mark every Node of the stand-in.
	Label   = "lab.standin/k3s"
	Runtime = "standin://0"
)

// kubelet registers the Node and keeps its Lease until ctx ends. It returns an
// error when it cannot listen.
func (a *agent) kubelet(ctx context.Context, own bool) error {
	l, err := net.Listen("tcp", ":10250")
	if err != nil {
		a.sd.Request(fmt.Errorf("kubelet exited: %w", err))
		return context.Cause(ctx)
	}
	go a.serve(ctx, l)
	c, err := kubernetes.NewForConfig(&rest.Config{
		Host: a.url, QPS: 20, Burst: 40, Timeout: 10 * time.Second,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile: a.cfg.AgentDir("server-ca.crt"), CertFile: a.cfg.AgentDir("client-kubelet.crt"), KeyFile: a.cfg.AgentDir("client-kubelet.key"),
		},
	})
	if err != nil {
		return err
	}
	for {
		err := a.register(ctx, c)
		if err == nil {
			break
		}
		proc.Info("Waiting for API server to become available: %v", err)
		if !proc.Sleep(ctx, 2*time.Second) {
			return context.Cause(ctx)
		}
	}
	if err := a.pod(); err != nil {
		proc.Error("start marker process: %v", err)
	}
	if !own {
		proc.Info("k3s agent is up and running")
		proc.Notify("READY=1\n")
	}
	t := time.NewTicker(beat)
	defer t.Stop()
	for n := 0; ; n++ {
		if err := a.heartbeat(ctx, c); err != nil && ctx.Err() == nil {
			proc.Error("Error updating node status, will retry: %v", err)
		}
		a.learnServers(ctx)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
	}
}

func (a *agent) serve(ctx context.Context, l net.Listener) {
	crt, err := tls.LoadX509KeyPair(a.cfg.AgentDir("serving-kubelet.crt"), a.cfg.AgentDir("serving-kubelet.key"))
	if err != nil {
		a.sd.Request(fmt.Errorf("kubelet exited: %w", err))
		return
	}
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second, TLSConfig: &tls.Config{Certificates: []tls.Certificate{crt}}, ErrorLog: proc.NoLog,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set(proc.Header, "1")
			if r.URL.Path == "/healthz" {
				_, _ = io.WriteString(w, "ok")
				return
			}
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
		}),
	}
	go func() {
		<-ctx.Done()
		_ = srv.Close()
	}()
	_ = srv.ServeTLS(l, "", "")
}

func (a *agent) labels() map[string]string {
	m := map[string]string{
		"kubernetes.io/hostname": a.cfg.NodeName, "kubernetes.io/os": "linux", "kubernetes.io/arch": runtime.GOARCH,
		"beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": runtime.GOARCH,
		"node.kubernetes.io/instance-type": "k3s", Label: "true",
	}
	for _, l := range a.cfg.List("node-label") {
		k, v, _ := strings.Cut(l, "=")
		m[k] = v
	}
	return m
}

func (a *agent) annotations() map[string]string {
	args, _ := json.Marshal(append([]string{a.cfg.Role}, redact(a.cfg.Args)...))
	return map[string]string{
		Label: "true", "k3s.io/node-args": string(args), "k3s.io/node-env": "{}", "k3s.io/internal-ip": a.cfg.NodeIP, "k3s.io/hostname": a.cfg.NodeName,
	}
}

// redact hides the values of secrets.
func redact(args []string) []string {
	out := make([]string, len(args))
	hide := false
	for i, s := range args {
		name, _, hasVal := strings.Cut(s, "=")
		n := strings.TrimLeft(name, "-")
		secret := n == "token" || n == "t" || n == "agent-token"
		switch {
		case hide:
			out[i], hide = "********", false
		case secret && strings.HasPrefix(s, "-") && hasVal:
			out[i] = name + "=********"
		default:
			out[i], hide = s, secret && strings.HasPrefix(s, "-")
		}
	}
	return out
}

func (a *agent) taints() []corev1.Taint {
	var out []corev1.Taint
	for _, t := range a.cfg.List("node-taint") {
		kv, effect, _ := strings.Cut(t, ":")
		k, v, _ := strings.Cut(kv, "=")
		out = append(out, corev1.Taint{Key: k, Value: v, Effect: corev1.TaintEffect(effect)})
	}
	return out
}

// register makes the Node, or puts labels and status on the one that is there.
func (a *agent) register(ctx context.Context, c kubernetes.Interface) error {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: a.cfg.NodeName, Labels: a.labels(), Annotations: a.annotations()},
		Spec:       corev1.NodeSpec{Taints: a.taints(), ProviderID: "k3s://" + a.cfg.NodeName},
		Status:     a.status(),
	}
	_, err := c.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
	if err == nil {
		proc.Info("Successfully registered node %s", n.Name)
		return a.renew(ctx, c)
	}
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	have, err := c.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if have.DeletionTimestamp != nil {
		return fmt.Errorf("node %s is being deleted", n.Name)
	}
	b, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": a.labels(), "annotations": a.annotations()}})
	if err != nil {
		return err
	}
	if _, err := c.CoreV1().Nodes().Patch(ctx, n.Name, types.StrategicMergePatchType, b, metav1.PatchOptions{}); err != nil {
		return err
	}
	if err := a.post(ctx, c); err != nil {
		return err
	}
	return a.renew(ctx, c)
}

func (a *agent) status() corev1.NodeStatus {
	now := metav1.Now()
	cond := func(t corev1.NodeConditionType, s corev1.ConditionStatus, reason, msg string) corev1.NodeCondition {
		return corev1.NodeCondition{Type: t, Status: s, Reason: reason, Message: msg, LastHeartbeatTime: now, LastTransitionTime: now}
	}
	release := ""
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		release = strings.TrimSpace(string(b))
	}
	res := corev1.ResourceList{
		corev1.ResourceCPU: *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI), corev1.ResourceMemory: resource.MustParse("1Gi"),
		corev1.ResourcePods: *resource.NewQuantity(110, resource.DecimalSI),
	}
	return corev1.NodeStatus{
		Capacity: res, Allocatable: res,
		Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: a.cfg.NodeIP}, {Type: corev1.NodeHostName, Address: a.cfg.NodeName}},
		Conditions: []corev1.NodeCondition{
			cond(corev1.NodeMemoryPressure, corev1.ConditionFalse, "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
			cond(corev1.NodeDiskPressure, corev1.ConditionFalse, "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
			cond(corev1.NodePIDPressure, corev1.ConditionFalse, "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
			cond(corev1.NodeReady, corev1.ConditionTrue, "KubeletReady", "kubelet is posting ready status (stand-in)"),
		},
		NodeInfo: corev1.NodeSystemInfo{
			KubeletVersion: proc.Version, ContainerRuntimeVersion: Runtime, KernelVersion: release, OSImage: "k3s stand-in (lab)",
			OperatingSystem: "linux", Architecture: runtime.GOARCH,
		},
		DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: 10250}},
	}
}

func (a *agent) post(ctx context.Context, c kubernetes.Interface) error {
	b, err := json.Marshal(map[string]any{"status": a.status()})
	if err != nil {
		return err
	}
	_, err = c.CoreV1().Nodes().PatchStatus(ctx, a.cfg.NodeName, b)
	return err
}

// heartbeat renews the Lease, and the status when it is not Ready any more. A
// Node that was deleted is not made again: that is for the next start.
func (a *agent) heartbeat(ctx context.Context, c kubernetes.Interface) error {
	if err := a.renew(ctx, c); err != nil {
		return err
	}
	n, err := c.CoreV1().Nodes().Get(ctx, a.cfg.NodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, cd := range n.Status.Conditions {
		if cd.Type == corev1.NodeReady && cd.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return a.post(ctx, c)
}

func (a *agent) renew(ctx context.Context, c kubernetes.Interface) error {
	leases := c.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	secs, now := int32(leaseSeconds), metav1.NowMicro()
	le, err := leases.Get(ctx, a.cfg.NodeName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: a.cfg.NodeName, Namespace: corev1.NamespaceNodeLease},
			Spec:       coordv1.LeaseSpec{HolderIdentity: &a.cfg.NodeName, LeaseDurationSeconds: &secs, RenewTime: &now},
		}, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	le.Spec.RenewTime = &now
	_, err = leases.Update(ctx, le, metav1.UpdateOptions{})
	return err
}

// pod starts the process that stands for the node's pods, unless that of an
// earlier run still lives. It has its own session and outlives k3s.
func (a *agent) pod() error {
	if b, err := os.ReadFile(a.podFile()); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && isMarker(pid) {
			return nil
		}
	}
	cmd := exec.Command("/bin/sh", "-c", markerLoop, Marker, a.podFile())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return os.WriteFile(a.podFile(), []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o644)
}

func isMarker(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.Contains(string(b), Marker)
}
