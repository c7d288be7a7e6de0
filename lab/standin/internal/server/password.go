package server

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"golang.org/x/crypto/scrypt"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/muster-edge/muster/lab/standin/internal/conf"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

const (
	passwordSuffix = ".node-password.k3s"
	passwordType   = "k3s.cattle.io/node-password"
)

func hashPassword(pw string, salt []byte) (string, error) {
	if salt == nil {
		salt = make([]byte, 8)
		rand.Read(salt)
	}
	h, err := scrypt.Key([]byte(pw), salt, 1<<15, 8, 1, 64)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("$1:%s:15:8:1:%s", hex.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(h)), nil
}

func verifyPassword(hash, pw string) error {
	f := strings.Split(hash, ":")
	if len(f) != 6 {
		return errors.New("malformed hash")
	}
	salt, err := hex.DecodeString(f[1])
	if err != nil {
		return err
	}
	again, err := hashPassword(pw, salt)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare([]byte(again), []byte(hash)) != 1 {
		return errors.New("hash does not match")
	}
	return nil
}

// checkNodePassword compares a node's password with the Secret of its name and
// makes the Secret at the first request. While the apiserver starts, only this
// node itself is let in, by its file. The int is the HTTP status of the error.
func (s *supervisor) checkNodePassword(ctx context.Context, node, pw string) (int, error) {
	k := s.kube.Load()
	if k == nil {
		if node != s.cfg.NodeName {
			return http.StatusServiceUnavailable, errors.New("runtime core not ready")
		}
		own, err := conf.NodePassword()
		if err != nil || own != pw {
			return http.StatusForbidden, errors.New("unable to verify local password")
		}
		return 0, nil
	}
	s.passMu.Lock() // scrypt is dear: one at a time
	defer s.passMu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	secrets := k.c.CoreV1().Secrets(metav1.NamespaceSystem)
	have, err := secrets.Get(ctx, node+passwordSuffix, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		hash, err := hashPassword(pw, nil)
		if err != nil {
			return http.StatusInternalServerError, err
		}
		immutable := true
		sec := &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: node + passwordSuffix, Namespace: metav1.NamespaceSystem},
			Immutable:  &immutable, Type: passwordType, Data: map[string][]byte{"hash": []byte(hash)},
		}
		if _, err := secrets.Create(ctx, sec, metav1.CreateOptions{}); err != nil {
			return http.StatusServiceUnavailable, err
		}
		return 0, nil
	}
	if err != nil {
		return http.StatusServiceUnavailable, err
	}
	if err := verifyPassword(string(have.Data["hash"]), pw); err != nil {
		// A server does not lock itself out: with k3s this is only an Event.
		if own, oerr := conf.NodePassword(); oerr == nil && node == s.cfg.NodeName && own == pw {
			proc.Warn("NodePasswordValidationFailed: %v", err)
			return 0, nil
		}
		return http.StatusForbidden, fmt.Errorf("Node password rejected, duplicate hostname or contents of '%s' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag: %w", conf.NodePasswordFile, err)
	}
	return 0, nil
}
