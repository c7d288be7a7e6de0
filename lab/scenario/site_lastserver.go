package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

const escrowKey = "escrow.key"

// orderSilence is how long a cluster is silent before a node heeds an order
// that takes its place: one that is not needed must not go off when a server
// merely restarts.
var orderSilence = clusterbootstrap.Policy{}.WithDefaults().QuorumLost

// lastServer: a site with one server loses it for good. What it sealed before
// is at the centre; a person opens it for another node and orders that node
// to go on from it.
func lastServer(ctx context.Context, s *shop) error {
	began := time.Now()
	if _, err := s.l.Muster(ctx, "escrow", "keygen", "--out", s.l.Path(escrowKey)); err != nil {
		return err
	}
	if _, err := s.c.muster(ctx, "escrow", "trust", s.l.Path(escrowKey+".pub"), "--reason", "first key", "--yes"); err != nil {
		return err
	}
	if err := s.on(ctx, s.box(1)); err != nil {
		return err
	}
	if _, err := s.watch.until(ctx, "founder", formLimit, func(v view) bool { return v.best.API && v.role(s.box(1)) == roleServer }); err != nil {
		return s.l.Check("the first box founds", err)
	}
	s.l.Timing("", "start_to_first_server_s", time.Since(began))
	if err := s.l.Check("something is written into the cluster", s.mark(ctx, s.box(1), "before-the-fire")); err != nil {
		return err
	}
	if err := s.on(ctx, s.nodes[1:]...); err != nil {
		return err
	}
	if err := s.atRest(ctx, 1, len(s.nodes)); err != nil {
		return err
	}
	uid, err := s.uid(s.watch.now())
	if err != nil {
		return err
	}
	blob, err := s.sealed(ctx, formLimit, func(b fleet.EscrowBlob) bool { return b.For == "" })
	if err := s.l.Check("a sealed snapshot of the cluster is at the centre", err); err != nil {
		return err
	}
	heir, other := s.box(2), s.box(3)
	if err := s.cut(s.box(1)); err != nil {
		return err
	}
	lost := time.Now()
	_, err = s.watch.rests(ctx, "loss", healLimit, rest, func(v view) bool {
		return v.status[heir.Name()].Blocker != "" && v.status[other.Name()].Blocker != "" && v.role(heir) == roleWorker && v.role(other) == roleWorker
	})
	if err := s.l.Check("without its only server nobody founds anew: the others name what they wait for", err); err != nil {
		return err
	}
	// The twin: without what was sealed an order to restore cannot be given.
	_, err = s.c.muster(ctx, "order", "restore", string(heir.ID()), "--site", site, "--snapshot", "e-aaaaaaaaaaaaaaaaaaaaaaaa", "--reason", "try", "--yes")
	if err == nil {
		err = errors.New("it was taken")
	} else {
		err = nil
	}
	if err := s.l.Check("an order to restore what nobody handed over is refused", err); err != nil {
		return err
	}
	if _, err := s.c.muster(ctx, "escrow", "open", blob.ID, "--key", s.l.Path(escrowKey), "--for", string(heir.ID()), "--reason", "the server burnt", "--yes"); err != nil {
		return s.l.Check("a person opens it for another node", err)
	}
	handed, err := s.sealed(ctx, time.Minute, func(b fleet.EscrowBlob) bool { return b.For == heir.ID() })
	if err := s.l.Check("a person opens it for another node", err); err != nil {
		return err
	}
	if _, err := s.c.muster(ctx, "order", "restore", string(heir.ID()), "--site", site, "--snapshot", handed.ID, "--reason", "the server burnt", "--yes"); err != nil {
		return s.l.Check("a person orders that node to go on", err)
	}
	s.l.Say("person", "order", heir.Name()+" shall go on from the sealed snapshot")
	ordered := time.Now()
	_, err = s.watch.rests(ctx, "rest", orderSilence+healLimit, rest, healthy(s, 1, len(s.nodes)-1))
	if err := s.l.Check(fmt.Sprintf("at rest: one cluster, 1 server that is a voter, %d nodes ready", len(s.nodes)-1), err); err != nil {
		return err
	}
	wait := max(lost.Add(orderSilence).Sub(ordered), 0)
	s.l.Timing("", "policy_wait_s", wait)
	s.l.Timing("", "order_to_restored_s", time.Since(ordered)-rest-wait)
	now := s.watch.now()
	var errs []error
	if got, err := s.uid(now); err != nil || got != uid {
		errs = append(errs, fmt.Errorf("the cluster is %s, it was %s (%w)", got, uid, err))
	}
	if now.role(heir) != roleServer || now.role(other) != roleWorker {
		errs = append(errs, fmt.Errorf("%s is %s, %s is %s", heir.Name(), now.role(heir), other.Name(), now.role(other)))
	}
	return s.l.Check("it is the same cluster with the same data", errors.Join(append(errs, s.hasMark(ctx, heir, "before-the-fire"))...))
}

// sealed waits for a sealed snapshot at the centre.
func (s *shop) sealed(ctx context.Context, limit time.Duration, fits func(fleet.EscrowBlob) bool) (fleet.EscrowBlob, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	var found fleet.EscrowBlob
	err := poll(ctx, time.Second, func() (bool, error) {
		b, err := s.c.muster(ctx, "escrow", "list", "--site", site, "-o", "json")
		if err != nil {
			return false, nil // a busy moment; the context ends it
		}
		var list []fleet.EscrowBlob
		if err := json.Unmarshal(b, &list); err != nil {
			return false, fmt.Errorf("scenario: read sealed snapshots: %w", err)
		}
		for _, x := range list {
			if fits(x) {
				found = x
				return true, nil
			}
		}
		return false, nil
	})
	return found, err
}
