// Package node is `k3s agent` of the stand-in, and the agent inside a server:
// the handshake with the supervisor, certificates, the local load balancer and
// a kubelet that registers a Node and renews its Lease but runs nothing. One
// marker process stands for the pods that outlive a restart of k3s.
package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/lab/standin/internal/access"
	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

type agent struct {
	cfg      *conf.Config
	sd       *proc.Shutdown
	url      string // of the supervisor: the load balancer, or the own server
	token    string
	password string
	lb       *balancer
	info     *access.Info // with the token
	certInfo *access.Info // with the kubelet's certificate
}

// Run is the agent of a node. On a server own is true: the supervisor is this
// process itself and there is no load balancer.
func Run(ctx context.Context, sd *proc.Shutdown, cfg *conf.Config, own bool) error {
	a := &agent{cfg: cfg, sd: sd, token: cfg.Token}
	var err error
	if a.password, err = conf.NodePassword(); err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.AgentDir("etc"), 0o700); err != nil {
		return err
	}
	if own {
		a.url = "https://127.0.0.1:" + cfg.Str("https-listen-port")
		b, err := os.ReadFile(cfg.ServerDir("agent-token"))
		if err != nil {
			return err
		}
		a.token = strings.TrimSpace(string(b))
	} else {
		if cfg.Server == "" {
			return errors.New("--server is required")
		}
		if a.token == "" && a.cert() == nil {
			return errors.New("--token is required")
		}
		if a.token != "" {
			if _, err := access.ParseToken(a.token); err != nil {
				return err
			}
		}
		proc.Info("Starting k3s agent %s (stand-in, not k3s)", proc.Version)
		lb, l, err := newBalancer(cfg.AgentDir("etc"), cfg.Server, cfg.Str("lb-server-port"))
		if err != nil {
			return fmt.Errorf("failed to listen on 127.0.0.1:%s: %w", cfg.Str("lb-server-port"), err)
		}
		go func() {
			<-ctx.Done()
			_ = l.Close()
		}()
		a.lb, a.url = lb, "https://"+l.Addr().String()
	}
	if !a.connect(ctx) {
		return context.Cause(ctx)
	}
	for {
		err := a.handshake(ctx)
		if err == nil {
			break
		}
		proc.Info("Waiting to retrieve agent configuration; server is not ready: %v", err)
		if !proc.Sleep(ctx, 5*time.Second+jitter(2*time.Second)) {
			return context.Cause(ctx)
		}
	}
	return a.kubelet(ctx, own)
}

func jitter(d time.Duration) time.Duration {
	n, _ := rand.Int(rand.Reader, big.NewInt(int64(d)))
	return time.Duration(n.Int64())
}

// cert is the kubelet's certificate of an earlier start, if it loads.
func (a *agent) cert() *tls.Certificate {
	c, err := tls.LoadX509KeyPair(a.cfg.AgentDir("client-kubelet.crt"), a.cfg.AgentDir("client-kubelet.key"))
	if err != nil {
		return nil
	}
	return &c
}

// connect validates the server, for ever: agents never give up.
func (a *agent) connect(ctx context.Context) bool {
	for {
		tok := a.token
		info, err := access.Validate(ctx, a.url, tok, "node", nil)
		if err == nil {
			a.info = info
			if c := a.cert(); c != nil {
				a.certInfo = info.Cert(c)
			}
			return true
		}
		proc.Error("Failed to validate connection to cluster at %s: %v", a.cfg.Server, err)
		if !proc.Sleep(ctx, 2*time.Second) {
			return false
		}
	}
}

// best asks with the certificate where there is one.
func (a *agent) best() *access.Info {
	if a.certInfo != nil {
		return a.certInfo
	}
	return a.info
}

// handshake fetches the configuration, the authorities and four certificates.
func (a *agent) handshake(ctx context.Context) error {
	if _, err := a.get(ctx, "/v1-k3s/config"); err != nil {
		return err
	}
	for _, ca := range []string{"client-ca.crt", "server-ca.crt"} {
		b, err := a.get(ctx, "/v1-k3s/"+ca)
		if err != nil {
			return err
		}
		if err := os.WriteFile(a.cfg.AgentDir(ca), b, 0o644); err != nil {
			return err
		}
	}
	for _, name := range []string{"serving-kubelet", "client-kubelet", "client-kube-proxy", "client-k3s-controller"} {
		if err := a.request(ctx, name); err != nil {
			return err
		}
	}
	for _, k := range []struct{ file, crt string }{{"kubelet.kubeconfig", "client-kubelet"}, {"kubeproxy.kubeconfig", "client-kube-proxy"}, {"k3scontroller.kubeconfig", "client-k3s-controller"}} {
		if err := a.kubeconfig(k.file, k.crt); err != nil {
			return err
		}
	}
	if c := a.cert(); c != nil {
		a.certInfo = a.info.Cert(c)
	}
	a.learnServers(ctx)
	return nil
}

// get asks with the certificate and, when that is refused, with the token.
func (a *agent) get(ctx context.Context, path string) ([]byte, error) {
	return a.do(ctx, http.MethodGet, path, nil, nil)
}

func (a *agent) do(ctx context.Context, method, path string, body []byte, h map[string]string) ([]byte, error) {
	b, err := a.best().Do(ctx, method, path, body, h)
	var se *access.StatusError
	if a.certInfo != nil && a.token != "" && errors.As(err, &se) && se.Code == http.StatusUnauthorized {
		return a.info.Do(ctx, method, path, body, h)
	}
	return b, err
}

// request has one key signed.
func (a *agent) request(ctx context.Context, name string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: a.cfg.NodeName}}, key)
	if err != nil {
		return err
	}
	crt, err := a.do(ctx, http.MethodPost, "/v1-k3s/"+name+".crt", csr, map[string]string{
		"k3s-Node-Name": a.cfg.NodeName, "k3s-Node-Password": a.password, "k3s-Node-IP": a.cfg.NodeIP,
	})
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(a.cfg.AgentDir(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	return os.WriteFile(a.cfg.AgentDir(name+".crt"), crt, 0o600)
}

func (a *agent) kubeconfig(file, crt string) error {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: local
  cluster: {server: %q, certificate-authority: %q}
contexts:
- name: Default
  context: {cluster: local, namespace: default, user: user}
current-context: Default
users:
- name: user
  user: {client-certificate: %q, client-key: %q}
`, a.url, a.cfg.AgentDir("server-ca.crt"), a.cfg.AgentDir(crt+".crt"), a.cfg.AgentDir(crt+".key"))
	return os.WriteFile(a.cfg.AgentDir(file), []byte(text), 0o600)
}

// learnServers asks for the list of API servers.
func (a *agent) learnServers(ctx context.Context) {
	if a.lb == nil {
		return
	}
	b, err := a.get(ctx, "/v1-k3s/apiservers")
	if err != nil {
		return
	}
	var addrs []string
	if json.Unmarshal(b, &addrs) == nil {
		a.lb.set(addrs)
	}
}

func (a *agent) podFile() string { return filepath.Join(a.cfg.AgentDir(), "standin-pod.pid") }
