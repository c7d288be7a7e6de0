package stepca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/muster-edge/muster/internal/flush"
	"github.com/muster-edge/muster/pki"
)

// Files in DIR/ca.
const (
	rootCert, rootKey     = "root.crt", "root.key"
	nodeCert, nodeKey     = "node.crt", "node.key"
	serverCert, serverKey = "server.crt", "server.key"

	tempPrefix = ".ca.new-"
	maxFile    = 64 << 10
)

func caDir(dir string) string { return filepath.Join(dir, "ca") }

// ordersKey is the file of a tenant's orders key. The name is a DNS label, so
// that it cannot leave the folder.
func ordersKey(tenant string) string { return "orders-" + tenant + ".key" }

func wrap(verb string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("stepca: %s: %w", verb, err)
}

func encodeCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("stepca: encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// readBlock reads a file that holds exactly one PEM block of the kind.
func readBlock(path, kind string, secret bool) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("stepca: read %s: %w", kind, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("stepca: read %s: %w", kind, err)
	}
	if secret && info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("stepca: read %s: others may read %s (mode %04o): set it to 0600", kind, path, info.Mode().Perm())
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("stepca: read %s: %w", kind, err)
	}
	if len(content) > maxFile {
		return nil, fmt.Errorf("stepca: read %s: %s has more than %d bytes", kind, path, maxFile)
	}
	return parseBlock(content, path, kind)
}

func parseBlock(content []byte, path, kind string) ([]byte, error) {
	block, rest := pem.Decode(content)
	if block == nil || block.Type != kind || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("stepca: read %s: %s does not hold exactly one PEM block of that kind", kind, path)
	}
	return block.Bytes, nil
}

func readCertificate(path string) (*x509.Certificate, error) {
	der, err := readBlock(path, "CERTIFICATE", false)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("stepca: read %s: %w", path, err)
	}
	if !cert.IsCA || pki.CheckKey(cert.PublicKey) != nil {
		return nil, fmt.Errorf("stepca: read %s: it is not a CA certificate with a P-256 key", path)
	}
	return cert, nil
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	der, err := readBlock(path, "PRIVATE KEY", true)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("stepca: read %s: it holds no PKCS #8 key", path)
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok || pki.CheckKey(k.Public()) != nil {
		return nil, fmt.Errorf("stepca: read %s: the key is not on P-256", path)
	}
	return k, nil
}

// loadOrCreateKey reads the key, or makes it if there is none. Of several
// processes that make it at the same time one wins, and all return its key.
func loadOrCreateKey(path string) (*ecdsa.PrivateKey, error) {
	k, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if k, err = newKey(); err != nil {
		return nil, wrap("make key", err)
	}
	content, err := encodeKey(k)
	if err != nil {
		return nil, err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), ".key-*")
	if err != nil {
		return nil, wrap("make key", err)
	}
	defer os.Remove(temp.Name())
	_, err = temp.Write(content)
	if err = errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return nil, wrap("make key", err)
	}
	// A link, unlike a rename, does not replace a key that another process
	// has put there meanwhile.
	if err := os.Link(temp.Name(), path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return readKey(path)
		}
		return nil, wrap("make key", err)
	}
	return k, syncDir(filepath.Dir(path))
}

// writeSynced writes a new file and flushes it; it never replaces one.
func writeSynced(path string, content []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return wrap("write", err)
	}
	_, err = f.Write(content)
	return wrap("write", errors.Join(err, f.Sync(), f.Close()))
}

func syncDir(dir string) error { return wrap("flush folder", flush.Dir(dir)) }

// lock keeps two processes from making the CA at the same time. The kernel
// frees it when the process ends, however that happens.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, wrap("lock", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, wrap("lock", err)
	}
	return func() { _ = f.Close() }, nil
}
