package node

import (
	"encoding/json"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

// balancer is the agent's way to the servers: a TCP proxy on the loopback that
// goes to the next server when one cannot be dialled. It looks no deeper: a
// server that answers 503 stays where it is, as with k3s.
type balancer struct {
	file string
	base string // address of the configured server URL

	mu    sync.Mutex
	state lbFile
	cur   string
	conns map[net.Conn]string
}

// lbFile is k3s-agent-load-balancer.json.
type lbFile struct {
	ServerURL       string   `json:"ServerURL"`
	ServerAddresses []string `json:"ServerAddresses"`
}

func newBalancer(dir, serverURL, port string) (*balancer, net.Listener, error) {
	u, err := url.Parse(serverURL)
	if err != nil {
		return nil, nil, err
	}
	base := u.Host
	if u.Port() == "" {
		base = net.JoinHostPort(u.Hostname(), "443")
	}
	b := &balancer{file: filepath.Join(dir, "k3s-agent-load-balancer.json"), base: base, conns: map[net.Conn]string{}}
	if raw, err := os.ReadFile(b.file); err == nil {
		var f lbFile
		if json.Unmarshal(raw, &f) == nil && f.ServerURL == serverURL {
			b.state = f
		}
	}
	b.state.ServerURL = serverURL
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return nil, nil, err
	}
	go b.serve(l)
	proc.Info("Running load balancer k3s-agent-load-balancer %s -> %v [default: %s]", l.Addr(), b.state.ServerAddresses, base)
	return b, l, nil
}

// set takes a new list of servers; connections to one that is gone are closed.
func (b *balancer) set(addrs []string) {
	if len(addrs) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	addrs = slices.Sorted(slices.Values(addrs))
	if slices.Equal(addrs, b.state.ServerAddresses) {
		return
	}
	b.state.ServerAddresses = addrs
	for c, to := range b.conns {
		if !slices.Contains(addrs, to) && to != b.base {
			_ = c.Close()
		}
	}
	raw, err := json.Marshal(b.state)
	if err == nil {
		if err = os.MkdirAll(filepath.Dir(b.file), 0o700); err == nil {
			err = os.WriteFile(b.file, raw, 0o600)
		}
	}
	if err != nil {
		proc.Error("write load balancer file: %v", err)
	}
	proc.Info("Updated load balancer k3s-agent-load-balancer server addresses -> %v [default: %s]", addrs, b.base)
}

func (b *balancer) order() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := []string{}
	for _, a := range append([]string{b.cur}, append(slices.Clone(b.state.ServerAddresses), b.base)...) {
		if a != "" && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

func (b *balancer) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go b.forward(c)
	}
}

func (b *balancer) forward(c net.Conn) {
	defer c.Close()
	for _, a := range b.order() {
		up, err := net.DialTimeout("tcp", a, 5*time.Second)
		if err != nil {
			continue
		}
		b.mu.Lock()
		b.cur = a
		b.conns[up] = a
		b.mu.Unlock()
		done := make(chan struct{}, 2)
		cp := func(dst, src net.Conn) {
			_, _ = io.Copy(dst, src)
			done <- struct{}{}
		}
		go cp(up, c)
		go cp(c, up)
		<-done
		_ = up.Close()
		b.mu.Lock()
		delete(b.conns, up)
		b.mu.Unlock()
		return
	}
}
