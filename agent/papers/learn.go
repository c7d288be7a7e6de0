package papers

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Kinds in the order in which they are looked at: a charter says who may sign
// admissions, these say who may sign records.
var kinds = []string{fleet.CharterPayload, fleet.AdmissionPayload, fleet.RemovalPayload, fleet.ClusterRecordPayload, fleet.OrderPayload}

var kindNames = map[string]string{fleet.CharterPayload: "charter", fleet.AdmissionPayload: "admission",
	fleet.RemovalPayload: "removal", fleet.ClusterRecordPayload: "record", fleet.OrderPayload: "order"}

// learning is one call of Learn or Open at work on a set of its own.
type learning struct {
	p   *Papers
	set *set
	// ours: the documents come from this node's disk, so that they were
	// verified when they were learned.
	ours    bool
	learned int
	refused []*Refused
}

func (p *Papers) learning(s *set, ours bool) *learning { return &learning{p: p, set: s, ours: ours} }

// parsed is an envelope that could be read; nothing of it is verified.
type parsed struct {
	raw []byte
	env statement.Envelope
	ref Ref
}

// all looks at envelopes kind by kind.
func (l *learning) all(envelopes [][]byte) {
	byKind := map[string][]parsed{}
	seen := map[Ref]bool{}
	for _, raw := range envelopes {
		if len(raw) > MaxEnvelope {
			l.refuse(parsed{}, "envelope", fmt.Errorf("%d bytes, at most %d are allowed", len(raw), MaxEnvelope))
			continue
		}
		e, err := statement.Parse(raw)
		if err != nil {
			l.refuse(parsed{}, "envelope", err)
			continue
		}
		x := parsed{raw: slices.Clone(raw), env: e, ref: sha256.Sum256(e.Payload)}
		whole := Ref(sha256.Sum256(raw))
		switch {
		case kindNames[e.PayloadType] == "":
			l.refuse(x, "envelope", fmt.Errorf("payload type %.80q is none of a site's", e.PayloadType))
		case l.p.set != nil && l.p.set.byRef[x.ref] != nil || seen[whole]:
			// Held already, or here twice. The same payload with another
			// signature is another matter: the bad one must not hide the good.
		default:
			seen[whole] = true
			byKind[e.PayloadType] = append(byKind[e.PayloadType], x)
		}
	}
	if l.set.site == "" {
		l.pin(byKind)
	}
	for _, kind := range kinds {
		for _, x := range byKind[kind] {
			if l.set.site == "" {
				l.refuse(x, kindNames[kind], errNoSite)
				continue
			}
			d, file, err := l.verify(kind, x)
			if err == nil {
				err = l.take(file, d)
			}
			if err != nil {
				l.refuse(x, kindNames[kind], err)
			}
		}
		l.set.index()
	}
}

var errNoSite = errors.New("this node does not know its site yet: its own admission must come first")

func (l *learning) refuse(x parsed, kind string, why error) {
	l.refused = append(l.refused, &Refused{Ref: x.ref, Kind: kind, Why: why})
}

// pin finds tenant and site by this node's own admission, the newest if there
// are several. Its signer may be a delegate of a charter that came with it.
func (l *learning) pin(byKind map[string][]parsed) {
	var best *fleet.Admission
	for _, x := range byKind[fleet.AdmissionPayload] {
		var a fleet.Admission
		if json.Unmarshal(x.env.Payload, &a) != nil || a.Node != l.p.cfg.Node || a.Validate() != nil || Ref(a.LDevIDKey) != l.p.cfg.Key ||
			l.p.cfg.Tenant != "" && a.Tenant != l.p.cfg.Tenant {
			continue
		}
		keys := l.p.keys
		for _, c := range byKind[fleet.CharterPayload] {
			var charter fleet.Charter
			if json.Unmarshal(c.env.Payload, &charter) == nil && charter.Tenant == a.Tenant && charter.Site == a.Site &&
				charter.Validate() == nil && verified(c.env, fleet.CharterPayload, l.p.keys) == nil {
				keys = withDelegates(keys, &charter)
			}
		}
		if verified(x.env, fleet.AdmissionPayload, keys) != nil {
			continue
		}
		if best == nil || a.Incarnation > best.Incarnation || a.Incarnation == best.Incarnation && a.Version.Compare(best.Version) > 0 {
			best = &a
		}
	}
	if best != nil {
		l.set.tenant, l.set.site = best.Tenant, best.Site
	}
}

// verified checks that one of keys signed. A signature is tried only with the
// key that it names, so that a hostile envelope costs few operations.
func verified(e statement.Envelope, kind string, keys map[string]crypto.PublicKey) error {
	_, err := signer(e, kind, keys)
	return err
}

func signer(e statement.Envelope, kind string, keys map[string]crypto.PublicKey) (string, error) {
	for _, s := range e.Signatures {
		k := keys[s.KeyID]
		if k == nil {
			continue
		}
		one := e
		one.Signatures = []statement.Signature{s}
		if _, err := one.VerifiedBy(kind, []crypto.PublicKey{k}); err == nil {
			return s.KeyID, nil
		}
	}
	return "", statement.ErrUntrusted
}

// withDelegates adds the keys that the charter lets sign admissions.
func withDelegates(keys map[string]crypto.PublicKey, c *fleet.Charter) map[string]crypto.PublicKey {
	if c == nil || len(c.Delegates) == 0 {
		return keys
	}
	out := make(map[string]crypto.PublicKey, len(keys)+len(c.Delegates))
	for _, der := range c.Delegates {
		k, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			continue // a kind of key that a newer version knows
		}
		if id, err := statement.KeyID(k); err == nil {
			out[id] = k
		}
	}
	for id, k := range keys {
		out[id] = k
	}
	return out
}

// verify checks signature, form and site, and says which file it is.
func (l *learning) verify(kind string, x parsed) (*doc, string, error) {
	d := &doc{ref: x.ref, envelope: x.raw}
	if kind == fleet.ClusterRecordPayload {
		return l.verifyRecord(d, x)
	}
	keys := l.p.keys
	if kind == fleet.AdmissionPayload || kind == fleet.RemovalPayload {
		keys = withDelegates(keys, l.set.charter())
	}
	by, err := signer(x.env, kind, keys)
	if err != nil {
		return nil, "", err
	}
	if l.p.keys[by] == nil {
		d.delegate, _ = KeyRef(keys[by]) // parsed by the same rules before
	}
	var tenant, site, file string
	switch kind {
	case fleet.CharterPayload:
		d.charter = new(fleet.Charter)
		err = read(x, d.charter, func() error { return d.charter.Validate() })
		tenant, site, file = d.charter.Tenant, d.charter.Site, charterFile
	case fleet.AdmissionPayload:
		d.admission = new(fleet.Admission)
		err = read(x, d.admission, func() error { return d.admission.Validate() })
		tenant, site, file = d.admission.Tenant, d.admission.Site, factFile(admissionPrefix, d.admission.Node, d.admission.Incarnation)
	case fleet.RemovalPayload:
		d.removal = new(fleet.Removal)
		err = read(x, d.removal, func() error { return d.removal.Validate() })
		tenant, site, file = d.removal.Tenant, d.removal.Site, factFile(removalPrefix, d.removal.Node, d.removal.Incarnation)
	case fleet.OrderPayload:
		d.order = new(fleet.Order)
		err = read(x, d.order, func() error { return d.order.Validate() })
		tenant, site, file = d.order.Tenant, d.order.Site, orderPrefix+d.order.ID+suffix
	}
	if err != nil {
		return nil, "", err
	}
	return d, file, l.home(tenant, site)
}

func read(x parsed, into any, validate func() error) error {
	if err := json.Unmarshal(x.env.Payload, into); err != nil {
		return fmt.Errorf("read payload: %w", err)
	}
	return validate()
}

func (l *learning) home(tenant, site string) error {
	if tenant != l.set.tenant || site != l.set.site {
		return fmt.Errorf("it is about site %.80q of tenant %.80q", site, tenant)
	}
	return nil
}

// verifyRecord checks a cluster record. One that this node took before stays
// good when its signer is removed: forgetting a cluster would let a second one
// be founded.
func (l *learning) verifyRecord(d *doc, x parsed) (*doc, string, error) {
	var r fleet.ClusterRecord
	if err := read(x, &r, func() error { return r.Validate() }); err != nil {
		return nil, "", err
	}
	if err := l.home(r.Tenant, r.Site); err != nil {
		return nil, "", err
	}
	_, err := recordSigner(x.raw, x.env, func(key Ref) bool {
		if a, s := l.set.standing(key); s == Admitted {
			return a.MayServe
		}
		return l.ours && slices.ContainsFunc(l.set.documents.Admissions, func(a fleet.Admission) bool {
			return a.MayServe && Ref(a.LDevIDKey) == key
		})
	})
	if err != nil {
		return nil, "", err
	}
	record := toRecord(r)
	d.record = &record
	return d, recordPrefix + r.UID + suffix, nil
}

// take puts a verified document into the set if it is news and if there is
// room.
func (l *learning) take(file string, d *doc) error {
	old := l.set.docs[file]
	if old != nil && !newer(d, old) {
		return nil
	}
	if old == nil {
		if err := l.room(d); err != nil {
			return err
		}
	}
	size := l.set.bytes + len(d.envelope)
	if old != nil {
		size -= len(old.envelope)
	}
	if size > MaxBytes {
		return fmt.Errorf("the papers of this site have more than %d bytes", MaxBytes)
	}
	l.set.put(file, d)
	l.learned++
	if d.charter != nil {
		l.revoke()
	}
	return nil
}

// newer says which of two documents about the same thing stays. It is the rule
// of clusterbootstrap.Documents.Merge, so that all nodes come to the same.
func newer(d, old *doc) bool {
	pick := func(c int, a, b any) bool { return c > 0 || c == 0 && greater(a, b) }
	switch {
	case d.charter != nil:
		return pick(d.charter.Version.Compare(old.charter.Version), d.charter, old.charter)
	case d.admission != nil:
		return pick(d.admission.Version.Compare(old.admission.Version), d.admission, old.admission)
	case d.removal != nil:
		return pick(d.removal.Version.Compare(old.removal.Version), d.removal, old.removal)
	case d.order != nil:
		return pick(d.order.Version.Compare(old.order.Version), d.order, old.order)
	}
	return d.record.Newer(*old.record) || !old.record.Newer(*d.record) && greater(d.record, old.record)
}

// revoke drops what delegates signed who are delegates no longer: the charter
// in force alone says whose word counts, whatever came first.
func (l *learning) revoke() {
	trusted := withDelegates(l.p.keys, l.set.charter())
	for file, d := range l.set.docs {
		if d.delegate != (Ref{}) && trusted[d.delegate.String()] == nil {
			l.set.drop(file)
		}
	}
}

// room says whether there is place for one more document. Of orders, those
// that end first go.
func (l *learning) room(d *doc) error {
	switch {
	case d.admission != nil || d.removal != nil:
		if l.set.count(func(x *doc) bool { return x.admission != nil || x.removal != nil }) >= MaxFacts {
			return fmt.Errorf("there are %d admissions and removals already", MaxFacts)
		}
	case d.record != nil:
		if l.set.count(func(x *doc) bool { return x.record != nil }) >= MaxRecords {
			return fmt.Errorf("there are records of %d clusters already", MaxRecords)
		}
	case d.order != nil:
		mine := d.order.Node == l.p.cfg.Node
		class := func(x *doc) bool { return x.order != nil && (x.order.Node == l.p.cfg.Node) == mine }
		if l.set.count(class) < MaxOrders {
			return nil
		}
		first := ""
		for file, x := range l.set.docs {
			if class(x) && (first == "" || x.order.NotAfter.Before(l.set.docs[first].order.NotAfter)) {
				first = file
			}
		}
		if !l.set.docs[first].order.NotAfter.Before(d.order.NotAfter) {
			return fmt.Errorf("there are %d orders already that end later", MaxOrders)
		}
		l.set.drop(first)
	}
	return nil
}
