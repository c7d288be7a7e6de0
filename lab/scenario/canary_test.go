package scenario

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func put(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCanaries(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	put(t, filepath.Join(dir, "centre/ca/root.key"), text)
	put(t, filepath.Join(dir, "centre/seal.key"), []byte("0123456789abcdef0123456789ABCDEF"))
	put(t, filepath.Join(dir, "centre/admin.yaml"), []byte("# keep\nserver: https://x\ntoken: muster_abcdefghijklmnopqrstuvwxyz\nca: |\n  x\n"))
	put(t, filepath.Join(dir, "centre/ca/root.crt"), []byte("public"))
	secrets, err := canaries(filepath.Join(dir, "centre"))
	if err != nil {
		t.Fatal(err)
	}
	if len(secrets) != 5 {
		t.Errorf("%d canaries, want token, seal key and three forms of the private key", len(secrets))
	}
	for name, c := range map[string]struct {
		content string
		found   bool
	}{
		"clean":          {"nothing here, not even public keys", false},
		"token":          {"GET / HTTP/1.1\r\nAuthorization: Bearer muster_abcdefghijklmnopqrstuvwxyz\r\n", true},
		"half a token":   {"muster_abcdefgh", false},
		"DER":            {"\x00\x01" + string(der) + "\x02", true},
		"PEM":            {string(text), true},
		"scalar":         {"xx" + string(scalar), true},
		"sealing key":    {"0123456789abcdef0123456789ABCDEF", true},
		"half a DER key": {string(der[:len(der)/3]), false},
	} {
		t.Run(name, func(t *testing.T) {
			place := t.TempDir()
			put(t, filepath.Join(place, "deep/net0.pcap"), []byte(c.content))
			if err := search(secrets, place); (err != nil) != c.found {
				t.Errorf("search: %v, want found: %v", err, c.found)
			}
		})
	}
	if err := search(secrets, filepath.Join(dir, "not-there")); err == nil {
		t.Error("a place that is not there: no error")
	}
	if err := searchCommandLines(secrets); err != nil {
		t.Error(err)
	}
	self, err := os.ReadFile("/proc/self/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	if err := searchCommandLines([]canary{{"ourselves", self}}); err == nil {
		t.Error("our own command line was not found")
	}
	put(t, filepath.Join(dir, "centre/admin.yaml"), []byte("server: x\n"))
	if _, err := canaries(filepath.Join(dir, "centre")); err == nil || !strings.Contains(err.Error(), "no token") {
		t.Errorf("an admin.yaml without token: %v", err)
	}
}

func TestAlterWhenNoImageThenError(t *testing.T) {
	for _, b := range [][]byte{nil, []byte("MZ"), make([]byte, 4096)} {
		if err := alter(b); err == nil {
			t.Errorf("%d bytes: no error", len(b))
		}
	}
}
