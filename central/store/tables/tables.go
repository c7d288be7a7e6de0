// Package tables keeps the centre's objects in the tables of an SQL database:
// one schema and one set of statements for every engine. Engines (packages
// sqlite and postgres) open a database, begin and commit transactions, and
// say which of their errors is which; everything else is here, once.
//
// It deliberately knows nothing about what the objects mean; the rules it does
// hold (one live request per node, one node per EK, tenant of every row) are
// constraints of the schema, so that a mistake above it cannot break them.
package tables

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Files are the migrations, in the words of SQLite.
func Files() fs.FS {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		panic(err) // the name is a constant
	}
	return files
}

// DefaultEvents is the size of each tenant's ring of events, unless an engine
// is told another.
const DefaultEvents = 20000

// DBTX runs statements: a transaction of database/sql, or an engine's wrapper
// of it. Statements use ?1, ?2 for their arguments.
type DBTX = db.DBTX

// New returns one transaction of the store over an engine's transaction.
func New(ctx context.Context, t DBTX, maxEvents int) Tx {
	return &tx{ctx: ctx, q: db.New(t), maxEvents: maxEvents, changes: make(map[store.Change]struct{})}
}

// Tx is a transaction with what an engine for several processes needs.
type Tx interface {
	store.Tx
	// Log writes down what the transaction changed, under a token that tells
	// later whether it was committed.
	Log(token string) error
	// Logged reports whether a transaction with this token was committed.
	Logged(token string) (bool, error)
	// ChangesAfter returns what was logged after a number, without what has a
	// token that begins with own.
	ChangesAfter(after uint64, own string) (store.Changes, error)
	// LastChange is the number of the newest entry of the log.
	LastChange() (uint64, error)
	// Term is the number of the leader; NextTerm makes the caller the next.
	Term() (uint64, error)
	NextTerm() (uint64, error)
}

// Migrate brings the schema up to date. A migration whose number is below one
// that was applied is applied, too: numbers are given out to people who work
// side by side, and arrive in any order.
func Migrate(ctx context.Context, d *sql.DB, dialect goose.Dialect, files fs.FS) error {
	p, err := provider(d, dialect, files)
	if err != nil {
		return err
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("tables: bring the schema up to date: %w", err)
	}
	return nil
}

func provider(d *sql.DB, dialect goose.Dialect, files fs.FS) (*goose.Provider, error) {
	p, err := goose.NewProvider(dialect, d, files, goose.WithVerbose(false), goose.WithAllowOutofOrder(true))
	if err != nil {
		return nil, fmt.Errorf("tables: read migrations: %w", err)
	}
	return p, nil
}

// FirstStart gives a new database its first epoch.
func FirstStart(t store.Tx) error {
	if _, err := t.Setting(settingEpoch); !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return t.PutSetting(settingEpoch, "1")
}

// Constraint is a rule of the schema that a statement broke. Engines return it
// (wrapped or not) in place of their own error.
type Constraint struct {
	// Foreign: the row belongs to one that is missing. Else a key is taken.
	Foreign bool
	// Rule is how the engine names the rule: an index, or the columns.
	Rule string
	// Err is the engine's error.
	Err error
}

// Error implements error.
func (c *Constraint) Error() string { return c.Err.Error() }

// Unwrap returns the engine's error.
func (c *Constraint) Unwrap() error { return c.Err }

// wrap gives database errors the names that callers branch on.
func wrap(verb, object string, err error) error {
	var c *Constraint
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("tables: %s %s: %w", verb, object, store.ErrNotFound)
	case errors.As(err, &c) && c.Foreign:
		return fmt.Errorf("tables: %s %s: what it belongs to is missing: %w", verb, object, store.ErrNotFound)
	case errors.As(err, &c):
		if strings.Contains(c.Rule, "requests_one_live") || strings.Contains(c.Rule, "requests.tenant, requests.node") {
			return fmt.Errorf("tables: %s %s: the node has another live request: %w", verb, object, store.ErrConflict)
		}
		return fmt.Errorf("tables: %s %s: %w", verb, object, store.ErrExists)
	}
	return fmt.Errorf("tables: %s %s: %w", verb, object, err)
}

// replaced turns the number of rows of an optimistic update into an error.
func replaced(object string, rows int64, err error) error {
	if err != nil {
		return wrap("write", object, err)
	}
	if rows == 0 {
		return fmt.Errorf("tables: write %s: %w", object, store.ErrConflict)
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

// Raw is a database below the objects: for backup and copy.
type Raw interface {
	// Engine is "sqlite" or "postgres".
	Engine() string
	// TableList is the statement that lists the tables, in the order in which
	// they were made: what a row belongs to comes before it.
	TableList() string
	// Read runs f over one snapshot, Write in one transaction.
	Read(ctx context.Context, f func(DBTX) error) error
	Write(ctx context.Context, f func(DBTX) error) error
	Close() error
}

// MigrateTo brings an empty database to the schema that has these migrations.
func MigrateTo(ctx context.Context, d *sql.DB, dialect goose.Dialect, files fs.FS, schema []int64) error {
	known := make(map[int64]bool)
	all, err := provider(d, dialect, files)
	if err != nil {
		return err
	}
	for _, s := range all.ListSources() {
		known[s.Version] = true
	}
	for _, v := range schema {
		if !known[v] {
			return fmt.Errorf("tables: make schema: migration %d is not known here: use the muster that wrote this, or a newer one", v)
		}
		if _, err := all.ApplyVersion(ctx, v, true); err != nil && !errors.Is(err, goose.ErrAlreadyApplied) {
			return fmt.Errorf("tables: make schema: %w", err)
		}
	}
	return nil
}
