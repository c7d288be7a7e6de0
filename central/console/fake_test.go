package console

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// start is when all fixtures are.
var start = time.Date(2026, 3, 14, 9, 26, 53, 0, time.UTC)

// fake is an API in memory: what the pages need of it, with the real rules
// about who may be approved and about revisions.
type fake struct {
	musterv1connect.UnimplementedManagementServiceHandler
	people

	mu       sync.Mutex
	now      time.Time
	lab      bool
	requests []fleet.Request
	nodes    []fleet.Node
	sites    []fleet.Site
	images   []fleet.Image
	events   []fleet.Event
	audit    []fleet.AuditRecord
	reports  map[fleet.NodeID]fleet.NodeReport
	alike    map[fleet.RequestID][]string
	warnings []string
	changed  chan struct{}
	// calls are the acts, in order.
	calls []string
}

type actorKey struct{}

func newFake() *fake {
	return &fake{now: start, reports: map[fleet.NodeID]fleet.NodeReport{}, alike: map[fleet.RequestID][]string{}, changed: make(chan struct{})}
}

func sum(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

// machine makes a request of a machine with this TPM.
func machine(tpm string, identity fleet.IdentityTrust, boot fleet.BootTrust, since time.Duration, change func(*fleet.Request)) fleet.Request {
	e := fleet.Evidence{
		EK: fleet.EKHash(sum("ek " + tpm)), AKName: sum("ak " + tpm), LDevIDName: sum("name " + tpm), LDevIDKey: sum("key " + tpm),
		Identity: identity, Boot: boot, Image: "recovery@1.4.0", PCRs: map[int]fleet.HexBytes{0: sum("0"), 2: sum("2"), 7: sum("7")},
		Serial: "MXQ" + strings.ToUpper(tpm), UUID: "4c4c4544-0042-" + tpm, TPMVendor: "IFX", TPMFirmware: "7.85", EKIssuer: "CN=Infineon OPTIGA(TM) RSA Manufacturing CA 024",
		Hardware: fleet.Hardware{
			Vendor: "Dell Inc.", Product: "Edge Gateway 3200", Serial: "MXQ" + strings.ToUpper(tpm), UUID: "4c4c4544-0042-" + tpm, BoardVendor: "Dell Inc.", Board: "0X9MCC",
			BIOSVendor: "Dell Inc.", BIOSVersion: "1.11.2", BIOSDate: "11/02/2025", CPU: "Intel(R) Atom(TM) x6425RE", CPUs: 4, MemoryBytes: 16 << 30, TPMVendor: "IFX", TPMFirmware: "7.85", SecureBoot: boot == fleet.BootEnforced, BootPath: "pxe",
			NICs:  []fleet.NIC{{Name: "eth0", MAC: "00:16:3e:5a:" + tpm[:2] + ":01", Link: true, SpeedMbit: 1000, Addresses: []string{"10.20.7.31/24"}}},
			Disks: []fleet.Disk{{Path: "/dev/nvme0n1", Model: "Samsung PM9A1", Serial: "S65YNX0", SizeBytes: 512e9}},
		},
	}
	if boot == fleet.BootUnknown {
		e.Image = ""
	}
	if identity == fleet.IdentityUnverified {
		e.EKIssuer = ""
	}
	node := e.EK.NodeID()
	r := fleet.Request{
		Tenant: "default", Node: node, Words: fleet.Words(node), State: fleet.RequestPending, Identity: identity, Boot: boot, Image: e.Image, Evidence: e,
		FirstSeen: start.Add(-since), LastSeen: start.Add(-20 * time.Second), Source: "10.20.7.31", Revision: 1,
		Findings: []fleet.Finding{
			{Check: "ek-certificate", OK: identity == fleet.IdentityHardware, Detail: "from the TPM's NV storage"},
			{Check: "ek-chain", OK: identity >= fleet.IdentityLab, Detail: e.EKIssuer},
			{Check: "boot-measured", OK: boot >= fleet.BootMeasured, Detail: "PCR 4 and PCR 11 are those of recovery@1.4.0"},
			{Check: "boot-enforced", OK: boot == fleet.BootEnforced, Detail: map[bool]string{true: "Secure Boot is on, and our key let the image in", false: "Secure Boot is off"}[boot == fleet.BootEnforced]},
			{Check: "quote", OK: true, Detail: "fresh, over the PCRs asked for"}, {Check: "certify", OK: true},
		},
	}
	if change != nil {
		change(&r)
	}
	r.EvidenceDigest = enroll.EvidenceDigest(r.Evidence)
	r.ID = fleet.RequestIDOf(r.EvidenceDigest)
	return r
}

// furnished is a centre with something on every page.
func furnished() *fake {
	f := newFake()
	changed := machine("d40c", fleet.IdentityHardware, fleet.BootMeasured, 26*time.Minute, func(r *fleet.Request) {
		r.Warnings = []string{"Another machine claims the serial number MXQC30B"}
	})
	old := machine("d40c", fleet.IdentityHardware, fleet.BootMeasured, 30*24*time.Hour, func(r *fleet.Request) {
		r.State, r.Evidence.PCRs[0], r.DecidedBy, r.DecidedAt = fleet.RequestSuperseded, sum("old"), "user:anna", start.Add(-29*24*time.Hour)
	})
	changed.Supersedes = old.ID
	f.requests = []fleet.Request{
		machine("a10b", fleet.IdentityHardware, fleet.BootEnforced, 12*time.Minute, nil),
		machine("b20e", fleet.IdentityHardware, fleet.BootMeasured, 9*time.Minute, func(r *fleet.Request) { r.Source = "10.20.7.44" }),
		machine("c30b", fleet.IdentityListed, fleet.BootMeasured, 3*time.Hour, func(r *fleet.Request) {
			r.Evidence.Hardware.Vendor, r.Evidence.Hardware.Product, r.Source = "Siemens", "SIMATIC IPC227G", "10.31.0.9"
		}),
		changed, old,
		machine("e50a", fleet.IdentityHardware, fleet.BootUnknown, 4*time.Minute, func(r *fleet.Request) { r.Source = "10.44.1.7" }),
		machine("f60a", fleet.IdentityUnverified, fleet.BootUnknown, 40*time.Minute, func(r *fleet.Request) {
			r.Evidence.Hardware.Vendor, r.Evidence.Hardware.Product, r.Source = "QEMU", "Standard PC", "203.0.113.66"
		}),
		machine("aa70", fleet.IdentityHardware, fleet.BootMeasured, 50*time.Hour, func(r *fleet.Request) {
			r.State, r.DecidedBy, r.DecidedAt, r.Reason, r.Revision = fleet.RequestRejected, "user:anna", start.Add(-49*time.Hour), "not one of ours", 2
		}),
	}
	f.alike[changed.ID] = []string{"Node " + string(f.requests[2].Node) + ` claims the serial number "MXQC30B", which looks like "MXQD40C" and is another`}
	for i, name := range []string{"0b1d", "1b2d", "2b3d", "3b4d", "4b5d", "5b6d"} {
		r := machine(name, fleet.IdentityHardware, fleet.BootMeasured, 400*time.Hour, nil)
		n := fleet.Node{
			ID: r.Node, Tenant: "default", Words: r.Words, State: fleet.NodeActive, Site: "shop-7", Incarnation: 1, MayServe: true, EK: r.Evidence.EK, AKName: r.Evidence.AKName, LDevIDKey: r.Evidence.LDevIDKey,
			Identity: r.Identity, Boot: r.Boot, Image: "slot@1.4.0", Request: r.ID, Hardware: r.Evidence.Hardware, Created: start.Add(-400 * time.Hour), LastSeen: start.Add(-time.Duration(i+3) * time.Second), Source: "10.20.7.3", Revision: 4,
			Certificate: fleet.Certificate{Serial: "0a1b", NotBefore: start.Add(-200 * time.Hour), NotAfter: start.Add(500 * time.Hour)}, Labels: map[string]string{"rack": fmt.Sprint(i)},
		}
		rep := fleet.NodeReport{Tenant: "default", Site: "shop-7", Node: n.ID, At: start.Add(-time.Minute), UID: "c-7d1f", Epoch: 1, Version: 4, Role: "server", State: "server", Voters: 3, Nodes: 4, NodesReady: 4, K3s: "v1.36.3+k3s1", Since: start.Add(-100 * time.Hour)}
		switch i {
		case 3:
			n.LastSeen, rep.Role, rep.State, rep.At = start.Add(-5*time.Hour), "worker", "worker", start.Add(-5*time.Hour)
		case 4:
			n.State, n.Site, n.Incarnation, n.Certificate, n.LastSeen = fleet.NodeApproved, "", 0, fleet.Certificate{}, time.Time{}
		case 5:
			n.State, n.Site, n.Incarnation, n.Reason = fleet.NodeDenied, "", 0, "stolen from the van"
		}
		if i < 4 {
			f.reports[n.ID] = rep
		}
		f.nodes = append(f.nodes, n)
	}
	site := func(name, title, place string, seen time.Duration, change func(*fleet.Site)) {
		s := fleet.Site{Meta: fleet.Meta{Tenant: "default", Name: name, Labels: map[string]string{"region": "north"}, Created: start.Add(-900 * time.Hour)}, Title: title, Location: place,
			Spec:   fleet.SiteSpec{Stack: "store", Version: "1.4.0"},
			Status: fleet.SiteStatus{Seen: start.Add(-seen), ClusterUID: "c-7d1f", ClusterEpoch: 1, Servers: 3, Workers: 1, Stack: "store", Version: "1.4.0"}, Ledger: fleet.SiteLedger{Sure: 1}}
		if change != nil {
			change(&s)
		}
		f.sites = append(f.sites, s)
	}
	site("hall-2", "Press hall", "Kassel", 30*time.Second, func(s *fleet.Site) {
		s.Status.Blocker = "two nodes are ready, three are needed for three servers"
		s.Status.Servers = 1
	})
	site("ship-aurora", "MS Aurora", "at sea", 41*time.Hour, nil)
	site("shop-12", "Shop 12", "Bremen", 20*time.Second, func(s *fleet.Site) { s.Status.Version = "1.3.2" })
	site("shop-7", "Shop 7", "Hamburg", 10*time.Second, func(s *fleet.Site) {
		s.Status.Founder, s.Status.Members = f.nodes[0].ID, []fleet.NodeID{f.nodes[0].ID, f.nodes[1].ID, f.nodes[2].ID}
	})
	site("shop-8", "Shop 8", "Lübeck", 40*time.Second, nil)
	site("shop-9", "Shop 9", "Kiel", 5*time.Second, nil)
	f.furnishPeople()
	f.images = []fleet.Image{{Tenant: "default", Name: "recovery", Version: "1.4.0", Kind: "recovery", Arch: "amd64", SHA256: sum("uki"), Size: 38e6, Registered: start.Add(-200 * time.Hour)}}
	for i, e := range []fleet.Event{
		{Kind: "pxe.served", MAC: "00:16:3e:5a:a1:01", Text: "00:16:3e:5a:a1:01 got the recovery image: unknown machine"},
		{Kind: "request.pending", Request: f.requests[0].ID, Node: f.requests[0].Node, Text: f.requests[0].Words + " asks for approval"},
		{Kind: "node.denied", Level: fleet.EventWarning, Node: f.nodes[5].ID, Text: f.nodes[5].Words + " was denied by user:anna: stolen from the van"},
		{Kind: "cluster.second", Level: fleet.EventAlarm, Site: "hall-2", Text: "a second cluster was shown"},
	} {
		e.Tenant, e.Seq, e.Time = "default", uint64(i+1), start.Add(time.Duration(i-10)*time.Minute)
		f.events = append(f.events, e)
	}
	for i, k := range []string{"tenant.created", "token.created", "site.created", "request.rejected", "node.denied"} {
		f.audit = append(f.audit, fleet.AuditRecord{Seq: uint64(i + 1), Tenant: "default", Time: start.Add(time.Duration(i-100) * time.Hour), Actor: []string{"system", "system", "user:anna", "user:anna", "user:anna"}[i], Source: "192.0.2.7", Kind: fleet.AuditKind(k), Object: []string{"tenant/default", "user/admin", "site/shop-7", "request/" + string(f.requests[7].ID), "node/" + string(f.nodes[5].ID)}[i], Reason: []string{"first start", "", "", "not one of ours", "stolen from the van"}[i]})
	}
	return f
}

func (f *fake) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(musterv1connect.NewManagementServiceHandler(f))
	mux.Handle(musterv1connect.NewAccessServiceHandler(&f.people))
	return mux
}

// notifyLocked wakes those who watch.
func (f *fake) notifyLocked(kind string) {
	f.events = append(f.events, fleet.Event{Tenant: "default", Seq: uint64(len(f.events) + 1), Time: time.Now(), Kind: kind, Text: kind})
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) file(r fleet.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, r)
	f.notifyLocked("request.pending")
}

func (f *fake) GetCentre(context.Context, *musterv1.GetCentreRequest) (*musterv1.GetCentreResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &musterv1.GetCentreResponse{Version: "1.4.0", Now: timestamppb.New(f.now), Epoch: 1, StaleAfterSeconds: 180, Warnings: f.warnings, Requests: map[string]uint32{}, Nodes: map[string]uint32{}, Tenant: &musterv1.Tenant{Lab: f.lab}}
	for _, r := range f.requests {
		out.Requests[r.State.String()]++
	}
	for _, n := range f.nodes {
		out.Nodes[n.State.String()]++
	}
	return out, nil
}

func refusal(r fleet.Request) string {
	if r.State != fleet.RequestPending {
		return ""
	}
	if err := (enroll.Policy{}).Check(r.Identity, r.Boot); err != nil {
		return err.Error()
	}
	return ""
}

func (f *fake) ListRequests(_ context.Context, q *musterv1.ListRequestsRequest) (*musterv1.ListRequestsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []fleet.Request
	for _, r := range f.requests {
		ok := q.State == "" || r.State.String() == q.State
		if len(q.Identities) > 0 {
			in := false
			for _, i := range q.Identities {
				in = in || fleet.IdentityTrust(i) == r.Identity
			}
			ok = ok && in
		}
		if q.Search != "" && !strings.HasPrefix(r.Words, q.Search) && r.Evidence.Serial != q.Search && !strings.HasPrefix(string(r.ID), q.Search) {
			ok = false
		}
		if ok {
			found = append(found, r)
		}
	}
	sort.SliceStable(found, func(i, j int) bool {
		if found[i].Identity != found[j].Identity {
			return found[i].Identity > found[j].Identity
		}
		return found[i].FirstSeen.Before(found[j].FirstSeen)
	})
	out := &musterv1.ListRequestsResponse{Total: uint32(len(found))}
	from := 0
	if q.After != "" {
		_, _ = fmt.Sscan(q.After, &from)
	}
	found = found[from:]
	if n := int(q.Limit); n > 0 && len(found) > n {
		found, out.More, out.Next = found[:n], true, fmt.Sprint(from+n)
	}
	for _, r := range found {
		out.Requests = append(out.Requests, api.RequestToProto(r))
		out.Refusals = append(out.Refusals, refusal(r))
	}
	return out, nil
}

func (f *fake) find(id string) (*fleet.Request, error) {
	var found *fleet.Request
	for i := range f.requests {
		r := &f.requests[i]
		if string(r.ID) == id || r.Words == id && (found == nil || r.State.Live()) {
			found = r
		}
	}
	if found == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no request %.80q", id))
	}
	return found, nil
}

func (f *fake) GetRequest(_ context.Context, q *musterv1.GetRequestRequest) (*musterv1.GetRequestResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, err := f.find(q.Id)
	if err != nil {
		return nil, err
	}
	out := &musterv1.GetRequestResponse{Request: api.RequestToProto(*r), Refusal: refusal(*r), LookAlikes: f.alike[r.ID]}
	if r.Supersedes != "" {
		if old, err := f.find(string(r.Supersedes)); err == nil {
			out.Diff = enroll.Diff(old.Evidence, r.Evidence)
		}
	}
	for _, e := range f.events {
		if strings.HasPrefix(e.Kind, "pxe.") && e.MAC == r.Evidence.Hardware.NICs[0].MAC {
			out.BootEvents = append(out.BootEvents, api.EventToProto(e))
		}
	}
	return out, nil
}

// decide changes a request by the real rules.
func (f *fake) decide(ctx context.Context, verb, id string, change func(time.Time, fleet.Request, string) (fleet.Request, error)) (*musterv1.Request, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	actor, _ := ctx.Value(actorKey{}).(Session)
	if actor.Role == "viewer" {
		return nil, connect.NewError(connect.CodePermissionDenied, errors.New("the role viewer does not allow this; it takes approver"))
	}
	r, err := f.find(id)
	if err != nil {
		return nil, err
	}
	changed, err := change(f.now, *r, actor.Actor)
	var refused *enroll.Refused
	switch {
	case errors.Is(err, enroll.ErrConflict):
		return nil, connect.NewError(connect.CodeAborted, err)
	case errors.As(err, &refused):
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	case err != nil:
		return nil, err
	}
	*r = changed
	f.calls = append(f.calls, fmt.Sprintf("%s %s %s site=%s labels=%v reason=%s", actor.Actor, verb, r.ID, r.Site, r.Labels, r.Reason))
	f.notifyLocked("request." + r.State.String())
	return api.RequestToProto(*r), nil
}

func (f *fake) acts() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

func (f *fake) Approve(ctx context.Context, q *musterv1.ApproveRequest) (*musterv1.ApproveResponse, error) {
	if q.Site != "" {
		if err := fleet.ValidateName("site", q.Site); err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
	}
	r, err := f.decide(ctx, "approve", q.Id, func(now time.Time, r fleet.Request, actor string) (fleet.Request, error) {
		out, _, err := enroll.Approve(now, r, enroll.Approval{Ruling: enroll.Ruling{Revision: q.Revision, Actor: actor, Reason: q.Reason}, Site: q.Site, Labels: q.Labels})
		return out, err
	})
	return &musterv1.ApproveResponse{Request: r}, err
}

func (f *fake) Reject(ctx context.Context, q *musterv1.RejectRequest) (*musterv1.RejectResponse, error) {
	if q.Reason == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("a reason is needed: the audit log keeps it"))
	}
	r, err := f.decide(ctx, "reject", q.Id, func(now time.Time, r fleet.Request, actor string) (fleet.Request, error) {
		out, _, err := enroll.Reject(now, r, enroll.Ruling{Revision: q.Revision, Actor: actor, Reason: q.Reason})
		return out, err
	})
	return &musterv1.RejectResponse{Request: r}, err
}

func (f *fake) Release(ctx context.Context, q *musterv1.ReleaseRequest) (*musterv1.ReleaseResponse, error) {
	r, err := f.decide(ctx, "release", q.Id, func(now time.Time, r fleet.Request, actor string) (fleet.Request, error) {
		out, _, err := enroll.Release(now, r, enroll.Ruling{Revision: q.Revision, Actor: actor, Reason: q.Reason})
		return out, err
	})
	return &musterv1.ReleaseResponse{Request: r}, err
}

func (f *fake) ListNodes(_ context.Context, q *musterv1.ListNodesRequest) (*musterv1.ListNodesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &musterv1.ListNodesResponse{}
	for _, n := range f.nodes {
		out.Nodes = append(out.Nodes, api.NodeToProto(n))
	}
	return out, nil
}

func (f *fake) GetNode(_ context.Context, q *musterv1.GetNodeRequest) (*musterv1.GetNodeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.nodes {
		if string(n.ID) == q.Id || n.Words == q.Id {
			out := &musterv1.GetNodeResponse{Node: api.NodeToProto(n), Denied: n.State == fleet.NodeDenied}
			if r, ok := f.reports[n.ID]; ok {
				out.Report = api.NodeReportToProto(r)
			}
			return out, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no node %.80q; `muster get nodes` lists them", q.Id))
}

func (f *fake) DenyNode(ctx context.Context, q *musterv1.DenyNodeRequest) (*musterv1.DenyNodeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, n := range f.nodes {
		if string(n.ID) == q.Id {
			if q.Revision != n.Revision {
				return nil, connect.NewError(connect.CodeAborted, errors.New("it has changed"))
			}
			f.nodes[i].State, f.nodes[i].Reason = fleet.NodeDenied, q.Reason
			f.calls = append(f.calls, "deny "+q.Id+" "+q.Reason)
			return &musterv1.DenyNodeResponse{}, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such node"))
}

func (f *fake) ListSites(context.Context, *musterv1.ListSitesRequest) (*musterv1.ListSitesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &musterv1.ListSitesResponse{}
	for _, s := range f.sites {
		out.Sites = append(out.Sites, api.SiteToProto(s))
	}
	return out, nil
}

func (f *fake) GetSite(_ context.Context, q *musterv1.GetSiteRequest) (*musterv1.GetSiteResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sites {
		if s.Name != q.Name {
			continue
		}
		out := &musterv1.GetSiteResponse{Site: api.SiteToProto(s), Now: timestamppb.New(f.now), StaleAfterSeconds: 180, Charter: &musterv1.Charter{Version: &musterv1.DocVersion{Epoch: 1, N: 12}}}
		for i, n := range f.nodes {
			if n.Site == s.Name {
				out.Nodes = append(out.Nodes, api.NodeToProto(n))
				out.Reports = append(out.Reports, api.NodeReportToProto(f.reports[n.ID]))
				out.Addresses = append(out.Addresses, fmt.Sprintf("100.64.0.%d", i+1))
			}
		}
		return out, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no site %.80q", q.Name))
}

func (f *fake) ListImages(context.Context, *musterv1.ListImagesRequest) (*musterv1.ListImagesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &musterv1.ListImagesResponse{}
	for _, i := range f.images {
		out.Images = append(out.Images, api.ImageToProto(i))
	}
	return out, nil
}

func (f *fake) ListRoots(context.Context, *musterv1.ListRootsRequest) (*musterv1.ListRootsResponse, error) {
	return &musterv1.ListRootsResponse{Roots: []*musterv1.Root{{Subject: "CN=Infineon OPTIGA(TM) TPM 2.0 RSA Root CA", Sha256: "ab12cd34ef56ab12cd34", NotAfter: timestamppb.New(start.AddDate(10, 0, 0))}}}, nil
}

func (f *fake) ListAudit(_ context.Context, q *musterv1.ListAuditRequest) (*musterv1.ListAuditResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &musterv1.ListAuditResponse{}
	for i := len(f.audit) - 1; i >= 0; i-- {
		if r := f.audit[i]; q.Object == "" || r.Object == q.Object {
			out.Records = append(out.Records, api.AuditRecordToProto(r))
		}
	}
	return out, nil
}

func (f *fake) VerifyAudit(context.Context, *musterv1.VerifyAuditRequest) (*musterv1.VerifyAuditResponse, error) {
	return &musterv1.VerifyAuditResponse{Ok: true, Records: 5, Head: "5:ab12"}, nil
}

func (f *fake) WatchEvents(ctx context.Context, q *musterv1.WatchEventsRequest, out *connect.ServerStream[musterv1.WatchEventsResponse]) error {
	f.mu.Lock()
	sent := max(0, len(f.events)-int(q.Tail))
	f.mu.Unlock()
	for {
		f.mu.Lock()
		events, changed := append([]fleet.Event(nil), f.events[sent:]...), f.changed
		f.mu.Unlock()
		for _, e := range events {
			if err := out.Send(&musterv1.WatchEventsResponse{Event: api.EventToProto(e)}); err != nil {
				return err
			}
			sent++
		}
		if !q.Follow {
			return nil
		}
		if len(events) == 0 {
			if err := out.Send(&musterv1.WatchEventsResponse{}); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fakeGate lets in whoever has one of these tokens.
type fakeGate struct {
	mu   sync.Mutex
	n    int
	open map[string]Session
}

func newFakeGate() *fakeGate { return &fakeGate{open: map[string]Session{}} }

var tokens = map[string]string{"muster_admin": "admin", "muster_approver": "approver", "muster_viewer": "viewer"}

func (g *fakeGate) Login(w http.ResponseWriter, _ *http.Request, token string) error {
	role, ok := tokens[token]
	if !ok {
		return errors.New("no such token")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n++
	cookie := fmt.Sprintf("cookie-%d", g.n)
	g.open[cookie] = Session{Actor: "user:anna", Role: role, Tenant: "default"}
	setCookie(w, sessionCookie, cookie, time.Hour)
	return nil
}

func (g *fakeGate) Session(r *http.Request) (Session, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, ok := g.open[cookieOf(r, sessionCookie)]
	if !ok {
		return s, ErrNoSession
	}
	return s, nil
}

func (g *fakeGate) Logout(w http.ResponseWriter, r *http.Request) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, cookieOf(r, sessionCookie))
	setCookie(w, sessionCookie, "", 0)
	return nil
}

func (g *fakeGate) As(ctx context.Context, s Session) context.Context {
	return context.WithValue(ctx, actorKey{}, s)
}

func newConsole(t testing.TB, f *fake) (*Console, *fakeGate) {
	t.Helper()
	g := newFakeGate()
	c, err := New(Config{API: InProcess(f.handler(), func(v any, stack []byte) { t.Errorf("%v\n%s", v, stack) }), Gate: g, Provider: fakeProvider{}, Now: func() time.Time { return f.now }})
	if err != nil {
		t.Fatal(err)
	}
	return c, g
}
