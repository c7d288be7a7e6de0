package k3scontract

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/lab/k3sbin"
)

// TestFounder has the rows that one server and a few agents can show.
func TestFounder(t *testing.T) {
	b := newBench(t, "f1", "w2", "w3", "w4")
	f, w2, w3, w4 := b.n("f1"), b.n("w2"), b.n("w3"), b.n("w4")

	// The founder is configured by drop-ins alone.
	drop := filepath.Join(f.dir, "etc", "k3s", "config.yaml.d")
	if err := os.MkdirAll(drop, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"10-a.yaml": "node-label: [\"one=1\"]\nwrite-kubeconfig-mode: \"0644\"\nkey-of-the-future: true\n",
		"20-b.yaml": "node-label+: [\"two=2\"]\nwrite-kubeconfig-mode: \"0600\"\n",
		"30-c.yaml": "cluster-init: true\n",
	} {
		if err := os.WriteFile(filepath.Join(drop, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(f.dir, "run", "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	p := f.start(true, []string{"NOTIFY_SOCKET=" + filepath.Join(f.dir, "run", "notify")}, f.serverArgs(twoLearners)...)

	row(t, "H5", func(t *testing.T) {
		buf := make([]byte, 4096)
		if err := sock.SetReadDeadline(time.Now().Add(3 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		for {
			n, err := sock.Read(buf)
			if err != nil {
				t.Fatalf("no READY=1: %v", err)
			}
			if strings.Contains(string(buf[:n]), "READY=1") {
				break
			}
		}
		if code, body, err := f.admin(http.MethodGet, "/readyz", nil); err != nil || code != 200 {
			t.Errorf("READY=1 was sent while the API says %d %s %v", code, body, err)
		}
	})
	f.ready()
	f.waitReady("f1", time.Minute)
	b.logf("founder ready")

	row(t, "C2", func(t *testing.T) {
		if !p.running() || len(p.codes()) != 0 {
			t.Errorf("ended with %v although the unknown key should be skipped", p.codes())
		}
	})
	row(t, "C3", func(t *testing.T) {
		o, err := f.nodeObject("f1")
		if err != nil {
			t.Fatal(err)
		}
		if o.Metadata.Labels["one"] != "1" || o.Metadata.Labels["two"] != "2" {
			t.Errorf("labels %v: key+ did not append", o.Metadata.Labels)
		}
		if m := mode(t, filepath.Join(f.dir, "etc", "k3s", "k3s.yaml")); m != 0o600 {
			t.Errorf("kubeconfig has mode %o: the later file did not replace the key", m)
		}
	})
	row(t, "C4", func(t *testing.T) {
		out, err := f.run("--version")
		if err != nil || !strings.HasPrefix(out, "k3s version "+k3s.Version+" ") {
			t.Errorf("%q %v", out, err)
		}
	})
	row(t, "F1", func(t *testing.T) {
		for path, want := range map[string]os.FileMode{
			"server/token": 0o600, "server/cred/passwd": 0o600, "server/tls/server-ca.key": 0o600, "server/tls/client-ca.key": 0o600,
			"server/tls/etcd/peer-ca.key": 0o600, "server/tls/etcd/server-ca.key": 0o600, "server/tls/service.key": 0o600,
			"server/db/etcd": 0o700 | os.ModeDir, "server/db/etcd/name": 0o600,
		} {
			if m := mode(t, f.data(path)); m != want {
				t.Errorf("%s: mode %v, want %v", path, m, want)
			}
		}
		if l, err := os.Readlink(f.data("server/node-token")); err != nil || filepath.Base(l) != "token" {
			t.Errorf("node-token links to %q %v", l, err)
		}
		tok, _ := os.ReadFile(f.data("server/token"))
		if !regexp.MustCompile(`^K10[0-9a-f]{64}::server:` + serverPass + "\n$").Match(tok) {
			t.Errorf("token %q", tok)
		}
		pw, _ := os.ReadFile(f.data("server/cred/passwd"))
		for _, want := range []string{serverPass + ",server,server,k3s:server", agentPass + ",node,node,k3s:agent"} {
			if !strings.Contains(string(pw), want) {
				t.Errorf("passwd has no line %q", want)
			}
		}
		if !regexp.MustCompile(`^f1-[0-9a-f]{8}$`).MatchString(f.memberName()) {
			t.Errorf("member name %q", f.memberName())
		}
	})
	row(t, "F2", func(t *testing.T) {
		if st, err := os.Stat(f.data("server/db/etcd/member/wal")); err != nil || !st.IsDir() {
			t.Errorf("%v", err)
		}
	})
	row(t, "F3", func(t *testing.T) {
		path := filepath.Join(f.dir, "etc", "node", "password")
		pw, err := os.ReadFile(path)
		if err != nil || !regexp.MustCompile(`^[0-9a-f]{32}\n?$`).Match(pw) || mode(t, path) != 0o600 {
			t.Errorf("%q %v", pw, err)
		}
	})
	row(t, "T1", func(t *testing.T) {
		code, ca, err := f.loop("/cacerts")
		if err != nil || code != 200 {
			t.Fatal(code, err)
		}
		sum := sha256.Sum256([]byte(ca))
		tok, _ := os.ReadFile(f.data("server/token"))
		if !strings.HasPrefix(string(tok), "K10"+hex.EncodeToString(sum[:])+"::") {
			t.Errorf("token %q does not pin %x", tok, sum)
		}
	})
	row(t, "H1", func(t *testing.T) {
		for path, want := range map[string]string{"/ping": "pong", "/cacerts": "-----BEGIN CERTIFICATE-----"} {
			code, body, err := (&request{method: "GET", url: f.url() + path}).do()
			if err != nil || code != 200 || !strings.HasPrefix(body, want) {
				t.Errorf("%s: %d %q %v", path, code, body, err)
			}
		}
	})
	row(t, "H2", func(t *testing.T) {
		ms, err := f.members()
		if err != nil || len(ms) != 1 || ms[0].Name != f.memberName() || ms[0].IsLearner || len(ms[0].PeerURLs) != 1 || ms[0].PeerURLs[0] != "https://"+f.ip+":2380" {
			t.Errorf("%+v %v", ms, err)
		}
		if code, body, err := (&request{method: "GET", url: f.url() + "/db/info"}).do(); err != nil || code != 401 && code != 403 {
			t.Errorf("a stranger gets %d %s %v", code, body, err)
		}
		if code, _, err := (&request{method: "GET", url: f.url() + "/db/info", user: "server", pass: serverPass}).do(); err != nil || code != 200 {
			t.Errorf("with the server token: %d %v", code, err)
		}
	})
	row(t, "H3", func(t *testing.T) {
		if code, _, err := f.loop("/readyz"); err != nil || code != 401 {
			t.Errorf("without credentials: %d %v", code, err)
		}
		if code, body, err := f.admin("GET", "/readyz", nil); err != nil || code != 200 || body != "ok" {
			t.Errorf("with them: %d %q %v", code, body, err)
		}
	})
	row(t, "T6", func(t *testing.T) {
		ask := func(user, pass string) (int, string) {
			code, body, err := (&request{method: "GET", url: f.url() + "/v1-k3s/server-bootstrap", user: user, pass: pass}).do()
			if err != nil {
				t.Fatal(err)
			}
			return code, body
		}
		if code, body := ask("server", serverPass); code != 200 || !strings.Contains(body, "ServerCAKey") {
			t.Errorf("server token: %d", code)
		}
		for _, u := range []string{"server", "node"} {
			if code, body := ask(u, agentPass); code != 401 && code != 403 || strings.Contains(body, "CAKey") {
				t.Errorf("agent token as %s: %d", u, code)
			}
		}
	})
	row(t, "P2", func(t *testing.T) {
		for _, pass := range []string{"", agentPass, "wrong"} {
			code, _, err := (&request{from: f, method: "POST", url: "https://127.0.0.1:6443/db/snapshot", user: "node", pass: pass, body: []byte(`{"operation":"save"}`)}).do()
			if err != nil || code != 401 && code != 403 {
				t.Errorf("password %q: %d %v", pass, code, err)
			}
		}
	})
	row(t, "P1", func(t *testing.T) {
		if out, err := f.run("etcd-snapshot", "save", "--name", "mine", "--token", serverPass); err != nil {
			t.Fatalf("save: %v %s", err, out)
		}
		files, _ := filepath.Glob(f.data("server/db/snapshots/mine-f1-*"))
		if len(files) != 1 || mode(t, files[0]) != 0o600 {
			t.Fatalf("files %v", files)
		}
		name := filepath.Base(files[0])
		if out, err := f.run("etcd-snapshot", "ls", "--token", serverPass); err != nil || !strings.Contains(out, name) {
			t.Errorf("ls: %v %s", err, out)
		}
		if out, err := f.run("etcd-snapshot", "delete", "--token", serverPass, name); err != nil {
			t.Errorf("delete: %v %s", err, out)
		}
		if _, err := os.Stat(files[0]); !os.IsNotExist(err) {
			t.Errorf("still there: %v", err)
		}
	})
	row(t, "S5", func(t *testing.T) {
		c, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid()))
		if err != nil || strings.Contains(string(c), serverPass) || strings.Contains(string(c), "cluster-init") || !strings.Contains(string(c), "k3s") {
			t.Errorf("process list shows %q %v", c, err)
		}
	})
	row(t, "R5", func(t *testing.T) {
		// A node that does not carry its member's name yet is no member to remove.
		b.eventually("the member's name on the node", time.Minute, func() error {
			o, err := f.nodeObject("f1")
			if err != nil {
				return err
			}
			if o.Metadata.Annotations["etcd.k3s.cattle.io/node-name"] == "" {
				return errors.New("not there yet")
			}
			return nil
		})
		f.must(t, http.MethodPatch, "/api/v1/nodes/f1", map[string]any{"metadata": map[string]any{"annotations": map[string]any{"etcd.k3s.cattle.io/remove": "true"}}}, 200)
		b.eventually("the refused annotation to go", time.Minute, func() error {
			o, err := f.nodeObject("f1")
			if err != nil {
				return err
			}
			if o.Metadata.Annotations["etcd.k3s.cattle.io/remove"] != "" {
				return errors.New("still there")
			}
			return nil
		})
		if v, _, err := f.voters(); err != nil || v != 1 {
			t.Errorf("%d voters %v", v, err)
		}
	})
	row(t, "N1", func(t *testing.T) {
		b.eventually("roles and EtcdIsVoter", time.Minute, func() error {
			o, err := f.nodeObject("f1")
			if err != nil {
				return err
			}
			l, a := o.Metadata.Labels, o.Metadata.Annotations
			if l["node-role.kubernetes.io/control-plane"] != "true" || l["node-role.kubernetes.io/etcd"] != "true" ||
				a["etcd.k3s.cattle.io/node-name"] != f.memberName() || a["etcd.k3s.cattle.io/node-address"] != f.ip || o.condition("EtcdIsVoter") != "True" {
				return fmt.Errorf("%v %v %v", l, a, o.Status.Conditions)
			}
			return nil
		})
	})
	row(t, "M1", func(t *testing.T) {
		o, err := f.nodeObject("f1")
		if err != nil {
			t.Fatal(err)
		}
		if o.Metadata.Labels["lab.standin/k3s"] != "true" || o.Status.NodeInfo.ContainerRuntimeVersion != "standin://0" || !strings.Contains(o.Status.NodeInfo.KubeletVersion, "standin") {
			t.Errorf("%+v", o)
		}
		r := &request{method: "GET", url: f.url() + "/ping"}
		if _, _, err := r.do(); err != nil || r.gotHeader.Get("X-K3s-Standin") != "1" {
			t.Errorf("header %v %v", r.gotHeader, err)
		}
		cmd := exec.Command(k3s.Path, "server", "--data-dir", t.TempDir())
		for _, e := range os.Environ() {
			if !strings.HasPrefix(e, "LAB_STANDIN=") {
				cmd.Env = append(cmd.Env, e)
			}
		}
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "LAB_STANDIN=1") {
			t.Errorf("starts without LAB_STANDIN=1: %v %s", err, out)
		}
	})

	row(t, "C1", func(t *testing.T) {
		for _, key := range []string{"cluster-init: true", "tls-san: [a]", "agent-token: x", "disable: [traefik]"} {
			dir := t.TempDir()
			cfg := filepath.Join(dir, "config.yaml")
			if err := os.WriteFile(cfg, []byte(key+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			p := w2.start(false, nil, "agent", "--config", cfg, "--server", f.url(), "--token", agentPass, "--data-dir", dir)
			_ = b.within(time.Minute, func() error {
				if p.running() {
					return errors.New("runs")
				}
				return nil
			})
			if c := p.codes(); len(c) == 0 || c[0] == 0 || !strings.Contains(p.text(), "not defined") {
				p.kill()
				t.Errorf("%s: ended with %v: %s", key, c, p.tail(3))
			}
		}
	})
	var tok string
	row(t, "T2", func(t *testing.T) {
		good, _ := os.ReadFile(f.data("server/token"))
		bad := "K10" + strings.Repeat("0", 64) + string(good)[67:]
		bad = strings.Replace(strings.TrimSpace(bad), "server:"+serverPass, "node:"+agentPass, 1)
		p := w2.work(f, bad)
		defer p.kill()
		b.eventually("the agent to say why", time.Minute, func() error {
			if !strings.Contains(p.text(), "does not match") {
				return errors.New("not yet")
			}
			return nil
		})
		if !p.running() || len(p.codes()) > 0 {
			t.Errorf("ended: %v", p.codes())
		}
		if _, err := f.nodeObject("w2"); !errors.Is(err, errNoNode) {
			t.Errorf("Node w2: %v", err)
		}
	})
	row(t, "T4", func(t *testing.T) {
		tok := f.bootstrapToken(t)
		id, _, _ := strings.Cut(tok[strings.Index(tok, "::")+2:], ".")
		if out, err := f.run("token", "delete", id); err != nil {
			t.Fatalf("token delete: %v %s", err, out)
		}
		p := w2.work(f, tok)
		defer p.kill()
		b.eventually("the agent to be refused", time.Minute, func() error {
			if !strings.Contains(p.text(), "401") && !strings.Contains(p.text(), "nauthorized") {
				return errors.New("not yet")
			}
			return nil
		})
		if !p.running() || len(p.codes()) > 0 {
			t.Errorf("ended: %v", p.codes())
		}
		if _, err := f.nodeObject("w2"); !errors.Is(err, errNoNode) {
			t.Errorf("Node w2: %v", err)
		}
	})
	row(t, "T3", func(t *testing.T) {
		tok = f.bootstrapToken(t)
		w2.work(f, tok, "--node-label", "gpu=yes")
		f.waitReady("w2", time.Minute)
	})
	row(t, "T5", func(t *testing.T) {
		p := w4.start(false, nil, append([]string{"server", "--server", f.url(), "--token", tok}, w4.base()...)...)
		b.eventually("the server to end", time.Minute, func() error {
			if p.running() {
				return errors.New("runs")
			}
			return nil
		})
		if ms, err := f.members(); err != nil || len(ms) != 1 {
			t.Errorf("members %v %v", ms, err)
		}
		if _, err := os.Stat(w4.data("server/tls/server-ca.key")); err == nil {
			t.Error("it holds the CA key")
		}
	})
	row(t, "S1", func(t *testing.T) {
		if code := w2.p.term(); code != 0 {
			t.Errorf("status %d", code)
		}
		if k3s.Kind == k3sbin.StandIn {
			pid, err := os.ReadFile(w2.data("agent/standin-pod.pid"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); err != nil {
				t.Errorf("the pod is gone: %v", err)
			}
			w2.work(f, tok)
			f.waitReady("w2", time.Minute)
			if again, _ := os.ReadFile(w2.data("agent/standin-pod.pid")); string(again) != string(pid) {
				t.Errorf("a second pod %s beside %s", again, pid)
			}
			w2.p.term()
		}
	})
	row(t, "T7", func(t *testing.T) {
		id, _, _ := strings.Cut(tok[strings.Index(tok, "::")+2:], ".")
		if out, err := f.run("token", "delete", id); err != nil {
			t.Fatalf("token delete: %v %s", err, out)
		}
		p := w2.work(f, tok, "--node-label", "gpu=yes", "--node-label", "again=1")
		b.eventually("the agent to run", time.Minute, func() error {
			if !strings.Contains(p.text(), "agent is up and running") {
				return errors.New("not yet")
			}
			return nil
		})
	})
	row(t, "N2", func(t *testing.T) {
		b.eventually("labels", time.Minute, func() error {
			o, err := f.nodeObject("w2")
			if err != nil {
				return err
			}
			if o.Metadata.Labels["again"] != "1" || o.Metadata.Labels["gpu"] != "yes" {
				return fmt.Errorf("%v", o.Metadata.Labels)
			}
			return nil
		})
	})
	row(t, "N3", func(t *testing.T) {
		before, err := f.nodeObject("w2")
		if err != nil {
			t.Fatal(err)
		}
		p := w3.work(f, agentPass, "--node-name", "w2")
		defer p.kill()
		b.eventually("403", time.Minute, func() error {
			if !strings.Contains(p.text(), "Node password rejected") && !strings.Contains(p.text(), "403") {
				return errors.New("not yet")
			}
			return nil
		})
		if !p.running() || len(p.codes()) > 0 {
			t.Errorf("ended: %v", p.codes())
		}
		after, err := f.nodeObject("w2")
		if err != nil || after.Metadata.UID != before.Metadata.UID || after.Status.Addresses[0] != before.Status.Addresses[0] {
			t.Errorf("Node changed: %+v %v", after, err)
		}
	})
	row(t, "N4", func(t *testing.T) {
		w2.p.kill()
		// The password goes with the Node only once it belongs to it, which a
		// controller sees to now and then.
		b.eventually("the node password to belong to the Node", time.Minute, func() error {
			o, err := f.nodeObject("w2")
			if err != nil {
				return err
			}
			code, body, err := f.admin(http.MethodGet, "/api/v1/namespaces/kube-system/secrets/w2.node-password.k3s", nil)
			if err != nil || code != http.StatusOK {
				return fmt.Errorf("read the secret: %d %v", code, err)
			}
			if !strings.Contains(body, o.Metadata.UID) {
				return errors.New("it has another owner or none")
			}
			return nil
		})
		f.must(t, http.MethodDelete, "/api/v1/nodes/w2", nil, 200)
		w3.work(f, agentPass, "--node-name", "w2")
		b.eventually("w2 on the other machine", 90*time.Second, func() error {
			o, err := f.nodeObject("w2")
			if err != nil {
				return err
			}
			for _, a := range o.Status.Addresses {
				if a.Address == w3.ip && o.condition("Ready") == "True" {
					return nil
				}
			}
			return fmt.Errorf("%+v", o.Status)
		})
	})
	row(t, "N5", func(t *testing.T) {
		w3.p.kill()
		b.eventually("Ready to become Unknown", 3*time.Minute, func() error {
			o, err := f.nodeObject("w2")
			if err != nil {
				return err
			}
			if s := o.condition("Ready"); s != "Unknown" {
				return fmt.Errorf("Ready is %q", s)
			}
			return nil
		})
	})
	row(t, "S2", func(t *testing.T) {
		uid, name := f.clusterUID(t), f.memberName()
		p.kill()
		f.start(true, nil, f.serverArgs(twoLearners)...)
		f.ready()
		if f.clusterUID(t) != uid || f.memberName() != name {
			t.Error("another cluster")
		}
	})
	row(t, "S3", func(t *testing.T) {
		uid := f.clusterUID(t)
		f.p.kill()
		f.moveAside(t)
		f.start(true, nil, f.serverArgs(twoLearners)...)
		f.ready()
		if f.clusterUID(t) == uid {
			t.Error("the same cluster out of nothing")
		}
	})
}
