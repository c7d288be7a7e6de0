package central

import (
	"context"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

const (
	sweepEvery = 10 * time.Minute
	// sweepBatch bounds one transaction; what is left waits for the next.
	sweepBatch = 200
)

// sweep ends requests that waited too long. A machine that comes back is
// expired by its own filing; this is for those that do not.
func (s *Server) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if err := s.expire(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("requests not expired", logError, err)
		}
		if err := s.expireOrders(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("orders not expired", logError, err)
		}
		if err := s.tidyBlobs(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("files not tidied", logError, err)
		}
		if err := s.tidyCredentials(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("ended credentials not forgotten", logError, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Ended credentials are shown for a while, for those who ask what became of
// them; the audit log has them for ever.
const (
	keepSessions = 30 * 24 * time.Hour
	keepTokens   = 366 * 24 * time.Hour
)

// tidyCredentials forgets what has long let nobody in.
func (s *Server) tidyCredentials(ctx context.Context) error {
	return s.store.Update(ctx, func(t store.Tx) error {
		now := s.cfg.Now()
		for kind, keep := range map[store.CredentialKind]time.Duration{
			store.CredentialSession: keepSessions, store.CredentialStart: keepTokens, store.CredentialPersonal: keepTokens,
			store.CredentialToken: keepTokens, store.CredentialInvitation: keepTokens,
		} {
			if err := t.DropCredentials(kind, now.Add(-keep)); err != nil {
				return err
			}
		}
		return t.DropLoginStates(now)
	})
}

func (s *Server) expire(ctx context.Context) error {
	for _, state := range []fleet.RequestState{fleet.RequestPending, fleet.RequestApproved} {
		var ended []fleet.Request
		err := s.store.Update(ctx, func(t store.Tx) error {
			ended = nil
			by := act{actor: "system", now: s.cfg.Now()}
			waiting, err := t.Requests(DefaultTenant, &state, maxList)
			if err != nil {
				return err
			}
			for _, r := range waiting {
				e, fact, due := enroll.Expire(by.now, r)
				if !due || len(ended) == sweepBatch {
					continue
				}
				if err := t.PutRequest(e, r.Revision); err != nil {
					return err
				}
				if err := by.facts(t, []enroll.Fact{fact}, []fleet.Request{e}); err != nil {
					return err
				}
				ended = append(ended, e)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, r := range ended {
			s.changed(r)
		}
	}
	return nil
}
