// Package postgres is the engine that keeps the centre's tables in a
// PostgreSQL database, which several centres may use at once.
//
// One transaction writes at a time, as in SQLite: an Update takes an advisory
// lock first (ADR 0012). Each leaves a row with a token in the log of changes;
// when the connection is lost in the middle of a commit, the next connection
// takes the lock, which waits for the lost transaction to be over, and looks
// for the token. So an act is acknowledged only if it is in the database, and
// is never run a second time if it is. The log is also how other processes
// learn what changed.
package postgres

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Config says where the database is.
type Config struct {
	// URL is postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full
	// or the key=value form. The database must exist, and nothing but muster
	// may use it.
	URL string
	// MaxEvents is the size of each tenant's ring of events (default
	// tables.DefaultEvents).
	MaxEvents int
	// Readers is the most reading connections (default 8). Beside them there
	// are at most two for writing and one that holds leadership.
	Readers int
	// Patience is how long an Update goes on trying while the database is away
	// or asks to try again, and how long it looks for the truth about a commit
	// (default 30 s each).
	Patience time.Duration
}

// Server-side limits of every session. A transaction whose process went away
// holds the lock of writers: the server ends it.
const (
	statementTimeout = 30 * time.Second
	idleTimeout      = 10 * time.Second
	connectTimeout   = 10 * time.Second
	// commitTimeout is how long the answer to a commit is waited for.
	commitTimeout = 30 * time.Second
)

// Advisory locks. Nothing but muster uses the database, so any numbers do.
const (
	lockWriter  = 0x6d757374_00000001
	lockLeader  = 0x6d757374_00000002
	lockMigrate = 0x6d757374_00000003
)

// Store is a PostgreSQL database. It implements store.Shared.
type Store struct {
	config    *pgx.ConnConfig
	writer    *sql.DB
	reader    *sql.DB
	maxEvents int
	patience  time.Duration
	// name begins the tokens of this process.
	name string
	// turn lets one Update of this process in at a time: a queue here costs
	// the database nothing.
	turn chan struct{}
}

var _ store.Shared = (*Store)(nil)

// Open connects to the database and brings its schema up to date.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.MaxEvents <= 0 {
		cfg.MaxEvents = tables.DefaultEvents
	}
	if cfg.Readers <= 0 {
		cfg.Readers = 8
	}
	if cfg.Patience <= 0 {
		cfg.Patience = 30 * time.Second
	}
	c, err := parse(cfg.URL)
	if err != nil {
		return nil, err
	}
	s := &Store{
		config: c, writer: stdlib.OpenDB(*c), reader: stdlib.OpenDB(*c), maxEvents: cfg.MaxEvents, patience: cfg.Patience,
		name: rand.Text() + ".", turn: make(chan struct{}, 1),
	}
	// The second one finds out what became of the first one's commit.
	s.writer.SetMaxOpenConns(2)
	s.reader.SetMaxOpenConns(cfg.Readers)
	for _, d := range []*sql.DB{s.writer, s.reader} {
		// After a fail-over, connections to the old server go.
		d.SetConnMaxLifetime(time.Hour)
		d.SetConnMaxIdleTime(5 * time.Minute)
	}
	s.reader.SetMaxIdleConns(cfg.Readers)
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// parse reads the URL. Its errors never show a password.
func parse(text string) (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig(strings.TrimSpace(text))
	if err != nil {
		if u, e := url.Parse(text); e == nil && u.Scheme != "" {
			return nil, fmt.Errorf("postgres: read database URL %s: %s", u.Redacted(), reason(err, u))
		}
		return nil, errors.New("postgres: read database URL: want postgres://USER:PASSWORD@HOST/DATABASE?sslmode=verify-full or sound key=value pairs")
	}
	c.ConnectTimeout = connectTimeout
	for name, d := range map[string]time.Duration{
		"statement_timeout": statementTimeout, "idle_in_transaction_session_timeout": idleTimeout,
	} {
		c.RuntimeParams[name] = fmt.Sprint(d.Milliseconds())
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "muster"
	}
	// A server that lost us finds out.
	for name, value := range map[string]string{"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"} {
		c.RuntimeParams[name] = value
	}
	return c, nil
}

// reason is the error's text without the URL and what is secret in it.
func reason(err error, u *url.URL) string {
	text := err.Error()
	if password, _ := u.User.Password(); password != "" {
		text = strings.ReplaceAll(text, password, "xxxxx")
	}
	return text
}

// prepare checks the server and brings the schema up to date. Of processes
// that start together, one does it.
func (s *Store) prepare(ctx context.Context) error {
	c, err := s.writer.Conn(ctx)
	if err != nil {
		return fmt.Errorf("postgres: connect: %w", err)
	}
	defer c.Close()
	var version int
	var fsync, pages, commit string
	if err := c.QueryRowContext(ctx, `SELECT current_setting('server_version_num')::int, current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')`).Scan(&version, &fsync, &pages, &commit); err != nil {
		return fmt.Errorf("postgres: ask for the server's settings: %w", err)
	}
	switch {
	case version < 130000:
		return fmt.Errorf("postgres: the server is version %d, at least 13 is needed", version/10000)
	case fsync != "on" || pages != "on" || commit == "off":
		return fmt.Errorf("postgres: the server has fsync %s, full_page_writes %s, synchronous_commit %s: a power cut would lose approvals that were acknowledged; switch them on", fsync, pages, commit)
	}
	// Not by statement_timeout: another process may migrate a large database.
	if _, err := c.ExecContext(ctx, "SET statement_timeout = 0"); err != nil {
		return fmt.Errorf("postgres: wait for migrations: %w", err)
	}
	defer c.ExecContext(context.WithoutCancel(ctx), "RESET statement_timeout") //nolint:errcheck // a lost connection is closed
	if _, err := c.ExecContext(ctx, "SELECT pg_advisory_lock($1)", int64(lockMigrate)); err != nil {
		return fmt.Errorf("postgres: wait for migrations: %w", err)
	}
	defer c.ExecContext(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", int64(lockMigrate)) //nolint:errcheck // it goes with the connection
	if err := s.migrate(ctx); err != nil {
		return err
	}
	return s.Update(ctx, tables.FirstStart)
}

func (s *Store) migrate(ctx context.Context) error {
	config := s.config.Copy()
	config.RuntimeParams["statement_timeout"] = "0"
	d := stdlib.OpenDB(*config)
	defer d.Close() //nolint:errcheck // nothing is pending
	return tables.Migrate(ctx, d, goose.DialectPostgres, files{tables.Files()})
}

// Close implements store.Store.
func (s *Store) Close() error {
	if err := errors.Join(s.reader.Close(), s.writer.Close()); err != nil {
		return fmt.Errorf("postgres: close: %w", err)
	}
	return nil
}

// View implements store.Store.
func (s *Store) View(ctx context.Context, f func(store.Reader) error) error {
	var t *sql.Tx
	// Connections of the pool may be dead without knowing: that shows at the
	// first statement, before f has run.
	err := s.patiently(ctx, func() (err error) {
		t, err = s.reader.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
		return err
	})
	if err != nil {
		return fmt.Errorf("postgres: begin: %w", err)
	}
	defer t.Rollback() //nolint:errcheck // nothing was written
	return f(tables.New(ctx, &statements{Tx: t}, s.maxEvents))
}

// patiently tries again while the database is away.
func (s *Store) patiently(ctx context.Context, try func() error) error {
	end := time.Now().Add(s.patience)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := try()
		if err == nil || !temporary(err) || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
		if pause(ctx, wait) != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Update implements store.Store.
func (s *Store) Update(ctx context.Context, f func(store.Tx) error) error {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return fmt.Errorf("postgres: begin: %w", ctx.Err())
	}
	return s.patiently(ctx, func() error { return s.once(ctx, f) })
}

// once runs one transaction. Its error is temporary only if nothing of the
// transaction counts.
func (s *Store) once(ctx context.Context, f func(store.Tx) error) error {
	// database/sql ends a transaction with its context, also in the middle of
	// a commit, whose answer would then be lost.
	whole, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	t, in, err := s.begin(ctx, whole)
	if err != nil {
		return err
	}
	defer t.Rollback() //nolint:errcheck // an error after Commit is no news
	log := tables.New(ctx, in, s.maxEvents)
	if term, leads := ctx.Value(termKey{}).(uint64); leads {
		if now, err := log.Term(); err != nil {
			return err
		} else if now != term {
			return fmt.Errorf("postgres: begin: term %d has ended, this is %d: %w", term, now, store.ErrNotLeader)
		}
	}
	if err := f(log); err != nil {
		return err
	}
	if in.broken != nil {
		return fmt.Errorf("postgres: commit: a statement of the transaction had failed: %w", in.broken)
	}
	token := s.name + rand.Text()
	if err := log.Log(token); err != nil {
		return err
	}
	failpoint.Hit("store.before-commit")
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("postgres: commit: %w", err)
	}
	timer := time.AfterFunc(commitTimeout, cancel)
	defer timer.Stop()
	if err := t.Commit(); err != nil {
		if err := s.settle(ctx, token, err); err != nil {
			return err
		}
	}
	failpoint.Hit("store.after-commit")
	return nil
}

// begin begins a transaction and takes the lock of writers: each statement
// after it sees all that was committed before.
func (s *Store) begin(ctx, whole context.Context) (*sql.Tx, *statements, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("postgres: begin: %w", err)
	}
	t, err := s.writer.BeginTx(whole, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, nil, fmt.Errorf("postgres: begin: %w", err)
	}
	if _, err := t.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(lockWriter)); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("postgres: wait for the lock of writers: %w", err), t.Rollback())
	}
	return t, &statements{Tx: t}, nil
}

// settle finds out what a commit that failed has done. It returns nil if the
// transaction counts, and cause if not.
func (s *Store) settle(ctx context.Context, token string, cause error) error {
	var e *pgconn.PgError
	if errors.As(cause, &e) && e.Severity == "ERROR" {
		return fmt.Errorf("postgres: commit: %w", cause) // the server says no
	}
	failpoint.Hit("store.unsettled")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.patience)
	defer cancel()
	counts := false
	err := s.patiently(ctx, func() error {
		t, in, err := s.begin(ctx, ctx)
		if err != nil {
			return err
		}
		defer t.Rollback() //nolint:errcheck // nothing was written
		counts, err = tables.New(ctx, in, s.maxEvents).Logged(token)
		return err
	})
	switch {
	case err != nil:
		return fmt.Errorf("postgres: commit: %w: %w; %v", store.ErrUnknown, errText(cause), errText(err))
	case counts:
		return nil
	}
	return fmt.Errorf("postgres: commit: %w", &lostError{cause})
}

// errText is an error that nobody branches on.
func errText(err error) error { return errors.New(err.Error()) }

// lostError: the connection went, and nothing of the transaction counts.
type lostError struct{ error }

// temporary reports whether trying again may help, given that nothing of the
// transaction counts.
func temporary(err error) bool {
	var (
		lost    *lostError
		e       *pgconn.PgError
		connect *pgconn.ConnectError
		network net.Error
	)
	switch {
	case errors.Is(err, store.ErrUnknown), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, store.ErrNotLeader):
		return false
	case errors.As(err, &lost):
		return true
	case errors.As(err, &e):
		switch e.Code {
		case "40001", "40P01", // serialization failure, deadlock
			"55P03",                   // lock not available
			"57P01", "57P02", "57P03", // shut down, crashed, starting
			"25006", // read only: this is the standby of a fail-over
			"53300": // too many connections
			return true
		}
		return strings.HasPrefix(e.Code, "08")
	case errors.As(err, &connect), errors.As(err, &network):
		return true
	}
	return pgconn.SafeToRetry(err) || errors.Is(err, os.ErrDeadlineExceeded) || closed(err)
}

// closed recognizes a connection that broke.
func closed(err error) bool {
	text := err.Error()
	for _, s := range []string{"unexpected EOF", "conn closed", "connection reset", "broken pipe", "bad connection", "closed network connection"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}

// files are the migrations in the words of PostgreSQL.
type files struct{ fs.FS }

// ReadFile implements fs.ReadFileFS.
func (f files) ReadFile(name string) ([]byte, error) {
	b, err := fs.ReadFile(f.FS, name)
	return []byte(inPostgres(string(b))), err
}

// Open implements fs.FS.
func (f files) Open(name string) (fs.File, error) {
	file, err := f.FS.Open(name)
	if err != nil || !strings.HasSuffix(name, ".sql") {
		return file, err
	}
	b, err := f.ReadFile(name)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &rewritten{File: file, Reader: strings.NewReader(string(b))}, nil
}

type rewritten struct {
	fs.File
	*strings.Reader
}

// Read implements fs.File.
func (r *rewritten) Read(b []byte) (int, error) { return r.Reader.Read(b) }
