// Package access is the way into a cluster: tokens in K10 form, the pin of the
// cluster's CA that they carry, and requests to a supervisor.
package access

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

const prefix = "K10"

var bootstrapRE = regexp.MustCompile(`^([a-z0-9]{6})\.([a-z0-9]{16})$`)

// Token is a parsed token. Either Bootstrap or Password is set.
type Token struct {
	CAHash    string // hex, "" for the short form
	User      string
	Password  string
	Bootstrap string // id.secret
}

// ParseToken reads the K10 form or a short form.
func ParseToken(s string) (Token, error) {
	var t Token
	if len(s) == 0 {
		return t, errors.New("token must not be empty")
	}
	if rest, ok := strings.CutPrefix(s, prefix); ok {
		hash, cred, found := strings.Cut(rest, "::")
		if !found || len(hash) != sha256.Size*2 {
			return t, errors.New("invalid token format")
		}
		if _, err := hex.DecodeString(hash); err != nil {
			return t, errors.New("invalid token CA hash")
		}
		t.CAHash, s = hash, cred
		if bootstrapRE.MatchString(s) {
			t.Bootstrap = s
			return t, nil
		}
		user, pw, found := strings.Cut(s, ":")
		if !found || pw == "" {
			return t, errors.New("invalid token format")
		}
		t.User, t.Password = user, pw
		return t, nil
	}
	if bootstrapRE.MatchString(s) {
		t.Bootstrap = s
		return t, nil
	}
	t.Password = s
	return t, nil
}

// ServerPassword is the password of a server's token: bootstrap tokens never
// make a server.
func ServerPassword(s string) (string, error) {
	t, err := ParseToken(s)
	if err != nil || t.Password == "" {
		return "", errors.New("failed to normalize server token; must be in format K10<CA-HASH>::<USERNAME>:<PASSWORD> or <PASSWORD>")
	}
	return t.Password, nil
}

// CAHash is the pin of a bundle: of the bytes when there is one certificate, of
// the root's DER form when there are more.
func CAHash(bundle []byte) (string, error) {
	var certs []*x509.Certificate
	for rest := bundle; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return "", fmt.Errorf("parse CA bundle: %w", err)
		}
		certs = append(certs, c)
	}
	switch len(certs) {
	case 0:
		return "", errors.New("no certificates in CA bundle")
	case 1:
		d := sha256.Sum256(bundle)
		return hex.EncodeToString(d[:]), nil
	}
	root := certs[0]
	for range certs {
		if root.CheckSignatureFrom(root) == nil {
			break
		}
		for _, c := range certs {
			if c != root && root.CheckSignatureFrom(c) == nil {
				root = c
				break
			}
		}
	}
	d := sha256.Sum256(root.Raw)
	return hex.EncodeToString(d[:]), nil
}

// Format writes the K10 form of "user:password" or "id.secret".
func Format(bundle []byte, cred string) (string, error) {
	h, err := CAHash(bundle)
	if err != nil {
		return "", err
	}
	return prefix + h + "::" + cred, nil
}
