package httpboot_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe/httpboot"
)

// shake does a handshake as firmware of 2022 does: TLS 1.2, RSA key exchange, no curves.
func shake(t *testing.T, server *tls.Config, roots *x509.CertPool, name string, now time.Time) error {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go func() { _ = tls.Server(a, server).Handshake() }()
	return tls.Client(b, &tls.Config{RootCAs: roots, ServerName: name, MaxVersion: tls.VersionTLS12, Time: func() time.Time { return now },
		CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA, tls.TLS_RSA_WITH_AES_256_GCM_SHA384}}).Handshake()
}

func TestBootCA(t *testing.T) {
	dir := t.TempDir()
	addr := netip.MustParseAddr("10.77.0.1")
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	ca, err := httpboot.OpenCA(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(ca.Path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := httpboot.OpenCA(dir, now.AddDate(1, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(again.Path); string(b) != string(first) {
		t.Error("a restart made another CA: every firmware would have to be set anew")
	}
	if st, err := os.Stat(filepath.Join(dir, "https-ca.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the key: %v, %v", st.Mode(), err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(first)
	server, err := again.TLS(addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []time.Time{now, now.AddDate(19, 0, 0), time.Date(2000, 2, 1, 0, 0, 0, 0, time.UTC)} {
		if err := shake(t, server, roots, "10.77.0.1", at); err != nil {
			t.Errorf("in %d: %v", at.Year(), err)
		}
	}
	if err := shake(t, server, roots, "10.77.0.2", now); err == nil {
		t.Error("the certificate is good for another address")
	}
	if err := shake(t, server, x509.NewCertPool(), "10.77.0.1", now); err == nil {
		t.Error("trusted without our CA")
	}
	// A key that is not the certificate's is no CA.
	other := t.TempDir()
	if _, err := httpboot.OpenCA(other, now); err != nil {
		t.Fatal(err)
	}
	key, _ := os.ReadFile(filepath.Join(other, "https-ca.key"))
	if err := os.WriteFile(filepath.Join(dir, "https-ca.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := httpboot.OpenCA(dir, now); err == nil {
		t.Error("a foreign key is taken")
	}
	_ = os.WriteFile(filepath.Join(dir, "https-ca.pem"), []byte("x"), 0o600)
	if _, err := httpboot.OpenCA(dir, now); err == nil {
		t.Error("garbage is taken for a CA, or replaced without a word")
	}
}
