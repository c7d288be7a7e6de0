package service

import (
	"context"
	"errors"
	"time"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
)

// ErrNotFound is returned by a Store that has no such request.
var ErrNotFound = errors.New("service: no such request")

// Store is what the service needs of the centre's database. The suite in
// servicetest says exactly how an implementation must behave.
type Store interface {
	// File reads what is known of the node, asks enroll.File and writes its
	// Decision, all in one transaction with the audit records of
	// Decision.Facts. Requests are written as the Decision has them, with the
	// Revision it has. It returns Decision.Request. An error of enroll.File
	// (enroll.ErrDenied, enroll.ErrFull) is returned so that errors.Is finds
	// it, and nothing is written.
	File(ctx context.Context, f enroll.Filing) (fleet.Request, error)
	// Request returns a request, with enroll.Expire applied or not, or an
	// error that is ErrNotFound.
	Request(ctx context.Context, tenant string, id fleet.RequestID) (fleet.Request, error)
	// Live returns the node's live request, or an error that is ErrNotFound.
	Live(ctx context.Context, tenant string, node fleet.NodeID) (fleet.Request, error)
	// Issue hands out the request's certificate and documents. If the one
	// issued last is Reusable for the request's LDevID key it is returned and
	// make is not called. Else make is called with the request as it is in
	// this transaction; then the result, the request as enroll.Issue returns
	// it, the node and the audit record are committed before Issue returns.
	// For a request that is issued already, it may return a *enroll.Refused:
	// then today's policy does not allow the machine what it was allowed once.
	// If make fails nothing changes and its error is returned.
	Issue(ctx context.Context, tenant string, id fleet.RequestID, make func(fleet.Request) (enroll.Issued, error)) (enroll.Issued, error)
	// Denied reports whether one of the EKs is on the tenant's deny list.
	Denied(ctx context.Context, tenant string, eks []fleet.EKHash) (bool, error)
	// Changed returns a channel that is closed, or receives, when the request
	// may have changed, and a function that ends the subscription. It is a
	// hint: the service polls as well.
	Changed(id fleet.RequestID) (<-chan struct{}, func())
}

// Issuer makes node certificates.
type Issuer interface {
	IssueNode(ctx context.Context, p pki.NodeProfile) (enroll.Certificate, error)
}

// PolicyFunc returns the tenant's verification policy. It is called once per
// Complete, so it should cache.
type PolicyFunc func(ctx context.Context, tenant string, now time.Time) (pki.Policy, error)

// DocumentsFunc returns the DSSE envelopes that go with a certificate. It runs
// inside the Store's transaction: it must not call the Store.
type DocumentsFunc func(ctx context.Context, r fleet.Request, now time.Time) ([][]byte, error)

// KeysFunc returns the sealing keys, newest first: the first seals, the first
// two open. Replicas must return the same keys.
type KeysFunc func(ctx context.Context, now time.Time) ([]Key, error)

// Key seals cookies and tickets. IDs must never be used again for another
// secret.
type Key struct {
	ID     uint32
	Secret [32]byte
}
