package api

import (
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// ImageToProto converts an image.
func ImageToProto(i fleet.Image) *musterv1.Image {
	return &musterv1.Image{
		Tenant: i.Tenant, Name: i.Name, Version: i.Version, Kind: string(i.Kind), Arch: i.Arch, Sha256: i.SHA256,
		Size: i.Size, Authenticode: i.Authenticode, Pcr11: i.PCR11, SignerCert: i.SignerCert, Manifest: i.Manifest,
		Registered: stamp(i.Registered), Kernel: i.Kernel, Loader: i.Loader,
	}
}

// ImageFromProto converts an image.
func ImageFromProto(m *musterv1.Image) (fleet.Image, error) {
	var r reading
	i := fleet.Image{
		Tenant: m.GetTenant(), Name: m.GetName(), Version: m.GetVersion(), Kind: fleet.ImageKind(m.GetKind()),
		Arch: m.GetArch(), SHA256: m.GetSha256(), Size: m.GetSize(), Authenticode: m.GetAuthenticode(),
		PCR11: m.GetPcr11(), SignerCert: m.GetSignerCert(), Manifest: m.GetManifest(),
		Registered: r.time("registered", m.GetRegistered()), Kernel: m.GetKernel(), Loader: m.GetLoader(),
	}
	return i, r.err("image")
}

// EventToProto converts an event.
func EventToProto(e fleet.Event) *musterv1.Event {
	return &musterv1.Event{
		Tenant: e.Tenant, Seq: e.Seq, Time: stamp(e.Time), Level: musterv1.EventLevel(e.Level), Kind: e.Kind,
		Node: string(e.Node), Request: string(e.Request), Site: e.Site, Mac: e.MAC, Text: e.Text, Fields: e.Fields,
	}
}

// EventFromProto converts an event.
func EventFromProto(m *musterv1.Event) (fleet.Event, error) {
	var r reading
	e := fleet.Event{
		Tenant: m.GetTenant(), Seq: m.GetSeq(), Time: r.time("time", m.GetTime()),
		Level: enum(&r, "level", m.GetLevel(), fleet.EventAlarm), Kind: m.GetKind(), Node: fleet.NodeID(m.GetNode()),
		Request: fleet.RequestID(m.GetRequest()), Site: m.GetSite(), MAC: m.GetMac(), Text: m.GetText(), Fields: m.GetFields(),
	}
	return e, r.err("event")
}

// AuditRecordToProto converts an audit record. Nothing that its hash covers
// is changed.
func AuditRecordToProto(a fleet.AuditRecord) *musterv1.AuditRecord {
	return &musterv1.AuditRecord{
		Seq: a.Seq, Tenant: a.Tenant, Time: stamp(a.Time), Actor: a.Actor, Source: a.Source, Kind: string(a.Kind),
		Object: a.Object, Before: a.Before, After: a.After, Reason: a.Reason, Prev: zero32(a.Prev), Hash: zero32(a.Hash),
	}
}

// AuditRecordFromProto converts an audit record.
func AuditRecordFromProto(m *musterv1.AuditRecord) (fleet.AuditRecord, error) {
	var r reading
	a := fleet.AuditRecord{
		Seq: m.GetSeq(), Tenant: m.GetTenant(), Time: r.time("time", m.GetTime()), Actor: m.GetActor(),
		Source: m.GetSource(), Kind: fleet.AuditKind(m.GetKind()), Object: m.GetObject(), Before: m.GetBefore(),
		After: m.GetAfter(), Reason: m.GetReason(), Prev: r.bytes32("prev", m.GetPrev()), Hash: r.bytes32("hash", m.GetHash()),
	}
	return a, r.err("audit record")
}

// TenantToProto converts a tenant.
func TenantToProto(t fleet.Tenant) *musterv1.Tenant {
	return &musterv1.Tenant{Meta: metaToProto(t.Meta), Title: t.Title, Lab: t.Lab, EscrowKey: t.EscrowKey}
}

// TenantFromProto converts a tenant.
func TenantFromProto(m *musterv1.Tenant) (fleet.Tenant, error) {
	var r reading
	t := fleet.Tenant{Meta: r.meta(m.GetMeta()), Title: m.GetTitle(), Lab: m.GetLab(), EscrowKey: m.GetEscrowKey()}
	return t, r.err("tenant")
}

// PreApprovalToProto converts a pre-approval.
func PreApprovalToProto(a fleet.PreApproval) *musterv1.PreApproval {
	m := &musterv1.PreApproval{
		Meta: metaToProto(a.Meta), Kind: string(a.Kind), Site: a.Site, NodeLabels: a.NodeLabels, ClaimHash: a.ClaimHash,
		MinIdentity: musterv1.IdentityTrust(a.MinIdentity), MinBoot: musterv1.BootTrust(a.MinBoot),
		Limit: int64(a.Limit), Used: int64(a.Used), NotAfter: stamp(a.NotAfter), Withdrawn: a.Withdrawn,
		Vendor: a.Vendor, Serials: a.Serials, PerDay: int64(a.PerDay),
	}
	for _, e := range a.EKs {
		m.Eks = append(m.Eks, &musterv1.ListedEk{Ek: zero32(e.EK), Serial: e.Serial, Site: e.Site, Request: string(e.Request), Labels: e.Labels})
	}
	return m
}

// PreApprovalFromProto converts a pre-approval.
func PreApprovalFromProto(m *musterv1.PreApproval) (fleet.PreApproval, error) {
	var r reading
	a := fleet.PreApproval{
		Meta: r.meta(m.GetMeta()), Kind: fleet.PreApprovalKind(m.GetKind()), Site: m.GetSite(), NodeLabels: m.GetNodeLabels(),
		ClaimHash:   m.GetClaimHash(),
		MinIdentity: enum(&r, "min_identity", m.GetMinIdentity(), fleet.IdentityHardware),
		MinBoot:     enum(&r, "min_boot", m.GetMinBoot(), fleet.BootEnforced),
		Limit:       r.int("limit", m.GetLimit()), Used: r.int("used", m.GetUsed()),
		NotAfter: r.time("not_after", m.GetNotAfter()), Withdrawn: m.GetWithdrawn(),
		Vendor: m.GetVendor(), Serials: m.GetSerials(), PerDay: r.int("per_day", m.GetPerDay()),
	}
	if len(m.GetEks()) > fleet.MaxListedEKs {
		r.fail("%d EKs, at most %d are allowed", len(m.GetEks()), fleet.MaxListedEKs)
		return a, r.err("pre-approval")
	}
	for _, e := range m.GetEks() {
		a.EKs = append(a.EKs, fleet.ListedEK{
			EK: r.bytes32("ek", e.GetEk()), Serial: e.GetSerial(), Site: e.GetSite(), Request: fleet.RequestID(e.GetRequest()),
			Labels: e.GetLabels(),
		})
	}
	return a, r.err("pre-approval")
}

// StackToProto converts a stack.
func StackToProto(s fleet.Stack) *musterv1.Stack {
	return &musterv1.Stack{Meta: metaToProto(s.Meta), Title: s.Title}
}

// StackFromProto converts a stack.
func StackFromProto(m *musterv1.Stack) (fleet.Stack, error) {
	var r reading
	s := fleet.Stack{Meta: r.meta(m.GetMeta()), Title: m.GetTitle()}
	return s, r.err("stack")
}
