package member

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/agent/spool"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Health bits of a report; 0 is healthy. They are never renumbered.
const (
	HealthPerson  = 1 << iota // a person is needed
	HealthK3s                 // a member's k3s does not answer
	HealthProblem             // something does not work and is tried again
	HealthJournal             // the disk does not take notes
)

// Health returns the bits for the centre.
func (m *Member) Health() uint64 {
	var h uint64
	failed := m.cfg.Journal.Failed() != nil
	role := m.cfg.Journal.Disk().Role
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shown.Blocker.NeedsPerson() || m.shown.Blocker == NodeFault {
		h |= HealthPerson
	}
	if role != cb.RoleNone && !m.k3s.API {
		h |= HealthK3s
	}
	if len(m.failures) > 0 {
		h |= HealthProblem
	}
	if failed {
		h |= HealthJournal
	}
	return h
}

// ClusterReport is what the centre is told. Record and escrow offer are the
// caller's to add.
func (m *Member) ClusterReport() *musterv1.ClusterReport {
	docs := m.cfg.Papers.Documents()
	role := m.cfg.Journal.Disk().Role
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &musterv1.ClusterReport{
		Role: role.String(), State: m.shown.State.String(), Blocker: string(m.shown.Blocker), Reason: m.shown.Reason,
		K3SVersion: m.k3s.Version, Since: timestamppb.New(m.since), NodeLabels: m.cfg.Labels,
	}
	if docs.Charter != nil {
		r.Charter = &musterv1.DocVersion{Epoch: docs.Charter.Version.Epoch, N: docs.Charter.Version.N}
	}
	for _, x := range m.k3s.Members {
		if x.Learner {
			r.Learners++
		} else {
			r.Voters++
		}
	}
	for _, n := range m.k3s.Nodes {
		r.Nodes++
		if n.Ready {
			r.NodesReady++
		}
	}
	return r
}

// News returns a channel that is closed when the report may have changed.
func (m *Member) News() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.view.changed
}

// outcomeKind is the kind of a spooled outcome of an order.
const outcomeKind = "order.outcome"

// maxOutcomes is how many outcomes go with one report.
const maxOutcomes = 16

// noteOutcomes spools what became of the orders of this node, once each. It
// looks at disk and documents only, so that a restart tells the same.
func (m *Member) noteOutcomes() error {
	if m.cfg.Spool == nil {
		return nil
	}
	docs := m.cfg.Papers.Documents()
	d := m.cfg.Journal.Disk()
	for _, o := range m.orders() {
		state := orderState(o, d, docs, m.cfg.Self)
		m.mu.Lock()
		told := m.done["order "+o.ID]
		m.mu.Unlock()
		if state == "" || state == told {
			continue
		}
		text := "The order is being carried out."
		if state == "done" {
			text = "The order was carried out."
		}
		_, err := m.cfg.Spool.Keep(spool.Entry{Time: m.cfg.Clock.Now(), Kind: outcomeKind, Object: o.ID, Text: text, Fields: map[string]string{"state": state}})
		if err != nil {
			return err
		}
		m.setDone("order "+o.ID, state)
	}
	return nil
}

// orders are those of this node that stand.
func (m *Member) orders() []fleet.Order {
	list := m.cfg.Papers.Orders(m.cfg.Clock.Now())
	if m.cfg.Withdrawn == nil {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), func(o fleet.Order) bool { return m.cfg.Withdrawn(o.ID) })
}

// mandate is the order that the planner hears of.
func (m *Member) mandate() *cb.Mandate {
	return cb.MandateOf(m.orders(), m.cfg.Self, m.cfg.Clock.Now())
}

// orderState is "", "running" or "done".
func orderState(o fleet.Order, d cb.Disk, docs cb.Documents, self fleet.NodeID) string {
	switch o.Kind {
	case fleet.OrderReset, fleet.OrderRestore:
		switch {
		case d.Reset == nil && d.Record != nil && d.Record.UID == o.Cluster && d.Record.Epoch >= o.Epoch && d.Record.Has(self):
			return "done"
		case d.Reset != nil && d.Reset.To == o.Epoch:
			return "running"
		}
	case fleet.OrderDissolve:
		if r, ok := docs.Newest(o.Cluster); ok && r.Into != "" {
			if d.Record != nil && d.Record.UID == o.Cluster {
				return "running"
			}
			return "done"
		}
	case fleet.OrderFound:
		// Its cluster has this node as founder, and is no older than the order.
		switch {
		case d.Intent != nil && d.Intent.Mode == fleet.FoundNamed:
			return "running"
		case d.Role == cb.RoleServer && d.Record != nil && d.Record.Founder == self && d.Intent == nil:
			return "done"
		}
	}
	return ""
}

// Outcomes are those that the centre has not acknowledged.
func (m *Member) Outcomes() []*musterv1.OrderOutcome {
	if m.cfg.Spool == nil {
		return nil
	}
	var out []*musterv1.OrderOutcome
	for _, e := range m.cfg.Spool.Entries(outcomeKind, maxOutcomes) {
		x := &musterv1.OrderOutcome{Id: e.Object, Text: e.Text, At: timestamppb.New(e.Time), State: musterv1.OrderState_ORDER_STATE_RUNNING}
		if e.Fields["state"] == "done" {
			x.State = musterv1.OrderState_ORDER_STATE_DONE
		}
		out = append(out, x)
	}
	return out
}

// Acknowledged forgets outcomes that the centre has: those that were there
// when it was told.
func (m *Member) Acknowledged(told []*musterv1.OrderOutcome, ids []string) error {
	if m.cfg.Spool == nil {
		return nil
	}
	var gone []uint64
	for _, e := range m.cfg.Spool.Entries(outcomeKind, 1<<16) {
		same := func(o *musterv1.OrderOutcome) bool {
			return o.GetId() == e.Object && o.GetAt().AsTime().Equal(e.Time)
		}
		if slices.Contains(ids, e.Object) && slices.ContainsFunc(told, same) {
			gone = append(gone, e.Seq)
		}
	}
	if err := m.cfg.Spool.Done(gone...); err != nil {
		return fmt.Errorf("member: forget outcomes: %w", err)
	}
	return nil
}
