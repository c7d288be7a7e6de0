package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// enrolledSince waits until a machine says, at or after line from, that it is
// enrolled.
func enrolledSince(ctx context.Context, m *machine.Machine, from int) (machine.Line, error) {
	line, err := m.Serial().Wait(ctx, from, enrolledLine)
	if err == nil && !enrolledOnly.MatchString(line.Text) {
		err = fmt.Errorf("the machine is stuck: %s", line.Text)
	}
	return line, err
}

// approveWhileOff cuts the power of machines that wait, approves them while
// they are off, and switches them on: they must need nobody any more.
func approveWhileOff(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine, requests map[string]fleet.Request) error {
	err := forEach(ctx, machines, func(_ context.Context, m *machine.Machine) error { return m.Cut() })
	if err != nil {
		return err
	}
	for _, m := range machines {
		l.Say(m.Name(), "power-cut", "the power is cut while it waits for approval")
	}
	if err := l.Check("with the power cut: the requests are still there, pending, unchanged", c.are(ctx, requests, fleet.RequestPending)); err != nil {
		return err
	}
	for _, m := range machines {
		if err := approveOne(ctx, l, c, m, requests[m.Name()]); err != nil {
			return err
		}
	}
	// A cut cable says nothing: within a long poll the centre hands the
	// certificate to a connection that nobody reads any more. The machine must
	// get it all the same.
	if err := l.Check("approved while off: approved, or issued into a dead connection", c.are(ctx, requests, fleet.RequestApproved, fleet.RequestIssued)); err != nil {
		return err
	}
	err = forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		mark := m.Serial().Mark()
		if err := l.PowerOn(ctx, m); err != nil {
			return err
		}
		since, _ := m.On()
		line, err := enrolledSince(ctx, m, mark)
		if err == nil {
			l.Timing(m.Name(), "power_on_to_certificate_s", line.At.Sub(since))
		}
		return err
	})
	return l.Check("with the power back: every machine says that it is enrolled", err)
}

// resetIssued presses the reset button of enrolled machines: they prove
// themselves again and are served without a person.
func resetIssued(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine, requests map[string]fleet.Request) error {
	before, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	decided := map[string]fleet.Request{}
	for _, m := range machines {
		if decided[m.Name()], err = c.waitRequest(ctx, m.UUID(), func(fleet.Request) bool { return true }); err != nil {
			return err
		}
	}
	err = forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		mark, at := m.Serial().Mark(), time.Now()
		l.Say(m.Name(), "reset", "somebody presses the reset button")
		if err := m.Reset(ctx); err != nil {
			return err
		}
		line, err := m.Serial().Wait(ctx, mark, initOrDead)
		if err != nil {
			return err
		}
		if line, err = enrolledSince(ctx, m, line.N+1); err != nil {
			return err
		}
		l.Timing(m.Name(), "reset_to_certificate_s", line.At.Sub(at))
		r, err := c.waitRequest(ctx, m.UUID(), func(r fleet.Request) bool { return r.LastSeen.After(at) })
		if err != nil {
			return fmt.Errorf("it did not prove itself again: %w", err)
		}
		was := decided[m.Name()]
		if r.ID != was.ID || !r.DecidedAt.Equal(was.DecidedAt) || r.DecidedBy != was.DecidedBy {
			return fmt.Errorf("request %s, decided by %s at %v, became %s, decided by %s at %v", was.ID, was.DecidedBy, was.DecidedAt, r.ID, r.DecidedBy, r.DecidedAt)
		}
		return nil
	})
	if err := l.Check("after a reset: every machine proves itself again and is served without a person", err); err != nil {
		return err
	}
	if err := l.Check("after a reset: one live request of each machine, the one that was approved", c.are(ctx, requests, fleet.RequestIssued)); err != nil {
		return err
	}
	return l.Check("after a reset: the same nodes with the same keys", sameNodes(ctx, l, c, before, len(machines)))
}

func sameNodes(ctx context.Context, l *lab.Lab, c *centre, before []fleet.Node, count int) error {
	after, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	if len(before) != count || len(after) != count {
		return fmt.Errorf("%d machines were %d nodes and are %d now", count, len(before), len(after))
	}
	for _, b := range before {
		found := false
		for _, a := range after {
			if a.ID != b.ID {
				continue
			}
			found = true
			switch {
			case a.Certificate.Serial == "" || b.Certificate.Serial == "":
				return fmt.Errorf("node %s has no certificate", a.ID)
			case a.LDevIDKey.String() != b.LDevIDKey.String():
				return fmt.Errorf("node %s had key %s, has %s", a.ID, b.LDevIDKey, a.LDevIDKey)
			case a.Certificate.Serial == b.Certificate.Serial:
				l.Say("centre", "certificate", "node "+string(a.ID)+" got the same certificate again")
			default:
				l.Say("centre", "certificate", "node "+string(a.ID)+" got a new certificate for the same key")
			}
		}
		if !found {
			return fmt.Errorf("node %s is gone", b.ID)
		}
	}
	return nil
}

// approveOne is a person's `muster approve`.
func approveOne(ctx context.Context, l *lab.Lab, c *centre, m *machine.Machine, r fleet.Request) error {
	if _, err := c.muster(ctx, "approve", string(r.ID), "--site", site); err != nil {
		return err
	}
	l.Say(m.Name(), "approve", fmt.Sprintf("a person approves request %s for site %s", r.ID, site))
	return nil
}

// are returns nil if the centre's requests are exactly these, in one of the
// states.
func (c *centre) are(ctx context.Context, requests map[string]fleet.Request, states ...fleet.RequestState) error {
	list, err := c.requests(ctx)
	if err != nil {
		return err
	}
	if len(list) != len(requests) {
		return fmt.Errorf("%d requests of %d machines", len(list), len(requests))
	}
	want := map[fleet.RequestID]bool{}
	for _, r := range requests {
		want[r.ID] = true
	}
	for _, r := range list {
		if !want[r.ID] || !slices.Contains(states, r.State) {
			return fmt.Errorf("request %s is %s, want %s and one of %v", r.ID, r.State, states, want)
		}
	}
	return nil
}

// audit is `muster audit list`.
func (c *centre) audit(ctx context.Context) ([]fleet.AuditRecord, error) {
	b, err := c.muster(ctx, "audit", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	var out []fleet.AuditRecord
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("scenario: read audit log: %w", err)
	}
	return out, nil
}

// checkAudit: each request was filed once and approved once, by a person, and
// nothing else was decided.
func checkAudit(ctx context.Context, c *centre, requests map[string]fleet.Request) error {
	records, err := c.audit(ctx)
	if err != nil {
		return err
	}
	return auditAgrees(records, requests)
}

var person = regexp.MustCompile(`^user:.`)

func auditAgrees(records []fleet.AuditRecord, requests map[string]fleet.Request) error {
	filed, approved, issued := map[string]int{}, map[string]int{}, map[string]int{}
	var errs []error
	for _, r := range records {
		switch r.Kind {
		case audit.RequestFiled:
			filed[r.Object]++
		case audit.RequestApproved:
			approved[r.Object]++
			if !person.MatchString(r.Actor) {
				errs = append(errs, fmt.Errorf("%s was approved by %q, who is no person", r.Object, r.Actor))
			}
		case audit.CertificateIssued:
			issued[r.Object]++
		case audit.RequestPreApproved, audit.RequestRejected, audit.RequestExpired, audit.RequestSuperseded, audit.RequestQuarantined, audit.RequestReopened:
			errs = append(errs, fmt.Errorf("record %d: %s of %s", r.Seq, r.Kind, r.Object))
		}
	}
	if len(filed) != len(requests) || len(approved) != len(requests) {
		errs = append(errs, fmt.Errorf("%d requests were filed and %d approved by %d machines", len(filed), len(approved), len(requests)))
	}
	if len(issued) == 0 {
		errs = append(errs, errors.New("no certificate was issued"))
	}
	for name, r := range requests {
		object := "request/" + string(r.ID)
		if filed[object] != 1 || approved[object] != 1 {
			errs = append(errs, fmt.Errorf("%s: request %s was filed %d times and approved %d times", name, r.ID, filed[object], approved[object]))
		}
	}
	return errors.Join(errs...)
}
