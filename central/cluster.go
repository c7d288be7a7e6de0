package central

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Bounds of a cluster report.
const (
	maxRecord    = 64 << 10
	maxOffer     = 8 << 10
	maxOutcomes  = 16
	maxSnapshots = 16
	maxSentence  = 512
	maxWord      = 64
)

var clusterRoles = []string{"none", "worker", "candidate", "server"}

// reportMemory remembers the digest of each node's last cluster report, so
// that one without news costs no database. A node that is not in it is asked.
type reportMemory struct {
	mu     sync.Mutex
	seen   map[fleet.NodeID]reportMark
	writes map[fleet.NodeID]allowance
}

// allowance is how many writes a node may cause just now: a node that turned
// hostile must not fill the audit log or keep the writer busy.
type allowance struct {
	left float64
	at   time.Time
}

const (
	// writeBurst is far above what a forming site needs, writeEvery what a
	// node may cause for ever.
	writeBurst = 30
	writeEvery = 3 * time.Second
)

// mayWrite takes one write from the node's allowance.
func (m *reportMemory) mayWrite(id fleet.NodeID, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, there := m.writes[id]
	if !there {
		a = allowance{left: writeBurst, at: now}
	}
	if passed := now.Sub(a.at); passed > 0 {
		a.left = min(writeBurst, a.left+float64(passed)/float64(writeEvery))
	}
	a.at = now
	may := a.left >= 1
	if may {
		a.left--
	}
	m.writes[id] = a
	return may
}

// forget makes the centre ask the node again.
func (m *reportMemory) forget(id fleet.NodeID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.seen, id)
}

type reportMark struct {
	site   string
	digest [32]byte
}

func newReportMemory() *reportMemory {
	return &reportMemory{seen: make(map[fleet.NodeID]reportMark), writes: make(map[fleet.NodeID]allowance)}
}

func (m *reportMemory) has(id fleet.NodeID, mark reportMark) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen[id] == mark
}

func (m *reportMemory) wants(id fleet.NodeID, site string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	mark, there := m.seen[id]
	return site != "" && (!there || mark.site != site)
}

func (m *reportMemory) note(id fleet.NodeID, mark reportMark) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen[id] = mark
}

// clusterReport takes what a node says of its cluster and its orders. It
// returns the orders whose outcome is on disk.
func (s nodeService) clusterReport(ctx context.Context, c nodeCaller, e nodeEntry, q *musterv1.ReportRequest) (acknowledged []string, err error) {
	if len(q.Outcomes) > maxOutcomes {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d outcomes of orders, at most %d are allowed", len(q.Outcomes), maxOutcomes))
	}
	if q.Cluster == nil && len(q.Outcomes) == 0 {
		return nil, nil
	}
	var mark reportMark
	var news bool
	var report fleet.NodeReport
	var record *fleet.ClusterRecord
	// What goes beyond the allowance is not looked at: the node says it again.
	limited := func() bool {
		if s.reports.mayWrite(c.id, s.cfg.Now()) {
			return false
		}
		s.reports.forget(c.id)
		return true
	}
	if q.Cluster != nil && e.site != "" {
		whole, err := proto.MarshalOptions{Deterministic: true}.Marshal(q.Cluster)
		if err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
		mark = reportMark{site: e.site, digest: sha256.Sum256(whole)}
		if news = !s.reports.has(c.id, mark); news && limited() {
			return nil, nil
		}
		if news {
			if report, err = s.readReport(e, c.id, q.Cluster); err != nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, err)
			}
			if record, err = s.readRecord(ctx, e, c.id, q.Cluster, &report); err != nil {
				return nil, err
			}
		}
	}
	if !news && (len(q.Outcomes) == 0 || limited()) {
		return nil, nil
	}
	err = s.gather.update(ctx, func(t store.Tx) error {
		acknowledged = nil
		by := act{actor: "node:" + string(c.id), source: c.source, now: s.cfg.Now()}
		for _, o := range q.Outcomes {
			if err := s.outcome(t, by, e, c.id, o); err != nil {
				return err
			}
			acknowledged = append(acknowledged, o.Id)
		}
		if news {
			if err := s.noteReport(t, by, report, record); err != nil {
				return err
			}
		}
		failpoint.Hit("report.before-commit")
		return nil
	})
	if err != nil {
		return nil, err
	}
	if news {
		s.reports.note(c.id, mark)
	}
	s.hub.changed(eventsTopic(e.tenant))
	return acknowledged, nil
}

// readReport checks and cleans a report; the record comes later.
func (s nodeService) readReport(e nodeEntry, id fleet.NodeID, m *musterv1.ClusterReport) (fleet.NodeReport, error) {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(len(m.Record) <= maxRecord, "the record has %d bytes, at most %d are allowed", len(m.Record), maxRecord)
	check(len(m.EscrowOffer) <= maxOffer, "the escrow offer has %d bytes, at most %d are allowed", len(m.EscrowOffer), maxOffer)
	check(slices.Contains(clusterRoles, m.Role), "role %.32q is none of %v", m.Role, clusterRoles)
	check(len(m.Snapshots) <= maxSnapshots, "%d snapshots, at most %d are allowed", len(m.Snapshots), maxSnapshots)
	check(max(m.Voters, m.Learners, m.Nodes, m.NodesReady) <= 1<<20, "a count is too large")
	if err := fleet.ValidateLabels(m.NodeLabels); err != nil {
		errs = append(errs, err)
	}
	check(m.Since == nil || m.Since.CheckValid() == nil, "since is no time")
	if err := errors.Join(errs...); err != nil {
		return fleet.NodeReport{}, fmt.Errorf("the cluster report is malformed: %w", err)
	}
	r := fleet.NodeReport{
		Tenant: e.tenant, Site: e.site, Node: id, At: s.cfg.Now().UTC(), Role: m.Role, State: text.Clean(m.State, maxWord),
		Blocker: text.Clean(m.Blocker, maxWord), Reason: text.Clean(m.Reason, maxSentence), Voters: int(m.Voters), Learners: int(m.Learners),
		Nodes: int(m.Nodes), NodesReady: int(m.NodesReady), K3s: text.Clean(m.K3SVersion, maxWord), Charter: api.DocVersion(m.Charter),
		Labels: m.NodeLabels,
	}
	if m.Since != nil {
		r.Since = m.Since.AsTime()
	}
	for _, n := range m.Snapshots {
		r.Snapshots = append(r.Snapshots, text.Clean(n, 256))
	}
	return r, nil
}

// readRecord verifies the record and the escrow offer of a report. What does
// not verify is left out and said, since the rest of the report is as true as
// before.
func (s nodeService) readRecord(ctx context.Context, e nodeEntry, id fleet.NodeID, m *musterv1.ClusterReport, report *fleet.NodeReport) (*fleet.ClusterRecord, error) {
	var record *fleet.ClusterRecord
	err := s.store.View(ctx, func(t store.Reader) error {
		record = nil
		if len(m.EscrowOffer) > 0 {
			offer, err := verifyOffer(t, e, id, m.EscrowOffer)
			switch {
			case err == nil:
				report.Offer, report.Offered = offer.Key, m.EscrowOffer
			case !errors.Is(err, errBadSignature):
				return err
			default:
				s.refusals.say("escrow offer refused", logNode, id, logError, err)
			}
		}
		if len(m.Record) == 0 {
			return nil
		}
		r, err := verifyRecord(t, e, id, m.Record)
		switch {
		case err == nil:
			record = &r
		case !errors.Is(err, errBadSignature):
			return err
		default:
			s.refusals.say("cluster record refused", logNode, id, logError, err)
		}
		return nil
	})
	if record != nil {
		report.UID, report.Epoch, report.Version = record.UID, record.Epoch, record.Version
	}
	return record, err
}

// errBadSignature: a document of a node that nobody has to believe.
var errBadSignature = errors.New("central: refused")

func badSignature(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errBadSignature, fmt.Errorf(format, args...))
}

// keyOf returns the LDevID public key of an admitted node: from the newest
// certificate that was made for it.
func keyOf(t store.Reader, n fleet.Node) (crypto.PublicKey, error) {
	all, err := t.IssuedToNode(n.Tenant, n.ID)
	if err != nil {
		return nil, err
	}
	for _, i := range slices.Backward(all) {
		if !bytes.Equal(i.LDevIDKey, n.LDevIDKey) || len(i.Certificates) == 0 {
			continue
		}
		leaf, err := x509.ParseCertificate(i.Certificates[0])
		if err != nil {
			continue
		}
		if sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo); bytes.Equal(sum[:], n.LDevIDKey) {
			return leaf.PublicKey, nil
		}
	}
	return nil, badSignature("node %s has no certificate", n.ID)
}

// admittedKey is the key of a node that belongs to the site and may serve.
func admittedKey(t store.Reader, e nodeEntry, id fleet.NodeID, serve bool) (crypto.PublicKey, error) {
	if id.Validate() != nil {
		return nil, badSignature("no node ID")
	}
	n, err := t.Node(e.tenant, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, badSignature("node %s is not known", id)
	}
	if err != nil {
		return nil, err
	}
	if n.Site != e.site || !n.Admitted() || n.State == fleet.NodeDenied || serve && !n.MayServe {
		return nil, badSignature("node %s may not speak for site %s", id, e.site)
	}
	return keyOf(t, n)
}

// verifyRecord wants the signature of a server of the site. Which one it was
// is not said in a way that could be trusted, so that those it may be are
// tried: the caller, the founder and the listed servers.
func verifyRecord(t store.Reader, e nodeEntry, caller fleet.NodeID, envelope []byte) (fleet.ClusterRecord, error) {
	var claimed fleet.ClusterRecord
	env, err := statement.Parse(envelope)
	if err != nil {
		return claimed, badSignature("%w", err)
	}
	if err := json.Unmarshal(env.Payload, &claimed); err != nil {
		return claimed, badSignature("the record is no JSON: %w", err)
	}
	if err := claimed.Validate(); err != nil {
		return claimed, badSignature("%w", err)
	}
	if claimed.Tenant != e.tenant || claimed.Site != e.site {
		return claimed, badSignature("the record is of another site")
	}
	ids := append([]fleet.NodeID{caller, claimed.Founder}, claimed.Servers...)
	slices.Sort(ids)
	var keys []crypto.PublicKey
	for _, id := range slices.Compact(ids) {
		key, err := admittedKey(t, e, id, true)
		switch {
		case err == nil:
			keys = append(keys, key)
		case !errors.Is(err, errBadSignature):
			return claimed, err
		}
	}
	if len(keys) == 0 {
		return claimed, badSignature("no server of the record may speak for site %s", e.site)
	}
	if _, err := statement.Verify(envelope, fleet.ClusterRecordPayload, keys); err != nil {
		return claimed, badSignature("%w", err)
	}
	return claimed, nil
}

func verifyOffer(t store.Reader, e nodeEntry, id fleet.NodeID, envelope []byte) (fleet.EscrowOffer, error) {
	var o fleet.EscrowOffer
	key, err := admittedKey(t, e, id, false)
	if err != nil {
		return o, err
	}
	payload, err := statement.Verify(envelope, fleet.EscrowOfferPayload, []crypto.PublicKey{key})
	if err != nil {
		return o, badSignature("%w", err)
	}
	if err := json.Unmarshal(payload, &o); err != nil {
		return o, badSignature("the offer is no JSON: %w", err)
	}
	if err := o.Validate(); err != nil {
		return o, badSignature("%w", err)
	}
	if o.Tenant != e.tenant || o.Site != e.site || o.Node != id {
		return o, badSignature("the offer is another node's")
	}
	return o, nil
}

// noteReport keeps the report and what it says of the site.
func (s nodeService) noteReport(t store.Tx, by act, r fleet.NodeReport, record *fleet.ClusterRecord) error {
	old, err := t.Report(r.Tenant, r.Node)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	first := err != nil || old.Site != r.Site
	if !first {
		same := old
		same.At = r.At
		if sameJSON(same, r) {
			return nil // the centre was restarted; nothing is new
		}
	}
	site, err := t.Site(r.Tenant, r.Site)
	if errors.Is(err, store.ErrNotFound) {
		return nil // it was moved while it spoke
	}
	if err != nil {
		return err
	}
	if err := t.PutReport(r); err != nil {
		return err
	}
	if first && r.Role != "none" || !first && (old.Role != r.Role || old.Blocker != r.Blocker) {
		e := fleet.Event{
			Tenant: r.Tenant, Time: by.now, Kind: "node.cluster", Node: r.Node, Site: r.Site,
			Text: fmt.Sprintf("%s at site %s is %s (%s)", fleet.Words(r.Node), r.Site, r.Role, r.State),
		}
		if r.Blocker != "" {
			e.Level, e.Text = fleet.EventWarning, e.Text+": "+r.Reason
		}
		if _, err := t.AddEvent(cleanEvent(e)); err != nil {
			return err
		}
	}
	was := site
	if record != nil {
		epoch, err := t.Epoch()
		if err != nil {
			return err
		}
		events := mergeRecord(&site, *record, r.Node, epoch)
		for _, e := range events {
			e.Tenant, e.Time, e.Site, e.Node = r.Tenant, by.now, r.Site, r.Node
			if _, err := t.AddEvent(cleanEvent(e)); err != nil {
				return err
			}
		}
		if site.Status.ClusterUID != was.Status.ClusterUID || site.Status.ClusterEpoch != was.Status.ClusterEpoch || site.Status.Second != was.Status.Second {
			if err := by.record(t, r.Tenant, audit.NodeReported, "site/"+r.Site, clusterForAudit(was), clusterForAudit(site), ""); err != nil {
				return err
			}
		}
	}
	reports, err := t.Reports(r.Tenant, r.Site)
	if err != nil {
		return err
	}
	summarise(&site, reports)
	site.Status.Seen = by.now
	_, err = t.PutSite(site)
	return err
}

func clusterForAudit(s fleet.Site) any {
	return map[string]any{"cluster": s.Status.ClusterUID, "epoch": s.Status.ClusterEpoch, "second": s.Status.Second, "ended": s.Ledger.Ended}
}

// mergeRecord brings a verified record into what is known of the site. The
// epoch of a cluster never goes back, and a cluster never takes the place of
// another one but by being dissolved into it or by a person's order.
func mergeRecord(site *fleet.Site, r fleet.ClusterRecord, from fleet.NodeID, epoch uint64) (events []fleet.Event) {
	st := &site.Status
	say := func(level fleet.EventLevel, kind, format string, args ...any) {
		events = append(events, fleet.Event{Level: level, Kind: kind, Text: fmt.Sprintf(format, args...)})
	}
	unsure := site.Ledger.Unsure(epoch)
	known := fleet.ClusterRecord{UID: st.ClusterUID, Epoch: st.ClusterEpoch, Version: st.ClusterVersion}
	take := func() {
		st.ClusterUID, st.ClusterEpoch, st.ClusterVersion, st.Founder, st.Members = r.UID, r.Epoch, r.Version, r.Founder, slices.Clone(r.Servers)
		site.Ledger.Sure, site.Ledger.Doubt = epoch, ""
	}
	switch {
	case site.Ledger.HasEnded(r.UID):
		say(fleet.EventWarning, "site.cluster-ended", "%s still belongs to cluster %s of site %s, which was ended", fleet.Words(from), r.UID, site.Name)
	case r.Into != "" && (r.UID == st.ClusterUID || r.UID == st.Second || st.ClusterUID == ""):
		endCluster(site, r.UID)
		if r.UID == st.ClusterUID || st.ClusterUID == "" {
			st.ClusterUID, st.ClusterEpoch, st.ClusterVersion, st.Founder, st.Members = r.Into, 0, 0, "", nil
		}
		if st.Second == r.UID || st.Second == st.ClusterUID {
			st.Second, st.SecondBy = "", ""
		}
		site.Ledger.Sure, site.Ledger.Doubt = epoch, ""
		say(fleet.EventWarning, "site.cluster-dissolved", "cluster %s of site %s was dissolved into %s", r.UID, site.Name, r.Into)
	case st.ClusterUID == "":
		take()
		say(fleet.EventInfo, "site.cluster-known", "site %s has cluster %s, founded by %s", site.Name, r.UID, fleet.Words(r.Founder))
		if g := site.Ledger.Grant; site.Spec.Chosen().Founding.Mode == fleet.FoundCentral && !unsure && (g == nil || g.Node != r.Founder) {
			say(fleet.EventAlarm, "site.founded-without-grant", "cluster %s of site %s was founded by %s, to whom the centre gave no right", r.UID, site.Name, fleet.Words(r.Founder))
		}
	case r.UID == st.ClusterUID:
		if !r.Newer(known) && st.Founder != "" {
			return events
		}
		raised := r.Epoch > st.ClusterEpoch && st.Founder != ""
		take()
		if raised {
			say(fleet.EventWarning, "site.cluster-reset", "cluster %s of site %s goes on in epoch %d", r.UID, site.Name, r.Epoch)
		}
	case st.Second != r.UID:
		st.Second, st.SecondBy = r.UID, from
		say(fleet.EventAlarm, "site.two-clusters", "site %s has two clusters: %s and %s (shown by %s); muster describe site %s", site.Name, st.ClusterUID, r.UID, fleet.Words(from), site.Name)
	}
	return events
}

func endCluster(site *fleet.Site, uid string) {
	if uid == "" || site.Ledger.HasEnded(uid) {
		return
	}
	ended := append(slices.Clone(site.Ledger.Ended), uid)
	site.Ledger.Ended = ended[max(0, len(ended)-fleet.MaxEndedClusters):]
}

// summarise puts what the nodes say into one line for the site: the word of a
// server counts more than that of others.
func summarise(site *fleet.Site, reports []fleet.NodeReport) {
	servers, workers, blocker, weight := 0, 0, "", -1
	for _, r := range reports {
		w := slices.Index(clusterRoles, r.Role)
		switch r.Role {
		case "server":
			servers++
		case "worker", "candidate":
			workers++
		}
		if r.Blocker != "" && w > weight {
			weight, blocker = w, fmt.Sprintf("%s: %s", fleet.Words(r.Node), r.Reason)
		}
	}
	if site.Status.Second != "" {
		blocker = fmt.Sprintf("two clusters (%s and %s): a person has to decide", site.Status.ClusterUID, site.Status.Second)
	}
	site.Status.Servers, site.Status.Workers, site.Status.Blocker = servers, workers, text.Clean(blocker, maxSentence)
}
