package api

import (
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

func nodeIDs(in []string) []fleet.NodeID {
	var out []fleet.NodeID
	for _, s := range in {
		out = append(out, fleet.NodeID(s))
	}
	return out
}

func nodeIDsToProto(in []fleet.NodeID) []string {
	var out []string
	for _, s := range in {
		out = append(out, string(s))
	}
	return out
}

func foundingToProto(f fleet.Founding) *musterv1.Founding {
	return &musterv1.Founding{Mode: string(f.Mode), Founder: string(f.Founder), Successors: nodeIDsToProto(f.Successors)}
}

func policyToProto(p fleet.SitePolicy) *musterv1.SitePolicy {
	return &musterv1.SitePolicy{
		Servers: int64(p.Servers), PromoteAt: int64(p.PromoteAt),
		PromoteAfterSeconds: p.PromoteAfter, ReplaceAfterSeconds: p.ReplaceAfter,
	}
}

func birthToProto(b fleet.BirthSettings) *musterv1.BirthSettings {
	return &musterv1.BirthSettings{
		ClusterCidr: b.ClusterCIDR, ServiceCidr: b.ServiceCIDR, ClusterDns: b.ClusterDNS, FlannelBackend: b.FlannelBackend,
		SecretsEncryption: b.SecretsEncryption, Disable: b.Disable, MaxLearners: int64(b.MaxLearners), NodeCidr: b.NodeCIDR,
	}
}

// SettingsToProto converts a site's settings.
func SettingsToProto(s fleet.SiteSettings) *musterv1.SiteSettings {
	return &musterv1.SiteSettings{
		Founding: foundingToProto(s.Founding), Policy: policyToProto(s.Policy), Birth: birthToProto(s.Birth),
		Images: s.Images, AnyBoot: s.AnyBoot, Delegates: s.Delegates, Update: updateToProto(s.Update), Install: diskRuleToProto(s.Install),
	}
}

func (r *reading) settings(m *musterv1.SiteSettings) fleet.SiteSettings {
	f, p, b := m.GetFounding(), m.GetPolicy(), m.GetBirth()
	return fleet.SiteSettings{
		Founding: fleet.Founding{
			Mode: fleet.FoundingMode(f.GetMode()), Founder: fleet.NodeID(f.GetFounder()), Successors: nodeIDs(f.GetSuccessors()),
		},
		Policy: fleet.SitePolicy{
			Servers: r.int("servers", p.GetServers()), PromoteAt: r.int("promote_at", p.GetPromoteAt()),
			PromoteAfter: p.GetPromoteAfterSeconds(), ReplaceAfter: p.GetReplaceAfterSeconds(),
		},
		Birth: fleet.BirthSettings{
			ClusterCIDR: b.GetClusterCidr(), ServiceCIDR: b.GetServiceCidr(), ClusterDNS: b.GetClusterDns(),
			FlannelBackend: b.GetFlannelBackend(), SecretsEncryption: b.GetSecretsEncryption(), Disable: b.GetDisable(),
			MaxLearners: r.int("max_learners", b.GetMaxLearners()), NodeCIDR: b.GetNodeCidr(),
		},
		Images: m.GetImages(), AnyBoot: m.GetAnyBoot(), Delegates: m.GetDelegates(),
		Update: updateFromProto(m.GetUpdate()), Install: diskRuleFromProto(m.GetInstall()),
	}
}

// SettingsFromProto converts a site's settings.
func SettingsFromProto(m *musterv1.SiteSettings) (fleet.SiteSettings, error) {
	var r reading
	s := r.settings(m)
	return s, r.err("site settings")
}

// SiteToProto converts a site.
func SiteToProto(s fleet.Site) *musterv1.Site {
	m := &musterv1.Site{
		Meta: metaToProto(s.Meta), Title: s.Title, Location: s.Location,
		Spec: &musterv1.SiteSpec{Stack: s.Spec.Stack, Version: s.Spec.Version, StackSha256: s.Spec.StackSHA256, Charter: docVersionToProto(s.Spec.Charter)},
		Status: &musterv1.SiteStatus{
			Seen: stamp(s.Status.Seen), Generation: s.Status.Generation, Stack: s.Status.Stack, Version: s.Status.Version,
			ClusterUid: s.Status.ClusterUID, ClusterEpoch: s.Status.ClusterEpoch, ClusterVersion: s.Status.ClusterVersion,
			Founder: string(s.Status.Founder), Members: nodeIDsToProto(s.Status.Members), Servers: int64(s.Status.Servers),
			Workers: int64(s.Status.Workers), Blocker: s.Status.Blocker, Second: s.Status.Second, SecondBy: string(s.Status.SecondBy),
		},
		Ledger: &musterv1.SiteLedger{Documents: docVersionToProto(s.Ledger.Documents), Sure: s.Ledger.Sure, Ended: s.Ledger.Ended, Doubt: s.Ledger.Doubt},
	}
	if s.Spec.Settings != nil {
		m.Spec.Settings = SettingsToProto(*s.Spec.Settings)
	}
	if g := s.Ledger.Grant; g != nil {
		m.Ledger.Grant = &musterv1.FoundingGrant{Node: string(g.Node), Uid: g.UID, At: stamp(g.At)}
	}
	return m
}

// SiteFromProto converts a site.
func SiteFromProto(m *musterv1.Site) (fleet.Site, error) {
	var r reading
	spec, status, ledger := m.GetSpec(), m.GetStatus(), m.GetLedger()
	s := fleet.Site{
		Meta: r.meta(m.GetMeta()), Title: m.GetTitle(), Location: m.GetLocation(),
		Spec: fleet.SiteSpec{Stack: spec.GetStack(), Version: spec.GetVersion(), StackSHA256: spec.GetStackSha256(), Charter: docVersion(spec.GetCharter())},
		Status: fleet.SiteStatus{
			Seen: r.time("seen", status.GetSeen()), Generation: status.GetGeneration(), Stack: status.GetStack(),
			Version: status.GetVersion(), ClusterUID: status.GetClusterUid(), ClusterEpoch: status.GetClusterEpoch(),
			ClusterVersion: status.GetClusterVersion(), Founder: fleet.NodeID(status.GetFounder()), Members: nodeIDs(status.GetMembers()),
			Servers: r.int("servers", status.GetServers()), Workers: r.int("workers", status.GetWorkers()),
			Blocker: status.GetBlocker(), Second: status.GetSecond(), SecondBy: fleet.NodeID(status.GetSecondBy()),
		},
		Ledger: fleet.SiteLedger{Documents: docVersion(ledger.GetDocuments()), Sure: ledger.GetSure(), Ended: ledger.GetEnded(), Doubt: ledger.GetDoubt()},
	}
	if x := spec.GetSettings(); x != nil {
		settings := r.settings(x)
		s.Spec.Settings = &settings
	}
	if g := ledger.GetGrant(); g != nil {
		s.Ledger.Grant = &fleet.FoundingGrant{Node: fleet.NodeID(g.GetNode()), UID: g.GetUid(), At: r.time("grant", g.GetAt())}
	}
	return s, r.err("site")
}

// NodeReportToProto converts a report.
func NodeReportToProto(n fleet.NodeReport) *musterv1.NodeReport {
	return &musterv1.NodeReport{
		Tenant: n.Tenant, Site: n.Site, Node: string(n.Node), At: stamp(n.At), Uid: n.UID, Epoch: n.Epoch, Version: n.Version,
		Role: n.Role, State: n.State, Blocker: n.Blocker, Reason: n.Reason, Voters: int64(n.Voters), Learners: int64(n.Learners),
		Nodes: int64(n.Nodes), NodesReady: int64(n.NodesReady), K3S: n.K3s, Since: stamp(n.Since), Charter: docVersionToProto(n.Charter),
		Offer: n.Offer, Offered: n.Offered, Snapshots: n.Snapshots, Labels: n.Labels,
	}
}

// NodeReportFromProto converts a report.
func NodeReportFromProto(m *musterv1.NodeReport) (fleet.NodeReport, error) {
	var r reading
	n := fleet.NodeReport{
		Tenant: m.GetTenant(), Site: m.GetSite(), Node: fleet.NodeID(m.GetNode()), At: r.time("at", m.GetAt()), UID: m.GetUid(),
		Epoch: m.GetEpoch(), Version: m.GetVersion(), Role: m.GetRole(), State: m.GetState(), Blocker: m.GetBlocker(),
		Reason: m.GetReason(), Voters: r.int("voters", m.GetVoters()), Learners: r.int("learners", m.GetLearners()),
		Nodes: r.int("nodes", m.GetNodes()), NodesReady: r.int("nodes_ready", m.GetNodesReady()), K3s: m.GetK3S(),
		Since: r.time("since", m.GetSince()), Charter: docVersion(m.GetCharter()), Offer: m.GetOffer(), Offered: m.GetOffered(),
		Snapshots: m.GetSnapshots(), Labels: m.GetLabels(),
	}
	return n, r.err("node report")
}

// EscrowBlobToProto converts the description of a sealed blob.
func EscrowBlobToProto(b fleet.EscrowBlob) *musterv1.EscrowBlob {
	return &musterv1.EscrowBlob{
		Tenant: b.Tenant, Site: b.Site, Id: b.ID, Sha256: b.SHA256, Size: b.Size, Node: string(b.Node), For: string(b.For),
		Cluster: b.Cluster, Epoch: b.Epoch, Taken: stamp(b.Taken), Stored: stamp(b.Stored), KeyId: b.KeyID, Kind: b.Kind,
	}
}

// EscrowBlobFromProto converts the description of a sealed blob.
func EscrowBlobFromProto(m *musterv1.EscrowBlob) (fleet.EscrowBlob, error) {
	var r reading
	b := fleet.EscrowBlob{
		Tenant: m.GetTenant(), Site: m.GetSite(), ID: m.GetId(), SHA256: m.GetSha256(), Size: m.GetSize(),
		Node: fleet.NodeID(m.GetNode()), For: fleet.NodeID(m.GetFor()), Cluster: m.GetCluster(), Epoch: m.GetEpoch(),
		Taken: r.time("taken", m.GetTaken()), Stored: r.time("stored", m.GetStored()), KeyID: m.GetKeyId(), Kind: m.GetKind(),
	}
	return b, r.err("escrow blob")
}

// IssuedOrderToProto converts an order with what became of it.
func IssuedOrderToProto(o fleet.IssuedOrder) *musterv1.IssuedOrder {
	return &musterv1.IssuedOrder{
		Order: OrderToProto(o.Order), State: musterv1.OrderState(o.State), Text: o.Text, By: o.By, Changed: stamp(o.Changed), Revision: o.Revision,
	}
}
