package central

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

// clock is a clock that a test moves.
type clock struct{ at atomic.Pointer[time.Time] }

func newClock() *clock {
	c := &clock{}
	c.set(servicetest.Start)
	return c
}

func (c *clock) set(t time.Time) { c.at.Store(&t) }
func (c *clock) now() time.Time  { return *c.at.Load() }

// harness is a Server that is not running: its parts, without sockets.
type harness struct {
	*enrollment
	s     *Server
	clock *clock
}

var testCaller = caller{access.Principal{Name: "test", Tenant: DefaultTenant, Source: "192.0.2.7", Bindings: []access.Binding{{Tenant: access.AllTenants, Role: access.Admin}}}, "192.0.2.7"}

// newHarness opens a centre in a new directory. The tenant is a lab.
func newHarness(t testing.TB, dir string) *harness {
	t.Helper()
	h, err := openHarness(dir, newClock())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.s.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func openHarness(dir string, c *clock) (*harness, error) { return openHarnessOn("", dir, c) }

// openHarnessOn uses a PostgreSQL database, if one is given.
func openHarnessOn(database, dir string, c *clock) (*harness, error) {
	s, err := New(context.Background(), Config{Data: dir, Database: database, Now: c.now, LabUnknownBoot: true, LabUnverified: true})
	if err != nil {
		return nil, err
	}
	if err := markLab(context.Background(), s.store, act{actor: "system", now: c.now()}, "test"); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	e := &enrollment{store: s.store, hub: s.hub, index: s.index, metrics: s.metrics, now: c.now, refitted: s.refitted}
	return &harness{e, s, c}, nil
}

// person gives somebody roles and returns their token.
func (h *harness) person(t testing.TB, name string, roles ...access.Binding) string {
	t.Helper()
	cred, token := newCredential(store.CredentialPersonal, name, roles[0].Tenant, h.clock.now(), 0)
	if err := h.s.store.Update(context.Background(), func(tx store.Tx) error {
		for _, b := range roles {
			if _, err := grant(tx, act{actor: "system", now: h.clock.now()}, store.Binding{Binding: b, Subject: userSubject(name)}, "test"); err != nil {
				return err
			}
		}
		return tx.AddCredential(cred)
	}); err != nil {
		t.Fatal(err)
	}
	return token
}

// The acts of people, as servicetest.Harness wants them.

func (h *harness) SetNow(t time.Time) { h.clock.set(t) }

func (h *harness) Approve(id fleet.RequestID, revision int64) error {
	_, _, err := h.s.approve(context.Background(), testCaller, approval{id: string(id), revision: revision, site: "shop-7", createSite: true})
	return err
}

func (h *harness) Reject(id fleet.RequestID, revision int64) error {
	_, err := h.s.reject(context.Background(), testCaller, string(id), revision, "test")
	return err
}

func (h *harness) Deny(n fleet.NodeID) error {
	_, err := h.s.deny(context.Background(), testCaller, string(n), 0, "test")
	return err
}

func (h *harness) Allow(n fleet.NodeID) error {
	_, err := h.s.allow(context.Background(), testCaller, string(n), 0, "test")
	return err
}

func (h *harness) Requests() (out []fleet.Request, err error) {
	err = h.store.View(context.Background(), func(t store.Reader) error {
		out, err = t.Requests(DefaultTenant, nil, 1000)
		return err
	})
	return out, err
}

func (h *harness) records() (out []fleet.AuditRecord, err error) {
	err = h.store.View(context.Background(), func(t store.Reader) error {
		out, err = t.Audit(DefaultTenant, 0, 10000)
		return err
	})
	return out, err
}

func (h *harness) Audit() (kinds []fleet.AuditKind, err error) {
	records, err := h.records()
	for _, r := range records {
		kinds = append(kinds, r.Kind)
	}
	return kinds, err
}

// sound fails the test unless what must always hold does: the chain is
// whole, a node has one live request and one row, and each certificate has
// one record.
func (h *harness) sound(t testing.TB) {
	t.Helper()
	records, err := h.records()
	if err != nil {
		t.Fatal(err)
	}
	if err := audit.Verify(records); err != nil {
		t.Error(err)
	}
	requests, err := h.Requests()
	if err != nil {
		t.Fatal(err)
	}
	live := make(map[fleet.NodeID]fleet.RequestID)
	for _, r := range requests {
		if !r.State.Live() {
			continue
		}
		if other, two := live[r.Node]; two {
			t.Errorf("node %s has the live requests %s and %s", r.Node, other, r.ID)
		}
		live[r.Node] = r.ID
	}
	issued := 0
	for _, r := range records {
		if r.Kind == audit.CertificateIssued || r.Kind == audit.CertificateRenewed {
			issued++
		}
	}
	certificates := 0
	err = h.store.View(context.Background(), func(tx store.Reader) error {
		nodes, err := tx.Nodes(DefaultTenant, "", 1000)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			all, err := tx.IssuedToNode(DefaultTenant, n.ID)
			if err != nil {
				return err
			}
			certificates += len(all)
			if len(all) > 0 && n.State != fleet.NodeDenied && n.Certificate.Serial != "" && !hasSerial(all, n.Certificate.Serial) {
				return fmt.Errorf("node %s holds certificate %s, which nobody issued", n.ID, n.Certificate.Serial)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if issued != certificates {
		t.Errorf("%d certificates, but %d records of issuing", certificates, issued)
	}
}

func hasSerial(all []store.Issued, serial string) bool {
	for _, i := range all {
		if i.Serial == serial {
			return true
		}
	}
	return false
}

// issueNow makes a certificate as the service would.
func (h *harness) issueNow(id fleet.RequestID, serial string) (enroll.Issued, error) {
	return h.Issue(context.Background(), DefaultTenant, id, func(r fleet.Request) (enroll.Issued, error) {
		now := h.clock.now()
		return enroll.Issued{
			Certificates: [][]byte{[]byte("leaf " + serial)}, Serial: serial, NotBefore: now, NotAfter: now.Add(30 * 24 * time.Hour),
			LDevIDKey: r.Evidence.LDevIDKey,
		}, nil
	})
}

// again runs every transaction twice and keeps the second: what an engine does
// that detects a conflict late.
type again struct{ store.Store }

var errAgain = errors.New("once more")

func (a again) Update(ctx context.Context, f func(store.Tx) error) error {
	err := a.Store.Update(ctx, func(t store.Tx) error { return errors.Join(f(t), errAgain) })
	if !errors.Is(err, errAgain) {
		return err
	}
	return a.Store.Update(ctx, f)
}

// TestActsRunAgain: no transaction of an act does harm by running twice, and
// its results are those of the second run.
func TestActsRunAgain(t *testing.T) {
	h := newHarness(t, t.TempDir())
	w := h.s.store.(*watched)
	w.Store = again{w.Store}
	h.scribe = &h.s.scribe
	ctx := context.Background()
	for i, name := range []string{"a", "b", "c"} {
		r, err := h.File(ctx, servicetest.Filing(name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "c" {
			if err := h.Reject(r.ID, r.Revision); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := h.Approve(r.ID, r.Revision); err != nil {
			t.Fatal(err)
		}
		out, err := h.issueNow(r.ID, fmt.Sprintf("0a0%d", i))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range []func(fleet.NodeID) error{h.Deny, h.Allow} {
			if err := f(r.Node); err != nil {
				t.Fatal(err)
			}
		}
		if len(out.Documents) == 0 {
			t.Error("no documents came with the certificate")
		}
	}
	h.sound(t)
	var sites []fleet.Site
	if err := h.store.View(ctx, func(tx store.Reader) (err error) {
		sites, err = tx.Sites(DefaultTenant, "", 10)
		return err
	}); err != nil || len(sites) != 1 {
		t.Fatal(sites, err)
	}
	if e := h.s.sites.get(DefaultTenant, sites[0].Name); e.revision != sites[0].Revision || e.documents != sites[0].Ledger.Documents {
		t.Errorf("memory says %+v, the database %+v", e, sites[0])
	}
}

func TestEnrollmentStore(t *testing.T) {
	servicetest.Run(t, func(t *testing.T) servicetest.Harness {
		h := newHarness(t, t.TempDir())
		t.Cleanup(func() { h.sound(t) })
		return h
	})
}
