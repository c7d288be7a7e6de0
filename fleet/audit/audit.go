// Package audit is the record of who did what: append-only, one hash chain
// per tenant. Each record carries the hash of the one before it, so that a
// change, a deletion, an insertion or a swap shows at the first record that no
// longer fits. Cutting records off the end shows against a pinned Head (from
// an export, a printout, another system), and so does a chain that somebody
// with the whole database wrote anew.
//
// Hashes are over length-prefixed fields in a fixed order, never over JSON:
// two programs can write the same JSON in different bytes.
//
// The package does no I/O but on the io.Reader or io.Writer it is given, and
// reads no clock.
package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet"
)

// Record is one link of the chain.
type Record = fleet.AuditRecord

// Hash is the SHA-256 hash of a record.
type Hash = fleet.Digest

// Kind names an act.
type Kind = fleet.AuditKind

// The acts. Kinds are never renamed, since they are in the hashes.
const (
	RequestFiled       Kind = "request.filed"
	RequestApproved    Kind = "request.approved"
	RequestPreApproved Kind = "request.pre-approved"
	RequestRejected    Kind = "request.rejected"
	RequestExpired     Kind = "request.expired"
	RequestSuperseded  Kind = "request.superseded"
	RequestQuarantined Kind = "request.quarantined"
	RequestReopened    Kind = "request.reopened"
	CertificateIssued  Kind = "certificate.issued"
	CertificateRenewed Kind = "certificate.renewed"
	NodeActivated      Kind = "node.activated"
	NodeAssigned       Kind = "node.assigned"
	NodeChanged        Kind = "node.changed"
	NodeDenied         Kind = "node.denied"
	NodeAllowed        Kind = "node.allowed"
	NodeReplaced       Kind = "node.replaced"
	NodeRemoved        Kind = "node.removed"
	NodeReported       Kind = "node.reported" // an act done offline at the node
	TenantCreated      Kind = "tenant.created"
	TenantChanged      Kind = "tenant.changed"
	TenantMarkedLab    Kind = "tenant.marked-lab"
	SiteCreated        Kind = "site.created"
	SiteChanged        Kind = "site.changed"
	SiteDeleted        Kind = "site.deleted"
	FoundingGranted    Kind = "site.founding-granted"
	SiteConfirmed      Kind = "site.confirmed"
	PreApprovalCreated Kind = "pre-approval.created"
	PreApprovalChanged Kind = "pre-approval.changed"
	PreApprovalEnded   Kind = "pre-approval.withdrawn"
	ImageRegistered    Kind = "image.registered"
	ImageWithdrawn     Kind = "image.withdrawn"
	RootsImported      Kind = "roots.imported"
	RootsRemoved       Kind = "roots.removed"
	CharterIssued      Kind = "charter.issued"
	AdmissionIssued    Kind = "admission.issued"
	RemovalIssued      Kind = "removal.issued"
	OrderIssued        Kind = "order.issued"
	OrderWithdrawn     Kind = "order.withdrawn"
	OrderFinished      Kind = "order.finished"
	EscrowHandedOver   Kind = "escrow.handed-over"
	EscrowFetched      Kind = "escrow.fetched"
	StackCreated       Kind = "stack.created"
	StackChanged       Kind = "stack.changed"
	StackDeleted       Kind = "stack.deleted"
	StackVersionAdded  Kind = "stack-version.published"
	StackVersionGone   Kind = "stack-version.deleted"
	RolloutStarted     Kind = "rollout.started"
	RolloutMoved       Kind = "rollout.moved" // on, or stopped, or at its end
	RolloutPaused      Kind = "rollout.paused"
	RolloutResumed     Kind = "rollout.resumed"
	RolloutAborted     Kind = "rollout.aborted"
	RolloutDeleted     Kind = "rollout.deleted"
	BootWindowOpened   Kind = "boot.window-opened"
	AuthorityCreated   Kind = "authority.created"
	AuthorityRotated   Kind = "authority.rotated"
	AuthorityExported  Kind = "authority.exported"
	TokenCreated       Kind = "token.created"
	TokenRevoked       Kind = "token.revoked"
	UserChanged        Kind = "user.changed"
	TokenUsedUp        Kind = "token.used-up" // what lets in once has let in
	RoleGranted        Kind = "role.granted"
	RoleRevoked        Kind = "role.revoked"
	LoggedIn           Kind = "session.opened"
	LoggedOut          Kind = "session.closed"
	TenantHandedOver   Kind = "tenant.handed-over"
	BackupRestored     Kind = "centre.restored"
	AuditExported      Kind = "audit.exported"
)

var kinds = []Kind{
	RequestFiled, RequestApproved, RequestPreApproved, RequestRejected, RequestExpired, RequestSuperseded,
	RequestQuarantined, RequestReopened, CertificateIssued, CertificateRenewed, NodeActivated, NodeAssigned,
	NodeChanged, NodeDenied, NodeAllowed, NodeReplaced, NodeRemoved, NodeReported, TenantCreated, TenantChanged, TenantMarkedLab,
	SiteCreated, SiteChanged, SiteDeleted, FoundingGranted, SiteConfirmed, PreApprovalCreated, PreApprovalChanged, PreApprovalEnded,
	ImageRegistered, ImageWithdrawn, RootsImported, RootsRemoved, CharterIssued, AdmissionIssued,
	RemovalIssued, OrderIssued, OrderWithdrawn, OrderFinished, EscrowHandedOver, EscrowFetched, StackCreated, StackChanged, StackDeleted,
	StackVersionAdded, StackVersionGone, RolloutStarted, RolloutMoved, RolloutPaused, RolloutResumed, RolloutAborted, RolloutDeleted,
	BootWindowOpened, AuthorityCreated, AuthorityRotated, AuthorityExported, TokenCreated, TokenRevoked, UserChanged,
	TokenUsedUp, RoleGranted, RoleRevoked, LoggedIn, LoggedOut, TenantHandedOver,
	BackupRestored, AuditExported,
}

// Kinds returns all kinds that Append accepts.
func Kinds() []Kind { return slices.Clone(kinds) }

// Head is the end of a chain: how many records it has and the hash of the
// last. The zero Head is that of an empty chain. A Head kept elsewhere pins
// the chain. The text form is "COUNT:HASH".
type Head struct {
	Count uint64
	Hash  Hash
}

// HeadOf returns the head of the chain that ends with r.
func HeadOf(r Record) Head { return Head{Count: r.Seq, Hash: r.Hash} }

// String returns "COUNT:HASH".
func (h Head) String() string { return fmt.Sprintf("%d:%s", h.Count, h.Hash) }

// ParseHead reads what String returns.
func ParseHead(s string) (Head, error) {
	var h Head
	count, hash, _ := strings.Cut(s, ":")
	if len(count) > 20 || len(hash) != 2*len(h.Hash) {
		return Head{}, fmt.Errorf("audit: read head: want COUNT:HASH, got %.100q", s)
	}
	if _, err := fmt.Sscanf(count, "%d", &h.Count); err != nil {
		return Head{}, fmt.Errorf("audit: read head: count: %w", err)
	}
	if err := h.Hash.UnmarshalText([]byte(hash)); err != nil {
		return Head{}, fmt.Errorf("audit: read head: %w", err)
	}
	if h.String() != s || (h.Count == 0) != h.Hash.IsZero() {
		return Head{}, fmt.Errorf("audit: read head: %.100q is not in its canonical form", s)
	}
	return h, nil
}

// resolution of times: what every database keeps.
const resolution = time.Microsecond

// Append links r to the chain that ends at head: it sets Seq, Prev and Hash,
// brings Time to UTC microseconds and Before and After to CanonicalJSON. The
// caller stores the result in the transaction of the act itself.
func Append(head Head, r Record) (Record, error) {
	r.Time = r.Time.UTC().Truncate(resolution)
	r.Seq, r.Prev = head.Count+1, head.Hash
	var err error
	if r.Before, err = CanonicalJSON(r.Before); err != nil {
		return Record{}, fmt.Errorf("audit: append: before: %w", err)
	}
	if r.After, err = CanonicalJSON(r.After); err != nil {
		return Record{}, fmt.Errorf("audit: append: after: %w", err)
	}
	r.Hash = hashOf(r)
	if err := sound(r); err != nil {
		return Record{}, fmt.Errorf("audit: append: %w", err)
	}
	return r, nil
}

// sound checks the form of a record, apart from its place in a chain.
func sound(r Record) error {
	if err := r.Validate(); err != nil {
		return err
	}
	if !slices.Contains(kinds, r.Kind) {
		return fmt.Errorf("kind %.80q does not exist", r.Kind)
	}
	if y := r.Time.Year(); y < 1970 || y > 9999 {
		return fmt.Errorf("the year %d is not between 1970 and 9999", y)
	}
	if r.Time.Location() != time.UTC || !r.Time.Equal(r.Time.Truncate(resolution)) {
		return errors.New("time is not in UTC microseconds")
	}
	for _, j := range []json.RawMessage{r.Before, r.After} {
		if c, err := CanonicalJSON(j); err != nil || !bytes.Equal(c, j) {
			return errors.New("before or after is not canonical JSON")
		}
	}
	if r.Hash != hashOf(r) {
		return errors.New("its hash does not belong to its content")
	}
	return nil
}

// CanonicalJSON returns j without insignificant space and with <, >, &, U+2028
// and U+2029 escaped: the form that encoding/json leaves as it is, whatever
// its options. No JSON at all gives nil.
func CanonicalJSON(j json.RawMessage) (json.RawMessage, error) {
	if len(j) == 0 {
		return nil, nil
	}
	if len(j) > fleet.MaxAuditJSON {
		return nil, fmt.Errorf("%d bytes of JSON, at most %d are allowed", len(j), fleet.MaxAuditJSON)
	}
	if !utf8.Valid(j) {
		return nil, errors.New("JSON is not UTF-8")
	}
	var compact, escaped bytes.Buffer
	if err := json.Compact(&compact, j); err != nil {
		return nil, err
	}
	json.HTMLEscape(&escaped, compact.Bytes())
	// A bare null would be lost: encoding/json reads it as "no message".
	if escaped.Len() > fleet.MaxAuditJSON || escaped.String() == "null" {
		return nil, errors.New("JSON is null or too long when escaped")
	}
	return escaped.Bytes(), nil
}

// domain separates these hashes from all others.
const domain = "muster/audit/v1/record"

// hashOf hashes the fields of r, each with its length as 8 bytes in front.
func hashOf(r Record) Hash {
	h := sha256.New()
	var n [8]byte
	field := func(b []byte) {
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		h.Write(n[:])
		h.Write(b)
	}
	number := func(v uint64) {
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], v)
		field(b[:])
	}
	field([]byte(domain))
	number(r.Seq)
	field([]byte(r.Tenant))
	number(uint64(r.Time.UnixMicro()))
	field([]byte(r.Actor))
	field([]byte(r.Source))
	field([]byte(r.Kind))
	field([]byte(r.Object))
	field(r.Before)
	field(r.After)
	field([]byte(r.Reason))
	field(r.Prev[:])
	return Hash(h.Sum(nil))
}
