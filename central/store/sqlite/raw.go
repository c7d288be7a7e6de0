package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"

	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store/tables"
)

// raw is a database file below the objects.
type raw struct{ db *sql.DB }

var _ tables.Raw = (*raw)(nil)

// OpenRaw opens a database that is there, for reading, whatever its schema and
// whoever else uses it.
func OpenRaw(path string) (tables.Raw, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("sqlite: open database: %w", err)
	}
	d, err := sql.Open("sqlite", dsn(path, "deferred", "query_only(1)"))
	if err != nil {
		return nil, fmt.Errorf("sqlite: open database: %w", err)
	}
	return &raw{d}, nil
}

// CreateRaw makes a database file with a schema; it must not be there.
func CreateRaw(ctx context.Context, path string, schema []int64) (tables.Raw, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sqlite: make database: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("sqlite: make database: %w", err)
	}
	// No write-ahead log: the file is moved when it is whole.
	d, err := sql.Open("sqlite", dsn(path, "immediate", "synchronous(FULL)", "journal_mode(DELETE)"))
	if err != nil {
		return nil, fmt.Errorf("sqlite: make database: %w", err)
	}
	d.SetMaxOpenConns(1)
	if err := tables.MigrateTo(ctx, d, goose.DialectSQLite3, tables.Files(), schema); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &raw{d}, nil
}

// Engine implements tables.Raw.
func (*raw) Engine() string { return "sqlite" }

// TableList implements tables.Raw.
func (*raw) TableList() string {
	return "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY rowid"
}

// Read implements tables.Raw.
func (r *raw) Read(ctx context.Context, f func(tables.DBTX) error) error {
	t, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("sqlite: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // nothing was written
	return f(t)
}

// Write implements tables.Raw.
func (r *raw) Write(ctx context.Context, f func(tables.DBTX) error) error {
	t, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("sqlite: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // an error after Commit is no news
	if err := f(t); err != nil {
		return err
	}
	if err := t.Commit(); err != nil {
		return fmt.Errorf("sqlite: commit: %w", err)
	}
	return nil
}

// Close implements tables.Raw.
func (r *raw) Close() error { return r.db.Close() }
