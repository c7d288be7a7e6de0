package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/muster-edge/muster/lab/standin/internal/pki"
)

// ErrOtherToken means that the data in the datastore need another token.
var ErrOtherToken = errors.New("bootstrap data already found and encrypted with different token")

// SaveBootstrap puts the bootstrap data into the datastore once, under the
// token's key; data under another token are an error.
func (s *Store) SaveBootstrap(ctx context.Context, password string) error {
	c := s.Client()
	key := pki.Key(password)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r, err := c.Get(ctx, "/bootstrap/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range r.Kvs {
		if string(kv.Key) == key {
			if _, err := pki.Open(password, kv.Value); err != nil {
				return fmt.Errorf("%w: %v", ErrOtherToken, err)
			}
			return nil
		}
	}
	if len(r.Kvs) > 0 {
		return ErrOtherToken
	}
	d, err := pki.ReadData(s.cfg.ServerDir())
	if err != nil {
		return err
	}
	sealed, err := pki.Seal(password, d)
	if err != nil {
		return err
	}
	_, err = c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).Then(clientv3.OpPut(key, string(sealed))).Commit()
	return err
}

// LocalBootstrap reads the bootstrap data from the database file of a member
// that does not run. Without a database it returns nil.
func (s *Store) LocalBootstrap(password string) (pki.Data, error) {
	file := filepath.Join(s.Dir(), "member", "snap", "db")
	if _, err := os.Stat(file); err != nil {
		return nil, nil
	}
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	want := pki.Key(password)
	found := map[string][]byte{}
	err = db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("key"))
		if b == nil {
			return nil
		}
		return b.ForEach(func(_, v []byte) error { // keys are revisions, oldest first
			if !bytes.Contains(v, []byte("/bootstrap/")) {
				return nil
			}
			var kv mvccpb.KeyValue
			if err := kv.Unmarshal(v); err != nil {
				return nil
			}
			if bytes.HasPrefix(kv.Key, []byte("/bootstrap/")) {
				found[string(kv.Key)] = bytes.Clone(kv.Value)
			}
			return nil
		})
	})
	if err != nil || len(found) == 0 {
		return nil, err
	}
	v, ok := found[want]
	if !ok || len(v) == 0 {
		return nil, ErrOtherToken
	}
	d, err := pki.Open(password, v)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrOtherToken, err)
	}
	return d, nil
}
