package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables"
)

// LastChange implements store.Shared.
func (s *Store) LastChange(ctx context.Context) (n uint64, err error) {
	err = s.View(ctx, func(t store.Reader) error {
		n, err = t.(tables.Tx).LastChange()
		return err
	})
	return n, err
}

// Changes implements store.Shared.
func (s *Store) Changes(ctx context.Context, after uint64) (c store.Changes, err error) {
	err = s.View(ctx, func(t store.Reader) error {
		c, err = t.(tables.Tx).ChangesAfter(after, s.name)
		return err
	})
	return c, err
}

// termKey is under which a context carries the term of a leader.
type termKey struct{}

const (
	askAgain = 2 * time.Second
	// beat is how often a leader looks whether it still has its lock, and
	// beatTimeout how long it waits for the answer.
	beat        = 2 * time.Second
	beatTimeout = 5 * time.Second
)

// Lead implements store.Shared. The lock is of a session: it goes with the
// process or the connection. A leader that does not notice in time is stopped
// by the term, which every Update of it checks.
func (s *Store) Lead(ctx context.Context, f func(ctx context.Context) error) error {
	for {
		led, err := s.leadOnce(ctx, f)
		if ctx.Err() != nil || led && err == nil {
			return nil
		}
		if err != nil && !temporary(err) && !errors.Is(err, store.ErrNotLeader) && !errors.Is(err, errDeposed) {
			return err
		}
		if pause(ctx, askAgain) != nil {
			return nil
		}
	}
}

var errDeposed = errors.New("postgres: the leader's connection was lost")

func (s *Store) leadOnce(ctx context.Context, f func(ctx context.Context) error) (led bool, err error) {
	c, err := pgx.ConnectConfig(ctx, s.config)
	if err != nil {
		return false, &lostError{err}
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), beatTimeout)
		defer cancel()
		_ = c.Close(end) // the lock goes with the connection
	}()
	if err := c.QueryRow(ctx, "SELECT pg_try_advisory_lock($1)", int64(lockLeader)).Scan(&led); err != nil || !led {
		return false, err
	}
	var term uint64
	if err := s.Update(ctx, func(t store.Tx) error {
		term, err = t.(tables.Tx).NextTerm()
		return err
	}); err != nil {
		return false, fmt.Errorf("postgres: lead: %w", err)
	}
	leading, depose := context.WithCancelCause(context.WithValue(ctx, termKey{}, term))
	defer depose(nil)
	done := make(chan error, 1)
	go func() { done <- f(leading) }()
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if errors.Is(context.Cause(leading), errDeposed) {
				return true, errDeposed
			}
			return true, err
		case <-tick.C:
			asked, cancel := context.WithTimeout(ctx, beatTimeout)
			_, err := c.Exec(asked, "SELECT 1")
			cancel()
			if err != nil {
				depose(errDeposed)
				<-done
				return true, errDeposed
			}
		}
	}
}
