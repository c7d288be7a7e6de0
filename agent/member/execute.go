package member

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-edge/muster/agent/spool"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/internal/failpoint"
)

// do carries out one action. When it returns nil, what the action promises is
// on the disk. Each may be repeated.
func (m *Member) do(ctx context.Context, a cb.Action) error {
	failpoint.Hit("member.before." + a.Kind.String())
	if err := m.perform(ctx, a); err != nil {
		return err
	}
	failpoint.Hit("member.after." + a.Kind.String())
	return nil
}

func (m *Member) perform(ctx context.Context, a cb.Action) error {
	switch a.Kind {
	case cb.Wait:
		return nil
	case cb.StartSurvey:
		return m.startSurvey()
	case cb.AskGrant:
		m.askGrant()
		return nil
	case cb.ClaimFounding:
		m.setClaim(a.Claim)
		return nil
	case cb.WithdrawClaim:
		m.setClaim(nil)
		return nil
	case cb.AckClaim:
		return m.ackClaim(a.Claim)
	case cb.FoundCluster:
		return m.foundCluster(a)
	case cb.AbandonFounding:
		return m.abandonFounding(ctx)
	case cb.RequestJoinMaterial:
		m.askMaterial(a)
		return nil
	case cb.RenewFenceLease:
		m.askLease(a)
		return nil
	case cb.StartWorker:
		return m.startWorker(ctx, a)
	case cb.StartServer:
		return m.startServer(ctx, a)
	case cb.KeepRecord:
		return m.keepRecord(a)
	case cb.WriteLedger:
		return m.writeLedger(ctx, a)
	case cb.StepPlan:
		return m.stepPlan(ctx, a)
	case cb.LeadPlan:
		return m.write(func(d *cb.Disk) { d.Lead = a.Lead })
	case cb.TakeSnapshot:
		return m.takeSnapshot(ctx, a.Plan)
	case cb.StopK3s:
		return m.stop(ctx)
	case cb.BeginReset:
		return m.write(func(d *cb.Disk) { d.Reset = a.Reset })
	case cb.ResetToOwnData:
		return m.reset(ctx)
	case cb.RestoreFromEscrow:
		return m.restore(ctx, a)
	case cb.RaiseEpoch:
		return m.raiseEpoch(a)
	case cb.MoveAside:
		return m.moveAside(ctx, a)
	case cb.RemoveDeadServer:
		return m.removeServer(ctx, a)
	case cb.UpdateAddresses:
		if err := m.write(func(d *cb.Disk) { d.Addrs = a.Addrs }); err != nil {
			return err
		}
		return m.applyHost()
	}
	return fmt.Errorf("member: nobody carries out %s", a.Kind)
}

// write changes the journal, and shows the change to others only after it is
// flushed.
func (m *Member) write(change func(*cb.Disk)) error {
	if err := m.cfg.Journal.Update(change); err != nil {
		return err
	}
	m.mu.Lock()
	m.show()
	m.mu.Unlock()
	return nil
}

func (m *Member) startSurvey() error {
	if m.cfg.Journal.Disk().Ack != nil {
		if err := m.write(func(d *cb.Disk) { d.Ack = nil }); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.round++
	m.claim = nil
	m.fresh = m.cfg.Fresh()
	m.survey = &cb.Survey{Since: m.mono(), Round: m.round}
	m.show()
	return nil
}

func (m *Member) setClaim(c *cb.Claim) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claim = c
	m.show()
}

func (m *Member) ackClaim(c *cb.Claim) error {
	m.mu.Lock()
	m.ackAt = m.mono()
	m.mu.Unlock()
	return m.write(func(d *cb.Disk) { d.Ack = c })
}

// foundCluster writes the intent first and the mark second. Between the two
// the intent alone is sign enough; setUp writes the mark after a power cut.
func (m *Member) foundCluster(a cb.Action) error {
	if err := m.write(func(d *cb.Disk) { d.Intent = a.Intent }); err != nil {
		return err
	}
	m.record("cluster.founding", a.Intent.UID, a.Reason)
	return m.setMark(a.Intent.UID)
}

// abandonFounding takes the mark away first: a mark without an intent would
// forbid founding for ever, an intent without a mark gets its mark again. Then
// goes what a first server left that never had a member: the planner abandons
// such a datastore only when it is damaged.
func (m *Member) abandonFounding(ctx context.Context) error {
	m.mu.Lock()
	m.claim, m.survey, m.fresh = nil, nil, m.cfg.Fresh()
	data := m.signs.Datastore || m.signs.Aside
	m.mu.Unlock()
	in := m.cfg.Journal.Disk().Intent
	if in != nil {
		m.mu.Lock()
		ours := m.mark == in.UID
		m.mu.Unlock()
		if ours {
			if err := m.setMark(""); err != nil {
				return err
			}
		}
	}
	if data {
		m.k3sMu.Lock()
		err := m.cfg.K3s.MoveAside(ctx, cb.RoleNone)
		m.k3sMu.Unlock()
		if err != nil {
			return fmt.Errorf("member: abandon the founding: %w", err)
		}
	}
	return m.write(func(d *cb.Disk) { d.Intent = nil })
}

func (m *Member) startWorker(ctx context.Context, a cb.Action) error {
	if a.Record == nil {
		return errors.New("member: start worker: no record")
	}
	if err := m.write(func(d *cb.Disk) { d.Role, d.Record = cb.RoleWorker, a.Record }); err != nil {
		return err
	}
	if err := m.setMark(a.Record.UID); err != nil {
		return err
	}
	return m.start(ctx, k3s.Start{Role: cb.RoleWorker})
}

func (m *Member) startServer(ctx context.Context, a cb.Action) error {
	x := k3s.Start{Role: cb.RoleServer, Init: a.Init}
	if d := m.cfg.Journal.Disk(); d.Role == cb.RoleCandidate {
		x.Role = cb.RoleCandidate
		if d.Step != nil {
			x.Plan, x.Unfenced = d.Step.Plan, d.Step.Replace
		}
	}
	return m.start(ctx, x)
}

// start starts k3s unless it runs already.
func (m *Member) start(ctx context.Context, x k3s.Start) error {
	s, err := m.settings()
	if err != nil {
		return err
	}
	x.Settings = s
	if err := m.applyHost(); err != nil {
		return err
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.Start(ctx, x); err != nil {
		return fmt.Errorf("member: start k3s as %s: %w", x.Role, err)
	}
	return nil
}

func (m *Member) stop(ctx context.Context) error {
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.Stop(ctx); err != nil {
		return fmt.Errorf("member: stop k3s: %w", err)
	}
	return nil
}

func (m *Member) keepRecord(a cb.Action) error {
	if a.Record == nil {
		return errors.New("member: keep record: no record")
	}
	was := m.cfg.Journal.Disk()
	err := m.write(func(d *cb.Disk) {
		d.Record = a.Record
		if a.Role != cb.RoleNone {
			d.Role, d.Intent, d.Ack = a.Role, nil, nil
		}
		if a.Role == cb.RoleServer {
			d.Step = nil
		}
	})
	if err != nil {
		return err
	}
	if a.Role == cb.RoleServer && was.Role != cb.RoleServer {
		m.record("cluster.server", a.Record.UID, a.Reason)
		m.k3sMu.Lock()
		defer m.k3sMu.Unlock()
		if err := m.cfg.K3s.SetRole(cb.RoleServer); err != nil { // setUp repeats it
			return fmt.Errorf("member: keep role: %w", err)
		}
	}
	return nil
}

func (m *Member) writeLedger(ctx context.Context, a cb.Action) error {
	if a.Ledger == nil {
		return errors.New("member: write ledger: no ledger")
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if a.Ledger.Record.Into != "" && a.Order == "" {
		// Something may have been put into the cluster since the last look.
		virgin, err := m.cfg.K3s.Virgin(ctx)
		if err != nil {
			return fmt.Errorf("member: dissolve: %w", err)
		}
		if !virgin {
			return errors.New("member: dissolve: the cluster holds something after all")
		}
	}
	if _, err := m.cfg.K3s.WriteLedger(ctx, *a.Ledger); err != nil {
		return fmt.Errorf("member: write ledger: %w", err)
	}
	return nil
}

func (m *Member) stepPlan(ctx context.Context, a cb.Action) error {
	if a.Step == nil {
		return errors.New("member: step plan: no step")
	}
	if a.Step.Phase == cb.StepPrepared {
		// askMaterial wrote the material before the planner saw it; without it
		// on the disk the step would promise what the node cannot do.
		if err := m.fit(ctx); err != nil {
			return err
		}
	}
	return m.write(func(d *cb.Disk) {
		d.Step = a.Step
		if a.Step.Phase == cb.StepSwitched {
			d.Role = cb.RoleCandidate
		}
	})
}

func (m *Member) reset(ctx context.Context) error {
	s, err := m.settings()
	if err != nil {
		return err
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.Reset(ctx, s); err != nil {
		return fmt.Errorf("member: reset to own data: %w", err)
	}
	return nil
}

func (m *Member) raiseEpoch(a cb.Action) error {
	if a.Record == nil {
		return errors.New("member: raise epoch: no record")
	}
	err := m.write(func(d *cb.Disk) {
		d.Record, d.Role = a.Record, cb.RoleServer
		d.Reset, d.Step, d.Lead = nil, nil, nil
	})
	if err != nil {
		return err
	}
	m.record("cluster.epoch-raised", a.Record.UID, a.Reason)
	return m.setMark(a.Record.UID)
}

func (m *Member) moveAside(ctx context.Context, a cb.Action) error {
	err := m.write(func(d *cb.Disk) {
		d.Role, d.Record, d.Aside = a.Role, a.Record, true
		d.Step, d.Lead, d.Reset, d.Intent, d.Ack = nil, nil, nil, nil, nil
	})
	if err != nil {
		return err
	}
	failpoint.Hit("member.aside.between")
	m.mu.Lock()
	m.lease, m.leaseAsk, m.material, m.snapshot = cb.Lease{}, leaseAsk{}, nil, ""
	m.mu.Unlock()
	m.k3sMu.Lock()
	err = m.cfg.K3s.MoveAside(ctx, a.Role)
	if err == nil {
		err = m.cfg.K3s.ForgetServerMaterial()
	}
	m.k3sMu.Unlock()
	if err != nil {
		return fmt.Errorf("member: move data aside: %w", err)
	}
	m.record("cluster.data-aside", "", a.Reason)
	return m.write(func(d *cb.Disk) { d.Aside = false })
}

func (m *Member) removeServer(ctx context.Context, a cb.Action) error {
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.RemoveServer(ctx, a.Node, a.KeepNode); err != nil {
		return fmt.Errorf("member: remove server %s: %w", a.Node, err)
	}
	return nil
}

// record keeps an act for the centre's records. A full or broken spool must not
// stop the node.
func (m *Member) record(kind, object, reason string) {
	if m.cfg.Spool == nil {
		return
	}
	_, err := m.cfg.Spool.Keep(spool.Entry{Time: m.cfg.Clock.Now(), Kind: kind, Object: object, Text: reason})
	m.outcome("spool", err)
}

// grantLimit bounds a question to the centre.
const grantLimit = 30 * time.Second
