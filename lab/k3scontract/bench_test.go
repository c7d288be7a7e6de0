package k3scontract

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/lab/k3sbin"
)

var (
	update = flag.Bool("update", false, "write docs/k3s-contract.md and results.json from this run")
	keep   = flag.String("keep", "", "directory for the nodes' data and logs, kept after the run")
)

const insideEnv = "K3SCONTRACT_INSIDE"

// k3s is what the tests run against; whyNot is why they cannot run here.
var (
	k3s    k3sbin.Binary
	whyNot string
)

// TestMain starts the tests again as the first process of new network, mount,
// PID and UTS namespaces: whatever happens, nothing is left on the host.
func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(insideEnv) == "" {
		os.Exit(outside(m))
	}
	if err := settle(); err != nil {
		fmt.Fprintln(os.Stderr, "k3scontract:", err)
		os.Exit(1)
	}
	if err := json.Unmarshal([]byte(os.Getenv(insideEnv)), &k3s); err != nil {
		fmt.Fprintln(os.Stderr, "k3scontract:", err)
		os.Exit(1)
	}
	fmt.Printf("k3scontract: running against %s %s (%s)\n", k3s.Kind, k3s.Version, k3s.Path)
	code := m.Run()
	if code == 0 || *update {
		if err := writeResults(); err != nil {
			fmt.Fprintln(os.Stderr, "k3scontract:", err)
			code = 1
		}
	}
	os.Exit(code)
}

func outside(m *testing.M) int {
	switch {
	case testing.Short():
		whyNot = "-short: these rows need root, network namespaces and minutes"
	case os.Geteuid() != 0:
		whyNot = "needs root for network namespaces"
	}
	if whyNot != "" {
		return m.Run()
	}
	b, err := k3sbin.Find(context.Background(), k3sbin.Config{Log: os.Stderr})
	if err != nil {
		fmt.Fprintln(os.Stderr, "k3scontract:", err)
		return 1
	}
	text, err := json.Marshal(b)
	if err != nil {
		fmt.Fprintln(os.Stderr, "k3scontract:", err)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideEnv+"="+string(text))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is tied to the thread
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	var ee *exec.ExitError
	switch {
	case errors.As(err, &ee):
		return max(1, ee.ExitCode())
	case err != nil:
		whyNot = fmt.Sprintf("new namespaces are refused here (%v); a container must be --privileged", err)
		return m.Run()
	}
	return 0
}

// settle makes the new namespaces usable.
func settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run/netns", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run/netns: %w", err)
	}
	for _, a := range []string{"link set lo up", "link add kbr type bridge", "addr add 10.99.0.254/24 dev kbr", "link set kbr up"} {
		if err := ip(a); err != nil {
			return err
		}
	}
	return nil
}

func ip(args string) error {
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, bytes.TrimSpace(out))
	}
	return nil
}

// The secrets of a bench's cluster.
const (
	serverPass = "the-server-password"
	agentPass  = "the-agent-password"
)

// bench is a LAN of nodes for one test.
type bench struct {
	t     *testing.T
	dir   string
	nodes map[string]*node
	began time.Time
}

// node is one machine: a network namespace with an address, and directories.
type node struct {
	b        *bench
	name, ip string
	dir      string
	p        *process // the last k3s started
}

var benches int

func newBench(t *testing.T, names ...string) *bench {
	t.Helper()
	if whyNot != "" {
		t.Skip("not run here: " + whyNot)
	}
	dir := t.TempDir()
	if *keep != "" {
		dir = filepath.Join(*keep, strings.ReplaceAll(t.Name(), "/", "_"))
		if err := os.RemoveAll(dir); err != nil { // of an earlier run
			t.Fatal(err)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{t: t, dir: dir, nodes: map[string]*node{}, began: time.Now()}
	benches++
	for i, name := range names {
		n := &node{b: b, name: name, ip: fmt.Sprintf("10.99.0.%d", i+1), dir: filepath.Join(dir, name)}
		for _, d := range []string{"data", "etc", "run", "kubelet", "cni"} {
			if err := os.MkdirAll(filepath.Join(n.dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		veth := fmt.Sprintf("k%d-%d", benches, i)
		for _, a := range []string{
			"netns add " + name, "link add " + veth + " type veth peer name eth0 netns " + name, "link set " + veth + " master kbr up",
			"-n " + name + " addr add " + n.ip + "/24 dev eth0", "-n " + name + " link set eth0 up", "-n " + name + " link set lo up",
			"-n " + name + " route add default via 10.99.0.254",
		} {
			if err := ip(a); err != nil {
				t.Fatal(err)
			}
		}
		b.nodes[name] = n
	}
	t.Cleanup(func() {
		for _, n := range b.nodes {
			if n.p != nil {
				n.p.kill()
			}
			_ = os.Remove(n.data("agent/standin-pod.pid")) // ends the marker
			if t.Failed() && n.p != nil {
				t.Logf("%s: end of the log:\n%s", n.name, n.p.tail(25))
			}
			_ = ip("netns del " + n.name)
		}
	})
	return b
}

// logf notes a measured moment.
func (b *bench) logf(format string, a ...any) {
	b.t.Logf("%6.1fs %s", time.Since(b.began).Seconds(), fmt.Sprintf(format, a...))
}

func (b *bench) n(name string) *node { return b.nodes[name] }

// data is a path below the node's data directory.
func (n *node) data(p ...string) string {
	return filepath.Join(append([]string{n.dir, "data"}, p...)...)
}

func (n *node) url() string { return "https://" + n.ip + ":6443" }

// command is a k3s command on the node: its own network, host name, /etc/rancher
// and the other fixed places. Each part execs the next, so the PID is k3s's.
func (n *node) command(args ...string) *exec.Cmd {
	script := `set -e
d=$1; h=$2; shift 2
hostname "$h"
mkdir -p /etc/rancher /var/lib/kubelet /var/lib/cni
mount --bind "$d/etc" /etc/rancher
mount --bind "$d/kubelet" /var/lib/kubelet
mount --bind "$d/cni" /var/lib/cni
exec "$@"`
	argv := append([]string{"--net=/run/netns/" + n.name, "unshare", "-m", "-u", "--propagation", "private", "sh", "-c", script, "sh", n.dir, n.name, k3s.Path}, args...)
	cmd := exec.Command("nsenter", argv...)
	cmd.Env = append(append(os.Environ(), k3s.Env...), "K3S_DATA_DIR="+n.data())
	return cmd
}

// run runs a short command and returns its output.
func (n *node) run(args ...string) (string, error) {
	out, err := n.command(args...).CombinedOutput()
	return string(out), err
}

// process is a k3s that runs, and is started again when it ends if wanted.
type process struct {
	n    *node
	log  string
	from int64 // where its part of the log begins
	mu   sync.Mutex
	cmd  *exec.Cmd
	stop bool
	code []int // of every end so far
	done chan struct{}
}

// restartAfter is systemd's RestartSec of the k3s units.
const restartAfter = 5 * time.Second

// start starts k3s; with again it is restarted as systemd would.
func (n *node) start(again bool, env []string, args ...string) *process {
	n.b.t.Helper()
	p := &process{n: n, log: filepath.Join(n.dir, "log"), done: make(chan struct{})}
	if st, err := os.Stat(p.log); err == nil {
		p.from = st.Size()
	}
	n.p = p
	if err := p.once(env, args); err != nil {
		n.b.t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		for {
			_ = p.cmd.Wait()
			p.mu.Lock()
			p.code = append(p.code, p.cmd.ProcessState.ExitCode())
			stop := p.stop || !again
			p.mu.Unlock()
			if stop {
				return
			}
			t := time.NewTimer(restartAfter)
			<-t.C
			p.mu.Lock()
			stop = p.stop
			p.mu.Unlock()
			if stop || p.once(env, args) != nil {
				return
			}
		}
	}()
	return p
}

func (p *process) once(env, args []string) error {
	f, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := p.n.command(args...)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop {
		return errors.New("stopped")
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	p.cmd = cmd
	return nil
}

// signal sends a signal and does not start k3s again.
func (p *process) signal(s syscall.Signal) {
	p.mu.Lock()
	p.stop = true
	_ = syscall.Kill(p.cmd.Process.Pid, s)
	p.mu.Unlock()
}

// kill is a power cut of the process; it returns when the process is gone.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// term ends k3s in order and returns its status.
func (p *process) term() int {
	p.signal(syscall.SIGTERM)
	<-p.done
	return p.codes()[len(p.codes())-1]
}

func (p *process) codes() []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]int(nil), p.code...)
}

func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return syscall.Kill(p.pid(), 0) == nil
	}
}

// text is what it has written.
func (p *process) text() string {
	b, _ := os.ReadFile(p.log)
	return string(b[min(int64(len(b)), p.from):])
}

func (p *process) tail(n int) string {
	l := strings.Split(strings.TrimSpace(p.text()), "\n")
	return strings.Join(l[max(0, len(l)-n):], "\n")
}

// flags that every k3s of a bench gets.
func (n *node) base() []string {
	a := []string{"--data-dir", n.data(), "--node-ip", n.ip, "--node-name", n.name}
	if k3s.Kind == k3sbin.Real {
		a = append(a, "--kubelet-arg=fail-cgroupv1=false")
	}
	return a
}

func (n *node) serverArgs(more ...string) []string {
	a := append([]string{"server", "--token", serverPass, "--agent-token", agentPass, "--etcd-arg=unsafe-no-fsync=true"}, n.base()...)
	if k3s.Kind == k3sbin.Real {
		a = append(a, "--disable=traefik,servicelb,metrics-server,coredns,local-storage", "--disable-helm-controller", "--flannel-backend=host-gw")
	}
	return append(a, more...)
}

const twoLearners = "--etcd-arg=max-learners=2"

// found starts the first server and waits until it is ready.
func (n *node) found(more ...string) *process {
	n.b.t.Helper()
	p := n.start(true, nil, n.serverArgs(append([]string{"--cluster-init", twoLearners}, more...)...)...)
	n.ready()
	return p
}

// serve starts a further server.
func (n *node) serve(first *node, more ...string) *process {
	n.b.t.Helper()
	return n.start(true, nil, n.serverArgs(append([]string{"--server", first.url(), twoLearners}, more...)...)...)
}

// work starts an agent with a token.
func (n *node) work(first *node, token string, more ...string) *process {
	n.b.t.Helper()
	return n.start(true, nil, append(append([]string{"agent", "--server", first.url(), "--token", token}, n.base()...), more...)...)
}

// eventually asks every 200 ms until f is nil, at most for limit.
func (b *bench) eventually(what string, limit time.Duration, f func() error) {
	b.t.Helper()
	if err := b.within(limit, f); err != nil {
		b.t.Fatalf("%s: not within %s: %v", what, limit, err)
	}
}

func (b *bench) within(limit time.Duration, f func() error) error {
	end := time.Now().Add(limit)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil || time.Now().After(end) {
			return err
		}
		<-tick.C
	}
}

// ready waits for the API of a server.
func (n *node) ready() {
	n.b.t.Helper()
	n.b.eventually("API of "+n.name, 2*time.Minute, func() error {
		code, body, err := n.admin(http.MethodGet, "/readyz", nil)
		if err != nil {
			return err
		}
		if code != http.StatusOK {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
}

// dialer makes connections out of the node's own network namespace.
func (n *node) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer home.Close()
	there, err := os.Open("/run/netns/" + n.name)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	defer func() {
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			panic(err) // this thread would stay in the wrong network
		}
	}()
	d := net.Dialer{Timeout: 5 * time.Second}
	return d.DialContext(ctx, network, addr)
}

// request is one HTTPS request; from is the node that asks, nil for another
// host of the LAN.
type request struct {
	from         *node
	method, url  string
	user, pass   string
	bearer       string
	cert         *tls.Certificate
	body         []byte
	contentType  string
	wait         time.Duration
	gotHeader    http.Header
	verifyServer []byte
}

func (r *request) do() (int, string, error) {
	tc := &tls.Config{InsecureSkipVerify: r.verifyServer == nil} // the tests look at pins themselves
	if r.verifyServer != nil {
		tc.RootCAs = x509.NewCertPool()
		tc.RootCAs.AppendCertsFromPEM(r.verifyServer)
	}
	if r.cert != nil {
		tc.Certificates = []tls.Certificate{*r.cert}
	}
	tr := &http.Transport{TLSClientConfig: tc, DisableKeepAlives: true}
	if r.from != nil {
		tr.DialContext = r.from.dial
	}
	if r.wait == 0 {
		r.wait = 10 * time.Second
	}
	req, err := http.NewRequest(r.method, r.url, bytes.NewReader(r.body))
	if err != nil {
		return 0, "", err
	}
	if r.contentType != "" {
		req.Header.Set("Content-Type", r.contentType)
	}
	if r.pass != "" {
		req.SetBasicAuth(r.user, r.pass)
	}
	if r.bearer != "" {
		req.Header.Set("Authorization", "Bearer "+r.bearer)
	}
	resp, err := (&http.Client{Transport: tr, Timeout: r.wait}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	r.gotHeader = resp.Header
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	return resp.StatusCode, string(b), err
}

// admin asks the node's API with its administrator's certificate.
func (n *node) admin(method, path string, body any) (int, string, error) {
	crt, err := tls.LoadX509KeyPair(n.data("server/tls/client-admin.crt"), n.data("server/tls/client-admin.key"))
	if err != nil {
		return 0, "", err
	}
	r := &request{from: n, method: method, url: "https://127.0.0.1:6443" + path, cert: &crt}
	if body != nil {
		if r.body, err = json.Marshal(body); err != nil {
			return 0, "", err
		}
		r.contentType = "application/json"
		if method == http.MethodPatch {
			r.contentType = "application/merge-patch+json"
		}
	}
	return r.do()
}

// loop asks the node's supervisor from the node itself, without credentials.
func (n *node) loop(path string) (int, string, error) {
	return (&request{from: n, method: http.MethodGet, url: "https://127.0.0.1:6443" + path}).do()
}
