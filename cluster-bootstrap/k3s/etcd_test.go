package k3s

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
)

// TestRemoveMember speaks to a server that answers as etcd's gRPC does; that
// etcd itself understands it is shown by TestSite.
func TestRemoveMember(t *testing.T) {
	var got []byte
	status, message, inHeader := "0", "", false
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 || r.URL.Path != "/etcdserverpb.Cluster/MemberRemove" || r.Header.Get("Content-Type") != "application/grpc" {
			t.Errorf("%s %s %v", r.Proto, r.URL, r.Header)
		}
		if len(r.TLS.PeerCertificates) != 1 {
			t.Error("no client certificate")
		}
		got, _ = io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/grpc")
		if inHeader {
			w.Header().Set("Grpc-Status", status)
			w.Header().Set("Grpc-Message", message)
			return
		}
		w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
		_, _ = w.Write([]byte{0, 0, 0, 0, 0})
		w.Header().Set("Grpc-Status", status)
		w.Header().Set("Grpc-Message", message)
	}))
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	srv.StartTLS()
	defer srv.Close()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "client"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<34, 0)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for f, b := range map[string][]byte{
		"client.crt":    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		"client.key":    pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"server-ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}),
	} {
		if err := launch.WriteBytes(filepath.Join(dir, f), b); err != nil {
			t.Fatal(err)
		}
	}
	e, err := newEtcd(dir, srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	for _, inHeader = range []bool{false, true} {
		status, message = "0", ""
		if err := e.removeMember(t.Context(), 300); err != nil {
			t.Error(err)
		}
		if want := []byte{0, 0, 0, 0, 3, 0x08, 0xac, 0x02}; !slices.Equal(got, want) {
			t.Errorf("sent % x", got)
		}
		status = grpcNotFound // is gone already
		if err := e.removeMember(t.Context(), 300); err != nil {
			t.Error(err)
		}
		status, message = "9", "etcdserver: re-configuration failed due to not enough started members"
		if err := e.removeMember(t.Context(), 300); err == nil || !strings.Contains(err.Error(), "not enough started") {
			t.Errorf("a refusal: %v", err)
		}
		status = ""
		if err := e.removeMember(t.Context(), 300); err == nil {
			t.Error("an answer without a status counts as done")
		}
	}
}

func TestLastVoter(t *testing.T) {
	m := func(id uint64, learner bool) member { return member{dbMember: dbMember{ID: id, Learner: learner}} }
	all := []member{m(1, false), m(2, false), m(3, true)}
	for _, c := range []struct {
		going []member
		ok    bool
	}{{all[:1], true}, {all[2:], true}, {all[:2], false}, {all, false}} {
		if err := lastVoter(all, c.going); (err == nil) != c.ok {
			t.Errorf("%v: %v", c.going, err)
		}
	}
	if lastVoter(all[:1], all[:1]) == nil {
		t.Error("the only voter may go")
	}
}
