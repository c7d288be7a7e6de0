package central

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

// systemReport takes what a node says of its operating system. A report
// without news touches memory only; one beyond the node's allowance is passed
// over and asked for again.
func (s nodeService) systemReport(ctx context.Context, c nodeCaller, e nodeEntry, q *musterv1.SystemReport) error {
	if q == nil {
		return nil
	}
	whole, err := proto.MarshalOptions{Deterministic: true}.Marshal(q)
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	mark := reportMark{site: e.site, digest: sha256.Sum256(whole)}
	if s.systems.has(c.id, mark) {
		return nil
	}
	if !s.systems.mayWrite(c.id, s.cfg.Now()) {
		s.systems.forget(c.id)
		return nil
	}
	report, err := s.readSystem(e, c.id, q)
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the system report is malformed: %w", err))
	}
	told := false
	err = s.store.Update(ctx, func(t store.Tx) error {
		told = false
		old, err := t.System(e.tenant, c.id)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err := t.PutSystem(report); err != nil {
			return err
		}
		text, level := systemNews(old, report)
		if text == "" {
			return nil
		}
		told = true
		_, err = t.AddEvent(cleanEvent(fleet.Event{
			Tenant: e.tenant, Time: report.At, Level: level, Kind: "system." + report.State.String(), Node: c.id, Site: e.site, Text: text,
		}))
		return err
	})
	if err != nil {
		return err
	}
	s.systems.note(c.id, mark)
	if report.State == fleet.SystemRecovery && e.site != "" {
		s.installByRule(ctx, e.tenant, c.id)
	}
	if told {
		s.hub.changed(eventsTopic(e.tenant))
	}
	return nil
}

// readSystem checks and cleans a report.
func (s nodeService) readSystem(e nodeEntry, id fleet.NodeID, q *musterv1.SystemReport) (fleet.SystemReport, error) {
	r, err := api.SystemReportFromProto(q)
	if err != nil {
		return r, err
	}
	r.Tenant, r.Site, r.Node, r.At = e.tenant, e.site, id, s.cfg.Now().UTC()
	r.Image, r.Target, r.Reason = text.Clean(r.Image, 256), text.Clean(r.Target, 256), text.Clean(r.Reason, maxSentence)
	for i := range r.Failed[:min(len(r.Failed), fleet.MaxFailedImages)] {
		f := &r.Failed[i]
		f.Image, f.Reason = text.Clean(f.Image, 256), text.Clean(f.Reason, maxSentence)
	}
	for i := range r.Warnings[:min(len(r.Warnings), fleet.MaxSystemWarnings)] {
		r.Warnings[i] = text.Clean(r.Warnings[i], maxSentence)
	}
	return r, r.Validate()
}

// systemNews is the sentence for the event log, "" if only the progress of the
// same state moved.
func systemNews(old, now fleet.SystemReport) (string, fleet.EventLevel) {
	who := fleet.Words(now.Node)
	if old.State == now.State && old.Slot == now.Slot && old.Image == now.Image && old.Target == now.Target && len(old.Failed) >= len(now.Failed) {
		return "", 0
	}
	level := fleet.EventInfo
	words := fmt.Sprintf("%s is %s", who, now.State)
	switch now.State {
	case fleet.SystemRolledBack, fleet.SystemFailed:
		level = fleet.EventAlarm
	case fleet.SystemRecovery:
		level = fleet.EventWarning
		words = who + " runs the recovery image"
	case fleet.SystemCurrent:
		words = fmt.Sprintf("%s runs %s in slot %s", who, now.Image, now.Slot)
	}
	if now.Target != "" && now.State != fleet.SystemCurrent {
		words += " (" + now.Target + ")"
	}
	if now.Reason != "" {
		words += ": " + now.Reason
	}
	return words, level
}
