package api

import (
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/drift"
)

func stackRefToProto(r *fleet.StackRef) *musterv1.StackRef {
	if r == nil {
		return nil
	}
	return &musterv1.StackRef{Name: r.Name, Version: r.Version, Sha256: r.SHA256}
}

// StackRefToProto converts a reference; nil stays nil.
func StackRefToProto(r *fleet.StackRef) *musterv1.StackRef { return stackRefToProto(r) }

// StackRefFromProto converts a reference; nil stays nil.
func StackRefFromProto(m *musterv1.StackRef) *fleet.StackRef {
	if m == nil {
		return nil
	}
	return &fleet.StackRef{Name: m.GetName(), Version: m.GetVersion(), SHA256: m.GetSha256()}
}

// SystemReportToProto converts a report.
func SystemReportToProto(v fleet.SystemReport) *musterv1.SystemReport {
	m := &musterv1.SystemReport{
		Tenant: v.Tenant, Site: v.Site, Node: string(v.Node), At: stamp(v.At), Slot: v.Slot, Image: v.Image, ImageSha256: v.ImageSHA256,
		Stack: stackRefToProto(v.Stack), State: musterv1.SystemState(v.State), Percent: uint32(int32(v.Percent)), Reason: v.Reason,
		Target: v.Target, TargetSha256: v.TargetSHA256, Since: stamp(v.Since), Warnings: v.Warnings,
	}
	for _, f := range v.Failed {
		m.Failed = append(m.Failed, &musterv1.FailedImage{Sha256: f.SHA256, Image: f.Image, Reason: f.Reason, At: stamp(f.At)})
	}
	return m
}

// SystemReportFromProto converts a report.
func SystemReportFromProto(m *musterv1.SystemReport) (fleet.SystemReport, error) {
	var r reading
	v := fleet.SystemReport{
		Tenant: m.GetTenant(), Site: m.GetSite(), Node: fleet.NodeID(m.GetNode()), At: r.time("at", m.GetAt()), Slot: m.GetSlot(),
		Image: m.GetImage(), ImageSHA256: m.GetImageSha256(), Stack: StackRefFromProto(m.GetStack()),
		State:   enum(&r, "state", m.GetState(), fleet.SystemFailed),
		Percent: int(int32(m.GetPercent())), Reason: m.GetReason(), Target: m.GetTarget(), TargetSHA256: m.GetTargetSha256(),
		Since: r.time("since", m.GetSince()), Warnings: m.GetWarnings(),
	}
	if len(m.GetFailed()) > fleet.MaxFailedImages {
		r.fail("%d failed images, at most %d are allowed", len(m.GetFailed()), fleet.MaxFailedImages)
		return v, r.err("system report")
	}
	for _, f := range m.GetFailed() {
		v.Failed = append(v.Failed, fleet.FailedImage{SHA256: f.GetSha256(), Image: f.GetImage(), Reason: f.GetReason(), At: r.time("at", f.GetAt())})
	}
	return v, r.err("system report")
}

func updateToProto(u *fleet.UpdatePolicy) *musterv1.UpdatePolicy {
	if u == nil {
		return nil
	}
	m := &musterv1.UpdatePolicy{Paused: u.Paused, DrainTimeoutSeconds: u.DrainTimeout, DrainForce: u.DrainForce, RateKbitPerSecond: u.RateKbit}
	for _, w := range u.Windows {
		m.Windows = append(m.Windows, &musterv1.UpdateWindow{Days: w.Days, From: w.From, Minutes: w.Minutes, UtcOffsetMinutes: w.UTCOffset})
	}
	return m
}

func updateFromProto(m *musterv1.UpdatePolicy) *fleet.UpdatePolicy {
	if m == nil {
		return nil
	}
	u := &fleet.UpdatePolicy{Paused: m.Paused, DrainTimeout: m.DrainTimeoutSeconds, DrainForce: m.DrainForce, RateKbit: m.RateKbitPerSecond}
	for _, w := range m.Windows {
		u.Windows = append(u.Windows, fleet.UpdateWindow{Days: w.GetDays(), From: w.GetFrom(), Minutes: w.GetMinutes(), UTCOffset: w.GetUtcOffsetMinutes()})
	}
	return u
}

func diskRuleToProto(d *fleet.DiskRule) *musterv1.DiskRule {
	if d == nil {
		return nil
	}
	return &musterv1.DiskRule{Prefer: d.Prefer, Model: d.Model, Transport: d.Transport, MinBytes: d.MinBytes, MaxBytes: d.MaxBytes, Overwrite: d.Overwrite}
}

func diskRuleFromProto(m *musterv1.DiskRule) *fleet.DiskRule {
	if m == nil {
		return nil
	}
	return &fleet.DiskRule{Prefer: m.Prefer, Model: m.Model, Transport: m.Transport, MinBytes: m.MinBytes, MaxBytes: m.MaxBytes, Overwrite: m.Overwrite}
}

// SiteDriftToProto converts how a site compares.
func SiteDriftToProto(r drift.Result) *musterv1.SiteDrift {
	m := &musterv1.SiteDrift{
		Site: r.Site, State: r.State.String(), Why: r.Why, Nodes: uint32(r.Nodes), NodesCurrent: uint32(r.Current), Stale: r.Stale, LastHeard: stamp(r.LastHeard),
	}
	if r.Desired != nil {
		m.Desired = r.Desired.ID()
	}
	for _, n := range r.Outliers {
		m.Outliers = append(m.Outliers, &musterv1.NodeDrift{
			Node: string(n.ID), Words: n.Words, Stale: n.Stale, LastHeard: stamp(n.LastHeard), Running: n.Running,
			State: musterv1.SystemState(n.System), Percent: uint32(max(n.Percent, 0)), Why: n.Why,
		})
	}
	return m
}
