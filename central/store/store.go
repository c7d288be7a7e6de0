// Package store says what the centre keeps and what it may rely on: the
// Store interface, its records, and its errors. Implementations live beside
// it (sqlite); storetest is the suite each of them passes.
//
// A transaction is the unit of everything: an act, its audit record and its
// events are one Update, and what Update has acknowledged survives a power
// cut. Every object belongs to a tenant and every query names it; only the
// database's own settings, the cookie keys and the look-up of a bearer token
// stand above tenants.
package store

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

var (
	// ErrNotFound: no such object in this tenant.
	ErrNotFound = errors.New("store: not found")
	// ErrConflict: somebody wrote the object since it was read, or a
	// constraint (one live request per node, one node per EK) forbids it.
	ErrConflict = errors.New("store: changed meanwhile")
	// ErrExists: an object with this key is there already.
	ErrExists = errors.New("store: exists already")
)

// Store is the centre's memory. All methods are safe for concurrent use.
type Store interface {
	// View runs f over one consistent snapshot.
	View(ctx context.Context, f func(Reader) error) error
	// Update runs f in one transaction that sees all earlier Updates and
	// runs alone. When Update returns nil, everything f wrote is on disk;
	// when it returns an error, nothing of it is. f may be run again by
	// engines that detect conflicts late, so it must have no other effect.
	Update(ctx context.Context, f func(Tx) error) error
	// Close waits for running transactions.
	Close() error
}

// Reader is the reading half of a transaction. Lists are ordered by key
// unless said otherwise. Single objects return ErrNotFound.
type Reader interface {
	StackReader

	// Setting returns a value of the database itself.
	Setting(name string) (string, error)
	// Epoch counts the lives of the database; it starts at 1 and is raised
	// when a backup is restored.
	Epoch() (uint64, error)

	Tenant(name string) (fleet.Tenant, error)
	Tenants() ([]fleet.Tenant, error)
	Site(tenant, name string) (fleet.Site, error)
	// Sites returns at most count sites after the given name.
	Sites(tenant, after string, count int) ([]fleet.Site, error)
	Node(tenant string, id fleet.NodeID) (fleet.Node, error)
	Nodes(tenant string, after fleet.NodeID, count int) ([]fleet.Node, error)
	// FindNodes returns at most count nodes whose ID or words start with
	// prefix.
	FindNodes(tenant, prefix string, count int) ([]fleet.NodeID, error)
	CountNodes(tenant string) (map[fleet.NodeState]int, error)

	Request(tenant string, id fleet.RequestID) (fleet.Request, error)
	// Requests returns at most count requests, oldest first for one state,
	// newest first for all (state nil).
	Requests(tenant string, state *fleet.RequestState, count int) ([]fleet.Request, error)
	// RequestsAfter goes on after a request of such a list, whatever its state
	// is now.
	RequestsAfter(tenant string, state *fleet.RequestState, after fleet.RequestID, count int) ([]fleet.Request, error)
	// RequestsOfNode returns all requests of a node, oldest first.
	RequestsOfNode(tenant string, node fleet.NodeID) ([]fleet.Request, error)
	// FindRequests returns at most count requests whose ID, node ID or words
	// start with prefix; those that still count come first.
	FindRequests(tenant, prefix string, count int) ([]fleet.RequestID, error)
	// LookAlikes returns at most count live requests of other nodes with this
	// serial or this UUID; empty claims match nothing.
	LookAlikes(tenant string, node fleet.NodeID, serial, uuid string, count int) ([]fleet.Request, error)
	// CountUnverified counts pending and quarantined requests whose identity
	// is unverified.
	CountUnverified(tenant string) (int, error)
	CountRequests(tenant string) (map[fleet.RequestState]int, error)
	// Queue returns at most count requests of a state and an identity, oldest
	// first, that stand behind a key; the zero key is the front.
	Queue(tenant string, state fleet.RequestState, identity fleet.IdentityTrust, after QueueKey, count int) ([]fleet.Request, error)
	// CountQueue counts the requests of a state by identity.
	CountQueue(tenant string, state fleet.RequestState) (map[fleet.IdentityTrust]int, error)
	// Issued returns what was issued last for a request.
	Issued(tenant string, id fleet.RequestID) (Issued, error)
	IssuedToNode(tenant string, id fleet.NodeID) ([]Issued, error)

	Image(tenant, name, version, arch string) (fleet.Image, error)
	Images(tenant string) ([]fleet.Image, error)
	ReleaseKeys(tenant string) ([]ReleaseKey, error)
	// Denial returns the entry of the deny list for one EK.
	Denial(tenant string, ek fleet.EKHash) (Denial, error)
	Denials(tenant string) ([]Denial, error)
	PreApproval(tenant, name string) (fleet.PreApproval, error)
	// PreApprovals, and the other calls that return some, leave out the lines
	// of lists.
	PreApprovals(tenant string) ([]fleet.PreApproval, error)
	// PreApprovalsOfKind are those that are not withdrawn.
	PreApprovalsOfKind(tenant string, kind fleet.PreApprovalKind) ([]fleet.PreApproval, error)
	// PreApprovalByClaim finds the claim code with this hash.
	PreApprovalByClaim(tenant string, hash fleet.HexBytes) (fleet.PreApproval, error)
	// LinesOfEK returns the lines with this EK in lists that are not
	// withdrawn.
	LinesOfEK(tenant string, ek fleet.EKHash) ([]ListLine, error)
	// CountLinesOfSite counts the lines of a list that bring their machine to
	// a site.
	CountLinesOfSite(tenant, preApproval, site string) (int, error)
	// CountUses counts the uses of a pre-approval after a time.
	CountUses(tenant, preApproval string, after time.Time) (int, error)
	// CountUsesOfNode counts the pre-approvals that were used for a machine.
	CountUsesOfNode(tenant string, node fleet.NodeID) (int, error)
	// Document returns the newest envelope of a kind and name.
	Document(tenant, kind, name string) (Document, error)

	// NodesOfSite returns at most count nodes of the site after the given ID.
	NodesOfSite(tenant, site string, after fleet.NodeID, count int) ([]fleet.Node, error)
	// NodeByKey finds the node whose LDevID key has this SHA-256.
	NodeByKey(tenant string, ldevidKey fleet.HexBytes) (fleet.Node, error)
	// DocumentOfSite returns the newest envelope of a kind and name at a site.
	DocumentOfSite(tenant, site, kind, name string) (Document, error)
	// DocumentsOfSite returns at most count documents of the site above a
	// version, oldest first, without those that a newer one made void.
	DocumentsOfSite(tenant, site string, after fleet.DocVersion, count int) ([]Document, error)
	// Address returns the node's in-site address.
	Address(tenant, site string, node fleet.NodeID) (netip.Addr, error)
	// Addresses are all in-site addresses ever given at the site.
	Addresses(tenant, site string) (map[fleet.NodeID]netip.Addr, error)
	// Report returns what the node said last about its cluster.
	Report(tenant string, node fleet.NodeID) (fleet.NodeReport, error)
	Reports(tenant, site string) ([]fleet.NodeReport, error)
	Order(tenant, id string) (Order, error)
	// FindOrders returns at most count orders whose ID starts with prefix.
	FindOrders(tenant, prefix string, count int) ([]string, error)
	// Orders returns at most count orders, newest first; of all sites for "".
	Orders(tenant, site string, count int) ([]Order, error)
	// OpenOrders are those of the node, or of the whole site for node "",
	// that are open, delivered or running, oldest first.
	OpenOrders(tenant, site string, node fleet.NodeID, count int) ([]Order, error)
	// EndedOrders returns at most count orders that are open or delivered and
	// ended at or before a time.
	EndedOrders(tenant string, at time.Time, count int) ([]Order, error)
	Escrow(tenant, id string) (fleet.EscrowBlob, error)
	// EscrowOfSite returns at most count blobs of the site, newest first.
	EscrowOfSite(tenant, site string, count int) ([]fleet.EscrowBlob, error)
	// EscrowAfter returns at most count blobs of the tenant by ID.
	EscrowAfter(tenant, after string, count int) ([]fleet.EscrowBlob, error)

	// Events returns at most count events with a number above after.
	Events(tenant string, after uint64, count int) ([]fleet.Event, error)
	LastEvent(tenant string) (uint64, error)
	// Audit returns at most count records with a number above after, as they
	// are stored: audit.Verify tells whether they are what was written. A
	// record that cannot even be read is returned with its Seq alone.
	Audit(tenant string, after uint64, count int) ([]fleet.AuditRecord, error)

	// CookieKeys returns the newest key first.
	CookieKeys() ([]CookieKey, error)

	// CredentialByHash finds the credential with this SHA-256, revoked or not.
	CredentialByHash(hash fleet.Digest) (Credential, error)
	Credential(id string) (Credential, error)
	// Credentials returns at most count credentials of a kind whose home is
	// the tenant, after the given ID; of all tenants for "".
	Credentials(tenant string, kind CredentialKind, after string, count int) ([]Credential, error)
	// CredentialsOf returns at most count credentials of a holder.
	CredentialsOf(holder string, kind CredentialKind, count int) ([]Credential, error)
	// BindingsOf are the bindings of one subject, in all tenants.
	BindingsOf(subject string) ([]Binding, error)
	// Bindings are those of a tenant, or of the centre for access.AllTenants.
	Bindings(tenant string) ([]Binding, error)
	Binding(tenant, id string) (Binding, error)
}

// Tx reads and writes. Put methods of objects with a Revision insert when it
// is 0 (ErrExists if the key is taken) and else replace the object with
// exactly this revision (ErrConflict if it was written since); they return
// the object with its new revision.
type Tx interface {
	Reader
	StackTx

	PutSetting(name, value string) error
	// RaiseEpoch begins a new life of the database.
	RaiseEpoch() (uint64, error)
	// NextVersion gives out the next number for a signed document.
	NextVersion() (fleet.DocVersion, error)

	PutTenant(fleet.Tenant) (fleet.Tenant, error)
	PutSite(fleet.Site) (fleet.Site, error)
	PutNode(fleet.Node) (fleet.Node, error)
	// TouchNode moves the node's LastSeen forward; it never goes back, and
	// it is no write in the sense of Revision.
	TouchNode(tenant string, id fleet.NodeID, at time.Time) error
	// AddRequest and PutRequest write the request with the Revision it has,
	// since package enroll counts it. PutRequest replaces the one of revision
	// seen (else ErrConflict) and never changes its node or evidence.
	AddRequest(fleet.Request) error
	PutRequest(r fleet.Request, seen int64) error
	AddIssued(Issued) error
	// AddImage returns ErrExists if name, version and architecture, or the
	// file's digest, are taken.
	AddImage(fleet.Image) error
	// AddReleaseKey reports whether the key is new.
	AddReleaseKey(ReleaseKey) (added bool, err error)
	PutDenial(Denial) error
	// RemoveDenials forgets the entries made for a node.
	RemoveDenials(tenant string, node fleet.NodeID) error
	// PutPreApproval takes the lines of a list when it inserts, and none when
	// it replaces; kind and claim hash never change, and what is withdrawn
	// stays so. It returns the object without lines.
	PutPreApproval(fleet.PreApproval) (fleet.PreApproval, error)
	// UsePreApproval counts a use, and marks the line that was used. It is
	// ErrConflict if the limit is reached, the pre-approval is withdrawn, the
	// line is used, this machine used the pre-approval before, or the
	// request was approved by another.
	UsePreApproval(Use) error
	// AddDocument adds the document; with a site, those of the same kind, name
	// and site before it are void from now on.
	AddDocument(Document) error
	// AddAddress gives a node its in-site address; ErrExists if either has
	// one, or the address is taken.
	AddAddress(tenant, site string, node fleet.NodeID, address netip.Addr) error
	// DropAddresses forgets all in-site addresses of a site.
	DropAddresses(tenant, site string) error
	PutReport(fleet.NodeReport) error
	DropReport(tenant string, node fleet.NodeID) error
	// AddOrder adds a new order; PutOrder changes what became of it, as Put
	// methods do. What was signed never changes.
	AddOrder(Order) error
	PutOrder(fleet.IssuedOrder) (fleet.IssuedOrder, error)
	AddEscrow(fleet.EscrowBlob) error
	DropEscrow(tenant, id string) error

	// AddEvent gives the event its number and drops the oldest beyond the
	// ring's size.
	AddEvent(fleet.Event) (fleet.Event, error)
	// AddAudit gives the record its number and links it into the tenant's
	// chain. Seq, Prev and Hash of the argument are ignored.
	AddAudit(fleet.AuditRecord) (fleet.AuditRecord, error)

	AddCookieKey(CookieKey) error
	DropCookieKeysBefore(id int64) error

	// AddCredential returns ErrExists if its ID or hash is taken.
	AddCredential(Credential) error
	// UseCredential moves LastUsed forward.
	UseCredential(id string, at time.Time) error
	// RevokeCredential ends a credential; one that has ended stays as it is.
	RevokeCredential(id string, at time.Time) error
	// DropCredentials forgets credentials of a kind that ended, by expiry or
	// by revocation, before a time.
	DropCredentials(kind CredentialKind, before time.Time) error
	// AddBinding returns ErrExists if its ID is taken.
	AddBinding(Binding) error
	DropBinding(tenant, id string) error
	AddLoginState(LoginState) error
	// TakeLoginState returns a log-in that is under way and forgets it, so
	// that nothing of it is ever used twice.
	TakeLoginState(hash fleet.Digest) (LoginState, error)
	// DropLoginStates forgets those that ended at or before a time.
	DropLoginStates(at time.Time) error
}

// QueueKey is a place in the queue of one state and identity.
type QueueKey struct {
	FirstSeen time.Time
	ID        fleet.RequestID
}

// Issued is one certificate with the documents that went with it.
type Issued struct {
	Tenant    string          `json:"tenant"`
	Request   fleet.RequestID `json:"request"`
	Node      fleet.NodeID    `json:"node"`
	LDevIDKey fleet.HexBytes  `json:"ldevid_key"`
	Serial    string          `json:"serial"`
	NotBefore time.Time       `json:"not_before"`
	NotAfter  time.Time       `json:"not_after"`
	// Certificates are DER, leaf first; Documents are DSSE envelopes.
	Certificates [][]byte `json:"certificates"`
	Documents    [][]byte `json:"documents,omitempty"`
}

// ReleaseKey is a public key whose signature on an image manifest counts.
type ReleaseKey struct {
	Tenant string
	// KeyID is hex SHA-256 over the PKIX DER.
	KeyID string
	PEM   string
	Added time.Time
}

// ListLine is a line of an EK list with the name of the list.
type ListLine struct {
	PreApproval string
	fleet.ListedEK
}

// Use is one use of a pre-approval.
type Use struct {
	Tenant      string
	PreApproval string
	EK          fleet.EKHash
	Request     fleet.RequestID
	At          time.Time
}

// Denial is one EK on the deny list. A node's aliases have their own.
type Denial struct {
	Tenant string
	EK     fleet.EKHash
	Node   fleet.NodeID
	Reason string
	Actor  string
	At     time.Time
}

// Document is a signed document: kind and name are its key ("admission",
// "n-..."), of which every version is kept.
type Document struct {
	Tenant string
	Kind   string
	Name   string
	// Site is whose nodes get it.
	Site     string
	Version  fleet.DocVersion
	At       time.Time
	Envelope []byte
}

// Order is an order with its envelope.
type Order struct {
	fleet.IssuedOrder
	Envelope []byte
}

// CookieKey is a key of the enrollment cookies, sealed by a key that is not
// in the database.
type CookieKey struct {
	ID      int64
	Created time.Time
	Sealed  []byte
}

// CredentialKind tells what a credential is for.
type CredentialKind string

// The kinds of credentials.
const (
	// CredentialStart is the token of admin.yaml: it is used up by the first
	// log-in with it.
	CredentialStart CredentialKind = "start"
	// CredentialPersonal is a person's own token, from `muster login`.
	CredentialPersonal CredentialKind = "personal"
	// CredentialToken is an API token with rights of its own.
	CredentialToken CredentialKind = "token"
	// CredentialSession is a browser session.
	CredentialSession CredentialKind = "session"
	// CredentialInvitation lets somebody new log in, once.
	CredentialInvitation CredentialKind = "invitation"
)

// Credential is something somebody shows to be let in. Of the secret only the
// SHA-256 is kept.
type Credential struct {
	ID   string       `json:"-"`
	Hash fleet.Digest `json:"-"`
	// Tenant is where calls act that do not name a tenant.
	Tenant string         `json:"-"`
	Kind   CredentialKind `json:"-"`
	// Holder is the name of the person it stands for.
	Holder  string    `json:"-"`
	Created time.Time `json:"-"`
	// Expires is never for the zero time.
	Expires time.Time `json:"-"`
	// Idle, if set, ends the credential when it was not used for so long.
	Idle     time.Duration `json:"-"`
	LastUsed time.Time     `json:"-"`
	Revoked  time.Time     `json:"-"`

	// Name is what people call a token.
	Name string `json:"name,omitempty"`
	// Prefix is the beginning of the secret, for recognition.
	Prefix string `json:"prefix,omitempty"`
	// Groups are the holder's groups as the identity provider said them.
	Groups []string `json:"groups,omitempty"`
	// Scopes are the rights of a token; those of its holder bound them.
	Scopes []access.Binding `json:"scopes,omitempty"`
	// Grants are what the holder of an invitation gets when it is used.
	Grants []access.Binding `json:"grants,omitempty"`
	// HandOver says that the use of an invitation ends all other rights in
	// the tenant.
	HandOver  bool   `json:"hand_over,omitempty"`
	CreatedBy string `json:"created_by,omitempty"`
	// Source is the address it was made from.
	Source string `json:"source,omitempty"`
}

// Ended says why the credential lets nobody in any more, "" if it does.
func (c Credential) Ended(now time.Time) string {
	switch {
	case !c.Revoked.IsZero():
		return "was revoked"
	case !c.Expires.IsZero() && !now.Before(c.Expires):
		return "has expired"
	case c.Idle > 0 && now.Sub(c.LastUsed) >= c.Idle:
		return "was not used for " + c.Idle.String()
	}
	return ""
}

// Binding is a role that a user ("user:NAME") or a group of the identity
// provider ("group:NAME") has.
type Binding struct {
	access.Binding
	ID        string    `json:"-"`
	Subject   string    `json:"-"`
	Created   time.Time `json:"-"`
	CreatedBy string    `json:"created_by,omitempty"`
	Reason    string    `json:"reason,omitempty"`
}

// LoginState is a browser's log-in that is under way.
type LoginState struct {
	// Hash is the SHA-256 of the state that the browser brings back.
	Hash    fleet.Digest
	Expires time.Time
	// Body is the caller's own.
	Body []byte
}
