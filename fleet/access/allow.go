package access

import "fmt"

// Kind is a kind of object.
type Kind string

// Verb is what is done to an object.
type Verb string

// The kinds.
const (
	Centre      Kind = "centre" // version, settings, EK roots, the boot role
	Tenant      Kind = "tenant"
	Site        Kind = "site"
	Node        Kind = "node"
	Request     Kind = "request"
	PreApproval Kind = "pre-approval"
	Order       Kind = "order"
	Escrow      Kind = "escrow"
	Event       Kind = "event"
	Image       Kind = "image" // with blobs and manifests
	Stack       Kind = "stack"
	Rollout     Kind = "rollout"
	Roots       Kind = "roots"
	ReleaseKey  Kind = "release-key"
	EscrowKey   Kind = "escrow-key"
	BootWindow  Kind = "boot-window"
	Audit       Kind = "audit"
	User        Kind = "user"  // role bindings
	Token       Kind = "token" // of somebody else; one's own need no right
)

// The verbs.
const (
	Read   Verb = "read"
	Decide Verb = "decide" // approve, reject, release
	Change Verb = "change" // create, change, delete, order
)

// Reach says which bindings count for an object.
type Reach uint8

// The reaches.
const (
	// Somewhere: a role at any site of the tenant is enough. For what
	// everybody of a tenant must know, such as its images.
	Somewhere Reach = iota
	// AtSite: a role at the object's site. What belongs to no site takes an
	// unlimited role, but for reading what waits for a decision.
	AtSite
	// Everywhere: an unlimited role in the tenant.
	Everywhere
	// OverAll: a role over the centre.
	OverAll
)

// Rule is one line of the table.
type Rule struct {
	Role  Role
	Reach Reach
	// Waiting, if set, lets a role of this height at any site read what
	// belongs to no site yet: who decides must see what waits.
	Waiting Role
}

type act struct {
	kind Kind
	verb Verb
}

// rules is the whole policy. What is not in it, nobody may.
var rules = map[act]Rule{
	{Centre, Read}:        {Role: Viewer, Reach: Somewhere},
	{Centre, Change}:      {Role: Admin, Reach: OverAll},
	{Tenant, Read}:        {Role: Viewer, Reach: Somewhere},
	{Tenant, Change}:      {Role: Admin, Reach: OverAll},
	{Site, Read}:          {Role: Viewer, Reach: AtSite},
	{Site, Change}:        {Role: Operator, Reach: AtSite},
	{Node, Read}:          {Role: Viewer, Reach: AtSite, Waiting: Operator},
	{Node, Change}:        {Role: Operator, Reach: AtSite},
	{Request, Read}:       {Role: Viewer, Reach: AtSite, Waiting: Approver},
	{Request, Decide}:     {Role: Approver, Reach: AtSite},
	{Request, Change}:     {Role: Operator, Reach: AtSite},
	{PreApproval, Read}:   {Role: Viewer, Reach: AtSite},
	{PreApproval, Change}: {Role: Operator, Reach: AtSite},
	{Order, Read}:         {Role: Viewer, Reach: AtSite},
	{Order, Change}:       {Role: Operator, Reach: AtSite},
	{Escrow, Read}:        {Role: Viewer, Reach: AtSite},
	{Escrow, Change}:      {Role: Operator, Reach: AtSite},
	{Event, Read}:         {Role: Viewer, Reach: AtSite},
	{Image, Read}:         {Role: Viewer, Reach: Somewhere},
	{Image, Change}:       {Role: Operator, Reach: Everywhere},
	{Stack, Read}:         {Role: Viewer, Reach: Somewhere},
	{Stack, Change}:       {Role: Operator, Reach: Everywhere},
	{Rollout, Read}:       {Role: Viewer, Reach: Somewhere},
	{Rollout, Change}:     {Role: Operator, Reach: Everywhere},
	{Roots, Read}:         {Role: Viewer, Reach: Somewhere},
	{Roots, Change}:       {Role: Admin, Reach: OverAll},
	{ReleaseKey, Read}:    {Role: Viewer, Reach: Somewhere},
	{ReleaseKey, Change}:  {Role: Admin, Reach: Everywhere},
	{EscrowKey, Change}:   {Role: Admin, Reach: Everywhere},
	{BootWindow, Change}:  {Role: Operator, Reach: OverAll},
	{Audit, Read}:         {Role: Viewer, Reach: Everywhere},
	{User, Read}:          {Role: Admin, Reach: Everywhere},
	{User, Change}:        {Role: Admin, Reach: Everywhere},
	{Token, Read}:         {Role: Admin, Reach: Everywhere},
	{Token, Change}:       {Role: Admin, Reach: Everywhere},
}

// RuleOf returns the line of the table.
func RuleOf(k Kind, v Verb) (Rule, bool) {
	r, known := rules[act{k, v}]
	return r, known
}

// Object is what a call acts upon.
type Object struct {
	Kind   Kind
	Tenant string
	// Site is the name of the site it belongs to, with the labels of that
	// site (Site.SelectLabels); "" for what belongs to none (yet).
	Site   string
	Labels map[string]string
}

// Answer is what Allow says.
type Answer uint8

// The answers. The zero value lets nobody in.
const (
	Hidden Answer = iota
	Forbidden
	Allowed
)

var answerNames = [...]string{"hidden", "forbidden", "allowed"}

// String returns the answer's word.
func (a Answer) String() string {
	if int(a) < len(answerNames) {
		return answerNames[a]
	}
	return fmt.Sprintf("answer(%d)", uint8(a))
}

// Decision is an answer with its reason for a person.
type Decision struct {
	Answer Answer
	Why    string
}

// Allow decides about one act upon one object.
func Allow(p Principal, v Verb, o Object) Decision {
	rule, known := RuleOf(o.Kind, v)
	if !known {
		return Decision{Forbidden, fmt.Sprintf("nobody may %s a %s", v, o.Kind)}
	}
	if o.Tenant != p.Tenant || p.Role() == None {
		return Decision{Hidden, "there is no such tenant for you"}
	}
	has := held(p, rule, o)
	if has >= rule.Role {
		return Decision{Answer: Allowed}
	}
	if read, readable := RuleOf(o.Kind, Read); v != Read && readable && !sees(p, read, o) || v == Read && rule.Reach == AtSite {
		return Decision{Hidden, "it is outside of your part of the tenant"}
	}
	return Decision{Forbidden, refusal(p, rule, v, o)}
}

// held is the role that counts for an object.
func held(p Principal, rule Rule, o Object) Role {
	switch rule.Reach {
	case Somewhere:
		return p.Role()
	case AtSite:
		switch {
		case o.Site != "":
			return p.At(o.Labels)
		case rule.Waiting != None && p.Role() >= rule.Waiting:
			return p.Role()
		}
		return p.Unlimited()
	case Everywhere:
		return p.Unlimited()
	case OverAll:
		return p.Central()
	}
	return None
}

// sees reports whether a rule of reading lets p see o.
func sees(p Principal, read Rule, o Object) bool {
	return held(p, read, o) >= read.Role
}

func refusal(p Principal, rule Rule, v Verb, o Object) string {
	role := rule.Role.String()
	switch {
	case rule.Reach == OverAll:
		return fmt.Sprintf("to %s the %s takes the role %s over the whole centre", v, o.Kind, role)
	case rule.Reach == Everywhere && p.Role() >= rule.Role:
		return fmt.Sprintf("to %s the %s takes the role %s in the whole tenant; yours is limited to some sites", v, o.Kind, role)
	case rule.Reach == AtSite && o.Site == "" && p.Role() >= rule.Role:
		return fmt.Sprintf("to %s a %s that belongs to no site takes the role %s in the whole tenant; yours is limited to some sites", v, o.Kind, role)
	case rule.Reach == AtSite && p.Role() >= rule.Role:
		return fmt.Sprintf("the role %s at site %s does not allow this; it takes %s", p.At(o.Labels), o.Site, role)
	}
	return fmt.Sprintf("the role %s does not allow this; it takes %s", p.Role(), role)
}

// Possible reports whether p may do this to some object of the tenant: what
// stands before a call whose object is not known yet. The act itself asks
// Allow about the object.
func Possible(p Principal, k Kind, v Verb) Decision {
	rule, known := RuleOf(k, v)
	if !known {
		return Decision{Forbidden, fmt.Sprintf("nobody may %s a %s", v, k)}
	}
	if p.Role() == None {
		return Decision{Hidden, "there is no such tenant for you"}
	}
	has := p.Role()
	switch rule.Reach {
	case Everywhere:
		has = p.Unlimited()
	case OverAll:
		has = p.Central()
	}
	if has >= rule.Role {
		return Decision{Answer: Allowed}
	}
	return Decision{Forbidden, refusal(p, rule, v, Object{Kind: k, Tenant: p.Tenant, Site: "-"})}
}
