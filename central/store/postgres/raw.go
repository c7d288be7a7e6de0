package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store/tables"
)

// raw is a database below the objects.
type raw struct{ db *sql.DB }

var _ tables.Raw = (*raw)(nil)

// OpenRaw opens a database for reading, whatever its schema and whoever else
// uses it. With a schema it makes that first, in an empty database.
func OpenRaw(ctx context.Context, url string, schema []int64) (tables.Raw, error) {
	c, err := parse(url)
	if err != nil {
		return nil, err
	}
	// A copy takes as long as it takes.
	c.RuntimeParams["statement_timeout"], c.RuntimeParams["idle_in_transaction_session_timeout"] = "0", "0"
	d := stdlib.OpenDB(*c)
	if err := d.PingContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("postgres: connect: %w", err), d.Close())
	}
	if schema != nil {
		if err := tables.MigrateTo(ctx, d, goose.DialectPostgres, files{tables.Files()}, schema); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return &raw{d}, nil
}

// Engine implements tables.Raw.
func (*raw) Engine() string { return "postgres" }

// TableList implements tables.Raw.
func (*raw) TableList() string {
	return "SELECT c.relname FROM pg_class c WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r' ORDER BY c.oid"
}

// Read implements tables.Raw.
func (r *raw) Read(ctx context.Context, f func(tables.DBTX) error) error {
	t, err := r.db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return fmt.Errorf("postgres: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // nothing was written
	return f(&statements{Tx: t})
}

// Write implements tables.Raw.
func (r *raw) Write(ctx context.Context, f func(tables.DBTX) error) error {
	t, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("postgres: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // an error after Commit is no news
	if _, err := t.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(lockWriter)); err != nil {
		return fmt.Errorf("postgres: wait for the lock of writers: %w", err)
	}
	if err := f(&statements{Tx: t}); err != nil {
		return err
	}
	if err := t.Commit(); err != nil {
		return fmt.Errorf("postgres: commit: %w", err)
	}
	return nil
}

// Close implements tables.Raw.
func (r *raw) Close() error { return r.db.Close() }
