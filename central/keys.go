package central

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service"
)

const (
	// A new cookie key every day. Tickets live as long as the two newest
	// keys; machines whose ticket is older just begin again.
	cookieKeyLife = 24 * time.Hour
	cookieKeyKeep = 3
)

// cookieKeys are the keys that seal enrollment cookies and tickets. They are
// in the database, so that a restart or a replica understands them, and
// sealed there with a key that is not.
type cookieKeys struct {
	store store.Store
	seal  cipher.AEAD

	mu   sync.Mutex
	keys []service.Key
	made time.Time // of the newest
}

// freshKey reports whether a key made at a time still seals: for a day, and
// not if it comes from a future that a clock once saw.
func freshKey(made, now time.Time) bool { return now.Sub(made).Abs() < cookieKeyLife }

func newCookieKeys(s store.Store, sealKey []byte) (*cookieKeys, error) {
	block, err := aes.NewCipher(sealKey)
	if err != nil {
		return nil, fmt.Errorf("central: use sealing key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("central: use sealing key: %w", err)
	}
	return &cookieKeys{store: s, seal: aead}, nil
}

// current implements service.KeysFunc: the newest key first.
func (c *cookieKeys) current(ctx context.Context, now time.Time) ([]service.Key, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.keys) > 0 && freshKey(c.made, now) {
		return c.keys, nil
	}
	var stored []store.CookieKey
	err := c.store.Update(ctx, func(t store.Tx) error {
		var err error
		if stored, err = t.CookieKeys(); err != nil {
			return err
		}
		if len(stored) > 0 && freshKey(stored[0].Created, now) {
			return nil
		}
		k := store.CookieKey{ID: 1, Created: now}
		if len(stored) > 0 {
			k.ID = stored[0].ID + 1
		}
		var secret [32]byte
		rand.Read(secret[:])
		k.Sealed = c.seal.Seal(nil, nil, secret[:], cookieKeyName(k.ID))
		if err := t.AddCookieKey(k); err != nil {
			return err
		}
		stored = append([]store.CookieKey{k}, stored...)
		return t.DropCookieKeysBefore(k.ID - cookieKeyKeep + 1)
	})
	if err != nil {
		return nil, fmt.Errorf("central: read cookie keys: %w", err)
	}
	keys := make([]service.Key, 0, cookieKeyKeep)
	for _, k := range stored[:min(len(stored), cookieKeyKeep)] {
		plain, err := c.seal.Open(nil, nil, k.Sealed, cookieKeyName(k.ID))
		if err != nil || len(plain) != 32 {
			// Another sealing key: the old keys are lost, and only machines in
			// the middle of enrolling notice.
			continue
		}
		keys = append(keys, service.Key{ID: uint32(k.ID), Secret: [32]byte(plain)})
	}
	if len(keys) == 0 || keys[0].ID != uint32(stored[0].ID) {
		return nil, fmt.Errorf("central: open cookie key %d: it was sealed with another %s; restore that file or delete the row", stored[0].ID, sealKeyFile)
	}
	c.keys, c.made = keys, stored[0].Created
	return keys, nil
}

func cookieKeyName(id int64) []byte {
	return binary.BigEndian.AppendUint64([]byte("muster/cookie-key/v1"), uint64(id))
}
