// Package declare is what people write down of what they want: documents such
// as
//
//	apiVersion: muster/v1
//	kind: Site
//	metadata: {name: shop-7, labels: {region: north}}
//	spec: {stack: shop@2027.1, policy: {servers: 3}}
//
// It reads them with all their problems at once, each with the path of the
// field it is about; brings objects to what they say; writes objects as
// documents; and describes them as JSON Schema. What a document does not name
// stays as it is, or is the default of a new object; null is the default.
// Lists and labels are replaced as a whole.
//
// It takes JSON. Package yamldoc makes that of YAML and knows the lines.
package declare

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// APIVersion is the first line of every document.
const APIVersion = "muster/v1"

// Bounds of one document.
const (
	MaxDocument  = 2 << 20
	maxDepth     = 32
	maxNodes     = 100_000
	maxProblems  = 64
	maxKnown     = 16
	hintDistance = 2
)

// Kind is what a document is about.
type Kind string

// The kinds.
const (
	Site            Kind = "Site"
	Stack           Kind = "Stack"
	StackVersion    Kind = "StackVersion"
	Assignment      Kind = "Assignment"
	PreApprovalRule Kind = "PreApprovalRule"
)

// Kinds returns all kinds, in the order in which they depend on each other.
func Kinds() []Kind { return []Kind{Stack, StackVersion, Site, PreApprovalRule, Assignment} }

// KindOf finds a kind by what people call it: "site", "sites", "StackVersion",
// "stack-version".
func KindOf(word string) (Kind, error) {
	plain := func(s string) string {
		return strings.NewReplacer("-", "", "_", "").Replace(strings.TrimSuffix(strings.ToLower(s), "s"))
	}
	for _, k := range Kinds() {
		if plain(string(k)) == plain(word) {
			return k, nil
		}
	}
	return "", fmt.Errorf("declare: kind %.60q is none of %s", word, kindList())
}

func kindList() string {
	var out []string
	for _, k := range Kinds() {
		out = append(out, string(k))
	}
	return strings.Join(out, ", ")
}

// Metadata is the same for all kinds.
type Metadata struct {
	// Name of the object. Of a StackVersion it is STACK@VERSION, of an
	// Assignment the node's ID.
	Name string `json:"name"`
	// Labels of the object. An Assignment has those of the node.
	Labels map[string]string `json:"labels,omitempty"`
	// Generation of the object that the document was made from: if others have
	// changed the object since, nothing is changed. 0: whatever is there.
	Generation int64 `json:"generation,omitempty"`
}

// Document is one document, as far as it was understood.
type Document struct {
	Kind     Kind
	Metadata Metadata
	root     *value
}

// ID is how people name what the document is about: "Site shop-7".
func (d *Document) ID() string { return string(d.Kind) + " " + d.Metadata.Name }

// SiteSpec is what people want of a site.
type SiteSpec struct {
	// Title is a name for people.
	Title string `json:"title"`
	// Location is where the site is.
	Location string `json:"location"`
	// Stack is the stack version (NAME@VERSION) that the site shall run; "":
	// nothing in particular.
	Stack string `json:"stack"`
	// Founding is who may start the site's cluster.
	Founding fleet.Founding `json:"founding"`
	// Policy is how the site grows and heals.
	Policy fleet.SitePolicy `json:"policy"`
	// Birth is fixed for the life of the cluster.
	Birth fleet.BirthSettings `json:"birth"`
	// Images (NAME@VERSION) that may join; none: all that are registered.
	Images []string `json:"images"`
	// AnyBoot lets machines join whatever they run (lab tenants only).
	AnyBoot bool `json:"any_boot"`
	// Delegates are public keys (PKIX DER in base64) that may admit and remove
	// nodes beside the centre.
	Delegates [][]byte `json:"delegates"`
	// Update is when and how nodes go to another version.
	Update *fleet.UpdatePolicy `json:"update"`
	// Install is which disk the centre orders installed when a node comes to
	// the site and the site has a stack; null: a person orders it.
	Install *fleet.DiskRule `json:"install"`
}

// StackSpec is what people want of a stack.
type StackSpec struct {
	// Title is a name for people.
	Title string `json:"title"`
}

// StackVersionSpec is a version as the release key has signed it. One of its
// fields is given.
type StackVersionSpec struct {
	// File holds the signed version, as muster release stack wrote it; the path
	// is relative to the document. Only the CLI follows it.
	File string `json:"file,omitempty"`
	// Envelope is the signed version itself, in base64.
	Envelope []byte `json:"envelope,omitempty"`
}

// AssignmentSpec gives a node to a site.
type AssignmentSpec struct {
	// Site that the node belongs to.
	Site string `json:"site"`
	// RoleHint is server (it may become one) or worker (it never does).
	RoleHint string `json:"role_hint"`
}

// Words of AssignmentSpec.RoleHint.
const (
	HintServer = "server"
	HintWorker = "worker"
)

// PreApprovalRuleSpec approves machines that prove enough.
type PreApprovalRuleSpec struct {
	// Site that the machines come to.
	Site string `json:"site"`
	// NodeLabels are given to the machines.
	NodeLabels map[string]string `json:"node_labels"`
	// MinIdentity is the least trust in the machine's identity: lab, listed or
	// hardware.
	MinIdentity fleet.IdentityTrust `json:"min_identity"`
	// MinBoot is the least trust in what it runs: measured or enforced.
	MinBoot fleet.BootTrust `json:"min_boot"`
	// Vendor and Serials narrow the rule to machines that say these of
	// themselves.
	Vendor  string   `json:"vendor"`
	Serials []string `json:"serials"`
	// Limit caps the machines that it approves, PerDay those of any 24 hours;
	// PerDay 0: no such cap.
	Limit  int `json:"limit"`
	PerDay int `json:"per_day"`
	// NotAfter is when the rule ends; of a new rule 30 days from now.
	NotAfter time.Time `json:"not_after,omitzero"`
}

// Problem is something wrong with a document.
type Problem struct {
	// Path of the field: "spec.policy.servers", "spec.update.windows[0].from".
	Path string `json:"path"`
	Text string `json:"problem"`
}

// String is the problem with its place.
func (p Problem) String() string {
	if p.Path == "" {
		return p.Text
	}
	return p.Path + ": " + p.Text
}

// specs are the specifications of the kinds.
var specs = map[Kind]func() any{
	Site:            func() any { return new(SiteSpec) },
	Stack:           func() any { return new(StackSpec) },
	StackVersion:    func() any { return new(StackVersionSpec) },
	Assignment:      func() any { return new(AssignmentSpec) },
	PreApprovalRule: func() any { return new(PreApprovalRuleSpec) },
}

// Parse reads a document and says all that is wrong with it by itself. The
// document is nil when not even its kind is known.
func Parse(b []byte) (*Document, []Problem) {
	if len(b) > MaxDocument {
		return nil, []Problem{{"", fmt.Sprintf("the document has %d bytes, at most %d are allowed", len(b), MaxDocument)}}
	}
	root, err := parseTree(b)
	if err != nil {
		return nil, []Problem{{"", err.Error()}}
	}
	r := &reading{}
	if root.kind != object {
		r.say("", "want an object with apiVersion, kind, metadata and spec, not %s", root.kind)
		return nil, r.problems
	}
	d := &Document{root: root}
	for _, f := range root.fields {
		if !slices.Contains([]string{"apiVersion", "kind", "metadata", "spec"}, f.name) {
			r.say(Field("", f.name), "unknown field; a document has apiVersion, kind, metadata and spec")
		}
	}
	switch v := root.field("apiVersion"); {
	case v == nil:
		r.say("", "apiVersion is missing: write apiVersion: %s", APIVersion)
	case v.kind != text || v.s != APIVersion:
		r.say("apiVersion", "is %s; this program knows %s", v.show(), APIVersion)
	}
	switch v := root.field("kind"); {
	case v == nil:
		r.say("", "kind is missing: one of %s", kindList())
	case v.kind != text || specs[Kind(v.s)] == nil:
		r.say("kind", "%s is none of %s%s", v.show(), kindList(), near(v.s, kindWords()))
	default:
		d.Kind = Kind(v.s)
	}
	if v := root.field("metadata"); v == nil {
		r.say("", "metadata is missing: it has the name")
	} else {
		r.into("metadata", v, reflect.ValueOf(&d.Metadata).Elem(), reflect.Value{})
		if d.Metadata.Name == "" && (v.kind != object || v.field("name") == nil) {
			r.say("metadata", "name is missing")
		}
	}
	if d.Kind == "" {
		return nil, r.problems
	}
	d.check(r)
	spec := specs[d.Kind]()
	d.over(r, spec, specs[d.Kind]())
	d.checkSpec(r, spec)
	return d, r.problems
}

func kindWords() []string {
	var out []string
	for _, k := range Kinds() {
		out = append(out, string(k))
	}
	return out
}

// check looks at the metadata.
func (d *Document) check(r *reading) {
	m := d.Metadata
	if m.Generation < 0 {
		r.say("metadata.generation", "%d is negative", m.Generation)
	}
	if err := fleet.ValidateLabels(m.Labels); err != nil {
		r.errors(d.root.field("metadata"), "metadata", err)
	}
	if len(m.Labels) > 0 && (d.Kind == StackVersion || d.Kind == PreApprovalRule) {
		r.say("metadata.labels", "a %s has no labels", d.Kind)
	}
	if m.Name == "" {
		return
	}
	var err error
	switch d.Kind {
	case StackVersion:
		if _, _, ok := SplitVersion(m.Name); !ok {
			err = fmt.Errorf("%.80q: want STACK@VERSION", m.Name)
		}
	case Assignment:
		err = fleet.NodeID(m.Name).Validate()
	default:
		err = fleet.ValidateName(strings.ToLower(string(d.Kind)), m.Name)
		if err == nil && d.Kind == Site && m.Name == fleet.PoolSite {
			err = fmt.Errorf("the name %q stands for nodes without a site", fleet.PoolSite)
		}
	}
	if err != nil {
		r.say("metadata.name", "%s", plain(err))
	}
}

// checkSpec looks at what can be judged without the object that is there.
func (d *Document) checkSpec(r *reading, spec any) {
	has := func(name string) bool {
		s := d.root.field("spec")
		return s != nil && s.kind == object && s.field(name) != nil
	}
	switch v := spec.(type) {
	case *SiteSpec:
		if v.Stack != "" {
			if _, _, ok := SplitVersion(v.Stack); !ok {
				r.say("spec.stack", "%.80q: want STACK@VERSION", v.Stack)
			}
		}
	case *StackVersionSpec:
		if has("file") == has("envelope") {
			r.say("spec", "want one of file (what muster release stack wrote) and envelope: a stack version counts because the release key has signed it")
		}
	case *AssignmentSpec:
		if v.Site == "" {
			r.say("spec", "site is missing; to put a node back into the pool: muster remove NODE")
		} else if err := fleet.ValidateName("site", v.Site); err != nil || v.Site == fleet.PoolSite {
			r.say("spec.site", "%.80q is no name of a site", v.Site)
		}
		if v.RoleHint != "" && v.RoleHint != HintServer && v.RoleHint != HintWorker {
			r.say("spec.role_hint", "%.40q is neither %s nor %s", v.RoleHint, HintServer, HintWorker)
		}
	}
}

// Over brings spec, a pointer to the specification of what is there, to what
// the document says. defaults is what null stands for.
func (d *Document) Over(spec, defaults any) []Problem {
	r := &reading{}
	d.over(r, spec, defaults)
	return r.problems
}

func (d *Document) over(r *reading, spec, defaults any) {
	v := d.root.field("spec")
	// "spec:" with nothing below it says nothing; it does not take all back.
	if v == nil || v.kind == null {
		return
	}
	r.into("spec", v, reflect.ValueOf(spec).Elem(), reflect.ValueOf(defaults).Elem())
}

// HasLabels reports whether the document says anything about labels.
func (d *Document) HasLabels() bool { return d.has("labels") }

func (d *Document) has(name string) bool {
	m := d.root.field("metadata")
	return m != nil && m.kind == object && m.field(name) != nil
}

// Find gives problems of a whole object the place in the document that they
// speak of, as far as their words tell.
func (d *Document) Find(err error) []Problem {
	r := &reading{}
	r.errors(d.root, "spec", err)
	return r.problems
}

// Write makes the JSON of a document.
func Write(kind Kind, m Metadata, spec any) ([]byte, error) {
	b, err := json.Marshal(struct {
		APIVersion string   `json:"apiVersion"`
		Kind       Kind     `json:"kind"`
		Metadata   Metadata `json:"metadata"`
		Spec       any      `json:"spec"`
	}{APIVersion, kind, m, spec})
	if err != nil {
		return nil, fmt.Errorf("declare: write %s %s: %w", kind, m.Name, err)
	}
	return b, nil
}

// SplitVersion reads STACK@VERSION.
func SplitVersion(s string) (stack, version string, ok bool) {
	stack, version, ok = strings.Cut(s, "@")
	return stack, version, ok && fleet.ValidateName("stack", stack) == nil && fleet.ValidateVersion(version) == nil
}

// OfSite is the specification of a site that is there.
func OfSite(s fleet.Site) SiteSpec {
	set := s.Spec.Chosen()
	out := SiteSpec{
		Title: s.Title, Location: s.Location, Founding: set.Founding, Policy: set.Policy, Birth: set.Birth, Images: set.Images, AnyBoot: set.AnyBoot,
		Delegates: set.Delegates, Update: set.Update, Install: set.Install,
	}
	if ref := s.Spec.StackRef(); ref != nil {
		out.Stack = ref.ID()
	}
	return out
}

// Settings are what the specification says of a site's charter.
func (s SiteSpec) Settings() fleet.SiteSettings {
	return fleet.SiteSettings{
		Founding: s.Founding, Policy: s.Policy, Birth: s.Birth, Images: s.Images, AnyBoot: s.AnyBoot, Delegates: s.Delegates, Update: s.Update, Install: s.Install,
	}
}

// OfRule is the specification of a rule that is there.
func OfRule(p fleet.PreApproval) PreApprovalRuleSpec {
	return PreApprovalRuleSpec{
		Site: p.Site, NodeLabels: p.NodeLabels, MinIdentity: p.MinIdentity, MinBoot: p.MinBoot, Vendor: p.Vendor, Serials: p.Serials,
		Limit: p.Limit, PerDay: p.PerDay, NotAfter: p.NotAfter,
	}
}

// Rule brings a pre-approval to what the specification says.
func (s PreApprovalRuleSpec) Rule(p fleet.PreApproval) fleet.PreApproval {
	p.Kind = fleet.PreApproveRule
	p.Site, p.NodeLabels, p.MinIdentity, p.MinBoot, p.Vendor, p.Serials = s.Site, s.NodeLabels, s.MinIdentity, s.MinBoot, s.Vendor, s.Serials
	p.Limit, p.PerDay, p.NotAfter = s.Limit, s.PerDay, s.NotAfter
	return p
}

var (
	packagePrefix = regexp.MustCompile(`^(fleet|declare): `)
	fieldWord     = regexp.MustCompile(`^[a-z][a-z0-9_]*`)
)

// plain takes the names of packages off an error.
func plain(err error) string { return packagePrefix.ReplaceAllString(err.Error(), "") }

// errors says each problem of a joined error at the field whose name it begins
// with, if the document has just one of that name.
func (r *reading) errors(root *value, at string, err error) {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		for _, e := range joined.Unwrap() {
			r.errors(root, at, e)
		}
		return
	}
	words := plain(err)
	path := at
	if name := fieldWord.FindString(words); name != "" && root != nil {
		var found []string
		root.walk("", func(p, field string) {
			if field == name {
				found = append(found, p)
			}
		})
		if len(found) == 1 {
			if path = found[0]; at == "metadata" {
				path = "metadata." + strings.TrimPrefix(path, ".")
			}
		}
	}
	r.say(path, "%s", words)
}
