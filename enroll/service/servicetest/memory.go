// Package servicetest says by tests how a service.Store must behave, and
// holds a Store in memory that does.
package servicetest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
)

// Harness is a Store under test with the acts of people around it. The tenant
// is Tenant; it is a lab that allows unknown boots and unverified identities.
type Harness interface {
	service.Store
	// SetNow sets the Store's clock.
	SetNow(time.Time)
	// Approve and Reject decide as a person who looked at that revision.
	Approve(id fleet.RequestID, revision int64) error
	Reject(id fleet.RequestID, revision int64) error
	// Deny puts the node on the deny list, Allow takes it off.
	Deny(n fleet.NodeID) error
	Allow(n fleet.NodeID) error
	// Requests are all requests of the tenant.
	Requests() ([]fleet.Request, error)
	// Audit are the kinds of the tenant's audit records about requests,
	// nodes and certificates, oldest first.
	Audit() ([]fleet.AuditKind, error)
}

// Tenant is the tenant that the suite uses.
const Tenant = "default"

// Memory is a Harness in memory.
type Memory struct {
	// The clock has a lock of its own: who makes a certificate asks for the
	// time while the store is locked.
	clock    sync.Mutex
	time     time.Time
	mu       sync.Mutex
	requests map[fleet.RequestID]fleet.Request
	issued   map[fleet.RequestID]enroll.Issued
	denied   map[fleet.EKHash]bool
	audit    []fleet.AuditKind
	watchers map[fleet.RequestID]map[chan struct{}]bool
	calls    int
}

var _ Harness = (*Memory)(nil)

// NewMemory makes an empty store.
func NewMemory() *Memory {
	return &Memory{
		time: Start, requests: map[fleet.RequestID]fleet.Request{}, issued: map[fleet.RequestID]enroll.Issued{},
		denied: map[fleet.EKHash]bool{}, watchers: map[fleet.RequestID]map[chan struct{}]bool{},
	}
}

// Calls counts the calls of Store methods.
func (m *Memory) Calls() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls
}

// SetNow implements Harness.
func (m *Memory) SetNow(t time.Time) {
	m.clock.Lock()
	defer m.clock.Unlock()
	m.time = t
}

// Now is the store's clock.
func (m *Memory) Now() time.Time {
	m.clock.Lock()
	defer m.clock.Unlock()
	return m.time
}

func (m *Memory) put(r fleet.Request, facts ...enroll.Fact) {
	m.requests[r.ID] = r
	for _, f := range facts {
		m.audit = append(m.audit, f.Kind)
	}
	for c := range m.watchers[r.ID] {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// File implements service.Store.
func (m *Memory) File(_ context.Context, f enroll.Filing) (fleet.Request, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	node := f.Evidence.EK.NodeID()
	known := enroll.Known{Denied: m.denied[f.Evidence.EK]}
	for _, r := range m.requests {
		switch {
		case r.Tenant != f.Tenant:
			continue
		case r.Node == node:
			known.Requests = append(known.Requests, r)
		case r.State.Live() && (f.Evidence.Serial != "" && r.Evidence.Serial == f.Evidence.Serial ||
			f.Evidence.UUID != "" && r.Evidence.UUID == f.Evidence.UUID):
			known.Others = append(known.Others, r)
		}
		if r.Identity == fleet.IdentityUnverified && (r.State == fleet.RequestPending || r.State == fleet.RequestQuarantined) {
			known.UnverifiedWaiting++
		}
	}
	d, err := enroll.File(m.Now(), known, f)
	if err != nil {
		return fleet.Request{}, err
	}
	for _, r := range d.Others {
		m.put(r)
	}
	m.put(d.Request, d.Facts...)
	return d.Request, nil
}

// Request implements service.Store.
func (m *Memory) Request(_ context.Context, tenant string, id fleet.RequestID) (fleet.Request, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	return m.find(tenant, id)
}

func (m *Memory) find(tenant string, id fleet.RequestID) (fleet.Request, error) {
	r, ok := m.requests[id]
	if !ok || r.Tenant != tenant {
		return fleet.Request{}, service.ErrNotFound
	}
	return r, nil
}

// Live implements service.Store.
func (m *Memory) Live(_ context.Context, tenant string, node fleet.NodeID) (fleet.Request, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	for _, r := range m.requests {
		if r.Tenant == tenant && r.Node == node && r.State.Live() {
			return r, nil
		}
	}
	return fleet.Request{}, service.ErrNotFound
}

// Issue implements service.Store.
func (m *Memory) Issue(_ context.Context, tenant string, id fleet.RequestID, make func(fleet.Request) (enroll.Issued, error)) (enroll.Issued, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	r, err := m.find(tenant, id)
	if err != nil {
		return enroll.Issued{}, err
	}
	if m.denied[r.Evidence.EK] {
		return enroll.Issued{}, enroll.ErrDenied
	}
	if err := enroll.MayIssue(m.Now(), r, r.Evidence.LDevIDKey); err != nil {
		return enroll.Issued{}, err
	}
	if i, ok := m.issued[id]; ok && i.Reusable(r.Evidence.LDevIDKey, m.Now()) {
		return i, nil
	}
	i, err := make(r)
	if err != nil {
		return enroll.Issued{}, err
	}
	r, fact, err := enroll.Issue(m.Now(), r, i)
	if err != nil {
		return enroll.Issued{}, err
	}
	m.issued[id] = i
	m.put(r, fact)
	return i, nil
}

// Denied implements service.Store.
func (m *Memory) Denied(_ context.Context, _ string, eks []fleet.EKHash) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	return slices.ContainsFunc(eks, func(h fleet.EKHash) bool { return m.denied[h] }), nil
}

// Changed implements service.Store.
func (m *Memory) Changed(id fleet.RequestID) (<-chan struct{}, func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := make(chan struct{}, 1)
	if m.watchers[id] == nil {
		m.watchers[id] = map[chan struct{}]bool{}
	}
	m.watchers[id][c] = true
	return c, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.watchers[id], c)
		if len(m.watchers[id]) == 0 {
			delete(m.watchers, id)
		}
	}
}

// Watchers counts the subscriptions.
func (m *Memory) Watchers() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.watchers {
		n += len(w)
	}
	return n
}

// Approve implements Harness.
func (m *Memory) Approve(id fleet.RequestID, revision int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.find(Tenant, id)
	if err != nil {
		return err
	}
	r, f, err := enroll.Approve(m.Now(), r, enroll.Approval{
		Ruling: enroll.Ruling{Revision: revision, Actor: "user:test"}, Site: "shop-7",
		Policy: enroll.Policy{Lab: true, UnknownBoot: true, Unverified: true},
	})
	if err == nil {
		m.put(r, f)
	}
	return err
}

// Reject implements Harness.
func (m *Memory) Reject(id fleet.RequestID, revision int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.find(Tenant, id)
	if err != nil {
		return err
	}
	r, f, err := enroll.Reject(m.Now(), r, enroll.Ruling{Revision: revision, Actor: "user:test"})
	if err == nil {
		m.put(r, f)
	}
	return err
}

// Deny implements Harness.
func (m *Memory) Deny(n fleet.NodeID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var of []fleet.Request
	for _, r := range m.requests {
		if r.Node == n {
			of = append(of, r)
		}
	}
	if len(of) == 0 {
		return errors.New("servicetest: deny: no such node")
	}
	m.denied[of[0].Evidence.EK] = true
	if r, f, ok := enroll.Deny(m.Now(), of, enroll.Ruling{Actor: "user:test"}); ok {
		m.put(r, f)
	}
	return nil
}

// Allow implements Harness.
func (m *Memory) Allow(n fleet.NodeID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ek := range m.denied {
		if ek.NodeID() == n {
			delete(m.denied, ek)
		}
	}
	return nil
}

// Requests implements Harness.
func (m *Memory) Requests() (out []fleet.Request, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.requests {
		out = append(out, r)
	}
	return out, nil
}

// Audit implements Harness.
func (m *Memory) Audit() ([]fleet.AuditKind, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.audit), nil
}
