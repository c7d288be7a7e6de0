package server

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"

	"github.com/spf13/pflag"

	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/pki"
)

// apiServer is the real kube-apiserver in this process. There can be only one:
// its feature gates and its metrics are global.
type apiServer struct {
	handler  http.Handler
	authn    authenticator.Request
	loopback *rest.Config
	run      func(context.Context) error
}

// admission is what stays on: what k3s and muster rely on. The rest costs
// start time and watches.
var admission = sets.New("NamespaceLifecycle", "NodeRestriction")

// publicPort makes the apiserver publish the supervisor's port in the
// kubernetes Endpoints, although it listens on another one.
type publicPort struct {
	net.Listener
	addr net.Addr
}

func (p publicPort) Addr() net.Addr { return p.addr }

func serviceIP(cfg *conf.Config) (net.IP, error) {
	_, n, err := net.ParseCIDR(cfg.List("service-cidr")[0])
	if err != nil {
		return nil, err
	}
	ip := n.IP.To4()
	if ip == nil {
		return nil, fmt.Errorf("service-cidr: the stand-in is IPv4 only")
	}
	return net.IPv4(ip[0], ip[1], ip[2], ip[3]+1), nil
}

func newAPIServer(ctx context.Context, cfg *conf.Config, t pki.Tree) (*apiServer, error) {
	advertise := cfg.NodeIP
	if a := cfg.Str("advertise-address"); a != "" {
		advertise = a
	}
	var off []string
	for _, p := range kubeoptions.AllOrderedPlugins {
		if !admission.Has(p) {
			off = append(off, p)
		}
	}
	args := []string{
		"--advertise-address=" + advertise,
		"--allow-privileged=true",
		"--anonymous-auth=false",
		"--api-audiences=https://kubernetes.default.svc." + cfg.Str("cluster-domain") + ",k3s",
		"--authorization-mode=Node,RBAC",
		"--bind-address=127.0.0.1",
		"--secure-port=6444",
		"--cert-dir=" + t.Path("temporary-certs"),
		"--client-ca-file=" + t.Path("client-ca.crt"),
		"--tls-cert-file=" + t.Path("serving-kube-apiserver.crt"),
		"--tls-private-key-file=" + t.Path("serving-kube-apiserver.key"),
		"--enable-admission-plugins=" + strings.Join(sets.List(admission), ","),
		"--disable-admission-plugins=" + strings.Join(off, ","),
		"--enable-bootstrap-token-auth=true",
		"--etcd-servers=https://127.0.0.1:2379",
		"--etcd-cafile=" + t.Path("etcd/server-ca.crt"),
		"--etcd-certfile=" + t.Path("etcd/client.crt"),
		"--etcd-keyfile=" + t.Path("etcd/client.key"),
		"--kubelet-client-certificate=" + t.Path("client-kube-apiserver.crt"),
		"--kubelet-client-key=" + t.Path("client-kube-apiserver.key"),
		"--proxy-client-cert-file=" + t.Path("client-auth-proxy.crt"),
		"--proxy-client-key-file=" + t.Path("client-auth-proxy.key"),
		"--requestheader-client-ca-file=" + t.Path("request-header-ca.crt"),
		"--requestheader-allowed-names=system:auth-proxy",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--service-account-issuer=https://kubernetes.default.svc." + cfg.Str("cluster-domain"),
		"--service-account-key-file=" + t.Path("service.key"),
		"--service-account-signing-key-file=" + t.Path("service.key"),
		"--service-cluster-ip-range=" + cfg.List("service-cidr")[0],
		"--service-node-port-range=" + cfg.Str("service-node-port-range"),
		"--storage-backend=etcd3",
		"--profiling=false",
		"--enable-priority-and-fairness=false",
	}
	for _, a := range cfg.List("kube-apiserver-arg") {
		args = append(args, "--"+strings.TrimLeft(a, "-"))
	}
	o := options.NewServerRunOptions()
	fs := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	named := o.Flags()
	for _, f := range named.FlagSets {
		fs.AddFlagSet(f)
	}
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if err := o.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, err
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	done, err := o.Complete(ctx)
	if err != nil {
		return nil, err
	}
	if errs := done.Validate(); len(errs) != 0 {
		return nil, fmt.Errorf("apiserver options: %v", errs)
	}
	c, err := app.NewConfig(done)
	if err != nil {
		return nil, err
	}
	g := c.KubeAPIs.ControlPlane.Generic
	g.SecureServing.Listener = publicPort{g.SecureServing.Listener, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 6443}}
	// No OpenAPI documents: nothing here reads them, and they cost seconds.
	g.SkipOpenAPIInstallation = true
	c.ApiExtensions.GenericConfig.SkipOpenAPIInstallation = true
	c.Aggregator.GenericConfig.SkipOpenAPIInstallation = true
	completed, err := c.Complete()
	if err != nil {
		return nil, err
	}
	chain, err := app.CreateServerChain(completed)
	if err != nil {
		return nil, err
	}
	prepared, err := chain.PrepareRun()
	if err != nil {
		return nil, err
	}
	loop := rest.CopyConfig(chain.GenericAPIServer.LoopbackClientConfig)
	loop.QPS, loop.Burst, loop.Timeout = 100, 200, 30*time.Second
	return &apiServer{
		handler: chain.GenericAPIServer.Handler, authn: g.Authentication.Authenticator,
		loopback: loop, run: prepared.Run,
	}, nil
}
