package device_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// TestTLSWithAKeyInTheTPM shakes hands with the LDevID key as client key; the
// twin presents the same certificate with a key of its own.
func TestTLSWithAKeyInTheTPM(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true})
	d := open(t, s)
	key := d.Signer()
	sign := func(public crypto.PublicKey) []byte {
		der, err := s.CA.Certify(public, func(c *x509.Certificate) {
			c.KeyUsage, c.UnknownExtKeyUsage = x509.KeyUsageDigitalSignature, nil
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
			c.DNSNames = []string{"centre"}
		})
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	serverKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stolen, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certificate := sign(key.Public())
	server := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{sign(serverKey.Public())}, PrivateKey: serverKey}},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    s.CA.Roots(),
	}
	for _, c := range []struct {
		when string
		key  crypto.Signer
		ok   bool
	}{{"when the key is the TPM's", key, true}, {"when the key is another", stolen, false}} {
		t.Run(c.when, func(t *testing.T) {
			near, far := net.Pipe()
			defer near.Close()
			defer far.Close()
			done := make(chan error, 1)
			go func() {
				conn := tls.Server(far, server)
				done <- conn.Handshake()
				_ = conn.Close()
			}()
			client := tls.Client(near, &tls.Config{
				MinVersion: tls.VersionTLS13, RootCAs: s.CA.Roots(), ServerName: "centre",
				Certificates: []tls.Certificate{{
					Certificate: [][]byte{certificate}, PrivateKey: c.key,
					SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
				}},
			})
			go func() { // reads the server's verdict, and its tickets
				_ = client.Handshake()
				_, _ = client.Read(make([]byte, 1))
			}()
			if err := <-done; (err == nil) != c.ok {
				t.Errorf("handshake: %v", err)
			}
		})
	}
}

func TestOpenWhenThereIsNoTPMThenErrNoTPM(t *testing.T) {
	if _, err := device.Open(filepath.Join(t.TempDir(), "tpm")); !errors.Is(err, device.ErrNoTPM) {
		t.Errorf("got %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := device.Open(file); err == nil || errors.Is(err, device.ErrNoTPM) {
		t.Errorf("a plain file: %v", err)
	}
}

func TestIdentityWhenCancelledThenError(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := open(t, s).Identity(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestHostileArguments(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true})
	d := open(t, s)
	if _, err := d.ActivateCredential([]byte{0, 1, 2}, []byte{0, 1, 2}); err == nil {
		t.Error("activation without identity")
	}
	identity(t, d)
	for _, b := range [][]byte{nil, {0}, {0xff, 0xff}, make([]byte, 5000), {0, 1, 2}, {0, 3, 0, 1, 2}} {
		if _, err := d.ActivateCredential(b, b); err == nil {
			t.Errorf("activation of %x", b[:min(len(b), 8)])
		}
	}
	for _, pcrs := range [][]int{nil, {-1}, {24}} {
		if _, _, _, err := d.Quote([32]byte{}, pcrs); err == nil {
			t.Errorf("quote of %v", pcrs)
		}
	}
}

// TestQuoteWhenTheBankIsMissingThenError: a TPM whose firmware has only the
// SHA-1 bank switched on.
func TestQuoteWhenTheBankIsMissingThenError(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true, Banks: "sha1"})
	if _, _, _, err := open(t, s).Quote([32]byte{}, []int{0, 4}); err == nil {
		t.Error("a quote without SHA-256 bank")
	}
}
