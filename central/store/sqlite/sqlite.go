// Package sqlite keeps the centre's objects in one SQLite file: pure Go, no
// set-up. One connection writes, a few read. It deliberately knows nothing
// about what the objects mean; the rules it does hold (one live request per
// node, one node per EK, tenant of every row) are constraints of the schema,
// so that a mistake above it cannot break them.
package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/pressly/goose/v3"
	sqlite3 "modernc.org/sqlite"
	sqlite3lib "modernc.org/sqlite/lib"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/sqlite/db"
	"github.com/muster-edge/muster/internal/failpoint"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Config says where the database is.
type Config struct {
	// Path of the database file; it is created with mode 0600. SQLite keeps
	// two more files beside it (-wal, -shm).
	Path string
	// MaxEvents is the size of each tenant's ring of events (default 20000).
	MaxEvents int
	// Readers is the number of reading connections (default 4).
	Readers int
}

// Store is a SQLite database. It implements store.Store.
type Store struct {
	writer    *sql.DB
	reader    *sql.DB
	maxEvents int
}

var _ store.Store = (*Store)(nil)

// Open opens the database, creates it if it is not there, and brings its
// schema up to date.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.MaxEvents <= 0 {
		cfg.MaxEvents = 20000
	}
	if cfg.Readers <= 0 {
		cfg.Readers = 4
	}
	// SQLite would create the file readable for everybody.
	f, err := os.OpenFile(cfg.Path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sqlite: open database: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("sqlite: open database: %w", err)
	}
	s := &Store{maxEvents: cfg.MaxEvents}
	// FULL makes every commit wait for the write-ahead log to reach the disk:
	// acknowledged means kept. The writer takes its lock at BEGIN, so that no
	// transaction fails half-way for want of it.
	s.writer, err = sql.Open("sqlite", dsn(cfg.Path, "immediate", "synchronous(FULL)", "journal_mode(WAL)"))
	if err != nil {
		return nil, fmt.Errorf("sqlite: open database: %w", err)
	}
	s.writer.SetMaxOpenConns(1)
	if err := s.migrate(ctx); err != nil {
		return nil, errors.Join(err, s.writer.Close())
	}
	s.reader, err = sql.Open("sqlite", dsn(cfg.Path, "deferred", "query_only(1)"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sqlite: open database: %w", err), s.writer.Close())
	}
	s.reader.SetMaxOpenConns(cfg.Readers)
	if err := s.Update(ctx, firstStart); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func dsn(path, lock string, pragmas ...string) string {
	q := url.Values{"_txlock": {lock}}
	q["_pragma"] = append([]string{"busy_timeout(10000)", "foreign_keys(1)"}, pragmas...)
	return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}).String()
}

func (s *Store) migrate(ctx context.Context) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("sqlite: read migrations: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, s.writer, files, goose.WithVerbose(false))
	if err != nil {
		return fmt.Errorf("sqlite: read migrations: %w", err)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("sqlite: bring the schema up to date: %w", err)
	}
	return nil
}

// firstStart gives a new database its first epoch.
func firstStart(t store.Tx) error {
	if _, err := t.Setting(settingEpoch); !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return t.PutSetting(settingEpoch, "1")
}

// Close implements store.Store.
func (s *Store) Close() error {
	var errs []error
	if s.reader != nil {
		errs = append(errs, s.reader.Close())
	}
	errs = append(errs, s.writer.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sqlite: close: %w", err)
	}
	return nil
}

// View implements store.Store.
func (s *Store) View(ctx context.Context, f func(store.Reader) error) error {
	t, err := s.reader.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("sqlite: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // nothing was written
	return f(&tx{ctx: ctx, q: db.New(t), maxEvents: s.maxEvents})
}

// Update implements store.Store.
func (s *Store) Update(ctx context.Context, f func(store.Tx) error) error {
	t, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("sqlite: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // an error after Commit is no news
	if err := f(&tx{ctx: ctx, q: db.New(t), maxEvents: s.maxEvents}); err != nil {
		return err
	}
	failpoint.Hit("store.before-commit")
	if err := t.Commit(); err != nil {
		return fmt.Errorf("sqlite: commit: %w", err)
	}
	failpoint.Hit("store.after-commit")
	return nil
}

// wrap gives database errors the names that callers branch on.
func wrap(verb, object string, err error) error {
	var e *sqlite3.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("sqlite: %s %s: %w", verb, object, store.ErrNotFound)
	case errors.As(err, &e) && (e.Code() == sqlite3lib.SQLITE_CONSTRAINT_PRIMARYKEY || e.Code() == sqlite3lib.SQLITE_CONSTRAINT_UNIQUE):
		if strings.Contains(e.Error(), "requests_one_live") || strings.Contains(e.Error(), "requests.tenant, requests.node") {
			return fmt.Errorf("sqlite: %s %s: the node has another live request: %w", verb, object, store.ErrConflict)
		}
		return fmt.Errorf("sqlite: %s %s: %w", verb, object, store.ErrExists)
	case errors.As(err, &e) && e.Code() == sqlite3lib.SQLITE_CONSTRAINT_FOREIGNKEY:
		return fmt.Errorf("sqlite: %s %s: what it belongs to is missing: %w", verb, object, store.ErrNotFound)
	}
	return fmt.Errorf("sqlite: %s %s: %w", verb, object, err)
}

// replaced turns the number of rows of an optimistic update into an error.
func replaced(object string, rows int64, err error) error {
	if err != nil {
		return wrap("write", object, err)
	}
	if rows == 0 {
		return fmt.Errorf("sqlite: write %s: %w", object, store.ErrConflict)
	}
	return nil
}

// stamp and clock convert times: nanoseconds since 1970, 0 for never.
func stamp(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func clock(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}
