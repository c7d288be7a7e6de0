package store

import (
	"context"
	"encoding/json"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

const progressKey = "k3s/etcd/learnerProgress"

// progress is the one slot in which the leader follows one learner.
type progress struct {
	ID               uint64    `json:"id,omitempty"`
	Name             string    `json:"name,omitempty"`
	RaftAppliedIndex uint64    `json:"raftAppliedIndex,omitempty"`
	LastProgress     time.Time `json:"lastProgress"`
}

// ManageLearners promotes learners while this member leads, every 15 s. It asks
// etcd to promote each learner and nothing else: etcd compares how far the log
// has been copied, not whether the learner still lives, and that is how a
// learner that has just died becomes a voter and takes the quorum with it.
// After each round seen gets the members.
func (s *Store) ManageLearners(ctx context.Context, seen func(context.Context, []*etcdserverpb.Member)) {
	t := time.NewTicker(promoteTick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		c := s.Client()
		if c == nil {
			continue
		}
		func() {
			ctx, cancel := context.WithTimeout(ctx, promoteTick)
			defer cancel()
			st, err := c.Status(ctx, endpoint)
			if err != nil {
				proc.Error("Failed to check local etcd status for learner management: %v", err)
				return
			}
			if st.Header.MemberId != st.Leader {
				return
			}
			ml, err := c.MemberList(ctx)
			if err != nil {
				proc.Error("Failed to get etcd members for learner management: %v", err)
				return
			}
			for _, m := range ml.Members {
				if m.IsLearner {
					if err := s.follow(ctx, c, m); err != nil {
						proc.Error("Failed to track learner progress toward promotion: %v", err)
					}
				}
			}
			if ml, err = c.MemberList(ctx); err == nil {
				seen(ctx, ml.Members)
			}
		}()
	}
}

// follow tries to promote one learner, else notes its progress and evicts it
// after five minutes without any. There is one slot for all learners, so with
// two of them the eviction never comes.
func (s *Store) follow(ctx context.Context, c *clientv3.Client, m *etcdserverpb.Member) error {
	if _, err := c.MemberPromote(ctx, m.ID); err == nil {
		proc.Info("Promoted learner %s", m.Name)
		return nil
	}
	var p progress
	r, err := c.Get(ctx, progressKey)
	if err != nil {
		return err
	}
	if len(r.Kvs) > 0 {
		if err := json.Unmarshal(r.Kvs[0].Value, &p); err != nil {
			return err
		}
	}
	now := time.Now()
	if p.Name != m.Name || p.ID != m.ID {
		p = progress{ID: m.ID, Name: m.Name, LastProgress: now}
	}
	for _, ep := range m.ClientURLs {
		sctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		lc, err := s.dial(ep)
		if err == nil {
			st, serr := lc.Status(sctx, ep)
			_ = lc.Close()
			if serr == nil {
				if p.RaftAppliedIndex < st.RaftAppliedIndex {
					p.RaftAppliedIndex, p.LastProgress = st.RaftAppliedIndex, now
				}
				cancel()
				break
			}
		}
		cancel()
	}
	if p.LastProgress != now {
		proc.Warn("Learner %s stalled at RaftAppliedIndex=%d for %s", p.Name, p.RaftAppliedIndex, now.Sub(p.LastProgress))
	}
	if now.Sub(p.LastProgress) > stallLimit {
		if _, err := c.MemberRemove(ctx, m.ID); err != nil {
			return err
		}
		proc.Warn("Removed learner %s from etcd cluster", p.Name)
		return nil
	}
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = c.Put(ctx, progressKey, string(b))
	return err
}

// RemoveMember removes the member of a node, by name or peer address; the
// leadership is given away first when it is this member's.
func (s *Store) RemoveMember(ctx context.Context, name, address string) error {
	c := s.Client()
	ml, err := c.MemberList(ctx)
	if err != nil {
		return err
	}
	for _, m := range ml.Members {
		if m.Name != name {
			continue
		}
		for _, p := range m.PeerURLs {
			if p != "https://"+address+":2380" {
				continue
			}
			st, err := c.Status(ctx, endpoint)
			if err == nil && st.Leader == m.ID {
				for _, o := range ml.Members {
					if o.ID == m.ID || o.IsLearner || len(o.ClientURLs) == 0 {
						continue
					}
					if lc, err := s.dial(m.ClientURLs...); err == nil {
						_, err = lc.MoveLeader(ctx, o.ID)
						_ = lc.Close()
						if err == nil {
							break
						}
					}
				}
			}
			proc.Info("Removing name=%s id=%d address=%s from etcd", m.Name, m.ID, address)
			_, err = c.MemberRemove(ctx, m.ID)
			return err
		}
	}
	return nil
}

// OnlyVoter tells whether the named member is the only started voter.
func (s *Store) OnlyVoter(ctx context.Context, name string) (bool, error) {
	ml, err := s.Client().MemberList(ctx)
	if err != nil {
		return false, err
	}
	n, mine := 0, false
	for _, m := range ml.Members {
		if !m.IsLearner && m.Name != "" {
			n++
			mine = mine || m.Name == name
		}
	}
	return mine && n == 1, nil
}
