// Package papers keeps the signed documents of a node's site on disk: charter,
// admissions, removals, orders and cluster records, each as the envelope it
// came in. What is in it was verified; what was acknowledged survives a power
// cut at any write. It needs no centre and believes no clock.
//
// It talks to nobody: who learned what from whom is the caller's matter, as is
// doing what an order says.
package papers

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Bounds of what is kept, all enforced by Learn. The centre's own limit of
// nodes per site is far below.
const (
	// MaxEnvelope is the largest envelope in bytes.
	MaxEnvelope = fleet.MaxEnvelope
	// MaxFacts bounds admissions and removals together.
	MaxFacts = 4096
	// MaxOrders bounds the orders of this node, and those of all others.
	MaxOrders = 64
	// MaxRecords bounds the clusters of the site whose record is kept.
	MaxRecords = 16
	// MaxBytes bounds all envelopes together.
	MaxBytes = 32 << 20
)

// Config says whose papers these are.
type Config struct {
	// Dir is made if it is missing (mode 0700).
	Dir string
	// OrdersKeys are trusted for every document, for ever: those of site.json.
	OrdersKeys []crypto.PublicKey
	// Node is this node, Key SHA-256 over the PKIX DER of its LDevID key.
	Node fleet.NodeID
	Key  Ref
	// Tenant and Site: "" means those of this node's own Admission, and that
	// nothing is learned before it.
	Tenant, Site string
	// Log gets a line for each document that is refused; default: none.
	Log *slog.Logger
}

// Validate reports all problems.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("papers: config: "+what))
		}
	}
	check(c.Dir != "", "dir is missing")
	check(len(c.OrdersKeys) > 0, "there is no orders key, so that no document could be verified")
	check(c.Node.Validate() == nil, "node is no node ID")
	check(c.Key != Ref{}, "key is missing")
	check(c.Tenant == "" || fleet.ValidateName("tenant", c.Tenant) == nil, "tenant is no name")
	check(c.Site == "" || fleet.ValidateName("site", c.Site) == nil, "site is no name")
	return errors.Join(errs...)
}

// Ref names a document by SHA-256 of its payload, or a key by SHA-256 of its
// PKIX DER.
type Ref [sha256.Size]byte

// String is hex.
func (r Ref) String() string { return fmt.Sprintf("%x", r[:]) }

// Refused says why one envelope was not taken. It is no fault: the others of
// the same Learn were.
type Refused struct {
	// Ref is that of the payload; zero if the envelope could not be read.
	Ref  Ref
	Kind string
	Why  error
}

// Error implements error.
func (r *Refused) Error() string {
	return fmt.Sprintf("papers: refuse %s %.8s: %v", r.Kind, r.Ref, r.Why)
}

// Unwrap returns the reason.
func (r *Refused) Unwrap() error { return r.Why }

// Standing is what a key is to this site.
type Standing uint8

const (
	// Unknown: no admission names it.
	Unknown Standing = iota
	// Admitted: the newest admission of its node names it, and stands.
	Admitted
	// Removed: it was admitted once and is no longer.
	Removed
)

// Papers are the documents of one node. Methods may be called by anybody at
// any time.
type Papers struct {
	cfg  Config
	keys map[string]crypto.PublicKey // orders keys by KeyID

	// learn is held from verifying to the end of flushing, so that two calls
	// write in turn; mu only to read or exchange what follows.
	learn sync.Mutex

	mu      sync.Mutex
	set     *set
	changed chan struct{}
}

// Open reads the papers in cfg.Dir. A file that does not verify any more is
// left where it is and not used: an image with older keys must not destroy
// what a newer one can read.
func Open(cfg Config) (*Papers, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Papers{cfg: cfg, keys: map[string]crypto.PublicKey{}, changed: make(chan struct{})}
	for _, k := range cfg.OrdersKeys {
		id, err := statement.KeyID(k)
		if err != nil {
			return nil, fmt.Errorf("papers: config: orders key: %w", err)
		}
		p.keys[id] = k
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("papers: make directory: %w", err)
	}
	held, err := readAll(cfg.Dir)
	if err != nil {
		return nil, err
	}
	l := p.learning(newSet(cfg.Tenant, cfg.Site), true)
	l.all(held)
	for _, r := range l.refused {
		cfg.Log.Warn("a document on disk is not used", slog.String(keyKind, r.Kind), slog.Any(keyWhy, r.Why))
	}
	p.set = l.set
	p.set.finish()
	return p, nil
}

// Constant keys of log lines.
const (
	keyKind = "kind"
	keyRef  = "ref"
	keyWhy  = "why"
)

// Learn verifies each envelope, merges it and flushes what is new before it
// returns how many that were. Envelopes that are refused cost nothing but a
// *Refused in the joined error; any other error is a fault of the disk, after
// which nothing of this call is acknowledged.
func (p *Papers) Learn(envelopes [][]byte) (learned int, err error) {
	p.learn.Lock()
	defer p.learn.Unlock()
	before := p.now()
	l := p.learning(before.clone(), false)
	l.all(envelopes)
	errs := make([]error, 0, len(l.refused))
	for _, r := range l.refused {
		p.cfg.Log.Info("document refused", slog.String(keyKind, r.Kind), slog.String(keyRef, r.Ref.String()), slog.Any(keyWhy, r.Why))
		errs = append(errs, r)
	}
	if l.learned == 0 {
		return 0, errors.Join(errs...)
	}
	l.set.finish()
	if err := l.set.flush(p.cfg.Dir, before); err != nil {
		return 0, errors.Join(append([]error{err}, errs...)...)
	}
	p.mu.Lock()
	p.set = l.set
	close(p.changed)
	p.changed = make(chan struct{})
	p.mu.Unlock()
	return l.learned, errors.Join(errs...)
}

// now returns the set in force, which nobody changes.
func (p *Papers) now() *set {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.set
}

// Documents is what the planner reads. It is never changed in place.
func (p *Papers) Documents() clusterbootstrap.Documents { return p.now().documents }

// Site is the tenant and site these papers belong to, "" while no own
// admission has said it.
func (p *Papers) Site() (tenant, site string) { s := p.now(); return s.tenant, s.site }

// Revision changes whenever the papers do, whatever the order of arrival: two
// nodes that hold the same documents have the same revision.
func (p *Papers) Revision() uint64 { return p.now().revision }

// Changed returns a channel that is closed at the next change.
func (p *Papers) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// Refs names all documents, sorted.
func (p *Papers) Refs() []Ref { return p.now().refs }

// Envelopes returns the envelopes of those refs that are held.
func (p *Papers) Envelopes(refs []Ref) [][]byte {
	s := p.now()
	var out [][]byte
	for _, r := range refs {
		if d := s.byRef[r]; d != nil {
			out = append(out, d.envelope)
		}
	}
	return out
}

// Missing returns those of refs that are not held.
func (p *Papers) Missing(refs []Ref) []Ref {
	s := p.now()
	var out []Ref
	for _, r := range refs {
		if s.byRef[r] == nil {
			out = append(out, r)
		}
	}
	return out
}

// Shown are the envelopes of a hello; nil for what there is not.
type Shown struct{ Charter, Admission, Record []byte }

// Hello returns what node shows of itself: the charter, its newest admission,
// and the record of the cluster uid.
func (p *Papers) Hello(node fleet.NodeID, uid string) (out Shown) {
	s := p.now()
	if d := s.docs[charterFile]; d != nil {
		out.Charter = d.envelope
	}
	if a, ok := s.documents.Admitted(node); ok {
		out.Admission = s.docs[factFile(admissionPrefix, a.Node, a.Incarnation)].envelope
	}
	if d := s.docs[recordPrefix+uid+suffix]; d != nil {
		out.Record = d.envelope
	}
	return out
}

// Standing says what the owner of an LDevID key is to this site now.
func (p *Papers) Standing(key Ref) (fleet.Admission, Standing) { return p.now().standing(key) }

// Orders returns the orders for this node that end after now, oldest version
// first.
func (p *Papers) Orders(now time.Time) []fleet.Order {
	var out []fleet.Order
	for _, d := range p.now().docs {
		if o := d.order; o != nil && o.Node == p.cfg.Node && now.Before(o.NotAfter) {
			out = append(out, *o)
		}
	}
	slices.SortFunc(out, func(a, b fleet.Order) int {
		return cmp.Or(a.Version.Compare(b.Version), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// Mandate returns the newest order for this node that ends after now and tells
// the planner something that is not done yet; nil if there is none.
func (p *Papers) Mandate(now time.Time) *clusterbootstrap.Mandate {
	docs := p.Documents()
	for _, o := range slices.Backward(p.Orders(now)) {
		m := clusterbootstrap.Mandate{ID: o.ID, UID: o.Cluster, Epoch: o.Epoch, Snapshot: o.Snapshot, Into: o.Into, NotAfter: o.NotAfter}
		r, known := docs.Newest(o.Cluster)
		switch o.Kind {
		case fleet.OrderFound:
			m.Kind = clusterbootstrap.MandateFound
		case fleet.OrderReset:
			m.Kind = clusterbootstrap.MandateReset
		case fleet.OrderRestore:
			m.Kind = clusterbootstrap.MandateRestore
		case fleet.OrderDissolve:
			m.Kind = clusterbootstrap.MandateDissolve
		default:
			continue
		}
		// A cluster that has reached the order's epoch has been through it.
		if known && o.Epoch != 0 && r.Epoch >= o.Epoch || known && o.Into != "" && r.Into == o.Into {
			continue
		}
		return &m
	}
	return nil
}
