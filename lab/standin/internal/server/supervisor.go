package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/csv"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/pki"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
	"github.com/muster-edge/muster/lab/standin/internal/store"
)

// supervisor answers on 6443: its own paths, and everything else through the
// apiserver in this process.
type supervisor struct {
	cfg   *conf.Config
	tree  pki.Tree
	store *store.Store

	routed atomic.Bool // false: everything is "starting"
	core   atomic.Bool // core controllers run
	api    atomic.Pointer[apiServer]
	kube   atomic.Pointer[kube]

	passMu sync.Mutex
	reads  chan struct{}
	writes chan struct{}
}

func newSupervisor(cfg *conf.Config, tree pki.Tree, st *store.Store) *supervisor {
	return &supervisor{cfg: cfg, tree: tree, store: st, reads: make(chan struct{}, 20), writes: make(chan struct{}, 10)}
}

// serve listens on bind-address:6443 until ctx ends.
func (s *supervisor) serve(ctx context.Context) error {
	host := s.cfg.Str("bind-address")
	l, err := net.Listen("tcp", net.JoinHostPort(host, s.cfg.Str("https-listen-port")))
	if err != nil {
		return err
	}
	crt, err := tls.LoadX509KeyPair(s.tree.Path("serving-kube-apiserver.crt"), s.tree.Path("serving-kube-apiserver.key"))
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler: s, ReadHeaderTimeout: 32 * time.Second,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{crt}, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2", "http/1.1"}},
		ErrorLog:  proc.NoLog,
	}
	go func() {
		<-ctx.Done()
		_ = srv.Close()
	}()
	go func() { _ = srv.ServeTLS(l, "", "") }()
	return nil
}

func (s *supervisor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(proc.Header, "1")
	if !s.routed.Load() {
		status(w, http.StatusServiceUnavailable, "starting")
		return
	}
	p := r.URL.Path
	switch {
	case p == "/ping":
		w.Header().Set("Content-Type", "text/plain")
		_, _ = io.WriteString(w, "pong")
	case p == "/cacerts":
		b, err := os.ReadFile(s.tree.Path("server-ca.crt"))
		if err != nil {
			status(w, http.StatusInternalServerError, err.Error())
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write(b)
	case strings.HasPrefix(p, "/static/"):
		http.StripPrefix("/static/", http.FileServer(http.Dir(s.cfg.ServerDir("static")))).ServeHTTP(w, r)
	case p == "/db/info":
		s.dbInfo(w, r)
	case p == "/db/snapshot":
		if s.need(w, r, groupServer) {
			s.snapshot(w, r)
		}
	case strings.HasPrefix(p, "/v1-k3s/"):
		s.own(w, r, strings.TrimPrefix(p, "/v1-k3s/"))
	default:
		a := s.api.Load()
		if a == nil {
			status(w, http.StatusServiceUnavailable, "apiserver not ready")
			return
		}
		a.handler.ServeHTTP(w, r)
	}
}

func status(w http.ResponseWriter, code int, msg string) {
	st := metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Message: msg, Code: int32(code), Reason: metav1.StatusReason(strings.ReplaceAll(http.StatusText(code), " ", "")),
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(st)
}

const (
	groupServer  = "k3s:server"
	groupAgent   = "k3s:agent"
	groupNodes   = "system:nodes"
	groupBoot    = "system:bootstrappers:k3s:default-node-token"
	groupMasters = "system:masters"
)

// caller finds out who asks: by client certificate, by the passwd file or by
// the apiserver (bootstrap tokens). nil means nobody.
func (s *supervisor) caller(r *http.Request) (name string, groups []string) {
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		c := r.TLS.PeerCertificates[0]
		b, err := os.ReadFile(s.tree.Path("client-ca.crt"))
		if err == nil {
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(b)
			if _, err := c.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
				return c.Subject.CommonName, c.Subject.Organization
			}
		}
	}
	if _, pw, ok := r.BasicAuth(); ok {
		user, _, _ := r.BasicAuth()
		for _, e := range s.passwd() {
			if e[0] == pw && e[1] == user {
				return e[1], strings.Split(e[3], ",")
			}
		}
		return "", nil
	}
	if strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ") {
		if a := s.api.Load(); a != nil {
			if resp, ok, err := a.authn.AuthenticateRequest(r.Clone(r.Context())); err == nil && ok {
				return resp.User.GetName(), resp.User.GetGroups()
			}
		}
	}
	return "", nil
}

// need answers 401 or 403 unless the caller is in one of the groups.
func (s *supervisor) need(w http.ResponseWriter, r *http.Request, groups ...string) bool {
	name, have := s.caller(r)
	if name == "" {
		if strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ") && s.api.Load() == nil {
			status(w, http.StatusServiceUnavailable, "apiserver not ready")
			return false
		}
		status(w, http.StatusUnauthorized, "not authorized")
		return false
	}
	for _, g := range groups {
		if slices.Contains(have, g) {
			return true
		}
	}
	status(w, http.StatusForbidden, "forbidden")
	return false
}

// passwd reads cred/passwd: password,user,uid,groups.
func (s *supervisor) passwd() [][]string {
	f, err := os.Open(s.cfg.ServerDir("cred", "passwd"))
	if err != nil {
		return nil
	}
	defer f.Close()
	rd := csv.NewReader(f)
	rd.FieldsPerRecord = 4
	all, _ := rd.ReadAll()
	return all
}

func loopback(r *http.Request) bool {
	h, _, err := net.SplitHostPort(r.RemoteAddr)
	ip := net.ParseIP(h)
	return err == nil && ip != nil && ip.IsLoopback()
}

func (s *supervisor) dbInfo(w http.ResponseWriter, r *http.Request) {
	if !loopback(r) && !s.need(w, r, groupServer) {
		return
	}
	in, err := s.store.ReadInfo(r.Context())
	if err != nil {
		status(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(in)
}

// own answers what is below /v1-k3s/. In-flight requests are capped.
func (s *supervisor) own(w http.ResponseWriter, r *http.Request, p string) {
	slots := s.reads
	if r.Method != http.MethodGet {
		slots = s.writes
	}
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	default:
		w.Header().Set("Retry-After", "1")
		status(w, http.StatusTooManyRequests, "too many requests, please try again later")
		return
	}
	agent := []string{groupAgent, groupNodes, groupBoot}
	switch p {
	case "server-bootstrap":
		if !s.need(w, r, groupServer) {
			return
		}
		d, err := pki.ReadData(s.cfg.ServerDir())
		if err != nil {
			status(w, http.StatusInternalServerError, err.Error())
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(d)
	case "config":
		if s.need(w, r, append(agent, groupServer)...) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(Critical(s.cfg))
		}
	case "client-ca.crt", "server-ca.crt":
		if s.need(w, r, append(agent, groupServer)...) {
			http.ServeFile(w, r, s.tree.Path(p))
		}
	case "apiservers":
		if s.need(w, r, agent...) {
			s.apiservers(w, r)
		}
	case "readyz":
		if !s.need(w, r, append(agent, groupServer)...) {
			return
		}
		if !s.core.Load() {
			status(w, http.StatusServiceUnavailable, "runtime core not ready")
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		_, _ = io.WriteString(w, "ok")
	case "client-kubelet.crt", "serving-kubelet.crt":
		if s.need(w, r, agent...) {
			s.kubeletCert(w, r, p == "serving-kubelet.crt")
		}
	case "client-kube-proxy.crt":
		if s.need(w, r, agent...) {
			s.sign(w, r, "client-ca", pkix.Name{CommonName: "system:kube-proxy"}, nil, nil, pki.ClientUse())
		}
	case "client-k3s-controller.crt":
		if s.need(w, r, agent...) {
			s.sign(w, r, "client-ca", pkix.Name{CommonName: "system:k3s-controller"}, nil, nil, pki.ClientUse())
		}
	case "connect":
		if s.need(w, r, groupNodes) {
			status(w, http.StatusNotImplemented, "no tunnel in the stand-in")
		}
	default:
		status(w, http.StatusNotFound, "not found")
	}
}

func (s *supervisor) sign(w http.ResponseWriter, r *http.Request, ca string, subj pkix.Name, names []string, ips []net.IP, use []x509.ExtKeyUsage) {
	if r.Method != http.MethodPost {
		status(w, http.StatusMethodNotAllowed, "the stand-in signs requests only")
		return
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	if err != nil {
		status(w, http.StatusBadRequest, err.Error())
		return
	}
	if blk, _ := pem.Decode(b); blk != nil {
		b = blk.Bytes
	}
	req, err := x509.ParseCertificateRequest(b)
	if err == nil {
		err = req.CheckSignature()
	}
	if err == nil {
		if _, ec := req.PublicKey.(*ecdsa.PublicKey); !ec {
			err = errors.New("unsupported key")
		}
	}
	if err != nil {
		status(w, http.StatusBadRequest, "invalid certificate request: "+err.Error())
		return
	}
	a, err := s.tree.Load(ca)
	if err != nil {
		status(w, http.StatusInternalServerError, err.Error())
		return
	}
	crt, err := a.Sign(req.PublicKey, subj, names, ips, use, time.Now())
	if err != nil {
		status(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write(crt)
}

func (s *supervisor) kubeletCert(w http.ResponseWriter, r *http.Request, serving bool) {
	node, pw := r.Header.Get("k3s-Node-Name"), r.Header.Get("k3s-Node-Password")
	if node == "" || pw == "" {
		status(w, http.StatusBadRequest, "node name and password are required")
		return
	}
	user, groups := s.caller(r)
	if slices.Contains(groups, groupNodes) {
		if user != "system:node:"+node {
			status(w, http.StatusForbidden, "header node name does not match auth node name")
			return
		}
		// A certificate of a deleted Node is worth nothing.
		if k := s.kube.Load(); k != nil {
			if gone, err := k.nodeGone(r.Context(), node); err != nil || gone {
				status(w, http.StatusUnauthorized, fmt.Sprintf("unable to verify node: nodes %q not found", node))
				return
			}
		}
	}
	if code, err := s.checkNodePassword(r.Context(), node, pw); err != nil {
		proc.Error("Node password validation failed for %s: %v", node, err)
		status(w, code, err.Error())
		return
	}
	if !serving {
		s.sign(w, r, "client-ca", pkix.Name{CommonName: "system:node:" + node, Organization: []string{groupNodes}}, nil, nil, pki.ClientUse())
		return
	}
	ips := []net.IP{net.IPv4(127, 0, 0, 1)}
	for _, p := range strings.Split(r.Header.Get("k3s-Node-IP"), ",") {
		if ip := net.ParseIP(strings.TrimSpace(p)); ip != nil {
			ips = append(ips, ip)
		}
	}
	s.sign(w, r, "server-ca", pkix.Name{CommonName: node}, []string{node, "localhost"}, ips, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth})
}

func (s *supervisor) apiservers(w http.ResponseWriter, r *http.Request) {
	var out []string
	c := s.store.Client()
	if c != nil {
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		if resp, err := c.Get(ctx, addressKey); err == nil && len(resp.Kvs) > 0 {
			_ = json.Unmarshal(resp.Kvs[0].Value, &out)
		}
	}
	if len(out) == 0 {
		out = []string{net.JoinHostPort(s.cfg.NodeIP, s.cfg.Str("https-listen-port"))}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out)
}

// addressKey holds the API addresses, for agents that ask a server whose
// apiserver does not answer yet.
const addressKey = "k3s/apiaddresses"
