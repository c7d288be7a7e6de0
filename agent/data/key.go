package data

import (
	"bytes"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"strings"
)

// A recovery key is 256 bits, in letters and digits that are hard to mistake
// on the phone (RFC 4648 base32, small letters): 13 groups of 4. That text,
// without dashes, is the passphrase.

var alphabet = base32.StdEncoding.WithPadding(base32.NoPadding)

const (
	keyBytes = 32
	keyText  = 52
	keyGroup = 4
)

// NewKey makes a recovery key: the passphrase.
func NewKey() []byte {
	b := make([]byte, keyBytes)
	_, _ = rand.Read(b) // crypto/rand never fails: it ends the program instead
	return bytes.ToLower([]byte(alphabet.EncodeToString(b)))
}

// ShowKey is a passphrase as people read it.
func ShowKey(pass []byte) string {
	var parts []string
	for i := 0; i < len(pass); i += keyGroup {
		parts = append(parts, string(pass[i:min(i+keyGroup, len(pass))]))
	}
	return strings.Join(parts, "-")
}

// ErrKey: what was typed is no recovery key.
var ErrKey = errors.New("data: this is no recovery key: it has 13 groups of 4 letters and digits 2 to 7")

// ParseKey reads what a person typed.
func ParseKey(s []byte) ([]byte, error) {
	if len(s) > 1024 {
		return nil, ErrKey
	}
	out := make([]byte, 0, keyText)
	for _, c := range s {
		switch {
		case c == '-' || c == ' ' || c == '\n' || c == '\r' || c == '\t':
			continue
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '2' && c <= '7':
		case c == '0': // there is no zero and no one in it
			c = 'o'
		case c == '1':
			c = 'l'
		default:
			return nil, ErrKey
		}
		out = append(out, c)
	}
	if len(out) != keyText {
		return nil, ErrKey
	}
	return out, nil
}
