package api

import (
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// RequestToProto converts a request.
func RequestToProto(q fleet.Request) *musterv1.Request {
	m := &musterv1.Request{
		Id: string(q.ID), Tenant: q.Tenant, Node: string(q.Node), Words: q.Words,
		State: musterv1.RequestState(q.State), Identity: musterv1.IdentityTrust(q.Identity), Boot: musterv1.BootTrust(q.Boot),
		Image: q.Image, Site: q.Site, Labels: q.Labels, EvidenceDigest: zero32(q.EvidenceDigest),
		Evidence: EvidenceToProto(q.Evidence), FirstSeen: stamp(q.FirstSeen), LastSeen: stamp(q.LastSeen),
		Source: q.Source, Warnings: q.Warnings, DecidedBy: q.DecidedBy, DecidedAt: stamp(q.DecidedAt),
		Reason: q.Reason, Supersedes: string(q.Supersedes), Replaces: string(q.Replaces), Revision: q.Revision,
	}
	if c := q.Clock; c != (fleet.TPMClock{}) {
		m.TpmClock = &musterv1.TpmClock{Millis: c.Millis, Resets: c.Resets, Restarts: c.Restarts}
	}
	for _, f := range q.Findings {
		m.Findings = append(m.Findings, &musterv1.Finding{Check: f.Check, Ok: f.OK, Detail: f.Detail})
	}
	return m
}

// RequestFromProto converts a request.
func RequestFromProto(m *musterv1.Request) (fleet.Request, error) {
	var r reading
	q := fleet.Request{
		ID: fleet.RequestID(m.GetId()), Tenant: m.GetTenant(), Node: fleet.NodeID(m.GetNode()), Words: m.GetWords(),
		State:    enum(&r, "state", m.GetState(), fleet.RequestQuarantined),
		Identity: enum(&r, "identity", m.GetIdentity(), fleet.IdentityHardware),
		Boot:     enum(&r, "boot", m.GetBoot(), fleet.BootEnforced),
		Image:    m.GetImage(), Site: m.GetSite(), Labels: m.GetLabels(),
		EvidenceDigest: r.bytes32("evidence_digest", m.GetEvidenceDigest()),
		Evidence:       r.evidence(m.GetEvidence()),
		FirstSeen:      r.time("first_seen", m.GetFirstSeen()), LastSeen: r.time("last_seen", m.GetLastSeen()),
		Source: m.GetSource(), Warnings: m.GetWarnings(), DecidedBy: m.GetDecidedBy(),
		DecidedAt: r.time("decided_at", m.GetDecidedAt()), Reason: m.GetReason(),
		Supersedes: fleet.RequestID(m.GetSupersedes()), Replaces: fleet.NodeID(m.GetReplaces()), Revision: m.GetRevision(),
		Clock: fleet.TPMClock{
			Millis: m.GetTpmClock().GetMillis(), Resets: m.GetTpmClock().GetResets(), Restarts: m.GetTpmClock().GetRestarts(),
		},
	}
	for _, f := range m.GetFindings() {
		q.Findings = append(q.Findings, fleet.Finding{Check: f.GetCheck(), OK: f.GetOk(), Detail: f.GetDetail()})
	}
	return q, r.err("request")
}

// EvidenceToProto converts evidence.
func EvidenceToProto(e fleet.Evidence) *musterv1.Evidence {
	m := &musterv1.Evidence{
		Ek: zero32(e.EK), EkAliases: aliasesToProto(e.Aliases), AkName: e.AKName, LdevidName: e.LDevIDName,
		LdevidKey: e.LDevIDKey, Identity: musterv1.IdentityTrust(e.Identity), Boot: musterv1.BootTrust(e.Boot),
		Image: e.Image, TpmVendor: e.TPMVendor, TpmFirmware: e.TPMFirmware, Board: e.Board, Serial: e.Serial,
		Uuid: e.UUID, EkIssuer: e.EKIssuer, Hardware: HardwareToProto(e.Hardware),
	}
	if len(e.PCRs) > 0 {
		m.Pcrs = make(map[uint32][]byte, len(e.PCRs))
		for i, v := range e.PCRs {
			m.Pcrs[uint32(i)] = v
		}
	}
	return m
}

// EvidenceFromProto converts evidence.
func EvidenceFromProto(m *musterv1.Evidence) (fleet.Evidence, error) {
	var r reading
	e := r.evidence(m)
	return e, r.err("evidence")
}

// maxPCR is the highest register of a PC.
const maxPCR = 23

func (r *reading) evidence(m *musterv1.Evidence) fleet.Evidence {
	e := fleet.Evidence{
		EK: r.bytes32("ek", m.GetEk()), Aliases: r.aliases(m.GetEkAliases()), AKName: m.GetAkName(),
		LDevIDName: m.GetLdevidName(), LDevIDKey: m.GetLdevidKey(),
		Identity: enum(r, "evidence identity", m.GetIdentity(), fleet.IdentityHardware),
		Boot:     enum(r, "evidence boot", m.GetBoot(), fleet.BootEnforced),
		Image:    m.GetImage(), TPMVendor: m.GetTpmVendor(), TPMFirmware: m.GetTpmFirmware(), Board: m.GetBoard(),
		Serial: m.GetSerial(), UUID: m.GetUuid(), EKIssuer: m.GetEkIssuer(), Hardware: r.hardware(m.GetHardware()),
	}
	for i, v := range m.GetPcrs() {
		if i > maxPCR || len(v) != 32 {
			r.fail("PCR %d with %d bytes; want an index up to %d and 32 bytes", i, len(v), maxPCR)
			continue
		}
		if e.PCRs == nil {
			e.PCRs = map[int]fleet.HexBytes{}
		}
		e.PCRs[int(i)] = v
	}
	return e
}

// HardwareToProto converts the facts of a machine.
func HardwareToProto(h fleet.Hardware) *musterv1.Hardware {
	m := &musterv1.Hardware{
		Vendor: h.Vendor, Product: h.Product, Serial: h.Serial, Uuid: h.UUID, BoardVendor: h.BoardVendor,
		Board: h.Board, BoardSerial: h.BoardSerial, BiosVendor: h.BIOSVendor, BiosVersion: h.BIOSVersion,
		BiosDate: h.BIOSDate, Cpu: h.CPU, Cpus: int64(h.CPUs), MemoryBytes: h.MemoryBytes, TpmVendor: h.TPMVendor,
		TpmModel: h.TPMModel, TpmFirmware: h.TPMFirmware, BootPath: h.BootPath, SecureBoot: h.SecureBoot,
		Image: h.Image, Version: h.Version,
	}
	for _, n := range h.NICs {
		m.Nics = append(m.Nics, &musterv1.Nic{
			Name: n.Name, Mac: n.MAC, Driver: n.Driver, Link: n.Link, SpeedMbit: int64(n.SpeedMbit), Addresses: n.Addresses,
		})
	}
	for _, d := range h.Disks {
		m.Disks = append(m.Disks, &musterv1.Disk{
			Path: d.Path, Model: d.Model, Serial: d.Serial, Wwn: d.WWN, SizeBytes: d.SizeBytes, Transport: d.Transport,
			Removable: d.Removable, Rotational: d.Rotational, Partitioned: d.Partitioned,
		})
	}
	for _, d := range h.Devices {
		m.Devices = append(m.Devices, &musterv1.Device{
			Bus: d.Bus, Vendor: d.Vendor, Device: d.Device, Class: d.Class, Driver: d.Driver,
		})
	}
	return m
}

// HardwareFromProto converts the facts of a machine. They are as hostile as
// they came: text.CleanHardware cleans them.
func HardwareFromProto(m *musterv1.Hardware) (fleet.Hardware, error) {
	var r reading
	h := r.hardware(m)
	return h, r.err("hardware")
}

func (r *reading) hardware(m *musterv1.Hardware) fleet.Hardware {
	h := fleet.Hardware{
		Vendor: m.GetVendor(), Product: m.GetProduct(), Serial: m.GetSerial(), UUID: m.GetUuid(),
		BoardVendor: m.GetBoardVendor(), Board: m.GetBoard(), BoardSerial: m.GetBoardSerial(),
		BIOSVendor: m.GetBiosVendor(), BIOSVersion: m.GetBiosVersion(), BIOSDate: m.GetBiosDate(), CPU: m.GetCpu(),
		CPUs: r.int("cpus", m.GetCpus()), MemoryBytes: m.GetMemoryBytes(), TPMVendor: m.GetTpmVendor(),
		TPMModel: m.GetTpmModel(), TPMFirmware: m.GetTpmFirmware(), BootPath: m.GetBootPath(),
		SecureBoot: m.GetSecureBoot(), Image: m.GetImage(), Version: m.GetVersion(),
	}
	for _, n := range m.GetNics() {
		h.NICs = append(h.NICs, fleet.NIC{
			Name: n.GetName(), MAC: n.GetMac(), Driver: n.GetDriver(), Link: n.GetLink(),
			SpeedMbit: r.int("speed_mbit", n.GetSpeedMbit()), Addresses: n.GetAddresses(),
		})
	}
	for _, d := range m.GetDisks() {
		h.Disks = append(h.Disks, fleet.Disk{
			Path: d.GetPath(), Model: d.GetModel(), Serial: d.GetSerial(), WWN: d.GetWwn(), SizeBytes: d.GetSizeBytes(),
			Transport: d.GetTransport(), Removable: d.GetRemovable(), Rotational: d.GetRotational(), Partitioned: d.GetPartitioned(),
		})
	}
	for _, d := range m.GetDevices() {
		h.Devices = append(h.Devices, fleet.Device{
			Bus: d.GetBus(), Vendor: d.GetVendor(), Device: d.GetDevice(), Class: d.GetClass(), Driver: d.GetDriver(),
		})
	}
	return h
}

// NodeToProto converts a node.
func NodeToProto(n fleet.Node) *musterv1.Node {
	m := &musterv1.Node{
		Id: string(n.ID), Tenant: n.Tenant, Words: n.Words, State: musterv1.NodeState(n.State), Site: n.Site,
		Labels: n.Labels, Incarnation: n.Incarnation, MayServe: n.MayServe, Ek: zero32(n.EK),
		EkAliases: aliasesToProto(n.Aliases), AkName: n.AKName, LdevidName: n.LDevIDName, LdevidKey: n.LDevIDKey,
		Identity: musterv1.IdentityTrust(n.Identity), Boot: musterv1.BootTrust(n.Boot), Image: n.Image,
		Request: string(n.Request), Hardware: HardwareToProto(n.Hardware), Created: stamp(n.Created),
		LastSeen: stamp(n.LastSeen), Source: n.Source, Reason: n.Reason, Generation: n.Generation, Revision: n.Revision,
		Replaces: string(n.Replaces), ReplacedBy: string(n.ReplacedBy), Removed: n.Removed,
	}
	if c := n.Certificate; c != (fleet.Certificate{}) {
		m.Certificate = &musterv1.Certificate{Serial: c.Serial, NotBefore: stamp(c.NotBefore), NotAfter: stamp(c.NotAfter)}
	}
	return m
}

// NodeFromProto converts a node.
func NodeFromProto(m *musterv1.Node) (fleet.Node, error) {
	var r reading
	n := fleet.Node{
		ID: fleet.NodeID(m.GetId()), Tenant: m.GetTenant(), Words: m.GetWords(),
		State: enum(&r, "state", m.GetState(), fleet.NodeDenied), Site: m.GetSite(), Labels: m.GetLabels(),
		Incarnation: m.GetIncarnation(), MayServe: m.GetMayServe(), EK: r.bytes32("ek", m.GetEk()),
		Aliases: r.aliases(m.GetEkAliases()), AKName: m.GetAkName(), LDevIDName: m.GetLdevidName(), LDevIDKey: m.GetLdevidKey(),
		Identity: enum(&r, "identity", m.GetIdentity(), fleet.IdentityHardware),
		Boot:     enum(&r, "boot", m.GetBoot(), fleet.BootEnforced),
		Image:    m.GetImage(), Request: fleet.RequestID(m.GetRequest()), Hardware: r.hardware(m.GetHardware()),
		Certificate: fleet.Certificate{
			Serial:    m.GetCertificate().GetSerial(),
			NotBefore: r.time("certificate not_before", m.GetCertificate().GetNotBefore()),
			NotAfter:  r.time("certificate not_after", m.GetCertificate().GetNotAfter()),
		},
		Created: r.time("created", m.GetCreated()), LastSeen: r.time("last_seen", m.GetLastSeen()),
		Source: m.GetSource(), Reason: m.GetReason(), Generation: m.GetGeneration(), Revision: m.GetRevision(),
		Replaces: fleet.NodeID(m.GetReplaces()), ReplacedBy: fleet.NodeID(m.GetReplacedBy()),
		Removed: m.GetRemoved(),
	}
	return n, r.err("node")
}
