package central

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/postgres"
	"github.com/muster-edge/muster/central/store/sqlite"
)

// DatabaseFile, in the data directory, holds the URL of a PostgreSQL database
// if the centre uses one: for serving and for every command that is given the
// directory. It has a password in it.
const DatabaseFile = "database"

// databaseURL is the URL in force: the given one, or that of the data
// directory; "" means SQLite.
func databaseURL(given, dir string) (string, error) {
	if given != "" {
		return given, nil
	}
	name := filepath.Join(dir, DatabaseFile)
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("central: read database URL: %w", err)
	}
	if given = strings.TrimSpace(string(b)); given == "" {
		return "", fmt.Errorf("central: read database URL: %s is empty", name)
	}
	return given, nil
}

// openStore opens the database of a data directory.
func openStore(ctx context.Context, given string, d *dataDir) (store.Store, error) {
	url, err := databaseURL(given, d.path)
	if err != nil {
		return nil, err
	}
	file := d.file(databaseFile)
	if url == "" {
		return sqlite.Open(ctx, sqlite.Config{Path: file})
	}
	if _, err := os.Stat(file); err == nil {
		return nil, fmt.Errorf("central: open database: %s holds a centre's objects, which a PostgreSQL database would not have: copy them first (muster database copy), or move the file away", file)
	}
	return postgres.Open(ctx, postgres.Config{URL: url})
}

// Settings that tie a shared database to the keys beside it.
const (
	settingRoot = "authority-sha256"
	settingSeal = "seal-key-sha256"
)

// sharedKeys refuses to serve from a database with other keys than the
// replicas before us: nodes would be given documents and certificates that the
// others do not know.
func sharedKeys(ctx context.Context, s store.Store, d *dataDir, rootsPEM, seal []byte) error {
	if _, shared := s.(store.Shared); !shared {
		return nil
	}
	return s.Update(ctx, func(t store.Tx) error {
		for _, k := range []struct {
			setting, file string
			key           []byte
		}{{settingRoot, "ca", rootsPEM}, {settingSeal, sealKeyFile, append([]byte("muster/seal-key/v1"), seal...)}} {
			sum := sha256.Sum256(k.key)
			want := hex.EncodeToString(sum[:])
			have, err := t.Setting(k.setting)
			switch {
			case errors.Is(err, store.ErrNotFound):
				if err := t.PutSetting(k.setting, want); err != nil {
					return err
				}
			case err != nil:
				return err
			case have != want:
				return fmt.Errorf("central: this database is used with another %s than the one in %s: copy ca, %s, roots and %s from a replica that serves, all into an empty directory",
					k.file, d.path, sealKeyFile, AdminFile)
			}
		}
		return nil
	})
}

// keysBefore refuses to make new keys for a database that has some.
func keysBefore(ctx context.Context, s store.Store, d *dataDir) error {
	if _, shared := s.(store.Shared); !shared {
		return nil
	}
	if _, err := os.Stat(d.file("ca")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.View(ctx, func(t store.Reader) error {
		_, err := t.Setting(settingRoot)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return fmt.Errorf("central: this database has a certificate authority, and %s has none: copy ca, %s, roots and %s from a replica that serves, or from the backup", d.path, sealKeyFile, AdminFile)
	})
}
