package central

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/central/store/backup"
	"github.com/muster-edge/muster/central/store/postgres"
	"github.com/muster-edge/muster/central/store/sqlite"
	"github.com/muster-edge/muster/central/store/tables"
)

// keyFiles are what a backup holds beside the database when keys are asked
// for: files and directories of the data directory.
var keyFiles = []string{"ca", sealKeyFile, rootsDir, AdminFile}

// openRaw opens the database of a data directory for reading. The centre may
// serve meanwhile.
func openRaw(ctx context.Context, dir string) (tables.Raw, error) {
	url, err := databaseURL("", dir)
	if err != nil {
		return nil, err
	}
	if url != "" {
		return postgres.OpenRaw(ctx, url, nil)
	}
	return sqlite.OpenRaw(filepath.Join(dir, databaseFile))
}

// Backup writes the database of a data directory as it is at one moment, with
// the keys beside it if that is asked for. The centre may serve meanwhile.
func Backup(ctx context.Context, dir string, w io.Writer, keys bool, program string, now time.Time) (_ backup.Summary, err error) {
	from, err := openRaw(ctx, dir)
	if err != nil {
		return backup.Summary{}, err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	var files []backup.File
	if keys {
		if files, err = readKeys(dir); err != nil {
			return backup.Summary{}, err
		}
	}
	return backup.Write(ctx, w, from, backup.Header{Created: now.UTC(), Program: program}, files)
}

func readKeys(dir string) (files []backup.File, err error) {
	for _, name := range keyFiles {
		err := filepath.WalkDir(filepath.Join(dir, name), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			rel, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			b, err := os.ReadFile(path)
			files = append(files, backup.File{Name: filepath.ToSlash(rel), Data: b})
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("central: read keys: %w", err)
		}
	}
	return files, nil
}

// Restore puts a backup into a data directory that has no database, or into
// the empty PostgreSQL database that the directory names, and begins a new
// life of the database. Nothing is written before all of the backup was found
// to be sound.
func Restore(ctx context.Context, dir, file, reason string, now time.Time) (_ backup.Summary, epoch uint64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return backup.Summary{}, 0, fmt.Errorf("central: restore: %w", err)
	}
	defer f.Close()
	found, err := backup.Verify(f)
	if err != nil {
		return found, 0, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return found, 0, fmt.Errorf("central: restore: %w", err)
	}
	d, err := openDataDir(dir)
	if err != nil {
		return found, 0, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if found.Keys {
		if _, err := os.Stat(d.file("ca")); err == nil {
			return found, 0, fmt.Errorf("central: restore: %s has keys, and so has the backup: restore into an empty directory", dir)
		}
	}
	if err := loadInto(ctx, d, f, found); err != nil {
		return found, 0, err
	}
	// The loaded rows are of a new epoch already, so that a crash here is none.
	l, err := openLocal(ctx, d, now)
	if err != nil {
		return found, 0, err
	}
	defer func() { err = errors.Join(err, l.store.Close()) }()
	epoch, err = l.Restored(ctx, reason, now)
	return found, epoch, err
}

// loadInto loads a sound backup. A SQLite file gets its name when it is whole.
func loadInto(ctx context.Context, d *dataDir, f io.Reader, found backup.Summary) (err error) {
	url, err := databaseURL("", d.path)
	if err != nil {
		return err
	}
	var into tables.Raw
	file, tmp := d.file(databaseFile), d.file(databaseFile+".restoring")
	if url != "" {
		into, err = postgres.OpenRaw(ctx, url, found.Schema)
	} else {
		for _, there := range []string{file, file + "-wal"} {
			if _, err := os.Stat(there); err == nil {
				return fmt.Errorf("%w: %s is there; move it away first", backup.ErrNotEmpty, there)
			}
		}
		// What an earlier try left.
		for _, old := range []string{tmp, tmp + "-journal"} {
			if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("central: restore: %w", err)
			}
		}
		into, err = sqlite.CreateRaw(ctx, tmp, found.Schema)
	}
	if err != nil {
		return err
	}
	_, err = backup.Load(ctx, f, into, 1, func(k backup.File) error {
		name := d.file(filepath.FromSlash(k.Name))
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			return fmt.Errorf("central: restore key: %w", err)
		}
		if err := renameio.WriteFile(name, k.Data, 0o600); err != nil {
			return fmt.Errorf("central: restore key: %w", err)
		}
		return nil
	})
	if err := errors.Join(err, into.Close()); err != nil || url != "" {
		return err
	}
	return moveDatabase(d, tmp, file)
}

func moveDatabase(d *dataDir, from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("central: move database: %w", err)
	}
	dir, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("central: move database: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("central: move database: %w", err)
	}
	return nil
}

// CopyDatabase copies the SQLite database of a data directory into an empty
// PostgreSQL database, in one transaction, and makes the directory use that.
// No centre may serve from the directory. The life of the database goes on:
// nothing is lost, so the epoch stays.
func CopyDatabase(ctx context.Context, dir, url, program string, now time.Time) (_ backup.Summary, err error) {
	d, err := openDataDir(dir)
	if err != nil {
		return backup.Summary{}, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if there, err := databaseURL("", dir); err != nil || there != "" {
		return backup.Summary{}, errors.Join(err, fmt.Errorf("central: copy database: %s uses PostgreSQL already", dir))
	}
	// What is in the write-ahead log is read, too; then the schema is ours.
	l, err := openLocal(ctx, d, now)
	if err != nil {
		return backup.Summary{}, err
	}
	if err := l.store.Close(); err != nil {
		return backup.Summary{}, err
	}
	from, err := sqlite.OpenRaw(d.file(databaseFile))
	if err != nil {
		return backup.Summary{}, err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	schema, err := backup.Schema(ctx, from)
	if err != nil {
		return backup.Summary{}, err
	}
	into, err := postgres.OpenRaw(ctx, url, schema)
	if err != nil {
		return backup.Summary{}, err
	}
	defer func() { err = errors.Join(err, into.Close()) }()
	r, w := io.Pipe()
	go func() {
		_, err := backup.Write(ctx, w, from, backup.Header{Created: now.UTC(), Program: program}, nil)
		w.CloseWithError(err)
	}()
	out, err := backup.Load(ctx, r, into, 0, func(backup.File) error { return nil })
	r.Close()
	if err != nil {
		return out, err
	}
	// The URL comes first: with both in the directory nothing serves, and says
	// why; with neither, an empty database would be made.
	if err := renameio.WriteFile(d.file(DatabaseFile), []byte(url+"\n"), 0o600); err != nil {
		return out, fmt.Errorf("central: copy database: %w", err)
	}
	return out, moveDatabase(d, d.file(databaseFile), d.file(databaseFile+".copied"))
}
