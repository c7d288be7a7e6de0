// Package storetest says by tests how a store.Store must behave. Every
// implementation passes the same suite.
package storetest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// Start is the time in the suite's objects.
var Start = time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)

// Ring is the number of events that the store under test must keep.
const Ring = 50

// Open opens the store at a place; opened there again after Close it must
// hold what it held. Its ring of events has the size Ring.
type Open func(t testing.TB, place string) store.Store

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		run  func(*suite)
	}{
		{"when nothing is there then ErrNotFound", (*suite).empty},
		{"when objects are written then they are read as they were, also after reopening", (*suite).objects},
		{"when a credential is used, revoked or expires then that is kept; a log-in is taken once", (*suite).credentials},
		{"when an object was written since it was read then ErrConflict", (*suite).conflicts},
		{"when a key is taken then ErrExists", (*suite).taken},
		{"when a node would have two live requests then ErrConflict", (*suite).oneLive},
		{"when an update fails then nothing of it is there", (*suite).rollback},
		{"when an update panics then nothing of it is there and the store works", (*suite).panics},
		{"when another tenant asks then it sees nothing", (*suite).tenants},
		{"when a tenant was a lab then it stays one", (*suite).lab},
		{"when many write at once then every write counts once", (*suite).concurrent},
		{"when a reader looks then it sees one moment", (*suite).snapshot},
		{"when the ring is full then the oldest events go", (*suite).ring},
		{"when records are added then the chain holds", (*suite).chain},
		{"when somebody searches by prefix then IDs and words are found", (*suite).find},
		{"when there are many requests then pages show each once", (*suite).pages},
		{"when the queue is read then in its order, page by page", (*suite).queue},
		{"when EKs are listed then their lines are found by them", (*suite).listed},
		{"when there is a claim code then it is found by its hash alone", (*suite).claims},
		{"when a pre-approval is used then never more than it may be", (*suite).uses},
		{"when denied then every EK is, until allowed", (*suite).denials},
		{"when seen later then last-seen moves, and never back", (*suite).touch},
		{"when versions are given out then each once, also after reopening", (*suite).versions},
		{"when a site has documents then its nodes' are found by version", (*suite).documentsOfSite},
		{"when a node has an in-site address then nobody else gets it", (*suite).addresses},
		{"when a node reports then its last word is kept", (*suite).reports},
		{"when there are orders then those that stand are found", (*suite).orders},
		{"when blobs are in escrow then each tenant sees its own", (*suite).escrow},
		{"when a site has nodes then they are found by it and by key", (*suite).nodesOfSite},
		{"when a backup was restored then versions outrank all before", (*suite).epochs},
		{"when there are stacks, systems and rollouts then each tenant has its own, and nothing is overwritten", (*suite).stacks},
		{"when the context has ended then nothing is written", (*suite).context},
	} {
		t.Run(c.name, func(t *testing.T) {
			place := t.TempDir()
			s := &suite{T: t, place: place, open: open, store: open(t, place)}
			t.Cleanup(func() {
				if err := s.store.Close(); err != nil {
					t.Error(err)
				}
			})
			s.update(func(tx store.Tx) error {
				for _, n := range []string{"one", "two"} {
					if _, err := tx.PutTenant(Tenant(n)); err != nil {
						return err
					}
				}
				return nil
			})
			c.run(s)
		})
	}
}

type suite struct {
	*testing.T
	place string
	open  Open
	store store.Store
}

func (s *suite) reopen() {
	s.Helper()
	if err := s.store.Close(); err != nil {
		s.Fatal(err)
	}
	s.store = s.open(s, s.place)
}

func (s *suite) update(f func(store.Tx) error) {
	s.Helper()
	if err := s.store.Update(context.Background(), f); err != nil {
		s.Fatal(err)
	}
}

func (s *suite) view(f func(store.Reader) error) {
	s.Helper()
	if err := s.store.View(context.Background(), f); err != nil {
		s.Fatal(err)
	}
}

// want fails unless an update gives this error.
func (s *suite) want(want error, f func(store.Tx) error) {
	s.Helper()
	if err := s.store.Update(context.Background(), f); !errors.Is(err, want) {
		s.Errorf("got %v, want %v", err, want)
	}
}

func hash(text string) [32]byte { return sha256.Sum256([]byte(text)) }

// Tenant, Site, Node, Request and Image make objects for tests.
func Tenant(name string) fleet.Tenant {
	return fleet.Tenant{Meta: fleet.Meta{Tenant: name, Name: name, Created: Start}}
}

// Site makes a site.
func Site(tenant, name string) fleet.Site {
	return fleet.Site{Meta: fleet.Meta{Tenant: tenant, Name: name, Labels: map[string]string{"a": "b"}, Created: Start}}
}

// Request makes the request of the machine whose TPM is called tpm, with
// evidence that differs by variant.
func Request(tenant, tpm, variant string) fleet.Request {
	ek := fleet.EKHash(hash("ek " + tpm))
	digest := hash(tpm + " " + variant)
	key := hash("key " + tpm)
	return fleet.Request{
		ID: fleet.RequestIDOf(digest), Tenant: tenant, Node: ek.NodeID(), Words: fleet.Words(ek.NodeID()),
		EvidenceDigest: digest, FirstSeen: Start, LastSeen: Start, Revision: 1, Warnings: []string{"w <&> \u202e \x1b"},
		Evidence: fleet.Evidence{EK: ek, LDevIDKey: key[:], Serial: "S-" + tpm, UUID: "U-" + tpm, PCRs: map[int]fleet.HexBytes{0: key[:]}},
		Clock:    fleet.TPMClock{Millis: 1 << 63, Resets: 3},
	}
}

// Node makes the node of that machine.
func Node(tenant, tpm string) fleet.Node {
	r := Request(tenant, tpm, "")
	return fleet.Node{
		ID: r.Node, Tenant: tenant, Words: r.Words, EK: r.Evidence.EK, LDevIDKey: r.Evidence.LDevIDKey, Request: r.ID,
		Created: Start, LastSeen: Start, Hardware: fleet.Hardware{Serial: "S-" + tpm, NICs: []fleet.NIC{{Name: "eth0", MAC: "52:54:00:00:00:01"}}},
	}
}

// Image makes an image.
func Image(tenant, version string) fleet.Image {
	h := hash(version)
	return fleet.Image{
		Tenant: tenant, Name: "recovery", Version: version, Kind: fleet.ImageRecovery, Arch: "amd64",
		SHA256: h[:], Size: 1, Authenticode: h[:], PCR11: h[:], Manifest: []byte("{}\xff"), Registered: Start,
	}
}

func (s *suite) empty() {
	id := Request("one", "a", "").ID
	ek := fleet.EKHash(hash("x"))
	s.view(func(t store.Reader) error {
		for what, get := range map[string]func() error{
			"tenant":       func() error { _, err := t.Tenant("none"); return err },
			"site":         func() error { _, err := t.Site("one", "x"); return err },
			"node":         func() error { _, err := t.Node("one", ek.NodeID()); return err },
			"request":      func() error { _, err := t.Request("one", id); return err },
			"issued":       func() error { _, err := t.Issued("one", id); return err },
			"image":        func() error { _, err := t.Image("one", "a", "b", "c"); return err },
			"denial":       func() error { _, err := t.Denial("one", ek); return err },
			"pre-approval": func() error { _, err := t.PreApproval("one", "x"); return err },
			"document":     func() error { _, err := t.Document("one", "admission", "x"); return err },
			"credential":   func() error { _, err := t.CredentialByHash(hash("x")); return err },
			"binding":      func() error { _, err := t.Binding("one", "x"); return err },
			"log-in":       func() error { _, err := t.Credential("x"); return err },
			"setting":      func() error { _, err := t.Setting("x"); return err },
		} {
			if err := get(); !errors.Is(err, store.ErrNotFound) {
				s.Errorf("%s: got %v, want ErrNotFound", what, err)
			}
		}
		if epoch, err := t.Epoch(); err != nil || epoch != 1 {
			s.Errorf("epoch %d, %v; want 1", epoch, err)
		}
		return nil
	})
	r := Request("one", "a", "")
	s.want(store.ErrConflict, func(t store.Tx) error { return t.PutRequest(r, 1) })
	r.Tenant = "none"
	s.want(store.ErrNotFound, func(t store.Tx) error { return t.AddRequest(r) })
	// The negative twin: in a tenant that is there it is written.
	r.Tenant = "one"
	s.want(nil, func(t store.Tx) error { return t.AddRequest(r) })
}

func (s *suite) objects() {
	request, node, site, image := Request("one", "a", ""), Node("one", "a"), Site("one", "shop"), Image("one", "1")
	issued := store.Issued{Tenant: "one", Request: request.ID, Node: node.ID, LDevIDKey: node.LDevIDKey, Serial: "0a", NotBefore: Start, NotAfter: Start.Add(time.Hour), Certificates: [][]byte{{0, 255}}, Documents: [][]byte{[]byte("{}")}}
	document := store.Document{Tenant: "one", Kind: "admission", Name: string(node.ID), Version: fleet.DocVersion{Epoch: 1, N: 2}, At: Start, Envelope: []byte(`{"a":1}`)}
	cookie := store.CookieKey{ID: 7, Created: Start, Sealed: []byte{1, 0, 2}}
	key := store.ReleaseKey{Tenant: "one", KeyID: "ab", PEM: "pem", Added: Start}
	s.update(func(t store.Tx) (err error) {
		if site, err = t.PutSite(site); err != nil {
			return err
		}
		if node, err = t.PutNode(node); err != nil {
			return err
		}
		_, err = t.AddReleaseKey(key)
		return errors.Join(err, t.AddRequest(request), t.AddIssued(issued), t.AddImage(image), t.AddDocument(document), t.AddCookieKey(cookie), t.PutSetting("k", "v"))
	})
	check := func() {
		s.Helper()
		s.view(func(t store.Reader) error {
			same(s, "site", site, first(t.Site("one", "shop")))
			same(s, "node", node, first(t.Node("one", node.ID)))
			same(s, "request", request, first(t.Request("one", request.ID)))
			same(s, "issued", issued, first(t.Issued("one", request.ID)))
			same(s, "issued to node", []store.Issued{issued}, first(t.IssuedToNode("one", node.ID)))
			same(s, "image", image, first(t.Image("one", "recovery", "1", "amd64")))
			same(s, "document", document, first(t.Document("one", "admission", string(node.ID))))
			same(s, "cookie keys", []store.CookieKey{cookie}, first(t.CookieKeys()))
			same(s, "release keys", []store.ReleaseKey{key}, first(t.ReleaseKeys("one")))
			same(s, "setting", "v", first(t.Setting("k")))
			same(s, "requests", []fleet.Request{request}, first(t.Requests("one", nil, 10)))
			same(s, "nodes", []fleet.Node{node}, first(t.Nodes("one", "", 10)))
			same(s, "sites", []fleet.Site{site}, first(t.Sites("one", "", 10)))
			same(s, "counts", map[fleet.RequestState]int{fleet.RequestPending: 1}, first(t.CountRequests("one")))
			same(s, "node counts", map[fleet.NodeState]int{fleet.NodeApproved: 1}, first(t.CountNodes("one")))
			return nil
		})
	}
	check()
	s.reopen()
	check()
}

type result[T any] struct {
	value T
	err   error
}

func first[T any](v T, err error) result[T] { return result[T]{v, err} }

func same[T any](t testing.TB, what string, want T, got result[T]) {
	t.Helper()
	if got.err != nil {
		t.Errorf("%s: %v", what, got.err)
	} else if d := cmp.Diff(want, got.value); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func (s *suite) conflicts() {
	site, node, request := Site("one", "shop"), Node("one", "a"), Request("one", "a", "")
	s.update(func(t store.Tx) (err error) {
		if site, err = t.PutSite(site); err != nil {
			return err
		}
		if node, err = t.PutNode(node); err != nil {
			return err
		}
		return t.AddRequest(request)
	})
	if site.Revision != 1 || node.Revision != 1 {
		s.Errorf("revisions of new objects: %d, %d", site.Revision, node.Revision)
	}
	newer := request
	newer.Revision = 2
	s.want(nil, func(t store.Tx) (err error) {
		if _, err = t.PutSite(site); err != nil {
			return err
		}
		if _, err = t.PutNode(node); err != nil {
			return err
		}
		return t.PutRequest(newer, 1)
	})
	s.want(store.ErrConflict, func(t store.Tx) error { _, err := t.PutSite(site); return err })
	s.want(store.ErrConflict, func(t store.Tx) error { _, err := t.PutNode(node); return err })
	s.want(store.ErrConflict, func(t store.Tx) error { return t.PutRequest(newer, 1) })
	// Neither the node nor the evidence of a request can be swapped.
	other := Request("one", "b", "")
	other.ID, other.Revision = request.ID, 3
	s.want(store.ErrConflict, func(t store.Tx) error { return t.PutRequest(other, 2) })
	newer.Revision = 2
	s.want(nil, func(t store.Tx) error { return t.PutRequest(newer, 2) })
}

func (s *suite) taken() {
	s.update(func(t store.Tx) error {
		_, err := t.PutSite(Site("one", "shop"))
		_, err2 := t.PutNode(Node("one", "a"))
		return errors.Join(err, err2, t.AddImage(Image("one", "1")), t.AddRequest(Request("one", "a", "")))
	})
	s.want(store.ErrExists, func(t store.Tx) error { _, err := t.PutTenant(Tenant("one")); return err })
	s.want(store.ErrExists, func(t store.Tx) error { _, err := t.PutSite(Site("one", "shop")); return err })
	s.want(store.ErrExists, func(t store.Tx) error { _, err := t.PutNode(Node("one", "a")); return err })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddImage(Image("one", "1")) })
	digest := Image("one", "1")
	digest.Version = "2"
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddImage(digest) })
	s.update(func(t store.Tx) error {
		for i, want := range []bool{true, false} {
			if added, err := t.AddReleaseKey(store.ReleaseKey{Tenant: "one", KeyID: "k"}); err != nil || added != want {
				s.Errorf("release key, time %d: %v, %v", i+1, added, err)
			}
		}
		return nil
	})
	// The same names in another tenant are other objects.
	s.want(nil, func(t store.Tx) error {
		_, err := t.PutSite(Site("two", "shop"))
		return errors.Join(err, t.AddImage(Image("two", "1")), t.AddRequest(Request("two", "a", "")))
	})
}

func (s *suite) oneLive() {
	s.update(func(t store.Tx) error { return t.AddRequest(Request("one", "a", "first")) })
	s.want(store.ErrConflict, func(t store.Tx) error { return t.AddRequest(Request("one", "a", "second")) })
	old := Request("one", "a", "first")
	old.State, old.Revision = fleet.RequestSuperseded, 2
	s.want(nil, func(t store.Tx) error {
		return errors.Join(t.PutRequest(old, 1), t.AddRequest(Request("one", "a", "second")))
	})
	old.State, old.Revision = fleet.RequestPending, 3
	s.want(store.ErrConflict, func(t store.Tx) error { return t.PutRequest(old, 2) })
}

func (s *suite) rollback() {
	broken := errors.New("broken")
	s.want(broken, func(t store.Tx) error {
		_, err := t.PutSite(Site("one", "shop"))
		_, err2 := t.AddAudit(Record("one", "shop"))
		_, err3 := t.AddEvent(Event("one", 1))
		return errors.Join(err, err2, err3, broken)
	})
	s.view(func(t store.Reader) error {
		same(s, "sites", []fleet.Site{}, first(t.Sites("one", "", 10)))
		same(s, "audit", []fleet.AuditRecord{}, first(t.Audit("one", 0, 10)))
		same(s, "events", []fleet.Event{}, first(t.Events("one", 0, 10)))
		return nil
	})
}

func (s *suite) panics() {
	func() {
		defer func() {
			if recover() == nil {
				s.Error("the panic was swallowed")
			}
		}()
		_ = s.store.Update(context.Background(), func(t store.Tx) error {
			if _, err := t.PutSite(Site("one", "shop")); err != nil {
				return err
			}
			panic("test")
		})
	}()
	s.view(func(t store.Reader) error {
		same(s, "sites", []fleet.Site{}, first(t.Sites("one", "", 10)))
		return nil
	})
	s.want(nil, func(t store.Tx) error { _, err := t.PutSite(Site("one", "shop")); return err })
}

func (s *suite) tenants() {
	s.update(func(t store.Tx) error {
		_, err := t.PutSite(Site("one", "shop"))
		_, err2 := t.PutNode(Node("one", "a"))
		_, err3 := t.AddAudit(Record("one", "x"))
		_, err4 := t.AddEvent(Event("one", 1))
		r := Request("one", "a", "")
		return errors.Join(err, err2, err3, err4, t.AddRequest(r), t.AddImage(Image("one", "1")),
			t.PutDenial(store.Denial{Tenant: "one", EK: r.Evidence.EK, Node: r.Node}))
	})
	r := Request("one", "a", "")
	for _, tenant := range []string{"one", "two"} {
		s.view(func(t store.Reader) error {
			n := 0
			count := func(k int, err error) {
				if err != nil {
					s.Error(err)
				}
				n += k
			}
			sites, err := t.Sites(tenant, "", 9)
			count(len(sites), err)
			nodes, err := t.Nodes(tenant, "", 9)
			count(len(nodes), err)
			requests, err := t.Requests(tenant, nil, 9)
			count(len(requests), err)
			ofNode, err := t.RequestsOfNode(tenant, r.Node)
			count(len(ofNode), err)
			alike, err := t.LookAlikes(tenant, Request(tenant, "b", "").Node, "S-a", "", 9)
			count(len(alike), err)
			found, err := t.FindRequests(tenant, "r-", 9)
			count(len(found), err)
			images, err := t.Images(tenant)
			count(len(images), err)
			denials, err := t.Denials(tenant)
			count(len(denials), err)
			records, err := t.Audit(tenant, 0, 9)
			count(len(records), err)
			events, err := t.Events(tenant, 0, 9)
			count(len(events), err)
			want := 10
			if tenant == "two" {
				want = 0
			}
			if n != want {
				s.Errorf("tenant %s sees %d objects, want %d", tenant, n, want)
			}
			return nil
		})
	}
}

func (s *suite) lab() {
	s.update(func(t store.Tx) error {
		v, err := t.Tenant("one")
		if err != nil {
			return err
		}
		v.Lab = true
		if v, err = t.PutTenant(v); err != nil {
			return err
		}
		v.Lab = false
		_, err = t.PutTenant(v)
		return err
	})
	s.view(func(t store.Reader) error {
		one, err := t.Tenant("one")
		two, err2 := t.Tenant("two")
		if !one.Lab || two.Lab || one.Revision != 3 {
			s.Errorf("lab: %v and %v, revision %d", one.Lab, two.Lab, one.Revision)
		}
		return errors.Join(err, err2)
	})
}

func (s *suite) concurrent() {
	const writers, each = 8, 20
	var group sync.WaitGroup
	errs := make([]error, writers)
	for w := range writers {
		group.Go(func() {
			for i := range each {
				errs[w] = errors.Join(errs[w], s.store.Update(context.Background(), func(t store.Tx) error {
					if _, err := t.AddAudit(Record("one", fmt.Sprintf("%d-%d", w, i))); err != nil {
						return err
					}
					_, err := t.NextVersion()
					return err
				}))
			}
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		s.Fatal(err)
	}
	s.view(func(t store.Reader) error {
		records, err := t.Audit("one", 0, 1000)
		if len(records) != writers*each {
			s.Errorf("%d records, want %d", len(records), writers*each)
		}
		seen := make(map[string]bool)
		for _, r := range records {
			if seen[r.Object] {
				s.Errorf("%s is there twice", r.Object)
			}
			seen[r.Object] = true
		}
		return errors.Join(err, audit.Verify(records))
	})
}

func (s *suite) snapshot() {
	s.view(func(t store.Reader) error {
		before, err := t.Sites("one", "", 9)
		if err != nil {
			return err
		}
		s.update(func(t store.Tx) error { _, err := t.PutSite(Site("one", "shop")); return err })
		after, err := t.Sites("one", "", 9)
		if len(before) != 0 || len(after) != 0 {
			s.Errorf("one view saw %d, then %d sites", len(before), len(after))
		}
		return err
	})
	s.view(func(t store.Reader) error {
		sites, err := t.Sites("one", "", 9)
		if len(sites) != 1 {
			s.Errorf("the next view saw %d sites", len(sites))
		}
		return err
	})
}

// Record and Event make journal entries.
func Record(tenant, object string) fleet.AuditRecord {
	return fleet.AuditRecord{Tenant: tenant, Time: Start, Actor: "user:test", Kind: audit.SiteCreated, Object: "site/" + object, After: []byte(`{"a": "<b>"}`), Reason: "why"}
}

// Event makes an event.
func Event(tenant string, n int) fleet.Event {
	return fleet.Event{Tenant: tenant, Time: Start, Kind: "test.event", Text: fmt.Sprint(n), Fields: map[string]string{"k": "v"}}
}

func (s *suite) ring() {
	s.update(func(t store.Tx) error {
		for i := range 2 * Ring {
			e, err := t.AddEvent(Event("one", i))
			if err != nil || e.Seq != uint64(i+1) {
				return fmt.Errorf("event %d has number %d: %w", i, e.Seq, err)
			}
		}
		_, err := t.AddEvent(Event("two", 0))
		return err
	})
	s.reopen()
	s.view(func(t store.Reader) error {
		events, err := t.Events("one", 0, 1000)
		if len(events) != Ring || events[0].Seq != Ring+1 || events[0].Text != fmt.Sprint(Ring) || events[0].Fields["k"] != "v" {
			s.Errorf("%d events, the first is %+v", len(events), events[0])
		}
		some, err2 := t.Events("one", 2*Ring-3, 2)
		if len(some) != 2 || some[0].Seq != 2*Ring-2 {
			s.Errorf("events after %d: %+v", 2*Ring-3, some)
		}
		last, err3 := t.LastEvent("one")
		two, err4 := t.LastEvent("two")
		if last != 2*Ring || two != 1 {
			s.Errorf("last events are %d and %d", last, two)
		}
		return errors.Join(err, err2, err3, err4)
	})
}

func (s *suite) chain() {
	for i := range 5 {
		s.update(func(t store.Tx) error {
			_, err := t.AddAudit(Record("one", fmt.Sprint(i)))
			_, err2 := t.AddAudit(Record("two", fmt.Sprint(i)))
			return errors.Join(err, err2)
		})
		s.reopen()
	}
	s.view(func(t store.Reader) error {
		records, err := t.Audit("one", 0, 100)
		page, err2 := t.Audit("one", 3, 1)
		if len(records) != 5 || len(page) != 1 || page[0].Seq != 4 {
			s.Errorf("%d records, page %+v", len(records), page)
		}
		if err := audit.Verify(records); err != nil {
			s.Error(err)
		}
		records[2].Reason = "another"
		if audit.Verify(records) == nil {
			s.Error("a changed record was not noticed")
		}
		return errors.Join(err, err2)
	})
	s.want(nil, func(t store.Tx) error {
		if _, err := t.AddAudit(fleet.AuditRecord{Tenant: "one", Kind: "no.such"}); err == nil {
			s.Error("a record of no known kind was taken")
		}
		return nil
	})
}

func (s *suite) find() {
	a, b := Request("one", "a", ""), Request("one", "b", "")
	old := Request("one", "a", "old")
	old.State = fleet.RequestSuperseded
	s.update(func(t store.Tx) error {
		_, err := t.PutNode(Node("one", "a"))
		return errors.Join(err, t.AddRequest(old), t.AddRequest(a), t.AddRequest(b))
	})
	s.view(func(t store.Reader) error {
		for _, c := range []struct {
			prefix string
			want   []fleet.RequestID
		}{
			{string(a.ID), []fleet.RequestID{a.ID}}, {string(a.ID)[:9], []fleet.RequestID{a.ID}},
			{a.Words, []fleet.RequestID{a.ID, old.ID}}, {strings.Fields(b.Words)[0], []fleet.RequestID{b.ID}},
			{string(b.Node), []fleet.RequestID{b.ID}}, {"zzz", nil}, {"r-%", nil}, {"_", nil},
		} {
			got, err := t.FindRequests("one", c.prefix, 9)
			if err != nil || fmt.Sprint(got) != fmt.Sprint(c.want) {
				s.Errorf("%q: %v, %v; want %v", c.prefix, got, err, c.want)
			}
		}
		ids, err := t.FindNodes("one", a.Words, 9)
		if len(ids) != 1 || ids[0] != a.Node {
			s.Errorf("node by words: %v", ids)
		}
		pending := fleet.RequestPending
		some, err2 := t.Requests("one", &pending, 1)
		if len(some) != 1 {
			s.Errorf("pending: %d", len(some))
		}
		return errors.Join(err, err2)
	})
}

func (s *suite) denials() {
	a, b := fleet.EKHash(hash("a")), fleet.EKHash(hash("b"))
	for _, ek := range []fleet.EKHash{a, b} {
		s.update(func(t store.Tx) error {
			return t.PutDenial(store.Denial{Tenant: "one", EK: ek, Node: a.NodeID(), Reason: "r", Actor: "user:x", At: Start})
		})
	}
	s.view(func(t store.Reader) error {
		same(s, "denial", store.Denial{Tenant: "one", EK: b, Node: a.NodeID(), Reason: "r", Actor: "user:x", At: Start}, first(t.Denial("one", b)))
		return nil
	})
	s.update(func(t store.Tx) error { return t.RemoveDenials("one", b.NodeID()) })
	s.view(func(t store.Reader) error { _, err := t.Denial("one", b); return err })
	s.update(func(t store.Tx) error { return t.RemoveDenials("one", a.NodeID()) })
	s.view(func(t store.Reader) error {
		same(s, "denials", []store.Denial{}, first(t.Denials("one")))
		return nil
	})
}

func (s *suite) touch() {
	n := Node("one", "a")
	s.update(func(t store.Tx) (err error) { n, err = t.PutNode(n); return err })
	for _, d := range []time.Duration{time.Hour, time.Minute} {
		s.update(func(t store.Tx) error { return t.TouchNode("one", n.ID, Start.Add(d)) })
	}
	s.view(func(t store.Reader) error {
		got, err := t.Node("one", n.ID)
		if !got.LastSeen.Equal(Start.Add(time.Hour)) || got.Revision != n.Revision {
			s.Errorf("last seen %s, revision %d", got.LastSeen, got.Revision)
		}
		return err
	})
}

func (s *suite) versions() {
	for n := range uint64(3) {
		s.update(func(t store.Tx) error {
			v, err := t.NextVersion()
			if v != (fleet.DocVersion{Epoch: 1, N: n + 1}) {
				s.Errorf("version %s", v)
			}
			return err
		})
		s.reopen()
	}
}

func (s *suite) context() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.store.Update(ctx, func(t store.Tx) error { _, err := t.PutSite(Site("one", "shop")); return err }); err == nil {
		s.Error("no error")
	}
	s.view(func(t store.Reader) error {
		same(s, "sites", []fleet.Site{}, first(t.Sites("one", "", 9)))
		return nil
	})
}
