// Package sqlite is the engine that keeps the centre's tables in one SQLite
// file: pure Go, no set-up. One connection writes, a few read.
package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/pressly/goose/v3"
	sqlite3 "modernc.org/sqlite"
	sqlite3lib "modernc.org/sqlite/lib"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Config says where the database is.
type Config struct {
	// Path of the database file; it is created with mode 0600. SQLite keeps
	// two more files beside it (-wal, -shm).
	Path string
	// MaxEvents is the size of each tenant's ring of events (default
	// tables.DefaultEvents).
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
		cfg.MaxEvents = tables.DefaultEvents
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
	if err := tables.Migrate(ctx, s.writer, goose.DialectSQLite3, tables.Files()); err != nil {
		return nil, errors.Join(err, s.writer.Close())
	}
	s.reader, err = sql.Open("sqlite", dsn(cfg.Path, "deferred", "query_only(1)"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sqlite: open database: %w", err), s.writer.Close())
	}
	s.reader.SetMaxOpenConns(cfg.Readers)
	if err := s.Update(ctx, tables.FirstStart); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func dsn(path, lock string, pragmas ...string) string {
	q := url.Values{"_txlock": {lock}}
	q["_pragma"] = append([]string{"busy_timeout(10000)", "foreign_keys(1)"}, pragmas...)
	return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}).String()
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
	return f(tables.New(ctx, t, s.maxEvents))
}

// Update implements store.Store.
func (s *Store) Update(ctx context.Context, f func(store.Tx) error) error {
	t, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("sqlite: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // an error after Commit is no news
	named := &namedErrors{Tx: t}
	if err := f(tables.New(ctx, named, s.maxEvents)); err != nil {
		return err
	}
	// PostgreSQL gives up a transaction in which a statement failed. That must
	// not be found out there first.
	if named.broken != nil {
		return fmt.Errorf("sqlite: commit: a statement of the transaction had failed: %w", named.broken)
	}
	failpoint.Hit("store.before-commit")
	if err := t.Commit(); err != nil {
		return fmt.Errorf("sqlite: commit: %w", err)
	}
	failpoint.Hit("store.after-commit")
	return nil
}

// namedErrors is a transaction whose errors have the names of package tables.
type namedErrors struct {
	*sql.Tx
	broken error
}

// ExecContext implements tables.DBTX.
func (t *namedErrors) ExecContext(ctx context.Context, statement string, args ...any) (sql.Result, error) {
	r, err := t.Tx.ExecContext(ctx, statement, args...)
	if err != nil {
		err = named(err)
		t.broken = err
	}
	return r, err
}

func named(err error) error {
	var e *sqlite3.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code() {
	case sqlite3lib.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3lib.SQLITE_CONSTRAINT_UNIQUE:
		return &tables.Constraint{Rule: e.Error(), Err: err}
	case sqlite3lib.SQLITE_CONSTRAINT_FOREIGNKEY:
		return &tables.Constraint{Foreign: true, Rule: e.Error(), Err: err}
	}
	return err
}
