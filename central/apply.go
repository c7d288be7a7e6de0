package central

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/declare"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Outcomes of a document.
const (
	docCreated   = "created"
	docChanged   = "changed"
	docUnchanged = "unchanged"
)

// applying is one call.
type applying struct {
	docs     [][]byte
	dry      bool
	noReturn bool
	reason   string
}

// applied is what became of one document.
type applied struct {
	index         int
	doc           *declare.Document
	outcome       string
	generation    int64
	before, after []byte
	notes         []string
}

// docProblem is a problem of one document.
type docProblem struct {
	index int
	declare.Problem
	conflict bool
}

// maxRestarts bounds how often a dry run begins anew without a document that
// failed in the middle of its changes.
const maxRestarts = 16

// apply brings objects to what documents say.
func (s *Server) apply(ctx context.Context, c caller, q applying) (done []applied, problems []docProblem, more bool, err error) {
	docs := make([]*declare.Document, len(q.docs))
	for i, b := range q.docs {
		d, bad := declare.Parse(b)
		if len(bad) == 0 {
			docs[i] = d
		}
		for _, p := range bad {
			problems = append(problems, docProblem{index: i, Problem: p})
		}
	}
	if q.dry {
		done, bad, more, err := s.tryAll(ctx, c, q, docs)
		return done, append(problems, bad...), more, err
	}
	if len(problems) > 0 {
		return nil, problems, false, nil
	}
	for i, d := range docs {
		var one applied
		var bad []docProblem
		err := s.store.Update(ctx, func(t store.Tx) error {
			one, bad, err = s.applyOne(t, c, i, d, q)
			if err == nil && len(bad) > 0 {
				return errUndo
			}
			failpoint.Hit("apply.before-commit")
			return err
		})
		if errors.Is(err, errUndo) {
			return done, bad, i+1 < len(docs), nil
		}
		if err != nil {
			return done, nil, false, err
		}
		failpoint.Hit("apply.after-commit")
		done = append(done, one)
		if one.outcome == docUnchanged {
			continue
		}
		s.hub.changed(eventsTopic(c.Tenant))
		if d.Kind == declare.Site {
			s.installs(ctx, c.Tenant, d.Metadata.Name)
		}
		s.log.Info("document applied", logObject, d.ID(), logActor, c.actor())
	}
	return done, nil, false, nil
}

// tryAll applies all documents in one transaction and undoes it, so that each
// sees those before it. One that fails in the middle of its changes is left out
// of a new transaction.
func (s *Server) tryAll(ctx context.Context, c caller, q applying, docs []*declare.Document) (done []applied, problems []docProblem, more bool, err error) {
	failed := make(map[int]bool)
	for range maxRestarts {
		again := false
		err := s.store.Update(ctx, func(t store.Tx) error {
			done, again = nil, false
			for i, d := range docs {
				if d == nil || failed[i] {
					continue
				}
				w := &writes{Tx: t}
				one, bad, err := s.applyOne(w, c, i, d, q)
				if err != nil {
					return err
				}
				if len(bad) == 0 {
					done = append(done, one)
					continue
				}
				failed[i] = true
				problems = append(problems, bad...)
				if again = w.some; again {
					break
				}
			}
			return errUndo
		})
		if !errors.Is(err, errUndo) {
			return nil, nil, false, err
		}
		if !again {
			return done, problems, false, nil
		}
	}
	return done, problems, true, nil
}

// writes notes whether anything was written: every act begins with one of
// these.
type writes struct {
	store.Tx
	some bool
}

func (w *writes) PutSite(v fleet.Site) (fleet.Site, error) {
	w.some = true
	return w.Tx.PutSite(v)
}

func (w *writes) PutNode(v fleet.Node) (fleet.Node, error) {
	w.some = true
	return w.Tx.PutNode(v)
}

func (w *writes) PutStack(v fleet.Stack) (fleet.Stack, error) {
	w.some = true
	return w.Tx.PutStack(v)
}

func (w *writes) PutPreApproval(v fleet.PreApproval) (fleet.PreApproval, error) {
	w.some = true
	return w.Tx.PutPreApproval(v)
}

func (w *writes) AddStackVersion(v store.StackVersion) error {
	w.some = true
	return w.Tx.AddStackVersion(v)
}

func (w *writes) NextVersion() (fleet.DocVersion, error) {
	w.some = true
	return w.Tx.NextVersion()
}

func (w *writes) AddAudit(r fleet.AuditRecord) (fleet.AuditRecord, error) {
	w.some = true
	return w.Tx.AddAudit(r)
}

// applyOne applies one document. What a person can mend are problems; the
// error is for the rest.
func (s *Server) applyOne(t store.Tx, c caller, index int, d *declare.Document, q applying) (applied, []docProblem, error) {
	a := applyOne{Server: s, t: t, part: c.part(t), by: c.act(s.cfg.Now()), applying: q, doc: d, out: applied{index: index, doc: d, outcome: docUnchanged}}
	err := a.run()
	var found *foundProblems
	if err != nil && !errors.As(err, &found) {
		p, conflict, known := problemFor(d, err)
		if !known {
			return a.out, nil, err
		}
		return a.out, []docProblem{{index, p, conflict}}, nil
	}
	if found != nil {
		var out []docProblem
		for _, p := range found.list {
			p.Text = text.Clean(p.Text, maxReason)
			out = append(out, docProblem{index: index, Problem: p})
		}
		return a.out, out, nil
	}
	return a.out, nil, nil
}

// problemFor turns an error that a person can do something about into a
// problem.
func problemFor(d *declare.Document, err error) (p declare.Problem, conflict, known bool) {
	var (
		refused *enroll.Refused
		none    *errNoSuch
		coded   *connect.Error
		old     *errOld
	)
	switch {
	case errors.As(err, &old):
		return declare.Problem{Path: "metadata.generation", Text: old.Error()}, true, true
	case errors.As(err, &refused):
		p.Text = strings.TrimPrefix(refused.Error(), "enroll: refused: ")
	case errors.As(err, &none):
		p.Text = none.Error()
	case errors.As(err, &coded):
		p.Text = coded.Message()
	case errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrExists):
		p.Text, conflict = d.ID()+" was changed by somebody else just now: apply it again", true
	default:
		return p, false, false
	}
	p.Text = text.Clean(p.Text, maxReason)
	return p, conflict, true
}

// errOld: the document was made from an older state.
type errOld struct {
	id       string
	from, is int64
	by       string
}

func (e *errOld) Error() string {
	return fmt.Sprintf("%s is at generation %d, and the document was made from %d: somebody has changed it since (`muster audit` says who). Look at what is there (muster export %s), take it over, and give that generation, or none", e.id, e.is, e.from, e.by)
}

// foundProblems are problems with their places.
type foundProblems struct{ list []declare.Problem }

func (e *foundProblems) Error() string { return fmt.Sprint(e.list) }

// applyOne is the application of one document in a transaction.
type applyOne struct {
	*Server
	*part
	applying
	t   store.Tx
	by  act
	doc *declare.Document
	out applied
}

func (a *applyOne) run() error {
	switch a.doc.Kind {
	case declare.Site:
		return a.site()
	case declare.Stack:
		return a.stack()
	case declare.StackVersion:
		return a.version()
	case declare.Assignment:
		return a.assignment()
	case declare.PreApprovalRule:
		return a.rule()
	}
	return invalid("kind %.40q is not known here", a.doc.Kind)
}

// unmoved refuses a document that was made from another generation than is
// there. It is asked when something would change: a document that says what is
// so already is right, however old it is.
func (a *applyOne) unmoved(generation int64) error {
	if from := a.doc.Metadata.Generation; from != 0 && from != generation {
		return &errOld{id: a.doc.ID(), from: from, is: generation, by: string(a.doc.Kind) + " " + a.doc.Metadata.Name}
	}
	return nil
}

// fresh refuses a document that was made from an object that is gone.
func (a *applyOne) fresh() error {
	if a.doc.Metadata.Generation != 0 {
		return &foundProblems{[]declare.Problem{{Path: "metadata.generation", Text: "there is no " + a.doc.ID() + " any more: without a generation it is made anew"}}}
	}
	return nil
}

// labels are what the document says of them, or what there is.
func (a *applyOne) labels(there map[string]string) map[string]string {
	if !a.doc.HasLabels() {
		return there
	}
	if maps.Equal(there, a.doc.Metadata.Labels) {
		return there
	}
	return a.doc.Metadata.Labels
}

// over brings a specification to what the document says.
func (a *applyOne) over(spec, defaults any) error {
	if p := a.doc.Over(spec, defaults); len(p) > 0 {
		return &foundProblems{p}
	}
	return nil
}

func (a *applyOne) found(err error) error {
	if err == nil {
		return nil
	}
	return &foundProblems{a.doc.Find(err)}
}

func (a *applyOne) write(kind declare.Kind, m declare.Metadata, spec any) ([]byte, error) {
	return declare.Write(kind, m, spec)
}

func siteDocument(v fleet.Site) ([]byte, error) {
	return declare.Write(declare.Site, declare.Metadata{Name: v.Name, Labels: v.Labels, Generation: v.Generation}, declare.OfSite(v))
}

func (a *applyOne) site() error {
	t, name := a.t, a.doc.Metadata.Name
	tenant, err := t.Tenant(a.Tenant)
	if err != nil {
		return err
	}
	old, err := t.Site(a.Tenant, name)
	create := errors.Is(err, store.ErrNotFound)
	switch {
	case create:
		old = fleet.Site{Meta: fleet.Meta{Tenant: a.Tenant, Name: name}}
		if err := a.fresh(); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		if err := a.may(access.Site, access.Change, name); err != nil {
			return err
		}
	}
	spec, defaults := declare.OfSite(old), declare.OfSite(fleet.Site{})
	if err := a.over(&spec, &defaults); err != nil {
		return err
	}
	site := old
	site.Labels, site.Title, site.Location = a.labels(old.Labels), spec.Title, spec.Location
	// For a site for which nobody chose, the defaults are no choice.
	if set := spec.Settings(); !sameJSON(set, old.Spec.Chosen()) {
		site.Spec.Settings = &set
		if err := a.found(set.Validate()); err != nil {
			return err
		}
		if err := checkSettings(t, tenant, set); err != nil {
			return err
		}
	}
	if err := a.siteStack(&site, spec.Stack); err != nil {
		return err
	}
	if create {
		if err := a.mayMake(site); err != nil {
			return err
		}
		made, _, why, err := a.makeSite(t, a.by, site, a.reason)
		if err != nil {
			return err
		}
		if made.Spec.StackRef() != nil {
			if err := stackEvent(t, a.by, made); err != nil {
				return err
			}
		}
		return a.wroteSite(docCreated, nil, made, why)
	}
	if sameJSON(wanted4audit(old), wanted4audit(site)) {
		a.out.generation = old.Generation
		return nil
	}
	if err := a.unmoved(old.Generation); err != nil {
		return err
	}
	changed, err := a.rewriteSite(t, a.by, a.part, old, site, a.reason)
	if err != nil {
		return err
	}
	return a.wroteSite(docChanged, &old, changed.site, changed.why)
}

func (a *applyOne) wroteSite(outcome string, old *fleet.Site, site fleet.Site, why string) (err error) {
	a.out.outcome, a.out.generation = outcome, site.Generation
	if why != "" {
		a.out.notes = append(a.out.notes, "no charter can be signed yet: "+text.Clean(why, maxSentence))
	}
	if old != nil {
		if a.out.before, err = siteDocument(*old); err != nil {
			return err
		}
	}
	a.out.after, err = siteDocument(site)
	return err
}

// siteStack brings what the site shall run to "NAME@VERSION", or to nothing.
func (a *applyOne) siteStack(site *fleet.Site, want string) error {
	ref := site.Spec.StackRef()
	switch {
	case want == "" && ref == nil, ref != nil && want == ref.ID():
		return nil
	case want == "":
		site.Spec.Stack, site.Spec.Version, site.Spec.StackSHA256 = "", "", nil
		return nil
	}
	at := func(err error) error {
		p, _, known := problemFor(a.doc, err)
		if !known {
			return err
		}
		p.Path = "spec.stack"
		return &foundProblems{[]declare.Problem{p}}
	}
	name, version, _ := declare.SplitVersion(want)
	v, r, err := a.assignableVersion(a.t, a.Tenant, name, version)
	if err != nil {
		return at(err)
	}
	why, err := a.assignable(a.t, *site, &v, a.noReturn)
	if err != nil {
		return err
	}
	if why != nil {
		return at(why)
	}
	site.Spec.Stack, site.Spec.Version, site.Spec.StackSHA256 = r.Name, r.Version, r.SHA256
	return nil
}

func stackDocument(k fleet.Stack) ([]byte, error) {
	return declare.Write(declare.Stack, declare.Metadata{Name: k.Name, Labels: k.Labels, Generation: k.Generation}, declare.StackSpec{Title: k.Title})
}

func (a *applyOne) stack() (err error) {
	if err := a.may(access.Stack, access.Change, ""); err != nil {
		return err
	}
	t, name := a.t, a.doc.Metadata.Name
	old, err := t.Stack(a.Tenant, name)
	create := errors.Is(err, store.ErrNotFound)
	if err != nil && !create {
		return err
	}
	spec := declare.StackSpec{Title: old.Title}
	if err := a.over(&spec, &declare.StackSpec{}); err != nil {
		return err
	}
	k, kind, before := old, audit.StackChanged, any(map[string]any{"title": old.Title, "labels": old.Labels})
	k.Title, k.Labels = spec.Title, a.labels(old.Labels)
	switch {
	case create:
		if err := a.fresh(); err != nil {
			return err
		}
		k.Meta = fleet.Meta{Tenant: a.Tenant, Name: name, Labels: k.Labels, Created: a.by.now}
		a.out.outcome, kind, before = docCreated, audit.StackCreated, nil
	case k.Title == old.Title && maps.Equal(k.Labels, old.Labels):
		a.out.generation = old.Generation
		return nil
	default:
		if err := a.unmoved(old.Generation); err != nil {
			return err
		}
		if a.out.before, err = stackDocument(old); err != nil {
			return err
		}
		a.out.outcome = docChanged
	}
	k.Generation++
	k.Updated = a.by.now
	if err := a.found(k.Validate()); err != nil {
		return err
	}
	if k, err = t.PutStack(k); err != nil {
		return err
	}
	a.out.generation = k.Generation
	if a.out.after, err = stackDocument(k); err != nil {
		return err
	}
	return a.by.record(t, a.Tenant, kind, "stack/"+name, before, map[string]any{"title": k.Title, "labels": k.Labels}, a.reason)
}

// versionSummary stands for the envelope where people compare.
type versionSummary struct {
	SHA256    fleet.HexBytes `json:"sha256"`
	K3s       string         `json:"k3s"`
	EtcdMinor string         `json:"etcd_minor"`
	Images    []string       `json:"images"`
	KeyID     string         `json:"key_id"`
}

func (a *applyOne) version() error {
	if err := a.may(access.Stack, access.Change, ""); err != nil {
		return err
	}
	var spec declare.StackVersionSpec
	if err := a.over(&spec, &declare.StackVersionSpec{}); err != nil {
		return err
	}
	if spec.File != "" {
		return &foundProblems{[]declare.Problem{{Path: "spec.file", Text: "the centre cannot read your files: give the envelope, or use muster apply"}}}
	}
	if len(spec.Envelope) > fleet.MaxEnvelope {
		return &foundProblems{[]declare.Problem{{Path: "spec.envelope", Text: fmt.Sprintf("the signed version has %d bytes, at most %d are allowed", len(spec.Envelope), fleet.MaxEnvelope)}}}
	}
	v, created, warnings, err := a.publishIn(a.t, a.by, a.Tenant, spec.Envelope, a.reason)
	if err != nil {
		return err
	}
	said, err := versionOf(v)
	if err != nil {
		return err
	}
	if said.ID() != a.doc.Metadata.Name {
		return &foundProblems{[]declare.Problem{{Path: "metadata.name", Text: fmt.Sprintf("what was signed is %s: the name says something else", said.ID())}}}
	}
	a.out.notes = append(a.out.notes, warnings...)
	if !created {
		return nil
	}
	a.out.outcome = docCreated
	sum := versionSummary{SHA256: v.SHA256, K3s: said.K3s, EtcdMinor: said.EtcdMinor, KeyID: v.KeyID}
	for _, i := range said.Images {
		sum.Images = append(sum.Images, i.ID()+" "+i.Arch)
	}
	a.out.after, err = a.write(declare.StackVersion, declare.Metadata{Name: said.ID()}, sum)
	return err
}

func assignmentDocument(n fleet.Node) ([]byte, error) {
	spec := declare.AssignmentSpec{Site: n.Site, RoleHint: declare.HintWorker}
	if n.MayServe {
		spec.RoleHint = declare.HintServer
	}
	return declare.Write(declare.Assignment, declare.Metadata{Name: string(n.ID), Labels: n.Labels, Generation: n.Generation}, spec)
}

func (a *applyOne) assignment() error {
	t := a.t
	old, err := a.findNode(a.doc.Metadata.Name)
	if err != nil {
		return err
	}
	var spec declare.AssignmentSpec
	if err := a.over(&spec, &declare.AssignmentSpec{}); err != nil {
		return err
	}
	if spec.RoleHint == "" {
		spec.RoleHint = declare.HintServer
		if old.Site == spec.Site && !old.MayServe {
			spec.RoleHint = declare.HintWorker
		}
	}
	labels, worker := a.labels(old.Labels), spec.RoleHint == declare.HintWorker
	if old.Admitted() && old.State != fleet.NodeDenied && old.Site == spec.Site && old.MayServe == !worker && maps.Equal(labels, old.Labels) {
		a.out.generation = old.Generation
		return a.may(access.Node, access.Read, old.Site)
	}
	if err := a.unmoved(old.Generation); err != nil {
		return err
	}
	if labels == nil {
		labels = map[string]string{}
	}
	n, _, _, err := a.assignIn(t, a.by, a.caller, assignment{id: string(old.ID), site: spec.Site, reason: a.reason, worker: worker, labels: labels})
	if err != nil {
		return err
	}
	a.out.outcome, a.out.generation = docChanged, n.Generation
	if old.Site == "" {
		a.out.outcome = docCreated
	} else if a.out.before, err = assignmentDocument(old); err != nil {
		return err
	}
	a.out.after, err = assignmentDocument(n)
	return err
}

func ruleDocument(p fleet.PreApproval) ([]byte, error) {
	return declare.Write(declare.PreApprovalRule, declare.Metadata{Name: p.Name, Generation: p.Generation}, declare.OfRule(p))
}

func (a *applyOne) rule() error {
	t, name := a.t, a.doc.Metadata.Name
	old, err := t.PreApproval(a.Tenant, name)
	create := errors.Is(err, store.ErrNotFound)
	if err != nil && !create {
		return err
	}
	if !create {
		sees, err := a.sees(access.PreApproval, old.Site)
		switch {
		case err != nil:
			return err
		case !sees:
			return &errNoSuch{fmt.Sprintf("there is no pre-approval %.80q for you in tenant %s, and the name is taken", name, a.Tenant), "give another name"}
		case old.Kind != fleet.PreApproveRule:
			return &enroll.Refused{Why: fmt.Sprintf("the pre-approval %s is of kind %s, not a rule", name, old.Kind), Do: "give another name"}
		case old.Withdrawn:
			return &enroll.Refused{Why: fmt.Sprintf("the rule %s was removed, and stays so", name), Do: "give another name"}
		}
		if err := a.may(access.PreApproval, access.Change, old.Site); err != nil {
			return err
		}
	}
	spec := declare.OfRule(old)
	defaults := declare.PreApprovalRuleSpec{NotAfter: a.by.now.Add(preApprovalLife).UTC()}
	if create {
		spec = defaults
	}
	if err := a.over(&spec, &defaults); err != nil {
		return err
	}
	p := spec.Rule(old)
	if err := a.may(access.PreApproval, access.Change, p.Site); err != nil {
		return err
	}
	if p.Site == "" {
		return &foundProblems{[]declare.Problem{{Path: "spec", Text: "site is missing: a rule belongs to one"}}}
	}
	if p.NotAfter.After(a.by.now.Add(maxPreApproval)) {
		return &foundProblems{[]declare.Problem{{Path: "spec.not_after", Text: fmt.Sprintf("a pre-approval holds for at most %d days", int(maxPreApproval.Hours()/24))}}}
	}
	if create {
		return a.newRule(p)
	}
	if sameJSON(declare.OfRule(old), declare.OfRule(p)) {
		a.out.generation = old.Generation
		return nil
	}
	if err := a.unmoved(old.Generation); err != nil {
		return err
	}
	if _, err := a.ensureSite(t, a.by, a.Tenant, p.Site, false); err != nil {
		return err
	}
	p.Generation++
	p.Updated = a.by.now
	if err := a.found(p.Validate()); err != nil {
		return err
	}
	if p, err = t.PutPreApproval(p); err != nil {
		return err
	}
	a.out.outcome, a.out.generation = docChanged, p.Generation
	if a.out.before, err = ruleDocument(old); err != nil {
		return err
	}
	if a.out.after, err = ruleDocument(p); err != nil {
		return err
	}
	return a.by.record(t, a.Tenant, audit.PreApprovalChanged, "pre-approval/"+p.Name, old, p, a.reason)
}

func (a *applyOne) newRule(p fleet.PreApproval) error {
	if err := a.fresh(); err != nil {
		return err
	}
	if _, err := a.ensureSite(a.t, a.by, a.Tenant, p.Site, false); err != nil {
		return err
	}
	p.Meta = fleet.Meta{Tenant: a.Tenant, Name: a.doc.Metadata.Name, Generation: 1}
	if err := a.found(p.Validate()); err != nil {
		return err
	}
	p, err := addPreApproval(a.t, a.by, p, a.reason)
	if err != nil {
		return err
	}
	a.out.outcome, a.out.generation = docCreated, p.Generation
	a.out.after, err = ruleDocument(p)
	return err
}
