package slots

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/turns"
)

// Cluster is what the site's cluster tells of a node, and the one object in it
// that a turn is.
type Cluster interface {
	// Facts fills what the cluster knows: API, Ledger, Nodes, Voters, Learners,
	// Cordoned, Draining, Pods, and Server. version is for WriteTurns; an error
	// is one of ours, not a cluster that does not answer.
	Facts(ctx context.Context, f *turns.Facts) (version string, err error)
	// WriteTurns writes by compare-and-set; false: somebody was faster.
	WriteTurns(ctx context.Context, l turns.Ledger, version string) (bool, error)
	// Drain cordons the node and asks its pods to leave.
	Drain(ctx context.Context, node fleet.NodeID) error
	Uncordon(ctx context.Context, node fleet.NodeID) error
}

// TurnsConfig says what Turns works with. What is not marked optional is needed.
type TurnsConfig struct {
	Self    fleet.NodeID
	Cluster Cluster
	// Clustered: this node belongs to a cluster.
	Clustered func() bool
	// Worker: and may not write there, so that Ask has a server do it. Optional.
	Worker func() bool
	Ask    func(ctx context.Context, a turns.Ask) (turns.Reply, error)
	// Policy is the charter's.
	Policy func() fleet.UpdatePolicy
	// Busy is why the cluster changes its servers, "" if it does not.
	Busy func() string
	// SnapshotTaken and TakeSnapshot are about a server's snapshot before
	// another version; a worker needs none.
	SnapshotTaken func(image string) bool
	TakeSnapshot  func(ctx context.Context, image string) error
	Now           func() time.Time
	// Mono is a clock that nobody sets.
	Mono func() time.Duration
	// Log is optional.
	Log *slog.Logger
}

// Turns is a Site on a cluster.
type Turns struct {
	cfg TurnsConfig

	// busy is taken by whoever asks: this node, or a worker through it.
	busy chan struct{}
	// seen is the ledger's version at seenAt.
	seen   string
	seenAt time.Duration
	// gaveUp is when the drain of a node was given up.
	gaveUp map[fleet.NodeID]time.Duration
}

// NewTurns makes one.
func NewTurns(cfg TurnsConfig) *Turns {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Turns{cfg: cfg, busy: make(chan struct{}, 1), gaveUp: map[fleet.NodeID]time.Duration{}}
}

// NeedsSnapshot implements Site.
func (t *Turns) NeedsSnapshot(image firmware.Digest) bool {
	return !t.cfg.SnapshotTaken(image.String())
}

// Snapshot implements Site.
func (t *Turns) Snapshot(ctx context.Context, image firmware.Digest) error {
	return t.cfg.TakeSnapshot(ctx, image.String())
}

// Turn implements Site. Several steps may follow each other at once; a wait
// ends it.
func (t *Turns) Turn(ctx context.Context, x firmware.Target) (bool, string) {
	r, err := t.ask(ctx, turns.Ask{Phase: turns.Leaving, Image: x.Image.String(), Version: x.Version, K3s: x.K3s, Older: x.Older})
	if err != nil {
		return false, "the cluster cannot be asked: " + err.Error()
	}
	return r.Go, r.Reason
}

// Settled implements Site.
func (t *Turns) Settled(ctx context.Context, image firmware.Digest, version string, failed *firmware.FailedImage) error {
	a := turns.Ask{Phase: turns.Settled, Image: image.String(), Version: version}
	if failed != nil {
		a.Image, a.Version, a.Failed = failed.Image.String(), failed.Version, failed.Reason
		if a.Failed == "" {
			a.Failed = "no reason was noted"
		}
	}
	_, err := t.ask(ctx, a)
	return err
}

// Judging implements Site.
func (t *Turns) Judging(ctx context.Context) {
	if _, err := t.ask(ctx, turns.Ask{Phase: turns.Judging}); err != nil {
		t.cfg.Log.Debug("a turn was not renewed", "err", err)
	}
}

func (t *Turns) worker() bool {
	return t.cfg.Worker != nil && t.cfg.Clustered() && t.cfg.Worker()
}

// ask is for this node: with its own rights, or through a server.
func (t *Turns) ask(ctx context.Context, ask turns.Ask) (turns.Reply, error) {
	if t.worker() {
		r, err := t.cfg.Ask(ctx, ask)
		r.Go = r.Go && err == nil && ask.Phase == turns.Leaving
		return r, err
	}
	a, err := t.advance(ctx, t.cfg.Self, ask)
	return reply(a), err
}

func reply(a turns.Answer) turns.Reply {
	return turns.Reply{State: a.State, Go: a.Step == turns.Go, Reason: a.Reason}
}

// For asks the cluster for a worker, whose key the caller has checked, and does
// what comes out to that worker's node and to no other.
func (t *Turns) For(ctx context.Context, node fleet.NodeID, ask turns.Ask) (turns.Reply, error) {
	switch {
	case !t.cfg.Clustered() || t.worker():
		return turns.Reply{}, fmt.Errorf("%w: this node is no server of a cluster", turns.ErrDenied)
	case node == t.cfg.Self:
		return turns.Reply{}, fmt.Errorf("%w: this is the node itself", turns.ErrDenied)
	}
	if err := ask.Validate(); err != nil {
		return turns.Reply{}, err
	}
	a, err := t.advance(ctx, node, ask)
	if err != nil {
		return turns.Reply{}, fmt.Errorf("slots: turn for %s: %w", node, err)
	}
	return reply(a), nil
}

// mayAsk says no to a node for which this server must not act.
func mayAsk(f turns.Facts) error {
	i := slices.IndexFunc(f.Nodes, func(n turns.Node) bool { return n.ID == f.Self })
	switch {
	case !f.API:
		return fmt.Errorf("%w: the cluster does not answer here", turns.ErrDenied)
	case i < 0:
		return fmt.Errorf("%w: the cluster does not know this node", turns.ErrDenied)
	case f.Nodes[i].Server:
		return fmt.Errorf("%w: a server asks the cluster itself", turns.ErrDenied)
	}
	return nil
}

// steps bounds how many steps follow each other in one call: cordon, last sign
// of life, go.
const steps = 6

func (t *Turns) advance(ctx context.Context, node fleet.NodeID, ask turns.Ask) (turns.Answer, error) {
	var a turns.Answer
	select {
	case t.busy <- struct{}{}:
		defer func() { <-t.busy }()
	case <-ctx.Done():
		return a, ctx.Err()
	}
	for range steps {
		f := ask.Facts()
		f.Self, f.Now, f.Clustered, f.Busy = node, t.cfg.Now(), t.cfg.Clustered(), t.cfg.Busy()
		p := t.cfg.Policy()
		f.Open, f.Opens = p.Open(f.Now)
		f.DrainLimit, f.Force = time.Duration(p.DrainTimeout)*time.Second, p.DrainForce
		version := ""
		if f.Clustered {
			var err error
			if version, err = t.cfg.Cluster.Facts(ctx, &f); err != nil {
				return a, err
			}
		}
		if node != t.cfg.Self {
			if err := mayAsk(f); err != nil {
				return a, err
			}
		}
		now := t.cfg.Mono()
		if version != t.seen {
			t.seen, t.seenAt = version, now
		}
		f.LedgerFor = now - t.seenAt
		if at, ok := t.gaveUp[node]; ok {
			f.GaveUp = max(now-at, 1)
		}
		a = turns.Decide(f)
		if a.GiveUp {
			t.gaveUp[node] = now // a node of the cluster, so that there is an end of them
		}
		if a.Step != turns.Wait {
			t.cfg.Log.Info("turn", "node", string(node), "state", a.State.String(), "step", a.Step.String(), "reason", a.Reason)
		}
		switch a.Step {
		case turns.Write:
			if _, err := t.cfg.Cluster.WriteTurns(ctx, a.Ledger, version); err != nil {
				return a, err
			}
		case turns.Drain:
			if err := t.cfg.Cluster.Drain(ctx, f.Self); err != nil {
				return a, err
			}
			if f.Cordoned {
				return a, nil // pods take their time
			}
		case turns.Uncordon:
			if err := t.cfg.Cluster.Uncordon(ctx, f.Self); err != nil {
				return a, err
			}
		case turns.Wait, turns.Go:
			return a, nil
		default:
			return a, fmt.Errorf("slots: unknown step %s", a.Step)
		}
	}
	return a, nil
}
