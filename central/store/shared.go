package store

import (
	"context"
	"errors"
)

var (
	// ErrUnknown: the database was lost in the middle of a commit and did not
	// come back in time to say whether it counts. Nothing was acknowledged;
	// whoever asks again finds out.
	ErrUnknown = errors.New("store: the database was lost in the middle of a commit")
	// ErrNotLeader: another process does meanwhile what only one may do.
	ErrNotLeader = errors.New("store: another replica leads now")
	// ErrForgotten: the changes that were asked for are no longer kept.
	ErrForgotten = errors.New("store: changes are no longer kept")
)

// ChangeKind is what sort of object a Change is about.
type ChangeKind string

// Kinds of changes: what processes keep in memory or wait for.
const (
	ChangedTenant  ChangeKind = "tenant"
	ChangedSite    ChangeKind = "site"
	ChangedNode    ChangeKind = "node"
	ChangedRequest ChangeKind = "request"
	// ChangedDenial has the node's ID as its key.
	ChangedDenial ChangeKind = "denial"
	// ChangedEvents has no key: there are new events of the tenant.
	ChangedEvents ChangeKind = "events"
)

// Change names an object that an Update wrote.
type Change struct {
	Kind   ChangeKind `json:"k"`
	Tenant string     `json:"t,omitempty"`
	Key    string     `json:"n,omitempty"`
}

// Changes are what was committed since somebody looked last.
type Changes struct {
	// All in the order of commits; an object may be named more than once.
	All []Change
	// Last is the number to ask with next time.
	Last uint64
	// Epoch of the database.
	Epoch uint64
	// More: there are newer ones.
	More bool
}

// Shared is a Store that several processes may use at once.
type Shared interface {
	Store
	// LastChange is the number of the newest commit: who reads everything
	// after asking for it has missed nothing.
	LastChange(ctx context.Context) (uint64, error)
	// Changes returns what others committed after a number. The error is
	// ErrForgotten if that is too long ago: then everything has to be read.
	Changes(ctx context.Context, after uint64) (Changes, error)
	// Lead waits until no other process leads, then runs f with a context that
	// ends when this one does not lead any more. Every Update with that
	// context fails with ErrNotLeader, in the same transaction, once another
	// process leads. When f returns nil, Lead does; when leadership was lost,
	// it waits again.
	Lead(ctx context.Context, f func(ctx context.Context) error) error
}
