package service

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// How long sealed things are good for.
const (
	cookieLife = 60 * time.Second
	ticketLife = 24 * time.Hour
	// keyLife is how long the default keys seal; they open twice as long, so
	// a ticket never outlives its key.
	keyLife = 24 * time.Hour
)

// Domains are the additional data of the AEAD: a ticket is no cookie.
const (
	cookieDomain = "muster/enroll/v1/cookie"
	ticketDomain = "muster/enroll/v1/ticket"
)

// A sealed thing is version (1), key ID (4), nonce (12), AES-256-GCM.
const (
	sealVersion = 1
	sealHeader  = 1 + 4
	sealNonce   = 12
)

var errSealed = errors.New("service: not sealed by us, or too long ago")

func aead(k Key) (cipher.AEAD, error) {
	block, err := aes.NewCipher(k.Secret[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// seal encrypts plain under the newest key. Nonces are random: with one key
// per day that stays far below 2^32 messages (NIST SP 800-38D §8.3).
func seal(keys []Key, domain string, plain []byte) ([]byte, error) {
	if len(keys) == 0 {
		return nil, errors.New("service: seal: there is no key")
	}
	a, err := aead(keys[0])
	if err != nil {
		return nil, fmt.Errorf("service: seal: %w", err)
	}
	out := make([]byte, sealHeader+sealNonce, sealHeader+sealNonce+len(plain)+a.Overhead())
	out[0] = sealVersion
	binary.BigEndian.PutUint32(out[1:], keys[0].ID)
	nonce := out[sealHeader:]
	_, _ = rand.Read(nonce) // does not fail, Go 1.24 on
	return a.Seal(out, nonce, plain, append([]byte(domain), out[:sealHeader]...)), nil
}

// open decrypts what one of the two newest keys sealed.
func open(keys []Key, domain string, sealed []byte) ([]byte, error) {
	if len(sealed) < sealHeader+sealNonce || sealed[0] != sealVersion {
		return nil, errSealed
	}
	id := binary.BigEndian.Uint32(sealed[1:])
	for _, k := range keys[:min(len(keys), 2)] {
		if k.ID != id {
			continue
		}
		a, err := aead(k)
		if err != nil {
			return nil, errSealed
		}
		plain, err := a.Open(nil, sealed[sealHeader:sealHeader+sealNonce], sealed[sealHeader+sealNonce:],
			append([]byte(domain), sealed[:sealHeader]...))
		if err != nil {
			return nil, errSealed
		}
		return plain, nil
	}
	return nil, errSealed
}

// cookie is all the state of a challenge.
type cookie struct {
	begun, expires          time.Time
	nonce, secret, exporter [32]byte
	tenant                  string
	// begin is the marshalled BeginRequest: EKs with certificates, AK and
	// LDevID. What Complete judges is what Begin challenged.
	begin []byte
}

const cookieFixed = 8 + 8 + 3*32 + 1

func (c cookie) encode() []byte {
	b := make([]byte, 0, cookieFixed+len(c.tenant)+len(c.begin))
	b = binary.BigEndian.AppendUint64(b, uint64(c.begun.UnixNano()))
	b = binary.BigEndian.AppendUint64(b, uint64(c.expires.UnixNano()))
	b = append(b, c.nonce[:]...)
	b = append(b, c.secret[:]...)
	b = append(b, c.exporter[:]...)
	b = append(b, byte(len(c.tenant)))
	b = append(b, c.tenant...)
	return append(b, c.begin...)
}

func decodeCookie(b []byte) (cookie, error) {
	var c cookie
	if len(b) < cookieFixed || len(b) < cookieFixed+int(b[cookieFixed-1]) {
		return c, errSealed
	}
	c.begun = time.Unix(0, int64(binary.BigEndian.Uint64(b)))
	c.expires = time.Unix(0, int64(binary.BigEndian.Uint64(b[8:])))
	copy(c.nonce[:], b[16:])
	copy(c.secret[:], b[48:])
	copy(c.exporter[:], b[80:])
	n := int(b[cookieFixed-1])
	c.tenant = string(b[cookieFixed : cookieFixed+n])
	c.begin = b[cookieFixed+n:]
	return c, nil
}

// ticket is the right to ask for one request's outcome, given to who proved
// the TPM. It yields a certificate for a key that is in that TPM: worth
// nothing to a thief.
type ticket struct {
	expires time.Time
	request fleet.RequestID
	tenant  string
	// key is the PKIX DER of the LDevID's public key. The request holds its
	// hash only.
	key []byte
}

const (
	requestIDLength = 26 // "r-" and 24 characters
	ticketFixed     = 8 + requestIDLength + 1
	maxTicket       = 512
)

func (t ticket) encode() ([]byte, error) {
	if len(t.request) != requestIDLength {
		return nil, fmt.Errorf("service: make ticket: request ID %q", t.request)
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(t.expires.UnixNano()))
	b = append(b, t.request...)
	b = append(b, byte(len(t.tenant)))
	b = append(b, t.tenant...)
	return append(b, t.key...), nil
}

func decodeTicket(b []byte) (ticket, error) {
	var t ticket
	if len(b) < ticketFixed || len(b) < ticketFixed+int(b[ticketFixed-1]) {
		return t, errSealed
	}
	t.expires = time.Unix(0, int64(binary.BigEndian.Uint64(b)))
	t.request = fleet.RequestID(b[8 : 8+requestIDLength])
	n := int(b[ticketFixed-1])
	t.tenant = string(b[ticketFixed : ticketFixed+n])
	t.key = b[ticketFixed+n:]
	if err := t.request.Validate(); err != nil {
		return t, errSealed
	}
	return t, nil
}

// memoryKeys are keys that live and die with the process.
type memoryKeys struct {
	mu   sync.Mutex
	keys []Key
	made time.Time
}

func newMemoryKeys() *memoryKeys { return &memoryKeys{} }

func (m *memoryKeys) current(_ context.Context, now time.Time) ([]Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.keys) == 0 || now.Sub(m.made).Abs() >= keyLife {
		k := Key{ID: 1}
		if len(m.keys) > 0 {
			k.ID = m.keys[0].ID + 1
		}
		_, _ = rand.Read(k.Secret[:])
		m.keys = append([]Key{k}, m.keys[:min(len(m.keys), 1)]...)
		m.made = now
	}
	return m.keys, nil
}
