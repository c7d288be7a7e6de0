package k3s

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// etcd makes the one call of etcd's API that k3s offers no way to when the
// member never came up: Cluster.MemberRemove. A gRPC call without streams is
// one HTTP/2 request with a five-byte frame, so that no client library is
// needed on nodes.
type etcd struct {
	url  string
	http *http.Client
}

func (m *Manager) etcdAddr() string { return "https://127.0.0.1:2379" }

// newEtcd uses the certificates of this server in dir (server/tls/etcd).
func newEtcd(dir, addr string) (*etcd, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
	if err != nil {
		return nil, fmt.Errorf("k3s: reach etcd: %w", err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "server-ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("k3s: reach etcd: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, errors.New("k3s: reach etcd: the CA file holds no certificate")
	}
	p := new(http.Protocols)
	p.SetHTTP2(true)
	return &etcd{url: addr, http: &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{
		Protocols:       p,
		TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
	}}}, nil
}

func (e *etcd) close() { e.http.CloseIdleConnections() }

// grpcNotFound: the member is not there (any more).
const grpcNotFound = "5"

func (e *etcd) removeMember(ctx context.Context, id uint64) error {
	// message MemberRemoveRequest { uint64 ID = 1; }
	msg := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), id)
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg)))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.url+"/etcdserverpb.Cluster/MemberRemove", bytes.NewReader(append(body, msg...)))
	if err != nil {
		return fmt.Errorf("k3s: remove etcd member: %w", err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	res, err := e.http.Do(req)
	if err != nil {
		return fmt.Errorf("k3s: remove etcd member: %w", err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(res.Body, 1<<20)); err != nil { // the trailers come after it
		return fmt.Errorf("k3s: remove etcd member: %w", err)
	}
	status, text := res.Trailer.Get("Grpc-Status"), res.Trailer.Get("Grpc-Message")
	if status == "" { // an answer without a message has it in the header
		status, text = res.Header.Get("Grpc-Status"), res.Header.Get("Grpc-Message")
	}
	if status == "0" || status == grpcNotFound {
		return nil
	}
	if t, err := url.PathUnescape(text); err == nil {
		text = t
	}
	return fmt.Errorf("k3s: remove etcd member %x: HTTP status %d, gRPC status %q: %.200s", id, res.StatusCode, status, text)
}
