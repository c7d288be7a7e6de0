package central

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/escrow"
)

// nodeEntry is what answering a report needs to know: it is in memory, so
// that a report without news reads no database.
type nodeEntry struct {
	tenant     string
	site       string
	state      fleet.NodeState
	ldevidKey  string
	certified  bool
	generation int64
	// revision orders writes: two that were committed one after the other
	// may arrive here the other way round.
	revision int64
	macs     []string
}

// nodeIndex holds all nodes of the centre.
type nodeIndex struct {
	mu    sync.RWMutex
	nodes map[fleet.NodeID]nodeEntry
	// denied counts denied and other machines per MAC, for the boot role.
	denied, fine map[string]int
}

func newNodeIndex() *nodeIndex {
	return &nodeIndex{nodes: make(map[fleet.NodeID]nodeEntry), denied: make(map[string]int), fine: make(map[string]int)}
}

func (x *nodeIndex) load(ctx context.Context, s store.Store, tenant string) error {
	return s.View(ctx, func(t store.Reader) error {
		for after := fleet.NodeID(""); ; {
			nodes, err := t.Nodes(tenant, after, 1000)
			if err != nil {
				return err
			}
			if len(nodes) == 0 {
				break
			}
			for _, n := range nodes {
				x.put(n)
			}
			after = nodes[len(nodes)-1].ID
		}
		// Machines that were denied before they became nodes.
		denials, err := t.Denials(tenant)
		if err != nil {
			return err
		}
		for _, d := range denials {
			if _, there := x.get(d.Node); there {
				continue
			}
			requests, err := t.RequestsOfNode(tenant, d.Node)
			if err != nil {
				return err
			}
			n := fleet.Node{ID: d.Node, Tenant: tenant, State: fleet.NodeDenied}
			if len(requests) > 0 {
				n.Hardware = requests[len(requests)-1].Evidence.Hardware
			}
			x.put(n)
		}
		return nil
	})
}

func (x *nodeIndex) put(n fleet.Node) {
	e := nodeEntry{
		tenant: n.Tenant, state: n.State, ldevidKey: string(n.LDevIDKey), generation: n.Generation,
		certified: n.Certificate.Serial != "", revision: n.Revision,
	}
	if n.Admitted() {
		e.site = n.Site
	}
	for _, nic := range n.Hardware.NICs {
		if nic.MAC != "" && len(e.macs) < 32 {
			e.macs = append(e.macs, strings.ToLower(nic.MAC))
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	old := x.nodes[n.ID]
	if old.revision > e.revision {
		return
	}
	x.count(old, -1)
	x.count(e, +1)
	x.nodes[n.ID] = e
}

func (x *nodeIndex) count(e nodeEntry, by int) {
	m := x.fine
	if e.state == fleet.NodeDenied {
		m = x.denied
	}
	for _, mac := range e.macs {
		if m[mac] += by; m[mac] <= 0 {
			delete(m, mac)
		}
	}
}

func (x *nodeIndex) get(id fleet.NodeID) (nodeEntry, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.nodes[id]
	return e, ok
}

// knownMAC reports whether a machine that is not denied claims the MAC.
func (x *nodeIndex) knownMAC(mac string) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.fine[strings.ToLower(mac)] > 0
}

// deniedMAC reports whether only denied machines claim the MAC: a denied
// machine cannot silence another by claiming its address.
func (x *nodeIndex) deniedMAC(mac string) bool {
	mac = strings.ToLower(mac)
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.denied[mac] > 0 && x.fine[mac] == 0
}

// lastSeen gathers when nodes called and writes it every few seconds: it may
// be lost in a crash, and it must not cost a commit per call.
type lastSeen struct {
	store store.Store
	log   *slog.Logger

	mu   sync.Mutex
	seen map[fleet.NodeID]seenAt
}

type seenAt struct {
	tenant string
	at     time.Time
}

const (
	lastSeenEvery = 5 * time.Second
	lastSeenBatch = 500
)

func (l *lastSeen) saw(tenant string, id fleet.NodeID, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen[id] = seenAt{tenant, at}
}

func (l *lastSeen) run(ctx context.Context) {
	tick := time.NewTicker(lastSeenEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.flush(ctx)
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			l.flush(end)
			return
		}
	}
}

func (l *lastSeen) flush(ctx context.Context) {
	l.mu.Lock()
	seen := l.seen
	l.seen = make(map[fleet.NodeID]seenAt)
	l.mu.Unlock()
	for len(seen) > 0 {
		err := l.store.Update(ctx, func(t store.Tx) error {
			n := 0
			for id, s := range seen {
				if err := t.TouchNode(s.tenant, id, s.at); err != nil {
					return err
				}
				delete(seen, id)
				if n++; n == lastSeenBatch {
					break
				}
			}
			return nil
		})
		if err != nil {
			l.log.Warn("last-seen times lost", logError, err, logCount, len(seen))
			return
		}
	}
}

// nodeCaller is the node that makes a call, as its certificate and its key
// say.
type nodeCaller struct {
	id     fleet.NodeID
	source string
}

type nodeCallerKey struct{}

// authenticateNode lets only nodes through that hold a certificate of our
// node CA for the key in their node row and that are not denied.
func (s *Server) authenticateNode(next http.Handler) http.Handler {
	errorWriter := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := s.nodeOf(r)
		if err != nil {
			s.metrics.refused.WithLabelValues("nodes", connect.CodeOf(err).String()).Inc()
			s.refusals.say("call refused", logMethod, r.URL.Path, logAddress, sourceOf(r.RemoteAddr), logNode, id, logError, err)
			if !errorWriter.IsSupported(r) {
				http.Error(w, err.Error(), statusOf(err))
				return
			}
			_ = errorWriter.Write(w, r, err) // the peer is gone: nothing to do
			return
		}
		proved(r.Context(), id)
		c := nodeCaller{id, sourceOf(r.RemoteAddr)}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), nodeCallerKey{}, c)))
	})
}

func (s *Server) nodeOf(r *http.Request) (fleet.NodeID, error) {
	refuse := func(code connect.Code, format string, args ...any) error {
		return connect.NewError(code, fmt.Errorf(format, args...))
	}
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return "", refuse(connect.CodeUnauthenticated, "this call wants a node certificate")
	}
	leaf := r.TLS.PeerCertificates[0]
	// A centre whose clock was ahead for a while has issued certificates that
	// begin in the future: only an end locks out.
	at := s.cfg.Now()
	if leaf.NotBefore.After(at) {
		at = leaf.NotBefore
	}
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots: s.nodeCA, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		if at.After(leaf.NotAfter) {
			return "", refuse(connect.CodeUnauthenticated, "the certificate ended on %s: enroll again, with unchanged evidence that needs nobody",
				leaf.NotAfter.UTC().Format(time.DateOnly))
		}
		return "", refuse(connect.CodeUnauthenticated, "the certificate is not one of ours: enroll again")
	}
	id, err := nodeIDOf(leaf)
	if err != nil {
		return "", refuse(connect.CodeUnauthenticated, "the certificate names no node")
	}
	if s.follower.behind() {
		return id, refuse(connect.CodeUnavailable, "this replica has lost its database: try again, or another")
	}
	e, there := s.index.get(id)
	key := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	switch {
	case !there:
		return id, refuse(connect.CodePermissionDenied, "node %s is not known here: enroll again", id)
	case e.state == fleet.NodeDenied:
		return id, refuse(connect.CodePermissionDenied, "node %s is denied", id)
	case !e.certified || e.ldevidKey != string(key[:]):
		return id, refuse(connect.CodePermissionDenied, "the certificate is not the one node %s holds now: enroll again", id)
	}
	return id, nil
}

// nodeIDOf reads the node's name from a certificate of our node CA: the URI
// spiffe://SITE.TENANT.DOMAIN/node/ID.
func nodeIDOf(c *x509.Certificate) (fleet.NodeID, error) {
	for _, u := range c.URIs {
		if name, found := strings.CutPrefix(u.Path, "/node/"); found && u.Scheme == "spiffe" {
			id := fleet.NodeID(name)
			return id, id.Validate()
		}
	}
	return "", errors.New("central: certificate has no node name")
}

// nodeBodies bounds what one call of a node may send. Renewals are guarded as
// enrollment is.
func (s *Server) nodeBodies(renew, other http.Handler) http.Handler {
	most := map[string]int64{
		musterv1connect.NodeServiceReportProcedure:      maxReport,
		musterv1connect.NodeServiceDocumentsProcedure:   maxQuestion,
		musterv1connect.NodeServiceAskFoundingProcedure: maxQuestion,
		musterv1connect.NodeServiceGetHandoverProcedure: maxQuestion,
		// Beside the blob there are the heads of its messages.
		musterv1connect.NodeServicePutEscrowProcedure: escrow.MaxBlob + 4<<20,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, known := most[r.URL.Path]
		if !known {
			renew.ServeHTTP(w, r)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, n)
		other.ServeHTTP(w, r)
	})
}

const (
	// maxReport holds a record, an offer, texts and outcomes at their limits.
	maxReport   = 192 << 10
	maxQuestion = 4 << 10
)

// nodeService implements musterv1connect.NodeServiceHandler.
type nodeService struct {
	*Server
	musterv1connect.UnimplementedNodeServiceHandler
}

// Report implements the node service. Without news it touches memory only.
func (s nodeService) Report(ctx context.Context, q *musterv1.ReportRequest) (*musterv1.ReportResponse, error) {
	c, e, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if len(q.StatusDigest) > 64 || len(q.BootId) > 64 || len(q.Image) > 256 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the report is malformed"))
	}
	now := s.cfg.Now()
	if e.state == fleet.NodeApproved {
		if e, err = s.activate(ctx, e.tenant, c, now); err != nil {
			s.log.Error("node not activated", logNode, c.id, logError, err)
			return nil, connect.NewError(connect.CodeUnavailable, errors.New("try again"))
		}
	}
	acknowledged, err := s.clusterReport(ctx, c, e, q)
	if err != nil {
		return nil, s.unavailable("cluster report not kept", c.id, err)
	}
	if err := s.systemReport(ctx, c, e, q.System); err != nil {
		return nil, s.unavailable("system report not kept", c.id, err)
	}
	if err := s.newer(ctx, e, c.id, fleet.DocVersion{Epoch: q.Epoch, N: q.Version}); err != nil {
		return nil, s.unavailable("doubt not kept", c.id, err)
	}
	s.seen.saw(e.tenant, c.id, now)
	s.metrics.reports.WithLabelValues("ok").Inc()
	return &musterv1.ReportResponse{
		Now: timestamppb.New(now), NextReportSeconds: uint32(s.cfg.ReportEvery / time.Second),
		Epoch: s.epoch, Generation: e.generation, Site: e.site, Acknowledged: acknowledged,
		Documents: api.DocVersionToProto(s.sites.get(e.tenant, e.site).documents), WantCluster: s.reports.wants(c.id, e.site),
		WantSystem: s.systems.wants(c.id, e.site),
	}, nil
}

// activate notes the node's first call with its certificate.
func (s *Server) activate(ctx context.Context, tenant string, c nodeCaller, now time.Time) (nodeEntry, error) {
	var n fleet.Node
	err := s.store.Update(ctx, func(t store.Tx) error {
		var err error
		if n, err = t.Node(tenant, c.id); err != nil || n.State != fleet.NodeApproved {
			return err
		}
		if n.State, err = n.State.MoveTo(fleet.NodeActive); err != nil {
			return err
		}
		n.Source = c.source
		if n, err = t.PutNode(n); err != nil {
			return err
		}
		by := act{actor: "node:" + string(c.id), source: c.source, now: now}
		if err := by.record(t, tenant, audit.NodeActivated, "node/"+string(c.id), nil, nil, ""); err != nil {
			return err
		}
		_, err = t.AddEvent(fleet.Event{Tenant: tenant, Time: now, Kind: "node.active", Node: n.ID, Site: n.Site, MAC: macOf(n.Hardware), Text: n.Words + " has called with its certificate"})
		return err
	})
	if err != nil {
		return nodeEntry{}, err
	}
	s.index.put(n)
	s.hub.changed(eventsTopic(tenant))
	e, _ := s.index.get(c.id)
	return e, nil
}
