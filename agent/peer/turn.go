package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"connectrpc.com/connect"

	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/fleet/turns"
)

// maxTurnText is what package turns takes.
const maxTurnText = 480

// TurnGiver asks the cluster for another node of it, and does what comes out to
// that node. An error is the answer no.
type TurnGiver func(ctx context.Context, node fleet.NodeID, ask turns.Ask) (turns.Reply, error)

// Turn implements the RPC. Whose turn it is about is what the connection
// proved, never what the message says.
func (s service) Turn(ctx context.Context, m *peerv1.TurnRequest) (*peerv1.TurnResponse, error) {
	p, l := s.p, linkOf(ctx)
	node, _ := l.greeted()
	if !p.gate.turner(p.cfg.Now(), l.key) {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("this node asked for its turn often enough; later"))
	}
	phase, err := turns.ParsePhase(m.GetPhase())
	if err != nil {
		return nil, bad(err)
	}
	// Other people's terminals show these.
	ask := turns.Ask{Phase: phase, Image: m.GetImage(), Version: text.Clean(m.GetVersion(), maxTurnText), K3s: text.Clean(m.GetK3S(), maxTurnText), Older: m.GetOlder(),
		Failed: text.Clean(m.GetFailed(), maxTurnText)}
	if err := ask.Validate(); err != nil {
		return nil, bad(err)
	}
	if p.cfg.Turns == nil {
		return &peerv1.TurnResponse{Denied: "this node gives no turns"}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTime*9/10)
	defer cancel()
	r, err := p.cfg.Turns(ctx, node, ask)
	if err != nil {
		p.cfg.Log.Info("no turn is given", slog.String(keyNode, string(node)), slog.Any(keyError, err))
		return &peerv1.TurnResponse{Denied: cleanWhy(err.Error())}, nil
	}
	return &peerv1.TurnResponse{State: r.State.String(), Reason: r.Reason, Go: r.Go}, nil
}

func turnMessage(a turns.Ask) *peerv1.TurnRequest {
	return &peerv1.TurnRequest{Phase: a.Phase.String(), Image: a.Image, Version: a.Version, K3S: a.K3s, Older: a.Older, Failed: text.Clean(a.Failed, maxTurnText)}
}

// Turn asks a server of the cluster for this node's turn. The error is *Denied
// if another is to be asked.
func (c *Conn) Turn(ctx context.Context, ask turns.Ask) (turns.Reply, error) {
	var none turns.Reply
	if err := c.ready(); err != nil {
		return none, err
	}
	c.mu.Lock()
	serve := c.serve
	c.mu.Unlock()
	if !serve {
		return none, ErrNotServer
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	m, err := c.rpc.Turn(ctx, turnMessage(ask))
	if err != nil {
		return none, failed("turn", err)
	}
	if m.GetDenied() != "" {
		return none, &Denied{Why: cleanWhy(m.GetDenied())}
	}
	state, err := turns.ParseState(m.GetState())
	if err != nil {
		return none, fmt.Errorf("peer: turn: %w", err)
	}
	return turns.Reply{State: state, Go: m.GetGo(), Reason: cleanWhy(m.GetReason())}, nil
}
