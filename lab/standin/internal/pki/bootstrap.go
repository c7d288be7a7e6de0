package pki

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// File is one file of the bootstrap data.
type File struct {
	Timestamp time.Time
	Content   []byte
}

// Data is the bootstrap data: what a second server needs to be part of the
// cluster. Whoever has it is the cluster's administrator.
type Data map[string]File

// files maps the names in the data to paths below server/.
var files = []struct {
	name, path string
	optional   bool
}{
	{"ServerCA", "tls/server-ca.crt", false}, {"ServerCAKey", "tls/server-ca.key", false},
	{"ClientCA", "tls/client-ca.crt", false}, {"ClientCAKey", "tls/client-ca.key", false},
	{"RequestHeaderCA", "tls/request-header-ca.crt", false}, {"RequestHeaderCAKey", "tls/request-header-ca.key", false},
	{"ETCDPeerCA", "tls/etcd/peer-ca.crt", false}, {"ETCDPeerCAKey", "tls/etcd/peer-ca.key", false},
	{"ETCDServerCA", "tls/etcd/server-ca.crt", false}, {"ETCDServerCAKey", "tls/etcd/server-ca.key", false},
	{"ServiceKey", "tls/service.key", false},
	{"PasswdFile", "cred/passwd", false}, {"IPSECKey", "cred/ipsec.psk", false},
	{"EncryptionConfig", "cred/encryption-config.json", true}, {"EncryptionHash", "cred/encryption-state.json", true},
}

// ReadData collects the bootstrap data from server/.
func ReadData(serverDir string) (Data, error) {
	d := Data{}
	for _, f := range files {
		p := filepath.Join(serverDir, f.path)
		b, err := os.ReadFile(p)
		if os.IsNotExist(err) && f.optional {
			continue
		}
		if err != nil {
			return nil, err
		}
		st, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		d[f.name] = File{st.ModTime().UTC(), b}
	}
	return d, nil
}

// OnDisk tells whether cred, tls and tls/etcd hold anything; if one does not,
// a server takes the data of the cluster as they are.
func OnDisk(serverDir string) bool {
	for _, d := range []string{"cred", "tls", "tls/etcd"} {
		es, err := os.ReadDir(filepath.Join(serverDir, d))
		if err != nil || len(es) == 0 {
			return false
		}
	}
	return true
}

// ErrNewer means that a file on disk is newer than the cluster's.
var ErrNewer = errors.New("newer than datastore and could cause a cluster outage")

// WriteData writes the data of the cluster under server/. With reconcile a file
// on disk that differs and is newer by 3 s or more is an error; older ones are
// overwritten.
func WriteData(serverDir string, d Data, reconcile bool) error {
	var newer []string
	for _, f := range files {
		in, ok := d[f.name]
		if !ok {
			continue
		}
		p := filepath.Join(serverDir, f.path)
		if reconcile {
			st, err := os.Stat(p)
			have, rerr := os.ReadFile(p)
			if err == nil && rerr == nil {
				if bytes.Equal(have, in.Content) {
					continue
				}
				if st.ModTime().Sub(in.Timestamp) >= 3*time.Second {
					newer = append(newer, p)
					continue
				}
			}
		}
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(p, in.Content, 0o600); err != nil {
			return err
		}
		if err := os.Chtimes(p, in.Timestamp, in.Timestamp); err != nil {
			return err
		}
	}
	if len(newer) > 0 {
		return fmt.Errorf("%s %w. Remove the file(s) from disk and restart to recreate from datastore", strings.Join(newer, ", "), ErrNewer)
	}
	return nil
}

// Key is the datastore key of the data for a token's password.
func Key(password string) string {
	d := sha256.Sum256([]byte(password))
	return "/bootstrap/" + hex.EncodeToString(d[:])[:12]
}

func gcm(password string, salt []byte) (cipher.AEAD, error) {
	key, err := pbkdf2.Key(sha1.New, password, salt, 4096, 32)
	if err != nil {
		return nil, err
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// Seal encrypts the data with the password of the server token.
func Seal(password string, d Data) ([]byte, error) {
	plain, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	salt := make([]byte, 8)
	rand.Read(salt)
	a, err := gcm(password, salt)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, a.NonceSize())
	rand.Read(nonce)
	return []byte(hex.EncodeToString(salt) + ":" + base64.StdEncoding.EncodeToString(a.Seal(nonce, nonce, plain, nil))), nil
}

// Open decrypts what Seal made.
func Open(password string, sealed []byte) (Data, error) {
	s, body, ok := strings.Cut(string(sealed), ":")
	if !ok {
		return nil, errors.New("invalid cipher data, not : delimited")
	}
	salt, err := hex.DecodeString(s)
	if err != nil {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(body)
	if err != nil {
		return nil, err
	}
	a, err := gcm(password, salt)
	if err != nil {
		return nil, err
	}
	if len(raw) < a.NonceSize() {
		return nil, errors.New("invalid cipher data")
	}
	plain, err := a.Open(nil, raw[:a.NonceSize()], raw[a.NonceSize():], nil)
	if err != nil {
		return nil, err
	}
	var d Data
	return d, json.Unmarshal(plain, &d)
}
