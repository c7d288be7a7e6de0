package member

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"runtime/debug"
	"time"

	"github.com/muster-edge/muster/agent/spool"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/internal/sleep"
)

const (
	// longest is the longest pause between two turns.
	longest = 5 * time.Second
	// busy is the longest pause of a node in the middle of a plan.
	busy = 2 * time.Second
	// soon is the pause after something was done or heard: changes come in
	// bursts.
	soon = 30 * time.Millisecond
	// patience is how long a turn may take beside its actions before the
	// watchdog may call the loop stuck.
	patience = 90 * time.Second
)

// loop plans and acts until ctx ends.
func (m *Member) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-m.kick:
			// A burst of news is one turn.
			if sleep.For(ctx, soon) != nil {
				return nil
			}
			select {
			case <-m.kick:
			default:
			}
		case <-m.cfg.Papers.Changed():
		}
		m.alive(patience)
		pause := m.turn(ctx)
		if ctx.Err() != nil {
			return nil
		}
		timer.Reset(pause)
	}
}

// turn is one observe, plan, act. It returns the pause before the next one. A
// panic in it costs this turn: the next one begins with what is on the disk.
func (m *Member) turn(ctx context.Context) (pause time.Duration) {
	defer func() {
		if r := recover(); r != nil {
			m.log.Error("a turn broke", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			m.outcome("turn", fmt.Errorf("member: turn: panic: %v", r))
			pause = longest
		}
	}()
	if err := m.cfg.Journal.Failed(); err != nil {
		if err := m.cfg.Journal.Mend(); err != nil {
			m.outcome("journal", err)
			m.stuck("My notes cannot be written to the disk: " + err.Error() + ". Please check the disk.")
			return longest
		}
		m.outcome("journal", nil)
	}
	if err := m.readMark(); err != nil {
		m.outcome("TPM mark", err)
		m.stuck("I cannot ask my TPM whether I belong to a cluster, so that I do nothing yet: " + err.Error())
		return longest
	}
	m.k3sMu.Lock()
	err := m.cfg.K3s.Tend(ctx)
	m.k3sMu.Unlock()
	m.outcome("tend k3s", err)
	m.look(ctx)
	m.setUp(ctx)
	if ctx.Err() != nil {
		return longest
	}

	m.mu.Lock()
	obs := m.observation()
	m.mu.Unlock()
	state, acts := cb.Plan(m.cfg.Clock.Now(), obs, m.cfg.Policy)
	if len(acts) == 0 { // the planner promises one
		m.log.Error("no action and no reason", "state", state.String())
		return longest
	}
	m.enter(state, acts[len(acts)-1])
	return m.act(ctx, acts)
}

// act does the actions in order and stops at the first that fails.
func (m *Member) act(ctx context.Context, acts []cb.Action) time.Duration {
	idle := true
	for _, a := range acts {
		limit := limitOf(a.Kind)
		m.alive(limit + patience)
		actx, cancel := context.WithTimeout(ctx, limit)
		err := m.do(actx, a)
		cancel()
		m.alive(patience)
		m.outcome(a.Kind.String(), err)
		if err != nil {
			return 500*time.Millisecond + m.jitter(time.Second)
		}
		idle = idle && passive[a.Kind]
	}
	m.forgetFailures()
	if !idle {
		return m.repeated(acts[len(acts)-1])
	}
	m.repeats = 0
	pause := longest
	if f := acts[len(acts)-1].For; f > 0 {
		pause = min(pause, max(f, 200*time.Millisecond))
	}
	m.mu.Lock()
	if m.state == cb.Candidate || m.state == cb.Leading {
		pause = min(pause, busy)
	}
	m.mu.Unlock()
	return pause - m.jitter(pause/5)
}

// forgetFailures drops failures of actions that the planner no longer wants,
// and of questions that were not asked for a while: they are over. A turn whose
// actions all succeeded calls it.
func (m *Member) forgetFailures() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k := cb.Wait; k <= cb.UpdateAddresses; k++ {
		if k != cb.TakeSnapshot { // until there is a copy elsewhere, that is missing
			delete(m.failures, k.String())
		}
		if at, asked := m.asked[k]; asked && m.mono()-at > time.Minute && !m.running[k] {
			delete(m.failures, answerTo(k))
		}
	}
}

// answerTo is under which name the failure of a job is shown.
func answerTo(k cb.ActionKind) string { return "answer to " + k.String() }

// repeated is the pause after something was done. Doing the same again and
// again means that it works and does not help (k3s ends as soon as it is
// started): then the pauses grow. Only the loop calls it.
func (m *Member) repeated(last cb.Action) time.Duration {
	same := fmt.Sprint(last.Kind, last.Plan, last.Reason)
	if same != m.lastDone {
		m.lastDone, m.repeats = same, 0
	}
	m.repeats++
	if m.repeats <= 3 {
		return soon
	}
	return min(soon<<min(m.repeats-3, 8), longest)
}

// passive actions change nothing here: planning again at once would say the
// same.
var passive = map[cb.ActionKind]bool{cb.Wait: true, cb.AskGrant: true, cb.RequestJoinMaterial: true, cb.RenewFenceLease: true}

// limitOf is how long an action may take.
func limitOf(k cb.ActionKind) time.Duration {
	switch k {
	case cb.StopK3s:
		return 6 * time.Minute
	case cb.ResetToOwnData, cb.TakeSnapshot:
		return 8 * time.Minute
	case cb.RestoreFromEscrow:
		return 30 * time.Minute
	case cb.StartServer, cb.StartWorker, cb.MoveAside, cb.AbandonFounding, cb.RemoveDeadServer:
		return 3 * time.Minute
	}
	return 30 * time.Second
}

func (m *Member) jitter(most time.Duration) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if most <= 0 {
		return 0
	}
	return time.Duration(m.cfg.Rand.Int64N(int64(most)))
}

// enter takes over the planner's state and tells people.
func (m *Member) enter(state cb.State, last cb.Action) {
	m.mu.Lock()
	from, was := m.state, m.shown
	now := shown{State: state, Blocker: last.Blocker, Reason: last.Reason, Action: last.Kind}
	_, wrong := from.MoveTo(state)
	m.state, m.shown = state, now
	moved := from != state || was.Blocker != now.Blocker
	if moved || !m.planned {
		m.since = m.cfg.Clock.Now()
		m.show()
	}
	said := m.planned && !moved && (was.Reason == now.Reason || last.Kind == cb.Wait && was.Action == cb.Wait || last.Kind == cb.RenewFenceLease)
	m.planned = true
	m.mu.Unlock()
	if wrong != nil { // a mistake of ours, not of the site: go on, but be heard
		m.log.Error("a move that is not in the table", "err", wrong)
	}
	if said {
		return
	}
	level := slog.LevelInfo
	if now.Blocker.NeedsPerson() {
		level = slog.LevelWarn
	}
	m.log.Log(context.Background(), level, "state", "from", from.String(), "to", state.String(), "reason", now.Reason,
		"blocker", string(now.Blocker), "action", last.Kind.String())
	if moved && m.cfg.Spool != nil {
		m.cfg.Spool.Put(spool.Entry{Time: m.cfg.Clock.Now(), Kind: "cluster.state", Text: now.Reason,
			Fields: map[string]string{"from": from.String(), "to": state.String(), "blocker": string(now.Blocker)}})
	}
}

// stuck shows a problem that keeps the loop from planning at all.
func (m *Member) stuck(reason string) {
	m.mu.Lock()
	now := shown{State: m.state, Blocker: NodeFault, Reason: reason}
	changed := !reflect.DeepEqual(m.shown, now)
	if changed {
		m.shown, m.since = now, m.cfg.Clock.Now()
		m.show()
	}
	m.mu.Unlock()
	if changed {
		m.log.Warn("state", "from", now.State.String(), "to", now.State.String(), "reason", reason, "blocker", string(NodeFault), "action", "none")
	}
}

// NodeFault is the blocker of a node whose disk or TPM does not work. It is
// not the planner's: without them there is nothing to plan with.
const NodeFault cb.Blocker = "node-fault"
