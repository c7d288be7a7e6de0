package postgres

import (
	"context"
	"database/sql"
	"errors"
	"regexp"
	"sync"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/muster-edge/muster/central/store/tables"
)

// Text is compared byte by byte, as in SQLite: prefixes are searched between
// two bounds, and pages go by order.
var textColumn = regexp.MustCompile(`(?m)^(\s+(?:ADD COLUMN )?"?[a-z_0-9]+"?\s+|.*\bADD COLUMN [a-z_0-9]+ )TEXT\b`)

func inPostgres(migration string) string {
	return textColumn.ReplaceAllString(migration, `${1}TEXT COLLATE "C"`)
}

var (
	placeholder = regexp.MustCompile(`\?([0-9]+)`)
	translated  sync.Map
)

// dollars turns ?1 into $1. There are as many statements as package tables
// has, so all are kept.
func dollars(statement string) string {
	if s, there := translated.Load(statement); there {
		return s.(string)
	}
	s := placeholder.ReplaceAllString(statement, "$$$1")
	translated.Store(statement, s)
	return s
}

// statements is a transaction that takes the statements of package tables and
// gives errors their names.
type statements struct {
	*sql.Tx
	// broken is the first error of a statement: the server has given the
	// transaction up.
	broken error
}

// ExecContext implements tables.DBTX.
func (t *statements) ExecContext(ctx context.Context, statement string, args ...any) (sql.Result, error) {
	r, err := t.Tx.ExecContext(ctx, dollars(statement), args...)
	return r, t.named(err)
}

// QueryContext implements tables.DBTX.
func (t *statements) QueryContext(ctx context.Context, statement string, args ...any) (*sql.Rows, error) {
	r, err := t.Tx.QueryContext(ctx, dollars(statement), args...)
	return r, t.named(err)
}

// QueryRowContext implements tables.DBTX.
func (t *statements) QueryRowContext(ctx context.Context, statement string, args ...any) *sql.Row {
	return t.Tx.QueryRowContext(ctx, dollars(statement), args...)
}

func (t *statements) named(err error) error {
	if err == nil {
		return nil
	}
	var e *pgconn.PgError
	if errors.As(err, &e) {
		switch e.Code {
		case "23505":
			err = &tables.Constraint{Rule: e.ConstraintName, Err: err}
		case "23503":
			err = &tables.Constraint{Foreign: true, Rule: e.ConstraintName, Err: err}
		}
	}
	if t.broken == nil {
		t.broken = err
	}
	return err
}
