package peer

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/text"
)

// Bounds of what a message may hold.
const (
	maxID         = 128
	maxWhy        = 512
	maxSees       = 256
	maxCandidates = 16
	maxVoters     = 1 << 16
	maxHints      = 64
	maxServers    = 8
	maxToken      = 4 << 10
	maxURL        = 256
	maxBlobName   = 128
	maxBlobs      = 64
	maxFsync      = time.Hour
)

// idForm is what plans, tokens and cluster UIDs look like, blockerForm the
// codes of package clusterbootstrap. Newer versions may know more codes.
var (
	idForm      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$`)
	blockerForm = regexp.MustCompile(`^[a-z][a-z-]{0,31}$`)
	versionForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)
)

// reading collects the problems of a message.
type reading struct{ errs []error }

func (r *reading) check(ok bool, format string, args ...any) {
	if !ok && len(r.errs) < 16 {
		r.errs = append(r.errs, fmt.Errorf(format, args...))
	}
}

func (r *reading) err(what string) error {
	if len(r.errs) == 0 {
		return nil
	}
	return fmt.Errorf("peer: read %s: %w", what, errors.Join(r.errs...))
}

func (r *reading) node(field, s string, optional bool) fleet.NodeID {
	n := fleet.NodeID(s)
	if optional && s == "" {
		return ""
	}
	r.check(n.Validate() == nil, "%s is no node ID", field)
	return n
}

func (r *reading) nodes(field string, list []string, most int) []fleet.NodeID {
	r.check(len(list) <= most, "%s has %d nodes, at most %d", field, len(list), most)
	if len(list) > most || len(list) == 0 {
		return nil
	}
	out := make([]fleet.NodeID, len(list))
	for i, s := range list {
		out[i] = r.node(field, s, false)
	}
	return out
}

func (r *reading) id(field, s string, optional bool) string {
	r.check(optional && s == "" || idForm.MatchString(s), "%s is no identifier", field)
	return s
}

func (r *reading) epoch(field string, n uint64) uint64 {
	r.check(n <= fleet.MaxClusterEpoch, "%s is out of range", field)
	return n
}

func nodesToProto(in []fleet.NodeID) (out []string) {
	for _, n := range in {
		out = append(out, string(n))
	}
	return out
}

func statusToProto(s clusterbootstrap.Status) *peerv1.NodeStatus {
	m := &peerv1.NodeStatus{
		Node: string(s.Node), Boots: s.Boots, Seq: s.Seq, Role: uint32(s.Role), State: uint32(s.State), Record: recordToProto(s.Record),
		Intent: s.Intent, Claim: claimToProto(s.Claim), Ack: claimToProto(s.Ack), Api: s.API, Virgin: s.Virgin, Fenced: s.Fenced,
		Voters: clamp(s.Voters), Learners: clamp(s.Learners), Reset_: s.Reset, Blocker: string(s.Blocker),
		Sees: nodesToProto(s.Sees[:min(len(s.Sees), maxSees)]), K3SVersion: s.Version, K3SArgs: s.Args,
		FsyncMicroseconds: uint64(min(max(0, s.Fsync), maxFsync).Microseconds()),
	}
	if x := s.Step; x != nil {
		m.Step = &peerv1.Step{Plan: x.Plan, N: x.N, Epoch: x.Epoch, Leader: string(x.Leader), Phase: uint32(x.Phase), Replace: x.Replace}
	}
	if x := s.Lead; x != nil {
		m.Lead = &peerv1.Lead{Plan: x.Plan, Epoch: x.Epoch, Phase: uint32(x.Phase), Candidates: nodesToProto(x.Candidates)}
	}
	if x := s.Plan; x != nil {
		m.Plan = &peerv1.Plan{Id: x.ID, N: x.N, Epoch: x.Epoch, Leader: string(x.Leader), Candidates: nodesToProto(x.Candidates),
			Phase: uint32(x.Phase), Replace: x.Replace, Serial: x.Serial, Go: clamp(x.Go), Reopened: x.Reopened, Off: x.Off,
			Failures: clamp(x.Failures), Why: text.Clean(x.Why, maxWhy)}
	}
	return m
}

func clamp(n int) uint32 { return uint32(min(max(n, 0), maxVoters)) }

// statusFromProto takes a status from the network. Everything in it has a
// bound and a form; what it says is the sender's word.
func statusFromProto(m *peerv1.NodeStatus) (clusterbootstrap.Status, error) {
	var r reading
	if m == nil {
		return clusterbootstrap.Status{}, errors.New("peer: read status: it is missing")
	}
	role, state := clusterbootstrap.Role(m.GetRole()), clusterbootstrap.State(m.GetState())
	r.check(m.GetRole() <= uint32(clusterbootstrap.RoleServer), "role %d is unknown", m.GetRole())
	r.check(m.GetState() <= uint32(clusterbootstrap.Removed), "state %d is unknown", m.GetState())
	r.check(m.GetVoters() <= maxVoters && m.GetLearners() <= maxVoters, "more voters than there can be")
	r.check(m.GetBlocker() == "" || blockerForm.MatchString(m.GetBlocker()), "blocker is no code")
	r.check(m.GetFsyncMicroseconds() <= uint64(maxFsync.Microseconds()), "nothing takes so long to flush")
	r.check(m.GetK3SVersion() == "" || versionForm.MatchString(m.GetK3SVersion()), "version of k3s is none")
	s := clusterbootstrap.Status{
		Node: r.node("node", m.GetNode(), false), Boots: m.GetBoots(), Seq: m.GetSeq(), Role: role, State: state,
		Record: r.record(m.GetRecord()), Intent: m.GetIntent(), Claim: r.claim("claim", m.GetClaim()), Ack: r.claim("ack", m.GetAck()),
		API: m.GetApi(), Virgin: m.GetVirgin(), Fenced: m.GetFenced(), Voters: int(m.GetVoters()), Learners: int(m.GetLearners()),
		Reset: m.GetReset_(), Sees: r.nodes("sees", m.GetSees(), maxSees), Blocker: clusterbootstrap.Blocker(m.GetBlocker()),
		Version: m.GetK3SVersion(), Args: r.id("arguments", m.GetK3SArgs(), true), Fsync: time.Duration(m.GetFsyncMicroseconds()) * time.Microsecond,
	}
	if x := m.GetStep(); x != nil {
		r.check(x.GetPhase() >= uint32(clusterbootstrap.StepPrepared) && x.GetPhase() <= uint32(clusterbootstrap.StepSwitched), "phase of step is unknown")
		s.Step = &clusterbootstrap.Step{Plan: r.id("plan", x.GetPlan(), false), N: x.GetN(), Epoch: r.epoch("epoch", x.GetEpoch()),
			Leader: r.node("leader", x.GetLeader(), false), Phase: clusterbootstrap.StepPhase(x.GetPhase()), Replace: x.GetReplace()}
	}
	if x := m.GetLead(); x != nil {
		r.check(x.GetPhase() >= uint32(clusterbootstrap.LeadOpen) && x.GetPhase() <= uint32(clusterbootstrap.LeadConfirming), "phase of lead is unknown")
		s.Lead = &clusterbootstrap.Lead{Plan: r.id("plan", x.GetPlan(), false), Epoch: r.epoch("epoch", x.GetEpoch()),
			Phase: clusterbootstrap.LeadPhase(x.GetPhase()), Candidates: r.nodes("candidates", x.GetCandidates(), maxCandidates)}
	}
	if x := m.GetPlan(); x != nil {
		r.check(x.GetPhase() <= uint32(clusterbootstrap.PlanAborted), "phase of plan is unknown")
		r.check(x.GetGo() <= maxCandidates && x.GetFailures() <= maxVoters, "numbers of plan are out of range")
		s.Plan = &clusterbootstrap.PlanDoc{ID: r.id("plan", x.GetId(), false), N: x.GetN(), Epoch: r.epoch("epoch", x.GetEpoch()),
			Leader: r.node("leader", x.GetLeader(), false), Candidates: r.nodes("candidates", x.GetCandidates(), maxCandidates),
			Phase: clusterbootstrap.PlanPhase(x.GetPhase()), Replace: x.GetReplace(), Serial: x.GetSerial(), Go: int(x.GetGo()),
			Reopened: x.GetReopened(), Off: x.GetOff(), Failures: int(x.GetFailures()), Why: text.Clean(x.GetWhy(), maxWhy)}
	}
	if err := r.err("status"); err != nil {
		return clusterbootstrap.Status{}, err
	}
	return s, nil
}

// cleanWhy bounds a sentence of a peer.
func cleanWhy(s string) string { return text.Clean(s, maxWhy) }

func recordToProto(x *clusterbootstrap.Record) *peerv1.Record {
	if x == nil {
		return nil
	}
	return &peerv1.Record{Uid: x.UID, Epoch: x.Epoch, Version: x.Version, Founder: string(x.Founder), Servers: nodesToProto(x.Servers), Into: x.Into}
}

func (r *reading) record(x *peerv1.Record) *clusterbootstrap.Record {
	if x == nil {
		return nil
	}
	r.check(fleet.ValidateClusterUID(x.GetUid()) == nil, "record has no cluster UID")
	r.check(x.GetInto() == "" || fleet.ValidateClusterUID(x.GetInto()) == nil, "into is no cluster UID")
	out := &clusterbootstrap.Record{UID: x.GetUid(), Epoch: r.epoch("epoch", x.GetEpoch()), Version: x.GetVersion(),
		Founder: r.node("founder", x.GetFounder(), true), Servers: r.nodes("servers", x.GetServers(), maxCandidates), Into: x.GetInto()}
	r.check(slices.IsSorted(out.Servers), "servers are not sorted")
	return out
}

func claimToProto(x *clusterbootstrap.Claim) *peerv1.Claim {
	if x == nil {
		return nil
	}
	return &peerv1.Claim{Node: string(x.Node), Round: x.Round, Token: x.Token}
}

func (r *reading) claim(field string, x *peerv1.Claim) *clusterbootstrap.Claim {
	if x == nil {
		return nil
	}
	return &clusterbootstrap.Claim{Node: r.node(field, x.GetNode(), false), Round: x.GetRound(), Token: r.id(field+" token", x.GetToken(), false)}
}

func addressesToProto(in []Address) (out []*peerv1.PeerAddress) {
	for _, a := range in[:min(len(in), maxHints)] {
		out = append(out, &peerv1.PeerAddress{Node: string(a.Node), Address: a.At.String()})
	}
	return out
}

// addressesFromProto takes hints. An address of a link's own scope means
// nothing on another machine.
func addressesFromProto(in []*peerv1.PeerAddress) ([]Address, error) {
	var r reading
	r.check(len(in) <= maxHints, "%d addresses, at most %d", len(in), maxHints)
	var out []Address
	for _, m := range in[:min(len(in), maxHints)] {
		at, err := netip.ParseAddrPort(m.GetAddress())
		r.check(err == nil && at.Port() != 0, "an address is none")
		n := r.node("address", m.GetNode(), false)
		if a := at.Addr(); err == nil && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() {
			out = append(out, Address{Node: n, At: netip.AddrPortFrom(a.Unmap(), at.Port())})
		}
	}
	if err := r.err("addresses"); err != nil {
		return nil, err
	}
	return out, nil
}

func refsToProto(in []papers.Ref) (out []*peerv1.DocumentRef) {
	for _, r := range in {
		out = append(out, &peerv1.DocumentRef{Sha256: slices.Clone(r[:])})
	}
	return out
}

func refsFromProto(in []*peerv1.DocumentRef) ([]papers.Ref, error) {
	out := make([]papers.Ref, 0, len(in))
	for _, m := range in {
		if len(m.GetSha256()) != len(papers.Ref{}) {
			return nil, errors.New("peer: read reference: want 32 bytes")
		}
		out = append(out, papers.Ref(m.GetSha256()))
	}
	return out, nil
}

func roleFromProto(as peerv1.JoinAs) (clusterbootstrap.Role, error) {
	switch as {
	case peerv1.JoinAs_JOIN_AS_WORKER:
		return clusterbootstrap.RoleWorker, nil
	case peerv1.JoinAs_JOIN_AS_SERVER:
		return clusterbootstrap.RoleServer, nil
	}
	return clusterbootstrap.RoleNone, errors.New("peer: read role: a node joins as a worker or as a server")
}

func roleToProto(as clusterbootstrap.Role) (peerv1.JoinAs, error) {
	switch as {
	case clusterbootstrap.RoleWorker:
		return peerv1.JoinAs_JOIN_AS_WORKER, nil
	case clusterbootstrap.RoleServer:
		return peerv1.JoinAs_JOIN_AS_SERVER, nil
	}
	return 0, fmt.Errorf("peer: nobody joins as %s", as)
}

// materialToProto copies the tokens, so that both copies can be wiped.
func materialToProto(m Material) (*peerv1.JoinMaterialResponse, error) {
	if len(m.Token) == 0 || len(m.Token) > maxToken || len(m.AgentToken) > maxToken || len(m.Servers) == 0 {
		return nil, errors.New("peer: material without a token or a server")
	}
	return &peerv1.JoinMaterialResponse{Servers: m.Servers[:min(len(m.Servers), maxServers)], Token: slices.Clone(m.Token),
		TokenSeconds: uint32(min(max(0, m.Good/time.Second), math.MaxInt32)), Uid: m.UID, Epoch: m.Epoch,
		AgentToken: slices.Clone(m.AgentToken), K3SVersion: m.Version, K3SArgs: m.Args}, nil
}

// materialFromProto takes the tokens out of the message.
func materialFromProto(x *peerv1.JoinMaterialResponse, as clusterbootstrap.Role, plan string) (Material, error) {
	var r reading
	r.check(len(x.GetServers()) > 0 && len(x.GetServers()) <= maxServers, "%d servers, want 1 to %d", len(x.GetServers()), maxServers)
	for _, s := range x.GetServers()[:min(len(x.GetServers()), maxServers)] {
		u, err := url.Parse(s)
		r.check(len(s) <= maxURL && err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil && u.Path == "" && u.RawQuery == "" && u.Fragment == "",
			"a server is no https://host:port")
	}
	r.check(tokenForm(x.GetToken()), "the token is not in K10 form")
	r.check(len(x.GetAgentToken()) == 0 || as == clusterbootstrap.RoleServer && oneLine(x.GetAgentToken()), "the agent token is none")
	r.check(x.GetK3SVersion() == "" || versionForm.MatchString(x.GetK3SVersion()), "version of k3s is none")
	r.check(fleet.ValidateClusterUID(x.GetUid()) == nil, "there is no cluster UID")
	m := Material{Servers: x.GetServers(), Token: x.GetToken(), AgentToken: x.GetAgentToken(), Version: x.GetK3SVersion(),
		Args: r.id("arguments", x.GetK3SArgs(), true), Good: time.Duration(x.GetTokenSeconds()) * time.Second,
		UID: x.GetUid(), Epoch: r.epoch("epoch", x.GetEpoch()), As: as, Plan: plan}
	if err := r.err("join material"); err != nil {
		m.Wipe()
		return Material{}, err
	}
	return m, nil
}

// tokenForm tells whether b is a token in K10 form, "K10<hex of the CA's
// hash>::<credentials>": one line of printable ASCII, since it becomes a file
// that k3s reads.
func tokenForm(b []byte) bool {
	return len(b) >= len("K10::x") && string(b[:3]) == "K10" && oneLine(b)
}

// oneLine tells whether b may be one line of a file that k3s reads.
func oneLine(b []byte) bool {
	if len(b) > maxToken {
		return false
	}
	for _, c := range b {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

func blobToProto(b Blob) *peerv1.EscrowBlob {
	return &peerv1.EscrowBlob{Sha256: slices.Clone(b.SHA256[:]), Size: uint64(max(0, b.Size)), Name: b.Name, Owner: string(b.Owner), Uid: b.UID, Epoch: b.Epoch, Kind: b.Kind}
}

func blobFromProto(m *peerv1.EscrowBlob) (Blob, error) {
	var r reading
	r.check(len(m.GetSha256()) == len(papers.Ref{}), "want a digest of 32 bytes")
	r.check(m.GetSize() > 0 && m.GetSize() <= math.MaxInt64, "size is out of range")
	r.check(len(m.GetName()) <= maxBlobName && (m.GetName() == "" || idForm.MatchString(m.GetName())), "name is no identifier")
	r.check(m.GetUid() == "" || fleet.ValidateClusterUID(m.GetUid()) == nil, "uid is no cluster UID")
	key := m.GetKind() == escrow.KindDiskKey
	r.check(key || m.GetKind() == escrow.KindSnapshot, "kind is not known")
	r.check(!key || m.GetSize() <= escrow.MaxDiskKey, "a disk key has not that many bytes")
	b := Blob{Kind: m.GetKind(), Name: m.GetName(), Owner: r.node("owner", m.GetOwner(), true), UID: m.GetUid(), Epoch: r.epoch("epoch", m.GetEpoch())}
	if err := r.err("blob"); err != nil {
		return Blob{}, err
	}
	b.SHA256, b.Size = papers.Ref(m.GetSha256()), int64(m.GetSize())
	return b, nil
}
