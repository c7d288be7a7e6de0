package central

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/text"
)

// management implements musterv1connect.ManagementServiceHandler: it turns
// messages into acts and errors into codes, and decides nothing.
type management struct {
	*Server
	musterv1connect.UnimplementedManagementServiceHandler
}

const (
	maxList   = 1000
	maxReason = 1024
	heartbeat = 15 * time.Second
	// auditPage is how many records the verifier holds at a time.
	auditPage = 500
)

// coded gives an error the code that clients branch on. What is not known to
// be harmless is logged and not shown.
func (s management) coded(ctx context.Context, verb string, err error) error {
	var (
		ambiguous *errAmbiguous
		refused   *enroll.Refused
		coded     *connect.Error
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &coded):
		return err
	case errors.As(err, &ambiguous):
		return connect.NewError(connect.CodeInvalidArgument, ambiguous)
	case errors.As(err, &refused):
		return connect.NewError(connect.CodeFailedPrecondition, refused)
	case errors.Is(err, enroll.ErrConflict):
		return connect.NewError(connect.CodeAborted, err)
	case errors.Is(err, store.ErrConflict):
		return connect.NewError(connect.CodeAborted, errors.New("it has changed since it was looked at; look again and decide then"))
	case errors.Is(err, store.ErrNotFound):
		var none *errNoSuch
		if errors.As(err, &none) {
			return connect.NewError(connect.CodeNotFound, none)
		}
		return connect.NewError(connect.CodeNotFound, err)
	case ctx.Err() != nil:
		return connect.NewError(connect.CodeCanceled, ctx.Err())
	}
	s.log.Error("call failed", logMethod, verb, logError, err)
	return connect.NewError(connect.CodeInternal, fmt.Errorf("%s failed; the centre's log says why", verb))
}

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

// reasonOf checks what a person wrote.
func reasonOf(s string, required bool) (string, error) {
	s = text.Clean(s, maxReason)
	if s == "" && required {
		return "", invalid("a reason is needed: the audit log keeps it")
	}
	return s, nil
}

func limitOf(n uint32) int {
	if n == 0 || n > maxList {
		return maxList
	}
	return int(n)
}

// GetCentre implements the management service.
func (s management) GetCentre(ctx context.Context, _ *musterv1.GetCentreRequest) (*musterv1.GetCentreResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetCentreResponse{
		Version: s.cfg.Version, Now: timestamppb.New(s.cfg.Now()), Actor: c.actor(), Role: c.Role().String(),
		Requests: make(map[string]uint32), Nodes: make(map[string]uint32),
		StaleAfterSeconds: uint32(staleReports * s.cfg.ReportEvery / time.Second),
	}
	err := s.store.View(ctx, func(t store.Reader) error {
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		out.Tenant = api.TenantToProto(tenant)
		if out.Epoch, err = t.Epoch(); err != nil {
			return err
		}
		return c.part(t).count(out)
	})
	if err != nil {
		return nil, s.coded(ctx, "reading the centre", err)
	}
	if set, err := s.trust.roots(ctx); err == nil {
		for _, p := range set.Problems {
			out.Warnings = append(out.Warnings, "EK root not used: "+text.Clean(p.Error(), 256))
		}
		if len(set.All) == 0 {
			out.Warnings = append(out.Warnings, "no EK root is trusted yet, so that every machine is unverified: muster roots import FILE")
		}
	}
	return out, nil
}

// count fills in how many requests and nodes the caller sees, per state.
func (p *part) count(out *musterv1.GetCentreResponse) error {
	if p.seesAll(access.Request) && p.seesAll(access.Node) {
		requests, err := p.t.CountRequests(p.Tenant)
		if err != nil {
			return err
		}
		for state, n := range requests {
			out.Requests[state.String()] = uint32(n)
		}
		nodes, err := p.t.CountNodes(p.Tenant)
		for state, n := range nodes {
			out.Nodes[state.String()] = uint32(n)
		}
		return err
	}
	// Whoever sees a part gets its numbers, which takes looking at it.
	requests, err := some(p, access.Request, maxFiltered, func(count int) ([]fleet.Request, error) { return p.t.Requests(p.Tenant, nil, count) },
		func(r fleet.Request) string { return r.Site })
	if err != nil {
		return err
	}
	for _, r := range requests {
		out.Requests[r.State.String()]++
	}
	nodes, err := page(p, access.Node, maxFiltered, func(after *fleet.Node, _ int) ([]fleet.Node, error) {
		if after == nil {
			return p.t.Nodes(p.Tenant, "", maxFiltered+1)
		}
		return p.t.Nodes(p.Tenant, after.ID, maxFiltered+1)
	}, func(n fleet.Node) string { return n.Site })
	for _, n := range nodes {
		out.Nodes[n.State.String()]++
	}
	return err
}

// ListRequests implements the management service.
func (s management) ListRequests(ctx context.Context, q *musterv1.ListRequestsRequest) (*musterv1.ListRequestsResponse, error) {
	c := callerOf(ctx)
	var state *fleet.RequestState
	if q.State != "" {
		state = new(fleet.RequestState)
		if err := state.UnmarshalText([]byte(q.State)); err != nil {
			return nil, invalid("%v", err)
		}
	}
	if err := checkListing(q); err != nil {
		return nil, err
	}
	limit := limitOf(q.Limit)
	out := &musterv1.ListRequestsResponse{}
	err := s.store.View(ctx, func(t store.Reader) error {
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		out.Lab = tenant.Lab
		requests, err := listRequests(c.part(t), state, q, limit+1, out)
		if len(requests) > limit {
			requests, out.More = requests[:limit], true
			if q.ByTrust {
				out.Next = queueKey(requests[limit-1])
			}
		}
		policy := s.approvalPolicy(tenant)
		for _, r := range requests {
			r = s.shown(r)
			out.Requests = append(out.Requests, api.RequestToProto(r))
			out.Refusals = append(out.Refusals, refusalOf(policy, r))
		}
		return err
	})
	return out, s.coded(ctx, "listing requests", err)
}

// shown is the request as it is now: one that has run out says so, even if
// nobody has written that yet.
func (s management) shown(r fleet.Request) fleet.Request {
	if e, _, due := enroll.Expire(s.cfg.Now(), r); due {
		return e
	}
	return r
}

func labOf(t store.Reader, tenant string) (bool, error) {
	v, err := t.Tenant(tenant)
	return v.Lab, err
}

// GetRequest implements the management service.
func (s management) GetRequest(ctx context.Context, q *musterv1.GetRequestRequest) (*musterv1.GetRequestResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetRequestResponse{}
	err := s.store.View(ctx, func(t store.Reader) error {
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		out.Lab = tenant.Lab
		look := c.part(t)
		r, err := look.findRequest(q.Id)
		if err != nil {
			return err
		}
		r = s.shown(r)
		out.Request = api.RequestToProto(r)
		if r.Supersedes != "" {
			old, err := t.Request(c.Tenant, r.Supersedes)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			if err == nil {
				for _, d := range enroll.Diff(old.Evidence, r.Evidence) {
					out.Diff = append(out.Diff, text.Clean(d, 512))
				}
			}
		}
		if err := explain(look, r, out); err != nil {
			return err
		}
		out.Refusal = refusalOf(s.approvalPolicy(tenant), r)
		return nil
	})
	return out, s.coded(ctx, "reading the request", err)
}

// Approve implements the management service.
func (s management) Approve(ctx context.Context, q *musterv1.ApproveRequest) (*musterv1.ApproveResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if q.Site != "" {
		if err := fleet.ValidateName("site", q.Site); err != nil {
			return nil, invalid("%v", err)
		}
	}
	if err := fleet.ValidateLabels(q.Labels); err != nil {
		return nil, invalid("%v", err)
	}
	r, created, err := s.approve(ctx, callerOf(ctx), approval{
		id: q.Id, revision: q.Revision, site: q.Site, labels: q.Labels, reason: reason, createSite: q.CreateSite,
	})
	if err != nil {
		return nil, s.coded(ctx, "approving", err)
	}
	return &musterv1.ApproveResponse{Request: api.RequestToProto(r), SiteCreated: created}, nil
}

// Reject implements the management service.
func (s management) Reject(ctx context.Context, q *musterv1.RejectRequest) (*musterv1.RejectResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	r, err := s.reject(ctx, callerOf(ctx), q.Id, q.Revision, reason)
	if err != nil {
		return nil, s.coded(ctx, "rejecting", err)
	}
	return &musterv1.RejectResponse{Request: api.RequestToProto(r)}, nil
}

// ListNodes implements the management service.
func (s management) ListNodes(ctx context.Context, q *musterv1.ListNodesRequest) (*musterv1.ListNodesResponse, error) {
	c := callerOf(ctx)
	limit := limitOf(q.Limit)
	out := &musterv1.ListNodesResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		nodes, err := page(c.part(t), access.Node, limit, func(after *fleet.Node, count int) ([]fleet.Node, error) {
			if after == nil {
				return t.Nodes(c.Tenant, fleet.NodeID(q.After), count)
			}
			return t.Nodes(c.Tenant, after.ID, count)
		}, func(n fleet.Node) string { return n.Site })
		if len(nodes) > limit {
			nodes, out.More = nodes[:limit], true
		}
		if err != nil || len(nodes) == 0 {
			return err
		}
		said := make(map[fleet.NodeID]fleet.SystemReport, len(nodes))
		for after, end := fleet.NodeID(q.After), nodes[len(nodes)-1].ID; after < end; {
			systems, err := t.Systems(c.Tenant, after, limit+1)
			if err != nil {
				return err
			}
			if len(systems) == 0 {
				break
			}
			for _, r := range systems {
				said[r.Node] = r
			}
			after = systems[len(systems)-1].Node
		}
		for _, n := range nodes {
			out.Nodes = append(out.Nodes, api.NodeToProto(n))
			out.Systems = append(out.Systems, api.SystemReportToProto(said[n.ID]))
		}
		return nil
	})
	return out, s.coded(ctx, "listing nodes", err)
}

// GetNode implements the management service.
func (s management) GetNode(ctx context.Context, q *musterv1.GetNodeRequest) (*musterv1.GetNodeResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.GetNodeResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		look := c.part(t)
		n, err := look.findNode(q.Id)
		if err != nil {
			return err
		}
		out.Node = api.NodeToProto(n)
		if out.Denied, err = denied(t, c.Tenant, []fleet.EKHash{n.EK}); err != nil {
			return err
		}
		if err := showKey(t, n, out); err != nil {
			return err
		}
		if err := s.showSystem(t, n, out); err != nil {
			return err
		}
		requests, err := t.RequestsOfNode(c.Tenant, n.ID)
		if err != nil {
			return err
		}
		requests, err = filter(look, access.Request, requests, func(r fleet.Request) string { return r.Site })
		for _, r := range requests {
			out.Requests = append(out.Requests, api.RequestToProto(s.shown(r)))
		}
		return err
	})
	return out, s.coded(ctx, "reading the node", err)
}

// DenyNode implements the management service.
func (s management) DenyNode(ctx context.Context, q *musterv1.DenyNodeRequest) (*musterv1.DenyNodeResponse, error) {
	reason, err := reasonOf(q.Reason, true)
	if err != nil {
		return nil, err
	}
	n, err := s.deny(ctx, callerOf(ctx), q.Id, q.Revision, reason)
	if err != nil {
		return nil, s.coded(ctx, "denying", err)
	}
	return &musterv1.DenyNodeResponse{Node: api.NodeToProto(n)}, nil
}

// AllowNode implements the management service.
func (s management) AllowNode(ctx context.Context, q *musterv1.AllowNodeRequest) (*musterv1.AllowNodeResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	n, err := s.allow(ctx, callerOf(ctx), q.Id, q.Revision, reason)
	if err != nil {
		return nil, s.coded(ctx, "allowing", err)
	}
	return &musterv1.AllowNodeResponse{Node: api.NodeToProto(n)}, nil
}

// ListSites implements the management service.
func (s management) ListSites(ctx context.Context, q *musterv1.ListSitesRequest) (*musterv1.ListSitesResponse, error) {
	c := callerOf(ctx)
	limit := limitOf(q.Limit)
	out := &musterv1.ListSitesResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		sites, err := page(c.part(t), access.Site, limit, func(after *fleet.Site, count int) ([]fleet.Site, error) {
			if after == nil {
				return t.Sites(c.Tenant, q.After, count)
			}
			return t.Sites(c.Tenant, after.Name, count)
		}, func(v fleet.Site) string { return v.Name })
		if len(sites) > limit {
			sites, out.More = sites[:limit], true
		}
		for _, v := range sites {
			out.Sites = append(out.Sites, api.SiteToProto(v))
		}
		return err
	})
	return out, s.coded(ctx, "listing sites", err)
}

// ListImages implements the management service.
func (s management) ListImages(ctx context.Context, _ *musterv1.ListImagesRequest) (*musterv1.ListImagesResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListImagesResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		images, err := t.Images(c.Tenant)
		for _, i := range images {
			out.Images = append(out.Images, api.ImageToProto(i))
		}
		return err
	})
	return out, s.coded(ctx, "listing images", err)
}

// RegisterImage implements the management service.
func (s management) RegisterImage(ctx context.Context, q *musterv1.RegisterImageRequest) (*musterv1.RegisterImageResponse, error) {
	if len(q.Manifest) == 0 || len(q.Manifest) > fleet.MaxManifest {
		return nil, invalid("the manifest has %d bytes; want 1 to %d", len(q.Manifest), fleet.MaxManifest)
	}
	image, created, err := s.registerImage(ctx, callerOf(ctx), q.Manifest)
	if err != nil {
		return nil, s.coded(ctx, "registering the image", err)
	}
	return &musterv1.RegisterImageResponse{Image: api.ImageToProto(image), Created: created}, nil
}

// TrustReleaseKey implements the management service.
func (s management) TrustReleaseKey(ctx context.Context, q *musterv1.TrustReleaseKeyRequest) (*musterv1.TrustReleaseKeyResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if len(q.PublicKey) > 64<<10 {
		return nil, invalid("the key has %d bytes", len(q.PublicKey))
	}
	c := callerOf(ctx)
	out := &musterv1.TrustReleaseKeyResponse{}
	err = s.store.Update(ctx, func(t store.Tx) (err error) {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		out.KeyIds, out.Added, err = trustReleaseKeys(t, by, c.Tenant, []byte(q.PublicKey), reason)
		return err
	})
	return out, s.coded(ctx, "trusting the release key", err)
}

// VerifyAudit implements the management service.
func (s management) VerifyAudit(ctx context.Context, _ *musterv1.VerifyAuditRequest) (*musterv1.VerifyAuditResponse, error) {
	head, bad, err := VerifyAudit(ctx, s.store, callerOf(ctx).Tenant)
	if err != nil {
		return nil, s.coded(ctx, "verifying the audit log", err)
	}
	out := &musterv1.VerifyAuditResponse{Ok: bad == nil, Records: head.Count, Head: head.String()}
	if bad != nil {
		out.BadSeq, out.Problem = bad.Seq, bad.Why
	}
	return out, nil
}

// VerifyAudit checks a tenant's chain in the database, page by page. bad is
// the first place where it does not hold.
func VerifyAudit(ctx context.Context, s store.Store, tenant string) (head audit.Head, bad *audit.BreakError, err error) {
	v := audit.NewVerifier(tenant, audit.Head{})
	err = s.View(ctx, func(t store.Reader) error {
		for after := uint64(0); ; {
			records, err := t.Audit(tenant, after, auditPage)
			if err != nil || len(records) == 0 {
				return err
			}
			for _, r := range records {
				if err := v.Add(r); errors.As(err, &bad) {
					return nil
				} else if err != nil {
					return err
				}
			}
			after = records[len(records)-1].Seq
		}
	})
	return v.Head(), bad, err
}

// WatchEvents implements the management service.
func (s management) WatchEvents(ctx context.Context, q *musterv1.WatchEventsRequest, out *connect.ServerStream[musterv1.WatchEventsResponse]) error {
	c := callerOf(ctx)
	tenant := c.Tenant
	woken, end := s.hub.wait(eventsTopic(tenant))
	defer end()
	after := q.After
	if q.Tail > 0 {
		err := s.store.View(ctx, func(t store.Reader) error {
			last, err := t.LastEvent(tenant)
			if tail := uint64(limitOf(q.Tail)); last > tail {
				after = max(after, last-tail)
			}
			return err
		})
		if err != nil {
			return s.coded(ctx, "reading events", err)
		}
	}
	if q.After > 0 {
		gap, err := s.eventGap(ctx, tenant, q.After)
		if err != nil {
			return s.coded(ctx, "reading events", err)
		}
		if gap != "" {
			after = 0
			if err := out.Send(&musterv1.WatchEventsResponse{Gap: gap}); err != nil {
				return err
			}
		}
	}
	if q.Follow {
		// Tell the caller at once that somebody is there.
		if err := out.Send(&musterv1.WatchEventsResponse{}); err != nil {
			return err
		}
	}
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for {
		var events []fleet.Event
		more := false
		err := s.store.View(ctx, func(t store.Reader) error {
			all, err := t.Events(tenant, after, maxList)
			if err != nil || len(all) == 0 {
				return err
			}
			after, more = all[len(all)-1].Seq, len(all) == maxList
			events, err = c.part(t).events(all)
			return err
		})
		if err != nil {
			return s.coded(ctx, "reading events", err)
		}
		for _, e := range events {
			if err := out.Send(&musterv1.WatchEventsResponse{Event: api.EventToProto(e)}); err != nil {
				return err
			}
		}
		if more {
			continue
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-woken:
		case <-beat.C:
			if err := out.Send(&musterv1.WatchEventsResponse{}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-s.stopping:
			return connect.NewError(connect.CodeUnavailable, errors.New("the centre stops"))
		}
	}
}

// ListRoots implements the management service.
func (s management) ListRoots(ctx context.Context, _ *musterv1.ListRootsRequest) (*musterv1.ListRootsResponse, error) {
	s.trust.forget()
	s.documentsStale()
	set, err := s.trust.roots(ctx)
	if err != nil {
		return nil, s.coded(ctx, "reading roots", err)
	}
	out := &musterv1.ListRootsResponse{Roots: rootsToProto(set.list())}
	for _, p := range set.Problems {
		out.Problems = append(out.Problems, text.Clean(p.Error(), 512))
	}
	err = s.store.View(ctx, func(t store.Reader) (err error) {
		out.Lab, err = labOf(t, callerOf(ctx).Tenant)
		return err
	})
	return out, s.coded(ctx, "reading roots", err)
}

// ImportRoots implements the management service.
func (s management) ImportRoots(ctx context.Context, q *musterv1.ImportRootsRequest) (*musterv1.ImportRootsResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
	roots, err := importRoots(ctx, s.store, s.data.file(rootsDir), by, q.Certificates, q.Lab, reason)
	if err != nil {
		var bad *badRoots
		if errors.As(err, &bad) {
			return nil, invalid("%v", err)
		}
		return nil, s.coded(ctx, "importing roots", err)
	}
	s.trust.forget()
	s.documentsStale()
	s.hub.changed(eventsTopic(c.Tenant))
	return &musterv1.ImportRootsResponse{Roots: rootsToProto(roots)}, nil
}

func rootsToProto(roots []Root) []*musterv1.Root {
	out := make([]*musterv1.Root, 0, len(roots))
	for _, r := range roots {
		out = append(out, &musterv1.Root{File: r.File, Subject: r.Subject, Sha256: r.SHA256, NotAfter: timestamppb.New(r.NotAfter), Lab: r.Lab})
	}
	return out
}

// OpenBootWindow implements the management service.
func (s management) OpenBootWindow(ctx context.Context, q *musterv1.OpenBootWindowRequest) (*musterv1.OpenBootWindowResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	server := s.boot.get()
	if server == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("this centre has no boot role: start it with --boot-interface"))
	}
	length := time.Duration(q.Seconds) * time.Second
	if length > maxBootWindow || q.Count > maxBootMachine || (q.Count > 0) != (q.Seconds > 0) {
		return nil, invalid("a window has 1 to %d machines and lasts at most %s; both 0 close it", maxBootMachine, maxBootWindow)
	}
	c := callerOf(ctx)
	now := s.cfg.Now()
	w := bootWindow{Until: now.Add(length), Count: q.Count}
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: now}
		if err := by.record(t, c.Tenant, audit.BootWindowOpened, "tenant/"+c.Tenant, nil, w, reason); err != nil {
			return err
		}
		_, err := t.AddEvent(fleet.Event{Tenant: c.Tenant, Time: now, Kind: "boot.window", Text: fmt.Sprintf("%s lets %d unknown machines boot until %s", by.actor, w.Count, w.Until.UTC().Format(time.RFC3339))})
		return err
	})
	if err != nil {
		return nil, s.coded(ctx, "opening the boot window", err)
	}
	if q.Count == 0 {
		server.CloseWindow()
	} else {
		server.OpenWindow(w.Until, int(w.Count))
	}
	s.hub.changed(eventsTopic(c.Tenant))
	return &musterv1.OpenBootWindowResponse{Until: timestamppb.New(w.Until), Count: w.Count}, nil
}
