package slots

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
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
	// Clustered: this node belongs to a cluster. Server: and has an API that
	// may be written.
	Clustered func() bool
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

	mu sync.Mutex
	// seen is the ledger's version at seenAt.
	seen   string
	seenAt time.Duration
	gaveUp time.Duration
	gave   bool
}

// NewTurns makes one.
func NewTurns(cfg TurnsConfig) *Turns {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Turns{cfg: cfg}
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
	f := turns.Facts{Phase: turns.Leaving, Image: x.Image.String(), Version: x.Version, K3s: x.K3s, Older: x.Older}
	a, err := t.advance(ctx, f)
	if err != nil {
		return false, "the cluster cannot be asked: " + err.Error()
	}
	return a.Step == turns.Go, a.Reason
}

// Settled implements Site.
func (t *Turns) Settled(ctx context.Context, image firmware.Digest, version string, failed *firmware.FailedImage) error {
	f := turns.Facts{Phase: turns.Settled, Image: image.String(), Version: version}
	if failed != nil {
		f.Image, f.Version, f.Failed = failed.Image.String(), failed.Version, failed.Reason
		if f.Failed == "" {
			f.Failed = "no reason was noted"
		}
	}
	_, err := t.advance(ctx, f)
	return err
}

// Judging implements Site.
func (t *Turns) Judging(ctx context.Context) {
	if _, err := t.advance(ctx, turns.Facts{Phase: turns.Judging}); err != nil {
		t.cfg.Log.Debug("a turn was not renewed", "err", err)
	}
}

// steps bounds how many steps follow each other in one call: cordon, last sign
// of life, go.
const steps = 6

func (t *Turns) advance(ctx context.Context, ask turns.Facts) (turns.Answer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var a turns.Answer
	for range steps {
		f := ask
		f.Self, f.Now, f.Clustered, f.Busy = t.cfg.Self, t.cfg.Now(), t.cfg.Clustered(), t.cfg.Busy()
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
		now := t.cfg.Mono()
		if version != t.seen {
			t.seen, t.seenAt = version, now
		}
		f.LedgerFor = now - t.seenAt
		if t.gave {
			f.GaveUp = max(now-t.gaveUp, 1)
		}
		a = turns.Decide(f)
		if a.GiveUp {
			t.gave, t.gaveUp = true, now
		}
		if a.Step != turns.Wait {
			t.cfg.Log.Info("turn", "state", a.State.String(), "step", a.Step.String(), "reason", a.Reason)
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
